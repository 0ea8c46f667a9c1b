"""Every example runs as a user runs it, in small, and writes the pictures that it says it writes."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.common import ROOT

EXAMPLES = ROOT / "examples"
ARGUMENTS = {
    "quickstart": ["--size", "256"],
    "xarray_dask": ["--days", "2", "--size", "512"],
    "s3_query": [],
    "own_labels": ["--steps", "20", "--minutes", "2"],
    "compare_codecs": ["--size", "256", "--codecs", "JPEG 4:2:0", "WebP"],
}
# What an example prints that only a sound run prints.
PRINTED = {
    "quickstart": r"formats agree: True\n(.|\n)*PSNR 3\d\.\d",
    "xarray_dask": r"8 chunks in [\d,]+ bytes(.|\n)*of 8 chunks show sea or lake, found by reading \d+ bytes",
    "s3_query": r"River > 0\.5: [1-9] of 12 chunks, by reading",
    "own_labels": r"new names: Field, Town, Wet, Wood, unknown(.|\n)*([5-9]\d) of 96 test tiles have the right label",
    "compare_codecs": r"DeepSIC +[\d,]+(.|\n)*WebP +[\d,]+",
}
PACKAGES = {
    "xarray_dask": ["dask", "xarray"],
    "s3_query": ["moto", "s3fs"],
    "compare_codecs": ["imagecodecs", "matplotlib"],
}


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*ARGUMENTS, "migrate"}  # tests/ecosystem/test_migrate.py


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_example(name, tmp_path, monkeypatch, capsys):
    """Examples run in this process, which has imported their packages already, as `tests/docs` runs pages."""
    for package in PACKAGES.get(name, []):
        pytest.importorskip(package)
    arguments = [str(EXAMPLES / f"{name}.py"), str(tmp_path / "out"), *ARGUMENTS[name]]
    if name == "s3_query":  # its server and s3fs keep buckets and connections for the whole process
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        printed = done.stdout
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")
        printed = capsys.readouterr().out
    assert re.search(PRINTED[name], printed), printed
    written = [Path(path) for path in re.findall(r"\S+\.png", printed)]
    assert len(written) >= (name != "xarray_dask")
    for path in written:
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 50
