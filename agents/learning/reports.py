"""What is known of each iteration of a loop, and how figures are written as JSON and read."""

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
    """Write a file of JSON as a whole."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))


def to_json(values: Any) -> dict[str, Any]:
    """A dataclass as JSON values; text for the numbers that JSON does not have."""
    text = json.dumps(asdict(values))
    found: dict[str, Any] = json.loads(text, parse_constant=lambda name: str(float(name)))
    return found


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of a policy from the base model, estimated from its samples.

    In nats a response (the mean of log policy - log base) and a token, with standard errors over
    prompts (over responses where there is one prompt; NaN for one response).
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
    """Estimate KL(policy || base) from complete responses, at least one, that the policy sampled.

    It is unbiased if they were drawn at temperature 1, without top-k or top-p, and infinite where
    the base could not have written one. The error of the ratio is by linearisation.
    """
    if not states or not all(is_terminal(state) for state in states):
        raise ValueError("divergence: expected complete responses, at least one.")
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
    """Of a mean over rows whose clusters are independent; float64[B], their sum is 0."""
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
    """How much a set of responses repeats itself.

    Args:
        distinct: Share of different n-grams of words among all, for n of 1, 2 and 3; NaN where
            there is none. It falls with the number of responses: compare sets of one size.
        duplicates: Share of responses with the same words as a response to another prompt.
        repeats: Share of responses with the same words as an earlier one to the same prompt.
    """

    distinct: tuple[float, ...]
    duplicates: float
    repeats: float


def diversity(records: Sequence[Record]) -> Diversity:
    """Count what responses, at least one, have in common; words are in lower case.

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
    """Share of different n-grams of words among all; NaN where there is none."""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


@dataclass(frozen=True)
class ValueCheck:
    """How well a value model predicts responses that it was not fitted on, over all prefixes.

    `error` is the root mean square of prediction - final score; `within_prompt` the correlation
    without the mean of each prompt's prefixes of one length: what a choice can use.
    """

    error: float
    correlation: float
    within_prompt: float
    num_prefixes: int


def check_value(
    value_model: ValueModel, records: Sequence[Record], *, ledger: Ledger | None = None
) -> ValueCheck:
    """Compare a value model's predictions for prefixes with the final scores, several to a prompt.

    If no response has two tokens, that is a `FitError`.
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
    """What a trusted reward that was not optimised says of the responses that it could score.

    `proxy` is the optimised reward's mean, `gap` proxy - gold: its change since the base model is
    the part of a rise that is not real, where both have one scale. The correlation is over
    responses.
    """

    proxy: float
    gold: float
    gap: float
    correlation: float
    num_responses: int


def check_gold(
    gold_model: RewardModel, records: Sequence[Record], *, ledger: Ledger | None = None
) -> GoldCheck | None:
    """Score responses with a trusted reward, those that it can; None where there are none."""
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
    """Answers to the train prompts: their counts and scores.

    `num_failed` prompts were left out, as their answers cannot be scored.
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
        """Sum up records."""
        scores, hinted = scores_of(records), [r.agent.endswith(HINTED) for r in records]
        counts = len(records), len({record.prompt_id for record in records}), sum(hinted)
        spread = float(np.mean(scores)), float(np.std(scores)), min(scores)
        return cls(*counts, num_failed, *spread)


@dataclass(frozen=True)
class Validation:
    """Plain sampling on the validation prompts: mean score over prompts with its standard error.

    `error` is NaN for one prompt; `tokens` is the mean length of a response.
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
        """Sum up records."""
        by_prompt: dict[str, list[float]] = defaultdict(list)
        for record, score in zip(records, scores_of(records), strict=True):
            by_prompt[record.prompt_id].append(score)
        means = np.asarray([np.mean(scores) for scores in by_prompt.values()])
        error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else math.nan
        tokens = float(np.mean([len(record.response_ids) for record in records]))
        return cls(float(means.mean()), error, tokens, diversity(records), divergence, gold)


@dataclass(frozen=True)
class ValueReport:
    """The value model of an iteration, and how well it and the one before predict.

    `fitted_at` is the iteration for whose policy it was fitted; `refitted` says whether that is
    this one. `when_fitted` is how well the old model did on the policy it was fitted for, `before`
    how well it does on this one (None for the first), `after` how well the model in use does.
    `error_ratio` is `before` by `when_fitted`.
    """

    fitted_at: int
    refitted: bool
    when_fitted: ValueCheck
    before: ValueCheck | None
    after: ValueCheck
    error_ratio: float | None


@dataclass(frozen=True)
class IterationReport:
    """An iteration's figures: 0 is the base model, and None what an iteration lacks.

    `policy` is the one at its end, which `validation` and `value` are of; `collected` is of the one
    before. `usage` is what each stage took: `Usage.as_dict()`, and `wall_seconds`.
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
        """JSON values, without the usage, which the ledger has."""
        values = to_json(self)
        values.pop("usage")
        return values

    def ledger(self) -> dict[str, Any]:
        """What each stage took, and the total."""
        rows = list(self.usage.values())
        return {**self.usage, "total": {name: sum(row[name] for row in rows) for name in rows[0]}}


@dataclass(frozen=True)
class LoopResult:
    """A report for each iteration, that of the base model first.

    `best` is the iteration with the highest mean on the validation prompts (0 is the base model),
    `stopped` why the loop ended before its last iteration.
    """

    iterations: tuple[IterationReport, ...]
    best: int
    stopped: str | None = None


def doubt_about(one: GoldCheck | None, other: GoldCheck | None) -> str | None:
    """What a rise of the reward since the base model may hide; None for nothing."""
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
    """Why nothing can be learned from answers; None where something can.

    A planner's equal answers can teach, if its policy's `own` plain samples differ.
    """
    scores = {record.score for record in answers}
    if len(scores) > 1 or (not is_plain and {record.score for record in own} != scores):
        return None
    return (
        "expected scores that differ, got the same for all answers: there is no signal to learn "
        f"from. {scores_described(answers)} If they are as high as they can be, nothing is left "
        f"to learn; otherwise check the reward {answers[0].reward_name!r}, take more answers to "
        "each prompt, or other prompts."
    )


def fallen(means: Sequence[float], patience: int | None) -> str | None:
    """Why a loop stops after `patience` means without a new best; None where it does not."""
    best = max(range(len(means)), key=lambda i: means[i])
    since = len(means) - 1 - best
    if patience is None or since < patience:
        return None
    return (
        f"The validation mean has not risen above that of iteration {best} ({means[best]:.4g}) for "
        f"{since} iteration{'s' if since > 1 else ''}; it is {means[-1]:.4g} now."
    )
