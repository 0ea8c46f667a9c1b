"""Scenes through every way in and out, compared with GDAL's reading of the source: what is equal, lost or refused.

    python -m benchmarks.roundtrips --images DIR [DIR ...]

Each TIFF file of the folders is stored by `ingest`, without loss or, for floats, within 2^-20 of the range of
its values, and then takes three ways: `export` as TIFF; xarray, which opens the archive and writes a Zarr group of its
own; and `dask.store` of the DataArray, followed by `export`. A scene of several pages stands for its first, as in GDAL.
The exit status is 1 if anything was lost without a message.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import table
from deepsic_codec import dask as deepsic_dask
from deepsic_codec.codec.v2 import DeepSIC
from deepsic_codec.errors import DeepSICError
from deepsic_codec.io.export import export
from deepsic_codec.io.ingest import ingest
from deepsic_codec.io.sources import open_sources

SUFFIXES = {".tif", ".tiff"}
FACTS = ("pixels", "place", "system", "validity", "scale", "units", "names", "tags")
FLOAT_BOUND = 2.0**-20  # share of the range of values
OURS = ("AREA_OR_POINT", "TIFFTAG_", "source", "long_name", "valid_range")  # tags that say nothing of the scene

Facts = dict[str, Any]


def told_by_gdal(path: Path) -> Facts:
    """Return what GDAL reads of a raster file: samples (bands, H, W) and what it knows of them."""
    import rasterio

    with warnings.catch_warnings(), rasterio.open(path) as file:
        warnings.simplefilter("ignore")
        tags = {key: value for key, value in file.tags().items() if not key.startswith(OURS)}
        return {
            "pixels": file.read(),
            "place": None if file.transform.is_identity else tuple(file.transform)[:6],
            "system": file.crs,
            "validity": file.read_masks() != 0,
            "scale": None
            if set(zip(file.scales, file.offsets, strict=True)) == {(1.0, 0.0)}
            else (file.scales, file.offsets),
            "units": file.units if any(file.units) else None,
            "names": file.descriptions if any(file.descriptions) else None,
            "tags": tags or None,
        }


def told_by_xarray(path: Path, name: str) -> Facts:
    """Return the same of an array in a Zarr group, as xarray reads it."""
    import rasterio
    import xarray as xr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = xr.open_zarr(path, mask_and_scale=False)[name]
    attributes = array.attrs
    samples, fill = first_page(array), attributes.get("_FillValue", array.encoding.get("_FillValue"))
    about = array.coords["spatial_ref"].attrs if "spatial_ref" in array.coords else {}
    numbers = [float(number) for number in about.get("GeoTransform", "").split()]
    missing = np.zeros(samples.shape, bool)
    if fill is not None:
        missing = (samples == fill) | (samples != samples) & (fill != fill)
    if "alpha" in (interpretations := attributes.get("colorinterp", [])):  # which the others refer to, as in GDAL
        missing[[name != "alpha" for name in interpretations]] |= samples[interpretations.index("alpha")] == 0
    bands = len(samples)
    scales, offsets = attributes.get("scale_factor", 1.0), attributes.get("add_offset", 0.0)

    def each(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else (value,) * bands

    return {
        "pixels": samples,
        "place": tuple(numbers[k] for k in (1, 2, 0, 4, 5, 3)) if numbers else None,
        "system": rasterio.crs.CRS.from_wkt(about["crs_wkt"]) if "crs_wkt" in about else None,
        "validity": ~missing,
        "scale": None if (scales, offsets) == (1.0, 0.0) else (each(scales), each(offsets)),
        "units": each(attributes["units"]) if "units" in attributes else None,
        "names": each(attributes["long_name"]) if "long_name" in attributes else None,
        "tags": attributes.get("tags", attributes),
    }


def first_page(array: Any) -> NDArray[Any]:
    """Return the samples (bands, H, W) of the first page of a DataArray."""
    images = ("y", "x", "band")
    page = array.isel({name: 0 for name in array.dims if name not in images})
    order = [name for name in ("band", "y", "x") if name in page.dims]
    values: NDArray[Any] = page.transpose(*order).values
    return values if values.ndim == 3 else values[None]


def compare(source: Facts, result: Facts, bound: float) -> dict[str, str]:
    """Return for each fact whether both agree: "=", "-" if the source does not have it, else what became of it."""
    outcome = {}
    for fact in FACTS:
        before, after = source[fact], result[fact]
        if fact == "pixels":
            data = source["validity"] & np.isfinite(before.astype(np.float64))
            same = before.shape == after.shape and before.dtype == after.dtype
            same = same and (np.abs(before.astype(np.float64) - after)[data].max(initial=0) <= bound)
        elif fact == "validity":
            same = before.shape == after.shape and np.array_equal(before, after)
        elif fact == "place" and before is not None and after is not None:
            same = bool(np.allclose(before, after, rtol=1e-12, atol=0))
        elif fact == "tags" and before is not None:
            same = all(str((after or {}).get(key)) == str(value) for key, value in before.items())
        else:
            same = before is None or before == after
        outcome[fact] = "=" if same and before is not None else "-" if same else "LOST" if after is None else "DIFFERS"
    return outcome


def ways_of(path: Path, folder: Path) -> dict[str, Callable[[], Facts]]:
    """Return what stores a scene and reads it again, for each way; the first stores it for all."""
    (source,) = open_sources([path])
    floats = source.values.dtype.kind == "f"
    bound = bound_of(told_by_gdal(path)) if floats else 0
    archive, name = folder / "archive.zarr", source.name
    ingest(source, archive, codec={"max_error": bound, "semantics": "none"})

    def exported() -> Facts:
        return told_by_gdal(Path(export(archive, folder / "a.tif", name=name).targets[0]))

    def through_xarray() -> Facts:
        import xarray as xr

        group = xr.open_zarr(archive)
        plain = group.load()
        for variable in plain.variables.values():
            variable.encoding = {key: variable.encoding[key] for key in KEPT & variable.encoding.keys()}
        plain.to_zarr(folder / "plain.zarr", zarr_format=2, mode="w")
        return told_by_xarray(folder / "plain.zarr", name)

    def stored() -> Facts:
        import xarray as xr

        array = xr.open_zarr(archive, mask_and_scale=False)[name]
        parameters = {"max_error": bound, "semantics": "none", "axes": str(source.axes)}
        deepsic_dask.store(array, folder / "again.zarr", name=name, codec=DeepSIC(**parameters))
        return told_by_gdal(Path(export(folder / "again.zarr", folder / "b.tif", name=name).targets[0]))

    return {"export": exported, "xarray": through_xarray, "dask": stored}


KEPT = {
    "_FillValue",
    "scale_factor",
    "add_offset",
    "dtype",
    "grid_mapping",
    "units",
    "calendar",
}  # of xarray's encoding


def bound_of(facts: Facts) -> float:
    """Return the bound on the error for a scene of floats."""
    data = facts["pixels"][facts["validity"] & np.isfinite(facts["pixels"])]
    return float(np.ptp(data.astype(np.float64)) * FLOAT_BOUND) if data.size else 1.0


def measure(path: Path) -> list[tuple[str, dict[str, str] | str]]:
    """Return the outcome of each way of a scene: for each fact, or why it was refused."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            facts = told_by_gdal(path)
            ways = ways_of(path, Path(folder))
        except DeepSICError as error:
            return [("ingest", f"refused: {error}")]
        bound = 2 * bound_of(facts) if facts["pixels"].dtype.kind == "f" else 0  # of two writes at most
        outcomes: list[tuple[str, dict[str, str] | str]] = []
        for way, run in ways.items():
            try:
                outcomes.append((way, compare(facts, run(), bound)))
            except DeepSICError as error:
                outcomes.append((way, f"refused: {error}"))
        return outcomes


def main(argv: list[str] | None = None) -> int:
    """Print the table, and return 1 if something was lost without a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    paths = [path for folder in arguments.images for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    rows, refused = [], []
    for path in paths:
        for way, outcome in measure(path):
            if isinstance(outcome, str):
                refused.append(f"{path.name}, {way}: {outcome}")
            else:
                rows.append([path.name, way, *outcome.values()])
    print(table(["scene", "way", *FACTS], rows))
    print("\n".join(refused))
    cells = [cell for row in rows for cell in row[2:]]
    lost = sum(cell in ("LOST", "DIFFERS") for cell in cells)
    print(
        f"{len(paths)} scenes: {cells.count('=')} facts equal, {lost} lost, {cells.count('-')} not in the source; "
        f"{len(refused)} ways refused"
    )
    return int(lost > 0)


if __name__ == "__main__":
    raise SystemExit(main())
