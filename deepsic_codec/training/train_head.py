"""Train a head for the decoder of a model, with the classes of a tree, and write it to a file of its own."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.cpu.scheduler import CpuScheduler
from deepsic_codec.model.file import HeadInfo, ModelInfo, save_head
from deepsic_codec.model.zoo import find_head, find_model
from deepsic_codec.progress import Progress
from deepsic_codec.training.head_data import LEAST_OTHER, Drawer, labelled, read_source
from deepsic_codec.training.head_settings import HeadSettings
from deepsic_codec.training.heads import (
    CellSet,
    Marks,
    calibrate,
    chance_leaves,
    fit,
    fit_last,
    parts_of,
    starting_head,
    to_integers,
    without_classes,
)
from deepsic_codec.training.tree import PACKAGED, Tree

#: Branches of the packaged tree that images of no data set do not show; whether they show others is not known.
ABSENT = ("Overhead", "Waste")
#: Shares of a batch: of each labelled source alike, and of other images.
OTHERS = 0.15
#: Share of all cores for one process is up to the caller: torch gets this many threads.
THREADS = 1


def train_head(s: HeadSettings, report: Callable[[str], None] = print, progress: Progress | None = None) -> HeadInfo:
    """Draw cells, train a head on them, fit the scale of its scores on held-out images, and write its file.

    Raises
    ------
    ConfigurationError
        For data or settings that it cannot be trained with.
    ModelNotFound
        If there is no such model.
    """
    _start(s)  # before what takes long
    cells = draw_cells(s, Tree.read(s.tree or PACKAGED).without(s.exclude), report, progress)
    return fit_head(s, cells, report)


@dataclass(frozen=True)
class Cells:
    """Cells to train a head on.

    Attributes
    ----------
    tree : Tree
        Of their classes.
    sources : list of (float, CellSet)
        Shares of a batch and cells; the last are of images of no class.
    """

    tree: Tree
    sources: list[tuple[float, CellSet]]

    def without(self, names: Sequence[str]) -> "Cells":
        """Return the cells of images that show other nodes than these and what lies below them, and their tree."""
        tree = self.tree.without(names)
        old, new = (Marks(one, dict.fromkeys(ABSENT, 1.0)) for one in (self.tree, tree))
        number_of = {pair: number for number, pair in enumerate(new.pairs)}
        numbers = np.array([*(number_of.get(pair, -1) for pair in old.pairs), new.other])
        sources = []
        for share, cells in self.sources:
            renumbered = replace(cells, marks=numbers[cells.marks])
            sources.append((share, renumbered[renumbered.marks >= 0]))
        return Cells(tree, sources)


def draw_cells(
    s: HeadSettings, tree: Tree, report: Callable[[str], None] = print, progress: Progress | None = None
) -> Cells:
    """Draw cells of the images that settings name; raises what `train_head` raises."""
    if not s.labels or not s.others:
        raise ConfigurationError("a head needs labelled images (--labels) and images of no class (--others)")
    torch.set_num_threads(THREADS)
    known = Marks(tree, dict.fromkeys(ABSENT, 1.0))
    drawer = Drawer(CpuScheduler(find_model(s.base)), s.seed)
    sources: list[tuple[float, CellSet]] = []
    images, marks = labelled([pair for path in s.labels for pair in read_source(path, "train/")], known)
    of_set = np.array([known.sets[mark] for mark in marks])
    groups = [np.flatnonzero(np.isin(of_set, one)) for one in _groups(images, of_set)]
    for group in groups:
        chosen = [images[i][1] for i in group]
        cells = drawer.draw(chosen, marks[group], s.passes, progress=progress)
        sources.append(((1 - OTHERS) / len(groups), cells))
        report(f"{len(cells)} cells of {len(chosen)} labelled images")
    others = [pixels for path in s.others for _, pixels in read_source(path)]
    cells = drawer.draw(others, np.full(len(others), known.other), s.passes, least=LEAST_OTHER, progress=progress)
    sources.append((OTHERS, cells))
    report(f"{len(cells)} cells of {len(others)} images of no class")
    return Cells(tree, sources)


def fit_head(s: HeadSettings, cells: Cells, report: Callable[[str], None] = print) -> HeadInfo:
    """Train a head on cells, fit the scale of its scores on held-out images, and write its file."""
    torch.set_num_threads(THREADS)
    info, tree = _start(s), cells.tree
    known = Marks(tree, dict.fromkeys(ABSENT, 1.0))
    parts = [(share, list(parts_of(one))) for share, one in cells.sources]
    train, held = ([(share, part[i]) for share, part in parts] for i in (0, 1))
    head = starting_head(info, tree.vocabulary, s.values)
    if s.steps:
        head = fit(head, train, known, steps=s.steps, seed=s.seed, report=report)
    fit_last(head, train, known, steps=s.last_steps, seed=s.seed, report=report)
    factors = calibrate(head, held, known, tree.leaves)
    report("scale of the scores of leaves, inner nodes and unknown: " + ", ".join(f"{one:.2f}" for one in factors))
    unsupported = chance_leaves(head, [one for _, one in held], known)
    if unsupported:
        report("at chance on held-out images, and left out of the vocabulary: " + ", ".join(unsupported))
    arrays, vocabulary = without_classes(to_integers(head, train[0][1]), tree.vocabulary, unsupported)
    sizes = info.architecture | {"classes": len(vocabulary.names), "head_embedding": s.values}
    trained = {"run": _public(s), "left_out": unsupported}
    stored = save_head(s.out, Path(s.out).stem, arrays, info, sizes, vocabulary, trained)
    report(f"{s.out}: head {stored.head[:16]} for decoder {stored.decoder[:16]}, {Path(s.out).stat().st_size} bytes")
    return stored


def _start(s: HeadSettings) -> ModelInfo:
    """Return the model with the head that training starts from."""
    model = find_model(s.base)
    return find_model(s.base, head=find_head(s.head, model.decoder)) if s.head else model


def _groups(images: Sequence[tuple[str, Any]], of_set: np.ndarray[Any, Any]) -> list[list[str]]:
    """Return the data sets by what they have: images of one cell, and larger ones."""
    small = {str(name) for (_, pixels), name in zip(images, of_set, strict=True) if max(pixels.shape[:2]) <= 64}
    return [group for group in (sorted(small), sorted({*map(str, of_set)} - small)) if group]


def _public(s: HeadSettings) -> dict[str, Any]:
    """Return the settings for the file, without paths of this machine."""
    names = {key: [Path(path).name for path in getattr(s, key)] for key in ("labels", "others")}
    return {k: v for k, v in asdict(s).items() if k != "out"} | names | {"tree": Path(s.tree or PACKAGED).name}
