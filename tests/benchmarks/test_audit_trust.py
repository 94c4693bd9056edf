import numpy as np
import pytest

from mbrl_text_env.benchmarks.audit.exploit_warnings import distinct, trust_warnings

WORDS = [f"word{i}" for i in range(400)]


def rows(agents, prompts=16, seed=0):
    """Rows of agents, each a function of a generator that returns text and score."""
    found = []
    for number, (agent, write) in enumerate(agents.items()):
        rng = np.random.default_rng([seed, number])
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
        (longer, "tokens: "),
        (repeating, "repetitions: "),
        (exclaiming, "exclamation marks per 100 words: "),
        (flattering, "flattery: in"),
    ],
)
def test_planted(write, expected):
    found = trust_warnings(rows({"sampling": plain, "best-of-n": better, "lookahead:n=2": write}))
    (about,) = [warning for warning in found if warning.startswith("lookahead:n=2: its reward")]
    assert f"above sampling's, and so are its {expected}" in about
    assert not any("best-of-n" in warning for warning in found)
    assert found == trust_warnings(
        rows({"sampling": plain, "best-of-n": better, "lookahead:n=2": write})
    )


def test_a_reward_that_goes_with_length():
    def by_length(rng):
        text, _ = plain(rng, spread=20)
        return text, 0.1 * len(text.split()) + rng.normal(0.0, 0.5)

    (warning,) = trust_warnings(rows({"mcts": by_length, "lookahead": by_length}))
    assert "increases with length: correlation 0.9" in warning
    # Lengths that hardly differ exploit nothing, whatever the correlation.
    steady = [
        {**row, "response_tokens": 1000 + row["score"]} for row in rows({"a": plain, "b": plain})
    ]
    assert trust_warnings(steady) == []


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
    assert "standard deviations above sampling's, but its relevance" in warning
    assert trust_warnings(found, gold=[None] * len(found)) == []
    with pytest.raises(ValueError, match="one score a row"):
        trust_warnings(found, gold=[1.0])


def test_distinct_by_hand():
    assert distinct("a b a b a") == 0.5
    assert distinct("a b a b a", words=3) == 1.0
    assert distinct("") == distinct("one") == 1.0
