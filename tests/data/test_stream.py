from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sae.data.language_model import LanguageModel
from lightning_sae.data.notices import unknown_token
from lightning_sae.data.stream import ActivationFilter, ActivationStream
from lightning_sae.data.tokens import TokenBlocks

BOS = 0


class Repeats(LanguageModel):
    """A model whose activation at a token is (token, 10 x token)."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def activations(self, tokens: Tensor) -> Tensor:
        return torch.stack([tokens, 10 * tokens], dim=-1).to(self.dtype)


class Counts(TokenBlocks):
    """Blocks of four tokens: BOS and the next three numbers."""

    def __init__(self) -> None:
        self.next = 1
        self.epoch, self.skipped = 2, 5

    def read(self, n: int) -> Tensor:
        numbers = torch.arange(self.next, self.next + 3 * n).view(n, 3)
        self.next += 3 * n
        return torch.cat([torch.full((n, 1), BOS), numbers], dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def of_norms(*norms: float) -> Tensor:
    """One block of activations with these norms."""
    return torch.tensor(norms)[None, :, None] * torch.tensor([0.6, 0.8])


def test_activations_that_are_not_finite_are_left_out_with_the_outliers() -> None:
    activations = of_norms(1.0, 2.0, float("nan"), 3.0, 100.0, float("inf"))
    tokens = torch.ones(1, 6, dtype=torch.long)
    kept = ActivationFilter([], max_norm_multiple=5.0).kept(tokens, activations)
    assert kept.tolist() == [[1, 1, 0, 1, 0, 0]]


def test_multiple_of_the_median_must_be_more_than_one() -> None:
    with pytest.raises(ValueError, match="`max_norm_multiple` to be more than 1"):
        ActivationFilter([], max_norm_multiple=0.5)


def test_special_tokens_are_left_out() -> None:
    tokens = torch.tensor([[0, 5, 7], [7, 7, 1]])
    keep = ActivationFilter([0, 7])
    assert keep.kept(tokens, torch.ones(2, 3, 2)).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert ActivationFilter([]).kept(tokens, torch.ones(2, 3, 2)).all()


@pytest.mark.parametrize(
    ("positions", "expected"),
    [((1, 3), [0, 1, 1, 0]), ((0, 4), [1, 1, 1, 1]), ((2, 99), [0, 0, 1, 1])],
)
def test_positions_before_the_first_and_from_the_end_on_are_left_out(
    positions: tuple[int, int], expected: list[int]
) -> None:
    tokens = torch.arange(8).view(2, 4)
    kept = ActivationFilter([], positions).kept(tokens, torch.ones(2, 4, 2))
    assert kept.tolist() == [expected, expected]


def test_norms_beyond_the_multiple_of_the_median_are_left_out() -> None:
    tokens = torch.arange(1, 6)[None]
    keep = ActivationFilter([], max_norm_multiple=2.5)
    kept = keep.kept(tokens, of_norms(2.0, 4.9, 0.1, 5.1, 1.0))  # the median is 2
    assert kept.tolist() == [[1, 1, 1, 0, 1]]


def test_the_median_is_that_of_what_the_other_reasons_keep() -> None:
    tokens = torch.tensor([[0, 0, 1, 2, 3, 4]])
    keep = ActivationFilter([0], (0, 5), max_norm_multiple=2.0)
    # Without the rule the median would be 8 or more, and the norm of 5 would pass.
    activations = of_norms(99.0, 99.0, 1.0, 2.0, 5.0, 8.0)
    left_out = {k: v[0].tolist() for k, v in keep.left_out(tokens, activations).items()}
    assert left_out == {
        "special_token": [1, 1, 0, 0, 0, 0],
        "position": [0, 0, 0, 0, 0, 1],
        "norm": [1, 1, 0, 0, 1, 1],
        "context_only": [0, 0, 0, 0, 0, 0],
    }
    assert keep.kept(tokens, activations).tolist() == [[0, 0, 1, 1, 0, 0]]


def test_a_batch_of_special_tokens_alone_has_no_median_and_gives_nothing() -> None:
    keep = ActivationFilter([0], max_norm_multiple=2.0)
    assert not keep.kept(torch.zeros(1, 3, dtype=torch.long), of_norms(1.0, 2.0, 9.0)).any()


def test_rows_come_in_the_order_of_the_text_without_those_left_out() -> None:
    stream = ActivationStream(Repeats(), Counts(), ActivationFilter([BOS, 5]), 2)
    rows = torch.cat([stream.read(), stream.read()])
    numbers = [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert rows.tolist() == [[n, 10 * n] for n in numbers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_dtype_asked_for(dtype: torch.dtype) -> None:
    stream = ActivationStream(Repeats(torch.float16), Counts(), ActivationFilter([]), 1, dtype)
    assert stream.read().dtype == dtype


def test_the_shares_left_out_are_counted_by_reason() -> None:
    keep = ActivationFilter([BOS, 2], (0, 3), max_norm_multiple=1.8)
    stream = ActivationStream(Repeats(), Counts(), keep, 2)
    assert stream.statistics() == {
        "seen": 0.0,
        "text_epoch": 2.0,
        "skipped_rows": 5.0,
        "dropped_special_token": 0.0,
        "dropped_position": 0.0,
        "dropped_norm": 0.0,
        "dropped_context_only": 0.0,
    }
    # Blocks 0 1 2 3 and 0 4 5 6: of 1, 4 and 5 the median is 4, and no norm is beyond 7.2.
    stream.read()
    assert stream.statistics() == {
        "seen": 8.0,
        "text_epoch": 2.0,
        "skipped_rows": 5.0,
        "dropped_special_token": 3 / 8,
        "dropped_position": 2 / 8,
        "dropped_norm": 0.0,
        "dropped_context_only": 0.0,
    }
    keep.max_norm_multiple = 1.1
    # Blocks 0 7 8 9 and 0 10 11 12: of 7, 8, 10 and 11 the (lower) median is 8; 9 to 12 are beyond.
    stream.read()
    assert stream.statistics()["dropped_norm"] == 4 / 16


def test_a_stream_goes_on_from_its_state_with_its_counts() -> None:
    stream = ActivationStream(Repeats(), Counts(), ActivationFilter([BOS]), 2)
    stream.read()
    state = stream.state_dict()
    expected, statistics = stream.read(), stream.statistics()
    resumed = ActivationStream(Repeats(), Counts(), ActivationFilter([BOS]), 2)
    resumed.load_state_dict(state)
    assert resumed.statistics()["seen"] == 8.0
    assert torch.equal(resumed.read(), expected)
    assert resumed.statistics() == statistics


class Passes(Counts):
    """Twelve tokens in a pass over the text, three blocks of which a read gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = self.left_at_end = 0

    def read(self, n: int) -> Tensor:
        self.epoch = (self.next - 1) // 9
        return super().read(n)


@pytest.mark.parametrize(
    ("wanted", "reads", "said"),
    [(27, 20, ""), (28, 3, ""), (28, 4, "about 3.11 times"), (90, 20, "about 10 times"),
     (None, 9, ""), (None, 10, "read 3 times"), (None, 30, "read 3 times")],
)  # fmt: skip
def test_more_than_three_passes_over_the_text_are_said_once_and_as_soon_as_known(
    caplog: pytest.LogCaptureFixture, wanted: float | None, reads: int, said: str
) -> None:
    # Of 12 tokens in a pass 3 are BOS, so 9 rows come of it; the fourth read begins the second.
    keep = ActivationFilter([BOS])
    stream = ActivationStream(Repeats(), Passes(), keep, 1, wanted=wanted)
    for _ in range(reads):
        stream.read()
    messages = [message for message in caplog.messages if "a pass over it gives about" in message]
    assert len(messages) == bool(said)
    assert all(said in message for message in messages)


def test_the_share_of_unknown_tokens_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    stream = ActivationStream(Repeats(), Counts(), ActivationFilter([BOS]), 2, unknown_token=5)
    stream.say_unknown()
    assert not caplog.messages
    stream.read()  # 0 1 2 3 and 0 4 5 6
    stream.say_unknown()
    stream.say_unknown()
    (message,) = caplog.messages
    assert "first 8 tokens of the training text 1 (12 %)" in message


class Tokenizer:
    """What a tokenizer says of its special tokens."""

    def __init__(self, unknown: int | None, bos: int | None, eos: int | None) -> None:
        self.unk_token_id, self.bos_token_id, self.eos_token_id = unknown, bos, eos


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(None, None), (Tokenizer(None, 1, 2), None), (Tokenizer(0, 1, 2), 0),
     (Tokenizer(0, 0, 2), None), (Tokenizer(2, 1, 2), None), (Tokenizer(0, None, None), 0)],
)  # fmt: skip
def test_an_unknown_token_that_also_bounds_documents_is_not_counted(
    tokenizer: Tokenizer | None, expected: int | None
) -> None:
    assert unknown_token(tokenizer) == expected
