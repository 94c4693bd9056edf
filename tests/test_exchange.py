"""Records go to other libraries and come back; fitted folders go to a Hub and come back."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import huggingface_hub
import numpy as np
import pytest

from mbrl_text_env.agents.model_free import load_policy
from mbrl_text_env.exchange import (
    _FOLDERS,
    from_dataset,
    from_minari,
    model_card,
    push_to_hub,
    to_dataset,
    to_minari,
)
from mbrl_text_env.mdp import append, initial
from mbrl_text_env.records import Record, RecordsError
from mbrl_text_env.rewards.learning.learned import LearnedReward, fit_reward
from mbrl_text_env.types import Message, Prompt, Usage
from tests.agents.model_free.test_candidate_policy import LAYOUT, policy
from tests.rewards.learning import test_fitting
from tests.rewards.learning.test_fitting import BLAME, PRAISE, letters, pairs_of
from tests.test_records import make_record
from tests.toys import LetterEncoder, toy_options

TOKEN = "mine"  # noqa: S105 made up
TEXT = "mbrl_text_env/TextGeneration-v0"


@pytest.fixture
def env() -> gym.Env[Any, Any]:
    return gym.make(TEXT, **toy_options(action_format="padded", observation="tokens"))


def written(chunks: list[tuple[int, ...]], env: gym.Env[Any, Any], **changes: Any) -> Record:
    """A record of the toys' tokenizer."""
    task = env.unwrapped.task
    messages = [Message("system", "Be brief."), Message("user", "abc")]
    prompt = Prompt("chat", messages, {"kind": "toy"}, "train")
    state = initial(prompt, task.tokenizer)
    for chunk in chunks:
        stop = "stop" if chunk[-1] in task.tokenizer.stop_token_ids else None
        state = append(state, chunk, stop, 8)
    record = Record.from_state(
        state,
        response=task.tokenizer.decode(state.response_ids),
        logprobs=(-0.5,) * len(state.response_ids),
        score=0.25,
        rewards={"first": 0.25, "second": 0.0},
        reward_name="toy",
        agent="sampling",
        language_model="toy",
        seed=3,
        usage=Usage(generated_tokens=2, lm_flops=1e9).as_dict(),
    )
    return replace(record, **changes)


class TestDatasets:
    datasets = pytest.importorskip("datasets")

    def test_round_trip_by_parquet(self, tmp_path):
        records = [make_record(number) for number in range(5)]
        messages = (Message("user", "Hi"), Message("assistant", "Ho"))
        records += [replace(records[0], messages=messages, sample=2, score=None, rewards={},
                            reward_name="", logprobs=())]  # fmt: skip
        dataset = to_dataset(records)
        assert from_dataset(dataset) == records
        # As the Hub keeps it.
        dataset.add_column("mine", range(6)).to_parquet(tmp_path / "train-00000.parquet")
        again = self.datasets.load_dataset(
            "parquet", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert from_dataset(again) == records

    def test_no_records(self):
        assert from_dataset(to_dataset([])) == []

    def test_other_columns(self):
        dataset = to_dataset([make_record(0)])
        with pytest.raises(RecordsError, match=r"without \['score'\]"):
            from_dataset(dataset.remove_columns("score"))
        with pytest.raises(RecordsError, match="as `to_dataset` writes them"):
            from_dataset(dataset.remove_columns("metadata").add_column("metadata", ["{"]))


class TestMinari:
    minari = pytest.importorskip("minari")

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    @pytest.mark.parametrize(
        "options",
        [
            {"observation": "tokens", "max_prompt_tokens": 40},
            {"observation": "text"},
            {"observation": "embedding", "encoder": LetterEncoder()},
        ],
        ids=lambda options: options["observation"],
    )
    def test_round_trip(self, options):
        env = gym.make(TEXT, **toy_options(action_format="padded", **options))
        stop = min(env.unwrapped.task.tokenizer.stop_token_ids)
        ordinary = [i for i in range(5) if i != stop]
        a, b, c = ordinary[:3]
        records = [
            written([(a, b), (c,), (stop,)], env),
            written([(a, b, c), (a, b, c), (a, b)], env),  # full: 8 tokens
            written([(b, c), (a,)], env, score=None, rewards={}, reward_name="", logprobs=()),
            # Cut short elsewhere.
            written([(b, c), (a,)], env, finish_reason="length", sample=1),
        ]
        made = to_minari(records, "toy/records-v0", env, author="me")
        assert from_minari(made, env) == records
        again = self.minari.load_dataset("toy/records-v0")
        assert from_minari(again, env) == records
        episodes = list(again.iterate_episodes())
        assert [len(e.rewards) for e in episodes] == [3, 3, 2, 2]
        assert [sum(e.rewards) for e in episodes] == [0.25, 0.25, 0.0, 0.25]
        assert [e.terminations[-1] for e in episodes] == [True, False, False, False]
        assert [e.truncations[-1] for e in episodes] == [False, True, False, True]
        # The actions are the environment's: taken in it, they write the same responses.
        for record, episode in zip(records, episodes, strict=True):
            env.reset(options={"prompt": record.prompt()})
            for action in episode.actions:
                *_, info = env.step(action)
            assert info["response"] == record.response

    def test_a_record_without_chunk_ends_is_one_chunk(self, env):
        record = replace(written([(1, 2)], env), chunk_ends=())
        env = gym.make(
            TEXT, **toy_options(action_format="padded", observation="tokens", max_prompt_tokens=40)
        )
        [found] = from_minari(to_minari([record], "toy/whole-v0", env), env)
        assert found == replace(record, chunk_ends=(2,))

    def test_refusals(self, env):
        record = written([(1, 2)], env)
        with pytest.raises(RecordsError, match="max_prompt_tokens"):
            to_minari([record], "toy/long-v0", env)
        short = gym.make(TEXT, **toy_options(action_format="padded", max_response_tokens=1))
        with pytest.raises(RecordsError, match="larger limits"):
            to_minari([record], "toy/short-v0", short)
        small = gym.make(TEXT, **toy_options(action_format="padded", max_chunk_tokens=1))
        with pytest.raises(RecordsError, match="1 to 1 token ids"):
            to_minari([record], "toy/small-v0", small)
        for other in (gym.make("CartPole-v1"), gym.make(TEXT, **toy_options())):
            with pytest.raises(RecordsError, match="action_format='padded'"):
                to_minari([record], "toy/other-v0", other)


class Hub:
    """As much of the Hub as takes files and gives them back."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.tokens.add(self.headers["Authorization"])
                self.answer(hub.posted(self.path, body))

            def do_GET(self) -> None:
                if "/resolve/" in self.path:
                    self.answer(hub.files[self.path.rpartition("/main/")[2]])
                else:
                    files = [{"type": "file", "path": n, "rfilename": n, "size": len(b), "oid": n}
                             for n, b in hub.files.items()]  # fmt: skip
                    info = {"id": "me/it", "sha": "main", "siblings": files}
                    self.answer(files if "/tree/" in self.path else info)

            do_HEAD = do_GET  # noqa: N815 - http.server's own names

            def answer(self, content: Any) -> None:
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(raw)))
                self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
                self.send_header("X-Repo-Commit", "main")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def posted(self, path: str, body: bytes) -> Any:
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                              for f in asked]}  # fmt: skip
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            return {"commitOid": "main", "commitUrl": f"{self.url}/me/it/commit/main"}
        return {"url": f"{self.url}/me/it", "name": "me/it", "id": "1"}

    def downloaded(self, folder: Path) -> Path:
        """As a user downloads it."""
        return Path(huggingface_hub.snapshot_download("me/it", cache_dir=folder / "cache"))

    @contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch) -> Iterator[Hub]:
        constants = huggingface_hub.constants
        with Hub().running() as hub:
            template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            yield hub

    def test_a_reward(self, hub, tmp_path):
        reward = fit_reward(pairs_of(PRAISE, BLAME), features=letters())
        reward.save(tmp_path / "reward")
        assert push_to_hub(tmp_path / "reward", "me/it", token=TOKEN) == f"{hub.url}/me/it"
        assert hub.tokens == {f"Bearer {TOKEN}"}
        folder = hub.downloaded(tmp_path)
        again = LearnedReward(folder, encoder=test_fitting.LetterEncoder())
        texts = ["I love snow.", "I hate it."]
        prompts = [Prompt.from_text("snow")] * 2
        assert again.score(prompts, texts).tolist() == reward.score(prompts, texts).tolist()
        card = huggingface_hub.ModelCard.load(folder / "README.md")
        assert card.data.library_name == "mbrl-text-env"
        assert "reward" in card.data.tags
        assert "LearnedReward(folder)" in card.text

    def test_a_policy_with_its_own_card(self, hub, tmp_path):
        found = policy(hidden=(8, 4))
        found.save(tmp_path / "p", {"more.json": {"a": 1}})
        (tmp_path / "p" / "README.md").write_text("Mine.")
        push_to_hub(tmp_path / "p", "me/it", token=TOKEN)
        folder = hub.downloaded(tmp_path)
        assert (folder / "README.md").read_text() == "Mine."
        assert (folder / "more.json").is_file()
        read = load_policy(folder)
        rows = np.random.default_rng(0).normal(size=(3, LAYOUT.size))
        assert read.scores(rows).tolist() == found.scores(rows).tolist()

    def test_other_folders_are_refused(self, hub, tmp_path):
        with pytest.raises(ValueError, match=r"one of policy\.json.*got none"):
            push_to_hub(tmp_path, "me/it")
        assert hub.files == {}

    @pytest.mark.parametrize("name", _FOLDERS)
    def test_what_the_cards_name_is_there(self, name, tmp_path):
        (tmp_path / name).write_text('{"a": [1]}')
        code = re.search("```python\n(.*?)```", model_card(tmp_path, "me/it"), re.DOTALL)[1]
        module, function = re.search(r"from (mbrl_text_env\S*) import (\w+)", code).groups()
        assert callable(getattr(import_module(module), function))
        compile(code, "card", "exec")
