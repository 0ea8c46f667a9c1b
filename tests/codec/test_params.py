import dataclasses
import inspect
import json
import pickle

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import DeepSIC, DeepSICCodec, create_array
from deepsic_codec.codec.params import _ENCODER_DEFAULTS
from deepsic_codec.errors import ConfigurationError, ModelNotFound
from tests import stub_runtime
from tests.common import check_config, check_lazy, check_rejects, check_repr

pytestmark = pytest.mark.usefixtures("stub")

CONFIGURATIONS = [
    {},
    {"quality": 1},
    {"quality": 33.337},
    {"axes": "tcyx", "semantics": "post"},
    {"axes": "yx", "semantics": "none", "label_tile": (64, 256)},
    {"label_tile": 256, "label_pooling": "mean"},
    {"model": "other", "effort": 2, "tune": "ms-ssim"},
    {"effort": 0},
    {"nodata": 0},
    {"nodata": -9999.5, "value_range": (0.25, 1)},
    {"nodata": float("nan"), "value_range": [(0, 1), (-3, 4)]},
    {"value_range": "chunk", "max_error": 0},
    {"quality": 80, "max_error": 1.5},
    {"psnr": 40, "spectral": "none"},
    {"spectral": [[0.6, 0.8], [-0.8, 0.6]]},
    {"bpp": 0.5},
    {"decoder": "77" * 32},
    {"decoder": "77" * 32, "head": "88" * 32},
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_every_configuration(configuration):
    for kind in (DeepSIC, DeepSICCodec):
        codec = kind(**configuration)
        check_repr(codec)
        assert codec == kind(**configuration) and hash(codec) == hash(kind(**configuration))
        assert codec.convert(DeepSICCodec).convert(DeepSIC) == DeepSIC(**configuration)
        assert kind.from_json(codec.to_json()) == codec.resolved() == codec.resolved().resolved()
    check_config(DeepSIC(**configuration).resolved())
    codec = DeepSICCodec(**configuration).resolved()
    assert DeepSICCodec.from_dict(json.loads(json.dumps(codec.to_dict()))) == codec
    assert codec.to_dict()["configuration"] == {
        k: v for k, v in codec.convert(DeepSIC).get_config().items() if k != "id"
    }


def test_metadata_is_as_specified():
    assert DeepSIC(quality=50.0, label_tile=[128, 64]).get_config() == {
        "id": "deepsic",
        "format": 1,
        "model": "base",
        "decoder": "ab" * 32,
        "head": "cd" * 32,
        "quality": 50,
        "axes": "yxc",
        "semantics": "pre",
        "label_tile": [128, 64],
        "embedding": False,
        "effort": 1,
        "tune": "mse",
        "transform": "auto",
        "spectral": "auto",
    }


def test_repr_is_short():
    assert repr(DeepSIC()) == "DeepSIC(model='base', quality=50, axes='yxc', semantics='pre')"
    assert "decoder" in repr(DeepSIC(decoder="77" * 32)) and "head" in repr(DeepSIC().resolved())


@given(st.floats(1, 100))
def test_quality_is_in_hundredths(quality):
    codec = DeepSIC(quality=quality, decoder="ab" * 32)
    assert abs(codec.quality - quality) <= 0.00501
    assert DeepSIC(quality=codec.quality, decoder="ab" * 32) == codec
    assert round(codec.quality * 100) / 100 == codec.quality


def test_numpy_pairs_and_replaced_parameters():
    codec = DeepSIC(value_range=[np.array([0, 1]), np.array([0, 2])], effort=np.int64(2))
    assert codec.value_range == ((0, 1), (0, 2)) and codec.effort == 2
    assert dataclasses.replace(codec, quality=80) == DeepSIC(value_range=[(0, 1), (0, 2)], effort=2, quality=80)


def test_numpy_numbers_become_plain():
    codec = DeepSIC(quality=np.float32(30.5), label_tile=np.array([64, 128]).tolist())
    assert json.dumps(codec.get_config()["quality"]) == "30.5"
    assert DeepSIC(label_tile=(np.int64(64), np.int64(128))).label_tile == (64, 128)
    assert DeepSIC(label_tile=64).label_tile == (64, 64)


def test_configurations_differ():
    codecs = [DeepSIC(**configuration) for configuration in CONFIGURATIONS]
    assert all(codecs[i] != codecs[j] for i in range(len(codecs)) for j in range(i))
    assert DeepSIC() != DeepSICCodec() and DeepSIC() != 3


def test_configuration_is_fixed():
    codec = DeepSIC.from_json(DeepSIC().to_json() | {"effort": {"notes": [1]}})
    codec.get_config()["effort"]["notes"].append(2)
    assert codec.get_config()["effort"] == {"notes": [1]}
    with pytest.raises(AttributeError):
        codec.quality = 3


BAD = {
    "model": [None, "", 3, ["base"]],
    "quality": [0, 0.99, 200.01, float("nan"), float("inf"), "50", True, [50], 1j],
    "axes": ["", "y", "xc", "yxx", "yxq", "YX", None, ["y", "x"], "y x", "yxctzny"],
    "semantics": ["", "PRE", None, 1, ["pre"]],
    "label_tile": [
        65,
        (64,),
        (64, 64, 64),
        (0, 64),
        (-64, 64),
        (64, 65),
        (64.0, 64),
        "64",
        (64, 1 << 21),
        (None, 64),
        {},
    ],
    "label_pooling": ["", "min", "MAX", None, 1, ["max"]],
    "nodata": ["x", "nan", float("inf"), True, [0], 1j],
    "value_range": [
        "auto",
        3,
        (),
        [],
        (1,),
        (0, 1, 2),
        (1, 1),
        (2, 1),
        (0, float("nan")),
        (0, float("inf")),
        (0, "1"),
        [(0, 1), 3],
        [(0, 1), (0, 0)],
        (False, True),
        {"low": 0},
    ],
    "spectral": [
        None,
        "planes",
        3,
        [[1.0]],
        [[1, 0], [0]],
        [[1, 0]],
        [[1, 0], [0, 1.002]],
        [[1, 0], [0.002, 1]],
        [[1, 0], [0, float("nan")]],
        [[1, 0], [0, "a"]],
        [["1", "0"], ["0", "1"]],
        [[True, False], [False, True]],
        np.eye(2) * 1j,
        np.zeros((2, 2, 2)),
    ],
    "max_error": [-1, float("nan"), float("inf"), "0", True, [1]],
    "psnr": [0, -3, float("nan"), float("inf"), "40", True],
    "bpp": [0, -3, float("nan"), float("inf"), "1", True],
    "rmse": [0, -3, float("nan"), float("inf"), "1", True],
    "effort": [-1, 5, 1.0, True, None, "2", [1], {"effort": 2}, float("nan")],
    "tune": ["ssim", "psnr", "", None, ["mse"], 1, "ms-ssim"],  # the last needs more than the default effort
    "decoder": ["", "ab" * 31, "AB" * 32, "zz" * 32, 5, "ab" * 33],
}


#: Encoder parameters as a later version may store them, and what this version encodes with then.
LATER = [
    ({"effort": 9}, 1, "mse"),
    ({"effort": 9, "tune": "ms-ssim"}, 1, "mse"),
    ({"effort": 2, "tune": "later"}, 2, "mse"),
    ({"effort": "max"}, 1, "mse"),
    ({"effort": None, "tune": None}, 1, "mse"),
    ({"effort": {"seconds": [1]}, "tune": ["a"]}, 1, "mse"),
    ({"tune": "ms-ssim"}, 1, "mse"),
    ({"spectral": "later"}, 1, "mse"),
]


@pytest.mark.parametrize("stored,effort,tune", LATER, ids=str)
@pytest.mark.parametrize("kind", [DeepSIC, DeepSICCodec])
def test_stored_encoder_parameters_never_keep_an_array_closed(kind, stored, effort, tune):
    metadata = kind().to_json() | stored
    codec = kind.from_json(metadata)
    assert codec.to_json() == metadata and (codec.effort, codec.tune) == (effort, tune)
    assert kind.from_json(json.loads(json.dumps(codec.to_json()))) == codec and hash(codec)
    assert (
        codec.convert(DeepSICCodec).to_json() == metadata
        if kind is DeepSIC
        else codec.convert(DeepSIC).to_json() == metadata
    )
    assert pickle.loads(pickle.dumps(codec)) == codec != kind().resolved()
    words = "tune" if effort == 2 else [*stored][0]
    check_rejects(ConfigurationError, words, kind, **stored)
    check_rejects(ConfigurationError, words, kind.from_json, stored)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_arrays_with_encoder_parameters_of_later_versions_can_be_used(tmp_path, zarr_format):
    data = np.zeros((64, 64, 3), "u1")
    create_array(tmp_path / "a.zarr", data=data, zarr_format=zarr_format)
    file = tmp_path / "a.zarr" / ("zarr.json" if zarr_format == 3 else ".zarray")
    text = file.read_text()
    assert '"effort": 1' in text and '"tune": "mse"' in text
    file.write_text(text.replace('"effort": 1', '"effort": {"later": true}').replace('"tune": "mse"', '"tune": 7'))
    array = zarr.open_array(tmp_path / "a.zarr", mode="r+")
    array[...] = data + 1
    assert (array[...] == data + 1).all()
    array.attrs["changed"] = True
    array.resize((128, 64, 3))
    later = json.loads(file.read_text())
    later = later["codecs"][0]["configuration"] if zarr_format == 3 else later["compressor"]
    assert later["effort"] == {"later": True} and later["tune"] == 7


@pytest.mark.parametrize("name,value", [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_bad_value_is_named(name, value):
    for kind in (DeepSIC, DeepSICCodec):
        check_rejects(ConfigurationError, name, kind, **{name: value})
    check_rejects(ConfigurationError, name, DeepSIC.from_config, {name: value})


def test_bad_head_is_named():
    check_rejects(ConfigurationError, "head", DeepSIC, head=3)
    check_rejects(ConfigurationError, "head", DeepSIC, head="no", decoder="0" * 64)


@pytest.mark.parametrize(
    "metadata,words",
    [
        ({"qualty": 3}, "unknown parameter qualty; did you mean quality?"),
        ({"device": "cuda", "batch": 3}, "unknown parameter batch, device"),
        ({1: 2}, "unknown parameter 1"),
        ({"encode": {}}, "unknown parameter encode"),
        ({"format": 2}, "format|2|upgrade"),
        ({"format": 0}, "format|version number"),
        ({"format": "0"}, "format|version number"),
        ({"format": -1}, "format|version number"),
        ({"format": None}, "format|version number"),
        ({"format": True}, "format|version number"),
    ],
    ids=str,
)
def test_hostile_metadata(metadata, words):
    check_rejects(ConfigurationError, words, DeepSIC.from_config, metadata)
    check_rejects(ConfigurationError, words, DeepSICCodec.from_dict, {"name": "deepsic", "configuration": metadata})


@pytest.mark.parametrize("configuration", [None, [], "x", 3])
def test_configuration_that_is_no_mapping(configuration):
    check_rejects(
        ConfigurationError, "mapping", DeepSICCodec.from_dict, {"name": "deepsic", "configuration": configuration}
    )


def test_name_of_another_codec():
    check_rejects(ConfigurationError, "'deepsic'|'zstd'", DeepSICCodec.from_dict, {"name": "zstd"})


def test_metadata_may_be_short():
    assert DeepSICCodec.from_dict({"name": "deepsic"}) == DeepSICCodec()
    assert DeepSIC.from_config({"quality": 30}) == DeepSIC(quality=30)


def test_missing_model():
    codec = DeepSIC(model="elsewhere")
    for use in (codec.get_config, codec.resolved, codec.convert(DeepSICCodec).to_dict):
        check_rejects(ModelNotFound, "elsewhere", use)
    check_rejects(ModelNotFound, "elsewhere", codec.encode, np.zeros((2, 2, 3), "u1"))
    codec = DeepSIC.from_config({"model": "elsewhere", "decoder": "77" * 32})  # its metadata can be read
    check_rejects(ModelNotFound, "7777", codec.encode, np.zeros((2, 2, 3), "u1"))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_keeps_the_model_that_it_was_created_with(tmp_path, monkeypatch, zarr_format):
    options = {"compressors": DeepSIC()} if zarr_format == 2 else {"serializer": DeepSICCodec(), "compressors": None}
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(64, 64, 3), dtype="u1", chunks=(32, 32, 3), zarr_format=zarr_format, **options
    )
    file = tmp_path / "a.zarr" / ("zarr.json" if zarr_format == 3 else ".zarray")
    assert "ab" * 32 in file.read_text() and "cd" * 32 in file.read_text()
    array = zarr.open_array(tmp_path / "a.zarr", mode="r+")
    monkeypatch.setattr(stub_runtime, "MODELS", (stub_runtime.ModelInfo("base", "ef" * 32, "cd" * 32),))
    array.resize((96, 64, 3))
    assert "ab" * 32 in file.read_text() and "ef" * 32 not in file.read_text()


def test_making_and_showing_a_codec_reads_no_file():
    check_lazy(
        """
        import pickle
        from deepsic_codec import DeepSIC, DeepSICCodec, create_array

        def refuse(event, arguments):
            assert event not in ("open", "os.listdir", "os.scandir"), (event, arguments)

        import sys
        sys.addaudithook(refuse)
        for kind in (DeepSIC, DeepSICCodec):
            codec = kind(model="anything", quality=30, effort=3)
            shown = "(model='anything', quality=30, axes='yxc', semantics='pre', effort=3)"
            assert repr(codec) == kind.__name__ + shown
            assert codec == kind(model="anything", quality=30, effort=3) != kind() and hash(codec)
            assert pickle.loads(pickle.dumps(codec)) == codec and codec.convert(DeepSIC).convert(DeepSICCodec)
        """,
        unwanted=("torch", "deepsic_codec.model.file", "deepsic_codec.model.zoo", "deepsic_codec.model.scheduler"),
    )


def test_metadata_needs_no_model_file(monkeypatch):
    config = DeepSIC().get_config()
    del config["id"]
    monkeypatch.setattr(stub_runtime, "MODELS", ())
    assert DeepSIC.from_config(config).decoder == "ab" * 32
    check_repr(DeepSIC.from_config(config))


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"psnr": 40, "bpp": 0.5}, "psnr and bpp|one of them"),
        ({"quality": 50, "psnr": 40}, "quality and psnr"),
        ({"max_error": 1, "psnr": 40}, "max_error and psnr"),
    ],
    ids=str,
)
def test_parameters_that_contradict(parameters, words):
    check_rejects(ConfigurationError, words, DeepSIC, **parameters)


def test_metadata_leaves_out_what_is_not_set():
    assert not {"value_range", "max_error", "psnr", "bpp"} & set(DeepSIC().get_config())
    config = DeepSIC(nodata=np.nan, value_range=np.array([[0, 1.5], [2, 3]]), max_error=np.float32(0.5)).get_config()
    assert config["nodata"] == "NaN" and config["value_range"] == [[0, 1.5], [2, 3]] and config["max_error"] == 0.5
    assert DeepSIC(value_range=[(0, 100.0)]).get_config()["value_range"] == [0, 100]
    config = DeepSIC(psnr=40.0).get_config()
    assert config["psnr"] == 40 and "quality" not in config
    assert DeepSIC(nodata="NaN") == DeepSIC(nodata=np.float32("nan"))


def test_default_quality():
    assert DeepSIC().quality == 50 and DeepSIC(max_error=3).quality == 20 and DeepSIC(psnr=40).quality is None
    assert DeepSIC(max_error=3, quality=50).quality == 50 and DeepSIC(max_error=3).get_config()["quality"] == 20


@pytest.mark.parametrize(
    ("error", "parameters", "similar"),
    [
        (TypeError, {"efort": 2}, "effort"),
        (TypeError, {"Tune": "mse"}, "tune"),
        (ConfigurationError, {"effort": 2, "tune": "ms_ssim"}, "ms-ssim"),
        (ConfigurationError, {"semantics": "pree"}, "pre"),
        (ConfigurationError, {"transform": "wavelets"}, "wavelet"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_right_one(error, parameters, similar):
    for codec in (DeepSIC, DeepSICCodec):
        check_rejects(error, f"did you mean {similar}", codec, **parameters)


def test_the_signature_has_the_defaults():
    parameters = inspect.signature(DeepSIC).parameters
    assert list(parameters)[:2] == ["model", "quality"]
    assert {name: parameters[name].default for name in _ENCODER_DEFAULTS} == _ENCODER_DEFAULTS
