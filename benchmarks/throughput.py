"""Speed on 512x512 chunks of a real scene beside other codecs, peak memory, and whether seams between chunks show.

    python -m benchmarks.throughput --image IMAGE
    python -m benchmarks.throughput --against 5250414

Without `--image` the bundled drone frame is encoded. Peers are set to about the PSNR of DeepSIC and run on the same
number of threads: each is single-threaded inside, and a pool of threads takes one chunk per task. Every codec's round
trip is checked before it is timed. Peak memory is that of a process of its own that writes a frame of 4000x2250 as a
Zarr array and reads it back.

With `--against`, no peer is measured: another commit runs in turn with this one, in its own environment, on one thread
and on `--threads`. The first run of each side, which compiles, does not count. Other load on the machine changes the
speeds, and hardly the seconds of CPU.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from benchmarks import against
from benchmarks.common import PEERS, Peer, Pixels, machine, median_time, over_threads, table
from deepsic_codec.io.images import read_rgb
from deepsic_codec.metrics import psnr
from deepsic_codec.samples import drone_frame

EDGE = 512  # of a chunk, pixels
BORDER = 8  # pixels along a chunk's edge that count as border
FRAME = (2250, 4000)  # height and width of the frame that peak memory is taken of
MEMORY_LIMIT = 2.0  # GiB
SPEED_TARGET = 5.0  # Mpx/s each way on two cores
PEER_NAMES = ("JPEG 2000 PSNR", "AVIF 4:4:4 s6", "JPEG XL e3", "JPEG XL e7")


@dataclass(frozen=True)
class Result:
    """One codec over all chunks."""

    codec: str
    setting: str
    bpp: float
    psnr: float  # dB, RGB, all pixels
    seam: float  # dB, PSNR of the border pixels of chunks minus that of the others
    encode: float  # Mpx/s
    decode: float  # Mpx/s


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = _arguments(argv)
    if args.memory_of_frame:  # in the child process
        _write_and_read(args)
        return
    chunks = cut(read_rgb(args.image) if args.image else drone_frame())[: args.chunks]
    print(machine(args.threads))
    if args.against:
        print(f"{len(chunks)} chunks of {EDGE}x{EDGE} RGB, {args.repeats} runs of each side in turn\n", flush=True)
        for part in compared(chunks, args):
            print(part, "\n", flush=True)
        return
    print(f"{len(chunks)} chunks of {EDGE}x{EDGE} RGB, median of {args.repeats} runs\n")

    results = [measure_deepsic(chunks, args)]
    goal = results[0].psnr
    results += [measure_deepsic(chunks, args, effort) for effort in args.efforts]
    results += [measure_peer(nearest(PEERS[name], chunks, goal, args.threads), chunks, args) for name in PEER_NAMES]
    results.append(measure_peer((_blosc_zstd(), 0), chunks, args))
    print(results_table(results), "\n")

    peak, before = peak_memory(args)
    height, width = FRAME
    print(
        f"Peak memory, frame of {width}x{height} written and read in chunks of {EDGE}x{EDGE}: {peak:.2f} GiB, "
        f"of which {before:.2f} GiB before the first chunk (limit {MEMORY_LIMIT:g} GiB)."
    )
    ours = results[0]
    print(f"Seams: PSNR of the outer {BORDER} pixels of chunks minus that of the others: {ours.seam:+.2f} dB.\n")
    print(conclusion(results, peak))


SPEED = """
import json, sys, time
import numpy as np
from deepsic_codec import DeepSIC
chunks, quality, batch, threads = list(np.load(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
codec, figures = DeepSIC(quality=quality, **json.loads(sys.argv[5])), {}
batches = [chunks[i : i + batch] for i in range(0, len(chunks), batch)]
payloads = [codec.encode_batch(part) for part in batches]
[codec.decode_batch(part) for part in payloads]
pixels = sum(chunk.shape[0] * chunk.shape[1] for chunk in chunks) / 1e6
suffix = f", {threads} thread{'s' * (threads != '1')}"
for way, calls in (("encode", [(codec.encode_batch, part) for part in batches]),
                   ("decode", [(codec.decode_batch, part) for part in payloads])):
    start, cpu = time.perf_counter(), time.process_time()
    for call, part in calls:
        call(part)
    figures[f"{way}{suffix}: Mpx/s"] = pixels / (time.perf_counter() - start)
    figures[f"{way}{suffix}: s of CPU per Mpx"] = (time.process_time() - cpu) / pixels
print(json.dumps(figures))
"""
MEMORY = """
import json, sys
import numpy as np
from deepsic_codec import DeepSIC, create_array

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20

array = create_array({}, data=np.load(sys.argv[1]), chunks=(512, 512, 3), codec=DeepSIC(quality=float(sys.argv[2])))
written = peak()
array[...]
print(json.dumps({"peak memory, writing, GiB": written, "peak memory, GiB": peak()}))
"""


def compared(chunks: list[Pixels], args: argparse.Namespace) -> Iterator[str]:
    """Measure another commit and this checkout in turn; yield a table for each number of threads, and one of memory."""
    pair, quality = against.sides(args), str(args.quality)

    def measured(code: str, repeats: int, arguments: list[str], threads: int) -> str:
        # A commit that has no transforms uses features.
        parameters = ["{}", json.dumps({} if args.transform == "auto" else {"transform": args.transform})]
        both = {side.name: [*arguments, more] for side, more in zip(pair, parameters, strict=True)}
        return against.comparison(against.in_turn(pair, code, repeats, both, DEEPSIC_THREADS=str(threads)), pair)

    with tempfile.TemporaryDirectory() as folder:
        stack, frame = str(Path(folder) / "chunks.npy"), str(Path(folder) / "frame.npy")
        np.save(stack, np.stack(chunks))
        for threads in sorted({1, args.threads}):
            yield measured(SPEED, args.repeats, [stack, quality, str(args.batch), str(threads)], threads)
        if Path("/proc/self/status").exists():
            np.save(frame, enlarged(read_rgb(args.image) if args.image else drone_frame()))
            yield measured(MEMORY, 1, [frame, quality], args.threads)


def enlarged(scene: Pixels) -> Pixels:
    """Return a scene in the size of FRAME, cut or mirrored at its edges."""
    missing = [(0, max(0, size - length)) for size, length in zip(FRAME, scene.shape[:2], strict=True)]
    return np.pad(scene, [*missing, (0, 0)], mode="symmetric")[: FRAME[0], : FRAME[1]]


def measure_deepsic(chunks: list[Pixels], args: argparse.Namespace, effort: int | None = None) -> Result:
    """Our codec, batches of chunks in one call each."""
    from deepsic_codec import DeepSIC, config

    config.set(threads=args.threads)
    options = {} if effort is None else {"effort": effort}
    codec = DeepSIC(model=args.model, quality=args.quality, transform=args.transform, **options)
    batches = [chunks[i : i + args.batch] for i in range(0, len(chunks), args.batch)]

    def encode() -> list[Any]:
        return [payload for batch in batches for payload in codec.encode_batch(batch)]

    def decode(payloads: list[Any]) -> list[Any]:
        parts = [payloads[i : i + args.batch] for i in range(0, len(payloads), args.batch)]
        return [image for part in parts for image in codec.decode_batch(part)]

    name, repeats = ("DeepSIC", args.repeats) if effort is None else (f"DeepSIC effort {effort}", 1)
    return _measure(name, f"quality {args.quality:g}", chunks, encode, decode, repeats)


def measure_peer(peer_at: tuple[Peer, float], chunks: list[Pixels], args: argparse.Namespace) -> Result:
    """Measure a peer at a setting, one chunk per task."""
    peer, setting = peer_at

    def encode() -> list[bytes]:
        return over_threads(lambda x: peer.encode(x, setting), chunks, args.threads)

    def decode(payloads: list[bytes]) -> list[Pixels]:
        return over_threads(peer.decode, payloads, args.threads)

    return _measure(peer.name, f"{setting:g}" if setting else "lossless", chunks, encode, decode, args.repeats)


def _measure(
    codec: str,
    setting: str,
    chunks: list[Pixels],
    encode: Callable[[], list[Any]],
    decode: Callable[[list[Any]], list[Any]],
    repeats: int,
) -> Result:
    payloads = encode()  # also the warm-up: compiled code and model are there afterwards
    decoded = [np.asarray(image) for image in decode(payloads)]
    for original, image in zip(chunks, decoded, strict=True):
        if image.shape != original.shape or image.dtype != original.dtype or psnr(original, image) < 20:
            raise RuntimeError(f"{codec} {setting}: a chunk does not come back")
    pixels = sum(x.shape[0] * x.shape[1] for x in chunks)
    before, after = np.stack(chunks), np.stack(decoded)
    border = np.ones((EDGE, EDGE), bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    return Result(
        codec=codec,
        setting=setting,
        bpp=8 * sum(len(p) for p in payloads) / pixels,
        psnr=psnr(before, after),
        seam=psnr(before[:, border], after[:, border]) - psnr(before[:, ~border], after[:, ~border]),
        encode=pixels / 1e6 / median_time(encode, repeats),
        decode=pixels / 1e6 / median_time(lambda: decode(payloads), repeats),
    )


def nearest(peer: Peer, chunks: list[Pixels], goal: float, threads: int) -> tuple[Peer, float]:
    """Find the setting of a peer whose PSNR comes nearest to `goal` (dB), by bisection between its listed settings."""
    part = np.stack(chunks)

    def quality(setting: float) -> float:
        payloads = over_threads(lambda x: peer.encode(x, setting), chunks, threads)
        return psnr(part, np.stack(over_threads(peer.decode, payloads, threads)))

    low, high = peer.settings[0], peer.settings[-1]
    tried = {}
    for _ in range(7):
        middle = (low + high) / 2
        # JPEG XL distances are real numbers, the others' settings are whole ones.
        middle = round(middle, 2) if peer.name.startswith("JPEG XL") else float(round(middle))
        if middle in tried:
            break
        tried[middle] = quality(middle)
        low, high = (middle, high) if tried[middle] < goal else (low, middle)
    return peer, min(tried, key=lambda setting: abs(tried[setting] - goal))


def _blosc_zstd() -> Peer:
    """Lossless, for scale: what Zarr arrays are often compressed with."""

    def encode(x: Pixels, _: float) -> bytes:
        return bytes(
            imagecodecs.blosc_encode(
                x.tobytes(), level=5, compressor="zstd", shuffle="shuffle", typesize=1, numthreads=1
            )
        )

    def decode(data: bytes) -> Pixels:
        flat = np.frombuffer(imagecodecs.blosc_decode(data, numthreads=1), np.uint8)
        return flat.reshape(EDGE, EDGE, 3)

    return Peer("Blosc-Zstd", (0,), (0, 0), encode, decode)


def cut(scene: Pixels) -> list[Pixels]:
    """Cut the whole chunks out of a scene (H, W, 3).

    Raises
    ------
    ValueError
        If it is smaller than one chunk.
    """
    rows, columns = scene.shape[0] // EDGE, scene.shape[1] // EDGE
    if not rows * columns:
        raise ValueError(f"a scene of at least {EDGE}x{EDGE} is needed, got {scene.shape[1]}x{scene.shape[0]}")
    return [
        np.ascontiguousarray(scene[r * EDGE : (r + 1) * EDGE, c * EDGE : (c + 1) * EDGE])
        for r in range(rows)
        for c in range(columns)
    ]


def peak_memory(args: argparse.Namespace) -> tuple[float, float]:
    """Measure, in a fresh process, peak memory in GiB and what it was before the first chunk was encoded."""
    command = [sys.executable, "-m", "benchmarks.throughput", "--memory-of-frame", "--threads", str(args.threads)]
    command += ["--quality", str(args.quality), "--model", args.model]
    if args.image:
        command += ["--image", args.image]
    root = Path(__file__).parents[1]  # where -m finds this package
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    before, peak = map(float, child.stdout.split())
    return peak, before


def _write_and_read(args: argparse.Namespace) -> None:
    """In the child process: print peak memory in GiB before and after writing and reading a frame."""
    import zarr

    from deepsic_codec import DeepSIC, config, create_array

    config.set(threads=args.threads)
    scene = read_rgb(args.image) if args.image else drone_frame()
    frame = enlarged(scene)
    before = _peak_gib()
    with tempfile.TemporaryDirectory() as folder:
        codec = DeepSIC(model=args.model, quality=args.quality)
        array = create_array(folder, shape=frame.shape, chunks=(EDGE, EDGE, 3), dtype="u1", codec=codec)
        array[:] = frame
        decoded = np.asarray(zarr.open_array(folder, mode="r")[:])
    if psnr(frame, decoded) < 20:
        raise RuntimeError("the frame does not come back")
    print(before, _peak_gib())


def _peak_gib() -> float:
    """Peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux what the parent had in memory when it started this process counts there.
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # kilobytes everywhere but on macOS


def results_table(results: list[Result]) -> str:
    """One row per codec."""
    header = ["codec", "setting", "bpp", "PSNR dB", "seam dB", "encode Mpx/s", "decode Mpx/s"]
    rows = [[r.codec, r.setting, f"{r.bpp:.3f}", r.psnr, r.seam, r.encode, r.decode] for r in results]
    for row in rows:
        if row[1] == "lossless":
            row[3] = row[4] = float("nan")
    return table(header, rows)


def conclusion(results: list[Result], peak: float) -> str:
    """Say in one sentence what the run shows."""
    ours = results[0]
    peers = [r for r in results if r.setting != "lossless" and not r.codec.startswith("DeepSIC")]

    def names(test: Callable[[Result], bool]) -> str:
        return ", ".join(r.codec for r in peers if test(r)) or "none of them"

    met = "meets" if min(ours.encode, ours.decode) >= SPEED_TARGET and peak < MEMORY_LIMIT else "misses"
    return (
        f"Conclusion: at {ours.psnr:.1f} dB DeepSIC encodes {ours.encode:.1f} and decodes {ours.decode:.1f} Mpx/s and "
        f"{met} the targets ({SPEED_TARGET:g} Mpx/s each way, under {MEMORY_LIMIT:g} GiB); of the lossy codecs beside "
        f"it, it encodes faster than {names(lambda r: ours.encode > r.encode)}, decodes faster than "
        f"{names(lambda r: ours.decode > r.decode)}, and needs fewer bits than {names(lambda r: ours.bpp < r.bpp)}."
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--image", help="scene to cut chunks from; default: the bundled drone frame")
    parser.add_argument("--model", default="base")
    parser.add_argument("--quality", type=float, default=50)
    text = "also with such levels of the encoder's effort (0 to 4), one run each"
    parser.add_argument("--efforts", type=int, nargs="+", default=[], metavar="N", help=text)
    parser.add_argument("--batch", type=int, default=8, help="chunks per call of DeepSIC")
    parser.add_argument("--chunks", type=int, default=32, help="maximum number of chunks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    against.add_arguments(parser)
    text = "of DeepSIC; with --against of this checkout, where the other commit knows features only"
    parser.add_argument("--transform", choices=("auto", "features", "wavelet"), default="auto", help=text)
    parser.add_argument("--memory-of-frame", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
