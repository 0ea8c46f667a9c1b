"""Which networks an architecture's description means."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepsic_codec.model import networks, paper
from deepsic_codec.model.prior import IntegerPrior

AnyArchitecture = networks.Architecture | paper.PaperArchitecture


def architecture_from(data: dict[str, Any]) -> AnyArchitecture:
    """Architecture of a description; raises TypeError or ValueError for one that is none."""
    family = paper.PaperArchitecture if str(data.get("name", "")).startswith("paper") else networks.Architecture
    return family.from_json(data)


def stored_networks(arch: AnyArchitecture) -> dict[str, nn.Module]:
    """The networks that a model file holds, by name."""
    module: Any = paper if isinstance(arch, paper.PaperArchitecture) else networks
    return {
        "analysis": module.Analysis(arch),
        "gains": module.Gains(arch),
        "synthesis": module.Synthesis(arch),
        "head": module.SemanticHead(arch),
    }


def integer_prior(arch: AnyArchitecture, tensors: dict[str, Tensor], device: str) -> IntegerPrior:
    """What codes the symbols."""
    if isinstance(arch, paper.PaperArchitecture):
        return paper.StaticPrior(arch, tensors, device)
    return IntegerPrior(arch, tensors, device)
