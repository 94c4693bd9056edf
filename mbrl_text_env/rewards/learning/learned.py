"""A reward model that was fitted on preferences or scores, and the folder that it is kept in."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.encoders import Encoder
from mbrl_text_env.files import restored, without_nan
from mbrl_text_env.fitting.folder import Arrays, FolderKind
from mbrl_text_env.fitting.heads import LayeredHead
from mbrl_text_env.fitting.report import FitError, FitReport
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardError, RewardModel, applies_to
from mbrl_text_env.rewards.evaluators.classifier import ClassifierReward
from mbrl_text_env.rewards.learning.features import (
    EMBEDDED,
    STATISTICS,
    EmbeddingFeatures,
    Features,
    HiddenFeatures,
    TokenFeatures,
)
from mbrl_text_env.rewards.learning.lora_classifier import read_adapter
from mbrl_text_env.types import FloatArray, Prompt

FOLDER = FolderKind(
    noun="learned reward",
    writer="`mbrl-text reward fit`",
    config="reward.json",
    weights="head.safetensors",
    version=2,
    error=RewardError,
)

RewardFitError = FitError


@dataclass(frozen=True)
class RewardFitReport:
    """A fit: what it was made from, and its figures on prompts that were left out.

    Args:
        objective: `"bradley-terry"` or `"regression"`.
        model: What was fitted, such as `"linear on embedding"` or `"lora"`.
        data: What the preferences or scores come from.
        num_fitted, num_fitted_prompts: Pairs or records that it was fitted on, and their prompts.
        fitted_accuracy: Pair accuracy on these; far above the held-out one it is overfitting. NaN
            where it was not measured.
        held_out: The figures on the prompts that were left out.
        chosen: What was chosen by cross-validation, and other settings of the fit.
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

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN is None."""
        found: dict[str, Any] = without_nan(asdict(self))
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RewardFitReport:
        """The report of which `as_dict` made `values`."""
        found: RewardFitReport = restored(cls, values)
        return found


@dataclass(frozen=True, eq=False)
class HeadScorer:
    """A head on frozen features, which are fitted."""

    features: Features
    head: LayeredHead

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the model below the head can read the prompt."""
        return self.features.applies_to(prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """float64[B]."""
        if not responses:
            return np.zeros(0)
        return self.head(self.features.transform(self.features.read(prompts, responses)))

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """float64[B]: what reading takes, and two operations for each weight of the head."""
        if not responses:
            return np.zeros(0)
        return self.features.flops(prompts, responses) + self._head_flops()

    def flops_bound(self) -> float:
        """The most that one response takes."""
        return self.features.flops_bound() + self._head_flops()

    def _head_flops(self) -> float:
        return float(sum(2 * weights.size for weights, _ in self.head.layers))


@dataclass(frozen=True)
class Fitted:
    """What a fit gives: a name, what scores, and how well."""

    name: str
    scorer: HeadScorer | ClassifierReward
    report: RewardFitReport


@dataclass(eq=False, repr=False)
class LearnedReward(RewardModel):
    """A fitted reward: a head on frozen features, or a classifier that was tuned with LoRA.

    `fit_reward` makes one with a head, `fit_lora` one with a tuned classifier; this class reads
    either from its folder. The scale of scores is the fit's: of a Bradley-Terry fit, differences
    are log-odds of being preferred, and the mean over the responses that a head was fitted on is 0;
    of a regression, the gold reward's own. The folder is read at once, models at first use.

    A folder holds `reward.json` and weights as safetensors; nothing in it is executed.

    Args:
        folder: As written by `save`, `fit_lora` or `mbrl-text reward fit`; None for a reward that
            was just fitted and is not saved.
        encoder: Needed if the fit used an encoder that has no name, or to take another copy of it.
        language_model: The same for hidden states.
        fitted: What a fit gave, instead of a folder; `fit_reward` passes it.

    Attributes:
        report_: `RewardFitReport` of the fit.

    Raises:
        RewardError: The folder is damaged or of another format, or an encoder or language model is
            needed. At first use: the encoder or base model cannot be loaded, or does not fit.

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
        self.name = self.fitted.name
        self.report_ = self.fitted.report
        self._scorer = self.fitted.scorer

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt can be read: one that fills a language model's context cannot."""
        return applies_to(self._scorer, prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]."""
        return self._scorer.score(prompts, responses)

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the floating-point operations of scoring each response."""
        return self._scorer.flops(prompts, responses)

    def flops_bound(self) -> float:
        """The most that one response can take."""
        return self._scorer.flops_bound()

    def save(self, folder: str | Path) -> None:
        """Write the reward, whole or not at all; a learned reward that is there is replaced."""
        scorer = self._scorer
        if isinstance(scorer, HeadScorer):
            assert self.fitted is not None
            config = described("head", self.fitted, _head_settings(scorer))
            arrays = scorer.features.numbers()
            for i, (weights, bias) in enumerate(scorer.head.layers):
                arrays |= {f"layers.{i}.weights": weights, f"layers.{i}.bias": bias}
            FOLDER.write(folder, config, arrays)
            return
        assert self.folder is not None
        with FOLDER.writing(folder) as scratch:
            shutil.copytree(self.folder, scratch, dirs_exist_ok=True)


def described(kind: str, fitted: Fitted, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `reward.json` says."""
    names = {"kind": kind, "name": fitted.name, "data": fitted.report.data}
    return {**names, **settings, "report": fitted.report.as_dict()}


def _head_settings(scorer: HeadScorer) -> dict[str, Any]:
    features = scorer.features
    return {
        "features": {
            "kind": features.kind,
            "source": features.source,
            "has_name": isinstance(features.given, str | Path | None),
            "statistics": list(STATISTICS) if features.use_statistics else None,
        },
        "num_layers": len(scorer.head.layers),
    }


def _read(folder: Path, given: Mapping[str, Any]) -> Fitted:
    scorer: HeadScorer | ClassifierReward
    with FOLDER.reading(folder) as (config, arrays):
        report = RewardFitReport.from_dict(config["report"])
        match config["kind"]:
            case "head":
                scorer = _read_head(config, arrays(), given)
            case "lora":
                scorer = read_adapter(folder, config)
            case kind:
                raise ValueError(f"kind {kind!r}, expected 'head' or 'lora'")
        return Fitted(str(config["name"]), scorer, report)


def _read_head(config: Mapping[str, Any], arrays: Arrays, given: Mapping[str, Any]) -> HeadScorer:
    features = _features(config["features"], given).restore(arrays)
    layers = tuple(
        (arrays[f"layers.{i}.weights"], arrays[f"layers.{i}.bias"])
        for i in range(config["num_layers"])
    )
    widths = [features.size, *(weights.shape[-1] for weights, _ in layers)]
    fit = (w.shape == (size, len(bias)) for size, (w, bias) in zip(widths, layers, strict=False))
    if widths[-1] != 1 or not all(fit):
        raise ValueError(f"layers that do not fit {features.size} features")
    return HeadScorer(features, LayeredHead(layers))


def _features(config: Mapping[str, Any], given: Mapping[str, Any]) -> Features:
    """Features of a saved head, not fitted yet."""
    statistics = config["statistics"]
    if statistics is not None and tuple(statistics) != STATISTICS:
        raise ValueError("counts of texts that this version of the package does not make")
    kinds = {kind.kind: kind for kind in (EmbeddingFeatures, HiddenFeatures, TokenFeatures)}
    if config["kind"] not in kinds:
        raise ValueError(f"features {config['kind']!r}, expected one of {sorted(kinds)}")
    kind: Any = kinds[config["kind"]]
    model = given[kind.argument]
    if model is None and not config["has_name"]:
        raise ValueError(
            f"it was fitted with a {config['source']!r} object, which has no name to load it by: "
            f"pass LearnedReward(folder, {kind.argument}=...)"
        )
    if model is None and config["source"] != EMBEDDED:
        model = config["source"]
    features: Features = kind(model, statistics is not None)
    return features
