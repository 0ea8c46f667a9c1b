"""The schema in docs/zarr-extension fits what arrays really have as metadata, and nothing that the codec refuses."""

import json
from pathlib import Path

import pytest
import zarr

from deepsic_codec import DeepSIC, DeepSICCodec, create_array, errors
from deepsic_codec.codec.params import FORMAT
from examples.migrate import migrate

jsonschema = pytest.importorskip("jsonschema")
pytestmark = pytest.mark.usefixtures("stub")

FOLDER = Path(__file__).parents[2] / "docs" / "zarr-extension"
SCHEMA = json.loads((FOLDER / "schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

CONFIGURATIONS = [
    {},
    {"quality": 12.34},
    {"axes": "tcyx"},
    {"axes": "yx"},
    {"semantics": "post"},
    {"semantics": "none"},
    {"label_tile": 64},
    {"label_tile": (128, 64)},
    {"effort": 0},
    {"effort": 2, "tune": "ms-ssim"},
    {"model": "other"},
]
LATER = [
    {"psnr": 40},
    {"bpp": 0.5},
    {"max_error": 0},
    {"max_error": 2.5, "quality": 30},
    {"nodata": -9999},
    {"nodata": float("nan")},
    {"value_range": "chunk"},
    {"value_range": (0, 10000)},
    {"value_range": [(0, 1.5), (-3, 3)]},
    {"label_bands": 3},
    {"label_bands": (3, 2, 1)},
    {"spectral": "none"},
    {"spectral": [[0.6, 0.8], [-0.8, 0.6]]},
]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("parameters", CONFIGURATIONS + LATER, ids=str)
def test_metadata_of_every_configuration(parameters):
    metadata = json.loads(json.dumps(DeepSICCodec(**parameters).to_dict()))
    VALIDATOR.validate(metadata)
    known = SCHEMA["properties"]["configuration"]["properties"]
    assert set(metadata["configuration"]) <= set(known)


def test_every_key_is_described():
    """Of the schema in README.md, and of the codec in the schema."""
    known = set(SCHEMA["properties"]["configuration"]["properties"])
    rows = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert {name for line in rows for name in line.split("|")[1].replace("`", "").replace(",", " ").split()} >= known
    made = set(DeepSICCodec().to_json())
    assert made <= known and known - made <= {
        "psnr",
        "bpp",
        "rmse",
        "max_error",
        "value_range",
        "nodata",
        "label_tile",
        "label_pooling",
        "label_bands",
    }


@pytest.mark.parametrize(
    "shape,axes,shards", [((64, 64, 3), "yxc", None), ((2, 3, 64, 64), "tcyx", None), ((64, 64), "yx", (64, 64))]
)
def test_metadata_of_arrays(tmp_path, shape, axes, shards):
    chunks = tuple(size if axis == "c" else min(size, 32) for axis, size in zip(axes, shape, strict=True))
    create_array(tmp_path / "a.zarr", shape=shape, dtype="u1", chunks=chunks, shards=shards, codec=DeepSIC(axes=axes))
    (entry,) = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["codecs"]
    if shards:
        (entry,) = entry["configuration"]["codecs"]
    VALIDATOR.validate(entry)


def test_metadata_after_migration(tmp_path):
    create_array(tmp_path / "a.zarr", shape=(64, 64, 3), dtype="u1", zarr_format=2)
    migrate(tmp_path / "a.zarr", remove=True)
    (entry,) = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["codecs"]
    VALIDATOR.validate(entry)
    assert zarr.open_array(tmp_path / "a.zarr", mode="r").metadata.codecs[0].to_dict() == entry


WRONG = [
    {"unknown": 1},
    {"quality": 0},
    {"quality": 201},
    {"quality": "50"},
    {"axes": "yxq"},
    {"axes": "yyx"},
    {"axes": "y"},
    {"axes": "cxt"},
    {"semantics": "maybe"},
    {"label_tile": [64]},
    {"label_tile": [32, 64]},
    {"label_bands": [1, 2]},
    {"label_bands": [-1]},
    {"decoder": "ab"},
    {"head": "AB" * 32},
    {"psnr": -1, "quality": None},
    {"max_error": -1},
    {"value_range": [1]},
    {"value_range": "all"},
    {"bands": "planes"},
    {"nodata": "none"},
    {"quality": 50, "psnr": 40},
    {"max_error": 1, "bpp": 1, "quality": None},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_what_the_codec_refuses_the_schema_refuses(change):
    metadata = json.loads(json.dumps(DeepSICCodec().to_dict()))
    metadata["configuration"].update(change)
    if change.get("quality", 0) is None:
        del metadata["configuration"]["quality"]
    with pytest.raises(errors.ConfigurationError):
        DeepSICCodec.from_dict(metadata)
    assert list(VALIDATOR.iter_errors(metadata))


def test_the_example_of_the_document():
    text = (FOLDER / "README.md").read_text()
    (example,) = (part.split("```")[0] for part in text.split("```json\n")[1:])
    VALIDATOR.validate(json.loads(example))
    assert DeepSICCodec.from_dict(json.loads(example)).axes == "yxc"
    assert json.loads(example)["configuration"]["format"] == FORMAT
    assert f"\n| {FORMAT} | " in text.split("## Changes")[1]
