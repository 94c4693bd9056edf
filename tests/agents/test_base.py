import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl_text_env.agents import BestOfN, Lookahead, RandomAgent, Sampling
from mbrl_text_env.agents.base import Completion
from mbrl_text_env.agents.registry import available, make
from mbrl_text_env.agents.search import affordable
from mbrl_text_env.env import TextGenerationEnv
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.mdp import initial, is_terminal, transition
from mbrl_text_env.types import Budget, BudgetError, Chunk, Ledger, Prompt, Usage
from tests.toys import PROMPTS, CountReward, ExactValue, FixedValue, now, toy_options

LM = NGramLM("abc", order=2, seed=3, stop_probability=0.15)
LIMIT = 6


def make_agents(lm=LM, limit=LIMIT):
    reward = CountReward()
    value = FixedValue(lambda text: text.count("a"), lm)
    options = {"max_response_tokens": limit, "chunk_tokens": 2}
    return [
        RandomAgent(lm, **options),
        Sampling(lm, **options),
        Sampling(lm, params=SamplingParams(temperature=0), **options),
        BestOfN(lm, reward, **options),
        BestOfN(lm, reward, n=3, **options),
        Lookahead(lm, reward, **options),
        Lookahead(lm, reward, value, prefix_tokens=2, **options),
        Lookahead(lm, reward, value, num_partials=3, prefix_tokens=64, keep=1, **options),
    ]


@pytest.mark.parametrize("agent", make_agents(), ids=lambda agent: agent.name)
@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(LIMIT, 60), seed=st.integers(0, 999))
def test_no_agent_overspends_and_every_answer_is_complete(agent, tokens, seed):
    for generation in agent.generate(PROMPTS, Budget(tokens=tokens), seed=seed):
        state = generation.completion.state
        assert is_terminal(state)
        assert 1 <= len(state.response_ids) <= LIMIT
        assert generation.usage.generated_tokens <= tokens
        assert generation.text == LM.decode(state.response_ids)
        if generation.completion.score is not None:
            expected = CountReward().score([generation.prompt], [generation.text])
            assert [generation.completion.score] == expected
        if generation.completion.logprobs:
            assert len(generation.completion.logprobs) == len(state.response_ids)


@pytest.mark.parametrize("agent", make_agents(), ids=lambda agent: agent.name)
@settings(max_examples=20, deadline=None)
@given(flops=st.floats(200, 2000), calls=st.integers(1, 9), seed=st.integers(0, 99))
def test_budgets_of_flops_and_reward_calls_hold(agent, flops, calls, seed):
    (generation,) = agent.generate(PROMPTS[:1], Budget(flops=flops, reward_calls=calls), seed=seed)
    assert generation.usage.flops <= flops
    assert generation.usage.reward_calls <= calls


@pytest.mark.parametrize("agent", make_agents(), ids=lambda agent: agent.name)
def test_a_batch_answers_as_single_prompts_do(agent):
    budget = Budget(tokens=30)
    together = agent.generate(PROMPTS, budget, seed=5)
    apart = [agent.generate([prompt], budget, seed=5)[0] for prompt in PROMPTS]
    assert [g.completion for g in together] == [g.completion for g in apart]
    assert [g.usage.generated_tokens for g in together] == [g.usage.generated_tokens for g in apart]


@pytest.mark.parametrize("agent", make_agents()[1:], ids=lambda agent: agent.name)
def test_budgets_too_small_for_a_response(agent):
    with pytest.raises(BudgetError, match="too small for one response"):
        agent.generate(PROMPTS[:1], Budget(tokens=LIMIT - 1))


@pytest.mark.parametrize("agent", make_agents(), ids=lambda agent: agent.name)
def test_acting_chunk_by_chunk_ends_an_episode(agent):
    env = TextGenerationEnv(
        **toy_options(tokenizer=LM, max_response_tokens=LIMIT, max_chunk_tokens=2)
    )
    env.reset(seed=0)
    ended = False
    while not ended:
        (decision,) = agent.act([env.get_state()], Budget(tokens=40), seed=1)
        assert is_terminal(decision.completion.state)
        _, _, terminated, truncated, _ = env.step(decision.chunk.token_ids)
        ended = terminated or truncated
    with pytest.raises(ValueError, match="ended"):
        agent.act([env.get_state()])


def test_the_chunks_of_a_decision_lead_to_its_completion():
    agent = BestOfN(LM, CountReward(), max_response_tokens=LIMIT, chunk_tokens=LIMIT)
    state = initial(PROMPTS[0], LM)
    (decision,) = agent.act([state], seed=2)
    assert transition(state, decision.chunk, LIMIT) == decision.completion.state
    assert decision.chunk.logprobs == decision.completion.logprobs


def test_agents_without_a_reward_model_cannot_score():
    agent = Sampling(LM)
    with pytest.raises(ValueError, match="reward model"):
        now(agent.scored([Completion(initial(PROMPTS[0], LM))], Ledger()))
    with pytest.raises(ValueError, match="at least one prompt"):
        agent.generate([])
    for wrong in ({"max_response_tokens": 0}, {"chunk_tokens": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Sampling(LM, **wrong)


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 200))
def test_affordable_is_the_largest_count(at_most, each, cap):
    ledger = Ledger(Budget(tokens=cap))
    found = affordable(ledger, lambda n: Usage(generated_tokens=n * each), at_most)
    assert found == min(at_most, cap // each)


def test_sampling_draws_from_the_language_model():
    """The frequency of each response is its probability, by enumeration."""
    lm = NGramLM("ab", order=2, seed=1, stop_probability=0.3)
    agent = Sampling(lm, max_response_tokens=2, params=SamplingParams())
    exact = dict(lm.responses(initial(PROMPTS[0], lm), 2))
    draws = [
        agent.generate(PROMPTS[:1], seed=seed)[0].completion.state.response_ids
        for seed in range(3000)
    ]
    for ids, probability in exact.items():
        error = (probability * (1 - probability) / len(draws)) ** 0.5
        assert abs(draws.count(ids) / len(draws) - probability) < 4.5 * error


def test_random_tokens_are_uniform_and_cost_nothing():
    agent = RandomAgent(LM, max_response_tokens=50)
    generations = [agent.generate(PROMPTS[:1], seed=seed)[0] for seed in range(400)]
    tokens = [t for g in generations for t in g.completion.state.response_ids]
    assert {0, 1, 2, 3} == set(tokens)
    assert all(abs(tokens.count(t) / len(tokens) - 0.25) < 0.06 for t in range(4))
    assert generations[0].usage.generated_tokens == 0


def test_greedy_is_the_most_probable_next_token():
    agent = Sampling(LM, params=SamplingParams(temperature=0), max_response_tokens=4)
    state = agent.generate(PROMPTS[:1])[0].completion.state
    prefix: tuple[int, ...] = ()
    for token in state.response_ids:
        assert token == LM.next_probabilities(state.prompt_ids, prefix).argmax()
        prefix = (*prefix, token)


def test_a_perfect_value_beats_blind_choice_in_lookahead():
    """On a world that can be enumerated, at equal tokens, over many seeds."""
    lm, reward = NGramLM("abcd", order=2, seed=4, stop_probability=0.05), CountReward()
    options = {"max_response_tokens": 6, "params": SamplingParams()}
    value = ExactValue(lm, CountReward(), 6)
    blind = BestOfN(lm, reward, n=4, **options)
    guided = Lookahead(
        lm, reward, value, num_partials=8, prefix_tokens=3, keep=2, continuations=2,
        partial_params=SamplingParams(), **options,
    )  # fmt: skip
    misled = Lookahead(
        lm, reward, FixedValue(lambda text: -text.count("a"), lm), num_partials=8,
        prefix_tokens=3, keep=2, continuations=2, partial_params=SamplingParams(), **options,
    )  # fmt: skip
    scores = {}
    for agent, label in ((blind, "blind"), (guided, "guided"), (misled, "misled")):
        drawn = [agent.generate(PROMPTS, seed=seed) for seed in range(40)]
        scores[label] = sum(g.completion.score for row in drawn for g in row) / (40 * len(PROMPTS))
    assert scores["guided"] > scores["blind"] + 0.03
    assert scores["misled"] < scores["blind"]


def test_a_response_as_long_as_the_agents_limit_is_refused():
    """An environment with a larger limit than the agent's; once a search without an end."""
    agent = BestOfN(LM, CountReward(), max_response_tokens=2)
    state = transition(initial(PROMPTS[0], LM), Chunk((1, 2)), 9)
    with pytest.raises(ValueError, match="max_response_tokens"):
        agent.act([state], Budget(tokens=9))


@pytest.mark.parametrize("agent", make_agents()[3:], ids=lambda agent: agent.name)
def test_a_cap_on_what_costs_nothing_is_none(agent):
    """Without it the search would go on for ever."""
    free = NGramLM("abc", order=2, seed=3, flops_per_token=0.0)
    agent.language_model = free
    (generation,) = agent.generate(PROMPTS[:1], Budget(flops=1.0))
    assert 1 <= generation.usage.reward_calls <= 4


def count_a(prompt, response):
    return float(response.count("a"))


@pytest.mark.parametrize("name", sorted(set(available()) - {"candidates"}))
def test_functions_and_names_are_rewards_and_texts_are_prompts(name):
    spec = "guarded:target=2" if name == "guarded" else name  # these rewards have no bound
    agents = [make(spec, LM, reward, max_response_tokens=4) for reward in (count_a, "sentiment")]
    for agent in agents:
        answers = [
            [(g.prompt, g.text) for g in agent.generate(prompts, Budget(tokens=60), seed=1)]
            for prompts in ("ab", ["ab"], Prompt.from_text("ab"), (p for p in ["ab"]))
        ]
        assert all(answer == answers[0] for answer in answers)
        assert answers[0][0][0] == Prompt.from_text("ab")
    if agents[0].reward_model is not None:
        assert [agent.reward_model.name for agent in agents] == ["count_a", "sentiment"]


def test_what_is_no_reward_and_no_prompt():
    for reward in (None, 5):
        with pytest.raises(TypeError, match="Expected a reward, got"):
            BestOfN(LM, reward)
    agent = BestOfN(LM, count_a, n=2, max_response_tokens=4)
    for prompts in (None, 5, [None], [["ab"]], {"text": "ab"}, b"ab"):
        with pytest.raises(ValueError, match="prompts: expected a sequence of Prompt, or of texts"):
            agent.generate(prompts)
    for name in ("builtin", "prompts.jsonl"):
        with pytest.raises(ValueError, match=r"looks like a file.*load_prompts"):
            agent.generate(name)
