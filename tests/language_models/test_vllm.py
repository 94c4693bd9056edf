"""The server client against a real vLLM; `make test-vllm` runs it.

`VLLM_PYTHON` is the interpreter of an environment that has vLLM.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbrl_text_env.benchmarks.compare import compare
from mbrl_text_env.benchmarks.llama_server import free_port
from mbrl_text_env.checks import check_language_model
from mbrl_text_env.language_models import (
    SampleRequest,
    ServerLM,
    TransformersLM,
    embedded_tokenizer,
)
from mbrl_text_env.language_models.guarding import sample_requests as guarded_requests
from mbrl_text_env.language_models.registry import embedded_folder
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.rewards import make
from mbrl_text_env.rewards.base import score_responses
from mbrl_text_env.types import Budget, Chunk, Ledger, Prompt, TextState
from tests.benchmarks.test_serving import TOKENS, is_idle, post_all, serving
from tests.language_models.test_guard import without
from tests.language_models.test_server import (
    GREEDY,
    assert_complete,
    chats,
    comparison,
    ledgers_for,
    rows_of,
)

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no interpreter with vLLM"),
    pytest.mark.timeout(1800),
]
PARAMETERS = 134_515_008
BLOCK = 32
"""Tokens that the prefix cache keeps together; the fewest that vLLM's kernels for CPUs take."""
START_SECONDS = 600.0
# Logits of two float32 programs differ by less; a greedy token may differ where the best two are
# as near to each other.
TIE = 1e-3


class VLLMServer:
    """A process group that can be killed and started again on its port."""

    def __init__(self, log: Path) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> VLLMServer:
        options = {
            "model": embedded_folder(),
            "served-model-name": "SmolLM2-135M-Instruct",
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": "float32",
            "max-model-len": 1024,
            "block-size": BLOCK,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        # As `vllm serve`, which needs a distribution called vllm: that for CPUs is vllm-cpu.
        module = ["-m", "vllm.entrypoints.openai.api_server"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [PYTHON, *module, *words, "--enforce-eager", "--enable-prompt-tokens-details"],
                env={**os.environ, **own, "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def ready(self) -> VLLMServer:
        assert self.process is not None
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):  # noqa: S310 loopback
                return self
            time.sleep(0.2)
        raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        assert self.process is not None
        # Its workers, too.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    found = VLLMServer(tmp_path_factory.mktemp("vllm") / "log").start()
    try:
        yield found.ready()
    finally:
        found.kill()


@pytest.fixture
def lm(server: VLLMServer) -> Iterator[ServerLM]:
    found = ServerLM(
        server.url,
        tokenizer=embedded_tokenizer(),
        num_parameters=PARAMETERS,
        max_wait=START_SECONDS,
    )
    yield found
    found.close()


def test_what_it_is(lm: ServerLM) -> None:
    assert (lm.name, lm.context_length) == ("SmolLM2-135M-Instruct", 1024)
    assert (lm.most_next_tokens, lm.losses) == (20, ())


def test_it_keeps_the_contract(lm: ServerLM) -> None:
    check_language_model(lm, [Prompt.from_text("A dog", chat=False)], max_new_tokens=2)


def test_greedy_tokens_are_those_of_the_engine(lm: ServerLM, smollm2: TransformersLM) -> None:
    states = [initial(prompt, smollm2) for prompt in load_prompts(split="test")[:4]]
    theirs, ours = (
        [row[0] for row in each.sample(states, 1, 24, seeds=[0] * 4, params=GREEDY)]
        for each in (lm, smollm2)
    )
    for state, their, our in zip(states, theirs, ours, strict=True):
        pairs = zip(their.token_ids, our.token_ids, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(our))
        np.testing.assert_allclose(their.logprobs[:same], our.logprobs[:same], atol=TIE)
        if their.token_ids != our.token_ids:
            there = TextState(state.prompt, state.prompt_ids, our.token_ids[:same])
            [best] = smollm2.next_tokens([there], 2)
            assert set(best.token_ids) == {their.token_ids[same], our.token_ids[same]}
            assert best.logprobs[0] - best.logprobs[1] < TIE


def test_log_probabilities(lm: ServerLM, smollm2: TransformersLM) -> None:
    states = chats(lm)
    chunks = [Chunk((504, 2988, 314)), Chunk((36, 2)), Chunk((0,))]
    for logs, exact in zip(*(each.logprobs(states, chunks) for each in (lm, smollm2)), strict=True):
        np.testing.assert_allclose(logs, exact, atol=TIE)
    for found, exact in zip(*(each.next_tokens(states, 5) for each in (lm, smollm2)), strict=True):
        assert found.token_ids == exact.token_ids
        np.testing.assert_allclose(found.logprobs, exact.logprobs, atol=TIE)


def test_a_guard_is_kept(lm: ServerLM) -> None:
    request = SampleRequest(chats(lm)[2], 1, 12, 0, guard=without("eE"))
    [row] = guarded_requests(lm, [request], ledgers=[Ledger()])
    assert not set("eE") & set("".join(lm.decode(chunk.token_ids) for chunk in row))
    assert all(len(c.logprobs) == len(c) == 12 or c.finish_reason == "stop" for c in row)


def test_ledgers(lm: ServerLM) -> None:
    states = chats(lm)
    ledgers = ledgers_for(states)
    rows = lm.sample(states, 2, 34, seeds=[4, 5, 6], ledgers=ledgers)
    for state, row, ledger in zip(states, rows, ledgers, strict=True):
        usage = ledger.usage
        # One request draws both samples, and its prompt counts once.
        assert usage.prompt_tokens + usage.cached_tokens == len(state.prompt_ids)
        assert (usage.lm_calls, usage.generated_tokens) == (1, sum(map(len, row)))
        assert usage.lm_flops == 2 * PARAMETERS * (usage.prompt_tokens + usage.generated_tokens)
    longer = [
        TextState(s.prompt, s.prompt_ids, row[0].token_ids[:-1])
        for s, row in zip(states, rows, strict=True)
    ]
    again = ledgers_for(states)
    lm.sample(longer, 1, 1, seeds=[0] * 3, ledgers=again)
    for state, ledger in zip(longer, again, strict=True):
        length = len(state.prompt_ids) + len(state.response_ids)
        # Whole blocks come from the cache, and at least the last token is computed.
        assert ledger.usage.cached_tokens == (length - 1) // BLOCK * BLOCK > 0
        assert ledger.usage.prompt_tokens == length - ledger.usage.cached_tokens


def test_behind_a_server_of_ours(lm: ServerLM) -> None:
    """Requests at a time, each a search over vLLM, score higher than one response of it."""
    prompts, reward = load_prompts(split="validation")[:8], make("sentiment")
    options = {"spec": "best-of-n:n=8", "budget": Budget(tokens=8 * TOKENS)}
    with serving(lm, reward, **options) as state:

        def mean(model: str) -> float:
            bodies = [{"model": model, "prompt": prompt.text, "seed": 0} for prompt in prompts]
            answers = [answer.json() for answer in asyncio.run(post_all(state, bodies))]
            for answer in answers:
                assert 0 < answer["usage"]["search"]["generated_tokens"] <= 8 * TOKENS
            texts = [answer["choices"][0]["text"] for answer in answers]
            return float(score_responses(reward, prompts, texts).total.mean())

        assert mean("best") > mean("plain") + 0.1
        assert is_idle(state)


def test_killed_and_restarted_in_the_middle_of_a_comparison(
    server: VLLMServer, lm: ServerLM, tmp_path: Path
) -> None:
    compare(comparison(lm), tmp_path / "undisturbed")
    killed: list[str] = []

    def kill_once(spec: str, count: int, rows: list[Any]) -> None:
        if not killed:
            killed.append(spec)
            server.kill()
            # Back while the next batch is being asked for.
            threading.Timer(0.5, server.start).start()

    summary = compare(comparison(lm), tmp_path / "disturbed", on_batch=kill_once)
    assert killed == ["sampling"]
    assert_complete(tmp_path / "disturbed", summary)
    undisturbed, disturbed = (rows_of(tmp_path / name) for name in ("undisturbed", "disturbed"))
    for before, after in zip(undisturbed, disturbed, strict=True):
        for name in ("agent", "prompt_id", "response", "score"):
            assert before[name] == after[name]
