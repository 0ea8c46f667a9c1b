"""Codecs of images of any number of bands, to compare with: round trips in every way that they take bands."""

import numpy as np
import pytest

from deepsic_codec.io.peers import BAND_PEERS, LOSSLESS_PEERS, band_groups, split_bands
from tests.common import photograph

pytest.importorskip("imagecodecs")


@pytest.mark.parametrize("name", list(BAND_PEERS))
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_band_peers(name, dtype):
    peer = BAND_PEERS[name]
    image = photograph(40, 48, 3)[..., [0, 1, 2, 0, 1]].astype(dtype) * (1 if dtype == "u1" else 9)
    for group in band_groups(peer, 5):
        parts = split_bands(image, group)
        assert sum(part.size for part in parts) == image.size

        def decoded(encode, parts=parts):
            return [peer.decode(encode(part), part) for part in parts]

        if peer.lossless is not None:
            for part, result in zip(parts, decoded(peer.lossless), strict=True):
                np.testing.assert_array_equal(result, part)
        if peer.bounded is not None:
            for part, result in zip(parts, decoded(lambda part: peer.bounded(part, 3)), strict=True):
                assert np.abs(np.rint(result) - part.astype(float)).max() <= 3
        if peer.lossy is not None:
            sizes = [sum(len(peer.lossy(part, setting)) for part in parts) for setting in (9.0, 1.0)]
            assert sizes[0] < sizes[1]


def test_groups_of_bands():
    peer = BAND_PEERS["JPEG 2000"]
    assert [band_groups(peer, bands) for bands in (1, 2, 3, 4)] == [
        ["alone"],
        ["all", "alone"],
        ["threes", "alone"],
        ["all", "threes", "alone"],
    ]
    shapes = [part.shape for part in split_bands(np.zeros((2, 3, 5)), "threes")]
    assert shapes == [(2, 3, 3), (2, 3), (2, 3)]


@pytest.mark.parametrize("name", list(LOSSLESS_PEERS))
def test_lossless_peers(name):
    peer, image = LOSSLESS_PEERS[name], photograph(40, 48, 3)
    data = peer.lossless(image)
    assert type(data) is bytes and len(data) < image.nbytes
    np.testing.assert_array_equal(peer.decode(data, image), image)


def test_too_many_levels_are_refused():
    image = np.linspace(0, 1, 64 * 64, dtype="f4").reshape(64, 64)
    with pytest.raises(ValueError, match="65536"):
        BAND_PEERS["quantised JPEG XL e7"].bounded(image, 1e-6)
