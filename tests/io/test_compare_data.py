"""Codecs compared on data: 16 bits of four bands with NoData, float32 with NaN, classes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, create_array, require
from deepsic_codec.cli.main import main
from deepsic_codec.errors import UnsupportedArray
from deepsic_codec.io import compare_data
from deepsic_codec.io.compare_data import BOUNDS, LOSSLESS, LOSSY, Level, Outcome, advise
from deepsic_codec.io.compare_data import compare_data as run
from deepsic_codec.io.ingest import closer_bound
from deepsic_codec.io.sources import open_sources
from tests.common import check_rejects, photograph

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

NODATA = 7
CODECS = ["JPEG 2000", "quantised JPEG XL e7", "bitshuffle Zstd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    values = photograph(96, 80, 3)[..., [0, 1, 2, 0]].astype("u2") * 20 + 300
    values[:30, 50:] = NODATA
    tags = [(42113, "s", 0, str(NODATA), False)]  # GDAL's tag of the NoData value
    options = {"planarconfig": "separate", "extratags": tags, "photometric": "minisblack"}
    tifffile.imwrite(folder / "deep.tif", np.moveaxis(values, -1, 0), **options)
    smooth = photograph(64, 72, 1)[..., 0] / np.float32(90)
    smooth[:9] = np.nan
    zarr.create_array(folder / "float.zarr", data=smooth.astype("f4"), dimension_names=["y", "x"])
    return folder


def sample_of(path, **options):
    (source,) = open_sources([path])
    return compare_data.take_sample(source, **options)


def test_samples_keep_dtype_bands_and_nodata(folder):
    sample = sample_of(folder / "deep.tif")
    (scene,) = sample.scenes
    assert scene.values.shape == (96, 80, 4) and scene.values.dtype == np.uint16 and scene.nodata == NODATA
    assert (~scene.valid).sum() == 30 * 30 * 4 and sample.peak == np.ptp(scene.values[scene.valid].astype(int))
    assert sample.codec.value_range is not None and sample.codec.nodata == NODATA
    real = sample_of(folder / "float.zarr").scenes[0]
    assert real.values.shape == (64, 72, 1) and not real.valid[:9].any() and real.valid[9:].all()


def test_chunks_of_a_large_array_are_those_with_data(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_data, "MAX_SAMPLES", 3 * 64 * 64)
    values = np.zeros((2, 512, 512), "u2")
    values[1, :128] = photograph(128, 512, 1)[..., 0] + 1
    zarr.create_array(tmp_path / "a.zarr", data=values, chunks=(1, 64, 64), dimension_names=["time", "y", "x"])
    sample = sample_of(tmp_path / "a.zarr", codec={"nodata": 0}, chunk=64)
    assert (len(sample.scenes), sample.chunks) == (3, 128)
    assert all(scene.valid.all() and scene.values.shape == (64, 64, 1) for scene in sample.scenes)
    # Without an edge that is passed, chunks get smaller until two of them fit.
    assert sample_of(tmp_path / "a.zarr").scenes[0].values.shape == (128, 128, 1)
    values[:] = 0
    zarr.create_array(tmp_path / "b.zarr", data=values, dimension_names=["time", "y", "x"])
    check_rejects(UnsupportedArray, "has data", sample_of, tmp_path / "b.zarr", codec={"nodata": 0})


def test_the_noise_sets_the_bound():
    rng = np.random.default_rng(0)
    slope = np.add.outer(np.arange(200.0), np.arange(300.0))[..., None] * 5
    scene = compare_data.Scene("s", np.rint(slope + rng.normal(0, 8, slope.shape)).astype("u2") + 0)
    assert compare_data._noise(scene) == pytest.approx(8, rel=0.05)


def test_rows_are_those_of_the_codec(folder):
    sample = sample_of(folder / "deep.tif")
    (scene,) = sample.scenes
    steps = []
    levels = compare_data.levels(sample, quality=[60], max_error=[4])
    assert [level.mode for level in levels] == [LOSSY, BOUNDS, LOSSLESS]
    results = list(run(sample, levels, codecs=CODECS, failed=pytest.fail, progress=lambda *step: steps.append(step)))
    assert steps[-1][0] == steps[-1][1] == len(steps)
    for level, (ours, *peers) in results:
        codec = sample.codec.changed(**compare_data.NO_TARGET | level.parameters)
        payload = codec.encode(scene.values)
        error = (codec.decode(payload).astype(float) - scene.values)[scene.valid]
        assert (ours.codec, ours.nbytes) == ("DeepSIC", len(payload)) and peers
        assert ours.rmse == np.sqrt(np.square(error).mean()) and ours.largest == np.abs(error).max()
        assert ours.ratio == scene.values.nbytes / len(payload)
        if level.mode == LOSSY:
            assert ours.psnr == pytest.approx(20 * np.log10(sample.peak / ours.rmse))
            assert all(abs(peer.nbytes - ours.nbytes) < 0.04 * ours.nbytes for peer in peers)
        else:
            assert all(row.largest <= level.target for row in (ours, *peers))
    assert {row.codec for _, rows in results for row in rows} == {"DeepSIC", *CODECS}
    assert {row.bands for row in results[0][1][1:]} == {"all", "threes", "alone"}


def test_floats_are_within_bounds_and_peers_alone_store_them_without_loss(folder):
    sample = sample_of(folder / "float.zarr")
    levels = compare_data.levels(sample, max_error=[0.02])
    (_, bound), (_, lossless) = results = list(run(sample, levels, codecs=["LERC Zstd", *CODECS]))
    assert {row.codec for row in lossless} == {"bitshuffle Zstd", "LERC Zstd"} and bound[0].codec == "DeepSIC"
    assert [advice.level.mode for advice in advise(results, asked=True)] == [BOUNDS]


def test_classes_are_compared_without_loss(folder):
    sample = sample_of(folder / "deep.tif")
    sample = replace(sample, source=replace(sample.source, lossless=True))
    assert [level.mode for level in compare_data.levels(sample, quality=[50])] == [LOSSLESS]


def outcome(codec, nbytes, rmse=0.0):
    return Outcome(codec, "all", 0, nbytes, 2.0, 4.0, rmse, 2 * rmse, 40.0, 1.0, 1.0)


def test_masks_are_compared_without_loss(tmp_path):
    mask = photograph(64, 72, 1)[..., 0] > 99
    zarr.create_array(tmp_path / "mask.zarr", data=mask, dimension_names=["y", "x"])
    sample = sample_of(tmp_path / "mask.zarr")
    ((level, rows),) = run(sample, compare_data.levels(sample, max_error=[1]), codecs=CODECS, failed=pytest.fail)
    assert level.mode == LOSSLESS and {row.codec for row in rows} == {"DeepSIC", "JPEG 2000", "bitshuffle Zstd"}


def test_advice_is_honest():
    lossy = Level(LOSSY, 50.0, {"quality": 50.0}), [outcome("DeepSIC", 100, 3.0), outcome("p", 99, 2.0)]
    bound = Level(BOUNDS, 2.0, {"max_error": 2.0}), [outcome("DeepSIC", 200, 1.0), outcome("q", 250, 1.0)]
    lossless = Level(LOSSLESS, 0.0, {"max_error": 0.0}), [outcome("DeepSIC", 210), outcome("r", 200)]
    first, second, third = advise([lossy, bound, lossless], asked=False)
    assert (first.level.mode, second.level.mode, third.level.mode) == (LOSSLESS, LOSSY, BOUNDS)
    assert first.text == "5.0 % more bytes than r, the best of the others"
    assert second.text == "RMSE 50.0 % larger than that of p, the best of the others, in as many bytes"
    assert third.text == "20.0 % fewer bytes than q, the best of the others"
    large = lossless[0], [outcome("DeepSIC", 400), outcome("r", 500)]
    assert advise([lossy, bound, large], asked=False)[0].level.mode == BOUNDS
    assert [one.level.mode for one in advise([lossy, bound, lossless], asked=True)] == [BOUNDS, LOSSY, LOSSLESS]


def test_the_command_ends_with_the_line_to_use(folder, tmp_path, capsys):
    assert main(["compare", str(folder / "deep.tif"), "--max-error", "3", "--codecs", *CODECS]) == 0
    *_, use, code, command = capsys.readouterr().out.splitlines()
    assert use.startswith("To use: DeepSIC(max_error=3), in Python for values with axes yxc")
    values = np.moveaxis(tifffile.imread(folder / "deep.tif"), 0, -1)
    assert command.split() == ["deepsic", "ingest", str(folder / "deep.tif"), "archive.zarr", "--max-error", "3"]
    names = {"create_array": create_array, "DeepSIC": DeepSIC, "values": values}
    z = eval(code.replace("archive.zarr", str(tmp_path / "archive.zarr")), names)
    assert (
        np.abs(z[:].astype(int) - values)[values != NODATA].max() <= 3
        and ((z[:] == NODATA) == (values == NODATA)).all()
    )


def test_the_command_says_that_another_codec_is_better(folder, capsys, monkeypatch):
    monkeypatch.setattr(compare_data.Advice, "change", 5.0)
    assert main(["compare", str(folder / "deep.tif"), "--max-error", "3", "--codecs", "LERC Zstd"]) == 0
    assert "Here, LERC Zstd is better than DeepSIC.\nTo use: DeepSIC(max_error=3)" in capsys.readouterr().out


def test_the_command_reads_archives(folder, tmp_path, capsys):
    assert main(["ingest", str(folder / "deep.tif"), str(tmp_path / "a.zarr"), "--max-error", "9"]) == 0
    assert main(["compare", str(tmp_path / "a.zarr"), "--max-error", "9", "--codecs", "LERC Zstd"]) == 0
    out = capsys.readouterr().out
    assert "deep: 96 x 80 x 4 (yxc) uint16, NoData 7" in out and "left out" not in out


def test_arrays_without_data_are_left_out(folder, tmp_path, capsys):
    zarr.create_array(tmp_path / "empty.zarr", shape=(0, 40, 50), dtype="u1", dimension_names=["time", "y", "x"])
    options = ["--max-error", "9", "--codecs", "LERC Zstd"]
    assert main(["compare", str(tmp_path / "empty.zarr"), *options]) == 1
    assert main(["compare", str(tmp_path / "empty.zarr"), str(folder / "deep.tif"), *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("left out: empty: ") and "To use: DeepSIC(max_error=9)" in out


def test_the_command_prints_json(folder, capsys):
    assert (
        main(["compare", str(folder), str(folder / "float.zarr"), "--rmse", "0.2", "--codecs", *CODECS, "--json"]) == 0
    )
    deep, real = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["data"]
    assert (deep["name"], deep["nodata"], deep["use"]) == ("deep", NODATA, "DeepSIC(rmse=0.2)")
    assert (real["dtype"], real["levels"][0]["rows"][0]["codec"]) == ("float32", "DeepSIC")


def test_codecs_that_are_not_installed_are_named_with_the_hint(folder, capsys, monkeypatch):
    find = require.find_spec
    monkeypatch.setattr(require, "find_spec", lambda name: None if name == "imagecodecs" else find(name))
    assert main(["compare", str(folder / "deep.tif"), "--max-error", "3"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("not compared:")]
    assert all(name in line for name in compare_data.DEFAULT) and "deepsic-codec[compare]" in line
    assert "DeepSIC(max_error=3): no other codec was measured" in out


def test_a_bound_that_is_smaller_and_closer_is_hinted_at(tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 2, (64, 64), "u2") * 40_000
    values[:2] = np.arange(128).reshape(2, 64) * 5  # fewer values would be stored without loss
    codec = DeepSIC(axes="yx", quality=90, effort=0, semantics="none", value_range=(0, 40_000))
    payload = codec.encode(values)
    bound = closer_bound(codec, values, codec.decode(payload), len(payload))
    bounded = codec.changed(quality=None, max_error=bound)
    assert len(bounded.encode(values)) < len(payload)
    assert closer_bound(bounded, values, values, len(payload)) is None
    smooth = photograph(64, 64, 1)[..., 0].astype("u2") * 100
    payload = codec.encode(smooth)
    assert closer_bound(codec, smooth, codec.decode(payload), len(payload)) is None
    tifffile.imwrite(tmp_path / "a.tif", values)
    options = ["--quality", "90", "--effort", "0", "--semantics", "none"]
    for more in (["--dry-run"], []):
        assert main(["ingest", str(tmp_path / "a.tif"), str(tmp_path / "o.zarr"), *options, *more]) == 0
        assert "would be smaller and closer" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "a.tif"), "--quality", "90", "--effort", "0", "--codecs", "LERC Zstd"]) == 0
    assert "is smaller and closer" in capsys.readouterr().out
