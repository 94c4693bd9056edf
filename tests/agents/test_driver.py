"""Searches side by side against the same searches one by one, and in an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mbrl_text_env.agents import BestOfN, Lookahead, Planner, Sampling
from mbrl_text_env.agents.base import Agent
from mbrl_text_env.agents.driver import Driver, ask, ask_for_chunks, run, run_async
from mbrl_text_env.language_models import NGramLM, SamplingParams
from mbrl_text_env.language_models.base import NextTokens, SampleRequest
from mbrl_text_env.mdp import initial
from mbrl_text_env.rewards.base import RewardError, Scores, score_responses
from mbrl_text_env.types import Budget, Chunk, Ledger, Prompt, TextState, Usage, timed
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
        return NGramLM.sample_requests(self, requests, ledgers=ledgers)

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


def request(seed: int, state: TextState | None = None) -> SampleRequest:
    return SampleRequest(state or start(), 1, 2, seed)


def asks(lm: Any, count: int) -> Callable[[], Coroutine[Any, Any, list[Chunk]]]:
    """A search that samples `count` times, one chunk after the other."""

    async def search() -> list[Chunk]:
        return [(await ask_for_chunks(lm, [request(i)], [Ledger()]))[0][0] for i in range(count)]

    return search


class TestRunning:
    def test_results_are_in_order(self):
        lm = EngineLM()

        async def search(number: int) -> int:
            await asks(lm, number % 4)()
            return number

        assert run([lambda i=i: search(i) for i in range(30)]) == list(range(30))
        assert lm.calls == [("sample_requests", n) for n in (22, 14, 7)]

    def test_nothing_to_run(self):
        assert run([]) == []

    @pytest.mark.parametrize("most", [1, 2, 5, 100])
    def test_no_more_than_allowed_are_under_way(self, most):
        lm, active, peaks = EngineLM(), [0], [0]

        async def search(count: int) -> int:
            active[0] += 1
            peaks.append(active[0])
            await asks(lm, count)()
            active[0] -= 1
            return count

        counts = [1 + i % 3 for i in range(12)]
        assert run([lambda c=c: search(c) for c in counts], most) == counts
        assert max(peaks) == min(most, 12)
        assert max(count for _, count in lm.calls) == min(most, 12)
        assert sum(count for _, count in lm.calls) == sum(counts)

    def test_everything_is_done_by_one_thread(self):
        lm, before = EngineLM(), threading.active_count()
        run([asks(lm, 3) for _ in range(8)])
        assert lm.threads == {threading.get_ident()}
        assert threading.active_count() == before

    def test_the_first_error_by_place_is_raised_and_the_others_are_given_up(self):
        lm, ended, closed = EngineLM(), [], []

        async def fails(number: int) -> None:
            await asks(lm, 1)()
            raise KeyError(number)

        async def lasts() -> None:
            try:
                await asks(lm, 5)()
                ended.append(True)
            finally:
                closed.append(True)

        begin = [lambda i=i: fails(i) for i in range(5)]
        with pytest.raises(KeyError, match="1"):
            run([lasts, begin[1], lasts, begin[3], begin[4], lasts])
        assert not ended
        assert len(closed) == 3
        assert len(lm.calls) == 1

    def test_an_earlier_error_is_raised_before_a_later_one_of_a_lower_place(self):
        async def fails(number: int, after: int) -> None:
            await asks(lm, after)()
            raise KeyError(number)

        lm = EngineLM()
        with pytest.raises(KeyError, match="1"):
            run([lambda: fails(0, 2), lambda: fails(1, 0)])

    def test_searches_that_wait_for_their_turn_are_not_begun_after_an_error(self):
        begun = []

        async def search() -> None:
            begun.append(True)
            raise KeyError

        with pytest.raises(KeyError):
            run([search] * 10, most_at_once=3)
        assert len(begun) == 3

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_an_interruption_ends_it_at_once(self, error):
        closed = []

        class Interrupted(EngineLM):
            def sample_requests(self, requests: Any, *, ledgers: Any = None) -> Any:
                raise error

        async def search() -> None:
            try:
                await asks(Interrupted(), 2)()
            finally:
                closed.append(True)

        with pytest.raises(error):
            run([search] * 3)
        assert len(closed) == 3

    def test_an_error_of_a_model_can_be_caught_by_the_search(self):
        class Failing(EngineLM):
            def sample_requests(self, requests: Any, *, ledgers: Any = None) -> Any:
                raise ValueError("no such prompt")

        async def search() -> str:
            with pytest.raises(ValueError, match="no such prompt"):
                await asks(failing, 1)()
            return lm.decode((await asks(lm, 1)())[0].token_ids)

        failing, lm = Failing(), EngineLM()
        assert len(run([search] * 3)) == 3
        assert lm.calls == [("sample_requests", 3)]

    def test_a_search_that_awaits_something_else_is_told(self):
        async def search() -> None:
            await asyncio.sleep(0)

        with pytest.raises(TypeError, match="It can only await model calls"):
            run([search])


def lengths(texts: Sequence[str]) -> list[int]:
    return [len(text) for text in texts]


def both_ways(base: int, texts: Sequence[str], ledgers: Sequence[Ledger]) -> dict[str, list[int]]:
    for ledger in ledgers:
        ledger.charge(Usage(value_calls=1))
    return {"more": [base + len(text) for text in texts], "less": [-len(text) for text in texts]}


class TestMerging:
    def run(self, search: Callable[[TextState], Coroutine[Any, Any, Any]]) -> list[Any]:
        states = [start(prompt) for prompt in PROMPTS]
        return run([lambda s=s: search(s) for s in states])

    def test_requests_of_all_kinds_are_one_call(self):
        lm, plain = EngineLM(), RecordingLM()

        async def search(state: TextState) -> list[Chunk]:
            n = len(state.prompt_ids)
            wanted = SampleRequest(state, n, 2 + n, n, params=SamplingParams(0.5 + n))
            return (await ask_for_chunks(lm, [wanted], [Ledger()]))[0]

        rows = self.run(search)
        assert lm.calls == [("sample_requests", 5)]
        for prompt, row in zip(PROMPTS, rows, strict=True):
            state = start(prompt)
            n = len(state.prompt_ids)
            params = SamplingParams(0.5 + n)
            assert [row] == plain.sample([state], n, 2 + n, seeds=[n], params=params)

    def test_without_requests_a_language_model_is_asked_per_kind(self):
        lm = RecordingLM()

        async def search(state: TextState) -> list[Chunk]:
            wanted = SampleRequest(state, len(state.prompt_ids), 4, 1)
            return (await ask_for_chunks(lm, [wanted], [Ledger()]))[0]

        assert [len(row) for row in self.run(search)] == [2, 2, 3, 1, 2]
        assert sorted(lm.calls) == [("sample", 1), ("sample", 1), ("sample", 3)]

    def test_everything_that_is_batched_is_merged(self):
        lm, reward = EngineLM(), CountReward()
        value = RecordingValue(lm)

        async def search(state: TextState) -> tuple[Any, ...]:
            chunks = [Chunk(state.prompt_ids)]
            [logs] = await ask(lm.logprobs, states=[state], chunks=chunks, ledgers=[Ledger()])
            features = await ask(lm.features, states=[state, state], ledgers=[Ledger()] * 2)
            [top] = await ask(top_tokens, lm, 1, states=[state])
            scores = await ask(
                score_responses, reward, prompts=[state.prompt] * 2, responses=["a", "ab"]
            )
            estimate = await ask(predict_values, value, states=[state])
            return logs, features, top, scores.total.tolist(), estimate

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

    def test_a_function_of_ones_own_is_merged(self):
        """Whatever takes and returns columns, with ledgers or without; a dictionary of them too."""
        sizes = []

        def counted(texts: Sequence[str]) -> list[int]:
            sizes.append(len(texts))
            return lengths(texts)

        async def search(state: TextState) -> Any:
            ledger, own = Ledger(), [state.prompt.text] * 2
            plain = await ask(counted, texts=own)
            both = await ask(both_ways, 10, texts=own, ledgers=[ledger] * 2)
            assert ledger.usage == Usage(value_calls=2)
            return plain, both

        for prompt, (plain, both) in zip(PROMPTS, self.run(search), strict=True):
            size = len(prompt.text)
            assert plain == [size] * 2
            assert both == {"more": [10 + size] * 2, "less": [-size] * 2}
        assert sizes == [10]

    def test_different_common_arguments_are_different_calls(self):
        lm = EngineLM()

        async def search(state: TextState) -> int:
            [found] = await ask(top_tokens, lm, min(2, len(state.prompt_ids)), states=[state])
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

        async def search(state: TextState) -> Scores:
            texts = ["ab", "b"]
            return await ask(score_responses, reward, prompts=[state.prompt] * 2, responses=texts)

        for prompt, scores in zip(PROMPTS, self.run(search), strict=True):
            assert scores.total.tolist() == [0.5, 0.0]
            assert scores.parts["half"].tolist() == [0.25, 0.0]
            assert scores.parts["length"].tolist() == [len(prompt.text)] * 2
        assert len(reward.calls) == 1


def top_tokens(lm: EngineLM, k: int, states: Sequence[TextState]) -> list[NextTokens]:
    return lm.next_tokens(states, k)


class TestErrors:
    def test_a_reward_that_fails_for_one_prompt_names_it(self):
        class Picky(CountReward):
            def score(self, prompts: Any, responses: Any) -> Any:
                if any(prompt.id == "p3" for prompt in prompts):
                    raise ZeroDivisionError("what a prompt")
                return super().score(prompts, responses)

        agent = BestOfN(RecordingLM(), Picky(), n=2, max_response_tokens=LIMIT)
        with pytest.raises(RewardError, match=r"'count', prompt 'p3'.*what a prompt"):
            agent.generate(PROMPTS)

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

        async def search() -> ValueEstimate:
            return await ask(predict_values, Unfitted(lm), states=[start()])

        with pytest.raises(ValueModelError, match="Unfitted is not fitted"):
            run([search, search])

    def test_a_language_model_that_fails_is_not_asked_again(self):
        class Failing(EngineLM):
            def sample_requests(self, requests: Any, *, ledgers: Any = None) -> Any:
                self.note("sample_requests", len(requests))
                raise ValueError("no memory")

        lm = Failing()
        with pytest.raises(ValueError, match="no memory"):
            Sampling(lm, max_response_tokens=LIMIT).generate(PROMPTS)
        assert lm.calls == [("sample_requests", 5)]

    def test_what_has_charged_is_not_asked_again(self):
        """Here the value of one prompt fails after the samples of others were charged."""
        calls = []

        class Sampled(RecordingValue):
            def predict_with(self, states: Any, ledgers: Any) -> ValueEstimate:
                calls.append({state.prompt.id for state in states})
                for state, ledger in zip(states, ledgers, strict=True):
                    if state.prompt.id == "p3":
                        raise ZeroDivisionError
                    ledger.charge(Usage(generated_tokens=1))
                return super().predict(states)

        lm = RecordingLM()
        agent = Lookahead(
            lm, CountReward(), Sampled(lm), prefix_tokens=2, max_response_tokens=LIMIT
        )
        with pytest.raises(ZeroDivisionError):
            agent.generate(PROMPTS)
        assert sum("p3" in asked for asked in calls) == 1

    @pytest.mark.parametrize(
        ("base", "method", "hint"),
        [
            (Agent, "search", r"async def search\(self, state, ledger, seed\)"),
            (Sampling, "search", "self.complete"),
            (Planner, "plan", r"async def plan\(self, search\).*search.expand"),
        ],
    )
    def test_a_search_that_is_no_coroutine_is_told_what_to_write(self, base, method, hint):
        with pytest.raises(TypeError, match=hint):
            type("Old", (base,), {method: lambda self, *arguments: None})


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


class AwaitedLM(EngineLM):
    """Can be awaited; says when, and for how long it takes."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.wait = seconds
        self.awaited: list[int] = []
        self.cancelled = 0

    async def sample_requests_async(
        self, requests: Sequence[SampleRequest], *, ledgers: Sequence[Ledger] | None = None
    ) -> list[list[Chunk]]:
        try:
            await asyncio.sleep(self.wait)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.awaited.append(len(requests))
        return self.sample_requests(requests, ledgers=ledgers)


class TestInAnEventLoop:
    @pytest.mark.parametrize("name", MAKERS)
    @pytest.mark.parametrize("kind", [RecordingLM, EngineLM, AwaitedLM])
    def test_the_answers_are_those_of_generate(self, name, kind):
        agent, budget = build(name, kind), Budget(tokens=77)

        async def both() -> tuple[Any, Any]:
            # `generate` has no loop of its own, so it works in one that is running.
            return await agent.generate_async(PROMPTS, budget), agent.generate(PROMPTS, budget)

        for a, b in zip(*asyncio.run(both()), strict=True):
            assert (a.prompt, a.text, a.completion) == (b.prompt, b.text, b.completion)
            assert replace(a.usage, seconds=0) == replace(b.usage, seconds=0)

    def test_a_language_model_that_can_be_awaited_is(self):
        agent = build("best-of-3", AwaitedLM)
        asyncio.run(agent.generate_async(PROMPTS))
        assert agent.language_model.awaited == [5]
        assert agent.language_model.threads == {threading.get_ident()}

    def test_two_run_side_by_side_and_the_loop_goes_on(self):
        class Waits(AwaitedLM):
            """Answers when both have asked."""

            async def sample_requests_async(self, requests: Any, *, ledgers: Any = None) -> Any:
                await meeting.wait()
                return await super().sample_requests_async(requests, ledgers=ledgers)

        async def both() -> Any:
            nonlocal meeting
            meeting = asyncio.Barrier(3)
            agents = [build("sampling", Waits), build("best-of-3", Waits)]
            tasks = [asyncio.create_task(agent.generate_async(PROMPTS)) for agent in agents]
            await meeting.wait()
            return await asyncio.gather(*tasks)

        meeting: Any = None
        assert [len(answers) for answers in asyncio.run(both())] == [5, 5]

    def test_other_calls_are_made_in_a_thread_one_at_a_time(self):
        busy, peaks, threads = [0], [0], set()

        class Slow(CountReward):
            def score(self, prompts: Any, responses: Any) -> Any:
                busy[0] += 1
                peaks.append(busy[0])
                threads.add(threading.get_ident())
                time.sleep(0.02)
                busy[0] -= 1
                return super().score(prompts, responses)

        async def several() -> None:
            agents = [BestOfN(NGramLM("abc"), Slow(), n=2, max_response_tokens=4)] * 4
            await asyncio.gather(*(agent.generate_async(PROMPTS) for agent in agents))

        asyncio.run(several())
        assert max(peaks) == 1
        assert threading.get_ident() not in threads

    def test_cancelling_ends_the_search(self):
        agent = build("best-of-n", lambda seconds: AwaitedLM(seconds=60.0))
        closed = []

        async def search() -> None:
            try:
                await asks(agent.language_model, 1)()
            finally:
                closed.append(True)

        async def cancelled() -> None:
            tasks = [
                asyncio.create_task(agent.generate_async(PROMPTS)),
                asyncio.create_task(run_async([search] * 2)),
            ]
            await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            for task in tasks:
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(asyncio.wait_for(cancelled(), timeout=30))
        assert agent.language_model.cancelled == 2
        assert len(closed) == 2
        assert not agent.language_model.awaited

    def test_an_error_of_one_prompt_names_it(self):
        class Picky(CountReward):
            def score(self, prompts: Any, responses: Any) -> Any:
                if any(prompt.id == "p3" for prompt in prompts):
                    raise ZeroDivisionError("what a prompt")
                return super().score(prompts, responses)

        agent = BestOfN(AwaitedLM(), Picky(), n=2, max_response_tokens=LIMIT)
        with pytest.raises(RewardError, match=r"'count', prompt 'p3'.*what a prompt"):
            asyncio.run(agent.generate_async(PROMPTS))
        assert len(asyncio.run(agent.generate_async(PROMPTS[:3]))) == 3

    def test_seconds_are_those_of_the_calls(self):
        agent = build("best-of-3", EngineLM, seconds=0.02)
        began = time.perf_counter()
        answers = asyncio.run(agent.generate_async(PROMPTS))
        elapsed = time.perf_counter() - began
        seconds = sum(answer.usage.seconds for answer in answers)
        assert 2 * 0.9 * 0.02 <= seconds <= 1.05 * elapsed + 0.01


class TestDriver:
    @pytest.mark.parametrize("name", MAKERS)
    def test_calls_share_batches_and_their_answers_are_those_of_generate(self, name):
        agent, budget = build(name, AwaitedLM), Budget(tokens=77)

        async def each() -> list[Any]:
            driver = Driver()
            calls = [agent.generate_async(p, budget, driver=driver) for p in PROMPTS]
            found = await asyncio.gather(*calls)
            assert driver.searches == 0
            return [answer for [answer] in found]

        found, together = asyncio.run(each()), build(name, AwaitedLM)
        asyncio.run(together.generate_async(PROMPTS, budget))
        assert agent.language_model.awaited == together.language_model.awaited
        for a, b in zip(found, agent.generate(PROMPTS, budget), strict=True):
            assert (a.prompt, a.text, a.completion) == (b.prompt, b.text, b.completion)
            assert replace(a.usage, seconds=0) == replace(b.usage, seconds=0)

    def test_one_joins_fails_or_is_cancelled_while_others_run(self):
        lm, ended = AwaitedLM(0.05), []

        async def wrong() -> None:
            await asyncio.sleep(0)

        async def fails() -> None:
            await asks(lm, 1)()
            raise KeyError("its own")

        async def endless() -> None:
            try:
                while True:
                    await asks(lm, 1)()
            finally:
                ended.append(len(lm.awaited))

        async def crowd() -> list[Any]:
            driver = Driver()
            long = asyncio.create_task(driver.run([asks(lm, 1), endless]))
            await asyncio.sleep(0.02)
            others = await asyncio.gather(
                driver.run([wrong]),
                driver.run([fails]),
                driver.run([asks(lm, 1)]),
                return_exceptions=True,
            )
            long.cancel()
            while driver.searches:
                await asyncio.sleep(0.01)
            # It begins again after a pause.
            return [*others, await driver.run([asks(lm, 1)])]

        wrong_found, failed, found, again = asyncio.run(asyncio.wait_for(crowd(), timeout=30))
        assert isinstance(wrong_found, TypeError)
        assert repr(failed) == "KeyError('its own')"
        assert found == again
        # The second batch had what joined.
        assert lm.awaited[:2] == [2, 3]
        assert ended[0] <= len(lm.awaited) - 1

    def test_further_searches_wait_for_a_place(self):
        lm = AwaitedLM()

        async def crowd() -> None:
            await Driver(most_at_once=2).run([asks(lm, 1)] * 5)

        asyncio.run(crowd())
        assert lm.awaited == [2, 2, 1]
