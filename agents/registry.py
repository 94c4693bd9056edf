"""Create agents by name, for the command line and comparisons."""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from mbrl_text_env import agents
from mbrl_text_env.agents.base import Agent
from mbrl_text_env.agents.model_free.candidate_agent import CandidateAgent
from mbrl_text_env.language_models.base import LanguageModel, SamplingParams
from mbrl_text_env.rewards.base import RewardLike
from mbrl_text_env.rewards.names import first_line
from mbrl_text_env.types import nearest
from mbrl_text_env.values import ValueModel

_SAMPLING = ("temperature", "top_p", "top_k")
SHARED_OPTIONS = (*_SAMPLING, "value", "policy")
"""Options of every agent, in addition to its constructor's."""


class AgentSpecError(ValueError):
    """An agent's name or option is unknown, or an option has an invalid value."""


def _named_agents() -> dict[str, type[Agent]]:
    """Named agent classes in this folder's modules, plus `CandidateAgent`."""
    files = [info.name for info in pkgutil.iter_modules(agents.__path__) if not info.ispkg]
    modules = [import_module(f"{agents.__name__}.{name}") for name in files if name != "registry"]
    found: list[type[Agent]] = [
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Agent) and each.__module__ == module.__name__
    ]
    found.append(CandidateAgent)
    return {each.name: each for each in found if each.name}


_CLASSES: Mapping[str, Callable[..., Agent]] = _named_agents()


def available() -> dict[str, str]:
    """Return a one-line description of each agent, by name."""
    return {name: first_line(cls) for name, cls in _CLASSES.items()}


def options_of(name: str) -> dict[str, Any]:
    """Return an agent's own options and their defaults, without `SHARED_OPTIONS`."""
    known = inspect.signature(_CLASSES[name]).parameters.values()
    own = [p for p in known if p.kind is p.KEYWORD_ONLY and not p.name.endswith("params")]
    return {p.name: p.default for p in own}


def make(
    spec: str,
    language_model: LanguageModel,
    reward_model: RewardLike,
    value_model: ValueModel | Mapping[str, ValueModel] | None = None,
    *,
    policies: Mapping[str, Any] | None = None,
    **defaults: Any,
) -> Agent:
    """Make an agent from a spec such as `"best-of-n:n=8:temperature=1.0"`.

    Args:
        spec: A name, followed by constructor options. `temperature`, `top_p` and `top_k` set how
            complete responses are sampled, `value` selects one of several value models by name,
            and `policy` selects the language model.
        value_model: For agents that use one. With a mapping of names to value models, an agent
            uses the one named by its `value` option, or the first.
        policies: Policies by the name that specs use (`policy=tuned`). Language models replace
            `language_model`. The agent `candidates` requires a policy trained to choose among
            chunks (`mbrl_text_env.agents.model_free.load_policy`).
        **defaults: Options that apply unless the spec sets them, such as `max_response_tokens`.

    Raises:
        AgentSpecError: The name or an option is unknown, or a value is invalid.
    """
    name, options = parse_spec(spec)
    cls = _CLASSES[name]
    known = inspect.signature(cls).parameters
    params = {key: options.pop(key) for key in _SAMPLING if key in options}
    several = value_model if isinstance(value_model, Mapping) else {}
    chosen: Any = next(iter(several.values()), None) if several is value_model else value_model
    if (value := options.pop("value", None)) is not None:
        chosen = _named(spec, "value", "value models", several, value)
    # A language model samples chunks; a policy trained with PPO or DQN chooses among them.
    chooses, asked, policy = "policy" in known, options.pop("policy", None), None
    if asked is not None or chooses:
        kind = "policy from train_ppo or train_dqn" if chooses else "policy"
        fit = {key: p for key, p in (policies or {}).items() if hasattr(p, "sample") != chooses}
        policy = _named(spec, kind, "policies", fit, asked)
    for key, value in options.items():
        if key not in known or key == "params":
            there = [*options_of(name), *SHARED_OPTIONS]
            raise AgentSpecError(f"Agent {name!r} has no option {key!r}; it has {there}.")
        if isinstance(value, float) and known[key].annotation in ("int", "int | None"):
            raise AgentSpecError(f"Agent {spec!r}: {key}: expected a whole number, got {value}.")
    if "value_model" in known:
        options["value_model"] = chosen
    try:
        if params:
            options["params"] = SamplingParams(**params)
        if chooses:
            options["policy"], policy = policy, None
        return cls(policy or language_model, reward_model, **{**defaults, **options})
    except (TypeError, ValueError) as error:
        raise AgentSpecError(f"Agent {spec!r}: {error}") from error


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split a spec such as `best-of-n:n=8` into name and options, or raise an `AgentSpecError`."""
    name, *items = spec.strip().split(":")
    if name not in _CLASSES:
        known = f"{sorted(_CLASSES)}.{nearest(name, _CLASSES)}"
        raise AgentSpecError(f"Unknown agent {name!r}. Expected one of {known}")
    options: dict[str, Any] = {}
    for item in items:
        key, _, value = item.partition("=")
        key = key.strip()
        parameter = inspect.signature(_CLASSES[name]).parameters.get(key)
        # For example, `root_policy` of MCTS.
        is_word = isinstance(getattr(parameter, "default", None), str)
        options[key] = _value(spec, item, value, is_word or key in ("value", "policy"))
    return name, options


def _named(spec: str, kind: str, kinds: str, there: Mapping[str, Any], name: Any) -> Any:
    if name not in there:
        known = sorted(there) or f"no {kinds}"
        raise AgentSpecError(f"Agent {spec!r}: expected a {kind} (known: {known}), got {name!r}.")
    return there[name]


def _value(spec: str, item: str, value: str, is_word: bool) -> int | float | str:
    if is_word and value:
        return value
    for kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    raise AgentSpecError(
        f"Agent {spec!r}: expected options as name=number, such as n=8; got {item!r}."
    )
