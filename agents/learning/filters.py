"""Which responses a policy is to be tuned on: pure functions from records to records.

All keep the order of the records. Of equal scores the first is taken.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbrl_text_env.records import Record

CORRECT = 1.0
"""Score of a correct response under the verifiable rewards."""


class FilterError(ValueError):
    """A filter that leaves too little to learn from, or whose settings are out of range."""


@dataclass(frozen=True)
class FilterSettings:
    """A chain of filters, applied in the order of the fields; None leaves one out.

    Args:
        distinct: Drop responses to a prompt that are token for token one that came before.
        threshold: Least score, itself included. For correct responses only, `CORRECT`.
        top_fraction: Share of all responses, the highest scores, above 0 and up to 1.
        best_of_prompt: Most responses to each prompt, the highest scores.

    Raises:
        FilterError: A number is out of its range.

    Example:
        >>> FilterSettings(threshold=CORRECT, best_of_prompt=1)
        FilterSettings(distinct=True, threshold=1.0, top_fraction=None, best_of_prompt=1)
    """

    distinct: bool = True
    threshold: float | None = None
    top_fraction: float | None = None
    best_of_prompt: int | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise FilterError(f"threshold: expected a finite score, got {self.threshold!r}.")
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            raise FilterError(
                f"top_fraction: expected a share above 0 and up to 1, got {self.top_fraction!r}."
            )
        if self.best_of_prompt is not None and self.best_of_prompt < 1:
            raise FilterError(f"best_of_prompt: expected at least 1, got {self.best_of_prompt!r}.")


def select(records: Sequence[Record], settings: FilterSettings) -> list[Record]:
    """Apply a chain of filters.

    Raises:
        FilterError: Fewer than two responses are left; the message describes the scores.

    Example:
        >>> kept = select(records, FilterSettings(top_fraction=0.25))  # doctest: +SKIP
    """
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
    return [record for record in records if record.score >= threshold]


def correct_only(records: Sequence[Record]) -> list[Record]:
    """Responses that a verifiable reward calls correct (`CORRECT`)."""
    return at_least(records, CORRECT)


def top_fraction(records: Sequence[Record], fraction: float) -> list[Record]:
    """The share of all responses with the highest scores, rounded up.

    Prompts whose responses score high in general get more of it; `best_of_prompt` treats all
    prompts alike.
    """
    # 0.1 x 30 is a little above 3 in floating point.
    return _highest(records, math.ceil(fraction * len(records) - 1e-9))


def best_of_prompt(records: Sequence[Record], n: int = 1) -> list[Record]:
    """The n responses to each prompt with the highest scores."""
    chosen: set[int] = set()
    for own in _by_prompt(records).values():
        chosen.update(id(record) for record in _highest(own, n))
    return [record for record in records if id(record) in chosen]


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
    scores = np.asarray([record.score for record in records])
    low, lower, middle, upper, high = np.quantile(scores, [0, 0.25, 0.5, 0.75, 1])
    [(common, count)] = Counter(scores.tolist()).most_common(1)
    return (
        f"The {len(scores)} scores of {len(_by_prompt(records))} prompts go from {low:.4g} to "
        f"{high:.4g}, quartiles {lower:.4g}, {middle:.4g} and {upper:.4g}; the most frequent is "
        f"{common:.4g} ({count} times)."
    )


def _highest(records: Sequence[Record], count: int) -> list[Record]:
    order = sorted(range(len(records)), key=lambda i: -records[i].score)
    return [records[i] for i in sorted(order[:count])]


def _by_prompt(records: Sequence[Record]) -> dict[str, list[Record]]:
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record.prompt_id, []).append(record)
    return rows
