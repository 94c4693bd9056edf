"""How probable a response is under a language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np

from mbrl_text_env.language_models.base import LanguageModel, PromptTooLongError
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.evaluators._hub import (
    Evaluator,
    TextEncoder,
    check_at_least_one,
    language_model_of,
)
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import Chunk, FloatArray, Prompt, TextState


@named("fluency")
@dataclass(eq=False, repr=False)
class FluencyReward(Evaluator):
    """Mean log-probability (nats a token) of a response under a language model, at most 0.

    It is minus the logarithm of the response's perplexity. The text is encoded anew, so its tokens
    may differ from the sampled ones; special tokens written out in it are read as ordinary text. A
    response without tokens scores the log-probability that the model ends right there (all its stop
    tokens together); the end of other responses does not count.

    A text that repeats itself is probable, so a search for this reward alone ends in repetition:
    combine it with `RepetitionPenalty` or another reward. Responses longer than `max_length`, or
    than the context has room for, are cut at their end; the first cut gives a warning.

    Args:
        language_model: One with `logprobs` (`TransformersLM`, `ServerLM`), its name on the Hub or
            folder; None for the embedded SmolLM2.
        conditional: Whether the response is judged as an answer to its prompt; otherwise as a text
            of its own, after the tokenizer's opening token or, where it has none, a stop token.
        max_length: Most tokens of a response that count.
        name: What reports call it; by default "fluency", or "fluency-unconditional".

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

    language_model: LanguageModel | str | Path | None = None
    _: KW_ONLY
    conditional: bool = True
    max_length: int = 2048
    name: str = ""

    cuts = (
        "response(s) to {} tokens or what the model's context has room for; the rest of them does "
        "not count",
        "context",
    )

    def __post_init__(self) -> None:
        self.name = self.name or ("fluency" if self.conditional else "fluency-unconditional")

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
        loaded: _Loaded = self._model()
        states, texts = self._states(prompts, responses)
        self._note_truncated(sum(len(text.ids) > text.kept for text in texts), self.max_length)
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
        return float(self._model().language_model.usage_bound(tokens, []).lm_flops)

    def _states(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[list[TextState], list[_Tokens]]:
        loaded: _Loaded = self._model()
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
        loaded: _Loaded = self._model()
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

    def _load(self) -> _Loaded:
        check_at_least_one(self, "max_length")
        language_model = language_model_of(self.language_model, self.name)
        if not language_model.stop_token_ids:
            raise RewardError(
                f"Reward model {self.name!r}: {language_model.name!r} has no stop tokens, by which "
                "an empty response is judged. Pass a language model that knows when a response "
                "ends."
            )
        return _Loaded(language_model, TextEncoder(language_model))


@dataclass(frozen=True)
class _Tokens:
    """A response's tokens, int[T], and how many of them count."""

    ids: tuple[int, ...]
    kept: int


@dataclass(frozen=True)
class _Loaded:
    language_model: LanguageModel
    encoder: TextEncoder
