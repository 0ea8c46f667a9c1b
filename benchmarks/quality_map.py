"""What a quality map saves, and what it costs at the edges of a region.

    python -m benchmarks.quality_map
    python -m benchmarks.quality_map --images DIR --size 768

A square of 20 % of each image, in its middle, has quality 75, the rest 25. The region's PSNR is compared with that of
one quality for the whole image which takes as many bytes, the bytes with those of the square and the four rectangles
around it, coded apart. Seams are of an image whose left fifth has quality 75: PSNR of the 8 outer columns on each side,
less that of this side coded alone. Images are the bundled photograph and mosaic, or those of a folder, cut to a square
in their middle.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from benchmarks.common import Pixels, machine, read_images, table
from deepsic_codec import DeepSIC
from deepsic_codec.metrics import psnr
from deepsic_codec.samples import drone_frame, eurosat_mosaic

HIGH, LOW, SHARE = 75.0, 25.0, 0.2
CELL = 16  # regions begin and end with cells
SEAM = 8  # columns
TRIALS = 12  # of the one quality
MIN_GAIN, MAX_OVERHEAD, MAX_LOSS = 6.0, 5.0, 0.3  # dB, per cent, dB
HEADER = ("image", "region, one quality", "region, map", "gain dB", "bytes %", "high seam dB", "low seam dB")


def codec(quality: float) -> DeepSIC:
    """The codec of a quality."""
    return DeepSIC(transform="wavelet", semantics="none", quality=quality)


decode = codec(HIGH).decode


def coded(image: Pixels, quality: float) -> bytes:
    """A payload of a part of an image."""
    return codec(quality).encode(np.ascontiguousarray(image))


def at_bytes(image: Pixels, size: int) -> bytes:
    """The payload of the largest quality that takes no more than `size` bytes, or hardly more."""
    low, high = 1.0, HIGH
    for _ in range(TRIALS):
        middle = (low + high) / 2
        low, high = (middle, high) if len(coded(image, middle)) <= size else (low, middle)
    return coded(image, high)


def measure(image: Pixels) -> list[float]:
    """The columns of the table for a square image."""
    edge = image.shape[0]
    side = round(edge * SHARE**0.5 / CELL) * CELL
    start = (edge - side) // 2 // CELL * CELL
    square = np.s_[start : start + side, start : start + side]
    qualities = np.full(image.shape[:2], LOW)
    qualities[square] = HIGH
    mapped = codec(LOW).encode(image, qualities)
    constant, region = at_bytes(image, len(mapped)), decode(mapped)[square]
    before, after = psnr(image[square], decode(constant)[square]), psnr(image[square], region)
    stop = start + side
    around = image[:start], image[stop:], image[start:stop, :start], image[start:stop, stop:]
    apart = len(coded(image[square], HIGH)) + sum(len(coded(part, LOW)) for part in around)

    width = round(edge * SHARE / CELL) * CELL
    qualities[...] = LOW
    qualities[:, :width] = HIGH
    decoded = decode(codec(LOW).encode(image, qualities))
    alone = [decode(coded(part, quality)) for part, quality in ((image[:, :width], HIGH), (image[:, width:], LOW))]
    left, right = np.s_[:, width - SEAM : width], np.s_[:, width : width + SEAM]
    left_loss = psnr(image[left], decoded[left]) - psnr(image[left], alone[0][:, -SEAM:])
    right_loss = psnr(image[right], decoded[right]) - psnr(image[right], alone[1][:, :SEAM])
    return [before, after, after - before, 100 * (len(mapped) / apart - 1), left_loss, right_loss]


def squares(folder: str | None, size: int) -> list[tuple[str, Pixels]]:
    """Names and squares of images."""
    images = read_images(folder) if folder else [("photograph", drone_frame()), ("mosaic", eurosat_mosaic())]
    middle = []
    for name, image in images:
        edge = min(size, *image.shape[:2]) // CELL * CELL
        y, x = ((length - edge) // 2 for length in image.shape[:2])
        middle.append((name, np.ascontiguousarray(image[y : y + edge, x : x + edge])))
    return middle


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if something is not as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", help="folder of images")
    parser.add_argument("--size", type=int, default=512, help="pixels of an edge of the square")
    args = parser.parse_args(argv)
    print(machine(1), end="\n\n")
    names, rows = zip(*((name, measure(image)) for name, image in squares(args.images, args.size)), strict=True)
    rows = np.array(rows)
    print(table(HEADER, [(name, *map(float, row)) for name, row in zip(names, rows, strict=True)]))
    checks = {
        f"gain of at least {MIN_GAIN:g} dB": rows[:, 2].min() >= MIN_GAIN,
        f"at most {MAX_OVERHEAD:g} % more bytes than apart": rows[:, 3].max() <= MAX_OVERHEAD,
        f"seams at most {MAX_LOSS:g} dB worse": rows[:, 4:].min() >= -MAX_LOSS,
    }
    print("\n" + "\n".join(f"{name}: {'yes' if held else 'no'}" for name, held in checks.items()))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
