"""Wrappers: candidate chunks as actions, potential-based shaping and a KL penalty.

With candidate chunks, a language model proposes K chunks and the agent chooses one; the spaces
work with stable-baselines3. The other two wrappers change the reward and can be combined.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorWrapper
from gymnasium.vector.utils import batch_space

from mbrl_text_env.env import (
    TextGenerationEnv,
    TextGenerationVectorEnv,
    as_actions,
    text_env,
    unchanged_if_it_fails,
)
from mbrl_text_env.language_models.base import LanguageModel, Tokenizer
from mbrl_text_env.language_models.registry import embedded
from mbrl_text_env.mdp import as_index, check_not_terminal, is_terminal
from mbrl_text_env.proposer import CandidateProposer, Known, ViewOptions
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.task import TextTask, feature_box
from mbrl_text_env.types import Chunk, Ledger, TextState
from mbrl_text_env.values import ValueModel, predict_values

if TYPE_CHECKING:
    _VectorWrapper = VectorWrapper[Any, Any, Any, Any, Any]
else:
    # Not generic before Gymnasium 1.4.
    _VectorWrapper = VectorWrapper

CANDIDATES_ID = "mbrl_text_env/CandidateChunks-v0"


@dataclass(frozen=True)
class CandidateState:
    """A state of `CandidateChunks`: the text state and the seed of its candidates."""

    text_state: TextState
    seed: int


class _View:
    """Shared by the single and the vector form: a proposer and its ledger."""

    def _begin(
        self, model: LanguageModel | None, task: TextTask, options: ViewOptions
    ) -> tuple[spaces.Discrete, spaces.Box]:
        if model is None:
            model = task.tokenizer if isinstance(task.tokenizer, LanguageModel) else _embedded()
        self.proposer = CandidateProposer(model, task, **options)
        self.ledger = Ledger()
        layout = self.proposer.layout
        return spaces.Discrete(layout.num_candidates), feature_box(layout.size)

    def _proposed(
        self,
        states: Sequence[TextState],
        seeds: Sequence[int],
        known: Sequence[Known],
        failures: list[RewardError | None] | None = None,
    ) -> tuple[list[list[Chunk]], npt.NDArray[np.float32], list[list[str]]]:
        ledgers = [self.ledger] * len(states)
        proposals = self.proposer.propose(states, seeds, ledgers)
        features = self.proposer.features(states, proposals, ledgers, known, failures)
        return proposals, features, self.proposer.texts(states, proposals)

    def _chosen(self, candidates: list[Chunk], action: Any) -> tuple[int, ...]:
        index, count = as_index(action), self.proposer.num_candidates
        if index is None or not 0 <= index < count:
            raise ValueError(
                f"Invalid action: expected the index of a candidate, 0 to {count - 1}, got "
                f"{action!r}."
            )
        return candidates[index].token_ids


class CandidateChunks(_View, gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Choose among K chunks that a language model proposes: `Discrete(K)` and `Box`.

    The candidates are a function of the state and a seed that `reset` draws, so the same episode
    seed gives the same candidates. `info["candidates"]` holds their texts, or K empty strings once
    the response has ended. The cost of proposing is charged to `ledger`.

    Args:
        env: A `TextGenerationEnv`, wrapped or not.
        language_model: Proposes chunks; by default the environment's tokenizer if that is a
            language model, otherwise the embedded SmolLM2.
        num_candidates, chunk_tokens, params, encoder, prefix_rewards: See `CandidateProposer`.

    Attributes:
        candidates: The K chunks at the current state; empty if it has ended.
        ledger: The cost of proposing, without the environment's own scores.

    Example:
        >>> import gymnasium as gym, mbrl_text_env
        >>> env = gym.make("mbrl_text_env/CandidateChunks-v0", num_candidates=4)  # doctest: +SKIP
    """

    kept_if_a_step_fails = ("_seed", "candidates")

    def __init__(
        self,
        env: gym.Env[Any, Any],
        language_model: LanguageModel | None = None,
        **options: Unpack[ViewOptions],
    ) -> None:
        RecordConstructorArgs.__init__(
            self, _disable_deepcopy=True, language_model=language_model, **options
        )
        gym.Wrapper.__init__(self, env)
        self._base = text_env(env)
        found = self._begin(language_model, self._base.task, options)
        self.action_space, self.observation_space = found
        self.candidates: list[Chunk] = []
        self._seed = 0
        self._known: list[Known] = [{}]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; see `TextGenerationEnv.reset`."""
        with unchanged_if_it_fails(self):
            _, info = self.env.reset(seed=seed, options=options)
            self._seed = int(self._base.np_random.integers(2**63))
            return self._show(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Append candidate `action`; an error leaves the state unchanged.

        Raises:
            EpisodeEndedError, ValueError: The response has ended, or there is no such candidate.
            RewardError: The response or a prefix could not be scored.
        """
        check_not_terminal(self._base.get_state())
        chosen = self._chosen(self.candidates, action)
        with unchanged_if_it_fails(self):
            _, reward, terminated, truncated, info = self.env.step(chosen)
            observation, info = self._show(info)
        return observation, reward, terminated, truncated, info

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """The Gymnasium spec; the registered id includes this wrapper."""
        base = self.env.spec
        return base if base is not None and base.id == CANDIDATES_ID else super().spec

    def get_state(self) -> CandidateState:
        """The state and the seed of its candidates."""
        return CandidateState(self._base.get_state(), self._seed)

    def set_state(self, state: CandidateState) -> tuple[Any, dict[str, Any]]:
        """Restore a `CandidateState`; return the same values as `reset`."""
        _check_states([state])
        with unchanged_if_it_fails(self):
            _, info = self._base.set_state(state.text_state)
            self._seed = state.seed
            return self._show(info)

    def _show(self, info: dict[str, Any]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        states = [self._base.get_state()]
        proposals, (features,), texts = self._proposed(states, [self._seed], self._known)
        self.candidates = proposals[0]
        return features, {**info, "candidates": tuple(texts[0])}


class CandidateChunksVector(_View, _VectorWrapper):
    """The vector form of `CandidateChunks`, with one language-model call per step.

    With `on_reward_error="record"`, a prefix that cannot be scored affects only its own
    sub-environment: the observation has zeros for its rewards, the info has a `reward_error`, and
    the next step ends the episode without a score. See `TextGenerationVectorEnv`.
    """

    kept_if_a_step_fails = ("candidates", "_seeds", "_failures")

    def __init__(
        self,
        env: TextGenerationVectorEnv,
        language_model: LanguageModel | None = None,
        **options: Unpack[ViewOptions],
    ) -> None:
        super().__init__(env)
        if not isinstance(env, TextGenerationVectorEnv):
            raise TypeError(f"Expected a TextGenerationVectorEnv, got {type(env).__name__}.")
        self._base = env
        self.autoreset_mode = env.autoreset_mode
        found = self._begin(language_model, env.task, options)
        self.single_action_space, self.single_observation_space = found
        self.action_space, self.observation_space = (batch_space(s, env.num_envs) for s in found)
        self.candidates: list[list[Chunk]] = []
        self._seeds = [0] * env.num_envs
        self._known: list[Known] = [{} for _ in range(env.num_envs)]
        self._failures: list[RewardError | None] = [None] * env.num_envs

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset; see `TextGenerationVectorEnv.reset`."""
        with unchanged_if_it_fails(self):
            _, infos = self._base.reset(seed=seed, options=options)
            self._draw_seeds()
            return self._show(infos, self._base.episode_started)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Append candidate `actions[i]` in sub-environment i; see `CandidateChunks.step`."""
        actions = as_actions(actions, self._base.num_envs)
        # A sub-environment without candidates has ended; the base env resets it or raises.
        known: list[list[Chunk]] = self.candidates or [[]] * len(actions)
        ids = [
            self._chosen(candidates, action) if candidates else ()
            for candidates, action in zip(known, actions, strict=True)
        ]
        with unchanged_if_it_fails(self):
            _, rewards, terminations, truncations, infos = self._base.step(ids, self._failures)
            if self.autoreset_mode == AutoresetMode.SAME_STEP:
                infos = self._with_final_view(infos)
            self._draw_seeds()
            observations, infos = self._show(infos)
        return observations, rewards, terminations, truncations, infos

    def get_states(self) -> list[CandidateState]:
        """The N current states and the seeds of their candidates."""
        return list(map(CandidateState, self._base.states, self._seeds))

    def set_states(self, states: Sequence[CandidateState]) -> tuple[Any, dict[str, Any]]:
        """Restore N `CandidateState`s; return the same values as `reset`."""
        _check_states(states)
        with unchanged_if_it_fails(self):
            _, infos = self._base.set_states([state.text_state for state in states])
            self._seeds = [state.seed for state in states]
            return self._show(infos)

    def _draw_seeds(self) -> None:
        for i in np.flatnonzero(self._base.episode_started).tolist():
            self._seeds[i] = int(self._base.generator(i).integers(2**63))

    def _show(
        self, infos: dict[str, Any], shown: npt.NDArray[np.bool_] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Propose for all sub-environments; add info for those in `shown` (None: for all)."""
        states = self._base.states
        failures: list[RewardError | None] = [None] * len(states)
        isolated = failures if self._base.on_reward_error == "record" else None
        self.candidates, features, texts = self._proposed(
            states, self._seeds, self._known, isolated
        )
        self._failures = failures
        for i in range(len(states)) if shown is None else np.flatnonzero(shown).tolist():
            row: dict[str, Any] = {"candidates": tuple(texts[i])}
            if failures[i] is not None:
                row["reward_error"] = str(failures[i])
            infos = self._add_info(infos, row, i)
        return features, infos

    def _with_final_view(self, infos: dict[str, Any]) -> dict[str, Any]:
        """Replace the final observations and infos with those of this wrapper."""
        ended = {i: s for i, s in enumerate(self._base.final_states) if s is not None}
        if not ended:
            return infos
        states, ledgers = list(ended.values()), [self.ledger] * len(ended)
        views = self.proposer.features(states, [[] for _ in states], ledgers)
        row = {"candidates": ("",) * self.proposer.num_candidates}
        for i, view in zip(ended, views, strict=True):
            infos["final_obs"][i] = view
            infos["final_info"] = self._add_info(infos["final_info"], row, i)
        return infos


def make_candidate_chunks(
    language_model: LanguageModel | None = None,
    *,
    num_envs: int | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> CandidateChunks | CandidateChunksVector:
    """Make `mbrl_text_env/CandidateChunks-v0`, or its vector form if `num_envs` is given.

    Args:
        language_model: Proposes chunks; by default the embedded SmolLM2.
        tokenizer: By default the language model.
        **options: Options of `CandidateProposer` and `TextGenerationEnv`.
    """
    model = _embedded() if language_model is None else language_model
    view: Any = {name: options.pop(name) for name in ViewOptions.__annotations__ if name in options}
    options["tokenizer"] = model if tokenizer is None else tokenizer
    if num_envs is None:
        return CandidateChunks(TextGenerationEnv(**options), model, **view)
    return CandidateChunksVector(TextGenerationVectorEnv(num_envs, **options), model, **view)


@functools.cache
def _embedded() -> LanguageModel:
    # All environments without their own model share one engine.
    return embedded()


def _check_states(states: Sequence[object]) -> None:
    for state in states:
        if not isinstance(state, CandidateState):
            raise TypeError(
                "Expected a CandidateState as returned by get_state() or get_states(), got "
                f"{type(state).__name__}."
            )


class _RewardWrapper(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Change the reward according to a transition; TypeError for other environments."""

    def __init__(self, env: gym.Env[Any, Any], **arguments: Any) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **arguments)
        gym.Wrapper.__init__(self, env)
        self._base = text_env(env)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step and change the reward; an error leaves the state unchanged."""
        before = self._base.get_state()
        with unchanged_if_it_fails(self.env):
            observation, reward, terminated, truncated, info = self.env.step(action)
            change, told = self._change(float(reward), before, self._base.get_state())
        return observation, float(reward) + change, terminated, truncated, {**info, **told}

    def _change(
        self, reward: float, before: TextState, after: TextState
    ) -> tuple[float, dict[str, float]]:
        """The amount to add to the reward, and the entries to add to `info`."""
        raise NotImplementedError


class PotentialShaping(_RewardWrapper):
    """Add `discount * potential(next state) - potential(state)` to every reward.

    The potential is the value model's mean, and 0 in terminal states. The optimal policy therefore
    does not depend on the value model (Ng, Harada and Russell, "Policy invariance under reward
    transformations", 1999). Truncated episodes count as ended, because the token limit is part of
    the task and the score is paid there. `info["unshaped_reward"]` is the original reward.

    `discount` must be the agent's discount, above 0 and at most 1.
    """

    def __init__(
        self, env: gym.Env[Any, Any], value_model: ValueModel, discount: float = 1.0
    ) -> None:
        if not 0 < discount <= 1:
            raise ValueError(f"discount: expected a number above 0 and up to 1, got {discount}.")
        super().__init__(env, value_model=value_model, discount=discount)
        self.value_model, self.discount = value_model, discount

    def _change(
        self, reward: float, before: TextState, after: TextState
    ) -> tuple[float, dict[str, float]]:
        shaping = self.discount * self._potential(after) - self._potential(before)
        return shaping, {"unshaped_reward": reward}

    def _potential(self, state: TextState) -> float:
        if is_terminal(state):
            return 0.0
        return float(predict_values(self.value_model, [state]).mean[0])


class KLPenalty(_RewardWrapper):
    """Subtract `coefficient` times the log-probability ratio of policy and reference.

    The sum of `log policy - log reference` over an episode is an unbiased estimate of the KL
    divergence of the policy from the reference (Ziegler et al., "Fine-tuning language models from
    human preferences", 2019). `info["kl"]` is the log ratio of one step in nats.

    Args:
        reference: The reference language model.
        coefficient: At least 0.
        policy: The language model that samples the chunks. If None, the penalty is
            `-log reference`; together with an entropy bonus of the same coefficient in the agent,
            this is the same objective.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        reference: LanguageModel,
        coefficient: float = 0.1,
        policy: LanguageModel | None = None,
    ) -> None:
        if not coefficient >= 0:
            raise ValueError(f"coefficient: expected 0 or more, got {coefficient}.")
        super().__init__(env, reference=reference, coefficient=coefficient, policy=policy)
        self.reference, self.coefficient, self.policy = reference, coefficient, policy

    def _change(
        self, reward: float, before: TextState, after: TextState
    ) -> tuple[float, dict[str, float]]:
        added = Chunk(after.response_ids[len(before.response_ids) :])
        ratio = -float(sum(self.reference.logprobs([before], [added])[0]))
        if self.policy is not None:
            ratio += float(sum(self.policy.logprobs([before], [added])[0]))
        return -self.coefficient * ratio, {"kl": ratio}
