"""What the commands of the benchmark share: options made from defaults, and progress messages."""

import argparse
import sys
from typing import Any


def add_option(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    """Add `--name` with the type of its default; a tuple takes one or more values."""
    several = isinstance(default, tuple)
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        type=type(default[0] if several else default),
        nargs="+" if several else None,
        default=default,
        help="%(default)s",
    )


def say(line: str) -> None:
    """Write a progress message to standard error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
