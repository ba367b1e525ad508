"""Tables, sentences and comparison of the study of replication."""

from collections.abc import Iterator, Mapping, Sequence
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
from lightning_sae.studies.shared.page import Compared, Table
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
    """A row for each SAE; columns are a heading, a figure and its form."""
    return Table(
        ["SAE", *columns],
        [
            [LABELS[name], *(_cell(rows, name, *column) for column in columns.values())]
            for name in names
        ],
        note,
    )


def figures_table(rows: Sequence[Row]) -> Table:
    """What each SAE recovers of activations and of the model's loss."""
    columns = {
        "L0": ("l0", ".1f"),
        "FVU": ("fvu", ".3f"),
        "CE": ("ce_spliced", ".3f"),
        "CE, zero": ("ce_zero_ablation", ".3f"),
        "CE, mean": ("ce_mean_ablation", ".3f"),
        "CE, clean": ("ce_clean", ".3f"),
        "recovered, zero": ("loss_recovered_zero", ".3f"),
        "recovered, mean": ("loss_recovered_mean", ".3f"),
        "mean ablation": ("mean_ablation_recovers", ".3f"),
    }
    note = (
        "Cross-entropies in nats per token: with the reconstruction, with zeros and with the mean "
        "in the activation's place, and of the model as it is. Shares of the loss recovered are "
        "against zero and mean ablation; the last column is what mean ablation recovers of zero "
        "ablation."
    )
    return _table(rows, _present(rows), columns, note)


def frequency_table(rows: Sequence[Row]) -> Table:
    """How often latents fire at the end of training."""
    columns = {
        "never": ("never", ".3f"),
        "below 1e-5": ("below_1e-5", ".3f"),
        "below 1e-4": ("below_1e-4", ".3f"),
        "rose": ("rare_at_half_that_rose", ".3f"),
        "cos(enc, dec)": ("encoder_decoder_cosine", ".2f"),
        "of rare": ("encoder_decoder_cosine_rare", ".2f"),
    }
    note = (
        "Shares of latents by how often they fire on the last activations of training; of those "
        "below 1e-4 half-way, the share that is above at the end; the median cosine of encoder and "
        "decoder rows of latents that are not rare, and of the rare."
    )
    return _table(rows, [name for name in _present(rows) if name != PRUNED], columns, note)


def rare_table(rows: Sequence[Row], across: Mapping[str, Sequence[float]]) -> Table:
    """How alike the rare latents are."""
    columns = {
        "rare": ("n_rare", ".0f"),
        "cos with mean": ("cosine_with_mean", ".3f"),
        "above .95": ("alike", ".3f"),
        "of others": ("others_with_mean", ".3f"),
        "encoder, 1 direction": ("encoder_on_one_direction", ".3f"),
        "decoder, 1 direction": ("decoder_on_one_direction", ".3f"),
        "fire on most aligned": ("on_most_aligned", ".3f"),
        "at once": ("most_at_once", ".3f"),
        "cos with mean activation": ("mean_activation", ".3f"),
    }
    names = [name for name in _present(rows) if name not in (PRUNED, OUT)]
    note = (
        "Number of rare latents; median cosine of their encoder rows with their mean, and the "
        "share above .95; the same median of other latents; how much of the rare rows' squared "
        "norm lies on one direction; which share of the rare fires on the held-out activation "
        "furthest along their mean, and on any one; cosine of that mean with the mean activation."
    )
    table = _table(rows, names, columns, note)
    seeds = [with_spread(across.get(n, []), ".3f") for n in names]
    return Table(
        [*table.headings, "cos between seeds"],
        [[*row, cell] for row, cell in zip(table.rows, seeds, strict=True)],
        note + " The last column is the cosine of these means of different seeds.",
    )


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


def comparison(rows: Sequence[Row], across: Mapping[str, Sequence[float]]) -> Iterator[Compared]:
    """Everything for which the document gives a figure."""
    yield from _of_loss(rows)
    yield from _of_rare_rows(rows, across.get(PLAIN) or [])
    yield from _of_what_becomes_of_them(rows)


def _here(rows: Sequence[Row], name: str, figure: str, form: str) -> str:
    return _cell(rows, name, figure, form, "no rare latents")


def _of_loss(rows: Sequence[Row]) -> Iterator[Compared]:
    recovered = _here(rows, PLAIN, "loss_recovered_zero", ".1%")
    yield (
        "loss recovered against zero ablation",
        "92 %",
        f"{recovered} at L0 {_here(rows, PLAIN, 'l0', '.1f')}",
    )
    yield (
        "mean ablation, on the scale of zero ablation",
        "25 %",
        _here(rows, PLAIN, "mean_ablation_recovers", ".1%"),
    )
    yield (
        "latents below 1e-4",
        "about 60 %, none dead, a mode of its own",
        f"{_here(rows, PLAIN, 'below_1e-4', '.1%')}, of which never: "
        f"{_here(rows, PLAIN, 'never', '.1%')}",
    )
    yield (
        "loss recovered without the rare latents",
        "92 % becomes 91 %",
        f"{recovered} becomes {_here(rows, PRUNED, 'loss_recovered_zero', '.1%')}",
    )


def _of_rare_rows(rows: Sequence[Row], between: Sequence[float]) -> Iterator[Compared]:
    yield (
        "rare encoder rows with a cosine above .95 with their mean",
        "97.5 %",
        _here(rows, PLAIN, "alike", ".1%"),
    )
    yield (
        "rare decoder rows on one direction",
        "very little",
        _here(rows, PLAIN, "decoder_on_one_direction", ".1%"),
    )
    yield (
        "cosine of the rare mean between seeds",
        ".96",
        with_spread(between, ".3f", "fewer than two seeds with rare latents"),
    )
    yield (
        "rare latents that fire on the input furthest along their mean",
        "95 %",
        _here(rows, PLAIN, "on_most_aligned", ".1%"),
    )
    yield (
        "cosine of encoder and decoder rows, median",
        ".5",
        _here(rows, PLAIN, "encoder_decoder_cosine", ".2f"),
    )


def _of_what_becomes_of_them(rows: Sequence[Row]) -> Iterator[Compared]:
    yield (
        "kept orthogonal to that direction",
        "a cluster of its own, in another direction",
        f"below 1e-4: {_here(rows, CONSTRAINED, 'below_1e-4', '.1%')}; median cosine with their "
        f"own mean: {_here(rows, CONSTRAINED, 'cosine_with_mean', '.2f')}",
    )
    yield (
        "rare latents that become more frequent late in training",
        "a drift upwards from 1.6 billion tokens on",
        f"{_here(rows, PLAIN, 'rare_at_half_that_rose', '.1%')} of those rare half-way"
        if _values(rows, PLAIN, "rare_at_half_that_rose")
        else "none was rare half-way",
    )
