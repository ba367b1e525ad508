"""`lightning-sae import` and `export`: convert SAEs from and to other libraries' formats."""

import sys
import warnings
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from lightning_sae.analysis.neuronpedia import write_neuronpedia
from lightning_sae.analysis.store import FeatureStore
from lightning_sae.checks import expect
from lightning_sae.files import write_atomically
from lightning_sae.interop import FORMATS, export
from lightning_sae.interop.saelens_runner import Plan, plan_of
from lightning_sae.loading import load

NEURONPEDIA = "neuronpedia"


def import_sae(
    source: str | None, output: str, format: str | None = None, config: str | None = None
) -> Path:
    """Read another library's SAE and write it as a folder of this package.

    Args:
        source: Folder or file.
        output: The folder to write, new or empty; with `config`, a new file.
        format: Its format; recognised by default.
        config: Instead of an SAE, SAELens' runner_cfg.json or its folder: writes the closest
            configuration for `lightning-sae fit`.

    Returns:
        The folder or file.

    Raises:
        ValueError: If there is no SAE, or the folder is not empty.
    """
    if (source is None) == (config is None):
        got = "neither" if source is None else "both"
        raise ValueError(f"Expected either an SAE or the argument `config` but got {got}.")
    if source is None:
        return _write_configuration(plan_of(Path(str(config))), Path(output))
    return load(source, format=format).save_pretrained(output)


def _write_configuration(plan: Plan, path: Path) -> Path:
    expect(not path.exists(), "output", "a new file", f"{path}, which exists")
    lines = "".join(f"# Not as in SAELens: {each}.\n" for each in plan.differs)
    text = lines + yaml.safe_dump(plan.config, sort_keys=False)
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return path


def export_sae(
    sae: str, output: str, format: str, member: str | None = None, unit_decoder: bool = False
) -> Path:
    """Write an SAE as a folder for another library.

    Args:
        sae: Folder or checkpoint of an SAE, or one in another library's format; for `neuronpedia`
            the folder of its analysis.
        output: The folder to write, new or empty.
        format: The other library's format, or `neuronpedia`.
        member: Name of the SAE, in a checkpoint of several side by side.
        unit_decoder: Fold the norms of decoder rows into the encoder; latents are multiplied by
            them.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no SAE, the format cannot hold it, or the folder is not empty.
    """
    if format == NEURONPEDIA:
        return write_neuronpedia(FeatureStore(sae), output)
    return export(load(sae, member=member), output, format, unit_decoder)


def import_main(args: list[str]) -> None:
    """Run `lightning-sae import`."""
    parser = ArgumentParser(
        prog="lightning-sae import",
        description=f"Read another library's SAE ({', '.join(FORMATS)}).",
    )
    parser.add_argument("source", nargs="?", help="folder or file of the SAE")
    parser.add_function_arguments(import_sae, skip={"source"})
    given = parser.parse_args(args).as_dict()
    with warnings.catch_warnings(record=True) as guesses:
        warnings.simplefilter("always", UserWarning)
        folder = import_sae(**given)
    if given["config"] is not None:
        differs = [line[2:] for line in folder.read_text().splitlines() if line[:2] == "# "]
        sys.stdout.write("\n".join([*differs, f"Made: {folder}  for lightning-sae fit"]) + "\n")
        return
    sae = load(folder)
    imported = sae.source.get("imported", {})
    lines = [
        *(f"Guessed: {guess.message}" for guess in guesses),
        f"Read {type(sae).__name__}, {sae.d_in} wide, {sae.d_sae} latents, from "
        f"{imported.get('format')}; units of its latents: {imported.get('units')}.",
        f"Made: {folder}  for lightning_sae.load",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def export_main(args: list[str]) -> None:
    """Run `lightning-sae export`."""
    parser = ArgumentParser(
        prog="lightning-sae export",
        description=f"Write an SAE for another library ({', '.join(FORMATS)}), or an analysis for "
        f"{NEURONPEDIA}.",
    )
    parser.add_argument("sae", help="folder or checkpoint of an SAE, or folder of an analysis")
    parser.add_function_arguments(export_sae, skip={"sae"})
    given = parser.parse_args(args)
    folder = export_sae(**given.as_dict())
    what = "its importer" if given.format == NEURONPEDIA else f"{given.format}, on raw activations"
    sys.stdout.write(f"Made: {folder}  for {what}\n")
