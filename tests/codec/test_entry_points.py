"""The package as a plugin: found by name, and light until something is coded."""

import textwrap
import tomllib

import numpy as np
import pytest
import zarr

from deepsic_codec import DeepSIC, create_array
from tests.common import ROOT, check_lazy, photograph, run_python

STUB = "from tests import stub_runtime; stub_runtime.install()\n"


@pytest.fixture
def installed(tmp_path):
    """A folder for sys.path that declares the entry points of pyproject.toml, as an installation does."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    folder = tmp_path / "site" / "deepsic_codec-0.0.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: deepsic-codec\nVersion: 0.0.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    return folder.parent


@pytest.fixture(params=[2, 3])
def archive(request, stub, tmp_path):
    array = photograph(70, 45, 3)
    z = create_array(
        tmp_path / "img.zarr", shape=array.shape, dtype="u1", chunks=(32, 32, 3), zarr_format=request.param
    )
    z[...] = array
    np.save(tmp_path / "expected.npy", array)
    return tmp_path


def test_reader_imports_nothing_of_ours(installed, archive):
    code = f"""
        import sys, zarr, numpy as np
        z = zarr.open({str(archive / "img.zarr")!r}, mode="r")
        loaded = {{name for name in sys.modules if name.startswith("deepsic_codec.model.")}}
        assert loaded <= {{"deepsic_codec.model.threads"}}, loaded
        from tests import stub_runtime; stub_runtime.install()
        np.testing.assert_array_equal(z[...], np.load({str(archive / "expected.npy")!r}))
        print(z[3, 4])
    """
    assert run_python(code, installed).strip() == str(photograph(70, 45, 3)[3, 4])


def test_writer_imports_nothing_of_ours(installed, archive):
    code = f"""
        from tests import stub_runtime; stub_runtime.install()
        import numcodecs, zarr, numpy as np
        codec = numcodecs.get_codec({{"id": "deepsic", "quality": 30}})
        print(type(codec).__name__, codec.quality)
        z = zarr.open({{}}, mode="w", zarr_format=3, codecs=[{{"name": "deepsic"}}], shape=(9, 9, 3), chunks=(4, 4, 3),
                      dtype="u1", fill_value=0)
        z[...] = array = np.load({str(archive / "expected.npy")!r})[:9, :9]
        np.testing.assert_array_equal(z[...], array)
    """
    assert run_python(code, installed).strip() == "DeepSIC 30.0"


def test_importing_is_light():
    unwanted = ("torch", "dask", "xarray", "zarr", "numcodecs", "numpy", "numba")
    check_lazy("import deepsic_codec", unwanted=unwanted)
    check_lazy("from deepsic_codec import config, errors; config.set(threads=1)", unwanted=unwanted)
    check_lazy("from deepsic_codec import DeepSIC, DeepSICCodec, chunk_attrs, create_array, open_archive")
    check_lazy(
        "import deepsic_codec.codec.v3, deepsic_codec.stored.layout", unwanted=("torch", "dask", "xarray", "numba")
    )


def test_opening_and_asking_are_light(installed, archive):
    url = str(archive / "img.zarr")
    check_lazy(f"import zarr; zarr.open({url!r})", installed)
    output = check_lazy(
        STUB + f"from deepsic_codec import chunk_attrs, open_archive; z = open_archive({url!r})\n"
        "print(len(chunk_attrs(z, (1, 1, 0))['labels']))",
        installed,
    )
    assert output.strip() == "1"


def test_package_names():
    import deepsic_codec

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(deepsic_codec.__all__) <= set(dir(deepsic_codec))
    for name in deepsic_codec.__all__:
        assert getattr(deepsic_codec, name) is not None
    assert deepsic_codec.__version__ in (project["version"], "(not installed)") and "__version__" in dir(deepsic_codec)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        deepsic_codec.nothing  # noqa: B018


def test_example_of_the_readme(stub):
    store = {}
    z = zarr.open(
        store, mode="w", zarr_format=2, compressor=DeepSIC(), shape=(64, 64, 3), chunks=(32, 32, 3), dtype="u1"
    )
    z[...] = photograph(64, 64, 3)
    np.testing.assert_array_equal(zarr.open(store)[...], photograph(64, 64, 3))


def test_what_is_missing_is_named_with_its_extra():
    code = """
        import sys
        for name in ("dask", "s3fs", "xarray"):
            sys.modules[name] = None
        import importlib, zarr
        from deepsic_codec import create_array, decode_features, open_archive, open_labels
        from deepsic_codec.dask import open as open_dask
        import numpy as np
        z = create_array({}, data=np.zeros((64, 64, 3), "u1"), chunks=(64, 64, 3))
        found = open_labels(z, scan=True).where("Dark")
        calls = {
            "dask": [found.to_dask, lambda: decode_features(z), lambda: open_dask(z)],
            "s3": [lambda: open_archive("s3://bucket/a.zarr")],
            "xarray": [found.to_xarray, lambda: importlib.import_module("deepsic_codec.xarray")],
        }
        for extra, functions in calls.items():
            for call in functions:
                try:
                    call()
                except ImportError as error:
                    assert f"pip install 'deepsic-codec[{extra}]'" in str(error), error
                else:
                    raise SystemExit(f"{extra}: {call} went through")
    """
    run_python(STUB + textwrap.dedent(code))
