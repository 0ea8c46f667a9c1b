"""Compile all functions that Python calls to a library for each kind of CPU: `python -m deepsic_codec.kernels.build`.

The libraries go to the folder where `deepsic_codec.kernels.library` looks for them. Building needs numba and a C
compiler, which links; `CC` names another than `cc`. Wheels are built with libraries for all kinds of CPU of the machine
that builds them (`hatch_build.py`).

`signatures.json` holds the types of the arguments that functions are compiled for. With the environment variable
`DEEPSIC_RECORD_KERNELS` set to a file, a process that lets numba compile adds the types that it met to this file when
it ends: run the tests with it after a change of arguments.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from deepsic_codec.kernels.library import (
    DESCRIPTION,
    FAILED,
    FOLDER,
    REFUSED,
    SUFFIX,
    VARIANTS,
    machine,
    sources,
)

#: CPUs that numba compiles for, and features beyond theirs that `model.cpu.dot_tiles` looks for.
TARGETS = {
    "avx512vnni": (
        "x86-64-v4",
        "+avx2,+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd,+avx512vnni,-prefer-256-bit",
    ),
    "avx2": ("x86-64-v3", "+avx2,+fma"),
    "generic": ("generic", ""),
}
#: Modules with functions that Python calls.
MODULES = (
    "codec.jacobi",
    "codec.spectral_rows",
    "codec.wavelet_filter",
    "codec.wavelet_rate",
    "labels.vectors",
    "model.cpu.dot",
    "model.cpu.layers",
    "model.cpu.prior",
    "model.cpu.transforms",
    "model.cpu.trellis",
    "payload.coders.cells",
    "payload.coders.mask",
    "payload.coders.residual_band",
    "payload.coders.residual_filter",
    "payload.coders.subbands",
    "payload.coders.symbols",
    "payload.coders.wavelet",
)
#: Where the fields of an array, and of its dtype, lie behind the header of the object: a part of NumPy's binary
#: interface, which `library.arrays_are_as_expected` checks.
ARRAY = {"data": 0, "dimensions": 8, "shape": 16, "strides": 24, "dtype": 40, "flags": 48}
DTYPE = {"byte order": 10, "number": 12}
C_CONTIGUOUS, ALIGNED = 0x001, 0x100
SIGNATURES = Path(__file__).parent / "signatures.json"


def described(kind: Any) -> Any:
    """Return a type of numba as `signatures.json` has it: a name, or a list of a class and the types of a tuple."""
    from numba import types

    if isinstance(kind, types.Array):
        return f"{kind.dtype}[{kind.ndim}{'C' if kind.layout == 'C' else 'A'}]"
    if isinstance(kind, types.BaseTuple):
        owner = getattr(kind, "instance_class", tuple)
        name = "" if owner is tuple else f"{owner.__module__}:{owner.__qualname__}"
        parts: Any = kind
        return [name, *map(described, parts)]
    return str(types.unliteral(kind))


def parsed(text: Any) -> Any:
    """Return the type of numba that `described` gives as this text."""
    from numba import from_dtype, types

    if isinstance(text, list):
        module, _, name = text[0].partition(":")
        parts = [parsed(part) for part in text[1:]]
        return types.BaseTuple.from_types(parts, getattr(import_module(module), name) if name else None)
    if "[" in text:
        import numpy as np

        dtype, _, shape = text[:-1].partition("[")
        return types.Array(from_dtype(np.dtype(dtype)), int(shape[:-1]), shape[-1])
    return getattr(types, {"bool": "boolean"}.get(text, text))


def record(path: Path) -> None:
    """Add the types that functions of this process were compiled for to a file."""
    from deepsic_codec.kernels.numba_jit import ENTRIES

    known: dict[str, list[Any]] = json.loads(path.read_text()) if path.exists() else {}
    for name, function in ENTRIES.items():
        if name.startswith("deepsic_codec."):
            kinds = [[described(kind) for kind in signature] for signature in function.signatures]
            known[name] = sorted({json.dumps(one): one for one in known.get(name, []) + kinds}.values(), key=_order)
    path.write_text("{\n" + ",\n".join(f" {json.dumps(n)}: {json.dumps(known[n])}" for n in sorted(known)) + "\n}\n")


def _order(arguments: Any) -> tuple[int, str]:
    """Return a key that brings types of arrays in C order to the front, which are accepted before others."""
    text = json.dumps(arguments)
    return text.count('A]"'), text


def compile_objects(path: Path, signatures: Path = SIGNATURES) -> None:
    """Compile the functions of a file of signatures for the CPU that numba is set to, and write an object file."""
    import llvmlite.binding as llvm
    from llvmlite import ir
    from numba.core.compiler_lock import global_compiler_lock

    from deepsic_codec.kernels.numba_jit import ENTRIES

    _skip_machine_code()
    modules = {module: import_module(f"deepsic_codec.{module}") for module in MODULES}
    kernels: dict[str, list[dict[str, Any]]] = {}
    whole: Any = None
    names: list[str] = []
    for name, overloads in json.loads(signatures.read_text()).items():
        for arguments in overloads:
            symbol = f"deepsic_kernel_{len(names)}"
            with global_compiler_lock:
                text, returns = _compiled(ENTRIES[name], [parsed(one) for one in arguments], symbol)
            names.append(symbol)
            kernels.setdefault(name, []).append({"symbol": symbol, "arguments": arguments, "returns": returns})
            module_of_one = llvm.parse_assembly(text)
            if whole is None:
                whole = module_of_one
            else:
                whole.link_in(module_of_one)
    data = (
        json.dumps({"sources": sources(), "tile": modules["model.cpu.dot"].VARIANT, "kernels": kernels}).encode()
        + b"\0"
    )
    described_in = ir.Module()
    constant = ir.GlobalVariable(described_in, ir.ArrayType(ir.IntType(8), len(data)), DESCRIPTION)
    constant.initializer, constant.global_constant = ir.Constant(constant.value_type, bytearray(data)), True
    described_in.triple = whole.triple
    whole.link_in(llvm.parse_assembly(str(described_in)))
    public = {*names, DESCRIPTION}
    for function in whole.functions:
        if not function.is_declaration and function.name not in public:
            function.linkage = "internal"
    for variable in whole.global_variables:
        if not variable.is_declaration and variable.name not in public:
            variable.linkage = "internal"
    cpu, features = os.environ["NUMBA_CPU_NAME"], os.environ["NUMBA_CPU_FEATURES"]
    target = llvm.Target.from_triple(whole.triple)
    machine_of_target = target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic")
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine_of_target, options)
    unused = llvm.create_new_module_pass_manager()
    unused.add_global_dead_code_eliminate_pass()
    unused.run(whole, passes)
    path.write_bytes(machine_of_target.emit_object(whole))


def _skip_machine_code() -> None:
    """Leave out what this process needs to run what it compiles: machine code is made of the whole, at the end.

    It takes a third of the time. Versions of numba that lack these names take it.
    """
    from numba.core import codegen, lowering

    library: Any = getattr(codegen, "JITCodeLibrary", None)
    compiler: Any = getattr(codegen, "JITCPUCodegen", None)
    lower: Any = lowering.Lower
    if library is not None and hasattr(compiler, "set_env"):
        library._finalize_specific = lambda self: None
        library.get_pointer_to_function = lambda self, name: 0
        compiler.set_env = lambda self, name, environment: None
        lower.create_cpython_wrapper = lambda self, release_gil=False: None


def _compiled(dispatcher: Any, arguments: list[Any], symbol: str) -> tuple[str, str]:
    """Return a module of LLVM with a function of this name that calls a compiled function, and what it returns.

    The function takes the address of words of 64 bits, as `library.Packer` makes them from arguments. It returns a
    word: the result, or `REFUSED` or `FAILED`.
    """
    import numpy as np
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.np.arrayobj import make_array, populate_array

    dispatcher.compile(tuple(arguments))
    result = dispatcher.overloads[tuple(arguments)]
    context, descriptor = result.target_context, result.fndesc
    library = context.codegen().create_library(symbol)
    module = library.create_ir_module(symbol)
    i8, i32, word = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(word, [word.as_pointer()]), symbol)
    builder = ir.IRBuilder(function.append_basic_block())
    refused = function.append_basic_block()
    ir.IRBuilder(refused).ret(word(REFUSED))
    read = iter(range(1 << 30))

    def next_word() -> Any:
        return builder.load(builder.gep(function.args[0], [word(next(read))]))

    def at(address: Any, offset: int, kind: Any) -> Any:
        return builder.load(builder.inttoptr(builder.add(address, word(offset)), kind.as_pointer()))

    def expect(condition: Any) -> None:
        accepted = function.append_basic_block()
        builder.cbranch(condition, accepted, refused)
        builder.position_at_end(accepted)

    header, type_of_arrays = next_word(), next_word()

    def array_of(one: Any) -> Any:
        """Return an array from the address of its object, if it is of this type."""
        address = next_word()
        fields = builder.add(address, header)
        expect(builder.icmp_unsigned("==", at(fields, -8, word), type_of_arrays))
        expect(builder.icmp_unsigned("==", at(fields, ARRAY["dimensions"], i32), i32(one.ndim)))
        flags = ALIGNED | (C_CONTIGUOUS if one.layout == "C" else 0)
        expect(builder.icmp_unsigned("==", builder.and_(at(fields, ARRAY["flags"], i32), i32(flags)), i32(flags)))
        of_dtype = builder.add(at(fields, ARRAY["dtype"], word), header)
        dtype = np.dtype(str(one.dtype))
        expect(builder.icmp_unsigned("==", at(of_dtype, DTYPE["number"], i32), i32(dtype.num)))
        expect(builder.icmp_unsigned("==", at(of_dtype, DTYPE["byte order"], i8), i8(ord(dtype.byteorder))))
        array = make_array(one)(context, builder)
        data = builder.inttoptr(at(fields, ARRAY["data"], word), array.data.type)
        shape, strides = (
            [at(at(fields, ARRAY[name], word), 8 * i, word) for i in range(one.ndim)] for name in ("shape", "strides")
        )
        sizes, distances = (cgutils.pack_array(builder, values, ty=word) for values in (shape, strides))
        populate_array(array, data, sizes, distances, word(dtype.itemsize), None)
        return array._getvalue()

    def value_of(one: Any) -> Any:
        if isinstance(one, types.Array):
            return array_of(one)
        if isinstance(one, types.BaseTuple):
            parts: Any = one
            return context.make_tuple(builder, one, [value_of(part) for part in parts])
        if isinstance(one, types.NoneType):
            return context.get_dummy_value()
        to = context.get_value_type(one)
        return next_word() if to == word else builder.trunc(next_word(), to)

    values = [value_of(one) for one in arguments]
    called = context.declare_function(module, descriptor)
    status, returned = context.call_conv.call_function(builder, called, descriptor.restype, descriptor.argtypes, values)
    kind = descriptor.restype
    returns = "bool" if isinstance(kind, types.Boolean) else "int64" if isinstance(kind, types.Integer) else "none"
    if returns == "none":
        returned = word(0)
    elif returned.type != word:
        returned = (builder.sext if getattr(kind, "signed", False) else builder.zext)(returned, word)
    builder.ret(builder.select(status.is_error, word(FAILED), returned))
    library.add_ir_module(module)
    library.add_linking_library(result.library)
    library.finalize()
    return library.get_llvm_str(), returns


def build(variant: str, folder: Path, signatures: Path = SIGNATURES) -> Path:
    """Build the library of a variant in processes of their own, and return its path.

    Raises
    ------
    RuntimeError
        If it cannot be compiled or linked.
    """
    linker = os.environ.get("CC", "cc").split()
    if shutil.which(linker[0]) is None:
        raise RuntimeError(f"the library {variant} cannot be built: there is no C compiler {linker[0]}")
    cpu, features = TARGETS[variant]
    settings = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "DEEPSIC_KERNEL_LIBRARIES": "none"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{variant}{SUFFIX}"
    with tempfile.TemporaryDirectory() as scratch:
        part, linked = Path(scratch) / "kernels.o", Path(scratch) / path.name
        settings["NUMBA_CACHE_DIR"] = scratch
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        commands = [
            [sys.executable, "-m", "deepsic_codec.kernels.build", "--object", str(part), str(signatures)],
            [*linker, "-shared", "-o", str(linked), str(part), "-lm"],
        ]
        for command in commands:
            try:
                subprocess.run(command, check=True, env=os.environ | settings | {"PYTHONPATH": paths})
            except (OSError, subprocess.CalledProcessError) as error:
                raise RuntimeError(f"the library {variant} cannot be built: {error}") from None
        path.write_bytes(linked.read_bytes())
    return path


def host_variants() -> list[str]:
    """Return the names of the libraries that can be built on this machine."""
    return list(VARIANTS.get(machine(), {}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Build libraries."""
    parser = argparse.ArgumentParser(prog="deepsic_codec.kernels.build", description="Compile kernels to libraries.")
    variants = host_variants()
    parser.add_argument("variants", nargs="*", default=variants, help=f"of {', '.join(variants)} (default: all)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to (default: in the package)")
    parser.add_argument("--object", type=Path, nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.object:
        compile_objects(*chosen.object)
        return
    for variant in chosen.variants:
        path = build(variant, chosen.folder)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
