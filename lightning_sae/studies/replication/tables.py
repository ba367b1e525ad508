"""Tables, sentences and comparison of the study of replication."""

from collections.abc import Mapping, Sequence
from statistics import mean

from lightning_sae.studies.replication.settings import (
    CONSTRAINED,
    LABELS,
    LOSS_SQUARED,
    OUT,
    PLAIN,
    PRUNED,
    REINITIALIZE,
)
from lightning_sae.studies.shared.page import Compared, Table, figures_table
from lightning_sae.studies.shared.rows import Row, distinct, known, select, with_spread


def _values(rows: Sequence[Row], name: str, figure: str) -> list[float]:
    return known(select(rows, sae=name), figure)


def _cell(rows: Sequence[Row], name: str, figure: str, form: str = ".3f", none: str = "") -> str:
    return with_spread(_values(rows, name, figure), form, none)


def _present(rows: Sequence[Row]) -> list[str]:
    return [name for name in LABELS if name in distinct(rows, "sae")]


def _table(
    rows: Sequence[Row], names: Sequence[str], columns: Mapping[str, tuple[str, str]], note: str
) -> Table:
    return figures_table({LABELS[name]: select(rows, sae=name) for name in names}, columns, note)


def figures(rows: Sequence[Row]) -> Table:
    """The reconstruction and loss recovered of each SAE."""
    columns = {
        "l0": ("L0", ".1f"),
        "fvu": ("FVU", ".3f"),
        "ce_spliced": ("CE", ".3f"),
        "ce_zero_ablation": ("CE, zero", ".3f"),
        "ce_mean_ablation": ("CE, mean", ".3f"),
        "ce_clean": ("CE, clean", ".3f"),
        "loss_recovered_zero": ("recovered, zero", ".3f"),
        "loss_recovered_mean": ("recovered, mean", ".3f"),
        "mean_ablation_recovers": ("mean ablation", ".3f"),
    }
    note = (
        "Cross-entropies in nats per token: with the reconstruction, with zeros and with the mean "
        "in the activation's place, and of the unchanged model. Shares of the loss recovered are "
        "against zero and mean ablation; the last column is what mean ablation recovers of zero "
        "ablation."
    )
    return _table(rows, _present(rows), columns, note)


def frequencies(rows: Sequence[Row]) -> Table:
    """How often latents fire at the end of training."""
    columns = {
        "never": ("never", ".3f"),
        "below_1e-5": ("below 1e-5", ".3f"),
        "below_1e-4": ("below 1e-4", ".3f"),
        "rare_at_half_that_rose": ("rose", ".3f"),
        "encoder_decoder_cosine": ("cos(enc, dec)", ".2f"),
        "encoder_decoder_cosine_rare": ("of rare", ".2f"),
    }
    note = (
        "Shares of latents by how often they fire on the last activations of training; of those "
        "below 1e-4 half-way, the share that is above at the end; the median cosine of encoder and "
        "decoder rows of latents that are not rare, and of the rare."
    )
    return _table(rows, [name for name in _present(rows) if name != PRUNED], columns, note)


def rare_latents(rows: Sequence[Row], across: Mapping[str, Sequence[float]]) -> Table:
    """The similarity of the rare latents."""
    columns = {
        "n_rare": ("rare", ".0f"),
        "cosine_with_mean": ("cos with mean", ".3f"),
        "alike": ("above .95", ".3f"),
        "others_with_mean": ("of others", ".3f"),
        "encoder_on_one_direction": ("encoder, 1 direction", ".3f"),
        "decoder_on_one_direction": ("decoder, 1 direction", ".3f"),
        "on_most_aligned": ("fire on most aligned", ".3f"),
        "most_at_once": ("at once", ".3f"),
        "mean_activation": ("cos with mean activation", ".3f"),
        "across": ("cos between seeds", ".3f"),
    }
    names = [name for name in _present(rows) if name not in (PRUNED, OUT)]
    between = [{"sae": name, "across": value} for name in names for value in across.get(name, [])]
    note = (
        "Number of rare latents; median cosine of their encoder rows with their mean, and the "
        "share above .95; the same median of other latents; how much of the rare rows' squared "
        "norm lies on one direction; which share of the rare fires on the held-out activation "
        "furthest along their mean, and on any one; cosine of that mean with the mean activation; "
        "cosine of these means of different seeds."
    )
    return _table([*rows, *between], names, columns, note)


# Words.


def hooks_text(rows: Sequence[Row]) -> str:
    """MLP activations beside MLP output."""
    pairs = [
        (
            f"{LABELS[name]}: L0 {_cell(rows, name, 'l0', '.1f')}, recovered against zero ablation "
            f"{_cell(rows, name, 'loss_recovered_zero')}, against mean ablation "
            f"{_cell(rows, name, 'loss_recovered_mean')}"
        )
        for name in (PLAIN, OUT)
    ]
    return "MLP activations against MLP output. " + "; ".join(pairs) + "."


def time_text(rows: Sequence[Row]) -> str:
    """Which SAE has the fewest rare latents."""
    shares = {
        name: mean(_values(rows, name, "below_1e-4"))
        for name in _present(rows)
        if _values(rows, name, "below_1e-4")
    }
    fewest = min(shares, key=shares.__getitem__)
    idle = [
        LABELS[name]
        for name in (REINITIALIZE, LOSS_SQUARED)
        if _values(rows, name, "mse") == _values(rows, PLAIN, "mse")
    ]
    none = f" No latent was replaced in: {'; '.join(idle)}." if idle else ""
    return (
        f"Without resampling {shares[PLAIN]:.1%} of latents are rare at the end; fewest are with: "
        f"{LABELS[fewest]} ({shares[fewest]:.1%}).{none}"
    )


def rare_text(rows: Sequence[Row]) -> str:
    """Whether rare latents share a direction."""
    if not any(_values(rows, PLAIN, "n_rare")):
        return "Without resampling no latent is rare: there is no direction that they could share."
    alike = mean(_values(rows, PLAIN, "cosine_with_mean") or [0.0])
    word = (
        "are nearly one direction"
        if alike > 0.9
        else ("share a direction in part" if alike > 0.5 else "share no direction")
    )
    return (
        f"The rare latents' encoder rows {word}: their median cosine with their mean is "
        f"{alike:.2f}, that of the other latents {_cell(rows, PLAIN, 'others_with_mean', '.2f')}."
    )


def comparison(rows: Sequence[Row], across: Mapping[str, Sequence[float]]) -> list[Compared]:
    """Everything for which the document gives a figure."""
    return [*_of_all_latents(rows), *_of_rare_latents(rows, across.get(PLAIN, []))]


def _here(rows: Sequence[Row], name: str, figure: str, form: str = ".1%") -> str:
    return _cell(rows, name, figure, form, "no rare latents")


def _of_all_latents(rows: Sequence[Row]) -> list[Compared]:
    recovered = _here(rows, PLAIN, "loss_recovered_zero")
    never = _here(rows, PLAIN, "never")
    return [
        (
            "loss recovered against zero ablation",
            "92 %",
            f"{recovered} at L0 {_here(rows, PLAIN, 'l0', '.1f')}",
        ),
        (
            "mean ablation, on the scale of zero ablation",
            "25 %",
            _here(rows, PLAIN, "mean_ablation_recovers"),
        ),
        (
            "latents below 1e-4",
            "about 60 %, none dead, a mode of its own",
            f"{_here(rows, PLAIN, 'below_1e-4')}, of which never: {never}",
        ),
        (
            "loss recovered without the rare latents",
            "92 % becomes 91 %",
            f"{recovered} becomes {_here(rows, PRUNED, 'loss_recovered_zero')}",
        ),
    ]


def _of_rare_latents(rows: Sequence[Row], across: Sequence[float]) -> list[Compared]:
    cosine = _here(rows, CONSTRAINED, "cosine_with_mean", ".2f")
    rose = f"{_here(rows, PLAIN, 'rare_at_half_that_rose')} of those rare half-way"
    had_rare = _values(rows, PLAIN, "rare_at_half_that_rose")
    return [
        (
            "rare encoder rows with a cosine above .95 with their mean",
            "97.5 %",
            _here(rows, PLAIN, "alike"),
        ),
        (
            "rare decoder rows on one direction",
            "very little",
            _here(rows, PLAIN, "decoder_on_one_direction"),
        ),
        (
            "cosine of the rare mean between seeds",
            ".96",
            with_spread(across, ".3f", "fewer than two seeds with rare latents"),
        ),
        (
            "rare latents that fire on the input furthest along their mean",
            "95 %",
            _here(rows, PLAIN, "on_most_aligned"),
        ),
        (
            "cosine of encoder and decoder rows, median",
            ".5",
            _here(rows, PLAIN, "encoder_decoder_cosine", ".2f"),
        ),
        (
            "kept orthogonal to that direction",
            "a cluster of its own, in another direction",
            f"below 1e-4: {_here(rows, CONSTRAINED, 'below_1e-4')}; median cosine with their own "
            f"mean: {cosine}",
        ),
        (
            "rare latents that become more frequent late in training",
            "a drift upwards from 1.6 billion tokens on",
            rose if had_rare else "none was rare half-way",
        ),
    ]
