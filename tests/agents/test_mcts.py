"""Monte Carlo tree search: visit counts by hand, schedules, solvable worlds, budgets, traces."""

import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env import checks
from mbrl_text_env.agents import BestOfN
from mbrl_text_env.agents.mcts import MCTS, GumbelDecision, Simulator
from mbrl_text_env.agents.search import Search
from mbrl_text_env.language_models import NGramLM, SamplingParams, TableLM
from mbrl_text_env.mdp import initial, is_terminal, transition
from mbrl_text_env.types import Budget, BudgetError, Ledger, Prompt
from tests.toys import PROMPTS, CountReward, FixedValue, OptimalValue, now

PLAIN = SamplingParams()
PROMPT = Prompt.from_text("ab")
SIZES = {"max_response_tokens": 6, "chunk_tokens": 1, "params": PLAIN}
# Options by name, one row a variant that every property below has to hold for.
VARIANTS = {
    "puct": {},
    "puct, rollouts": {"leaf_value": "rollout"},
    "puct, max": {"leaf_value": "rollout", "backup": "max"},
    "puct, batches": {"batch_size": 8, "widening": 1.0},
    "gumbel": {"root_policy": "gumbel"},
    "gumbel, rollouts": {"root_policy": "gumbel", "leaf_value": "rollout", "batch_size": 5},
    "kept trees": {"reuse_tree": True},
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


class TableReward(CountReward):
    """Every response of six letters has a reward of its own, and one of them is the best."""

    name = "table"

    def __init__(self, seed=0):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.weights, self.pairs = rng.random((6, 4)), rng.random((4, 4))

    def score(self, prompts, responses):
        return [self._score(["abcd".index(c) for c in text]) for text in responses]

    def _score(self, ids):
        own = sum(self.weights[i, c] for i, c in enumerate(ids[:6]))
        return float(own + sum(self.pairs[a, b] for a, b in itertools.pairwise(ids)))


def searched(planner, lm, value=None, budget=None, seed=0, reward=None):
    """A search that has not begun."""
    return Search(
        initial(PROMPT, lm),
        lm,
        reward or CountReward(),
        value,
        ledger=Ledger(budget),
        seed=seed,
        params=planner.params,
        max_response_tokens=planner.max_response_tokens,
    )


def decided(planner, simulator, node, count):
    decision = GumbelDecision(planner, simulator, node)
    now(decision.simulate(count))
    return decision


class TestVisits:
    def bandit(self, simulations, **options):
        """Two arms, drawn once each, that return 1 and 0 whatever follows."""
        lm = TableLM("ab", {"": [0.0, 0.5, 0.5]})
        lm._uniform = np.array([0.0, 0.5, 0.5])
        planner = MCTS(
            lm,
            CountReward(),
            widening_power=0.0,
            max_response_tokens=100,
            chunk_tokens=1,
            params=PLAIN,
            **{"batch_size": 1, **options},
        )
        value = FixedValue(lambda text: float(text.startswith("a")), lm)
        search = searched(planner, lm, value, seed=self.seed_of_both(lm))
        now(Simulator(planner, search).run(search.tree.root, simulations))
        root = search.tree.root
        return root, {lm.decode(child.state.response_ids): child for child in root.children}

    def seed_of_both(self, lm):
        state = initial(PROMPT, lm)
        for seed in range(50):
            [[one, other]] = lm.sample([state], 2, 1, seeds=[seed])
            if one.token_ids != other.token_ids:
                return seed
        raise AssertionError

    def test_puct_on_a_bandit(self):
        """After each arm's first visit, values are 1 and 0 and priors 1/2.

        The worse arm, with one visit of N, has the higher score as soon as
        c sqrt(N) / 4 > 1 + c sqrt(N) / (2 N), which c = 1.2507 fulfils from N = 14 on. With two,
        c sqrt(N) / 6 > 1 + c sqrt(N) / (2 (N - 1)): from N = 29 on.
        """
        for simulations, visits in [
            (2, (1, 1)),
            (3, (2, 1)),
            (8, (7, 1)),
            (14, (13, 1)),
            (15, (13, 2)),
            (16, (14, 2)),
            (29, (27, 2)),
            (30, (27, 3)),
        ]:
            root, arms = self.bandit(simulations)
            assert (arms["a"].visits, arms["b"].visits) == visits
            assert (arms["a"].mean, arms["b"].mean) == (1.0, 0.0)
            assert root.total == visits[0]

    def test_virtual_loss_sends_simulations_apart(self):
        """Two at a time: after (2, 1), the better arm's virtual loss makes its value 2/3; the worse
        one has a bonus of 1.2507 x 2 / 4 = 0.625 against 2/3 + 1.2507 x 2 / 8 = 0.979."""
        _, one_by_one = self.bandit(12)
        assert (one_by_one["a"].visits, one_by_one["b"].visits) == (11, 1)
        root, many = self.bandit(12, batch_size=6)
        assert many["b"].visits > 1
        assert root.visits == 12 == many["a"].visits + many["b"].visits

    @pytest.mark.parametrize("batch_size", [1, 3, 8])
    @pytest.mark.parametrize(
        ("considered", "simulations", "visits"),
        [
            (4, 12, [5, 5, 1, 1]),
            (8, 16, [4, 4, 2, 2, 1, 1, 1, 1]),
            (16, 32, [4] * 4 + [2] * 4 + [1] * 8),
        ],
    )
    @pytest.mark.parametrize("leaf_value", ["value", "rollout"])
    def test_gumbel_visits_by_the_schedule(
        self, considered, simulations, visits, batch_size, leaf_value
    ):
        lm = NGramLM("abcdefgh", seed=3, concentration=50.0, stop_probability=0.0)
        planner = MCTS(
            lm,
            CountReward(),
            root_policy="gumbel",
            max_considered=considered,
            batch_size=batch_size,
            leaf_value=leaf_value,
            max_response_tokens=60,
            chunk_tokens=10,
        )
        search = searched(planner, lm, FixedValue(lambda text: text.count("a"), lm))
        root = search.tree.root
        decision = decided(planner, Simulator(planner, search), root, simulations)
        assert sorted((child.visits for child in root.children), reverse=True) == visits
        finalists = [child for child in root.children if child.visits == visits[0]]
        assert decision.chosen() in finalists
        # The scale of the values, 5 to 6, against noise that spans some log(16) = 3.
        best = max(child.mean for child in finalists)
        worst = min(child.mean for child in decision.considered)
        assert decision.chosen().mean > (best + worst) / 2

    def test_a_later_decision_counts_its_own_visits(self):
        lm = NGramLM("abcdefgh", seed=3, concentration=50.0, stop_probability=0.0)
        planner = MCTS(
            lm, CountReward(), root_policy="gumbel", max_response_tokens=60, chunk_tokens=10
        )
        search = searched(planner, lm, FixedValue(lambda text: text.count("a"), lm))
        simulator = Simulator(planner, search)
        child = decided(planner, simulator, search.tree.root, 16).chosen()
        before = {node: node.visits for node in child.children}
        decision = decided(planner, simulator, child, 16)
        assert set(before) <= set(child.children)
        assert child.samples >= 16
        gained = sorted((n.visits - before.get(n, 0) for n in decision.considered), reverse=True)
        assert gained[:2] == [gained[0]] * 2
        assert sorted(decision.counts.values(), reverse=True) == gained

    def test_no_more_chunks_than_widening_allows(self):
        lm = NGramLM("abcdefgh", seed=3, concentration=50.0, stop_probability=0.0)
        planner = MCTS(lm, CountReward(), widening=1.5, max_response_tokens=80, chunk_tokens=8)
        search = searched(planner, lm, FixedValue(lambda text: text.count("a"), lm))
        now(Simulator(planner, search).run(search.tree.root, 60))
        for node in search.tree.nodes:
            assert node.samples <= max(1, np.ceil(1.5 * node.visits**0.5))
        assert search.tree.root.samples == 12


def check_consistent(tree, is_valued, is_rolled_out, weight=0.5):
    """Visits and totals are those of simulations that came back, and of no others."""
    for node in tree.nodes:
        below = sum(child.visits for child in node.children)
        total = sum(child.total for child in node.children)
        assert node.samples == sum(child.copies for child in node.children)
        if node.is_terminal:
            assert not node.children
            assert node.total == pytest.approx(node.visits * node.score)
        elif node is tree.root or (is_rolled_out and not is_valued):
            assert node.visits == below
        else:
            assert node.visits - below in (0, 1)
        if is_valued and not is_rolled_out and not node.is_terminal and node is not tree.root:
            assert node.visits == below + 1
            assert node.total == pytest.approx(node.value + total)
        if is_rolled_out and not is_valued and not node.is_terminal:
            assert node.total == pytest.approx(total)


class TestTrees:
    @pytest.mark.parametrize("batch_size", [1, 3, 8])
    @pytest.mark.parametrize("root_policy", ["puct", "gumbel"])
    @pytest.mark.parametrize("leaf_value", ["value", "rollout"])
    @pytest.mark.parametrize("stop", [0.0, 0.2])
    def test_simulations_under_way_leave_no_trace(self, batch_size, root_policy, leaf_value, stop):
        lm = NGramLM("abcd", seed=2, stop_probability=stop)
        planner = MCTS(
            lm,
            CountReward(),
            FixedValue(lambda text: text.count("a"), lm),
            root_policy=root_policy,
            leaf_value=leaf_value,
            batch_size=batch_size,
            num_simulations=12,
            max_response_tokens=10,
            chunk_tokens=2,
            params=PLAIN,
        )
        # One round, so that no response is finished outside a simulation.
        [(_, tree)] = planner.explore([PROMPT])
        check_consistent(tree, leaf_value != "rollout", leaf_value != "value")
        assert [node.index for node in tree.nodes] == list(range(len(tree.nodes)))
        for node in tree.nodes[1:]:
            assert node in node.parent.children
            assert transition(node.parent.state, node.chunk, 10) == node.state
            assert node.parent.index < node.index or stop or leaf_value != "value"

    def test_rollouts_are_chunks_of_the_tree(self):
        lm = NGramLM("abcd", seed=2, stop_probability=0.0)
        planner = MCTS(lm, CountReward(), max_response_tokens=10, chunk_tokens=3, params=PLAIN)
        [(_, tree)] = planner.explore([PROMPT], Budget(tokens=200))
        assert max(len(node.chunk) for node in tree.nodes[1:]) == 3
        assert len(tree.complete()) > 20
        for node in tree.complete():
            lengths = [len(each.chunk) for each in node.path() if each.chunk]
            assert lengths == [1, 3, 3, 3]
            assert node.state.finish_reason == "length"
            assert len(node.logprobs()) == 10
        states = [node.state for node in tree.nodes]
        assert len(set(states)) == len(states)
        assert sum(node.visits for node in tree.complete()) == tree.root.visits

    def test_stop_texts_end_chunks_and_not_rollouts(self):
        lm = NGramLM("abcd", seed=2, stop_probability=0.0)
        params = SamplingParams(stop=("a",))
        planner = MCTS(lm, CountReward(), max_response_tokens=10, chunk_tokens=3, params=params)
        [(_, tree)] = planner.explore([PROMPT], Budget(tokens=100))
        assert all(len(node.state.response_ids) == 10 for node in tree.complete())

    def test_the_same_seed_gives_the_same_tree(self):
        lm = NGramLM("abcd", seed=2)
        value = FixedValue(lambda text: text.count("a"), lm)
        for options in VARIANTS.values():
            planner = MCTS(lm, CountReward(), value, **SIZES, **options)
            trees = [
                planner.explore(PROMPTS[:2], Budget(tokens=80), seed=seed) for seed in (3, 3, 4)
            ]
            one, same, other = (
                json.dumps([tree.to_dict(lm) for _, tree in found]) for found in trees
            )
            assert one == same
            assert one != other

    def test_the_tree_says_why(self):
        lm = NGramLM("abcd", seed=2, stop_probability=0.0)
        for options, word in (({}, "visits"), ({"root_policy": "gumbel"}, "considered")):
            planner = MCTS(lm, CountReward(), **{**SIZES, **options})
            [(_, tree)] = planner.explore([PROMPT], Budget(tokens=100))
            decided = [node for node in tree.nodes if node.note.startswith("decided")]
            assert decided
            assert all(word in node.note for node in decided)
            assert any(node.parent is tree.root for node in decided)

    def test_a_value_is_the_mean_or_the_maximum_of_the_returns(self):
        lm = NGramLM("abcd", seed=2, stop_probability=0.0)
        for backup, reduce in (("mean", np.mean), ("max", np.max)):
            planner = MCTS(lm, CountReward(), backup=backup, **SIZES)
            [(_, tree)] = planner.explore([PROMPT], Budget(tokens=60))
            for node in tree.nodes:
                scores = [
                    end.score
                    for end in tree.complete()
                    if node in end.path()
                    for _ in range(end.visits)
                ]
                assert node.mean == pytest.approx(reduce(scores))


class TestSolvableWorlds:
    @pytest.mark.parametrize("name", ["puct", "puct, batches", "gumbel", "kept trees"])
    def test_with_a_perfect_value_the_optimum_is_found(self, name):
        """4^6 responses; a value that says the best that can still be had; 100 responses' worth."""
        lm, reward = NGramLM("abcd", seed=5, concentration=3.0, stop_probability=0.0), TableReward()
        texts = [lm.decode(ids) for ids, _ in lm.responses(initial(PROMPT, lm), 6)]
        assert len(texts) == 4**6
        planner = MCTS(lm, reward, OptimalValue(lm, reward, 6), **SIZES, **VARIANTS[name])
        [answer] = planner.generate([PROMPT], Budget(tokens=600), seed=0)
        assert answer.completion.score == pytest.approx(max(reward.score(None, texts)))

    def test_with_a_perfect_value_regret_is_a_fraction_of_that_without(self):
        """Over worlds; what is missed are letters that 200 responses' worth did not draw."""

        def valued(lm, reward):
            value = OptimalValue(lm, reward, 6)
            return MCTS(lm, reward, value, backup="max", **SIZES)

        def sampling(lm, reward):
            return BestOfN(lm, reward, max_response_tokens=6, params=PLAIN)

        assert self.regret(valued, 1200) < self.regret(sampling, 1200) / 4

    def regret(self, planner_of, tokens, seeds=6):
        found = []
        for seed in range(seeds):
            lm = NGramLM("abcd", seed=seed, concentration=3.0, stop_probability=0.0)
            reward = TableReward(seed)
            texts = [lm.decode(ids) for ids, _ in lm.responses(initial(PROMPT, lm), 6)]
            [answer] = planner_of(lm, reward).generate([PROMPT], Budget(tokens=tokens), seed=seed)
            found.append(max(reward.score(None, texts)) - answer.completion.score)
        return float(np.mean(found))

    @pytest.mark.parametrize("root_policy", ["puct", "gumbel"])
    def test_without_a_value_regret_falls_as_simulations_grow(self, root_policy):
        def planner_of(lm, reward):
            return MCTS(lm, reward, root_policy=root_policy, **SIZES)

        few, more, many = (self.regret(planner_of, tokens) for tokens in (60, 400, 1600))
        assert few > more > many
        assert many < few / 3

    @pytest.mark.parametrize("root_policy", ["puct", "gumbel"])
    def test_without_a_value_structure_beats_best_of_n(self, root_policy):
        """The share of a letter in 24 tokens, at equal tokens, over 20 worlds."""
        options = {"max_response_tokens": 24, "params": PLAIN}
        gains = []
        for seed in range(20):
            lm = NGramLM("abcdefgh", seed=seed, concentration=5.0, stop_probability=0.0)
            agents = (
                MCTS(lm, CountReward(), root_policy=root_policy, chunk_tokens=3, **options),
                BestOfN(lm, CountReward(), **options),
            )
            scores = [
                agent.generate([PROMPT], Budget(tokens=1500), seed=seed)[0].completion.score
                for agent in agents
            ]
            gains.append(scores[0] - scores[1])
        assert np.mean(gains) > 3 * np.std(gains, ddof=1) / len(gains) ** 0.5
        assert np.mean(gains) > 0.03

    @every_variant
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_a_misleading_value_never_costs_a_response_that_was_paid_for(self, name, seed):
        lm, reward = NGramLM("abcd", seed=seed), TableReward(seed)
        value = FixedValue(lambda text: -reward.score(None, [text])[0], lm)
        planner = MCTS(lm, reward, value, **SIZES, **VARIANTS[name])
        for answer, tree in planner.explore(PROMPTS[:2], Budget(tokens=90), seed=seed):
            assert answer.completion.score == max(node.score for node in tree.complete())
            assert tree.chosen.state == answer.completion.state

    def test_short_responses_that_win_are_not_given_up(self):
        """The best response ends at once; what goes on is a chain that is never as good."""
        lm = TableLM("ab", {"a": [0.3, 0.35, 0.35]})
        lm._uniform = np.array([0.0, 0.1, 0.9])
        planner = MCTS(lm, CountReward(), **{**SIZES, "chunk_tokens": 2})
        [(answer, tree)] = planner.explore([PROMPT], Budget(tokens=240))
        assert answer.text == "a"
        # Every round after the response was found decides at the root that nothing is better.
        assert tree.root.visits == sum(child.visits for child in tree.root.children)


class CostlyValue(FixedValue):
    """Charges what it computes."""

    def flops(self, states):
        return [7.0 + len(state.response_ids) for state in states]

    def flops_bound(self):
        return 40.0


class CostlyReward(CountReward):
    def flops(self, prompts, responses):
        return [30.0 + len(response) for response in responses]

    def flops_bound(self):
        return 60.0


class TestBudgets:
    @settings(max_examples=60, deadline=None)
    @given(
        name=st.sampled_from(sorted(VARIANTS)),
        seed=st.integers(0, 1000),
        stop=st.sampled_from([0.0, 0.1, 0.6]),
        limit=st.integers(1, 12),
        chunk=st.integers(1, 5),
        share=st.floats(0.3, 12.0),
        cap=st.sampled_from(["tokens", "flops", "reward_calls", "all"]),
        valued=st.booleans(),
    )
    def test_nothing_is_overspent(self, name, seed, stop, limit, chunk, share, cap, valued):
        lm = NGramLM("abc", seed=seed, stop_probability=stop)
        value = CostlyValue(lambda t: t.count("a") - t.count("b"), lm) if valued else None
        options = {"max_response_tokens": limit, "chunk_tokens": chunk, **VARIANTS[name]}
        planner = MCTS(lm, CostlyReward(), value, **options)
        least = planner.response_usage(initial(PROMPT, lm))
        caps = {
            "tokens": max(1, int(share * least.generated_tokens)),
            "flops": share * least.flops,
            "reward_calls": max(1, int(share * least.reward_calls)),
        }
        budget = Budget(**(caps if cap == "all" else {cap: caps[cap]}))
        if not Ledger(budget).affords(least):
            with pytest.raises(BudgetError):
                planner.generate([PROMPT], budget, seed=seed)
            return
        [answer] = planner.generate([PROMPT], budget, seed=seed)
        assert is_terminal(answer.completion.state)
        assert answer.completion.score is not None
        assert Ledger(budget).affords(answer.usage)

    @every_variant
    def test_larger_budgets_are_used(self, name):
        lm = NGramLM("abcdefgh", seed=2, concentration=5.0, stop_probability=0.0)
        value = FixedValue(lambda text: text.count("a"), lm)
        planner = MCTS(lm, CountReward(), value, **SIZES, **VARIANTS[name])
        for tokens in (6, 50, 300):
            [answer] = planner.generate([PROMPT], Budget(tokens=tokens))
            assert tokens - 6 < answer.usage.generated_tokens <= tokens

    def test_without_a_budget_each_decision_has_its_simulations(self):
        """Value: the root's 12 simulations; 6 decisions, each simulation one token."""
        lm = NGramLM("abcdefgh", seed=2, concentration=50.0, stop_probability=0.0)
        value = FixedValue(lambda text: text.count("a"), lm)
        planner = MCTS(lm, CountReward(), value, num_simulations=12, **SIZES)
        [(answer, tree)] = planner.explore([PROMPT])
        assert tree.root.visits == sum(child.visits for child in tree.root.children)
        assert tree.root.visits == 6 * 12
        # A draw that repeats a chunk goes on with another one.
        assert 6 * 12 <= answer.usage.generated_tokens < 2 * 6 * 12

    def test_a_budget_is_shared_by_the_decisions(self):
        """240 tokens are 40 responses; the first of 6 decisions has 6 of them, then 8 at least."""
        lm = NGramLM("abcdefgh", seed=2, concentration=50.0, stop_probability=0.0)
        planner = MCTS(lm, CountReward(), num_simulations=2, **SIZES)
        counts = []
        plain = planner._simulations
        planner._simulations = lambda *args: counts.append(plain(*args)) or counts[-1]
        planner.generate([PROMPT], Budget(tokens=240))
        assert counts[0] == 40 // 6
        assert counts[1] == (240 - 6 * 6) // 5 // 5


class TestAgents:
    @every_variant
    def test_the_contract_of_agents(self, name):
        lm = NGramLM("abcde", 2, seed=1)
        value = FixedValue(lambda text: text.count("a"), lm)
        options = {**SIZES, "num_simulations": 3, **VARIANTS[name]}
        checks.check_agent(MCTS(lm, CountReward(), value, **options), PROMPTS[:3])

    def test_the_contract_of_agents_without_a_value(self):
        lm = NGramLM("abcde", 2, seed=1)
        checks.check_agent(MCTS(lm, CountReward(), num_simulations=3, **SIZES), PROMPTS[:3])

    @pytest.mark.parametrize("chunk_tokens", [1, 2])
    def test_kept_trees_are_gone_on_with(self, chunk_tokens):
        lm = NGramLM("abcdefgh", seed=2, concentration=5.0, stop_probability=0.0)
        options = {**SIZES, "chunk_tokens": chunk_tokens}
        fresh, keeping = (
            MCTS(lm, CountReward(), reuse_tree=reuse, **options) for reuse in (False, True)
        )
        budget, state = Budget(tokens=60), initial(PROMPT, lm)
        scores = []
        while not is_terminal(state):
            [decision] = keeping.act([state], budget, seed=1)
            [again] = keeping.act([state], budget, seed=1)
            assert again.completion == decision.completion
            [first] = fresh.act([state], budget, seed=1)
            if not state.response_ids:
                assert first.completion == decision.completion
            scores.append(decision.completion.score)
            state = transition(state, decision.chunk, 6)
        # What was found before is not lost, so the plan only gets better.
        assert scores == sorted(scores)
        assert len(scores) == 6 // chunk_tokens

    def test_a_kept_tree_is_not_changed_by_the_next_search(self):
        lm = NGramLM("abcdefgh", seed=2, concentration=5.0, stop_probability=0.0)
        planner = MCTS(lm, CountReward(), reuse_tree=True, **SIZES)
        state = initial(PROMPT, lm)
        [decision] = planner.act([state], Budget(tokens=60))
        tree = planner._memory._trees[0, state]
        before = json.dumps(tree.to_dict(lm))
        after = transition(state, decision.chunk, 6)
        planner.act([after], Budget(tokens=60))
        assert json.dumps(tree.to_dict(lm)) == before
        [kept] = [node for node in tree.nodes if node.state == after]
        assert planner._memory._trees[0, after].root.visits > kept.visits > 0

    def test_kept_trees_are_bounded_and_do_not_pickle(self, monkeypatch):
        monkeypatch.setattr("mbrl_text_env.agents.mcts._TREES_KEPT", 3)
        lm = NGramLM("abcd", seed=2)
        planner = MCTS(lm, CountReward(), reuse_tree=True, **SIZES)
        planner.generate(PROMPTS, Budget(tokens=20))
        assert len(planner._memory._trees) == 3
        copied = pickle.loads(pickle.dumps(planner))  # noqa: S301 (its own)
        assert not copied._memory._trees
        one, other = (agent.generate([PROMPT], Budget(tokens=40)) for agent in (planner, copied))
        assert one[0].completion == other[0].completion

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"root_policy": "ucb"}, "root_policy: expected one of .*puct.*gumbel.*, got 'ucb'"),
            ({"leaf_value": "none"}, "leaf_value: expected one of .*value.*rollout"),
            ({"backup": "min"}, "backup: expected one of .*mean.*max"),
            ({"num_simulations": 0}, "num_simulations: expected at least 1, got 0"),
            ({"batch_size": 0}, "batch_size"),
            ({"max_considered": 0}, "max_considered"),
            ({"widening_power": 1.5}, "widening_power: expected a number from 0 to 1, got 1.5"),
            ({"widening_power": -0.1}, "widening_power"),
            ({"widening": float("nan")}, "widening: expected a number above 0"),
            ({"c_puct": 0.0}, "c_puct: expected a number above 0, got 0.0"),
        ],
    )
    def test_bad_arguments(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            MCTS(NGramLM("ab"), CountReward(), **wrong)


@pytest.mark.parametrize("root_policy", ["puct", "gumbel"])
def test_the_embedded_model(smollm2, root_policy):
    planner = MCTS(
        smollm2,
        CountReward("e"),
        root_policy=root_policy,
        num_simulations=2,
        max_response_tokens=12,
        chunk_tokens=4,
    )
    prompt = Prompt.from_text("Name a colour.")
    [(answer, tree)] = planner.explore([prompt], Budget(tokens=48), seed=0)
    assert 0 < answer.usage.generated_tokens <= 48
    assert is_terminal(answer.completion.state)
    assert answer.completion.score == max(node.score for node in tree.complete())
    assert len(tree.complete()) >= 4
    assert tree.root.visits == answer.usage.reward_calls
