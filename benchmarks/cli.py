"""The command line: `mbrl-text`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mbrl_text_env.benchmarks.options import (
    DtypeOption,
    LanguageModelOption,
    ParametersOption,
    PlainOption,
    PolicyOption,
    PromptsOption,
    RewardOption,
    SeedOption,
    ServerModelOption,
    TimeoutOption,
    TokenizerOption,
    TokensOption,
    ValueOption,
    WaitOption,
    chosen_prompts,
    console,
    friendly,
    load_language_model,
    load_policies,
    load_prompts_option,
    load_reward,
    load_value_option,
    that_fit,
    value_digest,
)
from mbrl_text_env.benchmarks.report import fit_table
from mbrl_text_env.benchmarks.reward_audit import audit_command
from mbrl_text_env.benchmarks.reward_fit import fit_command as fit_reward_command
from mbrl_text_env.benchmarks.search_command import search_command
from mbrl_text_env.benchmarks.terminal import CommandLine

app = typer.Typer(
    cls=CommandLine,
    help="Text generation as a Gymnasium environment: agents, rewards, comparisons.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


reward_app = typer.Typer(help="Fit and audit reward models.", no_args_is_help=True)
reward_app.command("fit")(fit_reward_command)
reward_app.command("audit")(audit_command)
app.add_typer(reward_app, name="reward")
app.command("search")(search_command)


@app.command()
@friendly
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what it makes.")] = Path("demo-results"),
    train_prompts: Annotated[int, typer.Option(min=2)] = 48,
    test_prompts: Annotated[int, typer.Option(min=1)] = 24,
    budget_tokens: Annotated[int, typer.Option(min=1)] = 400,
    max_response_tokens: TokensOption = 96,
    seed: SeedOption = 0,
) -> None:
    """Collect, fit the article's value predictor, and compare three agents for two rewards."""
    from mbrl_text_env.benchmarks.demo import DemoConfig, run_demo

    config = DemoConfig(
        train_prompts=train_prompts,
        test_prompts=test_prompts,
        budget_tokens=budget_tokens,
        max_response_tokens=max_response_tokens,
        seed=seed,
    )
    run_demo(load_language_model("embedded"), out, console, config)


@app.command("compare")
@friendly
def compare_command(
    agents: Annotated[
        str, typer.Option(help="Agents with their options: 'sampling,best-of-n:n=8,lookahead'.")
    ] = "sampling,best-of-n,lookahead",
    reward: RewardOption = "sentiment",
    num_prompts: Annotated[int, typer.Option(min=1)] = 16,
    budget_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that an agent may generate for a prompt.")
    ] = None,
    budget_flops: Annotated[
        float | None, typer.Option(help="FLOPs of all models that it may spend on a prompt.")
    ] = None,
    budget_seconds: Annotated[
        float | None, typer.Option(help="Seconds after which it begins nothing new.")
    ] = None,
    max_response_tokens: TokensOption = 96,
    seed: SeedOption = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of the comparison; resumed if it exists.")
    ] = Path("comparison"),
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "default",
    tokenizer: TokenizerOption = "embedded",
    num_parameters: ParametersOption = None,
    server_model: ServerModelOption = None,
    max_wait: WaitOption = 60.0,
    plain_prompts: PlainOption = False,
    prompts: PromptsOption = "builtin",
    split: Annotated[str, typer.Option(help="Split of the prompts; 'all' for all.")] = "test",
    reward_timeout: TimeoutOption = 600.0,
    gold: Annotated[
        str | None,
        typer.Option(help="A trusted reward that no agent sees; it scores the answers too."),
    ] = None,
    value: ValueOption = "prefix",
    policy: PolicyOption = None,
    batch_prompts: Annotated[int, typer.Option(min=1)] = 32,
    allow_unequal_budgets: bool = False,
) -> None:
    """Compare agents on the same held-out prompts, budget and seed; can be killed and resumed."""
    from mbrl_text_env.benchmarks.compare import CompareConfig, Comparison, compare
    from mbrl_text_env.benchmarks.progress import compare_progress
    from mbrl_text_env.benchmarks.report import table

    config = CompareConfig(
        tuple(spec.strip() for spec in agents.split(",")),
        budget_tokens=budget_tokens,
        max_response_tokens=max_response_tokens,
        seed=seed,
        batch_prompts=batch_prompts,
        allow_unequal_budgets=allow_unequal_budgets,
        budget_flops=budget_flops,
        budget_seconds=budget_seconds,
    )
    reward_model = load_reward(reward, reward_timeout)
    asked = chosen_prompts(prompts, split, num_prompts, reward_model, seed, plain_prompts)
    model = load_language_model(
        language_model, dtype, tokenizer, num_parameters, server_model, max_wait
    )
    policies = load_policies(policy or [], model)
    comparison = Comparison(
        config,
        that_fit(asked, model),
        model,
        reward_model,
        load_value_option(value, reward_model, model, max_response_tokens, seed),
        None if gold is None else load_reward(gold, reward_timeout),
        {"value": value_digest(value), "reward": reward, "dtype": dtype},
        policies,
    )
    with compare_progress(console, comparison) as on_batch:
        summary = compare(comparison, out, on_batch=on_batch)
    console.print(table(summary))
    console.print(f"results.jsonl, summary.json and comparison.png: {out.resolve()}")


@app.command("collect")
@friendly
def collect_command(
    out: Annotated[Path, typer.Option(help="Records folder; resumed if it exists.")],
    reward: RewardOption = "sentiment",
    num_prompts: Annotated[int, typer.Option(min=1)] = 48,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 4,
    max_response_tokens: TokensOption = 96,
    seed: SeedOption = 0,
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "default",
    tokenizer: TokenizerOption = "embedded",
    num_parameters: ParametersOption = None,
    server_model: ServerModelOption = None,
    max_wait: WaitOption = 60.0,
    plain_prompts: PlainOption = False,
    prompts: PromptsOption = "builtin",
    split: Annotated[str, typer.Option(help="Split of the prompts; 'all' for all.")] = "train",
    reward_timeout: TimeoutOption = 600.0,
) -> None:
    """Sample responses and write them down with their scores; can be killed and resumed."""
    from mbrl_text_env.agents.collection import collect, missing_samples
    from mbrl_text_env.benchmarks.progress import progress_bar
    from mbrl_text_env.records import RecordWriter

    reward_model = load_reward(reward, reward_timeout)
    asked = chosen_prompts(prompts, split, num_prompts, reward_model, seed, plain_prompts)
    model = load_language_model(
        language_model, dtype, tokenizer, num_parameters, server_model, max_wait
    )
    chosen = that_fit(asked, model)
    with RecordWriter(out) as writer, progress_bar(console) as bar:
        missing = missing_samples(writer.existing(), chosen, samples)
        left = [name for name, numbers in missing.items() if numbers]
        task = bar.add_task("Collecting", total=sum(map(len, missing.values())))
        failed = collect(
            model,
            reward_model,
            chosen,
            writer,
            samples_per_prompt=samples,
            max_response_tokens=max_response_tokens,
            seed=seed,
            on_batch=lambda records: bar.advance(task, len(records)),
        )
    added = sum(len(missing[name]) for name in left if name not in failed)
    console.print(
        f"{added} responses to {len(left) - len(failed)} prompts added "
        f"({len(chosen) - len(left)} prompts were there, {len(failed)} could not be scored): "
        f"{out.resolve()}"
    )
    if failed or len(chosen) < len(asked):
        # Not all was done; the same command tries these prompts again.
        raise typer.Exit(1)


@app.command("fit")
@friendly
def fit_command(
    records: Annotated[Path, typer.Option(help="Records folder, as written by `collect`.")],
    out: Annotated[Path, typer.Option(help="Folder for the value model.")],
    kind: Annotated[
        str,
        typer.Option(
            help="'embedding' (the article's), 'calibrated' (the reward of the prefix), 'stacked', "
            "'ensemble' or 'hidden-state'."
        ),
    ] = "stacked",
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "default",
    tokenizer: TokenizerOption = "embedded",
    max_response_tokens: TokensOption = 96,
    num_parameters: ParametersOption = None,
    server_model: ServerModelOption = None,
    max_wait: WaitOption = 60.0,
    seed: SeedOption = 0,
    reward: Annotated[
        str | None,
        typer.Option(
            help="The reward that scored the records; by default the one of the name in them."
        ),
    ] = None,
    reward_timeout: TimeoutOption = 600.0,
) -> None:
    """Fit a value model on scored records, for the reward that scored them."""
    from mbrl_text_env.agents.values import FITTED, FittedValue, check_value_fits, make_value
    from mbrl_text_env.records import read_records

    if kind not in FITTED:
        raise typer.BadParameter(f"--kind: expected one of {', '.join(FITTED)}, got {kind!r}.")
    found = read_records(records)
    if not found:
        raise typer.BadParameter(f"--records: expected scored records, got none in {records}.")
    reward_model = _reward_of(found[0].reward_name, reward, reward_timeout)
    model = load_language_model(
        language_model, dtype, tokenizer, num_parameters, server_model, max_wait
    )
    value = make_value(
        kind, model, reward_model, max_response_tokens=max_response_tokens, seed=seed
    )
    assert isinstance(value, FittedValue)
    value.fit(found)
    check_value_fits(value, model, reward_model)
    value.save(out)
    console.print(fit_table(value, found[0].reward_name))
    console.print(
        f"Use it with `mbrl-text compare --reward {reward or found[0].reward_name} --value {out}`."
    )


@app.command("prompts")
@friendly
def prompts_command(
    source: PromptsOption = "builtin",
    split: Annotated[str, typer.Option(help="train, validation, test, or all.")] = "all",
    kind: Annotated[str | None, typer.Option(help="Only prompts of this kind.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 20,
) -> None:
    """List prompts."""
    found = load_prompts_option(source, split, kind)
    shown = Table("id", "split", "kind", "text", title=f"{len(found)} prompts")
    for prompt in found[:limit]:
        shown.add_row(prompt.id, prompt.split, str(prompt.metadata.get("kind", "")), prompt.text)
    console.print(shown)
    if len(found) > limit:
        console.print(f"... and {len(found) - limit} more (--limit)")


@app.command("rewards")
@friendly
def rewards_command() -> None:
    """List reward models."""
    from mbrl_text_env.rewards import descriptions

    shown = Table("name", "what it scores", title="Reward models")
    for name, description in descriptions().items():
        shown.add_row(name, description)
    console.print(shown)


def _reward_of(name: str, spec: str | None, timeout: float) -> Any:
    """The reward that scored records, or its name alone where it cannot be made from that."""
    from mbrl_text_env.records import RecordsError
    from mbrl_text_env.rewards import RewardSpecError
    from mbrl_text_env.rewards.base import reward_name

    if spec is None:
        try:
            return load_reward(name, timeout)
        except RewardSpecError:
            return _NameOfReward(name)
    reward_model = load_reward(spec, timeout)
    if reward_name(reward_model) != name:
        raise RecordsError(
            f"--reward {spec!r} is called {reward_name(reward_model)!r}, and the records were "
            f"scored by {name!r}. Give the reward that scored them."
        )
    return reward_model


class _NameOfReward:
    """Stands for a reward that scored records, for values that do not ask it again."""

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, prompts: Any, responses: Any) -> Any:
        """Refuse."""
        raise ValueError(
            f"the records say no more of their reward than the name {self.name!r}, and this kind "
            "of value scores prefixes by it: pass --reward, as it was given to `collect`"
        )


if __name__ == "__main__":
    app()
