"""Planners that extend partial responses in stages: beam search, adaptive and particle filter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mbrl_text_env.agents.guarded import GuardedSearch, verifier_target
from mbrl_text_env.agents.search import Expansion, Planner, Search, check_target, value_of
from mbrl_text_env.agents.tree import Node, partial
from mbrl_text_env.language_models.base import Guard, spawn_seed, stream, watches_guards
from mbrl_text_env.rewards.base import reward_bounds
from mbrl_text_env.types import FloatArray, check_positive

# Candidates per stage, or particles, if neither the user nor a budget sets them.
_WITHOUT_BUDGET = 4
# Candidates per stage of the adaptive search if no budget sets them.
_NARROW = 8
# Values that differ by less than this are equal.
_SAME = 1e-9
# Separates resampling from the random streams that sample chunks.
_RESAMPLING = 5


@dataclass(eq=False, kw_only=True)
class BeamSearch(Planner):
    """Beam search over chunks: keep the best partial responses after each stage.

    With `beam_width=1` this is blockwise best-of-K. With `subtrees` above 1, the beams are divided
    among independent searches, which prevents an early favourite from crowding out the rest.

    Sources: Mudgal et al., "Controlled Decoding from Language Models", 2024 (blockwise best-of-K);
    Snell et al., "Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model
    Parameters", 2024 (beam search with a value); Beeching et al., "Scaling test-time compute with
    open models", 2024 (diverse verifier tree search, `subtrees`). Deviations: chunks have a fixed
    number of tokens; responses that end leave the beam and are scored; the number of candidates is
    computed from the remaining budget at every stage.

    Args:
        value_model: Ranks partial responses; without one they stay in sampling order.
        beam_width: Partial responses kept at each stage, over all subtrees.
        candidates: Chunks sampled per stage, over all beams. None uses as many as the budget allows
            until the end of the response, or 4 without one.
        subtrees: Number of independent searches, at most `beam_width`.

    Example:
        >>> planner = BeamSearch(lm, reward, value, beam_width=2)  # doctest: +SKIP
    """

    name = "beam"

    beam_width: int = 1
    candidates: int | None = None
    subtrees: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            beam_width=self.beam_width, subtrees=self.subtrees, candidates=self.candidates
        )
        if self.subtrees > self.beam_width:
            raise ValueError(
                f"subtrees: expected at most beam_width ({self.beam_width}), got {self.subtrees}."
            )

    async def plan(self, search: Search) -> None:
        """Run one beam search from the root."""
        await beam_search(
            search, self.chunk_tokens, self.beam_width, self.candidates, self.subtrees
        )


async def beam_search(
    search: Search,
    chunk_tokens: int,
    beam_width: int,
    candidates: int | None = None,
    subtrees: int = 1,
) -> None:
    """Run one beam search from the root of `search`; see `BeamSearch` for the arguments."""
    # The beams of each subtree. All subtrees start from the root.
    frontiers: list[list[Node]] = [[search.tree.root]] * subtrees
    widths = shares(beam_width, subtrees)
    while any(frontiers):
        beams = [node for frontier in frontiers for node in frontier]
        width = candidates or search.width(beams[0], chunk_tokens)
        total = _WITHOUT_BUDGET if width is None else width
        drawn = iter(await _drawn(search, beams, total, chunk_tokens))
        frontiers = [
            _kept(search, [next(drawn) for _ in frontier], width)
            for frontier, width in zip(frontiers, widths, strict=True)
        ]


async def _drawn(
    search: Search, beams: Sequence[Node], total: int, chunk_tokens: int
) -> list[list[Node]]:
    """Sample `total` chunks, split equally among the beams, and return each beam's children."""
    counts = shares(total, len(beams))
    asked = zip(beams, counts, strict=True)
    rows = iter(await search.expand(Expansion(b, n, chunk_tokens) for b, n in asked if n))
    return [next(rows) if count else [] for count in counts]


def _kept(search: Search, rows: Sequence[Sequence[Node]], width: int) -> list[Node]:
    drawn = [node for row in rows for node in row]
    kept = search.ranked(drawn)[:width]
    for rank, node in enumerate(kept, start=1):
        node.note = f"kept: rank {rank} of {len(drawn)} candidates"
    return kept


def shares(total: int, count: int) -> list[int]:
    """Split `total` into `count` parts that differ by at most 1, larger parts first."""
    each, more = divmod(total, count)
    return [each + (i < more) for i in range(count)]


@dataclass(eq=False, kw_only=True)
class Adaptive(Planner):
    """Beam search that keeps more beams if the value is uncertain and fewer if it is not.

    Each stage samples as many candidate chunks as the budget allows until the end. Of n candidates,
    the best n / `candidates_per_beam` are kept, and also all candidates within `margin` of the last
    one kept. Chunks start as short as `value_share` allows. They double in length after a stage in
    which all candidates have equal values, and return to the start length after any other stage.

    A partial response is dropped if the best complete response exceeds its mean value by more than
    `caution` + 2 standard deviations, or if the reward's bound shows that it cannot do better. If
    the reward is a verifier with a bound, the search is that of `Guarded`.

    Sources: Mudgal et al., "Controlled Decoding from Language Models", 2024 (blockwise choice);
    Snell et al., "Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model
    Parameters", 2024 (beam width by the budget); Kidambi et al., "MOReL: Model-Based Offline
    Reinforcement Learning", 2020 (pessimism by the model's uncertainty). The rule for keeping
    candidates is this project's: successive elimination (Even-Dar et al., "Action Elimination and
    Stopping Conditions", 2006) applied to the candidates of a stage.

    Args:
        value_model: Ranks partial responses. `margin` and `caution` need its standard deviations.
        candidates_per_beam: Candidates for each beam that is kept regardless of `margin`.
        margin: Candidates within this many standard deviations are also kept; at least 0.
        caution: Partial responses are ranked by mean - `caution` x standard deviation; at least 0.
        target: Score at which the search ends; it then starts with single responses. None uses the
            whole budget, or a verifier's bound.
        value_share: Maximum FLOPs spent on values, as a fraction of those spent on sampling.
        shortest_chunk: Minimum tokens per chunk; `chunk_tokens` is the maximum.

    Example:
        >>> planner = Adaptive(lm, reward, value, target=1.0)  # doctest: +SKIP
    """

    name = "adaptive"

    candidates_per_beam: int = 4
    margin: float = 0.1
    value_share: float = 0.5
    caution: float = 0.0
    target: float | None = None
    shortest_chunk: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            candidates_per_beam=self.candidates_per_beam, shortest_chunk=self.shortest_chunk
        )
        check_target(self.target)
        if not self.value_share > 0:
            raise ValueError(f"value_share: expected a number above 0, got {self.value_share}.")
        for name in ("margin", "caution"):
            if not (number := getattr(self, name)) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {number}.")

    async def plan(self, search: Search) -> None:
        """Run one search from the root to the end of the responses."""
        if (target := verifier_target(search, self.target)) is not None:
            await GuardedSearch(search, target).run()
            return
        beams = [search.tree.root]
        pays = math.ceil(search.value_tokens(search.tree.root) / self.value_share)
        shortest = max(self.shortest_chunk, pays)
        size = shortest = min(shortest, self.chunk_tokens)
        while beams and not search.has_reached(self.target):
            width = self._width(search, beams[0], size)
            drawn = [node for row in await _drawn(search, beams, width, size) for node in row]
            beams = self._kept(search, drawn, max(1, width // self.candidates_per_beam))
            size = shortest if self._tells(drawn) else min(2 * size, self.chunk_tokens)

    def _width(self, search: Search, node: Node, size: int) -> int:
        """Number of candidates in a stage."""
        affordable = search.width(node, size)
        if affordable is None:
            return _NARROW
        return affordable if self.target is None else min(affordable, 1 << search.round)

    def _kept(self, search: Search, drawn: Sequence[Node], certain: int) -> list[Node]:
        """Keep the best `certain` candidates, and those within `margin` of the last of them."""
        ranked = sorted(self._hopeful(search, partial(drawn)), key=self._cautious, reverse=True)
        if not ranked:
            return []
        last = ranked[min(certain, len(ranked)) - 1]
        cut = self._cautious(last) - self.margin * last.std - _SAME
        kept = [node for node in ranked if self._cautious(node) >= cut]
        for rank, node in enumerate(kept, start=1):
            told = "" if rank <= certain else ", within the margin of the last one"
            node.note = f"kept: rank {rank} of {len(drawn)} candidates{told}"
        return kept

    def _hopeful(self, search: Search, nodes: Sequence[Node]) -> list[Node]:
        best = search.tree.best()
        if best is None or best.score is None:
            return list(nodes)
        prompts = [node.state.prompt for node in nodes]
        texts = [search.language_model.decode(node.state.response_ids) for node in nodes]
        bounds = reward_bounds(search.reward_model, prompts, texts)
        return [
            node
            for node, bound in zip(nodes, bounds, strict=True)
            if bound > best.score and self._may_reach(node, best.score)
        ]

    def _may_reach(self, node: Node, score: float) -> bool:
        is_sure = node.value is not None and node.std > 0
        return not is_sure or value_of(node) + (self.caution + 2.0) * node.std >= score

    def _tells(self, drawn: Sequence[Node]) -> bool:
        """Whether the values of the candidates differ."""
        worths = [self._cautious(node) for node in partial(drawn)]
        return bool(worths) and max(worths) - min(worths) > _SAME

    def _cautious(self, node: Node) -> float:
        return value_of(node) - self.caution * node.std


@dataclass(eq=False, kw_only=True)
class ParticleFilter(Planner):
    """Twisted sequential Monte Carlo over chunks.

    Particles are partial responses. At each step, every particle samples one chunk from the
    language model, and its weight is multiplied by exp((value after - value before) /
    `temperature`). Particles are resampled at the end, and whenever the effective sample size falls
    below half their number. The sampled distribution approaches the language model's times
    exp(reward / `temperature`), with `guarded=1` over responses that reach the target. The answer
    is the best of them. `Node.visits` counts the particles that continued or ended at the node.

    Sources: Zhao et al., "Probabilistic Inference in Language Models via Twisted Sequential Monte
    Carlo", 2024 (the target and the twist functions); Puri et al., "A Probabilistic Inference
    Approach to Inference-Time Scaling of LLMs using Particle-Based Monte Carlo Methods", 2025 (the
    use as a search); Kitagawa, "Monte Carlo Filter and Smoother", 1996 (systematic resampling);
    Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted Rejection
    Sampling", 2025 (the weights with a guard).
    Deviation: the root has no value, so the first weights depend on the first values only.

    Args:
        particles: Number of particles. None uses the budget, or 4 without one.
        temperature: In units of the reward. Low values follow the value more closely.
        guarded: 1 to sample with a guard (`Guard.weighted`). It applies if the reward is a verifier
            with a bound and the language model supports guards.
    """

    name = "particle-filter"

    particles: int | None = None
    temperature: float = 0.1
    guarded: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(particles=self.particles)
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}.")
        if self.guarded not in (0, 1):
            raise ValueError(f"guarded: expected 0 or 1, got {self.guarded!r}.")

    async def plan(self, search: Search) -> None:
        """Move one set of particles from the root to the end."""
        root, guard = search.tree.root, None
        target = verifier_target(search, None) if self.guarded else None
        if target is not None and watches_guards(search.language_model):
            guard = GuardedSearch(search, target, adds=False, weighted=True).guard
        count = self.particles or search.width(root, self.chunk_tokens)
        particles = [root] * (_WITHOUT_BUDGET if count is None else max(1, count))
        rng = stream(spawn_seed(search.seed, _RESAMPLING), root.state, root.samples)
        log_weights = np.zeros(len(particles))
        while any(not particle.is_terminal for particle in particles):
            moved = await self._moved(search, particles, guard)
            if moved is None:
                break
            gains = [_worth(new) - _worth(old) for old, new in zip(particles, moved, strict=True)]
            # Ended particles did not change.
            steps = [
                0.0 if old is new else new.step()[1].log_weight
                for old, new in zip(particles, moved, strict=True)
            ]
            log_weights = log_weights + np.asarray(gains) / self.temperature + np.asarray(steps)
            particles = moved
            if not np.isfinite(log_weights.max()):
                break
            weights = np.exp(log_weights - log_weights.max())
            weights /= weights.sum()
            few = 1.0 / (weights**2).sum() < len(particles) / 2
            # Resampling also replaces particles of weight 0, which cannot continue.
            few |= not np.isfinite(log_weights).all()
            if few or all(particle.is_terminal for particle in particles):
                particles = [particles[i] for i in systematic(weights, rng.random())]
                log_weights = np.zeros(len(particles))
            _count(particle for particle in particles if not particle.is_terminal)
        _count(particle for particle in particles if particle.is_terminal)

    async def _moved(
        self, search: Search, particles: list[Node], guard: Guard | None
    ) -> list[Node] | None:
        """Extend each particle by one chunk; None if the budget does not allow it for all."""
        counts = Counter(particle for particle in particles if not particle.is_terminal)
        rows = await search.expand(
            Expansion(node, count, self.chunk_tokens, guard=guard) for node, count in counts.items()
        )
        children = {node: list(row) for node, row in zip(counts, rows, strict=True)}
        if any(len(children[node]) < count for node, count in counts.items()):
            return None
        return [p if p.is_terminal else children[p].pop(0) for p in particles]


def systematic(weights: FloatArray, uniform: float) -> list[int]:
    """Systematic resampling: n indices for weights float64[n] with sum 1; `uniform` in [0, 1)."""
    places = (np.arange(len(weights)) + uniform) / len(weights)
    # Rounding can make the cumulative sum end slightly below 1.
    found = np.searchsorted(np.cumsum(weights), places, side="right")
    return [min(int(i), len(weights) - 1) for i in found]


def _count(particles: Iterable[Node]) -> None:
    for particle in particles:
        particle.visits += 1
        particle.total += _worth(particle)


def _worth(node: Node) -> float:
    return 0.0 if node.worth is None else node.worth
