"""The command `export-model`."""

import argparse
from pathlib import Path

from deepsic_codec.cli.console import say
from deepsic_codec.require import require

CHECKED_SIZE = (128, 192)  # height and width of the photograph that a check compares


def add_export_model(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic export-model`."""
    text = "name of a model, or a model file (default: base)"
    parser.add_argument("model", metavar="MODEL", nargs="?", default="base", help=text)
    text = "write analysis.onnx, synthesis.onnx and head.onnx into this folder, and check them in ONNX Runtime"
    parser.add_argument("--onnx", metavar="DIR", required=True, help=text)


def run_export_model(args: argparse.Namespace) -> None:
    """Export the networks of a model.

    Raises
    ------
    ConfigurationError
        If the model is of a family that cannot be exported.
    MissingPackage
        If onnx or onnxruntime are not installed.
    ModelMismatch
        If the model file is damaged, or exported networks give other integers.
    ModelNotFound
        If there is no such model.
    """
    require("onnx", "onnx", "onnxruntime", purpose="the export of a model")
    from deepsic_codec.io.onnx_export import check, export
    from deepsic_codec.model.file import read_info
    from deepsic_codec.model.zoo import find_model
    from deepsic_codec.samples import drone_frame

    info = read_info(args.model) if Path(args.model).is_file() else find_model(args.model)
    photograph = drone_frame()[None, : CHECKED_SIZE[0], : CHECKED_SIZE[1]]
    for path in export(info, args.onnx):
        say(f"{path}: {path.stat().st_size:,} bytes")
    count = check(info, args.onnx, photograph)
    say(f"{count:,} integers computed by ONNX Runtime are those of this package")
