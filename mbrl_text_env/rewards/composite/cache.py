"""A reward that caches scores on disk, to avoid scoring a response twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.rewards.base import RewardError, Scores, score_responses, score_steps
from mbrl_text_env.rewards.composite.combinators import Wrapper
from mbrl_text_env.runs import identity
from mbrl_text_env.types import FloatArray, Prompt

_CREATE = "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID"
_SELECT = "SELECT value FROM scores WHERE key = ?"
_BUSY_SECONDS = 60.0


@dataclass(eq=False, repr=False)
class CachedReward(Wrapper):
    """A reward that stores its scores in a file and reads them from there the next time.

    The key of a score consists of the reward model (`runs.identity`), this package's version, the
    prompt's content and metadata, and the response. `num_found` counts the scores read from the
    file and `num_computed` the others. Several processes can share a file; killing one does not
    damage it. Cached scores are charged too, so an agent's budget is independent of earlier runs.

    Args:
        reward: The reward. It must be deterministic, like every reward.
        path: A SQLite file; created if it does not exist.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = CachedReward(SentimentReward(), "scores.sqlite")
        >>> reward.score([Prompt.from_text("Hi")], ["It was good."])  # doctest: +SKIP
        array([0.4404])
    """

    path: str | Path

    def __post_init__(self) -> None:
        super().__post_init__()
        self._key = [version("mbrl-text-env"), identity(self.reward)]
        self.num_found = self.num_computed = 0

    def identity(self) -> Any:
        """Return the identity of the reward, since caching does not change its scores."""
        return identity(self.reward)

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the reward's scores and parts, each float64[B]."""
        keys = [self._digest(*row) for row in zip(prompts, responses, strict=True)]

        def compute(rows: Sequence[int]) -> list[Any]:
            asked, said = [prompts[i] for i in rows], [responses[i] for i in rows]
            scores = score_responses(self.reward, asked, said)
            return [[float(total), scores.parts_of(i)] for i, total in enumerate(scores.total)]

        values = self._looked_up(keys, compute)
        names = values[0][1] if values else ()
        parts = {name: np.array([part[name] for _, part in values]) for name in names}
        return Scores(np.array([total for total, _ in values], dtype=np.float64), parts)

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> FloatArray:
        """Return float64[len(steps)], the reward's step scores."""
        key = self._digest(prompt, list(steps))
        (values,) = self._looked_up(
            [key], lambda _: [score_steps(self.reward, prompt, steps).tolist()]
        )
        return np.array(values, dtype=np.float64)

    def _looked_up(
        self, keys: Sequence[bytes], compute: Callable[[Sequence[int]], list[Any]]
    ) -> list[Any]:
        """Return the values of the keys; call `compute` with the rows that are missing."""
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        with self._connection() as connection:
            kept = {key: connection.execute(_SELECT, (key,)).fetchone() for key in first}
        found = {key: json.loads(value[0]) for key, value in kept.items() if value is not None}
        rows = sorted(first[key] for key in first.keys() - found.keys())
        if rows:
            computed = dict(zip([keys[i] for i in rows], compute(rows), strict=True))
            values = [(key, json.dumps(value)) for key, value in computed.items()]
            with self._connection() as connection:
                connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", values)
            found.update(computed)
        self.num_computed += len(rows)
        self.num_found += len(keys) - len(rows)
        return [found[key] for key in keys]

    def _digest(self, prompt: Prompt, response: str | list[str]) -> bytes:
        content = prompt.content
        said = content if isinstance(content, str) else [[m.role, m.content] for m in content]
        try:
            text = json.dumps([self._key, said, prompt.metadata, response], sort_keys=True)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"Reward model {self.name!r}, prompt {prompt.id!r}: expected metadata of JSON "
                f"values as a cache key, got {prompt.metadata!r:.80} ({error}). Remove values "
                "that JSON cannot represent, or do not cache."
            ) from error
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Open a connection, and commit if the block ends without an error."""
        try:
            # One connection per call, because threads must not share connections.
            with closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as connection:
                connection.execute(_CREATE)
                with connection:
                    yield connection
        except sqlite3.Error as error:
            raise RewardError(
                f"Reward model {self.name!r}: expected {str(self.path)!r} to be a readable and "
                f"writable file of scores, got {type(error).__name__}: {error}. Remove the "
                "file, or pass another path."
            ) from error
