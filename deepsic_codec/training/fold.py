"""Residual blocks that do nothing, left out of what is stored.

Training may shut a block off: hardly ever is one of its hidden channels above zero, and no
gradient to speak of reaches it again. It adds a constant then, which the block before it or
the stream's modulation can add as well, and costs as much as any other. That of the analysis
transform is free to go: the decoder does not depend on its size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepsic_codec.model.exact import fixed
from deepsic_codec.model.exact.layers import check_sums
from deepsic_codec.model.networks import Analysis

#: Share of its hidden values that may be above zero in a block that counts as idle.
IDLE_SHARE = 1e-6

Tensors = dict[str, Tensor]


@torch.no_grad()
def idle_blocks(analysis: Analysis, run: Callable[[], None]) -> dict[int, set[int]]:
    """Find blocks that do nothing.

    Parameters
    ----------
    analysis : Analysis
        In the ranges of its integer form.
    run : callable
        Runs it on training images.

    Returns
    -------
    dict of int to set of int
        Numbers of the idle blocks at 1/8 and 1/16.
    """
    seen: dict[tuple[int, int], list[float]] = {}

    def hook(at: int, number: int) -> Callable[[object, object, Tensor], None]:
        def note(module: object, given: object, out: Tensor) -> None:
            seen.setdefault((at, number), []).append(float((out > 0).float().mean()))

        return note

    handles = [
        block.condition.register_forward_hook(hook(at, number))
        for at in (8, 16)
        for number, block in enumerate(getattr(analysis, f"blocks{at}"))
    ]
    # imitating integers goes past the layers that hooks hang on
    was, analysis.integer, analysis.bounded = (analysis.integer, analysis.bounded), False, True
    try:
        run()
    finally:
        analysis.integer, analysis.bounded = was
        for handle in handles:
            handle.remove()
    idle: dict[int, set[int]] = {8: set(), 16: set()}
    for (at, number), shares in seen.items():
        if sum(shares) <= IDLE_SHARE * len(shares):
            idle[at].add(number)
    return idle


def fold_blocks(tensors: Tensors, at: int, idle: set[int]) -> tuple[Tensors, int]:
    """Leave idle blocks out of an exported transform.

    Parameters
    ----------
    tensors : dict of str to Tensor
        Of a transform in its integer form, as a model file has them; not changed.
    at : int
        8 or 16.
    idle : set of int
        Blocks whose hidden channels are always zero.

    Returns
    -------
    tensors : dict of str to Tensor
        The same transform with fewer blocks; all of them if their constants do not fit elsewhere.
    count : int
        How many blocks are left at this resolution.
    """
    name = f"blocks{at}"
    out = {k: v.clone() for k, v in tensors.items() if not k.startswith(f"{name}.")}
    offset = out[f"mod{at}.offset"].long()
    blocks = [number for number in range(64) if f"{name}.{number}.up.weight" in tensors]
    kept = 0
    for number in blocks:
        block = {k: v.clone() for k, v in tensors.items() if k.startswith(f"{name}.{number}.")}
        if number not in idle:
            out |= {k.replace(f"{name}.{number}.", f"{name}.{kept}."): v for k, v in block.items()}
            kept += 1
            continue
        constant = block[f"{name}.{number}.down.bias"] >> block[f"{name}.{number}.down.shift"].to(torch.int32)
        before = f"{name}.{kept - 1}.down"
        if kept:
            out[f"{before}.bias"] += constant << out[f"{before}.shift"].to(torch.int32)
        else:
            offset += constant.long() << fixed.MODULATION_BITS
    try:
        for number in range(kept):
            parts = (out[f"{name}.{number}.down.{part}"].to(torch.int32) for part in ("weight", "bias", "shift"))
            check_sums(f"{name}.{number}.down", *parts, fixed.BLOCK_LAYERS["down"])
    except ValueError:
        return dict(tensors), len(blocks)
    if int(offset.abs().max()) > fixed.BIAS_MAX:  # beyond it float32, which adds it, could round
        return dict(tensors), len(blocks)
    return out | {f"mod{at}.offset": offset.to(torch.int32)}, kept
