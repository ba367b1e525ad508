from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_sae.functional.sparse.code import (
    SWITCH,
    SWITCH_ELSEWHERE,
    Code,
    Layout,
    default_chunk_rows,
    encode,
)
from lightning_sae.functional.sparse.selection import Above, BatchTopK, Rule, TopK


def always(dense: bool) -> Layout:
    """A layout that stays as it is, whatever it sees."""
    return Layout(dense, thresholds=(-1.0, -1.0) if dense else (2.0, 2.0))


class Problem(NamedTuple):
    """What gradients are taken with respect to."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    origin: Tensor

    def with_gradients(self) -> "Problem":
        return Problem(*(tensor.detach().requires_grad_() for tensor in self))


def problem(rows: int = 7, d: int = 3, latents: int = 10) -> Problem:
    shapes = [(rows, d), (d, latents), (latents,), (latents, d), (d,)]
    return Problem(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))


def empty_rows() -> Problem:
    """Rows 0, 3 and 6 lie far out where the encoder sees nothing."""
    given = problem()
    given.W_enc[-1] = 1.0
    given.x[::3, -1] = -1e3
    return given


def empty_columns() -> Problem:
    given = problem()
    given.b_enc[[0, 4, 9]] = -1e3
    return given


def nothing_active() -> Problem:
    given = problem()
    given.b_enc.fill_(-1e3)
    return given


def whole_numbers() -> Problem:
    """Many pre-activations are equal, and many are exactly 0, where nothing is active."""
    return Problem(*(tensor.round() for tensor in problem(rows=12)))


def duplicates() -> Problem:
    given = problem()
    given.x[2] = given.x[5]
    given.W_enc[:, 7] = given.W_enc[:, 1]
    given.b_enc[7] = given.b_enc[1]
    return given


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "ordinary": problem,
    "rows without latents": empty_rows,
    "latents without rows": empty_columns,
    "nothing active": nothing_active,
    "one latent": lambda: problem(latents=1),
    "one example": lambda: problem(rows=1),
    "no example": lambda: problem(rows=0),
    "one dimension": lambda: problem(d=1),
    "whole numbers": whole_numbers,
    "duplicates": duplicates,
}
MEMORY: dict[str, Callable[[Problem], Problem]] = {
    "row by row": lambda p: p,
    "latent by latent": lambda p: p._replace(W_enc=p.W_enc.T.contiguous().T),
    "all transposed": lambda p: Problem(*(t.mT.contiguous().mT if t.ndim == 2 else t for t in p)),
    "with gaps": lambda p: Problem(*(torch.stack([t, t], -1)[..., 0] for t in p)),
}


def loss_on_code(code: Code, p: Problem) -> Tensor:
    """Something of every method that a loss may use, and a code used twice."""
    values = code.values
    shrunk = code.with_values(values.square() - 0.3 * values * code.at(p.b_enc))
    odd = code.parted(torch.arange(code.shape[1]) % 2, 2)[1]
    return (
        (code.decode(p.W_dec) - p.x).square().sum()
        + shrunk.decode(p.W_dec * 2).sum()
        + odd.decode(p.W_dec.flip(0)).square().sum()
        + 3 * code.mean_sum(values * code.at(p.W_dec.norm(dim=-1))) * len(p.x)
        + (code.row_sums() * torch.arange(len(p.x))).sum()
        + code.to_dense().square().sum()
    )


def loss_by_hand(p: Problem, origin: bool) -> Tensor:
    """The same with matrices."""
    f = torch.relu((p.x - p.origin if origin else p.x) @ p.W_enc + p.b_enc)
    return (
        (f @ p.W_dec - p.x).square().sum()
        + ((f.square() - 0.3 * f * p.b_enc) @ (p.W_dec * 2)).sum()
        + ((f * (torch.arange(f.shape[1]) % 2)) @ p.W_dec.flip(0)).square().sum()
        + 3 * (f * p.W_dec.norm(dim=-1)).sum()
        + (f.sum(1) * torch.arange(len(p.x))).sum()
        + f.square().sum()
    )


def gradients(loss: Tensor, p: Problem) -> list[Tensor]:
    return list(torch.autograd.grad(loss, p, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("origin", [True, False])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", PROBLEMS)
def test_losses_and_all_gradients_are_those_of_matrices(
    name: str, memory: str, origin: bool
) -> None:
    p = MEMORY[memory](PROBLEMS[name]()).with_gradients()
    expected = loss_by_hand(p, origin)
    for dense, rows in [(False, 1), (False, 3), (False, 100), (False, None), (True, None)]:
        zero = p.origin if origin else None
        code = encode(p.x, p.W_enc, p.b_enc, Above(0.0), always(dense), rows, zero)
        if not len(p.x):  # a mean over no rows is not a number
            assert code.decode(p.W_dec).shape == p.x.shape
            continue
        loss = loss_on_code(code, p)
        torch.testing.assert_close(loss, expected)
        expected_gradients = gradients(loss_by_hand(p, origin), p)
        torch.testing.assert_close(gradients(loss, p), expected_gradients)


@pytest.mark.parametrize("dense", [True, False])
# Not "whole numbers": 0 is a kink. Sorted, as all workers have to find the same tests.
@pytest.mark.parametrize("name", sorted({*PROBLEMS} - {"whole numbers", "no example"}))
def test_gradients_are_those_of_finite_differences(name: str, dense: bool) -> None:
    p = MEMORY["latent by latent"](PROBLEMS[name]()).with_gradients()

    def outputs(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, W_enc, b_enc, W_dec, origin = tensors
        code = encode(x, W_enc, b_enc, Above(0.0), always(dense), 2, origin)
        squared = code.with_values(code.values.square() * code.at(b_enc))
        return squared.decode(W_dec), code.row_sums()

    assert torch.autograd.gradcheck(outputs, tuple(p), fast_mode=True)


@pytest.mark.parametrize("dense", [True, False])
def test_the_gradient_of_a_bias_subtracted_and_added_is_exact(dense: bool) -> None:
    p = problem().with_gradients()
    code = encode(p.x, p.W_enc, p.b_enc, Above(0.0), always(dense), origin=p.origin)
    error = (code.decode(p.W_dec) + p.origin - p.x).square().sum()
    by_hand = torch.relu((p.x - p.origin) @ p.W_enc + p.b_enc) @ p.W_dec + p.origin - p.x
    torch.testing.assert_close(gradients(error, p), gradients(by_hand.square().sum(), p))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("frozen", ["x", "W_enc", "b_enc", "W_dec", "origin", "all but b_enc"])
def test_what_is_frozen_leaves_the_other_gradients_alone(frozen: str, dense: bool) -> None:
    p = problem().with_gradients()
    stays = set(p._fields) - {"b_enc"} if frozen == "all but b_enc" else {frozen}
    q = Problem(*(t.detach().requires_grad_(n not in stays) for n, t in p._asdict().items()))
    code = encode(q.x, q.W_enc, q.b_enc, Above(0.0), always(dense), origin=q.origin)
    (code.decode(q.W_dec) + code.row_sums().unsqueeze(1)).square().sum().backward()
    f = torch.relu((p.x - p.origin) @ p.W_enc + p.b_enc)
    expected = gradients((f @ p.W_dec + f.sum(1, keepdim=True)).square().sum(), p)
    for field, tensor, by_hand in zip(p._fields, q, expected, strict=True):
        if field in stays:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, by_hand)


@pytest.mark.parametrize("dense", [True, False])
def test_without_gradients_there_is_a_code_and_no_graph(dense: bool) -> None:
    p = problem().with_gradients()
    expected = torch.relu((p.x - p.origin) @ p.W_enc + p.b_enc) @ p.W_dec
    for mode in (torch.no_grad, torch.inference_mode):
        layout = always(dense)
        with mode():
            code = encode(p.x, p.W_enc, p.b_enc, Above(0.0), layout, origin=p.origin)
            x_hat = code.decode(p.W_dec)
        assert not x_hat.requires_grad
        torch.testing.assert_close(x_hat.clone(), expected.detach())
        later = encode(p.x, p.W_enc, p.b_enc, Above(0.0), layout, origin=p.origin)
        assert later.decode(p.W_dec).requires_grad  # memory kept by a layout serves both


RULES: dict[str, Rule] = {
    "above": Above(0.0),
    "above each its own": Above(torch.linspace(-1, 1, 10, dtype=torch.float64)),
    "top k": TopK(3),
    "top k of a batch": BatchTopK(2.5, 7),
}


@pytest.mark.parametrize("name", RULES)
def test_both_layouts_answer_the_same(name: str) -> None:
    p = problem().with_gradients()
    pre = (p.x - p.origin) @ p.W_enc + p.b_enc
    f = pre * RULES[name].mask(pre)
    weights = torch.randn(10, dtype=torch.float64)
    for dense in (False, True):
        code = encode(p.x, p.W_enc, p.b_enc, RULES[name], always(dense), 2, p.origin)
        assert code.shape == (7, 10)
        torch.testing.assert_close(code.to_dense(), f)
        torch.testing.assert_close(code.decode(p.W_dec), f @ p.W_dec)
        torch.testing.assert_close(code.row_sums(), f.sum(1))
        assert code.firings().tolist() == (f != 0).sum(0).tolist()
        weighted = code.with_values(code.values * code.at(weights))
        torch.testing.assert_close(weighted.to_dense(), f * weights)
        # A term that is not zero for a value of zero still counts for active entries alone.
        n_active = (f != 0).double().sum()
        torch.testing.assert_close(code.mean_sum(torch.ones_like(code.values)) * 7, n_active)
        group = torch.arange(f.shape[1]) % 3
        for index, part in enumerate(code.parted(group, 3)):
            own = f * (group == index)
            torch.testing.assert_close(part.to_dense(), own)
            assert part.firings().tolist() == (own != 0).sum(0).tolist()
            gradient = torch.autograd.grad(
                part.to_dense().square().sum(), p.b_enc, retain_graph=True
            )[0]
            torch.testing.assert_close(gradient, 2 * own.sum(0).detach())


def test_latents_given_as_a_matrix_are_a_code() -> None:
    f = torch.tensor([[0.0, 2.0, -1.0], [0.0, 0.0, 3.0]])
    code = Code.of_matrix(f)
    assert code.firings().tolist() == [0, 1, 2]
    assert code.row_sums().tolist() == [1.0, 3.0]
    assert code.mean_sum(code.values.abs() + 1).item() == (3 + 2 + 4) / 2


def test_a_code_stays_as_it_is_when_the_next_one_is_made() -> None:
    """The memory of the pre-activations is used again; values are not views of it."""
    layout = always(dense=False)
    for rule in RULES.values():
        p, q = problem(), problem()
        first = encode(p.x, p.W_enc, p.b_enc, rule, layout, 3)
        before = first.to_dense().clone()
        encode(q.x, q.W_enc, q.b_enc, rule, layout, 3)
        assert torch.equal(first.to_dense(), before)


def test_the_layout_changes_outside_its_thresholds_and_not_between() -> None:
    layout = Layout(thresholds=(0.2, 0.3))
    seen = []
    for density in (0.5, 0.29, 0.21, 0.19, 0.21, 0.29, 0.19, 0.31, 0.21, 0.29, 0.1):
        layout.see(round(100 * density), 100)
        seen.append(layout.dense)
    assert seen == [True] * 3 + [False] * 4 + [True] * 3 + [False]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_density_flaps_on_any_device(device: str) -> None:
    below, above = SWITCH.get(device, SWITCH_ELSEWHERE)
    for count in range(1001):
        layout = Layout()
        layout.see(count, 1000, device)
        settled = layout.dense
        for _ in range(3):
            layout.see(count, 1000, device)
            assert layout.dense == settled
    assert 0 < below < above < 1


@pytest.mark.parametrize("dense", [True, False])
def test_the_layout_is_updated_with_the_share_of_active_latents(
    dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(Layout, "see", lambda self, count, size, _: told.append(count / size))
    p = problem()
    encode(p.x, p.W_enc, p.b_enc, TopK(3), Layout(dense))
    assert told == [0.3]


def test_a_batch_that_is_sparse_enough_makes_the_next_one_sparse() -> None:
    p, layout = problem(), Layout(thresholds=(0.25, 0.35))
    sparse = []
    for k in (5, 2, 3, 4, 3):  # of 10
        code = encode(p.x, p.W_enc, p.b_enc, TopK(k), layout)
        sparse.append(code.values.ndim == 1)
    assert sparse == [False, False, True, True, False]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dense", [True, False])
def test_under_autocast_the_product_alone_is_bfloat16(dense: bool) -> None:
    p = Problem(*(tensor.float() for tensor in problem(rows=40, d=16))).with_gradients()
    low = (p.x - p.origin).bfloat16() @ p.W_enc.bfloat16()
    threshold = low.float()[0] + p.b_enc.detach()  # of row 0: rounding the sum would tip it
    with torch.autocast("cpu", torch.bfloat16):
        code = encode(p.x, p.W_enc, p.b_enc, Above(threshold.detach()), always(dense), 7, p.origin)
        x_hat = code.decode(p.W_dec)
        loss = (x_hat - p.x).square().sum() + code.row_sums().sum()
    assert code.values.dtype == torch.float32
    active = low.float() + p.b_enc > threshold
    assert not active[0].any()
    torch.testing.assert_close(code.to_dense(), (low.float() + p.b_enc) * active, rtol=0, atol=0)
    assert code.row_sums().dtype == torch.float32
    f = ((p.x - p.origin) @ p.W_enc + p.b_enc) * active
    expected = gradients((f @ p.W_dec - p.x).square().sum() + f.sum(), p)
    for found, exact in zip(gradients(loss, p), expected, strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, exact) < 0.01


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_train_too(dtype: torch.dtype, dense: bool) -> None:
    exact = Problem(*(tensor.round() for tensor in problem(rows=12)))  # pre-activations are exact
    p = Problem(*(tensor.to(dtype) for tensor in exact)).with_gradients()
    code = encode(p.x, p.W_enc, p.b_enc, Above(0.0), always(dense), origin=p.origin)
    found = gradients((code.decode(p.W_dec) - p.x).square().sum() + code.row_sums().sum(), p)
    q = exact.with_gradients()
    f = torch.relu((q.x - q.origin) @ q.W_enc + q.b_enc)
    expected = gradients((f @ q.W_dec - q.x).square().sum() + f.sum(), q)
    for low, by_hand in zip(found, expected, strict=True):
        assert low.dtype == dtype
        assert relative_error(low, by_hand) < 0.02


def test_default_chunks_fill_64_mib_of_float32_on_a_cpu_but_have_512_rows() -> None:
    for d_sae in (100, 2048, 16384):
        rows = default_chunk_rows(d_sae)
        assert rows * d_sae * 4 <= 2**26 < (rows + 1) * d_sae * 4
    assert default_chunk_rows(2**20) == 512
