"""Every example runs as a user runs it, in small, and writes the pictures that it says it writes."""

import re
import runpy
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
    """In this process, which has imported what takes seconds; `tests/docs` runs commands and pages likewise."""
    for package in PACKAGES.get(name, []):
        pytest.importorskip(package)
    for variable in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(variable, "unset")  # what an example sets ends with its test
    path = EXAMPLES / f"{name}.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path), str(tmp_path / "out"), *ARGUMENTS[name]])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(PRINTED[name], printed), printed
    written = [Path(path) for path in re.findall(r"\S+\.png", printed)]
    assert len(written) >= (name != "xarray_dask")
    for path in written:
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 50
