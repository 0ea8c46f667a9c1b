"""The entropy coder alone: speed of one core and bits, on the symbols of real images.

    python -m benchmarks.entropy --images DIR [--context context.safetensors] [--qualities 14 27 44]

Per quality: bits per pixel of the feature sections, of the prior's own estimate (the training-time rate), of the ideal
static code per channel (entropy of each channel's symbols over all images), of `constriction`'s range coder with those
tables, and, if given, of a learned float context model (`benchmarks.context_model`). Then Mpx/s of one thread each way,
and of the integer prior on all threads.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import constriction
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import machine
from deepsic_codec.model.logistic import INDEX_LEVELS, scale_table
from deepsic_codec.model.neighbours import iter_steps
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.schedule import Step
from deepsic_codec.model.torch_scheduler import TorchScheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.payload.coders.symbols import SymbolDecoder, SymbolEncoder
from deepsic_codec.training.data import read_images


@dataclass
class Image:
    """Symbols of one image, and the predictions of the prior, step by step."""

    symbols: NDArray[np.int16]  # (1,h,w,C)
    steps: list[tuple[Step, NDArray[np.int64], NDArray[np.int64], NDArray[np.int16], NDArray[np.uint8]]]
    estimate: float  # bits


def analyse(runtime: TorchScheduler, pixels: NDArray[np.uint8], quality: float) -> tuple[Image, float]:
    """Return the nearest symbols and predictions of an image, and the seconds that the prior took."""
    (encoded,) = runtime.encode([pixels[None]], [quality], [0], features=False, labels=False, symbols=True)
    symbols = encoded.symbols
    start = time.perf_counter()
    with torch.inference_mode():
        prior = runtime.model.prior
        neighbours = prior.neighbours(torch.from_numpy(symbols).float())
        qualities = torch.full((symbols.shape[1] * symbols.shape[2],), int(quality + 0.5))
        steps = [
            (
                step,
                *step.positions(*symbols.shape[1:3]),
                *(v.numpy() for v in prior.run(n, neighbours, r, qualities[: len(r)])),
            )
            for n, step, r, _, _ in iter_steps(prior, neighbours)
        ]
    seconds = time.perf_counter() - start
    log_scales = scale_table()
    bits = 0.0
    for step, ys, xs, means, scales in steps:
        coded = symbols[0, ys, xs, step.start : step.start + step.count].astype(float)
        s = np.exp(np.interp(scales / INDEX_LEVELS, np.arange(len(log_scales)), log_scales))
        d = np.abs(coded - means / 8)
        mass = 0.5 * (np.tanh((0.5 - d) / (2 * s)) - np.tanh((-0.5 - d) / (2 * s)))
        bits -= np.log2(np.maximum(mass, 1e-9)).sum()
    return Image(symbols, steps, bits), seconds


def code(runtime: TorchScheduler, image: Image) -> tuple[int, float, float]:
    """Return bytes, and seconds of encoding and decoding on this thread; check the round trip."""
    tables = runtime.model.coder_tables
    steps = [(ys, xs, s.start, s.second, m, i) for s, ys, xs, m, i in image.steps]
    start = time.perf_counter()
    encoder = SymbolEncoder(tables, image.symbols)
    for step in steps:
        encoder.encode_pass(*step)
    data = encoder.finish()
    middle = time.perf_counter()
    decoder = SymbolDecoder(tables, data, 1, image.symbols.shape[1:3], image.symbols.shape[3])
    for step in steps:
        decoder.decode_pass(*step)
    symbols = decoder.finish()
    end = time.perf_counter()
    if not np.array_equal(symbols, image.symbols):
        raise SystemExit("round trip failed: nothing below would mean anything")
    return len(data), middle - start, end - middle


def static_code(images: list[Image]) -> tuple[float, float, float, float]:
    """Return bits of the ideal static code per channel and of constriction's coder, and its seconds each way."""
    joined = np.concatenate([i.symbols.reshape(-1, i.symbols.shape[3]) for i in images]).astype(np.int32)
    ideal, words, encode, decode = 0.0, 0, 0.0, 0.0
    for column in joined.T:
        low = int(column.min())
        shifted = np.ascontiguousarray(column - low)
        counts = np.bincount(shifted)
        p = counts / counts.sum()
        ideal -= (counts[counts > 0] * np.log2(p[counts > 0])).sum()
        if len(counts) < 2:
            continue
        model = constriction.stream.model.Categorical(np.maximum(p, 1e-9).astype(np.float32), perfect=False)
        start = time.perf_counter()
        coder = constriction.stream.queue.RangeEncoder()
        coder.encode(shifted, model)
        data = coder.get_compressed()
        middle = time.perf_counter()
        back = constriction.stream.queue.RangeDecoder(data).decode(model, len(shifted))
        decode += time.perf_counter() - middle
        encode += middle - start
        if not np.array_equal(back, shifted):
            raise SystemExit("constriction's round trip failed")
        words += len(data)
    return ideal, words * 32.0, encode, decode


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of images, for example Kodak")
    parser.add_argument("--qualities", type=float, nargs="+", default=[14, 27, 44])
    parser.add_argument("--context", help="file written by benchmarks.context_model")
    parser.add_argument("--repeat", type=int, default=3, help="timings are the fastest of N runs", metavar="N")
    a = parser.parse_args()
    runtime = TorchScheduler(LoadedModel(find_model()))  # hands out what the prior predicts
    context = None
    if a.context:
        from benchmarks.context_model import load

        context = load(a.context)
    pictures = [pixels for _, pixels in read_images(Path(a.images))]
    print(machine(torch.get_num_threads()))
    print(f"{len(pictures)} images, model {runtime.model.info.name} {runtime.model.info.decoder[:16]}\n")
    columns = ["quality", "coder", "estimate", "static", "vs_static", "constriction", "context", "vs_context", "|"]
    columns += ["enc", "dec", "prior", "c_enc", "c_dec"]
    print(" ".join(f"{name:>12}" for name in columns))
    code(runtime, analyse(runtime, pictures[0], 50)[0])  # compiles
    for quality in a.qualities:
        images, prior_seconds = [], 0.0
        for pixels in pictures:
            image, _ = analyse(runtime, pixels, quality)
            prior_seconds += min([_] + [analyse(runtime, pixels, quality)[1] for _ in range(a.repeat - 1)])
            images.append(image)
        px = sum(i.symbols.shape[1] * i.symbols.shape[2] * 256 for i in images)
        runs = [[code(runtime, image) for image in images] for _ in range(a.repeat)]
        ours = 8 * sum(n for n, _, _ in runs[0]) / px
        encode, decode = (sum(min(run[i][k] for run in runs) for i in range(len(images))) for k in (1, 2))
        ideal, peer_bits, peer_encode, peer_decode = static_code(images)
        learned = float("nan")
        if context is not None:
            with torch.inference_mode():
                learned = (
                    sum(
                        float(
                            context(
                                torch.from_numpy(i.symbols).permute(0, 3, 1, 2).float(), torch.tensor([quality])
                            ).sum()
                        )
                        for i in images
                    )
                    / px
                )
        rates = (ours, sum(i.estimate for i in images) / px, ideal / px)
        speeds = (px / seconds / 1e6 for seconds in (encode, decode, prior_seconds, peer_encode, peer_decode))
        row = [f"{quality:.0f}", *(f"{r:.4f}" for r in rates), f"{100 * (ours * px / ideal - 1):+.1f} %"]
        row += [f"{peer_bits / px:.4f}", f"{learned:.4f}", f"{100 * (ours / learned - 1):+.1f} %", "|"]
        print(" ".join(f"{cell:>12}" for cell in row + [f"{v:.1f}" for v in speeds]), flush=True)
    print(
        "\nRates in bits per pixel, speeds in Mpx/s. vs_static: against the ideal static code per channel (target -22 %"
        "\nor better); vs_context: against the learned float context model (target +3 % or better); enc, dec: our coder"
        "\non one thread (target 30 Mpx/s each way at 0.5 bpp); prior: the integer prior on all threads; c_enc, c_dec:"
        "\nconstriction with per-channel tables on one thread, grouped by channel and so without any context."
    )


if __name__ == "__main__":
    main()
