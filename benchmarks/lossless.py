"""Lossless size and speed: features and residual, by quality of the lossy base, beside lossless codecs.

    python -m benchmarks.lossless --images DIR [--limit 6] [--qualities 5 40 80] [--chunk 512]

Images are RGB uint8, cut into chunks of the given size. Per quality: bits per sample of features, of the residual, and
of both, and Mpx/s of the residual coder alone on one thread. Then the same for other codecs on the same chunks. Every
round trip is checked.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, read_images, table
from deepsic_codec.io.peers import LOSSLESS_PEERS
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.payload.coders.residual import decode_integers, encode_integers

Pixels = NDArray[np.uint8]


def _timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.thread_time()
    value = function(*args)
    return time.thread_time() - start, value


def _ours(chunks: list[Pixels], quality: float) -> list[object]:
    runtime = get_scheduler(find_model("base"))
    features, coded, seconds = 0, 0, [0.0, 0.0]
    for chunk in chunks:
        encoded = runtime.encode([chunk[None]], [quality], labels=False)[0]
        decoded = runtime.decode([encoded.features], [(1, *chunk.shape[:2])], [quality])[0].astype(np.int32)
        residual = chunk[None] - decoded
        encode_seconds, data = _timed(encode_integers, residual, decoded)
        decode_seconds, result = _timed(decode_integers, data, decoded)
        if not np.array_equal(result, residual):
            raise AssertionError("the residual is not restored")
        features, coded = features + len(encoded.features), coded + len(data)
        seconds = [seconds[0] + encode_seconds, seconds[1] + decode_seconds]
    return _row(f"this codec, quality {quality:g}", chunks, features, coded, *seconds)


def _peer(chunks: list[Pixels], name: str) -> list[object]:
    peer = LOSSLESS_PEERS[name]
    assert peer.lossless is not None
    coded, seconds = 0, [0.0, 0.0]
    for chunk in chunks:
        encode_seconds, data = _timed(peer.lossless, chunk)
        decode_seconds, result = _timed(peer.decode, data, chunk)
        if not np.array_equal(result, chunk):
            raise AssertionError(f"{name}: the image is not restored")
        coded += len(data)
        seconds = [seconds[0] + encode_seconds, seconds[1] + decode_seconds]
    return _row(name, chunks, 0, coded, *seconds)


def _row(
    name: str, chunks: list[Pixels], features: int, coded: int, encode_seconds: float, decode_seconds: float
) -> list[object]:
    samples = sum(c.size for c in chunks)
    bits = [f"{8 * n / samples:.3f}" for n in (features, coded, features + coded)]
    return [name, *bits, samples / 3e6 / encode_seconds, samples / 3e6 / decode_seconds]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of lossless images")
    parser.add_argument("--limit", type=int, help="use only the first N images", metavar="N")
    parser.add_argument("--qualities", type=float, nargs="+", default=[5, 20, 40, 60, 80, 100])
    parser.add_argument("--chunk", type=int, default=512, help="pixels along each side of a chunk")
    args = parser.parse_args()
    n = args.chunk
    chunks = [
        np.ascontiguousarray(image[y : y + n, x : x + n])
        for _, image in read_images(args.images, args.limit)
        for y in range(0, image.shape[0], n)
        for x in range(0, image.shape[1], n)
    ]
    _ours(chunks[:1], args.qualities[0])  # compiles
    rows = [_ours(chunks, q) for q in args.qualities] + [_peer(chunks, name) for name in LOSSLESS_PEERS]
    print(machine(1))
    print(table(("codec", "features", "residual", "bits per sample", "Mpx/s encode", "Mpx/s decode"), rows))
    print("Speeds of this codec are the residual coder's alone.")


if __name__ == "__main__":
    main()
