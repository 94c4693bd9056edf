"""Ridge regression on token embeddings."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.agents.values import FitError, TokenEmbeddingValue, load_value
from mbrl_text_env.checks import check_value_model
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.types import Prompt, TextState
from mbrl_text_env.values import ValueModelError
from tests.agents.values.worlds import LM, prefixes, toy_records
from tests.toys import CountReward


class Embedding:
    """What of a transformer is read: two numbers a token, x and x^2 / 10."""

    def __init__(self, size):
        ids = torch.arange(float(size))
        self.table = torch.nn.Embedding.from_pretrained(torch.stack([ids, ids**2 / 10], 1))

    def get_input_embeddings(self):
        return self.table


class WithTable(NGramLM):
    model = Embedding(LM.vocab_size)


TABLE = WithTable("abcde", 2, seed=1)


def means(rows):
    ids = [np.array(row, dtype=float) for row in rows]
    return np.array([[x.mean(), (x**2).mean() / 10] if len(x) else [0.0, 0.0] for x in ids])


def state(prompt_ids, response_ids):
    return TextState(Prompt.from_text("x"), tuple(prompt_ids), tuple(response_ids))


def test_it_is_ridge_on_the_mean_and_on_what_is_taken_up_of_complete_responses():
    records = toy_records()
    value = TokenEmbeddingValue(TABLE, alphas=(3.0,)).fit(records)

    def inputs(rows):
        scaled = scaler.transform(value.inputs(rows))
        assert value.inputs(rows)[:, :2] == pytest.approx(means(r.response_ids for r in rows))
        return scaled * [1, 1, 20]

    states = [record.state() for record in records]
    scaler = StandardScaler().fit(value.inputs(states))
    reference = Ridge(alpha=3.0).fit(inputs(states), [r.score for r in records])
    expected = reference.predict(inputs(prefixes()))
    assert value.predict(prefixes()).mean == pytest.approx(expected, abs=1e-6)


def test_what_is_taken_up_is_weighted_by_how_rare_it_is():
    # Prompts (0, 1), (0, 2) and (0, 2): 0 is in all three, 1 in one, 2 in two, 3 in none.
    records = [
        replace(record, prompt_id=f"p{i}", prompt_ids=(0, 1 if i == 0 else 2))
        for i, record in enumerate(toy_records()[:3])
    ]
    value = TokenEmbeddingValue(TABLE)
    value.samples(records)
    table = TABLE.model.table.weight.double().numpy()
    rows = table - table.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rare, common, new = math.log(4 / 2), math.log(4 / 3), math.log(4)
    nearest = {token: max(rows[token] @ rows[4], rows[token] @ rows[1]) for token in (1, 2, 3)}
    expected = [
        (rare * 1.0 + common * nearest[2]) / (rare + common),
        nearest[3],
        0.0,
        0.0,
    ]
    assert new == value.rarest_
    states = [state(*each) for each in (((0, 1, 2), (4, 1)), ((0, 3), (4, 1)), ((0,), (4,)))]
    found = value.inputs([*states, state((1,), ())])
    assert found[:, 2] == pytest.approx(expected)


def test_what_it_costs_grows_with_prompt_and_response():
    value = TokenEmbeddingValue(TABLE).fit(toy_records())
    states = prefixes()
    # Two dimensions: similarities, then sums and norms, then the head.
    sizes = [(len(s.prompt_ids), len(s.response_ids)) for s in states]
    assert value.flops(states).tolist() == [2 * (2 * p * r + 4 * (p + r) + 2) for p, r in sizes]
    half = TABLE.context_length / 2
    assert value.flops_bound() == 2 * (2 * half**2 + 8 * half + 2)
    check_value_model(value, states)


def test_it_is_kept(tmp_path):
    value = TokenEmbeddingValue(TABLE).fit(toy_records())
    value.save(tmp_path / "value")
    again = load_value(tmp_path / "value", TABLE, CountReward())
    assert isinstance(again, TokenEmbeddingValue)
    assert again.alphas == value.alphas
    assert again.predict(prefixes()).mean.tolist() == value.predict(prefixes()).mean.tolist()


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueModelError, match=r"readable token embeddings.*NGramLM"):
        TokenEmbeddingValue(LM).fit(toy_records())
    with pytest.raises(ValueError, match="alphas"):
        TokenEmbeddingValue(TABLE, alphas=())
    blind = toy_records()
    object.__setattr__(blind[0], "response_ids", ())
    with pytest.raises(FitError, match="token ids of the response"):
        TokenEmbeddingValue(TABLE).fit(blind)
