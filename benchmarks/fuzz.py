"""Feed damaged and crafted bytes, metadata and texts to every reader: typed errors or right answers, in bounded time.

    python -m benchmarks.fuzz --count 100000 --resume fuzz.json --log fuzz.log
    python -m benchmarks.fuzz model index --count 1000 --seed 3
    python -m benchmarks.fuzz payload --model base --count 10000
    python -m benchmarks.fuzz --replay benchmarks/corpus/labels-0123456789.case

Targets, and the stages that make their cases, each from one or more sound inputs:

- payload: chunks of arrays. `bytes` keeps the original checksums, so that everything but the original has to be
  refused; `header`, `labels` and `section` make checksums right; `coder` and `parts` are decoders alone; `zarr` and
  `shard` read through zarr, in both formats.
- metadata: one JSON value of an archive is another one, or is left out.
- index: an array or an attribute of a label index is another one.
- model: model files with tensors of other shapes, dtypes and values, and identities that fit.
- expression: texts of queries.
- names: names of files in a folder that is ingested.

Cases count where they get past checksums and identities; those that do not are run, too. A case is made from the
seed, its target and its number, so that `--resume FILE` goes on where the same command stopped, whatever stopped it.
All cases of the corpus are run first. A case that fails is stored in the corpus, and the run goes on; the exit status
is 1 if any failed.

A small untrained model decodes, so that a case takes a few milliseconds; it has the layers and the coder of the real
ones. Numba checks no index unless told to: set NUMBA_BOUNDSCHECK=1 and a NUMBA_CACHE_DIR for kernels with checks.
"""

import argparse
import asyncio
import json
import resource
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
import zarr.core.sync
from google_crc32c import value as crc32c
from zarr.storage import MemoryStore

from benchmarks import strangers
from deepsic_codec import DeepSIC, config, consolidate_labels, create_array, open_labels, relabel
from deepsic_codec.axes import ceil_div
from deepsic_codec.codec.decode import compute_labels, decode_payloads, parse_payload
from deepsic_codec.errors import ConfigurationError, CorruptPayload, DeepSICError, UnsupportedArray
from deepsic_codec.labels.attributes import chunk_attrs
from deepsic_codec.model import file as model_file
from deepsic_codec.model import zoo
from deepsic_codec.model.exact.export import export_gains
from deepsic_codec.model.family import PRIOR, RDO
from deepsic_codec.model.paper import PaperArchitecture
from deepsic_codec.model.quantise import make_tables
from deepsic_codec.model.scheduler import load
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.payload import header as h
from deepsic_codec.payload.coders.contexts import MAX_LOW_BITS, SCALES, CoderTables
from deepsic_codec.payload.coders.mask import decode_mask, encode_mask
from deepsic_codec.payload.coders.residual import decode_integers, encode_integers
from deepsic_codec.payload.coders.subbands import decode_planes, encode_planes
from deepsic_codec.payload.coders.symbols import SymbolDecoder, SymbolEncoder
from deepsic_codec.payload.fields import PREFIX, Header
from deepsic_codec.payload.sections import LABELS, SECTIONS, STRUCTURE
from deepsic_codec.payload.steps import FRACTION_BITS, step_code
from deepsic_codec.payload.structure import GRIDS, Structure, decode_structure, encode_structure
from deepsic_codec.payload.varint import write_varint
from deepsic_codec.training.finish import head, transforms
from deepsic_codec.training.loss import Networks
from deepsic_codec.training.run import TINY, make_networks

MAX_PIXELS = 1 << 17  # of a crafted chunk: readers of untrusted data can set this limit, too
MEMORY = 2 << 30  # bytes beyond those at the start, after which the system refuses
SLOW = 60.0  # times a normal decode
SLOW_SECONDS = 0.25  # below which a ratio is noise
CORPUS = Path(__file__).with_name("corpus")
EVERY = 60.0  # seconds between lines of progress
MAX_FINDINGS = 20  # of a target, after which it stops
INTERESTING = (0, 1, 2, 3, 15, 16, 63, 64, 127, 128, 129, 254, 255)
WILD: tuple[Any, ...] = (0, -1, 2048, 1 << 20, 1 << 40, 1e308, "x", None, [], {}, True, [1 << 30] * 3, "\ud800")
WILD += ([2048, 2048], [64, 64], [1, 1], [0, 0])
TINY_PAPER = PaperArchitecture(1.0, (4, 2, 1, 1), filters=4, head_width=4, classes=4)
INTEGERS = (0, 1, 127, 128, 255, 256, *(1 << n for n in (14, 15, 16, 21, 28, 31)), (1 << 31) - 1, (1 << 32) - 1)


class Failure(AssertionError):
    """A case that fails."""


def tiny_model(folder: str | Path, seed: int = 0, name: str = "fuzz-tiny") -> model_file.ModelInfo:
    """Write a small untrained model whose prior gives a wide range of means and scales; return its description."""
    torch.manual_seed(seed)
    nets = make_networks(replace(TINY, head_embedding=4))
    nets.integer = nets.head.integer = True
    with torch.no_grad():
        for net in nets.prior.networks:  # type: ignore[union-attr]
            net.out_bias.table.normal_(0, 2)  # type: ignore[union-attr, operator]
            if net.has_inputs:  # type: ignore[union-attr]
                net.out.weight.normal_(0, 0.1)  # type: ignore[union-attr, operator]
        for transform in (nets.analysis, nets.synthesis):
            transform.out.weight.normal_(0, 0.05)
            transform.linear.weight.normal_(0, 0.05)
    return stored_model(nets, Path(folder) / f"{name}.safetensors")


def tiny_paper_model(folder: str | Path) -> model_file.ModelInfo:
    """Write a small untrained model of the family of the paper; return its description."""
    torch.manual_seed(0)
    nets = make_networks(TINY_PAPER).eval()
    torch.nn.init.constant_(nets.analysis.norms[-1].weight, 0.8)  # type: ignore[union-attr, index, arg-type]
    return stored_model(nets, Path(folder) / "fuzz-paper.safetensors")


def stored_model(nets: Networks, path: Path) -> model_file.ModelInfo:
    """Write a model file of untrained networks."""
    arch, exported = nets.arch, nets.export_prior()
    scales = nets.integer_prior(exported, "cpu").log_scales
    arrays = {f"{PRIOR}.{k}": v.numpy() for k, v in exported.items()}
    tables = CoderTables.untrained(arch.latents, scales.double().numpy())
    arrays |= {f"decoder.coder.{k}": v for k, v in tables.arrays().items()}
    if nets.stores_integers:
        choosing = make_tables(scales, export_gains(nets.gains)["step"])
        arrays |= {f"{RDO}.{name}": table.numpy() for name, table in choosing.items()}
    arrays |= transforms(nets) | head(nets)
    names = tuple(f"Class{i}" for i in range(arch.classes - 1))
    return model_file.save_model(path, path.stem, arrays, arch.to_json(), Vocabulary(names), {})


@dataclass
class Seed:
    """A sound payload and what it decodes to."""

    name: str
    codec: DeepSIC
    array: np.ndarray
    quality_map: Any = None
    payload: bytes = b""
    header: Any = None
    decoded: np.ndarray = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        self.payload = self.codec.encode(self.array, self.quality_map)
        self.header = h.read_header(self.payload)
        self.decoded = self.codec.decode(self.payload)


def make_seeds(model: str) -> list[Seed]:
    """Sound payloads of every kind that this version writes."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    y, x = np.mgrid[:90, :120]
    smooth = np.clip(128 + 90 * np.sin(y / 9)[..., None] * np.cos(x / 7)[..., None] * (1, 0.5, -1), 0, 255).astype("u1")
    wide = (smooth.astype("u2") * 100 + 3).astype("u2")
    holes = wide.copy()
    holes[10:40, 20:70] = 0
    bands = np.repeat(wide[..., :1], 7, axis=-1)
    mixed = np.rint(wide[:40, :48] @ rng.random((3, 6)) + rng.normal(0, 9, (40, 48, 6))).astype("u2")
    deep = rng.integers(0, 1 << 16, (96, 96, 2)).astype("u2")
    deep[..., 1] = deep[::2, ::2, 1].repeat(2, 0).repeat(2, 1)
    wavelet: dict[str, Any] = {"transform": "wavelet"}
    kinds: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        ("noise", noise, {"quality": 100}),
        ("smooth", smooth, {}),
        ("grey", smooth[:33, :17, 0], {"axes": "yx", "quality": 1}),
        ("pixel", noise[:1, :1], {}),
        ("slices", np.stack([smooth[:40, :50]] * 2), {"axes": "tyxc", "semantics": "post"}),
        ("fortran", np.asfortranarray(smooth[:48, :64]), {"semantics": "none", "quality": 80}),
        ("wide", wide[:40, :48], {"quality": 70}),
        ("bands", bands[:40, :48], {"quality": 70}),
        ("float", wide[:40, :48, 0].astype("f4") / 7, {"axes": "yx", "value_range": "chunk"}),
        ("holes", holes[:48, :72], {"nodata": 0}),
        ("bounded", smooth[:40, :48], {"max_error": 2, "quality": 30}),
        ("lossless", holes[:48, :40], {"max_error": 0, "nodata": 0}),
        ("grids", np.dstack([wide[:40, :48, 0], wide[:20, :24, 1].repeat(2, 0).repeat(2, 1)]), {"max_error": 1}),
        ("grids of wavelets", deep, wavelet | {"quality": 190}),
        ("cast", holes[:48, :40].astype("i8") * 100, {"max_error": 2, "nodata": 0}),
        ("levels", np.arange(256, dtype="u2")[smooth[:40, :48]] ** 2, {"max_error": 0}),
        ("embedding", smooth[:70, :90], {"embedding": True, "label_tile": 64}),
        ("wavelet", smooth[:40, :48], wavelet | {"quality": 120}),
        ("spectral", mixed, wavelet | {"quality": 150, "nodata": 0}),
        ("scaled", wide[:33, :17].astype("f4") / 7, wavelet | {"value_range": "chunk"}),
        ("checksums", rng.integers(0, 1 << 16, (96, 96)).astype("u2"), wavelet | {"axes": "yx", "quality": 190}),
    ]
    qualities = np.where(y[:70, :83] < 30, 0, 1 + 99 * (y + x)[:70, :83] / 160)
    kinds.append(("mapped", smooth[:70, :83], wavelet | {"quality_map": qualities}))
    seeds = []
    for name, array, options in kinds:
        values = options.pop("quality_map", None)
        try:
            seeds.append(Seed(name, DeepSIC(**{"model": model, "transform": "features", **options}), array, values))
        except (ConfigurationError, UnsupportedArray, TypeError) as error:
            print(f"seed {name} left out: {error}", flush=True)
    return seeds


def mutate(rng: np.random.Generator, data: bytes, others: Sequence[bytes] = (), max_changes: int = 8) -> bytes:
    """Change bytes in one to a few places."""
    out = bytearray(data)
    for _ in range(1 + int(rng.integers(max_changes) * rng.random())):
        kind, size = int(rng.integers(11)), len(out)
        at = int(rng.integers(size + 1))
        if kind < 3 and size:
            out[at % size] ^= 1 << int(rng.integers(8))
        elif kind == 3 and size:
            out[at % size] = INTERESTING[int(rng.integers(len(INTERESTING)))]
        elif kind == 4 and size:
            out[at % size] = int(rng.integers(256))
        elif kind == 5:
            out[at:at] = rng.bytes(int(rng.integers(1, 5)))
        elif kind == 6:
            del out[at : at + int(rng.integers(1, 9))]
        elif kind == 7:
            del out[at:]
        elif kind == 8:
            out[at : at + 4] = struct.pack("<I", INTEGERS[int(rng.integers(len(INTEGERS)))])
        elif kind == 9:
            length = int(rng.integers(1, 33))
            same = bytes((int(rng.integers(256)),)) * length
            out[at : at + length] = same if rng.random() < 0.5 else rng.bytes(length)
        elif others:
            other = others[int(rng.integers(len(others)))]
            start = int(rng.integers(len(other) + 1))
            out[at : at + int(rng.integers(64))] = other[start : start + int(rng.integers(64))]
    return bytes(out)


def mutate_grid(rng: np.random.Generator, data: bytes, header: Header) -> bytes:
    """Change a section of a grid, with right checksums."""
    grids = list(decode_structure(data, header).grids)
    number = int(rng.integers(len(grids)))
    sections = dict(grids[number].sections)
    kind = list(sections)[int(rng.integers(len(sections)))]
    sections[kind] = mutate(rng, sections[kind], list(sections.values()))
    grids[number] = replace(grids[number], sections=sections)
    try:
        return encode_structure(Structure(None, grids=tuple(grids)))
    except CorruptPayload:  # a wavelet without its start has no pieces
        return mutate(rng, data)


def with_header_checksum(payload: bytes) -> bytes:
    """Make the header's checksum right, if there is a header."""
    if len(payload) < PREFIX:
        return payload
    end = PREFIX + int.from_bytes(payload[6:8], "little")
    check = crc32c(payload[:8] + payload[PREFIX:end])
    return payload[:8] + struct.pack("<I", check) + payload[PREFIX:]


def with_body(payload: bytes, body: bytes, rest: bytes) -> bytes:
    """Put another header body into a payload."""
    return with_header_checksum(payload[:6] + struct.pack("<H", len(body) & 65535) + bytes(4) + body + rest)


def with_sections(payload: bytes, header: Any, sections: Sequence[tuple[int, bytes]]) -> bytes:
    """Put other sections into a payload, all checksums right."""
    table = 1 + sum(5 + len(write_varint(s.length)) for s in header.sections)
    body = payload[PREFIX : header.size - table] + bytes((len(sections) & 255,))
    for kind, data in sections:
        body += bytes((kind,)) + write_varint(len(data)) + struct.pack("<I", crc32c(data))
    return with_body(payload, body, b"".join(data for _, data in sections))


def sections_of(seed: Seed) -> list[tuple[int, bytes]]:
    """Kinds and bytes of the sections of a sound payload."""
    return [(s.kind, seed.payload[s.offset : s.offset + s.length]) for s in seed.header.sections]


class Stage:
    """A maker and runner of cases. The first byte of a case is the number of its seed.

    Attributes
    ----------
    share : float
        Of the cases of a target, in proportion to its other stages.
    checked : bool
        Whether cases have checksums that are not made right.
    """

    share = 1.0
    checked = False

    def __init__(self, seeds: list[Seed], folder: Path) -> None:
        self.seeds = seeds
        self.payloads = [seed.payload for seed in seeds]

    def sound(self) -> list[bytes]:
        """Cases without a fault, one for each seed."""
        return [bytes((i,)) + payload for i, payload in enumerate(self.payloads)]

    def make(self, rng: np.random.Generator) -> bytes:
        """Make a case."""
        number = int(rng.integers(len(self.seeds)))
        return bytes((number,)) + mutate(rng, self.payloads[number], self.payloads)

    def split(self, case: bytes) -> tuple[Seed, bytes]:
        """Return seed and bytes of a case."""
        return self.seeds[(case[0] if case else 0) % len(self.seeds)], case[1:]

    def run(self, case: bytes) -> str:
        """Run a case and return the outcome; raises a typed error, or Failure."""
        raise NotImplementedError


def decoded(job: Any) -> str:
    """Decode a verified payload and check what comes back."""
    (array,) = decode_payloads([job])
    dtype = (job.cast or job.header).dtype
    if array.shape != job.header.shape or array.dtype != dtype:
        raise Failure(f"{array.dtype} {array.shape} of a payload of {dtype} {job.header.shape}")
    return "decoded"


class Bytes(Stage):
    """Whole payloads as they are: whatever is not the original has to be refused."""

    share = 12
    checked = True

    def run(self, case: bytes) -> str:  # noqa: D102
        seed, payload = self.split(case)
        parse_payload(payload, shape=seed.header.shape)
        if payload not in self.payloads:
            raise Failure("a damaged payload passed all checks")
        return "sound"


class HeaderStage(Stage):
    """Header bodies with right checksums."""

    share = 22

    def make(self, rng: np.random.Generator) -> bytes:  # noqa: D102
        number = int(rng.integers(len(self.seeds)))
        seed = self.seeds[number]
        body = mutate(rng, seed.payload[PREFIX : seed.header.size], self.payloads, max_changes=4)
        payload = with_body(seed.payload, body, seed.payload[seed.header.size :])
        if rng.random() < 0.05:  # the prefix itself
            payload = with_header_checksum(mutate(rng, payload[:PREFIX], max_changes=2) + payload[PREFIX:])
        return bytes((number,)) + payload

    def run(self, case: bytes) -> str:  # noqa: D102
        _, payload = self.split(case)
        start = payload[:256]
        if h.header_size(start) > 256:
            raise Failure("a header of more than 256 bytes")
        h.read_section(payload, h.read_header(start), LABELS)
        job = parse_payload(payload)
        # other sizes and qualities, or another byte order, on the same stream: seldom, as it takes long
        return decoded(job) if payload in self.payloads or crc32c(case) % 8 == 0 else "verified"


class Labels(Stage):
    """Label blocks with right checksums."""

    share = 14

    def __init__(self, seeds: list[Seed], folder: Path) -> None:
        super().__init__([s for s in seeds if s.header.entry(LABELS.kind)], folder)
        self.blocks = [sections_of(seed)[0][1] for seed in self.seeds]

    def sound(self) -> list[bytes]:  # noqa: D102
        return [bytes((i,)) + block for i, block in enumerate(self.blocks)]

    def make(self, rng: np.random.Generator) -> bytes:  # noqa: D102
        number = int(rng.integers(len(self.seeds)))
        return bytes((number,)) + mutate(rng, self.blocks[number], self.blocks, max_changes=5)

    def run(self, case: bytes) -> str:  # noqa: D102
        seed, block = self.split(case)
        payload = with_sections(seed.payload, seed.header, [(LABELS.kind, block), *sections_of(seed)[1:]])
        unpacked = h.unpack(payload)
        header, labels = unpacked.header, unpacked.read(LABELS)
        if labels is None:
            raise Failure("the labels section is lost")
        rows, columns = ceil_div(header.height, labels.tile[0]), ceil_div(header.width, labels.tile[1])
        if labels.classes.shape[:3] != (header.slices, rows, columns) or labels.scores.shape != labels.classes.shape:
            raise Failure(f"labels {labels.classes.shape} of {header.shape}")
        labels.dense(255)
        return "decoded"


class Section(Stage):
    """Any one section with right checksums, decoded to the end."""

    share = 5

    def make(self, rng: np.random.Generator) -> bytes:  # noqa: D102
        number = int(rng.integers(len(self.seeds)))
        seed = self.seeds[number]
        sections = sections_of(seed)
        which = int(rng.integers(len(sections)))
        kind, data = sections[which]
        style = rng.random()
        if style < 0.1:
            data = rng.bytes(int(rng.integers(2 * len(data) + 8)))
        elif style < 0.2:
            data = bytes((int(rng.choice((0, 255, 85))),)) * int(rng.integers(2 * len(data) + 64))
        elif style < 0.23 and len(sections) > 1:
            del sections[which]
            which = -1
        elif kind == STRUCTURE.kind and data[:1] == bytes((GRIDS,)) and style < 0.8:
            data = mutate_grid(rng, data, seed.header)
        else:
            data = mutate(rng, data, [d for _, d in sections])
        if which >= 0:
            sections[which] = kind, data
        return bytes((number,)) + with_sections(seed.payload, seed.header, sections)

    def run(self, case: bytes) -> str:  # noqa: D102
        seed, payload = self.split(case)
        job = parse_payload(payload, shape=seed.header.shape)
        if case[-1] % 8 == 0:
            compute_labels(job)
        if case[-1] % 8 == 1:
            with suppress(DeepSICError):  # most have no checksum in their start
                seed.codec.decode_preview(payload[: -1 - len(payload) // 4], 2)
        return decoded(job)


class Coder(Stage):
    """The arithmetic decoder under random means, scales and tables, as no model would give them."""

    share = 17
    LATENTS, GRID = 5, (3, 4)

    def __init__(self, seeds: list[Seed], folder: Path) -> None:
        super().__init__(seeds, folder)
        logs = np.linspace(-3, 5, 64)
        base = CoderTables.untrained(self.LATENTS, logs)
        rng = np.random.default_rng(2)
        size, mixers = len(base.probabilities), base.weights.shape
        self.tables = [base]
        for single, low in ((0, 0), (SCALES, MAX_LOW_BITS), (28, 4)):
            self.tables.append(
                CoderTables(
                    probabilities=rng.choice(np.array([0, 1, 32768, 65535], np.uint16), size),
                    confidence=rng.integers(0, 1024, size).astype(np.uint16),
                    weights=rng.choice(np.array([-(1 << 31), -70000, 0, 70000, (1 << 31) - 1], np.int32), mixers),
                    low_bits=np.full(SCALES, low, np.uint8),
                    levels=base.levels,
                    limit=1023,
                    rate=64,
                    single=single,
                ).check(self.LATENTS)
            )

        ys, xs = (v.astype(np.int64) for v in np.nonzero(np.ones(self.GRID)))
        self.streams = []
        for number in range(16):
            tables = self.tables[number % 4]
            passes = []
            for start, count in ((0, 2), (2, 3)):
                means = rng.choice(np.array([-32767, -9, -4, 0, 3, 4, 80, 32767], np.int16), (2 * len(ys), count))
                indices = rng.integers(0, 253, (2 * len(ys), count)).astype(np.uint8)
                passes.append((ys, xs, start, bool(start), means, indices))
            spread = (2, 40, 3000, 1)[number // 4]
            symbols = rng.laplace(0, spread, (2, *self.GRID, self.LATENTS)).clip(-32767, 32767).astype(np.int16)
            encoder = SymbolEncoder(tables, symbols)
            for step in passes:
                encoder.encode_pass(*step)
            self.streams.append((tables, passes, encoder.finish()))

    def sound(self) -> list[bytes]:  # noqa: D102
        return [bytes((number,)) + stream for number, (_, _, stream) in enumerate(self.streams)]

    def make(self, rng: np.random.Generator) -> bytes:  # noqa: D102
        number, style = int(rng.integers(len(self.streams))), rng.random()
        data = self.streams[number][2]
        if style < 0.1:
            data = rng.bytes(int(rng.integers(600)))
        elif style < 0.2:
            data = bytes((int(rng.choice((0, 255, 128))),)) * int(rng.integers(900)) + data
        else:
            data = mutate(rng, data, max_changes=4)
        return bytes((number,)) + data

    def run(self, case: bytes) -> str:  # noqa: D102
        tables, passes, _ = self.streams[(case[0] if case else 0) % len(self.streams)]
        decoder = SymbolDecoder(tables, case[1:], 2, self.GRID, self.LATENTS)
        for step in passes:
            decoder.decode_pass(*step)
        if decoder.finish().shape != (2, *self.GRID, self.LATENTS):
            raise Failure("symbols of another shape")
        return "decoded"


class Parts(Stage):
    """Contents of sections and the coders of mask, residual and wavelet bands, by themselves."""

    share = 5
    SHAPES = ((1, 17, 23, 3), (2, 8, 9, 1), (1, 1, 1, 1), (1, 40, 40, 2))

    def __init__(self, seeds: list[Seed], folder: Path) -> None:
        super().__init__(seeds, folder)
        rng = np.random.default_rng(3)
        self.readers: list[tuple[bytes, Callable[[bytes], Any]]] = []
        for shape in self.SHAPES:
            mask = rng.random(shape[:3]) < 0.3
            mask[:, : shape[1] // 2] = True
            covered = np.broadcast_to(mask[..., None], shape)
            integers = np.rint(rng.laplace(0, 4, shape)).astype(np.int32)
            self.readers.append((encode_mask(mask), partial(decode_mask, shape=shape[:3])))
            coded, _ = encode_integers(integers, covered, 3)
            self.readers.append((coded, partial(decode_integers, shape=shape, mask=covered, step=3)))
            planes = np.moveaxis(integers, -1, 1)
            for step in (1 / 256, 1, 9, 1e6):
                coded, _, _ = encode_planes(np.array(planes << FRACTION_BITS, order="C"), step_code(step))
                decode = partial(decode_planes, shape=planes.shape, code=step_code(step))
                self.readers += [(coded, decode), (coded[: len(coded) * 2 // 3], partial(decode, whole=False))]
        for section in SECTIONS:
            payloads = [unpacked for seed in seeds if section in (unpacked := h.unpack(seed.payload))]
            if not payloads:
                raise Failure(f"no seed has a {section.name} section: add one")
            for payload in payloads:
                read = partial(section.decode, header=payload.header)
                self.readers.append((payload.sections[section.kind], read))

    def sound(self) -> list[bytes]:  # noqa: D102
        return [bytes((i,)) + data for i, (data, _) in enumerate(self.readers)]

    def make(self, rng: np.random.Generator) -> bytes:  # noqa: D102
        number = int(rng.integers(len(self.readers)))
        data = self.readers[number][0]
        return bytes((number,)) + (rng.bytes(int(rng.integers(300))) if rng.random() < 0.2 else mutate(rng, data))

    def run(self, case: bytes) -> str:  # noqa: D102
        self.readers[case[0] % len(self.readers)][1](case[1:])
        return "decoded"


class Zarr(Stage):
    """Chunks of arrays in both Zarr formats, with right checksums half of the time."""

    share = 1

    def __init__(self, seeds: list[Seed], folder: Path) -> None:
        super().__init__(seeds, folder)
        self.arrays = []
        for seed in seeds:
            for zarr_format in (2, 3):
                order = {"order": "F"} if zarr_format == 2 and seed.header.order == "F" else {}
                array = create_array(
                    {}, data=seed.array, chunks=seed.array.shape, codec=seed.codec, zarr_format=zarr_format, **order
                )
                self.arrays.append((array, array.metadata.encode_chunk_key((0,) * array.ndim)))

    def make(self, rng: np.random.Generator) -> bytes:  # noqa: D102
        number = int(rng.integers(len(self.seeds)))
        case = bytes((number,)) + mutate(rng, self.payloads[number], self.payloads)
        if rng.random() < 0.5:
            case = HeaderStage(self.seeds, Path()).make(rng)
        return case + bytes((int(rng.integers(2)),))

    def sound(self) -> list[bytes]:  # noqa: D102
        return [case + bytes((fmt,)) for case in super().sound() for fmt in (0, 1)]

    def run(self, case: bytes) -> str:  # noqa: D102
        number = (case[0] if case else 0) % len(self.seeds)
        array, key = self.arrays[2 * number + (case[-1] & 1 if len(case) > 1 else 0)]
        put(array, key, case[1:-1])
        with suppress(DeepSICError):
            chunk_attrs(array, (0,) * array.ndim)
        try:
            values = array[...]
        except DeepSICError:
            raise
        except ValueError as error:  # zarr's own, for a sound chunk of another shape or dtype in format 2
            if "reshape" in str(error) or "broadcast" in str(error) or "cannot" in str(error):
                return "zarr refused another shape"
            raise
        if values.shape != array.shape or values.dtype != array.dtype:
            raise Failure(f"read {values.dtype} {values.shape}")
        return "decoded"


def put(array: zarr.Array, key: str, data: bytes) -> None:
    """Set a key of an array's memory store."""
    store: Any = array.store
    store._store_dict[key] = zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(data)


class Shard(Stage):
    """Shards: their index with and without a right checksum, their payloads, read by zarr and by the label scan."""

    share = 1

    def __init__(self, seeds: list[Seed], folder: Path) -> None:
        super().__init__(seeds, folder)
        smooth = next(seed for seed in seeds if seed.name == "smooth")
        self.arrays = []
        for chunk, shard in (((32, 32, 3), (64, 64, 3)), ((16, 32, 3), (64, 64, 3))):
            array = create_array({}, data=smooth.array[:64, :64], chunks=chunk, shards=shard, codec=smooth.codec)
            key = array.metadata.encode_chunk_key((0, 0, 0))
            self.arrays.append((array, key, array.store._store_dict[key].to_bytes()))

    def sound(self) -> list[bytes]:  # noqa: D102
        return [bytes((i,)) + data for i, (_, _, data) in enumerate(self.arrays)]

    def make(self, rng: np.random.Generator) -> bytes:  # noqa: D102
        number = int(rng.integers(len(self.arrays)))
        array, _, data = self.arrays[number]
        size = 16 * int(np.prod([s // c for s, c in zip(array.shards, array.chunks, strict=True)])) + 4
        if rng.random() < 0.6:
            table = bytearray(data[-size:-4])
            for _ in range(1 + int(rng.integers(3))):
                at = 8 * int(rng.integers(len(table) // 8))
                table[at : at + 8] = struct.pack("<Q", int(rng.choice((0, 1, 100, 4096, 1 << 31, (1 << 63) - 1))))
            if rng.random() < 0.3:
                table = bytearray(mutate(rng, bytes(table))[: size - 4].ljust(size - 4, b"\0"))
            check = struct.pack("<I", crc32c(bytes(table))) if rng.random() < 0.8 else data[-4:]
            return bytes((number,)) + data[:-size] + bytes(table) + check
        return bytes((number,)) + mutate(rng, data)

    def run(self, case: bytes) -> str:  # noqa: D102
        array, key, _ = self.arrays[case[0] % len(self.arrays)]
        put(array, key, case[1:])
        errors = []
        for index in np.ndindex(*(s // c for s, c in zip(array.shards, array.chunks, strict=True))):
            try:
                chunk_attrs(array, index)
            except DeepSICError as error:
                errors.append(error)
        try:
            values = array[...]
        except DeepSICError:
            raise
        except (ValueError, KeyError, OverflowError, TypeError) as error:
            return f"zarr's own {type(error).__name__}"  # it reads shard indexes itself, and has no types for this
        if values.shape != array.shape:
            raise Failure(f"read {values.shape}")
        return "decoded" if not errors else "decoded, some label reads refused"


def forged(rng: np.random.Generator, info: model_file.ModelInfo, arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write a model file like another one with tensors of other shapes, dtypes or values, whose identities fit."""
    arrays, architecture = dict(arrays), dict(info.architecture)
    for _ in range(1 + int(rng.integers(3) * rng.random())):
        name = str(rng.choice(sorted(arrays)))
        arrays |= {name: changed(rng, arrays[name])}
        style = rng.random()
        if style < 0.03:
            del arrays[name]
        elif style < 0.06:
            arrays[f"{name}.{rng.integers(3)}"] = arrays[name]
        elif style < 0.1:
            size = str(rng.choice(sorted(architecture)))
            architecture[size] = WILD[int(rng.integers(len(WILD)))]
    model_file.save_model(path, "forged", arrays, architecture, info.vocabulary, {})


def changed(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Change the shape, the dtype or, most often, values of a tensor."""
    style, integer = rng.random(), array.dtype.kind in "iu"
    if style < 0.15 and array.ndim:
        axis = int(rng.integers(array.ndim))
        count = int(rng.choice([0, 1, array.shape[axis] - 1, array.shape[axis] + 1, 2 * array.shape[axis]]))
        return np.resize(array, [count if n == axis else size for n, size in enumerate(array.shape)])
    if style < 0.2:
        shapes = [(), (1, *array.shape), array.shape[1:], array.shape[::-1], (array.size,)]
        return np.resize(array, shapes[int(rng.integers(len(shapes)))])
    if style < 0.3:
        with np.errstate(all="ignore"):
            return array.astype(rng.choice(["i1", "u1", "i2", "u2", "i4", "u4", "i8", "f2", "f4"]))
    array = array.copy()
    limits = np.iinfo(array.dtype) if integer else np.finfo(array.dtype)
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    values = [0, 1, low, high, limits.min, limits.max] + ([] if integer else [np.nan, np.inf, -np.inf, -1])
    value = values[int(rng.integers(len(values)))]
    if style < 0.5 or not array.size or not array.ndim:
        array[...] = value
    elif style < 0.8:
        array.reshape(-1)[rng.integers(array.size, size=1 + int(rng.integers(4)))] = value
    elif style < 0.9 and integer:  # within the range that the tensor has
        array[...] = rng.integers(int(low), int(high), array.shape, endpoint=True)
    else:
        array[...] = rng.permutation(array.reshape(-1)).reshape(array.shape)
    return array


def use_model(info: model_file.ModelInfo, stream: bytes) -> str:
    """Load a model, encode, decode, and score labels; raises a typed error, or Failure."""
    image = np.random.default_rng(0).integers(0, 256, (1, 17, 50, 3), dtype=np.uint8)
    shape = image.shape[:3]
    scheduler = load(info, "cpu")
    (encoded,) = scheduler.encode([image], [42.5])
    settings = [shape], [encoded.quantiser]
    for features in (encoded.features or b"", stream):
        try:
            (symbols,) = scheduler.decode_symbols([features], *settings)
        except CorruptPayload:
            if features is encoded.features:
                raise Failure("a model cannot decode what it encoded") from None
            continue
        first, *again = (
            scheduler.decode([features], *settings, [True])[0] for _ in range(1 if features is stream else 2)
        )
        (scores,) = scheduler.score([symbols], *settings)
        if first.shape != image.shape or first.min() < 0 or first.max() > 255 * 64:
            raise Failure(f"pixels {first.dtype} {first.shape}, {first.min()} to {first.max()}")
        if not all(np.array_equal(first, other) for other in again):
            raise Failure("other pixels, decoded again")
        if scores.shape[-1] != info.outputs:
            raise Failure(f"scores {scores.shape} of a head of {info.outputs} outputs")
    return "used"


class Model(Stage):
    """Model files: descriptions, tensor tables and tensors; those that are accepted encode, decode and label."""

    share = 1
    FAMILIES = (0.75, 0.25)  # torch decodes with the second family, and takes most of its time to make the networks

    def __init__(self, seeds: list[Seed], folder: Path) -> None:
        super().__init__(seeds, folder)
        models = folder / "models"
        models.mkdir(exist_ok=True)
        self.models = [tiny_model(models, name="fuzz-integers"), tiny_paper_model(models)]
        self.arrays = [model_file.load_arrays(info) for info in self.models]
        self.stream = np.random.default_rng(0).bytes(40)
        self.data = Path(zoo.find_model(seeds[0].codec.model).path).read_bytes()
        self.path = folder / "case.safetensors.fuzz"
        self.start = 8 + int.from_bytes(self.data[:8], "little")
        self.table = json.loads(self.data[8 : self.start])

    def sound(self) -> list[bytes]:  # noqa: D102
        return [b"\0" + Path(info.path).read_bytes() for info in self.models]

    def make(self, rng: np.random.Generator) -> bytes:  # noqa: D102
        if rng.random() < 0.9:
            self.path.write_bytes(b"")  # what a writer refuses is no file
            number = int(rng.choice(len(self.models), p=self.FAMILIES))
            with suppress(DeepSICError):
                forged(rng, self.models[number], self.arrays[number], self.path)
            return b"\0" + self.path.read_bytes()
        style = rng.random()
        if style < 0.3:
            return b"\0" + mutate(rng, self.data[: self.start], max_changes=4) + self.data[self.start :]
        if style < 0.4:
            return b"\0" + mutate(rng, self.data)
        table = json.loads(json.dumps(self.table))
        about = json.loads(table["__metadata__"]["deepsic"])
        wild = WILD[int(rng.integers(len(WILD)))]
        name = str(rng.choice(sorted(about["architecture"])))
        if style < 0.6:
            about["architecture"][name] = wild
        elif style < 0.7:
            about[str(rng.choice(sorted(about)))] = wild
        else:
            tensor = str(rng.choice(sorted(k for k in table if k != "__metadata__")))
            part = str(rng.choice(["dtype", "shape", "data_offsets"]))
            choices = [wild, "F64", "BOOL", [0, 1 << 50], [1 << 31, 1 << 31], [5, 3], [1] * 70, [0, 1 << 63]]
            table[tensor][part] = choices[int(rng.integers(len(choices)))]
        if style < 0.8:  # as a forger would: identities that fit what is said
            try:
                arrays = model_file.load_arrays(zoo.find_model(self.seeds[0].codec.model))
                vocabulary = Vocabulary.from_json(about["vocabulary"])
                about["decoder"], about["head"] = model_file.identities(arrays, about["architecture"], vocabulary)
            except Exception:  # what cannot be hashed stays a plain fault
                pass
        table["__metadata__"]["deepsic"] = json.dumps(about)
        text = json.dumps(table).encode()
        return b"\0" + len(text).to_bytes(8, "little") + text + self.data[self.start :]

    def run(self, case: bytes) -> str:  # noqa: D102
        self.path.write_bytes(case[1:])
        return use_model(model_file.read_info(self.path), self.stream)


class Text(Stage):
    """Cases that are JSON."""

    def make(self, rng: np.random.Generator) -> bytes:  # noqa: D102
        return json.dumps(self.choose(rng)).encode()

    def sound(self) -> list[bytes]:  # noqa: D102
        return [json.dumps(value).encode() for value in self.sound_values()]

    def run(self, case: bytes) -> str:  # noqa: D102
        return self.run_value(json.loads(case))

    def choose(self, rng: np.random.Generator) -> Any:
        """Make a case."""
        raise NotImplementedError

    def sound_values(self) -> list[Any]:
        """Cases without a fault."""
        raise NotImplementedError

    def run_value(self, value: Any) -> str:
        """Run a case and return the outcome; raises a typed error, or Failure."""
        raise NotImplementedError


def archives(codec: DeepSIC) -> dict[str, MemoryStore]:
    """Return small archives with a label index: both formats, one tile and several in a chunk, labels of features."""
    image = np.random.default_rng(5).integers(0, 256, (130, 64, 3), dtype=np.uint8)
    kinds = {"v3": (3, 64, "pre"), "v2": (2, 128, "pre"), "features": (3, 128, "post")}
    stores = {}
    for name, (zarr_format, rows, semantics) in kinds.items():
        store = stores[name] = MemoryStore()
        zarr.open_group(store, zarr_format=zarr_format)
        codec_of_kind = DeepSIC(model=codec.model, transform="features", label_tile=(64, 64), semantics=semantics)
        options: dict[str, Any] = {"chunks": (rows, 64, 3), "codec": codec_of_kind, "zarr_format": zarr_format}
        array = create_array(store, name="image", data=image, **options)
        (consolidate_labels if semantics == "pre" else relabel)(array)
    return stores


class Metadata(Text):
    """Another value in one place of the metadata of an archive."""

    def __init__(self, seeds: list[Seed], folder: Path) -> None:
        super().__init__(seeds, folder)
        self.stores = archives(seeds[0].codec)

    def sound_values(self) -> list[Any]:  # noqa: D102
        return [
            {"archive": name, "operation": operation}
            for name, store in self.stores.items()
            for operation in strangers.operations(store)
        ]

    def choose(self, rng: np.random.Generator) -> Any:  # noqa: D102
        name = str(rng.choice(list(self.stores)))
        operation = strangers.random_operation(rng, strangers.operations(self.stores[name]))
        keys = str(rng.choice(["image/", "", "_labels/"]))
        return {
            "archive": name,
            "operation": operation,
            **strangers.random_change(rng, self.stores[name], keys),
        }

    def run_value(self, value: Any) -> str:  # noqa: D102
        store = self.stores[value["archive"]]
        if "key" in value:
            store = strangers.changed(store, value)
        strangers.operations(store)[value["operation"]]()
        return "answered"


class Index(Metadata):
    """Another array, or another attribute, in a label index."""

    def sound_values(self) -> list[Any]:  # noqa: D102
        return [
            {"archive": name, "operation": operation}
            for name, store in self.stores.items()
            for operation in strangers.index_operations(store)
            if (name, operation) != ("features", "repair")  # there are no labels in the headers
        ]

    def choose(self, rng: np.random.Generator) -> Any:  # noqa: D102
        name = str(rng.choice(list(self.stores)))
        store = self.stores[name]
        operation = strangers.random_operation(rng, strangers.index_operations(store))
        case = {"archive": name, "operation": operation}
        if rng.random() < 0.6:
            return case | strangers.random_array(rng, store)
        return case | strangers.random_change(rng, store, "_labels/")

    def run_value(self, value: Any) -> str:  # noqa: D102
        store = MemoryStore(dict(self.stores[value["archive"]]._store_dict))
        if "key" in value:
            store = strangers.changed(store, value)
        elif "member" in value:
            store = strangers.with_array(store, value)
        return strangers.index_operations(store)[value["operation"]]()


class Expression(Text):
    """Texts of queries."""

    def __init__(self, seeds: list[Seed], folder: Path) -> None:
        super().__init__(seeds, folder)
        self.labels = open_labels(archives(seeds[0].codec)["v2"], "image")

    def sound_values(self) -> list[Any]:  # noqa: D102
        return ["Class0 > 0.5 & ~(unknown | 20% < 'Class1')", "unknown"]

    def choose(self, rng: np.random.Generator) -> Any:  # noqa: D102
        return strangers.random_expression(rng)

    def run_value(self, value: Any) -> str:  # noqa: D102
        return strangers.run_expression(value, self.labels)


class Names(Text):
    """Names of files."""

    def sound_values(self) -> list[Any]:  # noqa: D102
        return [[["a", "png"], ["b/c", "tif"]]]

    def choose(self, rng: np.random.Generator) -> Any:  # noqa: D102
        return strangers.random_names(rng)

    def run_value(self, value: Any) -> str:  # noqa: D102
        return strangers.run_names([(name, suffix) for name, suffix in value])


STAGES: dict[str, type[Stage]] = {
    "bytes": Bytes,
    "header": HeaderStage,
    "labels": Labels,
    "section": Section,
    "coder": Coder,
    "parts": Parts,
    "zarr": Zarr,
    "shard": Shard,
    "metadata": Metadata,
    "index": Index,
    "model": Model,
    "expression": Expression,
    "names": Names,
}
TARGETS: dict[str, tuple[str, ...]] = {
    "payload": ("bytes", "header", "labels", "section", "coder", "parts", "zarr", "shard"),
    "metadata": ("metadata",),
    "index": ("index",),
    "model": ("model",),
    "expression": ("expression",),
    "names": ("names",),
}


def refused_as_damaged(error: DeepSICError) -> bool:
    """Tell whether a checksum, or the identity of a model, ended a case."""
    return "checksum does not match" in str(error) or "has SHA-256" in str(error)


@dataclass
class Fuzzer:
    """Stages over one model, with counts of what happened.

    Attributes
    ----------
    outcomes : Counter of (str, str)
        Cases by stage and outcome: the kind and section of a typed error, or the kind of result.
    counted : int
        Cases that got past checksums and identities.
    slowest : (float, str, float)
        The largest time in multiples of a sound case of the stage, the stage, and its seconds.
    """

    stages: dict[str, Stage]
    folder: Path
    outcomes: Counter = field(default_factory=Counter)
    counted: int = 0
    slowest: tuple[float, str, float] = (0.0, "", 0.0)
    normal: dict[str, float] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, names: Sequence[str] = tuple(STAGES), model: str | None = None) -> "Fuzzer":
        """Write the small model, unless there is another, and sound inputs, and time those."""
        seeds = make_seeds(model or tiny_model(folder).name)
        fuzzer = cls({name: STAGES[name](seeds, folder) for name in names}, folder)
        for name, stage in fuzzer.stages.items():
            times = []
            for case in stage.sound():
                stage_time = []
                for _ in range(2):
                    seconds, outcome = fuzzer.timed(stage, case)
                    stage_time.append(seconds)
                if not isinstance(outcome, str):
                    raise Failure(f"{name}: a sound case is refused: {outcome}") from outcome
                times.append(min(stage_time))
            fuzzer.normal[name] = max(times)
        return fuzzer

    @staticmethod
    def timed(stage: Stage, case: bytes) -> tuple[float, str | DeepSICError]:
        """Run a case: seconds of processor time, and the outcome."""
        start = time.process_time()
        try:
            outcome: str | DeepSICError = stage.run(case)
        except DeepSICError as error:
            outcome = error
        return time.process_time() - start, outcome

    def step(self, name: str, case: bytes) -> None:
        """Run a case and count its outcome; raises if the case fails."""
        stage = self.stages[name]
        seconds, outcome = self.timed(stage, case)
        if isinstance(outcome, DeepSICError):
            text = f"{type(outcome).__name__}: {str(outcome).partition(':')[0]}"
            text = text if len(text) < 60 and not set(text) & set("/0123456789") else type(outcome).__name__
            self.counted += not stage.checked and not refused_as_damaged(outcome)
        else:
            text = outcome
            self.counted += not stage.checked
        self.outcomes[name, text] += 1
        ratio = seconds / self.normal[name]
        if ratio > self.slowest[0]:
            seconds = min([seconds, *(self.timed(stage, case)[0] for _ in range(3))])  # noise is not repeated
            ratio = seconds / self.normal[name]
            if ratio > self.slowest[0]:
                self.slowest = ratio, name, seconds
            if ratio > SLOW and seconds > SLOW_SECONDS:
                raise Failure(f"{seconds:.3f} s, {ratio:.0f} times a sound case of stage {name}")

    def pick(self, rng: np.random.Generator, names: Sequence[str]) -> str:
        """Choose one of some stages by the shares."""
        shares = np.array([self.stages[name].share for name in names])
        return names[int(rng.choice(len(shares), p=shares / shares.sum()))]

    def report(self) -> str:
        """Return the outcomes as text."""
        lines = []
        for name in self.stages:
            mine = sorted(((n, text) for (s, text), n in self.outcomes.items() if s == name), reverse=True)
            lines.append(f"{name}: {sum(n for n, _ in mine)} cases, a sound one takes {self.normal[name] * 1e3:.2f} ms")
            lines += [f"  {n:9d}  {text}" for n, text in mine]
        ratio, name, seconds = self.slowest
        lines.append(f"slowest: {ratio:.1f} times a sound case ({name}, {seconds * 1e3:.1f} ms)")
        return "\n".join(lines)


def peak() -> float:
    """Return the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def limit_memory(extra: int) -> None:
    """Let the system refuse memory beyond what is used now and `extra` bytes."""
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) for line in file if line.startswith("VmData")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + extra, resource.getrlimit(resource.RLIMIT_DATA)[1]))


class InThisThread(ThreadPoolExecutor):
    """An executor without threads."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # noqa: D102
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@contextmanager
def without_threads() -> Iterator[None]:
    """Run zarr's coroutines in this thread: to hand them to another one takes longer than what they do in memory."""
    original = zarr.core.sync.sync
    loop = asyncio.new_event_loop()
    loop.set_default_executor(InThisThread())
    main = threading.get_ident()

    def sync(coroutine: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != main or loop.is_running():
            return original(coroutine, *args, **kwargs)
        return loop.run_until_complete(coroutine)

    users = [module for module in list(sys.modules.values()) if getattr(module, "sync", None) is original]
    try:
        for module in users:
            module.sync = sync  # type: ignore[attr-defined]
        yield
    finally:
        for module in users:
            module.sync = original  # type: ignore[attr-defined]
        loop.close()


@dataclass
class Progress:
    """How far a run came, in a file from which the same command goes on.

    Attributes
    ----------
    targets : dict
        For each target: `next`, number of the next case; `counted`, cases past checksums and identities; `seconds`;
        `findings`, files of cases that failed, by where they failed.
    """

    path: Path | None
    about: dict[str, Any]
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | None, about: dict[str, Any]) -> "Progress":
        """Read the file, if there is one; raises SystemExit if it is of another run."""
        progress = cls(Path(path) if path else None, about)
        if progress.path is not None and progress.path.exists():
            stored = json.loads(progress.path.read_text())
            if stored["about"] != about:
                raise SystemExit(f"{path}: of a run with {stored['about']}, not {about}; use another file")
            progress.targets = stored["targets"]
        return progress

    def of(self, target: str) -> dict[str, Any]:
        """Return how far a target came."""
        return self.targets.setdefault(target, {"next": 0, "counted": 0, "seconds": 0.0, "findings": {}})

    def save(self) -> None:
        """Write the file."""
        if self.path is not None:
            partial_path = self.path.with_name(f"{self.path.name}.partial")
            partial_path.write_text(json.dumps({"about": self.about, "targets": self.targets}, indent=1))
            partial_path.replace(self.path)


def place_of(error: BaseException) -> str:
    """Return what kind of error it is and where it was raised, the same for all cases of one fault."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "deepsic_codec" in frame.filename] or frames
    text = str(error) if isinstance(error, AssertionError) else ""
    kind = "".join(c for c in text if not c.isdigit())[:60]
    return f"{type(error).__name__} in {Path(inside[-1].filename).name} {inside[-1].name} {kind}".rstrip()


@dataclass
class Run:
    """A run of some targets."""

    fuzzer: Fuzzer
    progress: Progress
    say: "Log"
    corpus: Path

    def one(self, target: str, stage: str, case: bytes, label: str) -> None:
        """Run a case; one that fails is kept, unless another has failed in the same place."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.fuzzer.step(stage, case)
        except Exception as error:
            findings, place = self.progress.of(target)["findings"], place_of(error)
            if place in findings:
                return
            self.corpus.mkdir(parents=True, exist_ok=True)
            path = self.corpus / f"{stage}-{sha256(case).hexdigest()[:10]}.case"
            path.write_bytes(case)
            findings[place] = path.name
            self.say(f"{''.join(traceback.format_exception(error))}\nfinding: {target}, {label}, kept as {path}")

    def stored(self, targets: Sequence[str]) -> int:
        """Run the cases of the corpus, and return how many there are."""
        stages = {stage: target for target in targets for stage in TARGETS[target]}
        cases = [(path.name.partition("-")[0], path) for path in sorted(self.corpus.glob("*.case"))]
        cases = [(stage, path) for stage, path in cases if stage in stages]
        for stage, path in cases:
            self.one(stages[stage], stage, path.read_bytes(), f"corpus {path.name}")
        return len(cases)

    def target(self, target: str, seed: int, count: int, every: float) -> None:
        """Run cases of a target until `count` got past checksums and identities."""
        state, number = self.progress.of(target), list(TARGETS).index(target)
        began = said = time.monotonic()
        start, first = began - state["seconds"], state["next"]
        before = self.fuzzer.counted - state["counted"]

        def note() -> None:
            state["seconds"] = time.monotonic() - start
            self.progress.save()
            rate = (state["next"] - first) / max(1e-9, time.monotonic() - began)
            done = f"{target}: {state['next']} cases, {state['counted']} past checksums"
            ratio, name, _ = self.fuzzer.slowest
            self.say(
                f"{done}, {len(state['findings'])} findings, {rate:.0f}/s, slowest {ratio:.1f}x in {name}, "
                f"peak {peak():.0f} MB"
            )

        while state["counted"] < count and len(state["findings"]) < MAX_FINDINGS:
            rng = np.random.default_rng([seed, number, state["next"]])
            stage = self.fuzzer.pick(rng, TARGETS[target])
            self.one(target, stage, self.fuzzer.stages[stage].make(rng), f"case {state['next']}")
            state["next"] += 1
            state["counted"] = self.fuzzer.counted - before
            if time.monotonic() - said > every:
                said = time.monotonic()
                note()
        note()


def run(args: argparse.Namespace, folder: Path) -> int:
    """Fuzz; returns the exit status."""
    say = Log(args.log)
    targets = args.target or [name for name in TARGETS if args.model is None or name == "payload"]
    names = [args.replay.name.partition("-")[0]] if args.replay else [s for t in targets for s in TARGETS[t]]
    with config.set(threads=1, batch_pixels=1 << 18, max_pixels=MAX_PIXELS), without_threads():
        fuzzer = Fuzzer.make(folder, names, args.model)
        if args.replay:
            seconds, outcome = fuzzer.timed(fuzzer.stages[names[0]], args.replay.read_bytes())
            say(f"{names[0]}: {outcome!r} in {seconds * 1e3:.2f} ms")
            return 0
        if sys.platform == "linux":
            limit_memory(MEMORY)
        work = Run(fuzzer, Progress.open(args.resume, {"seed": args.seed, "model": args.model}), say, args.corpus)
        say(f"{work.stored(targets)} cases of the corpus")
        for target in targets:
            work.target(target, args.seed, args.count, args.every)
    say(fuzzer.report())
    status = 0
    for target in targets:
        state = work.progress.of(target)
        say(
            f"{target}: {state['counted']} cases past checksums of {state['next']}, {len(state['findings'])} findings, "
            f"{state['seconds']:.0f} s"
        )
        for place, name in state["findings"].items():
            status = 1
            say(f"  {place}: {name}")
    return status


class Log:
    """Prints lines, and keeps them in a file."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def __call__(self, text: str) -> None:
        """Print a line."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        if self.path:
            with open(self.path, "a") as file:
                file.write(line + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("target", nargs="*", choices=[*TARGETS, []], help="what to feed (default: all targets)")
    add("--count", type=int, default=1000, help="cases past checksums and identities, a target (default: 1000)")
    add("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    add("--model", help="decodes the payloads, for instance base (default: a small untrained one); only for `payload`")
    add("--resume", metavar="FILE", help="keep the progress in this file, and go on from there")
    add("--corpus", type=Path, default=CORPUS, help="folder of cases that failed once (default: benchmarks/corpus)")
    add("--log", help="file to which everything that is printed is added")
    add("--every", type=float, default=EVERY, help="seconds between lines of progress (default: 60)")
    add("--replay", type=Path, metavar="FILE", help="run one case of a corpus, and show its error")
    args = parser.parse_args(argv)
    if args.model is not None and args.target not in ([], ["payload"]):
        parser.error("--model is for the target payload")
    with tempfile.TemporaryDirectory() as folder:
        config.set_defaults(model_path=folder)
        return run(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
