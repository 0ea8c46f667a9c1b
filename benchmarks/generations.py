"""The cost of rewriting: a chunk is decoded and encoded ten times, and small parts of it are written.

    python -m benchmarks.generations
    python -m benchmarks.generations --images photo.tif --crop 512 --qualities 20 50 80 --errors 0 2

Zarr rewrites a whole chunk whenever a part of it is written: it decodes the chunk, puts the new samples in and encodes
it. Each row shows the error against the original and against the generation before. With `max_error` the error against
the generation before has to stay within the bound, which is checked.

"whole" writes back what was read; "part" writes 64 x 64 new samples and measures all the others.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec import DeepSIC, create_array
from deepsic_codec.errors import DeepSICError

GENERATIONS = 10
PATCH = 64  # edge of the part that is written


@dataclass(frozen=True)
class Generation:
    """A chunk after some rewrites.

    Attributes
    ----------
    number : int
        Times that it was encoded.
    psnr : float
        To the original, in dB of the dtype's range.
    worst : float
        Largest difference from the original.
    step : float
        Largest difference from the generation before.
    nbytes : int
        Bytes stored.
    """

    number: int
    psnr: float
    worst: float
    step: float
    nbytes: int


def psnr(one: NDArray[Any], other: NDArray[Any]) -> float:
    """PSNR in dB; the peak is 255 for uint8 and the original's range otherwise."""
    difference = one.astype("f8") - other.astype("f8")
    peak = 255.0 if one.dtype == np.uint8 else float(np.ptp(other.astype("f8"))) or 1.0
    error = float(np.square(difference).mean())
    return np.inf if error == 0 else float(10 * np.log10(peak**2 / error))


def generations(image: NDArray[Any], codec: DeepSIC, part: bool = False, count: int = GENERATIONS) -> list[Generation]:
    """Store an image as one chunk and rewrite it.

    Parameters
    ----------
    image : ndarray
        Of the axes of the codec.
    codec : DeepSIC
        How it is stored.
    part : bool
        Rewrite by writing a patch of noise into a corner instead of what was read; the patch is not measured.
    count : int
        Generations.
    """
    store: dict[str, Any] = {}
    array = create_array(store, shape=image.shape, dtype=image.dtype, chunks=image.shape, codec=codec)
    key = array.metadata.encode_chunk_key((0,) * image.ndim)
    y, x = codec.axes.index("y"), codec.axes.index("x")
    inside = tuple(slice(0, PATCH) if axis in (y, x) else slice(None) for axis in range(image.ndim))
    measured = np.ones(image.shape, bool)
    if part:
        measured[inside] = False
    rng, rows, before = np.random.default_rng(0), [], image
    for number in range(1, count + 1):
        if number == 1:
            array[...] = image
        elif part:
            low, high = int(image.min()), int(image.max())
            array[inside] = rng.integers(low, high + 1, image[inside].shape).astype(image.dtype)
        else:
            array[...] = before
        decoded = array[...]
        worst, step = (np.abs(decoded.astype("f8") - other.astype("f8"))[measured].max() for other in (image, before))
        size = len(store[key])
        rows.append(Generation(number, psnr(decoded[measured], image[measured]), float(worst), float(step), size))
        before = decoded
    return rows


def codecs(
    qualities: Sequence[float], errors: Sequence[float], axes: str
) -> Iterator[tuple[str, DeepSIC, float | None]]:
    """Yield names, codecs and bounds to try; prints which bounds the model cannot keep."""
    for quality in qualities:
        yield f"quality {quality:g}", DeepSIC(quality=quality, axes=axes), None
    for error in errors:
        try:
            yield f"max_error {error:g}", DeepSIC(max_error=error, axes=axes), error
        except (DeepSICError, TypeError) as reason:
            print(f"max_error {error:g} left out: {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", nargs="*", default=[], help="image files (default: the two bundled images)")
    add("--crop", type=int, default=256, metavar="PIXELS", help="edge of the chunk, from the middle (default: 256)")
    add("--qualities", nargs="*", type=float, default=[20, 50, 80])
    add("--errors", nargs="*", type=float, default=[0, 2], help="bounds for max_error, in data units")
    add("--count", type=int, default=GENERATIONS)
    args = parser.parse_args(argv)
    failed = 0
    for name, image, axes in images(args.images, args.crop):
        print(f"\n{name}: {image.shape} {image.dtype}")
        last = f"{args.count}"
        header = ("", "write", "PSNR 1", "2", last, "worst 1", last, "step 2..", "bytes 1", last)
        print(("{:>14} {:>6}" + " {:>8}" * 8).format(*header))
        for title, codec, bound in codecs(args.qualities, args.errors, axes):
            for part in (False, True):
                try:
                    rows = generations(image, codec, part, args.count)
                except DeepSICError as error:
                    print(f"{title:>14} left out: {error}")
                    break
                first, end, step = rows[0], rows[-1], max(row.step for row in rows[1:])
                psnrs = " ".join(f"{row.psnr:8.2f}" for row in (first, rows[1], end))
                worst = f"{first.worst:8g} {end.worst:8g} {step:8g}"
                way = "part" if part else "whole"
                print(f"{title:>14} {way:>6} {psnrs} {worst} {first.nbytes:8d} {end.nbytes:8d}")
                if bound is not None and max(row.step for row in rows) > bound:
                    failed += 1
                    print(f"{'':>14} more than the bound of {bound:g} from one generation to the next")
    if failed:
        print(f"\n{failed} bounds were not kept")
    return 1 if failed else 0


def images(paths: Sequence[str], crop: int) -> Iterator[tuple[str, NDArray[Any], str]]:
    """Yield names, images and axes."""
    from deepsic_codec.samples import drone_frame, eurosat_mosaic

    if not paths:
        yield "drone photograph", middle(drone_frame(), "yxc", crop), "yxc"
        yield "satellite mosaic", middle(eurosat_mosaic(), "yxc", crop), "yxc"
    if paths:
        from deepsic_codec.io.sources import open_sources

        for source in open_sources(list(paths)):
            yield source.name, middle(np.asarray(source.values), source.axes, crop), source.axes


def middle(image: NDArray[Any], axes: str, crop: int) -> NDArray[Any]:
    """Return a square from the middle."""
    sizes = [(size, min(size, crop) if axis in "yx" else size) for size, axis in zip(image.shape, axes, strict=True)]
    return np.ascontiguousarray(image[tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in sizes)])


if __name__ == "__main__":
    raise SystemExit(main())
