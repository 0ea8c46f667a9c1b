"""Train a head of its own: a vocabulary over several data sets, and embeddings, for the decoder of a model.

The loss is the cross-entropy of independent sigmoids, weighted by what the class of an image says of each node of the
tree (`training.tree`), and for embeddings the cross-entropy between two distributions over the other cells of a batch:
that of their similarity, and one that favours crops of the same image and of the same class, then of the same parent.

At the end an embedding is linear in what the last two layers see (`set_discriminant`): the directions in which classes
differ most, compared with the variation within them (linear discriminant analysis). Trained on few images of each
class, these tell new classes apart better than rows that follow gradients.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.export import export_network, restore_network
from deepsic_codec.model.family import HEAD, tensors_below
from deepsic_codec.model.file import ModelInfo, load_arrays
from deepsic_codec.model.networks import HIDDEN_MAX, STREAM_MAX, Block, SemanticHead
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.training.balance import balance_head, bias_of
from deepsic_codec.training.tree import Tree

#: Logits of an embedding's values have about this root mean square, so that 8 bits hold them.
SPREAD = 2.5
#: Similarities are divided by this: lower, and only the nearest cells count.
TEMPERATURE = 0.12
#: Weight of the loss of embeddings.
EMBEDDING_WEIGHT = 1.0
#: Similarity that the tree asks for between cells of one image or class, and of one parent.
SAME, SIBLINGS = 1.0, 0.15
#: Part of the variation within classes that is taken to be alike in all directions, so that rare ones do not rule.
SHRINKAGE = 0.2
#: Cells beyond the range of a direction, as a share: 8 bits hold the others.
CLIPPED = 1e-3
#: Share of images that the scales of the scores are fitted to.
HELD_OUT = 8
#: Held-out images of a leaf, and of other classes of its data set, that decide whether it stays.
LEAST_IMAGES = 5
#: Step of the integers that the hidden layer reads; smaller deviations are noise.
RESOLUTION = 2.0**-formats.READ_BITS
#: Weights of the past in the averages of the head.
AVERAGE = 0.995
#: Largest norm of the gradient.
MAX_NORM = 5.0


@dataclass
class CellSet:
    """Label cells with what is known of them.

    Attributes
    ----------
    cells : ndarray
        int16 (N,4,4,C), latents.
    marks : ndarray
        int64 (N,): number of a pair of data set and node, and one for images of no data set.
    images : ndarray
        int64 (N,): numbers of the images; cells of one image show one place.
    quality : ndarray
        float32 (N,).
    """

    cells: NDArray[np.int16]
    marks: NDArray[np.int64]
    images: NDArray[np.int64]
    quality: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.marks)

    def __getitem__(self, at: slice | NDArray[Any]) -> "CellSet":
        """Return some of the cells."""
        return CellSet(self.cells[at], self.marks[at], self.images[at], self.quality[at])


class Marks:
    """What cells of each pair of data set and node say, by the number of the pair; the last are of no data set."""

    def __init__(self, tree: Tree, other: dict[str, float]) -> None:
        self.tree = tree
        names = ((name, node) for name, one in tree.data_sets.items() for node in one["classes"].values())
        self.pairs = list(dict.fromkeys(names))
        self.sets = [name for name, _ in self.pairs]
        self.other = len(self.pairs)
        said = [tree.says(*pair) for pair in self.pairs] + [tree.says_other(other)]
        self.expected, self.weight = (torch.from_numpy(np.stack(part)) for part in zip(*said, strict=True))
        self.related = torch.zeros(self.other + 1, self.other + 1)
        for i, (_, one) in enumerate(self.pairs):
            for j, (_, two) in enumerate(self.pairs):
                if one == two:
                    self.related[i, j] = SAME
                elif tree.parents[one] == tree.parents[two] or one in tree.path(two) or two in tree.path(one):
                    self.related[i, j] = SIBLINGS


def pooled(head: SemanticHead, cells: Tensor, quality: Tensor) -> Tensor:
    """Return what the last two layers see of cells (N,4,4,C) of companded latents, within bounds, fast on a CPU."""
    n, h, w, channels = cells.shape
    x = F.linear(cells.reshape(n, h * w, channels), head.stem.weight[:, :, 0, 0], head.stem.bias)
    scale, offset = 1 + head.mod.scale(quality), head.mod.offset(quality)
    x = F.hardtanh(F.relu(x * scale[:, None] + offset[:, None]), -STREAM_MAX, STREAM_MAX)
    for block in head.blocks:
        assert isinstance(block, Block)
        spatial = torch.bmm(x.permute(2, 0, 1), _matrices(block.spatial.weight, h, w)).permute(1, 2, 0)
        hidden = F.linear(spatial + bias_of(block.spatial), block.up.weight[:, :, 0, 0], block.up.bias)
        hidden = F.hardtanh(hidden, 0, HIDDEN_MAX)
        x = x + F.linear(hidden, block.down.weight[:, :, 0, 0], block.down.bias)
        x = F.hardtanh(x, -STREAM_MAX, STREAM_MAX)
    return torch.cat([x.mean(1), x.amax(1)], 1)


def last_outputs(head: SemanticHead, values: Tensor) -> Tensor:
    """Return the outputs of the head from pooled values (N,2 widths)."""
    return head.out(head.dropout(F.hardtanh(head.hidden(values), 0, HIDDEN_MAX)))


@dataclass(frozen=True)
class Standardised:
    """Values that the hidden layer of a head sees, with mean 0 and variance 1: gradients then work on all alike.

    Attributes
    ----------
    mean, deviation : Tensor
        Of the values, float32 (2 widths,).
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Standardised":
        """Take mean and deviation of values (N,2 widths)."""
        return cls(values.mean(0), values.std(0) + RESOLUTION)

    def __call__(self, values: Tensor) -> Tensor:
        """Return the values standardised."""
        return (values - self.mean) / self.deviation

    @torch.no_grad()
    def enter(self, head: SemanticHead) -> None:
        """Change the hidden layer, in place, so that it gives for standardised values what it gave for others."""
        head.hidden.bias.add_(head.hidden.weight @ self.mean)
        head.hidden.weight.mul_(self.deviation)

    @torch.no_grad()
    def leave(self, head: SemanticHead) -> None:
        """Change the layer back, in place."""
        head.hidden.weight.div_(self.deviation)
        head.hidden.bias.sub_(head.hidden.weight @ self.mean)


def _matrices(kernels: Tensor, h: int, w: int) -> Tensor:
    """Return depth-wise 3x3 convolutions of a cell, (C,1,3,3), as matrices (C,h*w,h*w) from positions to positions."""
    padded = torch.zeros(len(kernels), 2 * h - 1, 2 * w - 1)
    padded[:, h - 2 : h + 1, w - 2 : w + 1] = kernels[:, 0]
    y, x = np.divmod(np.arange(h * w), w)
    rows, columns = (torch.from_numpy(a[:, None] - a[None]) for a in (y, x))
    return padded[:, rows + h - 1, columns + w - 1]


def compand(cells: NDArray[np.int16]) -> Tensor:
    """Return companded latents, float32, as the head reads them."""
    return torch.asinh(torch.from_numpy(cells).float() * (2 * 2.0**-formats.LATENT_BITS))


class Sampler:
    """Draws batches: a share from each source, classes alike, and two cells of an image where it has several."""

    def __init__(self, sources: list[tuple[float, CellSet]], rng: np.random.Generator) -> None:
        self.sources, self.rng = sources, rng
        self._groups = [self._grouped(cells) for _, cells in sources]

    @staticmethod
    def _grouped(cells: CellSet) -> list[list[NDArray[np.int64]]]:
        """Return the cells of each image, by mark."""
        groups: list[list[NDArray[np.int64]]] = []
        for mark in np.unique(cells.marks):
            numbers = np.flatnonzero(cells.marks == mark)
            numbers = numbers[np.argsort(cells.images[numbers], kind="stable")]
            ends = np.flatnonzero(np.diff(cells.images[numbers])) + 1
            groups.append(np.split(numbers, ends))
        return groups

    def batch(self, size: int) -> list[tuple[CellSet, NDArray[np.int64]]]:
        """Return the cells of each source that are in a batch, as numbers."""
        result = []
        for (share, cells), groups in zip(self.sources, self._groups, strict=True):
            chosen: list[int] = []
            while len(chosen) < round(share * size):
                images = groups[self.rng.integers(len(groups))]
                of_image = images[self.rng.integers(len(images))]
                chosen += self.rng.choice(of_image, min(2, len(of_image)), replace=False).tolist()
            result.append((cells, np.array(chosen)))
        return result

    def known_of(self, batch: list[tuple[CellSet, NDArray[np.int64]]]) -> tuple[Tensor, Tensor]:
        """Return marks, and numbers of images that differ between sources."""
        count = len(batch)
        marks = [torch.from_numpy(cells.marks[at]) for cells, at in batch]
        images = [torch.from_numpy(cells.images[at] * count + i) for i, (cells, at) in enumerate(batch)]
        return torch.cat(marks), torch.cat(images)


def label_loss(logits: Tensor, marks: Tensor, known: Marks) -> Tensor:
    """Return the weighted cross-entropy of the scores, summed over classes, as mean over cells."""
    loss = F.binary_cross_entropy_with_logits(logits, known.expected[marks], reduction="none")
    return (loss * known.weight[marks]).sum(1).mean()


def embedding_loss(values: Tensor, marks: Tensor, images: Tensor, known: Marks) -> Tensor:
    """Return the cross-entropy between what cells are to resemble and what they do, as mean over cells."""
    itself = torch.eye(len(values), dtype=torch.bool)
    target = torch.maximum(known.related[marks][:, marks], (images[:, None] == images[None]).float() * SAME)
    target = target.masked_fill(itself, 0)
    unit = F.normalize(values, dim=1)
    logits = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -1e9)
    total = target.sum(1)
    has_any = total > 0
    loss = -(target * F.log_softmax(logits, 1)).sum(1)[has_any] / total[has_any]
    spread = (values.square().mean().sqrt() - SPREAD).square()
    return loss.mean() + 0.1 * spread


def starting_head(info: ModelInfo, vocabulary: Vocabulary, values: int) -> SemanticHead:
    """Return a head for a model: that of the model, with a new last layer."""
    sizes = info.architecture | {"classes": len(vocabulary.names), "head_embedding": values}
    head = SemanticHead(Architecture.from_json(sizes))
    head.bounded = True
    restore_network(head, tensors_below(load_arrays(info), HEAD))
    return head


def fit_last(
    head: SemanticHead,
    sources: list[tuple[float, CellSet]],
    known: Marks,
    *,
    steps: int,
    batch: int = 512,
    learning_rate: float = 3e-3,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> None:
    """Train the scores of a head by its last two layers, in place: what they see of each cell is computed once.

    The embedding becomes that of `set_discriminant`, and training leaves it as it is.
    """
    values_of = {id(cells): _pooled_of(head, cells) for _, cells in sources}
    set_discriminant(head, [values_of[id(cells)] for _, cells in sources], [cells for _, cells in sources], known)
    scale = Standardised.of(torch.cat([*values_of.values()]))
    scale.enter(head)
    sampler = Sampler(sources, np.random.default_rng(seed))

    def step() -> tuple[Tensor, Tensor, Tensor]:
        drawn = sampler.batch(batch)
        values = torch.cat([values_of[id(cells)][at] for cells, at in drawn])
        return last_outputs(head, scale(values)), *sampler.known_of(drawn)

    values = len(head.out.bias) - head.classes
    rows = (head.hidden, slice(values)), (head.out, slice(head.classes, None))
    handles = [one.register_hook(partial(_zeroed, part)) for layer, part in rows for one in layer.parameters()]
    # Without weight decay: gradients of 0 then leave a row as it is.
    groups = [{"params": [*head.hidden.parameters(), *head.out.parameters()], "lr": learning_rate, "weight_decay": 0.0}]
    _train(head, groups, step, known, steps, seed, report)
    for handle in handles:
        handle.remove()
    scale.leave(head)


def _zeroed(rows: slice, gradient: Tensor) -> Tensor:
    result = gradient.clone()
    result[rows] = 0
    return result


@torch.no_grad()
def set_discriminant(head: SemanticHead, values: Sequence[Tensor], cells: Sequence[CellSet], known: Marks) -> None:
    """Make the embedding of a head linear in what the last two layers see, in place.

    The first units of the hidden layer become as many directions as an embedding has values, in the middle of their
    range, and the embedding repeats them.

    Parameters
    ----------
    head : SemanticHead
        With at least as many hidden units as values.
    values : sequence of Tensor
        What the layers see of each set, float32 (N,2 widths).
    cells : sequence of CellSet
        The sets.
    known : Marks
        Those of the sets; cells of one node are a class, and images of no class are none.
    """
    count = len(head.out.bias) - head.classes
    every, marks = torch.cat([*values]).double(), np.concatenate([one.marks for one in cells])
    mean, deviation = every.mean(0), every.std(0) + RESOLUTION
    standard = (every - mean) / deviation
    nodes = np.array([*(node for _, node in known.pairs), ""])[marks]
    classes = [standard[torch.from_numpy(nodes == node)] for node in sorted({*nodes} - {""})]
    within = torch.stack([torch.cov(one.T, correction=0) for one in classes if len(one) > 1]).mean(0)
    between = torch.cov(torch.stack([one.mean(0) for one in classes]).T, correction=0)
    width = len(within)
    within = (1 - SHRINKAGE) * within + SHRINKAGE * within.trace() / width * torch.eye(width)
    # The directions have variance 1 within classes, and are those of the largest variance between them.
    variances, axes = torch.linalg.eigh(within)
    whiten = axes / variances.sqrt()
    chosen = whiten @ torch.linalg.eigh(whiten.T @ between @ whiten)[1].flip(1)[:, :count]
    along = standard @ chosen
    reach = torch.quantile(along.abs()[torch.randperm(len(along))[:100_000]], 1 - CLIPPED, dim=0)
    middle = HIDDEN_MAX / 2
    factor = middle / reach
    weight = (chosen * factor).T / deviation
    head.hidden.weight[:count] = weight.float()
    head.hidden.bias[:count] = (middle - weight @ mean).float()
    scale = SPREAD / along.square().mean().sqrt() / factor
    head.out.weight[: head.classes, :count] = 0
    head.out.weight[head.classes :] = 0
    head.out.weight[head.classes :, :count] = torch.diag(scale).float()
    head.out.bias[head.classes :] = (-middle * scale).float()


def fit(
    head: SemanticHead,
    sources: list[tuple[float, CellSet]],
    known: Marks,
    *,
    steps: int,
    batch: int = 320,
    learning_rate: float = 2e-3,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> SemanticHead:
    """Train all layers of a head, the last two from the start, and return the average of its states."""
    torch.manual_seed(seed)
    scale = Standardised.of(torch.cat([_pooled_of(head, cells[::8]) for _, cells in sources]))
    _start_last(head)
    sampler, average = Sampler(sources, np.random.default_rng(seed)), copy.deepcopy(head)
    last = [*head.out.parameters()]
    others = [p for p in head.parameters() if all(p is not one for one in last)]
    groups = [{"params": others, "lr": learning_rate / 2}, {"params": last, "lr": learning_rate}]
    number = 0

    def step() -> tuple[Tensor, Tensor, Tensor]:
        nonlocal number
        drawn, number = sampler.batch(batch), number + 1
        with torch.no_grad():
            decay = min(AVERAGE, number / (number + 9))
            for mean, value in zip(average.parameters(), head.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        cells = compand(np.concatenate([cells.cells[at] for cells, at in drawn]))
        quality = torch.from_numpy(np.concatenate([cells.quality[at] for cells, at in drawn]))
        return last_outputs(head, scale(pooled(head, cells, quality))), *sampler.known_of(drawn)

    _train(head, groups, step, known, steps, seed, report)
    scale.leave(average)
    return average.eval()


@torch.no_grad()
def _start_last(head: SemanticHead) -> None:
    """Start the last two layers anew, for standardised values: scores are low, and embeddings point anywhere."""
    torch.nn.init.normal_(head.hidden.weight, 0, head.hidden.in_features**-0.5)
    torch.nn.init.zeros_(head.hidden.bias)
    torch.nn.init.normal_(head.out.weight[: head.classes], 0, 0.02)
    torch.nn.init.normal_(head.out.weight[head.classes :], 0, 0.1)
    torch.nn.init.constant_(head.out.bias[: head.classes], -2.0)
    torch.nn.init.zeros_(head.out.bias[head.classes :])


def _train(
    head: SemanticHead,
    groups: list[dict[str, Any]],
    draw: Callable[[], tuple[Tensor, Tensor, Tensor]],
    known: Marks,
    steps: int,
    seed: int,
    report: Callable[[str], None],
) -> None:
    """Take steps of AdamW; `draw` returns outputs, marks and images of a batch."""
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(groups, weight_decay=0.02)
    rates, classes, sums = [group["lr"] for group in groups], head.classes, np.zeros(3)
    head.train()
    for step in range(steps):
        factor = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        out, marks, images = draw()
        scores = label_loss(out[:, :classes], marks, known)
        nearness = embedding_loss(out[:, classes:], marks, images, known)
        optimiser.zero_grad()
        (scores + EMBEDDING_WEIGHT * nearness).backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], MAX_NORM)
        optimiser.step()
        sums += scores.item(), nearness.item(), 1
        if (step + 1) % 100 == 0 or step + 1 == steps:
            report(f"step {step + 1}: labels {sums[0] / sums[2]:.4f}, embeddings {sums[1] / sums[2]:.4f}")
            sums[:] = 0
    head.eval()


@torch.no_grad()
def _pooled_of(head: SemanticHead, cells: CellSet, size: int = 512) -> Tensor:
    parts = [
        pooled(head, compand(cells.cells[k : k + size]), torch.from_numpy(cells.quality[k : k + size]))
        for k in range(0, len(cells), size)
    ]
    return torch.cat(parts)


@torch.no_grad()
def all_outputs(head: SemanticHead, cells: CellSet) -> Tensor:
    """Return the outputs of a head for all cells."""
    return last_outputs(head, _pooled_of(head, cells))


def calibrate(head: SemanticHead, sources: list[tuple[float, CellSet]], known: Marks, leaves: int) -> list[float]:
    """Scale the logits of leaves, of inner nodes and of "unknown", so that scores are frequencies on these cells.

    Returns the factors.
    """
    logits = [all_outputs(head, cells)[:, : head.classes] for _, cells in sources]
    marks = [torch.from_numpy(cells.marks) for _, cells in sources]
    shares = [torch.full((len(one),), share / len(one)) for (share, _), one in zip(sources, marks, strict=True)]
    values, of, share = torch.cat(logits), torch.cat(marks), torch.cat(shares)
    weight, expected = known.weight[of] * share[:, None], known.expected[of]
    groups = slice(0, leaves), slice(leaves, head.classes - 1), slice(head.classes - 1, head.classes)
    factors = []
    for group in groups:

        def loss(factor: float, group: slice = group) -> float:
            terms = F.binary_cross_entropy_with_logits(factor * values[:, group], expected[:, group], reduction="none")
            return float((terms * weight[:, group]).sum())

        best = min(np.exp(np.linspace(-1.2, 1.2, 49)), key=loss)
        factors.append(float(best))
        with torch.no_grad():
            head.out.weight[group] *= best
            head.out.bias[group] *= best
    return factors


def chance_leaves(head: SemanticHead, held: Sequence[CellSet], known: Marks) -> list[str]:
    """Return the leaves whose scores say no more of held-out images than chance, in each of their data sets.

    An image counts by the mean logits of its cells. The score of a leaf is above chance if images of it score above
    those of other classes in more than half of all pairs, by more than the standard error of that share for images
    that are alike.
    """
    logits, marks = [], []
    for cells in held:
        values = all_outputs(head, cells)[:, : head.classes].numpy()
        for number in np.unique(cells.images[cells.marks != known.other]):
            of_image = cells.images == number
            logits.append(values[of_image].mean(axis=0))
            marks.append(int(cells.marks[of_image][0]))
    scores, sets = np.array(logits), np.array([known.sets[mark] for mark in marks])
    nodes, tree = np.array([known.pairs[mark][1] for mark in marks]), known.tree
    above_chance: dict[str, bool] = {}
    for number, leaf in enumerate(tree.nodes[: tree.leaves]):
        for data_set in np.unique(sets[nodes == leaf]):
            of_set = sets == data_set
            inside, others = (scores[of_set & at, number] for at in (nodes == leaf, nodes != leaf))
            n, m = len(inside), len(others)
            if min(n, m) >= LEAST_IMAGES:
                share = (np.sign(inside[:, None] - others) + 1).mean() / 2
                above_chance[leaf] = above_chance.get(leaf, False) or share > 0.5 + math.sqrt(
                    (n + m + 1) / (12 * n * m)
                )
    return [leaf for leaf, is_above in above_chance.items() if not is_above]


def without_classes(
    arrays: dict[str, NDArray[np.generic]], vocabulary: Vocabulary, names: Collection[str]
) -> tuple[dict[str, NDArray[np.generic]], Vocabulary]:
    """Return the tensors of a head in its integer form, and its vocabulary, without the scores of some classes."""
    numbers = [vocabulary.classes.index(name) for name in names]
    rows = {f"{HEAD}.out.{part}" for part in ("weight", "bias", "shift")}
    kept = {name: np.delete(value, numbers, 0) if name in rows else value for name, value in arrays.items()}
    classes = tuple(name for name in vocabulary.classes if name not in names)
    members = {name: tuple(one for one in part if one not in names) for name, part in vocabulary.parents.items()}
    return kept, replace(vocabulary, classes=classes, parents={name: part for name, part in members.items() if part})


@torch.no_grad()
def to_integers(head: SemanticHead, cells: CellSet) -> dict[str, NDArray[np.generic]]:
    """Bring a head into its integer form and return its tensors."""

    def run() -> None:
        for k in range(0, min(len(cells), 4096), 256):
            latents = torch.from_numpy(cells.cells[k : k + 256]).float() * 2.0**-formats.LATENT_BITS
            head(latents.permute(0, 3, 1, 2), torch.from_numpy(cells.quality[k : k + 256]))

    balance_head(head, run)
    return {f"{HEAD}.{name}": tensor.numpy() for name, tensor in export_network(head).items()}


def parts_of(cells: CellSet) -> Iterator[CellSet]:
    """Yield the cells to train on, and those whose images are held out."""
    for held in (False, True):
        yield cells[(cells.images % HELD_OUT == 0) == held]
