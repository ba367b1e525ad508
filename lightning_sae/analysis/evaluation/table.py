"""Figures of several SAEs as one flat row each, as a table, and as a plot."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lightning_sae.analysis.evaluation.hparams import write_hparams
from lightning_sae.analysis.evaluation.places import labelled
from lightning_sae.analysis.evaluation.probing import WIDTHS
from lightning_sae.files import write_atomically, written_whole

COLUMNS = {
    "L0": "l0",
    "FVU": "fvu",
    "loss recovered": "loss_recovered_zero",
    "nats added": "ce_added",
    "compute": "compute_share",
    "tokens, 1": "probing_token_1",
    "tokens, 5": "probing_token_5",
    "contexts, 1": "probing_context_1",
    "contexts, 5": "probing_context_5",
    "absorbed": "absorption_fraction",
    "in full": "absorption_full",
    "latents": "latents_per_property",
    "dead": "dead_fraction",
    "duplicates": "duplicates",
    "together": "together",
    "seeds": "stability_cosine",
}
"""Columns of the table, and the figures in them."""


def flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an SAE as one row of numbers, for a table or TensorBoard's HParams.

    Figures that are not available (no compute curve, no other seed, no property) are left out.

    Args:
        figures: Result of `evaluate_saes` for one SAE, or `figures` of one in `evaluation.json`.

    Returns:
        All figures of a test; `ce_added`; `compute_share` with `_low` and `_high`; mean accuracies
        `probing_token_1` and so on; `absorption_fraction`, `absorption_full` and
        `latents_per_property` over all token properties that a probe finds in the activation, and
        with the suffix `_letters` over first letters; `duplicates`, `together`, `stability_cosine`,
        `stability_above_0.9`, `stability_random`.
    """
    held_out = figures["held_out"]
    row = {**held_out, "ce_added": held_out["ce_spliced"] - held_out["ce_clean"]}
    if figures["compute"] is not None:
        own = figures["compute"]
        row |= {"compute_share": own["share"]}
        row |= {f"compute_share_{end}": own[end] for end in ("low", "high")}
    row |= mean_accuracies(figures["probing"], "latents")
    row |= _absorption(figures["absorption"])
    row |= {name: figures[name] for name in ("duplicates", "together")}
    pairs = figures["stability"]["pairs"]
    if pairs:
        row["stability_cosine"] = _mean(p["decoder_mean"] for p in pairs)
        row["stability_above_0.9"] = _mean(p["decoder_above_0.9"] for p in pairs)
        row["stability_random"] = _mean(p["random_mean"] for p in pairs)
    # NaN is null in a JSON file.
    known = {name: value for name, value in row.items() if value is not None}
    return {name: float(value) for name, value in known.items() if not math.isnan(value)}


def mean_accuracies(probing: Mapping[str, Any], of: str) -> dict[str, float]:
    """Mean accuracy over the properties of tokens and of contexts, by number of columns."""
    found = {}
    for kind in ("token", "context"):
        own = [probed for probed in probing.values() if probed["of"] == kind]
        for k in WIDTHS if own else ():
            found[f"probing_{kind}_{k}"] = _mean(probed[f"{of}_{k}"] for probed in own)
    return found


def _absorption(found: Mapping[str, Any]) -> dict[str, float]:
    letters = [own for name, own in found.items() if name.startswith("first_letter=")]
    row = {}
    for end, own in (("", list(found.values())), ("_letters", letters)):
        if own:
            row[f"absorption_fraction{end}"] = _mean(f["fraction"] for f in own)
            row[f"absorption_full{end}"] = _mean(f["full"] for f in own)
            row[f"latents_per_property{end}"] = _mean(len(f["latents"]) for f in own)
    return row


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def rows_of(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each SAE: name, path, architecture, size, and the result of `flat`."""
    about = ("name", "path", "architecture", "d_in", "d_sae", "model", "hook_name")
    return pd.DataFrame(
        [
            {
                **{key: r[key] for key in about},
                **({"place": ", ".join(r["place"])} if r.get("place") else {}),
                **flat(r["figures"]),
            }
            for r in results
        ]
    )


def markdown(results: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]) -> str:
    """The table, with rows of the activation and of neurons as baselines for probes."""
    names = list(COLUMNS)
    lines = ["| | " + " | ".join(names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for result in results:
        row = flat(result["figures"])
        cells = [_cell(column, row) for column in COLUMNS.values()]
        label = labelled(_of_cell(result["name"]), result.get("place", []), "`")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for reference in references:
        probing, place = reference["probing"], reference.get("place", [])
        few = mean_accuracies(probing, "neurons")
        whole = {
            f"probing_{kind}_5": _mean(p["activation"] for p in probing.values() if p["of"] == kind)
            for kind in dict.fromkeys(p["of"] for p in probing.values())
        }
        # Neurons are named by their own hook; several hooks of a layer have the same.
        neurons = f"neurons, `{reference['neurons_at']}`"
        of_neurons = [part for part in place if part != reference.get("hook_name")]
        for name, row in (
            (labelled(neurons, of_neurons, "`"), few),
            (labelled("the whole activation", place, "`"), whole),
        ):
            cells = [_cell(column, row) for column in COLUMNS.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _of_cell(text: str) -> str:
    """Text that ends no cell of a table."""
    return text.replace("|", "\\|")


def over_seeds(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of means ± standard deviations over SAEs that differ in their seeds only.

    Empty if there are none. A row has the name of its first SAE, without the seed.
    Cosines between seeds have no spread, because two SAEs share the figure of their pair.
    """
    by_name = {result["name"]: result for result in results}
    groups = dict.fromkeys(
        frozenset([name, *(pair["with"] for pair in result["figures"]["stability"]["pairs"])])
        for name, result in by_name.items()
    )
    several = [[name for name in by_name if name in group] for group in groups if len(group) > 1]
    if not several:
        return ""
    lines = ["| | n | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) + 1)]
    for names in several:
        rows = [flat(by_name[name]["figures"]) for name in names]
        label = labelled(_of_cell(without_seed(names)), by_name[names[0]].get("place", []), "`")
        cells = [_mean_and_spread(column, rows) for column in COLUMNS.values()]
        lines.append(f"| {label} | {len(names)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def without_seed(names: Sequence[str]) -> str:
    """The first of some names, without the part that can only be the seed.

    Example:
        >>> without_seed(["relu-0", "relu-1"]), without_seed(["a-seed=0-k=16", "a-seed=1-k=16"])
        ('relu', 'a-k=16')
        >>> without_seed(["l1-0.5", "again"])
        'l1-0.5'
    """
    for pattern in (r"[-_/]?seed[-_=]?\d+", r"[-_/]?\d+$"):
        without = {re.sub(pattern, "", name) for name in names}
        if len(without) == 1 and len(set(names)) > 1 and without != {""}:
            return without.pop().lstrip("-_/")
    return names[0]


def _mean_and_spread(column: str, rows: Sequence[Mapping[str, float]]) -> str:
    values = [row[column] for row in rows if column in row]
    if not values:
        return ""
    found = [mean(values)]
    if len(values) > 1 and column != "stability_cosine":
        found.append(stdev(values))
    return " ± ".join(_number(column, value) for value in found)


def _cell(column: str, row: Mapping[str, float]) -> str:
    if column not in row:
        return ""
    text = _number(column, row[column])
    if column == "compute_share":
        return f"{text} ({row['compute_share_low']:.2f} to {row['compute_share_high']:.2f})"
    return text


def _number(column: str, value: float) -> str:
    if column == "compute_share":
        return f"{value:.2f}"
    if column in ("l0", "latents_per_property"):
        return f"{value:.1f}"
    if abs(value) >= 1000:
        return f"{value:.2e}"
    return f"{value:.3f}".lstrip("0") or "0"


def picture(results: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each column of the table, a bar for each SAE."""
    rows = [flat(result["figures"]) for result in results]
    names = [labelled(result["name"], result.get("place", [])) for result in results]
    panels = [(title, c) for title, c in TITLES.items() if any(c in row for row in rows)]
    across = 4
    down = -(-len(panels) // across)
    figure = Figure(
        figsize=(13, down * (1.0 + 0.22 * len(rows)) + 0.3), dpi=110, layout="constrained"
    )
    axes = figure.subplots(down, across, sharey=True, squeeze=False).flat
    for axis, (title, column) in zip(axes, panels, strict=False):
        values = [_drawn(row.get(column)) for row in rows]
        axis.barh(names, values, color="#4477aa")
        for place, value in enumerate(values):
            if math.isnan(value):  # or else it would look like 0
                axis.text(
                    0.02,
                    place,
                    "no figure",
                    fontsize=6,
                    transform=axis.get_yaxis_transform(),
                    va="center",
                )
        if column == "compute_share":
            for place, row in enumerate(rows):
                ends = [_drawn(row.get(f"{column}_{end}")) for end in ("low", "high")]
                axis.plot(ends, [place, place], color="black", linewidth=1)
        ends = [_drawn(row.get(f"{column}_high", v)) for row, v in zip(rows, values, strict=True)]
        largest = max((v for v in ends if not math.isnan(v)), default=0.0)
        base = 0.5 if column.startswith("probing") else 0.0
        least = min([base, *(v for v in values if not math.isnan(v))])
        axis.set_xlim(least, max(1.05 * largest, base) or 1.0)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()  # one for all panels, which share it
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_visible(False)
    return figure


def _drawn(value: float | None) -> float:
    """A value of a bar; NaN if there is none, or none that can be drawn."""
    return value if value is not None and math.isfinite(value) else float("nan")


TITLES = {
    "L0": "l0",
    "fraction of variance unexplained": "fvu",
    "loss recovered": "loss_recovered_zero",
    "compute of a model as bad, share": "compute_share",
    "probing of tokens, 1 latent": "probing_token_1",
    "probing of tokens, 5 latents": "probing_token_5",
    "probing of contexts, 1 latent": "probing_context_1",
    "probing of contexts, 5 latents": "probing_context_5",
    "absorption fraction": "absorption_fraction",
    "full absorption": "absorption_full",
    "latents per property": "latents_per_property",
    "dead latents": "dead_fraction",
    "duplicates": "duplicates",
    "always together": "together",
    "matched cosine with another seed": "stability_cosine",
}
"""Titles of the plot's panels, and the figures in them."""


def write(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Write `evaluation.json`, `.csv`, `.md`, `.png` and `tensorboard` into a folder."""
    results, references = evaluation["saes"], evaluation["references"]
    tables = [markdown(results, references), over_seeds(results)]
    texts = {
        "evaluation.json": json.dumps(_plain(evaluation), indent=1) + "\n",
        "evaluation.csv": rows_of(results).to_csv(index=False),
        "evaluation.md": "\n".join(filter(None, tables)),
    }
    figure = picture(results)
    with written_whole(folder) as new:
        for name, text in texts.items():
            write_atomically(new / name, partial(Path.write_text, data=text))
        write_atomically(new / "evaluation.png", lambda path: figure.savefig(path, format="png"))
        rows = [flat(result["figures"]) for result in results]
        write_hparams(new / "tensorboard", results, rows)


def _plain(value: Any) -> Any:
    """The same with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
