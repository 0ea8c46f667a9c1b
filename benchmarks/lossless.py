"""Lossless size and speed beside lossless codecs.

    python -m benchmarks.lossless --images DIR [--limit 6] [--chunk 512]

Images are RGB uint8, cut into chunks of the given size. Bits per sample of the residual, and Mpx/s of its coder on one
thread; then the same for other codecs on the same chunks. Every round trip is checked.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import machine, read_images, table
from deepsic_codec.io.peers import LOSSLESS_PEERS
from deepsic_codec.payload.coders.residual import decode_integers, encode_integers

Pixels = NDArray[np.uint8]


def _timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.thread_time()
    value = function(*args)
    return time.thread_time() - start, value


def _ours(chunks: list[Pixels]) -> list[object]:
    coded, seconds = 0, [0.0, 0.0]
    for chunk in chunks:
        values = chunk[None].astype(np.int32)
        encode_seconds, (data, _) = _timed(encode_integers, values)
        decode_seconds, result = _timed(decode_integers, data, values.shape)
        if not np.array_equal(result, values):
            raise AssertionError("the chunk is not restored")
        coded += len(data)
        seconds = [seconds[0] + encode_seconds, seconds[1] + decode_seconds]
    return _row("this codec", chunks, coded, *seconds)


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
    return _row(name, chunks, coded, *seconds)


def _row(name: str, chunks: list[Pixels], coded: int, encode_seconds: float, decode_seconds: float) -> list[object]:
    samples = sum(c.size for c in chunks)
    return [name, f"{8 * coded / samples:.3f}", samples / 3e6 / encode_seconds, samples / 3e6 / decode_seconds]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of lossless images")
    parser.add_argument("--limit", type=int, help="use only the first N images", metavar="N")
    parser.add_argument("--chunk", type=int, default=512, help="pixels along each side of a chunk")
    args = parser.parse_args()
    n = args.chunk
    chunks = [
        np.ascontiguousarray(image[y : y + n, x : x + n])
        for _, image in read_images(args.images, args.limit)
        for y in range(0, image.shape[0], n)
        for x in range(0, image.shape[1], n)
    ]
    _ours(chunks[:1])  # compiles
    rows = [_ours(chunks)] + [_peer(chunks, name) for name in LOSSLESS_PEERS]
    print(machine(1))
    print(table(("codec", "bits per sample", "Mpx/s encode", "Mpx/s decode"), rows))


if __name__ == "__main__":
    main()
