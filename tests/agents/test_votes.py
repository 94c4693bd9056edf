"""Votes over final answers, counted by hand."""

from collections import Counter
from fractions import Fraction

import pytest

from mbrl_text_env import checks
from mbrl_text_env.agents import Majority, WeightedVote
from mbrl_text_env.agents.base import Completion
from mbrl_text_env.language_models import NGramLM, TableLM
from mbrl_text_env.mdp import initial
from mbrl_text_env.types import Budget, BudgetError, Chunk, TextState
from tests.toys import PROMPTS, CountReward

LM = NGramLM("1 2x", seed=3, concentration=2.0, stop_probability=0.3)


def samples(lm, n, seed, limit, **options):
    [chunks] = lm.sample([initial(PROMPTS[0], lm)], n, limit, seeds=[seed], **options)
    return chunks


@pytest.mark.parametrize("seed", range(4))
def test_the_most_frequent_answer_wins_and_its_first_response_is_the_answer(seed):
    agent = Majority(LM, n=21, max_response_tokens=4, extract="response")
    [answer] = agent.generate(PROMPTS[:1], seed=seed)
    texts = [LM.decode(c.token_ids) for c in samples(LM, 21, seed, 4, params=agent.params)]
    answers = [" ".join(text.split()) for text in texts]
    [(winner, votes)] = Counter(a for a in answers if a).most_common(1)
    assert votes > 1
    assert answer.text == texts[answers.index(winner)]
    assert answer.completion.score is None
    assert answer.usage.reward_calls == 0
    assert answer.usage.generated_tokens == sum(
        map(len, samples(LM, 21, seed, 4, params=agent.params))
    )


class Scripted(TableLM):
    """Draws given texts, with the probability of each of their tokens."""

    def __init__(self, *script):
        super().__init__("1234 ab", {})
        self.script = script

    def sample_requests(self, requests, *, ledgers=None):
        rows = []
        for r in requests:
            drawn = self.script[r.first_sample : r.first_sample + r.num_samples]
            rows.append([self._chunk(*each) for each in drawn])
        return rows

    def _chunk(self, text, *logprobs):
        ids = (*(self._id_of[c] for c in text), 0)
        return Chunk(ids, logprobs * len(ids), "stop")


def winner(cls, lm, **options):
    agent = cls(lm, n=len(lm.script), max_response_tokens=9, **options)
    [answer] = agent.generate(PROMPTS[:1])
    return answer.text


def test_probable_samples_count_more_where_votes_are_weighted():
    # e^-0.1 = 0.90 against e^-1 + e^-2 = 0.50; the length of a text is no matter.
    lm = Scripted(("1", -1.0), ("ab 2", -0.1), ("a 1", -2.0))
    assert winner(Majority, lm) == "1"
    assert winner(WeightedVote, lm) == "ab 2"
    # e^-1 + e^-1 = 0.74 against e^-0.5 = 0.61; the more probable one of the two stands for both.
    lm = Scripted(("2", -0.5), ("b 1", -1.0), ("1", -0.99))
    assert winner(WeightedVote, lm) == "1"
    assert winner(Majority, lm) == "b 1"


def test_of_as_many_votes_the_first_wins_and_no_answer_is_no_vote():
    assert winner(Majority, Scripted(("2",), ("1",), ("1",), ("2",))) == "2"
    assert winner(Majority, Scripted(("",), ("",), ("1",))) == "1"
    assert winner(Majority, Scripted(("",), ("",))) == ""
    assert winner(Majority, Scripted(("a",), ("b 1",), ("b 2",)), extract="b") == "b 1"


def test_where_an_answer_stands():
    def found(text, extract="number"):
        return Majority(LM, extract=extract).final_answer(text)

    assert found("First 3, then 1,500.") == found("1500.0") == Fraction(1500)
    assert found(" yes,\nno ") == "yes, no"
    assert found("  ") is None
    assert found("1 2\n3", "response") == "1 2 3"
    assert found("So #### 7\nor 8", "####") == "7"
    assert found("7", "####") is None
    assert found("abc", lambda text: text[-1]) == "c"


@pytest.mark.parametrize("cls", [Majority, WeightedVote])
def test_they_keep_the_contract_of_agents(cls):
    checks.check_agent(cls(LM, max_response_tokens=6, chunk_tokens=2), PROMPTS)


@pytest.mark.parametrize("cls", [Majority, WeightedVote])
def test_budgets_are_spent_and_kept(cls):
    lm = NGramLM("abcd", seed=1, stop_probability=0.0)
    agent = cls(lm, CountReward(), max_response_tokens=5)
    for tokens, spent in ((5, 5), (9, 5), (104, 100)):
        [answer] = agent.generate(PROMPTS[:1], Budget(tokens=tokens))
        assert answer.usage.generated_tokens == spent
    with pytest.raises(BudgetError):
        agent.generate(PROMPTS[:1], Budget(tokens=4))
    # No cap on samples is none: four are drawn, as without a budget.
    for budget in (None, Budget(reward_calls=2)):
        assert agent.generate(PROMPTS[:1], budget)[0].usage.generated_tokens == 20


def test_refusals():
    for options in ({"n": 0}, {"extract": ""}, {"extract": 3}):
        with pytest.raises(ValueError, match="expected"):
            Majority(LM, **options)
    state = TextState(PROMPTS[0], (1,), (2, 0), "stop")
    with pytest.raises(ValueError, match="token log-probabilities, got none from NGramLM"):
        WeightedVote(LM).weight(Completion(state))
