"""The loop: what it makes, how it goes on after a kill, when it stops, and what it refuses."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mbrl_text_env.agents.learning import (
    ExpertIteration,
    FilterError,
    FilterSettings,
    FineTuneSettings,
    LoopError,
    LoraImprover,
    NoSignalError,
    TuningError,
    check_value,
    planned,
    rejection_sampling,
    rest_em,
)
from mbrl_text_env.agents.learning.reports import fallen, without_signal
from mbrl_text_env.agents.learning.stages import STAGES, Stage
from mbrl_text_env.agents.values import StackedValue
from mbrl_text_env.language_models import SamplingParams
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import read_records
from mbrl_text_env.rewards.base import RewardError
from mbrl_text_env.runs import identity
from mbrl_text_env.types import Budget, BudgetError, Prompt
from mbrl_text_env.values import ValueModelError
from tests.agents.learning.worlds import (
    BASE,
    TOKENS,
    TRAIN,
    VALIDATION,
    AnswerReward,
    TabularImprover,
    make_loop,
    make_value,
)
from tests.agents.values.worlds import toy_records, written
from tests.toys import CountReward

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*train prompts. with fewer than 500"),
    pytest.mark.filterwarnings("ignore:Iteration .*to fit a value model on"),
    pytest.mark.filterwarnings("ignore:Iteration .*the gold reward fell"),
]

PLANNER = "receding-horizon:horizon=1:plans=2:chunk_tokens=1"
SETTINGS = planned(
    PLANNER,
    iterations=2,
    top_fraction=0.5,
    answers_per_prompt=2,
    max_response_tokens=TOKENS,
    params=SamplingParams(),
    batch_prompts=8,
    patience=None,
)


def content(folder):
    """Everything that a loop left, without times, by path."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name == ".lock":
            continue
        if path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".parquet":
            rows = [
                replace(record, usage=timeless(record.usage))
                for record in read_records(path.parent)
            ]
            found[str(Path(name).parent)] = rows
        else:
            found[name] = path.read_bytes()
    return found


def timeless(values):
    if isinstance(values, dict):
        return {k: timeless(v) for k, v in values.items() if k not in ("seconds", "wall_seconds")}
    return values


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A loop that nothing stopped: its folder, its result, and the loop."""
    folder = tmp_path_factory.mktemp("whole") / "loop"
    loop = make_loop(folder, SETTINGS, gold_model=CountReward("b"))
    return folder, loop.run(), loop


class TestWhatItMakes:
    def test_reports(self, whole):
        _, result, _ = whole
        base, first, second = result.iterations
        assert [r.iteration for r in result.iterations] == [0, 1, 2]
        assert (base.collected, base.selected, base.improvement) == (None, None, None)
        assert base.policy == "toy"
        assert first.policy != second.policy
        assert (first.collected.num_records, first.collected.num_prompts) == (30, 15)
        assert first.selected.num_records <= 15
        assert first.selected.mean > first.collected.mean > base.validation.mean
        assert first.validation.mean > base.validation.mean
        assert base.validation.divergence is None
        assert first.validation.divergence.per_response > 0
        assert second.value.refitted
        assert (result.best, result.stopped) == (2, None)

    def test_folders(self, whole):
        folder, result, _ = whole
        assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == [
            "00",
            "01",
            "02",
            "config.json",
        ]
        for number, names in ((0, STAGES[3:]), (1, STAGES), (2, STAGES)):
            found = {path.name for path in (folder / f"{number:02d}").iterdir()}
            assert found == {
                *names,
                *(f"{name}.json" for name in names),
                "scores.json",
                "ledger.json",
            }
        ledger = json.loads((folder / "01" / "ledger.json").read_text())
        assert set(ledger) == {*STAGES, "total"}
        collected = read_records(folder / "01" / "collected")
        assert ledger["collected"]["flops"] == pytest.approx(
            sum(record.usage["flops"] for record in collected)
        )
        stages = [ledger[name]["flops"] for name in STAGES]
        assert ledger["total"]["flops"] == pytest.approx(sum(stages))
        # Fifteen examples at most were learned at one operation each.
        assert ledger["policy"]["lm_flops"] == result.iterations[1].selected.num_records

    def test_figures_are_those_of_the_records(self, whole):
        _, result, loop = whole
        for report in result.iterations:
            records = loop.records(report.iteration, "validation")
            assert len(records) == 4 * len(VALIDATION)
            assert {r.language_model for r in records} == {report.policy}
            assert report.validation.mean == pytest.approx(np.mean([r.score for r in records]))
            gold = [r.response.count("b") / max(1, len(r.response)) for r in records]
            assert report.validation.gold.gold == pytest.approx(np.mean(gold))
            means = [np.mean([r.score for r in records if r.prompt_id == p.id]) for p in VALIDATION]
            expected = np.std(means, ddof=1) / np.sqrt(len(VALIDATION))
            assert report.validation.error == pytest.approx(expected)

    def test_the_value_is_tried_on_prompts_that_it_was_not_fitted_on(self, whole):
        _, result, loop = whole
        first, second = result.iterations[1:]
        fresh = loop.records(2, "validation")
        old = loop.value(1)
        assert second.value.before == check_value(old, fresh)
        assert second.value.when_fitted == check_value(old, loop.records(1, "validation"))
        assert second.value.when_fitted == first.value.after
        assert second.value.error_ratio == pytest.approx(
            second.value.before.error / second.value.when_fitted.error
        )
        assert loop.value(2).language_model_name_ == second.policy
        assert {r.prompt_id for r in loop.records(2, "value")} == {p.id for p in TRAIN}
        assert {r.language_model for r in loop.records(2, "value")} == {second.policy}

    def test_what_a_fit_asks_of_the_reward_is_charged(self, whole, tmp_path):
        _, result, loop = whole

        def prefixes(records):
            return sum(len(r.response_ids) > 1 for r in records)

        records, fresh = loop.records(0, "value"), loop.records(0, "validation")
        # Each response once, its prefixes in the fit, and those of the check.
        expected = len(records) + prefixes(records) + prefixes(fresh)
        found = result.iterations[0].usage["value"]["reward_calls"]
        assert found - expected == pytest.approx(
            0, abs=sum(len(r.response_ids) == 1 for r in records)
        )

    def test_answers_are_those_of_the_policy_before(self, whole):
        _, result, loop = whole
        for iteration in (1, 2):
            names = {r.language_model for r in loop.records(iteration, "collected")}
            assert names == {result.iterations[iteration - 1].policy}
            seeds = {r.seed for r in loop.records(iteration, "collected")}
            assert len(seeds) == 1

    def test_the_same_call_again_makes_nothing(self, whole):
        folder, result, _ = whole
        before = content(folder)
        begun = []
        loop = make_loop(
            folder, SETTINGS, gold_model=CountReward("b"), on_stage=lambda *s: begun.append(s)
        )
        assert [r.to_dict() for r in loop.run().iterations] == [
            r.to_dict() for r in result.iterations
        ]
        assert begun == []
        assert content(folder) == before

    def test_more_iterations_go_on(self, whole, tmp_path):
        folder, _, _ = whole
        make_loop(
            tmp_path / "a", replace(SETTINGS, iterations=1), gold_model=CountReward("b")
        ).run()
        make_loop(tmp_path / "a", SETTINGS, gold_model=CountReward("b")).run()
        assert content(tmp_path / "a") == content(folder)


def stage_numbers():
    names = [(0, name) for name in STAGES[3:]] + [(i, name) for i in (1, 2) for name in STAGES]
    return [pytest.param(at, id=f"{at[0]}-{at[1]}") for at in names]


class Stopping(CountReward):
    """Stands for Ctrl-C in one of its calls; counts them below 0."""

    left = 0

    def identity(self):
        return identity(CountReward())

    def score(self, prompts, responses):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().score(prompts, responses)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Calls of the reward model in the whole loop."""
    counted = Stopping()
    folder = tmp_path_factory.mktemp("count") / "loop"
    make_loop(folder, SETTINGS, reward_model=counted, gold_model=CountReward("b")).run()
    return -counted.left


class TestKills:
    @pytest.mark.parametrize("at", stage_numbers())
    def test_before_a_stage_is_noted(self, whole, tmp_path, monkeypatch, at):
        """Its data are there, its note is not."""

        class KillError(Exception):
            pass

        end = Stage.end

        def killed(self, values):
            if (self.iteration, self.name) == at:
                raise KillError
            end(self, values)

        with monkeypatch.context() as patch:
            patch.setattr(Stage, "end", killed)
            with pytest.raises(KillError):
                make_loop(tmp_path / "a", SETTINGS, gold_model=CountReward("b")).run()
        assert not (tmp_path / "a" / f"{at[0]:02d}" / f"{at[1]}.json").exists()
        begun = []
        make_loop(
            tmp_path / "a",
            SETTINGS,
            gold_model=CountReward("b"),
            on_stage=lambda *stage: begun.append(stage),
        ).run()
        assert begun[0] == at
        assert content(tmp_path / "a") == content(whole[0])

    @pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.9])
    def test_in_the_middle_of_a_stage(self, whole, calls, tmp_path, share):
        """Ctrl-C while something is scored: half of the records may be written."""

        stopping = Stopping()
        stopping.left = round(calls * share)
        loop = make_loop(
            tmp_path / "a", SETTINGS, reward_model=stopping, gold_model=CountReward("b")
        )
        with pytest.raises(KeyboardInterrupt, match=r"Stopped in iteration .*same call resumes"):
            loop.run()
        loop.run()
        assert content(tmp_path / "a") == content(whole[0])

    def test_sigkill(self, whole, tmp_path):
        """A process that dies in the middle of a planner's answers."""
        script = textwrap.dedent(
            """
            import os, signal, sys
            from mbrl_text_env.runs import identity
            from tests.agents.learning.test_expert_iteration import SETTINGS
            from tests.agents.learning.worlds import make_loop
            from tests.toys import CountReward

            class Deadly(CountReward):
                def identity(self):
                    return identity(CountReward())

                def score(self, prompts, responses):
                    if armed and os.path.exists(sys.argv[1] + "/01/collected/shard-00000.parquet"):
                        os.kill(os.getpid(), signal.SIGKILL)
                    return super().score(prompts, responses)

            armed = True
            make_loop(
                sys.argv[1], SETTINGS, reward_model=Deadly(), gold_model=CountReward("b")
            ).run()
            """
        )
        folder = tmp_path / "a"
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        # The first batch of answers was written, and no more than that.
        assert len(read_records(folder / "01" / "collected")) == 16
        assert not (folder / "01" / "collected.json").exists()
        make_loop(folder, SETTINGS, gold_model=CountReward("b")).run()
        assert content(folder) == content(whole[0])

    @pytest.mark.parametrize("where", ["records", "policy", "note"])
    def test_no_space_left(self, whole, tmp_path, monkeypatch, where):
        full = OSError(errno.ENOSPC, "No space left on device")

        def fail(*args, **kwargs):
            raise full

        class Full(TabularImprover):
            improve = fail

        options = {"gold_model": CountReward("b")}
        with monkeypatch.context() as patch:
            loop = make_loop(tmp_path / "a", SETTINGS, **options)
            if where == "policy":
                loop.improver = Full()
            if where == "records":
                make_loop(tmp_path / "a", replace(SETTINGS, iterations=1), **options).run()
                patch.setattr("mbrl_text_env.records.write_file", fail)
            if where == "note":
                patch.setattr("mbrl_text_env.agents.learning.reports.write_text", fail)
            # Records have an error of their own, which names the folder too.
            with pytest.raises((LoopError, ValueError), match="No space left on device") as caught:
                loop.run()
        assert str(tmp_path / "a") in str(caught.value)
        if where == "policy":
            assert "iteration 1, stage 'policy'" in str(caught.value)
            assert "Free some space" in str(caught.value)
            assert (tmp_path / "a" / "01" / "selected.json").is_file()
        make_loop(tmp_path / "a", SETTINGS, **options).run()
        assert content(tmp_path / "a") == content(whole[0])


def test_what_was_being_written_is_removed(tmp_path):
    def stop(iteration, name):
        raise KeyboardInterrupt

    folder, settings = tmp_path / "a", replace(SETTINGS, iterations=1)
    folder.mkdir()
    (folder / ".config.json-0123").write_text("{")
    with pytest.raises(KeyboardInterrupt):
        make_loop(folder, settings, on_stage=stop).run()
    (folder / "00" / ".validation-0123").mkdir(parents=True)
    (folder / "00" / ".validation.json-0123").write_text("{")
    make_loop(folder, settings).run()
    assert not list((folder / "00").glob(".validation*"))


class Falling(TabularImprover):
    """Learns the worst of what it is shown, from the second time on."""

    def improve(self, base, records, folder, *, start_from=None, seed=0):
        if start_from is not None:
            records = sorted(records, key=lambda record: record.score)[:2]
            records = [replace(r, response_ids=(2, 2, 2, 2)) for r in records]
            return super().improve(base, records * 20, folder, start_from=start_from)
        return super().improve(base, records, folder)


class TestStopping:
    def test_when_validation_falls(self, tmp_path):
        settings = rejection_sampling(
            iterations=6,
            max_response_tokens=TOKENS,
            params=SamplingParams(),
            answers_per_prompt=8,
            filter=FilterSettings(threshold=0.5),
            value="stacked",
            patience=2,
        )
        loop = make_loop(tmp_path / "a", settings, improver=Falling())
        result = loop.run()
        means = [report.validation.mean for report in result.iterations]
        assert means[1] > means[0]
        assert max(means[2:]) < means[1]
        assert (result.best, len(result.iterations)) == (1, 4)
        assert "not risen above that of iteration 1" in result.stopped
        assert "for 2 iterations" in result.stopped
        # Nothing searches with the last policy any more.
        assert result.iterations[-1].value is None
        with pytest.raises(LoopError, match="iteration 3 has no 'value'"):
            loop.value(3)
        # A call that is made again stops at the same place, with more patience later.
        assert loop.run().stopped == result.stopped
        more = replace(settings, patience=3)
        again = make_loop(tmp_path / "a", more, improver=Falling()).run()
        assert len(again.iterations) == 5
        assert again.iterations[3].value is not None

    def test_by_hand(self):
        assert fallen([0.1], 1) is None
        assert fallen([0.1, 0.2], 1) is None
        assert "iteration 0 (0.1) for 1 iteration; it is 0.05 now" in fallen([0.1, 0.05], 1)
        assert fallen([0.1, 0.05], 2) is None
        assert fallen([0.1, 0.05, 0.09], 2) is not None
        assert fallen([0.1, 0.05, 0.11], 2) is None
        assert fallen([0.1, 0.0, 0.0, 0.0], None) is None
        # Equal is no rise.
        assert fallen([0.1, 0.1], 1) is not None

    def test_no_signal_at_the_start(self, tmp_path):
        class Constant(CountReward):
            def score(self, prompts, responses):
                return [0.5] * len(responses)

        loop = make_loop(tmp_path / "a", rest_em(), reward_model=Constant())
        with pytest.raises(NoSignalError) as caught:
            loop.run()
        assert "no signal to learn from. The 480 scores of 15 prompts range from 0.5 to 0.5" in str(
            caught.value
        )
        assert "check the reward 'count'" in str(caught.value)
        # For a planner it is the value that cannot be fitted.
        with pytest.raises(ValueError, match="no signal to learn from"):
            make_loop(tmp_path / "b", SETTINGS, reward_model=Constant()).run()

    def test_no_signal_is_of_all_answers(self):
        same = [written("ab", "a", 1.0), written("c", "a", 1.0)]
        mixed = [*same, written("ab", "b", 0.0)]
        assert without_signal(mixed, mixed, is_plain=True) is None
        assert without_signal(same, mixed, is_plain=True) is not None
        # A planner that always finds the best has something to teach to a policy that does not.
        assert without_signal(same, mixed, is_plain=False) is None
        assert without_signal(same, same, is_plain=False) is not None

    def test_few_prompts(self, tmp_path):
        settings = replace(SETTINGS, iterations=1)
        with pytest.warns(UserWarning, match="15 train prompts: with fewer than 500"):
            make_loop(tmp_path / "a", settings).run()


class TestStaleValues:
    def test_refit_where_it_is_worse(self, tmp_path):
        """The same loop, with a factor that is always passed and one that never is."""
        for factor, refitted in ((1.0, None), (1e9, False)):
            settings = replace(SETTINGS, stale_value="refit-if-worse", error_factor=factor)
            loop = make_loop(tmp_path / str(factor), settings)
            for report in loop.run().iterations[1:]:
                worse = report.value.error_ratio > factor
                assert report.value.refitted == (worse if refitted is None else refitted)
                value = loop.value(report.iteration)
                assert value.language_model_name_ == report.policy
                stage = tmp_path / str(factor) / f"{report.iteration:02d}" / "value"
                assert (stage / "records").exists() == report.value.refitted
                if not report.value.refitted:
                    assert report.value.after == report.value.before
        last = report.value
        assert last.fitted_at == 0
        # Compared with how it did for the policy that it was fitted for, not with the last one.
        first = check_value(loop.value(2), loop.records(0, "validation"))
        assert last.when_fitted == first

    def test_an_error(self, tmp_path):
        settings = replace(SETTINGS, stale_value="error")
        loop = make_loop(tmp_path, settings)
        with pytest.raises(
            ValueModelError, match=r"fitted for the language model 'toy', got 'toy\+"
        ):
            loop.run()
        # The first iteration is whole, the second one has begun.
        assert (tmp_path / "01" / "scores.json").is_file()
        assert not (tmp_path / "02" / "collected.json").exists()
        assert not (tmp_path / "01" / "value").exists()
        report = json.loads((tmp_path / "01" / "value.json").read_text())["report"]
        assert (report["refitted"], report["fitted_at"]) == (False, 0)

    def test_a_value_of_ones_own(self, tmp_path):
        class Other(CountReward):
            name = "other"

        own = make_value(BASE, CountReward()).fit(toy_records(CountReward(), TRAIN, 4))
        settings = replace(SETTINGS, iterations=1)
        loop = make_loop(tmp_path / "a", settings, value_model=own)
        result = loop.run()
        assert not result.iterations[0].value.refitted
        assert result.iterations[1].value.refitted
        states = [r.prefix_state(1) for r in loop.records(0, "validation") if r.response]
        np.testing.assert_array_equal(loop.value(0).predict(states).mean, own.predict(states).mean)
        own.reward_name_ = "other"
        with pytest.raises(ValueModelError, match="fitted for the reward 'other'"):
            make_loop(tmp_path / "b", settings, value_model=own).run()

    def test_a_value_that_needs_no_fit(self, tmp_path):
        settings = replace(SETTINGS, iterations=1, value="prefix")
        result = make_loop(tmp_path, settings).run()
        assert [r.value.refitted for r in result.iterations] == [False, False]
        assert not list(tmp_path.glob("*/value"))


class TestGold:
    def test_a_reward_that_is_exploited(self, tmp_path):
        """What is optimised is the share of a; what is wanted is anything else."""

        class Gold(CountReward):
            name = "gold"

            def score(self, prompts, responses):
                return [1 - score for score in super().score(prompts, responses)]

        settings = replace(SETTINGS, iterations=1)
        with pytest.warns(UserWarning, match="gold reward fell from"):
            result = make_loop(tmp_path, settings, gold_model=Gold()).run()
        first, last = (report.validation.gold for report in result.iterations)
        assert last.gap > first.gap
        assert result.iterations[1].warnings
        scores = json.loads((tmp_path / "01" / "scores.json").read_text())
        assert scores["warnings"] == list(result.iterations[1].warnings)


class TestAgents:
    def test_a_budget(self, tmp_path):
        settings = replace(SETTINGS, budget=Budget(tokens=12), iterations=1)
        loop = make_loop(tmp_path / "a", settings)
        loop.run()
        spent = [r.usage["generated_tokens"] for r in loop.records(1, "collected")]
        assert max(spent) <= 12
        assert np.mean(spent) > 6
        tight = rest_em(budget=Budget(tokens=2), max_response_tokens=TOKENS)
        with pytest.raises(BudgetError, match="too small for one response"):
            make_loop(tmp_path / "b", tight).run()

    def test_prompts_that_cannot_be_scored(self, tmp_path):
        class Fussy(CountReward):
            def score(self, prompts, responses):
                if any(prompt.id == "train-ab" for prompt in prompts):
                    raise RewardError("not this one")
                return super().score(prompts, responses)

        settings = rest_em(
            iterations=1, max_response_tokens=TOKENS, filter=FilterSettings(top_fraction=0.5)
        )
        with pytest.warns(UserWarning, match="Skipped prompt 'train-ab'"):
            result = make_loop(tmp_path, settings, reward_model=Fussy()).run()
        report = result.iterations[1].collected
        assert (report.num_prompts, report.num_failed) == (14, 1)


class TestRefused:
    def test_another_loop(self, whole):
        folder, _, _ = whole
        options = {"gold_model": CountReward("b")}
        for change, key in (
            ({"settings": replace(SETTINGS, seed=1)}, "settings"),
            ({"train": TRAIN[:-1]}, "train"),
            ({"gold_model": None}, "gold"),
        ):
            merged = {"settings": SETTINGS, **options, **change}
            with pytest.raises(LoopError, match=rf"holds another loop \({key}"):
                make_loop(folder, merged.pop("settings"), **merged).run()

    def test_other_folders(self, tmp_path):
        (tmp_path / "precious.txt").write_text("mine")
        for folder in (tmp_path, tmp_path / "precious.txt"):
            with pytest.raises(LoopError, match=r"[Cc]hoose a"):
                make_loop(folder, SETTINGS).run()
        assert (tmp_path / "precious.txt").read_text() == "mine"

    def test_two_at_once(self, tmp_path):
        inner = []

        def twice(iteration, name):
            with pytest.raises(LoopError, match="another process works on this loop"):
                make_loop(tmp_path / "a", replace(SETTINGS, iterations=1)).run()
            inner.append(name)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make_loop(tmp_path / "a", replace(SETTINGS, iterations=1), on_stage=twice).run()
        assert inner == ["validation"]

    def test_a_damaged_note(self, whole, tmp_path):
        import shutil

        shutil.copytree(whole[0], tmp_path / "a")
        (tmp_path / "a" / "01" / "validation.json").write_text("{")
        with pytest.raises(LoopError, match=r"validation\.json: expected a whole JSON object"):
            make_loop(tmp_path / "a", SETTINGS, gold_model=CountReward("b")).run()

    def test_prompts(self, tmp_path):
        def loop(train, validation, reward=None):
            reward = reward or CountReward()
            return ExpertIteration(BASE, reward, train, validation, tmp_path, SETTINGS)

        with pytest.raises(LoopError, match="train: expected at least 1"):
            loop([], VALIDATION)
        with pytest.raises(LoopError, match=r"distinct ids, got \['train-aa'\] more than once"):
            loop(TRAIN, [TRAIN[0]])

        class Asks(AnswerReward):
            def applies_to(self, prompt):
                return "reference_answer" in prompt.metadata

        with pytest.raises(LoopError, match="1 others of 1, first 'plain'"):
            loop(TRAIN, [Prompt.from_text("ab", "plain")], Asks())

    def test_a_filter_that_leaves_nothing(self, tmp_path):
        settings = replace(SETTINGS, filter=FilterSettings(threshold=2.0))
        with pytest.raises(FilterError, match="got 0 of 30"):
            make_loop(tmp_path, settings).run()

    def test_policies_that_are_not_there(self, whole):
        with pytest.raises(LoopError, match="iteration 7 has no 'policy'"):
            whole[2].policy(7)

    def test_a_language_model_that_cannot_be_tuned(self, tmp_path):
        settings = rest_em(
            iterations=1, max_response_tokens=TOKENS, filter=FilterSettings(top_fraction=0.5)
        )
        with pytest.raises(TypeError, match=r"fine-tune, got 'toy' \(NGramLM\)"):
            make_loop(tmp_path, settings, improver=LoraImprover()).run()


def test_settings_of_the_improver_are_part_of_the_loop(tmp_path):
    settings = FineTuneSettings(epochs=3, seed=5)
    described = LoraImprover(settings).described()
    assert (described["kind"], described["epochs"], "seed" in described) == ("lora", 3, False)
    assert LoraImprover().described()["r"] == 16


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    from tests.agents.learning.tiny import PROMPTS, tiny_lm

    lm = tiny_lm()
    settings = rejection_sampling(
        iterations=2,
        answers_per_prompt=8,
        max_response_tokens=12,
        params=SamplingParams(),
        filter=FilterSettings(top_fraction=0.25),
        patience=None,
        value="stacked",
        validation_samples=8,
    )
    improver = LoraImprover(FineTuneSettings(learning_rate=2e-2, epochs=4, batch_size=4))
    folder = tmp_path_factory.mktemp("lora") / "loop"
    options = {"improver": improver}
    prompts = PROMPTS[:4], PROMPTS[4:]
    loop = ExpertIteration(lm, CountReward("e"), *prompts, folder, settings, **options)
    return (
        folder,
        loop.run(),
        loop,
        lambda to: ExpertIteration(lm, CountReward("e"), *prompts, to, settings, **options),
    )


class TestLora:
    """The real fine-tuning, on a tiny Llama."""

    def test_it_learns(self, tuned):
        _, result, loop, _ = tuned
        base, first, second = result.iterations
        assert second.validation.mean > base.validation.mean
        assert second.validation.divergence.per_response > first.validation.divergence.per_response
        assert first.improvement["num_examples"] == 8
        assert first.improvement["losses"][-1] < first.improvement["loss_before"]
        assert {base.policy, first.policy, second.policy} == {loop.policy(i).name for i in range(3)}
        assert first.policy.startswith("tiny+")
        assert second.value.refitted
        assert second.usage["policy"]["lm_flops"] > 0

    def test_it_goes_on_after_a_kill(self, tuned, tmp_path, monkeypatch):
        folder, _, _, make = tuned

        class KillError(Exception):
            pass

        end = Stage.end

        def killed(self, values):
            if (self.iteration, self.name) == (2, "policy"):
                raise KillError
            end(self, values)

        with monkeypatch.context() as patch:
            patch.setattr(Stage, "end", killed)
            with pytest.raises(KillError):
                make(tmp_path / "a").run()
        make(tmp_path / "a").run()
        there, here = content(folder), content(tmp_path / "a")
        assert there.keys() == here.keys()
        for name in there:
            if "adapter_model" in name or name.endswith("records") or "validation" in name:
                assert there[name] == here[name], name

    def test_a_policy_of_another_base(self, tuned):
        from tests.agents.learning.tiny import tiny_lm

        folder, _, _, _ = tuned
        with pytest.raises(TuningError, match="expected an adapter for"):
            LoraImprover().serve(tiny_lm(seed=1), folder / "01" / "policy")

    def test_stop_by_hand_in_tuning(self, tuned, tmp_path, monkeypatch):
        import os

        import trl

        _, _, _, make = tuned
        step = trl.SFTTrainer.training_step

        def stopped(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            return step(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(trl.SFTTrainer, "training_step", stopped)
            with pytest.raises(
                KeyboardInterrupt,
                match=r"Stopped in iteration 1, stage 'policy'.*Stopped after step",
            ):
                make(tmp_path / "a").run()


def test_a_state_is_not_shared_between_stages(whole):
    """Seeds differ: the same prompts are sampled anew at each stage and iteration."""
    _, _, loop = whole
    seeds = {
        (iteration, stage): loop.records(iteration, stage)[0].seed
        for iteration, stages in ((0, STAGES[3:]), (1, ("collected", *STAGES[3:])))
        for stage in stages
    }
    assert len(set(seeds.values())) == len(seeds)
    assert initial(VALIDATION[0], BASE).prompt_ids == loop.records(0, "validation")[0].prompt_ids
    assert isinstance(loop.value(0), StackedValue)
