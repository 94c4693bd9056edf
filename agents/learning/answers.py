"""Collect an agent's scored answers to many prompts, and select those to fine-tune on."""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mbrl_text_env.agents.base import Agent
from mbrl_text_env.agents.collection import Found, answered
from mbrl_text_env.agents.learning.training import expect
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.records import Record, RecordWriter, scores_of
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.runs import Each, in_order, in_turn
from mbrl_text_env.types import Budget, Ledger, Prompt

HINTED = "+hint"
"""Suffix of the agent's name in records of answers found with a hint."""

CORRECT = 1.0
"""Score of a correct response under verifiable rewards."""

Hint = Callable[[Prompt], Prompt | None]
"""Returns a prompt with a hint and the same id and metadata, or None if there is no hint."""


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
    """Answer prompts with an agent and write every scored answer as a record.

    Args:
        agent: An agent with a reward model. The reward also scores unscored answers.
        prompts: Prompts with distinct ids.
        answers: Number of answers per prompt, with different seeds.
        budget: Budget of each answer.
        batch_prompts: Prompts per batch.
        hint: If no answer to a prompt is correct (`CORRECT`), the prompt is answered the same
            number of times with this hint. These records have the prompt without the hint, an agent
            name that ends in `HINTED`, and no log-probabilities, which depend on the hint.
        ledger: Charged for everything.
        each: Runs the batches (for example `RayWorkers`). On workers, each batch starts with an
            empty prefix cache, so a prefix that prompts share is computed once per batch.

    Returns:
        The error of each skipped prompt, by prompt id. A prompt is skipped with a warning if an
        answer cannot be scored; a `RewardError` is raised if all prompts are skipped.
    """
    starts = range(0, len(prompts), batch_prompts)
    batches = [prompts[start : start + batch_prompts] for start in starts]
    answering = _Answering(agent, answers, budget, seed, hint, is_fresh=each is not in_turn)
    failed: dict[str, str] = {}
    # Learning depends on the order of the records.
    for records, usage, lacking in in_order(each(answering.batch, batches)):
        for name, error in lacking.items():
            warnings.warn(f"Skipped prompt {name!r}: {error}", stacklevel=2)
        failed |= lacking
        if ledger is not None:
            ledger.charge(usage)
        writer.extend(records)
        writer.flush()
    if len(failed) == len(prompts):
        first = next(iter(failed.values()), "there are no prompts")
        raise RewardError(
            f"None of {len(prompts)} prompts could be scored. The first error: {first}"
        )
    return failed


@dataclass(frozen=True)
class _Answering:
    """Answers one batch of `collect_answers`; `is_fresh` clears the cache first."""

    agent: Agent
    answers: int
    budget: Budget | None
    seed: int
    hint: Hint | None
    is_fresh: bool

    def batch(self, prompts: Sequence[Prompt]) -> Found:
        agent, numbers = self.agent, range(self.answers)
        if self.is_fresh:
            agent.language_model.clear_cache()
        asked = [(prompt, prompt, numbers) for prompt in prompts]
        found = answered(agent, asked, self.seed, agent.name, self.budget)
        if self.hint is None:
            return found
        records, usage, failed = found
        scored = zip(records, scores_of(records), strict=True)
        done = {record.prompt_id for record, score in scored if score >= CORRECT}
        wrong = [p for p in prompts if p.id not in done and p.id not in failed]
        hinted = [(p, told, numbers) for p in wrong if (told := self.hint(p)) is not None]
        seed = spawn_seed(self.seed, 1)
        more, further, lacking = answered(agent, hinted, seed, agent.name + HINTED, self.budget)
        return records + more, usage + further, failed | lacking


class FilterError(ValueError):
    """A filter keeps too few responses, or its settings are out of range."""


@dataclass(frozen=True)
class FilterSettings:
    """A chain of filters, applied in the order of the fields; None disables a filter.

    `distinct` drops duplicate responses to a prompt (same tokens). `threshold` is the minimum score
    (`CORRECT` keeps only correct ones). `top_fraction` keeps the best fraction of all responses,
    rounded up. `best_of_prompt` is the maximum per prompt. Ties go to the first response.

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
        check("top_fraction", share is None or 0 < share <= 1, "a number above 0 and up to 1")
        check("best_of_prompt", most is None or most >= 1, "at least 1")


def select(records: Sequence[Record], settings: FilterSettings) -> list[Record]:
    """Return the records that pass the filters, in order; a `FilterError` if fewer than two."""
    first: dict[Any, int] = {}
    for i, record in enumerate(records):
        key = (record.prompt_id, record.response_ids) if settings.distinct else i
        first.setdefault(key, i)
    scores, num_distinct = scores_of(records), len(first)
    # Indices, highest score first.
    kept = sorted(first.values(), key=lambda i: -scores[i])
    if settings.threshold is not None:
        kept = [i for i in kept if scores[i] >= settings.threshold]
    if settings.top_fraction is not None:
        # 0.1 x 30 is slightly above 3 in floating point.
        kept = kept[: math.ceil(settings.top_fraction * len(kept) - 1e-9)]
    if settings.best_of_prompt is not None:
        rows: dict[str, list[int]] = defaultdict(list)
        for i in kept:
            rows[records[i].prompt_id].append(i)
        kept = [i for row in rows.values() for i in row[: settings.best_of_prompt]]
    if len(kept) < 2:
        raise FilterError(
            f"Expected a filter that keeps at least two responses, got {len(kept)} of "
            f"{len(records)} ({num_distinct} of them distinct) with {settings}. "
            f"{scores_described(records)} Lower threshold, raise top_fraction or "
            "best_of_prompt, collect more responses, or use a stronger planner."
        )
    return [records[i] for i in sorted(kept)]


def scores_described(records: Sequence[Record]) -> str:
    """Describe the distribution of scores in a sentence."""
    if not records:
        return "There are no scores."
    scores = scores_of(records)
    low, lower, middle, upper, high = np.quantile(scores, [0, 0.25, 0.5, 0.75, 1])
    [(common, count)] = Counter(scores).most_common(1)
    return (
        f"The {len(scores)} scores of {len({r.prompt_id for r in records})} prompts range from "
        f"{low:.4g} to {high:.4g}, quartiles {lower:.4g}, {middle:.4g} and {upper:.4g}; the most "
        f"frequent is {common:.4g} ({count} times)."
    )
