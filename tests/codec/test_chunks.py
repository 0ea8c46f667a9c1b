import gc
import weakref
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsic_codec import DeepSIC
from deepsic_codec.axes import Axes
from deepsic_codec.codec.bands import from_images, to_images
from deepsic_codec.codec.chunk import check_chunk
from deepsic_codec.errors import CorruptPayload, UnsupportedArray, UnsupportedPayload
from deepsic_codec.payload import header as payload_header
from deepsic_codec.payload.fields import COLOURS, PLANES
from deepsic_codec.payload.sections import FEATURES, LABELS
from tests import stub_runtime
from tests.common import check_rejects, check_roundtrip, photograph

pytestmark = pytest.mark.usefixtures("stub")

SIZES = {"y": 5, "x": 7, "c": 3, "t": 2, "z": 4, "n": 3}
AXES = ["".join(order) for extra in ("", "c", "t", "ct", "tz", "ctz") for order in permutations("yx" + extra)] + [
    "ntzyxc",
    "yxcntz",
    "nycztx",
]


@st.composite
def chunks(draw):
    """Axes, and an array in C, F or no order with odd sizes."""
    extra = "".join(draw(st.lists(st.sampled_from("ctzn"), unique=True, max_size=4)))
    axes = "".join(draw(st.permutations("yx" + extra)))
    limit = 70 if len(axes) < 4 else 9
    sizes = {axis: draw(st.integers(1, 3)) for axis in "tzn"}
    sizes |= {"y": draw(st.integers(1, limit)), "x": draw(st.integers(1, 45)), "c": draw(st.sampled_from([1, 3]))}
    shape = [sizes[axis] for axis in axes]
    array = photograph(*shape, seed=draw(st.integers(0, 9)))
    layout = draw(st.sampled_from(["C", "F", "transposed", "strided", "reversed"]))
    if layout in "CF":
        return axes, np.array(array, order=layout)
    if layout == "transposed":
        order = draw(st.permutations(range(len(axes))))
        return axes, np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
    if layout == "strided":
        return axes, np.repeat(array, 2, axis=-1)[..., ::2]
    return axes, array[::-1]


@given(chunks())
def test_any_chunk_comes_back(case):
    axes, array = case
    check_roundtrip(DeepSIC(axes=axes), array)


@pytest.mark.parametrize("axes", AXES)
def test_every_order_of_axes(axes):
    array = photograph(*(SIZES[axis] for axis in axes))
    images = to_images(Axes(axes).to_samples(array), COLOURS)
    slices = [axis for axis in axes if axis not in "yxc"]
    assert images.shape == (np.prod([SIZES[axis] for axis in slices], dtype=int), 5, 7, 3)
    assert images.dtype == np.uint8 and images.flags.c_contiguous
    for place in np.ndindex(*(SIZES[axis] for axis in slices)):
        number = int(np.ravel_multi_index(place, [SIZES[axis] for axis in slices])) if slices else 0
        pick = dict(zip(slices, place, strict=True)) | {"y": 3, "x": 4}
        pixel = array[tuple(pick.get(axis, slice(None)) for axis in axes)]
        assert (images[number, 3, 4] == pixel).all()
    for order in "CF":
        codec = DeepSIC(axes=axes)
        same = codec.decode(codec.encode(np.array(array, order=order)))
        np.testing.assert_array_equal(same, array)
        assert same.flags[f"{order}_CONTIGUOUS"]


def test_grey_is_the_rounded_mean():
    triples = np.array([(a, b, c) for a in range(6) for b in range(6) for c in range(250, 256)], "u1")
    grey = from_images(triples.reshape(1, -1, 1, 3), 1, COLOURS)
    exact = [(int(a) + int(b) + int(c)) / 3 for a, b, c in triples]
    assert (np.abs(grey[0, :, 0, 0] - np.array(exact)) < 0.5).all()


@pytest.mark.parametrize(
    "shape,axes", [((1, 1, 3), "yxc"), ((1, 1), "yx"), ((1, 1, 1), "cyx"), ((1025, 771, 3), "yxc")]
)
def test_extreme_sizes(shape, axes):
    check_roundtrip(DeepSIC(axes=axes), photograph(*shape))


def test_read_only_and_odd_containers():
    array = photograph(6, 7, 3)
    frozen = array.copy()
    frozen.flags.writeable = False
    expected = DeepSIC().encode(array)
    for same in (frozen, memoryview(array), array.astype(">u1"), array.view(np.ndarray)):
        assert DeepSIC().encode(same) == expected
    for payload in (expected, bytearray(expected), memoryview(expected), np.frombuffer(expected, "u1")):
        np.testing.assert_array_equal(DeepSIC().decode(payload), array)


def test_result_is_the_callers_own():
    array = photograph(6, 7, 3)
    payload = DeepSIC().encode(array)
    array[...] = 0
    decoded = DeepSIC().decode(payload)
    decoded[...] = 7
    assert DeepSIC().decode(payload).std() > 1


def test_nothing_is_kept():
    array = photograph(6, 7, 3)
    alive = weakref.ref(array)
    DeepSIC().encode(array)
    del array
    gc.collect()
    assert alive() is None


def test_memory_order_is_recorded():
    array = photograph(6, 7, 3)
    assert payload_header.read_header(DeepSIC().encode(array)).order == "C"
    assert payload_header.read_header(DeepSIC().encode(np.asfortranarray(array))).order == "F"
    assert payload_header.read_header(DeepSIC().encode(array[::2])).order == "C"


def test_header_tells_the_configuration():
    header = payload_header.read_header(DeepSIC(quality=12.34, axes="tyx").encode(photograph(2, 30, 33)))
    assert (header.axes, header.shape, header.quality, header.grid) == ("tyx", (2, 30, 33), 12.34, (2, 3))
    assert header.decoder == bytes.fromhex("ab" * 8) and header.head == bytes.fromhex("cd" * 4)


def test_semantics():
    array = photograph(64, 64, 3)
    kinds = {}
    for semantics in ("pre", "post", "none"):
        header = payload_header.read_header(DeepSIC(semantics=semantics).encode(array))
        kinds[semantics] = [section.kind for section in header.sections], any(header.head)
    assert kinds == {
        "pre": ([LABELS.kind, FEATURES.kind], True),
        "post": ([FEATURES.kind], True),
        "none": ([FEATURES.kind], False),
    }


def test_alone_or_among_others():
    arrays = [photograph(20 + i, 30, 3, seed=i) for i in range(8)]
    together = DeepSIC().encode_batch(arrays)
    assert together == [DeepSIC().encode(array) for array in arrays]
    for array, decoded in zip(arrays, DeepSIC().decode_batch(together), strict=True):
        np.testing.assert_array_equal(decoded, array)


def test_batch_is_one_call(stub):
    payloads = DeepSIC().encode_batch([photograph(20, 30, 3)] * 5)
    DeepSIC(quality=3).decode_batch(payloads)
    assert stub.batches == [("encode", 5), ("decode", 5)]


def test_bad_chunk_is_retried_alone(stub):
    good, bad = photograph(20, 30, 3), np.full((4, 4, 3), stub_runtime.POISON, "u1")
    check_rejects(RuntimeError, "poisoned", DeepSIC().encode_batch, [good, bad, good])
    assert stub.sizes("encode") == [3, 1, 1, 1]


def test_other_model_of_the_payload_wins():
    payload = DeepSIC(model="other").encode(photograph(9, 8, 3))
    np.testing.assert_array_equal(DeepSIC(model="base").decode(payload), photograph(9, 8, 3))


def test_decode_features():
    array = photograph(2, 17, 33, 3)
    symbols = DeepSIC(axes="tyxc").decode_features(DeepSIC(axes="tyxc").encode(array))
    assert symbols.shape == (2, 768, 2, 3) and symbols.dtype == np.int16


BAD_ARRAYS = [
    (np.zeros((4, 4, 3), "f2"), "float16|float32|convert"),
    (np.zeros((4, 4, 3), ">c8"), "c8|convert"),
    (np.zeros((4, 4, 3), "O"), "object|convert"),
    (np.zeros(48, "u1"), "flat (48 samples)|filter"),
    (bytes(48), "flat (48 samples)|filter"),
    (np.zeros((4, 4), "u1"), "2 axes|'yxc'|axes="),
    (np.zeros((1, 4, 4, 3), "u1"), "4 axes|'yxc'|axes="),
    (np.zeros((4, 4, 257), "u1"), "257 bands|256|chunks"),
    (np.zeros((0, 4, 3), "u1"), "samples"),
    ("text", "str"),
    (None, "NoneType"),
]


@pytest.mark.parametrize("array,words", BAD_ARRAYS, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_arrays(array, words):
    check_rejects(UnsupportedArray, words, DeepSIC().encode, array)


def test_too_large():
    check_rejects(UnsupportedArray, "samples|chunks", check_chunk, (1 << 16, 1 << 14, 3), np.dtype("u1"), DeepSIC())


@pytest.mark.parametrize("out", [np.empty((5, 7, 3), "u1"), bytearray(3), np.empty((6, 7, 3), "f4")], ids=len)
def test_out_of_another_size(out):
    payload = DeepSIC().encode(photograph(6, 7, 3))
    check_rejects(UnsupportedArray, "out|126", DeepSIC().decode, payload, out=out)


def test_every_damage_is_noticed():
    payload = DeepSIC().encode(photograph(40, 30, 3))
    for end in range(len(payload)):
        with pytest.raises((CorruptPayload, UnsupportedPayload)):
            DeepSIC().decode(payload[:end])
    for byte in range(len(payload)):
        damaged = bytearray(payload)
        damaged[byte] ^= 1 << byte % 8
        with pytest.raises((CorruptPayload, UnsupportedPayload)):
            DeepSIC().decode(damaged)
    check_rejects(CorruptPayload, "", DeepSIC().decode, payload + b"\0")
    check_rejects(CorruptPayload, "", DeepSIC().decode, b"")
    check_rejects(UnsupportedPayload, "", DeepSIC().decode, b"\xff\xd8\xff\xe0 a JPEG of some other codec" * 9)


def _payload(**changes):
    values = {
        "dtype": np.dtype("u1"),
        "shape": (4, 4, 3),
        "order": "C",
        "axes": "yxc",
        "decoder": b"\xab" * 8,
        "head": bytes(4),
        "quality": 50.0,
        "grid": (1, 1),
        "sections": {FEATURES: b"u1\0" + stub_runtime.zlib.compress(bytes(48))},
    }
    return payload_header.pack(**(values | changes))


def test_well_formed_but_undecodable():
    assert (DeepSIC().decode(_payload()) == 0).all()
    check_rejects(CorruptPayload, "value range|uint16", DeepSIC().decode, _payload(dtype=np.dtype("u2")))
    check_rejects(CorruptPayload, "features", DeepSIC().decode, _payload(shape=(4, 4, 4), grouping=PLANES))
    check_rejects(CorruptPayload, "feature", DeepSIC().decode, _payload(sections={}))
    check_rejects(CorruptPayload, "features", DeepSIC().decode, _payload(sections={FEATURES: b"not deflated"}))
    check_rejects(stub_runtime.ModelNotFound, "9999", DeepSIC().decode, _payload(decoder=b"\x99" * 8))
