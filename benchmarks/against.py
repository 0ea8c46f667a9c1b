"""Run a measurement on this checkout and on another commit in turn, each in its own environment.

Used by `benchmarks.throughput --against COMMIT` and `benchmarks.startup --against COMMIT`. The commit is checked out as
a git worktree, with a virtual environment beside it, in the cache folder of the package; both are made on first use
and kept. `--against-env PYTHON` runs the commit with an environment that exists already.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import table
from deepsic_codec import config

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Side:
    """A checkout and the interpreter that runs it."""

    name: str
    python: str
    source: Path

    def run(self, code: str, *arguments: str, **environment: str) -> str:
        """Run code in a new process and return what it prints.

        Raises
        ------
        RuntimeError
            With the output of the process, if it fails.
        """
        values = {**os.environ, "PYTHONPATH": str(self.source), **environment}
        command = [self.python, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=values, cwd=self.source)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stderr}")
        return done.stdout

    def measure(self, code: str, *arguments: str, **environment: str) -> dict[str, float]:
        """Run code that prints figures by name, as JSON in its last line."""
        figures: dict[str, float] = json.loads(self.run(code, *arguments, **environment).splitlines()[-1])
        return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--against` and `--against-env`."""
    text = "compare with this commit, which runs in turn with this checkout"
    parser.add_argument("--against", metavar="COMMIT", help=text)
    text = "interpreter of an environment that can run the commit; by default one is made and kept"
    parser.add_argument("--against-env", metavar="PYTHON", help=text)


def sides(args: argparse.Namespace) -> tuple[Side, Side]:
    """Return the other commit and this checkout, in this order."""
    commit = _git("rev-parse", "--short", f"{args.against}^{{commit}}")
    folder = Path(config.get().cache).expanduser() / "against" / commit
    source = folder / "source"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _git("worktree", "prune")
        _git("worktree", "add", "--detach", str(source), commit)
    python = args.against_env or _environment(folder, source)
    return Side(commit, python, source), Side("this checkout", sys.executable, ROOT)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def _environment(folder: Path, source: Path) -> str:
    """Return the interpreter of a virtual environment with the dependencies of a checkout."""
    environment, complete = folder / "env", folder / "complete"
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not complete.exists():
        print(f"making an environment for {source} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", str(source)]
        if (source / "constraints.txt").exists():  # without them, torch is the newest, with gigabytes for GPUs
            install += ["-c", str(source / "constraints.txt")]
        subprocess.run(install, check=True)
        complete.touch()
    return str(python)


def in_turn(
    pair: tuple[Side, Side], code: str, repeats: int, arguments: Mapping[str, Sequence[str]], **environment: str
) -> dict[str, dict[str, list[float]]]:
    """Measure both sides `repeats` times, alternately, after one run of each that does not count.

    Parameters
    ----------
    pair : (Side, Side)
        The sides.
    code : str
        Prints figures by name, as JSON.
    repeats : int
        Runs of each side that count.
    arguments : mapping
        Arguments of the code, by the name of the side.
    **environment : str
        Environment variables.

    Returns
    -------
    dict
        By name of the figure, then of the side: the figure in each run.
    """
    figures: dict[str, dict[str, list[float]]] = {}
    for number in range(repeats + 1):
        for side in pair if number % 2 else pair[::-1]:
            measured = side.measure(code, *arguments[side.name], **environment)
            for name, value in measured.items() if number else ():
                figures.setdefault(name, {}).setdefault(side.name, []).append(value)
    return figures


def comparison(figures: Mapping[str, Mapping[str, Sequence[float]]], pair: tuple[Side, Side]) -> str:
    """Return a table of minimum and median of both sides, and the ratio of their medians."""
    before, after = (side.name for side in pair)
    header = ["figure", f"{before} min", "median", f"{after} min", "median", "ratio"]
    rows: list[list[Any]] = []
    for name, by_side in figures.items():
        one, two = (np.median(by_side[side]) for side in (before, after))
        numbers = (min(by_side[before]), one, min(by_side[after]), two)
        rows.append([name, *(f"{number:.4g}" for number in numbers), f"{two / one:.3f}"])
    return table(header, rows)
