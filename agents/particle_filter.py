"""Sequential Monte Carlo: particles that are resampled by what their value has gained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mbrl_text_env.agents.base import check_positive
from mbrl_text_env.agents.search import Expansion, Node, Planner, Search
from mbrl_text_env.language_models.base import spawn_seed, stream
from mbrl_text_env.types import FloatArray

_WITHOUT_BUDGET = 4
# Apart from the streams that chunks are drawn from.
_RESAMPLING = 5


@dataclass(eq=False, kw_only=True)
class ParticleFilter(Planner):
    """Twisted sequential Monte Carlo over chunks.

    Particles are partial responses. At each step every particle draws one chunk from the language
    model and its weight is multiplied by exp((value after - value before) / `temperature`). When
    the effective number of particles falls below half of them, and at the end, they are resampled.
    What is sampled tends to the language model's distribution times exp(reward / `temperature`);
    the answer is the best of the responses. A node's visit count is the number of particles that
    have gone on from there, or ended there.

    Sources: Zhao et al., "Probabilistic Inference in Language Models via Twisted Sequential Monte
    Carlo", 2024 (the target and the twist functions); Puri et al., "A Probabilistic Inference
    Approach to Inference-Time Scaling of LLMs using Particle-Based Monte Carlo Methods", 2025 (the
    use as a search); Kitagawa, "Monte Carlo Filter and Smoother", 1996 (systematic resampling).
    Deviation: the root has no value, so the first weights come from the values alone.

    Args:
        particles: Their number; None as many as the budget allows, or 4 without one.
        temperature: In units of the reward; small values follow the value more closely.

    The other arguments are those of every `Planner`.
    """

    name = "particle-filter"

    particles: int | None = None
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(particles=self.particles)
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}.")

    async def plan(self, search: Search) -> None:
        """Move one set of particles from the root to the end."""
        root = search.tree.root
        count = self.particles or search.width(root, self.chunk_tokens)
        particles = [root] * (_WITHOUT_BUDGET if count is None else max(1, count))
        rng = stream(spawn_seed(search.seed, _RESAMPLING), root.state, root.samples)
        log_weights = np.zeros(len(particles))
        while any(not particle.is_terminal for particle in particles):
            moved = await self._moved(search, particles)
            if moved is None:
                break
            gains = [_worth(new) - _worth(old) for old, new in zip(particles, moved, strict=True)]
            log_weights = log_weights + np.asarray(gains) / self.temperature
            particles = moved
            weights = np.exp(log_weights - log_weights.max())
            weights /= weights.sum()
            few = 1.0 / (weights**2).sum() < len(particles) / 2
            if few or all(particle.is_terminal for particle in particles):
                particles = [particles[i] for i in systematic(weights, rng.random())]
                log_weights = np.zeros(len(particles))
            _count(particle for particle in particles if not particle.is_terminal)
        _count(particle for particle in particles if particle.is_terminal)

    async def _moved(self, search: Search, particles: list[Node]) -> list[Node] | None:
        """Each particle after one more chunk; None where the budget does not allow all of them."""
        counts = Counter(particle for particle in particles if not particle.is_terminal)
        rows = await search.expand(
            Expansion(node, count, self.chunk_tokens) for node, count in counts.items()
        )
        children = {node: list(row) for node, row in zip(counts, rows, strict=True)}
        if any(len(children[node]) < count for node, count in counts.items()):
            return None
        return [p if p.is_terminal else children[p].pop(0) for p in particles]


def systematic(weights: FloatArray, uniform: float) -> list[int]:
    """Systematic resampling: as many indices as weights, each floor or ceiling of n x its weight.

    Args:
        weights: float64[n], sum to 1.
        uniform: In [0, 1).

    Example:
        >>> systematic(np.array([0.5, 0.25, 0.25, 0.0]), 0.5)
        [0, 0, 1, 2]
    """
    places = (np.arange(len(weights)) + uniform) / len(weights)
    # Rounding may leave the last sum a little below 1.
    found = np.searchsorted(np.cumsum(weights), places, side="right")
    return [min(int(i), len(weights) - 1) for i in found]


def _count(particles: Iterable[Node]) -> None:
    for particle in particles:
        particle.visits += 1
        particle.total += _worth(particle)


def _worth(node: Node) -> float:
    return 0.0 if node.worth is None else node.worth
