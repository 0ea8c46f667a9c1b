"""Choice of what runs a model on a device.

A device "cpu" needs no torch for models whose networks are integers; all else runs in `torch_scheduler`.
"""

import os
import threading

from deepsic_codec import config
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.batch import Scheduler
from deepsic_codec.model.file import ModelInfo
from deepsic_codec.require import require

_schedulers: dict[tuple[str, ...], Scheduler] = {}
_loading = threading.Lock()


def get_scheduler(info: ModelInfo) -> Scheduler:
    """Return the scheduler of a model on this process's device; loads the model on first use.

    Raises
    ------
    MissingPackage
        If the device or the family of the model needs torch, and it is not installed.
    """
    device = config.device_in_use(loading=True)
    # A decoder and head may have several encoders.
    key = (info.decoder, info.head, info.encoder, device, config.get().kernels)
    with _loading:
        if key not in _schedulers:
            _schedulers[key] = load(info, device)
        return _schedulers[key]


def load(info: ModelInfo, device: str) -> Scheduler:
    """Load a model for a device, whether it is loaded already or not."""
    on_cpu, family = device.startswith("cpu"), info.architecture.get("family")
    if on_cpu and family == Architecture.family:
        from deepsic_codec.model.cpu.scheduler import CpuScheduler

        return CpuScheduler(info)
    return load_with_torch(info, device, f"a model of the family {family!r}" if on_cpu else f"the device {device!r}")


def load_with_torch(info: ModelInfo, device: str, purpose: str) -> Scheduler:
    """Load a model with torch; `purpose` says what needs that, for the message of MissingPackage."""
    require("torch", "torch", purpose=purpose)
    from deepsic_codec.model.runtime import LoadedModel
    from deepsic_codec.model.torch_scheduler import TorchScheduler

    return TorchScheduler(LoadedModel(info, device))


def _after_fork() -> None:
    """Forget locks, thread pools and models of the parent process, whose threads do not exist here."""
    global _loading
    _loading = threading.Lock()
    _schedulers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
