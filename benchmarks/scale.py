"""Archives at scale: memory of single chunks and of the bulk writer, workers, batches, S3, and a whole archive.

    python -m benchmarks.scale                                  # every part, small
    python -m benchmarks.scale --parts chunks --shapes 2250x4000x3 16000x16000x1
    python -m benchmarks.scale --parts archive --pixels 10e9    # the large run: 20 to 30 minutes on two cores
    python -m benchmarks.scale --parts stages --device cuda     # networks and entropy coder on a GPU

The source is a real scene (`--image`, or the bundled drone frame), repeated lazily with a shift, so that no two
blocks are equal. Each part prints its figures and whether they meet the target; losses are printed too. Other load on
the machine lowers speeds, so the load average at the start is printed, too. Progress goes to standard error. Archives
lie in a folder that is deleted when the step ends, also by Ctrl-C; `--folder` chooses the disk.
"""

import argparse
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from dask.callbacks import Callback
from zarr.storage import MemoryStore, WrapperStore

from benchmarks.common import machine, median_time, table
from deepsic_codec import DeepSIC, config, open_labels
from deepsic_codec import dask as bulk
from deepsic_codec.axes import ceil_div
from deepsic_codec.bulk.write import BlockReport
from deepsic_codec.io.images import read_rgb
from deepsic_codec.samples import drone_frame

EDGE = 256  # of a chunk in pixels, but where the target names another
BLOCK = 1024  # edge of a block of the source
SIZES = (1, 4, 16)  # of the sources whose peak memory is compared
FLAT = 0.10  # how much of it may differ
SPEED_UP = 1.7  # that two workers have to reach
TELL = 10  # seconds between two lines that tell how far a write is
GPU_TARGETS = {"analysis": 1000.0, "synthesis": 1000.0, "encode, end to end": 300.0, "decode, end to end": 300.0}
# How single chunks are coded, and what memory may take beyond start-up and samples: MiB, and bytes a pixel of an image.
MODES: dict[str, dict[str, Any]] = {
    "features": {"quality": 75, "transform": "features"},
    "wavelets": {"quality": 75, "transform": "wavelet"},
    "wavelets, a target": {"psnr": 45, "transform": "wavelet"},
    "exact": {"max_error": 0},
    "within a bound": {"max_error": 4},
}
ALLOWED, ALLOWED_BYTES = 256, 12
BATCHES = (16, 64, 128, 256, 512, 1024)  # of chunks, end to end on a GPU
PARTS = ("chunks", "memory", "workers", "batch", "stages", "archive", "s3")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args = _arguments(argv)
    if args.child:
        _child(args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that folders go then, too
    print(machine(args.threads))
    print(f"Load average at the start: {os.getloadavg()[0]:.1f}. Device {args.device}.\n")
    verdicts = []
    for part in args.parts:
        began = time.perf_counter()
        print(f"## {part}\n")
        verdicts.append(f"{part}: {globals()[part](args)}")
        print(f"({time.perf_counter() - began:.0f} s)\n", flush=True)
    print("\n".join(verdicts))


def chunks(args: argparse.Namespace) -> str:
    """Peak memory of encoding and decoding one chunk, beyond what there is after start-up and its samples."""
    rows, missed = [], []
    for shape, dtype, mode in product(args.shapes, args.dtypes, args.modes):
        if mode == "features" and (dtype != "uint8" or not shape.endswith("x3")):
            continue
        with _folder(args) as folder:
            task = {"shape": [int(size) for size in shape.split("x")], "dtype": dtype, "mode": mode}
            task["payload"] = str(folder / "payload")
            figures = [_in_child(args, way, **task) for way in ("encode", "decode")]
        height, width, bands = task["shape"]
        pixels = height * width
        allowed = ALLOWED + ALLOWED_BYTES * pixels * ceil_div(bands, 3) / 2**20
        used = [one["peak"] - one["before"] - one["result"] for one in figures]
        missed += [(shape, dtype, mode)] * (max(used) > allowed)
        each = [value for one in used for value in (round(one), one * 2**20 / pixels)]
        cells = (shape, dtype, mode, *each, round(allowed), figures[0]["nbytes"] / pixels)
        rows.append((*cells, *(one["cpu"] / pixels * 1e6 for one in figures)))
        print(*rows[-1], file=sys.stderr, flush=True)
    header = [
        "chunk",
        "dtype",
        "as",
        "encode MiB",
        "bytes/px",
        "decode MiB",
        "bytes/px",
        "allowed MiB",
        "payload bytes/px",
    ]
    print(table([*header, "encode CPU s/Mpx", "decode CPU s/Mpx"], rows), "\n")
    return f"within {ALLOWED} MiB and {ALLOWED_BYTES} bytes a pixel of three bands: {_met(not missed)}" + "".join(
        f"; {' '.join(one)} is not" for one in missed
    )


def _code_chunk(task: dict[str, Any], image: str | None) -> None:
    """In the child process: encode or decode a chunk, and print memory in MiB."""
    codec, way = DeepSIC(**MODES[task["mode"]]), task["what"]
    small = _samples([256, 256, task["shape"][2]], task["dtype"], image)
    codec.decode(codec.encode(small))  # compiles, and loads the model
    path = Path(task["payload"])
    work: Any = _samples(task["shape"], task["dtype"], image) if way == "encode" else path.read_bytes()
    call = codec.encode if way == "encode" else codec.decode
    _scene.cache_clear()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = _resident(), time.process_time()
    result = call(work)
    cpu = time.process_time() - began
    peak = _peak()
    if way == "encode":
        path.write_bytes(result)
    result_mib = 0.0 if way == "encode" else result.nbytes / 2**20  # what is decoded, not what is encoded
    nbytes = len(result if way == "encode" else work)
    print(json.dumps({"peak": peak, "before": before, "result": result_mib, "nbytes": nbytes, "cpu": cpu}))


def _samples(shape: Sequence[int], dtype: str, image: str | None) -> np.ndarray:
    """Mirror a scene at its edges to samples of a shape; those of 16 bits have the scene moved as their lower bits."""
    scene = _scene(image)
    if dtype == "uint16":
        scene = scene.astype(np.uint16) * 200 + np.roll(scene, 97, (0, 1))
    height, width, bands = shape
    rows, columns = (
        np.pad(np.arange(size), (0, max(0, length - size)), "symmetric")[:length]
        for size, length in zip(scene.shape[:2], (height, width), strict=True)
    )
    out = np.empty((height, width, bands), dtype)
    for top in range(0, height, BLOCK):
        out[top : top + BLOCK] = scene[rows[top : top + BLOCK, None], columns][..., np.arange(bands) % 3]
    return out


def _peak() -> float:
    """Return the peak of the resident memory of this process in MiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def memory(args: argparse.Namespace) -> str:
    """Peak memory of the writer for sources of 1, 4 and 16 times the size."""
    unit = max(1, round(args.pixels / sum(SIZES) / BLOCK**2))
    rows, peaks = [], []
    for size in SIZES:
        figures = _in_child(args, "write", height=BLOCK * unit * size)
        peaks.append(figures["peak"])
        pixels = figures["pixels"] / 1e6
        rows.append(
            (
                f"{size}x",
                f"{pixels:.1f}",
                figures["peak"],
                figures["before"],
                figures["chunks"],
                pixels / figures["seconds"],
            )
        )
    print(table(("source", "Mpx", "peak MiB", "before MiB", "chunks", "Mpx/s"), rows), "\n")
    growth = max(peaks) / min(peaks) - 1
    return f"peaks for sources of {SIZES} times the size differ by {growth:.1%}; {_met(growth <= FLAT)} (at most 10%)"


def workers(args: argparse.Namespace) -> str:
    """Time of one and two worker processes of one thread each, in turn; the fastest run of each counts."""
    from distributed import Client, LocalCluster

    # A block is a task: of an odd number of equal ones, two workers cannot each have half.
    blocks = 2 * max(2, round(args.pixels / BLOCK**2 / 2))
    rows: list[tuple[float, ...]] = []
    with _folder(args) as folder:  # of all runs: a file system that has just deleted one makes files slowly
        for run, count in enumerate((1, 2) * args.repeats):
            options = {"n_workers": count, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
            with LocalCluster(**options) as cluster, Client(cluster) as client:
                client.run(_prepare, args.device)
                client.run(_warm_up, args.image)
                source = tiled(args.image, BLOCK * blocks, BLOCK)
                began, used = time.perf_counter(), sum(client.run(time.process_time).values())
                _store(source, folder / f"{run}.zarr")
                seconds = time.perf_counter() - began
                used = sum(client.run(time.process_time).values()) - used
            pixels = source.shape[0] * source.shape[1] / 1e6
            rows.append((count, pixels, seconds, pixels / seconds, used, used / seconds))
    rows.sort()
    print(table(("workers", "Mpx", "seconds", "Mpx/s", "CPU seconds", "cores had"), rows), "\n")
    one, two = (next(row for row in rows if row[0] == count) for count in (1, 2))
    gain = one[2] / two[2]
    text = f"two workers are {gain:.2f} times as fast as one; {_met(gain >= SPEED_UP)} (at least {SPEED_UP})"
    # Where others take part of the machine, time says more of them: what the workers got is told beside it.
    return f"{text}, on {two[5] / one[5]:.2f} times the CPU"


def batch(args: argparse.Namespace) -> str:
    """Encode chunks of 256x256 in batches of 16 and one by one."""
    _prepare(args.device, args.threads)
    codec, chunks = DeepSIC(), _chunks(args.image, EDGE, 64)
    decoded = codec.decode_batch(codec.encode_batch(chunks[:16]))
    assert all(a.shape == b.shape for a, b in zip(decoded, chunks, strict=False))
    pixels, rates = len(chunks) * EDGE**2 / 1e6, {}
    for size in (1, 4, 16, 64):

        def encode(size: int = size) -> None:
            for k in range(0, len(chunks), size):
                codec.encode_batch(chunks[k : k + size])

        encode()
        rates[size] = pixels / median_time(encode, args.repeats)
    print(table(("batch", "encode Mpx/s"), rates.items()), "\n")
    gain = rates[16] / rates[1]
    return f"batches of 16 encode {gain:.2f} times as fast as single chunks; {_met(gain > 1)} (batching pays)"


def stages(args: argparse.Namespace) -> str:
    """Networks alone, entropy coder alone, and all together, on batches of 512x512 chunks."""
    import torch

    from deepsic_codec.model.scheduler import get_scheduler
    from deepsic_codec.model.zoo import find_model

    _prepare(args.device, args.threads)
    edge, cuda = 512, torch.device(args.device).type == "cuda"
    chunks = _chunks(args.image, edge, 512 if cuda else 8)
    figures = {}
    for kernels in ("auto", "plain") if cuda else ("auto",):
        batch = chunks if kernels == "auto" else chunks[:128]
        pixels = len(batch) * edge**2 / 1e6
        for size in args.batch_pixels or [None]:
            with config.set(kernels=kernels, batch_pixels=None if size is None else int(size)):
                work, rates = (_stages if cuda else _cpu_stages)(get_scheduler(find_model()), DeepSIC(), batch), {}
                for stage, run in work.items():
                    run()
                    rates[stage] = pixels / median_time(run, args.repeats)
            calls = "" if size is None else f"calls of {size / 1e6:g} Mpx"
            name = ", ".join(filter(None, (f"kernels {kernels}" * cuda, calls)))
            figures[name] = rates
            title = ", ".join(filter(None, (f"on {args.device}", f"batch {len(batch)}", name)))
            rows = [(stage, rate * 1e6 / edge**2, rate) for stage, rate in rates.items()]
            print(table((title, "images/s", "Mpx/s"), rows), "\n")
    if cuda:
        print(table(("chunks in a batch", "encode Mpx/s", "decode Mpx/s"), _by_batch(chunks, args.repeats)), "\n")
    best = max(figures, key=lambda name: figures[name]["encode, end to end"])
    rates, bound = figures[best], {}
    for way, network in (("encode", "analysis and optimised quantisation"), ("decode", "synthesis")):
        bound[way] = min((network, f"prior and entropy coder, {way}"), key=lambda stage: rates[stage])
    text = f"encoding is bound by {bound['encode']}, decoding by {bound['decode']}"
    if not cuda:
        return f"{text} (targets are for a GPU)"
    missed = [name for name, target in GPU_TARGETS.items() if rates[name] < target]
    return f"{best}: {text}; targets {'met' if not missed else 'missed by ' + ', '.join(missed)}"


def _by_batch(chunks: list[np.ndarray], repeats: int) -> Iterator[tuple[int, float, float]]:
    """Yield batch sizes with the speed of encoding and decoding end to end."""
    codec = DeepSIC()
    for size in BATCHES:
        batch = [chunks[i % len(chunks)] for i in range(size)]
        payloads, pixels = codec.encode_batch(batch), size * chunks[0].shape[0] * chunks[0].shape[1] / 1e6
        codec.decode_batch(payloads)
        seconds = [
            median_time(lambda run=run, values=values: run(values), repeats)  # type: ignore[misc]
            for run, values in ((codec.encode_batch, batch), (codec.decode_batch, payloads))
        ]
        yield size, pixels / seconds[0], pixels / seconds[1]


def _stages(scheduler: Any, codec: DeepSIC, chunks: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Return the calls that `stages` times on a GPU; they begin and end on the device, but for pixels and scores."""
    import torch

    from deepsic_codec.model.coding import predict
    from deepsic_codec.model.device import download, synchronize, upload
    from deepsic_codec.model.runtime import Chosen

    model, count, quality = scheduler.model, len(chunks), np.full(len(chunks), 50.0)
    payloads = codec.encode_batch(chunks)
    encoded = scheduler.encode([chunk[None] for chunk in chunks], quality.tolist(), symbols=True)
    features, shape = [one.features for one in encoded], (1, *chunks[0].shape[:2])
    trellis = encoded[0].quantiser.trellis
    size = max(1, config.get().pixels_per_call(model.device.type) // (shape[1] * shape[2]))
    pieces = [slice(start, start + size) for start in range(0, count, size)]
    with torch.inference_mode():
        images = upload(np.stack(chunks), model.device)
        symbols = upload(np.concatenate([one.symbols for one in encoded]), model.device)
        scaled = torch.cat([model.analyse(images[piece], quality[piece]).scaled for piece in pieces])
        nearest = model.choose(scaled, quality, 0).symbols
        predictions = predict(model.prior, nearest, 50)
    coder, pool = scheduler.device_coder(count), ThreadPoolExecutor(config.get().threads or os.cpu_count())

    @torch.inference_mode()
    def analyse(effort: int) -> None:
        pending = []
        for piece in pieces:
            analysed = model.analyse(images[piece], quality[piece])
            model.choose(analysed.scaled, quality[piece], effort)
            pending.append(download(model.score(analysed.latents, quality[piece])))
        for scores in pending:
            scores()
        synchronize(model.device)

    @torch.inference_mode()
    def synthesise() -> None:
        pending = [download(model.synthesise(symbols[piece], quality[piece], False, trellis)) for piece in pieces]
        for pixels in pending:
            pixels()

    def encode(predictions: Any) -> None:
        model.encode_symbols(Chosen(nearest, predictions), count, quality.tolist(), pool, coder, count)()

    def decode() -> None:
        if coder is None:
            model.decode_symbols(features, shape, quality.tolist(), pool, trellis)
        else:
            model.decode_symbols_on_device(features, shape, quality.tolist(), coder, count, trellis)[1]()

    return {
        "analysis": lambda: analyse(0),
        "analysis and optimised quantisation": lambda: analyse(1),
        "synthesis": synthesise,
        "entropy coder, encode": lambda: encode(predictions),
        "prior and entropy coder, encode": lambda: encode(None),
        "prior and entropy coder, decode": decode,
        "encode, end to end": lambda: codec.encode_batch(chunks),
        "decode, end to end": lambda: codec.decode_batch(payloads),
    }


def _cpu_stages(scheduler: Any, codec: DeepSIC, chunks: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Return the calls that `stages` times on a CPU, where prior and entropy coder are one."""
    images, quality = [chunk[None] for chunk in chunks], [50.0] * len(chunks)
    shapes, payloads = [image.shape[:3] for image in images], codec.encode_batch(chunks)
    encoded = scheduler.encode(images, quality, symbols=True)
    features, symbols = [one.features for one in encoded], [one.symbols for one in encoded]
    quantisers = [one.quantiser for one in encoded]
    return {
        "analysis": lambda: scheduler.encode(images, quality, features=False),
        "analysis and optimised quantisation": lambda: scheduler.encode(images, quality, features=False, symbols=True),
        "synthesis": lambda: scheduler.synthesise(symbols, shapes, quantisers, False),
        "prior and entropy coder, encode": lambda: scheduler.encode_symbols(symbols, shapes, quantisers),
        "prior and entropy coder, decode": lambda: scheduler.decode_symbols(features, shapes, quantisers),
        "encode, end to end": lambda: codec.encode_batch(chunks),
        "decode, end to end": lambda: codec.decode_batch(payloads),
    }


def archive(args: argparse.Namespace) -> str:
    """A large source written, indexed and queried, with memory on the way."""
    figures = _in_child(args, "archive", height=max(BLOCK, round(args.pixels / args.width / BLOCK) * BLOCK))
    rows = [(f"{done:.0%}", mib) for done, mib in figures["memory"]]
    print(table(("written", "memory MiB"), rows), "\n")
    print(
        f"{figures['pixels'] / 1e6:,.0f} Mpx in {figures['chunks']:,} chunks, {figures['nbytes']:,} bytes "
        f"({8 * figures['nbytes'] / figures['pixels']:.3f} bpp), written in {figures['seconds']:.0f} s "
        f"({figures['pixels'] / 1e6 / figures['seconds']:.2f} Mpx/s), index included.\n"
        f"Query {figures['expression']!r}: {figures['matches']:,} chunks in {figures['query'] * 1e3:.0f} ms, opening "
        f"included; it read {figures['read']:,} bytes in {figures['requests']} requests.\n"
    )
    later = [mib for done, mib in figures["memory"] if done >= 0.2]
    growth = max(later) / later[0] - 1
    return f"memory grew by {growth:+.1%} after the first fifth; {_met(growth <= FLAT)} (at most {FLAT:+.0%})"


def s3(args: argparse.Namespace) -> str:
    """Concurrent writes, reads and a query against a real S3 server on loopback, through fsspec and obstore."""
    _prepare(args.device, args.threads)
    source = tiled(args.image, BLOCK * max(1, round(args.pixels / BLOCK**2 / 4)), BLOCK)
    expected, rows = None, []
    with _moto() as endpoint:
        for kind in ("fsspec", "obstore"):
            store = Counting(_s3_store(kind, endpoint))
            steps = {
                "write and index": lambda store=store: _store(source, store),
                "read": lambda store=store: bulk.open(store, "image").compute(),
                "query": lambda store=store: _query(store)[1].count,
            }
            values = {}
            for step, run in steps.items():
                store.clear()
                began = time.perf_counter()
                values[step] = run()
                seconds = time.perf_counter() - began
                rows.append((kind, step, seconds, store.gets, store.got, store.sets, store.put))
            decoded, count = values["read"], values["query"]
            if expected is not None:
                assert np.array_equal(decoded, expected[0]) and count == expected[1], "the two differ"
            expected = decoded, count
    print(table(("through", "step", "seconds", "reads", "bytes read", "writes", "bytes written"), rows), "\n")
    assert expected is not None
    return f"both ways give the same pixels and the same {expected[1]} chunks for the query"


def tiled(image: str | None, height: int, width: int) -> Any:
    """Repeat a scene lazily to (height, width, 3), each block shifted so that no two are equal."""
    import dask.array as da

    rows, columns = ((BLOCK,) * (size // BLOCK) + ((size % BLOCK,) if size % BLOCK else ()) for size in (height, width))
    empty = np.empty((0, 0, 0), np.uint8)
    return da.map_blocks(_tile, image=image, chunks=(rows, columns, (3,)), dtype=np.uint8, meta=empty)


def _tile(image: str | None, block_info: Any = None) -> np.ndarray:
    scene = _scene(image)
    (y0, y1), (x0, x1), _ = block_info[None]["array-location"]
    shift = 977 * (y0 // BLOCK) + 131 * (x0 // BLOCK)
    rows, columns = (np.arange(y0, y1) + shift) % scene.shape[0], (np.arange(x0, x1) + 3 * shift) % scene.shape[1]
    return scene[rows[:, None], columns]


@lru_cache(maxsize=1)
def _scene(image: str | None) -> np.ndarray:
    return read_rgb(image) if image else drone_frame()


def _chunks(image: str | None, edge: int, count: int) -> list[np.ndarray]:
    scene = _scene(image)
    rng = np.random.default_rng(0)
    tops, lefts = (rng.integers(0, size - edge + 1, count) for size in scene.shape[:2])
    return [np.ascontiguousarray(scene[y : y + edge, x : x + edge]) for y, x in zip(tops, lefts, strict=True)]


def _store(source: Any, target: Any, **kwargs: Any) -> Any:
    target = str(target) if isinstance(target, Path) else target
    return bulk.store(source, target, name="image", chunks=(EDGE, EDGE, 3), **kwargs)


def _prepare(device: str, threads: int = 1) -> None:
    import torch

    config.set_defaults(device=device, threads=threads)
    torch.set_num_threads(threads)


def _warm_up(image: str | None = None) -> None:
    """Load scene and model, compile, and import, so that this does not count in the measurement."""
    import dask

    _scene(image)
    with dask.config.set(scheduler="synchronous"):
        _store(np.zeros((EDGE, 2 * EDGE, 3), np.uint8) + 1, MemoryStore())


def _expression(labels: Any) -> str:
    """Return a query for two classes of the model."""
    return " | ".join(f"{name} > 0.5" for name in labels.vocabulary.names[:2])


def _query(place: Any) -> tuple[Any, Any]:
    labels = open_labels(place, "image")
    return labels, labels.where(_expression(labels))


def _met(good: bool) -> str:
    return "met" if good else "MISSED"


def _in_child(args: argparse.Namespace, what: str, **more: Any) -> dict[str, Any]:
    """Run a step in a new process, so that its peak memory is that of the step."""
    with _folder(args) as folder:  # here and not there: after Ctrl-C the child is killed before it has deleted much
        task = {"what": what, "width": args.width if what == "archive" else BLOCK, "folder": str(folder), **more}
        command = [
            sys.executable,
            "-m",
            "benchmarks.scale",
            "--child",
            json.dumps(task),
            "--device",
            args.device,
            "--threads",
            str(args.threads),
            *(["--image", args.image] if args.image else []),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the step {what!r} failed with exit code {done.returncode}; what it printed is above")
    return json.loads(done.stdout.splitlines()[-1])


def _child(args: argparse.Namespace) -> None:
    import dask

    task = json.loads(args.child)
    if "payload" in task:
        config.set_defaults(threads=args.threads)
        _code_chunk(task, args.image)
        return
    _prepare(args.device, args.threads)
    _warm_up(args.image)
    open_labels  # noqa: B018  # its modules are imported before memory is looked at
    before = _resident()
    source = tiled(args.image, task["height"], task["width"])
    path, watch = Path(task["folder"]) / "a.zarr", _Watch(source.size)
    began = time.perf_counter()
    with watch, dask.config.set(scheduler="threads", num_workers=args.threads):
        report = _store(source, path)
    figures = {
        "seconds": time.perf_counter() - began,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "before": before,
        "memory": watch.memory,
        "pixels": source.shape[0] * source.shape[1],
        "chunks": report.written,
        "nbytes": report.nbytes,
    }
    if task["what"] == "archive":
        began = time.perf_counter()
        labels, selection = _query(str(path))
        figures |= {"matches": int(selection.count), "query": time.perf_counter() - began}
        figures |= {"expression": _expression(labels)}
        figures |= {"read": int(labels.bytes_read + selection.bytes_read)}
        figures |= {"requests": int(labels.requests + selection.requests)}
    print(json.dumps(figures))


class _Watch(Callback):
    """Record memory at each tenth of a write, and print progress every few seconds.

    Parameters
    ----------
    samples : int
        Of the source.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples, self.done, self.memory = samples, 0, list[tuple[float, float]]()
        self.began = self.told = time.perf_counter()

    def _posttask(self, key: Any, value: Any, *rest: Any) -> None:
        if not isinstance(value, BlockReport):
            return
        self.done += value.samples
        share, now = self.done / self.samples, time.perf_counter()
        if share * 10 >= len(self.memory) + 1:
            self.memory.append((share, _resident()))
        if now - self.told >= TELL or share == 1:
            self.told, seconds = now, now - self.began
            end = "; now the index" if share == 1 else f", {seconds / share - seconds:,.0f} s left"
            print(
                f"{share:4.0%} of {self.samples / 3e6:,.0f} Mpx, {self.done / 3e6 / seconds:.2f} Mpx/s, "
                f"{_resident():,.0f} MiB, {seconds:,.0f} s{end}",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    """Make a folder for archives, deleted at the end."""
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="deepsic-scale-", dir=args.folder) as folder:
        yield Path(folder)


def _resident() -> float:
    """Return the resident memory of this process in MiB."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20


class Counting(WrapperStore[Any]):
    """A store that counts bytes and requests."""

    def __init__(self, store: Any, counts: dict[str, int] | None = None) -> None:
        super().__init__(store)
        self.counts = {} if counts is None else counts
        if counts is None:
            self.clear()

    def clear(self) -> None:
        """Set all counts to zero."""
        self.counts.update(dict.fromkeys(("gets", "got", "sets", "put"), 0))

    def __getattr__(self, name: str) -> Any:
        if name in ("gets", "got", "sets", "put"):
            return self.counts[name]
        raise AttributeError(name)

    def _with_store(self, store: Any) -> "Counting":
        return Counting(store, self.counts)

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        """Read."""
        data = await self._store.get(*args, **kwargs)
        self.counts["gets"] += 1
        self.counts["got"] += 0 if data is None else len(data)
        return data

    async def set(self, key: str, value: Any, *args: Any) -> None:
        """Write."""
        self.counts["sets"] += 1
        self.counts["put"] += len(value)
        await self._store.set(key, value, *args)


@contextmanager
def _moto() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        import boto3

        endpoint = f"http://127.0.0.1:{port}"
        client = boto3.client("s3", endpoint_url=endpoint)
        for bucket in ("fsspec", "obstore"):
            client.create_bucket(Bucket=bucket)
        yield endpoint
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the S3 server did not start")


def _s3_store(kind: str, endpoint: str) -> Any:
    from zarr.storage import FsspecStore, ObjectStore

    if kind == "fsspec":
        options = {"endpoint_url": endpoint, "anon": False, "config_kwargs": {"max_pool_connections": 128}}
        return FsspecStore.from_url("s3://fsspec/a.zarr", storage_options=options)
    from obstore.store import S3Store

    return ObjectStore(
        S3Store(
            "obstore",
            prefix="a.zarr",
            endpoint=endpoint,
            client_options={"allow_http": True},
            virtual_hosted_style_request=False,
        )
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run (default: all)")
    text = "chunks of the part chunks: rows, columns and bands (default: 2250x4000x3)"
    parser.add_argument("--shapes", nargs="+", default=["2250x4000x3"], help=text)
    parser.add_argument("--dtypes", nargs="+", choices=("uint8", "uint16"), default=["uint8", "uint16"], help="of them")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="how they are coded")
    text = "of the source of each part: a tenth of a second to a second per million on a CPU (default: 20e6)"
    parser.add_argument("--pixels", type=float, default=20e6, help=text)
    parser.add_argument("--width", type=int, default=8 * BLOCK, help="of the source of the part archive, in pixels")
    parser.add_argument("--image", help="scene to repeat (default: the bundled drone frame)")
    parser.add_argument("--folder", help="where archives lie while it runs (default: that of temporary files)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each process that encodes")
    text = "most pixels of a model call, several to compare (part stages; default: what the device gets)"
    parser.add_argument("--batch-pixels", type=float, nargs="+", help=text)
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is taken")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
