"""Where models run, and what they take there in memory and time: told before a download."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
import typer

from mbrl_text_env.encoders import Encoder
from mbrl_text_env.language_models.registry import embedded_encoder
from mbrl_text_env.rewards.evaluators._hub import HubReward
from mbrl_text_env.rewards.evaluators.relevance import RelevanceReward


def usable_device(name: str | None) -> torch.device:
    """The device of a name, or the one that models take by default; tried out."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(
            f"--device: expected one that torch can use here, such as 'cpu', got {name!r} "
            f"({reason}). `mbrl-text doctor` lists them."
        ) from error
    return found


def put_on(reward: Any, device: torch.device) -> None:
    """Have the classifiers and encoders of a reward run on a device; before its first use."""
    if isinstance(reward, HubReward):
        reward.device = device
    elif isinstance(reward, RelevanceReward) and reward.encoder is None and device.type != "cpu":
        reward.encoder = cast("Encoder", embedded_encoder(str(device)))
    for part in getattr(reward, "rewards", ()):
        put_on(part, device)


def needs(
    models: Sequence[tuple[str, str, torch.dtype]], tokens: int, device: torch.device
) -> list[str]:
    """A line for each model, and one of the time.

    `models` are names or folders, the class of transformers that loads each, and its number format.
    Each reads or writes about `tokens`. Of a model on the Hub only the config is fetched.
    """
    lines, seconds = [], 0.0
    for name, kind, dtype in models:
        size = parameters(name, kind)
        if size is None:
            lines.append(f"{name}: memory and time cannot be told; its config cannot be had.")
            continue
        # Tuning adds a copy in float32 where the policy is in another format.
        is_copied = kind.endswith("CausalLM") and dtype != torch.float32
        more = f", {size * 4 / 1e9:.1f} GB more while it is tuned" if is_copied else ""
        lines.append(
            f"{name}: {size / 1e6:,.1f} million parameters, {size * dtype.itemsize / 1e9:.1f} GB "
            f"of memory on {device} in {str(dtype).removeprefix('torch.')}{more}."
        )
        seconds += size * tokens * _seconds(device, dtype)
    if seconds:
        lines.append(
            f"At most {tokens:,} tokens are generated and scored: these models take about "
            f"{seconds / 60:.1f} minutes or more on {device}, as fast as it multiplies now."
        )
    return lines


def parameters(name: str, kind: str) -> int | None:
    """How many a model has, from its config alone; None where that cannot be had or read."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            return int(getattr(transformers, kind).from_config(config).num_parameters())
    except (OSError, ValueError, KeyError):
        return None


def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds for a parameter and a token, where 16 responses are generated together."""
    form = torch.float32 if dtype == torch.int8 else dtype
    rows, weights = (torch.ones(n, 2048, dtype=form, device=device) for n in (16, 2048))
    for _ in range(2):
        # The first try warms up; `item` waits for the device.
        began = time.perf_counter()
        for _ in range(8):
            found = rows @ weights.T
        found.sum().item()
        took = time.perf_counter() - began
    return took / (8 * rows.numel() * len(weights))
