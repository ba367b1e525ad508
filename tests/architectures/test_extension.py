"""What a subclass can get wrong ends in an error when the class is made, or works."""

from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sae import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    RescaleAndShiftSAE,
    RescaledSAE,
    SparseAutoencoder,
    TiedSAE,
    TopKSAE,
)
from lightning_sae.architectures.objective import Step

ROWWISE = [ReLUSAE, TiedSAE, TopKSAE]
OTHERS = [BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, RescaleAndShiftSAE, RescaledSAE]


def halved(self: SparseAutoencoder, pre: Tensor) -> Tensor:
    return pre.relu() / 2


@pytest.mark.parametrize("base", ROWWISE)
def test_training_and_encode_both_use_the_activate_of_a_subclass(
    base: type[SparseAutoencoder],
) -> None:
    sae = type("Halved", (base,), {"activate": halved})(4, 32)
    x = torch.randn(16, 4)
    trained = sae.objective(x).f
    torch.testing.assert_close(trained.to_dense(), sae.encode(x))


@pytest.mark.parametrize("base", OTHERS)
def test_activate_alone_is_refused_where_training_has_another_rule(
    base: type[SparseAutoencoder],
) -> None:
    with pytest.raises(TypeError, match="`Halved` defines `activate`, .* define `latents` and"):
        type("Halved", (base,), {"activate": halved})


class Halving:
    """A mixin."""

    activate = halved


def test_methods_of_a_mixin_count_as_those_of_the_class() -> None:
    with pytest.raises(TypeError, match="`Mixed` defines `activate`"):
        type("Mixed", (Halving, GatedSAE), {})
    assert ReLUSAE.rows_are_independent
    before: Any = type("Mixed", (Halving, ReLUSAE), {})
    behind: Any = type("Mixed", (GatedSAE, Halving), {})
    assert not before.rows_are_independent
    assert behind.activate is GatedSAE.activate


@pytest.mark.parametrize("given", [{}, {"activate": halved}, {"objective": ReLUSAE.objective}])
def test_a_class_without_activate_or_objective_cannot_be_instantiated(given: dict) -> None:
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (SparseAutoencoder,), given)(4, 8)


@pytest.mark.parametrize("base", OTHERS)
def test_a_subclass_that_says_how_it_trains_is_accepted(base: type[SparseAutoencoder]) -> None:
    methods = {"activate": halved, "objective": ReLUSAE.objective}
    assert type("Halved", (base,), methods)(4, 32).d_sae == 32


@pytest.mark.parametrize("base", [*ROWWISE, GatedSAE, JumpReLUSAE])
def test_rows_of_a_new_objective_are_not_taken_to_be_independent(
    base: type[SparseAutoencoder],
) -> None:
    def objective(self: SparseAutoencoder, x: Float[Tensor, "batch d_in"]) -> Step:
        raise AssertionError("only looked at")

    assert base(4, 32).rows_are_independent
    assert not type("Own", (base,), {"objective": objective})(4, 32).rows_are_independent
    said = {"objective": objective, "rows_are_independent": True}
    assert type("Own", (ReLUSAE,), said)(4, 32).rows_are_independent


def test_a_rule_over_the_batch_sees_the_whole_batch_though_it_is_large() -> None:
    class Normalised(SparseAutoencoder):
        """The squared error over that of the batch's mean: not a mean over rows."""

        def activate(self, pre: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
            return pre.relu()

        def objective(self, x: Float[Tensor, "batch d_in"]) -> Step:
            f = self.latents(x)
            x_hat = self.reconstruct(f)
            loss = (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
            return Step({"fvu": loss}, f, x_hat)

    torch.manual_seed(0)
    sae = Normalised(4, 8, chunk_rows=4)
    sae.layout.dense = True
    x = torch.randn(32, 4)
    x_hat = sae.decode(sae.encode(x))
    expected = (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    torch.testing.assert_close(sae._evaluate(x).loss, expected)
