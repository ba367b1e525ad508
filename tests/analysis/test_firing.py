"""Statistics of one pass over text, against naive loops and over several readers."""

import torch

from lightning_sae.analysis.firing import (
    Contexts,
    Firings,
    PairCounts,
    Strengths,
    hashed,
    together,
)

D_SAE, LENGTH = 6, 10


def some_latents(n: int = 400, seed: int = 0) -> torch.Tensor:
    """Non-negative latents [n, D_SAE]; the last one is silent."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(n, D_SAE, generator=generator).exp()
    f *= torch.rand(n, D_SAE, generator=generator) < 0.3
    f[:, -1] = 0
    return f


def firings(f: torch.Tensor, first: int = 0) -> Firings:
    token, latent = f.nonzero(as_tuple=True)
    return Firings(token + first, latent, f[token, latent])


def both(make, f: torch.Tensor, update) -> tuple:
    """Statistics of one reader, and those merged of two who read the blocks in turn."""
    alone, one, two = make(), make(), make()
    for i, start in enumerate(range(0, len(f), 2 * LENGTH)):
        part = f[start : start + 2 * LENGTH]
        update(alone, firings(part, start), len(part))
        update((one, two)[i % 2], firings(part, start), len(part))
    one.merge(two)
    return alone, one


def test_strengths_are_those_of_the_firings_alone_whoever_reads() -> None:
    f = some_latents()
    for found in both(lambda: Strengths(D_SAE, 1.0), f, lambda s, own, n: s.update(own, n)):
        for j in range(D_SAE - 1):
            own = f[:, j][f[:, j] > 0].double()
            assert found.count[j] == len(own)
            torch.testing.assert_close(found.frequency()[j].item(), len(own) / 400)
            torch.testing.assert_close(found.mean()[j], own.mean())
            torch.testing.assert_close(found.std()[j], own.std(correction=0))
            assert found.largest[j] == own.max().float()
            for share in (0.1, 0.5, 0.9):
                exact = own.quantile(share, interpolation="higher")
                assert abs(found.quantile(share)[j] / exact - 1) < 0.05
        assert found.quantile(0.5)[-1].isnan()
        assert found.mean()[-1].isnan()


def test_even_histogram_counts_a_largest_activation_on_the_edge_of_a_bin() -> None:
    strengths = Strengths(1, 1.0)
    strengths.update(firings(torch.tensor([[2.0], [1.0]])), 2)
    torch.testing.assert_close(strengths.histogram(4).sum(), torch.tensor(2.0))


def test_even_histogram_has_all_firings_and_follows_an_exact_one() -> None:
    generator = torch.Generator().manual_seed(1)
    f = torch.rand(20_000, 1, generator=generator) + 1e-3
    strengths = Strengths(1, 1.0)
    strengths.update(firings(f), len(f))
    histogram = strengths.histogram(10)
    assert abs(histogram.sum().item() - 20_000) < 1
    exact = torch.histc(f, 10, 0, f.max().item())
    torch.testing.assert_close(histogram[0], exact, rtol=0.1, atol=0)


def test_top_contexts_are_the_largest_of_different_blocks_whoever_reads() -> None:
    f = some_latents()
    found = both(lambda: Contexts(D_SAE, 3, 2, 1.0), f, lambda c, own, _n: c.update(own, LENGTH))
    for contexts in found:
        for j in range(D_SAE - 1):
            by_block = f[:, j].view(-1, LENGTH)
            values, blocks = by_block.amax(1).topk(3)
            assert contexts.top_values[j].tolist() == values.tolist()
            tokens = blocks * LENGTH + by_block.argmax(1)[blocks]
            assert contexts.top_tokens[j].tolist() == tokens.tolist()
        assert (contexts.top_tokens[-1] == -1).all()


def test_drawn_contexts_are_the_same_whoever_reads_and_of_their_octave() -> None:
    f = some_latents()
    alone, merged = both(
        lambda: Contexts(D_SAE, 1, 2, 1.0), f, lambda c, own, _n: c.update(own, LENGTH)
    )
    assert torch.equal(alone.drawn_tokens, merged.drawn_tokens)
    drawn = alone.drawn_tokens.view(2, D_SAE, Contexts.OCTAVES)
    for j in range(D_SAE):
        for octave in range(Contexts.OCTAVES):
            low = 2.0 ** (octave - 12) if octave else 0.0
            high = 2.0 ** (octave - 11) if octave < Contexts.OCTAVES - 1 else torch.inf
            inside = (f[:, j] >= low) & (f[:, j] < high) & (f[:, j] > 0)
            for token in drawn[:, j, octave].tolist():
                assert (token >= 0) == bool(inside.any())
                assert token < 0 or inside[token]


def test_draws_of_an_interval_are_even() -> None:
    token, latent = torch.arange(5).repeat(2000), torch.arange(2000).repeat_interleave(5)
    keys = hashed(token, latent, 0).view(2000, 5)
    assert keys.min() >= 0
    counts = torch.bincount(keys.argmax(1))
    assert (counts > 300).all()  # 400 each, with a standard deviation of 18


def test_chosen_contexts_come_once_by_latent_interval_and_strength() -> None:
    contexts = Contexts(D_SAE, 2, 3, 1.0)
    f = some_latents()
    contexts.update(firings(f), LENGTH)
    chosen = contexts.chosen()
    assert (f[chosen["token"], chosen["latent"]] == chosen["value"]).all()
    pairs = list(zip(chosen["latent"].tolist(), chosen["token"].tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    keys = [chosen["latent"], chosen["interval"], -chosen["value"]]
    rows = list(zip(*(key.tolist() for key in keys), strict=True))
    assert rows == sorted(rows)
    largest = contexts.top_values[:, 0][chosen["latent"]]
    drawn = chosen["interval"] > 0
    below = largest / 2.0 ** chosen["interval"]
    assert (chosen["value"][drawn] >= below[drawn] * 0.999).all()
    assert (chosen["value"][drawn] <= 2.001 * below[drawn]).all()


def test_pair_counts_are_those_of_a_loop_whoever_reads() -> None:
    f, partner = some_latents(), torch.arange(400) % 7

    def update(counts: PairCounts, own: Firings, _n: int) -> None:
        counts.update(own.latent, partner[own.token], own.value)

    for found in both(lambda: PairCounts(7), f, update):
        partners, counts, means = found.first(D_SAE, 7)
        for j in range(D_SAE):
            n = torch.tensor([int((f[:, j][partner == p] > 0).sum()) for p in range(7)])
            assert counts[j].tolist() == n.sort(descending=True).values.tolist()
            for p, count, mean in zip(partners[j], counts[j], means[j], strict=True):
                assert (p < 0) == (count == 0)
                if p >= 0:
                    own = f[:, j][(partner == p) & (f[:, j] > 0)]
                    assert len(own) == count
                    torch.testing.assert_close(own.mean(), mean)


def test_many_pairs_leave_each_latent_its_most_frequent_ones() -> None:
    counts = PairCounts(1000, keep=2, limit=50)
    for partner in range(200):
        often = 50 if partner in (0, 1) else 1
        latent = torch.zeros(often, dtype=torch.int64)
        counts.update(latent, torch.full((often,), partner), torch.ones(often))
    partners, found, _ = counts.first(1, 2)
    assert sorted(partners[0].tolist()) == [0, 1]
    assert found[0].tolist() == [50, 50]
    assert len(counts.pairs) <= 50


def test_latents_that_fire_together_are_all_pairs_of_a_token() -> None:
    f = some_latents(50)
    one, other, value = together(firings(f))
    expected = sorted(
        (i, j, f[t, i].item())
        for t in range(50)
        for i in range(D_SAE)
        for j in range(D_SAE)
        if i != j and f[t, i] > 0 and f[t, j] > 0
    )
    assert sorted(zip(one.tolist(), other.tolist(), value.tolist(), strict=True)) == expected
    fewer, _, _ = together(firings(f), most=20)
    assert 0 < len(fewer) <= 20
