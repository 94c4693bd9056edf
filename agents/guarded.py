"""Guarded search: avoid text that the reward's bound rules out, and insert what is missing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mbrl_text_env.agents.driver import ask
from mbrl_text_env.agents.search import Expansion, Planner, Search, check_target
from mbrl_text_env.agents.tree import Node
from mbrl_text_env.language_models.base import Guard, LanguageModel, prefix_of
from mbrl_text_env.mdp import transition
from mbrl_text_env.rewards.base import reward_bounds
from mbrl_text_env.types import Chunk, FinishReason, TextState
from mbrl_text_env.values import ValueModel

# Responses if neither a budget nor a target ends the search.
_WITHOUT_BUDGET = 4
# Twice the rounding error of a fraction such as 3 of 3.
_SAME = 1e-9
# Insertions per response. With more, the text consists mostly of inserted pieces.
_ADDITIONS = 8
# Texts to score at each position.
_TRIES = 4
_NO_ENCODING = LanguageModel.encode_text
_SENTENCE_ENDS = (".", "!", "?", '"', "”", "…", "。", ")", "]", "}")


@dataclass(eq=False, kw_only=True)
class Guarded(Planner):
    """Sample only responses that can still reach the target, until one does.

    During sampling, a token that lowers the reward's bound below the target is resampled from the
    probable tokens that do not (`language_models.base.Guard` defines the distribution). A response
    can end only if its score reaches the target. If it would end too early, cannot continue or gets
    too long, the reward's suggestion (`RewardModel.suggest`) is inserted at the end of a sentence
    or in the middle. The model then continues after it, or ends.

    Scoring a text that may end is charged as a reward call; bounds and suggestions are free.
    Inserted tokens have the language model's log-probabilities, which are charged. A server that
    cannot compute them needs `additions=0`. Models without `guards` resample rejected positions.

    Source: Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted
    Rejection Sampling", 2025 (lazy checks). Deviation: there are no weights, because the verifier
    decides, not a posterior. The insertions are this project's.

    Args:
        target: Score at which the search ends; by default the maximum that the bound allows.
        floor: Minimum log-probability (nats) of a replacement token, and of an end after an
            insertion.
        candidates: Number of most probable tokens tried to replace a rejected one.
        additions: 0 disables insertions.

    Raises:
        ValueError: The reward has no bound for a prompt.

    Example:
        >>> planner = Guarded(lm, ConstraintsReward())  # doctest: +SKIP
    """

    name = "guarded"

    target: float | None = None
    floor: float = -7.0
    candidates: int = 64
    additions: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.target)
        if not self.floor <= 0 or self.candidates < 1:
            raise ValueError(
                "Expected floor (a log-probability) <= 0 and candidates >= 1, got "
                f"floor={self.floor} and candidates={self.candidates}."
            )

    async def plan(self, search: Search) -> None:
        """Sample guarded responses until one reaches the target or the budget is exhausted."""
        most = search.most_reachable()
        if self.target is None and search.reward_model.is_bound_wrong:
            await search.expand([Expansion(search.tree.root, valued=False)])
            return
        if self.target is None and most == float("inf"):
            raise ValueError(
                f"{self.name}: expected a target, or a reward whose `bound` limits the score of "
                f"prompt {search.tree.root.state.prompt.id!r}; got no target, and "
                f"{search.reward_model.name!r} has no finite bound."
            )
        if self.target is not None and self.target > most + _SAME:
            warnings.warn(
                f"{self.name}: expected a target of at most {most:g}, the maximum of "
                f"{search.reward_model.name!r} for prompt "
                f"{search.tree.root.state.prompt.id!r}, got {self.target:g}; using {most:g}.",
                stacklevel=2,
            )
        target = most if self.target is None else min(self.target, most)
        options = self.floor, self.candidates, bool(self.additions)
        await GuardedSearch(search, target, *options).run()

    def values(self) -> ValueModel | None:
        """None: this planner uses no values."""
        return None


def verifier_target(search: Search, target: float | None) -> float | None:
    """The smaller of `target` and a verifier's bound; None if there is no bound to guard."""
    most = search.most_reachable()
    if not search.reward_model.is_verifier or not math.isfinite(most):
        return None
    return most if target is None else min(target, most)


@dataclass(frozen=True)
class GuardedSearch:
    """Sample guarded responses from a search's root until one scores `target`; see `Guarded`."""

    search: Search
    target: float
    floor: float = -7.0
    candidates: int = 64
    adds: bool = True
    weighted: bool = False
    guard: Guard = field(init=False)

    def __post_init__(self) -> None:
        kept = self.search.finish_usage(self.search.tree.root.state)
        guard = Guard(self._allows, self.floor, self.candidates, self.weighted, kept)
        object.__setattr__(self, "guard", guard)
        own = getattr(type(self.search.language_model), "encode_text", _NO_ENCODING)
        object.__setattr__(self, "adds", self.adds and own is not _NO_ENCODING)

    async def run(self) -> None:
        """Sample one response, or without a budget up to 4, until one reaches the target."""
        root = self.search.tree.root
        while not self._is_reached() and await self._respond(root):
            if self.search.is_capped or root.samples >= _WITHOUT_BUDGET:
                return

    async def _respond(self, root: Node) -> bool:
        """Sample one response with its insertions; False if the budget does not allow it."""
        if (node := await self._drawn(root)) is None:
            return False
        for _ in range(_ADDITIONS if self.adds else 0):
            if self._is_reached() or (added := await self._added(node)) is None:
                break
            if added.is_terminal or (following := await self._drawn(added)) is None:
                break
            node = following
        return True

    async def _drawn(self, node: Node) -> Node | None:
        [row] = await self.search.expand([Expansion(node, guard=self.guard, valued=False)])
        return row[0] if row else None

    def _is_reached(self) -> bool:
        return self.search.has_reached(self.target - _SAME)

    def _allows(
        self, states: Sequence[TextState], texts: Sequence[str], ended: Sequence[bool]
    ) -> list[bool]:
        """`Guard.allows`. It also allows an end below the target if there is a suggestion."""
        prompts = [state.prompt for state in states]
        bounds = reward_bounds(self.search.reward_model, prompts, texts)
        return [
            bool(bound >= self.target - _SAME) and (not ends or self._may_end(text))
            for bound, text, ends in zip(bounds, texts, ended, strict=True)
        ]

    def _may_end(self, text: str) -> bool:
        # Allowed if the budget does not allow a score: the answer is scored anyway.
        score = self.search.score_of(text)
        return score is None or score >= self.target - _SAME or any(self._suggested(text))

    async def _reaches(self, text: str) -> bool:
        [score] = await ask(_scores_of, self.search, texts=[text])
        return score is not None and score >= self.target - _SAME

    def _suggested(self, text: str) -> Iterator[str]:
        """Yield suggestions after which the text can still reach the target."""
        reward, prompt = self.search.reward_model, self.search.tree.root.state.prompt
        for piece in reward.suggest(prompt, text) if self.adds else ():
            [bound] = reward_bounds(reward, [prompt], [text + piece])
            if self._ids(piece) and bound >= self.target - _SAME:
                yield piece

    async def _added(self, node: Node) -> Node | None:
        """Replace the end of a sampled response by an insertion; None if there is none."""
        places = list(self._places(node))
        reason, whole = node.state.finish_reason, places[-1]
        ends = [place for place in places[1:] if _is_end(place.text)]
        if reason != "stop" and ends and (found := await self._ended(ends[-1])):
            return found
        if reason != "length" and (found := await self._continued(whole)):
            return found
        if reason == "stop":
            return await self._ended(ends[-1]) if ends else None
        # The response is too long: insert the missing piece in its first half.
        half = [place for place in ends if place.length <= whole.length // 2]
        return await self._continued(half[-1]) if reason == "length" and half else None

    def _places(self, node: Node) -> Iterator[_Place]:
        """Yield the states within a sampled chunk, from its start."""
        parent, chunk = node.step()
        decode = self.search.language_model.decode
        # The last token is a stop token, or one that no token may follow.
        whole = len(chunk) - (node.state.finish_reason != "length")
        before, limit = parent.state, self.search.limit
        for length in range(whole + 1):
            kept = Chunk(chunk.token_ids[:length], chunk.logprobs[:length])
            state = transition(before, kept, limit + 1) if length else before
            yield _Place(parent, kept, state, decode(state.response_ids))

    async def _continued(self, place: _Place) -> Node | None:
        """Insert the first suggestion that fits, and end after it if that is probable."""
        for piece in self._suggested(place.text):
            ids = self._ids(piece)
            if self._has_room(place, ids):
                logprobs = await self._logprobs(place.state, (*ids, self._stop))
                if logprobs is None:
                    return None
                ends = logprobs[-1] >= self.floor and await self._reaches(place.text + piece)
                added = (*ids, self._stop) if ends else ids
                return await self._append(place, added, logprobs[: len(added)])
        return None

    async def _ended(self, place: _Place) -> Node | None:
        """End the response, after a suggestion if needed; None if the target is out of reach."""
        tried = 0
        for piece in ("", *self._suggested(place.text)):
            ids = self._ids(piece)
            if tried < _TRIES and self._has_room(place, ids):
                tried += 1
                if await self._reaches(place.text + piece):
                    ended = (*ids, self._stop)
                    logprobs = await self._logprobs(place.state, ended)
                    return None if logprobs is None else await self._append(place, ended, logprobs)
        return None

    @property
    def _stop(self) -> int:
        return min(self.search.language_model.stop_token_ids)

    def _ids(self, piece: str) -> tuple[int, ...]:
        return tuple(self.search.language_model.encode_text(piece)) if piece else ()

    def _has_room(self, place: _Place, ids: Sequence[int]) -> bool:
        """Whether the tokens and a stop token fit."""
        return len(place.state.response_ids) + len(ids) < self.search.limit

    async def _logprobs(self, state: TextState, ids: tuple[int, ...]) -> tuple[float, ...] | None:
        """Log-probability of each inserted token; None if the budget does not allow it."""
        search = self.search
        most = search.language_model.usage_bound(len(prefix_of(state)), [len(ids)])
        if not search.ledger.affords(most + search.finish_usage(search.tree.root.state)):
            return None
        asked = ask(
            search.language_model.logprobs,
            states=[state],
            chunks=[Chunk(ids)],
            ledgers=[search.ledger],
        )
        return tuple((await asked)[0])

    async def _append(
        self, place: _Place, ids: tuple[int, ...], logprobs: tuple[float, ...]
    ) -> Node:
        """Add the tokens up to a place, followed by `ids`, as a node."""
        kept = place.kept
        reason: FinishReason | None = "stop" if ids[-1] == self._stop else None
        chunk = Chunk((*kept.token_ids, *ids), (*kept.logprobs, *logprobs), reason)
        added = await self.search.append(place.parent, chunk)
        added.note = f"added: {self.search.language_model.decode(ids)!r}"
        return added


def _scores_of(search: Search, texts: Sequence[str]) -> list[float | None]:
    return [search.score_of(text) for text in texts]


@dataclass(frozen=True)
class _Place:
    """A position within a chunk that was sampled after `parent`: the tokens kept and the state."""

    parent: Node
    kept: Chunk
    state: TextState
    text: str

    @property
    def length(self) -> int:
        return len(self.kept)


def _is_end(text: str) -> bool:
    """Whether a text ends with a sentence or a line."""
    return text.endswith("\n") or text.rstrip().endswith(_SENTENCE_ENDS)
