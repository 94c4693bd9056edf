"""A reward model that was fitted on preferences or scores, and the folder that it is kept in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mbrl_text_env.encoders import Encoder
from mbrl_text_env.files import recover_folder, write_folder
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.rewards.base import RewardError, RewardModel, applies_to
from mbrl_text_env.rewards.learning.features import (
    EMBEDDED,
    EmbeddingFeatures,
    Features,
    HiddenFeatures,
)
from mbrl_text_env.rewards.learning.fit_report import RewardFitReport
from mbrl_text_env.rewards.learning.text_statistics import STATISTICS
from mbrl_text_env.runs import writing
from mbrl_text_env.types import FloatArray, Prompt

CONFIG = "reward.json"
"""The file that makes a folder a learned reward."""

_WEIGHTS = "head.safetensors"
_FORMAT = 1


class Scorer(Protocol):
    """What a learned reward scores with: a head on features, or a fine-tuned classifier."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """float64[B]."""
        ...

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """float64[B]."""
        ...

    def flops_bound(self) -> float:
        """The most that one response takes."""
        ...


@dataclass(frozen=True)
class Head:
    """Layers from features to a score, with a rectifier (max(0, x)) between two.

    Args:
        layers: Weights float64[d_in, d_out] and bias float64[d_out] of each; the last d_out is 1.
    """

    layers: tuple[tuple[FloatArray, FloatArray], ...]

    def __call__(self, inputs: FloatArray) -> FloatArray:
        """float64[B, D] to float64[B]."""
        values = inputs
        for i, (weights, bias) in enumerate(self.layers):
            values = (np.maximum(values, 0.0) if i else values) @ weights + bias
        return np.asarray(values[:, 0], dtype=np.float64)


class HeadScorer:
    """A head on frozen features.

    Args:
        features: Fitted.
        head: Takes as many columns as the features have.
    """

    def __init__(self, features: Features, head: Head) -> None:
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
        encoder: Encoder | str | Path | None = None,
        language_model: LanguageModel | str | Path | None = None,
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
        target = Path(folder)
        check_target(target)
        with writing(target, RewardError), write_folder(target) as scratch:
            if isinstance(self.fitted.scorer, HeadScorer):
                _write_head(scratch, self.fitted, self.fitted.scorer)
            else:
                assert self.folder is not None
                shutil.copytree(self.folder, scratch, dirs_exist_ok=True)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        encoder: Encoder | str | Path | None = None,
        language_model: LanguageModel | str | Path | None = None,
    ) -> LearnedReward:
        """Read what `save` wrote; the same as the constructor."""
        return cls(folder, encoder=encoder, language_model=language_model)


@dataclass(frozen=True)
class Fitted:
    """What a fit gives: a name, what scores, and how well."""

    name: str
    scorer: Scorer
    report: RewardFitReport


def check_target(folder: Path) -> None:
    """Refuse to write over anything but a learned reward.

    Raises:
        RewardError: There is a file, or a folder with other things in it.
    """
    is_other = folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file()
    if is_other or (folder.exists() and not folder.is_dir()):
        raise RewardError(
            f"{folder}: expected a new folder, an empty one, or a learned reward to replace, got "
            f"{'a folder with other files' if is_other else 'a file'}. Choose another."
        )


def write_config(folder: Path, kind: str, fitted: Fitted, settings: Mapping[str, Any]) -> None:
    """Write `reward.json`."""
    config = {
        "format": _FORMAT,
        "kind": kind,
        "name": fitted.name,
        "data": fitted.report.data,
        **settings,
        "report": fitted.report.as_dict(),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _write_head(folder: Path, fitted: Fitted, scorer: HeadScorer) -> None:
    from safetensors.numpy import save

    features = scorer.features
    source: Any = getattr(features, "encoder", getattr(features, "language_model", None))
    settings = {
        "features": {
            "kind": features.kind,
            "source": features.source,
            "has_name": source is None or isinstance(source, str | Path),
            "statistics": list(STATISTICS) if features.use_statistics else None,
            "sizes": {name: list(values.shape) for name, values in features.arrays_.items()},
        },
        "num_layers": len(scorer.head.layers),
    }
    arrays = {f"features.{name}": values for name, values in features.arrays_.items()}
    for i, (weights, bias) in enumerate(scorer.head.layers):
        arrays[f"layers.{i}.weights"], arrays[f"layers.{i}.bias"] = weights, bias
    # As bytes: `save_file` makes files for their owner's eyes only.
    weights_file = save({name: np.ascontiguousarray(values) for name, values in arrays.items()})
    (folder / _WEIGHTS).write_bytes(weights_file)
    write_config(folder, "head", fitted, settings)


def _read(
    folder: Path,
    encoder: Encoder | str | Path | None,
    language_model: LanguageModel | str | Path | None,
) -> Fitted:
    from safetensors import SafetensorError

    try:
        recover_folder(folder)
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["format"] != _FORMAT:
            raise ValueError(f"format {config['format']!r}, and this version reads {_FORMAT}")
        report = RewardFitReport.from_dict(config["report"])
        if config["kind"] == "head":
            scorer: Scorer = _read_head(folder, config, encoder, language_model)
        elif config["kind"] == "lora":
            from mbrl_text_env.rewards.learning.lora_classifier import read_adapter

            scorer = read_adapter(folder, config)
        else:
            raise ValueError(f"kind {config['kind']!r}, expected 'head' or 'lora'")
        return Fitted(str(config["name"]), scorer, report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise RewardError(
            f"Expected the folder of a learned reward, as written by `mbrl-text reward fit`, got "
            f"{str(folder)!r} ({type(error).__name__}: {error}). Check the path, or fit the reward "
            "anew."
        ) from error


def _read_head(
    folder: Path,
    config: Mapping[str, Any],
    encoder: Encoder | str | Path | None,
    language_model: LanguageModel | str | Path | None,
) -> HeadScorer:
    from safetensors.numpy import load_file

    arrays = load_file(folder / _WEIGHTS)
    if not all(np.isfinite(values).all() for values in arrays.values()):
        raise ValueError("weights that are not finite")
    features = _features(config["features"], encoder, language_model)
    sizes = config["features"]["sizes"]
    features.arrays_ = {name: arrays[f"features.{name}"].astype(np.float64) for name in sizes}
    if any(list(features.arrays_[name].shape) != size for name, size in sizes.items()):
        raise ValueError("features of other sizes than reward.json says")
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
    return HeadScorer(features, Head(layers))


def _features(
    config: Mapping[str, Any],
    encoder: Encoder | str | Path | None,
    language_model: LanguageModel | str | Path | None,
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
