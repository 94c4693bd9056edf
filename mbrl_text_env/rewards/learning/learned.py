"""A reward model that was fitted on preferences or scores, and the folder that it is kept in."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.encoders import Encoder
from mbrl_text_env.fitting.folder import Arrays, FolderKind
from mbrl_text_env.fitting.report import FitReport, with_nan, without_nan
from mbrl_text_env.fitting.reward_heads import LayeredHead
from mbrl_text_env.fitting.samples import FitError
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardError, RewardModel, applies_to
from mbrl_text_env.rewards.evaluators.classifier import ClassifierReward
from mbrl_text_env.rewards.learning.features import (
    EMBEDDED,
    EmbeddingFeatures,
    Features,
    HiddenFeatures,
)
from mbrl_text_env.rewards.learning.text_statistics import STATISTICS
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
EncoderLike = Encoder | str | Path | None
LanguageModelLike = LanguageModel | str | Path | None


@dataclass(frozen=True)
class RewardFitReport:
    """A fit: what it was made from, and its figures on prompts that were left out.

    Args:
        objective: `"bradley-terry"` or `"regression"`.
        model: What was fitted, such as `"linear on embedding"` or `"lora"`.
        data: What the preferences or scores come from.
        seed: Split and fit follow from it.
        num_fitted: Pairs or records that the model was fitted on.
        num_fitted_prompts: Different prompts among them.
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
        """The report of which `as_dict` made `values`.

        Raises:
            KeyError, TypeError: Something is missing or unknown.
        """
        held_out = FitReport.from_dict(values["held_out"])
        return cls(**{**with_nan(values), "held_out": held_out})


class HeadScorer:
    """A head on frozen features.

    Args:
        features: Fitted.
        head: Takes as many columns as the features have.
    """

    def __init__(self, features: Features, head: LayeredHead) -> None:
        self.features = features
        self.head = head

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the model below the head can read the prompt."""
        return self.features.applies_to(prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """float64[B]."""
        if not responses:
            return np.zeros(0)
        raw = self.features.read(prompts, responses)
        return self.head(self.features.transform(raw))

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


class LearnedReward(RewardModel):
    """A fitted reward: a head on frozen features, or a classifier that was tuned with LoRA.

    `fit_reward` makes one with a head, `fit_lora` one with a tuned classifier; this class reads
    either from its folder. The scale of scores is the fit's: of a Bradley-Terry fit, differences
    are log-odds of being preferred, and the mean over the responses that a head was fitted on is 0;
    of a regression, the gold reward's own. The folder is read at once, models at first use.

    A folder holds `reward.json` (format, name, what the data came from, features or base model,
    report) and weights as safetensors; nothing in it is executed when it is read.

    Args:
        folder: As written by `save`, `fit_lora` or `mbrl-text reward fit`; None for a reward that
            was just fitted and is not saved.
        encoder: Needed if the fit used an encoder that has no name, or to take another copy of it.
        language_model: The same for hidden states.
        fitted: What a fit gave, instead of a folder; `fit_reward` passes it.

    Attributes:
        name: What reports call it.
        report_: `RewardFitReport` of the fit.

    Raises:
        RewardError: The folder is missing, damaged, half written or of another format, or an
            encoder or language model is needed. At first use: the encoder or base model cannot be
            loaded, or does not fit.

    Example:
        >>> reward = LearnedReward("my-reward")  # doctest: +SKIP
        >>> reward.score([Prompt.from_text("Hi")], ["Hello!"])  # doctest: +SKIP
        array([0.7])
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        encoder: EncoderLike = None,
        language_model: LanguageModelLike = None,
        fitted: Fitted | None = None,
    ) -> None:
        self.folder = folder
        self.encoder = encoder
        self.language_model = language_model
        if fitted is None:
            if folder is None:
                raise RewardError("LearnedReward: expected a folder, got None.")
            fitted = _read(Path(folder), encoder, language_model)
        self.fitted = fitted
        self.name = fitted.name
        self.report_ = fitted.report

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt can be read: one that fills a language model's context cannot."""
        return applies_to(self.fitted.scorer, prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]."""
        return self.fitted.scorer.score(prompts, responses)

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the floating-point operations of scoring each response."""
        return self.fitted.scorer.flops(prompts, responses)

    def flops_bound(self) -> float:
        """The most that one response can take."""
        return self.fitted.scorer.flops_bound()

    def save(self, folder: str | Path) -> None:
        """Write the reward, whole or not at all; a learned reward that is there is replaced.

        Raises:
            RewardError: The folder holds other things, or cannot be written.
        """
        scorer = self.fitted.scorer
        if isinstance(scorer, HeadScorer):
            config = described("head", self.fitted, _head_settings(scorer))
            arrays = scorer.features.numbers()
            for i, (weights, bias) in enumerate(scorer.head.layers):
                arrays[f"layers.{i}.weights"], arrays[f"layers.{i}.bias"] = weights, bias
            FOLDER.write(folder, config, arrays)
            return
        assert self.folder is not None
        with FOLDER.writing(folder) as scratch:
            shutil.copytree(self.folder, scratch, dirs_exist_ok=True)


@dataclass(frozen=True)
class Fitted:
    """What a fit gives: a name, what scores, and how well."""

    name: str
    scorer: HeadScorer | ClassifierReward
    report: RewardFitReport


def described(kind: str, fitted: Fitted, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `reward.json` says."""
    report = fitted.report
    names = {"kind": kind, "name": fitted.name, "data": report.data}
    return {**names, **settings, "report": report.as_dict()}


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


def _read(folder: Path, encoder: EncoderLike, language_model: LanguageModelLike) -> Fitted:
    with FOLDER.reading(folder) as (config, arrays):
        report = RewardFitReport.from_dict(config["report"])
        if config["kind"] == "head":
            scorer: HeadScorer | ClassifierReward = _read_head(
                config, arrays(), encoder, language_model
            )
        elif config["kind"] == "lora":
            from mbrl_text_env.rewards.learning.lora_classifier import read_adapter

            scorer = read_adapter(folder, config)
        else:
            raise ValueError(f"kind {config['kind']!r}, expected 'head' or 'lora'")
        return Fitted(str(config["name"]), scorer, report)


def _read_head(
    config: Mapping[str, Any],
    arrays: Arrays,
    encoder: EncoderLike,
    language_model: LanguageModelLike,
) -> HeadScorer:
    features = _features(config["features"], encoder, language_model).restore(arrays)
    layers = tuple(
        (arrays[f"layers.{i}.weights"], arrays[f"layers.{i}.bias"])
        for i in range(config["num_layers"])
    )
    widths = [features.size, *(weights.shape[-1] for weights, _ in layers)]
    if widths[-1] != 1 or any(
        weights.shape != (size, len(bias))
        for size, (weights, bias) in zip(widths, layers, strict=False)
    ):
        raise ValueError(f"layers that do not fit {features.size} features")
    return HeadScorer(features, LayeredHead(layers))


def _features(
    config: Mapping[str, Any],
    encoder: EncoderLike,
    language_model: LanguageModelLike,
) -> Features:
    """Features of a saved head, not fitted yet."""
    statistics = config["statistics"]
    if statistics is not None and tuple(statistics) != STATISTICS:
        raise ValueError("counts of texts that this version of the package does not make")
    given: Any = encoder if config["kind"] == "embedding" else language_model
    if given is None and not config["has_name"]:
        argument = "encoder" if config["kind"] == "embedding" else "language_model"
        raise ValueError(
            f"it was fitted with a {config['source']!r} object, which has no name to load it by: "
            f"pass LearnedReward(folder, {argument}=...)"
        )
    if given is None and config["source"] != EMBEDDED:
        given = config["source"]
    if config["kind"] == "embedding":
        return EmbeddingFeatures(given, statistics is not None)
    if config["kind"] == "hidden":
        return HiddenFeatures(given, statistics is not None)
    raise ValueError(f"features {config['kind']!r}, expected 'embedding' or 'hidden'")
