"""The agent checker passes what keeps its contract, and names the fault of what does not."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env import CheckError, agents, checks, rewards
from mbrl_text_env.agents.base import Completion
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.language_models.base import spawn_seed
from mbrl_text_env.mdp import initial, is_terminal
from mbrl_text_env.types import BudgetError, Chunk, Ledger
from tests.checks.common import LM, broken
from tests.toys import PROMPTS, CountReward, FixedValue, StepReward

# Agents that keep the contract.

VALUE = FixedValue(lambda text: text.count("a"), LM)
SIZES = {"max_response_tokens": 7, "chunk_tokens": 2}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda lm: agents.Sampling(lm, **SIZES),
        lambda lm: agents.Sampling(lm, params=SamplingParams(temperature=0), **SIZES),
        lambda lm: agents.RandomAgent(lm, **SIZES),
        lambda lm: agents.BestOfN(lm, CountReward(), **SIZES),
        lambda lm: agents.BestOfN(lm, CountReward(), n=3, **SIZES),
        lambda lm: agents.Lookahead(lm, CountReward(), **SIZES),
        lambda lm: agents.Lookahead(lm, CountReward(), VALUE, **SIZES),
        lambda lm: agents.Lookahead(
            lm, CountReward(), VALUE, prefix_tokens=4, max_response_tokens=20
        ),
    ],
)
def test_agents_pass(make, order):
    checks.check_agent(make(NGramLM("abcde", order, seed=order)), PROMPTS)


@settings(max_examples=15, deadline=None)
@given(
    limit=st.integers(1, 9),
    chunk=st.integers(1, 9),
    branches=st.integers(1, 4),
    prefix=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    stop=st.sampled_from([0.0, 0.1, 0.8]),
)
def test_agents_of_every_size_pass(limit, chunk, branches, prefix, seed, stop):
    lm = NGramLM("abc", seed=seed, stop_probability=stop)
    sizes = {"max_response_tokens": limit, "chunk_tokens": chunk}
    reward = rewards.WeightedSum([CountReward("a"), StepReward("b")], [1.0, -0.5])
    checks.check_agent(agents.BestOfN(lm, reward, n=branches, **sizes), PROMPTS[:2], seed=seed)
    lookahead = agents.Lookahead(
        lm,
        reward,
        VALUE,
        num_partials=branches,
        keep=(branches + 1) // 2,
        prefix_tokens=prefix,
        **sizes,
    )
    checks.check_agent(lookahead, PROMPTS[:2], seed=seed)


def test_agents_pass_where_the_context_is_shorter_than_the_limit():
    lm = NGramLM("abc", context_length=6, stop_probability=0)
    checks.check_agent(agents.Sampling(lm, **SIZES), PROMPTS)


def test_a_response_may_need_a_larger_budget():
    class Drafts(agents.BestOfN):
        """Writes a draft before the response."""

        def response_usage(self, state):
            return super().response_usage(state) * 2

    agent = Drafts(LM, CountReward(), **SIZES)
    checks.check_agent(agent, PROMPTS, budget_tokens=14)
    with pytest.raises(CheckError, match="got BudgetError"):
        checks.check_agent(agent, PROMPTS)


# Agents that break it.


class Overspends(agents.BestOfN):
    async def search(self, state, ledger, seed):
        return (await self.scored(await self.complete(state, 4, ledger, seed), ledger))[0]


class OverspendsQuietly(agents.BestOfN):
    async def search(self, state, ledger, seed):
        loose = Ledger()
        found = await super().search(state, loose, seed)
        ledger.usage = loose.usage
        return found


class SamplesOutsideTheLedger(agents.BestOfN):
    async def search(self, state, ledger, seed):
        self.language_model.sample([state], 1, 1, seeds=[seed])
        return await super().search(state, ledger, seed)


class ScoresOutsideTheLedger(agents.BestOfN):
    async def search(self, state, ledger, seed):
        found = await super().search(state, ledger, seed)
        self.reward_model.score([state.prompt], ["a"])
        return found


class OwnModel(agents.Sampling):
    """Holds its model under a second name, and spends there."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.drafter = self.language_model

    async def search(self, state, ledger, seed):
        self.drafter.sample([state], 1, 1, seeds=[seed])
        return await super().search(state, ledger, seed)


class Incomplete(agents.Sampling):
    async def search(self, state, ledger, seed):
        found = await super().search(state, ledger, seed)
        return dataclasses.replace(
            found, state=dataclasses.replace(found.state, finish_reason=None)
        )


class TooLong(agents.Sampling):
    async def search(self, state, ledger, seed):
        found = await super().search(state, ledger, seed)
        longer = dataclasses.replace(found.state, response_ids=(1,) * 8, finish_reason="length")
        return dataclasses.replace(found, state=longer)


class WrongEnding(agents.Sampling):
    async def search(self, state, ledger, seed):
        found = await super().search(state, ledger, seed)
        return dataclasses.replace(
            found, state=dataclasses.replace(found.state, finish_reason="stop")
        )


class IgnoresItsSeed(agents.Sampling):
    async def search(self, state, ledger, seed):
        return await super().search(state, ledger, 0)


class DrawsWithoutSeed(agents.Sampling):
    calls = itertools.count()

    async def search(self, state, ledger, seed):
        return await super().search(state, ledger, spawn_seed(seed, next(self.calls)))


class Reorders(agents.Sampling):
    def generate(self, prompts, budget=None, *, seed=0):
        answers = super().generate(prompts, budget, seed=seed)
        return sorted(answers, key=lambda answer: answer.text)


class OneAnswer(agents.Sampling):
    def generate(self, prompts, budget=None, *, seed=0):
        return super().generate(prompts, budget, seed=seed)[:1]


class SeedOfTheBatch(agents.Sampling):
    def generate(self, prompts, budget=None, *, seed=0):
        answers = super().generate(prompts, budget, seed=seed + len(prompts))
        return [dataclasses.replace(answer, seed=seed) for answer in answers]


class WrongScore(agents.BestOfN):
    async def search(self, state, ledger, seed):
        found = await super().search(state, ledger, seed)
        return dataclasses.replace(found, score=found.score + 1)


class InventsAScore(agents.Sampling):
    async def search(self, state, ledger, seed):
        return dataclasses.replace(await super().search(state, ledger, seed), score=1.0)


class StripsItsText(agents.Sampling):
    def generate(self, prompts, budget=None, *, seed=0):
        return [
            dataclasses.replace(answer, text=answer.text.upper())
            for answer in super().generate(prompts, budget, seed=seed)
        ]


class TakesAnyBudget(agents.BestOfN):
    def generate(self, prompts, budget=None, *, seed=0):
        try:
            return super().generate(prompts, budget, seed=seed)
        except BudgetError:
            states = [initial(prompt, self.language_model) for prompt in prompts]
            return [Completion(state) for state in states]


class LongChunks(agents.Sampling):
    def _first_chunk(self, state, completion):
        return Chunk(completion.state.response_ids, (), completion.state.finish_reason)


class OtherChunks(agents.Sampling):
    def _first_chunk(self, state, completion):
        return Chunk((5,) if completion.state.response_ids[0] != 5 else (4,))


class NeverStops(agents.Sampling):
    def _first_chunk(self, state, completion):
        return dataclasses.replace(super()._first_chunk(state, completion), finish_reason=None)


class DecidesAfterTheEnd(agents.Sampling):
    def act(self, states, budget=None, *, seed=0):
        going = [dataclasses.replace(s, response_ids=(), finish_reason=None) for s in states]
        ended = any(is_terminal(state) for state in states)
        return super().act(going if ended else states, budget, seed=seed)


class StartsAnew(agents.Sampling):
    """Answers every state as if nothing were written yet."""

    def act(self, states, budget=None, *, seed=0):
        fresh = [dataclasses.replace(s, response_ids=()) for s in states]
        return super().act(fresh, budget, seed=seed)


@pytest.mark.parametrize(
    ("cls", "match"),
    [
        broken(Overspends, "expected that it stays within Budget"),
        broken(OverspendsQuietly, r"expected at most 7 tokens a prompt"),
        broken(SamplesOutsideTheLedger, "generated tokens that its models were asked for"),
        broken(ScoresOutsideTheLedger, "reward calls that its models were asked for"),
        broken(OwnModel, "generated tokens that its models were asked for"),
        broken(Incomplete, "expected a complete response"),
        broken(TooLong, r"at most max_response_tokens \(7\)"),
        broken(WrongEnding, "'stop' after a stop token, and only then"),
        broken(IgnoresItsSeed, "that seeds 0 and 1 draw different samples"),
        broken(DrawsWithoutSeed, "the same answer for the same seed"),
        broken(Reorders, "in the order of the prompts"),
        broken(OneAnswer, "one Generation a prompt"),
        broken(SeedOfTheBatch, "the same answer in a batch as alone"),
        broken(WrongScore, "score: expected what the reward model gives"),
        broken(InventsAScore, "score: expected what the reward model gives"),
        broken(StripsItsText, "text: expected the decoded response"),
        broken(TakesAnyBudget, r"expected BudgetError for Budget\(tokens=6"),
        broken(LongChunks, r"1 to chunk_tokens \(2\) tokens"),
        broken(OtherChunks, "the beginning of its completion"),
        broken(NeverStops, "finish_reason 'stop' after the chunk is appended"),
        broken(DecidesAfterTheEnd, "expected ValueError for a state that has ended"),
        broken(StartsAnew, "the beginning of its completion"),
    ],
)
def test_broken_agents_fail(cls, match):
    with pytest.raises(CheckError, match=match):
        checks.check_agent(cls(LM, CountReward(), **SIZES), PROMPTS)


def test_a_score_without_a_reward_model():
    with pytest.raises(CheckError, match="expected None, for the agent has no reward model"):
        checks.check_agent(InventsAScore(LM, **SIZES), PROMPTS)


def test_other_objects_are_no_agents():
    with pytest.raises(CheckError, match="without generate, act"):
        checks.check_agent(object(), PROMPTS)
    with pytest.raises(ValueError, match="at least one prompt"):
        checks.check_agent(agents.Sampling(LM), [])


@pytest.mark.parametrize("cls", [agents.BestOfN, SamplesOutsideTheLedger])
def test_the_models_are_left_as_they_were(cls):
    lm, reward = NGramLM("abcde", seed=1), CountReward()
    before = set(vars(lm)), set(vars(reward))
    try:
        checks.check_agent(cls(lm, reward, **SIZES), PROMPTS)
    except CheckError:
        assert cls is SamplesOutsideTheLedger
    assert (set(vars(lm)), set(vars(reward))) == before


def test_models_that_cannot_be_counted_are_named():
    class Fixed:
        __slots__ = ()
        name = "fixed"

        def score(self, prompts, responses):
            return [0.0 for _ in responses]

    with pytest.raises(CheckError, match=r"Fixed: .*__slots__"):
        checks.check_agent(agents.BestOfN(LM, Fixed(), **SIZES), PROMPTS)
