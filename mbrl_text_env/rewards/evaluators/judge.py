"""A language model as a judge: how probable its possible verdicts are."""

from __future__ import annotations

import itertools
import math
import string
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
"""Answers for a template that asks a question; the score is P(Yes) / (P(Yes) + P(No))."""

_FIELDS = ("rubric", "prompt", "response")


@named("judge")
@dataclass(eq=False, repr=False)
class JudgeReward(Evaluator):
    """The verdict that a language model is expected to give on a response, by a rubric.

    Nothing is sampled or parsed: the score is the mean of the answers' values, weighted by the
    probabilities (`logprobs`) that each comes next after the template's question.

    Special tokens written out in prompt, response, rubric or template are read as ordinary text, so
    nothing can end the message or write the judge's answer. A response may still ask in plain words
    for a good mark. One that does not fit into `max_length` with the rest is cut at its end. The
    first such cut, and the first question whose answers together are less probable than
    `least_mass` (template or judge do not suit), gives a warning.

    Source: Liu et al., "G-Eval: NLG Evaluation using GPT-4 with Better Human Alignment", EMNLP
    2023. Deviations: exact probabilities rather than frequencies of 20 samples, divided by their
    sum over the answers; no chain of thought before the answer.

    Args:
        language_model: One with `logprobs` (`TransformersLM`, `ServerLM`), its name on the Hub or
            folder; None for the embedded SmolLM2, which is too small to judge well.
        rubric: What deserves which answer. A string under `"rubric"` in a prompt's metadata takes
            its place for that prompt.
        template: The question, with the fields `{rubric}`, `{prompt}` and `{response}`
            (`str.format`); `{response}` is required.
        answers: The value of each answer, two or more. Each is encoded as a text of its own, and
            none may begin with the tokens of another.
        chat: Whether the question is a user message of the judge's chat template; otherwise plain
            text, which the answer continues.
        max_length: Most tokens of question and answer.
        least_mass: Probability of all answers together below which a warning is given.
        name: What reports call it.

    Attributes:
        num_truncated: Responses that were cut so far.
        num_unlikely: Responses so far whose answers were all unlikely.

    Raises:
        RewardError: The language model cannot be loaded; an answer has no tokens, or begins with
            another; a prompt's rubric is no text, or the prompt leaves no room for a response; or
            all answers have a probability of 0.
        ValueError: At first use: the template has other fields, or an argument is out of its range.

    Example:
        >>> judge = JudgeReward(
        ...     template="Request: {prompt}\\nResponse: {response}\\nIs this polite? Yes or No.",
        ...     answers=YES_NO,
        ... )
        >>> judge.score([Prompt.from_text("Hi")], ["Good day to you."])  # doctest: +SKIP
        array([0.7...])
    """

    language_model: LanguageModel | str | Path | None = None
    _: KW_ONLY
    rubric: str = RUBRIC
    template: str = TEMPLATE
    answers: Mapping[str, float] = field(default_factory=lambda: ANSWERS)
    chat: bool = True
    max_length: int = 4096
    least_mass: float = 0.01
    name: str = "judge"

    num_unlikely = 0
    cuts = (
        "response(s) to fit into {} tokens with the template; the rest of them does not count",
        "judge's context",
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "answers": dict(self.answers)}

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the prompt leaves room for a response, and its rubric, if any, is text."""
        try:
            self._room(prompt)
        except RewardError:
            return False
        return True

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], from the least of the answers' values to the greatest."""
        if not responses:
            return np.zeros(0)
        loaded: _Loaded = self._model()
        questions = [self._question(*row) for row in zip(prompts, responses, strict=True)]
        self._note_truncated(sum(q.truncated for q in questions), loaded.question_limit)
        found = loaded.language_model.logprobs(
            [
                TextState(p, q.ids)
                for p, q in zip(prompts, questions, strict=True)
                for _ in self.answers
            ],
            [Chunk(ids) for _ in questions for ids in loaded.answer_ids],
        )
        logs = np.array([math.fsum(values) for values in found]).reshape(len(responses), -1)
        mass = np.logaddexp.reduce(logs, axis=1)
        for prompt, value in zip(prompts, mass, strict=True):
            if not value > -np.inf:
                raise RewardError(
                    f"Reward model {self.name!r}, prompt {prompt.id!r}: expected the judge to give "
                    f"one of {list(self.answers)} a probability above 0, got none. Change template "
                    "or answers, so that they are what the judge would say."
                )
        self._note_unlikely(int(np.sum(np.exp(mass) < self.least_mass)))
        shares = np.exp(logs - mass[:, None])
        return np.asarray(shares @ np.array(list(self.answers.values()), dtype=np.float64))

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], what the language model says that judging each response takes.

        An upper bound: beginnings of questions that it has cached are not computed again.
        """
        questions = [self._question(*row) for row in zip(prompts, responses, strict=True)]
        return np.array([self._usage(len(q.ids)) for q in questions], dtype=np.float64)

    def flops_bound(self) -> float:
        """The most that one response can take: a question that fills `max_length`."""
        return self._usage(self._model().question_limit)

    def _usage(self, tokens: int) -> float:
        loaded: _Loaded = self._model()
        # The last token of an answer is judged, but nothing is asked of what follows it.
        new_tokens = [len(ids) - 1 for ids in loaded.answer_ids]
        return loaded.language_model.usage_bound(tokens, new_tokens).lm_flops

    def _question(self, prompt: Prompt, response: str) -> _Question:
        """The judge's prompt, in which the response is as long as there is room for."""
        loaded: _Loaded = self._model()
        ids = self._ids(prompt, response)
        if ids is not None:
            return _Question(ids, truncated=False)
        kept, tokens = self._room(prompt), loaded.encoder.ids(response)
        while kept > 0:
            # A character of several tokens may have been cut in two.
            cut = loaded.language_model.decode(tokens[:kept]).rstrip("\ufffd")
            ids = self._ids(prompt, cut)
            if ids is not None:
                return _Question(ids, truncated=True)
            # Encoded again and among other text, the tokens may be a few more.
            kept -= 1 + kept // 64
        return _Question(self._empty(prompt), truncated=True)

    def _room(self, prompt: Prompt) -> int:
        """Tokens that are left for a response, at least 1."""
        room = self._model().question_limit - len(self._empty(prompt))
        if room < 1:
            raise self._no_room(prompt)
        return room

    def _empty(self, prompt: Prompt) -> tuple[int, ...]:
        """The question about an empty response."""
        ids = self._ids(prompt, "")
        if ids is None:
            raise self._no_room(prompt)
        return ids

    def _no_room(self, prompt: Prompt) -> RewardError:
        return RewardError(
            f"Reward model {self.name!r}: prompt {prompt.id!r} and the template leave no room for "
            f"a response in {self._model().question_limit} tokens. Shorten them, or raise "
            "max_length if the judge's context allows it."
        )

    def _ids(self, prompt: Prompt, response: str) -> tuple[int, ...] | None:
        """Token ids of a question; None if there are too many."""
        loaded: _Loaded = self._model()
        text = self.template.format(
            rubric=self._rubric(prompt),
            prompt=prompt.text,
            response=response,
        )
        try:
            ids = loaded.language_model.encode_prompt(
                Prompt.from_text(text, prompt.id, chat=self.chat)
            )
        except PromptTooLongError:
            return None
        except ValueError as error:
            raise RewardError(f"Reward model {self.name!r}: {error}") from error
        return ids if len(ids) <= loaded.question_limit else None

    def _rubric(self, prompt: Prompt) -> str:
        given = prompt.metadata.get("rubric")
        rubric = self.rubric if given is None else given
        if not isinstance(rubric, str) or not rubric.strip():
            raise RewardError(
                f"Reward model {self.name!r}: expected text under 'rubric' in the metadata of "
                f"prompt {prompt.id!r}, got {rubric!r}. Fix it, or leave it out for the reward's "
                "own rubric."
            )
        return rubric

    def _load(self) -> _Loaded:
        self._check_arguments()
        language_model = language_model_of(self.language_model, self.name)
        encoder = TextEncoder(language_model)
        answer_ids = [encoder.ids(answer) for answer in self.answers]
        self._check_answers(answer_ids)
        limit = min(self.max_length, language_model.context_length) - max(map(len, answer_ids))
        return _Loaded(language_model, encoder, answer_ids, limit)

    def _check_arguments(self) -> None:
        check_at_least_one(self, "max_length")
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(self.template)} - {None}
        except ValueError as error:
            raise ValueError(
                f"template: {error}, in {self.template!r}. Write {{{{ for {{."
            ) from error
        if "response" not in fields or not fields <= set(_FIELDS):
            raise ValueError(
                f"template: expected the field {{response}}, and of others {{rubric}} and "
                f"{{prompt}} alone, got {sorted(map(str, fields))}."
            )
        values = list(self.answers.values())
        if len(values) < 2 or not np.isfinite(np.array(values, dtype=np.float64)).all():
            raise ValueError(
                "answers: expected two or more, each with a finite value, got "
                f"{dict(self.answers)}."
            )

    def _check_answers(self, answer_ids: Sequence[tuple[int, ...]]) -> None:
        """Refuse answers whose probabilities are not those of different events."""
        named = list(zip(self.answers, answer_ids, strict=True))
        for answer, ids in named:
            if not ids:
                raise RewardError(
                    f"Reward model {self.name!r}: answer {answer!r} has no tokens. Use another."
                )
        for (one, first), (other, second) in itertools.permutations(named, 2):
            if second[: len(first)] == first:
                raise RewardError(
                    f"Reward model {self.name!r}: answer {other!r} begins with the tokens of "
                    f"{one!r}, whose probability would count for both. Use answers that differ "
                    "from their first token on, such as letters."
                )

    def _note_unlikely(self, count: int) -> None:
        if count and not self.num_unlikely:
            warnings.warn(
                f"Reward model {self.name!r}: for {count} response(s) the judge gives all answers "
                f"together a probability below {self.least_mass:g}; it would say something else. "
                "Say in the template what to answer, or use another judge. `num_unlikely` counts "
                "further ones.",
                stacklevel=3,
            )
        self.num_unlikely += count


@dataclass(frozen=True)
class _Question:
    """Token ids of the judge's prompt, int[P], and whether the response in it was cut."""

    ids: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class _Loaded:
    """A judge, its answers' tokens, and the most tokens that a question may have."""

    language_model: LanguageModel
    encoder: TextEncoder
    answer_ids: list[tuple[int, ...]]
    question_limit: int
