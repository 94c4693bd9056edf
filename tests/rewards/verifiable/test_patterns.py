"""Regular expressions as rewards."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import RewardError, applies_to
from mbrl_text_env.rewards.verifiable.patterns import RegexReward
from mbrl_text_env.types import Prompt

PROMPT = Prompt.from_text("Name a date.", "date")


def with_pattern(pattern) -> Prompt:
    return Prompt.from_text("Name a date.", "date", metadata={"pattern": pattern})


@pytest.mark.parametrize(
    ("pattern", "response", "expected"),
    [
        (r"\d{4}-\d\d", "2024-02", 1),
        (r"\d{4}-\d\d", " 2024-02\n", 1),
        (r"\d{4}-\d\d", "on 2024-02", 0),
        (r".*\d{4}-\d\d.*", "on 2024-02-29", 1),
        (r"a|ab", "ab", 1),
        (r"yes", "YES", 0),
        (r"(?i)yes", "YES", 1),
        (r"a.b", "a\nb", 0),
        (r"(?s)a.b", "a\nb", 1),
        (r"(?ms).*^b$.*", "a\nb\nc", 1),
        (r"(?x)a b # letters", "ab", 1),
        (r"\p{Han}+", "日本", 1),
        (r"(?i)é", "É", 1),
        (r".*", "", 0),
        (r"\s*", " \n", 0),
    ],
)
def test_matches_worked_out_by_hand(pattern, response, expected):
    assert RegexReward(pattern).score([PROMPT], [response])[0] == expected
    assert RegexReward().score([with_pattern(pattern)], [response])[0] == expected


@given(st.text(min_size=1).filter(str.strip))
def test_an_escaped_text_matches_itself_and_nothing_longer(text):
    import regex

    reward = RegexReward(f"(?s){regex.escape(text.strip())}")
    np.testing.assert_array_equal(reward.score([PROMPT] * 2, [text, f"{text.strip()}x"]), [1, 0])


@pytest.mark.parametrize("pattern", ["(", "*", "[a", r"(?P<a>x)(?P<a", "(?<=a+", r"\p{Nothing}"])
def test_a_pattern_that_does_not_compile_is_an_error(pattern):
    with pytest.raises(RewardError, match=r"^Reward model 'regex': expected a regular expression"):
        RegexReward(pattern)
    with pytest.raises(RewardError, match=r"prompt 'date': expected a regular expression, got"):
        RegexReward().score([with_pattern(pattern)], ["x"])


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(a|aa)+$", "a" * 60 + "b"),
        (r"(([a-z])+.)+[A-Z]([a-z])+$", "a" * 600 + "b"),
        (r"(x+x+)+y", "x" * 5000),
    ],
)
def test_a_match_that_takes_too_long_is_an_error_in_time_even_in_a_thread(pattern, text):
    errors = []

    def work() -> None:
        try:
            RegexReward(f"(?s).*(?:{pattern}).*", seconds=0.2).score([PROMPT], [text])
        except RewardError as error:
            errors.append(str(error))

    began = time.monotonic()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert time.monotonic() - began < 30
    assert len(errors) == 1
    assert "prompt 'date': expected the pattern" in errors[0]
    assert "within 0.2 s" in errors[0]
    assert "Rewrite nested repetitions" in errors[0]


def test_options_that_are_none_are_refused():
    with pytest.raises(ValueError, match="seconds to be a finite number above 0, got 0"):
        RegexReward("a", seconds=0)


def test_a_prompt_without_a_pattern_is_named():
    assert not applies_to(RegexReward(), PROMPT)
    assert applies_to(RegexReward(), with_pattern("a"))
    assert applies_to(RegexReward("a"), PROMPT)
    for prompt in (PROMPT, with_pattern(3)):
        with pytest.raises(RewardError, match=r"prompt 'date': .*a string, got (None|3)\."):
            RegexReward().score([prompt], ["a"])


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    with pytest.raises(RewardError, match=r"pip install 'mbrl-text-env\[verify\]'"):
        RegexReward("a")


def test_the_contract():
    check_reward_model(RegexReward(r"\w.*\."))
    check_reward_model(RegexReward(), [with_pattern("I.*"), with_pattern("日本")])
