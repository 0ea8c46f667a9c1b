"""The features section of a payload: arithmetic-coded latents, which the model reads and writes."""

from deepsic_codec.payload.fields import Header


def encode_features(coded: bytes) -> bytes:
    """Return the bytes as they are."""
    return coded


def decode_features(data: bytes, header: Header) -> bytes:
    """Return the bytes as they are: only the model that the header names can decode them."""
    return data
