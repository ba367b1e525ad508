"""`lightning-sae evaluate`: metrics of several SAEs and of their latents as features."""

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from lightning_sae.analysis.analyze import data_of
from lightning_sae.analysis.evaluation import table
from lightning_sae.analysis.evaluation.compute import read_curve
from lightning_sae.analysis.evaluation.figures import Questions, evaluate_saes, questions_of
from lightning_sae.analysis.evaluation.passages import read_passages
from lightning_sae.analysis.evaluation.places import Place, grouped
from lightning_sae.analysis.evaluation.properties import Question
from lightning_sae.architectures import SparseAutoencoder
from lightning_sae.checks import (
    expect,
    require_between,
    require_integers,
    require_new_folder,
    require_positive,
)
from lightning_sae.data import ActivationDataModule
from lightning_sae.files import read_json
from lightning_sae.loading import load

SHORT = """Evaluate SAEs: the figures of a test, sparse probing, absorption and splitting, the
compute that splicing costs, redundancy and stability, in one table."""


def evaluate(
    saes: list[str],
    output: str = "runs/evaluation",
    *,
    tokens: int = 131072,
    probe_tokens: int = 65536,
    properties: list[str] | str | None = None,
    label_column: str | None = None,
    curve: str | None = None,
    model: str | None = None,
    hook_name: str | None = None,
    text: str | list[str] | None = None,
    text_column: str | None = None,
    streaming: bool = False,
    validation_fraction: float = 0.1,
    device: str | None = None,
    seed: int = 0,
) -> Path:
    """Evaluate SAEs on held-out text: their reconstruction, and whether latents are features.

    Model, hook, text, context and filter default to those that each SAE was trained with. SAEs of
    one model and hook are evaluated on the same text.

    Args:
        saes: Folders that `save_pretrained` wrote, or checkpoints.
        output: New folder for `evaluation.json`, `.csv`, `.md`, `.png` and `tensorboard`.
        tokens: Held-out tokens for the figures of `test`.
        probe_tokens: Held-out tokens for probing, absorption and redundancy.
        properties: User-defined properties, one or a list, as `module:function` or
            `file.py:function`. The function takes a `Passage` and returns True, False or None for
            each of its `pieces`, or for the whole passage.
        label_column: A text column whose values are used as properties of contexts.
        curve: JSON file with the loss of similar models by compute; the package has one for the
            embedded model.
        model: Folder or hub name of the language model.
        hook_name: Its hook.
        text: Text to read.
        text_column: Name of the text column, if the text has columns.
        streaming: Read a hub data set as a stream.
        validation_fraction: Share of the documents that were held out in training.
        device: Device to run on; by default a GPU if there is one.
        seed: Seed of the draw of tokens for probes.

    Returns:
        The folder.

    Raises:
        ValueError: If an SAE's model is unknown, the text is too short, a property has no examples,
            or `output` holds files; raised before any model runs.
    """
    folder = Path(output)
    require_new_folder("output", folder)
    expect(len(saes) > 0, "saes", "one SAE or more", "none")
    _require_sizes(tokens, probe_tokens, validation_fraction, seed)
    named = [properties] if isinstance(properties, str) else properties
    questions = functions_of(named or ())
    known_curve = None if curve is None else read_curve(curve)
    chosen_device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    paths = dict(zip(names_of(saes), saes, strict=True))
    loaded = {name: load(path, device=chosen_device) for name, path in paths.items()}
    given = {"model": model, "hook_name": hook_name, "text": text, "text_column": text_column}
    chosen = {key: value for key, value in given.items() if value is not None}
    groups, places = grouped(loaded, chosen)
    of_groups = [_data(members, chosen, streaming, validation_fraction) for members in groups]
    if known_curve is not None:
        _require_one_model([data.source["model"] for data in of_groups])
    asked = [_questions(data, probe_tokens, questions, label_column) for data in of_groups]

    started = time.perf_counter()
    results, references = [], []
    for members, data, of_group, place in zip(groups, of_groups, asked, places, strict=True):
        if place:
            _say(f"{', '.join(place)}: {', '.join(members)}")
        data.language_model.to(chosen_device)
        figures, reference = evaluate_saes(
            members, data, of_group, n_tokens=tokens, curve=known_curve, seed=seed, say=_say
        )
        results += [_result(n, paths[n], loaded[n], data, place, f) for n, f in figures.items()]
        about = {"saes": [*members], **_about(data, place)}
        references.append({**about, **reference, "left_out": of_group.left_out})
    settings = {
        "tokens": tokens,
        "probe_tokens": probe_tokens,
        "validation_fraction": validation_fraction,
        "seed": seed,
        "seconds": time.perf_counter() - started,
    }
    table.write(folder, {"settings": settings, "saes": results, "references": references})
    return folder


def _require_sizes(tokens: int, probe_tokens: int, validation_fraction: float, seed: int) -> None:
    """Raise a ValueError if a number is out of range."""
    require_integers(tokens=tokens, probe_tokens=probe_tokens, seed=seed)
    require_positive(tokens=tokens, probe_tokens=probe_tokens)
    require_between(0, 1, validation_fraction=validation_fraction)
    expect(0 <= seed < 2**32, "seed", "from 0 to 2**32 - 1", seed)


def _data(
    saes: Mapping[str, SparseAutoencoder],
    given: Mapping[str, Any],
    streaming: bool,
    validation_fraction: float,
) -> ActivationDataModule:
    """The data that SAEs of one model and hook were trained on."""
    first = next(iter(saes.values()))
    data = data_of(first, {**given}, None, streaming, validation_fraction)
    for name, sae in saes.items():
        expect(
            data.d_in == sae.d_in,
            "hook_name",
            f"a hook of width {sae.d_in}, for which {name} was made,",
            f"{data.hook_name} of width {data.d_in}",
        )
    return data


def _questions(
    data: ActivationDataModule,
    probe_tokens: int,
    own: Mapping[str, Question],
    label_column: str | None,
) -> Questions:
    """The properties to probe; found without running the model."""
    longest = max(data.context_length, probe_tokens // 32)
    passages = read_passages(data, probe_tokens, longest, label_column)
    needed = () if label_column is None else ("label=",)
    return questions_of(passages, data.context_length, own, needed)


def _require_one_model(models: Sequence[str]) -> None:
    different = dict.fromkeys(models)
    expect(
        len(different) == 1,
        "curve",
        "the curve of the one model of all SAEs",
        f"SAEs of {', '.join(different)}: evaluate those of each model alone, with its curve",
    )


def names_of(paths: Sequence[str]) -> list[str]:
    """Short names of SAEs: their folder, or the parent of `sae`; full paths if two are equal."""
    parts = [Path(path) for path in paths]
    short = [p.parent.name if p.name.startswith("sae") and p.parent.name else p.name for p in parts]
    chosen = [s if short.count(s) == 1 else str(p) for s, p in zip(short, parts, strict=True)]
    expect(len(set(chosen)) == len(chosen), "saes", "different SAEs", f"{[*paths]}: name each once")
    return chosen


def functions_of(names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """The functions of `properties`, by the name that the property gets.

    Raises:
        ValueError: If there is no such function, or two have the same name.
    """
    found: dict[str, Callable[..., Any]] = {}
    for name in names:
        short = name.rpartition(":")[2]
        expect(short not in found, "properties", "functions of different names", f"{[*names]}")
        found[short] = function_of(name)
    return found


def function_of(name: str) -> Callable[..., Any]:
    """Import a function by `module:function` or `file.py:function`.

    Raises:
        ValueError: If there is no such function, or its module cannot be imported.
    """
    where, _, function = name.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            assert spec.loader is not None
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        found = getattr(module, function)
    except Exception as error:  # a module of the user's may raise any
        raise ValueError(
            "Expected argument `properties` to name functions as `file.py:function`, or as "
            f"`module:function` of an installed module, but got {name}: "
            f"{type(error).__name__}: {error}."
        ) from error
    expect(callable(found), "properties", "names of functions", f"{name}, a {type(found).__name__}")
    return found


def _result(
    name: str,
    path: str,
    sae: SparseAutoencoder,
    data: ActivationDataModule,
    place: Place,
    figures: Any,
) -> dict[str, Any]:
    return {
        "name": name,
        "path": path,
        "architecture": type(sae).__name__,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **_about(data, place),
        "figures": figures,
    }


def _about(data: ActivationDataModule, place: Place) -> dict[str, Any]:
    return {"model": data.source["model"], "hook_name": data.hook_name, "place": place}


def _say(text: str) -> None:
    sys.stderr.write(f"evaluate: {text}\n")


def main(args: list[str]) -> None:
    """Run `lightning-sae evaluate`."""
    parser = ArgumentParser(prog="lightning-sae evaluate", description=SHORT)
    parser.add_argument("saes", nargs="+", help="folders or checkpoints of SAEs")
    parser.add_function_arguments(evaluate, skip={"saes"})
    try:
        folder = evaluate(**parser.parse_args(args).as_dict())
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. Nothing was written.\n")
        sys.exit(130)
    seconds = read_json(folder / "evaluation.json")["settings"]["seconds"]
    sys.stdout.write(
        f"\n{(folder / 'evaluation.md').read_text()}\nIn {seconds:.0f} s. Made:\n"
        f"  {folder / 'evaluation.md'}  this table\n"
        f"  {folder / 'evaluation.png'}  the same as a picture\n"
        f"  {folder / 'evaluation.csv'}  a row for each SAE, with all figures\n"
        f"  {folder / 'evaluation.json'}  those of each property, and the settings\n"
        f"  {folder / 'tensorboard'}  a run for each SAE, for the page HParams\n"
    )
