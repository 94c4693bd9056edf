"""What the commands of `mbrl-text` share: options, settings, and how models and prompts load.

Each annotated field of a group or of the settings is an option (`friendly.friendly`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import typer

from mbrl_text_env.agents.registry import parse_spec
from mbrl_text_env.benchmarks.friendly import option
from mbrl_text_env.benchmarks.terminal import console, errors, plain
from mbrl_text_env.rewards.base import RewardModel, applies_to, reward_name
from mbrl_text_env.runs import folder_digest
from mbrl_text_env.types import Budget, Prompt, Split

_PUZZLES = "reasoning-gym:"
_PUZZLES_A_SPLIT = 256
_SUITE = "suite:"
_YEAR = 365 * 86400.0
_DTYPES = ("default", "float32", "bfloat16", "float16", "int8")
_SHARD = re.compile(r"(\d+)/(\d+)")
_PRICE = re.compile(r"(?P<number>\d+(\.\d*)?(e[+-]?\d+)?)(?P<unit>tokens|flops)")
# What a comparison allows an agent where nothing is said.
DEFAULT_TOKENS = 400
_PLAIN = (bool, int, float, str, tuple, type(None))
_LEAST = {"num_prompts": 4, "samples": 4, "max_response_tokens": 1, "sensitivity_samples": 1}

LANGUAGE_MODEL = typer.Option(
    help="'embedded' (SmolLM2-135M-Instruct), a Hub name, a folder, or the URL of an "
    "OpenAI-compatible server (several with commas between them)."
)
DTYPE = typer.Option(help="Number format: 'default', 'float32', 'bfloat16', 'float16' or 'int8'.")
TIMEOUT = typer.Option(
    min=0.001, max=_YEAR, help="Seconds that the reward model may take for one batch."
)
PROMPTS_HELP = (
    "'builtin', a .jsonl or .csv file, 'suite:NAME' (constraints, reasoning, code, sql), or "
    "'reasoning-gym:TASK' (256 questions a split)."
)
PROMPTS = typer.Option(help=PROMPTS_HELP)
PLAIN = typer.Option(
    "--plain-prompts", help="Prompts as plain text, for models without a chat template."
)
VALUE = typer.Option(
    help="'prefix' for the reward model on the prefix ('prefix-exact' in its own number "
    "format), or a value model's folder, as written by `fit`."
)
POLICY = typer.Option(
    help="NAME=FOLDER of a LoRA adapter, or of a choice that PPO or DQN learned: agents with "
    "the option policy=NAME use it. Repeatable."
)
PRICE = typer.Option(
    help="What a call of the reward counts for in place of its own FLOPs: '300tokens' that the "
    "language model generates, or '2e11flops'. Budgets are then in FLOPs."
)
SET = typer.Option(
    "--set",
    help="NAME=VALUE of another setting, such as learning_rate=0.0003; a wrong name lists "
    "them. Repeatable.",
)
SEED = typer.Option(min=0, help="All sampling follows from it.")
TOKENS = typer.Option(min=1, help="Token limit of a response.")
COUNT = typer.Option(min=1)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options that say which language model is used."""

    panel: ClassVar[str] = "Language model"

    language_model: str = option("embedded", LANGUAGE_MODEL)
    dtype: str = option("default", DTYPE)
    tokenizer: str = option(
        "embedded", "Tokenizer of a server's model: 'embedded', a Hub name, or a folder."
    )
    num_parameters: int | None = option(
        None, "Of a server's model, where it does not say; FLOPs follow from it.", min=1
    )
    model: str | None = option(None, "Name to ask a server for, where it lists several models.")
    max_wait: float = option(60.0, "Seconds to go on trying while no server answers.", min=0.0)
    # Only where all models of a command follow it.
    device: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise typer.BadParameter(
                f"--dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype!r}."
            )

    def load(self) -> Any:
        """Load the language model, or connect to its server."""
        if self.language_model.startswith(("http://", "https://")):
            return self._connect()
        import torch
        from transformers.utils import logging

        from mbrl_text_env.language_models import TransformersLM, embedded

        name = self.language_model
        options: dict[str, Any] = {"device": self.device}
        options |= {} if self.dtype == "default" else {"dtype": getattr(torch, self.dtype)}
        logging.disable_progress_bar()
        with console.status(plain(f"Loading the language model ({name})")):
            return embedded(**options) if name == "embedded" else TransformersLM(name, **options)

    def _connect(self) -> Any:
        from mbrl_text_env.language_models import HFTokenizer, ServerLM, embedded_tokenizer

        is_embedded = self.tokenizer == "embedded"
        return ServerLM(
            self.language_model.split(","),
            tokenizer=embedded_tokenizer() if is_embedded else HFTokenizer(self.tokenizer),
            num_parameters=self.num_parameters,
            model=self.model,
            max_wait=self.max_wait,
        )


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """The options that say which reward is used."""

    panel: ClassVar[str] = "Reward"

    reward: str | None = option(
        None,
        "A name, a weighted sum such as '0.5*sentiment+0.5*relevance', or a function or "
        "class in a file: 'my_rewards.py:brevity'. By default that of the suite of prompts, or "
        "'sentiment'.",
    )
    reward_timeout: float = option(600.0, TIMEOUT)

    def of(self, source: str) -> RewardOptions:
        """The options with the reward that prompts of a source have where none is given."""
        return self if self.reward is not None else replace(self, reward=_reward_of(source))

    def load(self, spec: str | None = None) -> Any:
        """The reward, or another of the same timeout, given up on if a batch takes longer."""
        from mbrl_text_env.rewards import TimeLimit, make

        own = self.of("builtin").reward
        return TimeLimit(make(own if spec is None else spec), self.reward_timeout)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The options that say which prompts are used."""

    panel: ClassVar[str] = "Prompts"

    prompts: str = option("builtin", PROMPTS)
    split: str = option(
        "test", "Split of the prompts; 'all' for all. A file that names none is taken whole."
    )
    shots: int | None = option(
        None,
        "Examples with answers before each question of a suite; by default 4 in "
        "'suite:reasoning', else 0.",
        min=0,
    )
    plain_prompts: bool = option(False, PLAIN)

    def load(self) -> Any:
        """All prompts of the split."""
        return load_prompts_option(self.prompts, self.split, shots=self.shots)

    def named(self, text: str) -> Any:
        """The prompt of that id; a prompt of that text where the prompts are the package's own."""
        if self.prompts == "builtin":
            return text_prompt(text, self.plain_prompts)
        found = {prompt.id: prompt for prompt in self.load()}
        if text not in found:
            raise typer.BadParameter(
                f"PROMPT: expected the id of one of {len(found)} prompts of {self.prompts}, such "
                f"as {next(iter(found), '')!r}, got {text!r}."
            )
        return self.formatted([found[text]])[0]

    def choose(self, count: int, reward_model: RewardModel, seed: int) -> list[Prompt]:
        """`count` prompts that the reward applies to; all of a shorter file."""
        found = self.load()
        count = self.available(count, found, reward_model)
        return self.formatted(choose_prompts(found, count, reward_model, seed))

    def available(self, count: int, found: Sequence[Any], *reward_models: Any) -> int:
        """`count`, or the number of prompts that all rewards apply to if a file has fewer."""
        there = sum(all(applies_to(model, p) for model in reward_models) for p in found)
        if self.prompts == "builtin" or not 0 < there < count:
            return count
        errors.print(
            f"{there} prompts of {self.prompts} can be used; --num-prompts asked for {count}."
        )
        return there

    def formatted(self, prompts: Sequence[Any]) -> list[Any]:
        """The prompts as chats, or as plain texts if asked for."""
        return [
            replace(prompt, content="\n\n".join(message.content for message in prompt.content))
            if self.plain_prompts and not isinstance(prompt.content, str)
            else prompt
            for prompt in prompts
        ]


class CompareError(ValueError):
    """A comparison that cannot be run as asked."""


class SettingError(ValueError):
    """A setting of `--set` that is unknown, or whose value is of another type."""


class AuditError(ValueError):
    """An audit that cannot be run as asked."""


@dataclass(frozen=True)
class CompareConfig:
    """What a comparison is; two runs with equal configs give equal rows, times aside.

    `agents` are specs. A budget is each agent's for each prompt. `batch_prompts` are answered
    together.
    """

    panel: ClassVar[str] = "Comparison"

    agents: tuple[str, ...] = option(
        ..., "Agents, with commas between them, and their options: 'best-of-n:n=8'."
    )
    budget_tokens: int | None = option(
        None,
        f"Tokens that an agent may generate for a prompt; {DEFAULT_TOKENS} if neither "
        "another budget nor --reward-price is given.",
        min=1,
        show_default=False,
    )
    max_response_tokens: int = option(256, TOKENS)
    seed: int = option(0, SEED)
    batch_prompts: int = option(32, COUNT)
    budget_flops: float | None = option(None, "FLOPs of all models that it may spend on a prompt.")
    budget_seconds: float | None = option(None, "Seconds after which it begins nothing new.")
    shard: str | None = option(
        None, "'2/3' for the second third of the batches, to `merge` with the others."
    )

    def __post_init__(self) -> None:
        index, count = self.shard_of
        if not 1 <= index <= count:
            raise CompareError(
                f"shard: expected 1/N to N/N for one of N shards, such as 2/3, got {self.shard!r}."
            )
        if not self.agents or len(set(self.agents)) != len(self.agents):
            raise CompareError(f"Expected one or more different agents, got {list(self.agents)}.")
        for spec in self.agents:
            # An error where it is none; before models are loaded.
            parse_spec(spec)
        if self.batch_prompts < 1:
            raise CompareError(f"batch_prompts: expected at least 1, got {self.batch_prompts}.")

    @property
    def shard_of(self) -> tuple[int, int]:
        """Which shard this is, from 1, and of how many; (0, 0) where that cannot be read."""
        found = _SHARD.fullmatch("1/1" if self.shard is None else self.shard)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def budget(self) -> Budget:
        """Each agent's for each prompt."""
        return Budget(self.budget_tokens, self.budget_flops, seconds=self.budget_seconds)


def priced(
    reward_model: RewardModel, price: str | None, language_model: Any, max_response_tokens: int
) -> RewardModel:
    """The reward at a price such as "300tokens" or "2e11flops" a call; as it is for None.

    A token counts for the mean FLOPs of a generated one in a response of `max_response_tokens` to a
    prompt of as many. A price that cannot be read is a `CompareError`.
    """
    from mbrl_text_env.rewards import Priced

    if price is None:
        return reward_model
    found = _PRICE.fullmatch(price.strip().lower())
    number = float(found["number"]) if found else math.inf
    if found is None or math.isinf(number):
        raise CompareError(
            "reward price: expected a number of tokens or FLOPs, such as '300tokens' or "
            f"'2e11flops', got {price!r}."
        )
    if found["unit"] == "flops":
        return Priced(reward_model, number)
    usage, length = language_model.usage_bound, max_response_tokens
    each = (usage(length, [length]) - usage(length, [])).flops / length
    if not each > 0:
        raise CompareError(
            f"reward price: {language_model.name!r} counts no FLOPs, so {price!r} says nothing. "
            "Give the price in FLOPs, such as '2e11flops', or the model's --num-parameters."
        )
    return Priced(reward_model, number * each)


@dataclass(frozen=True)
class AuditConfig:
    """What an audit is; equal configs measure the same. Too small a number is an AuditError."""

    panel: ClassVar[str] = "Audit"

    proxy: str = option(..., "The reward to audit: a name, or a weighted sum of names.")
    gold: str = option(..., "The reward that is trusted.")
    num_prompts: int = option(32, "At least 4; below 8 nothing is decided.")
    samples: int = option(64, "Responses to each prompt, at least 4: the largest N.")
    max_response_tokens: int = option(64, TOKENS)
    seed: int = option(0, SEED)
    sensitivity_samples: int = option(8, "Responses to each prompt that text changes are tried on.")

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise AuditError(
                    f"{name}: expected at least {least}, got {getattr(self, name)}. An audit of "
                    f"fewer measures nothing; raise --{name.replace('_', '-')}."
                )


@dataclass(frozen=True)
class DemoConfig:
    """How large the demonstration is; `pool_samples` are what best-of-N is read from."""

    train_prompts: int = option(16, "", min=2)
    test_prompts: int = option(12, COUNT)
    budget_tokens: int | None = option(
        None, "Of an agent for a prompt; by default of 4.2 responses.", min=1
    )
    max_response_tokens: int | None = option(
        None, "By default what fits in four minutes, 56 to 96; else both rewards are run.", min=1
    )
    seed: int = option(0, SEED)
    samples: int = 4
    pool_samples: int = 12


@dataclass(frozen=True)
class ArticleConfig:
    """How the article's pipeline is run; its own sizes where no option says another."""

    panel: ClassVar[str] = "Pipeline"

    policy: str = option(
        "embedded",
        "'embedded' (SmolLM2-135M-Instruct), a Hub name, or a folder.",
        "--policy",
        "--language-model",
    )
    device: str | None = option(
        None, "Of all models: 'cpu', 'cuda', 'mps'; by default a GPU where CUDA has one."
    )
    dtype: str = option("default", DTYPE)
    iterations: int = option(1, "Rounds of the loop.", min=1)
    max_response_tokens: int = option(256, TOKENS)
    seed: int = option(0, SEED)


def changes(kind: Any, items: Sequence[str]) -> dict[str, Any]:
    """The settings of a dataclass that "NAME=VALUE" items set; what is no JSON is a word."""
    known = {
        f.name: f.default
        for f in fields(kind)
        if isinstance(f.default, _PLAIN) and f.name != "budget"
    }
    found = {}
    for item in items:
        name, _, text = item.partition("=")
        if name not in known or not text:
            shown = ", ".join(f"{name}={value}" for name, value in known.items())
            raise SettingError(f"--set: expected NAME=VALUE of one of {shown}; got {item!r}.")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        default = known[name]
        value = tuple(value) if isinstance(value, list) else value
        value = float(value) if isinstance(default, float) and type(value) is int else value
        if default is not None and value is not None and type(value) is not type(default):
            wanted = f"a {type(default).__name__} such as {default!r}"
            raise SettingError(f"--set {name}: expected {wanted}, got {text!r}.")
        found[name] = value
    return found


def usable_device(name: str | None) -> Any:
    """The device of a name, or the one that models take by default; tried out."""
    import torch

    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(
            f"--device: expected one that torch can use here, such as 'cpu', got {name!r} "
            f"({reason}). `mbrl-text doctor` lists them."
        ) from error
    return found


def integers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers of an option, with commas between them."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        message = f"{option}: expected whole numbers with commas between, got {text!r}."
        raise typer.BadParameter(message) from None


def text_prompt(text: str, is_plain: bool) -> Any:
    """The prompt of a text on the command line."""
    if not text.strip():
        raise typer.BadParameter("PROMPT: expected a text to answer, got an empty one.")
    try:
        return Prompt.from_text(text, chat=not is_plain)
    except ValueError as error:
        raise typer.BadParameter(f"PROMPT: {error}") from error


def load_prompts_option(
    source: str, split: str, kind: str | None = None, shots: int | None = None
) -> Any:
    """The prompts of a `PromptsOption`; `split` may be "all"."""
    from mbrl_text_env.prompts import PromptError, load_prompts
    from mbrl_text_env.suites import load_suite

    if source.startswith(_SUITE):
        only = None if split == "all" else split
        return load_suite(source.removeprefix(_SUITE), split=only, kind=kind, shots=shots)
    if shots is not None:
        raise PromptError(
            f"shots: expected none with the prompts {source!r}, got {shots}. Only suites have "
            "examples (suite:reasoning, suite:code, suite:sql)."
        )
    if source.startswith(_PUZZLES):
        return _puzzles(source.removeprefix(_PUZZLES), split, kind)
    found = load_prompts(source, kind=kind)
    if split in get_args(Split) and all(prompt.split is None for prompt in found):
        errors.print(f"{source} names no split: all of its {len(found)} prompts are taken.")
        return found
    return load_prompts(source, split=None if split == "all" else split, kind=kind)


def _reward_of(source: str) -> str:
    """The reward of prompts where none is given."""
    from mbrl_text_env.suites import SUITES

    suite = SUITES.get(source.removeprefix(_SUITE)) if source.startswith(_SUITE) else None
    return "sentiment" if suite is None else suite.reward


def choose_prompts(
    prompts: Sequence[Prompt], count: int, reward_model: RewardModel, seed: int
) -> list[Prompt]:
    """`count` prompts that the reward applies to, by a seeded shuffle; too few: `CompareError`."""
    fitting = [prompt for prompt in prompts if applies_to(reward_model, prompt)]
    if not fitting:
        raise CompareError(
            f"Reward {reward_name(reward_model)!r} applies to none of {len(prompts)} prompts: they "
            "lack what it reads of a prompt's metadata. Give other prompts, or another reward."
        )
    if not 1 <= count <= len(fitting):
        raise CompareError(
            f"Expected 1 to {len(fitting)} prompts (as many as reward "
            f"{reward_name(reward_model)!r} applies to), got {count}."
        )
    order = np.random.default_rng(seed).permutation(len(fitting))
    return [fitting[i] for i in order[:count]]


def that_fit(prompts: Sequence[Any], language_model: Any) -> list[Any]:
    """The prompts that leave room for a response; the others are named and left out."""
    from mbrl_text_env.language_models import PromptTooLongError

    fitting = []
    for prompt in prompts:
        try:
            language_model.encode_prompt(prompt)
        except PromptTooLongError as error:
            errors.print(f"Left out: {error}", style="yellow")
            last = error
        else:
            fitting.append(prompt)
    if not fitting:
        raise last
    if len(fitting) < len(prompts):
        count = len(prompts) - len(fitting)
        errors.print(f"{count} of {len(prompts)} prompts are too long and left out.")
    return fitting


def load_value_option(
    value: str, reward_model: Any, language_model: Any, max_response_tokens: int, seed: int
) -> Any:
    """The value model of a `ValueOption`."""
    from mbrl_text_env.agents.values import READY, load_value, make_value

    if value not in READY:
        return load_value(value, language_model, reward_model)
    return make_value(
        value, language_model, reward_model, max_response_tokens=max_response_tokens, seed=seed
    )


def load_policies(items: Sequence[str], language_model: Any) -> dict[str, Any]:
    """The policies of a `PolicyOption`: the language model with an adapter, or trained choices."""
    found = {}
    for item in items:
        name, _, folder = item.partition("=")
        if not name or not folder:
            raise typer.BadParameter(f"--policy: expected NAME=FOLDER, got {item!r}.")
        found[name] = _policy(name, folder, language_model)
    return found


def _policy(name: str, folder: str, language_model: Any) -> Any:
    from mbrl_text_env.agents.learning.lora import BASE, adapted_name, serve

    if (Path(folder) / "policy.json").is_file():
        from mbrl_text_env.agents.model_free import load_policy

        return load_policy(folder, language_model, name=f"{name}-{folder_digest(folder)}")
    if not hasattr(language_model, "with_adapter"):
        raise typer.BadParameter(
            "--policy: expected a language model that runs here (`TransformersLM`), got "
            f"{language_model.name!r}; load the adapter in the server instead."
        )
    if (Path(folder) / BASE).is_file():
        return serve(language_model, folder)
    # An adapter from elsewhere does not say what it was trained on.
    return language_model.with_adapter(folder, adapted_name(language_model, folder))


def value_digest(value: str) -> str:
    """Names the value model of a `ValueOption` in a config: another one is another comparison."""
    from mbrl_text_env.agents.values import READY

    return value if value in READY else folder_digest(value)


def _puzzles(task: str, split: str, kind: str | None) -> Any:
    """Generated questions; the splits differ in the seed."""
    from mbrl_text_env.prompts import PromptError, reasoning_gym_prompts

    splits: tuple[Split, ...] = get_args(Split)
    if split not in (*splits, "all"):
        raise PromptError(f"split: expected one of {[*splits, 'all']}, got {split!r}.")
    if kind not in (None, task):
        raise PromptError(f"kind: expected {task!r}, as all of these are, or none, got {kind!r}.")
    return [
        replace(prompt, split=name)
        for seed, name in enumerate(splits)
        if split in (name, "all")
        for prompt in reasoning_gym_prompts(task, size=_PUZZLES_A_SPLIT, seed=seed)
    ]
