"""The demonstration: collect, fit the article's value predictor, compare planners with best-of-N.

Everything is real: the embedded language model writes, two reward models judge, and the comparison
is on prompts that the predictor has not seen. It ends with how many times a planner's compute
best-of-N needs for the same reward.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from mbrl_text_env.agents.collection import collect, missing_samples
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.agents.values import EmbeddingValue, make_value
from mbrl_text_env.benchmarks.compare import (
    CompareConfig,
    Comparison,
    compare_with_progress,
    read_rows,
)
from mbrl_text_env.benchmarks.matched import DEFAULT_PLANNER, Cell, analyse, make_pool
from mbrl_text_env.benchmarks.matched import table as multiplier_table
from mbrl_text_env.benchmarks.options import DemoConfig, choose_prompts
from mbrl_text_env.benchmarks.report import side_by_side, table
from mbrl_text_env.benchmarks.terminal import panel, progress_bar
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.records import RecordWriter, has_records, read_records, rescore
from mbrl_text_env.rewards import make

REWARDS = ("sentiment", "relevance")
AGENTS = ("sampling", "best-of-n", "lookahead:value=embedding", DEFAULT_PLANNER)


def run_demo(
    language_model: LanguageModel, out: Path, console: Console, config: DemoConfig
) -> dict[str, dict[str, Any]]:
    """Run or resume the demonstration and print it.

    Returns:
        The summary of the comparison by reward.
    """
    if out.exists():
        console.print(f"Going on in {out}: what an earlier run has finished is not run again.")
    _first_text(language_model, console, config)
    _collect(language_model, out, console, config)
    summaries = {}
    for name in REWARDS:
        value = _fit(language_model, out, name, console)
        comparison = _comparison(language_model, value, name, config)
        summaries[name] = compare_with_progress(comparison, out / f"compare-{name}", console)
        summaries[name]["multipliers"] = _multipliers(comparison, out, name, console, config)
    for name, summary in summaries.items():
        rows = read_rows(out / f"compare-{name}" / "results.jsonl")
        first = rows[0]["prompt_id"]
        console.print(side_by_side([row for row in rows if row["prompt_id"] == first]))
        console.print(table(summary))
        console.print(multiplier_table(summary["multipliers"]))
    console.print(f"Records, value models, rows, summaries and plots: {out.resolve()}")
    return summaries


def _first_text(language_model: LanguageModel, console: Console, config: DemoConfig) -> None:
    prompt = load_prompts(split="validation", limit=1)[0]
    agent = Sampling(language_model, max_response_tokens=32)
    (generation,) = agent.generate([prompt], seed=config.seed)
    text = f"{generation.text.strip()} ..."
    console.print(panel(text, prompt.text, f"written by {language_model.name}"))


def _collect(
    language_model: LanguageModel, out: Path, console: Console, config: DemoConfig
) -> None:
    """Sample once; the second reward scores the same responses."""
    first, *others = REWARDS
    reward = make(first)
    prompts = choose_prompts(load_prompts(split="train"), config.train_prompts, reward, config.seed)
    source = out / f"records-{first}"
    with progress_bar(console) as bar, RecordWriter(source) as writer:
        missing = missing_samples(writer.existing(), prompts, config.samples)
        total = sum(map(len, missing.values()))
        task = bar.add_task("Collecting scored responses", total=total)
        collect(
            language_model,
            reward,
            prompts,
            writer,
            samples_per_prompt=config.samples,
            max_response_tokens=config.max_response_tokens,
            seed=config.seed,
            on_batch=lambda records: bar.advance(task, len(records)),
        )
    for name in others:
        target = out / f"records-{name}"
        if not has_records(target, expected=len(read_records(source))):
            shutil.rmtree(target, ignore_errors=True)
            rescore(source, make(name), target)


def _fit(language_model: LanguageModel, out: Path, name: str, console: Console) -> EmbeddingValue:
    value = EmbeddingValue(language_model).fit(read_records(out / f"records-{name}"))
    value.save(out / f"value-{name}")
    report = value.report_
    console.print(
        f"Value predictor for {name!r}: fitted on {report.num_records} responses to "
        f"{report.num_prompts} prompts; on prompts left out its correlation with the score is "
        f"{report.correlation:.2f}, within a prompt {report.within_prompt:.2f}."
    )
    return value


def _comparison(
    language_model: LanguageModel, value: EmbeddingValue, name: str, config: DemoConfig
) -> Comparison:
    reward = make(name)
    return Comparison(
        CompareConfig(
            AGENTS,
            budget_tokens=config.budget_tokens,
            max_response_tokens=config.max_response_tokens,
            seed=config.seed,
        ),
        choose_prompts(load_prompts(split="test"), config.test_prompts, reward, config.seed),
        language_model,
        reward,
        {"embedding": value, "prefix": make_value("prefix", language_model, reward)},
    )


def _multipliers(
    comparison: Comparison, out: Path, name: str, console: Console, config: DemoConfig
) -> list[dict[str, Any]]:
    """What best-of-N needs to come up to each agent, from a pool that the rewards share."""
    with progress_bar(console) as bar:
        total = len(comparison.prompts) * config.pool_samples
        task = bar.add_task("Sampling what best-of-N would at any N", total=total)
        pool = make_pool(
            out / "pool",
            out / f"pool-scores-{name}",
            comparison.language_model,
            comparison.reward_model,
            comparison.prompts,
            samples=config.pool_samples,
            max_response_tokens=config.max_response_tokens,
            # An agent is not compared with its own samples.
            seed=config.seed + 1,
            on_batch=lambda count: bar.advance(task, count),
        )
    rows = read_rows(out / f"compare-{name}" / "results.jsonl")
    cells = [
        Cell(name, agent, config.budget_tokens, "tokens", [r for r in rows if r["agent"] == agent])
        for agent in AGENTS[1:]
    ]
    return analyse(pool, cells)
