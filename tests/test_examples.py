"""Every example runs as a user runs it, in small, and writes the pictures that it says it writes."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.common import ROOT

EXAMPLES = ROOT / "examples"
ARGUMENTS = {
    "quickstart": ["--size", "512"],
    "xarray_dask": ["--days", "2", "--size", "512"],
    "s3_query": [],
    "own_labels": ["--steps", "200", "--minutes", "2"],
    "compare_codecs": ["--size", "256", "--codecs", "JPEG 4:2:0", "WebP"],
}
# What an example prints that only a sound run prints.
PRINTED = {
    "quickstart": r"formats agree: True\n(.|\n)*PSNR 3\d\.\d",
    "xarray_dask": r"8 chunks in [\d,]+ bytes(.|\n)*of 8 chunks show sea or lake, found by reading \d+ bytes",
    "s3_query": r"River > 0\.5: [1-9] of 12 chunks, by reading",
    "own_labels": r"names now: Field, Town, Wet, Wood, unknown(.|\n)*right on ([5-9]\d) of 96 tiles",
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
def test_example(name, tmp_path):
    for package in PACKAGES.get(name, []):
        pytest.importorskip(package)
    # From another folder, so that only an installed package, or this path, can be what is imported.
    code = f"import runpy, sys; sys.path[0] = {str(ROOT)!r}; del sys.argv[0]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLES / f"{name}.py"), str(tmp_path / "out"), *ARGUMENTS[name]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(PRINTED[name], done.stdout), done.stdout
    written = [Path(path) for path in re.findall(r"\S+\.png", done.stdout)]
    assert len(written) >= (name != "xarray_dask")
    for path in written:
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 50
