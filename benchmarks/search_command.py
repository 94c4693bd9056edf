"""`mbrl-text search`: one prompt, one planner, and everything that it looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mbrl_text_env.benchmarks.options import (
    DtypeOption,
    LanguageModelOption,
    ParametersOption,
    PlainOption,
    RewardOption,
    SeedOption,
    ServerModelOption,
    TimeoutOption,
    TokenizerOption,
    TokensOption,
    ValueOption,
    WaitOption,
    console,
    friendly,
    load_language_model,
    load_reward,
    load_value_option,
    text_prompt,
)
from mbrl_text_env.benchmarks.terminal import panel


@friendly
def search_command(
    prompt: Annotated[str, typer.Argument(help="The prompt's text.")],
    agent: Annotated[str, typer.Option(help="A planner with its options.")] = "adaptive",
    reward: RewardOption = "sentiment",
    value: ValueOption = "prefix",
    budget_tokens: Annotated[int, typer.Option(min=1)] = 400,
    max_response_tokens: TokensOption = 96,
    seed: SeedOption = 0,
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "default",
    tokenizer: TokenizerOption = "embedded",
    num_parameters: ParametersOption = None,
    server_model: ServerModelOption = None,
    max_wait: WaitOption = 60.0,
    plain_prompts: PlainOption = False,
    reward_timeout: TimeoutOption = 600.0,
    children: Annotated[int, typer.Option(min=1, help="Children shown of a node.")] = 4,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the whole search there, as JSON.")
    ] = None,
    picture_file: Annotated[
        Path | None, typer.Option("--picture", help="Draw the whole search there, as PNG.")
    ] = None,
) -> None:
    """Answer a prompt with a planner and show its search: chunks, values, what was chosen, why."""
    from mbrl_text_env.agents.planner import Planner
    from mbrl_text_env.agents.registry import AgentSpecError, make
    from mbrl_text_env.benchmarks.search_view import draw_tree, picture
    from mbrl_text_env.files import write_text
    from mbrl_text_env.ledger import Budget

    asked = text_prompt(prompt, plain_prompts)
    model = load_language_model(
        language_model, dtype, tokenizer, num_parameters, server_model, max_wait
    )
    reward_model = load_reward(reward, reward_timeout)
    planner = make(
        agent,
        model,
        reward_model,
        load_value_option(value, reward_model, model, max_response_tokens, seed),
        max_response_tokens=max_response_tokens,
    )
    if not isinstance(planner, Planner):
        raise AgentSpecError(f"Agent {agent!r} does not search: expected a planner.")
    budget = Budget(tokens=budget_tokens)
    [(answer, tree)] = planner.explore([asked], budget, seed=seed)
    search = tree.to_dict(model)
    console.print(draw_tree(search, most_children=children))
    console.print(
        panel(
            answer.text.strip(),
            title=f"{reward} {answer.completion.score:.3f}",
            subtitle=f"{answer.usage.generated_tokens:,} tokens, {answer.usage.flops:.3g} FLOPs, "
            f"{answer.usage.reward_calls} reward calls",
        )
    )
    if json_file is not None:
        with _written("--json", json_file):
            write_text(json_file, json.dumps(search, indent=1))
    if picture_file is not None:
        with _written("--picture", picture_file):
            picture(search, picture_file)


@contextmanager
def _written(option: str, path: Path) -> Iterator[None]:
    """Name the option of a file that cannot be written."""
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(
            f"{option}: expected a file that can be written, got {str(path)!r} ({error.strerror})."
        ) from error
