"""The pool's costs by hand, and the figures that follow from rows and a pool."""

from dataclasses import replace

import numpy as np
import pytest

from mbrl_text_env.agents.registry import make as make_agent
from mbrl_text_env.benchmarks.audit.run import fill_pool
from mbrl_text_env.benchmarks.compare import CompareError
from mbrl_text_env.benchmarks.matched import (
    Cell,
    Pool,
    analyse,
    best_of_n_rows,
    multiplier,
    pool_of,
    table,
)
from mbrl_text_env.benchmarks.scaling import drawn_best, expected_best
from mbrl_text_env.benchmarks.statistics import exchange_test, paired_permutation_test
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import load_prompts
from tests.toys import CountReward

LM = NGramLM("abcdefgh", order=2, seed=1, concentration=4.0, stop_probability=0.05)
PROMPTS = load_prompts(split="test", limit=6)


class CostlyCount(CountReward):
    def flops(self, prompts, responses):
        return np.full(len(responses), 5.0)

    def flops_bound(self):
        return 5.0


def pooled(folder, reward=None, samples=32, seed=0):
    sizes = {"samples": samples, "max_response_tokens": 10, "seed": seed}
    records = fill_pool(folder / "pool", LM, PROMPTS, **sizes)
    return pool_of(records, folder / "scores", LM, reward or CostlyCount(), PROMPTS)


class TestPool:
    def test_costs_and_scores_are_those_of_the_samples(self, tmp_path):
        pool = pooled(tmp_path)
        assert pool.scores.shape == pool.tokens.shape == pool.flops.shape == (6, 32)
        start = initial(PROMPTS[0], LM)
        alone = LM.usage_bound(len(start.prompt_ids), [])
        assert pool.prompt_flops[0] == alone.flops
        length = int(pool.tokens[0, 0])
        whole = LM.usage_bound(len(start.prompt_ids), [length])
        assert pool.flops[0, 0] == pytest.approx(whole.flops - alone.flops + 5.0)
        agent = make_agent("best-of-n:n=32", LM, CostlyCount(), max_response_tokens=10)
        best = agent.generate(PROMPTS, seed=0)
        assert [g.completion.score for g in best] == pytest.approx(pool.scores.max(axis=1))
        assert (pool.logprobs <= 0).all()

    def test_it_is_made_once(self, tmp_path):
        first, second = pooled(tmp_path), pooled(tmp_path, samples=16)
        assert (second.scores == first.scores[:, :16]).all()

    def test_rows(self, tmp_path):
        pool = pooled(tmp_path)
        part = pool.rows([PROMPTS[3].id, PROMPTS[1].id])
        assert part.prompt_ids == (PROMPTS[3].id, PROMPTS[1].id)
        assert (part.scores == pool.scores[[3, 1]]).all()
        assert (part.prompt_flops == pool.prompt_flops[[3, 1]]).all()


def answered(pool, scores, *, budget=100, agent="agent", tokens=20.0, flops=None, failed=()):
    rows = [
        {
            "prompt_id": name,
            "score": None if name in failed else float(score),
            "seconds": 0.5,
            "logprob": -3.0,
            "response_tokens": 10,
            "usage": {
                "generated_tokens": tokens,
                "flops": 10 * tokens if flops is None else flops,
                "reward_calls": 2,
            },
        }
        for name, score in zip(pool.prompt_ids, scores, strict=True)
    ]
    return Cell("count", agent, budget, "tokens", rows)


def several(*cells, **changes):
    """One cell of several answers to each prompt; of `changes` each has its own, if it is given."""
    rows = []
    for i, cell in enumerate(cells):
        own = {name: values[i] for name, values in changes.items()}
        rows += [{**row, **own} for row in cell.rows]
    return replace(cells[0], rows=rows)


def eighths(rng, *shape):
    """Random numbers whose sums and means are exact."""
    return np.round(8 * rng.normal(size=shape)) / 8


def known_pool(prompts=24, samples=64, seed=0):
    scores = np.random.default_rng(seed).normal(size=(prompts, samples))
    cost = np.full((prompts, samples), 10.0)
    names = tuple(f"p{i}" for i in range(prompts))
    return Pool(names, scores, cost, 10 * cost, np.zeros(prompts), np.full(cost.shape, -2.0))


class TestAnalysis:
    def test_best_of_16_at_the_cost_of_two_has_a_multiplier_of_eight(self):
        pool = known_pool()
        scores = np.random.default_rng(1).normal(size=(24, 16)).max(axis=1)
        [row] = analyse(pool, [answered(pool, scores)])
        assert row["multiplier"] == pytest.approx(row["multiplier_tokens"])
        assert row["multiplier_low"] < 8 < row["multiplier_high"]
        assert row["low"] < row["mean"] < row["high"]
        assert row["p_vs_best_of_n"] < 0.01
        assert row["kl"] == pytest.approx(1.0)
        assert (row["tokens"], row["flops"], row["seconds"]) == (20.0, 200.0, 0.5)

    def test_reward_calls_count_in_flops_and_not_in_tokens(self):
        pool = known_pool()
        scores = np.random.default_rng(1).normal(size=(24, 16)).max(axis=1)
        [row] = analyse(pool, [answered(pool, scores, flops=400.0)])
        assert row["multiplier"] == pytest.approx(row["multiplier_tokens"] / 2)

    def test_what_failed_is_left_out_on_both_sides(self):
        pool = known_pool()
        scores = np.random.default_rng(1).normal(size=24)
        failed = pool.prompt_ids[:3]
        [row] = analyse(pool, [answered(pool, scores, failed=failed)])
        kept = pool.rows(pool.prompt_ids[3:])
        [alone] = analyse(kept, [answered(kept, scores[3:])])
        assert row.pop("failed") == 3
        assert alone.pop("failed") == 0
        assert row == alone

    def test_of_several_answers_the_means_are_taken(self):
        """Two answers around the one: the same row, but for what the test sees of each."""
        pool, rng = known_pool(), np.random.default_rng(1)
        scores, away = eighths(rng, 24) + 1, eighths(rng, 24)
        both = several(
            answered(pool, scores + away, tokens=10.0),
            answered(pool, scores - away, tokens=30.0),
            seconds=(0.25, 0.75), logprob=(-2.0, -4.0), response_tokens=(4, 16),
        )  # fmt: skip
        in_turn = sorted(both.rows, key=lambda row: pool.prompt_ids.index(row["prompt_id"]))
        one, two, other = (
            analyse(pool, [cell])[0]
            for cell in (answered(pool, scores), both, replace(both, rows=in_turn))
        )
        assert other == two
        assert (one.pop("answers"), two.pop("answers")) == (1, 2)
        assert (one["mean"], one["prompts"]) == (scores.mean(), 24)
        for row in (one, two):
            assert row.pop("p_holm") == row.pop("p_vs_best_of_n")
        assert two == one

    def test_the_p_value_sees_each_answer(self):
        """Answers far apart, with means that are always a little above that of two samples."""
        pool = known_pool()
        expected = expected_best(pool.scores, [2])
        each = expected + np.array([3.1, -2.9, 0.1])
        cell = several(*(answered(pool, column) for column in each.T))
        by_signs = paired_permutation_test(each.mean(axis=1) - expected[:, 0])
        by_exchange = exchange_test(each, drawn_best(pool.scores, 2))
        [row] = analyse(pool, [cell])
        assert by_signs < 0.001 < by_exchange == row["p_vs_best_of_n"]
        assert by_exchange != exchange_test(each.mean(axis=1), drawn_best(pool.scores, 2))

    def test_a_prompt_with_an_answer_that_failed_is_left_out_on_both_sides(self):
        pool, rng = known_pool(), np.random.default_rng(1)
        first, second = eighths(rng, 24), eighths(rng, 24)
        names = pool.prompt_ids
        [row] = analyse(
            pool,
            [
                several(
                    answered(pool, first, failed=names[:1]),
                    answered(pool, second, failed=names[:3]),
                )
            ],
        )
        kept = pool.rows(names[3:])
        [alone] = analyse(kept, [several(answered(kept, first[3:]), answered(kept, second[3:]))])
        assert (row.pop("failed"), alone.pop("failed")) == (4, 0)
        assert row["prompts"] == 21
        assert row == alone

    def test_p_values_are_corrected_over_the_cells(self):
        pool = known_pool()
        cells = [
            answered(pool, np.random.default_rng(s).normal(size=24) + 0.5, agent=f"agent {s}")
            for s in range(5)
        ]
        for row in analyse(pool, cells):
            assert row["p_vs_best_of_n"] <= row["p_holm"] <= 5 * row["p_vs_best_of_n"] + 1e-9

    def test_without_a_p_value_where_the_pool_is_too_small(self):
        """Best-of-64 as an agent, against a pool of 32: nothing can be said of equal compute."""
        pool = known_pool(samples=32)
        scores = np.random.default_rng(1).normal(size=(24, 64)).max(axis=1)
        dear, cheap = analyse(
            pool,
            [answered(pool, scores, tokens=640.0), answered(pool, scores, tokens=20.0)],
        )
        assert dear["p_vs_best_of_n"] is dear["p_holm"] is None
        assert cheap["p_holm"] == cheap["p_vs_best_of_n"] < 0.01
        assert list(table([dear]).columns[-1].cells) == ["pool too small"]

    def test_best_of_n_is_not_above_itself(self):
        """Also near the top of a reward's range, where its scores are skewed."""
        rng, above = np.random.default_rng(0), 0
        for seed in range(30):
            pool = known_pool(16, 64, seed)
            skewed = replace(pool, scores=rng.beta(8, 0.6, size=(16, 64)))
            scores = rng.beta(8, 0.6, size=(16, 6)).max(axis=1)
            [row] = analyse(skewed, [answered(skewed, scores, tokens=60.0)])
            above += row["p_vs_best_of_n"] < 0.05 and row["difference"] > 0
        assert above <= 3

    def test_agents_below_a_single_sample(self):
        pool = known_pool()
        [row] = analyse(pool, [answered(pool, np.full(24, -10.0))])
        assert row["multiplier_is_upper_bound"]
        assert multiplier(row, "multiplier").startswith("< ")

    def test_surprisal_is_compared_with_that_of_best_of_n(self):
        """A reward for length: best-of-N's own answers are as surprising as the agent's."""
        rng = np.random.default_rng(0)
        lengths = rng.integers(1, 30, size=(24, 64)).astype(float)
        pool = replace(known_pool(), scores=lengths, tokens=lengths, logprobs=-lengths)
        best = rng.integers(1, 30, size=(24, 8)).astype(float).max(axis=1)
        cell = answered(pool, best, tokens=100.0)
        rows = [
            {**row, "logprob": -n, "response_tokens": n}
            for row, n in zip(cell.rows, best, strict=True)
        ]
        [row] = analyse(pool, [replace(cell, rows=rows)])
        assert row["kl"] == pytest.approx(row["kl_of_equal_best_of_n"], abs=1.0)
        assert row["kl"] > 5 * row["kl_bound_of_equal_best_of_n"]
        assert row["nats_per_token"] == row["nats_per_token_of_samples"] == 1.0

    def test_too_few_scored_answers_are_an_error_that_names_the_agent(self):
        pool = known_pool(3)
        cell = answered(pool, np.zeros(3), failed=pool.prompt_ids[1:])
        with pytest.raises(CompareError, match=r"'agent' at 100.*got 1 of 3"):
            analyse(pool, [cell])
        twice = several(answered(pool, np.zeros(3)), cell)
        with pytest.raises(CompareError, match=r"'agent' at 100.*got 1 of 3"):
            analyse(pool, [twice])

    def test_best_of_n_itself(self):
        pool = known_pool()
        rows = best_of_n_rows("count", pool, [20, 160, 10_000], "tokens")
        assert [row["n"] for row in rows] == [2, 16]
        assert rows[0]["mean"] < rows[1]["mean"]
        assert rows[1]["flops"] == pytest.approx(1600.0)


def test_multipliers_are_shown_with_their_ends():
    row = {"m": 2.04, "m_low": 1.5, "m_high": 3.0}
    row |= {"m_is_lower_bound": False, "m_is_upper_bound": False}
    assert multiplier(row, "m") == "2.0 [1.5, 3.0]"
    row |= {"m_high": None, "m_is_lower_bound": True}
    assert multiplier(row, "m") == "> 2.0 [1.5, more]"
