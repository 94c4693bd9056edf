"""The command on a tiny model: its figures are those of its policies, and it goes on."""

import json

import numpy as np
import pytest

from mbrl_text_env.agents.learning import LoraImprover
from mbrl_text_env.benchmarks.studies.expert_iteration import main
from mbrl_text_env.benchmarks.studies.harness import Exam, paired, prompts_for
from mbrl_text_env.language_models import TransformersLM
from mbrl_text_env.records import read_records
from mbrl_text_env.rewards import make
from tests.benchmarks.studies.tiny_command import TOKENS, Command, said

pytestmark = pytest.mark.filterwarnings("ignore:.*train prompts. with fewer than 500")

SMALL = {
    "--iterations": "2", "--prompts": "4", "--answers": "2", "--validation-prompts": "2",
    "--test-prompts": "3", "--samples": "3", "--learning-rate": "0.05", "--value": "calibrated",
    "--planner": "receding-horizon:horizon=1:plans=2:chunk_tokens=4",
}  # fmt: skip


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
        """Each policy's mean scores, by the prompt, against those before it."""
        out, figures, _ = finished
        lm, reward = TransformersLM(command.model), make(f"{command.reward}:letters")
        test = prompts_for(reward, "test", 3)
        exam, improver = Exam(reward, test, 3, TOKENS), LoraImprover()
        policies = [lm] + [improver.serve(lm, out / "loop" / f"0{i}" / "policy") for i in (1, 2)]
        scores = [exam.sampled(policy, 0)[0] for policy in policies]
        assert len(set(scores)) == 3
        result, names = figures["result"], [prompt.id for prompt in test]
        assert result["sampling"] == [np.mean(own) for own in scores]
        assert result["against_the_one_before"] == [
            paired(scores[0], scores[1], names, 0), paired(scores[1], scores[2], names, 0),
        ]  # fmt: skip
        assert result["against_the_base"] == [
            paired(scores[0], scores[1], names, 0), paired(scores[0], scores[2], names, 0),
        ]  # fmt: skip
        seen = {
            r.prompt_id
            for path in (out / "loop").glob("*/*")
            if path.name in ("collected", "validation")
            for r in read_records(path)
        }
        assert len(seen) == 4 + 2
        assert not seen & set(names)

    def test_planners(self, command, finished):
        out, figures, _ = finished
        found = figures["result"]["planner_tuned_against_base"]
        assert found["iteration"] == max(figures["best"], 1)
        lm = TransformersLM(command.model)
        assert found["cap_flops"] == lm.usage_bound(64, [TOKENS] * 8).flops
        files = ["planner-00.json", f"planner-{found['iteration']:02d}.json"]
        assert sorted(path.name for path in out.glob("planner-*")) == files
        sides = [json.loads((out / name).read_text()) for name in files]
        assert found["mean_flops"] == [use["flops"] for _, use in sides]
        assert 0 < max(found["mean_flops"]) <= found["cap_flops"]
        names = [p.id for p in prompts_for(make(f"{command.reward}:letters"), "test", 3)]
        expected = paired(sides[0][0], sides[1][0], names, seed=0)
        assert {name: found[name] for name in expected} == expected

    def test_what_is_printed(self, finished):
        _, figures, result = finished
        for mean in figures["result"]["sampling"]:
            assert f"{mean:.3f}" in result.stdout
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
        figures = finished[1]
        out = tmp_path / "run"
        result = command.run(out, stop_after="loop/01/policy.json")
        assert result.exit_code == 130, result.output
        assert "Stopped in iteration 1, stage 'validation'" in said(result)
        result = command.run(out, stop_after="test-00.json")
        assert result.exit_code == 130, result.output
        assert "Stopped; the same command goes on." in said(result)
        assert "iteration 1: policy" not in result.stderr
        assert "iteration 2: policy" in result.stderr
        assert not (out / "test-01.json").exists()
        result = command.run(out)
        assert result.exit_code == 0, result.output
        found = json.loads(out.with_suffix(".json").read_text())["result"]
        assert found == figures["result"]

    def test_the_folder_of_another_run(self, command, finished, tmp_path):
        out, _, _ = finished
        result = command.run(out, budget_responses=9)
        assert result.exit_code == 2
        told = "another study (budget_responses: 8 there, 9 here)"
        assert told in said(result)
        (tmp_path / "precious.txt").write_text("mine")
        result = command.run(tmp_path)
        assert result.exit_code == 2
        assert "holds other files and no study" in said(result)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prompts": 466}, "CompareError: Expected 1 to 465 prompts"),
            ({"test_prompts": 99999}, "applies to), got 99999"),
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
