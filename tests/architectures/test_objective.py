import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sae import ReLUSAE
from lightning_sae.architectures.objective import Outcome, Step, at_once, in_chunks
from lightning_sae.functional.sparse.code import Layout

D_IN, D_SAE, BATCH = 6, 40, 30


def build_sae(dense: bool, **arguments: Any) -> ReLUSAE:
    """An SAE with random weights, whose codes keep their layout."""
    sae = ReLUSAE(D_IN, D_SAE, 0.3, **{"decoder_norm": "free", **arguments})
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.b_enc.sub_(1.5)
    sae.layout = Layout(dense, thresholds=(-1.0, -1.0) if dense else (2.0, 2.0))
    return sae


def gradients(outcome: Outcome, weights: Sequence[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(outcome.loss, weights, allow_unused=True))


def assert_same(found: Outcome, expected: Outcome, weights: Sequence[Tensor]) -> None:
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.losses, expected.losses)
    assert not any(value.requires_grad for value in found.losses.values())
    assert found.fired.tolist() == expected.fired.tolist()
    torch.testing.assert_close(found.squared_error, expected.squared_error)
    pairs = zip(gradients(found, weights), gradients(expected, weights), strict=True)
    for one, other in pairs:
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 10, 29, 30, 100])
def test_chunks_give_what_the_batch_gives_at_once(rows: int, dense: bool) -> None:
    sae, x = build_sae(dense).double(), torch.randn(BATCH, D_IN, dtype=torch.float64)
    weights = list(sae.parameters())
    expected = at_once(sae.objective, x)
    assert_same(in_chunks(sae.objective, x, rows, weights), expected, weights)
    f = sae.encode(x)
    assert expected.fired.tolist() == (f > 0).sum(0).tolist()
    torch.testing.assert_close(expected.squared_error, (sae(x) - x).square().sum(1))


@pytest.mark.parametrize("dense", [True, False])
def test_weights_without_a_gradient_may_be_among_those_of_chunks(dense: bool) -> None:
    sae, x = build_sae(dense).double(), torch.randn(BATCH, D_IN, dtype=torch.float64)
    unused = torch.nn.Parameter(torch.ones(3))
    sae.W_dec.requires_grad_(False)
    weights = [unused, sae.W_enc, sae.b_enc, sae.b_dec]
    assert_same(in_chunks(sae.objective, x, 7, weights), at_once(sae.objective, x), weights)


def test_a_loss_that_is_scaled_before_backward_scales_the_gradients_of_chunks() -> None:
    sae, x = build_sae(dense=True), torch.randn(BATCH, D_IN)
    weights = list(sae.parameters())
    (in_chunks(sae.objective, x, 7, weights).loss / 4).backward()
    expected = gradients(at_once(sae.objective, x), weights)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient / 4)  # type: ignore[operator]


def test_latents_may_be_a_matrix() -> None:
    sae, x = build_sae(dense=True), torch.randn(BATCH, D_IN)

    def objective(rows: Tensor) -> Step:
        step = sae.objective(rows)
        return step._replace(f=torch.relu(sae.pre_activations(rows)))

    weights = list(sae.parameters())
    assert_same(at_once(objective, x), at_once(sae.objective, x), weights)
    assert_same(in_chunks(objective, x, 8, weights), at_once(sae.objective, x), weights)


def test_chunks_under_autocast_have_the_gradients_of_the_batch() -> None:
    """Gradients taken inside of autocast would have their products rounded too."""
    sae, x = build_sae(dense=False), torch.randn(BATCH, D_IN)
    weights = list(sae.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = in_chunks(sae.objective, x, 7, weights), at_once(sae.objective, x)
    assert_same(found, expected, weights)


class Seen(NamedTuple):
    """A tensor that an operation was given or made; not itself, for who keeps it changes things."""

    shape: tuple[int, ...]
    dense: bool
    place: int
    bytes: int


def seen(tree: Any) -> list[Seen]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [
        Seen(tuple(t.shape), True, t.data_ptr(), t.untyped_storage().nbytes())
        if t.layout == torch.strided
        else Seen(tuple(t.shape), False, 0, 0)  # its parts were made before it
        for t in tensors
    ]


class Calls(TorchDispatchMode):
    """What each operation was given and made, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Seen], list[Seen]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = seen((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, given, seen(result)))
        return result


@contextmanager
def recorded() -> Iterator[Calls]:
    with Calls() as calls:
        yield calls


PRODUCTS = {
    getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")
}


def dense_products(calls: Calls) -> list[int]:
    """Of each product of two matrices that has the whole dictionary for a factor, the rows."""
    found, size = [], D_IN * D_SAE
    for func, given, made in calls.calls:
        dense = all(tensor.dense for tensor in given)  # a sparse factor's entries are few
        whole = any(math.prod(tensor.shape) >= size for tensor in given)
        if func.overloadpacket in PRODUCTS and dense and whole:
            found.append(made[0].shape[0] if made[0].shape[-1] == D_SAE else 0)
    return found


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_a_sparse_step_has_one_product_with_the_whole_dictionary(
    chunk_rows: int | None, apply_b_dec_to_input: bool
) -> None:
    sae = build_sae(False, chunk_rows=chunk_rows, apply_b_dec_to_input=apply_b_dec_to_input)
    with recorded() as calls:
        at_once(sae.objective, torch.randn(BATCH, D_IN)).loss.backward()
    rows = dense_products(calls)
    assert sum(rows) == BATCH
    assert len(rows) == (1 if chunk_rows is None else 5)
    # What else is dense would show in the dense layout, so that counting is known to work.
    with recorded() as calls:
        at_once(build_sae(True).objective, torch.randn(BATCH, D_IN)).loss.backward()
    assert len(dense_products(calls)) > 3


def largest(calls: Calls) -> int:
    """Bytes of the largest tensor made."""
    return max(tensor.bytes for _, _, made in calls.calls for tensor in made)


@pytest.mark.parametrize("dense", [True, False])
def test_pre_activations_of_the_whole_batch_never_exist_at_one_time(dense: bool) -> None:
    """In the sparse layout an objective sees to it, in the dense one `in_chunks`."""
    x, sae = torch.randn(200, D_IN), build_sae(dense, chunk_rows=9)
    with torch.no_grad():
        sae.b_enc.sub_(4)  # about 1 of 20 latents is active
    weights = list(sae.parameters())
    with recorded() as calls:
        if dense:
            in_chunks(sae.objective, x, 9, weights).loss.backward()
        else:
            at_once(sae.objective, x).loss.backward()
    assert largest(calls) < 4 * 200 * D_SAE / 4
    with recorded() as calls:
        at_once(build_sae(True).objective, x)
    assert largest(calls) == 4 * 200 * D_SAE


def test_gradients_of_chunks_are_passed_on_and_not_copied() -> None:
    sae = build_sae(dense=True)
    outcome = in_chunks(sae.objective, torch.randn(BATCH, D_IN), 7, list(sae.parameters()))
    with recorded() as calls:
        outcome.loss.backward()
    assert sae.W_enc.grad is not None
    for _, given, made in calls.calls:
        memory = {tensor.place for tensor in given}
        assert all(t.place in memory for t in made if math.prod(t.shape) == D_IN * D_SAE)
