"""Integer transforms: equal payloads give equal pixels, and equal pixels equal payloads, however they are computed."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from deepsic_codec import reference
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.exact import formats
from deepsic_codec.model.exact import matrix as exact
from deepsic_codec.model.exact.checks import check_model_sums, check_sums
from deepsic_codec.model.exact.export import export_network, restore_network
from deepsic_codec.model.exact.layers import Blocks
from deepsic_codec.model.exact.transforms import IntegerFilter, IntegerGains, IntegerSynthesis, dequantise, in_steps
from deepsic_codec.model.family import ANALYSIS, GAINS, SYNTHESIS, below
from deepsic_codec.model.file import load_arrays
from deepsic_codec.model.networks import Synthesis
from deepsic_codec.model.runtime import LoadedModel
from deepsic_codec.model.torch_scheduler import TorchScheduler
from deepsic_codec.model.zoo import find_model
from deepsic_codec.payload.fields import Quantiser
from deepsic_codec.samples import eurosat_mosaic

QUALITIES = (1.0, 33.33, 50.0, 77.5, 100.0)


@pytest.fixture(scope="module")
def runtime():
    return TorchScheduler(LoadedModel(find_model("base")))


@pytest.fixture(scope="module")
def images():
    """Shapes that need padding, in grey levels and in 64ths of them."""
    whole = eurosat_mosaic()[:150, :170]
    rest = np.random.default_rng(0).integers(-31, 32, (70, 90, 3))
    q6 = np.clip(whole[:70, :90].astype(np.int16) * 64 + rest, 0, 16320)
    return [whole[None], np.stack([whole[:64, :64], whole[20:84, 30:94]]), q6.astype(np.int16)[None]]


@pytest.fixture(scope="module")
def expected(runtime, images):
    return {quality: coded(runtime, images, quality) for quality in QUALITIES}


def coded(runtime, images, quality):
    """Pixels (both kinds), label scores and streams at a quality."""
    encoded = runtime.encode(images, [quality] * len(images))
    features, shapes = [e.features for e in encoded], [i.shape[:3] for i in images]
    quantisers, out = [e.quantiser for e in encoded], []
    for q6 in (False, True):
        out += runtime.decode(features, shapes, quantisers, [q6] * len(images))
    return out + [e.cells for e in encoded] + [np.frombuffer(f, np.uint8) for f in features]


def check(runtime, images, expected, qualities):
    for quality in qualities:
        for one, other in zip(coded(runtime, images, quality), expected[quality], strict=True):
            assert one.dtype == other.dtype and np.array_equal(one, other)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "setting",
    [
        lambda: threads(1),
        lambda: threads(2),
        lambda: threads(8),
        lambda: torch.backends.mkldnn.flags(enabled=False),
        lambda: precision("medium"),
    ],
)
def test_settings_of_the_process_do_not_matter(runtime, images, expected, setting):
    assert runtime.model.exact
    with setting():
        check(runtime, images, expected, [50.0])


def test_all_ways_of_computing_agree(images, expected, monkeypatch):
    """8-bit instructions, float32 and float64: no sum saturated, no partial sum was rounded.

    A caller's autocast would round the sums in float32.
    """
    monkeypatch.setattr(exact, "_has_int8", lambda kind: False)
    with torch.autocast("cpu", torch.bfloat16):
        check(TorchScheduler(LoadedModel(find_model("base"))), images, expected, QUALITIES[::2])
    monkeypatch.setattr(exact, "_float32_is_exact", lambda device: False)
    monkeypatch.setattr(exact, "_convolution_is_exact", lambda device: False)
    check(TorchScheduler(LoadedModel(find_model("base"))), images, expected, QUALITIES[::2])


def test_chunk_alone_and_in_a_batch_of_64(runtime):
    tiles = [eurosat_mosaic()[None, 8 * i : 8 * i + 64, 4 * i : 4 * i + 64] for i in range(64)]
    alike, mixed = (
        runtime.encode(tiles, qualities) for qualities in ([50.0] * 64, [*QUALITIES] * 12 + [*QUALITIES[:4]])
    )
    for i in range(0, 64, 9):
        for among, quality in ((alike, 50.0), (mixed, QUALITIES[i % 5])):
            (alone,) = runtime.encode([tiles[i]], [quality])
            assert among[i].features == alone.features and np.array_equal(among[i].cells, alone.cells)
    decoded = runtime.decode([e.features for e in mixed], [(1, 64, 64)] * 64, [e.quantiser for e in mixed])
    for i in (0, 17, 63):
        one = runtime.decode([mixed[i].features], [(1, 64, 64)], [mixed[i].quantiser])[0]
        assert np.array_equal(decoded[i], one)


def test_whole_grey_levels_are_the_same_in_either_type(runtime, images):
    grey = images[0]
    one, two = runtime.encode([grey, grey.astype(np.int16) * 64], [60.0, 60.0])
    assert one.features == two.features and np.array_equal(one.cells, two.cells)


def test_64ths_round_to_grey_levels(runtime, images):
    (encoded,) = runtime.encode(images[:1], [60.0])
    arguments = [encoded.features] * 2, [images[0].shape[:3]] * 2, [encoded.quantiser] * 2
    whole, q6 = runtime.decode(*arguments, [False, True])
    assert q6.dtype == np.int16 and q6.min() >= 0 and q6.max() <= 255 * 64
    assert np.array_equal(whole, (q6 + 32) >> 6)


def test_quantiser_and_dequantiser_agree():
    """Every latent comes back within half a step and half a unit, and hostile symbols stay in range."""
    table = load_arrays(find_model("base"))[f"{GAINS}.step"]
    gains = IntegerGains(dict.fromkeys(("step", "half"), torch.from_numpy(table)), torch.device("cpu"))
    hundredths = torch.tensor([100, 150, 5000, 9999, 10000])
    steps = gains.steps(hundredths, False)
    assert torch.equal(steps[0], gains.tables[0][0].int()) and torch.equal(steps[4], gains.tables[0][99].int())
    latents = torch.randint(-formats.WIDE_MAX, formats.WIDE_MAX + 1, (5, 3, 4, steps.shape[1]), dtype=torch.int32)
    symbols = torch.round(in_steps(latents, steps)).to(torch.int32)
    off = (dequantise(symbols, steps) - latents).abs().float()
    limit = steps[:, None, None, :].float() * 2.0**-formats.STEP_BITS / 2 + 1
    assert bool((off <= limit).all())
    for value in (-32767, 32767):
        hostile = dequantise(torch.full((5, 1, 1, steps.shape[1]), value, dtype=torch.int32), steps)
        real = steps[:, None, None, :].double() * value * 2.0**-formats.STEP_BITS
        exactly = (real + 0.5).floor()
        assert torch.equal(hostile, exactly.clamp(-formats.WIDE_MAX, formats.WIDE_MAX).int())


def test_exported_sums_stay_exact():
    """However large trained weights are, exported ones keep sums in the range that float32 holds."""
    torch.manual_seed(1)
    sizes = {"synthesis_widths": (8, 16), "synthesis_blocks": (1, 1), "prior_groups": (16,), "knots": 3}
    network = Synthesis(Architecture(latents=16, prior_detail=16, **sizes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 30)
    tensors = export_network(network)
    for name, weight in tensors.items():
        if name.endswith("spatial.weight"):
            total = weight.double().abs().sum((1, 2, 3)) * formats.STREAM_MAX
            assert float((total + tensors[name[:-6] + "bias"].double().abs()).max()) < 2**24
        elif name.endswith(("up.weight", "down.weight", "expand.weight", "out.weight")):
            total = weight.double().abs().flatten(1).sum(1) * formats.HIDDEN_HIGH
            largest = tensors[name[:-6] + "bias"].double().abs().reshape(-1, len(weight)).amax(0)  # of all qualities
            assert float((total + largest).max()) < 2**24


@pytest.fixture(scope="module")
def conditioned():
    """A synthesis whose blocks have other biases at every quality, with its integer tensors."""
    torch.manual_seed(2)
    network = Synthesis(network_arch()).eval().requires_grad_(False)
    for block in (*network.blocks8, *network.blocks16):
        block.condition.offset.table.normal_(0, 0.5)
    network.out.weight.normal_(0, 0.1)
    network.filter.scale.table.uniform_(-0.5, 0.5)
    for table in (network.filter.condition.offset.table, network.filter.places):
        table.normal_(0, 0.5)
    network.filter.down.weight.normal_(0, 0.05)
    network.filter.down.bias.normal_(0, 0.1)
    network.integer = True
    return network, export_network(network)


def test_conditioned_blocks_do_what_training_imitates_at_each_images_quality(conditioned):
    network, tensors = conditioned
    quality, cpu = torch.tensor([5, 48, 97]), torch.device("cpu")
    stream = torch.randint(-1500, 1501, (3, 5, 4, 16)).float()
    imitated = stream.permute(0, 3, 1, 2) * 2.0**-formats.STREAM_BITS
    for block in network.blocks16:
        imitated = block.imitate(imitated, quality.float())
    actual = Blocks(tensors, "blocks16", 2, cpu)(stream.clone(), quality)
    off = (imitated.permute(0, 2, 3, 1) * 2.0**formats.STREAM_BITS - actual).abs()
    # biases are rounded to integers only in the exported form, which can turn a tie
    assert float(off.max()) <= 8 and float((off > 0.5).float().mean()) < 0.3
    latents = torch.randint(-500, 501, (3, 3, 2, 16), dtype=torch.int32)
    integer = IntegerSynthesis(network_arch(), tensors, cpu)
    actual = integer(latents, quality)
    for i in range(3):
        assert torch.equal(integer(latents[i : i + 1], quality[i : i + 1]), actual[i : i + 1])
        arrays = {f"{SYNTHESIS}.{k}": v.numpy() for k, v in tensors.items()} | {
            f"{GAINS}.step": np.full((100, 16), 256)
        }
        plain = reference.synthesise(arrays, latents[i].numpy(), int(quality[i]) * 100)
        assert np.array_equal(plain, actual[i].numpy())
    other = integer(latents, torch.tensor([97, 48, 5]))
    assert not torch.equal(other[0], actual[0]) and torch.equal(other[1], actual[1])


def test_the_filter_does_what_training_imitates(conditioned):
    network, tensors = conditioned
    quality, pixels = torch.tensor([5, 97]), torch.randint(0, 255 * 64 + 1, (2, 17, 22, 3), dtype=torch.int16)
    imitated = (pixels.permute(0, 3, 1, 2).double() - 128 * 64).float() * 2.0**-formats.OUTPUT_BITS
    change = network.filter.imitate(imitated, quality.float()) * 2.0**formats.OUTPUT_BITS
    expected = (pixels.double() + change.permute(0, 2, 3, 1)).clamp(0, 255 * 64)
    actual = IntegerFilter(tensors, torch.device("cpu"))(pixels, quality)
    off = (actual - expected).abs()
    # biases are rounded to integers only in the exported form, which can turn a tie
    assert float(off.max()) <= 16 and float((off > 0.5).float().mean()) < 0.1
    assert float(change.abs().mean()) > 100


def test_conditioned_blocks_come_back_from_a_file(conditioned):
    network, tensors = conditioned
    again = Synthesis(network_arch()).eval().requires_grad_(False)
    restore_network(again, tensors)
    again.integer = True
    for name, expected in export_network(again).items():
        assert (expected.double() - tensors[name].double()).abs().max() <= 1, name


def test_biases_for_qualities_fit_their_layer_and_architecture(conditioned):
    _, tensors = conditioned
    name = "blocks16.1.up.bias"
    weight, bias, shift = (tensors[name.replace("bias", part)] for part in ("weight", "bias", "shift"))
    check_sums(name, weight, bias, shift, formats.UP)
    for crafted in (bias[:50], bias[:, :8], bias * 0 + 2**26):
        with pytest.raises(ValueError, match="out of the range"):
            check_sums(name, weight, crafted, shift, formats.UP)
    one = tensors | {name: bias[0]}
    with pytest.raises(ValueError, match="of another shape"):
        restore_network(Synthesis(network_arch()), one)


def network_arch():
    sizes = {"synthesis_widths": (8, 16), "synthesis_blocks": (1, 2), "prior_groups": (16,), "knots": 3}
    return Architecture(latents=16, prior_detail=16, **sizes)


def test_packaged_weights_are_integers():
    arrays = load_arrays(find_model("base"))
    for prefix in ("decoder", "encoder", "head"):
        for name, value in below(arrays, prefix).items():
            assert value.dtype.kind in "iu", f"{prefix}.{name} is {value.dtype}"


def unshuffle(v, n):
    rows, columns, channels = v.shape
    v = v.reshape(rows // n, n, columns // n, n, channels).transpose(0, 2, 4, 1, 3)
    return v.reshape(rows // n, columns // n, -1)


def analyse(t, pixels, quality):
    """Latents of pixels (H,W,3) in 64ths, sides multiples of 16: the analysis of docs/integer-transforms.md."""
    layer, modulate, read, wide = reference.layer, reference.modulate, reference.read, (-4095, 4095)
    g = ((pixels + 32) >> 6) - 128
    f = pixels - 64 * (g + 128)
    h = modulate(t, "mod8", layer(t, "stem", unshuffle(g, 8), wide, quality), quality)
    h = unshuffle(read(reference.blocks(t, "blocks8", h, quality)), 2)
    h = modulate(t, "mod16", layer(t, "reduce", h, wide, quality), quality)
    h = reference.blocks(t, "blocks16", h, quality)
    w = t["linear.weight"].astype(int).reshape(len(t["linear.weight"]), -1)
    total = unshuffle(g, 16) @ w.T + 2 * unshuffle(f, 16) @ reference.digits(w)[0].T
    linear = (total + t["linear.bias"]) >> t["linear.shift"].astype(int)
    return np.clip(linear + layer(t, "out", read(h), (-16319, 16319), quality), -16319, 16319)


@pytest.mark.parametrize("quality", [1.0, 42.42, 100.0])
def test_reference_of_the_specification_gives_the_same_pixels_and_symbols(runtime, quality):
    """What was written from the document alone agrees with the package, for sound and for hostile symbols."""
    arrays = load_arrays(find_model("base"))
    hundredths = round(quality * 100)
    steps = reference.quantiser_steps(arrays, hundredths, False).astype(np.float32)
    image = eurosat_mosaic()[40:88, 30:62]
    q6 = np.clip(image.astype(np.int16) * 64 + np.arange(32)[:, None] - 16, 0, 16320).astype(np.int16)
    for source in (image, q6):
        (encoded,) = runtime.encode([source[None]], [quality], efforts=[0])
        arguments = [encoded.features], [(1, 48, 32)], [encoded.quantiser]
        symbols = runtime.decode_symbols(*arguments)[0][0].transpose(1, 2, 0)
        pixels = source.astype(np.int64) * (1 if source.dtype == np.int16 else 64)
        latents = analyse(below(arrays, ANALYSIS), pixels, reference.whole_quality(hundredths))
        scaled = np.float32(256) * latents.astype(np.float32) / steps
        assert np.array_equal(np.rint(scaled).astype(np.int64), symbols)
        decoded = runtime.decode(*arguments, [True])[0][0]
        assert np.array_equal(reference.synthesise(arrays, symbols, hundredths), decoded)
    hostile = np.random.default_rng(0).integers(-32767, 32768, (1, 3, 2, len(steps))).astype(np.int16)
    for trellis in (False, True):
        actual = runtime.synthesise([hostile], [(1, 48, 32)], [Quantiser(quality, trellis)], True)[0][0]
        assert np.array_equal(reference.synthesise(arrays, hostile[0], hundredths, trellis), actual)


def test_reference_of_the_specification_gives_the_same_scores(runtime):
    """Whole cells and the smaller ones at the lower and right border, of stored features."""
    arrays = load_arrays(find_model("base"))
    image = eurosat_mosaic()[None, :128, :80]
    encoded = runtime.encode([image], [50.0])[0]
    assert encoded.quantiser == (50.0, True)
    symbols = runtime.decode_symbols([encoded.features], [(1, 128, 80)], [encoded.quantiser])[0]
    actual = runtime.score([symbols], [(1, 128, 80)], [encoded.quantiser])[0][0]
    latents = reference.dequantise(arrays, symbols[0].transpose(1, 2, 0), 5000, True)
    assert actual.shape[:2] == (2, 2)
    for row in range(2):
        for column in range(2):
            cell = latents[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            scores, embedding = reference.score_cell(arrays, 11, cell, 50)
            np.testing.assert_array_equal(np.concatenate([scores, embedding + 128]), actual[row, column])


def test_model_whose_sums_could_be_inexact_is_refused():
    """A crafted file must not make pixels depend on the machine."""
    arrays = dict(load_arrays(find_model("base")))
    arch = Architecture.from_json(find_model("base").architecture)
    check_model_sums(arch, arrays)
    for name, value in (
        ("decoder.synthesis.blocks8.0.spatial.weight", 127),
        ("decoder.synthesis.out.bias", 2**24),
        ("decoder.synthesis.linear.shift", 0),
        ("encoder.analysis.reduce.shift", 200),
        ("decoder.synthesis.filter_up.places", 2**24),
    ):
        crafted = arrays | {name: np.full_like(arrays[name], value)}
        if "spatial" in name:
            crafted["decoder.synthesis.blocks8.0.spatial.bias"] = np.full_like(arrays[name[:-6] + "bias"], 2**20)
        with pytest.raises(ValueError, match="out of the range"):
            check_model_sums(arch, crafted)


def test_a_matrix_padded_for_cuda_gives_the_rows_without_padding():
    chance = torch.Generator().manual_seed(0)
    values, rows = (torch.randint(-127, 128, (n, 40), generator=chance, dtype=torch.int8) for n in (11, 33))
    matrix = exact.Matrix(values, "cpu")
    expected = (rows.double() @ values.double().t()).int()
    assert torch.equal(matrix.matmul(rows), expected)
    matrix._padded = exact.F.pad(matrix.int8, (0, 0, 0, 5))
    actual = matrix.matmul(rows)
    assert torch.equal(actual, expected) and actual.is_contiguous()
