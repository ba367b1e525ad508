"""Write the page of the benchmark in Markdown, with tables and targets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import formatting
from benchmarks.formatting import Row
from benchmarks.libraries.base import OURS


class Target(NamedTuple):
    """Targets of a step: how much faster than the best peer, and how many floors at most."""

    peer: float
    floor: float


TARGETS = {
    "relu": Target(4, 1.5),
    "topk": Target(4, 1.4),
    "gated": Target(5, 1.6),
    "jumprelu": Target(5, 1.6),
    "batchtopk": Target(5, 1.6),
}
NAMES = {
    "relu": "ReLU, L1",
    "topk": "TopK",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
    "batchtopk": "BatchTopK",
}
FLOOR_TARGETS = {  # times the floor at most, by number of latents
    1024: dict.fromkeys(NAMES, 3.0),
    8192: {"relu": 1.25, "topk": 1.25, "batchtopk": 1.25, "gated": 1.4, "jumprelu": 1.4},
}
BF16_TARGET = 1.5  # times the speed of float32 at least
STREAM_TARGET = 0.9
FIT_TARGETS = {1024: 2.5, 8192: 5.0}
SPARSE_LIMIT = 0.01  # relative difference in loss between sparse and dense latents
MIB, GIB = 2**20, 2**30


def page(results: Row) -> str:
    """The whole page in Markdown, with the sections that were measured."""
    lines = [
        "# Benchmark",
        "",
        "How long training takes here and in other libraries, on the CPU unless a section says "
        "otherwise. All of a section ran on one machine, one process at a time, with the same "
        "tensors; [benchmarks/README.md](../benchmarks/README.md) says how. All figures are in "
        "[benchmark.json](benchmark.json). `make benchmark` renews this page.",
    ]
    for name, write in WRITERS.items():
        if name in results:
            lines += ["", *write(results[name])]
    return "\n".join([*lines, "", *_surroundings(results)]) + "\n"


def _surroundings(results: Row) -> list[str]:
    """Machine, versions and date, once for all sections of a run."""
    lines = ["## Where and with what"]
    runs = [results[name]["surroundings"] for name in WRITERS if name in results]
    for run in [run for at, run in enumerate(runs) if run not in runs[:at]]:
        names = [name for name in WRITERS if results.get(name, {}).get("surroundings") == run]
        lines += ["", f"For {', '.join(names)}:", ""]
        lines += [f"- {what}: {text}" for what, text in run.items()]
    return lines


# One step.


def _steps(section: Row) -> list[str]:
    plan = section["plan"]
    lines = [
        "## One optimizer step",
        "",
        f"{plan['batch_size']:,} activations of width {plan['d_in']}, {plan['d_sae']:,} latents, "
        f"float32. Milliseconds from one batch asked for to the next, median of "
        f"{plan['n_steps']} steps (and quartiles); memory at its peak, above what there was before "
        f"the SAE. L0 was set to {plan['l0']} where a threshold decides; k is {plan['k']}. The "
        "floor is the encoder's product and one pass of Adam.",
    ]
    for architecture in plan["architectures"]:
        rows = _of(architecture, section)
        if rows:
            lines += ["", *_step_table(architecture, rows, section["floors"][0])]
    return lines


def _of(architecture: str, section: Row) -> list[Row]:
    return [row for row in section["rows"] if row["architecture"] == architecture]


def _step_table(architecture: str, rows: Sequence[Row], floor: Row) -> list[str]:
    mine = formatting.ours(rows)
    ours = None if mine is None else formatting.median(mine)
    least = formatting.median(floor)
    table = [_step_row(row, ours, least) for row in rows]
    last = formatting.quotient(least, ours)
    table.append(["the floor", formatting.milliseconds(floor), last, "1", "", ""])
    head = ["", "ms", "of ours", "of the floor", "memory, MiB", "L0"]
    verdicts = _verdicts(architecture, rows, ours, least)
    return [f"### {NAMES[architecture]}", "", *formatting.table(head, table), "", *verdicts]


def _step_row(row: Row, ours: float | None, least: float | None) -> list[str]:
    time = formatting.median(row)
    if time is None:
        return [formatting.name(row), formatting.trouble(row), "", "", "", ""]
    return [
        formatting.name(row),
        formatting.milliseconds(row),
        formatting.quotient(time, ours),
        formatting.quotient(time, least),
        f"{row['peak_bytes'] / MIB:,.0f}",
        f"{row['l0']:.1f}",
    ]


def _verdicts(
    architecture: str, rows: Sequence[Row], ours: float | None, least: float | None
) -> list[str]:
    target, others = TARGETS[architecture], formatting.peers(rows)
    lines = []
    if ours and others:
        best = min(others, key=lambda row: row["seconds"]["median"])
        times = best["seconds"]["median"] / ours
        what = f"Time of the best peer ({formatting.name(best)}) over ours"
        lines.append(formatting.at_least(what, times, target.peer))
    if ours and least:
        lines.append(formatting.at_most("Our time over the floor", ours / least, target.floor))
    return lines


# Growth.


def _growth(section: Row) -> list[str]:
    plan = section["plan"]
    lines = [
        "## As the dictionary grows",
        "",
        "Seconds of a step and, in brackets, peak memory in GiB. Who needs more than "
        f"{plan['budget']:g} s for {plan['n_steps']} steps makes fewer, but at least 3; who needs "
        f"more than {plan['memory_gib']:g} GiB or {plan['timeout']:g} s in all is stopped.",
        "",
        "![Time of a step against the number of latents](benchmark.png)",
    ]
    for architecture in ("relu", "topk"):
        rows = _of(architecture, section)
        if rows:
            table = _growth_table(rows, section["floors"])
            lines += ["", f"### {NAMES[architecture]}", "", *table]
    return lines


def _growth_table(rows: Sequence[Row], floors: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(formatting.name(row) for row in rows))
    table = []
    for floor in floors:
        cells = {formatting.name(row): _cell(row) for row in rows if row["d_sae"] == floor["d_sae"]}
        product = formatting.seconds({"seconds": floor["product"]} if "product" in floor else floor)
        others = [cells.get(name, "") for name in names]
        table.append([f"{floor['d_sae']:,}", product, formatting.seconds(floor), *others])
    return formatting.table(["latents", "encoder's product", "the floor", *names], table)


def _cell(row: Row) -> str:
    if "seconds" not in row:
        return formatting.trouble(row)
    return f"{formatting.seconds(row)} ({row['peak_bytes'] / GIB:.2f})"


# A whole run.


def _run(section: Row) -> list[str]:
    plan, rows = section["plan"], section["rows"]
    measured = [row for row in rows if "loss" in row]
    dense = next((row for row in measured if row["variant"] == "dense"), None)
    goal = None if dense is None else dense["loss"] * (1 + SPARSE_LIMIT)
    head = ["", "steps", "seconds", "to the goal", "loss", "L0", "variance left", "dense steps"]
    return [
        "## A whole run",
        "",
        f"{plan['run_steps']} steps from the start on {plan['batch_size']:,} toy activations of "
        f"width {plan['run_d_in']} ({plan['run_features']:,} features, {plan['run_active']:g} of "
        f"them at a time); {plan['run_d_sae']:,} ReLU latents, L1 {plan['run_l1']:g}, learning "
        f"rate {plan['run_lr']:g}. Loss, L0 and share of variance left over are those of held-out "
        "rows, by one formula for all. `dense` is our SAE with its latents kept as a matrix, from "
        f"the same seed; the goal is its last loss, within {SPARSE_LIMIT:.0%}.",
        "",
        *formatting.table(head, [_run_row(row, goal) for row in rows]),
        "",
        *_sparse_against_dense(formatting.ours(measured), dense),
    ]


def _run_row(row: Row, goal: float | None) -> list[str]:
    if "loss" not in row:
        return [formatting.name(row), "", formatting.trouble(row), *[""] * 5]
    there = [look["seconds"] for look in row["looks"] if goal is not None and look["loss"] <= goal]
    return [
        formatting.name(row),
        str(row["steps"]),
        f"{row['wall']:.1f}",
        f"{there[0]:.1f}" if there else "not reached",
        f"{row['loss']:.4f}",
        f"{row['l0']:.1f}",
        f"{row['fvu']:.4f}",
        str(row["dense_steps"]) if row["library"] == OURS else "",
    ]


def _sparse_against_dense(sparse: Row | None, dense: Row | None) -> list[str]:
    if dense is None or sparse is None:
        return []
    apart = abs(sparse["loss"] / dense["loss"] - 1)
    verdict = "kept" if apart <= SPARSE_LIMIT else "exceeded"
    return [
        f"- Sparse against dense, same seed: the losses differ by {apart:.3%}, limit "
        f"{SPARSE_LIMIT:.0%}: {verdict}. Time of dense over sparse: "
        f"{dense['wall'] / sparse['wall']:.2f}."
    ]


# Language models.


def _stream(section: Row) -> list[str]:
    bare, *ours = section["rows"]
    full = bare.get("rate")
    table = [
        [row["what"], formatting.rate(row), f"{row['rate'] / full:.1%}" if _both(row, bare) else ""]
        for row in section["rows"]
    ]
    lines = [
        "## The stream of activations",
        "",
        f"{_source(section)}. The bare `transformers` model gets the same blocks and stops behind "
        "the same layer; the stream also reads text, makes tokens, drops BOS and shuffles.",
        "",
        *formatting.table(["", "activations/s", "of the bare model"], table),
        "",
    ]
    shares = [row["rate"] / full for row in ours if _both(row, bare)]
    if shares:
        verdict = "reached" if max(shares) >= STREAM_TARGET else "missed"
        lines.append(f"- {max(shares):.1%}, target at least {STREAM_TARGET:.0%}: {verdict}.")
    return lines


def _both(row: Row, bare: Row) -> bool:
    return "rate" in row and "rate" in bare


def _fit(section: Row) -> list[str]:
    plan = section["plan"]
    lines = [
        "## Training on a language model",
        "",
        f"{_source(section)}. {plan['fit_steps']} steps of {plan['source']['batch_size']:,} "
        "activations, ReLU latents with an L1 penalty, from the call that starts the run until it "
        "returns. Model and text are opened before, for SAELens tokens made too. SAELens runs "
        "twice: with our buffer and prefetch, and with its defaults.",
    ]
    for d_sae in dict.fromkeys(row["d_sae"] for row in section["rows"]):
        rows = [row for row in section["rows"] if row["d_sae"] == d_sae]
        lines += ["", f"### {d_sae:,} latents", "", *_fit_table(d_sae, rows)]
    return lines


def _fit_table(d_sae: int, rows: Sequence[Row]) -> list[str]:
    table = [[formatting.name(row), formatting.rate(row), *_quality(row)] for row in rows]
    lines = formatting.table(["", "activations/s", "L0", "variance left"], table)
    ours, others = formatting.ours(rows), formatting.peers(rows)
    if ours and others:
        best = max(others, key=lambda row: row["rate"])
        what = f"Our rate over the best peer's ({formatting.name(best)})"
        times = ours["rate"] / best["rate"]
        lines += ["", formatting.at_least(what, times, FIT_TARGETS.get(d_sae))]
    return lines


def _quality(row: Row) -> list[str]:
    return [f"{row['l0']:.1f}", f"{row['fvu']:.3f}"] if "rate" in row else ["", ""]


def _source(section: Row) -> str:
    source = section["plan"]["source"]
    name = source["model"].rstrip("/").split("/")[-1]
    model = "The embedded language model" if name == "embedded" else f"The language model {name}"
    return f"{model} behind layer {source['layer']}, blocks of {source['context_length']} tokens"


# Beside the floor.


def _floor(section: Row) -> list[str]:
    plan = section["plan"]
    lines = [
        "## Beside the least that a step must do",
        "",
        f"Our steps on {plan['batch_size']:,} activations, beside the encoder's product and one "
        "pass of Adam. What stands between: selecting the active latents, the sparse products, the "
        "decoder's norms, and Lightning. The smaller the product, the larger their share.",
    ]
    of_float32: dict[tuple[Any, ...], Row] = {}
    for least in section["floors"]:
        case = {name: least[name] for name in ("d_in", "l0_asked", "d_sae", "precision")}
        rows = [row for row in section["rows"] if case.items() <= row.items()]
        sizes = f"Width {least['d_in']}, {least['d_sae']:,} latents, L0 {least['l0_asked']}"
        lines += ["", f"### {sizes}, {least['precision']}", ""]
        lines += _floor_table(rows, least, of_float32)
        of_float32 |= {
            (least["d_sae"], least["l0_asked"], row["architecture"]): row for row in rows
        }
    return lines


def _floor_table(
    rows: Sequence[Row], least: Row, of_float32: Mapping[tuple[Any, ...], Row]
) -> list[str]:
    lower = least["precision"] != "32-true"
    last = ["of float32's speed"] if lower else []
    table = [["the floor", formatting.milliseconds(least), "1", "", *[""] * len(last)]]
    for row in rows:
        architecture, time = row["architecture"], formatting.median(row)
        quotient = formatting.quotient(time, formatting.median(least)) if time else ""
        target = None if lower else FLOOR_TARGETS.get(least["d_sae"], {}).get(architecture)
        verdict = "" if target is None or not quotient else _verdict(float(quotient), target)
        cells = [NAMES[architecture], formatting.milliseconds(row), quotient, verdict]
        before = of_float32.get((least["d_sae"], least["l0_asked"], architecture))
        if lower and before is not None and time:
            speed = (formatting.median(before) or 0.0) / time
            reached = "reached" if speed >= BF16_TARGET else "missed"
            cells.append(f"{speed:.2f}, target at least {BF16_TARGET:g}: {reached}")
        table.append([*cells, *[""] * (len(last) + 4 - len(cells))])
    return formatting.table(["", "ms", "of the floor", "target", *last], table)


def _verdict(found: float, target: float) -> str:
    return f"at most {target:g}: {'reached' if found <= target else 'missed'}"


# A GPU.


def _gpu(section: Row) -> list[str]:
    plan, card = section["plan"], section["card"]
    lines = ["## One optimizer step on a GPU", ""]
    if card is None:
        return [*lines, "There was no GPU: `make benchmark BENCHMARK=gpu` where there is one."]
    lines.append(
        f"On {card}: {plan['gpu_batch_size']:,} activations of width {plan['gpu_d_in']}, L0 "
        f"{plan['l0']} where a threshold decides, k {plan['k']}. Milliseconds by the GPU's clock "
        "and, in brackets, peak memory in GiB. The product is the encoder's alone, in the same "
        "precision: what a step at the card's full rate would take for it. In bf16-mixed each "
        "library uses bfloat16 by its own means; sparsify always does."
    )
    for floor in section["floors"]:
        case = {name: floor[name] for name in ("d_sae", "precision")}
        rows = [row for row in section["rows"] if case.items() <= row.items()]
        heading = f"### {floor['d_sae']:,} latents, {floor['precision']}"
        lines += ["", heading, "", *_gpu_table(rows, floor)]
    return lines


def _gpu_table(rows: Sequence[Row], floor: Row) -> list[str]:
    names = list(dict.fromkeys(formatting.name(row) for row in rows))
    table = []
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        cells = {
            formatting.name(row): _gpu_cell(row)
            for row in rows
            if row["architecture"] == architecture
        }
        table.append([NAMES[architecture], *(cells.get(name, "") for name in names)])
    least = {"product": floor.get("product"), "floor": floor.get("seconds")}
    shown = [f"{1000 * found['median']:.2f}" if found else "" for found in least.values()]
    table.append([f"the product: {shown[0]}; with Adam: {shown[1]}", *[""] * len(names)])
    return formatting.table(["", *names], table)


def _gpu_cell(row: Row) -> str:
    if "seconds" not in row:
        return formatting.trouble(row)
    return f"{1000 * row['seconds']['median']:.2f} ({row['peak_bytes'] / GIB:.2f})"


WRITERS: dict[str, Callable[[Row], list[str]]] = {
    "steps": _steps,
    "growth": _growth,
    "run": _run,
    "stream": _stream,
    "fit": _fit,
    "floor": _floor,
    "gpu": _gpu,
}
