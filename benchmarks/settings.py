"""What a comparison, an audit and the demonstration are asked for, in code and on the command line.

Each annotated field is an option of the command (see `benchmarks.options.friendly`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import typer

from mbrl_text_env.benchmarks.options import CountOption, SeedOption, TokensOption
from mbrl_text_env.types import Budget

_LEAST_OF_AUDITS = {
    "num_prompts": 4,
    "samples": 4,
    "max_response_tokens": 1,
    "sensitivity_samples": 1,
}


class CompareError(ValueError):
    """A comparison that cannot be run as asked."""


class AuditError(ValueError):
    """An audit that cannot be run as asked."""


@dataclass(frozen=True)
class CompareConfig:
    """What a comparison is; two runs with equal configs give equal rows, times aside.

    `agents` are specs (see `agents.registry.make`); `budget_tokens` may stand among the options of
    one if unequal budgets are allowed. A budget is each agent's for each prompt; None is no cap.
    `batch_prompts` are answered together.
    """

    agents: Annotated[
        tuple[str, ...],
        typer.Option(help="Agents with their options: 'sampling,best-of-n:n=8,lookahead'."),
    ]
    budget_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that an agent may generate for a prompt.")
    ] = None
    max_response_tokens: TokensOption = 256
    seed: SeedOption = 0
    batch_prompts: CountOption = 32
    allow_unequal_budgets: Annotated[bool, typer.Option()] = False
    budget_flops: Annotated[
        float | None, typer.Option(help="FLOPs of all models that it may spend on a prompt.")
    ] = None
    budget_seconds: Annotated[
        float | None, typer.Option(help="Seconds after which it begins nothing new.")
    ] = None

    def __post_init__(self) -> None:
        if not self.agents or len(set(self.agents)) != len(self.agents):
            raise CompareError(f"Expected one or more different agents, got {list(self.agents)}.")
        if self.batch_prompts < 1:
            raise CompareError(f"batch_prompts: expected at least 1, got {self.batch_prompts}.")
        tokens = {spec: budget.tokens for spec, budget in self.budgets.items()}
        if len(set(tokens.values())) > 1 and not self.allow_unequal_budgets:
            raise CompareError(
                f"The budgets differ: {tokens} tokens. A comparison at unequal budgets says "
                "little; make them equal, or allow it (--allow-unequal-budgets)."
            )

    @cached_property
    def budgets(self) -> dict[str, Budget]:
        """Each agent's budget."""
        from mbrl_text_env.agents.registry import parse_spec

        own = {spec: parse_spec(spec)[1].get("budget_tokens") for spec in self.agents}
        return {
            spec: Budget(
                self.budget_tokens if tokens is None else int(tokens),
                self.budget_flops,
                seconds=self.budget_seconds,
            )
            for spec, tokens in own.items()
        }


@dataclass(frozen=True)
class AuditConfig:
    """What an audit is; equal configs measure the same.

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
        for name, least in _LEAST_OF_AUDITS.items():
            if getattr(self, name) < least:
                raise AuditError(
                    f"{name}: expected at least {least}, got {getattr(self, name)}. An audit of "
                    f"fewer measures nothing; raise --{name.replace('_', '-')}."
                )


@dataclass(frozen=True)
class DemoConfig:
    """How large the demonstration is.

    `samples` responses are collected for each train prompt. `pool_samples` responses to each test
    prompt tell what best-of-N would score at any N.
    """

    train_prompts: Annotated[int, typer.Option(min=2)] = 48
    test_prompts: CountOption = 24
    budget_tokens: CountOption = 400
    max_response_tokens: TokensOption = 96
    seed: SeedOption = 0
    samples: int = 4
    pool_samples: int = 32
