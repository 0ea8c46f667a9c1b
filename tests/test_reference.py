"""The reference decoder, which was written from the documents alone, and the package agree on every payload."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import tiny_model
from deepsic_codec import DeepSIC, config, reference
from deepsic_codec.errors import CorruptPayload, UnsupportedPayload
from tests.common import check_rejects, photograph, run_python
from tests.fixtures.make import HERE, digest
from tests.payload import crafted

FIXTURES = sorted(HERE.glob("v*/payloads/*.dsic"))
SOURCE = Path(reference.__file__)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fixtures(path):
    payload, expected = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    assert digest(reference.decode(payload)) == expected["decoded"]
    labels = reference.labels(payload[:4096])
    assert (labels is not None) == ("labels" in expected)
    if labels is not None:
        tile, pairs = labels
        assert {"tile": list(tile), "digest": digest(np.moveaxis(pairs, -1, 0))} == expected["labels"]
    embedding = reference.embedding(payload)
    assert (None if embedding is None else digest(embedding[1])) == expected.get("embedding")


def scene(dtype, shape, kind, seed):
    """An array (rows, columns, bands) of a dtype, and parameters that suit it."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(seed)
    array = photograph(*shape, seed=seed).astype("f8") + rng.normal(0, 2, shape)
    if kind == "alike":
        array = array[..., :1] * np.linspace(1, 0.4, shape[2]) + rng.normal(0, 0.5, shape)
    if dtype.kind == "f":
        return (array / 7 - 11).astype(dtype)
    if dtype.itemsize > 2:
        return array.astype(dtype) + 10**12
    info = np.iinfo(dtype)
    array = (array / 255).clip(0, 1) * (int(info.max) - info.min) + info.min
    if kind == "levels":
        array = array // 5 * 5 + 1
    elif kind == "coarse levels":
        array = array // 32 * 32
    elif kind == "grids":
        array[..., 1:] = array[::2, ::2, 1:].repeat(2, 0).repeat(2, 1)[: shape[0], : shape[1]]
    array = array.clip(info.min, info.max).astype(dtype)
    if kind == "padding":
        array[: shape[0] // 2, : shape[1] // 2] = info.max
    return array


@st.composite
def chunks(draw):
    """A codec and an array."""
    dtype = draw(st.sampled_from(["u1", "i1", "<u2", ">u2", "<i2", ">i2", "<f4", ">f4", ">i8"]))
    shape = draw(st.tuples(st.integers(1, 26), st.integers(1, 26), st.integers(1, 4)))
    kind = draw(st.sampled_from(["plain", "alike", "levels", "padding", "grids", "nodata", "holes"]))
    mode = draw(st.sampled_from([{"max_error": 0}, {"max_error": 2}, {"quality": 40}, {"quality": 95}, {"bpp": 3}]))
    if dtype[-2] == "f" and mode == {"max_error": 0}:
        mode = {"max_error": 1e-9}
    if dtype == ">i8" and "max_error" not in mode:  # of 64 bits, which have no quality
        mode = {"max_error": 5}
    array = scene(dtype, shape, kind, draw(st.integers(0, 99)))
    nodata = None
    if kind in ("nodata", "holes"):
        nodata = float("nan") if draw(st.booleans()) and array.dtype.kind == "f" else 7
        where = array.shape if kind == "holes" else array.shape[:2]
        array[np.random.default_rng(1).random(where) < draw(st.sampled_from([0.2, 1]))] = nodata
    axes = draw(st.sampled_from(["yxc", "cyx", "tyxc", "yxt"]))
    if axes == "cyx":
        array = np.moveaxis(array, -1, 0)
    elif axes == "tyxc":
        array = np.stack([array, array[::-1]])
    array = np.asarray(array, order=draw(st.sampled_from("CF")))
    spectral = {"spectral": "none"} if draw(st.booleans()) else {}
    common = {"axes": axes, "nodata": nodata, "value_range": "chunk", "transform": "wavelet"}
    return DeepSIC(**common, **mode, **spectral, semantics="none"), array


@settings(max_examples=25)
@given(chunks())
def test_chunks_without_features(chunk):
    codec, array = chunk
    check_agreement(codec, codec.encode(array))


def check_agreement(codec, payload, model=None):
    expected, decoded = codec.decode(payload), reference.decode(payload, model)
    np.testing.assert_array_equal(decoded, expected, strict=True)
    assert decoded.dtype == expected.dtype and decoded.flags.f_contiguous == expected.flags.f_contiguous


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Path of a small model file."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder)
    with config.set(model_path=folder):
        yield folder / "fuzz-tiny.safetensors"


FEATURES = {
    "colour": ("u1", (64, 64, 3), {"quality": 50}),
    "grey": ("u1", (20, 33, 1), {"quality": 99.99}),
    "bands": ("<u2", (17, 16, 5), {"quality": 12.5}),
    "signed": (">i2", (16, 40, 3), {"quality": 1, "value_range": (-9000, 20000)}),
    "floats": ("f4", (31, 20, 2), {"quality": 80, "value_range": (-5, 20), "nodata": float("nan")}),
    "pixel": ("u1", (1, 1, 3), {"quality": 100}),
}


@pytest.mark.parametrize("name", FEATURES)
def test_chunks_with_features(name, model):
    dtype, shape, parameters = FEATURES[name]
    array = scene(dtype, shape, "plain", 3)
    if "nodata" in parameters:
        array[:9, :5] = np.nan
    with config.set(model_path=model.parent):
        codec = DeepSIC(model="fuzz-tiny", transform="features", axes="yxc", **parameters)
        check_agreement(codec, codec.encode(array), model)


# Payloads that are damaged here. Together they have every section but features.
SOUND = {
    "levels": ("u2", "levels", {"max_error": 0}),
    "padding": ("i2", "padding", {"max_error": 0}),
    "grids": ("u1", "grids", {"max_error": 0}),
    "bounded floats": ("f4", "plain", {"max_error": 0.1}),
    "floats in halves": ("f4", "plain", {"max_error": 1e-9}),
    "wavelet": ("u2", "alike", {"quality": 70}),
    "wavelet of floats": ("f4", "plain", {"quality": 60}),
    "wavelet of levels": ("u1", "coarse levels", {"psnr": 45}),
    "floats in halves, some without data": ("f4", "plain", {"max_error": 1e-9, "nodata": 3}),
    "quality map": ("u1", "alike", {"quality": 60}),
    "cast": ("i8", "plain", {"max_error": 0, "nodata": -9}),
    "mask": ("i1", "plain", {"nodata": 3, "max_error": 1}),
}


def sound(name):
    dtype, kind, parameters = SOUND[name]
    array = scene(dtype, (18, 21, 3), kind, 5)
    if "nodata" in parameters:
        array[3:7, 2:9] = array[8, 1, 1] = parameters["nodata"]
    codec = DeepSIC(transform="wavelet", value_range="chunk", axes="yxc", semantics="none", **parameters)
    if name != "quality map":
        return codec.encode(array)
    return codec.encode(array, quality_map=np.where(np.arange(21) < 16, [[60]], [[20]]) + np.zeros((18, 1)))


def outcome(decode, payload):
    """What decoding gives, or the kind of refusal."""
    try:
        decoded = decode(payload)
    except (reference.Damaged, CorruptPayload):
        return "damaged"
    except (reference.Unsupported, UnsupportedPayload):
        return "unsupported"
    return decoded.dtype.str, decoded.tobytes()


def with_section(payload, kind, change):
    """A payload, one of whose sections is changed without a change of its length; checksums are right."""
    header = reference.read_header(payload)
    entry = header.sections[kind]
    end = entry.offset + entry.length
    data = change(payload[entry.offset : end])
    head = payload[: min(other.offset for other in header.sections.values())]
    old, new = (crc.to_bytes(4, "little") for crc in (entry.crc, reference.crc32c(data)))
    at = head.rindex(old)
    return crafted.repair(head[:at] + new + payload[at + 4 : entry.offset] + data + payload[end:])


def test_every_section_is_damaged():
    kinds = {kind for name in SOUND for kind in reference.read_header(sound(name)).sections}
    assert kinds | {reference.LABELS, reference.EMBEDDING, reference.FEATURES} == reference.KINDS.keys()


@pytest.mark.parametrize("name", SOUND)
def test_damaged_sections_are_refused_by_both(name):
    """Or decode to the same samples: not every change can be noticed."""
    payload, codec, rng = sound(name), DeepSIC(), np.random.default_rng(0)
    assert outcome(reference.decode, payload) == outcome(codec.decode, payload)
    for kind in reference.read_header(payload).sections:
        for _ in range(6):
            damaged = with_section(payload, kind, lambda data: flipped(data, rng))
            assert outcome(reference.decode, damaged) == outcome(codec.decode, damaged), damaged.hex()


def flipped(data, rng):
    """Bytes of which one, most often one of the first, has another bit."""
    data = bytearray(data)
    data[min(int(rng.integers(len(data))), int(rng.integers(1, 200)) // 2)] ^= 1 << int(rng.integers(8))
    return bytes(data)


def test_cut_payloads_are_damaged():
    payload = sound("levels")
    for end in range(0, len(payload), 7):
        with pytest.raises(reference.Damaged):
            reference.decode(payload[:end])
    check_rejects(reference.Damaged, "1 bytes after", reference.decode, payload + b"\0")


def test_models_that_do_not_fit(model, tmp_path):
    with config.set(model_path=model.parent):
        payload = DeepSIC(model="fuzz-tiny", transform="features").encode(photograph(16, 16, 3))
    check_rejects(reference.DecodeError, "need the model file of", reference.decode, payload)
    base = next(SOURCE.parent.glob("models/base-*.safetensors"))
    check_rejects(reference.DecodeError, "another model", reference.decode, payload, base)
    check_rejects(reference.DecodeError, "No such file", reference.decode, payload, tmp_path / "none")
    stored, changed = model.read_bytes(), tmp_path / "changed"
    start = 8 + int.from_bytes(stored[:8], "little")
    for data in (b"", b"\xff" * 99, stored[:-1], stored[:2000], stored[:start] + b"\x55" + stored[start + 1 :]):
        changed.write_bytes(data)
        with pytest.raises(reference.DecodeError, match="model"):
            reference.decode(payload, changed)


def test_it_needs_numpy_alone(tmp_path):
    """A copy of the file, in a process that finds nothing of the package."""
    tree = ast.parse(SOURCE.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name if isinstance(node, ast.Import) else node.module for node in nodes for name in node.names}
    assert {name.split(".")[0] for name in names} <= {"numpy"} | sys.stdlib_module_names
    assert max(map(len, SOURCE.read_text().splitlines())) <= 88
    (tmp_path / "reference.py").write_text(SOURCE.read_text())
    path = HERE / "v1" / "payloads" / "narrow.dsic"
    base = next(SOURCE.parent.glob("models/base-*.safetensors"))
    arguments = [str(path), "--model", str(base), "--out", str(tmp_path / "chunk.npy")]
    code = (
        f"import sys; sys.path[:] = [{str(tmp_path)!r}, *sys.path[2:]]; import reference; reference.main({arguments})"
    )
    text = run_python(code)
    assert text.startswith("uint8 (33, 17, 3), axes yxc\nquality 20.0, decoder ") and "labels section: 5 bytes" in text
    np.testing.assert_array_equal(np.load(tmp_path / "chunk.npy"), reference.decode(path.read_bytes()))


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "chunk").write_bytes(b"DSIC")
    assert reference.main([str(tmp_path / "chunk")]) == 1
    assert capsys.readouterr().err == "prefix: ends early, within a field\n"
