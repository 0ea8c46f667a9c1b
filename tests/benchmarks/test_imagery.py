"""The benchmark of scientific imagery on two synthetic scenes: 16 bits of three bands with NoData, and float32."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import imagery
from deepsic_codec.io.peers import AS_IS, BAND_PEERS
from tests.common import photograph

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

NODATA = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    values = photograph(96, 80, 3).astype("u2") * 20 + 300
    values[:30, 50:] = NODATA
    tags = [(42113, "s", 0, str(NODATA), False)]  # GDAL's tag of the NoData value
    options = {"planarconfig": "separate", "extratags": tags}
    tifffile.imwrite(folder / "deep.tif", np.moveaxis(values, -1, 0), photometric="minisblack", **options)
    rng = np.random.default_rng(0)
    smooth = photograph(64, 72, 1)[..., 0] / np.float32(90) + rng.normal(0, 0.02, (64, 72))
    smooth[:9] = np.nan
    tifffile.imwrite(folder / "float.tif", smooth.astype("f4"))
    return folder


@pytest.fixture(scope="module")
def scenes(folder):
    return {scene.name: scene for scene in imagery.read_scenes([folder], [])}


def test_scenes_keep_dtype_bands_and_nodata(scenes, folder):
    deep, real = scenes["deep"], scenes["float"]
    assert deep.values.shape == (96, 80, 3) and deep.values.dtype == np.uint16 and deep.nodata == NODATA
    assert real.values.shape == (64, 72, 1) and real.values.dtype == np.float32 and real.nodata == "NaN"
    assert (~deep.valid).sum() == 30 * 30 * 3 and not real.valid[:9].any() and real.valid[9:].all()
    assert deep.filled[0, 79, 1] == np.rint(deep.values[..., 1][deep.valid[..., 1]].mean())
    assert imagery.parameters(deep)["value_range"] == (deep.values[deep.valid].min(), deep.values.max())
    assert [scene.name for scene in imagery.read_scenes([folder], ["fl*"])] == ["float"]


def test_a_band_that_is_called_transparency_is_a_band(tmp_path):
    values = np.arange(4 * 32 * 32, dtype="u1").reshape(4, 32, 32)
    options = {"photometric": "rgb", "planarconfig": "separate", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(tmp_path / "rgbn.tif", values, **options)
    np.testing.assert_array_equal(imagery.read_scene(tmp_path / "rgbn.tif").values, np.moveaxis(values, 0, -1))


def test_the_benchmark(folder, tmp_path, capsys, monkeypatch):
    out, picture = tmp_path / "rows.json", tmp_path / "curves.png"
    command = ["--scenes", str(folder), "--bits", "0.5", "2", "--bounds", "4", "--json", str(out), "--resume"]
    assert imagery.main([*command, "--chunked", "--plot", str(picture)]) == 0
    printed, progress = capsys.readouterr()
    assert "Left out" not in printed and picture.stat().st_size > 1000
    assert "## Summary of DeepSIC\n" in printed and "## Summary of DeepSIC, chunks and labels\n" in printed
    assert len(progress.splitlines()) == 2 and "deep: best in " in progress
    rows = json.loads(out.read_text())
    codecs = {(row["scene"], row["codec"], row["mode"]) for row in rows}
    assert {name for scene, name, mode in codecs if scene == "deep"} >= {"DeepSIC", imagery.KLT, *BAND_PEERS}
    assert not any(mode == "lossless" for scene, _, mode in codecs if scene == "float")
    assert {group for row in rows if (group := row["group"]).endswith(AS_IS)}
    for row in rows:
        if row["mode"] == "lossless":
            assert row["rms"] == 0
        if (row["scene"], row["mode"]) == ("deep", "bounds"):
            assert row["largest"] <= 4

    # the second run measures nothing
    def measured_again(*arguments):
        raise RuntimeError("measured again")

    for name in ("ours", "measure_peer", "measure_klt"):
        monkeypatch.setattr(imagery, name, measured_again)
    assert imagery.main(command) == 0
    assert json.loads(out.read_text()) == rows and "Left out" not in capsys.readouterr().out


def test_failures_of_deepsic_are_printed_and_set_the_status(folder, capsys, monkeypatch):
    def fails(*arguments):
        raise ValueError("not what was stored")

    monkeypatch.setattr(imagery, "ours", fails)
    monkeypatch.setattr(imagery, "BAND_PEERS", {})
    assert imagery.main(["--scenes", str(folder / "float.tif"), "--only", "bounds", "--bounds", "4"]) == 1
    assert "float, DeepSIC , bounds 4: not what was stored" in capsys.readouterr().out


def row(codec, bits, rms, group="alone", mode="lossy", target=0.0):
    return imagery.Row("s", codec, group, mode, target, bits, rms, 2 * rms, 1.0, 1.0)


def test_errors_are_interpolated_at_equal_bytes():
    rows = [row("p", 0.5, 8.0), row("p", 2.0, 2.0), row("p", 1.0, 6.0, "all"), row("p", 4.0, 0.0, "all", "lossless")]
    assert imagery.at_bits(rows, 1.0).rms == pytest.approx(4)  # of the group with the smaller error
    assert imagery.at_bits(rows, 3.9).rms == 2 and imagery.at_bits(rows, 0.495).rms == pytest.approx(8)
    assert imagery.at_bits(rows, 0.4) is None
    assert imagery.at_bits(rows, 4.0).rms == 0


def test_peers_that_come_near_are_measured_between_settings(scenes, monkeypatch):
    """Rates that change by large factors from one setting to the next."""
    results, rates = imagery.Results(None, False), []

    def measured(scene, peer, group, mode, setting):
        rates.append(2.0**-12 * setting**-3)
        return replace(row(peer.name, rates[-1], rates[-1] ** -0.5, group, mode, setting), scene=scene.name)

    monkeypatch.setattr(imagery, "measure_peer", measured)
    for error, closes in ((1.0, True), (0.5, False)):
        rates.clear()
        imagery._ladder(results, scenes["deep"], "JPEG 2000", f"alone, {error}", [row("DeepSIC", 1.0, error, "")])
        low, high = max(rate for rate in rates if rate < 1), min(rate for rate in rates if rate >= 1)
        assert (high <= imagery.APART * low) == closes


def test_wins_and_losses():
    peers = [row("p", 0.5, 8.0), row("p", 2.0, 2.0), row("q", 3.0, 0.0, mode="lossless")]

    def won(bits, rms):
        one = imagery.compare([row("DeepSIC", bits, rms, "", target=1.0), *peers], "DeepSIC", "lossy", 1.0)
        return one.won, one.ratio

    assert won(1.0, 3.9) == (True, pytest.approx(3.9 / 4)) and won(1.0, 4.1) == (False, pytest.approx(4.1 / 4))
    assert won(3.1, 0.1) == (False, np.inf) and won(3.1, 0.0) == (False, 1) and won(2.9, 0.0) == (True, 0)


def test_bytes_saved():
    peers = [row("p", bits, 4 / bits) for bits in (0.25, 0.5, 1, 2, 4)]
    rows = [*peers, *(row("DeepSIC", bits, 2 / bits, "") for bits in (0.25, 0.5, 1, 2))]
    assert imagery.bytes_saved(rows, "DeepSIC", ["p", "q"]) == pytest.approx(-50, abs=0.5)
    assert np.isnan(imagery.bytes_saved(rows, "DeepSIC", ["q"]))


def test_the_klt_decorrelates_edges():
    grey = photograph(64, 64, 1).astype(float)
    bands = grey * [1, 2, 3, 4] + np.random.default_rng(0).normal(0, 1, (64, 64, 4))
    matrix = imagery.klt(bands)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(4), atol=1e-6)
    energy = np.square(np.diff(bands @ matrix, axis=0)).sum((0, 1))
    assert energy[0] > 20 * energy[1:].sum()


def test_jpeg_2000_of_the_klt_reaches_every_error():
    scene = imagery.Scene("s", photograph(64, 64, 3)[..., [0, 1, 2, 0]])
    for share in (0.1, 0.05, 0.02):
        row = imagery.measure_klt(scene, share)
        assert 0.7 * share < row.rms / scene.deviation < 1.3 * share


def test_the_klt_of_three_bands_is_not_transformed_again():
    grey = photograph(128, 128, 1).astype(float) + np.random.default_rng(0).normal(0, 8, (128, 128, 1))
    scene = imagery.Scene("s", np.clip(np.repeat(grey, 3, axis=2), 0, 255).astype("u1"))
    alone = imagery.Scene("s", scene.values[..., :1])
    row, band = (
        imagery.measure_klt(scene, 0.1),
        imagery.measure_peer(alone, BAND_PEERS["JPEG 2000"], "alone", "lossy", 0.1),
    )
    assert row.bits < 0.5 * band.bits


def test_nodata_that_does_not_survive_does_not_count(scenes):
    values = scenes["deep"].values.copy()
    values[50, 50] = NODATA + 1
    scene = imagery.Scene("close", values, NODATA)
    peer = BAND_PEERS["JPEG-LS"]
    rows = [imagery.measure_peer(scene, peer, "alone" + way, "bounds", 4) for way in (AS_IS, "")]
    assert [row.kept for row in rows] == [False, True] and rows[1].largest <= 4
    assert imagery.measure_peer(scene, peer, "alone" + AS_IS, "lossless", 0).kept
    first = row("DeepSIC", 1.0, 2.0, "", "bounds", 4.0)
    rows = [replace(row("p", 0.5, 2.0, "alone", "bounds", 4.0), kept=False), row("p", 2.0, 2.0, "all", "bounds", 4.0)]
    assert imagery.compare([first, *rows], "DeepSIC", "bounds", 4.0).peers == rows[1:]


def test_a_broken_bound_is_an_error(scenes):
    scene = scenes["deep"]
    with pytest.raises(ValueError, match=r"deep, JPEG-LS, alone: error"):
        scene.measure("JPEG-LS", "alone", "bounds", 4, lambda: [b"."], lambda stored: scene.values + np.uint16(5))
