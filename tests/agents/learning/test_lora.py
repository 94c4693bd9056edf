"""Adapters: what is trained, written, refused and served."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from mbrl_text_env.agents.learning import AdapterSettings, TuningError, check_base, serve
from mbrl_text_env.agents.learning.lora import ADAPTER, base_of, trainable, write
from tests.agents.learning.tiny import tiny_lm

IDS = torch.tensor([[5, 60, 200, 31, 7]])


def moved(lm, seed=0):
    """A peft model whose adapter changes something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = trainable(lm, AdapterSettings(r=4, alpha=8))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    write(path, moved(tiny_lm()), tiny_lm(), {"note.json": {"a": 1}})
    return path


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def test_what_is_trained():
    lm = tiny_lm()
    model = trainable(lm, AdapterSettings(r=4, alpha=8, targets=("q_proj", "o_proj")))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # Two layers of hidden size 32, queries and outputs as wide: A is 4 x 32, B is 32 x 4.
    assert sum(p.numel() for p in trained.values()) == 2 * 2 * (4 * 32 + 32 * 4)
    assert {name.split(".")[-4] for name in trained} == {"q_proj", "o_proj"}
    assert model.peft_config["default"].lora_alpha / model.peft_config["default"].r == 2
    # A new adapter changes nothing.
    torch.testing.assert_close(logits(model), logits(lm.model), rtol=0, atol=0)


def test_frozen_weights_are_shared_and_stay():
    lm = tiny_lm()
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    model = trainable(lm, AdapterSettings(r=4))
    own = {p.data_ptr() for p in lm.model.parameters()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(p.data_ptr() in own for p in frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())
    # Nothing of the trainer's lies on the serving model.
    assert all(not p.requires_grad or p.grad is None for p in lm.model.parameters())
    assert not any("lora" in name for name, _ in lm.model.named_modules())


def test_a_reduced_format_is_trained_in_float32():
    lm = tiny_lm(dtype=torch.bfloat16)
    model = trainable(lm, AdapterSettings(r=4))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


def test_what_is_served_is_what_was_trained(folder):
    lm = tiny_lm()
    served = serve(lm, folder)
    torch.testing.assert_close(logits(served.model), logits(moved(lm)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(served.model), logits(lm.model), atol=0.1)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert served.name == f"{lm.name}+{hashlib.sha256(weights).hexdigest()[:12]}"
    assert serve(lm, folder, "mine").name == "mine"


def test_going_on_from_an_adapter(folder):
    lm = tiny_lm()
    again = trainable(lm, AdapterSettings(), start_from=folder)
    torch.testing.assert_close(logits(again.eval()), logits(moved(lm)))
    assert {n.split(".")[-3] for n, p in again.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_the_folder(folder):
    suffixes = {path.suffix for path in folder.iterdir()}
    assert suffixes <= {".json", ".jinja", ".safetensors", ".txt"}
    assert json.loads((folder / "note.json").read_text()) == {"a": 1}
    assert json.loads((folder / "base.json").read_text())["name"] == "tiny"
    # No path of the machine that it was trained on.
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "tiny"
    )
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_the_fingerprint_is_of_weights_and_not_of_formats():
    own = base_of(tiny_lm())["fingerprint"]
    assert base_of(tiny_lm(dtype=torch.bfloat16))["fingerprint"] == own
    assert base_of(tiny_lm(dtype=torch.int8))["fingerprint"] == own
    assert base_of(tiny_lm(seed=1))["fingerprint"] != own
    assert base_of(tiny_lm(family="qwen2"))["fingerprint"] != own


class TestRefused:
    def test_another_base(self, folder):
        for other in (tiny_lm(seed=1), serve(tiny_lm(), folder)):
            with pytest.raises(TuningError, match=r"expected an adapter for .* trained on 'tiny'"):
                serve(other, folder)
            with pytest.raises(TuningError, match="Load that model, or fine-tune this one"):
                trainable(other, AdapterSettings(), start_from=folder)

    @pytest.mark.parametrize("missing", ["base.json", "adapter_model.safetensors"])
    def test_half_an_adapter(self, folder, tmp_path, missing):
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "copy" / missing).unlink()
        with pytest.raises(TuningError, match=missing):
            check_base(tmp_path / "copy", tiny_lm())

    @pytest.mark.parametrize("text", ["{", "[]", '{"name": "tiny"}'])
    def test_a_damaged_note(self, folder, tmp_path, text):
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "copy" / "base.json").write_text(text)
        with pytest.raises(TuningError, match="Check the path, or fit the LoRA adapter anew"):
            serve(tiny_lm(), tmp_path / "copy")

    def test_unknown_targets(self):
        with pytest.raises(TuningError, match=r"among \['down_proj'.*got \['query'\]"):
            trainable(tiny_lm(), AdapterSettings(targets=("query",)))

    @pytest.mark.parametrize(
        "setting",
        [{"r": 0}, {"alpha": -1}, {"dropout": 1.0}, {"targets": ()}, {"targets": "q_proj"}],
    )
    def test_settings(self, setting):
        with pytest.raises(TuningError, match=next(iter(setting))):
            AdapterSettings(**setting)

    def test_folders_of_others(self, folder, tmp_path):
        for path in (tmp_path, tmp_path / "new", folder):
            ADAPTER.check_target(path)
        (tmp_path / "mine.txt").write_text("precious")
        for path in (tmp_path, tmp_path / "mine.txt"):
            with pytest.raises(TuningError, match="expected a new folder"):
                ADAPTER.check_target(path)
