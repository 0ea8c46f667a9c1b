"""What the start of a chunk shows: bytes read, time, and PSNR beside JPEG 2000 and progressive JPEG at equal bytes.

    python -m benchmarks.preview
    python -m benchmarks.preview --images DIR --quality 75

A square of each image is one chunk of wavelets. Its starts are those that a reduced size needs, and shares of its
bytes, of which `decode_preview` verifies and decodes what it can. Each is decoded at full size and compared with the
original. JPEG 2000 (imagecodecs) is encoded to these bytes, as one of its layers would end there; the prefix of a
progressive JPEG of about all bytes of the chunk is decoded by Pillow.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence

import imagecodecs
import numpy as np
from PIL import Image, ImageFile

from benchmarks.common import Pixels, machine, median_time, table
from benchmarks.quality_map import squares
from deepsic_codec import DeepSIC
from deepsic_codec.codec.reduced import needed_length
from deepsic_codec.metrics import psnr
from deepsic_codec.payload.header import read_header, unpack
from deepsic_codec.payload.sections import WAVELET

TRIALS = 9
REPEATS = 3
MAX_SHARE, MAX_TIME, MAX_LOSS = 15.0, 10.0, 2.0  # per cent of bytes and of time at 1/8, dB
SHARES = (20, 30, 40, 50, 60, 70, 80, 100)  # per cent of the bytes
HEADER = ("image", "start for", "bytes", "bytes %", "time %", "dB", "JPEG 2000 dB", "JPEG dB")


def jpeg2000(image: Pixels, size: int) -> float:
    """PSNR of JPEG 2000 in about this number of bytes."""
    low, high, best = 5.0, 70.0, float("nan")
    for _ in range(TRIALS):
        level = (low + high) / 2
        data = imagecodecs.jpeg2k_encode(image, level=level, mct=True, codecformat="j2k")
        if len(data) <= size:
            low, best = level, psnr(image, imagecodecs.jpeg2k_decode(data))
        else:
            high = level
    return best


def progressive(image: Pixels, size: int) -> bytes:
    """The progressive JPEG of the largest quality in this number of bytes."""
    best = b""
    for quality in range(5, 101, 5):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality, progressive=True)
        best = file.getvalue() if len(file.getvalue()) <= size or not best else best
    return best


def prefix_psnr(image: Pixels, jpeg: bytes, size: int) -> float:
    """PSNR of what Pillow makes of the first bytes of a JPEG."""
    try:
        with Image.open(io.BytesIO(jpeg[:size])) as opened:
            return psnr(image, np.asarray(opened.convert("RGB")))
    except OSError:
        return float("nan")


def measure(name: str, image: Pixels, quality: float) -> tuple[list[list[object]], dict[str, bool]]:
    """Rows of the table, and which targets are met."""
    codec = DeepSIC(transform="wavelet", semantics="none", quality=quality)
    payload = codec.encode(image)
    header, jpeg = read_header(payload), progressive(image, len(payload))
    whole = median_time(lambda: codec.decode(payload), REPEATS)
    starts = {f"1/{scale}": (needed_length(payload, header, scale), scale) for scale in (16, 8, 4, 2)}
    starts |= {f"{share} %": (share * len(payload) // 100, 1) for share in SHARES}
    rows: list[list[object]] = []
    for label, (size, scale) in starts.items():
        start = payload[:size]
        seconds = median_time(lambda start=start, scale=scale: codec.decode_preview(start, scale), REPEATS)
        peers = jpeg2000(image, size), prefix_psnr(image, jpeg, size)
        shares = 100 * size / len(payload), 100 * seconds / whole
        rows.append([name, label, size, *shares, psnr(image, codec.decode_preview(start, 1)), *peers])
    by_label = {str(row[1]): [float(str(value)) for value in row[2:]] for row in rows}
    met = {
        f"1/8 in at most {MAX_SHARE:g} % of the bytes": by_label["1/8"][1] <= MAX_SHARE,
        f"1/8 in at most {MAX_TIME:g} % of the time": by_label["1/8"][2] <= MAX_TIME,
    }
    for share, loss in ((30, MAX_LOSS), (60, 0.0)):
        _, _, _, reached, peer, _ = by_label[f"{share} %"]
        met[f"{loss:g} dB within JPEG 2000 at {share} % of the bytes"] = reached >= peer - loss
    checksums = len(payload[header.entry(WAVELET.kind).offset :]) - len(unpack(payload).read(WAVELET).stream)
    print(f"{name}: {checksums} bytes of lengths and checksums, {100 * checksums / len(payload):.2f} %")
    return rows, met


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the targets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", help="folder of images")
    parser.add_argument("--size", type=int, default=512, help="pixels of an edge of the square")
    parser.add_argument("--quality", type=float, default=50)
    args = parser.parse_args(argv)
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    print(machine(1), end="\n\n")
    results = [measure(name, image, args.quality) for name, image in squares(args.images, args.size)]
    print("\n" + table(HEADER, [row for rows, _ in results for row in rows]), end="\n\n")
    for target in results[0][1]:
        print(f"{target}: {'yes' if all(met[target] for _, met in results) else 'no'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
