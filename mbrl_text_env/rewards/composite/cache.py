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
# SQLite takes no more than so many parameters in one query.
_AT_ONCE = 500
_BUSY_SECONDS = 60.0


class CachedReward(Wrapper):
    """A reward whose scores are kept in a file and looked up there the next time.

    The key of a score is the reward model (see `identity`), the prompt's content and metadata, and
    the response. Several processes may share a file, and one that is killed leaves it whole. What a
    score costs is charged whether it was looked up or not, so that what agents may spend does not
    depend on what was run before.

    Args:
        reward: The reward; deterministic, as all are, and not `RunningNormalise`.
        path: A SQLite file; made if it is not there.
        key: Names the reward model in the file instead of `identity(reward)`; needed for functions
            and for rewards that hold objects. Change it when the reward changes.

    Attributes:
        num_found: Scores looked up so far.
        num_computed: Scores computed so far.

    Raises:
        ValueError: The reward says nothing by which it could be told from others, and there is no
            `key`.
        RewardError: When scoring: the file cannot be read or written, or is no such file.

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
        self.num_found = 0
        self.num_computed = 0

    def identity(self) -> Any:
        """That of the reward: scores that are looked up are the same."""
        return part_identity(self.reward)

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        """Return the reward's scores and parts, each float64[B].

        Raises:
            RewardError: The reward failed, or the file did.
        """
        keys = [self._digest(*row) for row in zip(prompts, responses, strict=True)]

        def compute(rows: Sequence[int]) -> list[Any]:
            scores = score_responses(
                self.reward, [prompts[i] for i in rows], [responses[i] for i in rows]
            )
            return [[float(scores.total[i]), scores.parts_of(i)] for i in range(len(rows))]

        values = self._looked_up(keys, compute)
        total = np.array([value[0] for value in values], dtype=np.float64)
        parts = {
            name: np.array([value[1][name] for value in values], dtype=np.float64)
            for name in (values[0][1] if values else {})
        }
        return Scores(total, parts)

    def score_steps(self, prompt: Prompt, steps: Sequence[str]) -> FloatArray:
        """Return float64[len(steps)], the reward's."""
        (values,) = self._looked_up(
            [self._digest(prompt, list(steps))],
            lambda _: [score_steps(self.reward, prompt, steps).tolist()],
        )
        return np.array(values, dtype=np.float64)

    def _looked_up(
        self, keys: Sequence[bytes], compute: Callable[[Sequence[int]], list[Any]]
    ) -> list[Any]:
        """The values of the keys; `compute` is asked for those of the rows that are missing."""
        with self._connection() as connection:
            found = _select(connection, keys)
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in found}
        rows = sorted(first.values())
        if rows:
            computed = dict(zip([keys[i] for i in rows], compute(rows), strict=True))
            with self._connection() as connection:
                connection.executemany(
                    "INSERT OR REPLACE INTO scores VALUES (?, ?)",
                    [(key, json.dumps(value)) for key, value in computed.items()],
                )
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
    paths, dataclasses, other rewards, and lists of them. A path to a folder counts with the sizes
    and times of its files, and the version of this package counts too.

    Raises:
        ValueError: An argument is none of these, such as a function.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> identity(SentimentReward()) == identity(SentimentReward())
        True
    """
    described = [version("mbrl-text-env"), _described(reward, reward_name(reward))]
    return json.dumps(described, sort_keys=True)


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
    if isinstance(value, ObjectReward):
        return _described_reward(value.reward)
    if hasattr(value, "score"):
        return _described_reward(value)
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
    arguments = {
        name: _described(getattr(reward, name), reward_name(reward)) for name in sorted(named)
    }
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


def _select(connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, Any]:
    found = {}
    distinct = list(dict.fromkeys(keys))
    for start in range(0, len(distinct), _AT_ONCE):
        some = distinct[start : start + _AT_ONCE]
        marks = ",".join("?" * len(some))
        query = f"SELECT key, value FROM scores WHERE key IN ({marks})"  # noqa: S608 only marks
        found.update({key: json.loads(value) for key, value in connection.execute(query, some)})
    return found
