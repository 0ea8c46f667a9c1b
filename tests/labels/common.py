"""Archives with made-up labels: payloads with a label section and features that nobody decodes."""

import numpy as np
import zarr

from deepsic_codec import DeepSIC, create_array
from deepsic_codec._compat import default_buffer_prototype, sync
from deepsic_codec.payload import header, labels
from deepsic_codec.payload.sections import FEATURES, LABELS
from tests import stub_runtime

CLASSES = 4  # Dark, Dim, Bright and unknown: those of tests/stub_runtime.py


def archive(
    store=None,
    *,
    shape=(128, 192, 3),
    chunks=(128, 128, 3),
    axes="yxc",
    tile=(64, 64),
    name="img",
    zarr_format=3,
    semantics="pre",
):
    """An empty array in a group."""
    store = zarr.storage.MemoryStore() if store is None else store
    zarr.open_group(store, zarr_format=zarr_format)
    codec = DeepSIC(axes=axes, label_tile=tile, semantics=semantics)
    return create_array(store, name=name, shape=shape, chunks=chunks, dtype="u1", codec=codec, zarr_format=zarr_format)


def payload(array, scores, head=stub_runtime.MODELS[0].head):
    """A payload with these label scores, uint8 (slices, rows, columns, classes), or without any."""
    codec = array.metadata.compressor if array.metadata.zarr_format == 2 else array.metadata.codecs[0]
    sections = {FEATURES: b"features"}
    if scores is not None:
        sections[LABELS] = labels.best_labels(scores, codec.label_tile)
    size = dict(zip(codec.axes, array.chunks, strict=True))
    return header.pack(
        dtype="u1",
        shape=array.chunks,
        order="C",
        axes=codec.axes,
        decoder=bytes.fromhex(codec.decoder)[:8],
        head=bytes.fromhex(head)[:4],
        quality=50,
        grid=(-(-size["y"] // 16), -(-size["x"] // 16)),
        sections=sections,
    )


def put(array, index, data):
    """Store a payload as a chunk."""
    key = f"{array.path}/{array.metadata.encode_chunk_key(index)}".lstrip("/")
    sync(array.store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


def fill(array, seed, missing=0.1, unlabelled=0.0):
    """Store made-up chunks: mostly one class per tile, faint others, all within reach of each threshold."""
    rng = np.random.default_rng(seed)
    codec = array.metadata.compressor if array.metadata.zarr_format == 2 else array.metadata.codecs[0]
    sizes = dict(zip(codec.axes, array.chunks, strict=True))
    slices = int(np.prod([sizes[axis] for axis in codec.axes if axis not in "yxc"]))
    tiles = slices, *(-(-sizes[axis] // tile) for axis, tile in zip("yx", codec.label_tile, strict=True))
    for index in np.ndindex(*array.cdata_shape):
        kind = rng.random()
        if kind < missing:
            continue
        scores = rng.integers(0, 256, (*tiles, CLASSES)).astype("u1")
        scores[rng.random(scores.shape) < 0.6] = 0
        put(array, index, payload(array, None if kind < missing + unlabelled else scores))
