"""The integer transforms of a model file as ONNX graphs, for runtimes other than this package.

The graphs are `docs/integer-transforms.md` in operators of ONNX. Products of 1x1 layers are `MatMulInteger` of unsigned
bytes with zero points, because products of unsigned with signed bytes saturate on CPUs without VNNI. All other steps
are integers, or float32 where every intermediate result is an integer below 2^24 or such an integer times a power of
two, so that no order of summation changes a result.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.errors import ConfigurationError, ModelMismatch
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.cpu.scheduler import CpuScheduler
from deepsic_codec.model.exact.formats import (
    EMBEDDING_SHIFT,
    HIDDEN_HIGH,
    HUNDREDTHS,
    LATENT_BITS,
    LOGIT_MAX,
    MODULATION_BITS,
    NORMAL_BITS,
    PIXEL_BITS,
    PIXEL_MAX,
    QUALITIES,
    READ_BITS,
    READ_HIGH,
    READ_LOW,
    STEM_MAX,
    STEP_BITS,
    STREAM_BITS,
    STREAM_MAX,
    UNITS_PER_LEVEL,
    WIDE_MAX,
)
from deepsic_codec.model.families import load_checked
from deepsic_codec.model.family import ANALYSIS, GAINS, HEAD, SYNTHESIS, below
from deepsic_codec.model.file import ModelInfo
from deepsic_codec.model.threads import host_threads
from deepsic_codec.payload.coders.symbols import SYMBOL_MAX
from deepsic_codec.payload.constants import EMBEDDING_ZERO, LABEL_CELL, LATENT_STRIDE
from deepsic_codec.payload.fields import Quantiser
from deepsic_codec.require import require

OPSET = 17
#: The IR of the first release of ONNX with this opset.
IR_VERSION = 8
#: What is added to signed bytes, which products take as unsigned ones.
ZERO_POINT = 128
FILES = ("analysis.onnx", "synthesis.onnx", "head.onnx")
#: Of the random images, symbols and cells that a check compares.
CHECKED_SHAPES = ((1, 3, 5), (2, 4, 4))
CHECKED_QUALITIES = (100, 3350, 5000, 8049, 10000)

Tensors = Mapping[str, NDArray[Any]]


def export(info: ModelInfo, folder: str | Path) -> list[Path]:
    """Write the analysis, the synthesis and the semantic head of a model as ONNX files.

    Parameters
    ----------
    info : ModelInfo
        A model of the family `"deepsic"`.
    folder : str or Path
        Made if it does not exist. Files of the names in `FILES` are replaced.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    MissingPackage
        If onnx is not installed.
    ConfigurationError
        If the model is of a family in floating point.
    ModelMismatch
        If the model file is damaged.
    """
    require("onnx", "onnx", purpose="the export of a model")
    import onnx

    arch, arrays = load_checked(info)
    if not isinstance(arch, Architecture):
        raise ConfigurationError(f"{info.name}: only models of the family 'deepsic' can be exported, not {arch.family}")
    steps, half = arrays[f"{GAINS}.step"], arrays[f"{GAINS}.half"]
    graphs = (
        _analysis(below(arrays, ANALYSIS), arch, steps),
        _synthesis(below(arrays, SYNTHESIS), arch, np.concatenate([steps, half])),
        _head(below(arrays, HEAD), arch),
    )
    properties = {"model": info.name, "decoder": info.decoder, "head": info.head}
    properties["classes"] = ",".join([*info.vocabulary.classes, "unknown"])
    paths = [Path(folder) / name for name in FILES]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, graph in zip(paths, graphs, strict=True):
        onnx.save(graph.model(path.stem, properties), path)
    return paths


def check(info: ModelInfo, folder: str | Path, images: NDArray[np.uint8] | None = None) -> int:
    """Compare exported files in ONNX Runtime with the engine of this package.

    Parameters
    ----------
    info : ModelInfo
        The exported model.
    folder : str or Path
        Folder of the files.
    images : uint8 (N,H,W,3), optional
        Images whose latents and symbols are compared, too; H and W are multiples of 16. Random pixels, symbols and
        latents are always compared.

    Returns
    -------
    int
        Number of integers that were compared.

    Raises
    ------
    ModelMismatch
        If a result differs.
    MissingPackage
        If onnxruntime is not installed.
    """
    require("onnx", "onnxruntime", purpose="the check of an exported model")
    import onnxruntime

    engine, rng, count = CpuScheduler(info), np.random.default_rng(0), 0
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = host_threads()
    sessions = {
        name: onnxruntime.InferenceSession(str(Path(folder) / name), options, providers=["CPUExecutionProvider"])
        for name in FILES
    }

    def compare(file: str, outputs: dict[str, NDArray[Any]], **inputs: NDArray[Any]) -> None:
        nonlocal count
        for name, values in zip(outputs, sessions[file].run([*outputs], inputs), strict=True):
            if not np.array_equal(values, outputs[name]):
                raise ModelMismatch(f"{Path(folder) / file}: {name} differ from those of this package")
            count += values.size

    def compare_symbols(symbols: NDArray[np.int16], hundredths: int, trellis: bool) -> None:
        quality, n, (h, w) = hundredths / HUNDREDTHS, len(symbols), symbols.shape[1:3]
        shape, quantiser = (n, h * LATENT_STRIDE, w * LATENT_STRIDE), Quantiser(quality, trellis)
        inputs = {"symbols": symbols, "quality": np.full(n, hundredths), "trellis": np.full(n, int(trellis))}
        latents = engine.dequantise(symbols, quantiser).astype(np.int32)
        outputs: dict[str, NDArray[Any]] = {"latents": latents}
        for name in ("pixels", "levels"):
            (outputs[name],) = engine.synthesise([symbols], [shape], [quantiser], name == "pixels")
        compare("synthesis.onnx", outputs, **inputs)
        edge = LABEL_CELL // LATENT_STRIDE
        cells = engine.score([symbols.transpose(0, 3, 1, 2)], [shape], [quantiser])[0][:, 0, 0]
        scored, values = np.split(cells, [engine.arch.classes], axis=1)
        outputs = {"scores": scored}
        if values.size:
            outputs["embedding"] = (values.astype(np.int16) - EMBEDDING_ZERO).astype(np.int8)
        compare("head.onnx", outputs, latents=latents[:, :edge, :edge], quality=inputs["quality"])

    def compare_images(pixels: NDArray[np.int16], hundredths: int) -> None:
        (encoded,) = engine.encode([pixels], [hundredths / HUNDREDTHS], [0], features=False, labels=False, symbols=True)
        inputs = {"pixels": pixels, "quality": np.full(len(pixels), hundredths)}
        compare("analysis.onnx", {"symbols": encoded.symbols}, **inputs)
        compare_symbols(encoded.symbols, hundredths, False)

    for n, h, w in CHECKED_SHAPES:
        for hundredths in CHECKED_QUALITIES:
            pixels = rng.integers(
                0, 255 * UNITS_PER_LEVEL, (n, h * LATENT_STRIDE, w * LATENT_STRIDE, 3), np.int16, True
            )
            compare_images(pixels, hundredths)
            for limit, trellis in ((3, True), (SYMBOL_MAX, False), (SYMBOL_MAX, True)):
                symbols = rng.integers(-limit, limit, (n, h, w, engine.arch.latents), np.int16, True)
                compare_symbols(symbols, hundredths, trellis)
    if images is not None:
        for hundredths in CHECKED_QUALITIES:
            compare_images(images.astype(np.int16) * UNITS_PER_LEVEL, hundredths)
    return count


class _Graph:
    """A graph that is being written. Values are names; images and streams are float32 (N,C,H,W) unless said."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._ends: dict[str, list[Any]] = {"inputs": [], "outputs": []}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, values: Any, dtype: Any) -> str:
        from onnx import numpy_helper

        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(values, dtype), name))
        return name

    def number(self, value: float) -> str:
        return self.constant(value, np.float32)

    def input(self, name: str, dtype: Any, shape: tuple[Any, ...]) -> str:
        self._end("inputs", name, dtype, shape)
        return name

    def output(self, name: str, value: str, dtype: Any, shape: tuple[Any, ...]) -> None:
        from onnx import helper

        self._nodes.append(helper.make_node("Cast", [value], [name], to=self._type(dtype)))
        self._end("outputs", name, dtype, shape)

    def _end(self, which: str, name: str, dtype: Any, shape: tuple[Any, ...]) -> None:
        from onnx import helper

        self._ends[which].append(helper.make_tensor_value_info(name, self._type(dtype), shape))

    def _type(self, dtype: Any) -> Any:
        from onnx import helper

        return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def model(self, name: str, properties: Mapping[str, str]) -> Any:
        """Return the finished model, checked by ONNX."""
        from onnx import checker, helper

        graph = helper.make_graph(
            self._nodes, f"deepsic {name}", self._ends["inputs"], self._ends["outputs"], self._constants
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="deepsic_codec")
        helper.set_model_props(model, dict(properties))
        checker.check_model(model)
        return model

    def cast(self, x: str, dtype: Any) -> str:
        return self.op("Cast", x, to=self._type(dtype))

    def add(self, x: str, value: float) -> str:
        return self.op("Add", x, self.number(value))

    def times(self, x: str, value: float) -> str:
        return self.op("Mul", x, self.number(value))

    def clip(self, x: str, low: float, high: float) -> str:
        return self.op("Clip", x, self.number(low), self.number(high))

    def floor_shift(self, x: str, bits: int) -> str:
        """Return `x >> bits` of integers in float32."""
        return self.op("Floor", self.times(x, 2.0**-bits))

    def last(self, x: str) -> str:
        return self.op("Transpose", x, perm=[0, 2, 3, 1])

    def first(self, x: str) -> str:
        return self.op("Transpose", x, perm=[0, 3, 1, 2])

    def product(self, rows: str, weight: NDArray[Any], zero_point: int) -> str:
        """Multiply rows (N,H,W,inputs), float32 and with the zero point not yet added, with a weight int8-ranged."""
        unsigned = self.cast(self.add(rows, zero_point) if zero_point else rows, np.uint8)
        second = self.constant(weight.T + ZERO_POINT, np.uint8)
        return self.op(
            "MatMulInteger",
            unsigned,
            second,
            self.constant(zero_point, np.uint8),
            self.constant(ZERO_POINT, np.uint8),
        )

    def weight(self, name: str) -> NDArray[np.int64]:
        weight = self.tensors[f"{name}.weight"]
        return weight.reshape(len(weight), -1).astype(np.int64)

    def layer(self, name: str, rows: str, whole: str | None, zero_point: int = ZERO_POINT) -> str:
        """Return `(sum + bias) >> shift` (N,H,W,outputs) of rows; biases may have a row for each whole quality."""
        total = self.cast(self.product(rows, self.weight(name), zero_point), np.float32)
        bias, unit = self.tensors[f"{name}.bias"], 2.0 ** -self.tensors[f"{name}.shift"].astype(np.float64)
        if bias.ndim == 2:
            biases = self.op("Gather", self.constant(bias[:, None, None], np.float32), cast(str, whole))
        else:
            biases = self.constant(bias, np.float32)
        return self.op("Floor", self.op("Mul", self.op("Add", total, biases), self.constant(unit, np.float32)))

    def digits(self, x: str) -> tuple[str, str]:
        """Return the high and the low digit of integers."""
        high = self.floor_shift(self.add(x, 64), 7)
        return high, self.op("Sub", x, self.times(high, 128))

    def digits_of_weight(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        weight = self.weight(name)
        high = (weight + 64) >> 7
        return high, weight - (high << 7)

    def assembled(self, high: str, low: str, bias: NDArray[Any], shift: NDArray[Any]) -> str:
        """Return `(128 high + low + bias) >> shift` of int32, which exceed 2^24, as float32."""
        total = self.op("Add", self.op("Mul", high, self.constant(128, np.int32)), low)
        total = self.op("Add", total, self.constant(bias, np.int32))
        return self.cast(self.floor_divided(total, self.constant(1 << shift.astype(np.int64), np.int32)), np.float32)

    def floor_divided(self, x: str, divisor: str) -> str:
        """Return `floor(x / divisor)` of integers, whose `Div` rounds towards zero."""
        return self.op("Div", self.op("Sub", x, self.op("Mod", x, divisor)), divisor)

    def stem_of_digits(self, x: str) -> str:
        """Return the layer `stem` (N,H,W,outputs) of wide values (N,H,W,C)."""
        weight = self.weight("stem")
        high, low = (self.product(digit, weight, ZERO_POINT) for digit in self.digits(x))
        return self.assembled(high, low, self.tensors["stem.bias"], self.tensors["stem.shift"])

    def modulated(self, name: str, x: str, whole: str) -> str:
        """Bound the results of a stem and modulate them: a stream."""
        scale, offset = (
            self.op("Gather", self.constant(self.tensors[f"{name}.{part}"][:, :, None, None], np.float32), whole)
            for part in ("scale", "offset")
        )
        product = self.op("Add", self.op("Mul", self.clip(x, -STEM_MAX, STEM_MAX), scale), offset)
        return self.clip(self.floor_shift(product, MODULATION_BITS), -STREAM_MAX, STREAM_MAX)

    def read(self, stream: str) -> str:
        bits = STREAM_BITS - READ_BITS
        return self.clip(self.floor_shift(self.add(stream, 1 << bits >> 1), bits), READ_LOW, READ_HIGH)

    def blocks(self, name: str, count: int, stream: str, whole: str | None) -> str:
        """Apply residual blocks to a stream."""
        for i in range(count):
            at = f"{name}.{i}"
            unit = 2.0 ** -self.tensors[f"{at}.spatial.shift"].astype(np.float64)
            weight, bias = self.tensors[f"{at}.spatial.weight"], self.tensors[f"{at}.spatial.bias"]
            total = self.op(
                "Conv",
                stream,
                self.constant(weight, np.float32),
                self.constant(bias, np.float32),
                group=len(weight),
                pads=[1, 1, 1, 1],
            )
            total = self.op("Mul", total, self.constant(unit[:, None, None], np.float32))
            spatial = self.clip(self.op("Floor", total), READ_LOW, READ_HIGH)
            hidden = self.clip(self.layer(f"{at}.up", self.last(spatial), whole), 0, 255)
            change = self.first(self.layer(f"{at}.down", hidden, None, 0))
            stream = self.clip(self.op("Add", stream, change), -STREAM_MAX, STREAM_MAX)
        return stream

    def filtered(self, pixels: str, whole: str) -> str:
        """Return what the filter adds to pixels (N,3,H,W), in 64ths of a grey level."""
        grey = self.add(self.floor_shift(self.add(pixels, UNITS_PER_LEVEL // 2), PIXEL_BITS), -128)
        grey = self.op("Pad", grey, self.constant([0, 0, 2, 2] * 2, np.int64), mode="edge")
        up, down = ({k: self.tensors[f"filter_{n}.{k}"] for k in ("weight", "bias", "shift")} for n in ("up", "down"))
        total = self.op("Conv", grey, self.constant(up["weight"], np.float32))
        bias = self.op("Gather", self.constant(up["bias"][:, :, None, None], np.float32), whole)
        # places of an image whose hidden values begin a row and a column before it
        places = np.roll(self.tensors["filter_up.places"], (1, 1), (1, 2))[None]
        size = self.op("Slice", self.op("Shape", total), self.constant([2], np.int64), self.constant([4], np.int64))
        repeats = self.op("Div", self.op("Add", size, self.constant(7, np.int64)), self.constant(8, np.int64))
        repeats = self.op("Concat", self.constant([1, 1], np.int64), repeats, axis=0)
        tiled = self.op("Tile", self.constant(places, np.float32), repeats)
        first, axes = self.constant([0, 0], np.int64), self.constant([2, 3], np.int64)
        total = self.op("Add", self.op("Add", total, bias), self.op("Slice", tiled, first, size, axes))
        unit = self.constant(2.0 ** -up["shift"].astype(np.float64)[:, None, None], np.float32)
        hidden = self.clip(self.op("Floor", self.op("Mul", total, unit)), 0, HIDDEN_HIGH)
        weights = self.constant(down["weight"], np.float32), self.constant(down["bias"], np.float32)
        unit = self.constant(2.0 ** -down["shift"].astype(np.float64)[:, None, None], np.float32)
        change = self.op("Floor", self.op("Mul", self.op("Conv", hidden, *weights), unit))
        scale = self.constant(self.tensors["filter_down.scale"][:, None, None, None], np.float32)
        change = self.op("Mul", self.clip(change, -PIXEL_MAX, PIXEL_MAX), self.op("Gather", scale, whole))
        return self.floor_shift(self.add(change, 1 << MODULATION_BITS >> 1), MODULATION_BITS)

    def quality(self) -> tuple[str, str]:
        """Return the input: qualities int64 (N,) in hundredths, and rows of tables by whole quality."""
        quality = self.input("quality", np.int64, ("N",))
        hundred, half = self.constant(HUNDREDTHS, np.int64), self.constant(HUNDREDTHS // 2, np.int64)
        row = self.op("Div", self.op("Add", quality, half), hundred)
        row = self.op("Sub", row, self.constant(1, np.int64))
        return quality, self.op("Clip", row, *(self.constant(value, np.int64) for value in (0, QUALITIES - 1)))

    def steps(self, table: NDArray[Any], quality: str, trellis: str | None = None) -> str:
        """Return steps int64 (N,1,1,C) of the quantiser at qualities in hundredths.

        Where the input `trellis` is 1, they are those of the second half of the table.
        """
        hundred, one = self.constant(HUNDREDTHS, np.int64), self.constant(1, np.int64)
        low = self.op("Clip", self.op("Div", quality, hundred), one, self.constant(QUALITIES - 1, np.int64))
        part = self.op("Sub", quality, self.op("Mul", low, hundred))
        part = self.op("Reshape", part, self.constant([-1, 1, 1, 1], np.int64))
        tables = self.constant(table[:, None, None], np.int64)
        rows = [self.op("Sub", low, one), low]
        if trellis is not None:
            offset = self.op("Mul", trellis, self.constant(QUALITIES, np.int64))
            rows = [self.op("Add", at, offset) for at in rows]
        below, above = (self.op("Gather", tables, at) for at in rows)
        total = self.op("Add", self.op("Mul", below, self.op("Sub", hundred, part)), self.op("Mul", above, part))
        return self.op("Div", self.op("Add", total, self.constant(HUNDREDTHS // 2, np.int64)), hundred)

    def unshuffled(self, x: str, edge: int, name: str, channels: int) -> str:
        """Return squares of images as rows (N,H,W,edge edge C), and put the inputs of a layer into this order."""
        tensors = dict(self.tensors)
        weight = tensors[f"{name}.weight"]
        weight = weight.reshape(len(weight), channels, edge, edge).transpose(0, 2, 3, 1)
        tensors[f"{name}.weight"] = weight.reshape(len(weight), -1)
        self.tensors = tensors
        return self.last(self.op("SpaceToDepth", x, blocksize=edge))

    def shuffled(self, rows: str, edge: int) -> str:
        return self.op("DepthToSpace", self.first(rows), blocksize=edge, mode="CRD")


def _analysis(tensors: Tensors, arch: Architecture, steps: NDArray[Any]) -> _Graph:
    """Pixels int16 (N,H,W,3) in 64ths of a grey level to latents and nearest symbols."""
    g = _Graph(tensors)
    pixels = g.first(g.cast(g.input("pixels", np.int16, ("N", "H", "W", 3)), np.float32))
    quality, whole = g.quality()
    grey = g.floor_shift(g.add(pixels, UNITS_PER_LEVEL // 2), PIXEL_BITS)
    rest = g.op("Sub", pixels, g.times(grey, UNITS_PER_LEVEL))
    grey = g.add(grey, -128)
    (w8, _), (n8, n16) = arch.analysis_widths, arch.analysis_blocks

    squares = g.unshuffled(grey, LATENT_STRIDE, "linear", 3)
    high, low = g.digits_of_weight("linear")
    small = g.product(g.last(g.op("SpaceToDepth", rest, blocksize=LATENT_STRIDE)), high, ZERO_POINT)
    lower = g.op("Add", g.product(squares, low, ZERO_POINT), g.op("Mul", small, g.constant(2, np.int32)))
    linear = g.assembled(
        g.product(squares, high, ZERO_POINT), lower, g.tensors["linear.bias"], g.tensors["linear.shift"]
    )
    linear = g.clip(linear, -(2**20), 2**20)

    stream = g.modulated("mod8", g.first(g.layer("stem", g.unshuffled(grey, 8, "stem", 3), None)), whole)
    stream = g.read(g.blocks("blocks8", n8, stream, whole))
    stream = g.modulated("mod16", g.first(g.layer("reduce", g.unshuffled(stream, 2, "reduce", w8), None)), whole)
    stream = g.read(g.blocks("blocks16", n16, stream, whole))
    curve = g.clip(g.layer("out", g.last(stream), None), -WIDE_MAX, WIDE_MAX)
    latents = g.clip(g.op("Add", linear, curve), -WIDE_MAX, WIDE_MAX)
    scaled = g.op("Div", g.times(latents, 1 << STEP_BITS), g.cast(g.steps(steps, quality), np.float32))
    shape = ("N", "h", "w", arch.latents)
    g.output("latents", latents, np.int32, shape)
    g.output("symbols", g.op("Round", g.clip(scaled, -SYMBOL_MAX, SYMBOL_MAX)), np.int16, shape)
    return g


def _synthesis(tensors: Tensors, arch: Architecture, steps: NDArray[Any]) -> _Graph:
    """Symbols int16 (N,h,w,C) to pixels, in 64ths of a grey level and in grey levels, and to latents.

    `steps` are those without a trellis, then those with one.
    """
    g = _Graph(tensors)
    symbols = g.cast(g.input("symbols", np.int16, ("N", "h", "w", arch.latents)), np.int64)
    quality, whole = g.quality()
    n8, n16 = arch.synthesis_blocks
    limit = 2 << (14 + STEP_BITS)
    product = g.op("Mul", symbols, g.steps(steps, quality, g.input("trellis", np.int64, ("N",))))
    product = g.op("Clip", product, *(g.constant(value, np.int64) for value in (-limit, limit)))
    latents = g.floor_shift(g.add(g.cast(product, np.float32), 1 << STEP_BITS >> 1), STEP_BITS)
    latents = g.clip(latents, -WIDE_MAX, WIDE_MAX)

    (high, low), (weight_high, weight_low) = g.digits(latents), g.digits_of_weight("linear")
    lower = g.op("Add", g.product(low, weight_high, ZERO_POINT), g.product(high, weight_low, ZERO_POINT))
    bias, shift = g.tensors["linear.bias"].astype(np.int64) >> 7, g.tensors["linear.shift"].astype(np.int64) - 7
    linear = g.assembled(g.product(high, weight_high, ZERO_POINT), lower, bias, shift)
    linear = g.shuffled(g.clip(linear, -PIXEL_MAX, PIXEL_MAX), LATENT_STRIDE)

    unit = 2.0 ** (tensors["normaliser"].astype(np.float64) + (NORMAL_BITS - LATENT_BITS))
    normal = g.op("Floor", g.add(g.op("Mul", latents, g.constant(unit, np.float32)), 0.5))
    stream = g.modulated("mod16", g.first(g.stem_of_digits(g.clip(normal, -WIDE_MAX, WIDE_MAX))), whole)
    stream = g.read(g.blocks("blocks16", n16, stream, whole))
    stream = g.modulated("mod8", g.shuffled(g.layer("expand", g.last(stream), None), 2), whole)
    stream = g.read(g.blocks("blocks8", n8, stream, whole))
    curve = g.shuffled(g.clip(g.layer("out", g.last(stream), None), -PIXEL_MAX, PIXEL_MAX), 8)

    middle, top = 128 * UNITS_PER_LEVEL, 255 * UNITS_PER_LEVEL
    pixels = g.clip(g.add(g.op("Add", linear, curve), middle), 0, top)
    pixels = g.last(g.clip(g.op("Add", pixels, g.filtered(pixels, whole)), 0, top))
    levels = g.floor_shift(g.add(pixels, UNITS_PER_LEVEL // 2), PIXEL_BITS)
    g.output("pixels", pixels, np.int16, ("N", "H", "W", 3))
    g.output("levels", levels, np.uint8, ("N", "H", "W", 3))
    g.output("latents", latents, np.int32, ("N", "h", "w", arch.latents))
    return g


def _head(tensors: Tensors, arch: Architecture) -> _Graph:
    """Latents int32 (N,h,w,C) of label cells, h and w at most 4, to scores and embeddings."""
    g = _Graph(tensors)
    latents = g.input("latents", np.int32, ("N", "h", "w", arch.latents))
    quality, whole = g.quality()
    magnitude = g.op("Gather", g.constant(tensors["compand"], np.float32), g.op("Abs", latents))
    companded = g.op("Mul", magnitude, g.cast(g.op("Sign", latents), np.float32))
    stream = g.modulated("mod", g.first(g.stem_of_digits(companded)), whole)
    stream = g.blocks("blocks", arch.head_blocks, g.op("Relu", stream), whole)
    shape = g.op("Shape", latents)
    count = g.op("ReduceProd", g.op("Slice", shape, g.constant([1], np.int64), g.constant([3], np.int64)), keepdims=1)
    two = g.constant(2, np.int64)
    total = g.cast(g.op("ReduceSum", stream, g.constant([2, 3], np.int64), keepdims=1), np.int64)
    mean = g.floor_divided(g.op("Add", g.op("Mul", total, two), count), g.op("Mul", count, two))
    pooled = g.op("Concat", g.cast(mean, np.float32), g.op("ReduceMax", stream, axes=[2, 3], keepdims=1), axis=1)
    hidden = g.clip(g.layer("hidden", g.last(g.read(pooled)), whole), 0, 255)
    logits = g.clip(g.layer("out", hidden, None, 0), -LOGIT_MAX, LOGIT_MAX)
    logits = g.op("Reshape", logits, g.constant([-1, arch.outputs], np.int64))

    def columns(first: int, last: int) -> str:
        return g.op("Slice", logits, *(g.constant([n], np.int64) for n in (first, last, 1)))

    of_classes = g.cast(g.add(columns(0, arch.classes), LOGIT_MAX), np.int64)
    scores = g.op("Gather", g.constant(tensors["score"], np.uint8), of_classes)
    g.output("scores", scores, np.uint8, ("N", arch.classes))
    if arch.outputs > arch.classes:
        rest = g.add(columns(arch.classes, arch.outputs), 1 << EMBEDDING_SHIFT >> 1)
        values = g.clip(g.floor_shift(rest, EMBEDDING_SHIFT), 1 - EMBEDDING_ZERO, EMBEDDING_ZERO - 1)
        g.output("embedding", values, np.int8, ("N", arch.outputs - arch.classes))
    return g
