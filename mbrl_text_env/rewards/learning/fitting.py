"""Fit heads on frozen features: Bradley-Terry on preferences, regression on scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from mbrl_text_env.fitting.report import FitReport, pair_report, regression_report
from mbrl_text_env.fitting.reward_heads import LayeredHead, Problem, fit_linear, fit_mlp
from mbrl_text_env.fitting.samples import split_by_group
from mbrl_text_env.rewards.learning.features import EmbeddingFeatures, Features, Raw
from mbrl_text_env.rewards.learning.learned import (
    Fitted,
    HeadScorer,
    LearnedReward,
    RewardFitError,
    RewardFitReport,
)
from mbrl_text_env.rewards.learning.preferences import PreferencePair
from mbrl_text_env.types import FloatArray

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

Objective = Literal["bradley-terry", "regression"]
HeadKind = Literal["linear", "mlp"]
Rows = npt.NDArray[np.bool_]

_FITS: Mapping[str, Callable[[Problem, int], tuple[LayeredHead, dict[str, Any]]]] = {
    "linear": fit_linear,
    "mlp": fit_mlp,
}


def fit_reward(
    data: Sequence[PreferencePair] | Sequence[Record],
    *,
    objective: Objective = "bradley-terry",
    head: HeadKind = "linear",
    features: Features | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    name: str | None = None,
    data_name: str | None = None,
) -> LearnedReward:
    """Fit a reward model: a head on features of a frozen model.

    The report is of the pairs or records of prompts that are held out of the fit. Prompts are told
    apart by their text. The penalty is chosen by cross-validation by prompt on the others.

    Bradley-Terry: a response is preferred with probability sigmoid(r_chosen - r_rejected), whose
    mean -log is minimised; with a linear head, a logistic regression on differences of features
    without an intercept. Margins are not used. Regression: ridge regression of the scores.

    Sources: Bradley and Terry, "Rank Analysis of Incomplete Block Designs", Biometrika 1952;
    Stiennon et al., "Learning to summarize from human feedback", NeurIPS 2020. Deviation: only a
    head is fitted, the model below it is frozen; `fit_lora` tunes a model.

    Args:
        data: Preference pairs, or for regression scored records of one reward model.
        objective: `"bradley-terry"` or `"regression"`.
        head: `"linear"`; or `"mlp"`, one hidden layer of 32 units, stopped early by the loss on a
            fifth of the prompts that are fitted on.
        features: By default `EmbeddingFeatures()`, on MiniLM, with counts. A copy is fitted.
        held_out: Share of the prompts to measure on.
        seed: The split and the initial weights of an MLP follow from it.
        name: Of the reward; by default `learned(<data_name>)`.
        data_name: What preferences or scores come from; by default the records' reward, or
            "preferences".

    Returns:
        The reward, not saved yet, with its report in `report_`.

    Raises:
        RewardFitError: There is too little data (fewer than five prompts), all of it looks the same
            to the features, or it does not fit the objective.
        RewardError: The model that reads texts cannot be loaded.

    Example:
        >>> pairs = pairs_from_records(read_records("records"))  # doctest: +SKIP
        >>> reward = fit_reward(pairs, data_name="relevance")  # doctest: +SKIP
        >>> reward.report_.held_out.accuracy  # doctest: +SKIP
        0.93
        >>> reward.save("my-reward")  # doctest: +SKIP
    """
    _check_arguments(data, objective, head)
    # A copy: the same features in two fits give two rewards.
    features = EmbeddingFeatures() if features is None else copy.copy(features)
    table = (_read_pairs if objective == "bradley-terry" else _read_records)(data, features)
    test = split_by_group(table.groups, held_out, seed)
    rows = table.rows(~test)
    features.fit({key: values[rows] for key, values in table.raw.items()})
    inputs = features.transform(table.raw)
    problem = _checked(table.problem(inputs).subset(~test), len(data), features)
    fitted, chosen = _FITS[head](problem, seed)
    if objective == "bradley-terry":
        fitted = fitted.moved(-fitted(inputs[rows]).mean())
    scores = fitted(inputs)
    origin = data_name or table.data_name
    model, measured = f"{head} on {features.kind}", table.measured(scores, test)
    report = RewardFitReport(objective, model, origin, seed, chosen=chosen, **measured)
    scorer = HeadScorer(features, fitted)
    return LearnedReward(None, fitted=Fitted(name or f"learned({origin})", scorer, report))


def _checked(problem: Problem, rows: int, features: Features) -> Problem:
    if problem.says_nothing():
        raise RewardFitError(
            f"Expected responses that the features tell apart, but {rows} rows look the same "
            f"to {features.kind} features. Add data, or choose other features."
        )
    return problem


class _Table(NamedTuple):
    """Records, one row each; or pairs, the chosen responses' rows before the rejected ones'.

    Args:
        raw: What was read of each row.
        groups: The prompt of each record or pair.
        lengths: Characters of the responses; of a pair, of both.
        data_name: What reports call it.
        scores: Of records; None with pairs.
    """

    raw: Raw
    groups: list[str]
    lengths: npt.NDArray[np.int64]
    data_name: str
    scores: FloatArray | None = None

    def rows(self, used: Rows) -> npt.NDArray[np.int64]:
        return np.flatnonzero(np.concatenate([used, used]) if self.scores is None else used)

    def problem(self, inputs: FloatArray) -> Problem:
        numbers = {group: i for i, group in enumerate(dict.fromkeys(self.groups))}
        groups = np.array([numbers[group] for group in self.groups], dtype=np.int64)
        if self.scores is not None:
            return Problem(inputs, groups, targets=self.scores)
        chosen, rejected = np.split(inputs, 2)
        return Problem(chosen, groups, rejected=rejected)

    def measured(self, scores: FloatArray, test: Rows) -> dict[str, Any]:
        """The fields of a `RewardFitReport` that follow from the split."""
        return {
            "num_fitted": int((~test).sum()),
            "num_fitted_prompts": len(set(np.array(self.groups)[~test])),
            "fitted_accuracy": self.report(scores, ~test).accuracy,
            "held_out": self.report(scores, test),
        }

    def report(self, scores: FloatArray, used: Rows) -> FitReport:
        groups = [group for group, is_used in zip(self.groups, used, strict=True) if is_used]
        lengths = self.lengths[used]
        if self.scores is not None:
            return regression_report(scores[used], self.scores[used], groups, lengths)
        chosen, rejected = np.split(scores, 2)
        return pair_report(chosen[used], rejected[used], groups, lengths)


def _read_pairs(data: Sequence[Any], features: Features) -> _Table:
    prompts = [pair.prompt for pair in data]
    responses = [*(pair.chosen for pair in data), *(pair.rejected for pair in data)]
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in data])
    raw = features.read(prompts * 2, responses)
    return _Table(raw, [prompt.text for prompt in prompts], lengths, "preferences")


def _read_records(data: Sequence[Any], features: Features) -> _Table:
    responses = [record.response for record in data]
    return _Table(
        features.read([record.prompt() for record in data], responses),
        [record.prompt_text for record in data],
        np.array([len(response) for response in responses]),
        data[0].reward_name,
        np.array([record.score for record in data], dtype=np.float64),
    )


def _check_arguments(data: Sequence[Any], objective: str, head: str) -> None:
    for argument, value, allowed in (
        ("objective", objective, get_args(Objective)),
        ("head", head, get_args(HeadKind)),
    ):
        if value not in allowed:
            raise RewardFitError(f"{argument}: expected one of {list(allowed)}, got {value!r}.")
    if not data:
        raise RewardFitError("Expected data to fit a reward on, got none.")
    is_pairs = all(isinstance(row, PreferencePair) for row in data)
    if is_pairs != (objective == "bradley-terry"):
        raise RewardFitError(
            f"objective={objective!r} takes "
            f"{'scored records' if is_pairs else 'preference pairs'}, got "
            f"{type(data[0]).__name__}s. Make pairs of records with `pairs_from_records`, or "
            "change the objective."
        )
    names = sorted({row.reward_name for row in data if not isinstance(row, PreferencePair)})
    if len(names) > 1:
        raise RewardFitError(
            f"Expected scores of one reward model, got those of {names}. Score the responses with "
            "one of them (`records.rescore`)."
        )
