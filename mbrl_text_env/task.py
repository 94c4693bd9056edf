"""What the single and the vector environment share: the task without an episode.

All methods are batched. The single environment is a batch of one, so both give the same numbers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from os.path import commonprefix
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args

import numpy as np
from gymnasium import spaces

from mbrl_text_env.encoders import Encoder
from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.rewards.base import (
    ProcessRewardModel,
    RewardError,
    RewardModel,
    check_process,
    isolate_failures,
    score_responses,
    score_steps,
)
from mbrl_text_env.spaces import (
    ChunkSpace,
    as_token_ids,
    padded_chunk_space,
    unpadded,
)
from mbrl_text_env.task import (
    EmbeddingObservation,
    Observation,
    TextObservation,
    TokenObservation,
)
from mbrl_text_env.types import (
    ChunkRules,
    InvalidChunkError,
    Ledger,
    Prompt,
    TextState,
    append,
    initial,
    response_limit,
)

RewardMode = Literal["terminal", "delta", "process"]
ObservationMode = Literal["text", "tokens", "embedding"]
ActionFormat = Literal["chunk", "padded"]
_Score = tuple[float, dict[str, float]]


class TaskOptions(TypedDict, total=False):
    """The keyword arguments of `TextTask`, which the environments pass on to it."""

    reward: RewardMode
    observation: ObservationMode
    encoder: Encoder | None
    max_response_tokens: int
    max_chunk_tokens: int
    max_prompt_tokens: int | None
    action_format: ActionFormat


class Outcome(NamedTuple):
    """What one environment returns of a step or a reset.

    Args:
        state: The state after it.
        response: Its decoded response prefix.
        reward: float.
        score: The score of the response: of the whole one where it has ended, of the prefix under
            `reward="delta"`, otherwise None.
        info: For the user; new at every call and deterministic.
    """

    state: TextState
    response: str
    reward: float
    score: float | None
    info: dict[str, Any]

    @property
    def terminated(self) -> bool:
        """The response ended with a stop token."""
        return self.state.finish_reason == "stop"

    @property
    def truncated(self) -> bool:
        """The response met a token limit."""
        return self.state.finish_reason == "length"


class TextTask:
    """Prompts, tokenizer, reward model, limits and ways to show a state.

    Args:
        prompts: Prompts to draw from; by default the train split of the package's own.
        tokenizer: A tokenizer or a language model; by default SmolLM2's tokenizer.
        reward_model: A reward model, a name or a weighted sum of names (see `rewards.make`), or a
            callable (see `rewards.as_reward_model`).
        reward: `"terminal"`: the score when the response ends, otherwise 0. `"delta"`: the increase
            of the prefix's score at every chunk, from 0 for no response, so that the rewards of an
            episode add up to the score. `"process"`: the process reward of each chunk.
        observation: `"text"`, `"tokens"` or `"embedding"`.
        encoder: Embeds texts for `observation="embedding"`; by default MiniLM.
        max_response_tokens: Token limit of a response.
        max_chunk_tokens: C, the most tokens in one chunk.
        max_prompt_tokens: P, the size of `"tokens"` observations; by default the longest prompt's.
        action_format: `"chunk"`: a `ChunkSpace`. `"padded"`: arrays of the fixed length C, for
            libraries that know Gymnasium's own spaces only; see `spaces.padded_chunk_space`.

    Attributes:
        ledger: Is charged for every score, where it is set; None by default.

    Raises:
        ValueError: There are no prompts, a limit is below 1, or a mode is unknown.
        RewardError: `reward="process"` meets a reward model that scores whole responses only.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt] | None = None,
        tokenizer: Tokenizer | None = None,
        reward_model: RewardModel | Callable[..., Any] | str = "sentiment",
        *,
        reward: RewardMode = "terminal",
        observation: ObservationMode = "text",
        encoder: Encoder | None = None,
        max_response_tokens: int = 128,
        max_chunk_tokens: int = 16,
        max_prompt_tokens: int | None = None,
        action_format: ActionFormat = "chunk",
    ) -> None:
        one_of("action_format", action_format, ActionFormat)
        one_of("reward", reward, RewardMode)
        one_of("observation", observation, ObservationMode)
        if max_response_tokens < 1 or max_chunk_tokens < 1:
            raise ValueError(
                "max_response_tokens and max_chunk_tokens must be at least 1, got "
                f"{max_response_tokens} and {max_chunk_tokens}."
            )
        from mbrl_text_env.language_models.registry import embedded_tokenizer
        from mbrl_text_env.rewards import as_reward_model

        self.prompts = _prompts(prompts)
        self.tokenizer = embedded_tokenizer() if tokenizer is None else tokenizer
        self.reward_model = as_reward_model(reward_model)
        self.ledger: Ledger | None = None
        if reward == "process":
            check_process(self.reward_model)
        self.reward: RewardMode = reward
        self.action_format: ActionFormat = action_format
        self._part_names = self.reward_model.part_names or ()
        self.max_response_tokens = max_response_tokens
        self.rules = ChunkRules(
            self.tokenizer.vocab_size, self.tokenizer.stop_token_ids, max_chunk_tokens
        )
        self.observation = self._observation(observation, encoder, max_prompt_tokens)

    def action_space(self) -> ChunkSpace | spaces.MultiDiscrete:
        """A new space of chunks, in the action format."""
        padded = self.action_format == "padded"
        return padded_chunk_space(self.rules) if padded else ChunkSpace(self.rules)

    def choose_prompt(
        self, generator: np.random.Generator, options: dict[str, Any] | None
    ) -> Prompt:
        """The prompt that `options["prompt"]` names (a `Prompt`, id or index), or a random one.

        A number is drawn in either case, so that naming a prompt leaves later draws as they are.

        Raises:
            ValueError: An option or a prompt is unknown.
        """
        drawn = int(generator.integers(len(self.prompts)))
        if not options:
            return self.prompts[drawn]
        if set(options) != {"prompt"}:
            raise ValueError(
                f"options: expected {{'prompt': ...}}, got the keys {sorted(options)}."
            )
        return self._named_prompt(options["prompt"])

    def start(self, prompt: Prompt) -> Outcome:
        """Begin a response."""
        return self.resume(initial(prompt, self.tokenizer))

    def resume(self, state: TextState) -> Outcome:
        """Go on from any state."""
        response = self.tokenizer.decode(state.response_ids)
        return Outcome(state, response, 0.0, None, self._info(state, response, cut=False))

    def advance(self, outcomes: Sequence[Outcome], actions: Sequence[Any]) -> list[Outcome]:
        """Step each state with its action: one reward call for all.

        Raises:
            EpisodeEndedError: A response has ended already.
            InvalidChunkError: An action is not a chunk.
            RewardError: The reward model failed.
        """
        appended = [
            self._append(outcome.state, action)
            for outcome, action in zip(outcomes, actions, strict=True)
        ]
        states = [state for state, _ in appended]
        responses = [self.tokenizer.decode(state.response_ids) for state in states]
        scores = self._scores(states, responses)
        rewards = self._rewards(outcomes, states, scores)
        rest = zip(appended, responses, rewards, scores, strict=True)
        return [
            Outcome(
                state,
                response,
                reward,
                score[0] if score else None,
                self._info(state, response, cut, score),
            )
            for (state, cut), response, reward, score in rest
        ]

    def advance_apart(
        self,
        outcomes: Sequence[Outcome],
        actions: Sequence[Any],
        failed_reward: float,
        errors: Sequence[RewardError | None],
    ) -> list[Outcome]:
        """`advance` where a failure of the reward model ends the episode that it belongs to alone.

        It ends without a score but with `failed_reward`, and `info["reward_error"]` says why.
        Nothing is scored where `errors`, one an outcome, has what has failed already.
        """
        rows = list(zip(outcomes, actions, strict=True))
        going = [row for row, error in zip(rows, errors, strict=True) if error is None]
        advanced = iter(
            isolate_failures(
                lambda some: self.advance([row[0] for row in some], [row[1] for row in some]), going
            )
        )
        results = [next(advanced) if error is None else error for error in errors]
        return [
            self._failed(*row, result, failed_reward) if isinstance(result, RewardError) else result
            for row, result in zip(rows, results, strict=True)
        ]

    def observe(self, outcomes: Sequence[Outcome]) -> list[Any]:
        """One observation for each outcome."""
        return self.observation.observe(
            [outcome.state for outcome in outcomes], [outcome.response for outcome in outcomes]
        )

    def check_state(self, state: object) -> TextState:
        """Refuse what is no state (TypeError), or one with too long a response (ValueError)."""
        if not isinstance(state, TextState):
            raise TypeError(
                f"Expected a TextState as returned by get_state(), got {type(state).__name__}."
            )
        if len(state.response_ids) > self.max_response_tokens:
            raise ValueError(
                f"The state's response has {len(state.response_ids)} tokens, but this environment "
                f"allows {self.max_response_tokens}. Make it with a larger max_response_tokens."
            )
        return state

    def _append(self, before: TextState, action: Any) -> tuple[TextState, bool]:
        """The state after an action, and whether the action was cut."""
        ids = as_token_ids(action)
        if ids is None:
            raise InvalidChunkError(
                "Invalid action: expected the token ids of a chunk (an integer array or tensor of "
                f"one axis, or a list or tuple of ints), got "
                f"{type(action).__name__} {action!r:.80}."
            )
        if self.action_format == "padded" and len(ids) <= self.rules.max_chunk_tokens:
            ids = unpadded(ids, self.rules)
        limit = response_limit(before, self.tokenizer, self.max_response_tokens)
        state = append(before, tuple(ids), self.rules.finish_reason(ids), limit)
        return state, len(state.response_ids) - len(before.response_ids) < len(ids)

    def _failed(
        self, outcome: Outcome, action: Any, error: RewardError, failed_reward: float
    ) -> Outcome:
        """The end of an episode whose response cannot be scored."""
        state, cut = self._append(outcome.state, action)
        if state.finish_reason is None:
            state = replace(state, finish_reason="length")
        response = self.tokenizer.decode(state.response_ids)
        nothing = float("nan"), dict.fromkeys(self._part_names, float("nan"))
        info = {**self._info(state, response, cut, nothing), "reward_error": str(error)}
        return Outcome(state, response, failed_reward, None, info)

    def _info(
        self,
        state: TextState,
        response: str,
        cut: bool,
        score: _Score | None = None,
    ) -> dict[str, Any]:
        """What the user is told: the same keys and types from the first step to the last."""
        if score is None or state.finish_reason is None:
            score = 0.0, dict.fromkeys(self._part_names, 0.0)
        return {
            "prompt_id": state.prompt.id,
            "prompt": state.prompt.text,
            "response": response,
            "finish_reason": state.finish_reason or "",
            "chunk_cut": cut,
            "score": score[0],
            "score_parts": score[1],
        }

    def _scored(self, rows: Sequence[tuple[TextState, str]]) -> list[_Score]:
        """Score and parts of responses, in one call."""
        scores = score_responses(
            self.reward_model,
            [state.prompt for state, _ in rows],
            [response for _, response in rows],
            ledgers=None if self.ledger is None else [self.ledger] * len(rows),
        )
        return [(float(total), scores.parts_of(i)) for i, total in enumerate(scores.total)]

    def _scores(self, states: Sequence[TextState], responses: Sequence[str]) -> list[_Score | None]:
        """Scores of the responses that need them: ended ones, and under delta all."""
        found: list[_Score | None] = [None] * len(states)
        everything = self.reward == "delta"
        wanted = [i for i, s in enumerate(states) if everything or s.finish_reason is not None]
        if wanted:
            scored = self._scored([(states[i], responses[i]) for i in wanted])
            for i, score in zip(wanted, scored, strict=True):
                found[i] = score
        return found

    def _rewards(
        self,
        outcomes: Sequence[Outcome],
        states: Sequence[TextState],
        scores: Sequence[_Score | None],
    ) -> list[float]:
        if self.reward == "process":
            model = cast("ProcessRewardModel", self.reward_model)
            steps = ((state.prompt, step_texts(state, self.tokenizer)) for state in states)
            return [float(score_steps(model, *row, ledger=self.ledger)[-1]) for row in steps]
        totals = [score[0] if score else 0.0 for score in scores]
        if self.reward == "terminal":
            return totals
        # Of the prefixes before the step only those of restored states have to be scored.
        missing = [o for o in outcomes if o.state.response_ids and o.score is None]
        found = iter(self._scored([(o.state, o.response) for o in missing]) if missing else ())
        before = [
            0.0 if not o.state.response_ids else next(found)[0] if o.score is None else o.score
            for o in outcomes
        ]
        return [total - earlier for total, earlier in zip(totals, before, strict=True)]

    def _observation(
        self, mode: ObservationMode, encoder: Encoder | None, max_prompt_tokens: int | None
    ) -> Observation:
        if mode == "text":
            return TextObservation()
        if mode == "tokens":
            if max_prompt_tokens is None:
                lengths = (len(self.tokenizer.encode_prompt(prompt)) for prompt in self.prompts)
                max_prompt_tokens = max(lengths)
            return TokenObservation(
                self.rules.vocab_size, max_prompt_tokens, self.max_response_tokens
            )
        from mbrl_text_env.language_models.registry import embedded_encoder

        return EmbeddingObservation(
            cast("Encoder", embedded_encoder()) if encoder is None else encoder
        )

    def _named_prompt(self, wanted: object) -> Prompt:
        if isinstance(wanted, Prompt):
            return wanted
        index = isinstance(wanted, int | np.integer) and not isinstance(wanted, bool)
        if index and 0 <= cast("int", wanted) < len(self.prompts):
            return self.prompts[cast("int", wanted)]
        for prompt in self.prompts:
            if prompt.id == wanted:
                return prompt
        raise ValueError(
            f"options['prompt']: expected a Prompt, the id of one of {len(self.prompts)} prompts, "
            f"or an index below {len(self.prompts)}; got {wanted!r}."
        )


def step_texts(state: TextState, tokenizer: Tokenizer) -> list[str]:
    """The text of each chunk of a response; joined, they are the response; see `added_text`."""
    response = tokenizer.decode(state.response_ids)
    ends = [0]
    for end in state.chunk_ends[:-1]:
        rest = added_text(tokenizer.decode(state.response_ids[:end]), response)
        ends.append(max(ends[-1], len(response) - len(rest)))
    return [response[start:end] for start, end in pairwise([*ends, len(response)])]


def added_text(before: str, after: str) -> str:
    """What decoding more tokens has added to a text.

    A character whose bytes two chunks share is shown as a replacement mark until it is whole; it
    belongs to the chunk that completes it.

    Example:
        >>> added_text("caf\ufffd", "caf\u00e9!")
        '\u00e9!'
    """
    shared = commonprefix([before, after])  # noqa: RUF071 character by character is what is meant
    return after[len(shared) :]


def one_of(name: str, value: object, allowed: Any) -> None:
    """Refuse an argument that is not among the values of a `Literal`."""
    if value not in get_args(allowed):
        raise ValueError(f"{name}: expected one of {list(get_args(allowed))}, got {value!r}.")


def _prompts(prompts: Sequence[Prompt] | None) -> tuple[Prompt, ...]:
    from mbrl_text_env.prompts import as_prompts, load_prompts

    if prompts is None:
        return tuple(load_prompts(split="train"))
    found = as_prompts(prompts)
    if not found:
        raise ValueError("prompts: expected at least one prompt, got an empty sequence.")
    return tuple(found)


def _one_thread() -> None:
    """A forked process has none of its parent's threads: OpenMP would wait for them for ever."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if "threadpoolctl" in sys.modules:
        sys.modules["threadpoolctl"].threadpool_limits(1)


# For environments that `AsyncVectorEnv` and others make or use in forked processes.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread)
