"""Reward models fitted on preferences or scores, and their folder format."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold

from mbrl_text_env.encoders import Encoder
from mbrl_text_env.files import restored, without_nan
from mbrl_text_env.fitting.folder import FolderKind, numbers_of, with_numbers
from mbrl_text_env.fitting.report import (
    FitError,
    FitReport,
    one_reward,
    pair_report,
    regression_report,
    split_by_group,
)
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardError, RewardModel
from mbrl_text_env.rewards.learning.features import (
    EMBEDDED,
    STATISTICS,
    EmbeddingFeatures,
    Features,
    HiddenFeatures,
    TokenFeatures,
)
from mbrl_text_env.rewards.learning.preferences import PreferencePair
from mbrl_text_env.types import FloatArray, Prompt, one_of

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

FOLDER = FolderKind(
    noun="learned reward",
    writer="`mbrl-text reward fit`",
    config="reward.json",
    weights="head.safetensors",
    version=3,
    error=RewardError,
)
RewardFitError = FitError
Objective = Literal["bradley-terry", "regression"]
Rows = npt.NDArray[np.bool_]

_FOLDS = 4
# The penalties that cross-validation compares.
_INVERSE_PENALTIES = tuple(10.0**power for power in range(-5, 2))
_PENALTIES = tuple(10.0**power for power in range(-2, 6))


@dataclass(frozen=True)
class RewardFitReport:
    """A report of a fit: its training data, and its metrics on held-out prompts.

    Args:
        objective: `"bradley-terry"` or `"regression"`.
        model: The fitted model, such as `"linear on embedding"`.
        data: The source of the preferences or scores.
        num_fitted, num_fitted_prompts: Numbers of training pairs or records, and of their prompts.
        fitted_accuracy: Pair accuracy on these; overfitting if far above the held-out accuracy.
        held_out: The metrics on the held-out prompts.
        chosen: The hyperparameters chosen by cross-validation, and other settings of the fit.
    """

    objective: str
    model: str
    data: str
    seed: int
    num_fitted: int
    num_fitted_prompts: int
    fitted_accuracy: float
    held_out: FitReport
    chosen: Mapping[str, Any]


class RewardData(NamedTuple):
    """N scored records, one row each; or N pairs, first all chosen, then all rejected responses.

    `groups` has the prompt's text of each record or pair, `lengths` the numbers of characters,
    int64[N] or int64[N, 2], and `scores` the scores of records, float64[N].
    """

    prompts: list[Prompt]
    responses: list[str]
    groups: list[str]
    lengths: npt.NDArray[np.int64]
    scores: FloatArray | None

    @classmethod
    def of_pairs(cls, pairs: Sequence[PreferencePair]) -> RewardData:
        """Make 2 N rows from N pairs."""
        prompts = [pair.prompt for pair in pairs]
        responses = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
        lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
        return cls(prompts * 2, responses, [prompt.text for prompt in prompts], lengths, None)

    @classmethod
    def of_records(cls, records: Sequence[Record]) -> RewardData:
        """Make N rows from N records."""
        from mbrl_text_env.records import scores_of

        responses = [record.response for record in records]
        return cls(
            [record.prompt() for record in records],
            responses,
            [record.prompt_text for record in records],
            np.array([len(response) for response in responses]),
            np.array(scores_of(records), dtype=np.float64),
        )

    def report(self, told: FloatArray, test: Rows, **facts: Any) -> RewardFitReport:
        """Report on `told`, the predicted scores of all rows; `test` marks the held-out rows."""
        return RewardFitReport(
            num_fitted=int((~test).sum()),
            num_fitted_prompts=len(set(compress(self.groups, ~test))),
            fitted_accuracy=self._measured(told, ~test).accuracy,
            held_out=self._measured(told, test),
            **facts,
        )

    def _measured(self, told: FloatArray, used: Rows) -> FitReport:
        groups, lengths = [*compress(self.groups, used)], self.lengths[used]
        if self.scores is not None:
            return regression_report(told[used], self.scores[used], groups, lengths)
        chosen, rejected = np.split(told, 2)
        return pair_report(chosen[used], rejected[used], groups, lengths)


@dataclass(frozen=True)
class Fitted:
    """A fitted linear head, scikit-learn's `Ridge`, and the fitted features of a frozen model."""

    name: str
    features: Features
    head: Ridge
    report: RewardFitReport


@dataclass(eq=False, repr=False)
class LearnedReward(RewardModel):
    """A learned reward: a linear head on features of a frozen model.

    `fit_reward` creates one; this class loads it from a folder of JSON and safetensors files, which
    cannot execute code. The scale of the scores depends on the fit. After a Bradley-Terry fit,
    differences of scores are log-odds of being preferred, and the mean over the training responses
    is 0. After a regression, the scale is that of the gold reward. Models are loaded at first use.

    Args:
        folder: A folder written by `save` or `mbrl-text reward fit`; None for a reward that was
            just fitted and is not saved.
        encoder: The encoder of the fit; required if it has no name. It can also be another copy.
        language_model: The same for hidden states.
        fitted: The result of a fit, instead of a folder; passed by `fit_reward`.

    Attributes:
        report_: `RewardFitReport` of the fit.

    Raises:
        RewardError: The folder is damaged or of another format, or requires an encoder or language
            model. At first use, if the encoder or model cannot be loaded or does not match the fit.

    Example:
        >>> reward = LearnedReward("my-reward")  # doctest: +SKIP
        >>> reward.score([Prompt.from_text("Hi")], ["Hello!"])  # doctest: +SKIP
        array([0.7])
    """

    folder: str | Path | None
    _: KW_ONLY
    encoder: Encoder | str | Path | None = None
    language_model: LanguageModel | str | Path | None = None
    fitted: Fitted | None = None

    def __post_init__(self) -> None:
        if self.fitted is None:
            if self.folder is None:
                raise RewardError("LearnedReward: expected a folder, got None.")
            given = {"encoder": self.encoder, "language_model": self.language_model}
            self.fitted = _read(Path(self.folder), given)
        self.name, self.report_ = self.fitted.name, self.fitted.report
        self._features, self._head = self.fitted.features, self.fitted.head

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the prompt leaves room for a response in a language model's context."""
        return self._features.applies_to(prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]."""
        if not responses:
            return np.zeros(0)
        inputs = self._features.transform(self._features.read(prompts, responses))
        return np.asarray(self._head.predict(inputs))

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the FLOPs of the features, plus two for each weight of the head."""
        if not responses:
            return np.zeros(0)
        return self._features.flops(prompts, responses) + 2.0 * self._head.coef_.size

    def flops_bound(self) -> float:
        """Return the upper bound for one response."""
        return self._features.flops_bound() + 2.0 * self._head.coef_.size

    def save(self, folder: str | Path) -> None:
        """Write the reward to a folder atomically, replacing any learned reward in it."""
        features = self._features
        about = {
            "kind": features.kind,
            "source": features.source,
            "has_name": isinstance(features.given, str | Path | None),
            "statistics": list(STATISTICS) if features.use_statistics else None,
        }
        report = without_nan(asdict(self.report_))
        config = {"name": self.name, "features": about, "report": report}
        FOLDER.write(folder, config, features.numbers() | numbers_of(self._head, "head"))


def _read(folder: Path, given: Mapping[str, Any]) -> Fitted:
    with FOLDER.reading(folder) as (config, arrays):
        report, found = restored(RewardFitReport, config["report"]), arrays()
        features = _features(config["features"], given).restore(found)
        head = with_numbers(Ridge(), found, "head")
        if head.coef_.shape != (features.size,):
            raise ValueError(f"a head that does not fit {features.size} features")
        return Fitted(str(config["name"]), features, head, report)


def _features(config: Mapping[str, Any], given: Mapping[str, Any]) -> Features:
    """Return the features of a saved head, not fitted yet."""
    statistics = config["statistics"]
    if statistics is not None and tuple(statistics) != STATISTICS:
        raise ValueError("text statistics that this version of the package does not compute")
    kinds = {kind.kind: kind for kind in (EmbeddingFeatures, HiddenFeatures, TokenFeatures)}
    if config["kind"] not in kinds:
        raise ValueError(f"features {config['kind']!r}, expected one of {sorted(kinds)}")
    kind: Any = kinds[config["kind"]]
    model = given[kind.argument]
    if model is None and not config["has_name"]:
        raise ValueError(
            f"it was fitted with a {config['source']!r} object, which cannot be loaded by name; "
            f"pass LearnedReward(folder, {kind.argument}=...)"
        )
    if model is None and config["source"] != EMBEDDED:
        model = config["source"]
    features: Features = kind(model, statistics is not None)
    return features


def fit_reward(
    data: Sequence[PreferencePair] | Sequence[Record],
    *,
    objective: Objective = "bradley-terry",
    features: Features | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    name: str | None = None,
    data_name: str | None = None,
) -> LearnedReward:
    """Fit a reward model, a linear head on features of a frozen model, without saving it.

    Prompts are split by their text. The report covers the pairs or records of the held-out prompts.
    The penalty is chosen on the other prompts, by cross-validation grouped by prompt.

    Bradley-Terry: a response is preferred with probability sigmoid(r_chosen - r_rejected). This is
    a logistic regression on feature differences without an intercept; margins are not used.
    Regression: ridge regression of the scores.

    Sources: Bradley and Terry, "Rank Analysis of Incomplete Block Designs", Biometrika 1952;
    Stiennon et al., "Learning to summarize from human feedback", NeurIPS 2020. Deviation: only a
    head is fitted; the model below it is frozen.

    Args:
        data: Preference pairs; for regression, records scored by one reward model.
        features: By default `EmbeddingFeatures()`: MiniLM and text statistics. A copy is fitted.
        held_out: Fraction of prompts to hold out.
        seed: Seed of the split.
        name: Name of the reward; by default `learned(<data_name>)`.
        data_name: Source of the preferences or scores; by default the name of the records' reward,
            or "preferences".

    Raises:
        RewardFitError: There is too little data (fewer than five prompts), all rows have the same
            features, or the data does not fit the objective.

    Example:
        >>> pairs = pairs_from_records(read_records("records"))  # doctest: +SKIP
        >>> reward = fit_reward(pairs, data_name="relevance")  # doctest: +SKIP
        >>> reward.report_.held_out.accuracy  # doctest: +SKIP
        0.93
    """
    rows: Any = data
    origin = _checked(rows, objective)
    table = (RewardData.of_pairs if objective == "bradley-terry" else RewardData.of_records)(rows)
    # Copy the features, so the same object can be used in several fits.
    features = EmbeddingFeatures() if features is None else copy.copy(features)
    raw = features.read(table.prompts, table.responses)
    test = split_by_group(table.groups, held_out, seed)
    used = ~test if table.scores is not None else np.tile(~test, 2)
    features.fit({key: values[used] for key, values in raw.items()})
    inputs = features.transform(raw)
    numbers = {group: i for i, group in enumerate(dict.fromkeys(table.groups))}
    groups = np.array([numbers[group] for group in table.groups], dtype=np.int64)[~test]
    targets = None if table.scores is None else table.scores[~test]
    head, chosen = fit_head(inputs[used], groups, targets, seed)
    if head is None:
        raise RewardFitError(
            f"Expected responses with different features, but {len(data)} rows look the same "
            f"to {features.kind} features. Add data, or choose other features."
        )
    origin = data_name or origin
    facts = {"objective": objective, "model": f"linear on {features.kind}", "data": origin}
    report = table.report(head.predict(inputs), test, seed=seed, chosen=chosen, **facts)
    return LearnedReward(None, fitted=Fitted(name or f"learned({origin})", features, head, report))


def fit_head(
    inputs: FloatArray, groups: npt.NDArray[np.int64], targets: FloatArray | None, seed: int
) -> tuple[Ridge | None, dict[str, Any]]:
    """Choose the penalty by cross-validation over prompts, then fit on all data.

    Args:
        inputs: float64[N, d] for scored responses; float64[2 N, d] for pairs, chosen ones first.
        groups: int64[N], the prompt of each record or pair.
        targets: float64[N], the scores; None for pairs, whose predicted scores have mean 0.

    Returns:
        The head, or None if the inputs are the same for all records, or for both responses of all
        pairs; and the chosen penalty with its validation loss.
    """
    folds = GroupKFold(min(_FOLDS, len(np.unique(groups))), shuffle=True, random_state=seed)
    sizes = [len(left_out) for _, left_out in folds.split(groups, groups=groups)]

    def mean_scores(results: Mapping[str, Any]) -> FloatArray:
        # Weight folds by their number of rows.
        scores = [results[f"split{i}_test_score"] for i in range(len(sizes))]
        return np.average(scores, axis=0, weights=sizes)

    def best_index(results: Mapping[str, Any]) -> int:
        return int(mean_scores(results).argmax())

    rows = inputs
    if targets is None:
        chosen, rejected = np.split(inputs, 2)
        differences = chosen - rejected
        # Add every pair in both orders. Both have the same loss, and the solver requires both
        # classes.
        rows, groups = np.concatenate([differences, -differences]), np.tile(groups, 2)
        targets = np.repeat([1, 0], len(differences))
        model = LogisticRegression(fit_intercept=False, max_iter=1000)
        grid, scoring = {"C": _INVERSE_PENALTIES}, "neg_log_loss"
    else:
        model, grid, scoring = Ridge(), {"alpha": _PENALTIES}, "neg_mean_squared_error"
    if not np.ptp(rows, axis=0).any():
        return None, {}
    search = GridSearchCV(model, grid, scoring=scoring, cv=folds, refit=best_index)
    head = search.fit(rows, targets, groups=groups).best_estimator_
    if isinstance(head, LogisticRegression):
        numbers = {"head.0.coef_": head.coef_[0], "head.0.intercept_": np.zeros(())}
        head = with_numbers(Ridge(), numbers, "head")
        head.intercept_ -= head.predict(inputs).mean()
    loss = -float(mean_scores(search.cv_results_).max())
    return head, {**search.best_params_, "validation_loss": loss}


def _checked(data: Sequence[Any], objective: str) -> str:
    """Return the default name of the data; raise if it does not fit the objective."""
    try:
        one_of("objective", objective, Objective)
    except ValueError as error:
        raise RewardFitError(str(error)) from error
    if not data:
        raise RewardFitError("Expected at least one row of data to fit a reward on, got none.")
    is_pairs = all(isinstance(row, PreferencePair) for row in data)
    if is_pairs != (objective == "bradley-terry"):
        raise RewardFitError(
            f"objective={objective!r} requires "
            f"{'scored records' if is_pairs else 'preference pairs'}, got "
            f"{type(data[0]).__name__}s. Make pairs from records with `pairs_from_records`, or "
            "change the objective."
        )
    return "preferences" if is_pairs else one_reward(data)
