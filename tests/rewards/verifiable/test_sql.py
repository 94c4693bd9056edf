"""Queries that have the rows of the reference, queries that have not, and queries that attack."""

import numpy as np
import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards import RewardError, SQLReward
from mbrl_text_env.rewards.verifiable import isolated, sql
from mbrl_text_env.rewards.verifiable.sql import is_ordered
from mbrl_text_env.types import Prompt

DATABASE = """CREATE TABLE fruit (name TEXT, weight REAL, amount INTEGER);
INSERT INTO fruit VALUES ('fig', 0.1, 3), ('plum', 0.2, 5), ('pear', NULL, 5);"""


def asking(query, database=DATABASE):
    return Prompt.from_text("?", "p1", metadata={"database": database, "reference_answer": query})


NAMES = asking("SELECT name FROM fruit")
ORDERED = asking("SELECT name FROM fruit ORDER BY name")
TOTAL = asking("SELECT sum(amount) FROM fruit")
WEIGHT = asking("SELECT sum(weight) FROM fruit")
AMOUNTS = asking("SELECT amount FROM fruit")


@pytest.mark.parametrize(
    ("prompt", "response", "score"),
    [
        (TOTAL, "SELECT 13", 1),
        (TOTAL, " select 13.0 ; -- the sum", 1),
        (TOTAL, "VALUES (13)", 1),
        (TOTAL, "WITH t AS (SELECT amount a FROM fruit) SELECT sum(a) AS total FROM t", 1),
        (TOTAL, "So:\n```sql\nSELECT sum(amount) FROM fruit;\n```\nThis is 13.", 1),
        (TOTAL, "```\nSELECT 12\n```\nNo:\n```sql\nSELECT 13\n```\n```\n13\n```", 1),
        (TOTAL, "```sql\nSELECT 13", 1),
        (TOTAL, "SELECT 12", 0),
        (TOTAL, "SELECT '13'", 0),
        (TOTAL, "SELECT 13, 13", 0),
        (TOTAL, "SELECT 13 UNION ALL SELECT 13", 0),
        (TOTAL, "SELECT 13 WHERE 0", 0),
        (TOTAL, "13", 0),
        (TOTAL, "The answer is SELECT 13", 0),
        (TOTAL, "", 0),
        (WEIGHT, "SELECT 0.3", 1),
        (WEIGHT, "SELECT 0.30001", 0),
        (NAMES, "SELECT name FROM fruit ORDER BY name DESC", 1),
        (NAMES, "SELECT DISTINCT name FROM fruit", 1),
        (NAMES, "SELECT name FROM fruit LIMIT 2", 0),
        (ORDERED, "SELECT name FROM fruit ORDER BY name", 1),
        (ORDERED, "SELECT name FROM fruit ORDER BY name DESC", 0),
        (AMOUNTS, "VALUES (5), (3), (5)", 1),
        (AMOUNTS, "VALUES (5), (3), (3)", 0),
        (asking("SELECT weight FROM fruit"), "VALUES (0.2), (NULL), (0.1)", 1),
        (asking("SELECT name FROM fruit WHERE 0"), "SELECT 1 WHERE 0", 1),
    ],
)
def test_by_hand(prompt, response, score):
    assert SQLReward().score([prompt], [response]).tolist() == [score]


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER  BY a", True),
        ("select a from t order by (select b from s)", True),
        ("SELECT * FROM (SELECT a FROM t ORDER BY a LIMIT 1)", False),
        ("SELECT 'ORDER BY (' FROM t -- ORDER BY a", False),
        ("SELECT sum(a) OVER (ORDER BY a) FROM t", False),
    ],
)
def test_which_queries_are_ordered(query, ordered):
    assert is_ordered(query) is ordered


LOOP = "WITH RECURSIVE c(x) AS (SELECT {0} UNION ALL SELECT {1} FROM c) SELECT {2} FROM c"
TABLES = ", ".join(f"fruit f{i}" for i in range(30))
HOSTILE = {
    "writes": "DELETE FROM fruit",
    "writes in a CTE": "WITH t AS (SELECT 1) INSERT INTO fruit SELECT 'x', 1, 1",
    "writes with rows": "UPDATE fruit SET amount = 13 RETURNING amount",
    "drops": "DROP TABLE fruit",
    "creates": "CREATE TEMP TABLE t AS SELECT 13",
    "two statements": "SELECT 13; SELECT 13",
    "opens a file": "ATTACH '{path}' AS other",
    "writes a file": "VACUUM INTO '{path}'",
    "settings": "PRAGMA query_only=OFF",
    "settings as a table": "SELECT * FROM pragma_query_only",
    "a transaction": "BEGIN",
    "an extension": "SELECT load_extension('{path}')",
    "chance": "SELECT 13 + 0 * random()",
    "chance as a blob": "SELECT 13 + 0 * length(randomblob(3))",
    "loops": LOOP.format("1", "x + 1", "sum(x)"),
    "loops with memory": LOOP.format("zeroblob(90000)", "x", "count(DISTINCT x || random())"),
    "sorts for ever": LOOP.format("1", "x + 1", "x") + " ORDER BY x",
    "grows": LOOP.format("'ab'", "x || x", "max(x)"),
    "crosses": "SELECT count(*) FROM {tables}",
    "groups": "SELECT group_concat(f0.name) FROM {tables}",
    "a blob": "SELECT length(zeroblob(1000000000))",
    "a padded text": "SELECT length(printf('%.*c', 100000000, 'x'))",
    "a replaced text": "SELECT replace(hex(zeroblob(40000)), '0', hex(zeroblob(40000)))",
    "a pattern": f"SELECT hex(zeroblob(40000)) LIKE '{'%0' * 400}1'",
    "deep": f"SELECT {'(' * 3000}13{')' * 3000}",
    "long": f"SELECT 13 {' ' * 20_000}",
    "wide": f"SELECT {', '.join(['13'] * 500)}",
    "a parameter": "SELECT ?",
    "no text": "SELECT CAST(x'ff' AS TEXT)",
    "a zero byte": "SELECT 13\0",
    "half a character": "SELECT 13, '\ud800'",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_queries_score_0_and_cost_nothing_else(name, tmp_path):
    path = tmp_path / "file"
    reward = SQLReward(seconds=120)
    assert reward.score([TOTAL], ["SELECT 13"]) == 1
    process = isolated._helper.process
    query = HOSTILE[name].replace("{path}", str(path)).replace("{tables}", TABLES)
    assert reward.score([TOTAL] * 2, [query, "SELECT sum(amount) FROM fruit"]).tolist() == [0, 1]
    assert isolated._helper.process is process, "no limit was left to the clock"
    assert not path.exists()


def test_memory_is_bounded_whatever_the_steps():
    query = LOOP.format("1", "x + 1", "x") + " ORDER BY zeroblob(90000), x"
    parts = (DATABASE, "SELECT 13", 10**9)
    work, check = (f"{sql.__name__}:{name}" for name in ("score_query", "reference_rows"))
    with pytest.raises(isolated.IsolatedError, match=r"MemoryError|out of memory"):
        isolated.call_isolated(work, *parts, query, seconds=120, prepare=[check, *parts])


def test_the_clock_is_the_last_limit():
    reward = SQLReward(max_steps=10**12, seconds=0.5)
    endless = LOOP.format("1", "x + 1", "sum(x)")
    assert reward.score([TOTAL] * 2, [endless, "SELECT 13"]).tolist() == [0, 1]


def test_the_bound_is_the_maximum():
    np.testing.assert_array_equal(SQLReward().bound([TOTAL] * 2, ["", "DROP"]), 1)
    check_reward_model(SQLReward(), [TOTAL], ["SELECT 13", "No.\n```sql\nSELECT 13\n```", "x"])


MANY = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 1001) SELECT x FROM c"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (Prompt.from_text("?", "p1"), r"'p1': expected metadata\['database'\]"),
        (asking("SELECT colour FROM fruit"), "'p1': .*no such column: colour"),
        (asking("DELETE FROM fruit"), "'p1': .*not authorized"),
        (asking("SELECT 1", "CREATE TABEL t (n)"), "'p1': .*syntax error"),
        (asking(MANY), "at most 1000 rows"),
    ],
)
def test_prompts_that_cannot_be_scored(prompt, said):
    with pytest.raises(RewardError, match=said):
        SQLReward().score([prompt], ["SELECT 1"])


@pytest.mark.parametrize("name", ["max_steps", "seconds"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=name):
        SQLReward(**{name: 0})
