"""Payloads of model `base` are the bytes that they were, and decode to the pixels that they were.

`payload_identity.json` has SHA-256 digests of payloads and of decoded samples. The decoder identity, the head identity
and the header checksum are zeroed first: they change when the description of a model changes, all other bytes do not.
A change of the format on purpose writes the digests anew:

    python -m tests.test_payload_identity --write
"""

import argparse
import hashlib
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from deepsic_codec import DeepSIC

DIGESTS = Path(__file__).with_name("payload_identity.json")
IMAGES = Path(__file__).parent.parent / "deepsic_codec" / "data"
NAN = float("nan")


@cache
def picture(name):
    image = pytest.importorskip("PIL.Image")
    with image.open(IMAGES / name) as opened:
        return np.asarray(opened.convert("RGB"))


def mosaic(height, width, y=0, x=0):
    """A crop of the lower right part of the bundled satellite mosaic, uint8 (height, width, 3)."""
    crop = picture("eurosat-mosaic.png")[256:, 576:][y : y + height, x : x + width]
    assert crop.shape == (height, width, 3)
    return crop.copy()


def photograph(height, width, y=0, x=0):
    """A crop of the bundled photograph, uint8 (height, width, 3)."""
    return picture("drone-frame.jpg")[y : y + height, x : x + width].copy()


def bands(height, width, count, y=0, x=0):
    """Neighbouring crops as bands that resemble one another, uint8 (height, width, count)."""
    parts = [mosaic(height, width, y + 64 * (i // 3), x) for i in range(0, count, 3)]
    return np.ascontiguousarray(np.concatenate(parts, axis=-1)[..., :count])


def deep(samples):
    """Samples of about 14 bits, uint16, whose low bits are not all alike."""
    wide = samples.astype("<u2")
    return (wide * 53 + np.roll(wide, 5, axis=0) // 3 + 7).astype("<u2")


def reals(samples):
    """The same as float32 from 0 to about 1."""
    return deep(samples).astype("<f4") / np.float32(16384)


def repeated(samples):
    """Samples whose last band has pixels of 2 x 2."""
    samples[..., -1] = samples[::2, ::2, -1].repeat(2, 0).repeat(2, 1)
    return samples


def holes(samples, value):
    """Samples of which a disc and a corner hold `value`."""
    y, x = np.ogrid[: samples.shape[0], : samples.shape[1]]
    mask = ((y - 30) ** 2 + (x - 40) ** 2 < 300) | (y + 2 * x < 25)
    samples = samples.copy()
    samples[mask] = value
    return samples


# Sums and differences of neighbouring bands, of seven.
PAIRS = np.eye(7)
PAIRS[:6, :6] = np.kron(np.eye(3), [[1, 1], [1, -1]]) / np.sqrt(2)

# name: (samples, parameters of the codec)
FEATURE_CASES = {
    "colour": (lambda: mosaic(128, 192), {}),
    "colour-none": (lambda: mosaic(128, 192), {"semantics": "none"}),
    "colour-effort-0": (lambda: mosaic(128, 192), {"effort": 0}),
    "colour-tiles": (lambda: mosaic(192, 128, 256, 320), {"label_tile": 64, "quality": 30, "effort": 0}),
    "odd-size": (lambda: mosaic(67, 45, 100, 100), {"quality": 80}),
    "pixel": (lambda: mosaic(1, 1), {}),
    "low-quality": (lambda: mosaic(128, 128, 64), {"quality": 3}),
    "high-quality": (lambda: mosaic(96, 96, 320, 64), {"quality": 100}),
    "photograph": (lambda: photograph(160, 128, 448, 600), {"quality": 72.25}),
    "grey": (lambda: mosaic(128, 96, 192)[..., 1].copy(), {"axes": "yx"}),
    "signed-bytes": (lambda: mosaic(64, 64)[..., 0].astype("i1"), {"axes": "yx", "effort": 0}),
    "channels-first": (lambda: np.moveaxis(mosaic(64, 96), 2, 0).copy(), {"axes": "cyx"}),
    "fortran": (lambda: np.asfortranarray(mosaic(80, 64)), {"effort": 0}),
    "time": (lambda: np.stack([mosaic(64, 80, 64 * i) for i in range(3)]), {"axes": "tyxc"}),
    "time-last": (lambda: np.stack([mosaic(64, 80, 64 * i) for i in range(2)], axis=-1), {"axes": "yxct"}),
    "depth-fortran": (
        lambda: np.asfortranarray(np.stack([mosaic(48, 64, 64 * i)[..., 0] for i in range(4)])),
        {"axes": "zyx", "quality": 65},
    ),
    "five-bands-planes": (lambda: bands(96, 64, 5), {"spectral": "none"}),
    "deep": (lambda: deep(mosaic(128, 96)), {}),
    "deep-range": (lambda: deep(mosaic(128, 96)), {"value_range": (300, 9000), "quality": 85}),
    "deep-big-endian": (lambda: deep(mosaic(64, 64)).astype(">u2"), {"effort": 0}),
    "deep-signed": (lambda: (deep(mosaic(64, 64)).astype("i4") - 6000).astype("<i2"), {"value_range": (-6000, 9000)}),
    "reals": (lambda: reals(mosaic(64, 96)), {"value_range": (0, 1)}),
    "nodata": (lambda: holes(mosaic(128, 96), 0), {"nodata": 0}),
    "nodata-unmasked": (lambda: mosaic(96, 96), {"nodata": 100}),
    "nodata-one-band": (lambda: np.dstack([holes(mosaic(64, 64)[..., :1], 9), mosaic(64, 64)[..., 1:]]), {"nodata": 9}),
    "nodata-nan": (lambda: holes(reals(mosaic(64, 96)[..., :1]), NAN), {"nodata": NAN, "value_range": "chunk"}),
    "nodata-alone": (lambda: np.full((64, 80, 3), 7, "u1"), {"nodata": 7}),
    "bounded": (lambda: mosaic(128, 96, 64), {"max_error": 2}),
    "bounded-deep": (lambda: deep(mosaic(64, 96)), {"max_error": 20, "quality": 60}),
    "bounded-reals": (lambda: reals(mosaic(64, 64)), {"max_error": 0.004, "value_range": (0, 1)}),
    "bounded-fine-reals": (lambda: reals(mosaic(64, 64)), {"max_error": 1e-9, "value_range": (0, 1)}),
    "lossless": (lambda: mosaic(96, 96, 128), {"max_error": 0}),
    "psnr": (lambda: mosaic(96, 128, 192), {"psnr": 34}),
    "bpp": (lambda: mosaic(96, 128, 192), {"bpp": 0.75, "effort": 0}),
}
WAVELET_CASES = {
    "colour": (lambda: mosaic(128, 192), {}),
    "colour-effort-0": (lambda: mosaic(67, 45, 100, 100), {"effort": 0, "quality": 80}),
    "grey": (lambda: mosaic(128, 96, 192)[..., 1].copy(), {"axes": "yx", "quality": 95}),
    "pixel": (lambda: mosaic(1, 1), {}),
    "line": (lambda: mosaic(1, 100), {"quality": 70}),
    "two-bands": (lambda: bands(64, 64, 2), {"effort": 0}),
    "five-bands": (lambda: bands(96, 64, 5), {}),
    "five-bands-planes": (lambda: bands(96, 64, 5), {"spectral": "none"}),
    "seven-bands-matrix": (lambda: deep(bands(64, 64, 7)), {"spectral": PAIRS, "effort": 0}),
    "many-bands": (lambda: deep(bands(48, 48, 24)), {"quality": 60}),
    "time": (lambda: np.stack([deep(mosaic(64, 80, 64 * i)) for i in range(2)]), {"axes": "tyxc", "quality": 110}),
    "deep": (lambda: deep(mosaic(128, 96)), {"quality": 150}),
    "deep-big-endian": (lambda: deep(mosaic(64, 64)).astype(">u2"), {"quality": 130}),
    "deep-signed": (lambda: (deep(mosaic(64, 64)).astype("i4") - 6000).astype("<i2"), {"value_range": (-6000, 9000)}),
    "reals": (lambda: reals(mosaic(64, 96)), {"value_range": (0, 1)}),
    "nodata-deep": (lambda: holes(deep(bands(96, 64, 4)), 65535), {"nodata": 65535, "value_range": "chunk"}),
    "nodata-nan": (lambda: holes(reals(mosaic(64, 96)[..., :1]), NAN), {"nodata": NAN, "value_range": "chunk"}),
    "bounded-deep": (lambda: deep(mosaic(64, 96)), {"max_error": 20, "quality": 60}),
    "lossless-deep-nodata": (lambda: holes(deep(bands(64, 64, 4)), 0), {"max_error": 0, "nodata": 0}),
    "psnr": (lambda: deep(mosaic(96, 128, 192)), {"psnr": 50}),
    "rmse": (lambda: deep(mosaic(96, 128, 192)), {"rmse": 30}),
    "bpp": (lambda: deep(bands(64, 64, 4)), {"bpp": 3, "semantics": "none"}),
    "mapped": (lambda: mosaic(96, 128), {"quality_map": np.where(np.arange(96 * 128).reshape(96, 128) < 5000, 70, 20)}),
    "resolutions": (lambda: repeated(deep(bands(192, 192, 3))), {"quality": 150}),
}
CASES = {
    f"{transform}-{name}": (make, parameters | {"transform": transform})
    for transform, cases in (("features", FEATURE_CASES), ("wavelet", WAVELET_CASES))
    for name, (make, parameters) in cases.items()
}


def blanked(payload):
    """Return a payload with zeros for decoder, head and header checksum; offsets as in `docs/format.md`."""
    data = bytearray(payload)
    assert data[:5] == b"DSIC\x01"
    data[8:12] = bytes(4)  # checksum of the header
    ndim = data[14]
    position = 15 + (ndim + 1) // 2  # after dtype, layout, number of axes, and four bits for each axis
    for _ in range(ndim):  # sizes, as varints
        while data[position] & 128:
            position += 1
        position += 1
    data[position : position + 12] = bytes(12)  # 8 bytes of decoder, 4 bytes of head
    return bytes(data)


def digest(array):
    """SHA-256 of dtype, shape, memory order and samples."""
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    about = f"{array.dtype.str} {array.shape} {order} "
    return hashlib.sha256(about.encode() + array.tobytes("C")).hexdigest()


def observed(name):
    make, parameters = CASES[name]
    samples = make()
    codec = DeepSIC(**{name: value for name, value in parameters.items() if name != "quality_map"})
    payload = codec.encode(samples, parameters.get("quality_map"))
    return {
        "samples": digest(samples),
        "bytes": len(payload),
        "payload": hashlib.sha256(blanked(payload)).hexdigest(),
        "decoded": digest(np.asarray(codec.decode(payload))),
    }


def test_every_case_has_its_digests():
    assert json.loads(DIGESTS.read_text()).keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_payload_and_pixels_are_those_that_are_stored(name):
    stored, now = json.loads(DIGESTS.read_text())[name], observed(name)
    assert now["samples"] == stored["samples"], "the test image is another: nothing is said about the codec"
    assert (now["bytes"], now["payload"]) == (stored["bytes"], stored["payload"]), "the payload has other bytes"
    assert now["decoded"] == stored["decoded"], "the same payload decodes to other samples"


def test_identities_and_checksum_are_all_that_is_blanked():
    payload = DeepSIC(effort=0).encode(mosaic(64, 64))
    blank = blanked(payload)
    other = [i for i, (one, two) in enumerate(zip(payload, blank, strict=True)) if one != two]
    assert len(payload) == len(blank) and set(other) <= {*range(8, 12), *range(20, 32)} and len(other) > 10


def main():
    parser = argparse.ArgumentParser(description="Write the digests of payloads and decoded samples anew.")
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    found = {name: observed(name) for name in CASES}
    DIGESTS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{DIGESTS}: {len(found)} cases, {sum(one['bytes'] for one in found.values())} bytes of payloads")


if __name__ == "__main__":
    main()
