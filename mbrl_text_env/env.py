"""Text generation as a Gymnasium environment, single (`TextGeneration-v0`) and vectorized."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, compress
from typing import Any, Literal, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.mdp import EpisodeEndedError, as_index, is_terminal
from mbrl_text_env.rewards.base import RewardError, RewardModel
from mbrl_text_env.task import Outcome, TextTask, as_frame, as_text, show
from mbrl_text_env.types import FloatArray, Prompt, TextState, check_positive, one_of

BoolArray = npt.NDArray[np.bool_]
OnRewardError = Literal["record", "raise"]
_StepResult = tuple[Any, FloatArray, BoolArray, BoolArray, dict[str, Any]]


class _TextEnv:
    """The task and the current outcomes (one, or N in the vector form)."""

    metadata: dict[str, Any]
    task: TextTask
    render_mode: str | None
    _outcomes: list[Outcome]

    def _begin(self, task: TextTask, render_mode: str | None) -> None:
        modes = self.metadata["render_modes"]
        if render_mode not in (None, *modes):
            raise ValueError(f"render_mode: expected None or one of {modes}, got {render_mode!r}.")
        self.task, self.render_mode, self._outcomes = task, render_mode, []

    def _current(self) -> list[Outcome]:
        if not self._outcomes:
            raise gym.error.ResetNeeded("Call `reset()` before anything else.")
        return self._outcomes


class TextGenerationEnv(_TextEnv, gym.Env[Any, Any]):
    """Write a response to a prompt, chunk by chunk.

    An action is a chunk of 1 to `max_chunk_tokens` token ids. A stop token sets `terminated`, and
    the token limit sets `truncated`. In both cases the response is scored once. A chunk that
    exceeds the limit is cut to fit, and `info["chunk_cut"]` is True.

    `info` has the same keys and types at every step: `prompt_id`, `prompt`, `response`,
    `finish_reason` (`""`, `"stop"` or `"length"`), `chunk_cut`, and `score` and `score_parts`,
    which are 0 until the end. If a reward does not declare its `part_names`, its parts appear only
    at the end. The environment does not contain a language model.

    Args:
        prompts, tokenizer, reward_model, **options: See `TextTask`.
        render_mode: `"ansi"` (`render` returns a string), `"rgb_array"` (a frame, uint8[480, 640,
            3]), `"human"` (Rich prints after every step), or None.

    Example:
        >>> import gymnasium as gym, mbrl_text_env
        >>> env = gym.make("mbrl_text_env/TextGeneration-v0")  # doctest: +SKIP
        >>> observation, info = env.reset(seed=0)  # doctest: +SKIP
    """

    metadata = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 4}  # noqa: RUF012
    kept_if_a_step_fails = ("_outcomes",)

    def __init__(
        self,
        prompts: Sequence[Prompt] | None = None,
        tokenizer: Tokenizer | None = None,
        reward_model: RewardModel | Callable[..., Any] | str = "sentiment",
        *,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        self._begin(TextTask(prompts, tokenizer, reward_model, **options), render_mode)
        self.action_space = self.task.action_space()
        self.observation_space = self.task.observation_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode with a random prompt or `options["prompt"]` (Prompt, id or index)."""
        super().reset(seed=seed)
        prompt = self.task.choose_prompt(self.np_random, options)
        return self._show(self.task.start(prompt))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Append a chunk of token ids (an integer array or tensor [n], or a list or tuple of ints).

        Raises:
            EpisodeEndedError, InvalidChunkError, RewardError: The state does not change.
        """
        (outcome,) = self.task.advance(self._current(), [action])
        observation, info = self._show(outcome)
        return observation, outcome.reward, outcome.terminated, outcome.truncated, info

    def get_state(self) -> TextState:
        """The state, frozen and picklable. It does not include the generator that draws prompts."""
        return self._current()[0].state

    def set_state(self, state: TextState) -> tuple[Any, dict[str, Any]]:
        """Restore a state of this or an equal environment; return the same values as `reset`."""
        return self._show(self.task.resume(self.task.check_state(state)))

    def render(self) -> Any:
        """Return the prompt and the response as a string or a frame, or print them."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render mode: gym.make(id, render_mode=...)")
            return None
        (outcome,) = self._current()
        if self.render_mode == "human":
            show(outcome)
            return None
        return as_text(outcome) if self.render_mode == "ansi" else as_frame(outcome)

    def _show(self, outcome: Outcome) -> tuple[Any, dict[str, Any]]:
        (observation,) = self.task.observe([outcome])
        self._outcomes = [outcome]
        if self.render_mode == "human":
            show(outcome)
        return observation, outcome.info


class TextGenerationVectorEnv(_TextEnv, VectorEnv[Any, Any, Any]):
    """The vector form of `TextGenerationEnv`, made by `gym.make_vec(id, num_envs=N)`.

    It returns the same values as `gymnasium.vector.SyncVectorEnv` over N single environments with
    the same seeds, but scores all responses in one call.

    By default, a response that cannot be scored raises an error, and no state changes. With
    `on_reward_error="record"`, only its own episode ends, with the reward `failed_reward` and as
    `truncated`, unless the response is already complete. `info["reward_error"]` holds the reason,
    `num_failed` counts the failure, and a warning reports it.

    Args:
        num_envs: N, at least 1.
        on_reward_error: `"raise"` or `"record"`.
        failed_reward: The reward of a failed step. Training on NaN, the default, makes network
            weights and Gymnasium's `NormalizeReward` NaN: drop such steps or pass a finite number.
        autoreset_mode: Gymnasium's `NextStep`, `SameStep` or `Disabled`.
        render_mode: None, `"ansi"` or `"rgb_array"`; `render` returns a tuple of N.
        prompts, tokenizer, reward_model, **options: See `TextTask`.

    Attributes:
        episode_started: bool[N], True for sub-environments that the last `reset` or `step` reset.
        final_states: With `SameStep`, the final states of the episodes that ended in the last step;
            None for the other sub-environments.
        num_failed: Number of responses so far that could not be scored.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012
    kept_if_a_step_fails = (
        *("_outcomes", "_generators", "_generator_states"),
        *("episode_started", "final_states", "num_failed"),
    )

    def __init__(
        self,
        num_envs: int = 1,
        prompts: Sequence[Prompt] | None = None,
        tokenizer: Tokenizer | None = None,
        reward_model: RewardModel | Callable[..., Any] | str = "sentiment",
        *,
        on_reward_error: OnRewardError = "raise",
        failed_reward: float = math.nan,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        check_positive(num_envs=num_envs)
        self._begin(TextTask(prompts, tokenizer, reward_model, **options), render_mode)
        one_of("on_reward_error", on_reward_error, OnRewardError)
        unused = on_reward_error == "raise" and not math.isnan(failed_reward)
        if math.isinf(failed_reward) or unused:
            raise ValueError(
                "failed_reward: expected a finite number (or NaN) together with "
                f"on_reward_error='record', got {failed_reward} and {on_reward_error!r}."
            )
        self.on_reward_error: OnRewardError = on_reward_error
        self.failed_reward = float(failed_reward)
        self.num_failed = 0
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_action_space = self.task.action_space()
        self.single_observation_space = self.task.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.episode_started = np.zeros(num_envs, dtype=np.bool_)
        self.final_states: list[TextState | None] = [None] * num_envs
        self._generators: list[np.random.Generator | None] = [None] * num_envs

    @property
    def states(self) -> list[TextState]:
        """The current states."""
        return [outcome.state for outcome in self._current()]

    def generator(self, index: int) -> np.random.Generator:
        """The random generator of a sub-environment."""
        generator = self._generators[index]
        if generator is None:
            generator = self._generators[index] = seeding.np_random()[0]
        return generator

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Reset all sub-environments, or those selected by `options["reset_mask"]` (bool[N]).

        `seed` is one int (sub-environment i gets seed + i) or one int for each sub-environment;
        `options["prompt"]` is as in `TextGenerationEnv.reset`.
        """
        n, rest = self.num_envs, dict(options or {})
        mask: Any = rest.pop("reset_mask", None)
        mask = np.ones(n, dtype=np.bool_) if mask is None else np.asarray(mask)
        if mask.shape != (n,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(
                f"options['reset_mask']: expected bool[{n}] with at least one True, got {mask!r}."
            )
        first: Any = as_index(seed)
        given: Any = [None] * n if seed is None else seed
        seeds = list(given) if first is None else [first + i for i in range(n)]
        if len(seeds) != n:
            raise ValueError(f"Expected {n} seeds, got {len(seeds)}.")
        with unchanged_if_it_fails(self):
            outcomes: list[Outcome | None] = [*self._outcomes] or [None] * n
            for i in np.flatnonzero(mask).tolist():
                if seeds[i] is not None:
                    self._generators[i] = seeding.np_random(seeds[i])[0]
                outcomes[i] = self._restarted(i, rest)
            if None in outcomes:
                raise gym.error.ResetNeeded("The first reset() must reset every sub-environment.")
            self._outcomes = [outcome for outcome in outcomes if outcome is not None]
            self.episode_started = mask
            infos = [o.info if m else {} for o, m in zip(self._outcomes, mask, strict=True)]
            return self._observations(), stack_infos(infos)

    def step(
        self, actions: Any, failures: Sequence[RewardError | None] | None = None
    ) -> _StepResult:
        """Step all sub-environments with one chunk each.

        With `NextStep`, a sub-environment that ended in the last step is reset, and its action is
        ignored. An error leaves all states unchanged. An error in `failures` means that the reward
        of that sub-environment has already failed, so its episode ends.

        Raises:
            ValueError, InvalidChunkError: There are not N actions, or one is not a chunk.
            EpisodeEndedError: With `Disabled`, a sub-environment has ended and was not reset.
            RewardError: The reward failed, and `on_reward_error` is `"raise"`.
        """
        before = self._current()
        actions = as_actions(actions, self.num_envs)
        ended = _ended(before)
        if self.autoreset_mode != AutoresetMode.NEXT_STEP and ended.any():
            raise EpisodeEndedError(
                f"Sub-environments {np.flatnonzero(ended).tolist()} have ended. Reset them with "
                "reset(options={'reset_mask': terminations | truncations})."
            )
        resets = ended if self.autoreset_mode == AutoresetMode.NEXT_STEP else np.zeros_like(ended)
        with unchanged_if_it_fails(self):
            rows = before, actions, failures or [None] * self.num_envs
            found = iter(self._advance(*(list(compress(row, ~resets)) for row in rows)))
            outcomes = [self._restarted(i) if r else next(found) for i, r in enumerate(resets)]
            self._outcomes, self.episode_started = outcomes, resets
            infos = [outcome.info for outcome in outcomes]
            if self.autoreset_mode == AutoresetMode.SAME_STEP:
                infos = self._restart_ended(outcomes)
            return (
                self._observations(),
                np.array([outcome.reward for outcome in outcomes], np.float64),
                np.array([outcome.terminated for outcome in outcomes], np.bool_),
                np.array([outcome.truncated for outcome in outcomes], np.bool_),
                stack_infos(infos),
            )

    @property
    def _generator_states(self) -> list[Any]:
        return [None if g is None else g.bit_generator.state for g in self._generators]

    @_generator_states.setter
    def _generator_states(self, states: list[Any]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            if generator is not None:
                generator.bit_generator.state = state

    def set_states(self, states: Sequence[TextState]) -> tuple[Any, dict[str, Any]]:
        """Restore N states (see `TextGenerationEnv.set_state`); return the same as `reset`."""
        if len(states) != self.num_envs:
            raise ValueError(f"Expected {self.num_envs} states, got {len(states)}.")
        with unchanged_if_it_fails(self):
            self._outcomes = [self.task.resume(self.task.check_state(state)) for state in states]
            self.episode_started = np.ones(self.num_envs, dtype=np.bool_)
            return self._observations(), stack_infos([o.info for o in self._outcomes])

    def render(self) -> tuple[Any, ...] | None:
        """Return the prompt and response of each sub-environment as text or as a frame."""
        if self.render_mode is None:
            return None
        draw = as_text if self.render_mode == "ansi" else as_frame
        return tuple(draw(outcome) for outcome in self._current())

    def _restart_ended(self, finals: Sequence[Outcome]) -> list[dict[str, Any]]:
        """Reset the ended episodes; return the infos, with `final_obs` and `final_info`."""
        ended, observations = _ended(finals), self.task.observe(finals)
        self._outcomes = [self._restarted(i) if ended[i] else o for i, o in enumerate(finals)]
        self.episode_started = ended
        self.final_states = [o.state if e else None for o, e in zip(finals, ended, strict=True)]
        rows = [dict(outcome.info) for outcome in self._outcomes]
        for i in np.flatnonzero(ended).tolist():
            rows[i].update(final_obs=observations[i], final_info=finals[i].info)
        return rows

    def _advance(
        self, outcomes: list[Outcome], actions: list[Any], failures: list[RewardError | None]
    ) -> list[Outcome]:
        """Step outcomes with their actions; reward failures are raised or recorded."""
        if self.on_reward_error == "raise":
            try:
                return self.task.advance(outcomes, actions)
            except RewardError as error:
                raise RewardError(
                    f"{error} No environment has been stepped. To end such episodes and continue, "
                    "set on_reward_error='record' and failed_reward to the reward for them."
                ) from error
        found = self.task.advance(outcomes, actions, failures)
        for i, outcome in enumerate(found):
            if (told := outcome.info.get("reward_error")) is not None:
                found[i] = outcome._replace(reward=self.failed_reward)
                self.num_failed += 1
                warnings.warn(
                    f"An episode ends without a score (reward {self.failed_reward}): {told}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return found

    def _restarted(self, index: int, options: dict[str, Any] | None = None) -> Outcome:
        return self.task.start(self.task.choose_prompt(self.generator(index), options))

    def _observations(self) -> Any:
        space = self.single_observation_space
        empty: Any = create_empty_array(space, self.num_envs)
        return concatenate(space, self.task.observe(self._outcomes), empty)


def _ended(outcomes: Sequence[Outcome]) -> BoolArray:
    return np.array([is_terminal(outcome.state) for outcome in outcomes], dtype=np.bool_)


def as_actions(actions: Any, num_envs: int) -> list[Any]:
    """A list of one action for each sub-environment; ValueError for another number."""
    try:
        found = list(actions)
    except TypeError:
        found = []
    if len(found) != num_envs:
        raise ValueError(f"Expected {num_envs} actions, got {actions!r:.80}.")
    return found


def stack_infos(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Convert the infos of sub-environments to Gymnasium's vector info.

    The result equals that of `VectorEnv._add_info`, but is built key by key, which is faster.

    Example:
        >>> stack_infos([{"score": 1.0}, {}])
        {'score': array([1., 0.]), '_score': array([ True, False])}
    """
    stacked: dict[str, Any] = {}
    for key in dict.fromkeys(chain.from_iterable(rows)):
        mask = np.array([key in row for row in rows], dtype=np.bool_)
        values = [row[key] for row in rows if key in row]
        if key != "final_obs" and isinstance(values[0], Mapping):
            stacked[key] = stack_infos([row.get(key, {}) for row in rows])
        else:
            stacked[key] = _column(values, mask, plain=key != "final_obs")
        stacked[f"_{key}"] = mask
    return stacked


def _column(values: list[Any], mask: BoolArray, plain: bool) -> npt.NDArray[Any]:
    first, given = values[0], cast("Any", values)
    if plain and isinstance(first, (bool, int, float, np.number)):
        column = np.zeros(len(mask), dtype=type(first))
    elif plain and isinstance(first, np.ndarray):
        column = np.zeros((len(mask), *first.shape), dtype=first.dtype)
    else:
        column = np.full(len(mask), None, dtype=object)
        given = np.fromiter(values, dtype=object, count=len(values))
    column[mask] = given
    return column


def text_env(env: gym.Env[Any, Any]) -> TextGenerationEnv:
    """The `TextGenerationEnv` inside wrappers; TypeError if there is none."""
    base = env.unwrapped
    if not isinstance(base, TextGenerationEnv):
        raise TypeError(f"Expected a TextGenerationEnv inside, got {type(base).__name__}.")
    return base


@contextmanager
def unchanged_if_it_fails(env: Any) -> Iterator[None]:
    """Restore all layers of an environment if a step or a reset raises.

    Each class lists the attributes to restore in `kept_if_a_step_fails`.
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
