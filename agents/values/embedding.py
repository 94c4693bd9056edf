"""Value models: what a partial response will be worth when it is complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl_text_env.encoders import (
    Encoder,
    encode_texts,
    encoder_flops,
    encoder_flops_bound,
    prefix_text,
)
from mbrl_text_env.files import write_folder
from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.types import FloatArray, TextState
from mbrl_text_env.values import ValueEstimate, ValueModelError

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

_CONFIG, _WEIGHTS = "value.json", "value.safetensors"
_FORMAT = 1


class FitError(ValueError):
    """Records that a value model cannot be fitted on."""


@dataclass(frozen=True)
class FitReport:
    """How well a value model predicts responses of prompts that it was not fitted on.

    Args:
        num_records: Records used.
        num_prompts: Different prompts among them.
        correlation: Pearson correlation of prediction and final reward over all records.
        within_prompt: The same after each prompt's mean is taken off both: what a choice among
            responses to one prompt can use. NaN where no prompt has two different scores.
        std: Standard deviation of the prediction's error.
    """

    num_records: int
    num_prompts: int
    correlation: float
    within_prompt: float
    std: float


class EmbeddingValue:
    """The article's quality predictor: ridge regression on the embedding of prompt and prefix.

    It is fitted on prefixes of scored responses, the first `prefix_ratio` of their words.

    Source: "Model Based Reinforcement Learning: Tutorial & Examples" (Patronus AI); its embedding
    (all-MiniLM-L6-v2), text format, alpha and prefix ratio are the defaults. Deviation: the
    standard deviation of a prediction, which the article does not have, is that of the errors on
    prompts left out in cross-validation, the same for every state.

    Args:
        tokenizer: Decodes states; a language model will do.
        encoder: Embeds texts; by default MiniLM.
        alpha: Strength of the ridge penalty.
        prefix_ratio: Share of a response's words that is kept, above 0 and up to 1.

    Attributes:
        coef_: float64[d], fitted.
        intercept_: Fitted.
        std_: Fitted.
        report_: `FitReport` of the fit.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> value = EmbeddingValue(tokenizer).fit(read_records("records"))  # doctest: +SKIP
        >>> value.predict([state]).mean  # doctest: +SKIP
        array([0.31])
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoder: Encoder | None = None,
        *,
        alpha: float = 1.0,
        prefix_ratio: float = 0.5,
    ) -> None:
        if not alpha > 0 or not 0 < prefix_ratio <= 1:
            raise ValueError(
                "Expected alpha above 0 and prefix_ratio above 0 and up to 1, got "
                f"{alpha} and {prefix_ratio}."
            )
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.alpha = alpha
        self.prefix_ratio = prefix_ratio

    @property
    def is_fitted(self) -> bool:
        """Whether there is something to predict with."""
        return hasattr(self, "coef_")

    def fit(self, records: Sequence[Record]) -> EmbeddingValue:
        """Fit on scored responses.

        Raises:
            FitError: There are fewer than two records, or their scores come from different reward
                models.
        """
        from sklearn.linear_model import Ridge

        _check_records(records)
        texts = [prefix_text(r.prompt_text, self._prefix(r.response)) for r in records]
        inputs = encode_texts(self._encoder(), texts).astype(np.float64)
        scores = np.asarray([record.score for record in records])
        groups = np.asarray([record.prompt_id for record in records])
        model = Ridge(alpha=self.alpha).fit(inputs, scores)
        self.coef_ = np.asarray(model.coef_, dtype=np.float64)
        self.intercept_ = float(model.intercept_)
        self.report_ = _report(Ridge(alpha=self.alpha), inputs, scores, groups)
        self.std_ = self.report_.std
        self.reward_name_ = records[0].reward_name
        return self

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        """Mean and standard deviation, each float64[B].

        Raises:
            ValueModelError: The model is not fitted.
        """
        if not self.is_fitted:
            raise ValueModelError(
                "EmbeddingValue is not fitted. Call fit(records) or load(folder)."
            )
        if not states:
            return ValueEstimate(np.zeros(0), np.zeros(0))
        inputs = encode_texts(self._encoder(), self._texts(states)).astype(np.float64)
        return ValueEstimate(inputs @ self.coef_ + self.intercept_, np.full(len(states), self.std_))

    def flops(self, states: Sequence[TextState]) -> FloatArray:
        """float64[B]: what embedding the states takes; 0 for encoders that do not say."""
        return encoder_flops(self._encoder(), self._texts(states))

    def flops_bound(self) -> float:
        """The most that one state takes."""
        return encoder_flops_bound(self._encoder())

    def save(self, folder: str | Path) -> None:
        """Write the fitted model: JSON and safetensors.

        Raises:
            ValueModelError: The model is not fitted.
        """
        from safetensors.numpy import save_file

        if not self.is_fitted:
            raise ValueModelError("Only a fitted EmbeddingValue can be saved. Call fit(records).")
        config = {
            "format": _FORMAT,
            "kind": "embedding",
            "alpha": self.alpha,
            "prefix_ratio": self.prefix_ratio,
            "intercept": self.intercept_,
            "std": self.std_,
            "reward": self.reward_name_,
            "report": asdict(self.report_),
        }
        with write_folder(folder) as scratch:
            (scratch / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
            save_file({"coef": self.coef_}, scratch / _WEIGHTS)

    @classmethod
    def load(
        cls, folder: str | Path, tokenizer: Tokenizer, encoder: Encoder | None = None
    ) -> EmbeddingValue:
        """Read what `save` wrote.

        Raises:
            ValueModelError: The folder holds no value model, or one of another format.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            config = json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8"))
            weights = load_file(Path(folder) / _WEIGHTS)
            if config["format"] != _FORMAT:
                raise ValueError(f"format {config['format']}, this version reads {_FORMAT}")
            value = cls(
                tokenizer, encoder, alpha=config["alpha"], prefix_ratio=config["prefix_ratio"]
            )
            value.coef_ = weights["coef"]
            value.intercept_, value.std_ = config["intercept"], config["std"]
            value.reward_name_ = config["reward"]
            value.report_ = FitReport(**config["report"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueModelError(
                f"Expected a folder that `EmbeddingValue.save` or `mbrl-text fit` wrote, got "
                f"{str(folder)!r} ({type(error).__name__}: {error}). Fit the value model anew."
            ) from error
        return value

    def _encoder(self) -> Any:
        if self.encoder is not None:
            return self.encoder
        from mbrl_text_env.language_models.catalogue import embedded_encoder

        return embedded_encoder()

    def _texts(self, states: Sequence[TextState]) -> list[str]:
        decode = self.tokenizer.decode
        return [prefix_text(s.prompt.text, decode(s.response_ids)) for s in states]

    def _prefix(self, response: str) -> str:
        words = response.split()
        return " ".join(words[: max(1, int(len(words) * self.prefix_ratio))])


def _check_records(records: Sequence[Record]) -> None:
    if len(records) < 2:
        raise FitError(
            f"Expected at least 2 scored records to fit a value model, got {len(records)}. Collect "
            "more with `mbrl-text collect`."
        )
    rewards = sorted({record.reward_name for record in records})
    if len(rewards) > 1:
        raise FitError(
            f"Expected scores of one reward model, got those of {rewards}. Re-score the records "
            "with one of them (`records.rescore`)."
        )


def _report(model: Any, inputs: Any, scores: FloatArray, groups: Any) -> FitReport:
    """Predict each prompt's records from the other prompts'."""
    from sklearn.model_selection import GroupKFold, cross_val_predict

    prompts = np.unique(groups)
    if len(prompts) < 2:
        spread = float(np.std(scores))
        return FitReport(len(scores), len(prompts), float("nan"), float("nan"), spread)
    folds = GroupKFold(n_splits=min(5, len(prompts)))
    predicted = cross_val_predict(model, inputs, scores, groups=groups, cv=folds)
    centred = [_centred(values, groups) for values in (predicted, scores)]
    return FitReport(
        len(scores),
        len(prompts),
        _correlation(predicted, scores),
        _correlation(*centred),
        float(np.std(predicted - scores)),
    )


def _centred(values: FloatArray, groups: Any) -> FloatArray:
    _, index = np.unique(groups, return_inverse=True)
    means = np.bincount(index, weights=values) / np.bincount(index)
    return np.asarray(values - means[index])


def _correlation(a: FloatArray, b: FloatArray) -> float:
    if np.ptp(a) < 1e-12 or np.ptp(b) < 1e-12:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
