"""Lazy initialisation of a large dictionary gives the weights of eager initialisation."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_sae
from lightning_sae import GatedSAE, JumpReLUSAE, ReLUSAE, TiedSAE, TopKSAE
from lightning_sae.architectures import SparseAutoencoder, initial
from lightning_sae.distributed.parts import Parts
from lightning_sae.distributed.split import keep_own_part
from lightning_sae.distributed.undrawn import Undrawn, without_drawing
from lightning_sae.functional import directions
from lightning_sae.functional.directions import RandomUnitRows


class Second(Parts):
    """The second part of three, alone in its process."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.index = 3, 1

    def as_first(self, value: Tensor) -> Tensor:
        return value


KINDS: list[Callable[..., Any]] = [ReLUSAE, TiedSAE, GatedSAE, JumpReLUSAE, TopKSAE]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """Initialises every dictionary lazily, and records which latents are drawn."""
    found: list[range] = []
    draw = RandomUnitRows.draw

    def noted(self: RandomUnitRows, wanted: range) -> Any:
        found.append(wanted)
        return draw(self, wanted)

    monkeypatch.setattr(RandomUnitRows, "draw", noted)
    monkeypatch.setattr(initial, "LARGE", 0)
    monkeypatch.setattr(directions, "PIECE", 128)
    return found


def at_once(kind: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> SparseAutoencoder:
    with monkeypatch.context() as patch:
        patch.setattr(initial, "LARGE", 2**28)
        torch.manual_seed(5)
        return kind(8, 96)


def later(kind: Callable[..., Any]) -> SparseAutoencoder:
    torch.manual_seed(5)
    return kind(8, 96)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [False, True])
def test_rows_start_at_the_norm_that_is_given_in_the_same_directions(
    kind: Callable[..., Any], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoder and decoder both, so that they start as each other's transpose."""
    monkeypatch.setattr(initial, "LARGE", 0 if large else 2**28)
    unit, short = (seeded(kind, decoder_init_norm=norm) for norm in (1.0, 0.1))
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(96))
    torch.testing.assert_close(short.W_dec, 0.1 * unit.W_dec)
    torch.testing.assert_close(short.W_enc, short.W_dec.T)


def seeded(kind: Callable[..., Any], **arguments: Any) -> SparseAutoencoder:
    torch.manual_seed(5)
    return kind(8, 96, decoder_norm="free", **arguments)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_norm_of_no_row_is_refused(norm: float) -> None:
    with pytest.raises(ValueError, match="`decoder_init_norm` to be"):
        ReLUSAE(4, 6, decoder_norm="free", decoder_init_norm=norm)


def test_another_norm_needs_free_rows() -> None:
    with pytest.raises(ValueError, match='`decoder_init_norm` to be 1 with `decoder_norm="unit"`'):
        ReLUSAE(4, 6, decoder_init_norm=0.1)


USES: dict[str, Callable[[SparseAutoencoder], Any]] = {
    "state_dict": lambda sae: sae.state_dict(),
    "W_dec": lambda sae: sae.W_dec,
    "parameters": lambda sae: list(sae.parameters()),
    "forward": lambda sae: sae(torch.zeros(1, 8)),
    "optimizer": lambda sae: sae.configure_optimizers(),
    "dict": lambda sae: dict(sae._parameters),
    "to": lambda sae: sae.to("cpu"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", USES)
def test_whoever_asks_gets_the_values_of_drawing_at_once(
    kind: Callable[..., Any], use: str, drawn: list[range], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bit for bit, with the same order and strides, and drawn only once."""
    expected = at_once(kind, monkeypatch)
    after = torch.get_rng_state()
    sae = later(kind)
    assert torch.equal(torch.get_rng_state(), after)
    assert drawn == []
    USES[use](sae)
    assert drawn == [range(96)]
    found, state = sae.state_dict(), expected.state_dict()
    assert list(found) == list(state)
    for name, weight in state.items():
        assert torch.equal(found[name], weight)
        assert found[name].stride() == weight.stride()
    assert drawn == [range(96)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sae: pickle.loads(pickle.dumps(sae))])
def test_copies_have_the_values(
    copied: Callable[..., Any], drawn: list[range], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = at_once(TopKSAE, monkeypatch).state_dict()
    sae = copied(later(TopKSAE))
    assert not isinstance(sae._parameters, Undrawn)
    assert all(torch.equal(sae.state_dict()[name], weight) for name, weight in state.items())


def test_a_subclass_may_change_what_is_drawn(
    drawn: list[range], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subclass may change weights in place, replace them or freeze them in its constructor."""

    class Halved(ReLUSAE):
        def __init__(self, d_in: int, d_sae: int) -> None:
            super().__init__(d_in, d_sae)
            self.W_dec.data *= 0.5

    class Own(ReLUSAE):
        def __init__(self, d_in: int, d_sae: int) -> None:
            super().__init__(d_in, d_sae)
            self.W_enc = nn.Parameter(torch.ones(d_in, d_sae), requires_grad=False)

    for kind in (Halved, Own):
        expected, sae = at_once(kind, monkeypatch), later(kind)
        for (name, weight), (_, found) in zip(
            expected.named_parameters(), sae.named_parameters(), strict=True
        ):
            assert torch.equal(found, weight), name
            assert found.requires_grad == weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_draws_its_own_latents_alone(
    kind: Callable[..., Any], drawn: list[range], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, sae, second = at_once(kind, monkeypatch), later(kind), Second()
    keep_own_part(expected, second, torch.device("cpu"))
    keep_own_part(sae, second, torch.device("cpu"))
    assert drawn == [range(32, 64)]
    for name, weight in expected.state_dict().items():
        assert torch.equal(sae.state_dict()[name], weight)
        assert sae.state_dict()[name].stride() == weight.stride()


def test_what_is_loaded_is_not_drawn(drawn: list[range], tmp_path: Path) -> None:
    sae = later(GatedSAE)
    sae.save_pretrained(tmp_path / "sae")
    drawn.clear()
    loaded = lightning_sae.load(tmp_path / "sae")
    assert drawn == []
    x = torch.randn(4, 8)
    assert torch.equal(loaded(x), sae(x))


def test_shapes_are_known_without_values(drawn: list[range]) -> None:
    sae = later(TopKSAE)
    sae.b_enc.data += 1
    with without_drawing(sae):
        shapes = {name: tuple(weight.shape) for name, weight in sae.named_parameters()}
        assert sae.W_dec.is_meta
        sae.W_enc.requires_grad_(False)
    assert shapes == {"W_enc": (8, 96), "W_dec": (96, 8), "b_enc": (96,), "b_dec": (8,)}
    assert drawn == []
    assert not sae.W_dec.is_meta
    assert [sae.W_enc.requires_grad, sae.W_dec.requires_grad] == [False, True]


def test_a_parameter_that_was_replaced_is_not_drawn(drawn: list[range]) -> None:
    sae = later(TopKSAE)
    sae._parameters["W_enc"] = nn.Parameter(torch.ones(8, 96))
    del sae._parameters["b_enc"]
    assert drawn == []
    assert not sae.W_dec.is_meta
    assert torch.equal(sae.W_enc, torch.ones(8, 96))
    assert list(dict(sae.named_parameters())) == ["W_enc", "W_dec", "b_dec"]


def test_small_dictionaries_are_drawn_at_once() -> None:
    assert type(TopKSAE(8, 96)._parameters) is dict


def test_weights_without_memory_stay_so(drawn: list[range]) -> None:
    """An SAE on `meta` draws nothing and leaves torch's random generator as it was."""
    before = torch.get_rng_state()
    with torch.device("meta"):
        sae = TopKSAE(8, 96)
    assert sae.W_dec.is_meta
    assert torch.equal(torch.get_rng_state(), before)
