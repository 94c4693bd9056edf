"""Ridge regression on the mean of token embeddings."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mbrl_text_env.agents.values import FitError, TokenEmbeddingValue, load_value
from mbrl_text_env.checks import check_value_model
from mbrl_text_env.language_models import NGramLM
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


def test_it_is_ridge_on_the_mean_of_complete_responses_applied_to_prefixes():
    records = toy_records()
    value = TokenEmbeddingValue(TABLE, alphas=(3.0,)).fit(records)
    reference = make_pipeline(StandardScaler(), Ridge(alpha=3.0))
    reference.fit(means(r.response_ids for r in records), [r.score for r in records])
    expected = reference.predict(means(s.response_ids for s in prefixes()))
    assert value.predict(prefixes()).mean == pytest.approx(expected, abs=1e-6)


def test_it_costs_the_sum_of_the_embeddings_and_the_head():
    value = TokenEmbeddingValue(TABLE).fit(toy_records())
    states = prefixes()
    expected = [2 * (len(s.response_ids) + 2) for s in states]
    assert value.flops(states).tolist() == expected
    assert value.flops_bound() == 2 * (TABLE.context_length + 2)
    check_value_model(value, states)


def test_it_is_kept(tmp_path):
    value = TokenEmbeddingValue(TABLE).fit(toy_records())
    value.save(tmp_path / "value")
    again = load_value(tmp_path / "value", TABLE, CountReward())
    assert isinstance(again, TokenEmbeddingValue)
    assert again.alphas == value.alphas
    assert again.predict(prefixes()).mean.tolist() == value.predict(prefixes()).mean.tolist()


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueModelError, match=r"token embeddings can be read.*NGramLM"):
        TokenEmbeddingValue(LM).fit(toy_records())
    with pytest.raises(ValueError, match="alphas"):
        TokenEmbeddingValue(TABLE, alphas=())
    blind = toy_records()
    object.__setattr__(blind[0], "response_ids", ())
    with pytest.raises(FitError, match="token ids of the response"):
        TokenEmbeddingValue(TABLE).fit(blind)
