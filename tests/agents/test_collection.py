from dataclasses import replace

import pytest

from mbrl_text_env.agents.collection import collect
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import RecordsError, RecordWriter, read_records, rescore, run_of
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
        pytest.warns(UserWarning, match="Skipped prompt 'ba': .*ZeroDivisionError"),
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


@pytest.mark.filterwarnings("ignore:Skipped prompt")
def test_a_reward_that_scores_nothing_is_an_error(tmp_path):
    prompts = [prompt for prompt in PROMPTS if prompt.text in Fussy.refused]
    with (
        RecordWriter(tmp_path) as writer,
        pytest.raises(RewardError, match="None of 2 prompts could be scored"),
    ):
        collect(LM, Fussy(), prompts, writer, **OPTIONS)


def collected(folder, prompts=PROMPTS, lm=LM, reward=None, **changes):
    with RecordWriter(folder, shard_rows=2) as writer:
        collect(lm, reward or CountReward(), prompts, writer, **{**OPTIONS, **changes})
    return sorted(
        (r.prompt_id, r.sample, r.response_ids, r.logprobs, r.score) for r in read_records(folder)
    )


def test_more_samples_and_prompts_give_the_rows_of_one_collection(tmp_path):
    whole = collected(tmp_path / "whole", samples_per_prompt=7)
    collected(tmp_path / "a", PROMPTS[:2], samples_per_prompt=2)
    collected(tmp_path / "a", PROMPTS[1:4], samples_per_prompt=4, batch_prompts=2)
    assert collected(tmp_path / "a", samples_per_prompt=7) == whole
    # Fewer are there already.
    assert collected(tmp_path / "a", PROMPTS[:1], samples_per_prompt=1) == whole


def test_what_a_shard_lacks_is_sampled_again(tmp_path):
    whole = collected(tmp_path, batch_prompts=1)
    for name in ("shard-00001.parquet", "shard-00003.parquet"):
        (tmp_path / name).unlink()
    assert collected(tmp_path, batch_prompts=5) == whole


def test_a_prompt_with_some_of_its_samples_is_not_done(tmp_path):
    whole = collected(tmp_path / "whole")
    records = read_records(tmp_path / "whole")
    with RecordWriter(tmp_path / "a") as writer:
        writer.go_on(run_of(tmp_path / "whole"))
        writer.extend(r for i, r in enumerate(records) if i not in (0, 4, 5, 13))
    assert collected(tmp_path / "a") == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [replace(p, metadata={"k": 1}) for p in PROMPTS]}, "another prompt 'ab'"),
        ({"lm": NGramLM("abc", seed=4)}, "language_model.seed: 3 there, 4 here"),
        ({"reward": CountReward("b")}, "reward.letter: a there, b here"),
        ({"seed": 6}, "seed: 5 there, 6 here"),
        ({"max_response_tokens": 7}, "max_response_tokens: 6 there, 7 here"),
        ({"params": SamplingParams(temperature=0.8)}, "params.temperature: 0.7 there, 0.8 here"),
    ],
)
def test_records_of_something_else_are_not_mixed(tmp_path, changes, message):
    whole = collected(tmp_path)
    with pytest.raises(RecordsError, match=message):
        collected(tmp_path, **changes)
    assert collected(tmp_path) == whole


def test_records_that_do_not_say_what_they_depend_on(tmp_path):
    collected(tmp_path / "a")
    with RecordWriter(tmp_path / "b") as writer:
        writer.extend(read_records(tmp_path / "a"))
    with pytest.raises(RecordsError, match="do not say what they depend on"):
        collected(tmp_path / "b")


def test_a_shard_that_was_copied_is_named(tmp_path):
    collected(tmp_path)
    shard = tmp_path / "shard-00000.parquet"
    (tmp_path / "shard-00007.parquet").write_bytes(shard.read_bytes())
    with pytest.raises(RecordsError, match="sample 0 of prompt 'ab' twice"):
        collected(tmp_path)


def test_a_rescored_folder_is_gone_on_with_by_its_new_reward(tmp_path):
    collected(tmp_path / "a")
    rescore(tmp_path / "a", CountReward("b"), tmp_path / "b")
    whole = collected(tmp_path / "whole", reward=CountReward("b"), samples_per_prompt=5)
    assert collected(tmp_path / "b", reward=CountReward("b"), samples_per_prompt=5) == whole
    with pytest.raises(RecordsError, match=r"reward\.letter"):
        collected(tmp_path / "b")


def test_a_function_a_name_and_texts(tmp_path):
    for i, reward in enumerate([lambda prompt, response: 1.0, "sentiment"]):
        with RecordWriter(tmp_path / str(i)) as writer:
            collect(LM, reward, ["ab", "ba"], writer, **OPTIONS)
        assert [r.prompt_id for r in read_records(tmp_path / str(i))] == ["ab"] * 3 + ["ba"] * 3
    with RecordWriter(tmp_path / "none") as writer, pytest.raises(TypeError, match="got None"):
        collect(LM, None, "ab", writer, **OPTIONS)
