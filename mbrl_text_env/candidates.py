"""The candidate view: a language model proposes K chunks, the agent picks one.

It turns text generation into a problem with `Discrete(K)` actions and `Box` observations, which
stable-baselines3 takes as it is.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorWrapper
from gymnasium.vector.utils import batch_space

from mbrl_text_env.encoders import Encoder, encode_texts, prefix_text
from mbrl_text_env.env import TextGenerationEnv
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams, Tokenizer
from mbrl_text_env.ledger import Ledger
from mbrl_text_env.mdp import check_not_terminal, is_terminal, response_limit, transition
from mbrl_text_env.observations import feature_box
from mbrl_text_env.task import TextTask, added_text
from mbrl_text_env.types import Chunk, TextState
from mbrl_text_env.vector import TextGenerationVectorEnv, stack_infos

CANDIDATES_ID = "mbrl_text_env/CandidateChunks-v0"
_VIEW_OPTIONS = ("num_candidates", "chunk_tokens", "params", "encoder")
# Mean log-probabilities below this one are shown as it: about one in five hundred million.
_LEAST_LOGPROB = -20.0


@dataclass(frozen=True)
class CandidateState:
    """What the candidate view restores: the state, and the seed of its proposals."""

    text_state: TextState
    seed: int


class CandidateProposer:
    """Proposes chunks and describes them; shared by the single and the vector view.

    Features: the share of the response's tokens that are written and, for each candidate, its mean
    log-probability, its share of `chunk_tokens`, and whether it ends the response. With an encoder,
    the embedding of the prefix, and of the prefix with each candidate, follow.

    Args:
        language_model: Proposes chunks.
        task: The environment's task.
        num_candidates: K, at least 1.
        chunk_tokens: Most tokens of a candidate; by default the environment's `max_chunk_tokens`.
        params: How candidates are drawn.
        encoder: `"embedded"` for MiniLM, `"language_model"` for the model's own features, any
            object with `encode(texts)`, or None for no embeddings.

    Raises:
        ValueError: K or `chunk_tokens` is out of range, or the model has no features.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        task: TextTask,
        num_candidates: int,
        chunk_tokens: int | None,
        params: SamplingParams,
        encoder: Encoder | str | None,
    ) -> None:
        limit = task.rules.max_chunk_tokens
        chunk_tokens = limit if chunk_tokens is None else chunk_tokens
        if num_candidates < 1:
            raise ValueError(f"num_candidates: expected at least 1, got {num_candidates}.")
        if not 1 <= chunk_tokens <= limit:
            raise ValueError(
                f"chunk_tokens: expected 1 to the environment's max_chunk_tokens ({limit}), got "
                f"{chunk_tokens}."
            )
        self.language_model = language_model
        self.task = task
        self.num_candidates = num_candidates
        self.chunk_tokens = chunk_tokens
        self.params = params
        self._encoder = self._checked_encoder(encoder)
        self.embedding_size = self._embedding_size()
        self.feature_size = 1 + 3 * num_candidates + (1 + num_candidates) * self.embedding_size

    def propose(
        self, states: Sequence[TextState], seeds: Sequence[int], ledger: Ledger
    ) -> list[list[Chunk]]:
        """K chunks for each state in one call of the language model; none where it has ended."""
        going = [i for i, state in enumerate(states) if not is_terminal(state)]
        proposals: list[list[Chunk]] = [[] for _ in states]
        if going:
            drawn = self.language_model.sample(
                [states[i] for i in going],
                self.num_candidates,
                self.chunk_tokens,
                seeds=[seeds[i] for i in going],
                params=self.params,
                ledgers=[ledger] * len(going),
            )
            for i, chunks in zip(going, drawn, strict=True):
                proposals[i] = chunks
        return proposals

    def texts(
        self, states: Sequence[TextState], proposals: Sequence[list[Chunk]]
    ) -> list[list[str]]:
        """The text that each candidate would add."""
        decode = self.task.tokenizer.decode
        return [
            [
                added_text(decode(state.response_ids), decode(state.response_ids + chunk.token_ids))
                for chunk in chunks
            ]
            for state, chunks in zip(states, proposals, strict=True)
        ]

    def features(
        self, states: Sequence[TextState], proposals: Sequence[list[Chunk]], ledger: Ledger
    ) -> npt.NDArray[np.float32]:
        """float32[B, feature_size]; the candidates of an ended state are all zeros."""
        rows = np.zeros((len(states), self.feature_size), dtype=np.float32)
        rows[:, 0] = [len(s.response_ids) / self.task.max_response_tokens for s in states]
        scalars = rows[:, 1 : 1 + 3 * self.num_candidates]
        for row, chunks in zip(scalars, proposals, strict=True):
            for k, chunk in enumerate(chunks):
                row[3 * k : 3 * k + 3] = (
                    max(chunk.logprob / len(chunk), _LEAST_LOGPROB),
                    len(chunk) / self.chunk_tokens,
                    chunk.finish_reason is not None,
                )
        if self._encoder is not None:
            self._embed(states, proposals, rows[:, 1 + 3 * self.num_candidates :], ledger)
        return rows

    def _embed(
        self,
        states: Sequence[TextState],
        proposals: Sequence[list[Chunk]],
        rows: npt.NDArray[np.float32],
        ledger: Ledger,
    ) -> None:
        wanted: list[TextState] = []
        places: list[tuple[int, int]] = []
        for row, (state, chunks) in enumerate(zip(states, proposals, strict=True)):
            limit = response_limit(state, self.task.tokenizer, self.task.max_response_tokens)
            children = [transition(state, chunk, limit) for chunk in chunks]
            wanted.extend([state, *children])
            places.extend((row, column) for column in range(1 + len(chunks)))
        size = self.embedding_size
        for (row, column), vector in zip(places, self._vectors(wanted, ledger), strict=True):
            rows[row, column * size : (column + 1) * size] = vector

    def _vectors(self, states: Sequence[TextState], ledger: Ledger) -> npt.NDArray[np.float32]:
        if self._encoder is self.language_model:
            model: Any = self.language_model
            vectors: npt.NDArray[np.float32] = model.features(
                states, ledgers=[ledger] * len(states)
            )
            return vectors
        decode = self.task.tokenizer.decode
        texts = [prefix_text(s.prompt.text, decode(s.response_ids)) for s in states]
        encoder: Any = self._encoder
        return encode_texts(encoder, texts)

    def _checked_encoder(self, encoder: Encoder | str | None) -> Any:
        if encoder == "embedded":
            from mbrl_text_env.language_models.catalogue import embedded_encoder

            return embedded_encoder()
        if encoder == "language_model":
            if not hasattr(self.language_model, "features"):
                raise ValueError(
                    f"encoder='language_model': {self.language_model.name!r} gives no features. "
                    "Use 'embedded', None, or an encoder of your own."
                )
            return self.language_model
        if isinstance(encoder, str) or (encoder is not None and not hasattr(encoder, "encode")):
            raise ValueError(
                "encoder: expected 'embedded', 'language_model', None, or an object with "
                f"encode(texts), got {encoder!r}."
            )
        return encoder

    def _embedding_size(self) -> int:
        if self._encoder is None:
            return 0
        if self._encoder is self.language_model:
            model: Any = self.language_model
            return int(model.feature_size)
        return int(encode_texts(self._encoder, ["size"]).shape[1])


class CandidateChunks(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Choose among K chunks that a language model proposes: `Discrete(K)` and `Box`.

    The proposals at a state follow from the state and from a seed that `reset` draws, so the same
    episode seed shows the same candidates. Their texts are in `info["candidates"]`. What proposing
    costs is charged to `ledger`.

    Args:
        env: A `TextGenerationEnv`, wrapped or not.
        language_model: Proposes chunks; by default the environment's tokenizer where that is a
            language model, otherwise the embedded SmolLM2.
        num_candidates: K.
        chunk_tokens: Most tokens of a candidate; by default the environment's `max_chunk_tokens`.
        params: How candidates are drawn.
        encoder: `"embedded"`, `"language_model"`, an object with `encode(texts)`, or None; see
            `CandidateProposer`.

    Attributes:
        candidates: The K chunks at the current state; none where it has ended.
        ledger: What proposing has cost so far.

    Example:
        >>> import gymnasium as gym, mbrl_text_env
        >>> env = gym.make("mbrl_text_env/CandidateChunks-v0", num_candidates=4)  # doctest: +SKIP
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        language_model: LanguageModel | None = None,
        *,
        num_candidates: int = 4,
        chunk_tokens: int | None = None,
        params: SamplingParams = SamplingParams(),
        encoder: Encoder | str | None = "embedded",
    ) -> None:
        RecordConstructorArgs.__init__(
            self,
            _disable_deepcopy=True,
            language_model=language_model,
            num_candidates=num_candidates,
            chunk_tokens=chunk_tokens,
            params=params,
            encoder=encoder,
        )
        gym.Wrapper.__init__(self, env)
        base = env.unwrapped
        if not isinstance(base, TextGenerationEnv):
            raise TypeError(f"Expected a TextGenerationEnv, got {type(base).__name__}.")
        self._base = base
        self.proposer = CandidateProposer(
            _language_model(language_model, base.task),
            base.task,
            num_candidates,
            chunk_tokens,
            params,
            encoder,
        )
        self.action_space = spaces.Discrete(num_candidates)
        self.observation_space = feature_box(self.proposer.feature_size)
        self.ledger = Ledger()
        self.candidates: list[Chunk] = []
        self._seed = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin a response; see `TextGenerationEnv.reset`."""
        _, info = self.env.reset(seed=seed, options=options)
        self._seed = _draw_seed(self._base.np_random)
        return self._show(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Append candidate `action`.

        Raises:
            EpisodeEndedError: The response has ended.
            ValueError: There is no such candidate.
        """
        check_not_terminal(self._base.get_state())
        index = _index(action, self.proposer.num_candidates)
        chunk = self.candidates[index]
        _, reward, terminated, truncated, info = self.env.step(chunk.token_ids)
        observation, info = self._show(info)
        return observation, reward, terminated, truncated, info

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """How Gymnasium makes this again; the id stands for the wrapper too."""
        base = self.env.spec
        return base if base is not None and base.id == CANDIDATES_ID else super().spec

    def get_state(self) -> CandidateState:
        """The state and the seed of its proposals."""
        return CandidateState(self._base.get_state(), self._seed)

    def set_state(self, state: CandidateState) -> tuple[Any, dict[str, Any]]:
        """Go on from a state of this view; returns what `reset` would.

        Raises:
            TypeError: It is no `CandidateState`.
        """
        if not isinstance(state, CandidateState):
            raise TypeError(
                f"Expected a CandidateState as returned by get_state(), got {type(state).__name__}."
            )
        _, info = self._base.set_state(state.text_state)
        self._seed = state.seed
        return self._show(info)

    def _show(self, info: dict[str, Any]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        states = [self._base.get_state()]
        proposals = self.proposer.propose(states, [self._seed], self.ledger)
        self.candidates = proposals[0]
        (features,) = self.proposer.features(states, proposals, self.ledger)
        return features, {**info, "candidates": self.proposer.texts(states, proposals)[0]}


class CandidateChunksVector(VectorWrapper[Any, Any, Any, Any, Any]):
    """The vector form of `CandidateChunks`: one language-model call a step for all environments.

    Args:
        env: A `TextGenerationVectorEnv`.
        language_model, num_candidates, chunk_tokens, params, encoder: As in `CandidateChunks`.

    Attributes:
        candidates: The K chunks of every environment.
        ledger: What proposing has cost so far.
    """

    def __init__(
        self,
        env: TextGenerationVectorEnv,
        language_model: LanguageModel | None = None,
        *,
        num_candidates: int = 4,
        chunk_tokens: int | None = None,
        params: SamplingParams = SamplingParams(),
        encoder: Encoder | str | None = "embedded",
    ) -> None:
        super().__init__(env)
        if not isinstance(env, TextGenerationVectorEnv):
            raise TypeError(f"Expected a TextGenerationVectorEnv, got {type(env).__name__}.")
        self._base = env
        self.proposer = CandidateProposer(
            _language_model(language_model, env.task),
            env.task,
            num_candidates,
            chunk_tokens,
            params,
            encoder,
        )
        self.single_action_space = spaces.Discrete(num_candidates)
        self.single_observation_space = feature_box(self.proposer.feature_size)
        self.action_space = batch_space(self.single_action_space, env.num_envs)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        self.ledger = Ledger()
        self.candidates: list[list[Chunk]] = []
        self._seeds = [0] * env.num_envs

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset; see `TextGenerationVectorEnv.reset`."""
        _, infos = self._base.reset(seed=seed, options=options)
        started = self._base.episode_started
        return self._show(infos, started)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Append candidate `actions[i]` in environment i."""
        count = self.proposer.num_candidates
        indices = [_index(action, count) for action in actions]
        # An environment without candidates has ended; the base resets it or says that it must be.
        ids = [
            candidates[index].token_ids if candidates else ()
            for candidates, index in zip(self.candidates, indices, strict=True)
        ]
        _, rewards, terminations, truncations, infos = self._base.step(ids)
        if self._base.autoreset_mode == AutoresetMode.SAME_STEP:
            infos = self._with_final_view(infos)
        everyone = np.ones(self._base.num_envs, dtype=np.bool_)
        observations, infos = self._show(infos, everyone)
        return observations, rewards, terminations, truncations, infos

    def _show(
        self, infos: dict[str, Any], shown: npt.NDArray[np.bool_]
    ) -> tuple[Any, dict[str, Any]]:
        """Propose anew everywhere; `shown` are the environments whose info is asked for."""
        for i in np.flatnonzero(self._base.episode_started).tolist():
            self._seeds[i] = _draw_seed(self._base.generator(i))
        states = self._base.states
        self.candidates = self.proposer.propose(states, self._seeds, self.ledger)
        texts = self.proposer.texts(states, self.candidates)
        rows = [
            {"candidates": row} if show else None for row, show in zip(texts, shown, strict=True)
        ]
        features = self.proposer.features(states, self.candidates, self.ledger)
        return features, {**infos, **stack_infos(rows)}

    def _with_final_view(self, infos: dict[str, Any]) -> dict[str, Any]:
        """Show the states in which episodes ended as this view does."""
        finals = self._base.final_states
        ended = [state for state in finals if state is not None]
        if not ended:
            return infos
        views = iter(self.proposer.features(ended, [[] for _ in ended], self.ledger))
        final_obs = np.full(len(finals), None, dtype=object)
        rows: list[dict[str, Any] | None] = [None] * len(finals)
        for i, state in enumerate(finals):
            if state is not None:
                final_obs[i] = next(views)
                rows[i] = {"candidates": []}
        final_info = {**infos["final_info"], **stack_infos(rows)}
        return {**infos, "final_obs": final_obs, "final_info": final_info}


def make_candidate_chunks(
    language_model: LanguageModel | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> CandidateChunks:
    """Make `mbrl_text_env/CandidateChunks-v0`: a `TextGenerationEnv` under the candidate view.

    Args:
        language_model: Proposes chunks; by default the embedded SmolLM2.
        tokenizer: By default the language model.
        **options: Those of `CandidateChunks` (`num_candidates`, `chunk_tokens`, `params`,
            `encoder`) and of `TextGenerationEnv`.
    """
    model = language_model if language_model is not None else _embedded()
    view = {name: options.pop(name) for name in _VIEW_OPTIONS if name in options}
    env = TextGenerationEnv(tokenizer=model if tokenizer is None else tokenizer, **options)
    return CandidateChunks(env, model, **view)


def make_candidate_chunks_vector(
    num_envs: int = 1,
    language_model: LanguageModel | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> CandidateChunksVector:
    """Make the vector form of `mbrl_text_env/CandidateChunks-v0`; see `make_candidate_chunks`."""
    model = language_model if language_model is not None else _embedded()
    view = {name: options.pop(name) for name in _VIEW_OPTIONS if name in options}
    env = TextGenerationVectorEnv(
        num_envs, tokenizer=model if tokenizer is None else tokenizer, **options
    )
    return CandidateChunksVector(env, model, **view)


def _language_model(model: LanguageModel | None, task: TextTask) -> LanguageModel:
    if model is not None:
        return model
    return task.tokenizer if isinstance(task.tokenizer, LanguageModel) else _embedded()


@functools.cache
def _embedded() -> LanguageModel:
    # One engine serves all environments that were made without a model of their own.
    from mbrl_text_env.language_models.catalogue import embedded

    return embedded()


def _draw_seed(generator: np.random.Generator) -> int:
    return int(generator.integers(2**63))


def _index(action: Any, count: int) -> int:
    try:
        index = operator.index(action)
    except TypeError:
        index = -1
    if not 0 <= index < count:
        raise ValueError(
            f"Invalid action: expected the index of a candidate, 0 to {count - 1}, got {action!r}."
        )
    return index
