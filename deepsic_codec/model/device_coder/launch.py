"""Compile `coder.cu` for a GPU when it is first needed, and launch its kernels."""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module, resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepsic_codec.payload.coders import binary
from deepsic_codec.payload.coders import contexts as tables
from deepsic_codec.payload.coders import interval as bits
from deepsic_codec.payload.coders import symbols as arithmetic
from deepsic_codec.payload.coders.contexts import ContextLayout
from deepsic_codec.payload.coders.trellis import NEXT

# A launch takes at most MAX_PASSES passes. Its job has GENERAL numbers, then PASS_FIELDS numbers for each pass.
MAX_PASSES, GENERAL, PASS_FIELDS = 32, 21, 8
# Lanes of a warp, and warps of a block whose chunks are not in shared memory.
LANES, WARPS = 32, 8
# Percentage of a multiprocessor's cache that chunks outside of shared memory leave to other kernels as shared memory.
# With the default of 0, kernels that need shared memory would wait for the coder to end.
CARVEOUT = 50
# Numbers in the state of a chunk: low, high, value, position, error; the rest is padding between chunks.
STATE = 8

Launch = Callable[[str, NDArray[np.int64], int, bool], None]
"""Runs a kernel, "encode", "decode" or "decode_trellis", with a job (`Job` in `coder.cu`) on N chunks.

The last argument tells whether their contexts are in shared memory.
"""


@lru_cache(maxsize=16)
def launcher(device: torch.device, latents: int) -> Launch:
    """Compile and load the coder for a CUDA device."""
    driver: Any = import_module("cuda.bindings.driver")  # comes with PyTorch for CUDA; nothing else here needs it
    kernels: dict[tuple[str, bool], Any] = {}
    attribute = driver.CUfunction_attribute
    nbytes, warps = {False: 0, True: shared_bytes(latents)}, {False: WARPS, True: 1}
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context, if there is none yet
        for shared in (False, True)[: 1 + fits_shared(device, latents)]:
            code = compile_cuda(source(latents, shared), torch.cuda.get_device_capability(device))
            module = _checked(driver.cuModuleLoadData(code))
            for name in ("encode", "decode", "decode_trellis"):
                kernel = kernels[name, shared] = _checked(driver.cuModuleGetFunction(module, name.encode()))
                settings = (
                    (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, nbytes[shared]),
                    (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100 if shared else CARVEOUT),
                )
                for key, value in settings:
                    _checked(driver.cuFuncSetAttribute(kernel, key, value))

    def launch(name: str, job: NDArray[np.int64], chunks: int, shared: bool) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            arguments = np.array([job.ctypes.data], np.uint64)  # the call copies the job
            grid, block = (-(-chunks // warps[shared]), 1, 1), (LANES * warps[shared], 1, 1)
            _checked(
                driver.cuLaunchKernel(
                    kernels[name, shared], *grid, *block, nbytes[shared], stream, arguments.ctypes.data, 0
                )
            )

    return launch


def fits_shared(device: torch.device, latents: int) -> bool:
    """Tell whether the shared memory of a multiprocessor has room for a chunk."""
    limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return bool(shared_bytes(latents) <= limit)


def shared_bytes(latents: int) -> int:
    """Return the bytes of shared memory of a chunk that has its contexts there."""
    working = LANES * (32 + 4 + 4) + 16
    return working + 4 * (ContextLayout.of(latents).size + 2 * tables.MIXERS * tables.INPUTS) + lookup_tables().nbytes


def source(latents: int, shared: bool, lanes: int = LANES) -> str:
    """Return `coder.cu` with the format's constants in front, for contexts in shared or in global memory."""
    layout = ContextLayout.of(latents)
    constants = {
        "CODE_BITS": bits.CODE_BITS,
        "CODE_MAX": f"{bits.CODE_MAX}ULL",
        "STRETCH_ONE": binary.STRETCH_ONE,
        "STRETCH_MAX": binary.STRETCH_MAX,
        "SYMBOL_MAX": arithmetic.SYMBOL_MAX,
        "FRACTIONS": tables.FRACTIONS,
        "NEIGHBOURS": tables.NEIGHBOURS,
        "PREVIOUS": tables.PREVIOUS,
        "UNARY": tables.UNARY,
        "ESCAPE_BITS": tables.ESCAPE_BITS,
        "SCALES": tables.SCALES,
        "INPUTS": tables.INPUTS,
        "MIXERS": tables.MIXERS,
        "ZERO_SCALE": layout.zero_scale,
        "ZERO_CHANNEL": layout.zero_channel,
        "ZERO_PREVIOUS": layout.zero_previous,
        "SIGN": layout.sign,
        "UNARY_SCALE": layout.unary_scale,
        "UNARY_NEIGHBOURS": layout.unary_neighbours,
        "UNARY_CHANNEL": layout.unary_channel,
        "ODD": layout.odd,
        "NEXT_EVEN": _packed(NEXT[:, 0]),
        "NEXT_ODD": _packed(NEXT[:, 1]),
        "LOW_BIT": layout.low_bit,
        "ESCAPE": layout.escape,
        "CONTEXTS": layout.size,
        "PASSES": MAX_PASSES,
        "STATE": STATE,
        "LANES": lanes,
        "WARPS": 1 if shared else WARPS,
        "SQUASH_AT": binary.STRETCH.size,
        "RECIPROCAL_AT": binary.STRETCH.size + binary.SQUASH.size,
        "TABLE_WORDS": lookup_tables().size // 2,
        "IN_SHARED": int(shared),
    }
    text = resources.files("deepsic_codec.model.device_coder").joinpath("coder.cu").read_text("utf-8")
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + text


def _packed(states: NDArray[np.int64]) -> str:
    """Return states of the trellis as a number, four bits for each."""
    return f"{sum(int(state) << 4 * number for number, state in enumerate(states))}U"


def compile_cuda(text: str, capability: tuple[int, int]) -> bytes:
    """Compile a CUDA source to machine code for a compute capability.

    Raises
    ------
    RuntimeError
        With the compiler's log, if it does not compile.
    """
    nvrtc: Any = import_module("cuda.bindings.nvrtc")
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"coder.cu", 0, [], []))
    options = [b"--gpu-architecture=sm_%d%d" % capability, b"--std=c++17"]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result[0]:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode(errors="replace").strip("\0 \n"))
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code


def lookup_tables() -> NDArray[np.uint16]:
    """Return the coder's larger tables in one array of an even size."""
    parts = [np.asarray(t).astype(np.int64) for t in (binary.STRETCH, binary.SQUASH, binary.RECIPROCAL)]
    joined = np.concatenate(parts).astype(np.uint16)  # all values have 16 bits, with a sign or without
    return np.pad(joined, (0, joined.size % 2))


def _checked(result: tuple[Any, ...]) -> Any:
    """Return the value of a CUDA call; raises RuntimeError if the call failed."""
    if result[0]:
        raise RuntimeError(f"CUDA: {result[0]!r}")
    return result[1] if len(result) > 1 else None
