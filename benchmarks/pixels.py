r"""Labels of a tree of classes by networks that see the pixels, beside a head of the codec.

    python -m benchmarks.pixels --train EUROSAT_0 EUROSAT_1 SCENES_LABELLED --others PHOTOGRAPHS \
        --labels EUROSAT_VAL SCENES_LABELLED --head scenes --minutes 9

ResNet-18 and the codec's own trunk (analysis and semantic head), from random weights, learn the classes of the tree of
`deepsic train-head` from the same training images with the same crops, light, shares of data sets and loss, for
``--minutes`` of CPU time each. Crops have 64 x 64 pixels. Images are measured as `benchmarks.labels` measures them:
those of at most 64 pixels as they are, others scaled to 128 x 128, which the networks pool as a whole. Top-1 and top-5
are among the classes of the image's own data set.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import labels
from benchmarks.accuracy import Trunk
from benchmarks.common import machine, table
from benchmarks.resnet import ResNet18
from deepsic_codec import DeepSIC
from deepsic_codec.io.images import Pixels
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.vocabulary import Vocabulary
from deepsic_codec.training.head_data import LEAST_LABELLED, LEAST_OTHER, labelled, random_cells, read_source
from deepsic_codec.training.heads import Marks, label_loss
from deepsic_codec.training.train_head import ABSENT, OTHERS
from deepsic_codec.training.tree import PACKAGED, Tree

BATCH, RATE, DECAY = 64, 2e-3, 0.01
EDGE = 64


class Crops:
    """Draws batches of crops: a share of other images, small and large labelled ones alike, and classes alike."""

    def __init__(self, sources: Sequence[str], others: Sequence[str], known: Marks) -> None:
        images, marks = labelled([pair for path in sources for pair in read_source(path, "train/")], known)
        self.images = [pixels for _, pixels in images]
        self.images += [pixels for path in others for _, pixels in read_source(path)]
        self.marks = np.concatenate([marks, np.full(len(self.images) - len(marks), known.other)])
        small = np.array([max(pixels.shape[:2]) <= EDGE for pixels in self.images])
        is_other = self.marks == known.other
        groups = [np.flatnonzero(~is_other & at) for at in (small, ~small)]
        kinds = [group for group in groups if len(group)]
        shares = [*((1 - OTHERS) / len(kinds) for _ in kinds), OTHERS]
        self.groups = [*zip(shares, [*kinds, np.flatnonzero(is_other)], strict=True)]
        self.rng, self.other = np.random.default_rng(0), known.other

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return crops (size,3,64,64) in 0..255, and their marks (size,)."""
        numbers: list[int] = []
        for share, group in self.groups:
            count = round(share * size) if group is not self.groups[-1][1] else size - len(numbers)
            of_class = np.unique(self.marks[group])
            drawn = self.rng.choice(of_class, count)
            numbers += [int(self.rng.choice(group[self.marks[group] == mark])) for mark in drawn]
        marks = self.marks[numbers]
        least = np.where(marks == self.other, LEAST_OTHER, LEAST_LABELLED)
        crops = [random_cells(self.images[i], one, self.rng) for i, one in zip(numbers, least, strict=True)]
        return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float(), torch.from_numpy(marks)


def fit(net: nn.Module, crops: Crops, known: Marks, minutes: float, steps: int) -> int:
    """Train on the loss of heads with AdamW and cosine decay, for so much CPU time; return the steps taken."""
    adam = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    start, step = time.process_time(), 0
    net.train()
    while (progress := max((time.process_time() - start) / (60 * minutes), step / steps)) < 1:
        for group in adam.param_groups:
            group["lr"] = RATE * max(0.01, 0.5 * (1 + math.cos(math.pi * progress))) * min(1, (step + 1) / 100)
        pixels, marks = crops.batch(BATCH)
        loss = label_loss(net(pixels), marks, known)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        step += 1
    net.eval()
    return step


@torch.no_grad()
def scores_of(net: nn.Module, images: Sequence[Pixels]) -> NDArray[np.float64]:
    """Return the scores of images, float64 (N, classes)."""
    parts = [net(torch.from_numpy(np.array(x)).permute(2, 0, 1)[None].float()).sigmoid() for x in images]
    return torch.cat(parts).double().numpy()


def rows_of(
    network: str, scores: NDArray[np.float64], vocabulary: Vocabulary, places: Sequence[tuple[str, str]], tree: Tree
) -> list[list[Any]]:
    """Return network, data set, images, top-1 and top-5 in percent."""
    rows = []
    for data_set in dict.fromkeys(one for one, node in places if node in vocabulary.known):
        at = np.array([one == data_set for one, _ in places])
        truth = np.array([node for _, node in places])[at]
        rows.append([network, data_set, int(at.sum()), *labels.top_shares(vocabulary, scores[at], truth)])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Train the networks and print the table."""
    a = _arguments(argv)
    torch.set_num_threads(1)
    print(machine(1), "\n")
    tree = Tree.read(a.tree or PACKAGED)
    images, places = labels.labelled_tiles(tree, a)
    known, vocabulary = Marks(tree, dict.fromkeys(ABSENT, 1.0)), tree.vocabulary
    rows = []
    codec = DeepSIC(model=a.model, head=a.head, bpp=a.bpp, transform="features", label_tile=labels.EDGE).resolved()
    measured = labels.Measured(codec, images)
    for kind, scores in measured.scores.items():
        rows += rows_of(f"head {a.head or a.model}, {kind}, {a.bpp:g} bpp", scores, measured.vocabulary, places, tree)
    crops = Crops(a.train, a.others, known)
    networks: dict[str, Callable[[], nn.Module]] = {
        "ResNet-18": lambda: ResNet18(len(vocabulary.names)),
        "own trunk, raw pixels": lambda: Trunk(Architecture(classes=len(vocabulary.names))),
    }
    for name, make in networks.items():
        torch.manual_seed(0)
        net = make()
        steps = fit(net, crops, known, a.minutes, a.steps)
        title = f"{name}, {steps} steps of {BATCH}"
        rows += rows_of(title, scores_of(net, images), vocabulary, places, tree)
    print(table(["network", "data set", "images", "top-1 %", "top-5 %"], rows))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="labelled images, as for deepsic train-head")
    parser.add_argument("--others", nargs="+", required=True, help="images of no class, as for it")
    parser.add_argument("--labels", nargs="+", required=True, help="labelled images to measure")
    parser.add_argument("--split", default="val/", help="start of the paths of the images to measure (default: val/)")
    parser.add_argument("--tree", default="", help="JSON of the tree (default: that of the packaged head)")
    parser.add_argument("--model", default="base", help="name of the model")
    parser.add_argument("--head", help="name of the head (default: that of the model)")
    parser.add_argument("--bpp", type=float, default=0.5, help="bits per pixel of chunks (default: 0.5)")
    parser.add_argument("--minutes", type=float, default=9, help="CPU time of training of each network (default: 9)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of training, at most")
    parser.add_argument("--limit", type=int, help="about as many images of each source")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
