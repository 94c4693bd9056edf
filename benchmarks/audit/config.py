"""What an audit is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from mbrl_text_env.benchmarks.options import SeedOption, TokensOption

_LEAST = {
    "num_prompts": 4,
    "samples": 4,
    "max_response_tokens": 1,
    "sensitivity_samples": 1,
}


class AuditError(ValueError):
    """An audit that cannot be run as asked."""


@dataclass(frozen=True)
class AuditConfig:
    """What an audit is, as the command line asks for it; equal configs measure the same.

    Raises:
        AuditError: A number is too small.
    """

    proxy: Annotated[
        str, typer.Option(help="The reward to audit: a name, or a weighted sum of names.")
    ]
    gold: Annotated[str, typer.Option(help="The reward that is trusted.")]
    num_prompts: Annotated[int, typer.Option(help="At least 4; below 8 nothing is decided.")] = 32
    samples: Annotated[
        int, typer.Option(help="Responses to each prompt, at least 4: the largest N.")
    ] = 64
    max_response_tokens: TokensOption = 64
    seed: SeedOption = 0
    sensitivity_samples: Annotated[
        int, typer.Option(help="Responses to each prompt that text changes are tried on.")
    ] = 8

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise AuditError(
                    f"{name}: expected at least {least}, got {getattr(self, name)}. An audit of "
                    f"fewer measures nothing; raise --{name.replace('_', '-')}."
                )
