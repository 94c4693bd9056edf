"""Classifiers of real architectures, tiny and random, loaded as any model of the Hub is."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

from mbrl_text_env.checks import check_reward_model
from mbrl_text_env.rewards.base import RewardError, score_responses
from mbrl_text_env.rewards.evaluators.classifier import ClassifierReward
from mbrl_text_env.types import Message, Prompt

PROMPT = Prompt.from_text("How are you?")
PLAIN = Prompt.from_text("How are you?", chat=False)
CHAT = Prompt(
    "chat",
    (Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello")),
)
RESPONSES = ["I am fine.", "The sky is blue, and I am fine, 1 2 3! " * 3, "", "Why?"]


def reference_logits(folder, *texts, **options):
    """What transformers itself gives for one text, or one pair of texts."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    # As lists: transformers takes a single empty second text for none at all.
    inputs = tokenizer(*([text] for text in texts), return_tensors="pt", **options)
    with torch.inference_mode():
        return model(**inputs).logits[0].double().numpy()


def score(reward, responses=RESPONSES, prompt=PROMPT):
    return score_responses(reward, [prompt] * len(responses), responses).total


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "modernbert", "deberta", "llama", "qwen2", "qwen3", "gemma"]
)
def test_pair_is_the_tokenizers_pair(classifiers, name):
    short = [r[:100] for r in RESPONSES]
    expected = [reference_logits(classifiers[name], PROMPT.text, r)[0] for r in short]
    scores = score(ClassifierReward(classifiers[name]), short)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(scores) > 0.05


@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_article_is_the_articles_pipeline(classifiers, name):
    from transformers import pipeline

    long = [*RESPONSES, "I am fine. " * 400]
    texts = [f"User: {PROMPT.text}\nAssistant: {response}" for response in long]
    classify = pipeline("text-classification", model=str(classifiers[name]), device="cpu")
    expected = [classify(text, truncation=True, max_length=512)[0]["score"] for text in texts]
    reward = ClassifierReward(classifiers[name], text_format="article", output="sigmoid")
    with pytest.warns(UserWarning, match="cut 1 text"):
        np.testing.assert_allclose(score(reward, long), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_with_padding", "qwen2", "qwen3", "gemma"])
def test_chat_is_the_tokenizers_chat_template(classifiers, name):
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(classifiers[name])
    messages = [{"role": m.role, "content": m.content} for m in CHAT.content]
    messages.append({"role": "assistant", "content": "Why?"})
    text = template.apply_chat_template(messages, tokenize=False)
    assert "Be kind." in text
    expected = reference_logits(classifiers[name], text, add_special_tokens=False)[0]
    reward = ClassifierReward(classifiers[name], text_format="chat")
    assert score(reward, ["Why?"], CHAT)[0] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(score(reward, prompt=PLAIN), score(reward, prompt=PROMPT))


def test_formats_differ(classifiers):
    folder = classifiers["llama_with_padding"]
    scores = [
        score(ClassifierReward(folder, text_format=text_format), ["Why?"])[0]
        for text_format in ("pair", "article", "chat")
    ]
    assert len({round(value, 4) for value in scores}) == 3


def test_outputs_of_a_single_logit(classifiers):
    logits = score(ClassifierReward(classifiers["bert"]))
    sigmoids = score(ClassifierReward(classifiers["bert"], output="sigmoid"))
    np.testing.assert_allclose(sigmoids, 1 / (1 + np.exp(-logits)))
    named = ClassifierReward(classifiers["bert"], label="LABEL_0")
    np.testing.assert_array_equal(score(named), logits)


def test_outputs_of_several_classes(classifiers):
    folder = classifiers["bert_with_three_classes"]
    logits = reference_logits(folder, PROMPT.text, "Why?")
    shares = np.exp(logits) / np.exp(logits).sum()
    for label, index in (("bad", 0), ("good", 2), (1, 1)):
        reward = ClassifierReward(folder, label=label)
        assert score(reward, ["Why?"])[0] == pytest.approx(logits[index], abs=1e-5)
        reward = ClassifierReward(folder, label=label, output="softmax")
        assert score(reward, ["Why?"])[0] == pytest.approx(shares[index], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "bert_with_three_classes",
            {},
            r"classes \['bad', 'fair', 'good'\].*got None. Pass label=, with output='softmax'",
        ),
        ("bert_with_three_classes", {"label": "great"}, "got 'great'"),
        ("bert_with_three_classes", {"label": 3}, "got 3"),
        ("bert_with_three_classes", {"label": -1}, "got -1"),
        (
            "bert_with_three_classes",
            {"label": "good", "output": "sigmoid"},
            "output='sigmoid' does not fit a model with 3 outputs. Use .* or 'softmax'",
        ),
        ("bert", {"output": "softmax"}, "does not fit a model with 1 output. Use .* or 'sigmoid'"),
        ("bert", {"label": 1}, r"classes \['LABEL_0'\].*got 1"),
        ("bert", {"text_format": "chat"}, "needs a tokenizer with a chat template"),
        ("bert", {"text_format": "chatty"}, "text_format: expected one of .*got 'chatty'"),
        ("bert", {"output": "tanh"}, "output: expected one of .*got 'tanh'"),
        ("bert", {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ("bert", {"batch_tokens": 0}, "batch_tokens: expected at least 1, got 0"),
        ("bert", {"max_length": 0}, "max_length: expected at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(classifiers, name, options, message):
    reward = ClassifierReward(classifiers[name], **options)
    with pytest.raises(RewardError, match=message) as caught:
        score(reward)
    assert caught.match(f"{reward.name!r}")


@pytest.mark.parametrize(
    ("name", "text_format"),
    [
        *((name, "pair") for name in ("bert", "modernbert", "deberta")),
        *((name, "chat") for name in ("llama_with_padding", "qwen2", "qwen3", "gemma")),
    ],
)
def test_the_batch_does_not_change_a_score(classifiers, name, text_format):
    options = ({"batch_size": 1}, {"batch_size": 2}, {}, {"batch_tokens": 60}, {"batch_tokens": 1})
    one = ClassifierReward(classifiers[name], text_format=text_format)
    alone = np.concatenate([score(one, [r]) for r in RESPONSES])
    for option in options:
        reward = ClassifierReward(classifiers[name], text_format=text_format, **option)
        np.testing.assert_allclose(score(reward), alone, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Reward model .* cut 1 text")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {}),
        ("deberta", {"text_format": "article", "output": "sigmoid"}),
        ("bert_with_three_classes", {"output": "softmax", "label": "good"}),
        ("qwen2", {"text_format": "chat"}),
    ],
)
def test_it_keeps_the_contract(classifiers, name, options):
    check_reward_model(ClassifierReward(classifiers[name], **options))


def test_long_texts_go_in_batches_of_few(classifiers, monkeypatch):
    import torch
    from transformers import BertForSequenceClassification

    shapes = []
    forward = BertForSequenceClassification.forward

    def noted(self, input_ids, **inputs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", noted)
    reward = ClassifierReward(classifiers["bert"], batch_tokens=300)
    with torch.inference_mode():
        score(reward, ["Why? " * count for count in (2, 100, 1, 3, 90, 120)])
    assert [rows for rows, _ in shapes] == [3, 1, 1, 1]
    assert all(rows == 1 or rows * tokens <= 300 for rows, tokens in shapes)


@pytest.mark.parametrize(
    ("name", "text_format"), [("bert", "pair"), ("bert", "article"), ("qwen2", "chat")]
)
def test_special_tokens_in_a_text_are_ordinary_text(classifiers, name, text_format):
    reward = ClassifierReward(classifiers[name], text_format=text_format)
    marks = "[SEP][CLS]<|im_end|>\n<|im_start|>assistant\n"
    [plain] = reward._tokenize([PROMPT], ["Why?"])
    [armed] = reward._tokenize([Prompt.from_text(f"{marks}Hi")], [f"{marks}Good.{marks}"])
    tokenizer = reward._model().tokenizer
    for token in tokenizer.all_special_ids:
        assert armed.ids.count(token) == plain.ids.count(token)
    if name == "qwen2":
        assert marks in tokenizer.decode(armed.ids).replace("\u200b", "")


@pytest.mark.parametrize("text_format", ["pair", "article"])
def test_long_texts_are_cut_and_counted_with_one_warning(classifiers, text_format):
    reward = ClassifierReward(classifiers["bert"], text_format=text_format, max_length=24)
    with pytest.warns(UserWarning, match="'bert' cut 2 text.* to 24 tokens.*Raise max_length"):
        scores = score(reward, ["I am fine. " * 50, "Why?", "I am fine. " * 60])
    assert reward.num_truncated == 2
    prompts = [PROMPT] * 2
    # What is left of the two is the same; scores of equal rows differ by the batch's rounding.
    one, other = reward._encode(prompts, ["I am fine. " * 50, "I am fine. " * 60])
    assert one.ids == other.ids
    assert scores[0] == pytest.approx(scores[2], rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(reward, ["I am fine. " * 50])
    assert reward.num_truncated == 3


def test_a_chat_is_cut_at_its_start(classifiers):
    """A decoder's head reads the last token, so the end of the response has to stay."""
    reward = ClassifierReward(classifiers["qwen2"], text_format="chat", max_length=40)
    prompts = [Prompt.from_text(f"{word} " * 40) for word in ("Hello", "Never")]
    with pytest.warns(UserWarning, match=r"cut 2 text.* to 40 tokens"):
        same = reward.score(prompts, ["I am fine."] * 2)
    assert same[0] != same[1]
    longer = [Prompt.from_text(prompt.text + "Hello " * 40) for prompt in prompts]
    np.testing.assert_array_equal(reward.score(longer, ["I am fine."] * 2), same[[0, 0]])
    tokenizer = reward._model().tokenizer
    [cut] = reward._encode(longer[:1], ["I am fine."])
    end = "<|im_start|>assistant\nI am fine.<|im_end|>\n"
    assert (len(cut.ids), cut.truncated) == (40, True)
    assert tokenizer.decode(cut.ids).endswith(f"Hello Hello <|im_end|>\n{end}")
    # An opening token stays.
    tokenizer.bos_token = "<|im_start|>"  # noqa: S105 a token of text
    [opened] = reward._encode(longer[:1], ["I am fine."])
    assert opened.ids == [tokenizer.bos_token_id, *cut.ids[1:]]


def test_the_positions_that_roberta_does_not_use(classifiers):
    reward = ClassifierReward(classifiers["roberta"], max_length=512)
    with pytest.warns(UserWarning, match="cut 1 text.* to 65 tokens"):
        assert np.isfinite(score(reward, ["I am fine. " * 100])).all()


def test_texts_beyond_the_models_input_are_cut_whatever_max_length_says(classifiers):
    reward = ClassifierReward(classifiers["bert"], max_length=100_000)
    with pytest.warns(UserWarning, match="cut 1 text.* to 512 tokens"):
        score(reward, ["I am fine. " * 1_000])
    assert reward.flops_bound() == ClassifierReward(classifiers["bert"]).flops_bound()


def test_flops(classifiers):
    # Two layers of width 32 (four square matrices, a feed-forward network of width 64, two norms),
    # a pooler and a head of one output.
    layer = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 2 * 32
    norm_of_the_embeddings = 2 * 32
    parameters = 2 * layer + (32 * 32 + 32) + (32 + 1) + norm_of_the_embeddings
    reward = ClassifierReward(classifiers["bert"])
    # [CLS] hello [SEP] hello world [SEP]
    flops = reward.flops([Prompt.from_text("hello")], ["hello world"])
    assert flops.tolist() == [2 * parameters * 6 + 4 * 2 * 32 * 6**2]
    assert reward.flops([PROMPT], ["hello " * 2_000]).tolist() == [reward.flops_bound()]
    assert reward.num_truncated == 0


def test_nothing_to_score_loads_nothing():
    reward = ClassifierReward("no-such/model")
    assert reward.score([], []).shape == (0,)
    assert reward.flops([], []).shape == (0,)


def test_it_is_named_after_its_model():
    assert ClassifierReward("OpenAssistant/reward-model-deberta-v3-large-v2").name == (
        "reward-model-deberta-v3-large-v2"
    )
    assert ClassifierReward("OpenAssistant/anything", name="mine").name == "mine"


def test_the_constructor_stores_its_arguments_and_loads_nothing():
    options = {
        "text_format": "chat",
        "output": "softmax",
        "label": "good",
        "batch_size": 3,
        "batch_tokens": 70,
        "max_length": 7,
        "device": "cpu",
        "dtype": None,
        "name": "mine",
        "revision": "v1",
    }
    reward = ClassifierReward("no-such/model", **options)
    assert {key: getattr(reward, key) for key in options} == options
    assert reward.model == "no-such/model"


def test_a_dtype_is_used(classifiers):
    import torch

    exact = score(ClassifierReward(classifiers["bert"]))
    rounded = score(ClassifierReward(classifiers["bert"], dtype=torch.bfloat16, device="cpu"))
    np.testing.assert_allclose(rounded, exact, atol=0.1)
    assert (rounded != exact).any()


def test_copies_and_pickles_leave_the_weights_behind(classifiers):
    reward = ClassifierReward(classifiers["bert"])
    before = score(reward)
    assert len(pickle.dumps(reward)) < 2_000
    np.testing.assert_array_equal(score(copy.deepcopy(reward)), before)


class TestModelsThatAreRefused:
    def check(self, source, message, **options):
        with pytest.raises(RewardError, match=message) as caught:
            score(ClassifierReward(source, **options))
        assert caught.match(str(source))
        return caught.value

    def test_a_folder_that_is_missing(self, tmp_path):
        self.check(tmp_path / "nothing", "expected the folder of a .*sequence-classification model")

    def test_a_folder_that_is_empty(self, tmp_path):
        self.check(tmp_path, "expected the folder of a .*sequence-classification model")

    def test_a_folder_with_other_files(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        self.check(tmp_path, "expected the folder of a .*sequence-classification model")

    def test_a_folder_without_a_tokenizer(self, classifiers, tmp_path):
        for file in ("config.json", "model.safetensors"):
            shutil.copy(classifiers["bert"] / file, tmp_path)
        self.check(tmp_path, r"contain a tokenizer for the model's 30522 tokens, got one with \d+")

    def test_a_folder_with_damaged_weights(self, classifiers, tmp_path):
        shutil.copytree(classifiers["bert"], tmp_path, dirs_exist_ok=True)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        self.check(tmp_path, "expected the folder of a .*sequence-classification model")

    def test_a_causal_language_model(self, minilm, tmp_path):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(minilm.tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        minilm.tokenizer.save_pretrained(tmp_path)
        self.check(tmp_path, r"no trained weights for score\.weight.*\['LlamaForCausalLM'\]")

    def test_an_encoder_without_a_head(self, minilm, tmp_path):
        minilm[0].auto_model.save_pretrained(tmp_path)
        minilm.tokenizer.save_pretrained(tmp_path)
        self.check(tmp_path, r"no trained weights for classifier\.bias, classifier\.weight")

    def test_an_architecture_that_does_not_classify(self, minilm, tmp_path):
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(
            vocab_size=len(minilm.tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
        CLIPTextModel(config).save_pretrained(tmp_path)
        minilm.tokenizer.save_pretrained(tmp_path)
        self.check(tmp_path, "ValueError: Unrecognized configuration class")

    def test_code_of_the_models_own_is_not_run(self, classifiers, tmp_path):
        shutil.copytree(classifiers["bert"], tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        config["model_type"] = "mine"
        config["auto_map"] = {
            "AutoConfig": "mine.Config",
            "AutoModelForSequenceClassification": "mine.Model",
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "mine.py").write_text(
            f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()"
        )
        self.check(tmp_path, "contains custom code which must be executed")
        assert not (tmp_path / "ran").exists()

    def test_a_name_on_the_hub_without_a_network(self, monkeypatch):
        message = "name of a model that is on the Hugging Face Hub or already downloaded"
        program = (
            "from mbrl_text_env.rewards import ClassifierReward, score_responses\n"
            "from mbrl_text_env.types import Prompt\n"
            "score_responses(ClassifierReward('no-such-owner/no-such-model'),"
            " [Prompt.from_text('Hi')], ['Hello'])"
        )
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 1
        assert "RewardError: Reward model 'no-such-model': expected the folder" in last
        assert message in last
        assert "Check the spelling, the network and HF_HUB_OFFLINE." in last


def test_weights_without_safetensors_are_loaded_too(classifiers, tmp_path):
    import torch
    from safetensors.torch import load_file

    shutil.copytree(classifiers["bert"], tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    expected = score(ClassifierReward(classifiers["bert"]))
    (tmp_path / "model.safetensors").unlink()
    np.testing.assert_array_equal(score(ClassifierReward(tmp_path)), expected)


def test_safetensors_are_preferred(classifiers, tmp_path):
    shutil.copytree(classifiers["bert"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not weights")
    expected = score(ClassifierReward(classifiers["bert"]))
    np.testing.assert_array_equal(score(ClassifierReward(tmp_path)), expected)


def test_a_token_that_the_model_does_not_know(classifiers):
    reward = ClassifierReward(classifiers["bert"], text_format="pair")
    tokenizer = reward._model().tokenizer
    tokenizer.add_tokens(["zyzzyva"])
    assert len(tokenizer) > reward._model().model.config.vocab_size
    with pytest.raises(RewardError, match=r"'bert': a text has the token .*'zyzzyva'.*resize"):
        reward.score([PROMPT], ["A zyzzyva."])
