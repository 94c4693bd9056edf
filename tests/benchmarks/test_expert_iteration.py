"""The comparisons by hand, and the command on a tiny model."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from mbrl_text_env.agents.learning import LoraImprover, check_value
from mbrl_text_env.agents.values import load_value, make_value
from mbrl_text_env.benchmarks.expert_iteration import (
    ExpertIterationError,
    Measurement,
    _Predictions,
    _predictions,
    compared,
    main,
    planned_answers,
    sampled,
    values_compared,
)
from mbrl_text_env.benchmarks.paired import chosen_prompts, paired
from mbrl_text_env.language_models import TransformersLM
from mbrl_text_env.records import read_records
from mbrl_text_env.rewards import make
from tests.agents.learning.tiny import PROMPTS, tiny_lm
from tests.agents.values.worlds import LM, written
from tests.benchmarks.test_policy_tuning import TOKENS, Command, said
from tests.toys import CountReward, FixedValue

pytestmark = pytest.mark.filterwarnings("ignore:.*train prompts. with fewer than 500")

SMALL = {
    "--iterations": "2", "--prompts": "4", "--answers": "2", "--validation-prompts": "2",
    "--test-prompts": "3", "--samples": "3", "--learning-rate": "0.05", "--value": "calibrated",
    "--planner": "receding-horizon:horizon=1:plans=2:chunk_tokens=4",
    "--refits": "hidden-state", "--refit-samples": "3",
}  # fmt: skip


class TestCompared:
    def test_by_hand(self):
        first = [written("ab", "a", 0.0), written("ab", "b", 0.5), written("c", "a", 0.5)]
        second = [replace(r, score=r.score + 0.25) for r in first]
        found = compared(first, second, seed=0)
        # Prompt means 0.25 and 0.5, and a quarter more.
        assert (found["before"], found["after"], found["difference"]) == (0.375, 0.625, 0.25)
        assert (found["num_prompts"], found["p_value"]) == (2, 0.5)

    def test_prompts_that_one_lacks_are_left_out(self):
        first = [written("ab", "a", 0.0), written("ba", "a", 9.0), written("c", "a", 0.5)]
        second = [written("aab", "a", 7.0), written("ab", "a", 0.5), written("c", "a", 0.5)]
        found = compared(first, second, seed=0)
        assert found == paired([0.0, 0.5], [0.5, 0.5], ["ab", "c"], seed=0)
        assert found["wins_ties_losses"] == [1, 1, 0]


class TestResampled:
    def predictions(self, mean, scores, prompts, lengths=None):
        lengths = [8] * len(mean) if lengths is None else lengths
        return _Predictions(
            np.array(mean, float), np.array(scores, float), np.array(prompts), np.array(lengths)
        )

    def test_by_hand(self):
        """Right about the first prompt, wrong about the second, at another level."""
        found = self.predictions([0, 1, 2, 9, 8, 7], [0, 1, 2, 5, 6, 7], [0, 0, 0, 1, 1, 1])
        for chosen, expected in (
            # Centred, each prompt adds 2 or -2 to the covariance and 2 to both variances.
            ([0], 1.0), ([1], -1.0), ([0, 1], 0.0), ([1, 0, 0], 1 / 3), ([1, 1, 1], -1.0),
        ):  # fmt: skip
            assert found.resampled(np.array(chosen)) == pytest.approx(expected)

    def test_prefixes_of_one_length_are_compared(self):
        """Right at the length 8, wrong at 16; across the lengths it would be mostly right."""
        found = self.predictions([0, 1, 10, 11], [0, 1, 6, 5], [0] * 4, [8, 8, 16, 16])
        assert found.resampled(np.array([0])) == pytest.approx(0.0)

    def test_nothing_varies(self):
        found = self.predictions([0, 1], [0.5, 0.5], [0, 0])
        assert np.isnan(found.resampled(np.array([0])))

    def test_all_prompts_once_is_the_usual_figure(self):
        rng = np.random.default_rng(0)
        records = [
            written(prompt, "".join(rng.choice(list("abc"), size=size)), rng.normal())
            for prompt in ("ab", "c", "ba")
            for size in (4, 9, 20, 20)
        ]
        value = FixedValue(lambda text: text.count("a") / (1 + text.count("b")), LM)
        found = _predictions(value, records).resampled(np.arange(3))
        assert found == pytest.approx(check_value(value, records).within_prompt, abs=1e-12)


class TestValuesCompared:
    """A response of two letters gives one prefix, its first letter."""

    RECORDS = (
        written("a", "aa", 1.0), written("a", "bb", 0.0),
        written("b", "cc", 1.0), written("b", "dd", 0.0),
    )  # fmt: skip

    def value(self, letters):
        return FixedValue(lambda text: text[0] in letters, LM)

    def test_by_hand(self):
        """The first value is right about prompt a and wrong about b, the other right about both.

        Of resamples, a quarter has a twice (1 and 1), a quarter b twice (-1 and 1), and half both
        (0 and 1).
        """
        found = values_compared(self.value("ad"), self.value("ac"), self.RECORDS, seed=0)
        expected = {"first": 0.0, "refitted": 1.0, "difference": 1.0, "interval": [0.0, 2.0]}
        assert found == {name: pytest.approx(value) for name, value in expected.items()}

    def test_resamples_without_a_figure_are_left_out(self):
        """Where b is drawn twice no score varies; where both are, the first tells b's apart."""
        flat = [*self.RECORDS[:2], *(replace(r, score=0.5) for r in self.RECORDS[2:])]
        found = values_compared(self.value("ad"), self.value("a"), flat, seed=0)
        assert found["first"] == pytest.approx(1 / np.sqrt(2))
        assert found["refitted"] == pytest.approx(1.0)
        assert found["interval"] == pytest.approx([0.0, 1 - 1 / np.sqrt(2)])

    def test_a_value_that_tells_nothing(self):
        found = values_compared(self.value("ac"), self.value("abcd"), self.RECORDS, seed=0)
        assert found == {
            "first": pytest.approx(1.0), "refitted": None, "difference": None,
            "interval": [None, None],
        }  # fmt: skip
        json.dumps(found, allow_nan=False)


class TestMeasured:
    def measurement(self, lm):
        flops = lm.usage(64, [TOKENS] * 8).flops
        return Measurement(
            CountReward("e"), PROMPTS[:3], 2, SMALL["--planner"], flops, TOKENS, seed=0
        )

    def test_a_prompt_costs_whatever_was_asked_before(self):
        """Both policies pay for their prompts, though the base has sampled from them already."""

        def rows():
            found = planned_answers(lm, None, self.measurement(lm))
            return [{k: v for k, v in row.items() if k != "seconds"} for row in found]

        lm = tiny_lm()
        lm.clear_cache()
        first = rows()
        assert [row["prompt"] for row in first] == [prompt.id for prompt in PROMPTS[:3]]
        assert rows() == first
        # The others have the first tokens of the template in common with it.
        assert first[0]["prompt_tokens"] >= len(lm.encode_prompt(PROMPTS[0]))
        assert all(0 < row["flops"] <= self.measurement(lm).flops for row in first)

    def test_samples_are_kept(self, tmp_path):
        lm = tiny_lm()
        found = sampled(tmp_path / "s", lm, self.measurement(lm))
        assert [r.prompt_id for r in found] == [p.id for p in PROMPTS[:3] for _ in range(2)]
        assert [r.score for r in found] == CountReward("e").score([], [r.response for r in found])
        # Nothing is drawn again: another seed would have drawn something else.
        other = replace(self.measurement(lm), seed=1)
        assert sampled(tmp_path / "s", lm, other) == found
        drawn = sampled(tmp_path / "t", lm, other)
        assert [r.response_ids for r in drawn] != [r.response_ids for r in found]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(main, tmp_path_factory.mktemp("models"), SMALL)


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("loop") / "run"
    result = command.run(out)
    assert result.exit_code == 0, result.output
    return out, json.loads(out.with_suffix(".json").read_text()), result


class TestCommand:
    def test_sampling(self, command, finished):
        out, figures, _ = finished
        reward = make(f"{command.reward}:letters")
        test = chosen_prompts(reward, "test", 3, ExpertIterationError)
        tests = [read_records(out / f"test-{i:02d}") for i in range(3)]
        names = [report["policy"] for report in figures["iterations"]]
        assert len(set(names)) == 3
        for records, name in zip(tests, names, strict=True):
            assert [r.prompt_id for r in records] == [p.id for p in test for _ in range(3)]
            assert {r.language_model for r in records} == {name}
        result = figures["result"]
        assert result["sampling"] == [np.mean([r.score for r in records]) for records in tests]
        assert result["against_the_one_before"] == [
            compared(tests[0], tests[1], 0), compared(tests[1], tests[2], 0),
        ]  # fmt: skip
        assert result["against_the_base"] == [
            compared(tests[0], tests[1], 0), compared(tests[0], tests[2], 0),
        ]  # fmt: skip
        seen = {
            r.prompt_id
            for path in (out / "loop").glob("*/*")
            if path.name in ("collected", "validation")
            for r in read_records(path)
        }
        assert len(seen) == 4 + 2
        assert not seen & {prompt.id for prompt in test}

    def test_values(self, command, finished):
        out, figures, _ = finished
        rows = figures["result"]["values_on_fresh_responses"]
        assert [row["iteration"] for row in rows] == [1, 2]
        lm, reward = TransformersLM(command.model), make(f"{command.reward}:letters")
        for row in rows:
            records = read_records(out / f"test-{row['iteration']:02d}")
            for name, iteration in (("first", 0), ("refitted", row["iteration"])):
                root = out / "loop" / f"{iteration:02d}"
                policy = LoraImprover().serve(lm, root / "policy") if iteration else lm
                value = load_value(root / "value" / "model", policy, reward)
                found = check_value(value, records).within_prompt
                assert row[name] == pytest.approx(found, abs=1e-12)

    def test_refits(self, command, finished):
        """Another kind of value than the loop's, on more samples of the same policies."""
        out, figures, _ = finished
        found = figures["result"]["refits"]
        assert set(found) == {"samples", "hidden-state"}
        assert found["samples"] == 3
        reward = make(f"{command.reward}:letters")
        train = chosen_prompts(reward, "train", 4, ExpertIterationError)
        test = chosen_prompts(reward, "test", 3, ExpertIterationError)
        base = TransformersLM(command.model)

        def value(iteration):
            root = out / "loop" / f"{iteration:02d}"
            policy = LoraImprover().serve(base, root / "policy") if iteration else base
            records = read_records(out / "refits-3" / f"fit-{iteration:02d}")
            assert [r.prompt_id for r in records] == [p.id for p in train for _ in range(3)]
            assert {r.language_model for r in records} == {policy.name}
            return make_value("hidden-state", policy, reward, seed=0).fit(records)

        first = value(0)
        assert [row["iteration"] for row in found["hidden-state"]] == [1, 2]
        for row in found["hidden-state"]:
            records = read_records(out / "refits-3" / f"fresh-{row['iteration']:02d}")
            assert [r.prompt_id for r in records] == [p.id for p in test for _ in range(3)]
            expected = values_compared(first, value(row["iteration"]), records, 0)
            for key, number in expected.items():
                assert row[key] == pytest.approx(number, abs=1e-4)

    def test_kinds_that_are_not_fitted_are_refused(self, command, tmp_path):
        refused = command.run(tmp_path / "run", refits="hidden-state,prefix")
        assert refused.exit_code == 2
        assert "--refits: expected some of" in said(refused)
        assert not (tmp_path / "run").exists()

    def test_planners(self, command, finished):
        out, figures, _ = finished
        found = figures["result"]["planner_tuned_against_base"]
        assert found["iteration"] == max(figures["best"], 1)
        lm = TransformersLM(command.model)
        assert found["cap_flops"] == lm.usage(64, [TOKENS] * 8).flops
        names = ["planner-00.json", f"planner-{found['iteration']:02d}.json"]
        assert sorted(path.name for path in out.glob("planner-*")) == names
        sides = [json.loads((out / name).read_text()) for name in names]
        assert found["mean_flops"] == [np.mean([row["flops"] for row in rows]) for rows in sides]
        assert max(row["flops"] for rows in sides for row in rows) <= found["cap_flops"]
        scores = [[row["score"] for row in rows] for rows in sides]
        expected = paired(*scores, [row["prompt"] for row in sides[0]], seed=0)
        assert {name: found[name] for name in expected} == expected

    def test_what_is_printed(self, finished):
        _, figures, result = finished
        shown = json.loads(result.stdout)
        assert shown["result"] == figures["result"]
        assert "iteration 2: policy" in result.stderr

    def test_a_second_run_makes_nothing(self, command, finished):
        out, figures, first = finished

        def made():
            # The loop's summaries are put together again from its notes.
            again = ("scores.json", "ledger.json", ".lock")
            files = (path for path in out.rglob("*") if path.is_file() and path.name not in again)
            return {path: path.stat().st_mtime_ns for path in files}

        before = made()
        again = command.run(out)
        assert (again.exit_code, again.stdout) == (0, first.stdout)
        assert "iteration" not in again.stderr
        assert made() == before
        assert json.loads(out.with_suffix(".json").read_text()) == figures

    def test_a_run_that_was_stopped_goes_on(self, command, finished, tmp_path):
        """Once in the loop, once while test prompts are answered."""
        figures = copy.deepcopy(finished[1])
        out = tmp_path / "run"
        result = command.run(out, stop_after="loop/01/policy.json")
        assert result.exit_code == 130, result.output
        assert "Stopped in iteration 1, stage 'validation'" in said(result)
        result = command.run(out, stop_after="test-00")
        assert result.exit_code == 130, result.output
        assert "Stopped; the same command goes on." in said(result)
        assert "iteration 1: policy" not in result.stderr
        assert "iteration 2: policy" in result.stderr
        assert not (out / "test-01").exists()
        result = command.run(out)
        assert result.exit_code == 0, result.output
        found = json.loads(out.with_suffix(".json").read_text())["result"]
        # Features round a little otherwise where another part of a prefix was in the cache.
        rows, expected = (r["refits"].pop("hidden-state") for r in (found, figures["result"]))
        for row, other in zip(rows, expected, strict=True):
            assert row.pop("interval") == pytest.approx(other.pop("interval"), abs=1e-4)
            assert row == pytest.approx(other, abs=1e-4)
        assert found == figures["result"]

    def test_the_folder_of_another_run(self, command, finished, tmp_path):
        out, _, _ = finished
        result = command.run(out, budget_responses=9)
        assert result.exit_code == 2
        told = "another measurement of expert iteration (budget_responses: 8 there, 9 here)"
        assert told in said(result)
        (tmp_path / "precious.txt").write_text("mine")
        result = command.run(tmp_path)
        assert result.exit_code == 2
        assert "no measurement of expert iteration" in said(result)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompts": 466}, "ExpertIterationError: Expected at least 466 train prompts"),
            ({"test_prompts": 99999}, "at least 99999 test prompts"),
            ({"reward": "sentimant"}, "Did you mean 'sentiment'"),
            ({"top_fraction": 0}, "top_fraction: expected a share above 0"),
            ({"start_from": "nowhere"}, "start_from: expected one of"),
        ],
    )
    def test_bad_input_is_told_without_a_traceback(self, command, tmp_path, changes, message):
        result = command.run(tmp_path / "run", **changes)
        assert result.exit_code == 2, result.output
        assert message in said(result)
        assert "Traceback" not in result.output
        assert not (tmp_path / "run.json").exists()
