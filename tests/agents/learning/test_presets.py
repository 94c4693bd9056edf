"""The presets: their numbers, and the best policy of a solvable world."""

from __future__ import annotations

import pytest

from mbrl_text_env.agents.learning import (
    FilterError,
    FilterSettings,
    LoopSettings,
    LoopSettingsError,
    NoSignalError,
    answer_hint,
    planned,
    rejection_sampling,
    rest_em,
    star,
)
from mbrl_text_env.language_models import SamplingParams
from mbrl_text_env.types import Message, Prompt
from tests.agents.learning.worlds import (
    BASE,
    TOKENS,
    TRAIN,
    AnswerReward,
    CopyLM,
    expected_score,
    make_loop,
)
from tests.toys import CountReward, OptimalValue

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*train prompts. with fewer than 500"),
    # A world this small is soon learned.
    pytest.mark.filterwarnings("ignore:Iteration [23]. expected scores that differ"),
    pytest.mark.filterwarnings("ignore:Iteration .*to fit a value model on"),
]

SMALL = {"max_response_tokens": TOKENS, "params": SamplingParams(), "patience": None}


def test_the_papers_numbers():
    found = star()
    assert (found.answers_per_prompt, found.hints, found.start_from) == (1, True, "base")
    assert found.filter == FilterSettings(threshold=1.0)
    found = rest_em()
    assert (found.answers_per_prompt, found.start_from) == (32, "base")
    assert (found.params.temperature, found.params.top_k) == (0.7, 40)
    assert (found.filter.threshold, found.filter.best_of_prompt) == (1.0, 10)
    found = rejection_sampling()
    assert (found.start_from, found.filter.best_of_prompt) == ("checkpoint", None)
    assert rejection_sampling(keep="best").filter.best_of_prompt == 1
    assert not any(s.value for s in (star(), rest_em(), rejection_sampling()))
    assert (planned().start_from, planned().value) == ("checkpoint", "stacked")
    assert planned(top_fraction=0.1, iterations=7).filter.top_fraction == 0.1


class TestTheBestPolicyIsReached:
    """Each policy's exact mean score is compared with the best that any policy has."""

    def check(self, loop, reward, tokens, start, best):
        result = loop.run()
        last = loop.policy(result.iterations[-1].iteration)
        assert expected_score(loop.policy(0), reward, tokens) <= start
        assert expected_score(last, reward, tokens) == pytest.approx(best, abs=1e-9)
        assert result.iterations[-1].validation.mean == pytest.approx(best)
        return result

    def best_count(self):
        """By enumeration of all responses, which is what a perfect search would find."""
        from mbrl_text_env.mdp import initial

        states = [initial(prompt, BASE) for prompt in TRAIN]
        return OptimalValue(BASE, CountReward(), TOKENS).predict(states).mean.mean()

    def test_rest_em(self, tmp_path):
        settings = rest_em(iterations=2, **SMALL)
        self.check(make_loop(tmp_path, settings), None, TOKENS, 0.2, self.best_count())

    @pytest.mark.parametrize("keep", ["best", "all"])
    def test_rejection_sampling(self, tmp_path, keep):
        settings = rejection_sampling(keep=keep, iterations=2, **SMALL, answers_per_prompt=32)
        loop = make_loop(tmp_path, settings)
        result = self.check(loop, None, TOKENS, 0.2, self.best_count())
        if keep == "best":
            assert all(r.selected.num_records <= len(TRAIN) for r in result.iterations[1:])

    @pytest.mark.parametrize(("start_from", "share"), [("base", 0.5), ("checkpoint", 0.25)])
    def test_planned(self, tmp_path, start_from, share):
        """No threshold is known to it: the best of a search's answers, again and again."""
        settings = planned(
            "receding-horizon:horizon=1:plans=4:chunk_tokens=1",
            iterations=3,
            top_fraction=share,
            answers_per_prompt=4,
            start_from=start_from,
            **SMALL,
        )
        result = self.check(make_loop(tmp_path, settings), None, TOKENS, 0.2, self.best_count())
        means = [report.validation.mean for report in result.iterations]
        assert means == sorted(means)
        assert result.iterations[1].collected.mean > means[0] + 0.2

    def test_star(self, tmp_path):
        """The base copies the question: only hints ever lead to a right answer."""
        settings = star(iterations=1, **SMALL)
        loop = make_loop(tmp_path, settings, language_model=CopyLM(), reward_model=AnswerReward())
        result = self.check(loop, AnswerReward(), 2, 0.0, 1.0)
        [report] = result.iterations[1:]
        assert (report.collected.num_records, report.collected.num_hinted) == (30, 15)
        assert (report.selected.num_records, report.selected.num_hinted) == (15, 15)
        for record in loop.records(1, "selected"):
            # What is learned is the prompt as it is asked.
            assert record.prompt() == next(p for p in TRAIN if p.id == record.prompt_id)
            assert record.prompt_ids == CopyLM().encode_prompt(record.prompt())
            assert (record.agent, record.logprobs) == ("sampling+hint", ())
        # The base has no right answer at all.
        assert report.validation.divergence.per_response == float("inf")

    def test_star_needs_its_hints_there(self, tmp_path):
        settings = star(iterations=1, hints=False, **SMALL)
        with pytest.raises(NoSignalError, match="got the same for all answers"):
            make_loop(
                tmp_path, settings, language_model=CopyLM(), reward_model=AnswerReward()
            ).run()

    def test_star_hints_the_failed_ones_alone(self, tmp_path):
        settings = star(iterations=1, **SMALL)
        lm = CopyLM(others=1.0)
        loop = make_loop(tmp_path, settings, language_model=lm, reward_model=AnswerReward())
        loop.run()
        rows = loop.records(1, "collected")
        right = {r.prompt_id for r in rows if r.agent == "sampling" and r.score == 1.0}
        hinted = {r.prompt_id for r in rows if r.agent == "sampling+hint"}
        assert right
        assert hinted == {p.id for p in TRAIN} - right

    @pytest.mark.parametrize("preset", [rest_em, rejection_sampling])
    def test_where_each_iteration_starts(self, tmp_path, preset):
        half = FilterSettings(threshold=0.5)
        settings = preset(iterations=2, filter=half, **SMALL, answers_per_prompt=8)
        result = make_loop(tmp_path, settings).run()
        went_on = [report.improvement["went_on"] for report in result.iterations[1:]]
        assert went_on == [False, preset is rejection_sampling]


def test_a_reward_that_is_never_1_needs_another_threshold(tmp_path):
    class Halved(CountReward):
        def score(self, prompts, responses):
            return [score / 2 for score in super().score(prompts, responses)]

    with pytest.raises(FilterError, match=r"got 0 of 480 .*range from 0 to 0\.5"):
        make_loop(tmp_path, rest_em(**SMALL), reward_model=Halved()).run()


class TestHint:
    def test_a_chat(self):
        asked = Prompt(
            "q",
            (Message("system", "Be brief."), Message("user", "1 + 1?")),
            {"reference_answer": 2},
        )
        told = answer_hint(asked)
        assert told.content[0] == asked.content[0]
        assert told.content[1].content == "1 + 1?\n(Hint: the correct answer is 2.)"
        assert (told.id, told.metadata) == (asked.id, asked.metadata)

    def test_several_answers_and_none(self):
        plain = Prompt.from_text("q", chat=False, metadata={"reference_answer": ["x", "y"]})
        assert answer_hint(plain).content == "q\n(Hint: the correct answer is x.)"
        assert answer_hint(Prompt.from_text("q")) is None
        assert answer_hint(Prompt.from_text("q", metadata={"reference_answer": []})) is None


@pytest.mark.parametrize(
    "setting",
    [
        {"iterations": 0},
        {"answers_per_prompt": 0},
        {"patience": 0},
        {"divergence_samples": -1},
        {"error_factor": 0.5},
        {"error_factor": float("nan")},
        {"start_from": "nowhere"},
        {"stale_value": "ignore"},
    ],
)
def test_settings_out_of_range(setting):
    with pytest.raises(LoopSettingsError, match=next(iter(setting))):
        LoopSettings(**setting)


def test_unknown_settings():
    with pytest.raises(LoopSettingsError, match=r"fields of LoopSettings .*got \['iteration'\]"):
        planned(iteration=3)
    with pytest.raises(LoopSettingsError, match="expected 'best' or 'all', got 'most'"):
        rejection_sampling(keep="most")
