"""Scientific imagery beside other codecs: error at equal bytes, lossless size, size within a bound on the error.

    python -m benchmarks.imagery --scenes DIR [DIR ...] --json rows.json --resume --plot curves.png
    python -m benchmarks.imagery --scenes DIR --names "landsat*" --only lossy --bits 0.5 2

Scenes are TIFF files, read with their dtype, bands and NoData value.

DeepSIC stores a scene as one chunk without labels, and takes `value_range=(min, max)` of the samples that are data if
they have 16 bits or are floats, which is what its documentation advises. `--chunked` adds a second comparison, with
chunks of 512 x 512 that have labels. Everything that is stored counts.

Lossy: DeepSIC encodes with `bpp=`, whose time is that of a search. Each peer encodes at a ladder of settings around
these bytes, 3 dB apart (JPEG XL: distances by factors of 1.5); where its error is near that of DeepSIC, also between
them, until two settings are within a tenth of the bytes. Its RMS error at the bytes of DeepSIC is interpolated between
the two nearest, in log bytes and log error; maximum error and speeds are those of the nearest. A
peer that needs more bytes at its lowest rate is left out; from the bytes of its lossless file on, it has no error.
Bands are handed to a peer in all ways that it takes (together, in threes as colours, alone), and the best counts.

"JPEG 2000 + KLT" codes the KLT of the bands, of the covariance of horizontal and vertical differences, as components of
one image with one scale and one slope of rate and distortion; its matrix counts. "JPEG 2000 5/3" is the reversible
wavelet, cut off.

`deepsic_codec.io.peers` says what peers get in place of NoData, and where samples are stretched; without loss or within
a bound the smaller way counts. Errors are in units of the data, over all samples that are data. Bounds are in units of
the data for integers, and in 256ths of the standard deviation for floats. Every round trip is checked. All codecs run
on one thread. MB are those of raw samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from benchmarks.common import machine, table
from benchmarks.metrics import Curve, bd_rate
from deepsic_codec import DeepSIC, config
from deepsic_codec.errors import DeepSICError
from deepsic_codec.io.images import TIFF
from deepsic_codec.io.ingest import declared_nodata
from deepsic_codec.io.peers import (
    BAND_PEERS,
    BOUNDS,
    LOSSLESS,
    LOSSY,
    MODES,
    BandPeer,
    Row,
    Scene,
    jpeg2000_components,
    measure_peer,
    peer_groups,
    to_dtype,
)
from deepsic_codec.io.sources import open_sources

Values = NDArray[Any]

BITS = (0.2, 0.5, 1.0, 2.0, 4.0)  # per sample
BOUND_SIZES = (1.0, 2.0, 4.0, 16.0)
FLOAT_BOUND = 1 / 256  # standard deviations: the bound 1 of floats
OURS, CHUNKED = "DeepSIC", "DeepSIC, chunks and labels"
EDGE = 512  # pixels: of a chunk
KLT = "JPEG 2000 + KLT"
KLT_BANDS = 6  # from this number on the summary has a column for it
KLT_BITS = 20  # of a component with its sign; OpenJPEG garbles large coefficients of 22 bits
MAX_KLT_SCALE = 64.0
JPEG2000 = ("JPEG 2000", "JPEG 2000 5/3")
DISTANCES = [25 / 1.5**k for k in range(20)]
MATCH = 0.02  # relative difference of bytes that counts as equal
# A peer whose error is at most this multiple of that of DeepSIC is measured at settings of these bytes and closer.
NEAR, APART, HALVINGS = 1.15, 1.1, 7
STRIDE = 4  # steps of a ladder at a time, below the bytes of DeepSIC


def read_scenes(locations: Sequence[Path], patterns: Sequence[str]) -> Iterator[Scene]:
    """Read TIFF files, and those of folders, whose names match one of the patterns (all if there is none)."""
    for location in locations:
        paths = [location] if location.is_file() else sorted(p for p in location.iterdir() if p.suffix.lower() in TIFF)
        for path in paths:
            if not patterns or any(fnmatch(path.stem, pattern) for pattern in patterns):
                yield read_scene(path)


def read_scene(path: Path) -> Scene:
    """Read a TIFF file; a band that the file calls transparency, as is often done to near infrared, is a band."""
    (source,) = open_sources([path], drop_alpha=True)
    values, axes = np.asarray(source.values), source.axes
    with tifffile.TiffFile(path) as file:
        if values.size < np.prod(file.series[0].shape):
            values, axes = file.series[0].asarray(), file.series[0].axes.lower()
    others = sorted(set(axes) - {"y", "x"})
    if len(others) > 1 or values.ndim != 2 + len(others):
        raise ValueError(f"{path}: axes {axes}; a scene has rows, columns and bands")
    values = np.moveaxis(values, axes.index(others[0]), -1) if others else values[..., None]
    nodata = declared_nodata(source)
    if nodata is None and values.dtype.kind == "f" and np.isnan(values).any():
        nodata = "NaN"
    scene = Scene(path.stem, np.ascontiguousarray(values), nodata)
    return replace(scene, unit=scene.deviation * FLOAT_BOUND) if scene.is_float else scene


def parameters(scene: Scene) -> dict[str, Any]:
    """Return the parameters of DeepSIC for a scene."""
    parameters: dict[str, Any] = {"axes": "yxc", "nodata": scene.nodata}
    data = scene.values[scene.valid]
    if scene.values.dtype.itemsize > 1 and data.min() < data.max():
        parameters["value_range"] = (data.min().item(), data.max().item())
    return parameters


def ours(scene: Scene, codec: str, mode: str, target: float) -> Row:
    """Store a scene with DeepSIC: as one chunk without labels, or in chunks with labels."""
    height, width, bands = scene.values.shape
    rate = {
        LOSSY: {"bpp": target * bands},
        LOSSLESS: {"max_error": 0},
        BOUNDS: {"max_error": scene.limit(BOUNDS, target)},
    }
    coder = DeepSIC(**parameters(scene), **rate[mode], semantics="none" if codec == OURS else "pre")
    edge = max(height, width) if codec == OURS else EDGE
    corners = [(y, x) for y in range(0, height, edge) for x in range(0, width, edge)]
    places = [(slice(y, y + edge), slice(x, x + edge)) for y, x in corners]

    def decode(payloads: Sequence[bytes]) -> Values:
        decoded = np.empty_like(scene.values)
        for place, chunk in zip(places, coder.decode_batch(payloads), strict=True):
            decoded[place] = chunk
        return decoded

    def encode() -> list[bytes]:
        return coder.encode_batch([np.ascontiguousarray(scene.values[place]) for place in places])

    row, decoded = scene.measure(codec, "", mode, target, encode, decode)
    if not np.array_equal(scene.equal_nodata(decoded), ~scene.valid):
        raise ValueError(f"{scene.name}: the NoData value is not where it was")
    return row


def klt(values: Values) -> NDArray[np.float32]:
    """Return the KLT of bands as the columns of a matrix, that of the largest variance first.

    The covariance is that of horizontal and vertical differences of float64 (height, width, bands), so edges decide.
    """
    bands = values.shape[2]
    differences = np.concatenate([np.diff(values, axis=axis).reshape(-1, bands) for axis in (0, 1)])
    return np.linalg.eigh(differences.T @ differences)[1][:, ::-1].astype(np.float32)


def measure_klt(scene: Scene, target: float) -> Row:
    """Measure JPEG 2000 of spectral components at an RMS error, a share of the standard deviation."""

    def encode() -> list[bytes]:
        values = scene.filled.astype(np.float64)
        matrix, means = klt(values), values.mean(axis=(0, 1)).astype(np.float32)
        components = (values - means) @ matrix
        scale = np.float32(min(MAX_KLT_SCALE, (2 ** (KLT_BITS - 1) - 1) / (np.abs(components).max() or 1)))
        integers = np.rint(components * scale).astype(np.int32)
        header = np.concatenate([[scale], means, matrix.ravel()]).astype(np.float32)
        return [header.tobytes(), jpeg2000_components(integers, target * scene.deviation * float(scale)), scene.mask]

    def decode(stored: Sequence[bytes]) -> Values:
        bands = scene.values.shape[2]
        header = np.frombuffer(stored[0], np.float32)
        matrix = header[1 + bands :].reshape(bands, bands)
        components = BAND_PEERS["JPEG 2000"].decode(stored[1], scene.values).astype(np.float64) / header[0]
        return to_dtype(components @ matrix.T.astype(np.float64) + header[1 : 1 + bands], scene.values.dtype)

    return scene.measure(KLT, "all", LOSSY, target, encode, decode)[0]


class Results:
    """Rows by what they measure, kept in a JSON file if there is one."""

    def __init__(self, path: Path | None, resume: bool) -> None:
        self.path = path
        self.failures: list[str] = []
        self._rows: dict[tuple[str, str, str, str, float], Row] = {}
        if path is not None and resume and path.exists():
            self._rows = {row.key: row for row in (Row(**values) for values in json.loads(path.read_text()))}

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return list(self._rows.values())

    def get(
        self, measure: Callable[[], Row], scene: str, codec: str, group: str, mode: str, target: float
    ) -> Row | None:
        """Return a row, measured if it is not there; None if the codec failed."""
        key = scene, codec, group, mode, target
        if key not in self._rows:
            try:
                self._rows[key] = measure()
            # Errors of imagecodecs are RuntimeErrors. A codec that does not keep its promise is left out, too.
            except (DeepSICError, RuntimeError, ValueError) as error:
                self.failures.append(f"{scene}, {codec} {group}, {mode} {target:g}: {error}")
                return None
        return self._rows[key]

    def save(self) -> None:
        """Write the file anew."""
        if self.path is not None:
            text = "[\n" + ",\n".join(json.dumps(asdict(row)) for row in self.rows) + "\n]\n"
            temporary = self.path.with_name(self.path.name + ".part")
            temporary.write_text(text)
            temporary.replace(self.path)


def run(scene: Scene, results: Results, codecs: Sequence[str], targets: dict[str, Sequence[float]]) -> None:
    """Measure a scene with DeepSIC (`codecs`), then with all peers; `targets` has those of each mode."""
    warm_up(scene)
    for codec in codecs:
        for mode, numbers in targets.items():
            for target in numbers:
                results.get(partial(ours, scene, codec, mode, target), scene.name, codec, "", mode, target)
                results.save()
    stored = [row for row in results.rows if row.scene == scene.name and row.codec in codecs and row.mode == LOSSY]
    for peer in BAND_PEERS.values():
        for mode, numbers in targets.items():
            if mode == LOSSY:
                for group in peer_groups(scene, peer, mode):
                    _ladder(results, scene, peer.name, group, stored)
            else:
                _bounded(results, scene, peer, mode, numbers)
        results.save()
    if LOSSY in targets and scene.values.shape[2] > 1:
        _ladder(results, scene, KLT, "all", stored)
        results.save()


def warm_up(scene: Scene) -> None:
    """Compile and load what DeepSIC needs, on a part of the scene; errors are left to the measurements."""
    part = np.ascontiguousarray(scene.values[:128, :128])
    for rate in ({"quality": 50}, {"max_error": scene.limit(BOUNDS, 1)}):
        with suppress(DeepSICError):
            codec = DeepSIC(**parameters(scene), **rate)
            codec.decode(codec.encode(part))


def _ladder(results: Results, scene: Scene, codec: str, group: str, stored: Sequence[Row]) -> None:
    """Measure a lossy peer from below the lowest rate of what DeepSIC stored to above the highest."""
    if not stored:
        return
    rates = [row.bits for row in stored]
    peer = BAND_PEERS.get(codec)
    floor = np.ptp(scene.filled.astype(np.float64)) / 2**19 if scene.is_float else 0.2  # units of the data
    settings = [2 ** (-k / 2) for k in range(60) if 2 ** (-k / 2) * scene.deviation > floor]
    settings = DISTANCES if peer is not None and peer.distances else settings

    def bits(setting: float) -> float:
        if peer is None:
            measure: Callable[[], Row] = partial(measure_klt, scene, setting)
        else:
            measure = partial(measure_peer, scene, peer, group, LOSSY, setting)
        row = results.get(measure, scene.name, codec, group, LOSSY, setting)
        return 0 if row is None else row.bits

    first = 0
    while first + STRIDE < len(settings) and bits(settings[first + STRIDE]) < min(rates):
        first += STRIDE
    reached = any(bits(setting) > max(rates) for setting in settings[first:])
    if not reached and peer is not None:
        _bounded(results, scene, peer, LOSSLESS, [0.0])
    for one in stored:
        for _ in range(HALVINGS):
            rows = [row for row in results.rows if (row.scene, row.codec, row.group) == (scene.name, codec, group)]
            points = _falling([row for row in rows if row.mode == LOSSY and row.rms > 0])
            above = [row for row in points if row.bits >= one.bits]
            below = [row for row in points if row.bits < one.bits]
            reached = at_bits(points, one.bits)
            if not (above and below and reached) or reached.rms > NEAR * one.rms:
                break
            if above[0].bits <= APART * below[-1].bits:
                break
            bits((below[-1].target * above[0].target) ** 0.5)


def _bounded(results: Results, scene: Scene, peer: BandPeer, mode: str, targets: Sequence[float]) -> None:
    """Measure a peer without loss or within bounds."""
    for group in peer_groups(scene, peer, mode):
        for target in targets:
            measure = partial(measure_peer, scene, peer, group, mode, target)
            results.get(measure, scene.name, peer.name, group, mode, target)


@dataclass(frozen=True)
class Comparison:
    """Codecs on a scene at a target: the row of DeepSIC, and that of each peer, best first."""

    scene: str
    mode: str
    target: float
    ours: Row
    peers: list[Row]

    @property
    def won(self) -> bool:
        """Whether DeepSIC has the smaller error at equal bytes, or as small an error as all peers in fewer bytes."""
        best = self.peers[0]
        if self.mode == LOSSY and (self.ours.rms > 0 or best.rms > 0):
            return self.ours.rms < best.rms
        return self.ours.bits < best.bits

    @property
    def ratio(self) -> float:
        """RMS error relative to the best peer's at equal bytes, or bytes relative to the best peer's."""
        best = self.peers[0]
        if self.mode == LOSSY:
            return self.ours.rms / best.rms if best.rms else float("inf") if self.ours.rms else 1.0
        return self.ours.bits / best.bits


def at_bits(rows: Sequence[Row], bits: float) -> Row | None:
    """Interpolate the rows of a codec, lossy and lossless, at bits per sample, with the best group of bands.

    None if it needs more bits at its lowest rate.
    """
    exact = [row for row in rows if row.rms == 0 and row.bits <= bits]
    if exact:
        return min(exact, key=lambda row: row.bits)
    best: Row | None = None
    for group in dict.fromkeys(row.group for row in rows if row.mode == LOSSY):
        points = _falling([row for row in rows if row.group == group and row.mode == LOSSY and row.rms > 0])
        if not points or bits < points[0].bits * (1 - MATCH):
            continue
        logs = np.log([(row.bits, row.rms) for row in points])
        rms = float(np.exp(np.interp(np.log(bits), logs[:, 0], logs[:, 1])))
        if best is None or rms < best.rms:
            nearest = points[int(np.abs(logs[:, 0] - np.log(bits)).argmin())]
            best = replace(nearest, rms=rms, bits=bits)
    return best


def _falling(rows: Sequence[Row]) -> list[Row]:
    """Sort by rate; leave out rows that take more bytes for no smaller error."""
    points: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.bits, row.rms)):
        if not points or (row.rms < points[-1].rms and row.bits > points[-1].bits):
            points.append(row)
    return points


def compare(rows: Sequence[Row], codec: str, mode: str, target: float) -> Comparison | None:
    """Compare DeepSIC (`codec`) with the peers; `rows` are those of one scene."""
    stored = [row for row in rows if row.codec == codec and row.mode == mode and row.target == target]
    peers: list[Row] = []
    for name in dict.fromkeys(row.codec for row in rows if not row.codec.startswith(OURS)):
        candidates = [row for row in rows if row.codec == name and row.kept]
        if mode == LOSSY and stored:
            row = at_bits([row for row in candidates if row.mode != BOUNDS], stored[0].bits)
            peers += [row] if row is not None else []
        else:
            candidates = [row for row in candidates if row.mode == mode and row.target == target]
            peers += [min(candidates, key=lambda row: row.bits)] if candidates else []
    if not stored or not peers:
        return None
    order = (lambda row: (row.rms, row.bits)) if mode == LOSSY else (lambda row: (row.bits, row.rms))
    return Comparison(stored[0].scene, mode, target, stored[0], sorted(peers, key=order))


def rate_curve(rows: Sequence[Row], codecs: Sequence[str]) -> Curve | None:
    """Return -20 log10 of the RMS error over rate, the best of some codecs; None without two points."""
    rows = [row for row in rows if row.codec in codecs and row.mode == LOSSY and row.rms > 0]
    if not rows:
        return None
    if codecs[0].startswith(OURS):
        points = [(row.bits, row.rms) for row in rows]
    else:
        grid = np.geomspace(min(row.bits for row in rows), max(row.bits for row in rows), 64)
        points = []
        for bits in grid:
            at = [at_bits([row for row in rows if row.codec == name], bits) for name in codecs]
            points.append((bits, min(row.rms for row in at if row is not None)))
    try:
        return Curve([bits for bits, _ in points], [-20 * np.log10(rms) for _, rms in points])
    except ValueError:
        return None


def bytes_saved(rows: Sequence[Row], codec: str, peers: Sequence[str]) -> float:
    """BD-rate over the RMS errors that both reach, in percent, negative where DeepSIC takes fewer bytes."""
    peers = [name for name in peers if any(row.codec == name and row.mode == LOSSY for row in rows)]
    test = rate_curve(rows, [codec])
    anchor = rate_curve(rows, peers) if peers else None
    return float("nan") if test is None or anchor is None else bd_rate(anchor, test, (0.0, np.inf))


def title(mode: str, target: float) -> str:
    """Name a target."""
    return {LOSSY: f"{target:g} bits", LOSSLESS: "lossless", BOUNDS: f"<= {target:g}"}[mode]


def describe(scene: Scene, comparisons: Sequence[Comparison]) -> str:
    """Return the table of a scene."""
    height, width, bands = scene.values.shape
    lines = [f"## {scene.name}", "", f"{height} x {width} x {bands} {scene.values.dtype}, DeepSIC({parameters(scene)})"]
    header = ["target", "codec", "bands", "bits/sample", "RMS error", "max error", "encode MB/s", "decode MB/s"]
    cells = [
        [
            title(one.mode, one.target),
            row.codec,
            row.group,
            f"{row.bits:.3f}",
            f"{row.rms:.4g}",
            f"{row.largest:.4g}",
            f"{row.encode:.3g}",
            f"{row.decode:.3g}",
        ]
        for one in comparisons
        for row in [one.ours, *one.peers]
    ]
    return "\n".join([*lines, "", table(header, cells)])


def summary(names: dict[str, int], rows: Sequence[Row], codec: str, targets: dict[str, Sequence[float]]) -> str:
    """Return the tables over all scenes (names and numbers of bands), for one of the ways to store with DeepSIC."""
    of_scene = {name: [row for row in rows if row.scene == name] for name in names}
    parts = [f"## Summary of {codec}"]
    for modes, caption in (
        ((LOSSY,), "RMS error relative to that of the best peer (named) at equal bytes"),
        ((LOSSLESS, BOUNDS), "Bytes relative to those of the best peer (named)"),
    ):
        columns = [(mode, target) for mode in modes for target in targets.get(mode, ())]
        table_rows = {name: [compare(of_scene[name], codec, *column) for column in columns] for name in names}
        if any(cell for cells in table_rows.values() for cell in cells):
            parts += [f"{caption}; below 1 DeepSIC is better:", _ratios(columns, table_rows)]
    if LOSSY in targets:
        parts += ["BD-rate over RMS in %, negative where DeepSIC takes fewer bytes:", _bd_rates(names, of_scene, codec)]
    return "\n\n".join(parts)


def _ratios(columns: Sequence[tuple[str, float]], cells: dict[str, list[Comparison | None]]) -> str:
    lines = [
        [name, *("-" if one is None else f"{one.ratio:.3f} ({one.peers[0].codec})" for one in row)]
        for name, row in cells.items()
    ]
    columnwise = [[one for one in column if one is not None] for column in zip(*cells.values(), strict=True)]
    means = []
    for column in columnwise:
        ratios = [one.ratio for one in column if 0 < one.ratio < np.inf]
        means.append(f"{np.exp(np.mean(np.log(ratios))):.3f}" if ratios else "-")
    lines.append(["geometric mean", *means])
    lines.append(["DeepSIC is best", *(f"{sum(one.won for one in column)} of {len(column)}" for column in columnwise)])
    return table(["scene", *(title(*column) for column in columns)], lines)


def _bd_rates(names: dict[str, int], of_scene: dict[str, list[Row]], codec: str) -> str:
    lossy = [name for name, peer in BAND_PEERS.items() if peer.lossy is not None] + [KLT]
    rivals = {"the best peer": lossy, "JPEG 2000": JPEG2000, KLT: [KLT], "JPEG XL e7": ["JPEG XL e7"]}
    lines: list[list[Any]] = []
    for name, bands in names.items():
        rates = {rival: bytes_saved(of_scene[name], codec, peers) for rival, peers in rivals.items()}
        if bands < KLT_BANDS:
            rates[KLT] = float("nan")
        lines.append([name, bands, *rates.values()])
    numbers = np.array([line[2:] for line in lines], float)
    means = [float(column[np.isfinite(column)].mean()) if np.isfinite(column).any() else np.nan for column in numbers.T]
    header = ["scene", "bands", *(f"against {rival}" for rival in rivals)]
    return table(header, [*lines, ["mean", "", *means]])


def plot(path: Path, names: Sequence[str], rows: Sequence[Row]) -> None:
    """Draw the RMS error over bits per sample, one panel for each scene."""
    from matplotlib.figure import Figure

    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    codecs = list(dict.fromkeys(row.codec for row in rows if row.mode == LOSSY))
    for number, name in enumerate(names):
        axis = figure.add_subplot(lines, columns, number + 1)
        for index, codec in enumerate(codecs):
            points = [row for row in rows if (row.scene, row.codec, row.mode) == (name, codec, LOSSY) and row.rms > 0]
            points = _falling(points)
            style: dict[str, Any] = {"color": "black", "lw": 2.2} if codec == OURS else {"color": f"C{index}", "lw": 1}
            axis.plot([row.bits for row in points], [row.rms for row in points], "o-", ms=2, label=codec, **style)
        axis.set(title=name, xscale="log", yscale="log", xlabel="bits per sample", ylabel="RMS error")
        axis.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns 1 if DeepSIC failed on a scene."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imagery", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--scenes", type=Path, nargs="+", required=True, metavar="DIR", help="folders of TIFF files, or files")
    add("--names", nargs="+", default=[], metavar="PATTERN", help="only scenes with such names, as in 'landsat*'")
    add("--only", choices=MODES, nargs="+", default=MODES, help="parts of the comparison")
    add("--bits", type=float, nargs="+", default=BITS, help="bits per sample of the lossy comparison")
    add("--bounds", type=float, nargs="+", default=BOUND_SIZES, help="bounds on the error")
    add("--chunked", action="store_true", help="also store with DeepSIC in chunks of 512 x 512 that have labels")
    add("--json", type=Path, metavar="FILE", help="keep all rows here")
    add("--resume", action="store_true", help="do not measure again what the JSON file has")
    add("--plot", type=Path, metavar="FILE", help="draw rate and error here")
    args = parser.parse_args(argv)
    with config.set(threads=1):
        return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Measure what the arguments of the command ask for."""
    numbers = {LOSSY: args.bits, LOSSLESS: [0.0], BOUNDS: args.bounds}
    targets = {mode: numbers[mode] for mode in MODES if mode in args.only}
    codecs = [OURS, CHUNKED] if args.chunked else [OURS]
    results = Results(args.json, args.resume)
    print(machine(1))
    names: dict[str, int] = {}
    for scene in read_scenes(args.scenes, args.names):
        started = time.perf_counter()
        possible = {mode: numbers for mode, numbers in targets.items() if mode != LOSSLESS or not scene.is_float}
        run(scene, results, codecs, possible)
        rows = [row for row in results.rows if row.scene == scene.name]
        columns = [(codec, mode, target) for codec in codecs for mode in possible for target in possible[mode]]
        comparisons = [compare(rows, *column) for column in columns]
        print(f"\n{describe(scene, [one for one in comparisons if one is not None])}", flush=True)
        won = sum(one.won for one in comparisons if one is not None)
        seconds = time.perf_counter() - started
        print(f"{scene.name}: best in {won} of {len(comparisons)}, {seconds:.0f} s", file=sys.stderr, flush=True)
        names[scene.name] = scene.values.shape[2]
    for codec in codecs:
        print(f"\n{summary(names, results.rows, codec, targets)}")
    if results.failures:
        print("\nLeft out:\n" + "\n".join(results.failures))
    if args.plot:
        plot(args.plot, list(names), results.rows)
    return int(any(f", {OURS}" in failure for failure in results.failures))


if __name__ == "__main__":
    raise SystemExit(main())
