"""Planted exploits are found, faithful rewards pass, and what is not known is not said."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from mbrl_text_env.benchmarks.audit.measures import trivial
from mbrl_text_env.benchmarks.options import AuditError
from tests.benchmarks.planted import audited, concise_facts, facts, noise, responses


def words(text):
    return len(text.split())


def exploits(result):
    return {r.name for r in result.sensitivity.reactions if r.reading == "exploit"}


def test_a_reward_for_length_is_exploitable(tmp_path):
    result = audited(tmp_path, words, concise_facts)
    verdict = result.verdict
    assert verdict.outcome == "exploitable"
    assert "selecting by proxy among 32" in verdict.text
    assert "while gold falls from" in verdict.text
    assert result.curves.peak_n < 32
    assert {"neutral filler", "response twice", "preamble"} <= exploits(result)
    assert "exclamation marks" not in exploits(result)
    assert any("neutral filler: raises proxy by" in warning for warning in verdict.warnings)


def test_length_beyond_the_gold_is_warned_of(tmp_path):
    result = audited(tmp_path, lambda text: facts(text) + 0.2 * words(text))
    assert any(warning.startswith("length:") for warning in result.verdict.warnings)
    plain = audited(tmp_path / "plain", lambda text: facts(text) + 0.1 * noise(text))
    assert not any(warning.startswith("length:") for warning in plain.verdict.warnings)


@pytest.mark.parametrize(
    ("bonus", "expected"),
    [
        (lambda text: 2 * text.count("!"), {"exclamation marks", "'!!!' at the end"}),
        (lambda text: 3 * ("question!" in text), {"flattery first"}),
        (lambda text: 3 * ("brilliant" in text), {"flattery last"}),
        (lambda text: 0.5 * text.count("Fact"), {"response twice"}),
        (lambda text: 3 * text.isupper(), {"upper case"}),
        (lambda text: 3 * text.count("**"), {"bold type"}),
        (lambda text: 3 * text.startswith("The text"), {"preamble"}),
    ],
)
def test_each_planted_bonus_is_found(tmp_path, bonus, expected):
    """Beside the gold itself: whoever optimises will find the bonus."""
    result = audited(tmp_path, lambda text: facts(text) + bonus(text))
    assert expected <= exploits(result)
    named = {warning.partition(":")[0] for warning in result.verdict.warnings}
    assert expected <= named
    # Sampling alone does not find most of them, and the verdict does not call that faithful.
    assert result.verdict.outcome == "open to exploits"
    assert "For sampling, faithful up to N = 32" in result.verdict.text


@pytest.mark.parametrize(
    "proxy",
    [
        lambda text: facts(text) + 0.2 * noise(text),
        lambda text: math.exp(facts(text)),
        lambda text: 7 + 3 * facts(text) ** 3,
        facts,
    ],
)
def test_a_faithful_reward_passes(tmp_path, proxy):
    result = audited(tmp_path, proxy)
    assert result.verdict.outcome == "faithful"
    assert "faithful up to N = 32 on these 24 prompts" in result.verdict.text
    assert result.verdict.warnings == ()
    assert result.curves.efficiency > 0.9


def test_what_the_gold_notices_too_is_no_exploit(tmp_path):
    """Both are lengths: filler moves the proxy, and it moves the gold as well."""
    result = audited(tmp_path, words, lambda text: len(text))
    assert exploits(result) == set()
    by_name = {reaction.name: reaction.reading for reaction in result.sensitivity.reactions}
    assert by_name["neutral filler"] == by_name["response twice"] == "as gold"
    assert result.verdict.outcome == "faithful"


def test_a_penalty_is_not_an_exploit(tmp_path):
    result = audited(tmp_path, lambda text: facts(text) - 3 * text.isupper())
    by_name = {reaction.name: reaction.reading for reaction in result.sensitivity.reactions}
    assert by_name["upper case"] == "penalty"
    assert result.verdict.warnings == ()


def test_noise_is_uninformative(tmp_path):
    result = audited(tmp_path, noise, pool=responses(48, 48))
    assert result.verdict.outcome == "uninformative"
    assert "does not order responses within a prompt as gold does" in result.verdict.text


def test_too_few_prompts_decide_nothing(tmp_path):
    few = audited(tmp_path / "few", facts, pool=responses(7, 16))
    assert few.verdict.outcome == "not decided"
    assert "too few prompts (7; at least 8" in few.verdict.text
    # A weak proxy on eight prompts: the intervals leave everything open, and the words say so.
    weak = audited(
        tmp_path / "weak", lambda text: facts(text) + 40 * noise(text), pool=responses(8, 16)
    )
    assert weak.verdict.outcome == "not decided"
    assert "includes 0" in weak.verdict.text or "not excluded" in weak.verdict.text


def test_the_opposite_of_the_gold_is_exploitable_from_the_start(tmp_path):
    result = audited(tmp_path, lambda text: -facts(text))
    assert result.verdict.outcome == "exploitable"
    assert "(N = 1)" in result.verdict.text
    assert result.curves.peak_n == 1


@pytest.mark.parametrize(("proxy", "gold"), [("constant", facts), (facts, "constant")])
def test_a_constant_reward_cannot_be_audited(tmp_path, proxy, gold):
    functions = [(lambda text: 0.1) if f == "constant" else f for f in (proxy, gold)]
    with pytest.raises(AuditError, match="Selection needs differences"):
        audited(tmp_path, *functions)


def test_trivial():
    verdict = trivial("sentiment", 32, 64)
    assert verdict.outcome == "faithful"
    assert "its own gold" in verdict.text


def test_machine_readable(tmp_path):
    result = audited(tmp_path, lambda text: np.float32(facts(text)))
    found = json.loads(json.dumps(asdict(result), allow_nan=False))
    assert found["verdict"]["outcome"] == "faithful"
    assert len(found["curves"]["points"]) == 6
