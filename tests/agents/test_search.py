"""The search under all planners: what it draws, what it pays for, what it keeps back."""

import numpy as np
import pytest

from mbrl_text_env.agents.beam import beam_search
from mbrl_text_env.agents.search import Expansion, Search
from mbrl_text_env.agents.tree import partial
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.mdp import initial
from mbrl_text_env.types import Budget, Ledger, Usage
from tests.toys import PROMPTS, ChargingValue, CountReward, FixedValue, now

LM = NGramLM("abcdefgh", seed=3, concentration=50.0, stop_probability=0.0)


class Expensive(FixedValue):
    def flops(self, states):
        return np.full(len(states), 100.0)

    def flops_bound(self):
        return 100.0


def begun(budget=None, value=None, limit=8, reward=None, lm=LM):
    return Search(
        initial(PROMPTS[0], lm),
        lm,
        reward or CountReward(),
        value,
        ledger=Ledger(budget),
        seed=0,
        params=SamplingParams(),
        max_response_tokens=limit,
    )


def test_children_are_drawn_scored_and_valued():
    search = begun(value=FixedValue(len, LM))
    [row] = now(search.expand([Expansion(search.tree.root, 3, tokens=2)]))
    assert [node.value for node in row] == [2.0] * 3
    ends = now(search.expand(Expansion(node) for node in row))
    scores = CountReward().score([None] * 3, [LM.decode(n.state.response_ids) for [n] in ends])
    assert [node.score for [node] in ends] == scores
    usage = search.ledger.usage
    assert usage.generated_tokens == 3 * 8 == search.drawn * 4
    assert (usage.value_calls, usage.reward_calls) == (3, 3)


def test_nothing_is_valued_where_that_is_not_wanted():
    search = begun(value=FixedValue(len, LM))
    [row] = now(search.expand([Expansion(search.tree.root, 3, tokens=2, valued=False)]))
    assert all(node.worth is None for node in row)
    now(search.evaluate(row))
    assert all(node.value == 2.0 for node in row)
    now(search.evaluate(row))
    assert search.ledger.usage.value_calls == 3


def test_two_expansions_of_a_node_draw_different_chunks():
    once = begun()
    [row] = now(once.expand([Expansion(once.tree.root, 4, tokens=3)]))
    twice = begun()
    rows = now(twice.expand([Expansion(twice.tree.root, 2, tokens=3)] * 2))
    assert [n.state for n in row] == [n.state for part in rows for n in part]


def test_where_not_all_is_affordable_every_expansion_gets_fewer():
    search = begun(Budget(tokens=20))
    root = search.tree.root
    [row] = now(search.expand([Expansion(root, 2, tokens=1)]))
    a, b = row
    # 18 tokens are left, 6 of them for finishing one of the two: 12 for chunks of 2.
    rows = now(search.expand([Expansion(a, 9, tokens=2), Expansion(b, 9, tokens=2)]))
    assert [len(r) for r in rows] == [3, 3]


def test_the_first_expansions_come_first_when_not_even_one_each_is_affordable():
    search = begun(Budget(tokens=12))
    [row] = now(search.expand([Expansion(search.tree.root, 3, tokens=1)]))
    rows = now(search.expand(Expansion(node, 1, tokens=2) for node in row))
    # Two chunks of 2, and 5 tokens to finish the nearest response with.
    assert [len(r) for r in rows] == [1, 1, 0]
    assert now(search.expand([Expansion(row[0], 5)])) == [[]]


def test_a_response_can_always_be_finished():
    search = begun(Budget(tokens=8))
    [row] = now(search.expand([Expansion(search.tree.root, 4, tokens=3)]))
    assert len(row) == 1
    best = now(search.finish())
    assert best.score is not None
    assert list(best.path())[1] is row[0]
    assert search.ledger.usage.generated_tokens == 8
    assert search.tree.chosen is best


def test_the_best_partial_response_is_finished():
    search = begun(value=FixedValue(lambda text: text.count("a"), LM))
    [row] = now(search.expand([Expansion(search.tree.root, 6, tokens=2)]))
    best = now(search.finish())
    assert best.parent is max(row, key=lambda node: node.value)


def test_what_values_leave_is_spent_on_whole_responses():
    """Valuing a chunk takes more tokens than there are."""
    search = begun(Budget(tokens=53))
    search.value_model = ChargingValue(len, LM, Usage(generated_tokens=60))
    now(beam_search(search, chunk_tokens=2, beam_width=1))
    assert search.drawn == 0
    best = now(search.finish())
    # Six of 8 tokens; the 5 tokens after them are no response.
    assert search.ledger.usage.generated_tokens == 48
    assert best.score == max(node.score for node in search.tree.nodes if node.is_terminal)
    assert best.score > search.tree.nodes[1].score


def test_nothing_is_spent_after_a_planner_has_an_answer():
    search = begun(Budget(tokens=53))
    [[node]] = now(search.expand([Expansion(search.tree.root)]))
    assert now(search.finish()) is node
    assert search.ledger.usage.generated_tokens == 8


def test_without_a_cap_one_response_is_finished():
    search = begun()
    now(search.finish())
    assert search.ledger.usage.generated_tokens == 8


def test_a_target_is_reached_by_a_complete_response_alone():
    search = begun(value=FixedValue(lambda text: 9.0, LM))
    assert not search.has_reached(0.0)
    now(search.expand([Expansion(search.tree.root, 3, tokens=2)]))
    assert not search.has_reached(0.0)
    now(search.expand([Expansion(search.tree.root, 3)]))
    best = max(node.score for node in search.tree.complete())
    assert best > 0
    assert search.has_reached(best)
    assert not search.has_reached(np.nextafter(best, 2.0))
    assert not search.has_reached(None)


def test_ranked():
    search = begun(value=FixedValue(lambda text: text.count("a"), LM))
    [row] = now(search.expand([Expansion(search.tree.root, 20, tokens=2)]))
    ranked = search.ranked([*row, *row])
    assert len(ranked) == len(set(row)) == len(partial(row))
    values = [node.value for node in ranked]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(("tokens", "chunk", "width"), [(80, 2, 10), (80, None, 10), (7, 2, 0)])
def test_width_is_what_the_budget_allows(tokens, chunk, width):
    search = begun(Budget(tokens=tokens))
    assert search.width(search.tree.root, chunk) == width


def test_width_counts_values_and_scores():
    value = Expensive(len, LM)
    plain, valued = begun(Budget(flops=2_000.0)), begun(Budget(flops=2_000.0), value)
    root = plain.tree.root
    # 8 operations a response, and three values of 100 on its way.
    assert plain.width(root, 2) > 100
    assert valued.width(valued.tree.root, 2) == 6
    calls = begun(Budget(reward_calls=5))
    assert calls.width(calls.tree.root, 2) == 5


def test_without_a_cap_that_counts_there_is_no_width():
    assert begun().width(begun().tree.root, 2) is None
    timed = begun(Budget(seconds=60.0))
    assert timed.width(timed.tree.root, 2) is None
    assert timed.is_capped
    assert not begun(Budget(flops=1e30)).is_capped


def test_what_a_value_costs_in_tokens():
    assert begun().value_tokens(begun().tree.root) == 0.0
    free = begun(value=FixedValue(len, LM))
    assert free.value_tokens(free.tree.root) == 0.0
    expensive = begun(value=Expensive(len, LM))
    assert expensive.value_tokens(expensive.tree.root) == pytest.approx(100.0)


def test_ended_responses_have_no_room():
    search = begun()
    [[node]] = now(search.expand([Expansion(search.tree.root)]))
    assert (search.room(search.tree.root.state), search.room(node.state)) == (8, 0)


def test_stop_texts_end_chunks_and_not_what_is_drawn_to_the_end():
    search = begun()
    search.params = SamplingParams(stop=("a", "b", "c"))
    [row] = now(search.expand([Expansion(search.tree.root, 12, tokens=6)]))
    assert min(len(node.chunk) for node in row) < 6
    assert all(node.is_terminal for [node] in now(search.expand(Expansion(node) for node in row)))
    alone = begun()
    alone.params = SamplingParams(stop=("a", "b", "c", "d"))
    assert now(alone.finish()).is_terminal


def test_a_response_that_was_reached_on_another_way_is_not_scored_again():
    lm = NGramLM("a", stop_probability=0.0)
    search = begun(lm=lm, limit=4)
    root = search.tree.root
    [[first], [whole]] = now(search.expand([Expansion(root, 1, tokens=2), Expansion(root, 1)]))
    [[end]] = now(search.expand([Expansion(first, 1)]))
    assert end.state.response_ids == whole.state.response_ids
    assert end is not whole
    assert (end.score, end.parts) == (whole.score, whole.parts)
    assert search.ledger.usage.reward_calls == 1
