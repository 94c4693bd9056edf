"""The command `mbrl-text serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.friendly import friendly
from mbrl_text_env.benchmarks.terminal import console, errors

_REWARD = options.RewardOptions(reward_timeout=30.0)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServeError(ValueError):
    """A server that cannot be started as asked."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on."""

    panel: ClassVar[str] = "Limits"

    max_running: Annotated[
        int, typer.Option(min=1, help="Requests that are searched for at a time.")
    ] = 32
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that wait for a place; above that, 429.")
    ] = 64
    request_timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds that a request may take, waiting included.")
    ] = 300.0
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of one prompt; by default what the model takes.")
    ] = None
    max_choices: Annotated[int, typer.Option(min=1, help="Answers to a request (n).")] = 8
    max_request_bytes: Annotated[int, typer.Option(min=1, help="Size of a request.")] = 2**20
    shutdown_timeout: Annotated[
        int, typer.Option(min=0, help="Seconds that requests have to end after Ctrl-C or SIGTERM.")
    ] = 30


@friendly
def serve_command(
    *,
    agent: Annotated[
        str, typer.Option(help="An agent with its options; several with commas between them.")
    ] = "adaptive",
    judge: options.RewardOptions = _REWARD,
    value: options.ValueOption = "prefix",
    budget_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that may be generated for one answer.")
    ] = 1024,
    max_response_tokens: options.TokensOption = 256,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key that clients send.")
    ] = None,
    plain_prompts: options.PlainOption = False,
    limits: Limits,
    model: options.ModelOptions,
) -> None:
    """Answer as an OpenAI-compatible server whose answers are searched for."""
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
        errors.print(f"Whoever reaches {host} can ask: give a key (--api-key-env).", style="yellow")
    console.print(f"Models at /v1: {', '.join(agents)}")
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=limits.shutdown_timeout)
