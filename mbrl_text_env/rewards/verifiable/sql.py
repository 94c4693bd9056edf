"""SQL that is right as far as its result tells: the response is a query, and its rows are compared.

The query is run on an SQLite database in memory, in a process that is killed if it takes too long.
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
# The last two would score one response differently from call to call.
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
    """1 if the query in a response has the rows of the reference query, else 0.

    `prompt.metadata["database"]` is SQL that makes the database, and `["reference_answer"]` a query
    on it. The response's query stands in its last code fence that begins with SELECT, WITH or
    VALUES, or is the whole response. Rows are compared as a multiset, or as a list if the reference
    query itself is ordered, column by column; names of columns do not count, an integer equals the
    same float, and floats are equal within one part in a million.

    Responses are untrusted. Each is one statement on a database of its own, in memory, which it can
    read and nothing else: no writing, no PRAGMA, no ATTACH, no extension, no `random`. A query that
    breaks a limit scores 0: `max_steps`, `seconds`, texts and blobs of 100,000 bytes (intermediate
    ones too), SQL of 10,000 bytes, 64 MiB of memory, one row more than the reference query has. It
    runs in a helper process (`rewards.verifiable.isolated`).

    The bound is 1: a prefix never rules a later fence out.

    Source: Yu et al., "Spider: A Large-Scale Human-Labeled Dataset for Complex and Cross-Domain
    Semantic Parsing and Text-to-SQL Task", EMNLP 2018 (execution accuracy). Deviation: columns have
    to be in the order that was asked for.

    Args:
        max_steps: Instructions of SQLite's virtual machine that one query may take.
        seconds: Wall-clock time that one query may take, for what no step counts.

    Raises:
        RewardError: When scoring: a prompt, which the message names, has no database or query, or
            ones that cannot be run, or a query of more than 1000 rows.

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
        """Whether the prompt has a database and a reference query."""
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
                    f"{str(database)[:80]!r} and {str(reference)[:80]!r}. Add them, or leave out "
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
    """The rows of a reference query, in the helper process; `RewardError` where it has none."""
    try:
        rows = _rows(database, query, max_steps, _MOST_ROWS + 1)
    except (sqlite3.Error, ValueError) as error:
        raise RewardError(
            f"expected a database and a query on it that can be run, got {database[:80]!r} and "
            f"{query[:200]!r} ({type(error).__name__}: {error}). Correct them."
        ) from error
    if len(rows) > _MOST_ROWS:
        raise RewardError(f"expected a query of at most {_MOST_ROWS} rows, got {query[:200]!r}.")
    return rows


def score_query(database: str, reference: str, max_steps: int, query: str) -> bool:
    """Whether a query has the rows of the reference, in the helper process; or any error."""
    wanted = reference_rows(database, reference, max_steps)
    rows = _rows(database, query, max_steps, len(wanted) + 1)
    return len(rows) == len(wanted) and _same(wanted, rows, is_ordered(reference))


def is_ordered(query: str) -> bool:
    """Whether a query itself, and not only one inside it, has an ORDER BY."""
    bare = _TEXT.sub(" ", query)
    while bare != (bare := _IN_BRACKETS.sub(" ", bare)):
        pass
    return _ORDERED.search(bare) is not None


def _rows(database: str, query: str, max_steps: int, most: int) -> list[tuple[Any, ...]]:
    """The first rows of a query on a new database that it can only read."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(database)
        # The memory is that of all connections of the process, which is the helper's.
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
