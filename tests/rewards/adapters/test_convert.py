"""Functions as reward models and back, TRL's own functions and trainer among them."""

from __future__ import annotations

import asyncio
import copy
import functools
import pickle
from typing import ClassVar

import numpy as np
import pytest

from mbrl_text_env.rewards.adapters import (
    FunctionReward,
    TRLFunctionReward,
    as_reward_model,
    to_openrlhf,
    to_trl,
    to_verl,
)
from mbrl_text_env.rewards.base import RewardError, applies_to, score_responses
from mbrl_text_env.rewards.evaluators.relevance import RelevanceReward
from mbrl_text_env.rewards.evaluators.sentiment import SentimentReward
from mbrl_text_env.rewards.verifiable.constraints import ConstraintsReward
from mbrl_text_env.types import Message, Prompt

CHAT = Prompt.from_text("Capital of France?", id="chat", metadata={"answer": "Paris"})
PLAIN = Prompt.from_text("The capital is", id="plain", chat=False, metadata={"answer": "Rome"})
TURNS = Prompt("turns", (Message("system", "Be brief."), Message("user", "Hi")))


def brevity(prompt, response):
    return -len(response.split())


def scaled(prompt, response, scale=2.0, **options):
    return scale * len(response)


def has_answer(completions, answer, **kwargs):
    return [
        float(word in (c if isinstance(c, str) else c[0]["content"]))
        for c, word in zip(completions, answer, strict=True)
    ]


def only_short(prompts, completions):
    return [None if len(c) > 5 else 1.0 for c in completions]


class CallableReward:
    def __call__(self, completions, **kwargs):
        return [1.0 for _ in completions]


async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def words(text):
    return text.split()


def score(reward, prompts, responses):
    return score_responses(as_reward_model(reward), prompts, responses).total.tolist()


def recorder(*names):
    """A TRL function that keeps what it was called with, under a signature with these names."""
    calls = []
    namespace = {"calls": calls}
    exec(f"def f({', '.join(names)}):\n calls.append(locals())\n return [0.0]", namespace)  # noqa: S102
    return namespace["f"], calls


class TestWhatIsAccepted:
    def test_a_reward_model_is_returned_as_it_is(self):
        reward = SentimentReward()
        assert as_reward_model(reward) is reward

    def test_a_function_of_two_texts(self):
        assert score(brevity, [CHAT, PLAIN], ["one two", "one"]) == [-2.0, -1.0]
        assert score(lambda p, r: p == "Capital of France?", [CHAT], ["x"]) == [1.0]

    def test_further_arguments_of_a_function_may_have_defaults(self):
        assert score(scaled, [CHAT], ["abc"]) == [6.0]
        assert score(functools.partial(scaled, scale=3.0), [CHAT], ["abc"]) == [9.0]

    def test_a_function_of_trl(self):
        assert score(has_answer, [CHAT, CHAT], ["It is Paris.", "Rome"]) == [1.0, 0.0]

    def test_an_async_function_of_trl(self):
        assert score(later, [PLAIN], ["abc"]) == [3.0]

        async def notebook():
            return score(later, [PLAIN], ["abc"])

        assert asyncio.run(notebook()) == [3.0]

    def test_an_async_function_of_two_texts(self):
        async def letters(prompt, response):
            await asyncio.sleep(0)
            return len(response)

        assert score(letters, [CHAT, PLAIN], ["abc", ""]) == [3.0, 0.0]

    @pytest.mark.parametrize("convert", [to_trl, to_verl, to_openrlhf])
    def test_what_was_made_of_a_reward_model_becomes_that_one(self, convert):
        reward = ConstraintsReward()
        assert as_reward_model(convert(reward)) is reward

    @pytest.mark.parametrize(
        ("reward", "name"),
        [
            (brevity, "brevity"),
            (has_answer, "has_answer"),
            (functools.partial(functools.partial(scaled, scale=1.0)), "scaled"),
            (CallableReward(), "CallableReward"),
            (lambda p, r: 0.0, "<lambda>"),
        ],
    )
    def test_it_is_named_as_trl_names_it(self, reward, name):
        assert as_reward_model(reward).name == name

    @pytest.mark.parametrize("reward", [3, None, len, max, lambda: 0.0, lambda p, r, m: 0.0, print])
    def test_anything_else_is_an_error_that_shows_what_is_accepted(self, reward):
        message = (
            r"(?s)Expected a reward, got .*score\(prompts, responses\) -> float64\[B\].*"
            r"f\(prompt, response\) -> float.*f\(prompts, completions, \*\*columns\) -> list.*"
            r"OpenEnv.*verl.*OpenRLHF"
        )
        with pytest.raises(TypeError, match=message):
            as_reward_model(reward)

    def test_a_function_of_verifiers_is_not_taken_for_one_of_two_texts(self):
        with pytest.raises(TypeError, match=r"Expected a reward, got .*completion, answer"):
            as_reward_model(lambda completion, answer: 0.0)

    def test_keyword_only_arguments_make_no_function_of_two_texts(self):
        def f(prompt, *, response):
            return 0.0

        with pytest.raises(TypeError, match=r"function f\(prompt, \*, response\)|got function f"):
            as_reward_model(f)

    def test_a_neural_network_is_no_function_of_two_texts(self, minilm):
        with pytest.raises(TypeError, match="Expected a reward, got BertModel"):
            as_reward_model(minilm[0].auto_model)

    def test_a_class_is_an_error_that_says_to_make_an_object(self):
        with pytest.raises(
            TypeError, match=r"the class SentimentReward.*SentimentReward\(\.\.\.\)"
        ):
            as_reward_model(SentimentReward)

    @pytest.mark.parametrize("function", [brevity, has_answer, CallableReward()])
    def test_it_pickles_if_the_function_does(self, function):
        unpickled = pickle.loads(pickle.dumps(as_reward_model(function)))  # noqa: S301
        assert score(unpickled, [CHAT], ["Paris"]) == score(function, [CHAT], ["Paris"])


class TestFunctionErrors:
    def test_an_exception_names_the_very_response(self):
        def picky(prompt, response):
            return 1 / len(response)

        message = (
            r"'picky': raised ZeroDivisionError: division by zero \(.*test_convert\.py, line \d+\) "
            r"for prompt 'plain', response"
        )
        with pytest.raises(RewardError, match=message):
            score(picky, [CHAT, PLAIN], ["a", ""])

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "'f' does not apply to prompt 'chat': it returned None for response 'abc'"),
            ("good", "'f': expected a number for prompt 'chat', response 'abc', got 'good'"),
            ("0.5", "'f': expected a number for prompt 'chat', response 'abc', got '0.5'"),
            ([1.0], r"expected a number .* got \[1.0\]"),
            (float("nan"), "'f': expected finite scores, got nan for prompt 'chat'"),
        ],
    )
    def test_what_is_no_number_is_an_error(self, value, message):
        def f(prompt, response):
            return value

        with pytest.raises(RewardError, match=message):
            score(f, [CHAT], ["abc"])


class TestTRLCalls:
    def test_chats_are_lists_of_messages(self):
        function, calls = recorder("prompts", "completions")
        score(function, [TURNS], ["Hello"])
        assert calls == [
            {
                "prompts": [
                    [
                        {"role": "system", "content": "Be brief."},
                        {"role": "user", "content": "Hi"},
                    ]
                ],
                "completions": [[{"role": "assistant", "content": "Hello"}]],
            }
        ]

    def test_plain_text_is_strings(self):
        function, calls = recorder("prompts", "completions")
        score(function, [PLAIN], [" Rome"])
        assert calls == [{"prompts": ["The capital is"], "completions": [" Rome"]}]

    def test_a_mixed_batch_makes_a_call_for_each_kind_and_keeps_the_order(self):
        seen = []

        def kinds(completions, **kwargs):
            seen.append({type(completion) for completion in completions})
            return has_answer(completions, **kwargs)

        prompts = [CHAT, PLAIN, CHAT, PLAIN]
        assert score(kinds, prompts, ["Paris", "Paris", "Rome", "Rome"]) == [1.0, 0.0, 0.0, 1.0]
        assert sorted(map(str, seen)) == ["{<class 'list'>}", "{<class 'str'>}"]

    def test_only_what_the_function_names_is_passed(self):
        function, calls = recorder("completions", "answer")
        score(function, [PLAIN], ["x"])
        assert calls == [{"completions": ["x"], "answer": ["Rome"]}]

    def test_all_is_passed_to_keywords(self):
        function, calls = recorder("completions", "**kwargs")
        score(function, [PLAIN], ["x"])
        kwargs = calls[0]["kwargs"]
        assert set(kwargs) == {"prompts", "answer", "trainer_state", "log_extra", "log_metric"}
        assert kwargs["trainer_state"] is None
        assert kwargs["log_extra"]("column", [1]) is None
        assert kwargs["log_metric"]("metric", 0.5) is None
        assert kwargs["log_metric"](name="metric", value=0.5) is None

    def test_metadata_cannot_take_the_place_of_the_texts(self):
        prompt = Prompt.from_text(
            "Hi", chat=False, metadata={"completions": "fake", "completion_ids": [1]}
        )
        function, calls = recorder("completions", "**kwargs")
        score(function, [prompt], ["x"])
        assert calls[0]["completions"] == ["x"]
        assert "completion_ids" not in calls[0]["kwargs"]

    def test_optional_columns_are_none_where_a_prompt_lacks_them(self):
        def optional(completions, answer=None, **kwargs):
            return [0.0 if value is None else 1.0 for value in answer or [None] * len(completions)]

        bare = Prompt.from_text("Hi", chat=False)
        assert score(optional, [PLAIN, bare], ["x", "y"]) == [1.0, 0.0]
        assert score(optional, [bare], ["y"]) == [0.0]

    def test_token_ids_come_from_encode(self):
        function, calls = recorder("completion_ids", "**kwargs")
        reward = as_reward_model(function, encode=words)
        score(reward, [PLAIN], ["one two"])
        assert calls[0]["completion_ids"] == [["one", "two"]]

    def test_a_function_that_needs_token_ids_is_refused_without_encode(self):
        function, _ = recorder("completions", "completion_ids")
        with pytest.raises(TypeError, match=r"'f' needs `completion_ids`.*encode=\.\.\."):
            as_reward_model(function)

    def test_token_ids_that_are_optional_are_left_out(self):
        function, calls = recorder("completions", "completion_ids=None")
        score(function, [PLAIN], ["x"])
        assert calls[0]["completion_ids"] is None

    def test_it_applies_to_prompts_with_the_columns_that_it_requires(self):
        reward = as_reward_model(has_answer)
        assert applies_to(reward, CHAT)
        assert not applies_to(reward, TURNS)
        with pytest.raises(
            RewardError, match=r"'has_answer', prompt 'turns': expected \['answer'\].*keys \[\]"
        ):
            score(reward, [CHAT, TURNS], ["x", "y"])

    def test_none_is_an_error_that_names_the_prompt(self):
        assert score(only_short, [PLAIN], ["short"]) == [1.0]
        with pytest.raises(RewardError, match="'only_short' does not apply to prompt 'plain'"):
            score(only_short, [PLAIN, PLAIN], ["short", "too long"])

    def test_too_few_values_are_an_error(self):
        def first(completions, **kwargs):
            return [0.0]

        with pytest.raises(RewardError, match=r"'first': expected 2 values.*got 1.*'plain'.*'x'"):
            score(first, [PLAIN, PLAIN], ["x", "y"])
        with pytest.raises(RewardError, match=r"expected 1 values.*got None.*'plain'.*'x'"):
            score(lambda completions: None, [PLAIN], ["x"])

    def test_an_exception_is_an_error_that_names_function_and_prompt(self):
        def broken(completions, **kwargs):
            raise KeyError("oops")

        with pytest.raises(RewardError, match=r"'broken', prompt 'plain'.*KeyError: 'oops'.*'x'"):
            score(broken, [PLAIN], ["x"])


class TestToTRL:
    def test_strings_and_messages(self):
        function = to_trl(SentimentReward())
        assert function.__name__ == "sentiment"
        assert function(prompts=["How was it?"], completions=["It was good."]) == [0.4404]
        prompt = [{"role": "user", "content": "How was it?"}]
        completion = [{"role": "assistant", "content": "It was good."}]
        assert function(prompts=[prompt], completions=[completion]) == [0.4404]
        assert function(prompts=[prompt], completions=[[{"content": "It was good."}]]) == [0.4404]

    def test_of_several_messages_those_of_the_assistant_count(self):
        completion = [
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "It was terrible."},
            {"role": "assistant", "content": "It was good."},
        ]
        assert to_trl(SentimentReward())(prompts=["x"], completions=[completion]) == [0.4404]

    def test_columns_are_metadata_and_none_says_that_it_does_not_apply(self):
        values = to_trl(ConstraintsReward())(
            prompts=["a", "b"],
            completions=["One, two.", "One, two."],
            constraints=[None, [{"type": "no_commas"}, {"type": "max_words", "value": 2}]],
            completion_ids=[[1], [2]],
            trainer_state=object(),
            log_extra=print,
            log_metric=print,
        )
        assert values == [None, 0.5]

    def test_a_failure_is_not_swallowed_and_names_the_row(self):
        function = to_trl(FunctionReward(lambda prompt, response: float("nan")))
        with pytest.raises(RewardError, match="got nan for prompt 'row 7', response 'x'"):
            function(prompts=["a"], completions=["x"], id=["row 7"])
        with pytest.raises(RewardError, match="got nan for prompt 'a', response 'x'"):
            function(prompts=["a"], completions=["x"])

    def test_there_and_back(self):
        responses = ["It was good.", "It was terrible.", "Paris"]
        prompts = [CHAT, PLAIN, TURNS]
        for reward in (SentimentReward(), RelevanceReward()):
            there = TRLFunctionReward(to_trl(reward))
            assert there.name == reward.name
            assert score(there, prompts, responses) == pytest.approx(
                score(reward, prompts, responses), abs=1e-6
            )

    def test_back_and_there(self):
        columns = {"prompts": ["Capital?", "Capital?"], "completions": ["Paris", "Rome"]}
        function = to_trl(as_reward_model(has_answer))
        assert function(**columns, answer=["Paris", "Paris"]) == [1.0, 0.0]
        assert function(**columns) == [None, None]

    def test_it_pickles(self):
        function = pickle.loads(pickle.dumps(to_trl(SentimentReward())))  # noqa: S301
        assert function(prompts=["x"], completions=["It was good."]) == [0.4404]
        assert function.__name__ == "sentiment"


def vowels(prompt, response):
    return float(sum(response.count(vowel) for vowel in "aeiou"))


class TestTRL:
    """TRL's own functions and trainer."""

    @pytest.fixture(autouse=True)
    def _trl(self):
        pytest.importorskip("trl")

    def test_think_format(self):
        from trl.rewards import think_format_reward

        responses = ["<think>Hm.</think>Paris", "Paris"]
        assert score(think_format_reward, [CHAT, CHAT], responses) == [1.0, 0.0]

    def test_repetition_penalty(self):
        from trl.rewards import get_repetition_penalty_reward

        reward = as_reward_model(get_repetition_penalty_reward(ngram_size=2), encode=words)
        assert isinstance(reward, TRLFunctionReward)
        assert reward.name == "repetition_penalty_reward"
        assert score(reward, [CHAT, CHAT], ["a b c d", "a a a a a"]) == [0.0, -0.75]

    def test_overlong_punishment(self):
        from trl.rewards import get_soft_overlong_punishment

        punishment = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
        with pytest.raises(TypeError, match="needs `completion_ids`"):
            as_reward_model(punishment)
        reward = as_reward_model(punishment, encode=words)
        assert score(reward, [PLAIN] * 2, ["a " * 90, "a " * 80]) == [-0.5, 0.0]

    def test_accuracy(self):
        pytest.importorskip("math_verify")
        from trl.rewards import accuracy_reward

        prompt = Prompt.from_text("1/3 + 1/3?", metadata={"solution": r"\frac{2}{3}"})
        responses = [r"\boxed{\frac{2}{3}}", r"\boxed{1}"]
        assert score(accuracy_reward, [prompt] * 2, responses) == [1.0, 0.0]
        assert not applies_to(as_reward_model(accuracy_reward), CHAT)

    def test_the_trainer_trains_with_our_rewards(self, minilm, tmp_path):
        import torch
        from datasets import Dataset
        from transformers import LlamaConfig, LlamaForCausalLM
        from trl import GRPOConfig, GRPOTrainer

        torch.manual_seed(0)
        tokenizer = copy.deepcopy(minilm.tokenizer)
        tokenizer.eos_token = tokenizer.sep_token
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.cls_token_id,
            )
        )
        rows = [{"prompt": "Tell me.", "constraints": None}] * 2 + [
            {"prompt": "Be brief.", "constraints": [{"type": "max_words", "value": 3}]}
        ] * 2
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=[
                to_trl(SentimentReward()),
                to_trl(ConstraintsReward()),
                to_trl(as_reward_model(vowels)),
            ],
            train_dataset=Dataset.from_list(rows),
            args=GRPOConfig(
                output_dir=str(tmp_path),
                max_steps=2,
                num_generations=2,
                per_device_train_batch_size=4,
                max_completion_length=8,
                report_to=[],
                use_cpu=True,
                logging_steps=1,
                learning_rate=0.01,
                disable_tqdm=True,
                save_strategy="no",
                bf16=False,
            ),
        )
        before = {name: weights.clone() for name, weights in model.state_dict().items()}
        trainer.train()
        assert any(not torch.equal(model.state_dict()[name], before[name]) for name in before)
        logged = [entry for entry in trainer.state.log_history if "rewards/sentiment/mean" in entry]
        assert len(logged) == 2
        assert all(-1.0 <= entry["rewards/sentiment/mean"] <= 1.0 for entry in logged)
        # A step without a prompt that has constraints has no mean of theirs.
        shares = np.array([entry["rewards/constraints/mean"] for entry in logged], dtype=float)
        shares = shares[np.isfinite(shares)]
        assert shares.size
        assert ((shares >= 0.0) & (shares <= 1.0)).all()


class TestColumnsOfDatasets:
    """Arrow gives every row the keys of all rows, None where a row has none."""

    CONSTRAINTS: ClassVar = [
        [
            {"type": "min_words", "value": 2, "keyword": None},
            {"type": "keyword_count", "keyword": "a", "value": 1},
        ],
        [{"type": "no_commas", "keyword": None, "value": None}],
    ]

    @pytest.mark.parametrize("convert", [list, lambda rows: np.array(rows, dtype=object)])
    def test_arguments_that_are_none_are_not_given(self, convert):
        function = to_trl(ConstraintsReward())
        columns = {"constraints": convert(self.CONSTRAINTS), "rubric": None, "id": [None, 7]}
        found = function(prompts=["Say a.", "Say c."], completions=["a b", "c"], **columns)
        assert found == [1.0, 1.0]
        prompt = Prompt.from_text("Say c.", metadata={"constraints": self.CONSTRAINTS[1]})
        assert score(ConstraintsReward(), [prompt] * 2, ["c", "c, d"]) == [1.0, 0.0]

    @pytest.mark.parametrize("column", [["Paris"], "Paris", 5, {"a": 1}])
    def test_a_column_that_is_no_list_of_a_value_each(self, column):
        with pytest.raises(RewardError, match="'sentiment': expected answer to be a list"):
            to_trl("sentiment")(prompts=["a", "b"], completions=["a", "b"], answer=column)

    def test_a_required_column_that_is_none_is_missing(self):
        prompt = Prompt.from_text("Capital?", metadata={"answer": None})
        assert not applies_to(as_reward_model(has_answer), prompt)


class TestNames:
    def test_a_name_is_looked_up(self):
        assert as_reward_model("sentiment").name == "sentiment"
        assert as_reward_model("2*sentiment").name == "2*sentiment"
        assert to_verl("sentiment").__name__ == "sentiment"
        assert to_trl(brevity).__name__ == "brevity"

    def test_a_name_that_is_not_known(self):
        with pytest.raises(ValueError, match="Did you mean 'sentiment'"):
            as_reward_model("sentimant")

    @pytest.mark.parametrize("reward", [None, 5, b"sentiment", ["sentiment"]])
    def test_what_is_none(self, reward):
        with pytest.raises(
            TypeError, match=r"(?s)Expected a reward, got .*a function of two texts"
        ):
            as_reward_model(reward)

    def test_a_function_that_was_not_adapted(self):
        with pytest.raises(TypeError, match="as_reward_model"):
            score_responses(brevity, [CHAT], ["a"])
