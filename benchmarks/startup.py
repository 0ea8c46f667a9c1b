"""What a new process costs: importing, opening, labels, the first decode, and where that time goes.

    python -m benchmarks.startup
    python -m benchmarks.startup --against 5250414

Every figure is the median of `--repeats` new processes, from their first line on: Python's own start is not in it.
*Cold* has no compiled code of numba's yet, as after an installation: with the package's libraries of compiled kernels,
and without; all others find it in the cache where there are no libraries. Other load on the machine adds to the
seconds, and hardly to those of CPU. Where torch and the driver of a GPU are installed, torch is imported to ask for the
GPU, unless DEEPSIC_DEVICE=cpu. With `--against`, another commit runs in turn with this one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import against
from benchmarks.common import machine, table
from deepsic_codec import create_array
from deepsic_codec.kernels import LIBRARY
from deepsic_codec.samples import drone_frame

IMPORT_LIMIT = 0.150  # seconds beyond numpy
DECODE_LIMIT = 0.8  # seconds, warm
COLD_LIMIT = 8.0  # seconds, of the first encode and decode together

CLOCK = "import time; began, cpu = time.perf_counter(), time.process_time()\n"
SAY = "\nprint(time.perf_counter() - began, time.process_time() - cpu)"
SAY_JSON = '\nprint(json.dumps({"s": time.perf_counter() - began, "s of CPU": time.process_time() - cpu}))'
WRITE = """
import sys
from deepsic_codec import create_array
from deepsic_codec.samples import drone_frame
create_array(sys.argv[1], data=drone_frame()[:512, :512], chunks=(512, 512, 3))
"""
STEPS = {
    "import numpy": CLOCK + "import numpy" + SAY,
    "import deepsic_codec, after numpy": "import numpy\n" + CLOCK + "import deepsic_codec" + SAY,
    "import zarr, after numpy": "import numpy\n" + CLOCK + "import zarr" + SAY,
    "open the array": CLOCK + "import zarr; zarr.open({url!r}, mode='r')" + SAY,
    "labels of a chunk": CLOCK
    + "from deepsic_codec import chunk_attrs, open_archive; chunk_attrs(open_archive({url!r}), (0, 0, 0))"
    + SAY,
    "the first decode, a chunk of 512 x 512": CLOCK + "import zarr; zarr.open({url!r}, mode='r')[:512, :512]" + SAY,
    "the second decode": "import zarr; z = zarr.open({url!r}, mode='r'); z[:512, :512]\n"
    + CLOCK
    + "z[:512, :512]"
    + SAY,
    "the first encode, a chunk of 512 x 512": CLOCK
    + "from deepsic_codec import DeepSIC; import numpy as np; DeepSIC().encode(np.zeros((512, 512, 3), 'u1'))"
    + SAY,
}
DECODE = "the first decode, a chunk of 512 x 512"
COLD = "the first encode and decode, cold"
COLD_JIT = "the same, compiled by numba"
COLD_CODE = CLOCK + WRITE + "import zarr; zarr.open(sys.argv[1], mode='r')[:]" + SAY


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    against.add_arguments(parser)
    args = parser.parse_args(argv)
    print(machine(os.cpu_count() or 1), "\n")
    if args.against:
        print(compared(against.sides(args), args.repeats))
        return
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder) / "frame.zarr")
        create_array(url, data=drone_frame()[:512, :512], chunks=(512, 512, 3))
        code = COLD_CODE.replace("sys.argv[1]", repr(str(Path(folder) / "cold.zarr")))
        cold = seconds(code, 1, NUMBA_CACHE_DIR=str(Path(folder) / "numba"))
        jit = cold
        if LIBRARY is not None:
            other = str(Path(folder) / "others")
            again = code.replace("cold.zarr", "jit.zarr")
            jit = seconds(again, 1, NUMBA_CACHE_DIR=other, DEEPSIC_KERNEL_LIBRARIES="none")
        times = {name: seconds(code.format(url=url), args.repeats) for name, code in STEPS.items()}
    rows = [(name, f"{wall:.3f}", f"{cpu:.3f}") for name, (wall, cpu) in times.items()]
    rows += [(name, f"{wall:.3f}", f"{cpu:.3f}") for name, (wall, cpu) in ((COLD, cold), (COLD_JIT, jit))]
    print(table(("step, in a new process", "seconds", "CPU s"), rows), "\n")
    print(conclusion({name: wall for name, (wall, _) in times.items()}, cold[0]))


def compared(pair: tuple[against.Side, against.Side], repeats: int) -> str:
    """Return a table of all steps of two checkouts."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        urls = {side.name: str(Path(folder) / f"{number}.zarr") for number, side in enumerate(pair)}
        for side in pair:
            side.run(WRITE, urls[side.name])
        for name, code in STEPS.items():
            step = code.format(url="URL").replace("'URL'", "sys.argv[1]")
            code = f"import sys, json\n{step}".replace(SAY, SAY_JSON)
            measured = against.in_turn(pair, code, repeats, {side: [url] for side, url in urls.items()})
            figures |= {f"{name}, {kind}": values for kind, values in measured.items()}
    return against.comparison(figures, pair)


def seconds(code: str, repeats: int, **environment: str) -> tuple[float, float]:
    """Return median seconds, wall and CPU, that `code` prints in new processes; the first of several is not counted."""
    runs = []
    for number in range(repeats + (repeats > 1)):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        if number or repeats == 1:
            runs.append([float(text) for text in done.stdout.split()])
    wall, cpu = np.median(runs, axis=0).tolist()
    return wall, cpu


def conclusion(times: dict[str, float], cold: float) -> str:
    """Return one paragraph: whether the limits are kept, and what the first decode is made of."""
    light, first, again = times["import deepsic_codec, after numpy"], times[DECODE], times["the second decode"]
    zarr = times["import zarr, after numpy"]
    rest = max(0.0, first - zarr - again)
    return (
        f"Import: {1000 * light:.0f} ms beyond numpy (limit {1000 * IMPORT_LIMIT:.0f}: "
        f"{'kept' if light < IMPORT_LIMIT else 'NOT kept'}). First decode: {first:.2f} s (limit {DECODE_LIMIT:g}: "
        f"{'kept' if first < DECODE_LIMIT else 'NOT kept'}), of which zarr's import is about {zarr:.2f}, decoding "
        f"itself {again:.2f}, and model file, compiled code and the rest {rest:.2f}. Once after an installation, "
        f"the first encode and decode take {cold:.2f} s together (limit {COLD_LIMIT:g}: "
        f"{'kept' if cold < COLD_LIMIT else 'NOT kept'})."
    )


if __name__ == "__main__":
    main()
