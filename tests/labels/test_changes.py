"""Changes along a time axis, against maps of the same labels."""

import json

import numpy as np
import pytest
from zarr.storage import LocalStore

from deepsic_codec import consolidate_labels, open_labels
from deepsic_codec.cli.main import main
from deepsic_codec.errors import ConfigurationError, ExpressionError, UnsupportedArray
from deepsic_codec.stored import coordinates
from deepsic_codec.stored.coordinates import Coordinate
from tests.common import check_rejects
from tests.labels.common import archive, fill

pytestmark = pytest.mark.usefixtures("stub")
DATES = ("2019-05-01T00:00:00", "2020-05-01T00:00:00", "2020-08-01T00:00:00", "2024-06-30T00:00:00")


def series(store=None, dates=DATES):
    """Four dates of four by six tiles, without labels at random."""
    array = archive(store, shape=(4, 256, 384), chunks=(1, 128, 128), axes="tyx")
    fill(array, seed=3, missing=0.25, unlabelled=0.1)
    if dates:
        times = np.array(dates, "M8[s]").astype("i8")
        about = {"units": "seconds since 1970-01-01"}
        coordinates.write(array.store_path, {"t": Coordinate(("t",), times, about)}, 3)
    return consolidate_labels(array)


def brute(labels, before, after, order):
    """Tiles and earlier positions, from maps; `before` and `after` take the scores of a tile."""
    maps = {name: labels.map(name) for name in ("Dark", "Dim", "Visible")}
    expected = []
    for y, x in np.ndindex(*labels.geometry.tile_grid[1:]):
        earlier = None
        for t in order:
            scores = {name: values[t, y, x] for name, values in maps.items()}
            if np.isnan(scores["Dark"]):
                continue
            if earlier is not None and before(earlier[1]) and after(scores):
                expected.append(((t, y, x), earlier[0]))
            earlier = t, scores
    return sorted(expected)


def changes(selection):
    return sorted(zip(map(tuple, selection.tiles.tolist()), selection.details["t_before"].tolist(), strict=True))


def is_dark(scores):
    return scores["Dark"] >= 0.5


def test_changes_are_those_that_maps_show():
    labels = series()
    found = labels.changes("Dark", "~Dark")
    assert changes(found) == brute(labels, is_dark, lambda s: not is_dark(s), range(4)) != []
    assert labels.changes(labels["Dark"] > 0.3, "Visible < .6").count > 0
    other = labels.changes("Dark > 0.3", "~(Visible > 0.7) | Dark")
    expected = brute(labels, lambda s: s["Dark"] > 0.3, lambda s: not s["Visible"] > 0.7 or is_dark(s), range(4))
    assert changes(other) == expected
    table = found.to_table()
    assert [DATES.index(date) for date in table["date"].astype(str)] == found.tiles[:, 0].tolist()
    assert [DATES.index(date) for date in table["date_before"].astype(str)] == table["t_before"].tolist()
    assert (table["score_Dark"] < 0.5).all() and "Dark, then ~Dark" in repr(found)
    assert found.chunks == sorted({(t, y // 2, x // 2) for t, y, x in found.tiles.tolist()})


@pytest.mark.parametrize(
    ("between", "positions"),
    [((0, -1), [0, 3]), (("2019", "2020"), [0, 2]), (("2020-05", "2024-06-30"), [1, 3]), ((1, 2), [1, 2])],
    ids=str,
)
def test_two_dates(between, positions):
    labels = series()
    found = labels.changes("Dark >= 0", "Dark >= 0", between=between)
    assert changes(found) == brute(labels, lambda s: True, lambda s: True, positions)


def test_dates_are_compared_in_their_order():
    labels = series(dates=DATES[::-1])
    found = labels.changes("Dark", "~Dark")
    assert changes(found) == brute(labels, is_dark, lambda s: not is_dark(s), [3, 2, 1, 0])
    check_rejects(ConfigurationError, "earlier date first", labels.changes, "Dark", "Dim", between=(0, 3))


@pytest.mark.parametrize(
    ("arguments", "between", "error", "words"),
    [
        (("Dark", "Dork"), None, ExpressionError, "did you mean Dark?"),
        (("Dark &", "Dim"), None, ExpressionError, "expected"),
        (("Dark", "Dim"), (0, 4), ConfigurationError, "0 to 3"),
        (("Dark", "Dim"), ("2018", "2024"), ConfigurationError, "'2018'|2019-05-01"),
        (("Dark", "Dim"), ("2024", "2019"), ConfigurationError, "earlier date first"),
        (("Dark", "Dim"), 3, ConfigurationError, "two dates"),
    ],
    ids=str,
)
def test_wrong_input(arguments, between, error, words):
    check_rejects(error, words, series().changes, *arguments, between=between)


def test_arrays_without_dates_or_time():
    check_rejects(
        ConfigurationError, "positions along axis t", series(dates=()).changes, "Dark", "Dim", between=("2019", "2024")
    )
    assert "date_before" not in series(dates=()).changes("Dark", "~Dark").to_table()
    array = archive()
    fill(array, seed=1)
    check_rejects(UnsupportedArray, "axis t", consolidate_labels(array).changes, "Dark", "Dim")


def test_nothing_is_decoded(stub):
    labels = series()
    stub.batches.clear()
    labels.changes("Dark", "~Dark").to_table()
    assert not stub.batches


def test_command(tmp_path, capsys):
    labels = series(LocalStore(tmp_path / "a.zarr"))
    expected = labels.changes("Dark", "~Dark", between=("2019", "2024"))
    arguments = ["changes", str(tmp_path / "a.zarr"), "Dark", "~Dark", "--between", "2019", "2024"]
    assert main([*arguments, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [tuple(line["chunk"]) for line in lines] == [(t, y // 2, x // 2) for t, y, x in expected.tiles.tolist()]
    assert {(line["date"], line["date_before"]) for line in lines} == {(DATES[3], DATES[0])}
    assert main(arguments) == 0
    assert f"{len(lines)} tiles in" in capsys.readouterr().out
    assert open_labels(labels.array).changes("Dark", "~Dark", between=(0, 3)).tiles.tolist() == expected.tiles.tolist()
