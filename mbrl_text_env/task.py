"""The task that all environments share: prompts, rewards, observations and rendering.

All methods are batched. The single environment is a batch of one, so both give the same numbers.
"""

from __future__ import annotations

import functools
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import compress, pairwise
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mbrl_text_env.encoders import Encoder, encode_texts, prefix_text
from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.language_models.registry import embedded_encoder, embedded_tokenizer
from mbrl_text_env.mdp import (
    ChunkRules,
    InvalidChunkError,
    append,
    as_token_ids,
    initial,
    response_limit,
    unpadded,
)  # fmt: skip
from mbrl_text_env.prompts import as_prompts, load_prompts
from mbrl_text_env.rewards import base as rewards
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardError, RewardModel
from mbrl_text_env.spaces import ChunkSpace, UnicodeText, padded_chunk_space
from mbrl_text_env.types import Ledger, Prompt, TextState, check_positive, one_of

RewardMode = Literal["terminal", "delta", "process"]
ObservationMode = Literal["text", "tokens", "embedding"]
ActionFormat = Literal["chunk", "padded"]
_Score = tuple[float, dict[str, float]]
_NAN = float("nan")
_MAX_CHARACTERS = 2**31 - 1
# Gymnasium's checker warns about infinite bounds; embeddings never reach this one.
_LARGEST = float(np.finfo(np.float32).max)
# Sizes of a frame in pixels, and characters per line.
_WIDTH, _HEIGHT, _FONT_SIZE, _LINE, _MARGIN, _COLUMNS = 640, 480, 16, 21, 12, 72


class Outcome(NamedTuple):
    """The result of one step or reset of one environment."""

    state: TextState  # after it
    response: str  # decoded
    reward: float
    # Of a complete response, or of the prefix with `reward="delta"`; otherwise None.
    score: float | None
    info: dict[str, Any]  # for the user; a new dict at every call, deterministic

    @property
    def terminated(self) -> bool:
        """Whether the response ended with a stop token."""
        return self.state.finish_reason == "stop"

    @property
    def truncated(self) -> bool:
        """Whether the response ended at a token limit."""
        return self.state.finish_reason == "length"


class TextTask:
    """Prompts, tokenizer, reward model, limits, and formats of observations and actions.

    Args:
        prompts: Prompts to draw from; by default the train split of the builtin prompts.
        tokenizer: A tokenizer or a language model; by default SmolLM2's tokenizer.
        reward_model: Anything that `rewards.as_reward_model` accepts: a reward model, a name such
            as `"sentiment"` or `"0.5*sentiment+relevance"`, or a callable.
        reward: `"terminal"`: the score when the response ends, otherwise 0. `"delta"`: the increase
            in the prefix's score at each chunk; the score of an empty response counts as 0, so the
            return of an episode equals the score. `"process"`: the process reward of each chunk.
        observation: `"text"`: `{"prompt": str, "response": str}`. `"tokens"`: ids, padded on the
            right with 0, and their counts, `{"prompt_ids": int64[P], "prompt_length": int64,
            "response_ids": int64[R], "response_length": int64}`. `"embedding"`: one embedding of
            the prompt and the response prefix, float32[d].
        encoder: Embeds texts for `observation="embedding"`; by default MiniLM.
        max_response_tokens: R, the token limit of a response.
        max_chunk_tokens: C, the maximum number of tokens in a chunk.
        max_prompt_tokens: P; by default the length of the longest prompt.
        action_format: `"chunk"`: a `ChunkSpace`. `"padded"`: arrays of the fixed length C, for
            libraries that support only Gymnasium's own spaces; see `spaces.padded_chunk_space`.

    Attributes:
        ledger: If set, it is charged for every score; None by default.

    Raises:
        ValueError: There are no prompts, a limit is below 1, or a mode is unknown.
        RewardError: `reward="process"`, but the reward model can only score complete responses.
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
        check_positive(max_response_tokens=max_response_tokens, max_chunk_tokens=max_chunk_tokens)
        found = load_prompts(split="train") if prompts is None else as_prompts(prompts)
        if not found:
            raise ValueError("prompts: expected at least one prompt, got an empty sequence.")
        self.prompts = tuple(found)
        self.tokenizer = embedded_tokenizer() if tokenizer is None else tokenizer
        self.reward_model = as_reward_model(reward_model)
        self.ledger: Ledger | None = None
        if reward == "process":
            rewards.check_process(self.reward_model)
        self.reward: RewardMode = reward
        self.action_format: ActionFormat = action_format
        self.observation: ObservationMode = observation
        self._part_names = self.reward_model.part_names or ()
        self.max_response_tokens = max_response_tokens
        self.rules = ChunkRules(
            self.tokenizer.vocab_size, self.tokenizer.stop_token_ids, max_chunk_tokens
        )
        if observation == "tokens" and max_prompt_tokens is None:
            max_prompt_tokens = max(len(self.tokenizer.encode_prompt(p)) for p in self.prompts)
        self.max_prompt_tokens = max_prompt_tokens or 0
        if observation == "embedding":
            self.encoder: Any = embedded_encoder() if encoder is None else encoder
        self.observation_space = self._observation_space()

    def action_space(self) -> ChunkSpace | spaces.MultiDiscrete:
        """A new action space in the chosen format."""
        padded = self.action_format == "padded"
        return padded_chunk_space(self.rules) if padded else ChunkSpace(self.rules)

    def choose_prompt(
        self, generator: np.random.Generator, options: dict[str, Any] | None
    ) -> Prompt:
        """The prompt given by `options["prompt"]` (a `Prompt`, id or index), or a random one.

        A random number is drawn in both cases, so choosing a prompt does not change later draws.
        """
        drawn = int(generator.integers(len(self.prompts)))
        if not options:
            return self.prompts[drawn]
        if set(options) != {"prompt"}:
            keys = sorted(options)
            raise ValueError(f"options: expected {{'prompt': ...}}, got the keys {keys}.")
        wanted = options["prompt"]
        if isinstance(wanted, Prompt):
            return wanted
        index = isinstance(wanted, int | np.integer) and not isinstance(wanted, bool)
        if index and 0 <= wanted < len(self.prompts):
            return self.prompts[wanted]
        for prompt in self.prompts:
            if prompt.id == wanted:
                return prompt
        raise ValueError(
            f"options['prompt']: expected a Prompt, the id of one of {len(self.prompts)} prompts, "
            f"or an index below {len(self.prompts)}; got {wanted!r}."
        )

    def start(self, prompt: Prompt) -> Outcome:
        """Start a response to a prompt."""
        return self.resume(initial(prompt, self.tokenizer))

    def resume(self, state: TextState) -> Outcome:
        """Continue from any state."""
        return self._outcome(state, self.tokenizer.decode(state.response_ids))

    def advance(
        self,
        outcomes: Sequence[Outcome],
        actions: Sequence[Any],
        failures: Sequence[RewardError | None] | None = None,
    ) -> list[Outcome]:
        """Step each state with its action, with one reward call for all states.

        With `failures` (one per outcome), a failed reward ends only its own episode, without a
        score and with `info["reward_error"]`. States with an error in `failures` are not scored.
        """
        pairs = zip(outcomes, actions, strict=True)
        appended = [self.append(outcome.state, action) for outcome, action in pairs]
        responses = [self.tokenizer.decode(state.response_ids) for state, _ in appended]
        steps = zip(outcomes, (state for state, _ in appended), responses, strict=True)
        paid: Iterable[tuple[float, _Score | None] | RewardError]
        if failures is None:
            paid = self._paid(list(steps))
        else:
            going = list(compress(steps, [error is None for error in failures]))
            found = iter(rewards.isolate_failures(self._paid, going))
            paid = [next(found) if error is None else error for error in failures]
        rows = zip(appended, responses, paid, strict=True)
        return [
            self._after(state, response, cut, result) for (state, cut), response, result in rows
        ]

    def _after(
        self,
        state: TextState,
        response: str,
        cut: bool,
        result: tuple[float, _Score | None] | RewardError,
    ) -> Outcome:
        if not isinstance(result, RewardError):
            return self._outcome(state, response, cut, *result)
        state = replace(state, finish_reason=state.finish_reason or "length")
        nothing = _NAN, dict.fromkeys(self._part_names, _NAN)
        ended = self._outcome(state, response, cut, _NAN, nothing, reward_error=str(result))
        return ended._replace(score=None)

    def observe(self, outcomes: Sequence[Outcome]) -> list[Any]:
        """One observation for each outcome; ValueError if a prompt is too long."""
        if self.observation == "text":
            return [{"prompt": o.state.prompt.text, "response": o.response} for o in outcomes]
        if self.observation == "embedding":
            texts = [prefix_text(o.state.prompt.text, o.response) for o in outcomes]
            return list(encode_texts(self.encoder, texts))
        rows = []
        for outcome in outcomes:
            state, row = outcome.state, cast("dict[str, Any]", {})
            if len(state.prompt_ids) > self.max_prompt_tokens:
                raise ValueError(
                    f"Prompt {state.prompt.id!r} has {len(state.prompt_ids)} tokens, but the "
                    f"observation holds {self.max_prompt_tokens}. Pass a larger max_prompt_tokens."
                )
            for part, ids, size in (
                ("prompt", state.prompt_ids, self.max_prompt_tokens),
                ("response", state.response_ids, self.max_response_tokens),
            ):
                row[f"{part}_ids"] = np.zeros(size, dtype=np.int64)
                row[f"{part}_ids"][: len(ids)] = ids
                row[f"{part}_length"] = np.int64(len(ids))
            rows.append(row)
        return rows

    def check_state(self, state: object) -> TextState:
        """Raise TypeError for other objects, ValueError if the response is too long."""
        if not isinstance(state, TextState):
            raise TypeError(
                f"Expected a TextState as returned by get_state(), got {type(state).__name__}."
            )
        length, most = len(state.response_ids), self.max_response_tokens
        if length > most:
            raise ValueError(
                f"The state's response has {length} tokens, but this environment allows {most}. "
                "Make it with a larger max_response_tokens."
            )
        return state

    def _observation_space(self) -> spaces.Space[Any]:
        if self.observation == "embedding":
            return feature_box(encode_texts(self.encoder, ["size"]).shape[1])
        if self.observation == "text":
            most = _MAX_CHARACTERS
            return spaces.Dict(prompt=UnicodeText(most), response=UnicodeText(most))
        prompt, response = self.max_prompt_tokens, self.max_response_tokens
        high = self.rules.vocab_size - 1
        return spaces.Dict(
            prompt_ids=spaces.Box(0, high, (prompt,), np.int64),
            prompt_length=spaces.Discrete(prompt + 1),
            response_ids=spaces.Box(0, high, (response,), np.int64),
            response_length=spaces.Discrete(response + 1),
        )

    def append(self, before: TextState, action: Any) -> tuple[TextState, bool]:
        """The state after an action, and whether the chunk was cut at the limit."""
        ids = as_token_ids(action)
        if ids is None:
            raise InvalidChunkError(
                "Invalid action: expected the token ids of a chunk (an integer array or tensor of "
                f"one axis, a list or tuple of ints), got {type(action).__name__} {action!r:.80}."
            )
        if self.action_format == "padded" and len(ids) <= self.rules.max_chunk_tokens:
            ids = unpadded(ids, self.rules)
        limit = response_limit(before, self.tokenizer, self.max_response_tokens)
        state = append(before, tuple(ids), self.rules.finish_reason(ids), limit)
        return state, len(state.response_ids) - len(before.response_ids) < len(ids)

    def _outcome(
        self,
        state: TextState,
        response: str,
        cut: bool = False,
        reward: float = 0.0,
        score: _Score | None = None,
        **more: Any,
    ) -> Outcome:
        """An outcome whose info has the same keys and types at every step."""
        ended = score is not None and state.finish_reason is not None
        total, parts = score if ended else (0.0, dict.fromkeys(self._part_names, 0.0))  # type: ignore[misc]
        info = {
            "prompt_id": state.prompt.id,
            "prompt": state.prompt.text,
            "response": response,
            "finish_reason": state.finish_reason or "",
            "chunk_cut": cut,
            "score": total,
            "score_parts": parts,
            **more,
        }
        return Outcome(state, response, reward, score[0] if score else None, info)

    def _scored(self, rows: Sequence[tuple[TextState, str]]) -> list[_Score]:
        if not rows:
            return []
        scores = rewards.score_responses(
            self.reward_model,
            [state.prompt for state, _ in rows],
            [response for _, response in rows],
            ledgers=None if self.ledger is None else [self.ledger] * len(rows),
        )
        return [(float(total), scores.parts_of(i)) for i, total in enumerate(scores.total)]

    def _paid(
        self, steps: Sequence[tuple[Outcome, TextState, str]]
    ) -> list[tuple[float, _Score | None]]:
        """Rewards and scores; only ended responses are scored, or all with "delta"."""
        wanted = [self.reward == "delta" or s.finish_reason is not None for _, s, _ in steps]
        found = iter(self._scored([(s, text) for _, s, text in compress(steps, wanted)]))
        scores = [next(found) if needed else None for needed in wanted]
        totals = [score[0] if score else 0.0 for score in scores]
        if self.reward == "process":
            model = cast("rewards.ProcessRewardModel", self.reward_model)
            parts = ((s.prompt, step_texts(s, self.tokenizer)) for _, s, _ in steps)
            totals = [
                float(rewards.score_steps(model, *row, ledger=self.ledger)[-1]) for row in parts
            ]
        elif self.reward == "delta":
            # Previous prefixes already have a score, except those of restored states.
            missing = [o for o, _, _ in steps if o.state.response_ids and o.score is None]
            found = iter(self._scored([(o.state, o.response) for o in missing]))
            for i, (before, _, _) in enumerate(steps):
                if before.state.response_ids:
                    totals[i] -= next(found)[0] if before.score is None else before.score
        return list(zip(totals, scores, strict=True))


def step_texts(state: TextState, tokenizer: Tokenizer) -> list[str]:
    """The text of each chunk of a response (see `added_text`); joined, the whole response."""
    response = tokenizer.decode(state.response_ids)
    ends = [0]
    for end in state.chunk_ends[:-1]:
        rest = added_text(tokenizer.decode(state.response_ids[:end]), response)
        ends.append(max(ends[-1], len(response) - len(rest)))
    return [response[start:end] for start, end in pairwise([*ends, len(response)])]


def added_text(before: str, after: str) -> str:
    """The text that was added by decoding more tokens.

    If two chunks share the bytes of a character, it is decoded as a replacement character until it
    is complete, and belongs to the chunk that completes it.

    Example:
        >>> added_text("caf\ufffd", "caf\u00e9!")
        '\u00e9!'
    """
    shared = commonprefix([before, after])  # noqa: RUF071 a comparison by character is intended
    return after[len(shared) :]


def feature_box(size: int) -> spaces.Box:
    """A space of feature vectors, float32[size]."""
    return spaces.Box(-_LARGEST, _LARGEST, (size,), np.float32)


def as_text(outcome: Outcome) -> str:
    """The prompt, the response and its finish reason."""
    prompt, ending = outcome.state.prompt.text, _ending(outcome)
    return f"Prompt: {prompt}\nResponse: {outcome.response} [{ending}]\n"


def as_frame(outcome: Outcome) -> npt.NDArray[np.uint8]:
    """An image of `as_text`, uint8[480, 640, 3], black on white; long texts are cut."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    drawing = ImageDraw.Draw(image)
    places = (_HEIGHT - 2 * _MARGIN) // _LINE
    prompt = _wrapped(f"Prompt: {outcome.state.prompt.text}")
    if len(prompt) > places // 2:
        prompt = [*prompt[: places // 2 - 1], "..."]
    response = _wrapped(f"Response: {outcome.response} [{_ending(outcome)}]")
    room = places - len(prompt)
    if len(response) > room:
        response = ["...", *response[1 - room :]]
    for row, line in enumerate([*prompt, *response]):
        colour = "dimgray" if row < len(prompt) else "black"
        drawing.text((_MARGIN, _MARGIN + row * _LINE), line, font=_font(), fill=colour)
    return np.asarray(image, dtype=np.uint8).copy()


def show(outcome: Outcome) -> None:
    """Print a state in a frame."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    title, tokens = Text(outcome.state.prompt.text), len(outcome.state.response_ids)
    told = f"{tokens} tokens, {_ending(outcome)}"
    Console().print(Panel(Text(outcome.response), title=title, subtitle=told))


def _ending(outcome: Outcome) -> str:
    score = "" if outcome.score is None else f", score {outcome.score:.3f}"
    return (outcome.state.finish_reason or "...") + score


def _wrapped(text: str) -> list[str]:
    lines = []
    for line in text.splitlines():
        # Unprintable characters, including lone surrogates, make the drawing fail.
        shown = "".join(c if c.isprintable() else "\ufffd" for c in line.expandtabs(4))
        lines.extend(textwrap.wrap(shown, _COLUMNS, drop_whitespace=False) or [""])
    return lines


@functools.cache
def _font() -> Any:
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    return ImageFont.truetype(str(path), _FONT_SIZE)


def _one_thread() -> None:
    """Use one thread: in a forked process, OpenMP would wait forever for the parent's threads."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if "threadpoolctl" in sys.modules:
        sys.modules["threadpoolctl"].threadpool_limits(1)


# `AsyncVectorEnv` and others run environments in forked processes.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread)
