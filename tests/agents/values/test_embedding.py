import numpy as np
import pytest
from sklearn.linear_model import Ridge

from mbrl_text_env.agents.values import EmbeddingValue, FitError, load_value
from mbrl_text_env.language_models import CharTokenizer
from mbrl_text_env.records import Record
from mbrl_text_env.types import Ledger, Prompt, TextState
from mbrl_text_env.values import ValueModelError, predict_values
from tests.toys import CountReward, FixedValue, LetterEncoder

TOKENIZER = CharTokenizer("abcde ")


def record(prompt, response, score, reward="count"):
    ids = TOKENIZER.encode_prompt(Prompt.from_text(response)) if response.strip() else (0,)
    state = TextState(Prompt.from_text(prompt), (1,), ids, "stop")
    return Record.from_state(
        state, response=response, score=score, rewards={reward: score}, reward_name=reward,
        agent="sampling", language_model="toy", seed=0,
    )  # fmt: skip


def learnable(count=60, seed=0):
    """The score is the share of "a" in the whole response, which its first half tells of."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(count):
        share = rng.uniform()
        letters = rng.choice(list("ab"), size=12, p=[share, 1 - share])
        text = " ".join("".join(letters[k : k + 3]) for k in range(0, 12, 3))
        records.append(record(f"prompt {i % 10}", text, text.count("a") / 12))
    return records


def state(prompt, response):
    ids = tuple(TOKENIZER.encode_prompt(Prompt.from_text(response)))
    return TextState(Prompt.from_text(prompt), (1,), ids)


def fitted(**options):
    return EmbeddingValue(TOKENIZER, LetterEncoder(), **options).fit(learnable())


def test_it_is_ridge_on_the_embedded_first_half():
    """The article's procedure, written out: prefix of half the words, its text format, alpha 1."""
    records = learnable()
    texts = []
    for r in records:
        words = r.response.split()
        prefix = " ".join(words[: max(1, len(words) // 2)])
        texts.append(f"Prompt: {r.prompt_text}\nResponse: {prefix}")
    reference = Ridge(alpha=1.0).fit(LetterEncoder().encode(texts), [r.score for r in records])
    value = fitted()
    assert value.head_.coef_ == pytest.approx(reference.coef_, rel=1e-4)
    asked = state("prompt 3", "aab ba")
    inputs = LetterEncoder().encode(["Prompt: prompt 3\nResponse: aab ba"])
    assert value.predict([asked]).mean == pytest.approx(reference.predict(inputs), rel=1e-4)


def test_it_learns_what_can_be_learned():
    report = fitted().report_
    assert report.num_records == 60
    assert report.num_prompts == 10
    assert report.correlation > 0.6
    assert report.within_prompt > 0.6
    assert 0.05 < report.std < 0.3


def test_scores_that_are_noise_are_reported_as_such():
    rng = np.random.default_rng(1)
    noise = [record(r.prompt_text, r.response, float(rng.normal())) for r in learnable(120)]
    report = EmbeddingValue(TOKENIZER, LetterEncoder()).fit(noise).report_
    assert abs(report.correlation) < 0.3


def test_constant_scores_are_no_signal():
    same = [record(r.prompt_text, r.response, 0.5) for r in learnable()]
    with pytest.raises(FitError, match=r"0\.5 60 times: there is no signal"):
        EmbeddingValue(TOKENIZER, LetterEncoder()).fit(same)


def test_predictions_are_batched_and_empty_batches_are_empty():
    value = fitted()
    states = [state("prompt 1", text) for text in ("a", "b", "aab ab")]
    together = value.predict(states)
    assert together.mean.tolist() == pytest.approx([value.predict([s]).mean[0] for s in states])
    assert together.std.tolist() == [value.spread_.stds[0]] * 3
    assert value.predict([]).mean.shape == (0,)


def test_its_settings_are_kept(tmp_path):
    value = fitted(alpha=0.3)
    value.save(tmp_path / "value")
    loaded = load_value(tmp_path / "value", TOKENIZER, CountReward(), LetterEncoder())
    states = [state("prompt 1", "aab")]
    assert loaded.predict(states).mean.tolist() == value.predict(states).mean.tolist()
    assert (loaded.alpha, loaded.reward_name_) == (0.3, "count")


def test_what_cannot_be_fitted():
    value = EmbeddingValue(TOKENIZER, LetterEncoder())
    for few in ([], learnable(1)):
        with pytest.raises(FitError, match="at least 2"):
            value.fit(few)
    mixed = [*learnable(3), record("p", "a", 1.0, reward="other")]
    with pytest.raises(FitError, match="one reward model"):
        value.fit(mixed)
    assert not value.is_fitted
    for call in (lambda: value.predict([state("p", "a")]), lambda: value.save("nowhere")):
        with pytest.raises(ValueModelError, match="fit"):
            call()
    for wrong in ({"alpha": 0}, {"prefix_ratio": 0}, {"prefix_ratio": 1.5}):
        with pytest.raises(ValueError, match="alpha"):
            EmbeddingValue(TOKENIZER, LetterEncoder(), **wrong)


def test_records_of_one_prompt_can_be_fitted():
    alone = [record("p", r.response, r.score) for r in learnable(10)]
    report = EmbeddingValue(TOKENIZER, LetterEncoder()).fit(alone).report_
    assert report.num_prompts == 1
    assert np.isnan(report.correlation)


def test_predict_values_checks_and_charges():
    ledger = Ledger()
    found = predict_values(FixedValue(len, TOKENIZER), [state("p", "ab")] * 2, ledgers=[ledger] * 2)
    assert found.mean.tolist() == [2.0, 2.0]
    assert ledger.usage.value_calls == 2
    with pytest.raises(ValueModelError, match="finite mean"):
        predict_values(FixedValue(lambda text: float("nan"), TOKENIZER), [state("p", "a")])


def test_the_real_embedding(minilm):
    records = [
        record(f"prompt {i}", text, score)
        for i in range(6)
        for text, score in (("bad cab dead", -1.0), ("a bed a cab", 1.0))
    ]
    value = EmbeddingValue(TOKENIZER).fit(records)
    assert value.head_.coef_.shape == (384,)
    good, bad = value.predict([state("prompt 9", "a bed"), state("prompt 9", "bad")]).mean
    assert good > bad
    states = [state("p", "ab"), state("p", "ab cd " * 150)]
    flops = value.flops(states)
    assert 0 < flops[0] < flops[1] <= value.flops_bound()
