import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbrl_text_env.agents import ParticleFilter, beam
from mbrl_text_env.agents.beam import systematic
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.mdp import initial
from mbrl_text_env.types import Prompt
from mbrl_text_env.values import ValueEstimate
from tests.toys import PROMPTS, CountReward, FixedValue


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-3),
    st.floats(0, 1, exclude_max=True),
)
def test_each_index_comes_as_often_as_its_weight_says(weights, uniform):
    w = np.array(weights) / sum(weights)
    chosen = systematic(w, uniform)
    assert len(chosen) == len(w)
    assert chosen == sorted(chosen)
    counts = np.bincount(chosen, minlength=len(w))
    assert (np.abs(counts - len(w) * w) < 1 + 1e-6).all()


def test_resampling_is_unbiased():
    w = np.array([0.5, 0.3, 0.15, 0.05])
    grid = (np.arange(1000) + 0.5) / 1000
    counts = sum(np.bincount(systematic(w, u), minlength=4) for u in grid)
    assert counts / counts.sum() == pytest.approx(w, abs=1e-3)


class TwistValue:
    """The exact twist: temperature x log of the mean of exp(reward / temperature) from here on."""

    is_fitted = True

    def __init__(self, lm, reward, limit, temperature):
        self.lm, self.reward, self.limit, self.temperature = lm, reward, limit, temperature

    def predict(self, states):
        means = []
        for state in states:
            ids, weights = zip(*self.lm.responses(state, self.limit), strict=True)
            texts = [self.lm.decode(i) for i in ids]
            rewards = np.array(self.reward.score([state.prompt] * len(texts), texts))
            tilted = np.average(np.exp(rewards / self.temperature), weights=weights)
            means.append(self.temperature * np.log(tilted))
        return ValueEstimate(np.array(means), np.zeros(len(means)))


def test_particles_tend_to_the_tilted_distribution():
    """With the exact twist: the distribution of the language model times exp(reward / T)."""
    lm, reward, temperature = NGramLM("ab", seed=4, stop_probability=0.0), CountReward(), 0.3
    prompt = Prompt.from_text("ab")
    ids, weights = zip(*lm.responses(initial(prompt, lm), 3), strict=True)
    texts = [lm.decode(i) for i in ids]
    target = np.array(weights) * np.exp(np.array(reward.score([None] * 8, texts)) / temperature)
    target /= target.sum()
    agent = ParticleFilter(
        lm,
        reward,
        TwistValue(lm, reward, 3, temperature),
        particles=400,
        temperature=temperature,
        max_response_tokens=3,
        chunk_tokens=1,
        params=SamplingParams(temperature=1.0),
    )
    found = dict.fromkeys(texts, 0.0)
    for seed in range(10):
        [(_, tree)] = agent.explore([prompt], seed=seed)
        assert sum(node.visits for node in tree.complete()) == 400
        for node in tree.complete():
            found[lm.decode(node.state.response_ids)] += node.visits
    shares = np.array([found[text] for text in texts])
    assert shares / shares.sum() == pytest.approx(target, abs=0.03)


def test_equal_values_are_never_resampled():
    lm = NGramLM("abc", seed=3, stop_probability=0.0)
    agent = ParticleFilter(
        lm, CountReward(), FixedValue(lambda t: 0.0, lm), particles=6, max_response_tokens=6
    )
    [(_, tree)] = agent.explore(PROMPTS[:1])
    for node in tree.nodes[1:]:
        if not node.is_terminal:
            assert node.visits == node.copies == node.samples
    assert sum(node.visits for node in tree.complete()) == 6


def test_a_good_particle_takes_the_place_of_the_others():
    lm = NGramLM("abcd", seed=3, concentration=50.0, stop_probability=0.0)
    agent = ParticleFilter(
        lm,
        CountReward(),
        FixedValue(lambda t: t.count("a"), lm),
        particles=16,
        temperature=0.05,
        max_response_tokens=4,
        chunk_tokens=1,
    )
    [(answer, tree)] = agent.explore(PROMPTS[:1])
    assert tree.chosen.visits >= 14
    assert answer.text == "aaaa"


def test_a_particle_that_has_ended_is_counted_once():
    lm = NGramLM("abc", seed=3, stop_probability=0.4)
    value = FixedValue(lambda t: t.count("a"), lm)
    agent = ParticleFilter(lm, CountReward(), value, particles=6, chunk_tokens=1)
    for seed in range(5):
        [(_, tree)] = agent.explore(PROMPTS[:1], seed=seed)
        assert sum(node.visits for node in tree.complete()) == 6


def test_resampling_is_independent_of_the_chunks(monkeypatch):
    """The uniform number must not come from a stream that a chunk was drawn from."""
    used, drawn = [], []
    real = beam.stream
    monkeypatch.setattr(beam, "stream", lambda *args: used.append(args) or real(*args))
    lm = NGramLM("abc", seed=3, stop_probability=0.0)
    sample = lm.sample

    def sampled(states, *args, seeds, **options):
        drawn.extend(zip(seeds, states, strict=True))
        return sample(states, *args, seeds=seeds, **options)

    monkeypatch.setattr(lm, "sample", sampled)
    ParticleFilter(lm, CountReward(), particles=4, max_response_tokens=4).explore(PROMPTS[:1])
    [(seed, state, _)] = used
    assert {seed_of for seed_of, root in drawn if root == state}
    assert (seed, state) not in drawn


@pytest.mark.parametrize("wrong", [{"particles": 0}, {"temperature": 0.0}, {"temperature": -1.0}])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ParticleFilter(NGramLM("ab"), CountReward(), None, **wrong)
