"""Scored answers of any agent to many prompts, with a second try for those who need a hint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from mbrl_text_env.agents.base import Agent, Completion
from mbrl_text_env.agents.collection import record_of
from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.learning.filters import CORRECT
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.records import RecordWriter
from mbrl_text_env.rewards.base import RewardError, isolate_failures
from mbrl_text_env.types import Budget, Ledger, Prompt, TextState, Usage, initial

HINTED = "+hint"
"""Ends the agent's name in records of answers that were found with a hint."""

Hint = Callable[[Prompt], Prompt | None]
"""A prompt with a hint, with the same id and metadata; None where there is nothing to tell."""


def collect_answers(
    agent: Agent,
    prompts: Sequence[Prompt],
    writer: RecordWriter,
    *,
    answers: int = 1,
    budget: Budget | None = None,
    batch_prompts: int = 16,
    seed: int = 0,
    hint: Hint | None = None,
    ledger: Ledger | None = None,
) -> dict[str, str]:
    """Answer prompts with an agent, and write every answer with its score.

    A prompt with an answer that cannot be scored is left out with a warning.

    Args:
        agent: With a reward model, which scores the answers of agents that ask for no score too.
        prompts: Of different ids.
        writer: Takes the records.
        answers: To each prompt, of different seeds.
        budget: Caps on each answer.
        batch_prompts: Prompts that are answered together.
        seed: The answers follow from it.
        hint: Where no answer to a prompt is correct (`CORRECT`), it is answered as often again with
            this hint. The record is then of the prompt without the hint, its agent's name ends in
            `HINTED`, and it has no log-probabilities, for these would be of another prompt.
        ledger: Is charged for all.

    Returns:
        The error of each prompt that was left out, by its id.

    Raises:
        RewardError: Not one prompt could be scored.
        BudgetError: The budget allows no complete response.
    """
    ledger = Ledger() if ledger is None else ledger
    collecting = _Collecting(agent, writer, answers, budget, ledger)
    for start in range(0, len(prompts), batch_prompts):
        batch = prompts[start : start + batch_prompts]
        done = collecting.write([(prompt, prompt) for prompt in batch], seed, agent.name)
        if hint is None:
            continue
        told = [(prompt, hint(prompt)) for prompt in batch if prompt.id not in done]
        wrong = [(prompt, asked) for prompt, asked in told if asked is not None]
        if wrong:
            collecting.write(wrong, spawn_seed(seed, 1), agent.name + HINTED)
    failed = collecting.failed
    if len(failed) == len(prompts):
        raise RewardError(
            f"None of {len(prompts)} prompts could be scored. The first error: "
            f"{next(iter(failed.values()), 'there are no prompts')}"
        )
    return failed


Row = list[tuple[Completion, Usage]]
"""The answers to one prompt, and what each took."""


@dataclass
class _Collecting:
    """What the parts of `collect_answers` share."""

    agent: Agent
    writer: RecordWriter
    answers: int
    budget: Budget | None
    ledger: Ledger
    failed: dict[str, str] = field(default_factory=dict)

    def write(self, pairs: Sequence[tuple[Prompt, Prompt]], seed: int, name: str) -> set[str]:
        """Answer each first prompt by asking the second, and write the answers.

        Returns:
            The prompts that have a correct answer, or none at all.
        """
        rows = isolate_failures(lambda some: self._answered(some, seed), pairs)
        done = set()
        for (prompt, _), row in zip(pairs, rows, strict=True):
            if isinstance(row, RewardError):
                warnings.warn(f"Left out prompt {prompt.id!r}: {row}", stacklevel=4)
                self.failed.setdefault(prompt.id, str(row))
                done.add(prompt.id)
                continue
            for completion, usage in row:
                self.ledger.charge(usage)
                record = record_of(completion, self.agent, usage.as_dict(), seed, agent=name)
                self.writer.append(record)
                if record.score >= CORRECT:
                    done.add(prompt.id)
        self.writer.flush()
        return done

    def _answered(self, pairs: Sequence[tuple[Prompt, Prompt]], seed: int) -> list[Row]:
        agent, asked = self.agent, [second for _, second in pairs]
        if isinstance(agent, Sampling):
            rows = self._sampled(asked, seed)
        else:
            seeds = [spawn_seed(seed, 0, k) for k in range(self.answers)]
            rounds = [agent.generate(asked, self.budget, seed=own) for own in seeds]
            rows = [[(g.completion, g.usage) for g in row] for row in zip(*rounds, strict=True)]
        return self._scored(
            [
                [(self._of(completion, first, second), usage) for completion, usage in row]
                for (first, second), row in zip(pairs, rows, strict=True)
            ]
        )

    def _sampled(self, prompts: Sequence[Prompt], seed: int) -> list[Row]:
        """All answers of a prompt in one call, which computes the prompt once."""
        agent = self.agent
        agent.check_budget(prompts, self.budget)
        states = [initial(prompt, agent.language_model) for prompt in prompts]
        ledgers = [Ledger() for _ in states]
        begun = zip(states, ledgers, strict=True)
        rows = run([partial(agent.complete, s, self.answers, own, seed) for s, own in begun])
        return [
            [(answer, _share(ledger.usage, self.answers, k)) for k, answer in enumerate(row)]
            for row, ledger in zip(rows, ledgers, strict=True)
        ]

    def _of(self, completion: Completion, prompt: Prompt, asked: Prompt) -> Completion:
        """The same response as an answer to the prompt that was not told anything."""
        if asked is prompt:
            return completion
        told = completion.state
        ids = self.agent.language_model.encode_prompt(prompt)
        state = TextState(prompt, ids, told.response_ids, told.finish_reason, told.chunk_ends)
        return Completion(state)

    def _scored(self, rows: Sequence[Row]) -> list[Row]:
        """Score what has no score yet; what that takes is added to each answer's usage."""
        plain = [answer for row in rows for answer in row]
        missing = [i for i, (completion, _) in enumerate(plain) if completion.score is None]
        if missing:
            ledgers = [Ledger() for _ in missing]
            alone = zip(missing, ledgers, strict=True)
            found = run([partial(self.agent.scored, [plain[i][0]], own) for i, own in alone])
            for i, [completion], ledger in zip(missing, found, ledgers, strict=True):
                plain[i] = completion, plain[i][1] + ledger.usage
        numbered = iter(plain)
        return [[next(numbered) for _ in row] for row in rows]


def _share(usage: Usage, parts: int, index: int) -> Usage:
    """One of several parts that add up to the whole; counts stay whole numbers."""
    amounts = {}
    for name, amount in vars(usage).items():
        if isinstance(amount, int):
            amounts[name] = amount * (index + 1) // parts - amount * index // parts
        else:
            amounts[name] = amount / parts
    return Usage(**amounts)
