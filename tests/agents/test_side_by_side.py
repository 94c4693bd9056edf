"""Searches side by side against the same searches one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mbrl_text_env.agents import BestOfN, Lookahead, Sampling
from mbrl_text_env.agents.base import Agent
from mbrl_text_env.agents.side_by_side import Merging, _Meeting, run_side_by_side
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.language_models.base import FeatureModel, NextTokens, SampleRequest
from mbrl_text_env.ledger import Budget, Ledger, timed
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards.base import RewardError, Scores, score_responses
from mbrl_text_env.types import Chunk, Prompt, TextState
from mbrl_text_env.values import ValueEstimate, ValueModelError, predict_values
from tests.toys import CountReward, FixedValue

PROMPTS = [Prompt.from_text(text, f"p{i}") for i, text in enumerate(("ab", "ba", "aab", "c", "bc"))]
LIMIT = 8


class RecordingLM(NGramLM):
    """Asked per kind; remembers each call's states."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__("abc", order=2, seed=3, stop_probability=0.15)
        self.seconds = seconds
        self.calls: list[tuple[str, int]] = []
        self.threads: set[int] = set()

    def note(self, method: str, count: int) -> None:
        self.calls.append((method, count))
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)

    def sample(self, states: Sequence[TextState], *args: Any, **options: Any) -> list[list[Chunk]]:
        with timed(options.get("ledgers")):
            self.note("sample", len(states))
        return super().sample(states, *args, **options)

    def logprobs(self, states: Any, chunks: Any, *, ledgers: Any = None) -> Any:
        self.note("logprobs", len(states))
        return super().logprobs(states, chunks, ledgers=ledgers)

    def features(self, states: Any, *, ledgers: Any = None) -> Any:
        self.note("features", len(states))
        return super().features(states, ledgers=ledgers)


class EngineLM(RecordingLM):
    """Answers requests of all kinds in one call, and knows next tokens."""

    def sample_requests(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        with timed(ledgers):
            self.note("sample_requests", len(requests))
        return [
            NGramLM.sample(
                self,
                [r.state],
                r.num_samples,
                r.max_new_tokens,
                seeds=[r.seed],
                first_sample=r.first_sample,
                params=r.params,
                ledgers=None if ledgers is None else [ledgers[i]],
            )[0]
            for i, r in enumerate(requests)
        ]

    def next_tokens(
        self, states: Sequence[TextState], k: int, *, ledgers: Any = None
    ) -> list[NextTokens]:
        self.note(f"next_tokens({k})", len(states))
        return [NextTokens(s.prompt_ids[:k], (0.0,) * k) for s in states]


class RecordingReward(CountReward):
    """Takes its time, if asked to."""

    seconds = 0.0

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        time.sleep(self.seconds)
        return super().score(prompts, responses)


class RecordingValue(FixedValue):
    def __init__(self, lm: NGramLM, seconds: float = 0.0) -> None:
        super().__init__(lambda text: text.count("a"), lm)
        self.calls: list[int] = []
        self.seconds = seconds

    def predict(self, states: Sequence[TextState]) -> ValueEstimate:
        self.calls.append(len(states))
        time.sleep(self.seconds)
        return super().predict(states)


def start(prompt: Prompt = PROMPTS[0]) -> TextState:
    return initial(prompt, RecordingLM())


def alive() -> set[threading.Thread]:
    return set(threading.enumerate())


def assert_all_end(before: set[threading.Thread]) -> None:
    for thread in alive() - before:
        thread.join(timeout=5)
    assert alive() <= before


def asks(lm: Any, count: int) -> Callable[[Merging], list[Chunk]]:
    """A search that samples `count` times, one chunk after the other."""

    def search(merging: Merging) -> list[Chunk]:
        model = merging.language_model(lm)
        return [model.sample([start()], 1, 2, seeds=[i])[0][0] for i in range(count)]

    return search


class TestRunning:
    def test_results_are_in_order(self):
        lm = EngineLM()

        def search(number: int) -> Callable[[Merging], int]:
            def run(merging: Merging) -> int:
                asks(lm, number % 4)(merging)
                return number

            return run

        assert run_side_by_side([search(i) for i in range(30)]) == list(range(30))
        assert lm.calls == [("sample_requests", n) for n in (22, 14, 7)]

    def test_nothing_to_run(self):
        assert run_side_by_side([]) == []

    @pytest.mark.parametrize("most", [1, 2, 5, 100])
    def test_no_more_than_allowed_are_under_way(self, most):
        lm, lock, active, peaks = EngineLM(), threading.Lock(), [0], [0]

        def search(count: int) -> Callable[[Merging], int]:
            def run(merging: Merging) -> int:
                with lock:
                    active[0] += 1
                    peaks.append(active[0])
                asks(lm, count)(merging)
                with lock:
                    active[0] -= 1
                return count

            return run

        counts = [1 + i % 3 for i in range(12)]
        assert run_side_by_side([search(c) for c in counts], most) == counts
        assert max(peaks) == min(most, 12)
        assert max(count for _, count in lm.calls) == min(most, 12)
        assert sum(count for _, count in lm.calls) == sum(counts)

    def test_models_are_asked_by_one_thread(self):
        lm = EngineLM()
        run_side_by_side([asks(lm, 3) for _ in range(8)])
        assert lm.threads == {threading.get_ident()}

    def test_the_first_error_by_place_is_raised_and_no_thread_stays(self):
        lm, before, ended = EngineLM(), alive(), []

        def fails(number: int) -> Callable[[Merging], None]:
            def run(merging: Merging) -> None:
                asks(lm, 1)(merging)
                raise KeyError(number)

            return run

        def lasts(merging: Merging) -> None:
            asks(lm, 5)(merging)
            ended.append(True)

        searches = [lasts, fails(1), lasts, fails(3), fails(4), lasts]
        with pytest.raises(KeyError, match="1"):
            run_side_by_side(searches)
        assert_all_end(before)
        assert not ended
        assert len(lm.calls) == 1

    def test_an_earlier_error_is_raised_before_a_later_one_of_a_lower_place(self):
        def fails(number: int, after: int) -> Callable[[Merging], None]:
            def run(merging: Merging) -> None:
                asks(lm, after)(merging)
                raise KeyError(number)

            return run

        lm = EngineLM()
        with pytest.raises(KeyError, match="1"):
            run_side_by_side([fails(0, 2), fails(1, 0)])

    def test_searches_that_wait_for_their_turn_are_not_begun_after_an_error(self):
        begun, before = [], alive()

        def search(merging: Merging) -> None:
            begun.append(True)
            raise KeyError

        with pytest.raises(KeyError):
            run_side_by_side([search] * 10, most_at_once=3)
        assert len(begun) == 3
        assert_all_end(before)

    def test_an_interruption_leaves_no_thread(self, monkeypatch):
        before, wait, lm = alive(), _Meeting.wait, EngineLM()

        def interrupted(self: _Meeting) -> None:
            wait(self)
            raise KeyboardInterrupt

        monkeypatch.setattr(_Meeting, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_side_by_side([asks(lm, 2)] * 3)
        for thread in alive() - before:
            thread.join(timeout=0.5)
        assert alive() <= before

    def test_a_model_that_is_interrupted_leaves_no_thread(self):
        class Interrupted(EngineLM):
            def sample_requests(self, requests: Any, *, ledgers: Any = None) -> Any:
                raise KeyboardInterrupt

        before = alive()
        with pytest.raises(KeyboardInterrupt):
            run_side_by_side([asks(Interrupted(), 2)] * 3)
        assert_all_end(before)

    def test_an_error_of_a_model_can_be_caught_by_the_search(self):
        class Failing(EngineLM):
            def sample_requests(self, requests: Any, *, ledgers: Any = None) -> Any:
                raise ValueError("no such prompt")

        def search(merging: Merging) -> str:
            with pytest.raises(ValueError, match="no such prompt"):
                asks(failing, 1)(merging)
            return merging.language_model(lm).decode(asks(lm, 1)(merging)[0].token_ids)

        failing, lm = Failing(), EngineLM()
        assert len(run_side_by_side([search] * 3)) == 3
        assert lm.calls == [("sample_requests", 3)]


class TestMerging:
    def run(self, search: Callable[[Merging, TextState], Any]) -> list[Any]:
        states = [start(prompt) for prompt in PROMPTS]
        return run_side_by_side([lambda merging, s=s: search(merging, s) for s in states])

    def test_requests_of_all_kinds_are_one_call(self):
        lm, plain = EngineLM(), RecordingLM()

        def search(merging: Merging, state: TextState) -> list[Chunk]:
            number = len(state.prompt_ids)
            model = merging.language_model(lm)
            params = SamplingParams(0.5 + number)
            return model.sample([state], number, 2 + number, seeds=[number], params=params)[0]

        rows = self.run(search)
        assert lm.calls == [("sample_requests", 5)]
        for prompt, row in zip(PROMPTS, rows, strict=True):
            state = start(prompt)
            n = len(state.prompt_ids)
            params = SamplingParams(0.5 + n)
            assert [row] == plain.sample([state], n, 2 + n, seeds=[n], params=params)

    def test_without_requests_a_language_model_is_asked_per_kind(self):
        lm = RecordingLM()

        def search(merging: Merging, state: TextState) -> list[Chunk]:
            return merging.language_model(lm).sample([state], len(state.prompt_ids), 4, seeds=[1])[
                0
            ]

        assert [len(row) for row in self.run(search)] == [2, 2, 3, 1, 2]
        assert sorted(lm.calls) == [("sample", 1), ("sample", 1), ("sample", 3)]

    def test_everything_that_is_batched_is_merged(self):
        lm, reward = EngineLM(), CountReward()
        value = RecordingValue(lm)

        def search(merging: Merging, state: TextState) -> tuple[Any, ...]:
            model = merging.language_model(lm)
            [logs] = model.logprobs([state], [Chunk(state.prompt_ids)])
            features = model.features([state, state])
            [top] = model.next_tokens([state], 1)
            scores = merging.reward_model(reward).score([state.prompt] * 2, ["a", "ab"])
            estimate = merging.value_model(value).predict([state])
            return logs, features, top, list(scores), estimate

        found = self.run(search)
        assert lm.calls == [("logprobs", 5), ("features", 10), ("next_tokens(1)", 5)]
        assert [len(call) for call in reward.calls] == [10]
        assert value.calls == [5]
        plain = RecordingLM()
        for prompt, (logs, features, top, scores, estimate) in zip(PROMPTS, found, strict=True):
            state = start(prompt)
            assert [logs] == plain.logprobs([state], [Chunk(state.prompt_ids)])
            np.testing.assert_array_equal(features, plain.features([state, state]))
            assert top.token_ids == state.prompt_ids[:1]
            assert scores == [1.0, 0.5]
            assert estimate.mean.shape == estimate.std.shape == (1,)

    def test_arguments_may_be_given_by_name(self):
        lm, reward = EngineLM(), CountReward()

        def search(merging: Merging, state: TextState) -> int:
            model = merging.language_model(lm)
            model.sample(states=[state], num_samples=1, max_new_tokens=2, seeds=[0])
            model.features(states=[state])
            model.logprobs(states=[state], chunks=[Chunk((1,))])
            merging.reward_model(reward).score(prompts=[state.prompt], responses=["a"])
            return len(model.next_tokens(states=[state], k=1))

        assert self.run(search) == [1] * 5

    def test_different_numbers_of_next_tokens_are_different_calls(self):
        lm = EngineLM()

        def search(merging: Merging, state: TextState) -> int:
            k = min(2, len(state.prompt_ids))
            [found] = merging.language_model(lm).next_tokens([state], k)
            return len(found.token_ids)

        assert self.run(search) == [2, 2, 2, 1, 2]
        assert sorted(lm.calls) == [("next_tokens(1)", 1), ("next_tokens(2)", 4)]

    def test_parts_of_scores_are_kept_apart(self):
        class Sized(CountReward):
            def score_parts(self, prompts: Any, responses: Any) -> Scores:
                total = np.asarray(self.score(prompts, responses))
                lengths = np.array([float(len(p.text)) for p in prompts])
                return Scores(total, {"half": total / 2, "length": lengths})

        reward = Sized()

        def search(merging: Merging, state: TextState) -> Scores:
            model = merging.reward_model(reward)
            return score_responses(model, [state.prompt] * 2, ["ab", "b"])

        for prompt, scores in zip(PROMPTS, self.run(search), strict=True):
            assert scores.total.tolist() == [0.5, 0.0]
            assert scores.parts["half"].tolist() == [0.25, 0.0]
            assert scores.parts["length"].tolist() == [len(prompt.text)] * 2
        assert len(reward.calls) == 1

    def test_a_stand_in_is_its_model_in_everything_else(self):
        lm, reward = EngineLM(), CountReward()

        def search(merging: Merging, state: TextState) -> None:
            model = merging.language_model(lm)
            assert type(model).__name__ == "EngineLM"
            assert (model.name, model.vocab_size) == (lm.name, lm.vocab_size)
            assert model.decode((1, 2)) == "ab"
            assert model.usage(3, [4]) == lm.usage(3, [4])
            assert isinstance(model, FeatureModel)
            assert not hasattr(merging.language_model(object()), "features")
            assert merging.reward_model(reward).name == "count"
            assert not hasattr(merging.reward_model(reward), "score_parts")

        self.run(search)


class TestErrors:
    def test_a_reward_that_fails_for_one_prompt_names_it(self):
        class Picky(CountReward):
            def score(self, prompts: Any, responses: Any) -> Any:
                if any(prompt.id == "p3" for prompt in prompts):
                    raise ZeroDivisionError("what a prompt")
                return super().score(prompts, responses)

        before = alive()
        agent = BestOfN(RecordingLM(), Picky(), n=2, max_response_tokens=LIMIT)
        with pytest.raises(RewardError, match=r"'count', prompt 'p3'.*what a prompt"):
            agent.generate(PROMPTS)
        assert_all_end(before)

    @pytest.mark.parametrize("bad", [[], [1.0] * 99, [float("nan")] * 99, "text"])
    def test_wrong_scores_are_named_as_ever(self, bad):
        class Wrong(CountReward):
            def score(self, prompts: Any, responses: Any) -> Any:
                return bad if len(bad) != 99 else bad[: len(responses) + (bad[0] == 1.0)]

        agent = BestOfN(RecordingLM(), Wrong(), n=2, max_response_tokens=LIMIT)
        with pytest.raises(RewardError, match=r"'count'.*'p0'"):
            agent.generate(PROMPTS)

    def test_a_reward_without_a_name_is_called_by_its_class(self):
        class Nameless:
            def score(self, prompts: Any, responses: Any) -> Any:
                return [float("nan")] * len(responses)

        agent = BestOfN(RecordingLM(), Nameless(), n=2, max_response_tokens=LIMIT)
        with pytest.raises(RewardError, match="'Nameless'"):
            agent.generate(PROMPTS)

    def test_a_value_model_is_called_by_its_class(self):
        class Broken(RecordingValue):
            def predict(self, states: Sequence[TextState]) -> ValueEstimate:
                return ValueEstimate(np.full(len(states), np.nan), np.zeros(len(states)))

        lm = RecordingLM()
        agent = Lookahead(lm, CountReward(), Broken(lm), max_response_tokens=LIMIT)
        with pytest.raises(ValueModelError, match="Broken: expected a finite mean"):
            agent.generate(PROMPTS)

        class Unfitted(RecordingValue):
            is_fitted = False

        def search(merging: Merging) -> ValueEstimate:
            return predict_values(merging.value_model(Unfitted(lm)), [start()])

        with pytest.raises(ValueModelError, match="Unfitted is not fitted"):
            run_side_by_side([search, search])

    def test_a_language_model_that_fails_is_not_asked_again(self):
        class Failing(EngineLM):
            def sample_requests(self, requests: Any, *, ledgers: Any = None) -> Any:
                self.note("sample_requests", len(requests))
                raise ValueError("no memory")

        lm = Failing()
        with pytest.raises(ValueError, match="no memory"):
            Sampling(lm, max_response_tokens=LIMIT).generate(PROMPTS)
        assert lm.calls == [("sample_requests", 5)]


MAKERS: dict[str, Callable[..., Agent]] = {
    "sampling": lambda lm, reward, value: Sampling(lm, reward, max_response_tokens=LIMIT),
    "best-of-n": lambda lm, reward, value: BestOfN(lm, reward, max_response_tokens=LIMIT),
    "best-of-3": lambda lm, reward, value: BestOfN(lm, reward, n=3, max_response_tokens=LIMIT),
    "lookahead": lambda lm, reward, value: Lookahead(
        lm, reward, value, prefix_tokens=2, max_response_tokens=LIMIT
    ),
    "unfitted": lambda lm, reward, value: Lookahead(lm, reward, max_response_tokens=LIMIT),
}
BUDGETS = [None, Budget(tokens=30), Budget(tokens=77), Budget(flops=150.0), Budget(reward_calls=7)]


def build(name: str, kind: type[RecordingLM], seconds: float = 0.0) -> Agent:
    lm, reward = kind(seconds), RecordingReward()
    reward.seconds = seconds
    return MAKERS[name](lm, reward, RecordingValue(lm, seconds))


def models_of(agent: Agent) -> list[Any]:
    """The models that the agent asks."""
    if isinstance(agent, Sampling):
        return [agent.language_model]
    value = getattr(agent, "value_model", None)
    return [agent.language_model, agent.reward_model, *([value] if value else [])]


@pytest.mark.parametrize("name", MAKERS)
class TestAgents:
    @pytest.mark.parametrize("kind", [RecordingLM, EngineLM])
    @pytest.mark.parametrize("budget", BUDGETS, ids=str)
    def test_results_and_ledgers_are_those_of_one_by_one(self, name, kind, budget):
        agent = build(name, kind)
        for seed in range(4):
            together = agent.generate(PROMPTS, budget, seed=seed)
            apart = [agent.generate([p], budget, seed=seed)[0] for p in PROMPTS]
            for a, b in zip(together, apart, strict=True):
                assert a.completion == b.completion
                assert (a.prompt, a.text, a.agent, a.seed) == (b.prompt, b.text, b.agent, b.seed)
                assert replace(a.usage, seconds=0) == replace(b.usage, seconds=0)

    def test_calls_are_merged(self, name):
        """All searches meet as often as the one that asks most often; each model once a time."""
        budget, agent = Budget(tokens=77), build(name, EngineLM)
        models = models_of(agent)

        def counts() -> list[int]:
            found = [len(model.calls) for model in models]
            for model in models:
                model.calls.clear()
            return found

        alone = []
        for prompt in PROMPTS:
            agent.generate([prompt], budget)
            alone.append(counts())
        agent.generate(PROMPTS, budget)
        meetings = max(map(sum, alone))
        for i, together in enumerate(counts()):
            each = [row[i] for row in alone]
            assert max(each) <= together <= meetings
            assert together <= 0.5 * sum(each)

    def test_states_of_one_call_act_alike(self, name):
        agent = build(name, EngineLM)
        states = [start(prompt) for prompt in PROMPTS]
        together = agent.act(states, Budget(tokens=30), seed=2)
        for state, decision in zip(states, together, strict=True):
            [alone] = agent.act([state], Budget(tokens=30), seed=2)
            assert decision.chunk == alone.chunk
            assert decision.completion == alone.completion

    def test_seconds_are_those_of_the_calls(self, name):
        agent = build(name, EngineLM, seconds=0.02)
        began = time.perf_counter()
        generations = agent.generate(PROMPTS, Budget(tokens=77))
        elapsed = time.perf_counter() - began
        seconds = [generation.usage.seconds for generation in generations]
        assert min(seconds) >= 0
        assert sum(seconds) <= 1.05 * elapsed + 0.01
        calls = sum(len(model.calls) for model in models_of(agent))
        assert sum(seconds) >= 0.9 * 0.02 * calls
