"""Language models go to other processes as what makes them again."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import gymnasium as gym
import pytest
import torch
import transformers

from mbrl_text_env.language_models import TransformersLM
from mbrl_text_env.types import Prompt, TextState
from tests.language_models.conftest import make_config
from tests.toys import CountReward

STATE = TextState(Prompt("p", "x"), (5, 6, 7))


def drawn(lm: TransformersLM) -> list[tuple[int, ...]]:
    [chunks] = lm.sample([STATE], 2, 4, seeds=[0])
    return [chunk.token_ids for chunk in chunks]


def played(env: gym.Env) -> list[tuple[str, ...]]:
    """The candidates of an episode's first steps."""
    torch.set_num_threads(1)
    _, info = env.reset(seed=0)
    candidates = [tuple(info["candidates"])]
    candidates.append(tuple(env.step(0)[-1]["candidates"]))
    return candidates


def test_a_folder_with_its_options(model_folder):
    lm = TransformersLM(model_folder("llama"), batch_size=3, name="mine")
    again = pickle.loads(pickle.dumps(lm))  # noqa: S301 - made here
    assert (again.name, again.batch_size) == ("mine", 3)
    assert again.identity() == lm.identity()
    assert drawn(again) == drawn(lm)


def test_a_relative_folder(model_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(model_folder("llama").parent)
    lm = TransformersLM(model_folder("llama").name)
    pickled = pickle.dumps(lm)
    monkeypatch.chdir(tmp_path)
    assert drawn(pickle.loads(pickled)) == drawn(lm)  # noqa: S301 - made here


def test_with_an_adapter(model_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "mine")
    base = TransformersLM(model_folder("llama"))
    lm = base.with_adapter(tmp_path / "mine")
    again = pickle.loads(pickle.dumps(lm))  # noqa: S301 - made here
    assert again.identity() == lm.identity() != base.identity()


def test_a_module_in_memory(tokenizer):
    config = make_config("llama", tokenizer.eos_token_id)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(pickle.PicklingError, match=r"module in memory.*save_pretrained"):
        pickle.dumps(TransformersLM(model, tokenizer=tokenizer))


def test_one_that_was_trained(model_folder):
    lm = TransformersLM(model_folder("llama"))
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(2)
    with pytest.raises(pickle.PicklingError, match=r"was trained.*save_pretrained"):
        pickle.dumps(lm)


def test_an_environment_in_a_spawned_process(model_folder):
    env = gym.make(
        "mbrl_text_env/CandidateChunks-v0",
        prompts=[Prompt.from_text("The river", chat=False)],
        reward_model=CountReward(),
        language_model=TransformersLM(model_folder("llama"), device="cpu"),
        num_candidates=2,
        encoder=None,
    )
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(played, env).result() == played(env)
