"""The package and a second decoder, written from the documents alone, agree on every symbol."""

import numpy as np
import pytest

from deepsic_codec import reference
from deepsic_codec.model.file import load_arrays
from deepsic_codec.model.scheduler import get_scheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.samples import drone_frame


@pytest.mark.parametrize("name", ["base"])
@pytest.mark.parametrize(
    "height,width,slices,quality",
    [(16, 16, 1, 50.0), (64, 48, 1, 12.5), (40, 33, 2, 71.5), (32, 32, 1, 100.0), (16, 40, 1, 1.0)],
)
def test_second_decoder_agrees(name, height, width, slices, quality):
    info = find_model(name)
    runtime = get_scheduler(info)
    frame = drone_frame()
    chunk = np.stack([frame[900 + 40 * s :, 800:][:height, :width] for s in range(slices)])
    encoded = runtime.encode([chunk], [quality])[0]
    wanted = runtime.decode_symbols([encoded.features], [chunk.shape[:3]], [encoded.quantiser])[0]
    model = load_arrays(info), info.architecture
    settings = slices, encoded.grid, round(100 * quality), encoded.quantiser.trellis
    found = reference.decode_features(encoded.features, model, *settings)
    np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), wanted)
    assert wanted.any() or quality == 1


@pytest.mark.parametrize("effort", [0, 1], ids=["scalar", "trellis"])
def test_extreme_pixels_agree(effort):
    """Noise at the highest quality reaches the escapes and the plain bits."""
    info = find_model("base")
    runtime = get_scheduler(info)
    rng = np.random.default_rng(0)
    chunk = (rng.integers(0, 2, (1, 32, 32, 1)) * 255).repeat(3, axis=3).astype(np.uint8)
    encoded = runtime.encode([chunk], [100.0], [effort])[0]
    assert encoded.quantiser == (100.0, bool(effort))
    wanted = runtime.decode_symbols([encoded.features], [(1, 32, 32)], [encoded.quantiser])[0]
    assert np.abs(wanted).max() > 100
    model = load_arrays(info), info.architecture
    found = reference.decode_features(encoded.features, model, 1, encoded.grid, 10000, encoded.quantiser.trellis)
    np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), wanted)
