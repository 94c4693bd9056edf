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

from mbrl_text_env.checks.base import CheckError, Trial, counted, rules
from mbrl_text_env.env import TextGenerationEnv
from mbrl_text_env.mdp import EpisodeEndedError, InvalidChunkError
from mbrl_text_env.spaces import ChunkSpace
from mbrl_text_env.types import TextState, check_positive

_SHOWN = ("prompt_id", "prompt", "response", "finish_reason")
_INFO: dict[str, type] = {
    **dict.fromkeys(_SHOWN, str),
    "chunk_cut": bool,
    "score": float,
    "score_parts": dict,
}
_TOLERANCE = 1e-9
_MOST_SEEDS = 64
_RULES = rules("""
spaces | spaces | two of Gymnasium's |
action_space | action_space of the text environment | {expected} | Make it with
    `task.action_space()`; define other actions in a wrapper.
pair | {where} | a tuple (observation, info) | Return both.
observation | {where}, observation | an element of {space} | Check shape, dtype and bounds.
reset | reset(seed={seed}) | the same observation, info and state every time, {first} | Draw from
    `self.np_random`, which `super().reset(seed=seed)` seeds, and clear what the last episode left.
prompts | reset(seed=...) | different prompts for {count} seeds | Draw the prompt from
    `self.np_random`.
step | step | a tuple (observation, reward, terminated, truncated, info) | Return all five.
reward | step, reward | a finite float | Use `score_responses`.
bools | step, terminated and truncated | bools | Convert them with bool().
flags | step | {expected} for finish_reason {reason!r} (terminated at 'stop', truncated at 'length',
    never both) | Derive both from the state's finish_reason.
info | {where}, info | a dict | Return a new one every time.
entry | {where}, info | {name!r}, a {kind} | Pass on the environment's.
shown | {where}, info | what the state says, {actual} | Do not edit it.
score | {where}, info | a finite float as 'score', and floats by name as 'score_parts', when the
    response has ended, and only then; 0.0 before | Score the complete response once, at its end.
limit | step | a response of at most max_response_tokens ({limit}), got {got} tokens | Cut a chunk
    that would pass the limit.
append | step | that tokens are appended to the response | Token ids are canonical: never encode the
    text again.
chunk | step | the chunk {chunk} at the end of the response, cut at the limit | Append the action's
    token ids.
chunk_cut | step, info['chunk_cut'] | {cut}, since {added} of {size} tokens were appended | Say
    whether the limit cut the chunk.
terminal | reward='terminal' | 0 until the last, which is the score {score:g} | Pay it once; pass
    check_rewards=False if a wrapper changes the reward.
delta | reward='delta' | that they add up to the score {score:g} | Pay it once; pass
    check_rewards=False if a wrapper changes the reward.
once | reward='terminal' | one scored response, got {got} in an episode | Score it when it has
    ended: reward models are expensive.
restored | set_state | that get_state() returns the state that was set, {state} | Restore everything
    that `step` reads.
copied | set_state | the same observation and info for the state and for its pickled copy | Derive
    both from the state alone.
state | get_state | a state that can be {able} | Use a frozen dataclass.
end | An episode | an end after at most max_response_tokens ({limit}) steps | Truncate the response
    at the limit.
invalid | action_space | that {case} is no element | See `ChunkRules`.
refusal | step | {error} for {case} | Leave it to the base class.
untouched | step | that {case}, which is refused, leaves the state as it was, {before} | Change the
    state only after everything that can fail.
repeated | {where}, {name} | the same as the first time, {value} | The result of a step must depend
    only on state and action: draw no other random numbers, keep no other state, and leave timings
    out of info.
""")


def check_text_env(
    env: gym.Env[Any, Any], *, steps: int = 50, seed: int = 0, check_rewards: bool = True
) -> None:
    """Check that an environment implements the interface of `TextGenerationEnv`.

    It checks the spaces; that seed and actions determine the results of `reset` and `step`; the
    ends of episodes; that the return of an episode is its score; that states can be pickled, hashed
    and restored, with the same results afterwards; and that steps after the end and invalid actions
    are rejected without changing the state.

    Also run `gymnasium.utils.env_checker.check_env`, which checks the general Gymnasium API.

    Args:
        env: A `TextGenerationEnv` or `CandidateChunks`, possibly inside wrappers, as returned by
            `gym.make`. Wrappers can change observations and rewards. Wrappers with their own state,
            such as `TimeLimit`, cannot be restored and fail.
        steps: Number of random steps, which are then repeated.
        seed: Seed of the episodes and actions.
        check_rewards: Whether the return of an episode must be its score. Pass False if a wrapper
            such as `PotentialShaping` changes the reward.

    Raises:
        CheckError: A check fails.

    Example:
        >>> import gymnasium as gym, mbrl_text_env
        >>> check_text_env(gym.make("mbrl_text_env/TextGeneration-v0"))  # doctest: +SKIP
    """
    check_positive(steps=steps)
    base = env.unwrapped
    if not isinstance(base, TextGenerationEnv):
        raise CheckError(
            "Environment: expected a TextGenerationEnv or a wrapper of one, got a "
            f"{type(base).__name__}. Derive it from TextGenerationEnv, or wrap one."
        )
    trial = _Trial(env, base, _stateful_layer(env), seed, check_rewards)
    trial.check_spaces()
    trial.check_reset()
    trial.check_episodes(steps)
    trial.check_restoring()
    trial.check_end()
    if isinstance(env.action_space, ChunkSpace):
        trial.check_invalid_actions(env.action_space)


@dataclass(frozen=True)
class _Step:
    """The result of `step`, with the states before and after it."""

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


@dataclass(frozen=True)
class _Trial(Trial):
    """An environment under check, its unwrapped environment, and the layer with `get_state`."""

    rules = _RULES
    subject = "Environment"
    env: gym.Env[Any, Any]
    base: TextGenerationEnv
    layer: Any
    seed: int
    check_rewards: bool

    @property
    def limit(self) -> int:
        return self.base.task.max_response_tokens

    def check_spaces(self) -> None:
        try:
            check_observation_space(self.env.observation_space)
            check_action_space(self.env.action_space)
        except Exception as error:
            raise self.fault("spaces", str(error)) from error
        found, expected = self.base.action_space, self.base.task.action_space()
        self.expect("action_space", found == expected, found, expected=expected)

    def check_pair(self, result: Any, where: str, env: Any) -> None:
        self.expect("pair", isinstance(result, tuple) and len(result) == 2, result, where=where)
        self.check_observation(env, result[0], where)
        self.check_info(result[1], self.base.get_state(), where)

    def check_reset(self) -> None:
        first = self.env.reset(seed=self.seed)
        self.check_pair(first, "reset", self.env)
        state = self.layer.get_state()
        self.env.step(_Actions(self)(0))
        again = self.env.reset(seed=self.seed)
        same = data_equivalence(first, again, exact=True) and self.layer.get_state() == state
        self.expect("reset", same, again[1], seed=self.seed, first=first[1])
        seeds = range(self.seed + 1, self.seed + 1 + _MOST_SEEDS)
        ids = (self.env.reset(seed=other)[1]["prompt_id"] for other in seeds)
        differ = len({prompt.id for prompt in self.base.task.prompts}) == 1 or any(
            prompt != first[1]["prompt_id"] for prompt in ids
        )
        self.expect("prompts", differ, f"always {first[1]['prompt_id']!r}", count=_MOST_SEEDS)

    def check_episodes(self, steps: int) -> None:
        """Play episodes, and each of them a second time."""
        calls = episode = 0

        def count(result: object, prompts: object, responses: list[str]) -> None:
            nonlocal calls
            calls += len(responses)

        while steps > 0:
            calls = 0
            with counted(self.base.task.reward_model, {"score": count, "score_parts": count}):
                first = self.played(episode, [None] * steps)
            if first[-1].ended and self.check_rewards:
                self.check_return(first, calls)
            again = self.played(episode, [step.action for step in first])
            for number, (one, other) in enumerate(zip(first, again, strict=False), start=1):
                where = f"step {number} of an episode that is played again"
                self.expect_repeated(one, other, where)
            steps -= len(first)
            episode += 1

    def played(self, episode: int, actions: list[Any]) -> list[_Step]:
        """The steps of an episode; an action that is None is drawn."""
        self.env.reset(seed=self.seed + episode)
        draw, played = _Actions(self, episode), []
        for number, action in enumerate(actions):
            played.append(self.stepped(draw(number) if action is None else action))
            if played[-1].ended:
                break
        return played

    def stepped(self, action: Any) -> _Step:
        before = self.base.get_state()
        result = self.env.step(action)
        self.expect("step", isinstance(result, tuple) and len(result) == 5, result)
        step = _Step(before, action, *result, self.base.get_state())
        self.check_observation(self.env, step.observation, "step")
        finite = isinstance(step.reward, float) and math.isfinite(step.reward)
        self.expect("reward", finite, step.reward)
        flags, reason = (step.terminated, step.truncated), step.after.finish_reason
        self.expect("bools", all(isinstance(flag, (bool, np.bool_)) for flag in flags), flags)
        right = (reason == "stop", reason == "length")
        expected, got = (f"terminated={a}, truncated={b}" for a, b in (right, flags))
        self.expect("flags", flags == right, got, expected=expected, reason=reason)
        self.check_info(step.info, step.after, "step")
        self.check_transition(step)
        return step

    def check_info(self, info: Any, state: TextState, where: str) -> None:
        self.expect("info", isinstance(info, dict), info, where=where)
        for name, kind in _INFO.items():
            right = isinstance(info.get(name), kind)
            self.expect("entry", right, info, where=where, name=name, kind=kind.__name__)
        response = self.base.task.tokenizer.decode(state.response_ids)
        values = (state.prompt.id, state.prompt.text, response, state.finish_reason or "")
        shown = {name: info[name] for name in _SHOWN}
        actual = dict(zip(_SHOWN, values, strict=True))
        self.expect("shown", shown == actual, shown, where=where, actual=actual)
        ended = where == "step" and state.finish_reason is not None
        numbers = [info["score"], *info["score_parts"].values()]
        right = all(isinstance(number, float) and math.isfinite(number) for number in numbers)
        got = {name: info[name] for name in ("score", "score_parts")}
        self.expect("score", right and (ended or not any(numbers)), got, where=where)

    def check_transition(self, step: _Step) -> None:
        before, after = step.before.response_ids, step.after.response_ids
        self.expect("limit", len(after) <= self.limit, len(after), limit=self.limit)
        grows = step.after.prompt == step.before.prompt and after[: len(before)] == before
        self.expect("append", grows, f"{before}, then {after}")
        if isinstance(self.env.action_space, ChunkSpace):
            chunk, added = tuple(map(int, step.action)), after[len(before) :]
            whole = added == chunk[: self.limit - len(before)]
            self.expect("chunk", whole, added, chunk=chunk)
            cut, said = len(added) < len(chunk), step.info["chunk_cut"]
            self.expect("chunk_cut", said == cut, said, cut=cut, added=len(added), size=len(chunk))

    def check_return(self, steps: list[_Step], calls: int) -> None:
        mode, score = self.base.task.reward, steps[-1].info["score"]
        rewards = [step.reward for step in steps]
        if mode == "terminal":
            right = rewards == [0.0] * (len(rewards) - 1) + [score]
            self.expect("terminal", right, rewards, score=score)
            self.expect("once", calls == 1, calls)
        if mode == "delta":
            close = abs(sum(rewards) - score) <= _TOLERANCE * max(1.0, abs(score))
            got = f"{rewards}, which add up to {sum(rewards):g}"
            self.expect("delta", close, got, score=score)

    def check_restoring(self) -> None:
        """Save, act, restore and act again; every second time, play other episodes in between."""
        for episode in (0, 1):
            self.env.reset(seed=self.seed + episode)
            actions = _Actions(self, episode)
            for number in range(4):
                state = self.layer.get_state()
                self.check_state(state)
                first = self.stepped(actions(number))
                if number % 2:
                    self.played(number, [None] * 3)
                self.restore(state)
                again = self.stepped(first.action)
                where = "the step after get_state, a step and set_state"
                self.expect_repeated(first, again, where)
                if first.ended:
                    break

    def restore(self, state: Any) -> None:
        result = self.layer.set_state(state)
        found = self.layer.get_state()
        self.expect("restored", found == state, found, state=state)
        self.check_pair(result, "set_state", self.layer)
        copied = self.layer.set_state(pickle.loads(pickle.dumps(state)))  # noqa: S301 made here
        self.expect("copied", data_equivalence(result, copied, exact=True), "different ones")

    def check_state(self, state: Any) -> None:
        able = "pickled"
        try:
            same = pickle.loads(pickle.dumps(state)) == state  # noqa: S301 it was made here
            able = "hashed"
            hash(state)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            raise self.fault("state", got, able=able) from error
        self.expect("state", same, state, able="pickled, and equals its copy")

    def check_end(self) -> None:
        """Step after the end of an episode, and after restoring that end."""
        # Every step adds a token, so an episode has at most as many steps as a response has tokens.
        last = self.played(1, [None] * self.limit)[-1]
        self.expect("end", last.ended, last.after, limit=self.limit)
        end = self.layer.get_state()
        self.expect_refused(EpisodeEndedError, last.action, "a step after the end")
        self.env.reset(seed=self.seed)
        self.restore(end)
        self.expect_refused(EpisodeEndedError, last.action, "a step after a restored end")

    def check_invalid_actions(self, space: ChunkSpace) -> None:
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
        self.env.reset(seed=self.seed)
        for case, ids in cases.items():
            action = np.asarray(ids, dtype=np.int64)
            self.expect("invalid", action not in space, ids, case=case)
            self.expect_refused(InvalidChunkError, action, case)

    def expect_refused(self, kind: type[Exception], action: Any, case: str) -> None:
        before = self.layer.get_state()
        self.expect_error("refusal", kind, lambda: self.env.step(action), case)
        after = self.layer.get_state()
        self.expect("untouched", after == before, after, case=case, before=before)

    def check_observation(self, env: Any, observation: Any, where: str) -> None:
        space = env.observation_space
        self.expect("observation", observation in space, observation, where=where, space=space)

    def expect_repeated(self, one: _Step, other: _Step, where: str) -> None:
        for name in ("observation", "reward", "terminated", "truncated", "info", "after"):
            value, again = getattr(one, name), getattr(other, name)
            same = (
                math.isclose(value, again, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
                if name == "reward"
                else data_equivalence(value, again, exact=True)
            )
            self.expect("repeated", same, again, where=where, name=name, value=value)


class _Actions:
    """Random actions that reach both kinds of episode end.

    Uniform tokens rarely include the stop token of a real vocabulary. Every second episode is
    therefore forced to stop at its second step, and the others are kept from stopping.
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


def _ordinary_and_stop(space: ChunkSpace) -> tuple[int | None, int | None]:
    """The first ordinary token and the first stop token, or None where there are none."""
    rules = space.rules
    ordinary = (i for i in range(rules.vocab_size) if i not in rules.stop_token_ids)
    return next(ordinary, None), min(rules.stop_token_ids, default=None)
