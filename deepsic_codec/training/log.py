"""The record of a training run: lines for people, `log.csv` and `held_out.csv`."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    "phase",
    "step",
    "minutes",
    "loss",
    "bpp",
    "psnr",
    "accuracy",
    "tiles_bpp",
    "tiles_psnr",
    "grad",
    "lr",
    "images_per_second",
)
HELD_OUT_COLUMNS = ("phase", "step", "quality", "bpp", "psnr", "pre", "post")


class Log:
    """Rows of a run's CSV files.

    Parameters
    ----------
    run : Path
        Folder of the run.
    report : callable
        Takes each line of text for people.
    """

    def __init__(self, run: Path, report: Callable[[str], None] = print) -> None:
        self.run, self.say = run, report
        self.rows, self.held_out = _read(run / "log.csv"), _read(run / "held_out.csv")

    def rewind(self, phases: list[str], phase: str, step: int) -> None:
        """Remove rows after a step of a phase, which is where the checkpoint was written."""

        def is_before(row: Row) -> bool:
            number = phases.index(row["phase"]) if row["phase"] in phases else len(phases)
            return (number, int(row["step"])) <= (phases.index(phase), step)

        self.rows = [row for row in self.rows if is_before(row)]
        self.held_out = [row for row in self.held_out if is_before(row)]
        self.write()

    def add(self, row: Row) -> None:
        """Add a row to the training log and report it."""
        self.rows.append(row)
        self.say(f"{row['phase']}: " + "  ".join(f"{k} {_text(row[k])}" for k in COLUMNS[1:] if k in row))

    def add_held_out(self, rows: list[Row]) -> None:
        """Add figures on held-out training data, one row per quality, and report them."""
        self.held_out += rows
        text = (" ".join(f"{k} {_text(r[k])}" for k in HELD_OUT_COLUMNS[2:] if k in r) for r in rows)
        self.say("  held out: " + " | ".join(text))

    def last_held_out(self) -> list[Row]:
        """Return the newest figures on held-out data, one row per quality."""
        steps = [(row["phase"], str(row["step"])) for row in self.held_out]
        return [row for row, step in zip(self.held_out, steps, strict=True) if step == steps[-1]]

    def write(self) -> None:
        """Write both files."""
        for name, columns, rows in (("log.csv", COLUMNS, self.rows), ("held_out.csv", HELD_OUT_COLUMNS, self.held_out)):
            with open(self.run / name, "w", newline="") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]
