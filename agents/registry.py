"""Agents by name, for the command line and for comparisons."""

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
"""Options of every agent, beside those of its constructor."""


class AgentSpecError(ValueError):
    """An agent's name or option that is not known, or a value that does not fit."""


def _named_agents() -> dict[str, type[Agent]]:
    """The agents by name: classes of this folder's files that have one, and trained choices."""
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
    """One line about each agent, by name."""
    return {name: first_line(cls) for name, cls in _CLASSES.items()}


def options_of(name: str) -> dict[str, Any]:
    """The options of an agent's own with their defaults, without `SHARED_OPTIONS`."""
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
    """Make an agent from a text such as `"best-of-n:n=8:temperature=1.0"`.

    Args:
        spec: A name, then options of its constructor. `temperature`, `top_p` and `top_k` say how
            complete responses are drawn, `value` which of several value models is taken, and
            `policy` which language model proposes.
        value_model: For agents that take one; or several by name, of which an agent takes the one
            that its option `value` names, or else the first.
        policies: By the names that specs use (`policy=tuned`): language models that take the place
            of `language_model`; and for the agent `candidates`, which has to name one, choices that
            were trained (`mbrl_text_env.agents.model_free.load_policy`).
        **defaults: Options that the spec does not name, such as `max_response_tokens`.

    Raises:
        AgentSpecError: The name or an option is unknown, or a value does not fit.
    """
    name, options = parse_spec(spec)
    cls = _CLASSES[name]
    known = inspect.signature(cls).parameters
    params = {key: options.pop(key) for key in _SAMPLING if key in options}
    several = value_model if isinstance(value_model, Mapping) else {}
    chosen: Any = next(iter(several.values()), None) if several is value_model else value_model
    if (value := options.pop("value", None)) is not None:
        chosen = _named(spec, "value", "value models", several, value)
    # A language model samples; a trained choice among candidates does not.
    chooses, asked, policy = "policy" in known, options.pop("policy", None), None
    if asked is not None or chooses:
        kind = "choice of train_ppo or train_dqn" if chooses else "policy"
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
    """Split a spec such as `best-of-n:n=8` into its name and options; or an `AgentSpecError`."""
    name, *items = spec.strip().split(":")
    if name not in _CLASSES:
        known = f"{sorted(_CLASSES)}.{nearest(name, _CLASSES)}"
        raise AgentSpecError(f"Unknown agent {name!r}; there are {known}")
    options: dict[str, Any] = {}
    for item in items:
        key, _, value = item.partition("=")
        key = key.strip()
        parameter = inspect.signature(_CLASSES[name]).parameters.get(key)
        # Such as `root_policy` of MCTS.
        is_word = isinstance(getattr(parameter, "default", None), str)
        options[key] = _value(spec, item, value, is_word or key in ("value", "policy"))
    return name, options


def _named(spec: str, kind: str, kinds: str, there: Mapping[str, Any], name: Any) -> Any:
    if name not in there:
        known = sorted(there) or f"no {kinds} by name"
        raise AgentSpecError(f"Agent {spec!r}: expected a {kind} of {known}, got {name!r}.")
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
