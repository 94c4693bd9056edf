"""Products of fixed weights: the layers' own, and those of 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.language_models.networks import FloatProduct, Int8Product, make_product


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def make_layers(
    inputs: int, outputs: Sequence[int] = (40, 24), bias: bool = True, seed: int = 0
) -> list[torch.nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.nn.Linear(inputs, size, bias=bias) for size in outputs]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data.normal_(generator=generator)
    return layers


def make_inputs(rows: int, inputs: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def with_outliers(x: torch.Tensor, factor: float = 50) -> torch.Tensor:
    """A few channels far larger than the rest, as in language models."""
    x = x.clone()
    x[:, [3, 70, 101]] *= factor
    return x


def error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Root mean square of the difference, as a share of the root mean square."""
    found, exact = torch.cat(tuple(found), -1).double(), torch.cat(tuple(exact), -1).double()
    return float((found - exact).norm() / exact.norm())


def plain_int8(x: torch.Tensor, layers: Sequence[torch.nn.Linear]) -> list[torch.Tensor]:
    """Rows of 8 bits on both sides, without rotation, summed exactly."""

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        scales = rows.abs().amax(-1, keepdim=True) / 127
        return (rows / scales).round().double() * scales

    return [(rounded(x) @ rounded(layer.weight).t() + layer.bias).float() for layer in layers]


class TestFloat:
    @pytest.mark.parametrize("bias", [True, False])
    def test_it_is_the_layers_own_output(self, bias):
        layers, x = make_layers(48, bias=bias), make_inputs(7, 48)
        found = FloatProduct(layers)(x)
        assert len(found) == 2
        for layer, y in zip(layers, found, strict=True):
            assert torch.equal(y, layer(x))

    @pytest.mark.parametrize("bias", [True, False])
    def test_the_result_may_be_written_into_memory_at_hand(self, bias):
        layers, x = make_layers(48, [30], bias=bias), make_inputs(7, 48)
        out = torch.full((7, 30), torch.nan)
        [y] = FloatProduct(layers)(x, out)
        torch.testing.assert_close(y, layers[0](x))
        assert bias or y.data_ptr() == out.data_ptr()

    def test_trained_weights_are_seen_at_once(self):
        layers, x = make_layers(48), make_inputs(7, 48)
        product = FloatProduct(layers)
        before = product(x)[1].clone()
        layers[1].weight.mul_(2)
        layers[1].bias.mul_(2)
        torch.testing.assert_close(product(x)[1], 2 * before)
        layers[1].weight = torch.nn.Parameter(torch.zeros(24, 48))
        assert torch.equal(product(x)[1], layers[1].bias.expand(7, -1))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_weights_of_a_reduced_format(self, dtype):
        layers, x = make_layers(48), make_inputs(7, 48)
        exact = [layer(x) for layer in layers]
        layers = [layer.to(dtype) for layer in layers]
        found = FloatProduct(layers)(x)
        assert {y.dtype for y in found} == {torch.float32}
        for layer, y in zip(layers, found, strict=True):
            assert torch.equal(y, layer(x.to(dtype)).float())
        assert error(found, exact) < 0.01
        out = torch.empty(7, 40)
        torch.testing.assert_close(FloatProduct(layers[:1])(x, out)[0], found[0])


SIZES = (64, 128, 576, 96, 100, 33, 3)
"""Inputs: with rotations of 64 channels, of 32, of 4, and with none."""


class TestInt8:
    @pytest.mark.parametrize("inputs", SIZES)
    @pytest.mark.parametrize("bias", [True, False])
    def test_it_is_near_the_float_product(self, inputs, bias):
        layers, x = make_layers(inputs, bias=bias), make_inputs(50, inputs)
        found, exact = Int8Product(layers)(x), FloatProduct(layers)(x)
        assert [y.shape for y in found] == [(50, 40), (50, 24)]
        assert {y.dtype for y in found} == {torch.float32}
        # Both sides are rounded to 127 steps of the largest of their row: 1 % each at most here.
        assert error(found, exact) < 0.015

    def test_one_layer_of_several_is_as_alone(self):
        layers, x = make_layers(128, [40, 8, 24, 16]), make_inputs(9, 128)
        together = Int8Product(layers)(x)
        for layer, y in zip(layers, together, strict=True):
            assert torch.equal(Int8Product([layer])(x)[0], y)

    def test_outlier_channels_do_not_take_the_whole_range(self):
        layers, x = make_layers(576), with_outliers(make_inputs(200, 576))
        # A network's weights for such channels are small.
        for layer in layers:
            layer.weight[:, [3, 70, 101]] /= 50
        exact = [layer(x) for layer in layers]
        rotated, plain = error(Int8Product(layers)(x), exact), error(plain_int8(x, layers), exact)
        assert rotated < 0.06
        assert rotated < plain / 3

    def test_without_outliers_rotation_costs_nothing(self):
        layers, x = make_layers(128), make_inputs(200, 128)
        exact = [layer(x) for layer in layers]
        rotated, plain = error(Int8Product(layers)(x), exact), error(plain_int8(x, layers), exact)
        assert rotated < 1.1 * plain

    @settings(max_examples=40)
    @given(
        inputs=st.sampled_from(SIZES),
        rows=st.integers(1, 12),
        scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
        seed=st.integers(0, 1000),
    )
    def test_any_scale_of_the_inputs(self, inputs, rows, scale, seed):
        layers = make_layers(inputs, bias=False, seed=seed)
        x = scale * make_inputs(rows, inputs, seed)
        exact = [layer(x) for layer in layers]
        assert error(Int8Product(layers)(x), exact) < 0.03

    def test_rows_of_zeros(self):
        layers, x = make_layers(64), make_inputs(3, 64)
        x[1] = 0
        layers[0].weight[5] = 0
        found = Int8Product(layers)(x)
        assert torch.equal(found[0][1], layers[0].bias)
        torch.testing.assert_close(found[0][:, 5], layers[0].bias[5].expand(3))

    def test_inputs_are_left_as_they_are(self):
        for inputs in SIZES:
            x = make_inputs(5, inputs)
            before = x.clone()
            Int8Product(make_layers(inputs))(x)
            assert torch.equal(x, before)

    def test_weights_are_copies(self):
        layers, x = make_layers(64), make_inputs(3, 64)
        product = Int8Product(layers)
        before = [y.clone() for y in product(x)]
        for layer in layers:
            layer.weight.zero_()
            layer.bias.zero_()
        for y, old in zip(product(x), before, strict=True):
            assert torch.equal(y, old)

    def test_weights_of_a_reduced_format(self):
        layers, x = make_layers(64), make_inputs(20, 64)
        exact = [layer(x) for layer in layers]
        product = Int8Product([layer.to(torch.bfloat16) for layer in layers])
        assert error(product(x), exact) < 0.015

    @pytest.mark.parametrize("bias", [True, False])
    def test_the_result_may_be_written_into_memory_at_hand(self, bias):
        layers = make_layers(128, [300], bias=bias)
        product = Int8Product(layers)
        for rows in (5, 2, 9, 5):
            x = make_inputs(rows, 128, seed=rows)
            [fresh] = Int8Product(layers)(x)
            out = torch.full((rows, 300), torch.nan)
            [y] = product(x, out)
            assert y.data_ptr() == out.data_ptr()
            assert torch.equal(y, fresh)


@pytest.mark.parametrize("kind", [FloatProduct, Int8Product])
@settings(max_examples=30)
@given(
    inputs=st.sampled_from(SIZES),
    rows=st.integers(2, 20),
    others=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    data=st.data(),
)
def test_a_row_is_independent_of_the_rows_beside_it(kind, inputs, rows, others, data):
    product = kind(make_layers(inputs))
    x = make_inputs(rows, inputs)
    row = data.draw(st.integers(0, rows - 1))
    changed = others * make_inputs(rows, inputs, seed=2)
    changed[row] = x[row]
    for before, after in zip(product(x), product(changed), strict=True):
        assert torch.equal(before[row], after[row])


@pytest.mark.parametrize("inputs", SIZES)
def test_int8_products_of_fewer_rows_are_nearly_the_same(inputs):
    """Sums of 8-bit numbers are exact; only where a rotated input is rounded may differ."""
    product, x = Int8Product(make_layers(inputs)), make_inputs(9, inputs)
    whole = product(x)
    for row in range(9):
        alone = product(x[row : row + 1])
        assert error([y[0] for y in alone], [y[row] for y in whole]) < 0.01


def test_the_product_of_a_format():
    layers = make_layers(64)
    assert isinstance(make_product(layers, torch.int8), Int8Product)
    for dtype in (torch.float32, torch.bfloat16):
        assert isinstance(make_product(layers, dtype), FloatProduct)
