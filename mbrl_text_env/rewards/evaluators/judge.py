"""Rewards from a language model: the log-probability of a response, and a judge's verdict."""

from __future__ import annotations

import itertools
import math
import string
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mbrl_text_env.language_models.base import LanguageModel, PromptTooLongError
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.rewards.evaluators._hub import Evaluator, language_model_of
from mbrl_text_env.rewards.names import named
from mbrl_text_env.types import Chunk, FloatArray, Prompt, TextState

RUBRIC = (
    "5: helpful, correct and clear throughout. 4: good, with small faults. 3: partly helpful or "
    "partly correct. 2: mostly unhelpful or wrong. 1: useless, wrong or off the topic."
)
TEMPLATE = """Rate how well a response answers a request.

Rubric:
{rubric}

[Start of the request]
{prompt}
[End of the request]

[Start of the response]
{response}
[End of the response]

Answer with one number from 1 to 5 and nothing else."""
ANSWERS: Mapping[str, float] = MappingProxyType({str(value): float(value) for value in range(1, 6)})
YES_NO: Mapping[str, float] = MappingProxyType({"Yes": 1.0, "No": 0.0})
"""Answers for a template with a yes-no question; the score is P(Yes) / (P(Yes) + P(No))."""


@dataclass(frozen=True)
class _Loaded:
    # `limit` is the maximum number of input tokens; `answer_ids` are the judge's answers.

    language_model: LanguageModel
    limit: int
    answer_ids: Sequence[tuple[int, ...]] = ()


@dataclass(frozen=True)
class _Reading:
    """A query to the language model: the log-probability of each text in `asked` after `ids`."""

    ids: tuple[int, ...]
    asked: Sequence[tuple[int, ...]]
    truncated: bool


@dataclass(eq=False, repr=False)
class _LanguageModelReward(Evaluator):
    """Base class of rewards from log-probabilities; `_read` makes the query for a response."""

    language_model: LanguageModel | str | Path | None = None

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the prompt fits into the context, with room for a response."""
        try:
            self._room(prompt)
        except RewardError:
            return False
        return True

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the language model's floating-point operations for each response.

        This is an upper bound, since cached prefixes are not computed again.
        """
        readings = [self._read(*row) for row in zip(prompts, responses, strict=True)]
        return np.array([self._usage(self._length(r)) for r in readings], dtype=np.float64)

    def flops_bound(self) -> float:
        """Return the upper bound for one response: a text of maximum length."""
        return self._usage(self._model().limit)

    def _usage(self, tokens: int) -> float:
        loaded: _Loaded = self._model()
        # The last token of an answer is only predicted, never read by the model.
        new_tokens = [len(ids) - 1 for ids in loaded.answer_ids]
        return float(loaded.language_model.usage_bound(tokens, new_tokens).lm_flops)

    def _length(self, reading: _Reading) -> int:
        """Return the number of tokens read before those of `answer_ids`."""
        return len(reading.ids)

    def _asked(
        self, prompts: Sequence[Prompt], responses: Sequence[str], limit: int
    ) -> list[list[Sequence[float]]]:
        """Return the token log-probabilities of each text in the query for each response."""
        readings = [self._read(*row) for row in zip(prompts, responses, strict=True)]
        self._note_truncated(sum(reading.truncated for reading in readings), limit)
        rows = zip(prompts, readings, strict=True)
        found = iter(
            self._model().language_model.logprobs(
                [TextState(prompt, reading.ids) for prompt, reading in rows for _ in reading.asked],
                [Chunk(ids) for reading in readings for ids in reading.asked],
            )
        )
        return [[next(found) for _ in reading.asked] for reading in readings]

    @abstractmethod
    def _read(self, prompt: Prompt, response: str) -> _Reading:
        """Make the query for a response, truncated to the available room."""

    @abstractmethod
    def _room(self, prompt: Prompt) -> int:
        """Return the tokens left for a response; raise `RewardError` if the prompt is too long."""


@named("fluency")
@dataclass(eq=False, repr=False)
class FluencyReward(_LanguageModelReward):
    """Mean log-probability (nats per token) of a response under a language model, at most 0.

    The text is encoded again, so its tokens can differ from the sampled ones. Special tokens inside
    it are read as plain text. An empty response scores the log-probability that the model stops
    immediately; the stop token of other responses does not count. The first response that is cut,
    to `max_length` or the room in the context, gives a warning.

    Repetitive text is probable, so combine this with `RepetitionPenalty` or another reward.

    Args:
        language_model: A model with `logprobs` and `encode_text` (`TransformersLM`, `ServerLM`),
            its name on the Hub, or its folder; None for the embedded SmolLM2.
        max_length: Maximum number of response tokens that count.
        name: Name in reports.

    Raises:
        RewardError: The language model cannot be loaded or has no stop tokens, or a prompt leaves
            no room in its context.

    Example:
        >>> prompt = Prompt.from_text("Why is the sky blue?")
        >>> texts = ["Because air scatters blue light.", "Scatters air because light blue."]
        >>> fluent, muddled = FluencyReward().score([prompt] * 2, texts)  # doctest: +SKIP
    """

    _: KW_ONLY
    max_length: int = 2048
    name: str = "fluency"

    cut = "response(s) to {} tokens or the room in the context, and the rest is ignored"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the mean log-probability (nats) of each response's tokens."""
        if not responses:
            return np.zeros(0)
        found = self._asked(prompts, responses, self.max_length)
        means = [[math.fsum(logs) / len(logs) for logs in row] for row in found]
        return np.array([np.logaddexp.reduce(row) for row in means], dtype=np.float64)

    def _read(self, prompt: Prompt, response: str) -> _Reading:
        prefix, loaded = self._prefix(prompt), self._model()
        ids = tuple(loaded.language_model.encode_text(response))
        kept = ids[: min(loaded.limit - len(prefix), self.max_length)]
        # An empty response is scored by all the tokens that could end it.
        stops = [(stop,) for stop in sorted(loaded.language_model.stop_token_ids)]
        return _Reading(prefix, [kept] if kept else stops, len(kept) < len(ids))

    def _length(self, reading: _Reading) -> int:
        return len(reading.ids) + len(reading.asked[0]) - 1

    def _room(self, prompt: Prompt) -> int:
        return int(self._model().limit) - len(self._prefix(prompt))

    def _prefix(self, prompt: Prompt) -> tuple[int, ...]:
        loaded: _Loaded = self._model()
        try:
            return loaded.language_model.encode_prompt(prompt)
        except ValueError as error:
            which = "" if isinstance(error, PromptTooLongError) else f", prompt {prompt.id!r}"
            raise RewardError(f"Reward model {self.name!r}{which}: {error}") from error

    def _load(self) -> _Loaded:
        language_model = language_model_of(self.language_model, self.name)
        if not language_model.stop_token_ids:
            raise RewardError(
                f"Reward model {self.name!r}: {language_model.name!r} has no stop tokens, which "
                "are needed to score empty responses. Pass a language model with stop tokens."
            )
        return _Loaded(language_model, language_model.context_length)


@named("judge")
@dataclass(eq=False, repr=False)
class JudgeReward(_LanguageModelReward):
    """The expected verdict of a language model on a response, given a rubric.

    Nothing is sampled or parsed. The score is the mean of the answers' values, weighted by the
    probability of each answer after the template's question. Special tokens inside its texts are
    read as plain text, but a response can still ask in words for a high score. Warnings: for the
    first response that is cut at its end, and for the first question whose answers have a total
    probability below `least_mass` (the template or the judge is unsuitable).

    Source: Liu et al., "G-Eval: NLG Evaluation using GPT-4 with Better Human Alignment", EMNLP
    2023. Deviations: exact probabilities, normalised over the answers, instead of frequencies in 20
    samples; no chain of thought before the answer.

    Args:
        language_model: See `FluencyReward`; the embedded SmolLM2 is too small to judge well.
        rubric: Describes which response deserves which answer. A string under `"rubric"` in a
            prompt's metadata replaces it for that prompt.
        template: The question, with the field `{response}`, and optionally `{rubric}`, `{prompt}`.
        answers: Two or more answers and their values; none can start with the tokens of another.
        chat: Whether the question is a user message; otherwise it is text to be continued.
        max_length: Maximum number of tokens of question and answer.
        least_mass: Total probability of the answers below which a warning is given.

    Raises:
        RewardError: The language model cannot be loaded, an answer starts with another one, or a
            prompt leaves no room for a response or has a rubric that is not text.

    Example:
        >>> judge = JudgeReward(
        ...     template="Request: {prompt}\\nResponse: {response}\\nIs this polite? Yes or No.",
        ...     answers=YES_NO,
        ... )
        >>> judge.score([Prompt.from_text("Hi")], ["Good day to you."])  # doctest: +SKIP
        array([0.7...])
    """

    _: KW_ONLY
    rubric: str = RUBRIC
    template: str = TEMPLATE
    answers: Mapping[str, float] = field(default_factory=lambda: ANSWERS)
    chat: bool = True
    max_length: int = 4096
    least_mass: float = 0.01
    name: str = "judge"

    num_unlikely = 0
    """The number of responses so far whose answers were all unlikely."""
    cut = "response(s) to fit into {} tokens with the template, and the rest is ignored"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "answers": dict(self.answers)}

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], between the lowest and the highest of the answers' values."""
        if not responses:
            return np.zeros(0)
        found = self._asked(prompts, responses, self._model().limit)
        logs = np.array([[math.fsum(values) for values in row] for row in found])
        mass = np.logaddexp.reduce(logs, axis=1)
        for prompt, value in zip(prompts, mass, strict=True):
            if not value > -np.inf:
                raise RewardError(
                    f"Reward model {self.name!r}, prompt {prompt.id!r}: expected the judge to give "
                    f"one of {list(self.answers)} a probability above 0, got 0 for all. Change the "
                    "template or the answers to match what the judge says."
                )
        unlikely = int(np.sum(np.exp(mass) < self.least_mass))
        message = (
            f"gives all answers together, for {unlikely} response(s), a probability below "
            f"{self.least_mass:g}: the judge would say something else. State the possible answers "
            "in the template, or use another judge"
        )
        self._note("num_unlikely", unlikely, message)
        shares = np.exp(logs - mass[:, None])
        return np.asarray(shares @ np.array(list(self.answers.values()), dtype=np.float64))

    def _read(self, prompt: Prompt, response: str) -> _Reading:
        loaded: _Loaded = self._model()
        ids = self._ids(prompt, response)
        if ids is not None:
            return _Reading(ids, loaded.answer_ids, truncated=False)
        kept, tokens = self._room(prompt), loaded.language_model.encode_text(response)
        while kept > 0 and ids is None:
            # A character of several tokens can be cut in the middle.
            ids = self._ids(prompt, loaded.language_model.decode(tokens[:kept]).rstrip("\ufffd"))
            # Inside the template, the same text can take a few more tokens.
            kept -= 1 + kept // 64
        return _Reading(ids or self._ids(prompt, "") or (), loaded.answer_ids, truncated=True)

    def _room(self, prompt: Prompt) -> int:
        limit, empty = int(self._model().limit), self._ids(prompt, "")
        if empty is None or len(empty) >= limit:
            raise RewardError(
                f"Reward model {self.name!r}: prompt {prompt.id!r} and the template leave no room "
                f"for a response in {limit} tokens. Shorten them, or raise max_length if the "
                "judge's context allows it."
            )
        return limit - len(empty)

    def _ids(self, prompt: Prompt, response: str) -> tuple[int, ...] | None:
        """Return the token ids of a question, or None if there are too many."""
        loaded: _Loaded = self._model()
        rubric = self._rubric(prompt)
        text = self.template.format(rubric=rubric, prompt=prompt.text, response=response)
        question = Prompt.from_text(text, prompt.id, chat=self.chat)
        try:
            ids = loaded.language_model.encode_prompt(question)
        except PromptTooLongError:
            return None
        except ValueError as error:
            raise RewardError(f"Reward model {self.name!r}: {error}") from error
        return ids if len(ids) <= loaded.limit else None

    def _rubric(self, prompt: Prompt) -> str:
        given = prompt.metadata.get("rubric")
        rubric = self.rubric if given is None else given
        if not isinstance(rubric, str) or not rubric.strip():
            raise RewardError(
                f"Reward model {self.name!r}: expected text under 'rubric' in the metadata of "
                f"prompt {prompt.id!r}, got {rubric!r}. Fix it, or remove it to use the reward's "
                "own rubric."
            )
        return rubric

    def _load(self) -> _Loaded:
        self._check_arguments()
        language_model = language_model_of(self.language_model, self.name)
        answer_ids = [tuple(language_model.encode_text(answer)) for answer in self.answers]
        self._check_answers(answer_ids)
        limit = min(self.max_length, language_model.context_length) - max(map(len, answer_ids))
        return _Loaded(language_model, limit, answer_ids)

    def _check_arguments(self) -> None:
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(self.template)} - {None}
        except ValueError as error:
            raise ValueError(
                f"template: {error}, in {self.template!r}. Write {{{{ for a literal {{."
            ) from error
        if "response" not in fields or not fields <= {"rubric", "prompt", "response"}:
            raise ValueError(
                f"template: expected the field {{response}}, and optionally {{rubric}} and "
                f"{{prompt}}, got {sorted(map(str, fields))}."
            )
        values = np.array(list(self.answers.values()), dtype=np.float64)
        if len(values) < 2 or not np.isfinite(values).all():
            got = dict(self.answers)
            raise ValueError(f"answers: expected two or more, each with a finite value, got {got}.")

    def _check_answers(self, answer_ids: Sequence[tuple[int, ...]]) -> None:
        """Raise `RewardError` unless the answers are disjoint events."""
        ids_of = dict(zip(self.answers, answer_ids, strict=True))
        for answer, ids in ids_of.items():
            if not ids:
                raise RewardError(
                    f"Reward model {self.name!r}: answer {answer!r} has no tokens. Use another."
                )
        for one, other in itertools.permutations(ids_of, 2):
            if ids_of[other][: len(ids_of[one])] == ids_of[one]:
                raise RewardError(
                    f"Reward model {self.name!r}: answer {other!r} starts with the tokens of "
                    f"{one!r}, whose probability would count for both. Use answers with different "
                    "first tokens, such as letters."
                )
