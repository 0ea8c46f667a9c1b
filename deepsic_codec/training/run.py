"""The state of a training run: networks, data, and the symbols that the encoder chooses with them."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.architecture import Architecture, Sizes
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.model.paper import RATES, PaperArchitecture
from deepsic_codec.payload.coders.contexts import CoderTables
from deepsic_codec.payload.constants import LABEL_CELL
from deepsic_codec.training.chooser import Chooser, Chosen
from deepsic_codec.training.data import LabelledTiles, Photographs
from deepsic_codec.training.loss import Networks, cells_of
from deepsic_codec.training.paper import PaperNetworks
from deepsic_codec.training.settings import Settings
from deepsic_codec.training.tables import Sample, average_tables, first_tables, samples_of

TINY = Architecture(
    latents=16,
    analysis_widths=(8, 16),
    analysis_blocks=(1, 1),
    synthesis_widths=(8, 16),
    synthesis_blocks=(1, 1),
    synthesis_filter=4,
    prior_groups=(4, 12),
    prior_width=16,
    prior_detail=6,
    head_width=16,
    knots=3,
)
ARCHITECTURES: dict[str, Sizes] = {"base": Architecture(), "tiny": TINY}
ARCHITECTURES |= {f"paper-{r}": PaperArchitecture(r, strides) for r, strides in RATES.items()}
#: Images per call where nothing is trained, and batches that rates of the trellis are fitted to.
BATCH, RATE_BATCHES = 8, 12


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
    stored_tables : CoderTables, optional
        The coder's tables of that file.
    saved_prior : dict of str to Tensor
        Integer prior from before the phase `prior`, as the checkpoint has it; empty without a checkpoint.
    """

    settings: Settings
    nets: Networks
    photos: Photographs | None
    tiles: LabelledTiles | None
    device: str
    stored_prior: dict[str, Tensor] | None = None
    stored_tables: CoderTables | None = None
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
    def _final_prior(self) -> dict[str, Tensor]:
        return self.stored_prior if self.stored_prior is not None else self.nets.export_prior()

    @cached_property
    def integer_prior(self) -> CodingPrior:
        """The prior that codes the symbols. Fixed at the first access, which comes after its training."""
        return self.nets.integer_prior(self._final_prior, self.device)

    @property
    def has_integer_prior(self) -> bool:
        """Whether the encoder can choose symbols with the prior by now."""
        return self.stored_prior is not None or "_final_prior" in self.__dict__

    @cached_property
    def chooser(self) -> Chooser:
        """Chooses symbols as the encoder does at its default effort, with the prior that codes them."""
        return self._chooser(self._final_prior, self.stored_tables)

    def _chooser(self, prior: dict[str, Tensor], tables: CoderTables | None = None) -> Chooser:
        """Return what chooses symbols with a prior; its rates are those of tables, or of ones fitted to a few crops."""
        if not self.nets.stores_integers:
            return Chooser(self.nets, prior, None, self.device)
        if tables is None:
            coding, batches = self.nets.integer_prior(prior, "cpu"), min(self.settings.symbol_batches, RATE_BATCHES)
            tables = first_tables(coding, self._samples(Chooser(self.nets, prior, None, self.device), batches))
            tables = average_tables(
                coding, tables, self._samples(Chooser(self.nets, prior, tables, self.device), batches)
            )
        return Chooser(self.nets, prior, tables, self.device)

    def _samples(self, chooser: Chooser, batches: int) -> list[Sample]:
        return samples_of(*self._collect(batches, self.settings.seed + 8, chooser))

    @cached_property
    def symbols(self) -> tuple[Chosen, Tensor]:
        """Symbols that the phase `prior` is trained on, chosen with the prior from before it, and their qualities."""
        return self._collect(self.settings.symbol_batches, self.settings.seed + 1, self._chooser(self.prior_before))

    def collect_symbols(self, batches: int, seed: int) -> tuple[Chosen, Tensor]:
        """Return symbols (N,C,h,w) of random crops at random qualities (N,); every fifth batch is mosaics."""
        return self._collect(batches, seed, self.chooser)

    @torch.no_grad()
    def _collect(self, batches: int, seed: int, chooser: Chooser) -> tuple[Chosen, Tensor]:
        # the other networks stay as the phase needs them
        analysis, rng = self.nets.analysis.eval(), np.random.default_rng(seed)
        chosen, qualities = [], []
        for number in range(batches):
            x = self.images(BATCH, rng, mosaics=number % 5 == 4, edge=self.settings.crop // LABEL_CELL)
            q = self.stored_qualities(BATCH, rng)
            chosen.append(chooser(analysis(x, q), q))
            qualities.append(q)
        return Chosen(*(torch.cat(column) for column in zip(*chosen, strict=True))), torch.cat(qualities)

    def qualities(self, count: int) -> Tensor:
        """Return random qualities (count,)."""
        s = self.settings
        place = torch.rand(count, device=self.device)
        qualities = place**s.quality_power * (s.quality_high - s.quality_low) + s.quality_low
        if s.used_share:
            used = place * (s.used_high - s.used_low) + s.used_low
            qualities = torch.where(torch.rand(count, device=self.device) < s.used_share, used, qualities)
        return qualities.clamp(s.quality_low, s.quality_high)

    def stored_qualities(self, count: int, rng: np.random.Generator) -> Tensor:
        """Return random qualities (count,) as payloads have them, in hundredths."""
        s = self.settings
        qualities = rng.uniform(s.quality_low, s.quality_high, count).round(2)
        if s.used_share:
            used = rng.uniform(s.used_low, s.used_high, count).round(2)
            qualities = np.where(rng.random(count) < s.used_share, used, qualities).clip(s.quality_low, s.quality_high)
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
                y[stored] = self.chooser.stored(y[stored], q[stored])
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
