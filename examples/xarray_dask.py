"""Write a stack of images with Dask, open it with xarray, query its labels, and compute with the matching chunks.

python examples/xarray_dask.py xarray-out
"""

import argparse
from pathlib import Path

import dask.array as da
import numpy as np
import xarray as xr

import deepsic_codec.xarray  # noqa: F401  # registers the accessor .deepsic
from deepsic_codec import DeepSIC
from deepsic_codec import dask as bulk
from deepsic_codec.samples import eurosat_mosaic


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the archive")
    parser.add_argument("--days", type=int, default=3, help="images in the stack")
    parser.add_argument("--size", type=int, default=768, help="edge of an image, at most 768")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    url = args.out / "archive.zarr"

    # A lazy stack: each day a little brighter. It is never in memory as a whole.
    scene = da.from_array(eurosat_mosaic()[: args.size, : args.size], chunks=(256, 256, 3))
    days = da.stack([(scene.astype("f4") * (1 + 0.1 * day)).clip(0, 255).astype("u1") for day in range(args.days)])
    stack = xr.DataArray(days, dims=("time", "y", "x", "band"), name="land")

    # Each task encodes a block of chunks as one batch; the label index is written at the end.
    codec = DeepSIC(quality=60, axes="tyxc", label_tile=64)
    report = bulk.store(stack, url, name="land", codec=codec, chunks=(1, 256, 256, 3), overwrite=True)
    print(f"{report.written} chunks in {report.nbytes:,} bytes of {stack.nbytes:,}")

    # Ordinary xarray from here on: chunks are decoded when they are computed.
    land = xr.open_zarr(url, consolidated=False)["land"]
    means = land.mean(("y", "x", "band")).compute()
    print("mean of each day:", np.round(means.values, 1))

    # The index tells which chunks show a class: a few kilobytes are read, and nothing is decoded.
    found = land.deepsic.where("SeaLake > 0.5")
    print(f"{found.count} of {found.mask.size} chunks show sea or lake, found by reading {found.bytes_read:,} bytes")
    water = found.to_xarray()
    print(f"{dict(water.sizes)}; mean of the matches: {float(water.mean()):.1f}")
    at = zip(water["time_start"].values, water["y_start"].values, water["x_start"].values, strict=True)
    print("first:", *(f"day {t}, row {y}, column {x};" for t, y, x in list(at)[:3]))


if __name__ == "__main__":
    main()
