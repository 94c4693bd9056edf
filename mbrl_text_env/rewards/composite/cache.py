"""Scores kept on the disk, so that no text is scored twice."""

from __future__ import annotations

import hashlib
import inspect
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.rewards.base import (
    ObjectReward,
    RewardError,
    RewardLike,
    Scores,
    reward_name,
    score_responses,
    score_steps,
)
from mbrl_text_env.rewards.composite.combinators import Wrapper
from mbrl_text_env.runs import identity as part_identity
from mbrl_text_env.types import FloatArray, Prompt

_CREATE = "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID"
_SELECT = "SELECT value FROM scores WHERE key = ?"
_BUSY_SECONDS = 60.0


class CachedReward(Wrapper):
    """A reward whose scores are kept in a file and looked up there the next time.

    The key of a score is the reward model (see `identity`), the prompt's content and metadata, and
    the response; `num_found` and `num_computed` count them. Several processes may share a file, and
    one that is killed leaves it whole. A score that is looked up is charged too, so that what
    agents may spend does not depend on what was run before.

    Args:
        reward: The reward; deterministic, as all are, and not `RunningNormalise`.
        path: A SQLite file; made if it is not there.
        key: Names the reward model in the file instead of `identity(reward)`; needed for functions
            and for rewards that hold objects. Change it when the reward changes.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = CachedReward(SentimentReward(), "scores.sqlite")
        >>> reward.score([Prompt.from_text("Hi")], ["It was good."])  # doctest: +SKIP
        array([0.4404])
    """

    def __init__(self, reward: RewardLike, path: str | Path, *, key: str | None = None) -> None:
        super().__init__(reward)
        self.path = Path(path)
        self.key = identity(self.reward) if key is None else key
        self.num_found = self.num_computed = 0

    def identity(self) -> Any:
        """That of the reward: scores that are looked up are the same."""
        return part_identity(self.reward)

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
        """Return float64[len(steps)], the reward's."""
        key = self._digest(prompt, list(steps))
        (values,) = self._looked_up(
            [key], lambda _: [score_steps(self.reward, prompt, steps).tolist()]
        )
        return np.array(values, dtype=np.float64)

    def _looked_up(
        self, keys: Sequence[bytes], compute: Callable[[Sequence[int]], list[Any]]
    ) -> list[Any]:
        """The values of the keys; `compute` is asked for those of the rows that are missing."""
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
            text = json.dumps([self.key, said, prompt.metadata, response], sort_keys=True)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"Reward model {self.name!r}, prompt {prompt.id!r}: expected metadata of JSON "
                f"values to look a score up by, got {prompt.metadata!r:.80} ({error}). Leave out "
                "what JSON cannot hold, or do not cache."
            ) from error
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are kept if the block ends without an error."""
        try:
            # A connection of its own for every call: they may not pass from thread to thread.
            with closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as connection:
                connection.execute(_CREATE)
                with connection:
                    yield connection
        except sqlite3.Error as error:
            raise RewardError(
                f"Reward model {self.name!r}: expected {str(self.path)!r} to be a file of scores "
                f"that can be read and written, got {type(error).__name__}: {error}. Remove the "
                "file, or give another path."
            ) from error


def identity(reward: object) -> str:
    """What tells a reward model from others: its class and what it was made with.

    Read are the attributes that have the names of the constructor's arguments: numbers, texts,
    paths, dataclasses, other rewards, and lists of them; others, such as functions, are an error. A
    path to a folder counts with the sizes and times of its files, and so does this package's
    version.
    """
    described = _described(reward, reward_name(reward))
    return json.dumps([version("mbrl-text-env"), described], sort_keys=True)


def _described(value: object, owner: str) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (str, Path)):
        return [str(value), _folder_state(Path(value))]
    if isinstance(value, (list, tuple)):
        return [_described(item, owner) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _described(item, owner) for key, item in value.items()}
    if hasattr(value, "score"):
        return _described_reward(value.reward if isinstance(value, ObjectReward) else value)
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return [type(value).__qualname__, _described(named, owner)]
    if type(value).__module__.partition(".")[0] == "torch":
        return str(value)
    raise ValueError(
        f"Reward model {owner!r} holds {value!r:.80}, by which it cannot be told from others when "
        "scores are looked up. Pass key=..., a name for the reward model, and change it when the "
        "reward model changes."
    )


def _described_reward(reward: object) -> Any:
    cls = type(reward)
    parameters = inspect.signature(cls).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [name for name in named if not hasattr(reward, name)]
    if missing:
        raise ValueError(
            f"Reward model {reward_name(reward)!r}: expected attributes with the names of the "
            f"constructor's arguments, and there is no {missing}. Add them, or pass key=..., a "
            "name for the reward model."
        )
    owner = reward_name(reward)
    arguments = {name: _described(getattr(reward, name), owner) for name in sorted(named)}
    return [f"{cls.__module__}.{cls.__qualname__}", arguments]


def _folder_state(path: Path) -> Any:
    try:
        if not path.is_dir():
            return None
        files = sorted(file for file in path.iterdir() if file.is_file())
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except (OSError, ValueError):
        # Texts that are no paths: too long, or with characters that no path has.
        return None
