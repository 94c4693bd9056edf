"""The command line: `mbrl-text`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Text generation as a Gymnasium environment: agents, rewards, comparisons.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
ParametersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Of a server's model, where it does not say; FLOPs follow from it."),
]
_DTYPES = ("default", "float32", "bfloat16", "float16", "int8")
console = Console()
errors = Console(stderr=True)

LanguageModelOption = Annotated[
    str,
    typer.Option(
        help="'embedded' (SmolLM2-135M-Instruct), a Hub name, a folder, or the URL of an "
        "OpenAI-compatible server (several with commas between them)."
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="Number format: 'default', 'float32', 'bfloat16', 'float16' or 'int8'.")
]
TokenizerOption = Annotated[
    str, typer.Option(help="Tokenizer of a server's model: 'embedded', a Hub name, or a folder.")
]
RewardOption = Annotated[
    str, typer.Option(help="A name, or a weighted sum such as '0.5*sentiment+0.5*relevance'.")
]
PromptsOption = Annotated[str, typer.Option(help="'builtin', or a .jsonl or .csv file.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Token limit of a response.")]


def _friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Print the errors that are the user's to mend without a traceback, and exit with 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        # Every error of ours that names what to change is one of these two.
        try:
            command(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            if not type(error).__module__.startswith(("mbrl_text_env", "agents", "benchmarks")):
                raise
            errors.print(f"{type(error).__name__}: {error}", style="red", markup=False)
            raise typer.Exit(2) from error

    return wrapped


@app.command()
@_friendly
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what it makes.")] = Path("demo-results"),
    train_prompts: Annotated[int, typer.Option(min=2)] = 48,
    test_prompts: Annotated[int, typer.Option(min=1)] = 24,
    budget_tokens: Annotated[int, typer.Option(min=1)] = 400,
    max_response_tokens: TokensOption = 96,
    seed: int = 0,
) -> None:
    """Collect, fit the article's value predictor, and compare three agents for two rewards."""
    from benchmarks.demo import DemoConfig, run_demo

    config = DemoConfig(
        train_prompts=train_prompts,
        test_prompts=test_prompts,
        budget_tokens=budget_tokens,
        max_response_tokens=max_response_tokens,
        seed=seed,
    )
    run_demo(_language_model("embedded"), out, console, config)


@app.command("compare")
@_friendly
def compare_command(
    agents: Annotated[
        str, typer.Option(help="Agents with their options: 'sampling,best-of-n:n=8,lookahead'.")
    ] = "sampling,best-of-n,lookahead",
    reward: RewardOption = "sentiment",
    num_prompts: Annotated[int, typer.Option(min=1)] = 16,
    budget_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that an agent may generate for a prompt.")
    ] = None,
    max_response_tokens: TokensOption = 96,
    seed: int = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of the comparison; resumed if it exists.")
    ] = Path("comparison"),
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "default",
    tokenizer: TokenizerOption = "embedded",
    num_parameters: ParametersOption = None,
    prompts: PromptsOption = "builtin",
    split: Annotated[str, typer.Option(help="Split of the prompts; 'all' for all.")] = "test",
    value: Annotated[
        Path | None, typer.Option(help="A value model's folder, as written by `fit`.")
    ] = None,
    batch_prompts: Annotated[int, typer.Option(min=1)] = 32,
    allow_unequal_budgets: bool = False,
) -> None:
    """Compare agents on the same held-out prompts, budget and seed; can be killed and resumed."""
    from agents.values import EmbeddingValue
    from benchmarks.compare import CompareConfig, Comparison, choose_prompts, compare
    from benchmarks.progress import compare_progress
    from benchmarks.report import table
    from mbrl_text_env.rewards import make

    config = CompareConfig(
        tuple(spec.strip() for spec in agents.split(",")),
        budget_tokens=budget_tokens,
        max_response_tokens=max_response_tokens,
        seed=seed,
        batch_prompts=batch_prompts,
        allow_unequal_budgets=allow_unequal_budgets,
    )
    reward_model = make(reward)
    chosen = choose_prompts(_prompts(prompts, split), num_prompts, reward_model, seed)
    model = _language_model(language_model, dtype, tokenizer, num_parameters)
    if value is None and any(spec.startswith("lookahead") for spec in config.agents):
        console.print(
            "lookahead has no fitted value model (--value), so it falls back to best-of-4, as the "
            "article's does. Make one with `mbrl-text collect` and `mbrl-text fit`."
        )
    comparison = Comparison(
        config,
        chosen,
        model,
        reward_model,
        None if value is None else EmbeddingValue.load(value, model),
        {"value": None if value is None else _digest(value), "reward": reward, "dtype": dtype},
    )
    with compare_progress(console, comparison) as on_batch:
        summary = compare(comparison, out, on_batch=on_batch)
    console.print(table(summary))
    console.print(f"results.jsonl, summary.json and comparison.png: {out.resolve()}")


@app.command("collect")
@_friendly
def collect_command(
    out: Annotated[Path, typer.Option(help="Records folder; resumed if it exists.")],
    reward: RewardOption = "sentiment",
    num_prompts: Annotated[int, typer.Option(min=1)] = 48,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 4,
    max_response_tokens: TokensOption = 96,
    seed: int = 0,
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "default",
    tokenizer: TokenizerOption = "embedded",
    num_parameters: ParametersOption = None,
    prompts: PromptsOption = "builtin",
    split: Annotated[str, typer.Option(help="Split of the prompts; 'all' for all.")] = "train",
) -> None:
    """Sample responses and write them down with their scores; can be killed and resumed."""
    from agents.collection import collect
    from benchmarks.compare import choose_prompts
    from benchmarks.progress import progress_bar
    from mbrl_text_env.records import RecordWriter
    from mbrl_text_env.rewards import make

    reward_model = make(reward)
    chosen = choose_prompts(_prompts(prompts, split), num_prompts, reward_model, seed)
    with RecordWriter(out) as writer, progress_bar(console) as bar:
        existing = writer.existing()
        _check_same_reward(existing, reward_model, out)
        done = {record.prompt_id for record in existing if record.seed == seed}
        left = [prompt for prompt in chosen if prompt.id not in done]
        task = bar.add_task("Collecting", total=len(left) * samples)
        if left:
            collect(
                _language_model(language_model, dtype, tokenizer, num_parameters),
                reward_model,
                left,
                writer,
                samples_per_prompt=samples,
                max_response_tokens=max_response_tokens,
                seed=seed,
                on_batch=lambda records: bar.advance(task, len(records)),
            )
    console.print(
        f"{len(left) * samples} responses to {len(left)} prompts added ({len(done)} prompts were "
        f"there): {out.resolve()}"
    )


@app.command("fit")
@_friendly
def fit_command(
    records: Annotated[Path, typer.Option(help="Records folder, as written by `collect`.")],
    out: Annotated[Path, typer.Option(help="Folder for the value model.")],
    language_model: LanguageModelOption = "embedded",
    alpha: Annotated[float, typer.Option(help="Strength of the ridge penalty.")] = 1.0,
    prefix_ratio: Annotated[float, typer.Option(help="Share of the words that is kept.")] = 0.5,
) -> None:
    """Fit the article's value predictor on scored records."""
    from agents.values import EmbeddingValue
    from mbrl_text_env.records import read_records

    found = read_records(records)
    value = EmbeddingValue(_tokenizer(language_model), alpha=alpha, prefix_ratio=prefix_ratio)
    report = value.fit(found).report_
    value.save(out)
    shown = Table("measured on prompts left out", "", title=f"Value of {found[0].reward_name!r}")
    shown.add_row("records", str(report.num_records))
    shown.add_row("prompts", str(report.num_prompts))
    shown.add_row("correlation", f"{report.correlation:.3f}")
    shown.add_row("correlation within a prompt", f"{report.within_prompt:.3f}")
    shown.add_row("standard deviation of the error", f"{report.std:.3f}")
    console.print(shown)
    console.print(f"Use it with `mbrl-text compare --value {out}`.")


@app.command("prompts")
@_friendly
def prompts_command(
    source: PromptsOption = "builtin",
    split: Annotated[str, typer.Option(help="train, validation, test, or all.")] = "all",
    kind: Annotated[str | None, typer.Option(help="Only prompts of this kind.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 20,
) -> None:
    """List prompts."""
    found = _prompts(source, split, kind)
    shown = Table("id", "split", "kind", "text", title=f"{len(found)} prompts")
    for prompt in found[:limit]:
        shown.add_row(prompt.id, prompt.split, str(prompt.metadata.get("kind", "")), prompt.text)
    console.print(shown)
    if len(found) > limit:
        console.print(f"... and {len(found) - limit} more (--limit)")


@app.command("rewards")
@_friendly
def rewards_command() -> None:
    """List reward models."""
    from mbrl_text_env.rewards.catalogue import DESCRIPTIONS

    shown = Table("name", "what it scores", title="Reward models")
    for name, description in DESCRIPTIONS.items():
        shown.add_row(name, description)
    console.print(shown)


def _language_model(
    name: str,
    dtype: str = "default",
    tokenizer: str = "embedded",
    num_parameters: int | None = None,
) -> Any:
    if name.startswith(("http://", "https://")):
        from mbrl_text_env.language_models import ServerLM

        return ServerLM(
            name.split(","), tokenizer=_tokenizer(tokenizer), num_parameters=num_parameters
        )
    import torch
    from transformers.utils import logging

    from mbrl_text_env.language_models import TransformersLM, embedded

    if dtype not in _DTYPES:
        raise typer.BadParameter(f"--dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}.")
    options = {} if dtype == "default" else {"dtype": getattr(torch, dtype)}
    logging.disable_progress_bar()
    with console.status(f"Loading the language model ({name})"):
        return embedded(**options) if name == "embedded" else TransformersLM(name, **options)


def _tokenizer(name: str) -> Any:
    from mbrl_text_env.language_models import HFTokenizer, embedded_tokenizer

    return embedded_tokenizer() if name == "embedded" else HFTokenizer(name)


def _prompts(source: str, split: str, kind: str | None = None) -> Any:
    from mbrl_text_env.prompts import load_prompts

    return load_prompts(source, split=None if split == "all" else split, kind=kind)


def _check_same_reward(records: Any, reward_model: Any, folder: Path) -> None:
    from mbrl_text_env.records import RecordsError
    from mbrl_text_env.rewards.base import reward_name

    others = sorted({record.reward_name for record in records} - {reward_name(reward_model)})
    if others:
        raise RecordsError(
            f"{folder} holds records scored by {others}, and these would be scored by "
            f"{reward_name(reward_model)!r}. Collect into another folder; `records.rescore` scores "
            "the same responses with another reward model."
        )


def _digest(folder: Path) -> str:
    """Names a value model in a comparison's config: another one is another comparison."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    app()
