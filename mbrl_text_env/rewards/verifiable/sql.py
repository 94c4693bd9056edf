"""A reward for SQL queries, which compares the rows of the response's query with the expected rows.

The query runs on an in-memory SQLite database, in a process that is killed if it takes too long.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any

from mbrl_text_env.rewards.base import RewardError, RowReward, check_finite
from mbrl_text_env.rewards.names import named
from mbrl_text_env.rewards.verifiable.code import extract_code
from mbrl_text_env.rewards.verifiable.isolated import IsolatedError, call_isolated
from mbrl_text_env.types import Prompt

_HERE = "mbrl_text_env.rewards.verifiable.sql"
_QUERY = r"(?i)^\s*(?:select|with|values)\b"
_ORDERED = re.compile(r"\border\s+by\b", re.IGNORECASE)
_TEXT = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
_IN_BRACKETS = re.compile(r"\([^()]*\)")
_ALLOWED = frozenset(
    (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
)
# With the last two, the score of a response would change from call to call.
_FORBIDDEN = frozenset({"load_extension", "fts3_tokenizer", "random", "randomblob"})
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 25_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
_HEAP_BYTES = 64 * 2**20
_MOST_ROWS = 1000


@named("sql")
@dataclass(eq=False)
class SQLReward(RowReward):
    """1 if the query in a response returns the rows of the reference query, otherwise 0.

    `prompt.metadata["database"]` is SQL that creates the database; `["reference_answer"]` is a
    query on it. The response's query is its last code block that starts with SELECT, WITH or
    VALUES, or the whole response. Rows are compared as a multiset, or as a list if the reference
    query has its own ORDER BY. Columns are compared in order, and their names are ignored. An
    integer equals the same float, and floats are equal within one part in a million.

    Responses are untrusted. Each is a single statement on its own in-memory database, which it can
    only read: no writes, PRAGMA, ATTACH, extensions or `random`. A query scores 0 if it exceeds a
    limit: `max_steps`, `seconds`, strings and blobs of 100,000 bytes (intermediate ones too), SQL
    of 10,000 bytes, 64 MiB of memory, or the number of rows of the reference query. It runs in a
    helper process (`rewards.verifiable.isolated`).

    The bound is always 1, because a later code block can contain the query.

    Source: Yu et al., "Spider: A Large-Scale Human-Labeled Dataset for Complex and Cross-Domain
    Semantic Parsing and Text-to-SQL Task", EMNLP 2018 (execution accuracy). Deviation: columns must
    be in the order of the reference query.

    Args:
        max_steps: Maximum number of SQLite virtual machine instructions per query.
        seconds: Wall-clock time limit per query, for work that is not counted as steps.

    Raises:
        RewardError: When scoring, if a prompt has no database or query, they cannot be run, or the
            query has more than 1000 rows. The message names the prompt.

    Example:
        >>> facts = {"database": "CREATE TABLE t (n); INSERT INTO t VALUES (1), (2);",
        ...          "reference_answer": "SELECT sum(n) FROM t"}
        >>> prompt = Prompt.from_text("What is the sum of n?", metadata=facts)
        >>> SQLReward().score([prompt] * 2, ["SELECT 3", "DROP TABLE t"])
        array([1., 0.])
    """

    name = "sql"

    _: KW_ONLY
    max_steps: int = 1_000_000
    seconds: float = 10.0

    def __post_init__(self) -> None:
        check_finite(self, "max_steps", "seconds", above=0)

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the prompt has a database and a reference query."""
        parts = _parts(prompt.metadata)
        return all(isinstance(part, str) and part.strip() for part in parts)

    def _score(self, prompt: Prompt, response: str) -> float:
        database, reference = _parts(prompt.metadata)
        query = extract_code(response, _QUERY)
        check, work = f"{_HERE}:reference_rows", f"{_HERE}:score_query"
        try:
            if not self.applies_to(prompt):
                raise RewardError(
                    "expected metadata['database'] and metadata['reference_answer'] to be SQL, got "
                    f"{str(database)[:80]!r} and {str(reference)[:80]!r}. Add them, or remove "
                    "the prompts that the reward does not apply to."
                )
            parts = (database, reference, self.max_steps)
            return float(
                call_isolated(work, *parts, query, seconds=self.seconds, prepare=[check, *parts])
            )
        except RewardError as error:
            raise RewardError(
                f"Reward model {self.name!r}, prompt {prompt.id!r}: {error}"
            ) from error
        except IsolatedError:
            return 0.0


def _parts(metadata: Mapping[str, Any]) -> tuple[Any, Any]:
    return metadata.get("database"), metadata.get("reference_answer")


@lru_cache(maxsize=1000)
def reference_rows(database: str, query: str, max_steps: int) -> list[tuple[Any, ...]]:
    """Return the rows of a reference query, in the helper process; `RewardError` if it fails."""
    try:
        rows = _rows(database, query, max_steps, _MOST_ROWS + 1)
    except (sqlite3.Error, ValueError) as error:
        raise RewardError(
            f"expected a valid database and a valid query, got {database[:80]!r} and "
            f"{query[:200]!r} ({type(error).__name__}: {error}). Correct them."
        ) from error
    if len(rows) > _MOST_ROWS:
        raise RewardError(f"expected a query of at most {_MOST_ROWS} rows, got {query[:200]!r}.")
    return rows


def score_query(database: str, reference: str, max_steps: int, query: str) -> bool:
    """Return whether a query has the rows of the reference, in the helper process, or raise."""
    wanted = reference_rows(database, reference, max_steps)
    rows = _rows(database, query, max_steps, len(wanted) + 1)
    return len(rows) == len(wanted) and _same(wanted, rows, is_ordered(reference))


def is_ordered(query: str) -> bool:
    """Return whether a query has an ORDER BY outside its subqueries."""
    bare = _TEXT.sub(" ", query)
    while bare != (bare := _IN_BRACKETS.sub(" ", bare)):
        pass
    return _ORDERED.search(bare) is not None


def _rows(database: str, query: str, max_steps: int, most: int) -> list[tuple[Any, ...]]:
    """Return the first rows of a query on a new read-only database."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(database)
        # The memory limit covers all connections of this (helper) process.
        connection.executescript(
            f"PRAGMA temp_store=MEMORY; PRAGMA hard_heap_limit={_HEAP_BYTES}; PRAGMA query_only=ON;"
        )
        for limit, value in _LIMITS.items():
            connection.setlimit(limit, value)
        connection.set_authorizer(_authorise)
        steps = min(max_steps, 1000)
        calls = iter(range(max_steps // steps))
        connection.set_progress_handler(lambda: next(calls, None) is None, steps)
        return connection.execute(query).fetchmany(most)
    finally:
        connection.close()


def _authorise(action: int, _first: Any, second: str | None, *_: Any) -> int:
    is_forbidden = action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FORBIDDEN
    allowed = action in _ALLOWED and not is_forbidden
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _same(wanted: list[tuple[Any, ...]], rows: list[tuple[Any, ...]], ordered: bool) -> bool:
    if ordered:
        return all(map(_equal, wanted, rows))
    left = list(rows)
    for row in wanted:
        place = next((i for i, other in enumerate(left) if _equal(row, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def _equal(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return len(first) == len(second) and all(map(_equal_values, first, second))


def _equal_values(first: Any, second: Any) -> bool:
    if isinstance(first, int | float) and isinstance(second, int | float):
        return first == second or math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-9)
    return type(first) is type(second) and bool(first == second)
