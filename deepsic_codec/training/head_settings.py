"""Settings of the training of a head. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class HeadSettings:
    """Settings of the training of a head. The metadata of each field holds its help text."""

    labels: Sequence[str] = _option(
        (), "labelled images: folders or zip files with <Class>/<image>, classes of the tree"
    )
    others: Sequence[str] = _option((), "images of no class")
    out: str = _option("head.safetensors", "head file; its stem is the name of the head")
    base: str = _option("base", "name of the model whose decoder the head is for")
    head: str = _option("", "head for that decoder to start from (default: that of the model)")
    tree: str = _option("", "JSON file of the tree of classes (default: that of the packaged head)")
    exclude: Sequence[str] = _option(
        (), "nodes of the tree that the head is not to know: images of them and of what lies below are left out"
    )
    passes: int = _option(2, "how often each image is drawn")
    steps: int = _option(500, "steps of training all layers")
    last_steps: int = _option(500, "steps of training the last two layers alone, after that")
    values: int = _option(48, "values of an embedding")
    seed: int = _option(0, "seed of all random draws")
