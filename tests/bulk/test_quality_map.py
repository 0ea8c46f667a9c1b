"""Arrays with quality maps: every way to write one, labels that keep their quality, what chunks tell of it."""

import numpy as np
import pytest

from deepsic_codec import DeepSIC, chunk_attrs, create_array, iter_chunk_attrs
from deepsic_codec.dask import store
from deepsic_codec.errors import ConfigurationError, ExpressionError
from deepsic_codec.payload.header import read_header, unpack
from deepsic_codec.payload.sections import QUALITY_MAP, STRUCTURE
from deepsic_codec.payload.structure import table_length
from deepsic_codec.stored.array import StoredArray
from tests.common import check_rejects, photograph

pytestmark = pytest.mark.usefixtures("stub")
CHUNKS = (64, 64, 3)


def codec(**options):
    return DeepSIC(**{"transform": "wavelet", "quality": 30, "semantics": "none"} | options)


def scene():
    values = np.full((150, 100), 30.0)
    values[:64, :64] = 80
    values[64:96, 16:48] = 0
    return photograph(150, 100, 3), values


def payloads(array):
    return dict(StoredArray(array).reader.payloads(StoredArray(array).indices()))


@pytest.mark.parametrize("layout", [{}, {"zarr_format": 2}, {"shards": (128, 128, 3)}], ids=str)
def test_all_ways_write_the_same(layout):
    image, values = scene()
    array = create_array({}, data=image, chunks=CHUNKS, codec=codec(), quality_map=values, **layout)
    wanted = payloads(array)
    regions = []

    def part(region):
        regions.append(region)
        return values[region[:2]]

    for quality_map in (values, part):
        report = store(image, {}, name="a", chunks=CHUNKS, codec=codec(), quality_map=quality_map, **layout)
        assert payloads(report.array) == wanted
    assert len(regions) == 6 and (slice(128, 150), slice(64, 100), slice(0, 3)) in regions
    maps = {index: QUALITY_MAP in unpack(payload) for index, payload in wanted.items()}
    assert maps == {(0, 0, 0): False, (0, 1, 0): False, (1, 0, 0): True, (1, 1, 0): False} | {
        (2, 0, 0): False, (2, 1, 0): False
    }  # fmt: skip
    assert [chunk_attrs(array, index)["quality"] for index in ((0, 0, 0), (0, 1, 0))] == [80, 30]


def test_chunks_tell_of_their_map():
    image, values = scene()
    array = create_array({}, data=image, chunks=CHUNKS, codec=codec(), quality_map=values)
    one = chunk_attrs(array, (1, 0, 0))["quality_map"]
    assert one["min"] == 0 and one["max"] == 30 and 20 < one["mean"] < 30
    assert [attrs["quality_map"] for _, attrs in iter_chunk_attrs(array)].count(None) == 5
    mixed = create_array({}, data=image, chunks=(150, 100, 3), codec=codec(), quality_map=values)
    whole = chunk_attrs(mixed, (0, 0, 0))
    assert whole["quality"] == whole["quality_map"]["max"] == 80 and whole["quality_map"]["min"] == 0


@pytest.mark.parametrize("layout", [{}, {"shards": (256, 256, 3)}], ids=str)
def test_attributes_of_bands_of_several_resolutions(layout):
    """Those of the finest; others have cells of more pixels."""
    image = np.random.default_rng(0).integers(0, 4000, (256, 256, 3)).astype("u2")
    image[..., 1] = image[::2, ::2, 1].repeat(2, 0).repeat(2, 1)
    image[..., 2] = image[::4, ::4, 2].repeat(4, 0).repeat(4, 1)
    values = np.full(image.shape[:2], 20)
    values[:80, :16] = 60
    options = {"codec": codec(value_range=(0, 4000)), "quality_map": values, "chunks": (128, 128, 3)}
    attrs = chunk_attrs(create_array({}, data=image, **options, **layout), (0, 0, 0))["quality_map"]
    assert attrs == {"mean": pytest.approx(20 + 5 * 40 / 64, abs=1), "min": pytest.approx(20, abs=1), "max": 60}
    coarse = create_array({}, data=image[..., 1:], **options | {"chunks": (128, 128, 2)})
    assert chunk_attrs(coarse, (0, 0, 0))["quality_map"]["mean"] == pytest.approx(20 + 6 * 2 * 40 / 64, abs=1)
    assert chunk_attrs(coarse, (1, 1, 0))["quality_map"] is None
    bounded = create_array({}, data=image, chunks=(128, 128, 3), codec=DeepSIC(max_error=0))
    assert chunk_attrs(bounded, (0, 0, 0))["quality_map"] is None


def test_attributes_after_a_long_spectral_transform():
    """The table of resolutions is read as far as it reaches."""
    rng = np.random.default_rng(0)
    image = rng.normal(0, 300, (64, 64, 8)) @ rng.normal(0, 1, (8, 40)) + rng.normal(9000, 99, (64, 64, 40))
    image = image.astype("u2")
    image[..., 20:] = image[::2, ::2, 20:].repeat(2, 0).repeat(2, 1)
    values = np.full(image.shape[:2], 40)
    values[:16, :16] = 60
    options = {"codec": codec(value_range=(0, 18000)), "quality_map": values, "chunks": (64, 64, 40)}
    array = create_array({}, data=image, **options)
    payload = payloads(array)[0, 0, 0]
    entry = read_header(payload).entry(STRUCTURE.kind)
    assert table_length(payload[entry.offset :], read_header(payload), entry.length) > 512
    assert chunk_attrs(array, (0, 0, 0))["quality_map"]["max"] == 60


def test_labels_keep_their_quality():
    """The stub scores how bright a cell is."""
    image = np.full((128, 256, 3), 20, np.uint8)
    image[:, 128:] = 230
    image += np.random.default_rng(0).integers(0, 20, image.shape).astype("u1")
    array = create_array(
        {}, data=image, chunks=(128, 256, 3), codec=codec(semantics="pre"), keep={"Bright": 90, "~Bright & Dark": 0}
    )
    cells = unpack(payloads(array)[0, 0, 0]).read(QUALITY_MAP).cells[0]
    assert (cells[:, 8:] == 1).all() and (cells[:, :8] != 1).all()
    error = np.abs(array[...].astype(int) - image)
    assert error[:, 136:].mean() < 0.6 * error[:, :120].mean()
    unlabelled = create_array({}, data=image, chunks=(128, 256, 3), codec=codec(), keep={"Bright": 90})
    attrs = chunk_attrs(unlabelled, (0, 0, 0))
    assert attrs["labels"] is None and attrs["quality_map"]["max"] == 90 and attrs["quality_map"]["min"] < 31


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"keep": {"Rivr": 80}}, ExpressionError, "Rivr"),
        ({"keep": "River"}, ConfigurationError, "keep: expected a quality for each expression|'River'"),
        ({"keep": {"Bright >": 80}}, ExpressionError, "Bright >"),
        ({"keep": {"Bright": 300}}, ConfigurationError, "keep['Bright']|300"),
        ({"keep": {"Bright": float("nan")}}, ConfigurationError, "keep['Bright']|nan"),
        ({"keep": {"Bright": "80"}}, ConfigurationError, "keep['Bright']|'80'"),
        ({"quality_map": np.zeros((100, 150))}, ConfigurationError, "quality_map|shape (150, 100)"),
        ({"quality_map": np.zeros((150, 100)), "codec": codec(quality=None, rmse=1)}, ConfigurationError, "rmse"),
        ({"keep": {"Bright": 9}, "codec": codec(transform="features")}, ConfigurationError, "features"),
    ],
    ids=str,
)
def test_what_is_refused_leaves_nothing(options, error, words):
    target = {}
    options = {"chunks": CHUNKS, "codec": codec()} | options
    check_rejects(error, words, create_array, target, data=scene()[0], **options)
    assert not target
    with pytest.raises(error):
        store(scene()[0], {}, name="a", **options)


def test_a_function_may_return_anything():
    image, _ = scene()
    for part, words in ((lambda region: None, "shape ()"), (lambda region: np.zeros(3), "shape (3,)")):
        options = {"data": image, "chunks": CHUNKS, "codec": codec(), "quality_map": part}
        check_rejects(ConfigurationError, f"quality_map|{words}", create_array, {}, **options)
    check_rejects(ConfigurationError, "data=", create_array, {}, shape=(9, 9), dtype="u1", quality_map=np.zeros((9, 9)))
