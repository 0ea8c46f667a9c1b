"""How this process runs the codec: device, batch size, threads. Never stored: metadata describes data, not machines.

>>> from deepsic_codec import config
>>> config.get().threads is None
True
>>> with config.set(threads=1):
...     config.get().threads
1

`config.set(...)` alone changes the settings for the rest of the process, in all its threads. Defaults come from the
environment: DEEPSIC_DEVICE, DEEPSIC_BATCH_PIXELS, DEEPSIC_THREADS, DEEPSIC_PRECISION, DEEPSIC_MAX_PIXELS,
DEEPSIC_KERNELS.
"""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from types import TracebackType
from typing import Any

from deepsic_codec.errors import ConfigurationError

#: Pixels that a CPU takes at a time unless `batch_pixels` says otherwise.
PIXELS_PER_CALL = 1 << 21
#: The same elsewhere, where a call should take longer than to ask for it (measured on an H200), and so many calls are
#: joined, as entropy coding there takes about as long for one chunk as for hundreds.
PIXELS_ELSEWHERE, CALLS_PER_BATCH = 1 << 25, 8
#: Pixels that are joined for each of its threads, so that none is without for long: twice what it takes at a time.
PIXELS_PER_THREAD = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Settings of this process.

    Parameters
    ----------
    device : str
        Where networks run: "auto" (CUDA if there is one, else CPU) or what `torch.device` takes.
    batch_pixels : int or None
        Most pixels (slices x height x width) joined into one model call; one larger chunk still goes alone. None is
        2 Mpx on a CPU, 8 chunks of 512x512, or 1 Mpx for each thread, past which it gains nothing and memory grows,
        and 32 Mpx elsewhere. There chunks are joined up to 8 such calls, parts of which are entropy-coded while the
        device is at the next.
    threads : int or None
        Threads of network and entropy coder; None leaves the libraries' defaults.
    precision : str
        Arithmetic of the analysis transform: "float32", "bfloat16", or "auto", which is bfloat16 where the processor
        multiplies matrices in it (AMX, CUDA). Decoding does not depend on it.
    max_pixels : int
        Most pixels (as `batch_pixels` counts them, a border of 16 around each image included) of one chunk; larger ones
        are neither written nor read. A hundred bytes from a stranger can announce a chunk of 2**31 samples, which takes
        tens of gigabytes to decode; the default, 2**29, takes a few.
    kernels : str
        What CUDA computes with: "auto" takes Triton's kernels where Triton is installed and they give the right
        integers, and an entropy coder of its own, "plain" torch's own operations and the CPU's coder, for which nothing
        has to be compiled. Results are the same.
    """

    device: str = "auto"
    batch_pixels: int | None = None
    threads: int | None = None
    precision: str = "auto"
    max_pixels: int = 1 << 29
    kernels: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not self.device:
            raise ConfigurationError(f"device: expected a name such as 'auto', 'cpu' or 'cuda:0', got {self.device!r}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigurationError(f"precision: expected auto, float32 or bfloat16, got {self.precision!r}")
        if self.kernels not in ("auto", "plain"):
            raise ConfigurationError(f"kernels: expected auto or plain, got {self.kernels!r}")
        for name in ("batch_pixels", "threads", "max_pixels"):
            value = getattr(self, name)
            if value is None and name != "max_pixels":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name}: expected an integer of at least 1, got {value!r}")

    def pixels_per_call(self, kind: str) -> int:
        """Most pixels of one model call on a kind of device, "cpu" or another."""
        return self.batch_pixels or (PIXELS_PER_CALL if kind == "cpu" else PIXELS_ELSEWHERE)

    def pixels_per_batch(self, kind: str, threads: int = 1) -> int:
        """Most pixels that are joined: a CPU's threads share them out, elsewhere many calls follow one another."""
        if kind != "cpu":
            return CALLS_PER_BATCH * self.pixels_per_call(kind)
        return self.batch_pixels or max(PIXELS_PER_CALL, threads * PIXELS_PER_THREAD)


def _from_environment() -> Settings:
    values: dict[str, str | int] = {}
    for name in ("device", "batch_pixels", "threads", "precision", "max_pixels", "kernels"):
        text = os.environ.get(f"DEEPSIC_{name.upper()}", "").strip()
        if text:
            values[name] = int(text) if name in ("batch_pixels", "threads", "max_pixels") and text.isdecimal() else text
    return Settings(**values)  # type: ignore[arg-type]  # Settings checks them


_settings = _from_environment()


def get() -> Settings:
    """Return the settings in force."""
    return _settings


def device_in_use(loading: bool = False) -> str:
    """Name of the device that this process runs networks on, "auto" resolved.

    For that torch is asked, which takes seconds to import: only where it is already, or with `loading`. Without it
    there is no GPU in use.
    """
    if _settings.device != "auto":
        return _settings.device
    if loading:
        with suppress(ImportError):
            import_module("torch")
    torch: Any = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"


class set:  # noqa: N801  # read as a call: config.set(device="cpu")
    """Change settings, until the end of the `with` block if there is one, otherwise for good.

    Parameters
    ----------
    **changes
        Fields of `Settings`.

    Raises
    ------
    ConfigurationError
        For a setting that does not exist or a value out of range; nothing is changed then.
    """

    def __init__(self, **changes: str | int | None) -> None:
        global _settings
        unknown = sorted(changes.keys() - Settings.__dataclass_fields__.keys())
        if unknown:
            known = ", ".join(Settings.__dataclass_fields__)
            raise ConfigurationError(f"no setting {', '.join(unknown)}; the settings are {known}")
        self._before = _settings
        _settings = replace(_settings, **changes)  # type: ignore[arg-type]

    def __enter__(self) -> Settings:
        return _settings

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        global _settings
        _settings = self._before
