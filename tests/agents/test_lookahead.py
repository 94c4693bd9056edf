import numpy as np
import pytest

from mbrl_text_env.agents import BestOfN, Lookahead
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.mdp import initial, transition
from mbrl_text_env.types import Budget, Chunk
from mbrl_text_env.values import ValueEstimate
from tests.toys import PROMPTS, CountReward, FixedValue

# Never stops: every response has its full length, so the costs are exact.
ENDLESS = NGramLM("abc", seed=3, stop_probability=0.0)


class RecordingValue(FixedValue):
    """Remembers what it was asked."""

    def __init__(self, function, tokenizer):
        super().__init__(function, tokenizer)
        self.asked = []

    def predict(self, states) -> ValueEstimate:
        self.asked.append([self.tokenizer.decode(s.response_ids) for s in states])
        return super().predict(states)


def count_a(text):
    return text.count("a")


def test_the_articles_procedure():
    """4 partials of 64, the best 2 kept, 2 continuations of 192 each: 1,024 tokens."""
    value, reward = RecordingValue(count_a, ENDLESS), CountReward()
    agent = Lookahead(ENDLESS, reward, value)
    (generation,) = agent.generate(PROMPTS[:1], seed=1)
    (partials,) = value.asked
    assert [len(text) for text in partials] == [64] * 4
    (finals,) = reward.calls
    assert [len(text) for text in finals] == [256] * 4
    kept = sorted(partials, key=count_a, reverse=True)[:2]
    assert [text[:64] for text in finals] == [kept[0]] * 2 + [kept[1]] * 2
    assert len(set(finals)) == 4
    assert generation.text == max(finals, key=count_a)
    usage = generation.usage
    assert (usage.generated_tokens, usage.reward_calls, usage.value_calls) == (1024, 4, 4)
    assert (agent.partial_params.temperature, agent.params.temperature) == (0.9, 0.7)


@pytest.mark.parametrize("unfitted", [None, "value"])
def test_untrained_it_is_best_of_four(unfitted):
    value = None
    if unfitted:
        value = FixedValue(count_a, ENDLESS)
        value.is_fitted = False
    options = {"max_response_tokens": 8}
    fallback = Lookahead(ENDLESS, CountReward(), value, **options).generate(PROMPTS, seed=3)
    plain = BestOfN(ENDLESS, CountReward(), n=4, **options).generate(PROMPTS, seed=3)
    assert [g.completion for g in fallback] == [g.completion for g in plain]


@pytest.mark.parametrize("tokens", [8, 9, 10, 31, 32, 33, 40, 64, 100])
def test_rounds_fill_the_budget_and_shrink_at_its_end(tokens):
    """A round costs 4 x 2 + 2 x 2 x 6 = 32 tokens, the smallest one 8."""
    agent = Lookahead(
        ENDLESS, CountReward(), FixedValue(count_a, ENDLESS), prefix_tokens=2, max_response_tokens=8
    )
    (generation,) = agent.generate(PROMPTS[:1], Budget(tokens=tokens))
    assert tokens - 8 < generation.usage.generated_tokens <= tokens


def test_partials_that_end_by_themselves_are_not_continued():
    stops = NGramLM("abc", seed=3, stop_probability=0.9)
    reward = CountReward()
    agent = Lookahead(
        stops, reward, FixedValue(count_a, stops), prefix_tokens=8, keep=4, num_partials=4
    )
    for seed in range(20):
        (generation,) = agent.generate(PROMPTS[:1], seed=seed)
        assert generation.completion.state.finish_reason == "stop"
        assert generation.usage.reward_calls <= 5
        assert generation.usage.generated_tokens < 40


def test_the_first_of_equal_values_is_kept():
    value, reward = RecordingValue(lambda text: 0.0, ENDLESS), CountReward()
    agent = Lookahead(ENDLESS, reward, value, prefix_tokens=2, max_response_tokens=4, keep=1)
    agent.generate(PROMPTS[:1])
    assert all(text.startswith(value.asked[0][0]) for text in reward.calls[0])


def test_short_responses_have_a_quarter_for_a_prefix():
    value = RecordingValue(count_a, ENDLESS)
    Lookahead(ENDLESS, CountReward(), value, max_response_tokens=32).generate(PROMPTS[:1])
    assert {len(text) for text in value.asked[0]} == {8}


def test_one_value_call_and_one_reward_call_serve_all_prompts():
    value, reward = RecordingValue(count_a, ENDLESS), CountReward()
    Lookahead(ENDLESS, reward, value, max_response_tokens=8).generate(PROMPTS)
    assert len(value.asked) == 1
    assert len(reward.calls) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"num_partials": 0}, {"prefix_tokens": 0}, {"keep": 0}, {"continuations": 0}, {"keep": 5}],
)
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Lookahead(ENDLESS, CountReward(), None, **wrong)


def test_states_of_different_lengths_are_searched_together():
    agent = Lookahead(
        ENDLESS, CountReward(), FixedValue(count_a, ENDLESS), prefix_tokens=2, max_response_tokens=8
    )
    start = initial(PROMPTS[0], ENDLESS)
    states = [start, transition(start, Chunk((1, 2, 3)), 8), transition(start, Chunk((1,) * 7), 8)]
    decisions = agent.act(states, seed=1)
    for state, decision in zip(states, decisions, strict=True):
        ids = decision.completion.state.response_ids
        assert ids[: len(state.response_ids)] == state.response_ids
        assert len(ids) == 8
    alone = [agent.act([state], seed=1)[0] for state in states]
    assert [d.completion for d in decisions] == [d.completion for d in alone]
    assert np.isfinite([d.completion.score for d in decisions]).all()
