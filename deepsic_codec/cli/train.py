"""Arguments of `deepsic train`. Torch is imported only when training begins."""

import argparse
import json
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepsic_codec.cli.console import progress_bar, say, say_json
from deepsic_codec.require import require
from deepsic_codec.training.settings import PRESETS, Settings, resolve

if TYPE_CHECKING:
    from deepsic_codec.model.file import ModelInfo

METAVARS = {int: "N", float: "X", str: "TEXT"}


class HelpAll(argparse.Action):
    """Print the help of all settings and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Put the texts of settings that the short help leaves out into the help, and print it."""
        texts = {f.name: _text(f) for f in fields(Settings)}
        for action in parser._actions:
            if action.help == argparse.SUPPRESS:
                action.help = texts.get(action.dest, "")
        parser.print_help()
        parser.exit()


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of `Settings`; only options that are given reach `run_train`."""
    parser.epilog = f"{parser.epilog}\n\nMore settings: deepsic train --help-all. Results: docs/training.md"
    parser.add_argument("--help-all", action=HelpAll, nargs=0, help="show all settings")
    parser.add_argument("--preset", default="", help=f"{', '.join(PRESETS)}, or a JSON file of settings")
    parser.add_argument("--resume", action="store_true", help="continue from the run's checkpoint, with its settings")
    text = "print the model file's content and the last held-out figures as JSON; progress goes to standard error"
    parser.add_argument("--json", action="store_true", help=text)
    for setting in fields(Settings):
        _add_setting(parser, setting)


def _add_setting(parser: argparse.ArgumentParser, setting: Field[Any]) -> None:
    name, default = setting.name, setting.metadata["default"]
    text = _text(setting) if setting.metadata["common"] else argparse.SUPPRESS
    names = {"base": ["--from"], "out": ["-o", "--out"]}.get(name, ["--" + name.replace("_", "-")])
    add = partial(parser.add_argument, *names, dest=name, default=argparse.SUPPRESS, help=text)
    if name == "base":
        add(metavar="MODEL")
    elif name == "parents":
        add(metavar="JSON", type=_parents)
    elif isinstance(default, list):
        add(nargs="+", metavar="PATH")
    elif isinstance(default, bool):
        add(action=argparse.BooleanOptionalAction)
    else:
        add(type=type(default), metavar=METAVARS[type(default)])


def _text(setting: Field[Any]) -> str:
    text, default = setting.metadata["help"], setting.metadata["default"]
    if isinstance(default, bool):
        return f"{text} (default: {'yes' if default else 'no'})"
    return text if default in ("", [], {}) else f"{text} (default: {default})".replace("%", "%%")


def run_train(args: argparse.Namespace) -> None:
    """Train; raises ConfigurationError for settings or data that cannot be trained with."""
    require("train", "torch")
    names = {f.name for f in fields(Settings)}
    settings = resolve({k: v for k, v in vars(args).items() if k in names}, args.preset, args.resume)

    from deepsic_codec.training.log import Log
    from deepsic_codec.training.train import train

    with progress_bar(f"training {settings.name}") as progress:
        info = train(settings, args.resume, report=partial(say, error=args.json), progress=progress)
    if args.json:
        say_json(summary(info, Log(settings.folder).last_held_out()))


def summary(info: "ModelInfo", held_out: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a model file holds and the last figures on held-out images, in JSON types."""
    figures = [
        {k: v if k == "phase" else int(v) if k == "step" else float(v) for k, v in row.items() if v not in (None, "")}
        for row in held_out
    ]
    return {
        "model": info.name,
        "file": info.path,
        "nbytes": Path(info.path).stat().st_size,
        "decoder": info.decoder,
        "head": info.head,
        "encoder": info.encoder,
        "vocabulary": info.vocabulary.to_json(),
        "architecture": info.architecture,
        "held_out": figures,
    }


def _parents(text: str) -> dict[str, list[str]]:
    try:
        data = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
        return {str(k): [str(c) for c in v] for k, v in data.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"expected JSON of names and lists, got {text!r} ({error})") from None


def add_train_head(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `deepsic train-head`."""
    from deepsic_codec.training.head_settings import HeadSettings

    parser.epilog = f"{parser.epilog}\n\nMethod and results: docs/training.md"
    for setting in fields(HeadSettings):
        name, text = setting.name, setting.metadata["help"]
        names = {"base": ["--from"], "out": ["-o", "--out"]}.get(name, ["--" + name.replace("_", "-")])
        add = partial(parser.add_argument, *names, dest=name, help=text)
        if name in ("labels", "others", "exclude"):
            add(nargs="+", metavar="CLASS" if name == "exclude" else "PATH", default=[])
        else:
            add(type=type(setting.default), default=setting.default, metavar=METAVARS[type(setting.default)])
    parser.add_argument("--json", action="store_true", help="print what the file holds as JSON")


def run_train_head(args: argparse.Namespace) -> None:
    """Train a head; raises ConfigurationError for settings or data that it cannot be trained with."""
    require("train", "torch")
    from deepsic_codec.training.head_settings import HeadSettings

    settings = HeadSettings(**{f.name: getattr(args, f.name) for f in fields(HeadSettings)})
    from deepsic_codec.training.train_head import train_head

    with progress_bar("drawing cells") as progress:
        info = train_head(settings, report=partial(say, error=args.json), progress=progress)
    if args.json:
        about = {"head": info.head, "decoder": info.decoder, "file": info.path, "name": info.name}
        say_json(about | {"vocabulary": info.vocabulary.to_json()})
