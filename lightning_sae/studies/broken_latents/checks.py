"""Checks of whether an SAE shows what the document reports."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from lightning_sae.studies.broken_latents.measure import Measured

CLEAN = 0.98  # |cosine| with one feature above which a latent is that feature's
MIXED = 0.93  # |cosine| below which a latent is a mixture


@dataclass(frozen=True)
class Check:
    """An expected property of an SAE.

    Attributes:
        words: The expectation in words.
        met: Function that checks an SAE; picklable, because runs are sent to processes.
    """

    words: str
    met: Callable[[Measured], bool]


def clean(least: float = CLEAN) -> Check:
    """Each alive latent is one feature."""
    words = f"every alive latent has |cos| > {least:g} with one feature"
    return Check(words, partial(_clean, least=least))


def _clean(m: Measured, least: float) -> bool:
    return bool((m.best[m.alive] > least).all() and m.alive.any())


def exactly(features: Iterable[int], least: float = CLEAN) -> Check:
    """Each of these features has exactly one latent, and no other feature has one."""
    wanted = sorted(features)
    have = "have one latent each" if wanted[1:] else "has one latent, and nothing else has one"
    words = f"{_named(wanted)} {have}, with |cos| > {least:g}"
    return Check(words, partial(_exactly, wanted=wanted, least=least))


def _exactly(m: Measured, wanted: Sequence[int], least: float) -> bool:
    return _clean(m, least) and sorted(m.features[m.alive].tolist()) == wanted


def learnt(feature: int, least: float = CLEAN) -> Check:
    """A feature has a latent."""
    words = f"feature {feature} has a latent, with |cos| > {least:g}"
    return Check(words, partial(_learnt, feature=feature, least=least))


def _learnt(m: Measured, feature: int, least: float) -> bool:
    return bool((m.decoder[m.alive, feature].abs() > least).any())


def dead(n: int) -> Check:
    """A number of latents do not fire."""
    return Check(f"{n} latents are dead", partial(_dead, n=n))


def _dead(m: Measured, n: int) -> bool:
    return int((~m.alive).sum()) == n


def mixed(at_least: int = 2, below: float = MIXED) -> Check:
    """Several latents mix features."""
    words = f"at least {at_least} latents have no feature with |cos| >= {below:g}"
    return Check(words, partial(_mixed, at_least=at_least, below=below))


def _mixed(m: Measured, at_least: int, below: float) -> bool:
    return int((m.best[m.alive] < below).sum()) >= at_least


def takes_in(parent: int, children: Iterable[int], more_than: float = 0.3) -> Check:
    """The latents of several features have a component of another."""
    wanted = sorted(children)
    words = f"feature {parent} is in the latents of {_listed(wanted)}, with |cos| > {more_than:g}"
    return Check(words, partial(_takes_in, parent=parent, children=wanted, more_than=more_than))


def _takes_in(m: Measured, parent: int, children: Sequence[int], more_than: float) -> bool:
    rows = m.decoder[:, list(children)].abs().argmax(0)
    return bool((m.decoder[rows, parent].abs() > more_than).all())


def several_peaks(below: float = MIXED, at_least: float = CLEAN) -> Check:
    """Activations of mixed latents have several peaks, those of clean ones one."""
    words = "activations of mixed latents have several peaks, of clean ones a single one"
    return Check(words, partial(_several_peaks, below=below, at_least=at_least))


def _several_peaks(m: Measured, below: float, at_least: float) -> bool:
    mixtures, single = m.alive & (m.best < below), m.alive & (m.best > at_least)
    return bool((m.peaks[mixtures] > 1).all() and (m.peaks[single] == 1).all())


def absorbed() -> Check:
    """The parent's latent is silent where the child fires, whose latent includes the parent."""
    words = (
        "the parent's latent is silent where the child fires, and only there; the decoder of the "
        "child's latent has the parent in it"
    )
    return Check(words, _absorbed)


def _absorbed(m: Measured) -> bool:
    if m.parent_silent is None or m.parent_in_child is None or m.parent_silent_alone is None:
        return False
    return m.parent_silent > 0.9 and m.parent_silent_alone < 0.1 and m.parent_in_child > 0.5


def spare_latents_misused() -> Check:
    """Latents beyond the features are used for repetitions and combinations."""
    return Check("some alive latents are duplicates or combinations of features", _misused)


def _misused(m: Measured) -> bool:
    of_one = m.features[m.alive & (m.best > CLEAN)].tolist()
    return bool((m.best[m.alive] <= CLEAN).any()) or len(set(of_one)) < len(of_one)


def one_mixture(of: Iterable[int], without: Iterable[int]) -> Check:
    """The only latent has several features in it."""
    inside, outside = sorted(of), sorted(without)
    words = f"one latent has features {_listed(inside)} in it, not {_listed(outside)}"
    return Check(words, partial(_one_mixture, inside=inside, outside=outside))


def _one_mixture(m: Measured, inside: Sequence[int], outside: Sequence[int]) -> bool:
    (row,) = m.decoder.abs()
    return bool((row[list(inside)] > 0.2).all() and (row[list(outside)] < 0.1).all())


def _named(features: Sequence[int]) -> str:
    return f"feature{'s' * (len(features) > 1)} {_listed(features)}"


def _listed(features: Sequence[int]) -> str:
    names = [str(feature) for feature in features]
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
