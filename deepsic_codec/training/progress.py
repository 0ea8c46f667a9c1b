"""What a run tells: a progress bar or lines, ``log.csv``, ``held_out.csv`` and ``log.png``."""

from __future__ import annotations

import csv
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

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
    """Rows of a run's CSV files, and how they are shown."""

    def __init__(self, run: Path, console: Console | None = None) -> None:
        self.run = run
        self.console = console or (Console() if sys.stdout.isatty() else Console(width=200))
        self.rows, self.held_out = _read(run / "log.csv"), _read(run / "held_out.csv")

    def rewind(self, phases: list[str], phase: str, step: int) -> None:
        """Forget rows after a step of a phase: the checkpoint knows nothing of them."""

        def before(row: Row) -> bool:
            number = phases.index(row["phase"]) if row["phase"] in phases else len(phases)
            return (number, int(row["step"])) <= (phases.index(phase) if phase in phases else -1, step)

        self.rows, self.held_out = [r for r in self.rows if before(r)], [r for r in self.held_out if before(r)]
        self.write()

    def say(self, text: str) -> None:
        """One line, as it stands."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def add(self, row: Row) -> None:
        """A row of the training log."""
        self.rows.append(row)
        if not self.console.is_terminal:
            shown = {k: _text(row[k]) for k in COLUMNS[1:] if k in row}
            self.say(f"{row['phase']}: " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def add_held_out(self, rows: list[Row]) -> None:
        """Measures on held-out training data, one row per quality."""
        self.held_out += rows
        text = (" ".join(f"{k} {_text(r[k])}" for k in HELD_OUT_COLUMNS[2:] if k in r) for r in rows)
        self.say("  held out: " + " | ".join(text))

    def last_held_out(self) -> list[Row]:
        """The newest rows of measures on held-out data, one per quality."""
        place = [(r["phase"], str(r["step"])) for r in self.held_out]
        return [r for r, at in zip(self.held_out, place, strict=True) if at == place[-1]]

    def write(self) -> None:
        """Bring both files up to date."""
        for name, columns, rows in (("log.csv", COLUMNS, self.rows), ("held_out.csv", HELD_OUT_COLUMNS, self.held_out)):
            with open(self.run / name, "w", newline="") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)

    def plot(self) -> None:
        """Draw ``log.png``: loss, rate, PSNR and accuracy over steps, and the held-out curves."""
        try:
            import matplotlib
        except ImportError:
            self.say("log.png needs matplotlib: pip install 'deepsic-codec[bench]'")
            return
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
        phases = list(dict.fromkeys(r["phase"] for r in self.rows))
        for axis, name in zip(axes.flat, ("loss", "bpp", "psnr", "accuracy"), strict=False):
            for phase in phases:
                part = [r for r in self.rows if r["phase"] == phase and r.get(name) not in (None, "")]
                if part:
                    axis.plot([int(r["step"]) for r in part], [float(r[name]) for r in part], label=phase)
            axis.set(title=name, xlabel="step")
            axis.grid(alpha=0.3)
        if phases:
            axes[0, 0].legend()
        for axis, name in ((axes[1, 1], "psnr"), (axes[1, 2], "post")):
            part = [r for r in self.last_held_out() if all(r.get(k) not in (None, "") for k in (name, "bpp"))]
            axis.plot([float(r["bpp"]) for r in part], [float(r[name]) for r in part], ".-")
            axis.set(title=f"held out: {name}", xlabel="bpp (estimate)")
            axis.grid(alpha=0.3)
        figure.savefig(self.run / "log.png", dpi=100)
        plt.close(figure)


class Bar:
    """Progress of one phase: a bar on a terminal, nothing elsewhere (the log's rows are lines there)."""

    def __init__(self, console: Console, phase: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>4.1f} %"),
            TextColumn("{task.fields[figures]}"),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._progress.add_task(phase, total=1.0, figures="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, done: float, seconds: float, row: Row) -> None:
        """Show the share done (0..1), the time left and the row's figures."""
        left = seconds * (1 - done) / max(done, 1e-9)
        names = {"bpp": "bpp", "psnr": "dB", "accuracy": "top-1", "images_per_second": "images/s"}
        figures = "  ".join(f"{_text(row[k])} {unit}" for k, unit in names.items() if k in row)
        time_left = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d} left"
        self._progress.update(self._task, completed=done, figures=f"step {row['step']}  {figures}  {time_left}")


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a request that the loop grants after its step; a second one acts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]
