import re
import subprocess
import sys

import numpy as np
import pytest
import zarr
from PIL import Image

from deepsic_codec.cli.main import main
from deepsic_codec.metrics import psnr
from deepsic_codec.samples import drone_frame, eurosat_classes, eurosat_mosaic

METADATA = {"zarr.json", ".zarray", ".zattrs", ".zgroup"}


@pytest.mark.parametrize(
    "arguments",
    [[], ["nothing"], ["demo", "--format", "4"], ["demo", "--quality", "101"], ["demo", "--quality", "good"]],
)
def test_misuse_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("deepsic")


def test_failure_is_one_line_and_a_traceback_only_with_debug(tmp_path, capsys):
    occupied = tmp_path / "file"
    occupied.touch()
    assert main(["demo", "--out", str(occupied)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("deepsic demo: error: ") and "file" in line
    with pytest.raises(FileExistsError):
        main(["--debug", "demo", "--out", str(occupied)])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_demo_stores_what_it_prints(zarr_format, tmp_path, capsys):
    assert main(["demo", "--format", str(zarr_format), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name, image in {"mosaic": eurosat_mosaic(), "drone": drone_frame()}.items():
        array = zarr.open(tmp_path / "demo.zarr" / name, mode="r")
        assert array.metadata.zarr_format == zarr_format
        files = [f for f in (tmp_path / "demo.zarr" / name).rglob("*") if f.is_file() and f.name not in METADATA]
        stored = sum(f.stat().st_size for f in files)
        assert len(files) == 12 and stored < image.nbytes / 8
        (row,) = [line for line in printed.splitlines() if f"{image.nbytes:,}" in line]
        assert name in row and f"{stored:,}" in row and f"{psnr(image, array[:]):.2f}" in row
    with Image.open(tmp_path / "before-after.png") as picture:
        assert picture.width > 1500 and len(np.unique(np.asarray(picture)[::8, ::8])) > 100


def test_demo_finds_most_labels_and_answers_its_query_from_headers(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (agreeing,) = re.findall(r"true classes on (\d+) of 192 tiles", printed)
    assert int(agreeing) > 0.7 * 192
    (read,) = re.findall(r"Found by reading ([\d,]+) bytes", printed)
    assert int(read.replace(",", "")) <= 12 * 256
    found, water = (
        {w for w in line.split() if w[0].isdigit() and "." in w}
        for line in printed.splitlines()
        if line.strip().startswith(("labels:", "true classes:"))
    )
    assert water == {
        f"{r // 4}.{c // 4}"
        for r, row in enumerate(eurosat_classes())
        for c, name in enumerate(row)
        if name in ("River", "SeaLake")
    }
    assert len(found & water) >= len(water) - 1 and len(found) < 12


def test_help_and_version_do_not_import_torch():
    code = "import sys; from deepsic_codec.cli.main import _parser; _parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
