"""The benchmarks of quality maps and of previews, on one small image."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("imagecodecs")

from benchmarks import preview, quality_map  # noqa: E402
from deepsic_codec.samples import drone_frame  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(drone_frame()[100:260, 200:360]).save(tmp_path / "a.png")
    return str(tmp_path)


def rows_of(printed):
    """Cells of the rows of a table, without its heading."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    return rows[2:]


def test_a_map_is_compared_with_one_quality(folder, capsys):
    code = quality_map.main(["--images", folder, "--size", "128"])
    printed = capsys.readouterr().out
    ((name, before, after, gain, overhead, *_),) = rows_of(printed)
    assert name.startswith("a") and float(gain) == pytest.approx(float(after) - float(before), abs=0.02)
    assert float(gain) > 3 and float(overhead) < 30
    assert "gain of at least 6 dB: " in printed and code == (0 if printed.count(": yes") == 3 else 1)


def test_starts_of_chunks_get_better(folder, capsys):
    assert preview.main(["--images", folder, "--size", "160", "--quality", "100"]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert [row[1] for row in rows] == ["1/16", "1/8", "1/4", "1/2", *(f"{share} %" for share in preview.SHARES)]
    sizes, decibels, peers = (np.array([float(row[column]) for row in rows]) for column in (2, 5, 6))
    order = sizes.argsort()
    assert (np.diff(decibels[order]) >= 0).all() and decibels[order[-1]] > decibels[order[0]] + 9
    assert (np.diff(peers[order]) >= 0).all() and rows[-1][3] == "100.00"
    assert printed.count(": yes") + printed.count(": no") == 4
