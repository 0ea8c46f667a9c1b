"""Imagery of every kind beside other codecs: rate and error at equal bytes, and size and speed within a bound.

    python -m benchmarks.imagery --scenes ../shared/data/scenes

Scenes are TIFF files of 8 or 16 bits with any number of bands.  DeepSIC stores them as an archive would, in chunks of
512 x 512; the others get each scene whole, which is in their favour, once as a colour image where there are three
bands and once band by band, and the better of the two counts.  JPEG XL takes values stretched to their range, as its
quality is about appearance.  The lossy comparison sets the bits of each chunk of DeepSIC (which takes a search, so that
its time for encoding is that of the search), and the others to the bytes that come out.  Errors are in units of the
data, over all samples that are data.  Every round trip is checked.  All codecs run on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numcodecs
import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, table
from deepsic_codec import DeepSIC, config
from deepsic_codec.io.compare import Chunked
from deepsic_codec.io.peers import Peer, match_bytes
from deepsic_codec.io.sources import open_sources

EDGE = 512  # of a chunk, pixels
BITS = (0.2, 0.5, 1.0)  # per sample
BOUNDS = (0, 1, 2, 4)
MATCH = 0.02  # relative deviation of the bytes from the target at which the search stops
Values = NDArray[Any]
Parts = list[Values]


@dataclass(frozen=True)
class Row:
    """A codec on a scene: bits per sample, errors in units of the data, seconds."""

    scene: str
    codec: str
    setting: str
    bits: float
    largest: float
    rms: float
    encode: float
    decode: float


@dataclass(frozen=True)
class Scene:
    """An image (height, width, bands) and how DeepSIC takes it."""

    name: str
    values: Values
    codec: dict[str, Any]

    @property
    def data(self) -> NDArray[np.bool_]:
        """Samples that are data."""
        value = self.codec.get("nodata")
        return np.ones(self.values.shape, bool) if value is None else self.values != value

    def row(self, codec: str, setting: str, nbytes: int, decoded: Values, encode: float, decode: float) -> Row:
        """Measure a round trip."""
        assert decoded.shape == self.values.shape
        error = np.abs(decoded.astype(np.float64) - self.values)[self.data]
        rms = float(np.sqrt(np.square(error).mean()))
        bits = 8 * nbytes / self.values.size
        return Row(self.name, codec, setting, bits, float(error.max()), rms, encode, decode)


def read_scenes(folder: Path, names: Sequence[str] | None, crop: int) -> list[Scene]:
    """Read TIFF scenes; a scene with a share of zeros in all bands takes 0 for NoData."""
    scenes = []
    for path in sorted(folder.glob("*.tif")):
        if names and not any(name in path.name for name in names):
            continue
        (source,) = open_sources([path])
        values = np.asarray(source.values.compute())
        values = values[..., None] if values.ndim == 2 else values
        if source.axes.index("y"):
            values = np.moveaxis(values, source.axes.index("c"), -1)
        values = np.ascontiguousarray(values[:crop, :crop])
        codec: dict[str, Any] = {"axes": "yxc", "semantics": "none"}
        if values.dtype != np.uint8:
            codec["value_range"] = "chunk"
        if (values == 0).all(axis=-1).mean() > 0.01 and values.dtype == np.uint8:
            codec["nodata"] = 0
        if _unlike(values):
            codec["bands"] = "planes"
        scenes.append(Scene(path.stem, values, codec))
    return scenes


def _unlike(values: Values) -> bool:
    """Whether three bands show different things: their edges are not in the same places."""
    if values.shape[2] != 3:
        return False
    edges = np.diff(values.astype(np.float32), axis=1).reshape(-1, 3)
    return bool(np.corrcoef(edges.T)[np.triu_indices(3, 1)].mean() < 0.5)


def ours(scene: Scene, setting: str, **parameters: Any) -> Row:
    """Store a scene in chunks with DeepSIC."""
    codec = DeepSIC(**{**scene.codec, **parameters})
    height, width, _ = scene.values.shape
    places = [(slice(y, y + EDGE), slice(x, x + EDGE)) for y in range(0, height, EDGE) for x in range(0, width, EDGE)]
    began = time.perf_counter()
    payloads = codec.encode_batch([np.ascontiguousarray(scene.values[place]) for place in places])
    encoded = time.perf_counter()
    chunks = codec.decode_batch(payloads)
    done = time.perf_counter()
    decoded = np.empty_like(scene.values)
    for place, chunk in zip(places, chunks, strict=True):
        decoded[place] = chunk
    if "nodata" in scene.codec:
        np.testing.assert_array_equal(decoded[~scene.data], scene.values[~scene.data])
    nbytes = sum(map(len, payloads))
    return scene.row("DeepSIC", setting, nbytes, decoded, encoded - began, done - encoded)


def _parts(values: Values) -> list[Parts]:
    """Return the ways to hand bands to a codec for photographs: all alone, and three as colours."""
    alone = [np.ascontiguousarray(values[..., band]) for band in range(values.shape[2])]
    triples = [np.ascontiguousarray(values[..., k : k + 3]) for k in range(0, values.shape[2] - 2, 3)]
    colours = [*triples, *alone[3 * len(triples) :]]
    return [alone, colours] if triples else [alone]


def _join(parts: Sequence[Values]) -> Values:
    return np.concatenate([part if part.ndim == 3 else part[..., None] for part in parts], axis=2)


def _stretch(values: Values) -> tuple[Values, Callable[[Values], Values]]:
    """Stretch 16-bit values to their dtype's range; returns them and the way back."""
    low, high = int(values.min()), int(values.max())
    if values.dtype == np.uint8 or low == high:
        return values, lambda decoded: decoded
    top = int(np.iinfo(values.dtype).max)
    stretched = np.rint((values.astype(np.float64) - low) * top / (high - low)).astype(values.dtype)
    return stretched, lambda d: np.rint(low + d.astype(np.float64) * (high - low) / top).astype(values.dtype)


def _jpeg2000(x: Values, level: float) -> bytes:
    mct = x.ndim == 3
    return bytes(imagecodecs.jpeg2k_encode(x, level=level, codecformat="j2k", reversible=False, mct=mct, numthreads=1))


def _jpegxl(x: Values, distance: float) -> bytes:
    return bytes(imagecodecs.jpegxl_encode(x, distance=distance, effort=5, numthreads=1))


def _jpeg2000_decode(data: bytes) -> Values:
    return imagecodecs.jpeg2k_decode(data, numthreads=1)


def _jpegxl_decode(data: bytes) -> Values:
    return imagecodecs.jpegxl_decode(data, numthreads=1)


def _peer(
    name: str, limits: tuple[float, float], encode: Callable[[Values, float], bytes], decode: Callable[[bytes], Values]
) -> Peer:
    """Return a codec of single images as a codec of scenes in parts."""
    return Peer(
        name,
        (),
        limits,
        lambda parts, setting: Chunked([encode(part, setting) for part in parts], ()),
        lambda chunked: [decode(payload) for payload in chunked.payloads],
    )


JPEG_XL = "JPEG XL e5"
LOSSY = {
    "JPEG 2000": _peer("JPEG 2000", (10, 90), _jpeg2000, _jpeg2000_decode),
    JPEG_XL: _peer(JPEG_XL, (25, 0.02), _jpegxl, _jpegxl_decode),
}


def peer_at(scene: Scene, name: str, target: int) -> Row:
    """Measure a peer at about `target` bytes, with the smaller error of colours and single bands."""
    peer = LOSSY[name]
    values, back = _stretch(scene.values) if name == JPEG_XL else (scene.values, lambda decoded: decoded)
    rows = []
    for parts in _parts(values):
        setting, _ = match_bytes(peer, parts, target, MATCH)
        start = time.perf_counter()
        chunked = peer.encode(parts, setting)
        middle = time.perf_counter()
        decoded = back(_join(peer.decode(chunked)))
        seconds = middle - start, time.perf_counter() - middle
        rows.append(scene.row(name, f"{setting:.2f}", len(chunked), decoded, *seconds))
    return min(rows, key=lambda row: row.rms)


Decode = Callable[[bytes], Values]


def _lerc(bound: int) -> tuple[Callable[[Values], bytes], Decode]:
    return lambda x: bytes(imagecodecs.lerc_encode(x, level=bound, compression="zstd")), imagecodecs.lerc_decode


def bounded_peers(bound: int) -> dict[str, tuple[Callable[[Values], bytes], Decode]]:
    """Codecs that keep a bound on the error, each a way to encode a part and one to decode it."""
    peers: dict[str, tuple[Callable[[Values], bytes], Decode]] = {"LERC Zstd": _lerc(bound)}
    if imagecodecs.SPERR.available and bound:
        peers["SPERR"] = (
            lambda x: bytes(imagecodecs.sperr_encode(x.astype(np.float32), level=float(bound), mode="pwe")),
            lambda data: np.rint(imagecodecs.sperr_decode(data)),
        )
    if bound == 0:
        peers[JPEG_XL] = (
            lambda x: bytes(imagecodecs.jpegxl_encode(x, lossless=True, effort=5, numthreads=1)),
            _jpegxl_decode,
        )
        peers["JPEG 2000"] = (
            lambda x: bytes(imagecodecs.jpeg2k_encode(x, level=0, codecformat="j2k", reversible=True, numthreads=1)),
            _jpeg2000_decode,
        )
        blosc = numcodecs.Blosc("zstd", clevel=9, shuffle=numcodecs.Blosc.SHUFFLE)
        peers["Blosc Zstd 9"] = (lambda x: _with_shape(x, blosc.encode(x)), lambda data: _of_shape(data, blosc))
    return peers


def _with_shape(x: Values, data: bytes) -> bytes:
    return json.dumps([x.shape, x.dtype.str]).ljust(64).encode() + bytes(data)


def _of_shape(data: bytes, codec: Any) -> Values:
    shape, dtype = json.loads(data[:64])
    return np.frombuffer(codec.decode(data[64:]), dtype).reshape(shape)


def peer_within(scene: Scene, name: str, bound: int) -> Row:
    """Another codec within a bound, with the fewer bytes of colours and single bands."""
    encode, decode = bounded_peers(bound)[name]
    best: Row | None = None
    for parts in _parts(scene.values) if name != "SPERR" else _parts(scene.values)[:1]:
        began = time.perf_counter()
        coded = [encode(part) for part in parts]
        encoded = time.perf_counter()
        joined = _join([decode(data) for data in coded])
        done = time.perf_counter()
        decoded = np.clip(joined, *_limits(scene.values)).astype(scene.values.dtype)
        row = scene.row(name, f"<= {bound}", sum(map(len, coded)), decoded, encoded - began, done - encoded)
        assert row.largest <= bound, row
        best = row if best is None or row.bits < best.bits else best
    assert best is not None
    return best


def _limits(values: Values) -> tuple[int, int]:
    info = np.iinfo(values.dtype)
    return int(info.min), int(info.max)


def run(scenes: Sequence[Scene], rates: Sequence[float], bounds: Sequence[int]) -> list[Row]:
    """Measure everything."""
    rows: list[Row] = []
    for scene in scenes:
        ours(scene, "", quality=50.0)  # compiles and loads
        for bits in rates:
            rows.append(ours(scene, f"{bits:g} bits", bpp=bits * scene.values.shape[2]))
            target = round(rows[-1].bits * scene.values.size / 8)
            rows += [peer_at(scene, name, target) for name in LOSSY]
        for bound in bounds:
            rows.append(ours(scene, f"<= {bound}", max_error=bound))
            assert rows[-1].largest <= bound, rows[-1]
            rows += [peer_within(scene, name, bound) for name in bounded_peers(bound)]
    return rows


def report(scenes: Sequence[Scene], rows: Sequence[Row]) -> str:
    """Return the table of all rows, and what it says in a sentence."""
    size = {scene.name: scene.values.nbytes / 1e6 for scene in scenes}
    header = ["scene", "codec", "setting", "bits/sample", "max error", "RMS error", "encode MB/s", "decode MB/s"]
    cells: list[list[object]] = [
        [
            r.scene,
            r.codec,
            r.setting,
            f"{r.bits:.3f}",
            f"{r.largest:g}",
            r.rms,
            size[r.scene] / r.encode,
            size[r.scene] / r.decode,
        ]
        for r in rows
    ]
    lossy = [r for r in rows if not r.setting.startswith("<=")]
    wins = dict.fromkeys(LOSSY, 0)
    count = 0
    for k in range(0, len(lossy), 1 + len(LOSSY)):
        count += 1
        for peer in lossy[k + 1 : k + 1 + len(LOSSY)]:
            wins[peer.codec] += lossy[k].rms < peer.rms
    text = ", ".join(f"than {name} in {number} of {count}" for name, number in wins.items())
    lossless = [r for r in rows if r.setting == "<= 0"]
    names = dict.fromkeys(r.scene for r in lossless)
    best = {name: min((r for r in lossless if r.scene == name), key=lambda r: r.bits) for name in names}
    smallest = ", ".join(f"{name}: {row.codec}" for name, row in best.items())
    sentences = [f"at equal bytes the RMS error of DeepSIC is smaller {text} cases"] * bool(count)
    sentences += [f"the smallest lossless file is that of ({smallest})"] * bool(smallest)
    return f"{table(header, cells)}\n\nConclusion: {'; '.join(sentences)}."


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imagery", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scenes", type=Path, required=True, help="folder of TIFF files")
    parser.add_argument("--only", nargs="*", help="parts of the names of scenes")
    parser.add_argument("--crop", type=int, default=1 << 20, help="pixels of each edge")
    parser.add_argument("--bits", type=float, nargs="*", default=BITS, help="bits per sample of the lossy comparison")
    parser.add_argument("--bound", type=int, nargs="*", default=BOUNDS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    config.set_defaults(threads=1)
    scenes = read_scenes(args.scenes, args.only, args.crop)
    print(machine(1))
    for scene in scenes:
        print(f"{scene.name}: {scene.values.shape} {scene.values.dtype}, DeepSIC({scene.codec})")
    rows = run(scenes, args.bits, args.bound)
    print(report(scenes, rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
