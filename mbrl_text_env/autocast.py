"""The format in which neural reward models and encoders multiply, for a block of code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

Dtype = Literal["bfloat16", "float16"]
"""Formats that are faster than a model's own, and less exact."""


@contextmanager
def reduced_products(dtype: Dtype | None) -> Iterator[None]:
    """Let torch multiply in a reduced format, on CPU and GPU; None changes nothing.

    Args:
        dtype: The format.
    """
    if dtype is None:
        yield
        return
    import torch

    with ExitStack() as stack:
        for device in _devices():
            stack.enter_context(torch.autocast(device, dtype=getattr(torch, dtype)))
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Let torch multiply in the models' own formats, inside `reduced_products` too.

    For what is kept and used again outside.
    """
    # Without torch there is nothing to multiply, and loading it would take seconds.
    if "torch" not in sys.modules:
        yield
        return
    import torch

    with ExitStack() as stack:
        for device in _devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _devices() -> tuple[str, ...]:
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
