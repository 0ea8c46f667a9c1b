"""The table of tensors of the family `"deepsic"`: what `export` writes and the integer networks read."""

from deepsic_codec.model.architecture import FILTER_PLACES, Architecture, BlockSizes, NetworkSizes
from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact.formats import QUALITIES
from deepsic_codec.model.exact.prior_formats import COMPANDED, LINEAR_MAX, PRIOR_BIAS_MAX, SHIFTS
from deepsic_codec.model.family import ANALYSIS, GAINS, HEAD, PRIOR, RDO, SYNTHESIS
from deepsic_codec.model.logistic import DISTANCES, INDEX_MAX, PRICE_MAX
from deepsic_codec.model.schedule import STARTS, schedule
from deepsic_codec.model.tensors import Table, coder_tensors, spec
from deepsic_codec.payload.constants import LATENT_STRIDE

Formats = dict[str, formats.Format]


def tensors(arch: Architecture) -> Table:
    """Return the table of an architecture."""
    latents, wide = arch.latents, formats.WIDE_MAX
    table = _network(ANALYSIS, arch.analysis, formats.ANALYSIS_LAYERS, conditioned=True)
    table |= _network(SYNTHESIS, arch.synthesis, formats.SYNTHESIS_LAYERS, conditioned=True)
    table |= _filter(arch.synthesis_filter)
    table |= _network(HEAD, arch.head, formats.HEAD_LAYERS)
    table[f"{SYNTHESIS}.normaliser"] = spec("int8", (latents,), -formats.STEP_BITS, formats.STEP_BITS)
    table[f"{HEAD}.compand"] = spec("int16", (wide + 1,), 0, wide)
    table[f"{HEAD}.score"] = spec("uint8", (2 * formats.LOGIT_MAX + 1,), 0, 255)
    for name in ("step", "half"):
        table[f"{GAINS}.{name}"] = spec("int32", (QUALITIES, latents), 1, 2**22)
    table[f"{RDO}.saved"] = spec("int16", (INDEX_MAX + 1, DISTANCES), -(2**15), 2**15 - 1)
    table[f"{RDO}.price"] = spec("int32", (QUALITIES, latents), 0, PRICE_MAX)
    return table | _prior(arch) | coder_tensors(latents)


def _network(prefix: str, sizes: NetworkSizes, layer_formats: Formats, conditioned: bool = False) -> Table:
    table: Table = {}
    for name, (outputs, inputs, edge) in sizes.layers.items():
        pooled = edge > LATENT_STRIDE  # a linear layer, which is no convolution
        shape = (outputs, inputs) if pooled else (outputs, inputs, 1, 1)
        table |= _layer(f"{prefix}.{name}", shape, layer_formats[name], edge**-2)
    for name, blocks in sizes.blocks.items():
        for number in range(blocks.number):
            table |= _block(f"{prefix}.{name}.{number}", blocks, conditioned)
    largest, half = formats.MODULATION_MAX, 2 ** (formats.MODULATION_BITS - 1)
    for name, channels in sizes.modulations.items():
        shape = QUALITIES, channels
        table[f"{prefix}.{name}.scale"] = spec("int16", shape, -largest, largest)
        table[f"{prefix}.{name}.offset"] = spec("int32", shape, half - formats.BIAS_MAX, half + formats.BIAS_MAX)
    return table


def _block(name: str, sizes: BlockSizes, conditioned: bool) -> Table:
    width, hidden, uses = sizes.width, formats.EXPANSION * sizes.width, sizes.edge**-2
    shapes = {"spatial": (width, 1, 3, 3), "up": (hidden, width, 1, 1), "down": (width, hidden, 1, 1)}
    table: Table = {}
    for part, form in formats.BLOCK_LAYERS.items():
        table |= _layer(f"{name}.{part}", shapes[part], form, uses, conditioned and part == "up")
    return table


def _filter(hidden: int) -> Table:
    up, down = f"{SYNTHESIS}.filter_up", f"{SYNTHESIS}.filter_down"
    table = _layer(up, (hidden, 3, 3, 3), formats.FILTER_UP, 1.0, conditioned=True)
    shape, largest = (hidden, FILTER_PLACES, FILTER_PLACES), formats.BIAS_MAX
    table[f"{up}.places"] = spec("int32", shape, -largest, largest)
    table[f"{down}.scale"] = spec("int16", (QUALITIES,), 0, formats.FILTER_SCALE_MAX)
    return table | _layer(down, (3, hidden, 3, 3), formats.FILTER_DOWN, 1.0)


def _layer(name: str, shape: tuple[int, ...], form: formats.Format, uses: float, conditioned: bool = False) -> Table:
    outputs, (least, largest) = shape[:1], form.shifts
    biases = (QUALITIES, *outputs) if conditioned else outputs
    return {
        f"{name}.weight": spec("int16" if form.wide_weight else "int8", shape, -form.weight_max, form.weight_max, uses),
        # with half of the unit that the sum is shifted down to
        f"{name}.bias": spec("int32", biases, -form.bias_max, form.bias_max + 2**largest // 2),
        f"{name}.shift": spec("uint8", outputs, least, largest),
    }


def _prior(arch: Architecture) -> Table:
    companded = spec("uint8", (COMPANDED,), 0, LINEAR_MAX)
    table: Table = {f"{PRIOR}.compand": companded, f"{PRIOR}.compand_half": companded}
    for number, step in enumerate(schedule(arch.prior_groups, arch.prior_detail)):
        outputs, width = 2 * step.count, arch.prior_width
        uses = len(STARTS[step.mask]) / 4 / LATENT_STRIDE**2  # the share of positions that are in the step
        layers = {"out": (outputs, width)}
        if step.input_count:
            layers |= {"first": (width, step.input_count), "second": (width, width)}
        for name, shape in layers.items():
            at, bias = f"{PRIOR}.{number}.{name}", shape[:1] if name == "second" else (QUALITIES, *shape[:1])
            if step.input_count:
                table[at] = spec("int8", shape, -127, 127, uses)
            table[f"{at}_bias"] = spec("int32", bias, -PRIOR_BIAS_MAX, PRIOR_BIAS_MAX)
            table[f"{at}_shift"] = spec("uint8", shape[:1], *SHIFTS[name])
        if step.signed:
            table[f"{PRIOR}.{number}.direct"] = spec("int8", (len(step.offsets), step.count), -127, 127, uses)
    return table
