"""The accessor: labels of whole variables, and of nothing else."""

import numpy as np
import pytest
import zarr

from deepsic_codec import consolidate_labels
from deepsic_codec.errors import UnsupportedArray
from tests.common import check_rejects
from tests.labels.common import archive

xarray = pytest.importorskip("xarray")
pytest.importorskip("deepsic_codec.xarray")


def test_accessor(stub, tmp_path):
    folder = tmp_path / "archive.zarr"
    archive(zarr.storage.LocalStore(folder), shape=(128, 200, 3), chunks=(64, 64, 3))[:] = 200
    consolidate_labels(folder)
    for options in ({}, {"chunks": None}):
        image = xarray.open_zarr(folder, consolidated=False, **options)["img"]
        found = image.deepsic.where("Bright & ~Dark", verify=None)
        assert found.count == 6 and image.deepsic.labels.where("Bright").chunks == found.chunks
        assert (found.to_xarray() == 200).all()
        assert image.deepsic.open_labels(scan=True).where("Bright").count == 6
        check_rejects(UnsupportedArray, "'img'", lambda image=image: image[:64].deepsic.labels)
        check_rejects(UnsupportedArray, "'img'", lambda image=image: (image + 1).deepsic.labels)
    check_rejects(UnsupportedArray, "None", lambda: xarray.DataArray(np.zeros(3)).deepsic.labels)
