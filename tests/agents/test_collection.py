import pytest

from agents.collection import collect
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import RecordWriter, read_records
from mbrl_text_env.rewards import RewardError
from tests.toys import PROMPTS, CountReward

LM = NGramLM("abc", seed=3)
OPTIONS = {"samples_per_prompt": 3, "max_response_tokens": 6, "seed": 5}


def test_every_response_is_kept_with_tokens_and_score(tmp_path):
    seen = []
    with RecordWriter(tmp_path) as writer:
        collect(
            LM, CountReward(), PROMPTS, writer, batch_prompts=2, on_batch=seen.append, **OPTIONS
        )
    records = read_records(tmp_path)
    assert [len(batch) for batch in seen] == [6, 6, 3]
    assert [r.prompt_id for r in records] == [p.id for p in PROMPTS for _ in range(3)]
    for prompt, row in zip(PROMPTS, range(0, 15, 3), strict=True):
        (chunks,) = LM.sample(
            [initial(prompt, LM)], 3, 6, seeds=[5], params=SamplingParams(temperature=0.7)
        )
        for record, chunk in zip(records[row : row + 3], chunks, strict=True):
            assert record.response_ids == chunk.token_ids
            assert record.logprobs == pytest.approx(chunk.logprobs)
            assert record.response == LM.decode(chunk.token_ids)
            assert record.score == CountReward().score([prompt], [record.response])[0]
            assert record.rewards == {"count": record.score}
        generated = sum(r.usage["generated_tokens"] for r in records[row : row + 3])
        assert generated == pytest.approx(sum(len(chunk) for chunk in chunks))


def test_a_killed_collection_keeps_whole_batches(tmp_path):
    class StopError(Exception):
        pass

    def stop(batch):
        raise StopError

    with pytest.raises(StopError), RecordWriter(tmp_path) as writer:
        collect(LM, CountReward(), PROMPTS, writer, batch_prompts=2, on_batch=stop, **OPTIONS)
    assert len(read_records(tmp_path)) == 6


def test_refusals(tmp_path):
    with RecordWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="at least one prompt"):
            collect(LM, CountReward(), [], writer)
        with pytest.raises(ValueError, match="samples_per_prompt"):
            collect(LM, CountReward(), PROMPTS, writer, samples_per_prompt=0)


class Fussy(CountReward):
    """Cannot score answers to some prompts."""

    refused = frozenset({"ba", "c"})

    def score(self, prompts, responses):
        for prompt in prompts:
            if prompt.text in self.refused:
                raise ZeroDivisionError(f"{prompt.text} is too hard")
        return super().score(prompts, responses)


def test_a_prompt_that_cannot_be_scored_is_left_out(tmp_path):
    with RecordWriter(tmp_path / "all") as writer:
        assert collect(LM, CountReward(), PROMPTS, writer, **OPTIONS) == {}
    with (
        pytest.warns(UserWarning, match="Left out prompt 'ba': .*ZeroDivisionError"),
        RecordWriter(tmp_path / "some") as writer,
    ):
        failed = collect(LM, Fussy(), PROMPTS, writer, **OPTIONS)
    assert sorted(failed) == ["ba", "c"]
    assert "ba is too hard" in failed["ba"]
    kept = [r for r in read_records(tmp_path / "all") if r.prompt_id not in failed]

    def amounts(records):
        return [{**r.usage, "seconds": 0.0} for r in records]

    found = read_records(tmp_path / "some")
    assert [(r.prompt_id, r.response_ids, r.score) for r in found] == [
        (r.prompt_id, r.response_ids, r.score) for r in kept
    ]
    assert amounts(found) == amounts(kept)


@pytest.mark.filterwarnings("ignore:Left out prompt")
def test_a_reward_that_scores_nothing_is_an_error(tmp_path):
    prompts = [prompt for prompt in PROMPTS if prompt.text in Fussy.refused]
    with (
        RecordWriter(tmp_path) as writer,
        pytest.raises(RewardError, match="None of 2 prompts could be scored"),
    ):
        collect(LM, Fussy(), prompts, writer, **OPTIONS)


def test_a_function_a_name_and_texts(tmp_path):
    for i, reward in enumerate([lambda prompt, response: 1.0, "sentiment"]):
        with RecordWriter(tmp_path / str(i)) as writer:
            collect(LM, reward, ["ab", "ba"], writer, **OPTIONS)
        assert [r.prompt_id for r in read_records(tmp_path / str(i))] == ["ab"] * 3 + ["ba"] * 3
    with RecordWriter(tmp_path / "none") as writer, pytest.raises(TypeError, match="got None"):
        collect(LM, None, "ab", writer, **OPTIONS)
