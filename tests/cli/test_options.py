"""Options of a command arrive in the function that does the work, each as the parameter that it is for."""

import importlib
import inspect

import pytest
from PIL import Image

from deepsic_codec.cli.main import main
from tests.common import photograph

CALLS = {
    "info a.zarr --name b --index i --all": (
        "io.info.describe",
        {"source": "a.zarr", "name": "b", "index": "i", "everything": True},
    ),
    "preview a.zarr --name b --index i --size 99 --no-labels --where Sea --select t=3 --bands 3,2,1 --stretch": (
        "io.preview.preview",
        {"source": "a.zarr", "name": "b", "index": "i", "size": 99, "labels": False, "where": "Sea"}
        | {"select": {"t": 3}, "bands": (3, 2, 1), "stretch": True, "everything": False},
    ),
    "preview a.zarr --labels --map --no-stretch --all": (
        "io.preview.preview",
        {
            "labels": True,
            "quality_map": True,
            "stretch": False,
            "everything": True,
            "bands": None,
            "where": None,
            "select": {},
        },
    ),
    "export a.zarr b.tif --name b --as png --where Sea --crop --region y=1:2 x=3 --codec none --format 2 --overwrite": (
        "io.export.export",
        {"source": "a.zarr", "target": "b.tif", "name": "b", "kind": "png", "where": "Sea", "crop": True}
        | {"region": {"y": slice(1, 2), "x": 3}, "codec": "none", "zarr_format": 2, "overwrite": True, "index": None},
    ),
    "compare a.png --quality 70 --codecs WebP --no-curve": (
        "io.compare.at_equal_bytes",
        {"quality": 70, "codecs": ["WebP"]},
    ),
    "compare a.png --bpp 0.5 --codecs WebP --no-curve": ("io.compare.at_equal_bytes", {"bpp": 0.5}),
    "compare a.png --model m --chunk 64 --effort 3 --tune ms-ssim --no-curve": (
        "io.compare.deepsic",
        {"model": "m", "chunk": 64, "effort": 3, "tune": "ms-ssim"},
    ),
    "compare a.png --max-error 2 --rmse 3 4 --nodata 7 --codecs SPERR --model m --chunk 32 --effort 0": (
        "io.compare_data.take_sample",
        {"codec": {"model": "m", "effort": 0, "nodata": 7}, "chunk": 32},
    ),
    "compare a.png --max-error 2 --rmse 3 4": (
        "io.compare_data.levels",
        {"quality": None, "bpp": None, "rmse": [3, 4], "max_error": [2]},
    ),
    "index a.zarr --name b --index i": (
        "labels.consolidate.consolidate_labels",
        {"source": "a.zarr", "name": "b", "index": "i"},
    ),
    "query a.zarr Sea --name b --index i --scan": (
        "labels.open.open_labels",
        {"source": "a.zarr", "name": "b", "index": "i", "scan": True},
    ),
    "ingest a.png b.zarr --name b --quality 170 --effort 3 --tune ms-ssim --chunk 64 --shard 128 --workers 2 "
    "--resume": (
        "io.ingest.ingest",
        {"url": "b.zarr", "chunk": 64, "shard": 128, "workers": 2, "resume": True, "overwrite": False}
        | {"zarr_format": 3, "embed_model": False, "batch_size": 16}
        | {"codec": {"quality": 170, "effort": 3, "tune": "ms-ssim"}},
    ),
    "ingest a.png b.zarr --max-error 2 --nodata 7 --value-range 1,9 --transform wavelet --semantics post --embed-model "
    "--format 2 --batch-size 3 --overwrite --resume": (
        "io.ingest.ingest",
        {"resume": False, "overwrite": True, "zarr_format": 2, "embed_model": True, "batch_size": 3, "chunk": None}
        | {
            "codec": {
                "max_error": 2,
                "nodata": 7,
                "value_range": [(1, 9)],
                "transform": "wavelet",
                "semantics": "post",
            },
        },
    ),
    "ingest a.png b.zarr --keep River=80 --keep Sea>=0.6=0": (
        "io.ingest.ingest",
        {"keep": {"River": 80, "Sea>=0.6": 0}, "quality_map": None},
    ),
    "ingest a.png b.zarr --ome --psnr 40 --value-range chunk": (
        "io.ingest.ingest_pyramid",
        {"codec": {"psnr": 40, "value_range": "chunk"}},
    ),
}


@pytest.mark.parametrize("line", CALLS)
def test_options_arrive(line, tmp_path, monkeypatch):
    path, expected = CALLS[line]
    module, name = path.rsplit(".", 1)
    module = importlib.import_module(f"deepsic_codec.{module}")
    signature = inspect.signature(getattr(module, name))
    calls = []

    def record(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                call |= call.pop(parameter.name, {})
        calls.append(call)
        raise RuntimeError("seen enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, name, record)
    Image.fromarray(photograph(64, 64, 3)).save("a.png")
    assert main(line.split()) == 1
    (call,) = calls
    if "codec" in call and isinstance(call["codec"], dict):
        call["codec"] = {key: value for key, value in call["codec"].items() if value is not None}
    assert {key: call[key] for key in expected} == expected
