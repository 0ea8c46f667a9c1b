"""A lossless stand-in for model.file, model.zoo and model.scheduler, without torch.

Whatever garbles a chunk shows exactly.

Features are the pixels, deflated; with `RUNTIME.lossy`, they are rounded first, by more the lower the quality. Labels
tell how bright a cell of 64x64 pixels is. An image that is 13 everywhere makes the call that it is part of fail, as a
batch does in which one item is bad.
"""

import sys
import types
import zlib
from dataclasses import dataclass, field, replace

import numpy as np

from deepsic_codec.codec import chunk, encode
from deepsic_codec.errors import CorruptPayload, ModelMismatch, ModelNotFound
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.payload.fields import Quantiser

POISON = 13
WITHOUT_LOSS = encode._without_loss
SHADES = ("Dark", "Dim", "Bright")


VOCABULARY = Vocabulary(SHADES, {"Visible": ("Dim", "Bright")})


@dataclass(frozen=True)
class ModelInfo:
    name: str
    decoder: str
    head: str
    vocabulary: Vocabulary = VOCABULARY
    architecture: dict = field(default_factory=lambda: {"family": "deepsic", "latents": 768})

    values: int = 4
    outputs: int = 8

    def __post_init__(self):
        object.__setattr__(self, "vocabulary", replace(self.vocabulary, head=self.head))


MODELS = (ModelInfo("base", "ab" * 32, "cd" * 32), ModelInfo("other", "12" * 32, "34" * 32))


@dataclass(frozen=True)
class Encoded:
    grid: tuple[int, int]
    quantiser: Quantiser
    features: bytes | None = None
    cells: np.ndarray | None = None
    symbols: np.ndarray | None = None  # the pixels of decoding, as the stub has no latents
    pixels: np.ndarray | None = None


def find_model(name_or_hash="base", *, head=None, preferred=None):
    for info in MODELS:
        if (info.name == name_or_hash or info.decoder.startswith(name_or_hash)) and info.head.startswith(head or ""):
            return info
    raise ModelNotFound(f"no model {name_or_hash!r} with head {head!r}; looked in tests/stub_runtime.py")


def resolve(name, head=None):
    info = find_model(name)
    return info.decoder, info.head if head is None else find_head(head, info.decoder)


def find_head(name, decoder):
    info = find_model(name)
    if info.decoder != decoder:
        raise ModelMismatch(f"head {name!r} is for decoder {info.decoder}, the model has {decoder}")
    return info.head


def _rows_cols(size, step):
    return -(-size[0] // step), -(-size[1] // step)


def _padded(images, step):
    rows, cols = _rows_cols(images.shape[1:3], step)
    pad = ((0, 0), (0, rows * step - images.shape[1]), (0, cols * step - images.shape[2]), (0, 0))
    return np.pad(images, pad, mode="edge").reshape(len(images), rows, step, cols, step, 3).swapaxes(2, 3)


def shade_scores(images):
    """Cells u8 (slices, rows, columns, 8): scores of Dark, Dim, Bright, unknown, and an embedding of 4 values."""
    mean = _padded(images, 64).mean(axis=(3, 4, 5)) / (64 if images.dtype == np.int16 else 1)
    shade = np.minimum(mean * 3 // 256, 2).astype(int)
    scores = np.full((*mean.shape, 4), 10, "u1")
    np.put_along_axis(scores, shade[..., None], 200, axis=-1)
    level = np.clip(mean[..., None] - 128, -127, 127).round() * [1, -1, 0, 0] + [0, 0, 100, -100]
    return np.concatenate([scores, (level + 128).astype("u1")], -1)


def _deflated(pixels, trellis):
    return pixels.dtype.str[1:].encode() + bytes([trellis]) + zlib.compress(pixels.tobytes(), 1)


def quantiser(quality):
    """Return that of a quality: above 40 with a trellis, so that a reader who does not know it is noticed."""
    return Quantiser(quality, quality > 40)


def _finished(results, finish):
    return results if finish is None else [last(result) for last, result in zip(finish, results, strict=True)]


class Scheduler:
    def __init__(self):
        self.batches = []  # ("encode" or "decode", number of items)
        self.delay = None  # called at each batch
        self.model = types.SimpleNamespace(exact=True)
        self.lossy = False

    def _enter(self, kind, items):
        self.batches.append((kind, len(items)))
        if self.delay is not None:
            self.delay()

    def sizes(self, kind):
        return [count for name, count in self.batches if name == kind]

    def encode(
        self,
        images,
        qualities,
        efforts=None,
        tunes=None,
        *,
        features=True,
        labels=True,
        symbols=False,
        pixels=False,
        finish=None,
    ):
        self._enter("encode", images)
        assert len(images) == len(qualities) == len(efforts if efforts is not None else images)
        for image in images:
            assert image.dtype in (np.uint8, np.int16) and image.ndim == 4 and image.shape[3] == 3
            assert image.flags.c_contiguous and image.min() >= 0 and image.max() <= 255 * 64
            if (image == POISON).all():
                raise RuntimeError("a poisoned image")
        encoded = []
        for image, quality in zip(images, qualities, strict=True):
            rounded = self._rounded(image, quality)
            encoded.append(
                Encoded(
                    _rows_cols(image.shape[1:3], 16),
                    quantiser(quality),
                    _deflated(rounded, quantiser(quality).trellis) if features else None,
                    shade_scores(image) if labels else None,
                    rounded if symbols else None,
                    rounded if pixels else None,
                )
            )
        return _finished(encoded, finish)

    def encode_symbols(self, symbols, shapes, quantisers):
        assert len(symbols) == len(shapes) and all(one == quantiser(one.quality) for one in quantisers)
        return [_deflated(one, trellis) for one, (_, trellis) in zip(symbols, quantisers, strict=True)]

    def synthesise(self, symbols, shapes, quantisers, q6):
        assert len(symbols) == len(shapes) == len(quantisers)
        assert all((one.dtype == np.int16) == q6 for one in symbols)
        return symbols

    def map(self, function, *columns):
        return list(map(function, *columns))

    def _rounded(self, image, quality):
        if not self.lossy:
            return image
        unit = 64 if image.dtype == np.int16 else 1
        step = int(1 + (100 - quality) / 4) * unit
        return np.minimum(image // step * step + step // 2, 255 * unit).astype(image.dtype)

    def decode(self, features, shapes, quantisers, q6=None, finish=None):
        self._enter("decode", features)
        images = []
        in_q6 = q6 or [False] * len(features)
        for data, shape, wanted, (_, trellis) in zip(features, shapes, in_q6, quantisers, strict=True):
            try:
                dtype = bytes(data[:2]).decode()
                pixels = np.frombuffer(zlib.decompress(bytes(data[3:])), dtype).reshape(*shape, 3)
                assert data[2] == trellis, "another quantiser"
                if dtype == "u1" and wanted:
                    pixels = 64 * pixels.astype("i2")
                elif dtype == "i2" and not wanted:
                    pixels = ((pixels + 32) // 64).astype("u1")
                images.append(pixels)
            except (zlib.error, ValueError, TypeError, UnicodeError) as error:
                raise CorruptPayload(f"features: {error}") from error
        return _finished(images, finish)

    def decode_symbols(self, features, shapes, quantisers):
        blocks = [_padded(images, 16) for images in self.decode(features, shapes, quantisers)]
        return [np.moveaxis(block.reshape(*block.shape[:3], -1), -1, 1).astype("i2") for block in blocks]

    def score(self, symbols, shapes, quantisers):
        assert len(symbols) == len(quantisers) and all(one == quantiser(one.quality) for one in quantisers)
        scores = []
        for block, (count, height, width) in zip(symbols, shapes, strict=True):
            rows, cols = block.shape[2:]
            pixels = np.moveaxis(block, 1, -1).reshape(count, rows, cols, 16, 16, 3).swapaxes(2, 3)
            images = pixels.reshape(count, rows * 16, cols * 16, 3)[:, :height, :width]
            scores.append(shade_scores(images.astype("u1")))
        return scores


RUNTIME = Scheduler()


def get_scheduler(info):
    return RUNTIME


def modules():
    """The modules, by name, that stand in for the real ones."""
    file = types.ModuleType("deepsic_codec.model.file")
    file.ModelInfo, file.HeadInfo = ModelInfo, type("HeadInfo", (), {})
    zoo = types.ModuleType("deepsic_codec.model.zoo")
    zoo.find_model, zoo.resolve, zoo.find_head = find_model, resolve, find_head
    scheduler = types.ModuleType("deepsic_codec.model.scheduler")
    scheduler.get_scheduler, scheduler.Encoded = get_scheduler, Encoded
    families = types.ModuleType("deepsic_codec.model.families")
    families.family_of = lambda architecture: types.SimpleNamespace(exact=architecture["family"] != "paper")
    families.architecture_from = lambda architecture: types.SimpleNamespace(**architecture)
    return {module.__name__: module for module in (file, zoo, families, scheduler)}


def transform_of(params, dtype, bands):
    """Code chunks as features, which are lossless here, unless wavelets are asked for."""
    return "wavelet" if params.transform == "wavelet" or params.rmse is not None else "features"


def without_loss(task, payload):
    """Leave features as they are: the small pictures of tests have few values."""
    return None if task.chunk.features else WITHOUT_LOSS(task, payload)


def install():
    """Stand in for the rest of the process (tests use the fixture `stub`)."""
    sys.modules.update(modules())
    chunk.transform_of = transform_of
    encode._without_loss = without_loss
