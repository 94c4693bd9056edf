"""The command `mbrl-text serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.terminal import console, errors

_REWARD = options.RewardOptions(reward_timeout=30.0)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServeError(ValueError):
    """A server that cannot be started as requested."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on the requests that a server accepts."""

    panel: ClassVar[str] = "Limits"

    max_running: int = option(32, "Requests processed at a time.", min=1)
    max_waiting: int = option(64, "Requests that can wait; further ones get status 429.", min=0)
    request_timeout: float = option(
        300.0, "Time limit of a request in seconds, including waiting.", min=0.001
    )
    max_prompt_tokens: int | None = option(
        None, "Maximum tokens per prompt; default: the model's limit.", min=1
    )
    max_choices: int = option(8, "Maximum choices per request (n).", min=1)
    max_request_bytes: int = option(2**20, "Maximum request size in bytes.", min=1)
    shutdown_timeout: int = option(
        30, "Seconds for requests to finish after Ctrl-C or SIGTERM.", min=0
    )


@friendly
def serve_command(
    *,
    agent: str = option("adaptive", "Agents with their options, comma-separated if several."),
    judge: options.RewardOptions = _REWARD,
    value: str = option("prefix", options.VALUE),
    budget_tokens: int = option(1024, "Tokens that a search may generate per answer.", min=1),
    max_response_tokens: int = option(256, options.TOKENS),
    host: str = option("127.0.0.1", "Address to listen on."),
    port: int = option(8000, "Port to listen on; 0 picks a free one.", min=0, max=65535),
    api_key_env: str | None = option(None, "Environment variable with the key that clients send."),
    plain_prompts: bool = option(False, options.PLAIN),
    limits: Limits,
    model: options.ModelOptions,
) -> None:
    """Start an OpenAI-compatible server that finds its answers by search."""
    from mbrl_text_env._lazy import extras
    from mbrl_text_env.agents.registry import make
    from mbrl_text_env.types import Budget, Prompt

    with extras():
        import uvicorn

        from mbrl_text_env.benchmarks.serving import create_app

    key = None if api_key_env is None else os.environ.get(api_key_env)
    if api_key_env is not None and not key:
        raise ServeError(f"--api-key-env: expected a key in {api_key_env}, which is not set.")
    language_model, reward, most = model.load(), judge.load(), max_response_tokens
    values = options.load_value_option(value, reward, language_model, most, seed=0)
    agents = {
        spec: make(spec, language_model, reward, values, max_response_tokens=most)
        for spec in map(str.strip, agent.split(","))
    }
    budget = Budget(tokens=budget_tokens)
    for each in agents.values():
        each.check_budget([Prompt.from_text("Hello", chat=not plain_prompts)], budget)
    app = create_app(agents, budget, limits=limits, api_key=key, plain_prompts=plain_prompts)
    if key is None and host not in _LOOPBACK:
        errors.print(f"Anyone can use {host} without a key: set --api-key-env.", style="yellow")
    console.print(f"Models at /v1: {', '.join(agents)}")
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=limits.shutdown_timeout)
