"""Sizes of a model's networks, as its file describes them; needs no torch."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

from deepsic_codec.model.vocabulary import MAX_CLASSES
from deepsic_codec.payload.constants import LATENT_STRIDE
from deepsic_codec.payload.fields import MAX_VALUES

#: Bounds of widths and of numbers of blocks in a model file.
MAX_WIDTH, MAX_BLOCKS = 2048, 64
#: Most hidden channels of the filter of the synthesis.
MAX_FILTER = 64
#: Edge of the squares of pixels in which the filter of the synthesis knows places.
FILTER_PLACES = 8


class LayerSizes(NamedTuple):
    """Outputs and inputs of a layer, and the edge in pixels of the square that each of its positions stands for."""

    outputs: int
    inputs: int
    edge: int


class BlockSizes(NamedTuple):
    """Channels and number of the residual blocks of a list, and the edge of their positions in pixels."""

    width: int
    number: int
    edge: int


class NetworkSizes(NamedTuple):
    """Sizes of a network by the names of its parts: layers, lists of blocks, and channels of modulations."""

    layers: dict[str, LayerSizes]
    blocks: dict[str, BlockSizes]
    modulations: dict[str, int]


class Sizes:
    """Base of the frozen dataclasses that hold the sizes of one family of networks.

    Attributes
    ----------
    family : str
        Name of the family, a key of `families.FAMILIES`.
    """

    family: ClassVar[str]
    classes: int

    @property
    def outputs(self) -> int:
        """Numbers that the semantic head gives for a label cell: scores, and the values of an embedding."""
        return self.classes

    @property
    def latents(self) -> int:
        """Channels of the symbols."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return the family and all sizes, with lists in place of tuples."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]  # of a dataclass
        return {"family": self.family} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_json`.

        Raises
        ------
        ValueError
            If a size is missing, unknown or out of range, or the description is of another family.
        """
        names = {"family", *(field.name for field in fields(cls))}  # type: ignore[arg-type]  # of a dataclass
        if set(data) != names or data["family"] != cls.family:
            raise ValueError(f"architecture: expected {', '.join(sorted(names))} of the family {cls.family!r}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "family"})


@dataclass(frozen=True)
class Architecture(Sizes):
    """Sizes of the networks of the family `"deepsic"`, which the packaged model belongs to.

    Attributes
    ----------
    latents : int
        Channels of the latents.
    analysis_widths, analysis_blocks, synthesis_widths, synthesis_blocks : (int, int)
        Channels and number of residual blocks at 1/8 and at 1/16 of the image's resolution.
    synthesis_filter : int
        Hidden channels of the filter at full resolution, a multiple of 4.
    prior_groups : tuple of int
        Channels that the prior codes together; they add up to the latents.
    prior_width : int
        Hidden features of a step of the prior.
    prior_detail : int
        Number of leading latents that the prior's contexts contain with their signs, and diagonally.
    head_width, head_blocks : int
        Channels and number of residual blocks of the semantic head.
    head_embedding : int
        Values of an embedding, which the semantic head gives after the scores; 0 for none.
    classes : int
        Scores of the semantic head, *unknown* included.
    knots : int
        Qualities at which the tables over quality are trained.
    """

    family: ClassVar[str] = "deepsic"

    latents: int = 320
    analysis_widths: tuple[int, int] = (128, 256)
    analysis_blocks: tuple[int, int] = (7, 0)
    synthesis_widths: tuple[int, int] = (128, 256)
    synthesis_blocks: tuple[int, int] = (7, 5)
    synthesis_filter: int = 12
    prior_groups: tuple[int, ...] = (8, 24, 64, 96, 128)
    prior_width: int = 128
    prior_detail: int = 32
    head_width: int = 120
    head_blocks: int = 3
    head_embedding: int = 0
    classes: int = 11
    knots: int = 9

    def __post_init__(self) -> None:
        """Refuse sizes that no model has, before anything is allocated for them."""
        sizes = [self.latents, self.prior_width, self.prior_detail, self.head_width, self.classes, self.knots]
        sizes += [*self.prior_groups, *self.analysis_widths, *self.synthesis_widths]
        blocks = [*self.analysis_blocks, *self.synthesis_blocks, self.head_blocks]
        pairs = (self.analysis_widths, self.analysis_blocks, self.synthesis_widths, self.synthesis_blocks)
        valid = all(isinstance(n, int) and 1 <= n <= MAX_WIDTH for n in sizes)
        valid = valid and all(isinstance(n, int) and 0 <= n <= MAX_BLOCKS for n in blocks)
        if not valid or any(len(pair) != 2 for pair in pairs) or self.knots < 2 or self.prior_detail > self.latents:
            raise ValueError("architecture: sizes out of range")
        hidden = self.synthesis_filter
        if not isinstance(hidden, int) or not 4 <= hidden <= MAX_FILTER or hidden % 4:
            raise ValueError(f"architecture: a filter of {hidden} hidden channels, expected 4 to {MAX_FILTER} in fours")
        if sum(self.prior_groups) != self.latents:
            raise ValueError("architecture: the prior's groups do not add up to the latents")
        if self.classes > MAX_CLASSES:
            raise ValueError(f"architecture: {self.classes} classes, expected at most {MAX_CLASSES}")
        if not isinstance(self.head_embedding, int) or not 0 <= self.head_embedding <= MAX_VALUES:
            raise ValueError(f"architecture: embeddings of {self.head_embedding} values, expected at most {MAX_VALUES}")

    @property
    def outputs(self) -> int:
        """Numbers that the semantic head gives for a label cell: scores, and the values of an embedding."""
        return self.classes + self.head_embedding

    @property
    def analysis(self) -> NetworkSizes:
        """Sizes of the analysis transform."""
        (w8, w16), (n8, n16) = self.analysis_widths, self.analysis_blocks
        return NetworkSizes(
            {
                "linear": LayerSizes(self.latents, 3 * LATENT_STRIDE**2, 16),
                "stem": LayerSizes(w8, 3 * 8**2, 8),
                "reduce": LayerSizes(w16, 4 * w8, 16),
                "out": LayerSizes(self.latents, w16, 16),
            },
            {"blocks8": BlockSizes(w8, n8, 8), "blocks16": BlockSizes(w16, n16, 16)},
            {"mod8": w8, "mod16": w16},
        )

    @property
    def synthesis(self) -> NetworkSizes:
        """Sizes of the synthesis transform."""
        (w8, w16), (n8, n16) = self.synthesis_widths, self.synthesis_blocks
        return NetworkSizes(
            {
                "linear": LayerSizes(3 * LATENT_STRIDE**2, self.latents, 16),
                "stem": LayerSizes(w16, self.latents, 16),
                "expand": LayerSizes(4 * w8, w16, 16),
                "out": LayerSizes(3 * 8**2, w8, 8),
            },
            {"blocks8": BlockSizes(w8, n8, 8), "blocks16": BlockSizes(w16, n16, 16)},
            {"mod8": w8, "mod16": w16},
        )

    @property
    def head(self) -> NetworkSizes:
        """Sizes of the semantic head, whose last two layers see one vector for each label cell."""
        w = self.head_width
        return NetworkSizes(
            {
                "stem": LayerSizes(w, self.latents, 16),
                "hidden": LayerSizes(w, 2 * w, 64),
                "out": LayerSizes(self.outputs, w, 64),
            },
            {"blocks": BlockSizes(w, self.head_blocks, 16)},
            {"mod": w},
        )
