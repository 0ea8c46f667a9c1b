"""The encoder's hints as options of commands."""

from __future__ import annotations

import argparse
from typing import Any

from deepsic_codec.codec.params import DEFAULT_EFFORT, MAX_EFFORT, REFINED, TUNES


def add_hints(parser: argparse.ArgumentParser) -> None:
    """Declare `--effort` and `--tune`."""
    text = (
        f"0 to {MAX_EFFORT}: how long to look for fewer bytes; from {REFINED} on many times as long "
        f"(default: {DEFAULT_EFFORT})"
    )
    parser.add_argument("--effort", type=int, metavar="N", help=text)
    text = f"measure of quality to spend bytes on; others than {TUNES[0]}, the default, with --effort {REFINED} or more"
    parser.add_argument("--tune", choices=TUNES, help=text)


def hints(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return what `DeepSIC(encode=...)` takes; None where nothing was said."""
    given = {name: getattr(args, name) for name in ("effort", "tune")}
    return {name: value for name, value in given.items() if value is not None} or None
