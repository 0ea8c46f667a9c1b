import numpy as np
import pytest
import zarr
from PIL import Image

from deepsic_codec import DeepSIC, consolidate_labels, create_array
from deepsic_codec.errors import ConfigurationError, ExpressionError, LabelIndexError
from deepsic_codec.io import draw
from deepsic_codec.io import preview as module
from deepsic_codec.io.preview import NO_DATA, preview
from deepsic_codec.labels.colours import GREY, colours
from tests.common import check_rejects, photograph

GREYS = (10, 120, 250, 60)


def quarters(stub, store=None, **codec):
    """Four chunks, each of one grey, in the order of GREYS."""
    image = np.zeros((128, 192, 3), "u1")
    for number, grey in enumerate(GREYS):
        y, x = number // 2 * 64, number % 2 * 96
        image[y : y + 64, x : x + 96] = grey
    return create_array(store or {}, name="img", data=image, chunks=(64, 96, 3), codec=DeepSIC(**codec))


def body(picture, height, width, panel=0):
    """The pixels of a panel: below two lines of captions, beside each other."""
    pixels = np.asarray(picture)
    top = next(row for row in range(len(pixels)) if (pixels[row : row + 8, draw.GAP : draw.GAP + 20] != 255).all())
    left = draw.GAP + panel * (width + draw.GAP)
    return pixels[top : top + height, left : left + width]


def test_the_picture_is_the_image(stub):
    array = quarters(stub)
    made = preview(array, size=192, labels=False)
    np.testing.assert_array_equal(body(made.image, 128, 192), array[...])
    assert (made.chunks, made.decoded, made.sampled, made.classes) == (4, 4, False, {})


def test_the_start_of_a_chunk_is_enough_for_a_small_picture():
    noise = np.random.default_rng(0).integers(0, 9000, (512, 512)).astype("u2")
    codec = DeepSIC(axes="yx", semantics="none", rmse=20, value_range=(0, 65535))
    array = create_array({}, name="a", data=noise, chunks=(256, 256), codec=codec)
    small, large = (preview(array, size=size, labels=False) for size in (64, 512))
    assert (small.scale, large.scale, small.decoded, large.decoded) == (8, 1, 4, 4)
    assert small.bytes_read < large.bytes_read / 3
    assert body(small.image, 64, 64).shape == (64, 64, 3)


def test_labels_are_counted_and_drawn(stub):
    array = quarters(stub)
    made = preview(array, size=384)
    # Chunks of 64 x 96 have tiles of 64 x 64: two each.
    assert made.classes == {"Dark": 4, "Dim": 2, "Bright": 2}
    tinted = body(made.image, 256, 384, panel=1).astype(int)
    plain = body(made.image, 256, 384).astype(int)
    assert (abs(tinted - plain).sum(axis=-1) > 30).mean() > 0.9
    consolidate_labels(quarters(stub, store := zarr.storage.MemoryStore()))
    assert preview(store, "img").classes == made.classes


def test_qualities_are_counted_and_drawn(stub):
    """Of a chunk without a map, its quality; of a bounded one none."""
    data = np.random.default_rng(0).integers(90, 99, (3, 80, 128)).astype("u2")
    qualities = np.full(data.shape, 30.0)
    qualities[1, :32, :16], qualities[1, 32:, :16] = 0, 90
    codec = {"axes": "tyx", "semantics": "none"}
    array = create_array({}, data=data, chunks=(3, 80, 64), codec=DeepSIC(**codec), quality_map=qualities)
    made = [preview(array, select={"t": t}, quality_map=True, stretch=False, size=128) for t in (0, 1)]
    names = list(module.QUALITIES)
    assert made[0].qualities == {"20 to 39": 40}
    assert made[1].qualities == {names[0]: 2, "20 to 39": 35, "80 to 99": 3} and not made[1].classes
    picture, panel = (body(made[1].image, 80, 128, panel=number) for number in (0, 1))
    for (y, x), name in {(20, 5): names[0], (50, 5): "80 to 99", (20, 40): "20 to 39", (50, 100): "20 to 39"}.items():
        expected = draw.tint(picture[y : y + 1, x : x + 1], np.zeros((1, 1), int), np.array([module.QUALITIES[name]]))
        np.testing.assert_array_equal(panel[y, x], expected[0, 0])
    bounded = create_array({}, data=data, chunks=(3, 80, 64), codec=DeepSIC(**codec, max_error=1))
    assert preview(bounded, quality_map=True, size=128).qualities == {}


def test_qualities_of_bands_of_several_resolutions(stub):
    """Of a chunk without a map, its quality; of a bounded one none."""
    data = np.random.default_rng(0).integers(0, 4000, (64, 128, 2)).astype("u2")
    data[..., 1] = data[::2, ::2, 1].repeat(2, 0).repeat(2, 1)
    qualities = np.full(data.shape[:2], 30.0)
    qualities[:16, :32] = 90
    codec = {"semantics": "none", "value_range": (0, 4000), "transform": "wavelet"}
    array = create_array({}, data=data, chunks=(64, 64, 2), codec=DeepSIC(**codec), quality_map=qualities)
    assert preview(array, quality_map=True, bands=[0], size=128).qualities == {"20 to 39": 30, "80 to 99": 2}
    bounded = create_array({}, data=data, chunks=(64, 64, 2), codec=DeepSIC(max_error=0))
    assert preview(bounded, quality_map=True, bands=[0], size=128).qualities == {}


@pytest.mark.parametrize("semantics", ["pre", "post"])
def test_labels_of_one_slice(stub, semantics):
    data = np.repeat(np.array(GREYS, "u1"), 64 * 64).reshape(4, 64, 64)
    array = create_array({}, data=data, chunks=(2, 64, 64), codec=DeepSIC(axes="tyx", semantics=semantics))
    for t, name in enumerate(["Dark", "Dim", "Bright", "Dark"]):
        made = preview(array, select={"t": t}, size=64)
        assert list(made.classes) == [name]
        assert (body(made.image, 64, 64) == GREYS[t]).all()


def test_where_dims_the_rest(stub):
    array = quarters(stub)
    pixels = body(preview(array, where="Bright", size=192).image, 128, 192)
    assert (pixels[70:120, 6:90] == 250).all() and (pixels[:60, 100:] < 50).all()
    assert pixels[64, 40].tolist() == [255, 220, 0]  # the line around what matches
    check_rejects(ExpressionError, "Brigt|did you mean Bright", preview, array, where="Brigt")


def test_a_large_array_is_sampled(stub, monkeypatch):
    array = create_array({}, data=photograph(640, 640, 3), chunks=(64, 64, 3))
    monkeypatch.setattr(module, "MAX_PIXELS", 9 * 32 * 32)  # at half the size
    stub.batches.clear()
    made = preview(array, size=320)
    assert made.sampled and made.chunks == 100 and made.decoded == sum(stub.sizes("decode")) == 9
    cell = body(made.image, 128, 128)  # 4 x 4 chunks, shown by one of the two in the middle
    candidates = [array[y : y + 64, x : x + 64].mean() for y in (64, 128) for x in (64, 128)]
    assert min(abs(cell.mean() - mean) for mean in candidates) < 3
    assert preview(array, size=320, everything=True).decoded == 100


@pytest.mark.parametrize("axes", ["yxc", "xyc", "cxy"])
def test_a_sample_of_matches_decodes_matches_only(stub, monkeypatch, tmp_path, axes):
    image = np.full((640, 320, 3), 10, "u1")
    image[512:576, 64:128] = 250
    order = ["yxc".index(axis) for axis in axes]
    chunks = tuple((64, 64, 3)[number] for number in order)
    array = create_array({}, data=image.transpose(order), chunks=chunks, codec=DeepSIC(axes=axes))
    monkeypatch.setattr(module, "MAX_PIXELS", 9 * 32 * 32)  # at half the size
    made = preview(array, size=320, where="Bright")
    assert made.decoded == 1 and made.sampled
    assert (body(made.image, 320, 160) == 250).all(axis=-1).any()
    check_rejects(LabelIndexError, "nowhere", preview, array, where="Bright", index=tmp_path / "nowhere")


def test_bands_of_16_bits_are_stretched(stub):
    data = (photograph(128, 128, 5).astype("u2") * 30) + 4000
    array = create_array({}, data=data, chunks=(64, 64, 5), codec=DeepSIC(value_range="chunk"))
    made = preview(array, size=128, bands=[4, 2, 0], labels=False)
    for (low, high), band in zip(made.limits, (4, 2, 0), strict=True):
        assert 4000 <= low < np.median(data[..., band]) < high <= data.max()
    assert body(made.image, 128, 128).std() > 30
    grey = body(preview(array, size=128, bands=[1], labels=False).image, 128, 128)
    assert (grey[..., 0] == grey[..., 1]).all()


def test_nodata_and_missing_chunks_are_left_out(stub):
    data = photograph(128, 128, 3)
    data[:40, :40] = 0
    data[data == 0] = 1
    data[:40, :40] = 0
    array = create_array({}, shape=data.shape, chunks=(64, 64, 3), dtype="u1", codec=DeepSIC(nodata=0))
    array[:, :64] = data[:, :64]
    made = preview(array, size=128, labels=False)
    pixels = body(made.image, 128, 128)
    assert (pixels[:40, :40] == NO_DATA).all() and (pixels[:, 64:] == NO_DATA).all()
    np.testing.assert_array_equal(pixels[64:, :64], data[64:, :64])
    assert made.decoded == 2


@pytest.mark.parametrize(
    ("axes", "chunks", "options"),
    [
        ("cyx", (3, 64, 64), {}),
        ("xyc", (64, 50, 3), {}),
        ("yxc", (64, 64, 1), {}),
        ("yxc", (64, 64, 3), {"shards": (128, 128, 3)}),
        ("yxc", (64, 64, 3), {"zarr_format": 2, "order": "F"}),
    ],
)
def test_axes_in_any_order(stub, axes, chunks, options):
    image = photograph(150, 130, 3)
    data = image.transpose(["yxc".index(axis) for axis in axes])
    array = create_array({}, data=data, chunks=chunks, codec=DeepSIC(axes=axes), **options)
    made = preview(array, size=150, labels=False)
    np.testing.assert_array_equal(body(made.image, 150, 130), image)
    assert preview(array, size=150).classes


def test_without_labels_there_is_one_image(stub):
    array = create_array({}, data=photograph(64, 64, 3), codec=DeepSIC(semantics="none"))
    assert preview(array).image.width == preview(array, labels=False).image.width


def test_misuse(stub):
    array = create_array({}, data=photograph(2, 64, 64, 3), codec=DeepSIC(axes="tyxc"))
    check_rejects(ConfigurationError, "no axis 'q'|t, y, x, c", preview, array, select={"q": 0})
    check_rejects(ConfigurationError, "t=2|are 0 to 1", preview, array, select={"t": 2})
    check_rejects(ConfigurationError, "select y", preview, array, select={"y": 2})
    check_rejects(ConfigurationError, "bands|0 to 2", preview, array, bands=[3])
    check_rejects(ConfigurationError, "size", preview, array, size=1)


def test_shrinking_averages_and_leaves_nan_out():
    values = photograph(96, 80, 2).astype("f4")
    small = draw.shrink(values, 12, 10)
    np.testing.assert_allclose(small, values.reshape(12, 8, 10, 8, 2).mean(axis=(1, 3)), rtol=1e-4)
    np.testing.assert_allclose(draw.shrink(values.astype("u1"), 12, 10), small, rtol=1e-4)
    values[:8, :8] = np.nan
    values[8, 0] = np.nan
    small = draw.shrink(values, 12, 10)
    assert np.isnan(small[0, 0]).all() and not np.isnan(small[1:]).any()
    np.testing.assert_allclose(small[1, 0], np.nanmean(values[8:16, :8], axis=(0, 1)), rtol=1e-4)


def test_colours_are_all_different():
    names = ["unknown", "Forest", "River", "Zebra", "Lake", "SeaLake", *(f"class {k}" for k in range(60))]
    found = colours(names)
    assert list(found) == names and len(set(found.values())) == len(names) and found["unknown"] == GREY
    assert colours(["Forest"])["Forest"] == found["Forest"]


def test_the_legend_has_every_colour():
    entries = colours(["Forest", "River", "unknown"])
    pixels = np.asarray(draw.legend(entries, {}, 400)).reshape(-1, 3)
    for colour in entries.values():
        assert (pixels == colour).all(axis=-1).sum() > 100
    assert isinstance(draw.sheet([("words " * 30, 15, draw.INK), Image.new("RGB", (9, 9))], 100), Image.Image)
