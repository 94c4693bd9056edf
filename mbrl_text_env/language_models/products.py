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
    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """float32[rows, inputs] -> one float32[rows, outputs] a matrix."""


class FloatProduct(Product):
    """The layers' own weights, used where they lie: training them is seen at once.

    Args:
        layers: Linear layers with the same number of inputs.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        self.layers = list(layers)

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One product a layer."""
        return [functional.linear(x, layer.weight, layer.bias) for layer in self.layers]


class _Packed(Product):
    """The matrices in one, as a copy in another format."""

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        biases = [layer.bias for layer in layers]
        self._bias = (
            torch.cat([bias.detach() for bias in biases]) if biases[0] is not None else None
        )

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        y = self._multiply(x)
        if self._bias is not None:
            y += self._bias
        return y.split(self._sizes, -1) if len(self._sizes) > 1 else (y,)

    @abstractmethod
    def _multiply(self, x: torch.Tensor) -> torch.Tensor: ...


class HalfProduct(_Packed):
    """bfloat16 or float16 products of a network that is float32 otherwise.

    Args:
        layers: Linear layers with the same number of inputs.
        dtype: Of the product.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear], dtype: torch.dtype) -> None:
        super().__init__(layers)
        self._weight = torch.cat([layer.weight.detach() for layer in layers]).to(dtype)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x.to(self._weight.dtype), self._weight).float()


class Int8Product(_Packed):
    """int8 products with one scale a weight row and one an input row; sums are exact.

    Inputs of language models have a few channels that are far larger than the rest, which would
    take the whole range. Both sides are therefore rotated first by Hadamard matrices of up to 64
    neighbouring channels, which changes no product and spreads those channels out.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024).
    Deviations: 8 bits; the inputs of every product are rotated as they come, in small blocks, so
    that neither the network nor its norms have to be rewritten and nothing is calibrated.

    Args:
        layers: Linear layers with the same number of inputs.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        super().__init__(layers)
        weight = torch.cat([layer.weight.detach().float() for layer in layers])
        self._rotation = _hadamard(weight.shape[-1], weight.device)
        weight = self._rotated(weight)
        self._scales = _scales(weight)
        weight = (weight / self._scales).round_().to(torch.int8)
        # The kernel is fastest with the inputs along the rows.
        self._weight, self._scales = weight.t(), self._scales.t().contiguous()

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        x = self._rotated(x)
        scales = _scales(x)
        whole = torch._int_mm(x.div_(scales).round_().to(torch.int8), self._weight)
        return whole.float().mul_(scales).mul_(self._scales)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        size = self._rotation.shape[-1]
        return (x.reshape(-1, size) @ self._rotation).view(x.shape)


def make_product(layers: Sequence[torch.nn.Linear], dtype: torch.dtype) -> Product:
    """The product of `layers` in a format.

    Args:
        layers: Linear layers with the same number of inputs.
        dtype: That of the layers, or bfloat16, float16 or int8 for float32 layers.
    """
    if dtype == layers[0].weight.dtype:
        return FloatProduct(layers)
    return Int8Product(layers) if dtype == torch.int8 else HalfProduct(layers, dtype)


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
