"""Compare DeepSIC with other codecs on data: any dtype, all bands, errors in units of the data, NoData left out.

Codecs get the same chunks, as an archive would have them; of a large array, a few. With loss, every codec takes as many
bytes as DeepSIC; within a bound and without loss, bytes are compared.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log10, nan, prod
from typing import Any

import numpy as np

from deepsic_codec.archive import auto_edge, chunk_bands
from deepsic_codec.axes import Axes, grid_shape
from deepsic_codec.codec.params import DEFAULT_EFFORT, NAN
from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.io.compare import OURS
from deepsic_codec.io.images import ImageSource
from deepsic_codec.io.ingest import (
    RATES,
    chunk_edges,
    closer_bound,
    codec_parameters,
    sample_codec,
    sample_regions,
    with_one_nodata,
)
from deepsic_codec.io.peers import (
    BAND_PEERS,
    BOUNDS,
    LOSSLESS,
    LOSSY,
    BandPeer,
    Peer,
    Row,
    Samples,
    Scene,
    match_bytes,
    measure_peer,
    peer_groups,
    round_trip,
)
from deepsic_codec.progress import Progress, no_progress

DEFAULT = ("JPEG 2000", "JPEG XL e7", "quantised JPEG XL e7", "LERC Zstd", "bitshuffle Zstd")
QUALITIES = (50.0, 80.0, 110.0)
MAX_SAMPLES = 1 << 21  # of all chunks together: about a minute
MAX_CHUNKS, MIN_EDGE = 8, 128
DRAWN = 16  # chunks that are looked at for each that is used, since many may have no data
DISTANCES = (25, 0.01)  # of JPEG XL: limits of the search for equal bytes
RMS_FACTOR = 8  # between the RMS error of DeepSIC and the limits of that search, for other codecs
MATCH = 0.02  # relative difference of bytes that counts as equal
WARM_UP = 128  # pixels
NO_TARGET = dict.fromkeys((*RATES, "max_error"))
NEAR = 1.1  # files without loss that are larger by at most this factor are preferred to those with errors


@dataclass(frozen=True)
class Sample:
    """Chunks of a source, and the codec that `deepsic ingest` would store them with.

    Attributes
    ----------
    source : ImageSource
        The array.
    scenes : list of Scene
        Chunks that have data.
    codec : DeepSIC
        For chunks with axes y, x and c; its targets are to be replaced.
    chunks : int
        Number of chunks that the array has.
    """

    source: ImageSource
    scenes: list[Scene]
    codec: DeepSIC
    chunks: int

    @property
    def peak(self) -> float:
        """Of the PSNR: 255 for 8 bits, otherwise the range of the samples that are data."""
        if self.scenes[0].values.dtype == np.uint8:
            return 255.0
        ends = [(data.min(), data.max()) for scene in self.scenes for data in [scene.values[scene.valid]]]
        return float(max(high for _, high in ends)) - float(min(low for low, _ in ends)) or 1.0

    @property
    def noise(self) -> float:
        """The standard deviation of white noise with as much of the finest detail, the median over chunks."""
        return float(np.median([_noise(scene) for scene in self.scenes]))


@dataclass(frozen=True)
class Level:
    """What codecs are compared at: a mode, its target, and the parameters of DeepSIC that ask for it."""

    mode: str
    target: float
    parameters: Mapping[str, Any]

    @property
    def codec(self) -> str:
        """The call that makes the codec."""
        return f"DeepSIC({', '.join(f'{key}={value:g}' for key, value in self.parameters.items())})"


@dataclass(frozen=True)
class Outcome:
    """Chunks stored with a codec.

    Attributes
    ----------
    codec, bands : str
        Names; how the codec was handed the bands.
    setting : float
        Quality, distance, RMS error or bound.
    nbytes : int
        Bytes of all chunks, with those of a mask if the codec knows no NoData.
    ratio, bits : float
        Ratio to the raw samples, and bits per sample.
    rmse, largest : float
        Root mean square error and largest error in units of the data.
    psnr : float
        In dB, with the peak of the sample.
    encode_seconds, decode_seconds : float
        Of one call for each chunk.
    closer_bound : float or None
        `max_error` with which DeepSIC made smaller errors in fewer bytes of the first chunk.
    """

    codec: str
    bands: str
    setting: float
    nbytes: int
    ratio: float
    bits: float
    rmse: float
    largest: float
    psnr: float
    encode_seconds: float
    decode_seconds: float
    closer_bound: float | None = None

    @classmethod
    def total(cls, rows: Sequence[Row], sample: Sample, setting: float) -> "Outcome":
        """Add up the rows of all chunks."""
        scenes = sample.scenes
        sizes = np.array([scene.values.size for scene in scenes])
        raw = np.array([scene.values.nbytes for scene in scenes])
        counts = [scene.valid.sum() for scene in scenes]
        rmse = float(np.sqrt(np.average([row.rms**2 for row in rows], weights=counts)))
        nbytes = round(sum(row.bits * size for row, size in zip(rows, sizes, strict=True)) / 8)
        seconds = [float((raw / 1e6 / [getattr(row, name) for row in rows]).sum()) for name in ("encode", "decode")]
        return cls(
            rows[0].codec,
            rows[0].group,
            setting,
            nbytes,
            float(raw.sum() / nbytes),
            float(8 * nbytes / sizes.sum()),
            rmse,
            max(row.largest for row in rows),
            20 * log10(sample.peak / rmse) if rmse else inf,
            *seconds,
        )


def take_sample(source: ImageSource, *, codec: Mapping[str, Any] | None = None, chunk: int | None = None) -> Sample:
    """Read chunks of a source: all of a small array, otherwise at least two, spread over the array.

    Raises
    ------
    UnsupportedArray
        If they have no data.
    """
    import dask

    parameters = codec_parameters(source, codec)
    source = with_one_nodata(source, parameters["nodata"])
    axes, shape = Axes(source.axes), source.values.shape
    bands = chunk_bands(axes.bands(shape))
    edge = chunk or auto_edge(bands)
    is_small = source.values.size <= MAX_SAMPLES
    while chunk is None and not is_small and edge > MIN_EDGE and 2 * edge**2 * bands > MAX_SAMPLES:
        edge //= 2
    chunks = chunk_edges(source.axes, shape, edge)
    total = prod(grid_shape(shape, chunks))
    count = total if is_small else min(max(2, MAX_SAMPLES // (edge**2 * bands)), MAX_CHUNKS)
    regions = sample_regions(source, edge, DRAWN * count)
    nodata = NAN if parameters["nodata"] is None and source.values.dtype.kind == "f" else parameters["nodata"]
    parts: list[Samples] = []
    scenes: list[Scene] = []
    for region in [region for first in range(DRAWN) for region in regions[first::DRAWN]]:
        if len(scenes) == count:
            break
        (part,) = dask.compute(source.values[region])
        part = part.view(np.uint8) if part.dtype == bool else part  # which other codecs do not take
        scene = Scene(source.name, np.ascontiguousarray(axes.to_samples(part)[0]), nodata)
        if scene.valid.any():
            parts.append(part)
            scenes.append(scene)
    if not scenes:
        raise UnsupportedArray(f"{source.name}: none of {len(regions)} chunks that were read has data to compare")
    encoder = sample_codec(source, parameters, chunks, parts).changed(axes="yxc")
    return Sample(source, scenes, encoder, total)


def _noise(scene: Scene) -> float:
    """Return a robust estimate from differences between diagonal neighbours, over all bands."""
    values = np.where(scene.valid, scene.values, np.nan).astype(np.float64)
    columns = np.diff(np.diff(values, axis=0), axis=1)
    known = np.abs(columns[np.isfinite(columns)])
    return float(np.median(known)) / 0.6745 / 2 if known.size else 0.0


def default_bound(sample: Sample) -> float:
    """Return a bound on the error below the noise: half of it, with one digit, at least 1 for integers."""
    half = sample.noise / 2
    is_float = sample.scenes[0].is_float
    half = half or (sample.scenes[0].deviation / 256 if is_float else 1.0)
    digit = float(f"{half:.0e}")
    return digit if is_float else max(1.0, float(round(digit)))


def levels(
    sample: Sample,
    *,
    quality: Sequence[float] | None = None,
    bpp: Sequence[float] | None = None,
    rmse: Sequence[float] | None = None,
    max_error: Sequence[float] | None = None,
) -> list[Level]:
    """Return the levels to compare at: those asked for, and no loss; three qualities and a bound by default.

    Classes, and others that may not change, are compared without loss alone.
    """
    asked = [
        Level(LOSSY, float(value), {name: float(value)})
        for name, values in {"quality": quality, "bpp": bpp, "rmse": rmse}.items()
        for value in values or ()
    ]
    asked += [Level(BOUNDS, float(value), {"max_error": float(value)}) for value in max_error or () if value]
    lossless = [Level(LOSSLESS, 0.0, {"max_error": 0.0})]
    if sample.source.lossless or sample.source.values.dtype == bool:
        return lossless
    if not asked and not max_error:
        bound = default_bound(sample)
        asked = [Level(LOSSY, value, {"quality": value}) for value in QUALITIES]
        asked.append(Level(BOUNDS, bound, {"max_error": bound}))
    return asked + lossless


def compare_data(
    sample: Sample,
    levels: Sequence[Level],
    *,
    codecs: Sequence[str] = DEFAULT,
    failed: Callable[[str, str], None] = lambda codec, message: None,
    progress: Progress = no_progress,
) -> Iterator[tuple[Level, list[Outcome]]]:
    """Store chunks with DeepSIC and with each peer, in each way that it takes bands (with loss: that best at first).

    Parameters
    ----------
    sample : Sample
        The chunks.
    levels : sequence of Level
        What to compare at.
    codecs : sequence of str
        Names in `deepsic_codec.io.peers.BAND_PEERS`.
    failed : callable
        Called with the name of each codec that is not installed, or fails, and the reason.
    progress : callable
        Called with the number of measurements that are done and of all.

    Yields
    ------
    (Level, list of Outcome)
        DeepSIC first (unless samples are floats and there may be no loss), then peers, best first.
    """
    ways = [_ways(sample, level, codecs) for level in levels]
    total, done = sum(1 + len(pairs) for pairs in ways), 0
    missing: set[str] = set()
    chosen: dict[str, str] = {}  # the best way to take bands at the first level with loss: searches take long
    for level, pairs in zip(levels, ways, strict=True):
        ours = None
        if level.mode != LOSSLESS or not sample.scenes[0].is_float:
            ours = _deepsic(sample, level)
        done += 1
        progress(done, total)
        peers: list[Outcome] = []
        for peer, group in pairs:
            try:
                skipped = level.mode == LOSSY and (not ours or not ours.rmse or chosen.get(peer.name, group) != group)
                if peer.name not in missing and not skipped:
                    peers += _peer(sample, level, peer, group, ours)
            except ImportError as error:
                missing.add(peer.name)
                failed(peer.name, str(error))
            except (RuntimeError, ValueError) as error:  # those of imagecodecs are RuntimeErrors
                failed(f"{peer.name}, {group}, at {level.codec}", str(error))
            done += 1
            progress(done, total)
        key = (lambda one: (one.rmse, one.nbytes)) if level.mode == LOSSY else (lambda one: (one.nbytes, one.rmse))
        peers = sorted(peers, key=key)
        if level.mode == LOSSY:
            chosen = {one.codec: one.bands for one in reversed(peers)} | chosen
        yield level, ([ours] if ours else []) + peers


def _ways(sample: Sample, level: Level, codecs: Sequence[str]) -> list[tuple[BandPeer, str]]:
    scene = next((scene for scene in sample.scenes if not scene.valid.all()), sample.scenes[0])
    peers = [BAND_PEERS[name] for name in codecs]
    return [(peer, group) for peer in peers for group in peer_groups(scene, peer, level.mode)]


def _deepsic(sample: Sample, level: Level) -> Outcome:
    codec = sample.codec.changed(**NO_TARGET | dict(level.parameters))
    start = np.ascontiguousarray(sample.scenes[0].values[:WARM_UP, :WARM_UP])
    codec.decode(codec.encode(start))  # times do not include compiling and loading the model
    rows = []
    for scene in sample.scenes:
        encode, decode = (lambda x=scene.values: [codec.encode(x)]), (lambda payloads: codec.decode(payloads[0]))
        rows.append(scene.measure(OURS, "", level.mode, level.target, encode, decode))
    first = sample.scenes[0].values
    closer = closer_bound(codec, first, rows[0][1], round(rows[0][0].bits * first.size / 8))
    return replace(Outcome.total([row for row, _ in rows], sample, level.target), closer_bound=closer)


def _peer(sample: Sample, level: Level, peer: BandPeer, group: str, ours: Outcome | None) -> list[Outcome]:
    """Measure a peer; returns nothing if it did not keep the NoData value."""

    def targets(setting: float) -> list[float]:
        absolute = level.mode == LOSSY and not peer.distances
        return [setting / scene.deviation if absolute else setting for scene in sample.scenes]

    def encode(scenes: Sequence[Scene], setting: float) -> bytes:
        pairs = zip(scenes, targets(setting), strict=True)
        return b"".join(data for scene, target in pairs for data in round_trip(scene, peer, group, LOSSY, target)[0]())

    setting = level.target
    if level.mode == LOSSY and ours is not None:
        limits = DISTANCES if peer.distances else (ours.rmse * RMS_FACTOR, ours.rmse / RMS_FACTOR)
        setting, _ = match_bytes(Peer(peer.name, (), limits, encode, len), sample.scenes, ours.nbytes, MATCH)
    pairs = zip(sample.scenes, targets(setting), strict=True)
    rows = [measure_peer(scene, peer, group, level.mode, target) for scene, target in pairs]
    return [Outcome.total(rows, sample, setting)] if all(row.kept for row in rows) else []


@dataclass(frozen=True)
class Advice:
    """A setting, and what the best peer does at it.

    Attributes
    ----------
    level : Level
        The setting.
    ours : Outcome
        DeepSIC.
    peer : Outcome or None
        The best peer: the smallest, or with loss that with the smallest error in as many bytes.
    """

    level: Level
    ours: Outcome
    peer: Outcome | None

    @property
    def change(self) -> float:
        """How much larger than that of the peer error (with loss) or file are, in percent; NaN without a peer."""
        if self.peer is None:
            return nan
        name = "rmse" if self.level.mode == LOSSY else "nbytes"
        ours, peer = getattr(self.ours, name), getattr(self.peer, name)
        return 100 * (ours / peer - 1) if peer else inf

    @property
    def text(self) -> str:
        """The verdict in words."""
        if self.level.mode == LOSSY and not self.ours.rmse:
            return "no errors, so as without loss"
        if self.peer is None:
            return "no other codec was measured"
        number, worse, name = f"{abs(self.change):.1f} %", self.change > 0, f"{self.peer.codec}, the best of the others"
        if self.level.mode == LOSSY:
            return f"RMSE {number} {('smaller', 'larger')[worse]} than that of {name}, in as many bytes"
        return f"{number} {('fewer', 'more')[worse]} bytes than {name}"

    def code(self, sample: Sample) -> str:
        """Return the line of Python that stores the array with this setting."""
        parameters = {"axes": sample.source.axes, "nodata": sample.codec.nodata, **self.level.parameters}
        parameters |= {"effort": sample.codec.effort} if sample.codec.effort != DEFAULT_EFFORT else {}
        text = ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value!r}"
            for key, value in parameters.items()
            if value is not None
        )
        return f'create_array("archive.zarr", data=values, codec=DeepSIC({text}))'


def advise(results: Sequence[tuple[Level, Sequence[Outcome]]], asked: bool) -> list[Advice]:
    """Return an advice for each level that DeepSIC reaches, that to follow first.

    If the user asked for targets, that is the first one, of bounds if there are any. Otherwise it is storing without
    loss if that takes hardly more bytes than errors below the noise, and the bound if not.
    """
    advices = [
        Advice(level, row[0], row[1] if len(row) > 1 else None)
        for level, row in results
        if row and row[0].codec == OURS
    ]
    if asked or len(advices) < 2:
        return sorted(advices, key=lambda advice: advice.level.mode != BOUNDS)
    bound = next(advice for advice in advices if advice.level.mode == BOUNDS)
    lossless = [advice for advice in advices if advice.level.mode == LOSSLESS]
    first = next((one for one in lossless if one.ours.nbytes <= NEAR * bound.ours.nbytes), bound)
    return [first, *(advice for advice in advices if advice is not first)]
