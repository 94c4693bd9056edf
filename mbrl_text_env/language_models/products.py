"""Matrix products with fixed weights, in the number formats that a processor is fast at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch.nn import functional

# Rotations of this many neighbouring inputs; a power of 2.
_ROTATION = 64


class Product(ABC):
    """x -> x W' + b for several weight matrices that share their input."""

    @abstractmethod
    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
        """float32[rows, inputs] -> one float32[rows, outputs] a matrix.

        Args:
            x: The inputs.
            out: Where a product of one matrix may be written. Fresh memory costs more than the
                arithmetic where the result is as large as the logits of a batch.
        """


class FloatProduct(Product):
    """The layers' own weights, used where they lie: training them is seen at once.

    Weights of a reduced format multiply inputs rounded to it; the result has the inputs' format.

    Args:
        layers: Linear layers with the same number of inputs.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        self._layers = list(layers)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> list[torch.Tensor]:
        """One product a layer."""
        first = self._layers[0]
        if x.dtype != first.weight.dtype:
            rounded = x.to(first.weight.dtype)
            return [
                functional.linear(rounded, layer.weight, layer.bias).to(x.dtype)
                for layer in self._layers
            ]
        if out is not None and first.bias is None:
            return [torch.mm(x, first.weight.t(), out=out)]
        return [functional.linear(x, layer.weight, layer.bias) for layer in self._layers]


class Int8Product(Product):
    """int8 products with one scale a weight row and one an input row; sums are exact.

    Inputs of language models have a few channels that are far larger than the rest, which would
    take the whole range. Both sides are therefore rotated first by Hadamard matrices of up to 64
    neighbouring channels, which changes no product and spreads those channels out.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024).
    Deviations: 8 bits; the inputs of every product are rotated as they come, in small blocks, so
    that neither the network nor its norms have to be rewritten and nothing is calibrated.

    Args:
        layers: Linear layers with the same number of inputs; their weights are copied.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        biases = [layer.bias.detach().float() for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        weight = torch.cat([layer.weight.detach().float() for layer in layers])
        self._rotation = _hadamard(weight.shape[-1], weight.device)
        weight = self._rotated(weight)
        scales = _scales(weight)
        # The kernel is fastest with the inputs along the rows.
        self._weight = (weight / scales).round_().to(torch.int8).t()
        self._scales = scales.t().contiguous()
        self._sums: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
        """One product a layer."""
        x = self._rotated(x)
        scales = _scales(x)
        rounded = x.div_(scales).round_().to(torch.int8)
        if out is None:
            y = torch._int_mm(rounded, self._weight).float()
        else:
            y = out.copy_(torch._int_mm(rounded, self._weight, out=self._buffer(out)))
        y.mul_(scales).mul_(self._scales)
        if self._bias is not None:
            y += self._bias
        return y.split(self._sizes, -1) if len(self._sizes) > 1 else (y,)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        size = self._rotation.shape[-1]
        return (x.reshape(-1, size) @ self._rotation).view(x.shape)

    def _buffer(self, out: torch.Tensor) -> torch.Tensor:
        if self._sums is None or len(self._sums) < len(out):
            self._sums = torch.empty(out.shape, dtype=torch.int32, device=out.device)
        return self._sums[: len(out)]


def make_product(layers: Sequence[torch.nn.Linear], dtype: torch.dtype) -> Product:
    """The product of `layers` in a format.

    Args:
        layers: Linear layers with the same number of inputs.
        dtype: That of the layers, or int8.
    """
    return Int8Product(layers) if dtype == torch.int8 else FloatProduct(layers)


def _scales(rows: torch.Tensor) -> torch.Tensor:
    """float32[rows, 1]: what one step of 8 bits is worth in each row."""
    return rows.abs().amax(-1, keepdim=True).clamp_(min=1e-30).mul_(1 / 127)


def _hadamard(inputs: int, device: torch.device) -> torch.Tensor:
    """The largest orthogonal Hadamard matrix of up to `_ROTATION` that divides the inputs."""
    size = 1
    while size < _ROTATION and inputs % (2 * size) == 0:
        size *= 2
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
