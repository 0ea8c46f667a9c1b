"""The phases of a run: what each trains, and one step of it.

1. ``joint``: everything, on rate, distortion and semantics together.
2. ``integer``: the same, with transforms that imitate their integer form.
3. ``prior``: the prior alone, imitating its integer form, on symbols that the encoder chose with it before.
4. ``synthesis``: the synthesis alone, on symbols as the encoder chooses them with that prior.
5. ``head``: the semantic head alone, on latents of fresh crops, half of them as they are stored.

From a model file (``--from``), whose decoder stays as it is: ``encoder`` and ``integer``, which
train the analysis and the head as ``joint`` and ``integer`` train everything, then ``head``.

The coder's tables and the model file follow (``finish.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.architecture import Architecture, Sizes
from deepsic_codec.model.exact.export import export_gains
from deepsic_codec.model.family import CodingPrior
from deepsic_codec.model.networks import step_lambda
from deepsic_codec.model.ops.protocol import RateTables
from deepsic_codec.model.paper import RATES, PaperArchitecture
from deepsic_codec.model.quantise import load_tables, make_tables, quantise
from deepsic_codec.payload.constants import LABEL_CELL, quality_step
from deepsic_codec.training.balance import balance, balance_head
from deepsic_codec.training.data import LabelledTiles, Photographs
from deepsic_codec.training.graphs import Graphs
from deepsic_codec.training.loss import Networks, Terms, cell_logits, cells_of, semantic
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
#: Phases whose transforms do not imitate their integer form.
FLOATING = ("joint", "encoder")
#: Qualities at which held-out data is measured.
CHECKED = (15.0, 35.0, 55.0, 80.0)
#: Images per call where nothing is trained.
BATCH = 8

#: Batches that the transforms' ranges are measured on.
CALIBRATION = 8

Measures = dict[str, Tensor]
Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Phase:
    """A phase of the run.

    Attributes
    ----------
    name : str
    groups : list of dict
        Parameters that it trains, ``{"params": ..., "factor": of the learning rate}``, for Adam.
    step : callable
        Number of the step, data generator -> measures; has added to the gradients.
    steps, minutes, lr
        It ends when either is over.
    images : int
        Images per step, for the rate that is shown.
    given : dict of str to Tensor
        What its data come from and its own steps change: checkpoints keep it for who resumes.
    """

    name: str
    groups: list[dict[str, Any]]
    step: Callable[[int, np.random.Generator], Measures]
    steps: int
    minutes: float
    lr: float
    images: int
    given: dict[str, Tensor] = field(default_factory=dict)


class Work:
    """Networks, data and settings of a run, and the phases that they go through.

    ``stored`` is the integer prior of the model file that the networks are from, if they are from one.
    """

    def __init__(
        self,
        s: Settings,
        nets: Networks,
        photos: Photographs | None,
        tiles: LabelledTiles | None,
        device: str,
        stored: dict[str, Tensor] | None = None,
    ) -> None:
        self.s, self.nets, self.photos, self.tiles, self.device = s, nets, photos, tiles, device
        self._stored = stored
        self.share = s.share
        self._gradients: Callable[..., Measures] = self._joint_gradients
        self.given: dict[str, Tensor] = {}  # of the checkpoint that a phase goes on from

    def plan(self) -> list[tuple[str, Callable[[], Phase]]]:
        """Names of the phases that these settings ask for, and what makes each when its turn comes."""
        s, wanted = self.s, []
        if s.base:
            if s.trains_encoder:
                wanted += [("encoder", self.encoder), ("integer", self.integer)]
        else:
            if s.minutes and s.steps:
                wanted.append(("joint", self.joint))
            if self.nets.stores_integers:
                wanted.append(("integer", self.integer))  # without minutes or steps: brought into that form
            if s.prior_minutes and s.prior_steps and hasattr(self.nets, "prior"):
                wanted.append(("prior", self.prior))
            if s.synthesis_minutes and s.synthesis_steps:
                wanted.append(("synthesis", self.synthesis))
        if s.head_minutes and s.head_steps and self.tiles:
            wanted.append(("head", self.head))
        return wanted

    def joint(self) -> Phase:
        """Phase 1."""
        s, nets = self.s, self.nets
        nets.integer = False
        nets.train()
        return self._joint_phase("joint", s.steps, s.minutes, s.lr)

    def encoder(self) -> Phase:
        """Phase 1 of a model whose decoder stays: its analysis learns to make more of it."""
        s, nets = self.s, self.nets
        nets.integer, nets.bounded = False, True
        nets.train()
        return self._joint_phase("encoder", s.encoder_steps, s.encoder_minutes, s.encoder_learning_rate)

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters that the joint loss trains."""
        s, nets = self.s, self.nets
        if not s.base:
            return nets.groups(s.linear_lr, s.prior_lr)
        trained = [nets.analysis, nets.head] if self.tiles else [nets.analysis]
        encoder = {id(p) for part in trained for p in part.parameters()}
        groups = [
            g | {"params": [p for p in g["params"] if id(p) in encoder]} for g in nets.groups(s.linear_lr, s.prior_lr)
        ]
        return [g for g in groups if g["params"]]

    def _joint_step(self, number: int, rng: np.random.Generator) -> Measures:
        s = self.share
        # labelled cells sometimes stand alone and sometimes inside a larger image
        arrangement = (s.mosaics_per_step, 4) if number % 2 else (16 * s.mosaics_per_step, 1)
        drawn = [self.photos.crops(s.photos_per_step, s.crop, rng), self.qualities(s.photos_per_step)]
        if self.tiles:
            drawn += self.tiles.mosaics(*arrangement, rng, s.jitter)
            drawn.append(self.qualities(arrangement[0]))
        return self._gradients(*drawn)

    def _joint_gradients(
        self,
        photos: Tensor,
        quality: Tensor,
        tiles: Tensor | None = None,
        labels: Tensor | None = None,
        tiles_quality: Tensor | None = None,
    ) -> Measures:
        nets, bf16 = self.nets, self.share.bf16
        only = _only(bool(self.s.base))  # a model file's prior is integers
        if tiles is None:
            return self._descended([(nets.terms(photos, quality, bf16, **only), quality, None)])
        if tiles.shape[1:] == photos.shape[1:]:  # one batch of both: fewer and larger operations
            both = torch.cat([quality, tiles_quality])
            terms = nets.terms(torch.cat([photos, tiles]), both, bf16, **only)
            of_photos, of_tiles = terms.of(slice(len(photos))), terms.of(slice(len(photos), None))
            return self._descended([(of_photos, quality, None), (of_tiles, tiles_quality, labels)])
        first = self._descended([(nets.terms(photos, quality, bf16, **only), quality, None)])
        second = self._descended([(nets.terms(tiles, tiles_quality, bf16, **only), tiles_quality, labels)])
        return first | second | {"loss": first["loss"] + second["loss"]}

    def _descended(self, parts: list[tuple[Terms, Tensor, Tensor | None]]) -> Measures:
        """Add to the gradients those of the loss of photographs and of tiles, which have labels."""
        s, nets, seen = self.share, self.nets, {}
        total = torch.zeros((), device=self.device)
        for terms, q, labels in parts:
            loss = (1.0 if not self.tiles else 0.75 if labels is None else 0.25) * nets.loss(terms, q)
            if self.tiles:
                unknown = torch.full(terms.logits.shape[:3], nets.arch.classes - 1, device=self.device)
                goal = unknown if labels is None else labels
                loss = loss + s.semantic_weight * (0.3 if labels is None else 1) * semantic(terms.logits, goal)
            total = total + loss
            prefix = "" if labels is None else "tiles_"
            seen |= {f"{prefix}bpp": terms.rate.mean(), f"{prefix}mse": terms.distortion.mean()}
            if labels is not None:
                seen["accuracy"] = (terms.logits.argmax(-1) == labels).float().mean()
        total.backward()
        return {k: v.detach() for k, v in ({"loss": total} | seen).items()}

    def _joint_phase(self, name: str, steps: int, minutes: float, lr: float) -> Phase:
        """A phase of the joint loss, for the networks as they are now."""
        groups = self._groups()
        self._gradients = self._joint_gradients
        if self.device.startswith("cuda") and self.s.graphs and self.nets.can_be_recorded:
            self._gradients = Graphs(self._joint_gradients, [p for group in groups for p in group["params"]])
        images = self.s.photos_per_step + (self.s.mosaics_per_step if self.tiles else 0)
        return Phase(name, groups, self._joint_step, steps, minutes, lr, images)

    def integer(self) -> Phase:
        """Phase 2."""
        s, nets = self.s, self.nets
        nets.eval()
        if not nets.integer:
            transforms = [nets.analysis] if s.base else [nets.analysis, nets.synthesis]
            balance(transforms, self._calibrate, **({"largest": 1.0} if nets.bounded else {}))
            nets.integer = True
        nets.train()
        return self._joint_phase("integer", s.integer_steps, s.integer_minutes, s.integer_learning_rate)

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Run both transforms on training images at all qualities."""
        nets = self.nets
        for x, q in self.calibration(CALIBRATION):
            gain = nets.gains(q)
            nets.synthesis(torch.round(nets.analysis(x, q) * gain) / gain, q)

    def calibration(self, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training images (8,3,H,W) and qualities (8,)."""
        rng = np.random.default_rng(self.s.seed + 6)
        for batch in range(batches):
            mosaic = self.tiles and batch % 4 == 3
            x = self.tiles.mosaics(BATCH, 2, rng)[0] if mosaic else self.photos.crops(BATCH, self.s.crop, rng)
            yield x, self.stored_qualities(len(x), rng)

    @torch.no_grad()
    def integer_head(self) -> None:
        """Bring the semantic head into its integer form."""
        nets, s = self.nets.eval(), self.s

        def calibrate() -> None:
            rng = np.random.default_rng(s.seed + 7)
            for batch in range(4 * CALIBRATION):
                if self.tiles and (batch % 4 or not self.photos):
                    x = self.tiles.mosaics(BATCH, 4, rng)[0]
                else:
                    x = self.photos.crops(BATCH, s.crop, rng)
                q = self.stored_qualities(len(x), rng)
                cell_logits(nets.head, nets.analysis(x, q), q)

        if nets.stores_integers and not nets.head.integer:
            balance_head(nets.head, calibrate)
            nets.head.integer = True

    def prior(self) -> Phase:
        """Phase 3: weighs every quality alike."""
        s, net = self.s, self.nets.prior
        symbols, quality = self.symbols
        net.train()

        def step(number: int, rng: np.random.Generator) -> Measures:
            pick = torch.from_numpy(rng.integers(len(symbols), size=self.share.prior_batch)).to(self.device)
            x, q = symbols[pick].float(), quality[pick]
            bits = net.bits(x, *net(x, q, quantised=True)).sum((1, 2, 3)) / (256 * x.shape[2] * x.shape[3])
            loss = (bits / (bits.detach() + 0.05)).mean()
            loss.backward()
            return {"loss": loss.detach(), "bpp": bits.mean().detach()}

        groups = [{"params": list(net.parameters()), "factor": 1.0}]
        return Phase(
            "prior",
            groups,
            step,
            s.prior_steps,
            s.prior_minutes,
            s.prior_learning_rate,
            s.prior_batch,
            self.prior_before,
        )

    def synthesis(self) -> Phase:
        """Phase 4: on symbols as the encoder chooses them with the trained prior."""
        s, nets = self.s, self.nets
        nets.eval()
        groups = [{"params": list(nets.synthesis.parameters()), "factor": 1.0}]

        def step(number: int, rng: np.random.Generator) -> Measures:
            count = self.share.photos_per_step
            x = self.photos.crops(count, s.crop, rng)
            if self.tiles and number % 4 == 3:
                x = self.tiles.mosaics(max(1, count // 2), 4, rng)[0]
            q = self.qualities(len(x))
            with torch.no_grad():
                gain = nets.gains(q)
                decoded = self.chosen(nets.analysis(x, q) * gain, gain, q) / gain
            with torch.autocast(x.device.type, torch.bfloat16, enabled=s.bf16):
                found = nets.synthesis(decoded, q)
            error = (found - x).square().mean((1, 2, 3))
            loss = (quality_step(q) / 20 * step_lambda(q) * error).mean()
            loss.backward()
            return {"loss": loss.detach(), "mse": error.mean().detach()}

        return Phase(
            "synthesis",
            groups,
            step,
            s.synthesis_steps,
            s.synthesis_minutes,
            s.synthesis_learning_rate,
            s.photos_per_step,
        )

    def head(self) -> Phase:
        """Phase 5: in floating point; balanced, a head loses next to nothing when it is rounded."""
        s, net = self.s, self.nets.head
        self.nets.eval()
        net.train()

        def step(number: int, rng: np.random.Generator) -> Measures:
            latents, labels, quality = self.cells(self.share.head_batch, rng)
            with torch.autocast(latents.device.type, torch.bfloat16, enabled=s.bf16):
                logits = net(latents, quality).float()
            loss = semantic(logits, labels)
            loss.backward()
            known = labels < net.out.out_features - 1
            right = (logits.argmax(1) == labels) & known
            return {"loss": loss.detach(), "accuracy": right.sum() / known.sum().clamp(min=1)}

        matrices = [p for p in net.parameters() if p.ndim > 1]
        others = [p for p in net.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "factor": 1.0, "weight_decay": s.head_weight_decay},
            {"params": others, "factor": 1.0},
        ]
        return Phase("head", groups, step, s.head_steps, s.head_minutes, s.head_learning_rate, s.head_batch)

    def qualities(self, count: int) -> Tensor:
        """Random qualities (count,)."""
        low, high = self.s.quality_low, self.s.quality_high
        return torch.rand(count, device=self.device) ** self.s.quality_power * (high - low) + low

    def stored_qualities(self, count: int, rng: np.random.Generator) -> Tensor:
        """Random qualities (count,) as payloads have them, in hundredths."""
        drawn = rng.uniform(self.s.quality_low, self.s.quality_high, count).round(2)
        return torch.from_numpy(drawn).float().to(self.device)

    @cached_property
    def prior_before(self) -> dict[str, Tensor]:
        """The integer prior as it is before its phase, also where that is resumed."""
        return self.given or self.nets.export_prior()

    @cached_property
    def symbols(self) -> tuple[Tensor, Tensor]:
        """Symbols to fit the prior to, as the encoder chooses them with the prior that there is before."""
        before = self.nets.integer_prior(self.prior_before, self.device)
        tables = self._make_rdo_tables(before)

        def rounding(scaled: Tensor, gain: Tensor, quality: Tensor) -> Tensor:
            return _choose(before, tables, scaled, quality)

        return self.collect_symbols(self.s.symbol_batches, self.s.seed + 1, rounding)

    @cached_property
    def checked_symbols(self) -> tuple[Tensor, Tensor]:
        """Others, to report on."""
        return self.collect_symbols(max(2, self.s.symbol_batches // 25), self.s.seed + 2, self.chosen)

    @cached_property
    def integer_prior(self) -> CodingPrior:
        """The prior that codes the symbols; not before it is trained."""
        exported = self._stored if self._stored is not None else self.nets.export_prior()
        return self.nets.integer_prior(exported, self.device)

    @cached_property
    def rdo_tables(self) -> RateTables | None:
        """What the encoder chooses symbols by."""
        return self._make_rdo_tables(self.integer_prior)

    def _make_rdo_tables(self, prior: CodingPrior) -> RateTables | None:
        if not self.nets.stores_integers:
            return None
        tables = make_tables(prior.log_scales, export_gains(self.nets.gains)["step"])
        return load_tables(tables, self.nets.arch.latents, self.device)

    def chosen(self, scaled: Tensor, gain: Tensor, quality: Tensor) -> Tensor:
        """What the encoder makes of latents in steps (B,C,h,w), at its usual effort."""
        return _choose(self.integer_prior, self.rdo_tables, scaled, quality)

    @torch.no_grad()
    def collect_symbols(self, batches: int, seed: int, rounding: Rounding | None = None) -> tuple[Tensor, Tensor]:
        """Symbols int16 (N,C,h,w) of random crops at random qualities (N,); every fifth batch mosaics.

        ``rounding`` takes latents in steps (B,C,h,w), gains (B,C,1,1) and qualities; to the nearest by default.
        """
        rng = np.random.default_rng(seed)
        nets, out, qualities = self.nets.eval(), [], []
        for i in range(batches):
            mosaic = self.tiles and i % 5 == 4
            x = self.tiles.mosaics(BATCH, self.s.crop // 64, rng)[0] if mosaic else None
            x = self.photos.crops(BATCH, self.s.crop, rng) if x is None else x
            q = self.stored_qualities(BATCH, rng)
            gain = nets.gains(q)
            scaled = (nets.analysis(x, q) * gain).clamp(-32767, 32767)
            out.append((rounding(scaled, gain, q) if rounding else torch.round(scaled)).to(torch.int16))
            qualities.append(q)
        return torch.cat(out), torch.cat(qualities)

    @torch.no_grad()
    def cells(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (N,C,4,4) of about ``count`` fresh cells, numbers of their classes (N,), qualities (N,).

        Half of the tiles stand alone and half in mosaics, half of the latents are as the
        analysis gives them and half as they are stored; an eighth are cells of photographs,
        which are *unknown*.
        """
        nets, found = self.nets, []
        strange = max(1, count // 8) if self.photos else 0
        alone = max(1, (count - strange) // 2)
        parts = [self.tiles.mosaics(alone, 1, rng, self.s.jitter)]
        inside = (count - strange - alone) // 16
        if inside:
            parts.append(self.tiles.mosaics(inside, 4, rng, self.s.jitter))
        if strange:
            crops = -(-strange // (self.s.crop // LABEL_CELL) ** 2)
            x = self.photos.crops(crops, self.s.crop, rng)
            edge = self.s.crop // LABEL_CELL
            parts.append((x, torch.full((crops, edge, edge), nets.arch.classes - 1, device=self.device)))
        for x, labels in parts:
            q = self.stored_qualities(len(x), rng)
            with self._floating(), torch.autocast(x.device.type, torch.bfloat16, enabled=self.s.bf16):
                y = nets.analysis(x, q).float()
            stored = torch.from_numpy(np.flatnonzero(rng.random(len(y)) < 0.5)).to(self.device)
            if len(stored):
                gain = nets.gains(q[stored])
                y[stored] = self.chosen((y[stored] * gain).clamp(-32767, 32767), gain, q[stored]) / gain
            found.append((cells_of(y), labels.reshape(-1), q.repeat_interleave(labels[0].numel())))
        latents, targets, qualities = (torch.cat(column) for column in zip(*found, strict=True))
        return latents, targets, qualities

    def _floating(self) -> AbstractContextManager[None]:
        """The analysis in floating point, where it has another form."""
        return self.nets.analysis.floating() if self.nets.stores_integers else nullcontext()

    @property
    def estimates_rate(self) -> bool:
        """Whether the prior has been trained here or restored: the paper's is not."""
        return not self.s.base or self.nets.stores_integers

    @torch.no_grad()
    def held_out(self, state: dict[str, Tensor], quantised: bool) -> list[dict[str, Any]]:
        """Estimated rate, PSNR and accuracy on held-out training data, one row per quality."""
        s = self.s
        with torch.random.fork_rng(devices=[]):  # measuring must not change what training draws next
            nets = type(self.nets)(self.nets.arch).to(self.device).eval()
        nets.load_state_dict(state)
        nets.integer, nets.bounded = self.nets.integer, self.nets.bounded
        rows = []
        for quality in [q for q in CHECKED if s.quality_low <= q <= s.quality_high] or [s.quality_low]:
            row: dict[str, Any] = {"quality": quality}
            if self.photos:
                bpp, decibels = [], []
                for image in self.photos.held_out[:12]:
                    edges = [min(768, n // 64 * 64) for n in image.shape[:2]]
                    x = torch.tensor(image[: edges[0], : edges[1]], device=self.device)
                    q = torch.full((1,), quality, device=self.device)
                    terms = nets.terms(x.permute(2, 0, 1)[None].float(), q, s.bf16, **_only(quantised))
                    bpp.append(float(terms.rate))
                    decibels.append(10 * math.log10(255**2 / max(1e-9, float(terms.distortion))))
                row |= {"psnr": float(np.mean(decibels))}
                if self.estimates_rate:
                    row["bpp"] = float(np.mean(bpp))
            if self.tiles:
                row |= {"pre": self.accuracy(nets, quality, False), "post": self.accuracy(nets, quality, True)}
            rows.append(row)
        return rows

    @torch.no_grad()
    def accuracy(self, nets: Networks, quality: float, rounded: bool) -> float:
        """Top-1 on the held-out tiles of the training set, from float or rounded latents.

        They are rounded as the encoder does from when on there is a prior to do it by; to the nearest before.
        """
        right = 0
        for i in range(0, len(self.tiles.test_labels), 256):
            x = torch.from_numpy(self.tiles.test_pixels[i : i + 256]).to(self.device).permute(0, 3, 1, 2).float()
            q = torch.full((len(x),), quality, device=self.device)
            y, gain = nets.analysis(x, q), nets.gains(q)
            if rounded:
                chooses = self._stored is not None or "integer_prior" in self.__dict__
                y = (self.chosen(y * gain, gain, q) if chooses else torch.round(y * gain)) / gain
            found = cell_logits(nets.head, y, q)[:, 0, 0].argmax(1).cpu().numpy()
            right += int((found == self.tiles.test_labels[i : i + 256]).sum())
        return right / len(self.tiles.test_labels)


def _choose(prior: CodingPrior, tables: RateTables | None, scaled: Tensor, quality: Tensor) -> Tensor:
    """Symbols, as float, of latents in steps (B,C,h,w) at qualities (B,)."""
    nhwc = scaled.permute(0, 2, 3, 1).contiguous()
    whole = torch.floor(quality + 0.5).clamp(1, 100).long()
    return quantise(prior, tables, nhwc, whole)[0].float().permute(0, 3, 1, 2)


def _only(quantised: bool) -> dict[str, bool]:
    """The integer form of the prior is asked for only where there is one."""
    return {"quantised": True} if quantised else {}


def architecture_of(s: Settings, classes: int) -> Sizes:
    """Sizes of a named architecture for a number of classes.

    Raises
    ------
    ConfigurationError
        If there is no such architecture.
    """
    if s.architecture not in ARCHITECTURES:
        raise ConfigurationError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {s.architecture!r}")
    return replace(ARCHITECTURES[s.architecture], classes=classes + 1)
