"""Networks as the paper published them (sections III and IV), for comparison: sizes and tensors.

`paper_networks` has the networks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from deepsic_codec.model.architecture import MAX_WIDTH, Sizes
from deepsic_codec.model.family import ANALYSIS, HEAD, PRIOR, SYNTHESIS, CodingPrior, Family, Transforms, below
from deepsic_codec.model.file import Arrays
from deepsic_codec.model.logistic import INDEX_MAX, MEAN_MAX
from deepsic_codec.model.tensors import HALF, HALF_MAX, Table, TensorSpec, coder_tensors, half, spec
from deepsic_codec.model.vocabulary import MAX_CLASSES
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.constants import LABEL_CELL, LATENT_STRIDE

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

KERNELS = (7, 5, 3, 3)
#: The rates of Table I in bits per pixel, and the strides here.
RATES = {0.25: (4, 2, 2, 1), 0.5: (4, 2, 1, 1), 1.0: (4, 2, 1, 1), 1.5: (4, 2, 1, 1)}


class Convolution(NamedTuple):
    """Channels on the side of the image, edge of the kernel, and stride of a convolution."""

    channels: int
    kernel: int
    stride: int


@dataclass(frozen=True)
class PaperArchitecture(Sizes):
    """Sizes of the paper's networks for one rate.

    Attributes
    ----------
    rate : float
        Bits per pixel that training aims at.
    strides : tuple of int
        Of the four convolutions of the analysis.
    filters : int
        Channels of the feature maps.
    head_width : int
        Channels of the semantic head.
    classes : int
        Scores of the semantic head, *unknown* included.
    """

    family: ClassVar[str] = "paper"

    rate: float = 0.5
    strides: tuple[int, ...] = (4, 2, 2, 1)
    filters: int = 128
    head_width: int = 128
    classes: int = 11

    def __post_init__(self) -> None:
        """Refuse sizes that no such model has."""
        sizes = (self.filters, self.head_width, self.classes)
        if not all(isinstance(n, int) and 1 <= n <= MAX_WIDTH for n in sizes) or self.rate <= 0:
            raise ValueError("architecture: sizes out of range")
        if self.classes > MAX_CLASSES:
            raise ValueError(f"architecture: {self.classes} classes, expected at most {MAX_CLASSES}")
        if self.strides not in RATES.values():
            raise ValueError(f"architecture: expected strides {' or '.join(map(str, {*RATES.values()}))}")

    @property
    def fold(self) -> int:
        """Positions of the feature map per position of the symbol grid, along each axis."""
        return LATENT_STRIDE // math.prod(self.strides)

    @property
    def latents(self) -> int:
        """Channels of the symbol grid."""
        return self.filters * self.fold**2

    @property
    def convolutions(self) -> list[Convolution]:
        """Sizes of the convolutions of the analysis; the synthesis has them in reverse, transposed."""
        inputs = (3, *[self.filters] * (len(KERNELS) - 1))
        return [Convolution(*sizes) for sizes in zip(inputs, KERNELS, self.strides, strict=True)]


def tensors(arch: PaperArchitecture) -> Table:
    """Return the table of tensors of an architecture."""
    n, table = arch.filters, Table()
    edge = 1
    for number, (channels, kernel, stride) in enumerate(arch.convolutions):
        edge *= stride  # of the position of a feature, in pixels
        at = len(KERNELS) - 1 - number
        table[f"{ANALYSIS}.convs.{number}.weight"] = half((n, channels, kernel, kernel), edge**-2)
        table[f"{SYNTHESIS}.convs.{at}.weight"] = half((n, channels, kernel, kernel), edge**-2)
        table[f"{SYNTHESIS}.convs.{at}.bias"] = half((channels,))
        table |= _norm(f"{ANALYSIS}.norms.{number}", n)
        if number:
            table |= _norm(f"{SYNTHESIS}.norms.{at}", n)
            table |= {f"{network}.slopes.{number - 1}": half((n,)) for network in (ANALYSIS, SYNTHESIS)}
    table[f"{SYNTHESIS}.last_path.weight"] = half((3, n, 1, 1), arch.strides[0] ** -2)
    table[f"{SYNTHESIS}.last_path.bias"] = half((3,))
    w = arch.head_width
    shapes = {"first": (w, arch.latents, 3, 3), "second": (w, w, 3, 3), "hidden": (w, w), "out": (arch.classes, w)}
    for name, shape in shapes.items():
        pooled = len(shape) == 2  # one vector for each label cell
        table[f"{HEAD}.{name}.weight"] = half(shape, (LABEL_CELL if pooled else LATENT_STRIDE) ** -2)
        table[f"{HEAD}.{name}.bias"] = half(shape[:1])
    table[f"{PRIOR}.mean"] = spec("int16", (arch.latents,), -MEAN_MAX, MEAN_MAX)
    table[f"{PRIOR}.index"] = spec("uint8", (arch.latents,), 0, INDEX_MAX)
    return table | coder_tensors(arch.latents)


def _norm(name: str, channels: int) -> Table:
    shape = (channels,)
    return {
        **{f"{name}.{part}": half(shape) for part in ("weight", "bias", "running_mean")},
        f"{name}.running_var": half(shape, low=0),
        f"{name}.num_batches_tracked": TensorSpec((), (*HALF, "int64"), 0, HALF_MAX),
    }


class PaperFamily(Family):
    """The paper's networks: floating point, a static prior, no choice of symbols by the encoder."""

    architecture = PaperArchitecture
    exact = False

    def networks(self, arch: PaperArchitecture) -> "dict[str, nn.Module]":
        from deepsic_codec.model.paper_networks import make_networks

        return make_networks(arch)

    def prior(self, arch: PaperArchitecture, tensors: "Mapping[str, Tensor]", device: str) -> CodingPrior:
        from deepsic_codec.model.paper_networks import StaticPrior

        return StaticPrior(arch, tensors, device)

    def tensors(self, arch: PaperArchitecture) -> Table:
        return tensors(arch)

    def check(self, arch: PaperArchitecture, arrays: Arrays) -> None:
        CoderTables.from_arrays(below(arrays, "decoder.coder")).check(arch.latents)

    def transforms(self, arch: PaperArchitecture, arrays: Arrays, device: "torch.device") -> Transforms:
        from deepsic_codec.model.paper_networks import PaperTransforms, make_networks

        return PaperTransforms(make_networks(arch), arrays, device)
