"""A tree of classes over several data sets, and what an image of one of them says of all others.

A class of one data set is unknown, not absent, in another: an image that one set calls *Industrial* may show what
another calls *Parking*. Only branches of the tree that part at its top, and the classes of the image's own set, are
known to be absent. What lies below the class of an image is unknown, as in YOLO9000's WordTree.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.model.vocabulary import Vocabulary

#: Tree of the packaged head.
PACKAGED = Path(__file__).with_name("tree.json")
#: What is said of a class of another data set in the same branch: next to nothing.
FAINT = 0.05


@dataclass(frozen=True)
class Tree:
    """Classes, their parents, and the classes of data sets.

    Attributes
    ----------
    parents : dict of str to str
        Parent of each node; "" for those at the top.
    others : dict of str to list of str
        Further broader names of the vocabulary, which are not nodes.
    data_sets : dict of str to dict
        Of each data set: `prefix`, with which the names of its images start, and `classes`, folder to node.
    """

    parents: dict[str, str]
    others: dict[str, list[str]]
    data_sets: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: str | Path = PACKAGED) -> "Tree":
        """Read a tree from JSON.

        Raises
        ------
        ConfigurationError
            If the file holds no tree: a parent that is no node, a cycle, or a class of a data set that is no node.
        """
        try:
            data = json.loads(Path(path).read_text())
            tree = cls(dict(data["parents"]), dict(data.get("others", {})), dict(data["data_sets"]))
            mapped = {node for one in tree.data_sets.values() for node in one["classes"].values()}
            if unknown := ({*tree.parents.values(), *mapped} - {"", *tree.parents}):
                raise ValueError(f"{min(unknown)} is no node")
            for node in tree.parents:
                tree.path(node)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"{path}: no tree of classes ({type(error).__name__}: {error})") from None
        return tree

    def path(self, node: str) -> list[str]:
        """Return a node and what is above it, up to the top; raises ValueError for a cycle."""
        path = [node]
        while above := self.parents[path[-1]]:
            if above in path:
                raise ValueError(f"a cycle: {' in '.join([*path, above])}")
            path.append(above)
        return path

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """All nodes: leaves, then inner nodes, deepest first."""
        inner = {*self.parents.values()}
        leaves = [node for node in self.parents if node not in inner]
        return (*leaves, *sorted((node for node in self.parents if node in inner), key=lambda n: -len(self.path(n))))

    @property
    def leaves(self) -> int:
        """Number of leaves, which are the first nodes."""
        return len({*self.parents} - {*self.parents.values()})

    @property
    def vocabulary(self) -> Vocabulary:
        """All nodes as classes; inner nodes are parents, too."""
        members: dict[str, list[str]] = {}
        for node in self.nodes:
            if above := self.parents[node]:
                members.setdefault(above, []).append(node)
        return Vocabulary(self.nodes, {k: tuple(v) for k, v in (members | self.others).items()})

    def locate(self, folder: str, name: str) -> tuple[str, str] | None:
        """Return the data set and the node of an image in a folder; None if no data set has it."""
        for data_set, about in self.data_sets.items():
            if folder in about["classes"] and name.startswith(about["prefix"]):
                return data_set, about["classes"][folder]
        return None

    def without(self, names: Iterable[str]) -> "Tree":
        """Return the tree without some nodes, what lies below them, and what is above nothing else.

        Raises
        ------
        ConfigurationError
            If a name is no node, or nothing is left.
        """
        names = {*names}
        if unknown := sorted(names - {*self.parents}):
            raise ConfigurationError(f"the tree of classes has no node {unknown[0]!r}; exclude others")
        parents = {node: above for node, above in self.parents.items() if names.isdisjoint(self.path(node))}
        data_sets = {
            name: one | {"classes": {k: v for k, v in one["classes"].items() if v in parents}}
            for name, one in self.data_sets.items()
        }
        labelled = {node for one in data_sets.values() for node in one["classes"].values()}
        inner = {*self.parents.values()} - labelled
        while childless := {node for node in parents if node in inner and node not in parents.values()}:
            parents = {node: above for node, above in parents.items() if node not in childless}
        if not parents:
            raise ConfigurationError("no class of the tree is left; exclude fewer")
        others = {name: [one for one in members if one in parents] for name, members in self.others.items()}
        return Tree(parents, {k: v for k, v in others.items() if v}, data_sets)

    def says(self, data_set: str, node: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return what an image of a class says of all nodes and, last, of "unknown".

        Returns
        -------
        expected, weight : ndarray
            float32 (nodes + 1,): 1 for present and 0 for absent, and how far that is known.
        """
        path, expected, weight = self.path(node), [], []
        labelled = {above for one in self.data_sets[data_set]["classes"].values() for above in self.path(one)}
        for other in self.nodes:
            below = node in self.path(other)
            expected.append(float(other in path))
            if other in path:
                weight.append(1.0)
            elif below:
                weight.append(0.0)
            else:
                apart = self.path(other)[-2:] != path[-2:]  # at the top or just below it
                weight.append(1.0 if apart or other in labelled else FAINT)
        return np.array([*expected, 0], np.float32), np.array([*weight, 1], np.float32)

    def says_other(self, absent: Mapping[str, float]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return what an image of no data set says: unknown, and no node below those that are absent."""
        weight = [max(absent.get(above, 0.0) for above in self.path(node)) for node in self.nodes]
        return np.array([*[0] * len(self.nodes), 1], np.float32), np.array([*weight, 1], np.float32)
