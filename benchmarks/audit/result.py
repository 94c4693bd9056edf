"""What an audit is asked for, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

from mbrl_text_env.benchmarks.audit.association import Association
from mbrl_text_env.benchmarks.audit.curves import Curves
from mbrl_text_env.benchmarks.audit.pool import AuditError
from mbrl_text_env.benchmarks.audit.sensitivity import Sensitivity
from mbrl_text_env.benchmarks.audit.verdict import Verdict

_LEAST_PROMPTS = 4
_LEAST_SAMPLES = 4


@dataclass(frozen=True)
class AuditConfig:
    """What an audit is; two runs with equal configs measure the same.

    Args:
        proxy: The reward to choose by, as the command line names it.
        gold: The reward that is trusted; the proxy itself is allowed.
        num_prompts: Prompts, at least 4; below 8 nothing is decided.
        samples: Responses to each prompt, at least 4: the largest N.
        max_response_tokens: Token limit of a response.
        seed: Of the prompts' choice, the sampling and the bootstrap.
        sensitivity_samples: Responses to each prompt that the interventions are tried on.

    Raises:
        AuditError: A number is too small.
    """

    proxy: str
    gold: str
    num_prompts: int = 32
    samples: int = 64
    max_response_tokens: int = 64
    seed: int = 0
    sensitivity_samples: int = 8

    def __post_init__(self) -> None:
        least = {
            "num_prompts": _LEAST_PROMPTS,
            "samples": _LEAST_SAMPLES,
            "max_response_tokens": 1,
            "sensitivity_samples": 1,
        }
        for name, number in least.items():
            if getattr(self, name) < number:
                raise AuditError(
                    f"{name}: expected at least {number}, got {getattr(self, name)}. An audit of "
                    f"fewer measures nothing; raise --{name.replace('_', '-')}."
                )


@dataclass(frozen=True)
class AuditResult:
    """What an audit found: the content of `audit.json` after date, command and config."""

    config: AuditConfig
    prompts: int
    left_out: int
    curves: Curves
    association: Association | None
    sensitivity: Sensitivity
    verdict: Verdict
