"""The server over a real socket, asked by the openai client and httpx."""

import asyncio
import contextlib
import hashlib
import json
import threading
import time

import httpx
import openai
import pytest
import uvicorn

from mbrl_text_env.agents import make
from mbrl_text_env.benchmarks.serve import Limits
from mbrl_text_env.benchmarks.serving import create_app
from mbrl_text_env.language_models import NGramLM
from mbrl_text_env.rewards import TimeLimit
from mbrl_text_env.types import Budget, Prompt
from tests.toys import CountReward

TOKENS = 8
KEY = "sk-secret"


class SlowLM(NGramLM):
    """Says how many requests each of its calls had; a call takes `seconds`."""

    def __init__(self, seconds=0.0):
        super().__init__("abcdefgh", order=2, seed=4)
        self.seconds, self.calls = seconds, []

    def sample_requests(self, requests, *, ledgers=None):
        self.calls.append(len(requests))
        time.sleep(self.seconds)
        return super().sample_requests(requests, ledgers=ledgers)


class FickleReward(CountReward):
    """Fails as the prompt says."""

    name = "fickle"

    def score(self, prompts, responses):
        texts = [prompt.text for prompt in prompts]
        if "h" in texts:
            time.sleep(30)
        if "e" in texts:
            raise KeyError("secret of the reward")
        if "g" in texts:
            return [float("nan")] * len(texts)
        return super().score(prompts, responses)


@contextlib.contextmanager
def serving(lm=None, reward=None, budget=None, spec="best-of-n:n=4", **options):
    lm, reward = lm or SlowLM(), reward or CountReward()
    specs = {"best": spec, "plain": "sampling"}
    agents = {k: make(v, lm, reward, max_response_tokens=TOKENS) for k, v in specs.items()}
    limits = Limits(**options.pop("limits", {}))
    app = create_app(agents, budget or Budget(tokens=64), limits=limits, **options)
    config = uvicorn.Config(
        app, port=0, log_level="error", timeout_graceful_shutdown=limits.shutdown_timeout
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        app.state.url, app.state.server, app.state.thread = (
            f"http://127.0.0.1:{port}",
            server,
            thread,
        )
        yield app.state
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def state():
    with serving(api_key=KEY) as state:
        yield state


@pytest.fixture(scope="module")
def client(state):
    return openai.OpenAI(base_url=f"{state.url}/v1", api_key=KEY, max_retries=0)


def ask(client, text="ab", model="best", **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, **options)


def post(state, path="chat/completions", key=KEY, **body):
    body = {"model": "best", "messages": [{"role": "user", "content": "ab"}], **body}
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    # Half a character can be written in JSON.
    content = json.dumps(body)
    return httpx.post(f"{state.url}/v1/{path}", content=content, headers=headers, timeout=60)


async def post_all(state, bodies):
    async with httpx.AsyncClient(base_url=state.url, timeout=60) as client:
        posts = [client.post("/v1/completions", json={"model": "best", **b}) for b in bodies]
        return await asyncio.gather(*posts)


def is_idle(state):
    end = time.monotonic() + 30
    service = state.service
    while time.monotonic() < end:
        if (service.running, service.waiting, service.driver.searches) == (0, 0, 0):
            return True
        time.sleep(0.01)
    return False


class TestAnswers:
    def test_a_chat(self, client):
        answer = ask(client, seed=3)
        [choice] = answer.choices
        assert choice.finish_reason in ("stop", "length")
        text = choice.message.content
        assert choice.score == text.count("a") / max(1, len(text))
        # Four responses were drawn and scored for the one that was sent.
        search = answer.usage.search
        assert search["reward_calls"] <= 4
        assert search["lm_calls"] == 4 or search["generated_tokens"] <= 4 * TOKENS
        assert answer.usage.prompt_tokens == 2
        assert 0 < answer.usage.completion_tokens <= TOKENS

    def test_it_is_what_the_agent_answers(self, client):
        agent = make("best-of-n:n=4", SlowLM(), CountReward(), max_response_tokens=TOKENS)
        answer = client.completions.create(model="best", prompt="ab", seed=3)
        prompt = Prompt(hashlib.sha256(repr("ab").encode()).hexdigest()[:16], "ab")
        [found] = agent.generate([prompt], Budget(tokens=64), seed=3)
        assert answer.choices[0].text == found.text

    def test_the_search_beats_its_model(self, client):
        def mean(model):
            answers = [ask(client, "ab", model, seed=seed) for seed in range(16)]
            texts = [answer.choices[0].message.content for answer in answers]
            return sum(t.count("a") / max(1, len(t)) for t in texts) / len(texts)

        assert mean("best") > mean("plain") + 0.1

    def test_seeds(self, client):
        two = ask(client, seed=5, n=2).choices
        assert [c.index for c in two] == [0, 1]
        assert two[0].message.content == ask(client, seed=5).choices[0].message.content
        assert two[0].message.content != two[1].message.content
        free = ask(client)
        again = ask(client, seed=free.seed)
        assert free.choices[0].message.content == again.choices[0].message.content

    def test_several_prompts(self, client):
        answer = client.completions.create(model="best", prompt=["ab", "c"], n=2, seed=1)
        alone = client.completions.create(model="best", prompt="c", n=2, seed=1)
        assert [c.text for c in answer.choices[2:]] == [c.text for c in alone.choices]
        assert answer.usage.prompt_tokens == 3

    def test_greedy_and_tokens(self, client):
        texts = {
            ask(client, temperature=0, seed=s, max_tokens=3).choices[0].message.content
            for s in range(4)
        }
        assert len(texts) == 1
        assert len(texts.pop()) <= 3

    def test_a_stop_text_cuts_and_the_score_is_of_what_is_sent(self, client):
        found = ask(client, stop=["a", "b"], seed=2, n=8).choices
        for choice in found:
            text = choice.message.content
            assert "a" not in text
            assert "b" not in text
            assert choice.score == 0.0
        assert any(choice.finish_reason == "stop" for choice in found)

    def test_a_stream_adds_up_to_the_answer(self, client):
        whole = ask(client, seed=4, n=2)
        chunks = list(ask(client, seed=4, n=2, stream=True, stream_options={"include_usage": True}))
        for choice in whole.choices:
            parts = [c for k in chunks for c in k.choices if c.index == choice.index]
            assert "".join(p.delta.content or "" for p in parts) == choice.message.content
            assert parts[0].delta.role == "assistant"
            assert parts[-1].finish_reason == choice.finish_reason
            assert parts[-1].score == choice.score
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

    def test_a_stream_ends_with_done_and_has_the_score_in_a_header(self, state):
        answer = post(state, seed=4, stream=True)
        lines = [line for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2].removeprefix("data: "))
        assert float(answer.headers["x-score"]) == last["choices"][0]["score"]

    def test_what_is_off_or_for_the_books_is_ignored(self, client):
        off = {"tools": [], "logprobs": False, "frequency_penalty": 0}
        books = {"user": "me", "metadata": {"a": "b"}}
        assert ask(client, seed=1, **off, **books).choices == ask(client, seed=1).choices

    def test_parts_of_messages(self, client):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert ask(client, parts, seed=1).choices == ask(client, "ab", seed=1).choices

    def test_models_health_and_metrics(self, state, client):
        assert [model.id for model in client.models.list()] == ["best", "plain"]
        assert httpx.get(f"{state.url}/health").json() == {"status": "ok"}
        text = httpx.get(f"{state.url}/metrics").text
        assert 'mbrl_text_requests_total{path="/v1/chat/completions",status="200"}' in text
        assert 'mbrl_text_spent_total{kind="generated_tokens"}' in text
        assert "mbrl_text_running_searches 0.0" in text


@pytest.mark.parametrize(
    ("body", "status", "param", "word"),
    [
        ({"model": "gpt"}, 404, "model", "best"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "Not supported"),
        ({"logprobs": True}, 400, "logprobs", "Not supported"),
        ({"max_tokens": TOKENS + 1}, 400, "max_tokens", "at most 8"),
        ({"max_completion_tokens": 99}, 400, "max_tokens", "at most 8"),
        ({"max_tokens": 0}, 400, "max_tokens", "1"),
        ({"temperature": 3}, 400, "temperature", "2"),
        ({"temperature": "1"}, 400, "temperature", "number"),
        ({"n": 9}, 400, "n", "at most 8"),
        ({"n": 0}, 400, "n", "1"),
        ({"seed": -1}, 400, "seed", "0"),
        ({"stop": [""]}, 400, None, ""),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "0"),
        ({"messages": []}, 400, "messages", "required"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role", "user"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, None, "empty"),
        ({"messages": [{"role": "user", "content": "ab\ud800"}]}, 400, None, "half"),
        ({"messages": [{"role": "user", "content": "a" * 2000}]}, 400, None, "context"),
        ({"messages": [{"role": "user", "content": "a" * 2**21}]}, 413, None, "bytes"),
    ],
)
def test_what_is_refused(state, body, status, param, word):
    answer = post(state, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert word in error["message"]
    if param is not None:
        assert error["param"] == param


def test_no_json_and_no_such_place(state):
    headers = {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{state.url}/v1/completions", content=b"{", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = httpx.request(method, state.url + path, headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", f"Bearer {KEY}x", "Bearer ü"])
def test_a_wrong_key(state, given):
    headers = {} if given is None else {"authorization": given.encode()}
    for path in ("models", "chat/completions"):
        answer = httpx.get(f"{state.url}/v1/{path}", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_concurrent_requests_share_batches_and_leave_nothing_behind():
    lm = SlowLM(0.02)
    with serving(lm) as state:
        for _ in range(4):
            bodies = [{"prompt": "ab", "seed": seed} for seed in range(25)]
            answers = asyncio.run(post_all(state, bodies))
            assert {answer.status_code for answer in answers} == {200}
        assert sum(lm.calls) == 100
        assert len(lm.calls) < 30
        assert is_idle(state)
        assert not state.service.driver._waiting


def test_a_crowd_with_clients_that_leave_and_some_too_many():
    lm = SlowLM(0.1)
    with serving(lm, limits={"max_running": 8, "max_waiting": 8}) as state:

        async def crowd():
            async with httpx.AsyncClient(base_url=state.url, timeout=60) as client:

                async def one(number):
                    body = {"model": "best", "prompt": "ab", "seed": number}
                    return await client.post("/v1/completions", json=body)

                tasks = [asyncio.create_task(one(number)) for number in range(32)]
                await asyncio.sleep(0.15)
                for task in tasks[::4]:
                    task.cancel()
                return await asyncio.gather(*tasks, return_exceptions=True)

        answers = [a for a in asyncio.run(crowd()) if isinstance(a, httpx.Response)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(answers) >= 24
        assert {answer.status_code for answer in answers} == {200, 429}
        assert len(refused) >= 8
        assert refused[0].headers["retry-after"] == "1"
        assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
        assert is_idle(state)
        assert asyncio.run(post_all(state, [{"prompt": "ab"}]))[0].status_code == 200


def test_a_client_that_leaves_ends_its_search():
    lm = SlowLM(0.05)
    with serving(lm, spec="best-of-n", budget=Budget(tokens=10**6)) as state:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{state.url}/v1/completions", json={"model": "best", "prompt": "ab"}, timeout=0.5
            )
        assert is_idle(state)
        made = len(lm.calls)
        time.sleep(0.2)
        assert 1 < made == len(lm.calls)


def test_a_request_that_takes_too_long():
    limits = {"request_timeout": 0.3}
    with serving(SlowLM(0.05), None, Budget(tokens=10**6), "best-of-n", limits=limits) as state:
        answer = post(state)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        assert answer.headers["x-should-retry"] == "false"
        assert is_idle(state)


@pytest.mark.parametrize("bad", ["e", "g", "h"])
def test_a_bad_reward_costs_its_own_request(bad):
    with serving(SlowLM(0.1), TimeLimit(FickleReward(), 0.5)) as state:
        bodies = [{"prompt": text, "seed": 1} for text in ("ab", bad, "ba", "c")]
        answers = asyncio.run(post_all(state, bodies))
        assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
        error = answers[1].json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "reward_failed")
        assert "'fickle'" in error["message"]
        assert "secret" not in answers[1].text


def test_limits_of_prompts():
    with serving(limits={"max_prompt_tokens": 3}) as state:
        answers = asyncio.run(post_all(state, [{"prompt": "abc"}, {"prompt": "abcd"}]))
        assert [answer.status_code for answer in answers] == [200, 400]
        assert answers[1].json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(("seconds", "status"), [(30, 200), (0, None)])
def test_shutdown_finishes_or_cancels(seconds, status):
    lm = SlowLM(0.3)
    budget = Budget(tokens=64 if status else 10**6)
    spec = "best-of-n:n=4" if status else "best-of-n"
    with serving(lm, None, budget, spec, limits={"shutdown_timeout": seconds}) as state:

        async def stopped():
            asked = asyncio.create_task(post_all(state, [{"prompt": "ab"}]))
            while not lm.calls:
                await asyncio.sleep(0.01)
            state.server.should_exit = True
            return await asyncio.gather(asked, return_exceptions=True)

        [found] = asyncio.run(stopped())
        state.thread.join(30)
        assert not state.thread.is_alive()
        if status:
            assert found[0].status_code == 200
        else:
            assert isinstance(found, httpx.HTTPError) or found[0].status_code == 500
    made = len(lm.calls)
    time.sleep(0.4)
    assert len(lm.calls) == made
