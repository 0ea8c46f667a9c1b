"""What a notebook shows of reports, labels and selections."""

import re
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest

from deepsic_codec import DeepSIC, consolidate_labels, create_array, open_labels
from deepsic_codec import dask as deepsic_dask
from deepsic_codec.bulk import preview
from deepsic_codec.labels import query, thumbnails
from deepsic_codec.labels.colours import colours
from tests.common import photograph

HOSTILE = "<script>alert(1)</script>"


def check_html(text):
    """Only tags of a table and a picture."""
    tags = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.add(tag)
    parser.feed(text)
    assert tags <= {"div", "img", "table", "tr", "th", "td"} and "<script" not in text
    return text


def pictures(text):
    from PIL import Image

    return [np.asarray(Image.open(BytesIO(b64decode(data)))) for data in re.findall(r"base64,([^\"]+)", text)]


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_a_report_shows_the_image_and_what_is_known(stub, bands):
    image = photograph(180, 200, bands)
    attributes = {"crs": HOSTILE, "long_name": [HOSTILE] * bands}
    codec = DeepSIC(max_error=0)
    report = deepsic_dask.store(image, {}, name="a", codec=codec, chunks=(64, 64, bands), attributes=attributes)
    text = check_html(report._repr_html_())
    for word in ("180 x 200 x", "lossless", "&lt;script&gt;", f"{report.nbytes:,}", "12 written"):
        assert word in text
    (shown,) = pictures(text)
    assert shown.shape == (22, 25, 3)
    small = image[:176, :200].reshape(22, 8, 25, 8, bands).mean(axis=(1, 3))[..., 0]
    assert np.corrcoef(shown[..., 0].ravel(), small.ravel())[0, 1] > 0.9


def test_large_arrays_are_not_read(stub, monkeypatch):
    monkeypatch.setattr(preview, "MAX_PICTURE", 100)
    assert "<img" not in deepsic_dask.store(photograph(64, 64, 3), {}, name="a")._repr_html_()


def test_a_large_index_is_not_read(stub, monkeypatch):
    labels = consolidate_labels(create_array({}, name="a", data=photograph(128, 192, 3), chunks=(64, 64, 3)))
    monkeypatch.setattr(query, "MAX_SUMMARY", 10)
    monkeypatch.setattr(labels.index, "read", None)  # so that reading fails
    text = check_html(labels._repr_html_())
    assert "<img" not in text and "summary() counts them" in text


def test_labels_and_selections_show_themselves(stub):
    array = create_array({}, name="a", data=photograph(128, 192, 3), chunks=(64, 64, 3))
    labels = open_labels(array, scan=True)
    text = check_html(labels._repr_html_())
    assert "Dark" in text and "128 x 192 x 3" in text
    (shown, *examples), names = pictures(text), labels.vocabulary.names
    assert shown.shape == (84, 126, 3)
    assert len(examples) == min(6, sum(count > 0 for count in labels.summary()["classes"].values()))
    assert all(one.shape == (64, 64, 3) for one in examples)
    best = np.array([labels.index.read([(labels.index.scores, (row,))])[0] for row in range(len(names))]).argmax(0)
    for (y, x), number in np.ndenumerate(best[..., 0]):
        assert tuple(shown[42 * y + 20, 42 * x + 20].tolist()) == colours(labels.vocabulary.known)[names[number]]
    for name, count in labels.summary()["classes"].items():
        assert (f"<th>{name}</th><td style" in text) == (count > 0)
        assert not count or f"<th>{name}</th><td style=" in text and f">{count} " in text
    selection = labels.where("Visible")
    text = check_html(selection._repr_html_())
    assert f"{selection.count} of 6 chunks" in text and str(selection.expression) in unescape(text)
    grid, sheet = pictures(text)
    assert grid.shape == (84, 126) and sheet.shape == (64, 68 * min(6, selection.count) - 4, 3)
    np.testing.assert_array_equal(grid[21::42, 21::42] == 255, selection.mask[..., 0])


LEVELS = np.array([[20, 90], [140, 220]])


def levels(**options):
    """Labels of chunks of 128 x 128 pixels, each of one level, but for its first tile, which has 30 more."""
    pixels = LEVELS.repeat(128, 0).repeat(128, 1)
    for y, x in np.ndindex(2, 2):
        pixels[128 * y : 128 * y + 64, 128 * x : 128 * x + 64] += 30
    pixels = pixels[..., None].repeat(3, 2)
    codec = DeepSIC(label_tile=64, max_error=0)
    values = pixels.astype(options.get("dtype", "u1"))
    return consolidate_labels(create_array({}, name="a", data=values, chunks=(128, 128, 3), codec=codec))


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_thumbnails_are_those_of_regions(stub, dtype):
    labels = levels(dtype=dtype)
    chunks, tiles = labels.where("Visible | ~Visible"), labels.where("Visible | ~Visible", tiles=True)
    (_, sheet), (_, tile_sheet) = (pictures(one._repr_html_()) for one in (chunks, tiles))
    assert sheet.shape == (64, 4 * 68 - 4, 3) and tile_sheet.shape == (64, 6 * 68 - 4, 3)
    seen = [sheet[50, 68 * k + 10, 0] for k in range(4)]
    expected = LEVELS.ravel() if dtype == "u1" else (LEVELS.ravel() - 20) * 255 // 230
    np.testing.assert_allclose(seen, expected, atol=2)
    values = np.array([np.asarray(labels.array[region]).mean() for region in tiles.regions[:6]])
    expected = values if dtype == "u1" else (values - values.min()) * 255 / np.ptp(values)
    np.testing.assert_allclose([tile_sheet[10, 68 * k + 10, 0] for k in range(6)], expected, atol=2)


def test_a_notebook_shows_what_it_can(stub, monkeypatch):
    labels = levels()
    selection = labels.where("Visible | ~Visible")
    monkeypatch.setattr(thumbnails, "MAX_SAMPLES", 4 * 128 * 128 * 3 - 1)
    assert len(pictures(check_html(selection._repr_html_()))) == 1, "as many samples take long"
    monkeypatch.undo()
    key = next(key for key in labels.array.store._store_dict if key.endswith("/c/0/1/0"))
    damaged = labels.array.store._store_dict[key]
    labels.array.store._store_dict[key] = type(damaged).from_bytes(damaged.to_bytes()[:-20])
    for _ in range(2):  # a damaged chunk, a chunk that was deleted
        text = check_html(selection._repr_html_())
        sheet = pictures(text)[1]
        assert "<th>not shown</th><td>0.1.0: " in text and sheet.shape == (64, 4 * 68 - 4, 3)
        assert [sheet[50, 68 * k + 10, 0] for k in (0, 2, 3)] == LEVELS.ravel()[[0, 2, 3]].tolist()
        assert sorted(np.unique(sheet[:, 68:132])) == [thumbnails.INK, thumbnails.PAPER], "a cross"
        assert all(picture.shape for picture in pictures(check_html(labels._repr_html_())))
        labels.array.store._store_dict.pop(key, None)
    for other in [key for key in labels.array.store._store_dict if "/c/" in key and "_labels" not in key]:
        del labels.array.store._store_dict[other]
    assert len(pictures(check_html(selection._repr_html_()))) == 1, "no chunk is left"
    assert len(pictures(check_html(labels.where("~Visible & Visible")._repr_html_()))) == 1, "nothing selected"


def test_large_archives_keep_it_small(stub):
    """Some dozens of kilobytes, whatever the array has."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 768, 3)).astype("u1")
    labels = consolidate_labels(create_array({}, name="a", data=noise, chunks=(64, 64, 3), codec=DeepSIC(max_error=0)))
    assert len(labels.where("Visible | ~Visible")._repr_html_()) < 120_000 and len(labels._repr_html_()) < 150_000
