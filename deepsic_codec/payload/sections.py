"""The kinds of sections of a payload, in the order of the specification: `docs/format.md`.

A new kind is one file with its content's `encode` and `decode`, one line in `SECTIONS`, and a row in the specification.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from deepsic_codec.payload.cast import Cast, decode_cast, encode_cast
from deepsic_codec.payload.embedding import Embedding, decode_embedding, encode_embedding
from deepsic_codec.payload.fields import OPTIONAL, Header
from deepsic_codec.payload.labels import LabelBlock, decode_labels, encode_labels
from deepsic_codec.payload.nodata import NoData, decode_nodata, encode_nodata
from deepsic_codec.payload.quality_map import QualityMap, decode_quality_map, encode_quality_map
from deepsic_codec.payload.residual import Residual, decode_residual, encode_residual
from deepsic_codec.payload.spectral import Matrix, decode_spectral, encode_spectral
from deepsic_codec.payload.structure import Structure, decode_structure, encode_structure
from deepsic_codec.payload.value_range import Ranges, decode_ranges, encode_ranges
from deepsic_codec.payload.wavelet import Wavelet, decode_wavelet, encode_wavelet

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Section(Generic[T]):
    """A kind of section: its number in the section table, and how its content is written and read.

    Attributes
    ----------
    number : int
        1 to 127. Sections are stored in ascending order of their numbers.
    name : str
        In error messages, `deepsic info` and the specification.
    required : bool
        Whether a reader must know the section to decode the chunk. Others skip it.
    encode : callable
        Content to bytes.
    decode : callable
        Bytes and the payload's header to content; raises CorruptPayload and UnsupportedPayload.
    """

    number: int
    name: str
    required: bool
    encode: Callable[[T], bytes]
    decode: Callable[[bytes, Header], T]

    @property
    def kind(self) -> int:
        """The byte in the section table."""
        return self.number if self.required else self.number | OPTIONAL


LABELS: Section[LabelBlock] = Section(1, "labels", False, encode_labels, decode_labels)
VALUE_RANGE: Section[Ranges] = Section(2, "value range", True, encode_ranges, decode_ranges)
NODATA: Section[NoData] = Section(3, "nodata", True, encode_nodata, decode_nodata)
STRUCTURE: Section[Structure] = Section(4, "structure", True, encode_structure, decode_structure)
SPECTRAL: Section[Matrix] = Section(5, "spectral transform", True, encode_spectral, decode_spectral)
QUALITY_MAP: Section[QualityMap] = Section(6, "quality map", True, encode_quality_map, decode_quality_map)
# The large ones come last, so that all that a reduced size needs is at the start. Arithmetic-coded latents, which the
# model that the header names writes and reads:
FEATURES: Section[bytes] = Section(7, "features", True, bytes, lambda data, header: data)
RESIDUAL: Section[Residual] = Section(8, "residual", True, encode_residual, decode_residual)
WAVELET: Section[Wavelet] = Section(9, "wavelet", True, encode_wavelet, decode_wavelet)
CAST: Section[Cast] = Section(10, "cast", True, encode_cast, decode_cast)
EMBEDDING: Section[Embedding] = Section(11, "embedding", False, encode_embedding, decode_embedding)
SECTIONS = (
    LABELS,
    VALUE_RANGE,
    NODATA,
    STRUCTURE,
    SPECTRAL,
    QUALITY_MAP,
    FEATURES,
    RESIDUAL,
    WAVELET,
    CAST,
    EMBEDDING,
)

NAMES = {section.kind: section.name for section in SECTIONS}


def section_name(kind: int) -> str:
    """Return the name of a kind of section, such as "labels section", for messages."""
    return f"{NAMES[kind]} section" if kind in NAMES else f"section of kind {kind & ~OPTIONAL}"
