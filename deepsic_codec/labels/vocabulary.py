"""The vocabulary of an array: in its attributes, or in the model of a chunk."""

from collections.abc import Mapping
from typing import Any

import zarr

from deepsic_codec.errors import ModelNotFound
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.stored.array import ATTRIBUTE
from deepsic_codec.stored.embedded import use_embedded


def vocabulary_of(array: zarr.Array, decoder: str, head: str | None) -> Vocabulary:
    """Return the vocabulary of the head that labelled a chunk.

    The attributes of the array have that of its own model. A chunk that another model labelled, or an array that this
    package did not create, takes the model.

    Parameters
    ----------
    array : zarr.Array
        The array.
    decoder, head : str
        SHA-256 identities, or their first hexadecimal digits; a head of None is any head.

    Raises
    ------
    ModelNotFound
        If the model is needed and missing.
    """
    from deepsic_codec.model.zoo import find_model  # late, for start-up: it reads model files

    attribute = array.attrs.get(ATTRIBUTE)
    stored: Any = attribute.get("vocabulary") if isinstance(attribute, Mapping) else None
    same_head = isinstance(stored, Mapping) and str(stored.get("head")).startswith(head or "")
    if same_head and isinstance(stored.get("classes"), list):
        return Vocabulary.from_json(stored)
    try:
        return find_model(decoder, head=head).vocabulary
    except ModelNotFound:
        if use_embedded(array) is None:
            raise
    return find_model(decoder, head=head).vocabulary
