"""What holds for every planner, on worlds whose answers are known by enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env import checks
from mbrl_text_env.agents import (
    MCTS,
    Adaptive,
    BeamSearch,
    BestFirst,
    BestOfN,
    Lookahead,
    ParticleFilter,
    RecedingHorizon,
    Sampling,
    Screened,
)
from mbrl_text_env.agents.driver import MOST_AT_ONCE
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.mdp import initial, is_terminal
from mbrl_text_env.types import Budget, BudgetError, Ledger, Prompt, TextState, Usage
from mbrl_text_env.values import ValueEstimate
from tests.toys import PROMPTS, ChargingValue, CountReward, FixedValue, OptimalValue

SIZES = {"max_response_tokens": 6, "chunk_tokens": 1, "params": SamplingParams()}
# By name: constructor and options, one row a planner and mode.
PLANNERS = {
    "best-of-n, pruned": (BestOfN, {"keep": 0.5}),
    "lookahead": (Lookahead, {"prefix_tokens": 3, "keep": 1}),
    "lookahead, chunkwise": (Lookahead, {"chunkwise": True}),
    "beam": (BeamSearch, {}),
    "beam of 3": (BeamSearch, {"beam_width": 3}),
    "beam, 2 subtrees": (BeamSearch, {"beam_width": 4, "subtrees": 2}),
    "receding horizon": (RecedingHorizon, {}),
    "mcts": (MCTS, {}),
    "mcts, gumbel": (MCTS, {"root_policy": "gumbel"}),
    "particle filter": (ParticleFilter, {"temperature": 0.02}),
    "screened": (Screened, {}),
    "screened, one finalist": (Screened, {"candidates": 8, "finalists": 1}),
    "adaptive": (Adaptive, {"candidates_per_beam": 32}),
    "adaptive, cautious": (Adaptive, {"candidates_per_beam": 32, "caution": 1.0}),
    "adaptive, with a target": (Adaptive, {"target": 1e9}),
}
# With those that make nothing of a value.
SEARCHES = {
    **PLANNERS,
    "best-of-n": (BestOfN, {}),
    "best-first": (BestFirst, {"expansions": 20_000}),
    "best-first, stochastic": (
        BestFirst,
        {"stochastic": True, "batch_size": 3, "expansions": 20_000},
    ),
    "mcts, rollouts": (MCTS, {"leaf_value": "rollout"}),
    "mcts, gumbel rollouts": (MCTS, {"root_policy": "gumbel", "leaf_value": "rollout"}),
}
every_planner = pytest.mark.parametrize("name", PLANNERS)
every_search = pytest.mark.parametrize("name", SEARCHES)


def build(name, lm, reward, value=None, **options):
    cls, own = SEARCHES[name]
    return cls(lm, reward, value, **{**SIZES, **own, **options})


class TableReward(CountReward):
    """Every response has a reward of its own, and one of them is the best."""

    name = "table"

    def __init__(self, seed=0, bumps=40):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.weights = rng.random((6, 4))
        self.pairs = rng.random((4, 4))

    def score(self, prompts, responses):
        return [self._score(["abcd".index(c) for c in text]) for text in responses]

    def _score(self, ids):
        own = sum(self.weights[i, c] for i, c in enumerate(ids[:6]))
        return float(own + sum(self.pairs[a, b] for a, b in itertools.pairwise(ids)))


def optimum(lm, reward, prompt):
    texts = [lm.decode(ids) for ids, _ in lm.responses(initial(prompt, lm), 6)]
    return max(reward.score([prompt] * len(texts), texts)), len(texts)


@every_planner
def test_with_a_perfect_value_the_optimum_is_found(name):
    """4^6 responses, of which best-of-N sees at most 100 with 600 tokens."""
    lm, reward = NGramLM("abcd", seed=5, concentration=3.0, stop_probability=0.0), TableReward()
    prompt = Prompt.from_text("ab")
    best, count = optimum(lm, reward, prompt)
    assert count == 4**6
    # The last chunks of two stages and of best-of-N are a lottery, and rounds that begin narrow are
    # repeated: they need more draws.
    more = {"lookahead": 20_000, "best-of-n, pruned": 20_000, "adaptive, with a target": 3_000}
    budget = Budget(tokens=more.get(name, 600))
    agent = build(name, lm, reward, OptimalValue(lm, reward, 6))
    [answer] = agent.generate([prompt], budget, seed=0)
    assert answer.completion.score == pytest.approx(best)


def test_without_a_value_the_same_budget_does_not_find_it():
    lm, reward = NGramLM("abcd", seed=5, concentration=3.0, stop_probability=0.0), TableReward()
    prompt = Prompt.from_text("ab")
    best, _ = optimum(lm, reward, prompt)
    agent = BestOfN(lm, reward, **SIZES)
    answers = [agent.generate([prompt], Budget(tokens=600), seed=s)[0] for s in range(8)]
    assert all(a.completion.score < best for a in answers)


@every_planner
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_misleading_value_never_costs_a_response_that_was_paid_for(name, seed):
    lm, reward = NGramLM("abcd", seed=seed), TableReward(seed)
    agent = build(name, lm, reward, FixedValue(lambda t: -reward.score([None], [t])[0], lm))
    found = agent.explore(PROMPTS[:2], Budget(tokens=90), seed=seed)
    for answer, tree in found:
        complete = [node.score for node in tree.complete()]
        assert answer.completion.score == max(complete)
        assert tree.chosen.state == answer.completion.state
        assert answer.usage.reward_calls == len(complete)


@every_search
def test_planners_keep_the_contract_of_agents(name):
    lm = NGramLM("abcde", 2, seed=1)
    agent = build(name, lm, CountReward(), FixedValue(lambda t: t.count("a"), lm))
    checks.check_agent(agent, PROMPTS)


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


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(SEARCHES)),
    seed=st.integers(0, 1000),
    stop=st.sampled_from([0.0, 0.1, 0.6]),
    limit=st.integers(1, 12),
    chunk=st.integers(1, 5),
    share=st.floats(0.3, 12.0),
    cap=st.sampled_from(["tokens", "flops", "reward_calls", "all"]),
    kind=st.sampled_from(["certain", "uncertain", "charging"]),
    stop_text=st.booleans(),
)
def test_no_planner_overspends(name, seed, stop, limit, chunk, share, cap, kind, stop_text):
    lm = NGramLM("abc", seed=seed, stop_probability=stop)
    value = CostlyValue(lambda t: t.count("a") - t.count("b"), lm)
    if kind == "charging":
        taken = Usage(generated_tokens=2 * limit, lm_flops=9.0, reward_calls=2, reward_flops=60.0)
        value = ChargingValue(len, lm, taken)
    if kind == "uncertain":
        value.predict = lambda states: ValueEstimate(
            np.array([float(len(s.response_ids) % 3) for s in states]), np.full(len(states), 0.3)
        )
    agent = build(
        name,
        lm,
        CostlyReward(),
        value,
        max_response_tokens=limit,
        chunk_tokens=chunk,
        params=SamplingParams(stop=("a",) if stop_text else ()),
    )
    state = initial(PROMPTS[0], lm)
    least = agent.response_usage(state)
    caps = {
        "tokens": max(1, int(share * least.generated_tokens)),
        "flops": share * least.flops,
        "reward_calls": max(1, int(share * least.reward_calls)),
    }
    budget = Budget(**(caps if cap == "all" else {cap: caps[cap]}))
    allows_one = all(
        value is None or value >= need
        for value, need in (
            (budget.tokens, least.generated_tokens),
            (budget.flops, least.flops),
            (budget.reward_calls, least.reward_calls),
        )
    )
    if not allows_one:
        with pytest.raises(BudgetError):
            agent.generate(PROMPTS[:1], budget, seed=seed)
        return
    [answer] = agent.generate(PROMPTS[:1], budget, seed=seed)
    usage = answer.usage
    assert is_terminal(answer.completion.state)
    assert answer.completion.score is not None
    assert budget.tokens is None or usage.generated_tokens <= budget.tokens
    assert budget.flops is None or usage.flops <= budget.flops
    assert budget.reward_calls is None or usage.reward_calls <= budget.reward_calls


@every_search
def test_larger_budgets_are_used(name):
    """Nothing is left that would pay for another response, unless all has been seen."""
    lm = NGramLM("abcdefgh", seed=2, concentration=5.0, stop_probability=0.0)
    agent = build(name, lm, CountReward(), FixedValue(lambda t: t.count("a"), lm))
    for tokens in (6, 50, 300):
        [answer] = agent.generate(PROMPTS[:1], Budget(tokens=tokens))
        assert tokens - 6 < answer.usage.generated_tokens <= tokens


@every_search
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    stop=st.sampled_from([0.05, 0.3, 0.5, 0.7]),
    chunk=st.sampled_from([1, 3, 16]),
    limit=st.sampled_from([5, 12]),
    share=st.floats(1.0, 20.0),
    cap=st.sampled_from(["tokens", "flops", "reward_calls"]),
    valued=st.booleans(),
)
def test_what_is_left_does_not_afford_another_response(
    name, seed, stop, chunk, limit, share, cap, valued
):
    """With 16 letters something new can always be drawn, also where most responses are short."""
    lm = NGramLM("abcdefghijklmnop", seed=seed, concentration=50.0, stop_probability=stop)
    value = CostlyValue(lambda t: t.count("a") - t.count("b"), lm)
    options = {"max_response_tokens": limit, "chunk_tokens": chunk}
    needs_value = SEARCHES[name][1].get("keep") == 0.5
    agent = build(name, lm, CostlyReward(), value if valued or needs_value else None, **options)
    least = agent.response_usage(initial(PROMPTS[0], lm))
    caps = {"tokens": least.generated_tokens, "flops": least.flops, "reward_calls": 1}
    budget = Budget(**{cap: int(share * caps[cap]) + 1})
    [answer] = agent.generate(PROMPTS[:1], budget, seed=seed)
    ledger = Ledger(budget)
    ledger.charge(answer.usage)
    assert not ledger.affords(least)


@every_search
@pytest.mark.parametrize("budget", [Budget(tokens=2_000), Budget(reward_calls=100)])
def test_a_world_whose_responses_are_all_known_ends_the_search(name, budget):
    """3 responses: nothing, "a" and "aa"."""
    lm = NGramLM("a", seed=1, stop_probability=0.4)
    agent = build(name, lm, CountReward(), FixedValue(len, lm), max_response_tokens=2)
    [answer] = agent.generate(PROMPTS[:1], budget)
    assert answer.text.startswith("a")
    assert answer.usage.reward_calls <= 3


class TwinLM(NGramLM):
    """Every letter has two tokens, so different tokens are the same text."""

    def decode(self, token_ids):
        return super().decode(token_ids).lower()


@every_search
def test_no_text_is_scored_twice(name):
    lm, reward = TwinLM("abAB", seed=3, stop_probability=0.3), CountReward()
    agent = build(name, lm, reward, FixedValue(lambda t: t.count("a"), lm), max_response_tokens=3)
    [answer] = agent.generate(PROMPTS[:1], Budget(tokens=300))
    scored = list(itertools.chain(*reward.calls))
    assert len(scored) == len(set(scored)) == answer.usage.reward_calls > 3


@every_planner
def test_without_a_budget_there_is_one_round(name):
    lm = NGramLM("abc", seed=2, stop_probability=0.0)
    agent = build(name, lm, CountReward(), FixedValue(lambda t: t.count("a"), lm))
    [answer] = agent.generate(PROMPTS[:1])
    assert is_terminal(answer.completion.state)
    assert answer.usage.generated_tokens < 200


@every_planner
def test_the_environment_is_played_one_chunk_at_a_time(name):
    lm, reward = NGramLM("abc", seed=2), CountReward()
    agent = build(name, lm, reward, FixedValue(lambda t: t.count("a"), lm), chunk_tokens=2)
    env = world(lm, reward)
    env.reset(seed=1)
    terminated = truncated = False
    total = 0.0
    while not (terminated or truncated):
        [decision] = agent.act([env.unwrapped.get_state()], Budget(tokens=40), seed=3)
        _, value, terminated, truncated, _ = env.step(decision.chunk.token_ids)
        total += value
    text = lm.decode(env.unwrapped.get_state().response_ids)
    assert total == pytest.approx(reward.score([None], [text])[0])


def world(lm, reward):
    import gymnasium as gym

    return gym.make(
        "mbrl_text_env/TextGeneration-v0",
        prompts=PROMPTS,
        tokenizer=lm,
        reward_model=reward,
        max_chunk_tokens=2,
        max_response_tokens=6,
    )


class CachingLM(NGramLM):
    """Says how many tokens of prefixes it keeps; remembers which prompts are asked together."""

    def __init__(self, cache_tokens=None, stop_probability=0.0, **options):
        super().__init__("abcd", seed=3, stop_probability=stop_probability, **options)
        if cache_tokens is not None:
            self.cache_tokens = cache_tokens
        self.asked = []

    def sample(self, states, *args, **options):
        self.asked.append(tuple(dict.fromkeys(state.prompt.id for state in states)))
        return super().sample(states, *args, **options)

    def together(self):
        """Prompts that were searched together, one group after the other."""
        return [len(ids) for ids, _ in itertools.groupby(self.asked)]


class TestSearchesSideBySide:
    """16 prompts of 2 tokens; with a budget of 18 each of them has 20 tokens to keep."""

    PROMPTS = tuple(Prompt.from_text(a + b) for a, b in itertools.product("abcd", repeat=2))

    def together(self, cache_tokens, budget, prompts=PROMPTS, **options):
        """Without a stop token all beam searches of a group take the same steps."""
        lm = CachingLM(cache_tokens, **options)
        value = FixedValue(lambda t: t.count("a"), lm)
        agent = build("beam", lm, CountReward(), value, chunk_tokens=2)
        agent.generate(prompts, budget)
        return lm.together()

    @pytest.mark.parametrize(
        ("cache_tokens", "sizes"),
        [(320, [16]), (319, [15, 1]), (200, [10, 6]), (199, [9, 7]), (180, [9, 7])],
    )
    def test_no_more_than_the_cache_can_hold(self, cache_tokens, sizes):
        assert self.together(cache_tokens, Budget(tokens=18)) == sizes

    @pytest.mark.parametrize("cache_tokens", [179, 60, 1])
    def test_never_fewer_than_eight(self, cache_tokens):
        assert self.together(cache_tokens, Budget(tokens=18)) == [8, 8]

    def test_never_more_than_threads_are_good_for(self):
        prompts = [Prompt.from_text("ab", f"p{i}") for i in range(MOST_AT_ONCE + 3)]
        assert self.together(10**9, Budget(tokens=18), prompts) == [MOST_AT_ONCE, 3]

    def test_flops_are_as_many_tokens_as_they_buy(self):
        """12 x 20 tokens."""
        assert self.together(240, Budget(flops=36.0), flops_per_token=2.0) == [12, 4]
        assert self.together(240, Budget(tokens=18, flops=1e3), flops_per_token=2.0) == [12, 4]
        assert self.together(240, Budget(tokens=999, flops=36.0), flops_per_token=2.0) == [12, 4]
        assert self.together(240, Budget(flops=1.0), flops_per_token=0.0) == [16]

    @pytest.mark.parametrize("budget", [None, Budget(reward_calls=9)])
    def test_all_where_no_budget_says_what_a_search_keeps(self, budget):
        assert self.together(1, budget)[0] == 16

    @pytest.mark.parametrize("cache_tokens", [0, None])
    def test_all_where_nothing_is_kept(self, cache_tokens):
        assert self.together(cache_tokens, Budget(tokens=18)) == [16]

    def test_a_decision_keeps_the_response_so_far(self):
        """2 tokens of the prompt, 3 of the response and a budget of 15."""
        for cache_tokens, sizes in ((240, [12, 4]), (239, [11, 5])):
            lm = CachingLM(cache_tokens)
            states = [TextState(p, lm.encode_prompt(p), (1, 1, 1)) for p in self.PROMPTS]
            agent = build("beam", lm, CountReward(), FixedValue(len, lm))
            agent.act(states, Budget(tokens=15))
            assert lm.together() == sizes

    @pytest.mark.parametrize(
        ("options", "most"), [({}, 16), ({"n": 2}, 16), ({"target": 0.5}, 16), ({"keep": 0.5}, 8)]
    )
    def test_whole_samples_are_not_limited(self, options, most):
        """They have nothing in common but the prompt, unless they are pruned chunk by chunk."""
        lm = CachingLM(1)
        agent = BestOfN(lm, CountReward(), FixedValue(len, lm), **SIZES, **options)
        agent.generate(self.PROMPTS, Budget(tokens=18))
        assert max(lm.together()) == most

    def test_agents_that_do_not_plan_are_not_limited(self):
        lm = CachingLM(1)
        Sampling(lm, max_response_tokens=6).generate(self.PROMPTS, Budget(tokens=18))
        assert lm.together() == [16]

    @every_planner
    @settings(max_examples=4, deadline=None)
    @given(limit=st.sampled_from([(1, 8), (320, 10), (511, 15)]), seed=st.integers(0, 99))
    def test_the_answers_do_not_depend_on_it(self, name, limit, seed):
        """Searches that end early make room for others: 32 tokens each to keep."""
        found = []
        for cache_tokens, most in (limit, (0, 16)):
            lm = CachingLM(cache_tokens, stop_probability=0.15)
            value = FixedValue(lambda t: t.count("a"), lm)
            agent = build(name, lm, CountReward(), value, chunk_tokens=2)
            answers = agent.generate(self.PROMPTS, Budget(tokens=30), seed=seed)
            found.append([(a.completion, a.usage.generated_tokens) for a in answers])
            assert max(map(len, lm.asked)) == most
        assert found[0] == found[1]
