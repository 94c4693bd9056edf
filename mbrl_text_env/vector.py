"""N text environments in one: one batched reward call a step for all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, Unpack

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from mbrl_text_env.env import check_render_mode, unchanged_if_it_fails
from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.mdp import EpisodeEndedError, is_terminal
from mbrl_text_env.rendering import as_frame, as_text
from mbrl_text_env.rewards.base import RewardError, RewardModel
from mbrl_text_env.spaces import as_index
from mbrl_text_env.task import Outcome, TaskOptions, TextTask, one_of
from mbrl_text_env.types import FloatArray, Prompt, TextState

BoolArray = npt.NDArray[np.bool_]
OnRewardError = Literal["record", "raise"]
_StepResult = tuple[Any, FloatArray, BoolArray, BoolArray, dict[str, Any]]


class TextGenerationVectorEnv(VectorEnv[Any, Any, Any]):
    """The vector form of `TextGenerationEnv`, made by `gym.make_vec(id, num_envs=N)`.

    It returns what `gymnasium.vector.SyncVectorEnv` over N single environments with the same seeds
    would, but scores all responses in one call.

    A response that the reward model cannot score raises, and no state is changed. With
    `on_reward_error="record"` it does not cost the others theirs: its episode ends (`truncated`,
    unless it ended by itself) with the reward `failed_reward`, `info["reward_error"]` says why,
    `num_failed` counts it, and a warning names it.

    Args:
        num_envs: N, at least 1.
        on_reward_error: `"raise"` or `"record"`, as said above.
        failed_reward: With `"record"`, the reward of an episode that ends without a score: a finite
            number for whatever learns from it. By default NaN, which makes all weights of a network
            NaN, and Gymnasium's `NormalizeReward` too: leave such steps out.
        autoreset_mode: Gymnasium's `NextStep`, `SameStep` or `Disabled`.
        render_mode: None, `"ansi"` (`render` returns a tuple of N strings) or `"rgb_array"` (of N
            frames).
        prompts, tokenizer, reward_model, **options: As in `TextGenerationEnv`.

    Attributes:
        states: The N current states.
        episode_started: bool[N], which sub-environments the last `reset` or `step` reset.
        final_states: Under `SameStep`, the states in which the last step's episodes ended; None for
            sub-environments that go on.
        num_failed: Responses that could not be scored so far.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,
    }
    kept_if_a_step_fails = (
        "_outcomes",
        "_generators",
        "_generator_states",
        "episode_started",
        "final_states",
        "num_failed",
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
        **options: Unpack[TaskOptions],
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs: expected at least 1, got {num_envs}.")
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.task = TextTask(prompts, tokenizer, reward_model, **options)
        one_of("on_reward_error", on_reward_error, OnRewardError)
        if math.isinf(failed_reward) or (
            on_reward_error == "raise" and failed_reward == failed_reward
        ):
            raise ValueError(
                "failed_reward: expected a finite number (or NaN) together with "
                f"on_reward_error='record', got {failed_reward} and {on_reward_error!r}."
            )
        self.on_reward_error: OnRewardError = on_reward_error
        self.failed_reward = float(failed_reward)
        self.num_failed = 0
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_action_space = self.task.action_space()
        self.single_observation_space = self.task.observation.space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.episode_started = np.zeros(num_envs, dtype=np.bool_)
        self.final_states: list[TextState | None] = [None] * num_envs
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._outcomes: list[Outcome] = []

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
        """Reset all sub-environments, or those of `options["reset_mask"]` (bool[N]).

        Args:
            seed: None, one int (sub-environment i gets seed + i), or one a sub-environment.
            options: `prompt` as in `TextGenerationEnv.reset`, and `reset_mask`.

        Raises:
            ValueError: The number of seeds or the mask does not fit.
        """
        rest = dict(options or {})
        mask = self._mask(rest.pop("reset_mask", None))
        seeds = self._seeds(seed)
        with unchanged_if_it_fails(self):
            outcomes: list[Outcome | None] = [*self._outcomes] or [None] * self.num_envs
            for i in np.flatnonzero(mask).tolist():
                if seeds[i] is not None:
                    self._generators[i] = seeding.np_random(seeds[i])[0]
                outcomes[i] = self._restarted(i, rest)
            if None in outcomes:
                raise gym.error.ResetNeeded("The first reset() must reset every sub-environment.")
            self._outcomes = [outcome for outcome in outcomes if outcome is not None]
            self.episode_started = mask
            infos = [o.info if m else None for o, m in zip(self._outcomes, mask, strict=True)]
            return self._observations(), stack_infos(infos)

    def step(self, actions: Any) -> _StepResult:
        """Step all sub-environments with one chunk each.

        Under `NextStep`, the action for a sub-environment that ended in the last step is not looked
        at: it is reset instead.

        Raises:
            ValueError: The number of actions is not N.
            InvalidChunkError: An action is not a chunk.
            EpisodeEndedError: Under `Disabled`, a sub-environment has ended and was not reset.
            RewardError: The reward failed, and `on_reward_error` is `"raise"`. No state has changed
                then, nor after any other error.
        """
        return self.step_with_failures(actions, [None] * self.num_envs)

    def step_with_failures(
        self, actions: Any, failures: Sequence[RewardError | None]
    ) -> _StepResult:
        """`step` where the reward has failed already in some sub-environments: these end."""
        before = self._current()
        actions = as_actions(actions, self.num_envs)
        ended = _ended(before)
        if self.autoreset_mode != AutoresetMode.NEXT_STEP and ended.any():
            raise EpisodeEndedError(
                f"Sub-environments {np.flatnonzero(ended).tolist()} have ended. Reset them with "
                "reset(options={'reset_mask': terminations | truncations})."
            )
        with unchanged_if_it_fails(self):
            if self.autoreset_mode == AutoresetMode.NEXT_STEP:
                return self._step_next(actions, ended, failures)
            return self._step_same(actions, failures)

    @property
    def _generator_states(self) -> list[Any]:
        return [None if g is None else g.bit_generator.state for g in self._generators]

    @_generator_states.setter
    def _generator_states(self, states: list[Any]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            if generator is not None:
                generator.bit_generator.state = state

    def set_states(self, states: Sequence[TextState]) -> tuple[Any, dict[str, Any]]:
        """Go on from N states, as `TextGenerationEnv.set_state`; returns what `reset` would."""
        if len(states) != self.num_envs:
            raise ValueError(f"Expected {self.num_envs} states, got {len(states)}.")
        with unchanged_if_it_fails(self):
            self._outcomes = [self.task.resume(self.task.check_state(state)) for state in states]
            self.episode_started = np.ones(self.num_envs, dtype=np.bool_)
            return self._observations(), stack_infos([o.info for o in self._outcomes])

    def render(self) -> tuple[Any, ...] | None:
        """Prompt and response of every sub-environment, as text or as a frame."""
        if self.render_mode is None:
            return None
        draw = as_text if self.render_mode == "ansi" else as_frame
        return tuple(draw(outcome) for outcome in self._current())

    def _step_next(
        self, actions: list[Any], ended: BoolArray, failures: Sequence[RewardError | None]
    ) -> _StepResult:
        going = np.flatnonzero(~ended).tolist()
        advanced = self._advance(
            [self._outcomes[i] for i in going],
            [actions[i] for i in going],
            [failures[i] for i in going],
        )
        found = iter(advanced)
        outcomes = [self._restarted(i) if e else next(found) for i, e in enumerate(ended)]
        self._outcomes, self.episode_started = outcomes, ended
        return self._results(outcomes, stack_infos([outcome.info for outcome in outcomes]))

    def _step_same(self, actions: list[Any], failures: Sequence[RewardError | None]) -> _StepResult:
        finals = self._advance(self._outcomes, actions, failures)
        self._outcomes = finals
        if self.autoreset_mode == AutoresetMode.DISABLED:
            self.episode_started = np.zeros(self.num_envs, dtype=np.bool_)
            return self._results(finals, stack_infos([outcome.info for outcome in finals]))
        ended = _ended(finals)
        observations = self.task.observe(finals)
        self._outcomes = [
            self._restarted(i) if ended[i] else outcome for i, outcome in enumerate(finals)
        ]
        self.episode_started = ended
        self.final_states = [o.state if e else None for o, e in zip(finals, ended, strict=True)]
        rows = [dict(outcome.info) for outcome in self._outcomes]
        for i in np.flatnonzero(ended):
            rows[i].update(final_obs=observations[i], final_info=finals[i].info)
        return self._results(finals, stack_infos(rows))

    def _advance(
        self,
        outcomes: Sequence[Outcome],
        actions: Sequence[Any],
        failures: Sequence[RewardError | None],
    ) -> list[Outcome]:
        if not any(failures):
            try:
                return self.task.advance(outcomes, actions)
            except RewardError as error:
                if self.on_reward_error == "raise":
                    raise RewardError(
                        f"{error} No environment has been stepped. To end such episodes and go on, "
                        "set on_reward_error='record' and failed_reward to the reward that they "
                        "get."
                    ) from error
        advanced = self.task.advance_apart(outcomes, actions, self.failed_reward, failures)
        errors = [o.info["reward_error"] for o in advanced if "reward_error" in o.info]
        self.num_failed += len(errors)
        for told in errors:
            warnings.warn(
                f"An episode ends without a score (reward {self.failed_reward}): {told}",
                RuntimeWarning,
                stacklevel=5,
            )
        return advanced

    def _results(self, outcomes: Sequence[Outcome], infos: dict[str, Any]) -> _StepResult:
        n = self.num_envs
        return (
            self._observations(),
            np.fromiter((outcome.reward for outcome in outcomes), np.float64, n),
            np.fromiter((outcome.terminated for outcome in outcomes), np.bool_, n),
            np.fromiter((outcome.truncated for outcome in outcomes), np.bool_, n),
            infos,
        )

    def _restarted(self, index: int, options: dict[str, Any] | None = None) -> Outcome:
        return self.task.start(self.task.choose_prompt(self.generator(index), options))

    def _observations(self) -> Any:
        space = self.single_observation_space
        empty: Any = create_empty_array(space, self.num_envs)
        return concatenate(space, self.task.observe(self._outcomes), empty)

    def _current(self) -> list[Outcome]:
        if not self._outcomes:
            raise gym.error.ResetNeeded("Call `reset()` before `step()`.")
        return self._outcomes

    def _mask(self, mask: Any) -> BoolArray:
        if mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(
                f"options['reset_mask']: expected bool[{self.num_envs}] with at least one True, "
                f"got {mask!r}."
            )
        return mask

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        first = as_index(seed)
        seeds = list(seed) if first is None else [first + i for i in range(self.num_envs)]  # type: ignore[arg-type]
        if len(seeds) != self.num_envs:
            raise ValueError(f"Expected {self.num_envs} seeds, got {len(seeds)}.")
        return seeds


def _ended(outcomes: Sequence[Outcome]) -> BoolArray:
    return np.array([is_terminal(outcome.state) for outcome in outcomes], dtype=np.bool_)


def as_actions(actions: Any, num_envs: int) -> list[Any]:
    """One action for each environment, or a ValueError."""
    try:
        found = list(actions)
    except TypeError:
        raise ValueError(f"Expected {num_envs} actions, got {actions!r:.80}.") from None
    if len(found) != num_envs:
        raise ValueError(f"Expected {num_envs} actions, got {len(found)}.")
    return found


def stack_infos(rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Turn the infos of sub-environments into Gymnasium's vector info.

    The result is that of `VectorEnv._add_info` over the rows, made a key at a time, which for many
    sub-environments is several times faster. A None row has no keys.

    Example:
        >>> stack_infos([{"score": 1.0}, None])
        {'score': array([1., 0.]), '_score': array([ True, False])}
    """
    stacked: dict[str, Any] = {}
    for key in dict.fromkeys(chain.from_iterable(row for row in rows if row)):
        values = [row[key] for row in rows if row is not None and key in row]
        has = [True] * len(rows)
        if len(values) < len(rows):
            has = [row is not None and key in row for row in rows]
        mask = np.array(has, dtype=np.bool_)
        if key != "final_obs" and isinstance(values[0], Mapping):
            parts = iter(values)
            stacked[key] = stack_infos([next(parts) if present else None for present in has])
        else:
            stacked[key] = _column(key, values, mask)
        stacked[f"_{key}"] = mask
    return stacked


def _column(key: str, values: list[Any], mask: BoolArray) -> npt.NDArray[Any]:
    first = values[0]
    if key != "final_obs" and isinstance(first, (bool, int, float, np.number)):
        column = np.zeros(len(mask), dtype=type(first))
        column[mask] = values
    elif key != "final_obs" and isinstance(first, np.ndarray):
        column = np.zeros((len(mask), *first.shape), dtype=first.dtype)
        column[mask] = values
    else:
        column = np.full(len(mask), None, dtype=object)
        column[mask] = np.fromiter(values, dtype=object, count=len(values))
    return column
