"""The command line: `mbrl-text`.

Exit codes: 0 for success, 1 if prompts were left out, 2 for an error that the user can fix, 130
for Ctrl-C.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mbrl_text_env.benchmarks import options
from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.machines import RayOptions, merge_command
from mbrl_text_env.benchmarks.reward_fit import fit_command as fit_reward_command
from mbrl_text_env.benchmarks.serve import serve_command
from mbrl_text_env.benchmarks.terminal import (
    CommandLine,
    console,
    numbers,
    panel,
    progress_bar,
    table_of,
)
from mbrl_text_env.benchmarks.train import train_command

_TRAIN = options.PromptOptions(split="train")
_ANY_SPLIT = options.PromptOptions(split="all")
_ARTICLE = options.RewardOptions(reward="relevance")
_COMPARE = options.CompareConfig(("sampling", "best-of-n", "adaptive"), max_response_tokens=96)

app = typer.Typer(
    cls=CommandLine,
    help="Text generation as a Gymnasium environment: agents, rewards, comparisons.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
reward_app = typer.Typer(help="Fit and audit reward models.", no_args_is_help=True)
reward_app.command("fit")(fit_reward_command)
app.add_typer(reward_app, name="reward")
world_app = typer.Typer(help="Diagnose world models.", no_args_is_help=True)
app.add_typer(world_app, name="world-model")
app.command("train")(train_command)
app.command("serve")(serve_command)
app.command("merge")(merge_command)


@app.command()
@friendly
def demo(
    *,
    out: Path = option(Path("demo-results"), "Output folder."),
    config: options.DemoConfig,
) -> None:
    """Run the demo: collect, fit the article's value model, compare four agents on two rewards."""
    from mbrl_text_env.benchmarks.demo import find_pace, load, run_demo

    pace = find_pace(out, console, config)
    run_demo(load(pace.dtype), out, console, config, pace)


@app.command("article")
@friendly
def article_command(
    *,
    out: Path = option(Path("article"), "Output folder; an existing run is resumed."),
    config: options.ArticleConfig,
    judge: options.RewardOptions = _ARTICLE,
) -> None:
    """Run the article's pipeline: collect, fit, compare with best-of-4, train. Can be resumed."""
    from mbrl_text_env.benchmarks.article import run_article

    run_article(config, judge, out, console)


@world_app.command("report")
@friendly
def world_model_report_command(
    *,
    folder: Annotated[Path, typer.Argument(help="World model, by `fit --kind world-model`.")],
    records: Path = option(..., "Records of prompts that the world model was not fitted on."),
    shift: list[Path] | None = option(
        None, "Records of other kinds of prompts, or of another policy. Repeatable."
    ),
    horizons: str = option("8,16,32", "Horizons in tokens, comma-separated."),
    prefix_tokens: int = option(16, "Tokens of the prefix that predictions start from.", min=1),
    seed: int = option(0, options.SEED),
    out: Path = option(Path("world-model-report"), "Output folder of the report."),
    model: options.ModelOptions,
) -> None:
    """Report errors, calibration and disagreement of a world model by horizon."""
    from mbrl_text_env.benchmarks.reports import write_report
    from mbrl_text_env.benchmarks.world_model import report_horizons

    ahead, places = options.integers("--horizons", horizons), [records, *(shift or [])]
    settings = {"prefix_tokens": prefix_tokens, "seed": seed}
    report_horizons(model.load(), folder, places, ahead, out, **settings)
    console.print(f"Report: {write_report(out).resolve()}")


@app.command("compare")
@friendly
def compare_command(
    *,
    config: options.CompareConfig = _COMPARE,
    judge: options.RewardOptions,
    num_prompts: int = option(16, options.NUM_PROMPTS),
    out: Path = option(Path("comparison"), "Output folder; an existing comparison is resumed."),
    model: options.ModelOptions,
    prompts: options.PromptOptions,
    gold: str | None = option(
        None, "A trusted reward that no agent sees; the answers are scored with it too."
    ),
    reward_price: str | None = option(None, options.PRICE),
    no_budget: bool = option(False, "Do not apply the default token budget.", "--no-budget"),
    value: str = option("prefix", options.VALUE),
    policy: list[str] | None = option(None, options.POLICY),
    machines: RayOptions,
) -> None:
    """Compare agents on the same prompts, budget and seed. Can be resumed."""
    from mbrl_text_env.benchmarks.compare import Comparison, compare_with_progress
    from mbrl_text_env.benchmarks.report import table

    judge = judge.of(prompts.prompts)
    if not (no_budget or reward_price is not None or config.budget.is_capped):
        config = replace(config, budget_tokens=options.DEFAULT_TOKENS)
    if reward_price is not None and config.budget_flops is None and config.budget_tokens:
        raise typer.BadParameter(
            "--reward-price: expected a budget in FLOPs (--budget-flops), got only one in tokens, "
            "which does not count reward calls. Give --budget-flops too, or instead."
        )
    reward = judge.load()
    asked = prompts.choose(num_prompts, reward, config.seed)
    language_model = model.load()
    reward = options.priced(reward, reward_price, language_model, config.max_response_tokens)
    comparison = Comparison(
        config,
        options.that_fit(asked, language_model),
        language_model,
        reward,
        options.load_value_option(
            value, reward, language_model, config.max_response_tokens, config.seed
        ),
        None if gold is None else judge.load(gold),
        {
            "value": options.value_digest(value),
            "reward": judge.reward,
            "dtype": model.dtype,
            **({} if reward_price is None else {"reward_price": reward_price}),
        },
        options.load_policies(policy or [], language_model),
    )
    with machines.each() as each:
        summary = compare_with_progress(comparison, out, console, each)
    console.print(table(summary))
    console.print(f"results.jsonl, summary.json and report.html: {out.resolve()}")
    failed = any(entry["failed"] for entry in summary["agents"])
    _exit_complete(not failed and len(comparison.prompts) == len(asked))


@app.command("collect")
@friendly
def collect_command(
    *,
    out: Path = option(..., "Records folder; an existing one is resumed."),
    judge: options.RewardOptions,
    num_prompts: int = option(48, options.NUM_PROMPTS),
    samples: int = option(4, "Responses per prompt.", min=1),
    max_response_tokens: int = option(96, options.TOKENS),
    seed: int = option(0, options.SEED),
    batch_prompts: int = option(16, "Prompts per batch.", min=1),
    model: options.ModelOptions,
    prompts: options.PromptOptions = _TRAIN,
    machines: RayOptions,
) -> None:
    """Sample responses, score them and save both as records. Can be resumed."""
    from mbrl_text_env.benchmarks.demo import collect_with_progress
    from mbrl_text_env.benchmarks.reports import write_records_report

    reward = judge.of(prompts.prompts).load()
    asked = prompts.choose(num_prompts, reward, seed)
    language_model = model.load()
    chosen = options.that_fit(asked, language_model)
    with machines.each() as each:
        missing, failed = collect_with_progress(
            (language_model, reward),
            chosen,
            out,
            console,
            samples=samples,
            max_response_tokens=max_response_tokens,
            batch_prompts=batch_prompts,
            seed=seed,
            each=each,
        )
    left = [name for name, numbers in missing.items() if numbers]
    added = sum(len(missing[name]) for name in left if name not in failed)
    console.print(
        f"{added} responses to {len(left) - len(failed)} prompts added "
        f"({len(chosen) - len(left)} prompts were complete, {len(failed)} could not be scored): "
        f"{out.resolve()}"
    )
    console.print(f"Report: {write_records_report(out, failed)}")
    _exit_complete(not failed and len(chosen) == len(asked))


@app.command("report")
@friendly
def report_command(
    folder: Annotated[Path, typer.Argument(help="The --out of the command that wrote the report.")],
    out: Path | None = option(
        None,
        "Output file; default: the run's own report.html. A file that ends in .md gets the "
        "answers side by side.",
    ),
) -> None:
    """Write the HTML report of a run again, from the files in its folder."""
    from mbrl_text_env.benchmarks.reports import write_report

    with _written("--out", out or folder):
        place = write_report(folder, out)
    console.print(f"Report: {place.resolve()}")


@app.command("fit")
@friendly
def fit_command(
    *,
    records: Path = option(..., "Records folder, as written by `collect`."),
    out: Path = option(..., "Output folder of the value model."),
    kind: str = option(
        "stacked",
        "'embedding' (the article's), 'calibrated' (the reward of the prefix), 'stacked', "
        "'hidden-state', 'world-model' or 'token-embedding' (cheapest).",
    ),
    model: options.ModelOptions,
    max_response_tokens: int = option(96, options.TOKENS),
    seed: int = option(0, options.SEED),
    reward: str | None = option(
        None, "The reward that scored the records; default: found by its name in the records."
    ),
    reward_timeout: float = option(600.0, options.TIMEOUT),
) -> None:
    """Fit a value model to scored records, for the reward that scored them."""
    from mbrl_text_env.agents.values import (
        FITTED,
        WORLD_MODEL,
        FittedValue,
        check_value_fits,
        make_value,
    )
    from mbrl_text_env.benchmarks.report import fit_table
    from mbrl_text_env.records import read_records
    from mbrl_text_env.world_model import WorldModelValue

    kinds = (*FITTED, WORLD_MODEL)
    if kind not in kinds:
        raise typer.BadParameter(f"--kind: expected one of {', '.join(kinds)}, got {kind!r}.")
    found = read_records(records)
    if not found:
        raise typer.BadParameter(f"--records: expected scored records, got none in {records}.")
    name = found[0].reward_name
    judge = _reward_of(name, reward, reward_timeout)
    language_model = model.load()
    value = make_value(
        kind, language_model, judge, max_response_tokens=max_response_tokens, seed=seed
    )
    assert isinstance(value, FittedValue | WorldModelValue)
    value.fit(found)
    check_value_fits(value, language_model, judge)
    value.save(out)
    wanted = reward or name
    if isinstance(value, FittedValue):
        console.print(fit_table(value, name))
    else:
        # A world model knows no reward: it serves every reward that is computed from counts.
        wanted = "REWARD --agents best-of-n,beam"
    console.print(f"Use it with `mbrl-text compare --reward {wanted} --value {out}`.")


@app.command("prompts")
@friendly
def prompts_command(
    source: str = option("builtin", options.PROMPTS_HELP, "--prompts", "--source"),
    split: str = option("all", "train, validation, test, or all."),
    kind: str | None = option(None, "Only prompts of this kind."),
    limit: int = option(20, "Maximum number of prompts to list.", min=1),
) -> None:
    """List prompts."""
    found = options.load_prompts_option(source, split, kind)
    rows = ((p.id, p.split, str(p.metadata.get("kind", "")), p.text) for p in found[:limit])
    title = f"{len(found)} prompts"
    console.print(table_of(rows, "id", "split", "kind", "text", title=title))
    if len(found) > limit:
        console.print(f"... and {len(found) - limit} more (--limit)")


@app.command("rewards")
@friendly
def rewards_command() -> None:
    """List reward models."""
    from mbrl_text_env.rewards import descriptions

    rows = descriptions().items()
    console.print(table_of(rows, "name", "what it scores", title="Reward models"))


@app.command("agents")
@friendly
def agents_command() -> None:
    """List agents and their options, which follow the name as in 'best-of-n:n=8'."""
    from mbrl_text_env.agents.registry import SHARED_OPTIONS, available, options_of

    rows = []
    for name, description in available().items():
        own = (f"{key}={'' if v is None else v}" for key, v in options_of(name).items())
        rows.append((name, description, " ".join(own)))
    caption = f"All agents also have {', '.join(SHARED_OPTIONS)}. An option without a default "
    caption += "depends on the budget, the prompt or the policy."
    names = ("name", "what it does", "options")
    console.print(table_of(rows, *names, title="Agents", show_lines=True, caption=caption))


@app.command("doctor")
@friendly
def doctor_command() -> None:
    """Show versions, devices, fast number formats, and which features are missing."""
    from mbrl_text_env.benchmarks.doctor import diagnosis

    for each in diagnosis():
        remedy = f" -> {each.remedy}" if each.remedy else ""
        console.print(f"{each.name}: {each.found}{remedy}", style="yellow" if remedy else None)


@app.command("models")
@friendly
def models_command(
    *,
    remove: str | None = option(None, "Remove this model from the cache, after confirmation."),
    yes: bool = option(False, "Remove without confirmation.", "--yes"),
) -> None:
    """List the models in the Hugging Face cache with their sizes, or remove one."""
    from mbrl_text_env.benchmarks.doctor import models_kept, remove_model

    sizes, folder = models_kept()
    if remove is None:
        rows = ((name, f"{size / 1e6:,.1f}") for name, size in sizes.items())
        title = f"Hugging Face cache: {folder}"
        shown = table_of(rows, "model", *numbers("MB"), title=title)
        console.print(shown if sizes else f"No models in {folder}.")
    elif remove not in sizes:
        raise typer.BadParameter(
            f"--remove: expected one of {sorted(sizes) or 'no models (the cache is empty)'}, got "
            f"{remove!r}."
        )
    elif yes or typer.confirm(f"Remove {remove} ({sizes[remove] / 1e6:,.1f} MB) from {folder}?"):
        console.print(f"{remove_model(remove) / 1e6:,.1f} MB freed.")


@app.command("search")
@friendly
def search_command(
    *,
    prompt: Annotated[
        str, typer.Argument(help="The prompt's text, or the id of one of --prompts.")
    ],
    agent: str = option("adaptive", "The planner, with its options."),
    judge: options.RewardOptions,
    value: str = option("prefix", options.VALUE),
    budget_tokens: int = option(400, "Tokens that the planner may sample.", min=1),
    max_response_tokens: int = option(96, options.TOKENS),
    seed: int = option(0, options.SEED),
    model: options.ModelOptions,
    prompts: options.PromptOptions = _ANY_SPLIT,
    children: int = option(4, "Children to show per node.", min=1),
    json_file: Path | None = option(None, "Write the whole search to this JSON file.", "--json"),
    picture_file: Path | None = option(None, "Draw the whole search as this PNG.", "--picture"),
    html_file: Path | None = option(
        None, "Write the whole search to this HTML file, to step through.", "--html"
    ),
) -> None:
    """Answer a prompt with a planner and show its search tree: chunks, values and choices."""
    from mbrl_text_env.agents.registry import AgentSpecError, make
    from mbrl_text_env.agents.search import Planner
    from mbrl_text_env.benchmarks.page import provenance, write_page
    from mbrl_text_env.benchmarks.report import draw_tree, picture, search_page
    from mbrl_text_env.files import write_text
    from mbrl_text_env.rewards.base import reward_bounds
    from mbrl_text_env.types import Budget

    asked, judge = prompts.named(prompt), judge.of(prompts.prompts)
    language_model, reward, limit = model.load(), judge.load(), max_response_tokens
    values = options.load_value_option(value, reward, language_model, limit, seed)
    planner = make(agent, language_model, reward, values, max_response_tokens=limit)
    if not isinstance(planner, Planner):
        raise AgentSpecError(f"Agent {agent!r} does not search. Give a planner.")
    [(answer, tree)] = planner.explore([asked], Budget(tokens=budget_tokens), seed=seed)
    search = tree.to_dict(language_model)
    console.print(draw_tree(search, most_children=children))
    usage = answer.usage
    spent = f"{usage.generated_tokens:,} tokens, {usage.flops:.3g} FLOPs, "
    spent += f"{usage.reward_calls} reward calls"
    score = f"{judge.reward} {answer.completion.score:.3f}"
    console.print(panel(answer.text.strip(), score, spent))
    if json_file is not None:
        with _written("--json", json_file):
            write_text(json_file, json.dumps(search, indent=1))
    if picture_file is not None:
        with _written("--picture", picture_file):
            picture(search, picture_file)
    if html_file is not None:
        texts = [language_model.decode(node.state.response_ids) for node in tree.nodes]
        bounds = reward_bounds(reward, [asked] * len(texts), texts).tolist()
        settings = {"agent": agent, "reward": judge.reward, "language_model": language_model.name}
        settings |= {"value": value, "budget_tokens": budget_tokens, "seed": seed}
        settings |= {"max_response_tokens": limit, **answer.usage.as_dict()}
        with _written("--html", html_file):
            write_page(html_file, search_page(search, bounds, settings, provenance()))


@reward_app.command("audit")
@friendly
def audit_command(
    *,
    config: options.AuditConfig,
    out: Path = option(Path("audit"), "Output folder; an existing audit is resumed."),
    pool: Path | None = option(
        None, "Records folder to take responses from; missing responses are added to it."
    ),
    model: options.ModelOptions,
    prompts: options.PromptOptions,
) -> None:
    """Audit a reward: does selecting by it also raise a trusted one? Can be resumed."""

    from mbrl_text_env.benchmarks.audit.run import Audit, choose_for_both, run_audit
    from mbrl_text_env.benchmarks.audit.view import summary
    from mbrl_text_env.rewards import make

    proxy, gold = make(config.proxy), make(config.gold)
    found = prompts.load()
    config = replace(config, num_prompts=prompts.available(config.num_prompts, found, proxy, gold))
    asked, left_out = choose_for_both(found, config, proxy, gold)
    language_model = model.load()
    chosen = options.that_fit(prompts.formatted(asked), language_model)
    labels = {"prompts_source": prompts.prompts, "split": prompts.split, "dtype": model.dtype}
    audit = Audit(config, chosen, language_model, proxy, gold, left_out, labels)
    with progress_bar() as bar:
        tasks = {"pool": bar.add_task("Responses", total=len(chosen) * config.samples)}
        for role in audit.roles:
            text = f"Prompts scored by {getattr(config, role)}"
            tasks[role] = bar.add_task(text, total=len(chosen))
        result = run_audit(
            audit,
            out,
            pool=pool,
            on_progress=lambda stage, count: bar.advance(tasks[stage], count),
        )
    console.print(summary(result))
    console.print(f"audit.json and report.html: {out.resolve()}")
    _exit_complete(len(chosen) == len(asked))


def _exit_complete(is_complete: bool) -> None:
    """Exit with 1 if prompts were left out."""
    if not is_complete:
        raise typer.Exit(1)


@contextmanager
def _written(option: str, path: Path) -> Iterator[None]:
    """Report a file that cannot be written under the name of its option."""
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(
            f"{option}: expected a file that can be written, got {str(path)!r} ({error.strerror})."
        ) from error


def _reward_of(name: str, spec: str | None, timeout: float) -> Any:
    """The reward that scored the records, or only its name if it cannot be made from that."""
    from mbrl_text_env.records import RecordsError
    from mbrl_text_env.rewards import RewardSpecError
    from mbrl_text_env.rewards.base import reward_name

    if spec is None:
        try:
            return options.RewardOptions(reward=name, reward_timeout=timeout).load()
        except RewardSpecError:
            return _NameOfReward(name)
    reward_model = options.RewardOptions(reward=spec, reward_timeout=timeout).load()
    if reward_name(reward_model) != name:
        raise RecordsError(
            f"--reward {spec!r} is called {reward_name(reward_model)!r}, but the records were "
            f"scored by {name!r}. Give the reward that scored them."
        )
    return reward_model


@dataclass
class _NameOfReward:
    """A reward known only by its name, for value models that do not call it."""

    name: str

    def score(self, prompts: Any, responses: Any) -> Any:
        """Raise: the reward is not available."""
        raise ValueError(
            f"the records hold only the name of their reward, {self.name!r}, and this kind of "
            "value model scores prefixes with the reward: pass --reward, as given to `collect`"
        )


if __name__ == "__main__":
    app()
