"""Best-first search on worlds whose answers are known by enumeration."""

import heapq
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mbrl_text_env.agents import BestFirst, expected_score
from mbrl_text_env.agents.best_first import conditioned
from mbrl_text_env.language_models import NGramLM, TableLM
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.types import Budget, Prompt
from tests.toys import PROMPTS, CountReward

# Answers of at most 2 letters: b 0.36, aa 0.2, a and ab 0.15, nothing 0.1, ba 0.04.
SMALL = TableLM("ab", {"": [0.1, 0.5, 0.4], "a": [0.3, 0.4, 0.3], "b": [0.9, 0.1, 0.0]})
ALL = {"b": 0.36, "aa": 0.2, "a": 0.15, "ab": 0.15, "": 0.1, "ba": 0.04}


def search(lm, reward=None, budget=None, seed=0, **options):
    """The answer, and the texts that were scored in their order."""
    reward = CountReward() if reward is None else reward
    [(answer, tree)] = BestFirst(lm, reward, **options).explore(PROMPTS[:1], budget, seed=seed)
    return answer, tree, [lm.decode(node.state.response_ids) for node in tree.complete()]


def test_answers_come_in_the_order_of_their_probability():
    answer, tree, texts = search(SMALL, n=6, max_response_tokens=2)
    assert texts == list(ALL)
    assert [node.score for node in tree.complete()] == [0, 1, 1, 0.5, 0, 0.5]
    found = [math.exp(sum(node.logprobs())) for node in tree.complete()]
    assert found == pytest.approx(list(ALL.values()))
    # Expanded are the empty prefix, "a" (0.5) and "b" (0.4).
    assert (answer.usage.generated_tokens, answer.usage.lm_calls) == (3, 3)
    assert answer.usage.reward_calls == 6
    # Of equals the first: "aa" is more probable than "a".
    assert answer.text == "aa"


def test_the_first_answer_is_the_most_probable_one_and_not_the_greedy_one():
    answer, _, texts = search(SMALL, n=1, max_response_tokens=2)
    assert (answer.text, texts, answer.usage.reward_calls) == ("b", ["b"], 1)


def textbook(lm, prompt, limit, count):
    """Prefixes in the order in which they leave the queue, and the first answers among them."""
    root = initial(prompt, lm)
    queue, number, expanded, answers = [(0.0, 0, ())], 0, [], []
    while queue and len(answers) < count:
        cost, _, ids = heapq.heappop(queue)
        if (ids and ids[-1] == 0) or len(ids) == limit:
            answers.append(ids)
            continue
        expanded.append(ids)
        row = lm.next_probabilities(root.prompt_ids, ids)
        for token in np.argsort(-row, kind="stable").tolist():
            number += 1
            heapq.heappush(queue, (cost - math.log(row[token]), number, (*ids, token)))
    return expanded, answers


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    stop=st.sampled_from([0.05, 0.3, 0.6]),
    limit=st.integers(1, 5),
    count=st.integers(1, 12),
    batch=st.integers(2, 5),
)
def test_one_by_one_is_the_textbooks_search_and_batches_find_the_same(
    seed, stop, limit, count, batch
):
    lm = NGramLM("abc", seed=seed, stop_probability=stop)
    options = {"n": count, "max_response_tokens": limit}
    answer, tree, _ = search(lm, **options)
    expanded, answers = textbook(lm, PROMPTS[0], limit, count)
    taken = [node.state.response_ids for node in tree.nodes if not node.is_terminal]
    assert taken == expanded
    assert answer.usage.generated_tokens == len(expanded)
    assert [node.state.response_ids for node in tree.complete()] == answers
    wide, wide_tree, _ = search(lm, batch_size=batch, **options)
    assert [node.state.response_ids for node in wide_tree.complete()] == answers
    assert wide.usage.generated_tokens >= answer.usage.generated_tokens
    assert wide.completion == answer.completion


def test_a_batch_is_one_call_of_the_model():
    calls = []

    class Counting(NGramLM):
        def next_tokens(self, states, k, *, ledgers=None):
            calls.append(len(states))
            return super().next_tokens(states, k, ledgers=ledgers)

    lm = Counting("abc", seed=2, stop_probability=0.0)
    search(lm, n=9, batch_size=4, max_response_tokens=3)
    assert max(calls) > 1
    assert max(calls) <= 4
    assert len(calls) < sum(calls)


def test_few_candidates_leave_out_improbable_tokens():
    _, _, texts = search(SMALL, n=9, max_response_tokens=2, candidates=1)
    assert texts == ["aa"]


def test_it_stops_at_the_target():
    answer, _, texts = search(SMALL, target=1.0, max_response_tokens=2)
    assert (answer.text, texts) == ("aa", ["b", "aa"])
    with_budget, _, _ = search(SMALL, None, Budget(tokens=100), target=1, max_response_tokens=2)
    assert with_budget.usage.reward_calls == 2


class NoB(RewardModel):
    """The share of three letters that are there, nothing with a "b"."""

    name = "no-b"

    def score(self, prompts, responses):
        return [0.0 if "b" in text else min(len(text), 3) / 3 for text in responses]

    def bound(self, prompts, prefixes):
        return [0.0 if "b" in text else 1.0 for text in prefixes]


def test_prefixes_that_cannot_reach_the_target_are_not_expanded_and_not_scored():
    lm = NGramLM("abcd", seed=4, stop_probability=0.3)
    answer, tree, texts = search(lm, NoB(), Budget(tokens=500), max_response_tokens=5)
    # The target is the most that the bound allows.
    assert answer.completion.score == 1.0
    assert texts.index(answer.text) == len(texts) - 1
    assert not any("b" in lm.decode(node.state.response_ids) for node in tree.nodes)

    def unbound(prompt, text):
        return NoB().score([], [text])[0]

    plain, _, _ = search(lm, unbound, Budget(tokens=500), target=1.0, max_response_tokens=5)
    assert plain.text == answer.text
    assert answer.usage.generated_tokens < plain.usage.generated_tokens
    assert answer.usage.reward_calls < plain.usage.reward_calls


def test_where_nothing_can_reach_the_target_there_is_still_an_answer():
    class Lost(NoB):
        def bound(self, prompts, prefixes):
            return [0.9 if text else 1.0 for text in prefixes]

    answer, _, _ = search(SMALL, Lost(), Budget(tokens=50), max_response_tokens=2)
    assert answer.completion.score is not None
    assert answer.usage.reward_calls == 1


@pytest.mark.parametrize("tokens", [4, 5, 6, 9, 30])
def test_a_budget_that_is_too_small_for_the_order_is_finished_greedily(tokens):
    lm = NGramLM("abcdefgh", seed=1, concentration=20.0, stop_probability=0.0)
    answer, _, _ = search(lm, None, Budget(tokens=tokens), max_response_tokens=4)
    assert answer.usage.generated_tokens <= tokens
    if tokens == 4:
        [[chunk]] = lm.sample(
            [initial(PROMPTS[0], lm)], 1, 4, seeds=[0], params=SamplingParams(temperature=0)
        )
        assert answer.completion.state.response_ids == chunk.token_ids
    if tokens == 30:
        assert answer.usage.generated_tokens == 30


@pytest.mark.parametrize("budget", [None, Budget(reward_calls=5)])
def test_long_answers_do_not_keep_it_forever(budget):
    lm = NGramLM("abcdefgh", seed=1, concentration=20.0, stop_probability=0.0)
    answer, _, _ = search(lm, None, budget, max_response_tokens=30, expansions=50)
    assert 50 < answer.usage.generated_tokens <= 80
    assert answer.completion.score is not None


def test_refusals():
    class Plain(NGramLM):
        next_tokens = LanguageModel.next_tokens

    with pytest.raises(ValueError, match=r"most probable next tokens .*, got Plain"):
        BestFirst(Plain("abc"), CountReward())
    counts = {"n": 0, "candidates": 0, "batch_size": 0, "expansions": 0}
    for name, value in {**counts, "stochastic": 2, "target": math.nan}.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            BestFirst(SMALL, CountReward(), **{name: value})


class TestSamplingWithoutReplacement:
    @staticmethod
    def trees(count, reward=None, **options):
        """Of prompts that are the same but for their id, which decides what is drawn."""
        prompts = [Prompt.from_text("ab", f"p{i}") for i in range(count)]
        reward = CountReward() if reward is None else reward
        agent = BestFirst(SMALL, reward, stochastic=True, max_response_tokens=2, **options)
        return [tree for _, tree in agent.explore(prompts, seed=7)]

    @staticmethod
    def texts(tree):
        return [SMALL.decode(node.state.response_ids) for node in tree.complete()]

    def test_the_order_has_its_law_and_every_answer_comes_once(self):
        orders = [self.texts(tree) for tree in self.trees(800, n=9)]
        assert all(sorted(order) == sorted(ALL) for order in orders)
        counts = Counter((first, second) for first, second, *_ in orders)
        law = {(x, y): p * q / (1 - p) for x, p in ALL.items() for y, q in ALL.items() if x != y}
        observed = [counts[pair] for pair in law]
        assert chisquare(observed, [len(orders) * p for p in law.values()]).pvalue > 0.001
        in_batches = [self.texts(tree) for tree in self.trees(60, n=9, batch_size=3)]
        assert in_batches == orders[:60]

    def test_answers_that_cannot_be_found_change_nothing_for_the_others(self):
        """Nothing (0.1) and "ab" (0.15) have a token that is third."""
        counts = Counter(self.texts(tree)[0] for tree in self.trees(600, n=1, candidates=2))
        law = {"aa": 0.2, "a": 0.15, "b": 0.36, "ba": 0.04}
        assert set(counts) == set(law)
        observed, total = [counts[text] for text in law], sum(law.values())
        assert chisquare(observed, [600 * p / total for p in law.values()]).pvalue > 0.001

    def test_the_estimate_is_unbiased_and_better_than_as_many_independent_samples(self):
        scores = {text: {"b": 1.0, "aa": -2.0, "ba": 9.0}.get(text, 0.5) for text in ALL}
        exact = sum(p * scores[text] for text, p in ALL.items())
        trees = self.trees(800, lambda prompt, text: scores[text], n=5)
        found = np.array([expected_score(tree) for tree in trees])
        assert abs(found.mean() - exact) < 3.5 * found.std() / math.sqrt(len(found))
        variance = sum(p * (scores[text] - exact) ** 2 for text, p in ALL.items())
        assert found.var() < variance / 5

    def test_other_seeds_give_other_answers(self):
        options = {"n": 1, "stochastic": True, "max_response_tokens": 2}
        assert len({search(SMALL, seed=seed, **options)[0].text for seed in range(20)}) > 1

    def test_the_estimate_needs_a_sample(self):
        for options in ({"n": 1, "stochastic": True}, {"n": 3}):
            _, tree, _ = search(SMALL, max_response_tokens=2, **options)
            with pytest.raises(ValueError, match="at least two sampled answers, got"):
                expected_score(tree)

    def test_conditioned_gumbels(self):
        rng = np.random.default_rng(0)
        locations = np.array([-0.1, -3.0, -40.0, -np.inf])
        rows = np.array([conditioned(rng.gumbel(size=4) + locations, 1.5) for _ in range(2000)])
        assert (rows.max(axis=1) == 1.5).all()
        assert (rows[:, 3] == -np.inf).all()
        # The largest is each with its own probability.
        share = math.exp(-0.1) / (math.exp(-0.1) + math.exp(-3.0))
        assert (rows.argmax(axis=1) == 0).mean() == pytest.approx(share, abs=0.02)


def test_arithmetic_with_examples_on_the_embedded_model(smollm2):
    shots = "".join(f"{a} + {b} = {a + b}\n" for a, b in [(2, 3), (4, 4), (1, 6), (5, 2)])
    prompt = Prompt.from_text(f"{shots}3 + 5 =", chat=False)

    def right(prompt, text):
        return float(text.split("\n")[0].strip() == "8")

    smollm2.clear_cache()
    agent = BestFirst(smollm2, right, target=1, n=20, max_response_tokens=3)
    [(answer, tree)] = agent.explore([prompt])
    complete = tree.complete()
    logs = [sum(node.logprobs()) for node in complete]
    assert logs == sorted(logs, reverse=True)
    texts = {smollm2.decode(node.state.response_ids) for node in complete}
    assert answer.usage.reward_calls == len(texts)
    assert answer.completion.score == 1.0
    # The prompt is computed once, and every expansion after that takes one token.
    prefix = len(tree.root.state.prompt_ids)
    assert answer.usage.prompt_tokens == prefix + answer.usage.generated_tokens - 1
