"""The state of a training run: networks, data, and the symbols that the encoder chooses with them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.architecture import Architecture, Sizes
from deepsic_codec.model.exact.export import export_gains
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.model.ops.protocol import RateTables
from deepsic_codec.model.paper import RATES, PaperArchitecture
from deepsic_codec.model.quantise import load_tables, make_tables, quantise
from deepsic_codec.payload.coders.symbols import SYMBOL_MAX
from deepsic_codec.payload.constants import LABEL_CELL
from deepsic_codec.training.data import LabelledTiles, Photographs
from deepsic_codec.training.loss import Networks, cells_of
from deepsic_codec.training.paper import PaperNetworks
from deepsic_codec.training.settings import Settings

TINY = Architecture(
    latents=16,
    analysis_widths=(8, 16),
    analysis_blocks=(1, 1),
    synthesis_widths=(8, 16),
    synthesis_blocks=(1, 1),
    prior_groups=(4, 12),
    prior_width=16,
    prior_detail=6,
    head_width=16,
    knots=3,
)
ARCHITECTURES: dict[str, Sizes] = {"base": Architecture(), "tiny": TINY}
ARCHITECTURES |= {f"paper-{r}": PaperArchitecture(r, strides) for r, strides in RATES.items()}
Choose = Callable[[Tensor, Tensor], Tensor]
#: Images per call where nothing is trained.
BATCH = 8


@dataclass
class Run:
    """Networks, data and settings of a run.

    Attributes
    ----------
    settings : Settings
    nets : Networks
        On `device`.
    photos, tiles : Photographs, LabelledTiles, or None
        Unlabelled and labelled training images.
    device : str
        A torch device.
    stored_prior : dict of str to Tensor, optional
        Integer prior of the model file whose decoder stays, with `--from`.
    saved_prior : dict of str to Tensor
        Integer prior from before the phase `prior`, as the checkpoint has it; empty without a checkpoint.
    """

    settings: Settings
    nets: Networks
    photos: Photographs | None
    tiles: LabelledTiles | None
    device: str
    stored_prior: dict[str, Tensor] | None = None
    saved_prior: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def share(self) -> Settings:
        """Settings of one of the processes that share a step."""
        return self.settings.per_process()

    @property
    def estimates_rate(self) -> bool:
        """Whether the networks have a trained prior: files of the paper's networks do not hold theirs."""
        return not self.settings.base or self.nets.stores_integers

    @cached_property
    def prior_before(self) -> dict[str, Tensor]:
        """The integer prior from before the phase `prior`, also where that phase is resumed."""
        return self.saved_prior or self.nets.export_prior()

    @cached_property
    def integer_prior(self) -> CodingPrior:
        """The prior that codes the symbols. Fixed at the first access, which comes after its training."""
        tensors = self.stored_prior if self.stored_prior is not None else self.nets.export_prior()
        return self.nets.integer_prior(tensors, self.device)

    @property
    def has_integer_prior(self) -> bool:
        """Whether the encoder can choose symbols with the prior by now."""
        return self.stored_prior is not None or "integer_prior" in self.__dict__

    @cached_property
    def choose(self) -> Choose:
        """Choose the symbols of latents as the encoder does at its default effort.

        Takes latents in quantiser steps (B,C,h,w) and qualities (B,), and returns symbols as float (B,C,h,w).
        """
        return self._chooser(self.integer_prior)

    def _chooser(self, prior: CodingPrior) -> Choose:
        tables: RateTables | None = None  # rounds to the nearest
        if self.nets.stores_integers:
            rates = make_tables(prior.log_scales, export_gains(self.nets.gains)["step"])
            tables = load_tables(rates, self.device)

        def choose(scaled: Tensor, quality: Tensor) -> Tensor:
            channels_last = scaled.permute(0, 2, 3, 1).contiguous()
            rounded = torch.floor(quality + 0.5).clamp(1, 100).long()
            return quantise(prior, tables, channels_last, rounded)[0].float().permute(0, 3, 1, 2)

        return choose

    @cached_property
    def symbols(self) -> tuple[Tensor, Tensor]:
        """Symbols that the phase `prior` is trained on, chosen with the prior from before it, and their qualities."""
        choose = self._chooser(self.nets.integer_prior(self.prior_before, self.device))
        return self._collect(self.settings.symbol_batches, self.settings.seed + 1, choose)

    def collect_symbols(self, batches: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return symbols int16 (N,C,h,w) of random crops at random qualities (N,); every fifth batch is mosaics."""
        return self._collect(batches, seed, self.choose)

    @torch.no_grad()
    def _collect(self, batches: int, seed: int, choose: Choose) -> tuple[Tensor, Tensor]:
        nets, rng = self.nets.eval(), np.random.default_rng(seed)
        symbols, qualities = [], []
        for number in range(batches):
            x = self.images(BATCH, rng, mosaics=number % 5 == 4, edge=self.settings.crop // LABEL_CELL)
            q = self.stored_qualities(BATCH, rng)
            scaled = (nets.analysis(x, q) * nets.gains(q)).clamp(-SYMBOL_MAX, SYMBOL_MAX)
            symbols.append(choose(scaled, q).to(torch.int16))
            qualities.append(q)
        return torch.cat(symbols), torch.cat(qualities)

    def qualities(self, count: int) -> Tensor:
        """Return random qualities (count,)."""
        low, high = self.settings.quality_low, self.settings.quality_high
        return torch.rand(count, device=self.device) ** self.settings.quality_power * (high - low) + low

    def stored_qualities(self, count: int, rng: np.random.Generator) -> Tensor:
        """Return random qualities (count,) as payloads have them, in hundredths."""
        qualities = rng.uniform(self.settings.quality_low, self.settings.quality_high, count).round(2)
        return torch.from_numpy(qualities).float().to(self.device)

    def images(self, count: int, rng: np.random.Generator, mosaics: bool, edge: int) -> Tensor:
        """Return images (count,3,H,W): crops, or mosaics of `edge` x `edge` cells if there are labelled tiles."""
        if mosaics and self.tiles:
            return self.tiles.mosaics(count, edge, rng)[0]
        assert self.photos is not None
        return self.photos.crops(count, self.settings.crop, rng)

    @torch.no_grad()
    def cells(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return fresh cells for the semantic head.

        Half of the tiles are single and half lie in mosaics. Half of the latents are those of the analysis and half are
        those of a stored chunk. An eighth are cells of photographs, which are *unknown*.

        Returns
        -------
        latents : Tensor (N,C,4,4)
            N is about `count`.
        labels : Tensor (N,)
            Numbers of their classes.
        quality : Tensor (N,)
        """
        s, nets = self.settings, self.nets
        assert self.tiles is not None
        unknown = max(1, count // 8) if self.photos else 0
        single = max(1, (count - unknown) // 2)
        parts = [self.tiles.mosaics(single, 1, rng, s.jitter)]
        mosaics = (count - unknown - single) // 16
        if mosaics:
            parts.append(self.tiles.mosaics(mosaics, 4, rng, s.jitter))
        if self.photos:
            edge = s.crop // LABEL_CELL
            x = self.photos.crops(-(-unknown // edge**2), s.crop, rng)
            parts.append((x, torch.full((len(x), edge, edge), nets.arch.classes - 1, device=self.device)))
        columns = []
        for x, labels in parts:
            q = self.stored_qualities(len(x), rng)
            with nets.floating(), torch.autocast(x.device.type, torch.bfloat16, enabled=s.bf16):
                y = nets.analysis(x, q).float()
            stored = torch.from_numpy(np.flatnonzero(rng.random(len(y)) < 0.5)).to(self.device)
            if len(stored):
                gain = nets.gains(q[stored])
                scaled = (y[stored] * gain).clamp(-SYMBOL_MAX, SYMBOL_MAX)
                y[stored] = self.choose(scaled, q[stored]) / gain
            columns.append((cells_of(y), labels.reshape(-1), q.repeat_interleave(labels[0].numel())))
        latents, labels, quality = (torch.cat(column) for column in zip(*columns, strict=True))
        return latents, labels, quality


def make_networks(arch: Sizes) -> Networks:
    """Return fresh networks of an architecture."""
    if isinstance(arch, PaperArchitecture):
        return PaperNetworks(arch)
    assert isinstance(arch, Architecture)
    return Networks(arch)


def architecture_of(s: Settings, classes: int) -> Sizes:
    """Return the named architecture for a number of classes.

    Raises
    ------
    ConfigurationError
        If there is no such architecture.
    """
    if s.architecture not in ARCHITECTURES:
        raise ConfigurationError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {s.architecture!r}")
    arch = ARCHITECTURES[s.architecture]
    return type(arch).from_json(arch.to_json() | {"classes": classes + 1})
