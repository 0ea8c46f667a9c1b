"""Registry of the families of networks.

To add a family, write an implementation of `family.Family` in a module of its own, as `paper` does, and `register` it
before a model of the family is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepsic_codec.errors import ModelMismatch
from deepsic_codec.model.architecture import Architecture, Sizes
from deepsic_codec.model.exact import tensors
from deepsic_codec.model.exact.checks import check_model_sums
from deepsic_codec.model.family import CodingPrior, Family, Transforms, below
from deepsic_codec.model.file import Arrays, ModelInfo, load_arrays
from deepsic_codec.model.paper import PaperFamily
from deepsic_codec.model.tensors import Table, check_tensors
from deepsic_codec.payload.coders.contexts import CoderTables

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: Families by the name that architectures give.
FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Add a family.

    Raises
    ------
    ValueError
        If there is one of its name.
    """
    name = family.architecture.family
    if name in FAMILIES:
        raise ValueError(f"a family named {name!r} is already registered")
    FAMILIES[name] = family


class DeepSICFamily(Family):
    """Networks with integer transforms and a learned prior (`networks`, `exact`)."""

    architecture = Architecture
    exact = True

    def networks(self, arch: Architecture) -> dict[str, nn.Module]:
        from deepsic_codec.model.networks import make_networks

        return make_networks(arch)

    def tensors(self, arch: Architecture) -> Table:
        return tensors.tensors(arch)

    def check(self, arch: Architecture, arrays: Arrays) -> None:
        check_model_sums(arch, arrays)
        CoderTables.from_arrays(below(arrays, "decoder.coder")).check(arch.latents)

    def prior(self, arch: Architecture, tensors: Mapping[str, Tensor], device: str) -> CodingPrior:
        from deepsic_codec.model.exact.prior import IntegerPrior

        return IntegerPrior(arch, tensors, device)

    def transforms(self, arch: Architecture, arrays: Arrays, device: torch.device) -> Transforms:
        from deepsic_codec.model.exact.transforms import IntegerTransforms

        return IntegerTransforms(arch, arrays, device)


register(DeepSICFamily())
register(PaperFamily())


def family_of(architecture: Sizes | Mapping[str, Any]) -> Family:
    """Family of an architecture, or of its JSON.

    Raises
    ------
    ValueError
        If the family is not registered.
    """
    name = architecture.family if isinstance(architecture, Sizes) else architecture.get("family")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"architecture: no family {name!r}; known are {', '.join(FAMILIES)}; add others with families.register"
        )
    return FAMILIES[name]


def architecture_from(data: Mapping[str, Any]) -> Sizes:
    """Architecture of a model file's description.

    Raises
    ------
    ValueError
        If the family is not registered, or its sizes are not those that the description has.
    """
    return family_of(data).architecture.from_json(dict(data))


def load_checked(info: ModelInfo) -> tuple[Sizes, Arrays]:
    """Architecture and arrays of a model file, which may come from anywhere, after all checks of its tensors.

    Raises
    ------
    ModelMismatch
        If the file is damaged, its description is of no architecture, its vocabulary is not that of the head, or a
        tensor is not what the table of the family says (`tensors.check_tensors`), or its sums could be inexact.
    """
    subject = info.path if info.head_file is None else f"{info.path} with head {info.head_file.path}"
    try:
        arch = architecture_from(info.architecture)
        table = family_of(arch).tensors(arch)
    except (TypeError, ValueError) as error:
        raise ModelMismatch(f"{subject}: {error}") from None
    classes = info.vocabulary.classes
    if classes and len(classes) + 1 != arch.classes:
        raise ModelMismatch(
            f"{subject}: a vocabulary of {len(classes)} classes for {arch.classes} scores, of which one is 'unknown'"
        )
    arrays = load_arrays(info)
    check_tensors(arrays, table, subject)
    try:
        family_of(arch).check(arch, arrays)
    except ValueError as error:
        raise ModelMismatch(f"{subject}: tensors do not fit the architecture: {error}") from None
    return arch, arrays
