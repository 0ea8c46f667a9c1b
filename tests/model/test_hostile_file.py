"""Crafted model files: refused with a typed error, before anything is allocated for what they claim."""

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepsic_codec import config
from deepsic_codec.errors import ModelMismatch
from deepsic_codec.model.file import identities, load_arrays, read_info, save_model
from deepsic_codec.model.vocabulary import Vocabulary
from tests.common import ROOT, check_rejects

ARCHITECTURE = {"name": "toy", "latents": 4, "synthesis_widths": [2, 2], "synthesis_blocks": [1, 1], "classes": 3}
VOCABULARY = Vocabulary(("Sand", "Rock"), {"Ground": ("Sand", "Rock")})
ARRAYS = {
    "decoder.a": np.arange(6, dtype=np.int8).reshape(2, 3),
    "decoder.number": np.asarray(7, np.int64),
    "encoder.b": np.ones(3, np.float16),
    "head.c": np.zeros((2, 2), np.float32),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Header and tensors of a sound file, and where to put others."""
    path = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    save_model(path, "toy", ARRAYS, ARCHITECTURE, VOCABULARY, {})
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:], path.with_name("case.safetensors")


def forged(toy, change, architecture=None, vocabulary=None):
    """A file with a changed header, its identities made to fit what it says."""
    header, tensors, path = toy
    header = json.loads(json.dumps(header))
    about = json.loads(header["__metadata__"]["deepsic"])
    if architecture is not None:
        about["architecture"] |= architecture
        about["decoder"], about["head"] = identities(ARRAYS, about["architecture"], VOCABULARY)
    if vocabulary is not None:
        about["vocabulary"] = vocabulary
    change(header, about)
    if isinstance(header.get("__metadata__"), dict) and "deepsic" in header["__metadata__"]:
        header["__metadata__"]["deepsic"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
    return path


def read(path):
    return load_arrays(read_info(path))


def refused(path):
    """The file is refused, in little memory whatever it claims."""
    tracemalloc.start()
    try:
        message = check_rejects(ModelMismatch, "", read, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * path.stat().st_size + 500_000, (peak, message)
    return message


def test_a_file_that_is_not_changed_is_read(toy):
    actual = read(forged(toy, lambda header, about: None))
    assert actual.keys() == ARRAYS.keys()
    assert all(np.array_equal(actual[name], ARRAYS[name]) for name in ARRAYS)
    assert all(actual[name].flags.writeable and actual[name].flags.owndata for name in ARRAYS)


def of(name, part, value):
    return lambda header, about: header[name].__setitem__(part, value)


TABLES = {
    "huge shape": of("decoder.a", "shape", [1 << 40, 1 << 40]),
    "negative shape": of("decoder.a", "shape", [-2, -3]),
    "float shape": of("decoder.a", "shape", [2.0, 3]),
    "boolean shape": of("decoder.a", "shape", [True, 6]),
    "endless shape": of("decoder.a", "shape", [1] * 100_000),
    "text shape": of("decoder.a", "shape", "23"),
    "another product": of("decoder.a", "shape", [3, 3]),
    "huge offsets": of("decoder.a", "data_offsets", [0, 1 << 62]),
    "negative offsets": of("decoder.a", "data_offsets", [-6, 0]),
    "offsets that end first": of("decoder.a", "data_offsets", [6, 0]),
    "three offsets": of("decoder.a", "data_offsets", [0, 6, 6]),
    "no offsets": lambda header, about: header["decoder.a"].pop("data_offsets"),
    "offsets of another tensor": lambda header, about: header["decoder.a"].update(header["head.c"]),
    "unknown dtype": of("decoder.a", "dtype", "F8_E4M3"),
    "pickled dtype": of("decoder.a", "dtype", "O"),
    "a list for a dtype": of("decoder.a", "dtype", ["I8"]),
    "an entry that is a number": lambda header, about: header.update({"decoder.z": 5}),
    "an entry that is null": lambda header, about: header.update({"decoder.z": None}),
    "a gap": lambda header, about: header.pop("decoder.a"),
    "a foreign name": lambda header, about: header.update({"../x": header.pop("decoder.a")}),
    "a long name": lambda header, about: header.update({"decoder." + "x" * 9999: header.pop("decoder.a")}),
    "many tensors": lambda header, about: header.update(
        {f"decoder.{i}": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}
    ),
    "no description": lambda header, about: header.pop("__metadata__"),
    "a description that is a list": lambda header, about: header["__metadata__"].update(deepsic=[]) or about.clear(),
    "no decoder": lambda header, about: about.pop("decoder"),
    "a decoder that is no hash": lambda header, about: about.update(decoder="x" * 64),
    "a decoder in capitals": lambda header, about: about.update(decoder=about["decoder"].upper()),
    "a name that is a number": lambda header, about: about.update(name=5),
    "a name that is a book": lambda header, about: about.update(name="x" * 100_000),
}


@pytest.mark.parametrize("name", TABLES)
def test_crafted_headers(toy, name):
    refused(forged(toy, TABLES[name]))


@pytest.mark.parametrize(
    "architecture",
    [
        {"latents": 1 << 31},
        {"latents": -4},
        {"latents": 1e308},
        {"classes": [1] * 1000},
        {"classes": {"a": {"b": 3}}},
        {"classes": None},
        {"synthesis_blocks": [1 << 17, 1]},
        {"x" * 10: "y" * 100_000},
        {f"size{i}": 1 for i in range(1000)},
    ],
    ids=lambda a: str(a)[:40],
)
def test_descriptions_that_no_family_has(toy, architecture):
    assert "architecture" in refused(forged(toy, lambda header, about: None, architecture))


@pytest.mark.parametrize(
    "vocabulary",
    [
        {},
        [],
        {"classes": "Sand"},
        {"classes": [1, 2]},
        {"classes": ["Sand", "Sand"]},
        {"classes": [""]},
        {"classes": ["\x1b[2J"]},
        {"classes": ["x" * 1000]},
        {"classes": [str(i) for i in range(256)]},
        {"classes": ["Sand"], "parents": {"Ground": "Sand"}},
        {"classes": ["Sand"], "parents": [["Ground", ["Sand"]]]},
        {"classes": ["Sand"], "parents": {str(i): [] for i in range(300)}},
        {"classes": ["Sand"], "parents": {str(i): [str(j) for j in range(100)] for i in range(100)}},
    ],
    ids=lambda v: str(v)[:40],
)
def test_crafted_vocabularies(toy, vocabulary):
    refused(forged(toy, lambda header, about: None, vocabulary=vocabulary))


RAW = {
    "nested": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a list": b"[1, 2]",
    "a long number": b'{"a": ' + b"9" * 50_000 + b"}",
    "not a number": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "the same name twice": b'{"__metadata__": {}, "__metadata__": {}}',
    "half a letter": b'{"a": "\xff\xfe"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
}


@pytest.mark.parametrize("name", RAW)
def test_headers_that_are_no_headers(toy, name):
    path = toy[2]
    path.write_bytes(len(RAW[name]).to_bytes(8, "little") + RAW[name] + bytes(100))
    refused(path)


@pytest.mark.parametrize("length", [0, 1, 101, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_headers_longer_than_the_file(toy, length):
    path = toy[2]
    path.write_bytes(length.to_bytes(8, "little") + b"{" + bytes(99))
    refused(path)


def test_a_file_that_is_too_large_is_not_read(toy):
    path = toy[2]
    with open(path, "wb") as out:
        out.truncate(config.get().max_model_bytes + 1)  # a hole: takes no room
    message = check_rejects(ModelMismatch, "max_model_bytes", read_info, path)
    assert str(path) in message
    path.unlink()


def test_a_damaged_encoder_is_noticed(toy):
    header, tensors, path = toy
    low, _ = header["encoder.b"]["data_offsets"]
    text = json.dumps(header).encode()
    broken = bytearray(tensors)
    broken[low] ^= 1
    path.write_bytes(len(text).to_bytes(8, "little") + text + broken)
    check_rejects(ModelMismatch, "encoder", read, path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_header_is_read_or_refused(toy, data):
    """One field anywhere in the header becomes any JSON value."""
    header, tensors, path = toy
    header = json.loads(json.dumps(header))
    about = json.loads(header["__metadata__"]["deepsic"])
    node = data.draw(
        st.sampled_from(
            [header, about, *(header[k] for k in ARRAYS), *(about[k] for k in ("architecture", "vocabulary"))]
        )
    )
    node[data.draw(st.sampled_from(sorted(node)) | st.text(max_size=8))] = data.draw(json_values)
    if isinstance(header.get("__metadata__"), dict) and data.draw(st.booleans()):
        header["__metadata__"]["deepsic"] = json.dumps(about)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
    survives(path)


@settings(deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_read_or_refused(toy, content, framed):
    path = toy[2]
    path.write_bytes((len(content).to_bytes(8, "little") if framed else b"") + content)
    survives(path)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_changed_bytes_are_read_or_refused(toy, changes):
    header, tensors, path = toy
    text = json.dumps(header).encode()
    content = bytearray(len(text).to_bytes(8, "little") + text + tensors)
    for at, value in changes:
        content[at % len(content)] = value
    path.write_bytes(content)
    survives(path)


def survives(path):
    try:
        actual = read(path)
    except ModelMismatch:
        return
    assert all(np.array_equal(actual[name], ARRAYS[name]) for name in ARRAYS)


UNSAFE = re.compile(
    r"\b(pickle|cPickle|dill|joblib|marshal|shelve)\.\w|\b(import|from) +(pickle|dill|joblib|marshal|shelve)\b"
    r"|(?<![.\w])(exec|eval)\(|allow_pickle *= *True|torch\.load\("
)


@pytest.mark.parametrize("folder", ["deepsic_codec", "benchmarks"])
def test_nothing_is_unpickled_or_executed(folder):
    actual = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if UNSAFE.search(line)
    ]
    # Compiled code that numba keeps in a folder of the user, and reads in this way itself.
    assert {line.split(":")[0] for line in actual} <= {"deepsic_codec/kernels/numba_jit.py"}


def test_the_search_for_unsafe_calls_can_find_them():
    unsafe = "pickle.loads(x)", "np.load(f, allow_pickle=True)", "torch.load(p)", "eval(text)", "import pickle"
    assert all(UNSAFE.search(line) for line in unsafe)
    assert isinstance(ROOT, Path)
