"""How far a tuned policy has moved, and what of that is not an improvement.

The further a policy moves from the base model, the less its value model fits, the fewer different
things it says, and the more of its reward may be the reward model's mistake.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mbrl_text_env.agents.values.training_prefixes import cut_prefixes, samples_of
from mbrl_text_env.fitting.report import correlation, root_mean_square, within_prompt
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.ledger import Ledger
from mbrl_text_env.mdp import is_terminal
from mbrl_text_env.records import Record
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardModel,
    applies_to,
    isolate_failures,
    score_responses,
)
from mbrl_text_env.types import Chunk, FloatArray, TextState
from mbrl_text_env.values import ValueModel, as_value_model, predict_values

_NGRAMS = (1, 2, 3)


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of a policy from the base model, estimated from its samples.

    Args:
        per_response: Nats a response: the mean of log policy - log base over whole responses.
        per_response_error: Its standard error; NaN for one prompt with one response.
        per_token: Nats a token: the same sum, divided by the number of tokens.
        per_token_error: Its standard error.
        num_responses: Responses.
    """

    per_response: float
    per_response_error: float
    per_token: float
    per_token_error: float
    num_responses: int


@dataclass(frozen=True)
class Diversity:
    """How much a set of responses repeats itself.

    Args:
        distinct: Share of different n-grams of words among all, over all responses, for n of 1, 2
            and 3; NaN where there is none. It falls with the number of responses, so compare sets
            of one size.
        duplicates: Share of responses with the same words as a response to another prompt.
        repeats: Share of responses with the same words as an earlier one to the same prompt.
    """

    distinct: tuple[float, float, float]
    duplicates: float
    repeats: float


@dataclass(frozen=True)
class ValueCheck:
    """How well a value model predicts responses that it was not fitted on.

    Args:
        error: Root mean square of prediction - final score, over prefixes of all lengths.
        correlation: Pearson correlation over all prefixes.
        within_prompt: The same after the mean of each prompt's prefixes of one length is taken off
            both: what a choice among partial responses can use. NaN where nothing varies.
        num_prefixes: Prefixes.
    """

    error: float
    correlation: float
    within_prompt: float
    num_prefixes: int


@dataclass(frozen=True)
class GoldCheck:
    """What a trusted reward that was not optimised says of the same responses.

    Args:
        proxy: Mean score under the reward that is optimised, of the responses below.
        gold: Mean score under the trusted one.
        gap: proxy - gold. Its change from the base model's tells how much of a rise is not real,
            where both rewards have one scale.
        correlation: Of the two, over responses; NaN where one does not vary.
        num_responses: Responses that the trusted reward could score.
    """

    proxy: float
    gold: float
    gap: float
    correlation: float
    num_responses: int


def divergence(
    policy: LanguageModel,
    base: LanguageModel,
    states: Sequence[TextState],
    *,
    ledger: Ledger | None = None,
) -> Divergence:
    """Estimate KL(policy || base) from complete responses that the policy sampled.

    The estimate is unbiased if the responses were drawn from the policy itself (temperature 1, no
    top-k or top-p), from the prompt to the end. Standard errors are over prompts, with the usual
    linearisation for the ratio of nats and tokens; over responses where there is one prompt.

    Args:
        policy: What sampled them.
        base: With the same tokens.
        states: Terminal.
        ledger: Is charged for both models' computation.

    Returns:
        Infinite values where the base could not have written a response.

    Raises:
        ValueError: There are no responses, or one has not ended.
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


def diversity(records: Sequence[Record]) -> Diversity:
    """Count what responses have in common; words are divided by spaces, case does not count.

    Source of distinct-n: Li et al., "A Diversity-Promoting Objective Function for Neural
    Conversation Models", NAACL 2016.

    Raises:
        ValueError: There are no records.
    """
    if not records:
        raise ValueError("diversity: expected at least one record, got none.")
    texts = [tuple(record.response.lower().split()) for record in records]
    askers: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for text, record in zip(texts, records, strict=True):
        askers[text].add(record.prompt_id)
    pairs = {(record.prompt_id, text) for record, text in zip(records, texts, strict=True)}
    one, two, three = (_distinct(texts, n) for n in _NGRAMS)
    return Diversity(
        (one, two, three),
        sum(len(askers[text]) > 1 for text in texts) / len(texts),
        1 - len(pairs) / len(texts),
    )


def _distinct(texts: Sequence[tuple[str, ...]], n: int) -> float:
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def check_value(
    value_model: ValueModel,
    records: Sequence[Record],
    *,
    ledger: Ledger | None = None,
) -> ValueCheck:
    """Compare a value model's predictions for prefixes with the final scores.

    Args:
        value_model: Fitted.
        records: Complete responses to several prompts, several to each.
        ledger: Is charged.

    Raises:
        FitError: No response has two tokens.
        ValueModelError: The value model is not fitted, or fails.
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


def check_gold(
    gold_model: RewardModel,
    records: Sequence[Record],
    *,
    ledger: Ledger | None = None,
) -> GoldCheck | None:
    """Score responses with a trusted reward; None where it applies to none of them.

    Responses that it cannot score are left out on both sides.
    """
    rows = [record for record in records if applies_to(gold_model, record.prompt())]

    def score(some: Sequence[Record]) -> list[float]:
        charged = None if ledger is None else [ledger] * len(some)
        prompts, texts = [r.prompt() for r in some], [r.response for r in some]
        found: list[float] = score_responses(
            gold_model, prompts, texts, ledgers=charged
        ).total.tolist()
        return found

    found = isolate_failures(score, rows) if rows else []
    pairs = [
        (record.score, gold)
        for record, gold in zip(rows, found, strict=True)
        if not isinstance(gold, RewardError)
    ]
    if not pairs:
        return None
    proxy, gold = np.asarray(pairs, dtype=np.float64).T
    return GoldCheck(
        float(proxy.mean()),
        float(gold.mean()),
        float((proxy - gold).mean()),
        correlation(proxy, gold),
        len(pairs),
    )


def to_json(values: Any) -> dict[str, Any]:
    """A dataclass of this module as JSON values; text for the numbers that JSON does not have."""
    return {name: _plain(value) for name, value in asdict(values).items()}


def from_json(kind: Any, values: Mapping[str, Any]) -> Any:
    """Read `to_json`."""
    return kind(**{name: _number(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_number(item) for item in value)
    return float(value) if isinstance(value, str) else value
