"""Scored answers of any agent to many prompts, and which of them a policy is to be tuned on."""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mbrl_text_env.agents.base import Agent, Completion
from mbrl_text_env.agents.collection import record_of
from mbrl_text_env.agents.driver import run
from mbrl_text_env.agents.learning.training import expect
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import Record, RecordWriter, scores_of
from mbrl_text_env.rewards.base import RewardError, isolate_failures
from mbrl_text_env.runs import Each, in_order, in_turn
from mbrl_text_env.types import Budget, Ledger, Prompt, Usage

HINTED = "+hint"
"""Ends the agent's name in records of answers that were found with a hint."""

CORRECT = 1.0
"""Score of a correct response under the verifiable rewards."""

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
    each: Each = in_turn,
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
        hint: Where no answer to a prompt is correct (`CORRECT`), it is answered as often again with
            this hint. The record is then of the prompt without the hint, its agent's name ends in
            `HINTED`, and it has no log-probabilities, for these would be of another prompt.
        ledger: Is charged for all.
        each: Where the batches are answered (`RayWorkers`). Elsewhere than here each begins with an
            empty prefix cache, so that what prompts share is computed once a batch.

    Returns:
        The error of each prompt that was left out, by its id. If that is all, a `RewardError`.
    """
    starts = range(0, len(prompts), batch_prompts)
    batches = [prompts[start : start + batch_prompts] for start in starts]
    answering = _Answering(agent, answers, budget, seed, hint, is_fresh=each is not in_turn)
    failed: dict[str, str] = {}
    # What is learned of the records depends on their order.
    for found, lacking in in_order(each(answering.batch, batches)):
        for name, error in lacking.items():
            warnings.warn(f"Left out prompt {name!r}: {error}", stacklevel=2)
        failed |= lacking
        for record, usage in found:
            if ledger is not None:
                ledger.charge(usage)
            writer.append(record)
        writer.flush()
    if len(failed) == len(prompts):
        raise RewardError(
            f"None of {len(prompts)} prompts could be scored. The first error: "
            f"{next(iter(failed.values()), 'there are no prompts')}"
        )
    return failed


Row = list[tuple[Completion, Usage]]
"""The answers to one prompt, and what each took."""
Written = list[tuple[Record, Usage]]


@dataclass(frozen=True)
class _Answering:
    """How `collect_answers` answers a batch; `is_fresh`: as if it were the first."""

    agent: Agent
    answers: int
    budget: Budget | None
    seed: int
    hint: Hint | None
    is_fresh: bool

    def batch(self, prompts: Sequence[Prompt]) -> tuple[Written, dict[str, str]]:
        """The records of a batch, and the errors of its prompts that are left out, by id."""
        if self.is_fresh:
            self.agent.language_model.clear_cache()
        name = self.agent.name
        found, failed = self._records([(prompt, prompt) for prompt in prompts], self.seed, name)
        if self.hint is None:
            return found, failed
        done = {record.prompt_id for record, _ in found if scores_of([record])[0] >= CORRECT}
        told = [(p, self.hint(p)) for p in prompts if p.id not in done and p.id not in failed]
        wrong = [(prompt, asked) for prompt, asked in told if asked is not None]
        if not wrong:
            return found, failed
        more, lacking = self._records(wrong, spawn_seed(self.seed, 1), name + HINTED)
        return found + more, failed | lacking

    def _records(
        self, pairs: Sequence[tuple[Prompt, Prompt]], seed: int, name: str
    ) -> tuple[Written, dict[str, str]]:
        """Answer each first prompt by asking the second."""
        rows = isolate_failures(lambda some: self._answered(some, seed), pairs)
        found: Written = []
        failed = {}
        for (prompt, _), row in zip(pairs, rows, strict=True):
            if isinstance(row, RewardError):
                failed[prompt.id] = str(row)
                continue
            for completion, usage in row:
                record = record_of(completion, self.agent, usage.as_dict(), seed, agent=name)
                found.append((record, usage))
        return found, failed

    def _answered(self, pairs: Sequence[tuple[Prompt, Prompt]], seed: int) -> list[Row]:
        agent, asked = self.agent, [second for _, second in pairs]
        if isinstance(agent, Sampling):
            rows = self._sampled(asked, seed)
        else:
            seeds = [spawn_seed(seed, 0, k) for k in range(self.answers)]
            rounds = [agent.generate(asked, self.budget, seed=own) for own in seeds]
            rows = [[(g.completion, g.usage) for g in row] for row in zip(*rounds, strict=True)]
        for (prompt, told), row in zip(pairs, rows, strict=True):
            if told is not prompt:
                # The same response as an answer to the prompt that was not told anything.
                ids = agent.language_model.encode_prompt(prompt)
                own: dict[str, Any] = {"prompt_ids": ids, "logprob": None}
                row[:] = [
                    (Completion(replace(found.state, prompt=prompt, **own)), usage)
                    for found, usage in row
                ]
        self._score(rows)
        return rows

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

    def _score(self, rows: Sequence[Row]) -> None:
        """Score what has no score yet; what that takes is added to each answer's usage."""
        places = [(row, k) for row in rows for k, (found, _) in enumerate(row)]
        places = [(row, k) for row, k in places if row[k][0].score is None]
        if not places:
            return
        ledgers = [Ledger() for _ in places]
        alone = zip(places, ledgers, strict=True)
        scored = run([partial(self.agent.scored, [row[k][0]], own) for (row, k), own in alone])
        for (row, k), [completion], ledger in zip(places, scored, ledgers, strict=True):
            row[k] = completion, row[k][1] + ledger.usage


def _share(usage: Usage, parts: int, index: int) -> Usage:
    """One of several parts that add up to the whole; counts stay whole numbers."""
    amounts = {}
    for name, amount in vars(usage).items():
        if isinstance(amount, int):
            amounts[name] = amount * (index + 1) // parts - amount * index // parts
        else:
            amounts[name] = amount / parts
    return Usage(**amounts)


# Filters: functions from records to records that keep their order. Of equal scores the first is
# taken.


class FilterError(ValueError):
    """A filter that leaves too little to learn from, or whose settings are out of range."""


@dataclass(frozen=True)
class FilterSettings:
    """A chain of filters, applied in the order of the fields; None leaves one out.

    Responses to a prompt with the same tokens count once (`distinct`); then come the least score
    (`CORRECT` for correct ones only), the share of all responses with the highest scores, and the
    most responses to each prompt.

    Example:
        >>> FilterSettings(threshold=CORRECT, best_of_prompt=1)
        FilterSettings(distinct=True, threshold=1.0, top_fraction=None, best_of_prompt=1)
    """

    distinct: bool = True
    threshold: float | None = None
    top_fraction: float | None = None
    best_of_prompt: int | None = None

    def __post_init__(self) -> None:
        check = partial(expect, self, error=FilterError)
        least, share, most = self.threshold, self.top_fraction, self.best_of_prompt
        check("threshold", least is None or math.isfinite(least), "a finite score")
        check("top_fraction", share is None or 0 < share <= 1, "a share above 0 and up to 1")
        check("best_of_prompt", most is None or most >= 1, "at least 1")


def select(records: Sequence[Record], settings: FilterSettings) -> list[Record]:
    """Apply a chain of filters; fewer than two responses that are left are a `FilterError`."""
    kept = list(records)
    if settings.distinct:
        kept = without_duplicates(kept)
    num_distinct = len(kept)
    if settings.threshold is not None:
        kept = at_least(kept, settings.threshold)
    if settings.top_fraction is not None:
        kept = top_fraction(kept, settings.top_fraction)
    if settings.best_of_prompt is not None:
        kept = best_of_prompt(kept, settings.best_of_prompt)
    if len(kept) < 2:
        raise FilterError(
            f"Expected a filter that leaves at least two responses, got {len(kept)} of "
            f"{len(records)} ({num_distinct} of them different) with {settings}. "
            f"{scores_described(records)} Lower the threshold, raise top_fraction or "
            "best_of_prompt, or collect more responses, or with a stronger planner."
        )
    return kept


def at_least(records: Sequence[Record], threshold: float) -> list[Record]:
    """Responses with a score of `threshold` or more."""
    scores = scores_of(records)
    return [record for record, score in zip(records, scores, strict=True) if score >= threshold]


def correct_only(records: Sequence[Record]) -> list[Record]:
    """Responses that a verifiable reward calls correct (`CORRECT`)."""
    return at_least(records, CORRECT)


def top_fraction(records: Sequence[Record], fraction: float) -> list[Record]:
    """The share of all responses with the highest scores, rounded up.

    Prompts whose responses score high in general get more of it; `best_of_prompt` treats all
    prompts alike.
    """
    # 0.1 x 30 is a little above 3 in floating point.
    count = math.ceil(fraction * len(records) - 1e-9)
    return [records[i] for i in sorted(_ranked(records)[:count])]


def best_of_prompt(records: Sequence[Record], n: int = 1) -> list[Record]:
    """The n responses to each prompt with the highest scores."""
    rows: dict[str, list[int]] = defaultdict(list)
    for i in _ranked(records):
        rows[records[i].prompt_id].append(i)
    return [records[i] for i in sorted(i for row in rows.values() for i in row[:n])]


def without_duplicates(records: Sequence[Record]) -> list[Record]:
    """The first of each prompt's responses with the same tokens."""
    first: dict[tuple[str, tuple[int, ...]], Record] = {}
    for record in records:
        first.setdefault((record.prompt_id, record.response_ids), record)
    return list(first.values())


def scores_described(records: Sequence[Record]) -> str:
    """The distribution of scores, in a sentence."""
    if not records:
        return "There are no scores."
    scores = scores_of(records)
    low, lower, middle, upper, high = np.quantile(scores, [0, 0.25, 0.5, 0.75, 1])
    [(common, count)] = Counter(scores).most_common(1)
    return (
        f"The {len(scores)} scores of {len({r.prompt_id for r in records})} prompts go from "
        f"{low:.4g} to {high:.4g}, quartiles {lower:.4g}, {middle:.4g} and {upper:.4g}; the most "
        f"frequent is {common:.4g} ({count} times)."
    )


def _ranked(records: Sequence[Record]) -> list[int]:
    """Places of the records, the highest score first."""
    scores = scores_of(records)
    return sorted(range(len(records)), key=lambda i: -scores[i])
