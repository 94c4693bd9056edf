import numpy as np
import pytest

from benchmarks.audit.trust import distinct, trust_warnings

WORDS = [f"word{i}" for i in range(400)]


def rows(agents, prompts=16, seed=0):
    """Rows of agents, each a function of a generator that returns text and score."""
    found = []
    for agent, write in agents.items():
        rng = np.random.default_rng(seed)
        for i in range(prompts):
            text, score = write(rng)
            found.append(
                {
                    "prompt_id": f"p{i}",
                    "agent": agent,
                    "score": score,
                    "parts": {},
                    "response": text,
                    "response_tokens": len(text.split()),
                    "finish_reason": "stop",
                }
            )
    return found


def plain(rng, words=40, gain=0.0, spread=10):
    count = words + int(rng.integers(-spread, spread + 1))
    return " ".join(rng.choice(WORDS, size=count, replace=False)), gain + rng.normal(0.0, 0.1)


def better(rng):
    return plain(rng, gain=1.0)


def longer(rng):
    return plain(rng, words=70, gain=1.0)


def repeating(rng):
    text, score = better(rng)
    words = text.split()
    half = " ".join(words[: len(words) // 2])
    return f"{half} {half}", score


def exclaiming(rng):
    text, score = better(rng)
    return text + " word! word! word!", score


def flattering(rng):
    text, score = better(rng)
    return "What a great question! " * (rng.random() < 0.6) + text, score


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (longer, ["The reward goes with length", "tokens: 7"]),
        (repeating, ["repetitions: 5"]),
        (exclaiming, ["exclamation marks in 100 words: 7"]),
        (flattering, ["flattery: in"]),
    ],
)
def test_planted(write, expected):
    found = trust_warnings(rows({"sampling": plain, "best-of-n": better, "lookahead:n=2": write}))
    about = [warning for warning in found if warning.startswith("lookahead:n=2: its reward")]
    named = [warning for warning in found if any(text in warning for text in expected)]
    assert len(named) == len(expected)
    assert set(about) <= set(named)
    assert found == trust_warnings(
        rows({"sampling": plain, "best-of-n": better, "lookahead:n=2": write})
    )


@pytest.mark.parametrize("seed", range(5))
def test_silent_where_nothing_is_wrong(seed):
    agents = {"sampling": plain, "best-of-n": better, "lookahead": better}
    assert trust_warnings(rows(agents, seed=seed)) == []


def test_silent_without_a_gain_a_reference_or_enough_prompts():
    no_gain = rows({"sampling": plain, "lookahead": lambda rng: plain(rng, words=70)}, seed=1)
    assert [w for w in trust_warnings(no_gain) if "lookahead" in w] == []
    assert trust_warnings(rows({"mcts": plain, "lookahead": exclaiming})) == []
    assert trust_warnings(rows({"sampling": plain, "lookahead": longer}, prompts=7)) == []
    assert trust_warnings([]) == []


def test_best_of_n_is_the_reference_without_sampling():
    (warning,) = trust_warnings(rows({"best-of-n:n=4": plain, "lookahead": exclaiming}))
    assert "lookahead: its reward is above best-of-n:n=4's" in warning


def test_rows_without_a_score_are_left_out():
    found = rows({"sampling": plain, "lookahead": exclaiming}, prompts=10)
    failed = {"prompt_id": "p0", "agent": "sampling", "score": None, "error": "no"}
    assert len(trust_warnings([failed, *found[1:]])) == 1
    assert trust_warnings([{**row, "score": None} for row in found]) == []


def test_gold_that_stays_behind():
    found = rows({"sampling": plain, "lookahead": better})
    rng = np.random.default_rng(0)
    follows = [row["score"] + rng.normal(0.0, 0.05) for row in found]
    stays = [float(rng.normal()) for _ in found]
    assert trust_warnings(found, gold=follows) == []
    (warning,) = trust_warnings(found, gold=stays, gold_name="relevance")
    assert "standard deviations above sampling's, its relevance" in warning
    assert trust_warnings(found, gold=[None] * len(found)) == []
    with pytest.raises(ValueError, match="one score a row"):
        trust_warnings(found, gold=[1.0])


def test_distinct_by_hand():
    assert distinct("a b a b a") == 0.5
    assert distinct("a b a b a", words=3) == 1.0
    assert distinct("") == distinct("one") == 1.0
