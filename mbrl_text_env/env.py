"""Text generation as a Gymnasium environment: `mbrl_text_env/TextGeneration-v0`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import gymnasium as gym
from gymnasium.vector import VectorWrapper

from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.rendering import as_frame, as_text, show
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.task import Outcome, TaskOptions, TextTask
from mbrl_text_env.types import Prompt, TextState


class TextGenerationEnv(gym.Env[Any, Any]):
    """Write a response to a prompt, chunk by chunk.

    An action is a chunk of 1 to `max_chunk_tokens` token ids. A stop token ends the episode with
    `terminated`, the token limit with `truncated`; either way the response is scored, once. A chunk
    that would pass the limit is cut there, and `info["chunk_cut"]` is True.

    `info` has the same keys and types from the first step to the last: `prompt_id`, `prompt`,
    `response`, `finish_reason` (`""`, `"stop"` or `"length"`), `chunk_cut`, and `score` and
    `score_parts`, which are 0 until the end. The parts of a reward that does not name them
    beforehand (`part_names`) are there at the end only. The environment holds no language model.

    Args:
        prompts: Prompts to draw from; by default the train split of the package's own.
        tokenizer: A tokenizer or a language model; by default SmolLM2's tokenizer.
        reward_model: A reward model, a name such as `"sentiment"` or `"0.5*sentiment+relevance"`,
            or a callable.
        reward, observation, encoder, max_response_tokens, max_chunk_tokens, max_prompt_tokens,
            action_format: See `TextTask`.
        render_mode: `"ansi"` (`render` returns a string), `"rgb_array"` (a frame, uint8[480, 640,
            3]), `"human"` (Rich prints after every step), or None.

    Example:
        >>> import gymnasium as gym, mbrl_text_env
        >>> env = gym.make("mbrl_text_env/TextGeneration-v0")  # doctest: +SKIP
        >>> observation, info = env.reset(seed=0)  # doctest: +SKIP
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["ansi", "human", "rgb_array"],
        "render_fps": 4,
    }
    kept_if_a_step_fails = ("_outcome",)

    def __init__(
        self,
        prompts: Sequence[Prompt] | None = None,
        tokenizer: Tokenizer | None = None,
        reward_model: RewardModel | Callable[..., Any] | str = "sentiment",
        *,
        render_mode: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> None:
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.task = TextTask(prompts, tokenizer, reward_model, **options)
        self.render_mode = render_mode
        self.action_space = self.task.action_space()
        self.observation_space = self.task.observation.space
        self._outcome: Outcome | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin a response to a random prompt or to `options["prompt"]` (Prompt, id, index)."""
        super().reset(seed=seed)
        prompt = self.task.choose_prompt(self.np_random, options)
        return self._show(self.task.start(prompt))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Append a chunk of token ids (an integer array or tensor [n], or a list or tuple of ints).

        Raises:
            ResetNeeded: There was no `reset` before.
            EpisodeEndedError: The response has ended.
            InvalidChunkError: The action is not a chunk.
            RewardError: The reward model failed; the state is as it was before the step.
        """
        (outcome,) = self.task.advance([self._current()], [action])
        observation, info = self._show(outcome)
        return observation, outcome.reward, outcome.terminated, outcome.truncated, info

    def get_state(self) -> TextState:
        """The state: frozen and picklable, nothing is copied.

        It holds the episode, not the generator that draws the prompts of later ones.

        Raises:
            ResetNeeded: There was no `reset` before.
        """
        return self._current().state

    def set_state(self, state: TextState) -> tuple[Any, dict[str, Any]]:
        """Go on from a state of this or of an equal environment; returns what `reset` would.

        Raises:
            TypeError: It is no `TextState`.
            ValueError: Its response is longer than the limit.
        """
        return self._show(self.task.resume(self.task.check_state(state)))

    def render(self) -> Any:
        """The prompt and the response: returned as a string or a frame, or printed."""
        if self.render_mode is None:
            gym.logger.warn(
                "render() does nothing without a render mode: gym.make(id, render_mode=...)"
            )
            return None
        outcome = self._current()
        if self.render_mode == "ansi":
            return as_text(outcome)
        if self.render_mode == "rgb_array":
            return as_frame(outcome)
        show(outcome)
        return None

    def _current(self) -> Outcome:
        if self._outcome is None:
            raise gym.error.ResetNeeded(
                "Call `reset()` before `step()`, `get_state()` or `render()`."
            )
        return self._outcome

    def _show(self, outcome: Outcome) -> tuple[Any, dict[str, Any]]:
        (observation,) = self.task.observe([outcome])
        self._outcome = outcome
        if self.render_mode == "human":
            show(outcome)
        return observation, outcome.info


def text_env(env: gym.Env[Any, Any]) -> TextGenerationEnv:
    """The text environment inside wrappers.

    Raises:
        TypeError: There is none.
    """
    base = env.unwrapped
    if not isinstance(base, TextGenerationEnv):
        raise TypeError(f"Expected a TextGenerationEnv inside, got {type(base).__name__}.")
    return base


def check_render_mode(render_mode: str | None, known: list[str]) -> None:
    """Refuse a render mode that an environment does not have."""
    if render_mode not in (None, *known):
        raise ValueError(f"render_mode: expected None or one of {known}, got {render_mode!r}.")


@contextmanager
def unchanged_if_it_fails(env: Any) -> Iterator[None]:
    """Put back what a step or a reset has changed, in all layers of an environment, if it raises.

    The attributes of a layer are those that its class lists in `kept_if_a_step_fails`.
    """
    layers = [env]
    while isinstance(layers[-1], (gym.Wrapper, VectorWrapper)):
        layers.append(layers[-1].env)
    kept = []
    for layer in layers:
        for name in getattr(type(layer), "kept_if_a_step_fails", ()):
            value = getattr(layer, name)
            kept.append((layer, name, list(value) if isinstance(value, list) else value))
    try:
        yield
    except BaseException:
        for layer, name, value in kept:
            setattr(layer, name, value)
        raise
