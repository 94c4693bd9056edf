"""The checker of text environments."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.utils.passive_env_checker import check_action_space, check_observation_space

from mbrl_text_env.checks.base import CheckError, counted, expect, expect_error
from mbrl_text_env.env import TextGenerationEnv
from mbrl_text_env.spaces import ChunkSpace
from mbrl_text_env.types import EpisodeEndedError, InvalidChunkError, TextState

_SHOWN = ("prompt_id", "prompt", "response", "finish_reason")
_INFO: dict[str, type] = {
    **dict.fromkeys(_SHOWN, str),
    "chunk_cut": bool,
    "score": float,
    "score_parts": dict,
}
_TOLERANCE = 1e-9
_MOST_SEEDS = 64


def check_text_env(
    env: gym.Env[Any, Any], *, steps: int = 50, seed: int = 0, check_rewards: bool = True
) -> None:
    """Check that an environment keeps the contract of `TextGenerationEnv`.

    Checked are the spaces; what `reset` and `step` return, and that it follows from the seed and
    the actions; the endings; that the rewards of an episode make its score; that a state can be
    pickled, hashed and restored, and that what follows is the same again; and that steps after the
    end and actions that are no chunks are refused without a trace.

    `gymnasium.utils.env_checker.check_env` looks at what every environment has to do; run it too.

    Args:
        env: A `TextGenerationEnv`, the candidate view of one, or either inside wrappers, as
            `gym.make` returns them. Wrappers may change observations and rewards. Those that have a
            state of their own, such as `TimeLimit`, cannot be restored and fail.
        steps: Random steps that are taken and then repeated.
        seed: Of the episodes and the actions.
        check_rewards: Whether the rewards of an episode have to make its score. Pass False if a
            wrapper changes the reward, such as `PotentialShaping`.

    Raises:
        CheckError: The contract is broken.
        ValueError: `steps` is below 1.

    Example:
        >>> import gymnasium as gym, mbrl_text_env
        >>> check_text_env(gym.make("mbrl_text_env/TextGeneration-v0"))  # doctest: +SKIP
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
    base = env.unwrapped
    if not isinstance(base, TextGenerationEnv):
        raise CheckError(
            "Environment: expected a TextGenerationEnv or a wrapper of one, got a "
            f"{type(base).__name__}. Derive it from TextGenerationEnv, or wrap one."
        )
    trial = _Trial(env, base, _stateful_layer(env), seed, check_rewards)
    _check_spaces(trial)
    _check_reset(trial)
    _check_episodes(trial, steps)
    _check_restoring(trial)
    _check_end(trial)
    if isinstance(env.action_space, ChunkSpace):
        _check_invalid_actions(trial, env.action_space)


@dataclass(frozen=True)
class _Trial:
    """An environment under check.

    Args:
        env: As it was passed.
        base: The text environment inside.
        layer: Where `get_state` and `set_state` are: the environment or a view of it.
        seed, check_rewards: As in `check_text_env`.
    """

    env: gym.Env[Any, Any]
    base: TextGenerationEnv
    layer: Any
    seed: int
    check_rewards: bool

    @property
    def limit(self) -> int:
        """Token limit of a response."""
        return self.base.task.max_response_tokens


@dataclass(frozen=True)
class _Step:
    """What `step` returned, with the states around it."""

    before: TextState
    action: Any
    observation: Any
    reward: Any
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    after: TextState

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated


def _stateful_layer(env: gym.Env[Any, Any]) -> Any:
    layer: Any = env
    while not (hasattr(type(layer), "get_state") and hasattr(type(layer), "set_state")):
        if not isinstance(layer, gym.Wrapper):
            raise CheckError(
                f"{type(layer).__name__}: expected `get_state` and `set_state`, got an environment "
                "without them. Searches restore states: define both."
            )
        layer = layer.env
    return layer


def _check_spaces(trial: _Trial) -> None:
    try:
        check_observation_space(trial.env.observation_space)
        check_action_space(trial.env.action_space)
    except Exception as error:
        raise CheckError(
            f"observation_space and action_space: expected two of Gymnasium's spaces, got {error}"
        ) from error
    expected = trial.base.task.action_space()
    expect(
        trial.base.action_space == expected,
        "action_space of the text environment",
        str(expected),
        trial.base.action_space,
        "Make it by `task.action_space()`; other actions are for a wrapper to define.",
    )


def _check_pair(trial: _Trial, result: Any, where: str, env: Any) -> None:
    """Check what `reset` or `set_state` returned."""
    expect(
        isinstance(result, tuple) and len(result) == 2,
        where,
        "a tuple (observation, info)",
        result,
        "Return `observation, info`.",
    )
    _check_observation(env, result[0], where)
    _check_info(result[1], trial.base.get_state(), trial, where)


def _check_reset(trial: _Trial) -> None:
    first = trial.env.reset(seed=trial.seed)
    _check_pair(trial, first, "reset", trial.env)
    state = trial.layer.get_state()
    trial.env.step(_Actions(trial)(0))
    again = trial.env.reset(seed=trial.seed)
    expect(
        data_equivalence(first, again, exact=True) and trial.layer.get_state() == state,
        f"reset(seed={trial.seed})",
        f"the same observation, info and state every time, {first[1]}",
        again[1],
        "Draw from `self.np_random`, which `super().reset(seed=seed)` seeds, and clear what the "
        "last episode left.",
    )
    prompts = {prompt.id for prompt in trial.base.task.prompts}
    seeds = range(trial.seed + 1, trial.seed + 1 + _MOST_SEEDS)
    drawn = (trial.env.reset(seed=other)[1]["prompt_id"] for other in seeds)
    expect(
        len(prompts) == 1 or any(prompt != first[1]["prompt_id"] for prompt in drawn),
        "reset(seed=...)",
        f"different prompts for {_MOST_SEEDS} different seeds, of {len(prompts)} prompts",
        f"always {first[1]['prompt_id']!r}",
        "Draw the prompt from `self.np_random`.",
    )


def _check_episodes(trial: _Trial, steps: int) -> None:
    """Play episodes, and each of them a second time."""
    calls = episode = 0

    def count(result: object, prompts: object, responses: list[str]) -> None:
        nonlocal calls
        calls += len(responses)

    while steps > 0:
        calls = 0
        with counted(trial.base.task.reward_model, {"score": count, "score_parts": count}):
            first = _played(trial, episode, [None] * steps)
        if first[-1].ended and trial.check_rewards:
            _check_return(trial, first, calls)
        again = _played(trial, episode, [step.action for step in first])
        for number, (one, other) in enumerate(zip(first, again, strict=False), start=1):
            _expect_repeated(one, other, f"step {number} of an episode that is played again")
        steps -= len(first)
        episode += 1


def _played(trial: _Trial, episode: int, actions: list[Any]) -> list[_Step]:
    """The steps of an episode; an action that is None is drawn."""
    trial.env.reset(seed=trial.seed + episode)
    draw, played = _Actions(trial, episode), []
    for number, action in enumerate(actions):
        played.append(_stepped(trial, draw(number) if action is None else action))
        if played[-1].ended:
            break
    return played


class _Actions:
    """Random actions that reach all endings.

    Uniform tokens hardly ever hold the stop token of a real vocabulary, so every second episode is
    made to stop at its second step, and the others are kept from stopping.
    """

    def __init__(self, trial: _Trial, episode: int = 0) -> None:
        self.space = trial.env.action_space
        self.space.seed(trial.seed + episode)
        self.stops = episode % 2 == 1

    def __call__(self, number: int) -> Any:
        action = self.space.sample()
        if not isinstance(self.space, ChunkSpace):
            return action
        ordinary, stop = _ordinary_and_stop(self.space)
        if stop is not None and self.stops and number == 1:
            action[-1] = stop
        elif ordinary is not None and action[-1] in self.space.rules.stop_token_ids:
            action[-1] = ordinary
        return action


def _stepped(trial: _Trial, action: Any) -> _Step:
    """Take a step and check what it returns."""
    before = trial.base.get_state()
    result = trial.env.step(action)
    expect(
        isinstance(result, tuple) and len(result) == 5,
        "step",
        "a tuple (observation, reward, terminated, truncated, info)",
        result,
        "Return all five.",
    )
    step = _Step(before, action, *result, trial.base.get_state())
    _check_observation(trial.env, step.observation, "step")
    expect(
        isinstance(step.reward, float) and math.isfinite(step.reward),
        "step, reward",
        "a finite float",
        step.reward,
        "Score through `rewards.score_responses`, which refuses what is not finite.",
    )
    _check_flags(step)
    _check_info(step.info, step.after, trial, "step")
    _check_transition(trial, step)
    return step


def _check_flags(step: _Step) -> None:
    flags, reason = (step.terminated, step.truncated), step.after.finish_reason
    expect(
        all(isinstance(flag, (bool, np.bool_)) for flag in flags),
        "step, terminated and truncated",
        "bools",
        flags,
        "Convert them with bool().",
    )
    expect(
        flags == (reason == "stop", reason == "length"),
        "step",
        f"terminated={reason == 'stop'}, truncated={reason == 'length'} for finish_reason "
        f"{reason!r} (terminated at 'stop', truncated at 'length', never both)",
        f"terminated={flags[0]}, truncated={flags[1]}",
        "Derive both from the state's finish_reason.",
    )


def _check_info(info: Any, state: TextState, trial: _Trial, where: str) -> None:
    subject = f"{where}, info"
    expect(isinstance(info, dict), subject, "a dict", info, "Return a new dict every time.")
    for name, kind in _INFO.items():
        expect(
            isinstance(info.get(name), kind),
            subject,
            f"{name!r}, a {kind.__name__}",
            info,
            "Pass on what the text environment puts there.",
        )
    response = trial.base.task.tokenizer.decode(state.response_ids)
    values = (state.prompt.id, state.prompt.text, response, state.finish_reason or "")
    shown, actual = {name: info[name] for name in _SHOWN}, dict(zip(_SHOWN, values, strict=True))
    expect(shown == actual, subject, f"what the state says, {actual}", shown, "Do not edit it.")
    ended = where == "step" and state.finish_reason is not None
    numbers = [info["score"], *info["score_parts"].values()]
    expect(
        all(isinstance(number, float) and math.isfinite(number) for number in numbers)
        and (ended or not any(numbers)),
        subject,
        "a finite float as 'score', and floats by name as 'score_parts', when the response has "
        "ended, and only then; 0.0 before",
        {name: info[name] for name in ("score", "score_parts")},
        "Score the complete response once, at its end. Convert numbers with float().",
    )


def _check_transition(trial: _Trial, step: _Step) -> None:
    before, after = step.before.response_ids, step.after.response_ids
    expect(
        len(after) <= trial.limit,
        "step",
        f"a response of at most max_response_tokens ({trial.limit})",
        f"{len(after)} tokens",
        "Cut a chunk that would pass the limit.",
    )
    expect(
        step.after.prompt == step.before.prompt and after[: len(before)] == before,
        "step",
        "that tokens are appended to the response",
        f"{before}, then {after}",
        "Token ids are canonical: never encode the text again.",
    )
    if not isinstance(trial.env.action_space, ChunkSpace):
        return
    chunk, added = tuple(map(int, step.action)), after[len(before) :]
    expect(
        added == chunk[: trial.limit - len(before)],
        "step",
        f"the chunk {chunk} at the end of the response, cut at the limit",
        added,
        "Append the action's token ids.",
    )
    expect(
        step.info["chunk_cut"] == (len(added) < len(chunk)),
        "step, info['chunk_cut']",
        f"{len(added) < len(chunk)}, since {len(added)} of {len(chunk)} tokens were appended",
        step.info["chunk_cut"],
        "Say whether the limit cut the chunk.",
    )


def _check_return(trial: _Trial, steps: list[_Step], calls: int) -> None:
    mode, score = trial.base.task.reward, steps[-1].info["score"]
    rewards = [step.reward for step in steps]
    subject = f"Rewards of an episode with reward={mode!r}"
    advice = "Pay the score once; pass check_rewards=False if a wrapper changes the reward."
    if mode == "terminal":
        expect(
            rewards == [0.0] * (len(rewards) - 1) + [score],
            subject,
            f"0 until the last, which is the score {score:g}",
            rewards,
            advice,
        )
        expect(
            calls == 1,
            "An episode with reward='terminal'",
            "one scored response",
            f"{calls} scored responses",
            "Score the response once, when it has ended: reward models are expensive.",
        )
    if mode == "delta":
        expect(
            abs(sum(rewards) - score) <= _TOLERANCE * max(1.0, abs(score)),
            subject,
            f"that they add up to the score {score:g}",
            f"{rewards}, which add up to {sum(rewards):g}",
            advice,
        )


def _check_restoring(trial: _Trial) -> None:
    """Snapshot, act, restore, act again; with other episodes in between every second time."""
    for episode in (0, 1):
        trial.env.reset(seed=trial.seed + episode)
        actions = _Actions(trial, episode)
        for number in range(4):
            state = trial.layer.get_state()
            _check_state(state)
            first = _stepped(trial, actions(number))
            if number % 2:
                _played(trial, number, [None] * 3)
            _restore(trial, state)
            again = _stepped(trial, first.action)
            _expect_repeated(first, again, "the step after get_state, a step and set_state")
            if first.ended:
                break


def _restore(trial: _Trial, state: Any) -> None:
    result = trial.layer.set_state(state)
    expect(
        trial.layer.get_state() == state,
        "set_state",
        f"that get_state() returns the state that was set, {state}",
        trial.layer.get_state(),
        "Restore all that `step` reads.",
    )
    _check_pair(trial, result, "set_state", trial.layer)
    expect(
        data_equivalence(result, trial.layer.set_state(pickle.loads(pickle.dumps(state))), True),  # noqa: S301 it was made here
        "set_state",
        "the same observation and info for the state and for its pickled copy",
        "different ones",
        "Derive both from the state alone.",
    )


def _check_state(state: Any) -> None:
    advice = "Make it a frozen dataclass of plain data."
    able = "pickled"
    try:
        same = pickle.loads(pickle.dumps(state)) == state  # noqa: S301 it was made here
        able = "hashed"
        hash(state)
    except Exception as error:
        raise CheckError(
            f"get_state: expected a state that can be {able}, got {type(error).__name__}: {error}. "
            f"{advice}"
        ) from error
    expect(same, "get_state", "a state that equals its pickled copy", state, advice)


def _check_end(trial: _Trial) -> None:
    """Step on after the end of an episode, and after that end was restored."""
    # Every step adds a token, so an episode has at most as many steps as a response has tokens.
    steps = _played(trial, 1, [None] * trial.limit)
    expect(
        steps[-1].ended,
        "An episode",
        f"an end after at most max_response_tokens ({trial.limit}) steps",
        steps[-1].after,
        "Truncate the response at the limit.",
    )
    end = trial.layer.get_state()
    _expect_refused(trial, EpisodeEndedError, steps[-1].action, "a step after the end")
    trial.env.reset(seed=trial.seed)
    _restore(trial, end)
    _expect_refused(trial, EpisodeEndedError, steps[-1].action, "a step after a restored end")


def _check_invalid_actions(trial: _Trial, space: ChunkSpace) -> None:
    ordinary, stop = _ordinary_and_stop(space)
    rules = space.rules
    cases = {
        "an empty chunk": [],
        "an id outside the vocabulary": [rules.vocab_size],
        "a negative id": [-1],
    }
    if ordinary is not None:
        cases["more than max_chunk_tokens"] = [ordinary] * (rules.max_chunk_tokens + 1)
        if stop is not None and rules.max_chunk_tokens > 1:
            cases["a stop token before the last place"] = [stop, ordinary]
    trial.env.reset(seed=trial.seed)
    for case, ids in cases.items():
        action = np.asarray(ids, dtype=np.int64)
        expect(
            action not in space,
            "action_space",
            f"that {case} is no element",
            ids,
            "Let `contains` follow `ChunkRules.fault`.",
        )
        _expect_refused(trial, InvalidChunkError, action, case)


def _expect_refused(trial: _Trial, kind: type[Exception], action: Any, case: str) -> None:
    before = trial.layer.get_state()
    change = "Leave it to `TextGenerationEnv.step` to refuse it."
    expect_error(kind, lambda: trial.env.step(action), "step", case, change)
    expect(
        trial.layer.get_state() == before,
        "step",
        f"that {case}, which is refused, leaves the state as it was, {before}",
        trial.layer.get_state(),
        "Change the state only after everything that can fail.",
    )


def _check_observation(env: Any, observation: Any, where: str) -> None:
    expect(
        observation in env.observation_space,
        f"{where}, observation",
        f"an element of {env.observation_space}",
        observation,
        "Mind shape, dtype and bounds.",
    )


def _expect_repeated(one: _Step, other: _Step, where: str) -> None:
    for name in ("observation", "reward", "terminated", "truncated", "info", "after"):
        value, again = getattr(one, name), getattr(other, name)
        same = (
            math.isclose(value, again, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
            if name == "reward"
            else data_equivalence(value, again, exact=True)
        )
        expect(
            same,
            f"{where}, {name}",
            f"the same as the first time, {value}",
            again,
            "What a step returns has to follow from the state and the action alone: draw no other "
            "random numbers, keep no other state, and leave timings out of info.",
        )


def _ordinary_and_stop(space: ChunkSpace) -> tuple[int | None, int | None]:
    """The first ordinary token and the first stop token, or None where there are none."""
    rules = space.rules
    ordinary = (i for i in range(rules.vocab_size) if i not in rules.stop_token_ids)
    return next(ordinary, None), min(rules.stop_token_ids, default=None)
