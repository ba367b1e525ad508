"""`lightning-sae import` and `lightning-sae export`: other libraries' SAEs in, ours out."""

import sys
import warnings
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_sae.interop import FORMATS, export
from lightning_sae.loading import load


def import_sae(source: str, output: str, format: str | None = None) -> Path:
    """Read another library's SAE and write it as a folder of this package.

    Args:
        source: Folder or file.
        output: The folder to write; it has to be new or empty.
        format: Its format; recognised by default.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no SAE, or the folder holds files.
    """
    return load(source, format=format).save_pretrained(output)


def export_sae(
    sae: str, output: str, format: str, member: str | None = None, unit_decoder: bool = False
) -> Path:
    """Write an SAE as a folder for another library.

    Args:
        sae: Folder or checkpoint of an SAE, or one in another library's format.
        output: The folder to write; it has to be new or empty.
        format: The other library's format.
        member: Which one, in a checkpoint of several side by side.
        unit_decoder: Fold norms of decoder rows into the encoder: latents are times the norms.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no SAE, the format cannot hold it, or the folder holds files.
    """
    return export(load(sae, member=member), output, format, unit_decoder)


def import_main(args: list[str]) -> None:
    """Run `lightning-sae import`."""
    parser = ArgumentParser(
        prog="lightning-sae import",
        description=f"Read another library's SAE ({', '.join(FORMATS)}).",
    )
    parser.add_argument("source", help="folder or file of the SAE")
    parser.add_function_arguments(import_sae, skip={"source"})
    given = parser.parse_args(args).as_dict()
    with warnings.catch_warnings(record=True) as guesses:
        warnings.simplefilter("always", UserWarning)
        folder = import_sae(**given)
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
        description=f"Write an SAE for another library ({', '.join(FORMATS)}).",
    )
    parser.add_argument("sae", help="folder or checkpoint of an SAE")
    parser.add_function_arguments(export_sae, skip={"sae"})
    given = parser.parse_args(args)
    folder = export_sae(**given.as_dict())
    sys.stdout.write(f"Made: {folder}  for {given.format}, on raw activations\n")
