"""What an installed wheel has to do, with nothing but its declared dependencies: python smoke.py, in an empty folder.

No test (its name says so to pytest), as it is for another environment: `.ci/run` runs it in a new one.
"""

import subprocess
import sys
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import zarr

import deepsic_codec
from deepsic_codec import DeepSIC, chunk_attrs, consolidate_labels, create_array, open_labels
from deepsic_codec.errors import MissingPackage
from deepsic_codec.metrics import psnr
from deepsic_codec.samples import eurosat_mosaic

OPTIONAL = (
    *("PIL", "dask", "imagecodecs", "llvmlite", "matplotlib", "numba", "pytest", "rasterio", "rich", "tifffile"),
    *("torch", "xarray"),
)

CONTENTS = (
    "deepsic_codec/models/base-407b2baf.safetensors",
    "deepsic_codec/model/device_coder/coder.cu",
    "deepsic_codec/kernels/libraries/generic.so",
    "deepsic_codec/py.typed",
    "deepsic_codec/data/ATTRIBUTION.md",
    "deepsic_codec/data/eurosat-mosaic.png",
    "licenses/LICENSE",
)


def main() -> None:
    """Check contents, both formats, labels, entry points and the command."""
    folder = Path(deepsic_codec.__file__).parent
    assert "site-packages" in folder.parts, f"{folder} is not an installation"
    assert not [name for name in OPTIONAL if find_spec(name)], "more is installed than what is declared"
    files = [str(path).replace("\\", "/") for path in distribution("deepsic-codec").files or ()]
    for name in CONTENTS:
        assert any(path.endswith(name) for path in files), f"the wheel lacks {name}"
    assert not [path for path in files if path.startswith(("tests/", "docs/", "benchmarks/"))]

    try:
        eurosat_mosaic()
    except MissingPackage as error:
        assert "deepsic-codec[cli]" in str(error), error
    else:
        raise AssertionError("the sample was read without Pillow")
    y, x, band = np.ogrid[:256, :512, :3]
    image = np.uint8(128 + 60 * np.sin(x / 40 + band) * np.cos(y / 30) + 20 * ((x // 64 + y // 64) % 2))
    for zarr_format in (2, 3):
        codec = DeepSIC(quality=60)
        z = create_array(
            f"{zarr_format}.zarr", name="image", data=image, chunks=(256, 256, 3), codec=codec, zarr_format=zarr_format
        )
        decibels = psnr(image, z[...])
        assert decibels > 28, decibels
        assert len(chunk_attrs(z, (0, 1, 0))["labels"]) == 16
        consolidate_labels(z)
        assert open_labels(z).where("Forest >= 0").count == 2
    reader = "import zarr, sys; print(zarr.open('2.zarr/image', mode='r')[:8, :8].sum())"
    printed = subprocess.run([sys.executable, "-c", reader], capture_output=True, text=True, check=True).stdout
    assert int(printed) == int(np.asarray(zarr.open("2.zarr/image", mode="r")[:8, :8]).sum())
    command = [Path(sys.executable).parent / "deepsic", "--version"]
    assert version("deepsic-codec") in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(f"deepsic-codec {version('deepsic-codec')} from {len(files)} files: both formats, labels, command work")


if __name__ == "__main__":
    main()
