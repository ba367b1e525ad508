from itertools import chain
from typing import Any

import pytest
import torch

from lightning_sae.data.documents import Document, named
from lightning_sae.data.encoding import Encoder, Marks, Unreadable, ids_of

TEXT = named("abc")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}"
)


class Letters:
    """A fast tokenizer whose tokens are code points; `puts` come first unless told otherwise."""

    is_fast = True
    chat_template: str | None = TEMPLATE

    def __init__(self, bos: int | None, eos: int | None, puts: list[int] = []) -> None:  # noqa: B006
        self.bos_token_id, self.eos_token_id, self.puts = bos, eos, puts

    def __call__(
        self,
        text: str,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> dict[str, list[Any]]:
        return {
            "input_ids": self.puts * add_special_tokens + [ord(letter) for letter in text],
            "offset_mapping": [(i, i + 1) for i in range(len(text))],
        }

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        from jinja2 import Environment, TemplateError

        def refuse(why: str) -> None:
            raise TemplateError(why)

        template = Environment().from_string(self.chat_template or "")
        return template.render(messages=messages, raise_exception=refuse)


def tokens_of(encoder: Encoder, content: Any) -> list[int]:
    return [*chain(*encoder.pieces(Document("", content, "row 7")))]


@pytest.mark.parametrize(
    ("tokenizer", "marks"),
    [
        (Letters(1, 2, puts=[1]), ([1], [])),  # Llama, Gemma: the tokenizer puts BOS first
        (Letters(3, 3), ([3], [])),  # GPT-2, NeoX: one token is both
        (Letters(None, 2), ([], [2])),  # Qwen: no BOS, so documents are only kept apart
        (Letters(1, 2), ([], [2])),  # BLOOM: a BOS that texts do not begin with
    ],
)
def test_by_default_texts_begin_as_the_tokenizer_has_it(
    tokenizer: Letters, marks: tuple[list[int], list[int]]
) -> None:
    encoder = Encoder(tokenizer)
    assert encoder.marks(TEXT) == marks
    assert encoder.marks(named([5, 6])) == ([], [])
    assert encoder.marks(named([{"role": "user", "content": "a"}])) == ([], [])
    words = {(True, False): ("bos", "none"), (False, True): ("none", "eos")}
    start, separator = words[bool(marks[0]), bool(marks[1])]
    assert encoder.described() == {
        "document_start": f"auto ({start} before texts)",
        "separator": f"auto ({separator} between texts)",
    }


def test_marks_are_what_the_user_says_for_every_kind_of_row() -> None:
    encoder = Encoder(Letters(1, 2, puts=[1]), "eos", "\n\n")
    for content in ("abc", [5, 6], [{"role": "user", "content": "a"}]):
        assert encoder.marks(named(content)) == Marks([2], [10, 10])
    assert Encoder(Letters(1, 2), "none", "none").marks(TEXT) == ([], [])
    assert Encoder(Letters(1, 2), "bos", "eos").marks(TEXT) == ([1], [2])
    assert encoder.described() == {"document_start": "eos", "separator": "\n\n"}


def test_a_mark_that_the_tokenizer_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="`document_start` to be a token .* got 'bos'.*or `none`"):
        Encoder(Letters(None, 2), "bos")
    with pytest.raises(ValueError, match="`separator` to be a token .* got 'eos'"):
        Encoder(Letters(1, None), separator="eos")
    neither = Encoder(Letters(None, None))
    with pytest.raises(ValueError, match="it has neither: set `separator` to a text"):
        neither.marks(TEXT)
    assert neither.marks(named([5])) == ([], [])
    assert Encoder(Letters(None, None), separator="\n").marks(TEXT) == ([], [10])


def test_token_ids_need_no_tokenizer_and_stay_as_they_are() -> None:
    encoder = Encoder(None, vocabulary=10)
    assert tokens_of(encoder, [0, 9, 3]) == [0, 9, 3]
    assert tokens_of(encoder, named(torch.tensor([1, 2])).text) == [1, 2]
    assert list(encoder.pieces(Document("", [5] * 40_000), 2)) == [[5] * (40_000 - 2 * 2**14)]
    assert encoder.described()["document_start"] == "auto (none before texts)"
    for content in ("abc", [{"role": "user", "content": "a"}]):
        with pytest.raises(ValueError, match="`model` to come with a tokenizer"):
            tokens_of(encoder, content)


@pytest.mark.parametrize(("ids", "wrong"), [([1, 10], 10), ([-3, 2], -3)])
def test_token_ids_of_another_model_are_refused(ids: list[int], wrong: int) -> None:
    encoder = Encoder(None, vocabulary=10)
    with pytest.raises(ValueError, match=f"from 0 to 9 but row 7 holds {wrong}: use the tokenizer"):
        tokens_of(encoder, ids)
    with pytest.raises(ValueError, match="row 7 holds"):
        encoder.require_ids(Document("", ids, "row 7"))
    encoder.require_ids(Document("", "text"))
    encoder.require_ids(Document("", []))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "row 7 has no text"),
        ("", "row 7 is empty"),
        (" \n\t", "row 7 is empty"),
        ([], "row 7 is empty"),
        (5, "row 7 holds int"),
        (b"abc", "row 7 holds bytes"),
        ({"a": 1}, "row 7 holds dict"),
        ([1.5, 2.0], "row 7 holds a list that is neither"),
        ([True, False], "row 7 holds a list that is neither"),
        (["a"], "row 7 holds a list that is neither"),
        ("ab\ud800", "row 7 has half of a character"),
        ([{"role": "robot", "content": "a"}], "row 7 is not a chat .* .no robots."),
        ([{"from": "human", "value": "a"}], "row 7 is not a chat .*role"),
    ],
)
def test_rows_that_give_no_tokens_say_why(content: Any, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        tokens_of(Encoder(Letters(1, 2)), content)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok", "name": None}]


def test_a_chat_is_what_the_template_writes() -> None:
    written = [ord(letter) for letter in "u:hi;a:ok;"]
    assert tokens_of(Encoder(Letters(1, 2)), CHAT) == written
    by_key = {"role": ["user", "assistant"], "content": ["hi", "ok"]}
    assert tokens_of(Encoder(Letters(1, 2)), by_key) == written


def test_of_other_roles_tokens_are_context_alone() -> None:
    tokens = tokens_of(Encoder(Letters(1, 2), chat_roles=["assistant"]), CHAT)
    assert [t < 0 for t in tokens] == [True] * 5 + [False] * 5
    assert ids_of(torch.tensor(tokens)).tolist() == [ord(letter) for letter in "u:hi;a:ok;"]
    assert all(t > 0 for t in tokens_of(Encoder(Letters(1, 2), chat_roles=["user"]), CHAT)[:5])


def test_roles_that_no_message_has_are_named() -> None:
    encoder = Encoder(Letters(1, 2), chat_roles=["asistant"])
    with pytest.raises(
        Unreadable, match=r"`chat_roles`=\['asistant'\] but of \['assistant', 'user"
    ):
        tokens_of(encoder, CHAT)


def test_a_template_that_rewrites_earlier_messages_tells_no_roles_apart() -> None:
    tokenizer = Letters(1, 2)
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="`chat_roles` to be null .* roles cannot be told apart"):
        tokens_of(Encoder(tokenizer, chat_roles=["user"]), CHAT)


def test_a_message_that_cannot_stand_alone_counts_with_the_next() -> None:
    tokenizer = Letters(1, 2)
    tokenizer.chat_template = (
        "{% if messages | length == 1 %}{{ raise_exception('alone') }}{% endif %}" + TEMPLATE
    )
    chat = [{"role": "system", "content": "x"}, *CHAT]
    tokens = tokens_of(Encoder(tokenizer, chat_roles=["user"]), chat)
    assert [t > 0 for t in tokens] == [True] * len("s:x;u:hi;") + [False] * len("a:ok;")


def test_chats_without_a_template_are_refused() -> None:
    tokenizer = Letters(1, 2)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="to have a chat template.*set `tokenizer.chat_template`"):
        tokens_of(Encoder(tokenizer), CHAT)


def test_context_alone_keeps_its_id() -> None:
    tokens = torch.tensor([[0, ~0, 7, ~7]])
    assert ids_of(tokens).tolist() == [[0, 0, 7, 7]]
