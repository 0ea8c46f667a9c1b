"""Queries on labels: time, requests, bytes; what they find and what they miss.

    python -m benchmarks.query --data EUROSAT_VAL

``--data`` is a zip file or folder with EuroSAT validation tiles, ``<Class>/<Class>_<n>.jpg``. Measured are a real
archive of their tiles in chunks of 64x64 (repeated up to ``--chunks``), an index of a million chunks of 512x512 with 16
label tiles each, whose scores are drawn from those of the real tiles and whose land cover is made up, and the same over
S3: moto on loopback with an injected delay.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image
from zarr.storage import LocalStore, MemoryStore

from benchmarks import s3
from benchmarks.common import machine, table
from deepsic_codec import DeepSIC, consolidate_labels, create_array, iter_chunk_attrs, open_labels, relabel
from deepsic_codec._compat import default_buffer_prototype, sync
from deepsic_codec.labels.expression import Expression, parse
from deepsic_codec.labels.index import HEADER, Entries
from deepsic_codec.labels.index_writer import IndexWriter, replace
from deepsic_codec.labels.query import Labels
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.stored.array import StoredArray
from deepsic_codec.stored.geometry import Geometry
from deepsic_codec.stored.location import IndexLocation

TILE = 64
QUERIES = ("Forest > 0.6", "Water", "Forest > 0.6 & ~Water", "River & Residential", "~Vegetation & ~Agriculture")
TARGETS = {"seconds": 0.1, "similar": 0.1, "share": 0.001, "s3 query": 0.3, "s3 scan": 1.0}
SCANNED = 1024  # chunks of the header scan
SIDE = 1000  # chunks along each axis of the large index


def read_tiles(source: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """Tiles (n, 64, 64, 3) and their classes, in an order that mixes the classes."""
    if source.is_dir():
        files: list[tuple[str, Callable[[], bytes]]] = [(str(p), p.read_bytes) for p in sorted(source.rglob("*.jpg"))]
    else:
        archive = zipfile.ZipFile(source)
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        files = [(name, partial(archive.read, name)) for name in names]
    if any("train" in Path(name).parts for name, _ in files):
        raise ValueError(f"{source} has training tiles: figures of a model on them mean nothing")
    order = np.random.default_rng(0).permutation(len(files))
    pixels = [np.asarray(Image.open(io.BytesIO(files[i][1]())).convert("RGB")) for i in order]
    return np.stack(pixels), [Path(files[i][0]).parent.name for i in order]


def real_archive(folder: Path, tiles: NDArray[np.uint8], chunks: int, codec: DeepSIC) -> tuple[zarr.Array, int]:
    """Store tiles as an array of so many chunks at least, each a tile; returns the columns of its grid."""
    columns = int(np.ceil(np.sqrt(chunks)))
    rows = -(-chunks // columns)
    zarr.open_group(str(folder))
    shape = rows * TILE, columns * TILE, 3
    array = create_array(str(folder), name="image", shape=shape, dtype="u1", chunks=(TILE, TILE, 3), codec=codec)
    for row in range(rows):
        picked = tiles[np.arange(row * columns, (row + 1) * columns) % len(tiles)]
        array[row * TILE : (row + 1) * TILE] = np.concatenate(list(picked), axis=1)
    return array, columns


def random_expression(rng: np.random.Generator, names: Sequence[str], depth: int = 3) -> str:
    """Text of an expression on these names."""
    if depth == 0 or rng.random() < 0.3:
        threshold = "" if rng.random() < 0.4 else f" {rng.choice(['>', '>=', '<', '<='])} {rng.integers(0, 21) / 20}"
        return f"{rng.choice(names)}{threshold}"
    left = random_expression(rng, names, depth - 1)
    if rng.random() < 0.3:
        return f"~({left})"
    return f"({left}) {rng.choice(['&', '|'])} ({random_expression(rng, names, depth - 1)})"


def check_queries(labels: Labels, dense: NDArray[np.uint8], columns: int, count: int) -> str:
    """Compare `where` with an evaluation of all chunk attributes, and with the scores before truncation."""
    vocabulary = labels.vocabulary
    stored = np.zeros((len(vocabulary.names), labels.geometry.count), np.uint8)
    for index, attrs in iter_chunk_attrs(labels.array):
        for name, score in attrs["labels"][0].items():
            stored[vocabulary.names.index(name), index[0] * columns + index[1]] = round(score * 255)
    whole = dense[np.arange(labels.geometry.count) % len(dense)].T
    rng = np.random.default_rng(1)
    wrong = missed = expected = extra = selected_total = 0
    for _ in range(count):
        expression = parse(random_expression(rng, vocabulary.known))
        selected = labels.where(expression).mask.ravel()
        brute, untruncated = (_evaluated(expression, vocabulary, scores) for scores in (stored, whole))
        wrong += int((selected != brute).sum())
        missed += int((untruncated & ~selected).sum())
        extra += int((selected & ~untruncated).sum())
        expected += int(untruncated.sum())
        selected_total += int(selected.sum())
    share = "exactly 1" if wrong == 0 else f"WRONG for {wrong} chunks"
    return (
        f"{count} random expressions against brute force over {labels.geometry.count:,} chunk attributes: recall and "
        f"precision {share}. Against scores before truncation to 5 classes: recall {1 - missed / expected:.6f}, "
        f"precision {1 - extra / selected_total:.6f}."
    )


def _evaluated(expression: Expression, vocabulary: Vocabulary, scores: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return expression.tiles(lambda name: vocabulary.score(name, scores.__getitem__))


def against_truth(labels: Labels, truth: NDArray[np.str_]) -> str:
    """Precision and recall of each class and parent, at scores of at least 0.5."""
    rows = []
    for name in labels.vocabulary.known:
        members = [labels.vocabulary.names[i] for i in labels.vocabulary.members(name)]
        real = np.isin(truth, members)
        if not real.any():
            continue
        selected = labels.where(f'"{name}"').mask.ravel()
        right = int((selected & real).sum())
        rows.append(
            [
                name,
                int(real.sum()),
                int(selected.sum()),
                f"{right / max(1, selected.sum()):.4f}",
                f"{right / real.sum():.4f}",
            ]
        )
    return table(["query", "true chunks", "selected", "precision", "recall"], rows)


def pieces(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Noise with features of every size, as land cover has."""
    field = np.zeros(shape, np.float32)
    for size in (1, 4, 16, 64, 256):
        small = rng.normal(size=tuple(-(-n // size) for n in shape)).astype(np.float32) * np.float32(size**0.6)
        field += np.repeat(np.repeat(small, size, 0), size, 1)[: shape[0], : shape[1]]
    return field


def simulate(folder: Path, dense: NDArray[np.uint8], truth: NDArray[np.str_], codec: DeepSIC) -> tuple[Labels, int]:
    """Write an index of a million chunks of 512x512; returns it and the bytes that the archive would have."""
    from deepsic_codec.model.zoo import find_model

    vocabulary = find_model(codec.model).vocabulary
    zarr.open_group(str(folder))
    pixels = SIDE * 512
    array = create_array(
        str(folder), name="image", shape=(pixels, pixels, 3), dtype="u1", chunks=(512, 512, 3), codec=codec
    )
    geometry = Geometry.of(array, "yxc", None)
    rng = np.random.default_rng(2)
    rows, columns = geometry.tile_grid[:2]
    best, cover = np.full((rows, columns), -np.inf, np.float32), np.zeros((rows, columns), np.uint8)
    for number in range(len(vocabulary.classes)):
        field = pieces((rows, columns), rng)
        cover[field > best] = number
        np.maximum(best, field, out=best)
    kept = np.where(dense >= 8, dense, 0)
    chosen = np.zeros((rows, columns), np.int32)  # each tile gets all scores of a real tile of its class
    for number, name in enumerate(vocabulary.classes):
        mask = cover == number
        chosen[mask] = rng.choice(np.flatnonzero(truth == name), int(mask.sum()))
    about = {"name": "image", "decoder": codec.decoder, "fingerprint": StoredArray(array).fingerprint()}
    total = 0

    def write(version: IndexLocation) -> None:
        nonlocal total
        writer = IndexWriter(version, geometry, vocabulary, about)
        for start, stop in writer.chunking.units(geometry.grid):
            entries = Entries(geometry, len(vocabulary.names), start, stop)
            part = chosen[geometry.tiles_of(start, stop)[:2]]
            entries.tiles[...] = np.moveaxis(kept[part], -1, 0)[..., None]
            shape = entries.source.shape
            entries.source[...], entries.head[...] = HEADER, int((codec.head or "0")[:8], 16)
            entries.crc[...] = rng.integers(0, 1 << 32, shape)
            entries.nbytes[...] = np.exp(rng.normal(np.log(14_000), 0.5, shape))  # about 0.5 bit per pixel
            total += int(entries.nbytes.sum(dtype=np.int64))
            writer.write(entries)
        writer.finish()

    replace(IndexLocation(LocalStore(folder), "image_labels", 3), write)
    return open_labels(str(folder), "image"), total


def timed_queries(labels: Labels, total: int, repeats: int) -> str:
    """Time of queries, and what they read, of an archive of so many bytes."""
    rows = []
    for text in QUERIES:
        seconds, cpu = [], []
        for _ in range(repeats):
            start, start_cpu = time.perf_counter(), time.process_time()
            selected = labels.where(text)
            count = selected.count
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        good = min(seconds) <= TARGETS["seconds"] and selected.bytes_read <= TARGETS["share"] * total
        rows.append(
            [
                text,
                f"{count:,}",
                f"{np.median(seconds) * 1e3:.0f}",
                f"{min(seconds) * 1e3:.0f}",
                f"{np.median(cpu) * 1e3:.0f}",
                f"{selected.bytes_read:,}",
                f"{selected.bytes_read / total:.4%}",
                selected.requests,
                "met" if good else "missed",
            ]
        )
    header = ["query", "chunks", "median ms", "best ms", "CPU ms", "bytes read", "of archive", "requests", "target"]
    return table(header, rows)


def over_s3(array: zarr.Array, latency: float) -> Iterator[str]:
    """Query and scan an archive of 1,024 chunks in S3."""
    import s3fs

    side = int(np.sqrt(SCANNED))
    copy = MemoryStore()
    zarr.open_group(copy)
    codec: Any = array.metadata.codecs[0]  # type: ignore[union-attr]
    part = create_array(
        copy, name="image", shape=(side * TILE, side * TILE, 3), dtype="u1", chunks=(TILE, TILE, 3), codec=codec
    )
    get = default_buffer_prototype()
    for index in np.ndindex(*part.cdata_shape):
        data = sync(array.store.get(f"image/{array.metadata.encode_chunk_key(index)}", get))
        assert data is not None
        sync(copy.set(f"image/{part.metadata.encode_chunk_key(index)}", data))
    consolidate_labels(part)
    with s3.running(latency) as address:
        os.environ.update({**s3.KEYS, "AWS_ENDPOINT_URL": address})
        files = s3fs.S3FileSystem(anon=False)
        files.mkdir("bucket")

        async def upload() -> None:
            for key, value in copy._store_dict.items():
                await files._pipe_file(f"bucket/a.zarr/{key}", value.to_bytes())

        from fsspec.asyn import sync as on_its_loop

        on_its_loop(files.loop, upload)
        url, query = "s3://bucket/a.zarr", QUERIES[2]
        rows = []
        for name, scan, cold in (
            ("index, s3fs", False, False),
            ("index, s3fs, first use in the process", False, True),
            ("headers, s3fs", True, False),
        ):
            open_labels(url, "image", scan=scan).where(query)  # the service then has the answers, s3fs its connections
            if cold:
                s3fs.S3FileSystem.clear_instance_cache()
            rows.append(_s3_row(name, scan, address, lambda scan: open_labels(url, "image", scan=scan).where(query)))
        for name, scan in (("index, obstore", False), ("headers, obstore", True)):

            def run(scan: bool) -> Any:
                return open_labels(_obstore(address), "image", scan=scan).where(query)

            run(scan)
            rows.append(_s3_row(name, scan, address, run))
    yield table(["S3: open and query by", "seconds", "chunks selected", "requests", "bytes", "target"], rows)
    from zarr.testing.store import LatencyStore

    slow = zarr.open_array(LatencyStore(copy, get_latency=latency), path="image", mode="r+")
    start = time.perf_counter()
    read = sum(one is not None for _, one in StoredArray(slow).reader.starts(np.ndindex(*slow.cdata_shape)))
    yield (
        f"Headers of {read:,} chunks from a store in memory that answers after {latency * 1e3:.0f} ms: "
        f"{time.perf_counter() - start:.2f} s"
    )


def _obstore(address: str) -> Any:
    from obstore.store import S3Store

    options: Any = {"client_options": {"allow_http": True}, "virtual_hosted_style_request": False}
    store = S3Store("bucket", prefix="a.zarr", endpoint=address, **options)
    return zarr.storage.ObjectStore(store, read_only=True)


def _s3_row(name: str, scan: bool, address: str, run: Callable[[bool], Any]) -> list[Any]:
    s3.counts(address)
    start = time.perf_counter()
    selected = run(scan)
    seconds = time.perf_counter() - start
    counted, target = s3.counts(address), TARGETS["s3 scan" if scan else "s3 query"]
    verdict = f"{'met' if seconds <= target else 'missed'} ({target:g} s)"
    return [name, f"{seconds:.2f}", selected.count, counted["requests"], f"{counted['bytes']:,}", verdict]


def without_torch(folder: Path) -> str:
    """Query in a process that cannot import torch and must not decode."""
    code = f"""
import sys
sys.modules["torch"] = None
from deepsic_codec import open_labels
from deepsic_codec.codec.decode import PayloadToDecode
from deepsic_codec.codec.batching import Batcher
def never(*args, **kwargs): raise AssertionError("decoded")
PayloadToDecode.__init__ = Batcher.submit = Batcher.submit_async = never
print(open_labels({str(folder)!r}, "image").where({QUERIES[2]!r}).count)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"A process that cannot import torch: FAILED\n{done.stderr}"
    return f"In a process that cannot import torch or decode, {QUERIES[2]!r} finds {done.stdout.strip()} chunks."


def relabelling(array: zarr.Array, chunks: int) -> str:
    """Speed of labels from features beside decoding pixels and classifying these."""
    from deepsic_codec.model.scheduler import get_scheduler
    from deepsic_codec.model.zoo import find_model

    side = int(np.sqrt(chunks))
    store = MemoryStore()
    zarr.open_group(store)
    pixels = np.asarray(array[: side * TILE, : side * TILE])
    codec = DeepSIC(quality=array.metadata.codecs[0].quality, semantics="post")  # type: ignore[union-attr]
    post = create_array(store, name="image", data=pixels, chunks=(TILE, TILE, 3), codec=codec)
    runtime = get_scheduler(find_model(codec.model))
    rates = {}
    for name, run in {
        "labels from features (relabel)": lambda: relabel(post),
        "decode, then encoder and head": lambda: _decode_and_classify(post, runtime, codec.quality),
    }.items():
        run()
        start = time.perf_counter()
        run()
        rates[name] = side * side / (time.perf_counter() - start)
    rows = [[name, f"{rate:.0f}", f"{rate * TILE * TILE / 1e6:.2f}"] for name, rate in rates.items()]
    return table([f"new labels for {side * side:,} chunks", "chunks/s", "Mpx/s"], rows)


def _decode_and_classify(array: zarr.Array, runtime: Any, quality: float) -> None:
    for row in range(array.cdata_shape[0]):
        pixels = np.asarray(array[row * TILE : (row + 1) * TILE])
        tiles = np.stack(np.split(pixels, pixels.shape[1] // TILE, axis=1))
        runtime.encode([tile[None] for tile in tiles], [quality] * len(tiles), features=False)


def similarity(folder: Path, tiles: NDArray[np.uint8], classes: Sequence[str], args: argparse.Namespace) -> str:
    """Look-alikes among a million tiles, real ones with noise: time, and whether order and class are right."""
    from deepsic_codec.labels.embeddings import embed_image
    from deepsic_codec.model.zoo import find_model

    info = find_model(args.model)
    columns = 30
    rows = min(len(tiles), 900) // columns
    tiles = tiles[: rows * columns]
    mosaic = tiles.reshape(rows, columns, TILE, TILE, 3).swapaxes(1, 2).reshape(rows * TILE, columns * TILE, 3)
    vectors = embed_image(mosaic, info, tile=(TILE, TILE), quality=args.quality).reshape(len(tiles), -1)
    codec = DeepSIC(model=args.model, quality=args.quality, label_tile=TILE).resolved()
    zarr.open_group(str(folder))
    shape = SIDE * TILE, SIDE * TILE, 3
    array = create_array(str(folder), name="image", shape=shape, dtype="u1", chunks=(TILE, TILE, 3), codec=codec)
    geometry, rng = Geometry.of(array, "yxc", None), np.random.default_rng(3)
    about = {"name": "image", "decoder": codec.decoder, "fingerprint": StoredArray(array).fingerprint()}
    picked = rng.integers(0, len(tiles), (SIDE, SIDE, 1))

    def write(version: IndexLocation) -> None:
        writer = IndexWriter(version, geometry, info.vocabulary, about)
        for start, stop in writer.chunking.units(geometry.grid):
            entries = Entries(geometry, len(info.vocabulary.names), start, stop)
            part = vectors[picked[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]].astype(np.int16)
            entries.embeddings = np.clip(part + rng.integers(-2, 3, part.shape), -127, 127).astype(np.int8)
            entries.source[...] = HEADER
            writer.write(entries)
        writer.finish()

    replace(IndexLocation(LocalStore(folder), "image_labels", 3), write)
    labels = open_labels(str(folder), "image")
    start = time.perf_counter()
    labels.similar((0, 0, 0), 1)
    first = time.perf_counter() - start
    flat = labels.embeddings().reshape(SIDE * SIDE, -1).astype(np.float32)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)
    numbers = picked.ravel()
    one = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    seconds, cpu, same, agreed = [], [], [], True
    for number in rng.integers(0, SIDE * SIDE, 20 * args.repeats).tolist():
        chunk = (*divmod(number, SIDE), 0)
        start, start_cpu = time.perf_counter(), time.process_time()
        result = labels.similar(chunk, 100)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
        hits = result.tiles[:, 0] * SIDE + result.tiles[:, 1]
        cosines = flat @ flat[number]
        cosines[number] = -1
        agreed &= bool(cosines[hits].min() >= np.partition(cosines, -100)[-100] - 1e-4)
        # Copies of the tile itself would always have its class: look among the others.
        order = np.argsort(-(one @ one[numbers[number]]))[1:11]
        same.append(np.mean([classes[i] == classes[numbers[number]] for i in order]))
    verdict = "met" if np.median(seconds) <= TARGETS["similar"] else "missed"
    rows_ = [
        [
            f"{vectors.shape[1]}",
            f"{first:.2f}",
            f"{np.median(seconds) * 1e3:.0f}",
            f"{min(seconds) * 1e3:.0f}",
            f"{np.median(cpu) * 1e3:.0f}",
            "yes" if agreed else "NO",
            f"{np.mean(same):.3f}",
            f"{verdict} ({TARGETS['similar'] * 1e3:.0f} ms)",
        ]
    ]
    header = ["values", "first s", "median ms", "best ms", "CPU ms", "exact", "class of 10 nearest", "target"]
    return table(header, rows_)


def main(argv: Sequence[str] | None = None) -> None:
    """Print all figures."""
    args = _arguments(argv)
    print(machine(os.cpu_count() or 1), "\n", flush=True)
    tiles, classes = read_tiles(args.data)
    if "similarity" in args.parts:
        with tempfile.TemporaryDirectory() as name:
            print(f"100 look-alikes of a tile among {SIDE * SIDE:,}, whose embeddings are real ones with noise:")
            print(similarity(Path(name, "similar.zarr"), tiles, classes, args), "\n", flush=True)
    if "queries" in args.parts:
        _queries(args, tiles, classes)


def _queries(args: argparse.Namespace, tiles: NDArray[np.uint8], classes: list[str]) -> None:
    from deepsic_codec.model.scheduler import get_scheduler
    from deepsic_codec.model.zoo import find_model

    codec = DeepSIC(model=args.model, quality=args.quality).resolved()
    runtime = get_scheduler(find_model(codec.model))
    encoded = runtime.encode([tile[None] for tile in tiles], [args.quality] * len(tiles), labels=True)
    names = find_model(codec.model).vocabulary.names
    dense = np.stack([one.cells[0, 0, 0, : len(names)] for one in encoded if one.cells is not None])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        array, columns = real_archive(folder / "real.zarr", tiles, args.chunks, codec)
        written = time.perf_counter()
        labels = consolidate_labels(str(folder / "real.zarr"), "image")
        total = int(np.asarray(labels.index.group["nbytes"][...]).sum(dtype=np.int64))
        truth = np.array(classes)[np.arange(labels.geometry.count) % len(classes)]
        print(
            f"Real archive: {labels.geometry.count:,} chunks of 64x64 from {len(tiles):,} validation tiles, "
            f"{total:,} bytes; written in {written - start:.1f} s, indexed in {time.perf_counter() - written:.1f} s.\n"
        )
        print(against_truth(labels, truth), "\n", flush=True)
        print(check_queries(labels, dense, columns, args.expressions), "\n", flush=True)
        print(timed_queries(labels, total, args.repeats), "\n", flush=True)
        print(without_torch(folder / "real.zarr"), "\n", flush=True)
        print(relabelling(array, SCANNED), "\n", flush=True)
        for text in over_s3(array, args.latency):
            print(text, "\n", flush=True)
        large, total = simulate(folder / "large.zarr", dense, np.array(classes), codec)
        print(
            f"Index of {large.geometry.count:,} chunks of 512x512 (simulated), 16 label tiles each, archive of "
            f"{total / 1e9:.1f} GB:"
        )
        print(timed_queries(large, total, args.repeats), flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.query", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="zip file or folder of EuroSAT validation tiles")
    parts = ("queries", "similarity")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure (default: all)")
    parser.add_argument("--model", default="base")
    parser.add_argument("--quality", type=float, default=50)
    parser.add_argument("--chunks", type=int, default=10_800, help="of the real archive, at least (default: 10800)")
    parser.add_argument("--expressions", type=int, default=300, help="random ones to check (default: 300)")
    parser.add_argument("--repeats", type=int, default=5, help="of each timed query (default: 5)")
    parser.add_argument("--latency", type=float, default=0.04, help="of S3, seconds (default: 0.04)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
