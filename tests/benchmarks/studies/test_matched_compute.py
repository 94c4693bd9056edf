"""A study of a toy world, its plots, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mbrl_text_env.agents.registry import make as make_agent
from mbrl_text_env.benchmarks.compare import CompareError
from mbrl_text_env.benchmarks.matched import analyse
from mbrl_text_env.benchmarks.studies import matched_compute
from mbrl_text_env.benchmarks.studies.harness import StudyOptions
from mbrl_text_env.benchmarks.studies.matched_compute import AGENTS as DEFAULT_AGENTS
from mbrl_text_env.benchmarks.studies.matched_compute import (
    Study,
    plot,
    run_and_write,
    run_study,
    slug,
)
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.types import Budget
from tests.benchmarks.studies.tiny_command import Command
from tests.benchmarks.test_matched import LM, CostlyCount
from tests.toys import CountReward

AGENTS = ("beam:chunk_tokens=2:value=prefix", "best-of-n")
STUDY = Study(
    {"count": AGENTS},
    budgets=(40, 120),
    num_prompts=6,
    samples=32,
    train_prompts=4,
    train_samples=3,
    max_response_tokens=10,
)
FIELDS = {
    "reward",
    "agent",
    "budget_tokens",
    "mean",
    "low",
    "high",
    "tokens",
    "flops",
    "seconds",
    "multiplier",
    "multiplier_low",
    "multiplier_high",
    "multiplier_tokens",
    "kl",
    "p_vs_best_of_n",
    "reward_price",
}


def ran(folder, study=STUDY):
    [(name, pool, cells)] = list(run_study(study, LM, {"count": CostlyCount()}, folder))
    assert name == "count"
    return pool, cells


class TestStudy:
    def test_a_cell_for_each_agent_and_budget(self, tmp_path):
        pool, cells = ran(tmp_path)
        assert [(c.agent, c.budget) for c in cells] == [
            (agent, budget) for budget in (40, 120) for agent in AGENTS
        ]
        for cell in cells:
            assert [row["prompt_id"] for row in cell.rows] == list(pool.prompt_ids)
            assert all(row["usage"]["generated_tokens"] <= cell.budget for row in cell.rows)

    def test_a_price_is_charged_to_agents_and_to_best_of_n(self, tmp_path):
        """7 tokens of a FLOP each in place of 5 FLOPs; the scores are read from the same folder."""
        pool, _ = ran(tmp_path)
        study = replace(STUDY, unit="flops", reward_price="7tokens", budgets=(120,))
        priced, cells = ran(tmp_path, study)
        assert (priced.scores == pool.scores).all()
        assert priced.flops == pytest.approx(pool.flops + 2.0)
        for cell in cells:
            for row in cell.rows:
                assert row["usage"]["reward_flops"] == 7.0 * row["usage"]["reward_calls"]
        with pytest.raises(CompareError, match="unit: expected 'flops' with a reward price"):
            replace(STUDY, reward_price="7tokens")

    def test_it_is_resumed(self, tmp_path):
        _, first = ran(tmp_path)
        removed = next((tmp_path / "runs").rglob("parts/*.jsonl"))
        removed.unlink()
        again = ran(tmp_path)[1]
        for one, other in zip(first, again, strict=True):
            assert [row["score"] for row in one.rows] == [row["score"] for row in other.rows]

    def test_budgets_in_flops_are_what_best_of_n_spends(self, tmp_path):
        study = Study(**{**vars(STUDY), "unit": "flops"})
        pool, cells = ran(tmp_path, study)
        per_token = pool.flops.sum() / pool.tokens.sum()
        for cell in cells:
            cap = pool.prompt_flops.mean() + cell.budget * per_token
            spent = [row["usage"]["flops"] for row in cell.rows]
            assert max(spent) <= cap
            assert np.mean(spent) > 0.5 * cap

    def test_budgets_in_seconds_are_what_best_of_n_takes(self, tmp_path):
        study = Study(**{**vars(STUDY), "unit": "seconds", "budgets": (40,)})
        _, cells = ran(tmp_path, study)
        caps = {row["budget_seconds"] for cell in cells for row in cell.rows}
        assert len(caps) == 1
        assert 0 < caps.pop() < 60

    def test_another_seed_needs_another_folder(self, tmp_path):
        ran(tmp_path)
        with pytest.raises(ValueError, match="seed"):
            ran(tmp_path, Study(**{**vars(STUDY), "seed": 1}))

    @pytest.mark.parametrize("name", ["train_prompts", "train_samples", "max_response_tokens"])
    def test_another_training_set_or_limit_needs_another_folder(self, tmp_path, name):
        ran(tmp_path, replace(STUDY, budgets=(40,)))
        other = replace(STUDY, budgets=(40,), **{name: getattr(STUDY, name) - 1})
        with pytest.raises(CompareError, match=f"another study .*{name}"):
            ran(tmp_path, other)

    def test_rewards_with_other_prompts_share_a_folder(self, tmp_path):
        """A reward may apply to none of the prompts that were sampled for the one before."""
        early = {prompt.id for prompt in load_prompts(split="test", limit=90)}

        class Early(CostlyCount):
            def applies_to(self, prompt):
                return prompt.id in early

        class Late(CostlyCount):
            def applies_to(self, prompt):
                return prompt.id not in early

        study = replace(STUDY, agents={"early": AGENTS, "late": AGENTS}, budgets=(40,))
        found = list(run_study(study, LM, {"early": Early(), "late": Late()}, tmp_path))
        assert not {*found[0][1].prompt_ids} & {*found[1][1].prompt_ids}

    def test_flops_that_pay_for_no_response_are_refused_at_once(self, tmp_path):
        with pytest.raises(CompareError, match=r"budget 10.*budgets of \d+ or more"):
            ran(tmp_path, replace(STUDY, unit="flops", budgets=(10,)))
        assert not (tmp_path / "runs").exists()

    def test_each_answer_has_a_seed_and_a_folder_of_its_own(self, tmp_path):
        study = replace(STUDY, budgets=(40,), answers=3)
        pool, cells = ran(tmp_path, study)
        for cell in cells:
            assert [(row["seed"], row["prompt_id"]) for row in cell.rows] == [
                (seed, name) for seed in (1, 2, 3) for name in pool.prompt_ids
            ]
        runs = tmp_path / "runs" / "count" / "tokens-40"
        slugs = [slug(agent) for agent in AGENTS]
        assert {folder.name for folder in runs.iterdir()} == {
            f"{name}{again}" for name in slugs for again in ("", "-again-1", "-again-2")
        }
        prompts = {prompt.id: prompt for prompt in load_prompts(split="test")}
        agent = make_agent("best-of-n", LM, CostlyCount(), max_response_tokens=10)
        asked = [prompts[name] for name in pool.prompt_ids]
        expected = [agent.generate(asked, Budget(tokens=40), seed=seed) for seed in (1, 2, 3)]
        texts = [[g.text for g in row] for row in expected]
        assert [row["response"] for row in cells[1].rows] == [t for row in texts for t in row]
        assert texts[0] != texts[1] != texts[2] != texts[0]

    def test_more_answers_go_on_from_the_first_ones(self, tmp_path):
        study = replace(STUDY, agents={"count": ("best-of-n",)}, budgets=(40,))
        ran(tmp_path, study)
        # What is read again has this mark, and what is made anew has not.
        [part] = (tmp_path / "runs").rglob("parts/*.jsonl")
        rows = [json.loads(line) for line in part.read_text().splitlines()]
        part.write_text("".join(json.dumps({**row, "marked": True}) + "\n" for row in rows))
        for answers in (3, 2, 1):
            _, [cell] = ran(tmp_path, replace(study, answers=answers))
            marks = [row.get("marked", False) for row in cell.rows]
            assert marks == [True] * 6 + [False] * 6 * (answers - 1)

    def test_no_answers_are_refused(self):
        with pytest.raises(CompareError, match="answers: expected at least 1, got 0"):
            replace(STUDY, answers=0)

    def test_slugs_differ(self):
        specs = ("beam:chunk_tokens=2", "beam:chunk_tokens=2.5", "beam:beam_width=2")
        assert len({slug(spec) for spec in specs}) == 3


def test_values_are_fitted_on_records_with_this_rewards_scores(tmp_path):
    runs = matched_compute._Runs(STUDY, LM, "count", CostlyCount(), tmp_path)
    assert runs.value("prefix") is runs.value("prefix")
    assert not list(tmp_path.iterdir())
    records = runs.records()
    assert len(records) == 12
    assert {record.split for record in records} == {"train"}
    for record in records:
        assert record.score == CountReward().score([None], [record.response])[0]
        assert record.reward_name == "count"


def test_plots(tmp_path):
    pool, cells = ran(tmp_path / "study")
    rows = analyse(pool, cells)
    for against in ("compute", "divergence"):
        plot({"count": rows}, {"count": pool}, tmp_path / "plot.png", against)
        assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_a_small_study_with_a_reward_in_a_file(tmp_path):
    """On a tiny model; what is kept is in the study's folder, whatever the reward is called."""
    files = tmp_path / "files"
    files.mkdir()
    command = Command(matched_compute.main, files, {})
    before = sorted(files.rglob("*"))
    study = Study(
        {f"{command.reward}:letters": DEFAULT_AGENTS},
        budgets=(48,),
        num_prompts=3,
        samples=4,
        train_prompts=3,
        train_samples=2,
        max_response_tokens=12,
    )
    path = tmp_path / "results.json"
    how = StudyOptions(
        language_model=str(command.model),
        dtype="float32",
        json_file=path,
    )
    result = run_and_write(study, how, tmp_path / "study")
    made = [path for path in files.rglob("*") if "__pycache__" not in path.parts]
    assert sorted(made) == before
    found = json.loads(path.read_text())
    assert found == json.loads(json.dumps(result))
    assert [row["agent"] for row in found["results"]] == list(DEFAULT_AGENTS)
    for row in found["results"]:
        assert row.keys() >= FIELDS
        assert row["tokens"] <= row["budget_tokens"]
        assert row["low"] <= row["mean"] <= row["high"]
    assert (tmp_path / "results.png").exists()
    assert (tmp_path / "results-divergence.png").exists()


def test_options_are_told():
    app = typer.Typer()
    app.command()(matched_compute.main)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for option in ("--json", "--quick", "--budgets", "--unit", "--answers", "--reward-price"):
        assert option in shown
    wrong = (["--unit", "years"], ["--budgets", "many"], ["--budgets", "10"], ["--answers", "0"])
    wrong += (["--unit", "tokens", "--reward-price", "300tokens"],)
    for words in wrong:
        assert CliRunner().invoke(app, words).exit_code == 2


def test_quick_changes_only_what_is_not_given(monkeypatch):
    asked = []
    monkeypatch.setattr(matched_compute, "run_and_write", lambda *args: asked.append(args))
    app = typer.Typer()
    app.command()(matched_compute.main)
    words = [
        "--quick",
        "--agents",
        "mcts:value=prefix",
        "--budgets",
        "1024",
        "--rewards",
        "numbers",
    ]
    for given in (words, ["--quick"], [], ["--answers", "3"]):
        assert CliRunner().invoke(app, given).exit_code == 0
    studies, folders = [args[0] for args in asked], [str(args[2]) for args in asked]
    assert studies[0].agents == {"numbers": ("mcts:value=prefix",)}
    assert (studies[0].budgets, studies[0].num_prompts, studies[0].samples) == ((1024,), 16, 32)
    assert (studies[1].budgets, studies[1].train_prompts) == ((512,), 16)
    assert (studies[2].num_prompts, studies[2].samples, len(studies[2].budgets)) == (64, 256, 6)
    assert [study.answers for study in studies] == [1, 1, 1, 3]
    assert studies[3] == replace(studies[2], answers=3)
    assert folders == ["matched-compute-quick"] * 2 + ["matched-compute"] * 2
