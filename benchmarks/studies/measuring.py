"""Policies and agents on held-out prompts: what they score, and what an answer takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mbrl_text_env.agents.base import Agent
from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.benchmarks.studies.harness import StudyError
from mbrl_text_env.language_models.base import LanguageModel, clear_cache
from mbrl_text_env.rewards.base import RewardModel, score_responses
from mbrl_text_env.types import Budget, Ledger, Prompt, Usage, initial


@dataclass(frozen=True)
class Spent:
    """Amounts of computation.

    Args:
        reward_calls: Responses or prefixes that the reward model scored.
        tokens: Tokens that a language model sampled.
        flops: Floating-point operations of all models, updates included.
        seconds: Wall time.
    """

    reward_calls: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    @classmethod
    def of(
        cls, usage: Mapping[str, float], *, more_flops: float = 0.0, seconds: float | None = None
    ) -> Spent:
        """What `Usage.as_dict()` says; the wall time of the models' calls where no other is known.

        Example:
            >>> Spent.of(Usage(generated_tokens=5, seconds=1.0).as_dict(), seconds=2.0).seconds
            2.0
        """
        return cls(
            float(usage["reward_calls"]),
            float(usage["generated_tokens"]),
            float(usage["flops"]) + more_flops,
            float(usage["seconds"]) if seconds is None else seconds,
        )

    def __add__(self, other: Spent) -> Spent:
        return Spent(**{name: amount + vars(other)[name] for name, amount in vars(self).items()})

    def __mul__(self, factor: float) -> Spent:
        return Spent(**{name: amount * factor for name, amount in vars(self).items()})


@dataclass(frozen=True)
class Exam:
    """Held-out prompts that every policy and agent answers.

    Args:
        reward_model: Scores the answers.
        prompts: P prompts.
        samples: Answers of a policy to each of them.
        max_response_tokens: Token limit of an answer.
    """

    reward_model: RewardModel
    prompts: Sequence[Prompt]
    samples: int
    max_response_tokens: int

    def sampled(self, policy: LanguageModel, seed: int) -> tuple[tuple[float, ...], Spent]:
        """Plain sampling: the P mean scores, and what a response takes."""
        agent = Sampling(policy, self.reward_model, max_response_tokens=self.max_response_tokens)
        ledgers = [Ledger() for _ in self.prompts]
        states = [initial(prompt, policy) for prompt in self.prompts]
        rows, start = [], time.perf_counter()
        for sample in range(self.samples):
            # Each response takes its whole prompt, as the answers of an agent do.
            clear_cache(policy)
            rows.append(
                run(
                    [
                        partial(agent.complete, state, 1, ledger, seed, first_sample=sample)
                        for state, ledger in zip(states, ledgers, strict=True)
                    ]
                )
            )
        seconds = time.perf_counter() - start
        flat = [completion.state for found in zip(*rows, strict=True) for [completion] in found]
        texts = [policy.decode(state.response_ids) for state in flat]
        scores = score_responses(self.reward_model, [s.prompt for s in flat], texts).total
        usage = sum((ledger.usage for ledger in ledgers), Usage())
        means = scores.reshape(len(self.prompts), self.samples).mean(axis=1)
        whole = Spent.of(usage.as_dict(), seconds=seconds)
        return tuple(means.tolist()), whole * (1 / len(flat))

    def answered(self, agent: Agent, budget: Budget, seed: int) -> tuple[tuple[float, ...], Spent]:
        """An agent's answers: the P scores, and what an answer takes."""
        clear_cache(agent.language_model)
        start = time.perf_counter()
        found = agent.generate(self.prompts, budget, seed=seed)
        seconds = time.perf_counter() - start
        usage = sum((generation.usage for generation in found), Usage())
        scores = []
        for generation in found:
            if generation.completion.score is None:
                raise StudyError(
                    f"{agent.name!r}, prompt {generation.prompt.id!r}: expected a scored answer, "
                    "got one without a score. Take an agent that scores what it answers."
                )
            scores.append(generation.completion.score)
        return tuple(scores), Spent.of(usage.as_dict(), seconds=seconds) * (1 / len(found))
