"""Hand SAEs over in both directions and write the table: `python -m benchmarks.interop`."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.interop import ours, theirs
from benchmarks.interop.compare import Row, Side, compared
from benchmarks.interop.libraries import LIBRARIES, saelens
from benchmarks.interop.page import page
from benchmarks.interop.saebench import checked
from benchmarks.interop.splicing import spliced
from lightning_sae import JumpReLUSAE, ReLUSAE, SparseAutoencoder, TiedSAE, load
from lightning_sae.interop import export

PACKAGES = ("sae-lens", "dictionary-learning", "eai-sparsify", "sae-bench", "transformer-lens")
N_ROWS = 2048


def main() -> None:
    """Run the parts that are asked for, write the page, and end with an error if SAEs differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interop", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; or all")
    parser.add_argument("--output", default="docs/interop", help="path of the page, less .md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    output = Path(asked.output).with_suffix(".json")
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    results["versions"] = {name: version(name) for name in (*PACKAGES, "torch")}
    results["rows"] = N_ROWS
    for part in asked.parts or PARTS:
        with TemporaryDirectory() as made:
            results[part] = PARTS[part](Path(made))
        output.write_text(json.dumps(results, indent=1) + "\n")
        page(output.with_suffix(".md"), results)
    say(f"Wrote {output.with_suffix('.md')} and {output.name}.")
    rows = [Row(**row) for part in DIRECTIONS for row in results.get(part, [])]
    wrong = [row.sae for row in rows if row.verdict == "DIFFERENT"]
    if wrong:
        sys.exit(f"{len(wrong)} SAEs differ: {'; '.join(wrong)}")


def out(root: Path) -> Iterator[Row]:
    """SAEs trained here, read by the other libraries."""
    for number, (case, sae) in enumerate(ours.trained()):
        x = activations(case.hook)
        for format in LIBRARIES:
            for unit in (False, True):
                if not unit or "free" in case.arguments.values():
                    folder = root / f"{number}-{format}-{unit}"
                    yield told("to", _handed_over(case, sae, format, unit, folder, x))


def _handed_over(
    case: ours.Case,
    sae: SparseAutoencoder,
    format: str,
    unit: bool,
    folder: Path,
    x: Float[Tensor, "rows d_in"],
) -> Row:
    name = f"{case.name}{', norms folded on export' if unit else ''}"
    try:
        export(sae.to(case.dtype), folder, format, unit)
    except ValueError as error:
        return Row(format, name, note=str(error).splitlines()[0])
    # Thresholds in a SAELens file are rounded down to its dtype, and right for sums in it.
    in_its_dtype = format == "saelens" and case.kind is JumpReLUSAE
    dtype = case.dtype if in_its_dtype else torch.float32
    reader = partial(saelens, dtype=dtype) if in_its_dtype else LIBRARIES[format]
    sae.to(dtype)
    expected = Side(sae.encode, sae.decode)
    note = "both compute in bfloat16" if dtype == torch.bfloat16 else ""
    if format == "dictionary_learning" and type(sae) in FOLDED:
        unit, note = True, "its `load_dictionary` folds the norms"
    if unit:
        expected = _times(expected, sae.W_dec.detach().norm(dim=-1))
    return compared(format, name, expected, reader(folder), x.to(dtype), note)


FOLDED = (ReLUSAE, TiedSAE)
"""Become its `AutoEncoder`, whose norms `load_dictionary` folds into the encoder."""


def _times(side: Side, norms: Float[Tensor, " d_sae"]) -> Side:
    """An SAE whose latents are multiplied by the norms of its decoder rows."""
    return Side(lambda x: side.encode(x) * norms, lambda f: side.decode(f / norms))


def back(root: Path) -> Iterator[Row]:
    """SAEs trained by the other libraries, read here."""
    rows = activations(ours.RESIDUAL, 16 * N_ROWS)
    x, train = rows[:N_ROWS], rows[N_ROWS:]
    for each in theirs.trained(train, root):
        try:
            sae = load(each.folder).float()
        except ValueError as error:
            row = Row(each.library, each.name, note=str(error).splitlines()[0])
        else:
            units = str(sae.source.get("imported", {}).get("units", ""))
            own = Side(sae.encode, sae.decode)
            if each.library == "dictionary_learning" and type(sae) in FOLDED:
                own = _times(own, sae.W_dec.detach().norm(dim=-1))
                units += "; its `load_dictionary` folds the norms of decoder columns"
            row = compared(each.library, each.name, each.side, own, x, units)
        yield told("from", row)


def activations(hook: str, n: int = N_ROWS) -> Float[Tensor, "rows d_in"]:
    """Activations of the embedded model on held-out text."""
    data = ours.data_at(hook)
    found: list[Tensor] = []
    for batch in data.val_dataloader():
        found.append(batch)
        if sum(map(len, found)) >= n:
            break
    return torch.cat(found)[:n]


def told(direction: str, row: Row) -> Row:
    """A row, which the reader at the terminal sees too."""
    figures = f"L0 {row.l0:.1f}" if row.l0 is not None else row.note[:80]
    say(f"{row.verdict:<10} {direction:<5}{row.library:<20}{row.sae:<70} {figures}")
    return row


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


DIRECTIONS = ("out", "in")
PARTS: dict[str, Callable[[Path], Any]] = {
    "out": lambda root: [asdict(row) for row in out(root)],
    "in": lambda root: [asdict(row) for row in back(root)],
    "saebench": checked,
    "splicing": spliced,
}
"""What can be run on its own, by the name of its results."""


if __name__ == "__main__":
    main()
