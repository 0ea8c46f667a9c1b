"""Settings of this process: device, threads, limits, folders of models. Array metadata never contains them.

>>> from deepsic_codec import config
>>> config.get().threads is None
True
>>> with config.set(threads=1):
...     config.get().threads
1

`config.set(...)` changes settings for this thread and for the threads in which Zarr, Dask and this package run its
calls; other threads keep theirs. `config.set_defaults(...)` changes them for all threads of the process. Without
either, a setting comes from the environment (`DEEPSIC_` and its name in capitals, such as
DEEPSIC_MAX_PIXELS) or from a YAML file in ~/.config/deepsic_codec. Both are read when this module is imported.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from importlib import import_module
from types import TracebackType
from typing import Any, TypeVar

import donfig

from deepsic_codec.errors import ConfigurationError, did_you_mean

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Pixels of one model call on a CPU, unless `batch_pixels` is set.
CPU_CALL_PIXELS = 1 << 21
#: The same on a GPU, where a call should take longer than its launch (measured on an H200 by benchmarks/scale.py).
GPU_CALL_PIXELS = 1 << 25
#: Model calls of one batch on a GPU, whose entropy coder takes about as long for one chunk as for hundreds.
GPU_CALLS_PER_BATCH = 8
#: Pixels of a batch for each thread of a CPU: twice what a thread takes at a time, so that none waits for long.
PIXELS_PER_THREAD = 1 << 20

_NUMBERS = ("max_pixels", "max_chunks", "max_model_bytes", "max_model_macs", "max_model_memory")
_OPTIONAL_NUMBERS = ("batch_pixels", "threads", "max_memory")
_CHOICES = {"precision": ("auto", "float32", "bfloat16"), "kernels": ("auto", "plain")}


@dataclass(frozen=True)
class Settings:
    """Settings of this process.

    Parameters
    ----------
    device : str
        Where networks run: "auto" (CUDA if there is one, else CPU) or a device name that `torch.device` takes.
    batch_pixels : int or None
        Maximum pixels (slices x height x width) in one model call; a larger chunk goes alone. None is 2 Mpx on a
        CPU (8 chunks of 512x512) or 1 Mpx for each thread, beyond which only memory grows, and 32 Mpx on a GPU. On a
        GPU up to 8 such calls are joined to a batch, and one is entropy-coded while the device computes the next.
    threads : int or None
        Threads of networks and entropy coder; None leaves the defaults of the libraries.
    precision : str
        Arithmetic of the analysis transform: "float32", "bfloat16", or "auto", which is bfloat16 where the processor
        multiplies matrices in it (AMX, CUDA). Decoding does not depend on it.
    max_pixels : int
        Maximum pixels of one chunk, counted as for `batch_pixels` with a border of 16 around each image. Larger
        chunks are neither written nor read, nor are their labels. A hundred bytes from a stranger can announce a chunk
        of 2**31 samples, which takes tens of gigabytes to decode. The default is 2**28.
    max_memory : int or None
        Maximum bytes of memory that decoding one chunk, or a query, may take, by an estimate. What would take more is
        refused before anything is allocated. None is what the system has available at that moment, for what takes more
        than 2**30.
    max_chunks : int
        Maximum chunks of an array whose headers are all read, or whose label index is read or written. Metadata of a
        hundred bytes can announce 2**64 of them.
    kernels : str
        How CUDA computes: "auto" uses Triton's kernels, where Triton is installed and they give the right integers,
        and the entropy coder on the device. "plain" uses torch's own operations and the coder of the CPU, for which
        nothing is compiled. Results are the same.
    max_model_bytes, max_model_macs, max_model_memory : int
        Maximum size of a model file, and multiply-accumulates and bytes of memory that its networks may take for a
        pixel. The packaged model has 9.8 MB, 27,000 and 54.
    model_path : tuple of str
        Files and folders where models are looked for before the package itself. Environment and files have a string
        with the separator of PATH.
    cache : str
        Folder for models that were copied from archives.
    allowed_codecs : tuple of str
        Names of codecs that archives may use beyond those that are harmless, such as "zfpy". Some codecs run code that
        is in the data, "pickle" does: allow those for archives only whose author you trust. Environment and files may
        have a string with commas.
    """

    device: str = "auto"
    batch_pixels: int | None = None
    threads: int | None = None
    precision: str = "auto"
    max_pixels: int = 1 << 28
    max_memory: int | None = None
    max_chunks: int = 1 << 26
    kernels: str = "auto"
    max_model_bytes: int = 1 << 28
    max_model_macs: int = 1 << 18
    max_model_memory: int = 1 << 8
    model_path: tuple[str, ...] = ()
    cache: str = "~/.cache/deepsic_codec"
    allowed_codecs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _check(item.name, getattr(self, item.name)))

    def pixels_per_call(self, kind: str) -> int:
        """Return the maximum number of pixels of one model call on a kind of device, "cpu" or another."""
        return self.batch_pixels or (CPU_CALL_PIXELS if kind == "cpu" else GPU_CALL_PIXELS)

    def pixels_per_batch(self, kind: str, threads: int = 1) -> int:
        """Return the maximum pixels of a batch, which threads of a CPU share and a GPU takes in several calls."""
        if kind != "cpu":
            return GPU_CALLS_PER_BATCH * self.pixels_per_call(kind)
        return self.batch_pixels or max(CPU_CALL_PIXELS, threads * PIXELS_PER_THREAD)


def _check(name: str, value: Any) -> Any:
    """Return a setting in its one form.

    Raises
    ------
    ConfigurationError
        If the setting cannot have the value. The message names the setting.
    """
    if name in _CHOICES:
        if not isinstance(value, str) or value not in _CHOICES[name]:
            similar = did_you_mean(value, _CHOICES[name])
            raise ConfigurationError(f"{name}: expected one of {', '.join(_CHOICES[name])}, got {value!r}{similar}")
    elif name in _NUMBERS or name in _OPTIONAL_NUMBERS:
        if value is None and name in _OPTIONAL_NUMBERS:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{name}: expected an integer of at least 1, got {value!r}")
    elif name == "model_path":
        paths = value.split(os.pathsep) if isinstance(value, str) else value
        paths = [paths] if isinstance(paths, os.PathLike) else paths
        if not isinstance(paths, list | tuple) or not all(isinstance(path, str | os.PathLike) for path in paths):
            raise ConfigurationError(
                f"{name}: expected paths, or a string of paths with {os.pathsep!r} between them, got {value!r}"
            )
        return tuple(os.fspath(path) for path in paths if os.fspath(path))
    elif name == "allowed_codecs":
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(codec, str) for codec in names):
            raise ConfigurationError(f"{name}: expected names of codecs, got {value!r}")
        return tuple(codec.strip() for codec in names if codec.strip())
    elif name == "cache":
        if not isinstance(value, str | os.PathLike) or not os.fspath(value):
            raise ConfigurationError(f"cache: expected a folder, got {value!r}")
        return os.fspath(value)
    elif not isinstance(value, str) or not value:
        raise ConfigurationError(f"{name}: expected a name such as 'auto', 'cpu' or 'cuda:0', got {value!r}")
    return value


_NAMES = tuple(item.name for item in fields(Settings))
#: Defaults, configuration files and environment, and above them `set_defaults`; the same for all threads.
_process = donfig.Config(
    "deepsic_codec",
    defaults=[asdict(Settings())],
    env_prefix="DEEPSIC_",
    env_var="DEEPSIC_CONFIG",
    root_env_var="DEEPSIC_ROOT_CONFIG",
)
_defaults: Settings | None = None
_changing = threading.Lock()
#: What `set` changed in this context.
_overrides: ContextVar[Mapping[str, Any]] = ContextVar("deepsic_codec.config", default={})  # noqa: B039  # never changed
#: Defaults, overrides, and what `get` made of them last.
_merged: tuple[Settings, Mapping[str, Any], Settings] | None = None


def get() -> Settings:
    """Return the settings in force in this thread.

    Raises
    ------
    ConfigurationError
        If the environment or a configuration file has a value out of range.
    """
    global _defaults, _merged
    if _defaults is None:
        with _changing:
            _defaults = _defaults or _read_defaults()
    defaults, overrides, merged = _defaults, _overrides.get(), _merged
    if not overrides:
        return defaults
    if merged is None or merged[0] is not defaults or merged[1] is not overrides:
        merged = _merged = defaults, overrides, replace(defaults, **overrides)
    return merged[2]


def _read_defaults() -> Settings:
    values = {name: _process.get(name) for name in _NAMES}
    values = {name: value.strip() if isinstance(value, str) else value for name, value in values.items()}
    return Settings(**{name: value for name, value in values.items() if value != ""})  # "" counts as not set


class set:  # noqa: N801  # read as a call: config.set(device="cpu")
    """Change settings of this thread, until the end of the `with` block if there is one.

    Threads in which Zarr, Dask and this package run a call of this thread have the same settings during that call. No
    other thread has them.

    Parameters
    ----------
    **changes
        Fields of `Settings`.

    Raises
    ------
    ConfigurationError
        For an unknown setting or a value out of range; nothing is changed then.
    """

    def __init__(self, **changes: Any) -> None:
        _check_names(changes)
        self._before = _overrides.get()
        _overrides.set({**self._before, **{name: _check(name, value) for name, value in changes.items()}})

    def __enter__(self) -> Settings:
        return get()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _overrides.set(self._before)


def set_defaults(**changes: Any) -> None:
    """Change settings of all threads of this process, but for what `set` changed in a thread.

    Parameters
    ----------
    **changes
        Fields of `Settings`.

    Raises
    ------
    ConfigurationError
        For an unknown setting or a value out of range; nothing is changed then.
    """
    global _defaults
    _check_names(changes)
    checked = {name: _check(name, value) for name, value in changes.items()}
    with _changing:
        _process.set(checked)
        _defaults = _read_defaults()


def _check_names(changes: Mapping[str, Any]) -> None:
    unknown = sorted(changes.keys() - {*_NAMES})
    if unknown:
        known = did_you_mean(unknown[0], _NAMES) or f"; known are {', '.join(_NAMES)}"
        raise ConfigurationError(f"unknown setting {', '.join(unknown)}{known}")


def pool_map(pool: Executor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Call `pool.map(function, items)` so that the threads of the pool have the settings of this thread."""
    contexts_and_items = [(copy_context(), item) for item in items]  # a context runs in one thread at a time
    return pool.map(lambda pair: pair[0].run(function, pair[1]), contexts_and_items)


def device_in_use(loading: bool = False) -> str:
    """Return the name of the device that networks run on, "auto" resolved.

    Parameters
    ----------
    loading : bool
        Import torch, which takes seconds, to find out whether there is a GPU, if this machine has a driver of one and
        torch is installed. Otherwise "auto" is the CPU until torch is imported.
    """
    device = get().device
    if device != "auto":
        return device
    if loading and "torch" not in sys.modules and _has_gpu_driver():
        with suppress(ImportError):
            import_module("torch")
    # without `cuda` while another thread imports torch
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    return "cuda" if cuda is not None and cuda.is_available() else "cpu"


@lru_cache(maxsize=1)
def _has_gpu_driver() -> bool:
    """Whether a driver of CUDA or ROCm is installed, without torch."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/kfd")
    return True
