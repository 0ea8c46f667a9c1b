"""The integer prior: exact however it is computed, and equal to what training imitated."""

import numpy as np
import pytest
import torch

from deepsic_codec.errors import CorruptPayload
from deepsic_codec.model import prior as prior_module
from deepsic_codec.model.architecture import Architecture
from deepsic_codec.model.coding import decode_symbols, encode_symbols
from deepsic_codec.model.exact import matrix as exact
from deepsic_codec.model.exact.checks import check_prior_sums
from deepsic_codec.model.exact.export import export_prior
from deepsic_codec.model.exact.prior import IntegerPrior
from deepsic_codec.model.file import load_arrays
from deepsic_codec.model.neighbours import iter_steps
from deepsic_codec.model.prior import Prior
from deepsic_codec.model.schedule import schedule
from deepsic_codec.model.zoo import find_model
from deepsic_codec.payload.coders.contexts import CoderTables

ARCH = Architecture(latents=16, prior_groups=(2, 6, 8), prior_width=24, knots=3, prior_detail=4)


@pytest.fixture(scope="module")
def trained():
    """A prior whose weights are random but all in use."""
    torch.manual_seed(0)
    prior = Prior(ARCH)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    return prior.eval()


@pytest.fixture(scope="module")
def integer(trained):
    return IntegerPrior(ARCH, export_prior(trained))


def symbols(*shape, seed=0):
    return np.rint(np.random.default_rng(seed).laplace(0, 3, shape)).astype(np.int16)


def everything(prior, values, quality):
    """Means and scale indices of all passes."""
    neighbours = prior.neighbours(torch.from_numpy(values).float())
    q = torch.tensor(quality)
    return [prior.run(n, neighbours, rows, q[image]) for n, _, rows, _, image in iter_steps(prior, neighbours)]


def test_schedule_covers_every_symbol_once():
    for grid in ((1, 1), (1, 4), (5, 3), (8, 8)):
        count = np.zeros((*grid, sum(ARCH.prior_groups)), int)
        for step in schedule(ARCH.prior_groups, ARCH.prior_detail):
            ys, xs = step.positions(*grid)
            count[ys, xs, step.start : step.start + step.count] += 1
        assert (count == 1).all()


def test_equals_what_training_imitates(trained, integer):
    values = symbols(2, 6, 5, 16)
    quality = [20, 77]
    nchw = torch.from_numpy(values).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        mean, index = trained(nchw, torch.tensor(quality, dtype=torch.float32), quantised=True)
    agree = []
    neighbours = integer.neighbours(torch.from_numpy(values).float())
    for n, step, rows, _, image in iter_steps(integer, neighbours):
        means, scales = integer.run(n, neighbours, rows, torch.tensor(quality)[image])
        ys, xs = step.positions(6, 5)
        as_rows = [t.permute(0, 2, 3, 1)[:, ys, xs, step.channels].reshape(-1, step.count) for t in (mean, index)]
        agree += [(means == as_rows[0] * 8).float().mean(), (scales == as_rows[1] * 4).float().mean()]
    # biases are rounded to integers only in the exported form, which can turn a tie
    assert min(agree) > 0.9 and torch.stack(agree).mean() > 0.98


def test_same_integers_under_any_threads_batches_and_precision(integer):
    values, quality = symbols(12, 7, 6, 16), list(range(3, 99, 8))
    expected = everything(integer, values, quality)
    for threads in (1, 2, 8):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for actual, one in zip(everything(integer, values, quality), expected, strict=True):
                assert torch.equal(actual[0], one[0]) and torch.equal(actual[1], one[1])
        finally:
            torch.set_num_threads(before)
    for i in (0, 5, 11):
        alone = everything(integer, values[i : i + 1], quality[i : i + 1])
        for actual, one in zip(alone, expected, strict=True):
            rows = slice(i * len(actual[0]), (i + 1) * len(actual[0]))
            assert torch.equal(actual[0], one[0][rows]) and torch.equal(actual[1], one[1][rows])


def check_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_all_ways_of_multiplying_agree(integer, monkeypatch):
    """8-bit instructions, float32 and float64 give the same integers: no sum saturated, no partial sum was rounded."""
    values = symbols(2, 6, 6, 16, seed=3) * 40
    expected = everything(integer, values, [1, 100])
    monkeypatch.setattr(exact, "_has_int8", lambda kind: False)
    check_same(everything(integer, values, [1, 100]), expected)
    monkeypatch.setattr(exact, "_float32_is_exact", lambda device: False)
    check_same(everything(integer, values, [1, 100]), expected)


def test_callers_settings_do_not_matter(integer):
    """Neither autocast nor a lower precision of products changes an integer."""
    values = symbols(2, 6, 6, 16, seed=4)
    expected = everything(integer, values, [30, 60])
    with torch.autocast("cpu", torch.bfloat16):
        check_same(everything(integer, values, [30, 60]), expected)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            check_same(everything(integer, values, [30, 60]), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_sums_too_large_to_be_exact_are_refused():
    wide = Prior(Architecture(latents=96, prior_groups=(48, 48), prior_detail=32, prior_width=16, knots=3))
    check_prior_sums(export_prior(wide))
    with torch.no_grad():
        wide.networks[3].first.weight.fill_(1e4)
    with pytest.raises(ValueError, match="too large"):
        export_prior(wide)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("0.out_bias", (7, 1)),
        ("1.first_bias", (0, 0)),
        ("1.first_bias", (99, -1)),
        ("2.second_bias", (-1,)),
        ("3.out_bias", (57, 3)),
    ],
)
@pytest.mark.parametrize("size", [2**23, 2**31 - 1])
def test_a_bias_too_large_to_be_exact_is_refused_at_any_quality(trained, name, place, sign, size):
    tensors = {name: tensor.clone() for name, tensor in export_prior(trained).items()}
    tensors[name][place] = sign * size - (sign < 0)
    with pytest.raises(ValueError, match=f"weights or biases of {name.removesuffix('_bias')} are too large"):
        check_prior_sums(tensors)


@pytest.mark.parametrize("value", [127, -128])
@pytest.mark.parametrize("name", ["3.first", "3.second", "3.out"])
def test_weights_too_large_to_be_exact_are_refused(name, value):
    """Also -128, which has no positive counterpart in 8 bits."""
    tensors = {name: torch.full((4, 600), value, dtype=torch.int8), f"{name}_bias": torch.zeros(4, dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"weights or biases of {name} are too large"):
        check_prior_sums(tensors)


def test_bounds_hold_for_the_bundled_model():
    arrays = load_arrays(find_model("base"))
    prefix = "decoder.prior."
    check_prior_sums({k[len(prefix) :]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)})


TABLES = CoderTables.untrained(16, np.linspace(np.log(0.05), np.log(100), 64))


@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (1, 1, 5, 16), (2, 4, 3, 16), (1, 9, 8, 16)])
def test_coding_round_trip(integer, shape):
    chunks = [symbols(*shape, seed=i) * (1 + 50 * i) for i in range(3)]
    quality = [1.0, 50.49, 100.0]
    streams = encode_symbols(integer, TABLES, chunks, quality)
    for one, two in zip(decode_symbols(integer, TABLES, streams, shape[0], shape[1:3], quality), chunks, strict=True):
        np.testing.assert_array_equal(one, two)
    # a chunk's bytes do not depend on its company
    assert encode_symbols(integer, TABLES, chunks[1:2], quality[1:2]) == streams[1:2]


def test_foreign_bytes_are_decoded_to_something_or_refused(integer):
    rng = np.random.default_rng(0)
    refused = 0
    for size in (0, 1, 50, 3000):
        data = rng.bytes(size)
        try:
            decode_symbols(integer, TABLES, [data], 1, (3, 3), [50.0])
        except CorruptPayload:
            refused += 1
    assert refused >= 1  # the long one has bytes left over at least


def test_kernel_that_a_device_lacks_is_not_used():
    assert not exact._has_torch_kernel(torch.device("cpu"))


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (5, 4), (7, 6)])
def test_training_reads_the_contexts_that_coding_reads(integer, grid):
    """The same features in the same columns, position by position."""
    values = torch.from_numpy(symbols(2, *grid, 16))
    neighbours = integer.neighbours(values.float())
    linear, magnitude = (
        t.reshape(2, grid[0] + 2, grid[1] + 2, 16)[:, 1:-1, 1:-1].float()
        for t in (neighbours.linear, neighbours.magnitude)
    )
    actual = iter(prior_module._Features.apply(integer.steps, linear, magnitude))
    for _, step, rows, flat, image in iter_steps(integer, neighbours):
        expected = neighbours.gather(step, rows)
        if expected is None:
            continue
        features, places = next(actual), []
        for y, x, height, width in step.grids(*grid):
            place = (y + 2 * torch.arange(height))[:, None] * grid[1] + x + 2 * torch.arange(width)
            places.append(place.reshape(-1))
        order = torch.cat(places) + image.unique()[:, None] * grid[0] * grid[1]
        back = torch.argsort(order.reshape(-1))
        assert torch.equal(order.reshape(-1)[back], flat.sort().values)
        assert torch.equal(features.flatten(0, 1)[back], expected[flat.argsort()].float())
    assert next(actual, None) is None


def test_gradients_of_contexts_and_places():
    steps = schedule((2, 3), 1)
    shape = (2, 3, 4, 5)
    source = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: prior_module._Features.apply(steps, a, b), source)
    counts = [(s, s.position_count(3, 4)) for s in steps]
    actual = [torch.randn(2, n, s.count, dtype=torch.float64, requires_grad=True) for s, n in counts for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *parts: prior_module._Assembled.apply(steps, shape, *parts), actual)


def test_bfloat16_is_for_training_only(trained):
    """Estimates move by what eight bits of significand lose; the integer form is imitated in full."""
    values = torch.from_numpy(symbols(2, 5, 4, 16)).permute(0, 3, 1, 2).float()
    quality = torch.tensor([30.0, 60.0])
    with torch.no_grad():
        exact = [trained(values, quality, quantised) for quantised in (False, True)]
        with torch.autocast("cpu", torch.bfloat16):
            rough, again = trained(values, quality), trained(values, quality, True)
        assert all(t.dtype == torch.float32 for t in rough)
        off = [float((a - b).abs().max()) for a, b in zip(rough, exact[0], strict=True)]
        assert 0 < off[0] < 0.3 and 0 < off[1] < 3
    assert all(torch.equal(a, b) for a, b in zip(again, exact[1], strict=True))
