from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from deepsic_codec import require
from deepsic_codec.errors import ConfigurationError, MissingPackage
from deepsic_codec.io import compare
from deepsic_codec.io.peers import PEERS, Peer, match_bytes
from deepsic_codec.io.sources import open_sources
from deepsic_codec.metrics import psnr
from deepsic_codec.samples import eurosat_mosaic
from tests.common import check_lazy, check_rejects, photograph

pytest.importorskip("imagecodecs")


@pytest.fixture(scope="module")
def image():
    return eurosat_mosaic()[:192, :256]


@pytest.mark.parametrize("name", list(PEERS))
def test_peers_store_images(name, image):
    peer = PEERS[name]
    sizes = []
    for setting in (peer.settings[1], peer.settings[-2]):
        data = peer.encode(image, setting)
        assert type(data) is bytes
        decoded = peer.decode(data)
        assert decoded.shape == image.shape and decoded.dtype == np.uint8
        sizes.append((len(data), psnr(image, decoded)))
    assert sizes[0] < sizes[1] and sizes[0][1] > 18


@pytest.mark.parametrize("name", [name for name in PEERS if name in compare.DEFAULT])
def test_bytes_are_matched(name, image):
    target = 8000
    setting, data = match_bytes(PEERS[name], image, target)
    assert data == PEERS[name].encode(image, setting)
    assert abs(len(data) - target) <= (0.06 if PEERS[name].integer else 0.015) * target


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("limits", [(1, 100), (100, 1)])
def test_the_search_finds_the_nearest(limits, integer):
    rising = limits[0] < limits[1]
    tried = []

    def encode(x, setting):
        tried.append(setting)
        return bytes(round(setting**2 if rising else 10_000 / setting**2))

    peer = Peer("p", (1, 2), limits, encode, len, integer)
    for target in (1, 7, 100, 2500, 9999, 20_000):
        tried.clear()
        setting, data = match_bytes(peer, np.zeros((1, 1, 3), "u1"), target, tolerance=0)
        assert len(tried) <= 22 and len(set(tried)) == len(tried)
        if integer:
            sizes = {s: len(encode(None, s)) for s in range(1, 101)}
            assert abs(len(data) - target) == min(abs(size - target) for size in sizes.values())
        else:
            assert abs(len(data) - min(target, 10_000)) <= max(1, 0.001 * target)


def test_equal_bytes_side_by_side(stub, image):
    names = ["JPEG 4:2:0", "WebP"]
    ((name, original, results),) = compare.at_equal_bytes(
        [("one", image)], codecs=names, ours=compare.deepsic(chunk=128)
    )
    assert name == "one" and original is image
    assert [outcome.codec for outcome, _ in results] == [compare.OURS, *names]
    # The stand-in for the model is lossless: its bytes are more than a JPEG can use.
    np.testing.assert_array_equal(results[0][1], image)
    assert results[0][0].psnr == np.inf
    for outcome, pixels in results[1:]:
        assert outcome.psnr == pytest.approx(psnr(image, pixels))
        assert outcome.rmse == pytest.approx(255 / 10 ** (outcome.psnr / 20)) and outcome.largest >= outcome.rmse
        assert outcome.bpp == pytest.approx(8 * outcome.nbytes / (192 * 256))
    mean = compare.means([outcome for outcome, _ in results] * 2)
    assert [(one.codec, one.nbytes) for one in mean] == [(outcome.codec, outcome.nbytes) for outcome, _ in results]


def plain_peer(name):
    """A codec whose setting is the bytes it takes."""
    black = np.zeros((64, 64, 3), "u1")
    return Peer(name, (1,), (1, 10_000), lambda image, setting: bytes(round(setting)), lambda data: black)


@pytest.mark.parametrize("bpp", [None, 0.25])
def test_each_image_has_bytes_of_its_own(monkeypatch, bpp):
    """What DeepSIC took for one image is no target for the next."""
    ours = plain_peer(compare.OURS)
    if bpp is None:
        ours = replace(ours, encode=lambda image, setting: bytes(int(image[0, 0, 0])))
    monkeypatch.setitem(compare.PEERS, "plain", plain_peer("plain"))
    monkeypatch.setattr(compare, "require", lambda *names: None)
    images = [(str(value), np.full((64, 64, 3), value, "u1")) for value in (100, 200)]
    results = list(compare.at_equal_bytes(images, quality=50, bpp=bpp, codecs=["plain"], ours=ours))
    sizes = [[outcome.nbytes for outcome, _ in outcomes] for _, _, outcomes in results]
    targets = (100, 200) if bpp is None else (128, 128)
    assert sizes == [[pytest.approx(target, rel=0.01)] * 2 for target in targets]


def test_our_chunks_make_the_image(stub):
    values = photograph(100, 130, 3)
    ours = compare.deepsic(chunk=64)
    chunked = ours.encode(values, 50)
    assert len(chunked.payloads) == 6 and len(chunked) == sum(map(len, chunked.payloads))
    np.testing.assert_array_equal(ours.decode(chunked), values)


def test_options_reach_the_encoder(image):
    part = image[:96, :96]
    sizes = [len(compare.deepsic(**options).encode(part, 40)) for options in ({}, {"effort": 0})]
    assert sizes[0] < sizes[1]


def test_a_rate_is_found(image):
    """With the model itself: the stand-in has one rate."""
    quality, chunked = match_bytes(compare.deepsic(), image, 4000, tolerance=0.02)
    assert abs(len(chunked) - 4000) <= 0.04 * 4000 and 1 < quality < 100


def test_progress_counts_codecs_and_settings(stub, image):
    steps = []
    images = [("a", image), ("b", image)]
    options = {"codecs": ["WebP"], "progress": lambda *step: steps.append(step)}
    list(compare.at_equal_bytes(images, **options))
    assert steps == [(n, 4) for n in range(1, 5)]
    steps.clear()
    compare.curves(images, **options)
    assert steps == [(n, 12) for n in range(1, 13)]


def test_pictures_show_the_same_part(stub, image):
    _, _, results = next(compare.at_equal_bytes([("a", image)], codecs=["WebP"]))
    picture = np.asarray(compare.picture("a", image, results, crop=(20, 30)))
    part = image[20 : 20 + compare.PART[1], 30 : 30 + compare.PART[0]]
    enlarged = part.repeat(compare.ZOOM, axis=0).repeat(compare.ZOOM, axis=1)
    # Original and lossless stand-in: found twice in the sheet.
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], enlarged.shape[:2])
    corners = np.argwhere((windows[..., 0, 0] == enlarged[0, 0, 0]) & (windows[..., -1, -1] == enlarged[-1, -1, 0]))
    assert sum((windows[tuple(place)] == enlarged[..., 0]).all() for place in corners) == 2


def test_the_busiest_part_is_where_edges_are():
    flat = np.full((480, 640, 3), 100, "u1")
    flat[300:360, 400:480] = np.where(np.arange(80)[None, :, None] // 8 % 2, 20, 220)
    y, x = compare.busiest(flat)
    assert y <= 300 < y + compare.PART[1] and x <= 440 < x + compare.PART[0]
    assert compare.busiest(flat[:50, :60]) == (0, 0)


def test_curves_and_plot(stub, image, tmp_path):
    pytest.importorskip("matplotlib")
    found = compare.curves([("a", image)], codecs=["JPEG 4:2:0"])
    assert list(found) == [compare.OURS, "JPEG 4:2:0"]
    rates = [row.bpp for row in found["JPEG 4:2:0"]]
    assert len(rates) == compare.CURVE_POINTS and rates == sorted(rates)
    compare.plot(tmp_path / "c.png", found, "title")
    with Image.open(tmp_path / "c.png") as plot:
        assert plot.width > 1000 and len(np.unique(np.asarray(plot.convert("L")))) > 20


def test_photographs_are_told_from_data(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = photograph(64, 80, 3)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(values[:8]).save(tmp_path / "small.png")
    tifffile.imwrite(tmp_path / "deep.tif", values.astype("u2") * 9, photometric="rgb")
    tags = [(42113, "s", 0, "0", False)]  # GDAL's tag of the NoData value
    tifffile.imwrite(tmp_path / "scene.tif", values, photometric="rgb", extratags=tags)
    kinds = {source.name: compare.is_photograph(source) for source in open_sources([tmp_path])}
    assert kinds == {"a": True, "grey": False, "small": False, "deep": False, "scene": False}


def test_what_cannot_be_compared(image, monkeypatch):
    check_rejects(ConfigurationError, "'BPG'|WebP", compare.find_peers, ["BPG"])
    check_rejects(ConfigurationError, "chunk", compare.deepsic, chunk=0)
    monkeypatch.setattr(require, "find_spec", lambda name: None)
    check_rejects(MissingPackage, "imagecodecs|deepsic-codec[compare]", compare.find_peers, ["WebP"])
    check_rejects(MissingPackage, "matplotlib|pip install", compare.plot, "x.png", {}, "x")
    check_rejects(MissingPackage, "pillow|deepsic-codec[cli]", compare.picture, "x", image, [])
    check_rejects(MissingPackage, "imagecodecs", PEERS["WebP"].encode, image, 50)


def test_nothing_is_imported_before_it_is_needed():
    check_lazy(
        "import deepsic_codec.io.peers, deepsic_codec.io.compare, deepsic_codec.cli.main",
        unwanted=("torch", "imagecodecs", "matplotlib", "dask", "xarray"),
    )
