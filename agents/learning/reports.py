"""Reports of a loop's iterations, and their JSON form."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.agents.learning.answers import HINTED, scores_described
from mbrl_text_env.agents.values.fitted import cut_prefixes, samples_of
from mbrl_text_env.files import write_text
from mbrl_text_env.fitting.report import correlation, root_mean_square, within_prompt
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.mdp import is_terminal
from mbrl_text_env.records import Record, scores_of
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardModel,
    applies_to,
    isolate_failures,
    score_responses,
)
from mbrl_text_env.types import Chunk, FloatArray, Ledger, TextState
from mbrl_text_env.values import ValueModel, as_value_model, predict_values


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))


def to_json(values: Any) -> dict[str, Any]:
    """Convert a dataclass to JSON values; NaN and infinity become text."""
    text = json.dumps(asdict(values))
    found: dict[str, Any] = json.loads(text, parse_constant=lambda name: str(float(name)))
    return found


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of a policy from the base model, estimated from its samples.

    In nats per response (the mean of log policy - log base) and per token. Standard errors are over
    prompts, or over responses if there is one prompt (NaN for one response).
    """

    per_response: float
    per_response_error: float
    per_token: float
    per_token_error: float
    num_responses: int


def divergence(
    policy: LanguageModel,
    base: LanguageModel,
    states: Sequence[TextState],
    *,
    ledger: Ledger | None = None,
) -> Divergence:
    """Estimate KL(policy || base) from at least one complete response that the policy sampled.

    The estimate is unbiased for samples at temperature 1 without top-k or top-p. It is infinite if
    the base model cannot generate a response. The ratio's error uses a linear approximation.
    """
    if not states or not all(is_terminal(state) for state in states):
        raise ValueError("divergence: expected at least one complete response.")
    starts = [TextState(state.prompt, state.prompt_ids) for state in states]
    chunks = [Chunk(state.response_ids) for state in states]
    ledgers = None if ledger is None else [ledger] * len(states)
    own, other = (model.logprobs(starts, chunks, ledgers=ledgers) for model in (policy, base))
    nats = np.asarray([sum(a) - sum(b) for a, b in zip(own, other, strict=True)])
    if not np.isfinite(nats).all():
        return Divergence(math.inf, math.nan, math.inf, math.nan, len(states))
    tokens = np.asarray([float(len(chunk)) for chunk in chunks])
    ratio = nats.sum() / tokens.sum()
    prompts = [state.prompt.id for state in states]
    return Divergence(
        float(nats.mean()),
        _standard_error(nats - nats.mean(), prompts),
        float(ratio),
        _standard_error((nats - ratio * tokens) / tokens.mean(), prompts),
        len(states),
    )


def _standard_error(deviations: FloatArray, clusters: Sequence[str]) -> float:
    """Standard error of a mean over rows in independent clusters; float64[B] that sum to 0."""
    groups = np.unique(clusters, return_inverse=True)[1]
    if groups.max() == 0:
        groups = np.arange(len(deviations))
    sums = np.bincount(groups, deviations)
    if len(sums) < 2:
        return float("nan")
    correction = len(sums) / (len(sums) - 1)
    return float(np.sqrt(correction * np.square(sums).sum()) / len(deviations))


@dataclass(frozen=True)
class Diversity:
    """Repetition within a set of responses.

    Args:
        distinct: Fraction of distinct word n-grams for n of 1, 2 and 3; NaN if there are none. It
            decreases with the number of responses, so compare sets of equal size.
        duplicates: Fraction of responses with the same words as a response to another prompt.
        repeats: Fraction of responses with the same words as an earlier one to the same prompt.
    """

    distinct: tuple[float, ...]
    duplicates: float
    repeats: float


def diversity(records: Sequence[Record]) -> Diversity:
    """Measure the repetition within at least one response; words are lower-cased.

    Source of distinct-n: Li et al., "A Diversity-Promoting Objective Function for Neural
    Conversation Models", NAACL 2016.
    """
    if not records:
        raise ValueError("diversity: expected at least one record, got none.")
    texts = [tuple(record.response.lower().split()) for record in records]
    askers: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for text, record in zip(texts, records, strict=True):
        askers[text].add(record.prompt_id)
    num_different = sum(len(own) for own in askers.values())
    return Diversity(
        tuple(distinct_share(texts, n) for n in (1, 2, 3)),
        sum(len(askers[text]) > 1 for text in texts) / len(texts),
        1 - num_different / len(texts),
    )


def distinct_share(texts: Sequence[tuple[str, ...]], n: int) -> float:
    """Fraction of word n-grams that are distinct; NaN if there are none."""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


@dataclass(frozen=True)
class ValueCheck:
    """Accuracy of a value model on responses it was not fitted on, over all prefixes.

    `error` is the root mean square of prediction - final score. `within_prompt` is the correlation
    after subtracting the mean of each prompt and prefix length: the part that helps to choose.
    """

    error: float
    correlation: float
    within_prompt: float
    num_prefixes: int


def check_value(
    value_model: ValueModel, records: Sequence[Record], *, ledger: Ledger | None = None
) -> ValueCheck:
    """Compare predictions for prefixes with final scores; needs several responses per prompt.

    Raises a `FitError` if no response has two tokens.
    """
    states, owners = cut_prefixes(records, as_value_model(value_model).lengths)
    charged = None if ledger is None else [ledger] * len(states)
    mean = predict_values(value_model, states, ledgers=charged).mean
    samples = samples_of(mean[:, None], owners, [len(state.response_ids) for state in states])
    return ValueCheck(
        root_mean_square(mean - samples.scores),
        correlation(mean, samples.scores),
        within_prompt(mean, samples),
        len(states),
    )


@dataclass(frozen=True)
class GoldCheck:
    """Scores from a trusted reward that was not optimised, on the responses it can score.

    `proxy` is the mean of the optimised reward, and `gap` is proxy - gold. If both have the same
    scale, an increase of the gap since the base model is the part of the gain that is not real. The
    correlation is over responses.
    """

    proxy: float
    gold: float
    gap: float
    correlation: float
    num_responses: int


def check_gold(
    gold_model: RewardModel, records: Sequence[Record], *, ledger: Ledger | None = None
) -> GoldCheck | None:
    """Score responses with a trusted reward; None if it can score none of them."""
    rows = [record for record in records if applies_to(gold_model, record.prompt())]

    def score(some: Sequence[Record]) -> list[float]:
        charged = None if ledger is None else [ledger] * len(some)
        prompts, texts = [r.prompt() for r in some], [r.response for r in some]
        return list(score_responses(gold_model, prompts, texts, ledgers=charged).total)

    found = isolate_failures(score, rows) if rows else []
    scored = zip(rows, found, strict=True)
    pairs = [(row.score, gold) for row, gold in scored if not isinstance(gold, RewardError)]
    if not pairs:
        return None
    proxy, gold = np.asarray(pairs, dtype=np.float64).T
    means = float(proxy.mean()), float(gold.mean()), float((proxy - gold).mean())
    return GoldCheck(*means, correlation(proxy, gold), len(pairs))


@dataclass(frozen=True)
class Answers:
    """Counts and scores of the answers to the training prompts.

    `num_failed` prompts were skipped because their answers cannot be scored.
    """

    num_records: int
    num_prompts: int
    num_hinted: int
    num_failed: int
    mean: float
    std: float
    lowest: float

    @classmethod
    def of(cls, records: Sequence[Record], num_failed: int = 0) -> Answers:
        """Summarise records."""
        scores, hinted = scores_of(records), [r.agent.endswith(HINTED) for r in records]
        counts = len(records), len({record.prompt_id for record in records}), sum(hinted)
        spread = float(np.mean(scores)), float(np.std(scores)), min(scores)
        return cls(*counts, num_failed, *spread)


@dataclass(frozen=True)
class Validation:
    """Results of sampling on the validation prompts: mean score over prompts and standard error.

    `error` is NaN for one prompt. `tokens` is the mean response length.
    """

    mean: float
    error: float
    tokens: float
    diversity: Diversity
    divergence: Divergence | None = None
    gold: GoldCheck | None = None

    @classmethod
    def of(
        cls, records: Sequence[Record], divergence: Divergence | None, gold: GoldCheck | None
    ) -> Validation:
        """Summarise records."""
        by_prompt: dict[str, list[float]] = defaultdict(list)
        for record, score in zip(records, scores_of(records), strict=True):
            by_prompt[record.prompt_id].append(score)
        means = np.asarray([np.mean(scores) for scores in by_prompt.values()])
        error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else math.nan
        tokens = float(np.mean([len(record.response_ids) for record in records]))
        return cls(float(means.mean()), error, tokens, diversity(records), divergence, gold)


@dataclass(frozen=True)
class ValueReport:
    """The value model of an iteration, and the accuracy of it and the previous one.

    `fitted_at` is the iteration whose policy the model was fitted for; `refitted` is true if it is
    this one. `when_fitted` is the accuracy of the old model on the policy it was fitted for,
    `before` its accuracy on this policy (None for the first), and `after` the accuracy of the model
    in use. `error_ratio` is the error of `before` divided by that of `when_fitted`.
    """

    fitted_at: int
    refitted: bool
    when_fitted: ValueCheck
    before: ValueCheck | None
    after: ValueCheck
    error_ratio: float | None


@dataclass(frozen=True)
class IterationReport:
    """Results of an iteration; 0 is the base model. None marks what an iteration does not have.

    `policy`, `validation` and `value` refer to the policy after the iteration; `collected` refers
    to the previous one. `usage` has `Usage.as_dict()` and `wall_seconds` per stage.
    """

    iteration: int
    policy: str
    validation: Validation
    collected: Answers | None
    selected: Answers | None
    improvement: Mapping[str, Any] | None
    value: ValueReport | None
    usage: Mapping[str, Mapping[str, float]]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values, without the usage, which is in the ledger."""
        values = to_json(self)
        values.pop("usage")
        return values

    def ledger(self) -> dict[str, Any]:
        """The usage of each stage, and the total."""
        rows = list(self.usage.values())
        return {**self.usage, "total": {name: sum(row[name] for row in rows) for name in rows[0]}}


@dataclass(frozen=True)
class LoopResult:
    """One report per iteration, starting with the base model.

    `best` is the iteration with the highest mean validation score (0 is the base model). `stopped`
    is the reason if the loop ended before its last iteration.
    """

    iterations: tuple[IterationReport, ...]
    best: int
    stopped: str | None = None


def doubt_about(one: GoldCheck | None, other: GoldCheck | None) -> str | None:
    """Return a warning if the reward rose since the base model but the gold reward fell."""
    if one is None or other is None or other.proxy <= one.proxy or other.gold >= one.gold:
        return None
    return (
        f"the reward rose from {one.proxy:.4g} to {other.proxy:.4g} since the base model, while "
        f"the gold reward fell from {one.gold:.4g} to {other.gold:.4g} on the same responses: the "
        "policy may be learning the reward model's mistakes."
    )


def without_signal(
    answers: Sequence[Record], own: Sequence[Record], *, is_plain: bool
) -> str | None:
    """Reason why nothing can be learned from the answers, or None.

    Equal answers of a planner can teach something if plain samples of its policy (`own`) differ.
    """
    scores = {record.score for record in answers}
    if len(scores) > 1 or (not is_plain and {record.score for record in own} != scores):
        return None
    return (
        "expected scores that differ, got the same for all answers: there is no signal to learn "
        f"from. {scores_described(answers)} If this is the maximum score, nothing is left "
        f"to learn; otherwise check the reward {answers[0].reward_name!r}, use more answers per "
        "prompt, or use other prompts."
    )


def fallen(means: Sequence[float], patience: int | None) -> str | None:
    """Reason to stop after `patience` means without a new best, or None."""
    best = max(range(len(means)), key=lambda i: means[i])
    since = len(means) - 1 - best
    if patience is None or since < patience:
        return None
    return (
        f"The validation mean has not risen above that of iteration {best} ({means[best]:.4g}) for "
        f"{since} iteration{'s' if since > 1 else ''}; it is {means[-1]:.4g} now."
    )
