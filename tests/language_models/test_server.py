"""The server client against a real llama.cpp server, and where that cannot be had, a fake one."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import signal
import subprocess
import threading
import traceback
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbrl_text_env.benchmarks.compare import CompareConfig, Comparison, compare, read_rows
from mbrl_text_env.benchmarks.llama_server import free_port, start, wait_until_ready
from mbrl_text_env.checks import check_language_model
from mbrl_text_env.language_models import (
    HFTokenizer,
    MalformedAnswerError,
    PromptTooLongError,
    SampleRequest,
    SamplingParams,
    ServerError,
    ServerLM,
    ServerUnavailableError,
    TransformersLM,
    UnsupportedByServerError,
    embedded_tokenizer,
)
from mbrl_text_env.language_models._http import ServerConfigError
from mbrl_text_env.language_models.base import Guard
from mbrl_text_env.language_models.guarding import REDRAWS
from mbrl_text_env.language_models.guarding import sample_requests as guarded_requests
from mbrl_text_env.language_models.guarding import sample_requests_async as guarded_requests_async
from mbrl_text_env.mdp import initial
from mbrl_text_env.types import Budget, Chunk, Ledger, Message, Prompt, TextState
from tests.language_models.fake_server import (
    MODELS,
    FakeServer,
    Reply,
    Request,
    models,
    sampled_ids,
    vllm,
)
from tests.language_models.test_guard import without
from tests.toys import CountReward

GREEDY = SamplingParams(temperature=0)
SHAPED = SamplingParams(temperature=0.7, top_p=0.9, top_k=20)
TEXTS = ("Hi", "What is 2+2?", "Tell me a story about a dog.")
SECRET = "sk-0123456789-do-not-tell"  # noqa: S105 made up
SLOT_TOKENS = 256
END = 2  # <|im_end|>
# llama.cpp multiplies the 4-bit weights with activations rounded to 8 bits; the embedded model
# multiplies the same weights in float32. Measured: 0.05 on average, 0.3 at most.
MEAN_DIFFERENCE, MOST_DIFFERENCE = 0.15, 1.0


class LlamaServer:
    """A process that can be killed and started again on its port."""

    def __init__(self, parallel: int = 4) -> None:
        self.port = free_port()
        self.parallel = parallel
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> LlamaServer:
        context = SLOT_TOKENS * self.parallel
        self.process = start(self.port, 1, self.parallel, context)
        return self

    def ready(self) -> LlamaServer:
        assert self.process is not None
        wait_until_ready(self.url, self.process)
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaServer]:
    server = LlamaServer().start()
    try:
        yield server.ready()
    finally:
        server.kill()


@pytest.fixture
def mortal() -> Iterator[LlamaServer]:
    """A server for tests that kill it."""
    server = LlamaServer().start()
    try:
        yield server.ready()
    finally:
        server.kill()


@pytest.fixture
def clients() -> Iterator[Callable[..., ServerLM]]:
    """Makes clients and closes them."""
    with ExitStack() as stack:

        def make(*servers: Any, **options: Any) -> ServerLM:
            urls = [getattr(server, "url", server) for server in servers]
            lm = ServerLM(urls, **{"tokenizer": embedded_tokenizer(), **options})
            stack.callback(lm.close)
            return lm

        yield make


@pytest.fixture
def fakes() -> Iterator[Callable[..., FakeServer]]:
    """Makes fake servers and stops them."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(FakeServer(*args, **options).running())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def chats(lm: Any, texts: Sequence[str] = TEXTS) -> list[TextState]:
    return [initial(Prompt.from_text(text), lm) for text in texts]


def state_of(length: int) -> TextState:
    """The first tokens of a long random prompt."""
    ids = np.random.default_rng(0).integers(1000, 2000, SLOT_TOKENS)[:length].tolist()
    return TextState(Prompt(f"p{length}", "text"), tuple(ids))


def ledgers_for(states: Sequence[TextState]) -> list[Ledger]:
    return [Ledger() for _ in states]


def assert_charged_once(
    lm: ServerLM, states: Sequence[TextState], rows: list[list[Chunk]], ledgers: Sequence[Ledger]
) -> None:
    for state, row, ledger in zip(states, rows, ledgers, strict=True):
        usage, prefix = ledger.usage, len(state.prompt_ids) + len(state.response_ids)
        assert usage.lm_calls == 1
        assert usage.generated_tokens == sum(map(len, row))
        assert usage.prompt_tokens + usage.cached_tokens == prefix * len(row)
        assert usage.prompt_tokens <= lm.usage_bound(prefix, [len(c) for c in row]).prompt_tokens
        computed = usage.prompt_tokens + usage.generated_tokens
        assert usage.flops == 2 * lm.num_parameters * computed


class TestLlamaCpp:
    def test_what_it_is(self, llama, clients):
        lm = clients(llama.url + "/v1/")
        assert lm.base_urls == [llama.url]
        assert lm.name == "SmolLM2-135M-Instruct.Q4_1"
        assert lm.num_parameters == 134_515_008
        assert (lm.vocab_size, lm.context_length) == (49_152, SLOT_TOKENS)
        assert lm.stop_token_ids == {END}
        assert lm.losses == ()
        assert copy.deepcopy(lm) is lm

    def test_it_keeps_the_contract(self, llama, clients):
        """All of the checker's demands, where llama.cpp's rounding is the same in every call."""
        lm = clients(llama, prefix_cache=False, max_concurrency=1)
        check_language_model(lm, [Prompt.from_text("A dog", chat=False)], max_new_tokens=2)

    def test_greedy_is_that_of_its_own_interface(self, llama, clients):
        lm = clients(llama, prefix_cache=False, max_concurrency=1)
        states = chats(lm)
        rows = lm.sample(states, 1, 12, seeds=[0, 1, 2], params=GREEDY)
        for state, [chunk] in zip(states, rows, strict=True):
            body = {
                "prompt": list(state.prompt_ids),
                "n_predict": 12,
                "temperature": 0,
                "return_tokens": True,
                "cache_prompt": False,
            }
            assert list(chunk.token_ids) == post(llama.url + "/completion", body)["tokens"]

    def test_it_is_near_the_embedded_model(self, llama, clients, smollm2: TransformersLM):
        lm = clients(llama)
        states = chats(lm)
        assert [s.prompt_ids for s in states] == [s.prompt_ids for s in chats(smollm2)]
        for params in (SamplingParams(), SHAPED, GREEDY):
            chunks = [row[0] for row in lm.sample(states, 1, 10, seeds=[1, 2, 3], params=params)]
            exact = smollm2.logprobs(states, chunks)
            difference = np.concatenate(exact) - np.concatenate([c.logprobs for c in chunks])
            assert np.abs(difference).mean() < MEAN_DIFFERENCE
            assert np.abs(difference).max() < MOST_DIFFERENCE
        # The first tokens of a greedy answer are no near ties in these prompts.
        own = [row[0] for row in smollm2.sample(states, 1, 3, seeds=[0] * 3, params=GREEDY)]
        assert [c.token_ids[:3] for c in chunks] == [c.token_ids for c in own]

    def test_its_own_samplers_are_off(self, llama, clients, smollm2: TransformersLM):
        """By default it keeps 40 tokens, 95 % of the mass, and 5 % of the largest probability."""
        lm = clients(llama)
        [state] = chats(lm, TEXTS[2:])
        [row] = lm.sample([state], 40, 1, seeds=[0])
        most = smollm2.next_tokens([state], 1)[0].logprobs[0]
        assert min(chunk.logprob for chunk in row) < most + np.log(0.05) - MOST_DIFFERENCE
        [few] = lm.sample([state], 20, 1, seeds=[0], params=SamplingParams(top_k=2))
        assert len({chunk.token_ids for chunk in few}) == 2
        [likely] = lm.sample([state], 20, 1, seeds=[0], params=SamplingParams(top_p=0.2))
        assert {chunk.token_ids for chunk in likely} < {chunk.token_ids for chunk in row}

    def test_log_probabilities_of_given_chunks(self, llama, clients, smollm2: TransformersLM):
        lm = clients(llama)
        states = chats(lm)
        chunks = [Chunk((504, 2988, 314)), Chunk((36, END)), Chunk((0,))]
        ledgers = ledgers_for(states)
        found = lm.logprobs(states, chunks, ledgers=ledgers)
        for logs, exact in zip(found, smollm2.logprobs(states, chunks), strict=True):
            np.testing.assert_allclose(logs, exact, atol=MOST_DIFFERENCE)
        for state, chunk, ledger in zip(states, chunks, ledgers, strict=True):
            usage, length = ledger.usage, len(state.prompt_ids) + len(chunk) - 1
            assert usage.prompt_tokens + usage.cached_tokens == length
            assert (usage.lm_calls, usage.generated_tokens) == (1, 0)

    def test_the_most_probable_next_tokens(self, llama, clients, smollm2: TransformersLM):
        lm = clients(llama)
        states = chats(lm)
        ledgers = ledgers_for(states)
        rows = lm.next_tokens(states, 5, ledgers=ledgers)
        for state, found, ledger in zip(states, rows, ledgers, strict=True):
            assert len(found.token_ids) == len(set(found.token_ids)) == 5
            assert list(found.logprobs) == sorted(found.logprobs, reverse=True)
            chunks = [Chunk((token,)) for token in found.token_ids]
            exact = [logs[0] for logs in smollm2.logprobs([state] * 5, chunks)]
            np.testing.assert_allclose(found.logprobs, exact, atol=MOST_DIFFERENCE)
            usage = ledger.usage
            assert usage.prompt_tokens + usage.cached_tokens == len(state.prompt_ids)
            assert (usage.lm_calls, usage.generated_tokens) == (1, 1)
        for k in (0, 1001):
            with pytest.raises(ValueError, match="k: expected a number from 1 to 1000"):
                lm.next_tokens(states, k)

    def test_a_guard_is_kept_and_what_it_throws_away_is_paid(self, llama, clients):
        lm, guard = clients(llama, prefix_cache=False, max_concurrency=1), without("eE")
        [state] = chats(lm, TEXTS[2:])
        ledger, request = Ledger(), SampleRequest(state, 2, 24, 0, guard=guard)
        [row] = guarded_requests(lm, [request], ledgers=[ledger])
        texts = [lm.decode(chunk.token_ids) for chunk in row]
        assert not set("eE") & set("".join(texts))
        for chunk in row:
            assert len(chunk.logprobs) == len(chunk)
            assert chunk.finish_reason == "stop" or len(chunk) == 24
        assert ledger.usage.generated_tokens > sum(map(len, row))
        assert ledger.usage.lm_calls > 2
        agains = guarded_requests_async(lm, [request], ledgers=[Ledger()])
        assert asyncio.run(agains) == [row]

    def test_the_stop_token_ends_a_response(self, llama, clients):
        lm = clients(llama)
        [[chunk]] = lm.sample(chats(lm)[1:2], 1, 30, seeds=[0], params=GREEDY)
        assert chunk.finish_reason == "stop"
        assert chunk.token_ids.index(END) == len(chunk) - 1 < 29
        assert len(chunk.logprobs) == len(chunk)
        assert "4" in lm.decode(chunk.token_ids)

    def test_tokens_that_stop_the_server_alone_do_not_end_a_response(self, llama, clients):
        tokenizer = HFTokenizer(embedded_tokenizer().tokenizer, stop_token_ids=[5])
        lm = clients(llama, tokenizer=tokenizer)
        states, ledgers = chats(lm)[1:2], ledgers_for(TEXTS[:1])
        rows = lm.sample(states, 1, 30, seeds=[0], params=GREEDY, ledgers=ledgers)
        chunk = rows[0][0]
        assert END in chunk.token_ids[:-1]
        assert (len(chunk), len(chunk.logprobs), chunk.finish_reason) == (30, 30, None)
        assert ledgers[0].usage.generated_tokens == 30

    def test_stop_tokens_that_the_server_does_not_know(self, llama, clients):
        lm = clients(llama)
        [[whole]] = lm.sample(chats(lm)[1:2], 1, 6, seeds=[0], params=GREEDY)
        stop = whole.token_ids[3]
        tokenizer = HFTokenizer(embedded_tokenizer().tokenizer, stop_token_ids=[stop])
        [[chunk]] = clients(llama, tokenizer=tokenizer).sample(
            chats(lm)[1:2], 1, 6, seeds=[0], params=GREEDY
        )
        assert chunk.token_ids == whole.token_ids[:4]
        assert chunk.finish_reason == "stop"

    def test_stop_texts_cut_a_chunk_and_count_what_was_sampled(self, llama, clients):
        lm = clients(llama)
        states, ledgers = chats(lm)[2:], ledgers_for(TEXTS[:1])
        params = SamplingParams(temperature=0, stop=(" time", "never there"))
        [[chunk]] = lm.sample(states, 1, 12, seeds=[0], params=params, ledgers=ledgers)
        text = lm.decode(chunk.token_ids)
        assert " time" in text
        assert " time" not in lm.decode(chunk.token_ids[:-1])
        assert chunk.finish_reason is None
        assert len(chunk.logprobs) == len(chunk) < ledgers[0].usage.generated_tokens == 12

    def test_the_context_is_a_limit(self, llama, clients):
        lm = clients(llama)
        states = [state_of(SLOT_TOKENS - n) for n in (1, 4, 20)]
        params = SamplingParams(temperature=0)
        rows = lm.sample(states, 1, 6, seeds=[0] * 3, params=params)
        assert [len(row[0]) for row in rows] == [1, 4, 6]
        assert [row[0].finish_reason for row in rows] == ["length", "length", None]
        with pytest.raises(PromptTooLongError, match="256 tokens and fill the model's context"):
            lm.sample([state_of(SLOT_TOKENS)], 1, 1, seeds=[0])
        long = clients(llama, context_length=4096)
        with pytest.raises(ServerError, match="exceeds the available context size"):
            long.sample([state_of(SLOT_TOKENS)], 1, 1, seeds=[0])
        with pytest.raises(ServerError, match=r"pass context_length="):
            long.sample(states[:1], 1, 6, seeds=[0], params=params)

    def test_ledgers(self, llama, clients):
        lm = clients(llama)
        states = chats(lm)
        ledgers = ledgers_for(states)
        rows = lm.sample(states, 3, 4, seeds=[4, 5, 6], ledgers=ledgers)
        assert_charged_once(lm, states, rows, ledgers)
        assert all(ledger.usage.cached_tokens > 0 for ledger in ledgers)
        assert all(ledger.usage.seconds > 0 for ledger in ledgers)
        again = ledgers_for(states)
        fresh = clients(llama, prefix_cache=False)
        assert_charged_once(
            fresh, states, fresh.sample(states, 3, 4, seeds=[4, 5, 6], ledgers=again), again
        )
        assert [ledger.usage.cached_tokens for ledger in again] == [0, 0, 0]

    def test_two_addresses_share_the_load(self, llama, clients):
        lm = clients(llama, f"http://localhost:{llama.port}", max_concurrency=2)
        before = lm.served
        lm.sample(chats(lm), 4, 2, seeds=[1, 2, 3])
        counts = [lm.served[url] - before[url] for url in lm.base_urls]
        assert sum(counts) == 12
        assert min(counts) >= 2

    def test_chat(self, llama, clients):
        lm, plain = clients(llama, mode="chat"), clients(llama)
        states = chats(lm)[1:2]
        with pytest.warns(UserWarning, match="applies its own template"):
            [[chunk]] = lm.sample(states, 1, 4, seeds=[0], params=GREEDY)
        [[expected]] = plain.sample(states, 1, 8, seeds=[0], params=GREEDY)
        assert chunk.token_ids == expected.token_ids[:4]
        longer = TextState(states[0].prompt, states[0].prompt_ids, chunk.token_ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Said once.
            [[rest]] = lm.sample([longer], 1, 4, seeds=[0], params=GREEDY)
        assert chunk.token_ids + rest.token_ids == expected.token_ids
        with pytest.raises(UnsupportedByServerError, match="only its chat endpoint is used"):
            lm.logprobs(states, [chunk])

    def test_from_threads_and_from_a_running_loop(self, llama, clients):
        lm = clients(llama)
        states = chats(lm)
        expected = lm.sample(states, 1, 3, seeds=[0] * 3, params=GREEDY)
        results: list[Any] = [None] * 3

        def call(i: int) -> None:
            results[i] = lm.sample([states[i]], 1, 3, seeds=[0], params=GREEDY)[0]

        threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        async def cell() -> Any:
            return lm.sample(states, 1, 3, seeds=[0] * 3, params=GREEDY)

        ids = [[c.token_ids for c in row] for row in expected]
        assert [[c.token_ids for c in row] for row in results] == ids
        assert [[c.token_ids for c in row] for row in asyncio.run(cell())] == ids

    def test_it_can_be_sent_to_other_processes(self, llama, clients):
        lm = clients(llama)
        other = pickle.loads(pickle.dumps(lm))  # noqa: S301 our own
        state = chats(lm)[:1]
        row = other.sample(state, 1, 3, seeds=[0], params=GREEDY)
        assert row == lm.sample(state, 1, 3, seeds=[0], params=GREEDY)
        other.close()
        lm.close()
        assert row == lm.sample(state, 1, 3, seeds=[0], params=GREEDY), "closed ones open again"


class TestKilledAndRestarted:
    def test_in_the_middle_of_a_call(self, mortal, clients):
        lm = clients(mortal)
        states, ledgers = chats(lm), ledgers_for(TEXTS)
        found: list[Any] = []

        def call() -> None:
            found.append(lm.sample(states, 6, 6, seeds=[1, 2, 3], ledgers=ledgers))

        thread = threading.Thread(target=call)
        thread.start()
        wait_for(lambda: sum(lm.served.values()) >= 4)
        mortal.kill()
        answered = sum(lm.served.values())
        mortal.start()
        thread.join()
        [rows] = found
        assert [len(row) for row in rows] == [6, 6, 6]
        assert all(len(c) == 6 or c.finish_reason == "stop" for row in rows for c in row)
        assert_charged_once(lm, states, rows, ledgers)
        # One answer for the description, and one a chunk: some before the kill, some after it.
        assert 4 <= answered < sum(lm.served.values()) == 1 + 18

    def test_in_the_middle_of_a_comparison(self, llama, mortal, clients, tmp_path):
        options = {"prefix_cache": False, "max_concurrency": 1}
        undisturbed = comparison(clients(llama, **options))
        compare(undisturbed, tmp_path / "undisturbed")

        killed: list[str] = []

        def kill_once(spec: str, count: int, rows: list[Any]) -> None:
            if not killed:
                killed.append(spec)
                mortal.kill()
                # Back while the next batch is being asked for.
                threading.Timer(0.5, mortal.start).start()

        disturbed = comparison(clients(mortal, **options))
        summary = compare(disturbed, tmp_path / "disturbed", on_batch=kill_once)
        assert killed == ["sampling"]
        assert_complete(tmp_path / "disturbed", summary)
        assert rows_of(tmp_path / "disturbed") == rows_of(tmp_path / "undisturbed")

    def test_a_comparison_that_ended_goes_on_where_it_stopped(self, mortal, clients, tmp_path):
        lm = clients(mortal, prefix_cache=False, max_wait=0.2)
        done: list[str] = []

        def kill_at_the_second(spec: str, count: int, rows: list[Any]) -> None:
            done.append(spec)
            if len(done) == 2:
                mortal.kill()

        with pytest.raises(ServerUnavailableError, match="resumes where it stopped"):
            compare(comparison(lm), tmp_path / "run", on_batch=kill_at_the_second)
        kept = {p: p.read_bytes() for p in (tmp_path / "run" / "parts").iterdir()}
        assert len(kept) == len(done) == 2
        mortal.start().ready()
        before = sum(lm.served.values())
        summary = compare(comparison(lm), tmp_path / "run")
        assert_complete(tmp_path / "run", summary)
        assert all(path.read_bytes() == content for path, content in kept.items())
        rows = read_rows(tmp_path / "run" / "results.jsonl")
        chunks = {"sampling": 1, "best-of-n:n=2": 2}
        missing = sum(chunks[row["agent"]] for row in rows) // 2
        assert sum(lm.served.values()) - before == missing


def comparison(lm: ServerLM) -> Comparison:
    config = CompareConfig(
        ("sampling", "best-of-n:n=2"), budget_tokens=24, max_response_tokens=8, batch_prompts=2
    )
    texts = ("Hi", "Name a colour.", "Why?", "Tell me a story.")
    prompts = [Prompt.from_text(text, chat=False) for text in texts]
    return Comparison(config, prompts, lm, CountReward())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "results.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_complete(folder: Path, summary: dict[str, Any]) -> None:
    rows = read_rows(folder / "results.jsonl")
    assert len(rows) == len({(row["agent"], row["prompt_id"]) for row in rows}) == 8
    for row in rows:
        usage, chunks = row["usage"], 1 if row["agent"] == "sampling" else 2
        assert row["response_tokens"] <= usage["generated_tokens"] <= 8 * chunks
        assert usage["generated_tokens"] >= chunks
        assert usage["flops"] >= usage["lm_flops"] > 0
        tokens = usage["prompt_tokens"] + usage["generated_tokens"]
        assert usage["lm_flops"] == 2 * 134_515_008 * tokens
    assert [entry["prompts"] for entry in summary["agents"]] == [4, 4]


def post(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data)  # noqa: S310 loopback
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        return json.load(answer)


def wait_for(condition: Callable[[], bool]) -> None:
    """Until something is so; pytest's own limit ends it if that never happens."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.005)


class TestRetries:
    def test_busy_servers_are_asked_again_and_the_chunk_counts_once(self, fakes, clients):
        refusals = iter([429, 503, 500, 429])

        def reply(request: Request) -> Reply:
            status = next(refusals, None)
            if status is None:
                return vllm(request)
            return Reply({"error": {"message": "busy"}}, status, {"Retry-After": "0"})

        server = fakes(reply)
        lm = clients(server)
        states, ledgers = [state_of(5)], ledgers_for(TEXTS[:1])
        [[chunk]] = lm.sample(states, 1, 6, seeds=[3], ledgers=ledgers)
        assert len(server.requests) == 5
        assert len({json.dumps(body) for body in server.bodies()}) == 1, "the same seed each time"
        assert chunk.token_ids == tuple(sampled_ids(server.bodies()[0]))
        usage = ledgers[0].usage
        assert (usage.prompt_tokens, usage.generated_tokens, usage.lm_calls) == (5, 6, 1)
        assert usage.flops == 2 * 1000 * (5 + 6)

    @pytest.mark.parametrize(
        "fault",
        [
            *(Reply({"detail": "later"}, status) for status in (408, 409, 425, 500)),
            Reply(""),
            Reply("  \n"),
            Reply('{"choices": [{"text": "cut'),
            Reply("nonsense", headers={"Content-Encoding": "gzip"}),
            Reply({"error": {"message": "rate limit", "code": 429}}),
            Reply({"error": {"message": "overloaded", "code": "engine"}}),
            Reply({"error": "upstream"}),
            Reply({"choices": []}),
            Reply({"choices": [{"text": "", "token_ids": [], "finish_reason": "abort"}]}),
            Reply({"choices": [{"text": "a", "token_ids": [1000], "finish_reason": "error"}]}),
        ],
    )
    def test_a_fault_that_passes_is_asked_again(self, fakes, clients, fault):
        faults = iter([fault])
        server = fakes(lambda request: next(faults, None) or vllm(request))
        [[chunk]] = clients(server, max_wait=10).sample([state_of(5)], 1, 2, seeds=[0])
        assert chunk.token_ids == tuple(sampled_ids(server.bodies()[0]))
        assert len(server.requests) == 2

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            ({"message": "no such model", "code": 404}, r"status 404.*no such model"),
            ({"message": "bad key", "code": 401}, "rejects the API key"),
        ],
    )
    def test_an_error_in_a_good_answer_is_read_like_a_status(self, fakes, clients, error, expected):
        server = fakes(lambda _: Reply({"error": error}))
        with pytest.raises(ServerError, match=expected):
            clients(server, mode="completions").sample([state_of(5)], 1, 2, seeds=[0])

    def test_a_fault_that_stays_is_an_error(self, fakes, clients):
        server = fakes(lambda _: Reply({"choices": []}))
        with pytest.raises(ServerError, match=r"failed 2 times.*an answer without choices"):
            clients(server, max_attempts=2).sample([state_of(5)], 1, 2, seeds=[0])
        assert len(server.requests) == 2

    @pytest.mark.parametrize("wanted", ["3600", "Wed, 21 Oct 2090 07:28:00 GMT"])
    def test_a_pause_beyond_max_wait_is_an_error_at_once(self, fakes, clients, wanted):
        server = fakes(lambda _: Reply({"detail": "quota"}, 429, {"Retry-After": wanted}))
        lm = clients(server, max_wait=50)
        with pytest.raises(ServerUnavailableError, match=r"429: quota.*max_wait=50 s"):
            lm.sample([state_of(5)], 1, 1, seeds=[0])
        assert len(server.requests) == 1

    def test_a_server_that_always_fails(self, fakes, clients):
        server = fakes(lambda _: Reply("out of memory", 500, {"Retry-After": "0"}))
        lm = clients(server, max_attempts=3)
        with pytest.raises(ServerError, match=r"failed 3 times.*500: out of memory"):
            lm.sample([state_of(5)], 1, 1, seeds=[0])
        assert len(server.requests) == 3

    def test_a_server_that_is_too_slow(self, fakes, clients):
        answered = threading.Event()

        def reply(request: Request) -> Reply:
            answered.wait()
            return vllm(request)

        server = fakes(reply)
        lm = clients(server, timeout=0.2, max_attempts=2)
        with pytest.raises(ServerError, match=r"failed 2 times.*no answer within 0.2 s"):
            lm.sample([state_of(5)], 1, 1, seeds=[0])
        answered.set()
        assert len(server.requests) == 2

    def test_blanks_that_keep_the_connection_alive_do_not_count_as_an_answer(self, clients):
        """Some servers send white space while they work."""
        closed = threading.Event()

        class Dripping(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(MODELS).encode())

            def do_POST(self) -> None:
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):  # The client hangs up.
                    while not closed.wait(0.02):
                        self.wfile.write(b"\n")
                        self.wfile.flush()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            lm = clients(url, timeout=0.2, max_attempts=2)
            with pytest.raises(ServerError, match=r"failed 2 times.*no answer within 0.2 s"):
                lm.sample([state_of(5)], 1, 1, seeds=[0])
        finally:
            closed.set()
            server.shutdown()
            server.server_close()

    def test_a_dead_server_among_several(self, fakes, clients):
        server = fakes(vllm)
        lm = clients(f"http://127.0.0.1:{free_port()}", server)
        rows = lm.sample([state_of(5)] * 20, 1, 2, seeds=range(20))
        for [chunk] in rows:
            [body] = sorted_by_result(server, [chunk])
            assert chunk.token_ids == tuple(sampled_ids(body))
        assert len(server.requests) == 20

    def test_all_servers_dead(self, clients):
        urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
        with pytest.raises(ServerUnavailableError, match="Restart the server") as caught:
            clients(*urls, max_wait=0)
        assert all(url in str(caught.value) for url in urls)

    def test_a_refusal_is_an_error_at_once(self, fakes, clients):
        server = fakes(lambda _: Reply({"message": "the model `x` does not exist"}, 404))
        with pytest.raises(ServerError, match=r"404.*does not exist"):
            clients(server).sample([state_of(5)], 1, 1, seeds=[0])
        assert len(server.requests) == 1

    def test_an_error_ends_the_other_requests(self, fakes, clients):
        held = threading.Event()

        def reply(request: Request) -> Reply:
            if len(request.body["prompt"]) == 5:
                return Reply({"message": "no"}, 413)
            held.wait()
            return vllm(request)

        lm = clients(fakes(reply))
        with pytest.raises(ServerError, match="413"):
            lm.sample([state_of(6), state_of(5)], 1, 1, seeds=[0, 0])
        held.set()

    def test_an_interrupt_cancels(self, fakes, clients):
        held, asked = threading.Event(), threading.Event()

        def reply(request: Request) -> Reply:
            asked.set()
            held.wait()
            return vllm(request)

        lm = clients(fakes(reply))
        main = threading.main_thread().ident

        def interrupt() -> None:
            asked.wait()
            signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            lm.sample([state_of(5)], 1, 1, seeds=[0])
        thread.join()
        held.set()
        assert len(lm.sample([state_of(5)], 1, 1, seeds=[0])[0]) == 1


def sorted_by_result(server: FakeServer, row: Sequence[Chunk]) -> list[dict[str, Any]]:
    """The requests in the order of the chunks that they gave."""
    by_first = {sampled_ids(body)[0]: body for body in server.bodies()}
    return [by_first[chunk.token_ids[0]] for chunk in row]


class TestFleet:
    def test_least_loaded_first(self, fakes, clients):
        """Nobody is answered before all four have come, and they are shared two and two."""
        everyone = threading.Barrier(4)

        def reply(request: Request) -> Reply:
            everyone.wait()
            return vllm(request)

        servers = [fakes(reply), fakes(reply)]
        clients(*servers).sample([state_of(5)] * 4, 1, 1, seeds=range(4))
        assert [len(server.requests) for server in servers] == [2, 2]

    def test_no_more_than_asked_for_at_a_time(self, fakes, clients):
        together = threading.Barrier(3)

        def reply(request: Request) -> Reply:
            together.wait()
            return vllm(request)

        server = fakes(reply)
        clients(server, max_concurrency=3).sample([state_of(5)] * 12, 1, 1, seeds=range(12))
        assert server.most_at_once == 3

    def test_results_come_in_order(self, fakes, clients):
        server = fakes(vllm)
        lm = clients(server, max_concurrency=4)
        states = [state_of(n) for n in (5, 6, 7)]
        rows = lm.sample(states, 4, 2, seeds=[1, 2, 3])
        bodies = {tuple(body["prompt"]): body for body in server.bodies()}
        for state, row in zip(states, rows, strict=True):
            body = bodies[state.prompt_ids]
            assert body["n"] == 4
            assert [list(c.token_ids) for c in row] == [
                sampled_ids(body, sample=k) for k in range(4)
            ]
        alone = [lm.sample([s], 4, 2, seeds=[i])[0] for s, i in zip(states, (1, 2, 3), strict=True)]
        assert rows == alone
        first, rest = (lm.sample(states, n, 2, seeds=[1, 2, 3], first_sample=4 - n) for n in (4, 2))
        assert [row[2:] for row in first] == rest
        assert lm.sample([], 1, 1, seeds=[]) == []

    def test_engines_that_draw_one_sample_a_request(self, fakes, clients):
        server = fakes(vllm, models=models("somebody", n_params=1))
        lm, ledgers = clients(server), ledgers_for(TEXTS[:1])
        lm.sample([state_of(5)], 3, 2, seeds=[0], ledgers=ledgers)
        assert ["n" in body for body in server.bodies()] == [False] * 3
        assert ledgers[0].usage.prompt_tokens == 3 * 5, "as it is billed"

    def test_greedy_samples_take_a_request_each(self, fakes, clients):
        server = fakes(vllm)
        clients(server).sample([state_of(5)], 2, 2, seeds=[0], params=GREEDY)
        assert ["n" in body for body in server.bodies()] == [False] * 2

    def test_the_engine_can_be_given(self, fakes, clients):
        server = fakes(vllm, models=models("somebody", n_params=1))
        clients(server, engine="vllm").sample([state_of(5)], 2, 2, seeds=[0])
        assert [body["n"] for body in server.bodies()] == [2]

    def test_from_coroutines(self, fakes, clients):
        lm, ledger = clients(fakes(vllm)), Ledger()
        requests = [SampleRequest(state_of(n), 2, 3, seed=n) for n in (5, 6)]

        async def both() -> list[Any]:
            return await asyncio.gather(
                *(lm.sample_requests_async([r], ledgers=[ledger]) for r in requests)
            )

        [[first], [second]] = asyncio.run(both())
        assert [first, second] == lm.sample_requests(requests)
        assert (ledger.usage.lm_calls, ledger.usage.generated_tokens) == (2, 12)
        assert ledger.usage.seconds > 0

    def test_a_fleet_serves_one_model(self, fakes, clients):
        names = ("a/one", "b/two")
        servers = [fakes(vllm, models=models(name=name, n_params=1)) for name in names]
        with pytest.raises(ServerError, match=r"'one' and .* serves 'two'"):
            clients(*servers)
        assert clients(*servers, model="one").name == "one"

    def test_options(self, fakes, clients):
        server = fakes(vllm, models=models())
        unsized, ledger = clients(server), Ledger()
        unsized.sample([state_of(5)], 1, 2, seeds=[0], ledgers=[ledger])
        assert (ledger.usage.prompt_tokens, ledger.usage.flops) == (5, 0)
        assert not unsized.counts_flops
        with pytest.raises(ServerConfigError, match="num_parameters="):
            unsized.sample([state_of(5)], 1, 2, seeds=[0], ledgers=[Ledger(Budget(flops=1e9))])
        lm = clients(server, num_parameters=7)
        assert lm.counts_flops
        assert lm.usage_bound(10, [2, 3]).flops == 2 * 7 * (20 + 5)
        assert (lm.name, lm.context_length) == ("tiny", 4096)
        assert clients(server, num_parameters=7, context_length=99).context_length == 99
        for options in (
            {"mode": "talk"},
            {"engine": "steam"},
            {"max_concurrency": 0},
            {"num_parameters": 0},
            {"timeout": 0},
        ):
            with pytest.raises(ServerConfigError, match="xpected"):
                clients(server, **options)
        for urls in ([], ["ftp://a"], ["localhost:80"], ["http://a", "http://a/v1"], [""]):
            with pytest.raises(ServerConfigError, match="base_urls"):
                clients(*urls)

    def test_a_server_that_lists_no_models(self, fakes, clients):
        lm = clients(fakes(vllm, models=Reply({}, 404)), num_parameters=7)
        assert lm.name == "server"
        assert len(lm.sample([state_of(5)], 1, 2, seeds=[0])[0][0]) == 2

    def test_a_server_that_lists_several_models(self, fakes, clients):
        listed = {"data": [{"id": "a"}, {"id": "b", "meta": {"n_params": 5}}]}
        server = fakes(vllm, models=listed)
        with pytest.raises(ServerError, match=r"\['a', 'b'\]; choose one of them with model="):
            clients(server)
        lm = clients(server, model="b")
        assert lm.num_parameters == 5
        lm.sample([state_of(5)], 1, 1, seeds=[0])
        assert server.bodies()[0]["model"] == "b"

    def test_arguments(self, fakes, clients):
        lm = clients(fakes(vllm))
        ended = TextState(Prompt("p", "text"), (3, 4), (1,), "stop")
        with pytest.raises(ValueError, match="has ended"):
            lm.sample([ended], 1, 1, seeds=[0])
        with pytest.raises(ValueError, match="has ended"):
            lm.logprobs([ended], [Chunk((3,))])
        with pytest.raises(ValueError, match=r"one chunk per state \(1\), got 2"):
            lm.logprobs([state_of(3)], [Chunk((3,))] * 2)


class TestGuards:
    @staticmethod
    def refusing(*tokens: int) -> Guard:
        """Refuses texts with one of the tokens in them."""
        texts = [embedded_tokenizer().decode([token]) for token in tokens]
        return Guard(lambda _, prefixes, __: [not any(t in p for t in texts) for p in prefixes])

    @staticmethod
    def one_by_one(top: dict[str, float] | None) -> Callable[[Request], Reply]:
        """Draws 1000, 1001, ... and 2000, 2001, ... after the first request."""

        def reply(request: Request) -> Reply:
            body = request.body
            start = 1000 if len(body["prompt"]) == 5 and body["max_tokens"] > 1 else 2000
            content = vllm(request, ids=[start + i for i in range(body["max_tokens"])]).content
            if top is not None and body["max_tokens"] == 1:
                content["choices"][0]["logprobs"]["top_logprobs"] = [top]
            return Reply(content)

        return reply

    def drawn(self, lm: ServerLM, guard: Guard, ledger: Ledger | None = None) -> Chunk:
        request = SampleRequest(state_of(5), 1, 6, 0, guard=guard)
        [[chunk]] = guarded_requests(lm, [request], ledgers=[ledger or Ledger()])
        return chunk

    def test_a_refused_token_is_replaced_by_a_probable_one(self, fakes, clients):
        top = {"token_id:1003": -0.1, "token_id:1500": -0.5, "token_id:1600": -9.0}
        server, ledger = fakes(self.one_by_one(top)), Ledger()
        chunk = self.drawn(clients(server), self.refusing(1003), ledger)
        assert chunk.token_ids == (1000, 1001, 1002, 1500, 2000, 2001)
        assert chunk.logprobs[3] == -0.5
        asked = [(len(body["prompt"]), body["max_tokens"]) for body in server.bodies()]
        assert asked == [(5, 6), (8, 1), (9, 2)]
        assert server.bodies()[1]["logprobs"] == 20
        usage = ledger.usage
        assert (usage.lm_calls, usage.generated_tokens) == (3, 6 + 1 + 2)
        assert usage.prompt_tokens == 5 + 8 + 9

    def test_without_a_probable_one_the_chunk_ends_there(self, fakes, clients):
        lm = clients(fakes(self.one_by_one({"token_id:1003": -0.1, "token_id:1600": -9.0})))
        assert self.drawn(lm, self.refusing(1003)).token_ids == (1000, 1001, 1002, 1003)

    @pytest.mark.parametrize("top", [None, {" dog": -0.1}])
    def test_where_they_are_not_known_the_place_is_drawn_again(self, fakes, clients, top):
        server, ledger = fakes(self.one_by_one(top)), Ledger()
        lm = clients(server)
        assert self.drawn(lm, self.refusing(1003), ledger).token_ids[3:] == (2000, 2001, 2002)
        assert ledger.usage.generated_tokens == 6 + 3, "the question that failed is not charged"
        ledger = Ledger()
        chunk = self.drawn(lm, self.refusing(1003, 2000), ledger)
        assert chunk.token_ids == (1000, 1001, 1002, 1003)
        assert ledger.usage.generated_tokens == 6 + 3 * REDRAWS
        # Each from a stream of its own.
        seeds = [body["seed"] for body in server.bodies() if "seed" in body]
        assert len(set(seeds[-REDRAWS:])) == REDRAWS

    def test_the_loop_goes_on_meanwhile(self, fakes, clients):
        lm = clients(fakes(self.one_by_one({"token_id:1500": -0.5})))
        request = SampleRequest(state_of(5), 1, 6, 0, guard=self.refusing(1003))
        chunk = self.drawn(lm, self.refusing(1003))

        async def both() -> list[Any]:
            job = guarded_requests_async(lm, [request], ledgers=[Ledger()])
            return await asyncio.gather(job, asyncio.sleep(0))

        assert asyncio.run(both())[0] == [[chunk]]


class TestFormats:
    def test_vllm(self, fakes, clients):
        server = fakes(vllm)
        lm = clients(server)
        params = SamplingParams(0.5, 0.9, stop=("never",))
        [[chunk]] = lm.sample([state_of(5)], 1, 4, seeds=[0], params=params)
        [body] = server.bodies()
        assert chunk.token_ids == tuple(sampled_ids(body))
        assert chunk.logprobs == tuple(-(i % 7) / 8 for i in chunk.token_ids)
        assert (body["temperature"], body["top_p"], body["top_k"]) == (0.5, 0.9, -1)
        assert (body["stop"], body["include_stop_str_in_output"]) == (["never"], True)
        assert (body["model"], body["stop_token_ids"]) == ("team/tiny", [END])
        assert 0 <= body["seed"] < 2**31
        assert lm.losses == ()

    def test_ids_written_as_tokens(self, fakes, clients):
        server = fakes(lambda request: vllm(request, token_ids=None))
        lm = clients(server)
        [[chunk]] = lm.sample([state_of(5)], 1, 4, seeds=[0])
        assert chunk.token_ids == tuple(sampled_ids(server.bodies()[0]))
        assert len(chunk.logprobs) == 4
        assert lm.losses == ()

    def test_cached_tokens(self, fakes, clients):
        def reply(request: Request) -> Reply:
            content = vllm(request).content
            content["usage"]["prompt_tokens_details"] = {"cached_tokens": 3}
            return Reply(content)

        lm, ledgers = clients(fakes(reply)), ledgers_for(TEXTS[:1])
        lm.sample([state_of(5)], 4, 1, seeds=[0], ledgers=ledgers)
        usage = ledgers[0].usage
        assert (usage.prompt_tokens, usage.cached_tokens) == (2, 3)
        assert (usage.generated_tokens, usage.lm_calls) == (4, 1)

    @pytest.mark.parametrize("ids", [[1000, 1001, END], [1000, 1001]])
    def test_a_stop_token_that_is_left_out_is_put_back(self, fakes, clients, ids):
        def reply(request: Request) -> Reply:
            content = vllm(request, ids=ids, finish_reason="stop").content
            content["usage"]["completion_tokens"] = 3
            return Reply(content)

        lm, ledgers = clients(fakes(reply)), ledgers_for(TEXTS[:1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            [[chunk]] = lm.sample([state_of(5)], 1, 9, seeds=[0], ledgers=ledgers)
        assert chunk.token_ids == (1000, 1001, END)
        assert chunk.finish_reason == "stop"
        assert ledgers[0].usage.generated_tokens == 3
        assert len(chunk.logprobs) == (3 if END in ids else 0)
        assert [("ends a response" in loss) for loss in lm.losses] == [True] * (END not in ids)

    @pytest.mark.parametrize("ids", [[1000, 77], [1000]])
    def test_it_goes_on_after_a_stop_of_the_servers_own(self, fakes, clients, ids):
        answers = iter([ids])

        def reply(request: Request) -> Reply:
            mine = next(answers, None)
            if mine is None:
                return vllm(request)
            return vllm(request, ids=mine, finish_reason="stop", stop_reason=77)

        server = fakes(reply)
        lm = clients(server)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            [[chunk]] = lm.sample([state_of(5)], 1, 6, seeds=[0])
        first, second = server.bodies()
        assert chunk.token_ids == (1000, 77, *sampled_ids(second))
        assert second["prompt"] == [*first["prompt"], 1000, 77]
        assert (second["max_tokens"], chunk.finish_reason) == (4, None)
        assert first["seed"] != second["seed"]

    def test_judging_by_vllm(self, fakes, clients):
        def reply(request: Request) -> Reply:
            rows = [
                {str(i): {"logprob": -place / 4}, "7": {"logprob": -0.1}}
                for place, i in enumerate(request.body["prompt"])
            ]
            return vllm(request, prompt_logprobs=[None, *rows[1:]])

        lm, ledgers = clients(fakes(reply)), ledgers_for(TEXTS[:1])
        [logs] = lm.logprobs([state_of(5)], [Chunk((40, 41))], ledgers=ledgers)
        assert logs == (-5 / 4, -6 / 4)
        usage = ledgers[0].usage
        assert (usage.prompt_tokens, usage.generated_tokens, usage.lm_calls) == (6, 0, 1)

    def test_judging_by_echo(self, fakes, clients):
        def reply(request: Request) -> Reply:
            found = [None, *(-i / 4 for i in range(1, len(request.body["prompt"])))]
            tokens = [str(i) for i in range(len(found))]
            return vllm(request, logprobs={"tokens": tokens, "token_logprobs": found})

        server = fakes(reply, models=models("somebody", n_params=1))
        assert clients(server).logprobs([state_of(5)], [Chunk((40, 41))]) == [(-5 / 4, -6 / 4)]
        assert server.bodies()[0] == {
            "prompt": [*state_of(5).prompt_ids, 40, 41],
            "temperature": 0.0,
            "model": "team/tiny",
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        }

    @pytest.mark.parametrize("refuses", [True, False])
    def test_servers_that_cannot_judge_say_so(self, fakes, clients, refuses):
        def reply(request: Request) -> Reply:
            if refuses:
                return Reply({"detail": "max_tokens must be above 0"}, 400)
            return vllm(request, ids=[1000])

        lm = clients(fakes(reply, models=models("somebody", n_params=1)))
        with pytest.raises(NotImplementedError, match="does not return the log-probabilities"):
            lm.logprobs([state_of(5)], [Chunk((40, 41))])

    def test_sglang(self, fakes, clients):
        def reply(request: Request) -> Reply:
            body = request.body
            count = body["sampling_params"]["max_new_tokens"]
            triples = [[-i / 4, 1000 + i, None] for i in range(count)]
            given = [[-i / 8, t, None] for i, t in enumerate(body["input_ids"])]
            start = body.get("logprob_start_len", 0)
            meta = {
                "finish_reason": {"type": "length", "length": count},
                "output_token_logprobs": triples,
                "input_token_logprobs": [[None, *given[start][1:]], *given[start + 1 :]],
                "cached_tokens": 1,
                "completion_tokens": count,
            }
            text = embedded_tokenizer().decode([t[1] for t in triples])
            return Reply({"text": text, "output_ids": [t[1] for t in triples], "meta_info": meta})

        server = fakes(reply, models=models("sglang", n_params=1))
        lm = clients(server)
        with pytest.warns(UserWarning, match="--enable-deterministic-inference"):
            [[chunk]] = lm.sample([state_of(5)], 1, 3, seeds=[0])
        assert chunk == Chunk((1000, 1001, 1002), (0.0, -0.25, -0.5))
        [body] = server.bodies("/generate")
        assert body["input_ids"] == list(state_of(5).prompt_ids)
        assert body["sampling_params"]["top_k"] == -1
        assert lm.logprobs([state_of(5)], [Chunk((40, 41))]) == [(-5 / 8, -6 / 8)]
        with pytest.warns(UserWarning, match="the model's own log-probabilities"):
            [[chunk]] = lm.sample([state_of(5)], 1, 3, seeds=[0], params=SHAPED)
        assert chunk.logprobs == ()

    def test_a_strict_server(self, fakes, clients):
        known = {
            "model", "prompt", "max_tokens", "temperature", "top_p", "presence_penalty",
            "frequency_penalty", "seed", "logprobs",
        }  # fmt: skip

        def reply(request: Request) -> Reply:
            unknown = sorted(request.body.keys() - known)
            if unknown:
                return Reply({"error": {"message": f"unknown parameters {unknown}"}}, 400)
            content = vllm(request, token_ids=None, text=" a dog").content
            content["choices"][0]["logprobs"]["tokens"] = [" a"] * request.body["max_tokens"]
            return Reply(content)

        server = fakes(reply, models=models("somebody", n_params=1))
        lm = clients(server)
        with pytest.warns(UserWarning, match=server.url) as caught:
            [[chunk]] = lm.sample([state_of(5)], 1, 2, seeds=[0])
        assert lm.decode(chunk.token_ids) == " a dog"
        assert chunk.logprobs == ()
        assert [str(w.message) for w in caught] == list(lm.losses)
        said = " ".join(lm.losses)
        for loss in ("beyond OpenAI's", "no token ids", "the model's own log-probabilities"):
            assert loss in said
        assert len(server.requests) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lm.sample([state_of(5)], 3, 2, seeds=[0])
        assert len(server.requests) == 2 + 3, "the extras are left out from then on"
        with pytest.raises(UnsupportedByServerError, match="top_k=3"):
            lm.sample([state_of(5)], 1, 2, seeds=[0], params=SamplingParams(top_k=3))

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_a_server_that_takes_only_text(self, fakes, clients):
        def reply(request: Request) -> Reply:
            if not isinstance(request.body["prompt"], str):
                return Reply({"detail": "prompt: a string was expected"}, 422)
            return vllm(request)

        server = fakes(reply, models=models("somebody", n_params=1))
        lm = clients(server)
        [state] = chats(lm, ["Hi"])
        with pytest.warns(UserWarning, match="prompts are sent as text"):
            lm.sample([state], 1, 2, seeds=[0])
        text = server.bodies()[-1]["prompt"]
        assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

    def test_a_request_that_is_bad_in_every_way(self, fakes, clients):
        server = fakes(lambda _: Reply({"message": "bad luck"}, 400))
        with pytest.raises(ServerError, match=r"400.*bad luck"):
            clients(server).sample([state_of(5)], 1, 2, seeds=[0])

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"token_ids": [1000]}, "one log-probability per token"),
            ({"token_ids": ["a", "b"]}, "expected token ids"),
            ({"token_ids": [1000, 60_000]}, "Is the tokenizer that of the server's model"),
            ({"ids": [1000, 1001, 1002]}, "at most 2 token ids"),
            ({"ids": [1000], "finish_reason": "length"}, "without a stop token"),
            ({"token_ids": None, "logprobs": None, "text": None}, "token ids or text"),
            ({"token_ids": None, "logprobs": None, "text": ""}, "without a stop token"),
            *(
                ({"logprobs": {"tokens": ["a", "b"], "token_logprobs": [value, -1.0]}}, message)
                for value, message in (
                    (float("nan"), "a finite log-probability"),
                    (float("-inf"), "a finite log-probability"),
                    (0.5, "at most 0"),
                    (None, "a finite log-probability of at most 0, got None"),
                )
            ),
        ],
    )
    def test_malformed_answers(self, fakes, clients, changes, expected):
        server = fakes(lambda request: vllm(request, **changes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ServerError, match=expected) as caught:
                clients(server).sample([state_of(5)], 1, 2, seeds=[0])
        assert server.url in str(caught.value)
        assert len(server.requests) == 1, "no use in asking again"

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("<html>Hello</html>", "expected JSON, got '<html>Hello</html>'"),
            ([], "expected the field 'choices'"),
            ({"choices": [{}, {}]}, "expected one choice, got 2"),
            ({"choices": "x"}, "expected a list for choices"),
            ({"choices": [{"text": "a", "logprobs": [1]}]}, "AttributeError"),
        ],
    )
    def test_answers_of_another_form(self, fakes, clients, content, expected):
        server = fakes(lambda _: Reply(content))
        with pytest.raises(MalformedAnswerError, match=expected) as caught:
            clients(server).sample([state_of(5)], 1, 2, seeds=[0])
        assert f"{server.url}/v1/completions" in str(caught.value)

    def test_a_tokenizer_of_another_model_is_noticed(self, fakes, clients):
        lm = clients(fakes(lambda request: vllm(request, text="something else")))
        with pytest.warns(UserWarning, match="does not seem to be that of the server's model"):
            lm.sample([state_of(5)], 1, 2, seeds=[0])


class TestChat:
    @staticmethod
    def reply(request: Request) -> Reply:
        if request.path != "/v1/chat/completions":
            return Reply({"detail": "Not Found"}, 404)
        choice = {"message": {"content": "Good day to you."}, "finish_reason": "stop"}
        return Reply({"choices": [choice]})

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_servers_without_completions(self, fakes, clients):
        server = fakes(self.reply, models=models("somebody", n_params=1))
        lm = clients(server)
        prompt = Prompt("p", (Message("system", "Be kind."), Message("user", "Hi")))
        states = [initial(prompt, lm)]
        with pytest.warns(UserWarning, match="applies its own template"):
            [[chunk]] = lm.sample(states, 1, 20, seeds=[0])
        assert lm.decode(chunk.token_ids) == "Good day to you."
        assert (chunk.finish_reason, chunk.logprobs) == ("stop", ())
        assert chunk.token_ids[-1] == END
        lm.sample(states, 1, 20, seeds=[0])
        assert len(server.bodies()) == 1, "completions are tried once"
        [body, _] = server.bodies("/v1/chat/completions")
        assert body["messages"] == [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
        ]
        begun = TextState(prompt, states[0].prompt_ids, chunk.token_ids[:2])
        with pytest.raises(UnsupportedByServerError, match="not known to continue a response"):
            lm.sample([begun], 1, 20, seeds=[0])
        with pytest.raises(UnsupportedByServerError, match="plain text"):
            lm.sample([state_of(5)], 1, 20, seeds=[0])

    def test_completions_alone(self, fakes, clients):
        lm = clients(fakes(self.reply), mode="completions")
        with pytest.raises(ServerError, match="404"):
            lm.sample(chats(lm)[:1], 1, 20, seeds=[0])

    def test_vllm_goes_on_with_a_message(self, fakes, clients):
        server = fakes(self.reply)
        lm = clients(server, mode="chat")
        [state] = chats(lm, ["Hi"])
        ids = tuple(embedded_tokenizer().tokenizer("Well,")["input_ids"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lm.sample([TextState(state.prompt, state.prompt_ids, ids)], 1, 20, seeds=[0])
        [body] = server.bodies("/v1/chat/completions")
        assert body["messages"][-1] == {"role": "assistant", "content": "Well,"}
        assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


class TestApiKey:
    @pytest.fixture(autouse=True)
    def _key(self, monkeypatch) -> None:
        monkeypatch.setenv("TEST_KEY", SECRET)

    def test_it_is_sent(self, fakes, clients, monkeypatch):
        server = fakes(vllm)
        lm = clients(server, api_key_env="TEST_KEY")
        lm.sample([state_of(5)], 1, 1, seeds=[0])
        assert server.requests[0].headers["Authorization"] == f"Bearer {SECRET}"
        monkeypatch.delenv("TEST_KEY")
        lm.sample([state_of(5)], 1, 1, seeds=[0])
        assert "Authorization" not in server.requests[1].headers

    @pytest.mark.parametrize(
        "reply",
        [
            Reply({"error": {"message": f"the key {SECRET} is not valid"}}, 401),
            Reply({"error": {"message": f"not with {SECRET}"}}, 400),
            Reply(f"broken by {SECRET}", 500, {"Retry-After": "0"}),
            Reply(f"<p>{SECRET}</p>"),
            Reply({"choices": f"for {SECRET}"}),
            Reply("", 429, {"Retry-After": "9999", "X-Key": SECRET}),
            Reply("", 307, {"Location": f"http://u:{SECRET}@other/v1?key={SECRET}"}),
        ],
    )
    def test_it_stands_nowhere(self, fakes, clients, caplog, reply):
        server = fakes(lambda _: reply)
        lm = clients(server, api_key_env="TEST_KEY", max_attempts=2, max_wait=1)
        with (
            caplog.at_level(logging.DEBUG),
            pytest.raises(ServerError) as caught,
        ):
            lm.sample([state_of(5)], 1, 1, seeds=[0])
        whole = "".join(traceback.format_exception(caught.value))
        for text in (whole, repr(lm), repr(vars(lm)), str(pickle.dumps(lm)), *lm.losses):
            assert SECRET not in text
        ours = [r.getMessage() for r in caplog.records if not r.name.startswith("httpcore")]
        assert ours
        assert SECRET not in "".join(ours)
        if "X-Key" not in reply.headers and "Location" not in reply.headers:
            assert SECRET not in caplog.text

    def test_it_does_not_follow_a_redirect(self, fakes, clients):
        other = fakes(vllm)
        server = fakes(lambda r: Reply("", 307, {"Location": f"{other.url}{r.path}"}))
        lm = clients(server, api_key_env="TEST_KEY")
        with pytest.raises(ServerError, match=f"redirects to '{other.url}/v1/completions'"):
            lm.sample([state_of(5)], 1, 1, seeds=[0])
        assert other.requests == []

    def test_a_refused_key_names_the_variable(self, fakes, clients):
        with pytest.raises(ServerError, match="environment variable TEST_KEY"):
            clients(fakes(vllm, models=Reply("no", 403)), api_key_env="TEST_KEY")

    def test_a_key_that_cannot_be_sent(self, fakes, clients, monkeypatch):
        monkeypatch.setenv("TEST_KEY", f"{SECRET}\nX-Other: 1")
        with pytest.raises(ServerError, match="not allowed in an API key") as caught:
            clients(fakes(vllm), api_key_env="TEST_KEY")
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    def test_addresses_with_a_password_are_refused(self, clients):
        with pytest.raises(ServerConfigError, match="without user name, password") as caught:
            clients(f"http://user:{SECRET}@127.0.0.1:1")
        assert SECRET not in str(caught.value)
