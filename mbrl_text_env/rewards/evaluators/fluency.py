"""How probable a response is under a language model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.language_models.base import LanguageModel, PromptTooLongError
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.evaluators._hub import TextEncoder, check_at_least_one, language_model_of
from mbrl_text_env.types import Chunk, FloatArray, Prompt, TextState


class FluencyReward:
    """Mean log-probability (nats a token) of a response under a language model, at most 0.

    It is minus the logarithm of the response's perplexity. Reward models see text only, so the
    response is encoded anew: its tokens, and so its score, may differ from those that were sampled.
    Special tokens written out in it are read as ordinary text.

    An empty mean would be 0, the best score there is. So a response without tokens scores the
    log-probability that the model ends right there: that of all its stop tokens together. The end
    of other responses does not count; they may have been cut by a limit.

    Probable is not good: a text that repeats itself scores close to 0, so a search for this reward
    alone ends in repetition. Combine it with `RepetitionPenalty` or another reward.

    Responses longer than `max_length`, or than the model's context has room for, are cut at their
    end, and a warning says so the first time.

    Args:
        language_model: A language model with `logprobs`, such as `TransformersLM` or `ServerLM`;
            the name on the Hub or the folder of one; None for the embedded SmolLM2, which is loaded
            at first use.
        conditional: Whether the response is judged as an answer to its prompt; otherwise as a text
            of its own, after the tokenizer's opening token or, where it has none, a stop token.
        max_length: Most tokens of a response that count.

    Attributes:
        num_truncated: Responses that were cut so far.

    Raises:
        RewardError: The language model cannot be loaded, has no stop tokens, or a prompt leaves no
            room in its context. A log-probability of minus infinity is refused by
            `score_responses`.
        ValueError: At first use: `max_length` is below 1.

    Example:
        >>> prompt = Prompt.from_text("Why is the sky blue?")
        >>> texts = ["Because air scatters blue light.", "Scatters air because light blue."]
        >>> fluent, muddled = FluencyReward().score([prompt] * 2, texts)  # doctest: +SKIP
        >>> fluent > muddled  # doctest: +SKIP
        True
    """

    def __init__(
        self,
        language_model: LanguageModel | str | Path | None = None,
        *,
        conditional: bool = True,
        max_length: int = 2048,
    ) -> None:
        self.language_model = language_model
        self.conditional = conditional
        self.max_length = max_length
        self.num_truncated = 0
        self._loaded: _Loaded | None = None

    @property
    def name(self) -> str:
        """`"fluency"`, or `"fluency-unconditional"`."""
        return "fluency" if self.conditional else "fluency-unconditional"

    def __getstate__(self) -> dict[str, Any]:
        # A model that was loaded here is not pickled; a copy loads it again when first used.
        return {**self.__dict__, "_loaded": None}

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the model can read the prompt: it fits, and a chat needs a chat template."""
        try:
            self._prefix(prompt)
        except RewardError:
            return False
        return True

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the mean log-probability (nats) of each response's tokens."""
        if not responses:
            return np.zeros(0)
        loaded = self._model()
        states, texts = self._states(prompts, responses)
        self._note_truncated(sum(len(text.ids) > text.kept for text in texts))
        # A response without tokens is judged by each of the tokens that could end it.
        stops = [(stop,) for stop in sorted(loaded.language_model.stop_token_ids)]
        rows = [[text.ids[: text.kept]] if text.ids else stops for text in texts]
        found = iter(
            loaded.language_model.logprobs(
                [state for state, row in zip(states, rows, strict=True) for _ in row],
                [Chunk(ids) for row in rows for ids in row],
            )
        )
        scores = []
        for text, row in zip(texts, rows, strict=True):
            logprobs = [next(found) for _ in row]
            if text.ids:
                scores.append(math.fsum(logprobs[0]) / len(logprobs[0]))
            else:
                scores.append(float(np.logaddexp.reduce([values[0] for values in logprobs])))
        return np.array(scores, dtype=np.float64)

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], what the language model says that judging each response takes.

        An upper bound: prompts that it has cached are not computed again.
        """
        if not responses:
            return np.zeros(0)
        states, texts = self._states(prompts, responses)
        return np.array(
            [
                # The last token is judged, but nothing is asked of what follows it.
                self._usage(len(state.prompt_ids) + max(1, text.kept) - 1)
                for state, text in zip(states, texts, strict=True)
            ]
        )

    def flops_bound(self) -> float:
        """The most that one response can take: prompt and response that fill the context."""
        return self._usage(self._model().language_model.context_length)

    def _usage(self, tokens: int) -> float:
        return self._model().language_model.usage_bound(tokens, []).lm_flops

    def _states(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[list[TextState], list[_Tokens]]:
        loaded = self._model()
        states, texts = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            prefix = self._prefix(prompt)
            ids = loaded.encoder.ids(response)
            room = loaded.language_model.context_length - len(prefix)
            states.append(TextState(prompt, prefix))
            texts.append(_Tokens(ids, min(len(ids), room, self.max_length)))
        return states, texts

    def _prefix(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens that the response follows."""
        loaded = self._model()
        if not self.conditional:
            return loaded.encoder.opening or (min(loaded.language_model.stop_token_ids),)
        try:
            return loaded.language_model.encode_prompt(prompt)
        except PromptTooLongError as error:
            raise RewardError(f"Reward model {self.name!r}: {error}") from error
        except ValueError as error:
            raise RewardError(
                f"Reward model {self.name!r}: prompt {prompt.id!r} cannot be encoded: {error}"
            ) from error

    def _model(self) -> _Loaded:
        if self._loaded is None:
            check_at_least_one(self, "max_length")
            language_model = language_model_of(self.language_model, self.name)
            if not language_model.stop_token_ids:
                raise RewardError(
                    f"Reward model {self.name!r}: {language_model.name!r} has no stop tokens, by "
                    "which an empty response is judged. Pass a language model that knows when a "
                    "response ends."
                )
            self._loaded = _Loaded(language_model, TextEncoder(language_model))
        return self._loaded

    def _note_truncated(self, count: int) -> None:
        if count and not self.num_truncated:
            warnings.warn(
                f"Reward model {self.name!r} cut {count} response(s) to {self.max_length} tokens "
                "or what the model's context has room for; the rest of them does not count. Raise "
                "max_length if the context allows it, or shorten prompts and responses. "
                "`num_truncated` counts further ones.",
                stacklevel=3,
            )
        self.num_truncated += count


@dataclass(frozen=True)
class _Tokens:
    """A response's tokens, int[T], and how many of them count."""

    ids: tuple[int, ...]
    kept: int


@dataclass(frozen=True)
class _Loaded:
    language_model: LanguageModel
    encoder: TextEncoder
