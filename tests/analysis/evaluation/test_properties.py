"""Labels of tokens and passages against labels by hand."""

import numpy as np
import pytest
import torch

from lightning_sae.analysis.evaluation.figures import questions_of
from lightning_sae.analysis.evaluation.passages import Passage
from lightning_sae.analysis.evaluation.properties import labels_of, usable, word_labels

SOURCE = [
    "if",
    " x",
    " ==",
    " 'if",
    " a'",
    ":",
    "  #",
    " if",
    "\n",
    "   ",
    " pass",
    "\n",
    "y",
    "\n",
]


def passage(pieces: list[str], name: str = "a/b.py", kind: str = "a") -> Passage:
    return Passage(name, kind, "".join(pieces), list(range(len(pieces))), pieces)


def test_python_source_is_labelled_as_python_reads_it() -> None:
    found = labels_of([passage(SOURCE)]).of_tokens
    with_it = {
        name: [SOURCE[i] for i in (labels == 1).nonzero().squeeze(1)]
        for name, labels in found.items()
    }
    assert with_it["keyword"] == ["if", " pass"]
    assert with_it["identifier"] == [" x", "y"]
    assert with_it["in_string"] == [" 'if", " a'"]
    assert with_it["in_comment"] == ["  #", " if"]
    assert with_it["indentation"] == ["   "]


def test_white_space_inside_a_string_is_no_indentation() -> None:
    pieces = ["x", " =", " '''", "a", "\n   ", " b", "'''", "\n"]
    found = labels_of([passage(pieces)]).of_tokens
    assert found["indentation"].tolist() == [0] * 8
    assert found["in_string"].tolist() == [0, 0, 1, 1, 1, 1, 1, 0]


def test_prose_has_words_and_no_code() -> None:
    prose, code = passage(["It", " is", " so", "."]), passage(SOURCE)
    alone, both = labels_of([prose]).of_tokens, labels_of([prose, code]).of_tokens
    assert "keyword" not in alone
    assert both["keyword"][:4].tolist() == [-1] * 4
    assert both["keyword"][4] == 1


def test_words_have_first_letters_whatever_their_case() -> None:
    labels = word_labels([" Ab", "a", "é", "a1", " 7", ""])
    assert labels["first_letter=a"].tolist() == [1, 1, -1, -1, -1, -1]
    assert labels["first_letter=z"].tolist() == [0, 0, -1, -1, -1, -1]
    assert labels["capital"].tolist() == [1, 0, -1, -1, -1, -1]
    assert labels["number"].tolist() == [0, 0, 0, 0, 1, -1]


def test_kinds_and_own_properties_speak_of_tokens_or_passages() -> None:
    passages = [passage(["a", "b", "c"], kind="x" if i < 4 else "y") for i in range(7)]
    own = {
        "long": lambda p: len(p.pieces) > 2,
        "is_b": lambda p: [None if piece == "c" else piece == "b" for piece in p.pieces],
    }
    labels = labels_of(passages, own)
    assert labels.of_passages["kind=x"].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert "kind=y" not in labels.of_passages  # three are too few
    assert labels.of_passages["long"].tolist() == [1] * 7
    assert labels.of_tokens["is_b"].tolist() == [0, 1, -1] * 7
    with pytest.raises(ValueError, match="`fails` could not be asked .* ZeroDivisionError"):
        labels_of(passages, {"fails": lambda p: 1 / 0})
    for came, wrong in (
        ("1 of them", lambda p: [True]),
        ("3", lambda p: 3),
        ("'yes' among others", lambda p: ["yes"] * 3),
        ("0.5 among others", lambda p: torch.full((3,), 0.5)),
        ("{0: True", lambda p: dict.fromkeys(range(3), True)),
    ):
        with pytest.raises(
            ValueError, match=f"`wrong` to give True, False or None for each of the 3.* got {came}"
        ):
            labels_of(passages, {"wrong": wrong})


def test_an_array_or_a_tensor_of_answers_is_as_good_as_a_list() -> None:
    passages = [passage(["a", "b", "c"])] * 2
    own = {
        "array": lambda p: np.array([True, False, True]),
        "tensor": lambda p: torch.tensor([True, False, True]),
        "whole": lambda p: np.bool_(True),
    }
    labels = labels_of(passages, own)
    assert (
        labels.of_tokens["array"].tolist() == labels.of_tokens["tensor"].tolist() == [1, 0, 1] * 2
    )
    assert labels.of_passages["whole"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["capital", "first_letter=a", "keyword", "kind=x"])
def test_an_own_property_replaces_none_of_the_package(name: str) -> None:
    passages = [passage(["It", " is"], kind=kind) for kind in "xxxxy"]
    with pytest.raises(ValueError, match=f"`{name}`, which is a property of this package"):
        labels_of(passages, {name: lambda p: True})


def test_a_property_is_asked_where_both_halves_have_both_classes() -> None:
    tested = torch.tensor([False, False, True, True])
    assert usable(torch.tensor([1, 0, 1, 0]), tested, 1)[0]
    fits, counts = usable(torch.tensor([1, 0, 1, -1]), tested, 1)
    assert not fits
    assert counts == {"train_with": 1, "train_without": 1, "test_with": 1, "test_without": 0}


def test_an_own_property_without_both_classes_is_refused() -> None:
    passages = [passage(["a"] * 40) for _ in range(4)]
    asked = questions_of(passages, 8, {"half": lambda p: [True, False] * 20})
    assert set(asked.of_tokens) == {"half"}
    assert asked.left_out["capital"]["train_with"] == 0
    with pytest.raises(ValueError, match="`always` with {'train_with': 80, 'train_without': 0"):
        questions_of(passages, 8, {"always": lambda p: [True] * 40})
    with pytest.raises(ValueError, match="`label_column`"):
        questions_of(passages, 8, needed=("label=",))
