"""The options `--effort` and `--tune`, which several commands have."""

import argparse
from typing import Any

from deepsic_codec.codec.params import DEFAULT_EFFORT, DEFAULT_TUNE, MAX_EFFORT, MIN_REFINED_EFFORT, TUNES


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Declare `--effort` and `--tune`."""
    text = (
        f"0 to {MAX_EFFORT}: time spent on fewer bytes; from {MIN_REFINED_EFFORT} on encoding takes many times as long "
        f"(default: {DEFAULT_EFFORT})"
    )
    parser.add_argument("--effort", type=int, metavar="N", help=text)
    text = f"error measure that bytes are spent on (default: {DEFAULT_TUNE}); ms-ssim needs --effort "
    parser.add_argument("--tune", choices=TUNES, help=f"{text}{MIN_REFINED_EFFORT} or more")


def encoder_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return those of the keyword arguments `effort` and `tune` of `DeepSIC` that the command line has."""
    return {name: getattr(args, name) for name in ("effort", "tune") if getattr(args, name) is not None}
