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
from deepsic_codec.labels import query
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


def picture(text):
    from PIL import Image

    (data,) = re.findall(r"base64,([^\"]+)", text)
    return np.asarray(Image.open(BytesIO(b64decode(data))))


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_a_report_shows_the_image_and_what_is_known(stub, bands):
    image = photograph(180, 200, bands)
    attributes = {"crs": HOSTILE, "long_name": [HOSTILE] * bands}
    codec = DeepSIC(max_error=0)
    report = deepsic_dask.store(image, {}, name="a", codec=codec, chunks=(64, 64, bands), attributes=attributes)
    text = check_html(report._repr_html_())
    for word in ("180 x 200 x", "lossless", "&lt;script&gt;", f"{report.nbytes:,}", "12 written"):
        assert word in text
    shown = picture(text).astype(float)
    assert shown.shape == ((22, 25, 3) if bands > 1 else (22, 25))
    small = image[:176, :200].reshape(22, 8, 25, 8, bands).mean(axis=(1, 3))[..., 0]
    assert np.corrcoef(shown.reshape(22, 25, -1)[..., 0].ravel(), small.ravel())[0, 1] > 0.9


def test_large_arrays_are_not_read(stub, monkeypatch):
    monkeypatch.setattr(deepsic_dask, "MAX_PICTURE", 100)
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
    shown, names = picture(text), labels.vocabulary.names
    assert shown.shape == (84, 126, 3)
    best = np.array([labels.index.read([(labels.index.scores, (row,))])[0] for row in range(len(names))]).argmax(0)
    for (y, x), number in np.ndenumerate(best[..., 0]):
        assert tuple(shown[42 * y + 20, 42 * x + 20].tolist()) == colours(labels.vocabulary.known)[names[number]]
    for name, count in labels.summary()["classes"].items():
        assert (f"<th>{name}</th><td style" in text) == (count > 0)
        assert not count or f"<th>{name}</th><td style=" in text and f">{count}</td>" in text
    selection = labels.where("Visible")
    text = check_html(selection._repr_html_())
    assert f"{selection.count} of 6 chunks" in text and str(selection.expression) in unescape(text)
    grid = picture(text)
    assert grid.shape == (84, 126)
    np.testing.assert_array_equal(grid[21::42, 21::42] == 255, selection.mask[..., 0])
