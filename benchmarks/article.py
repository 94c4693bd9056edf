"""The article's pipeline: collect, fit the predictor, compare with best-of-4, then train.

Source: "Model Based Reinforcement Learning: Tutorial & Examples" (Patronus AI). The numbers of
responses, lengths and LoRA settings are the article's; models, rewards and devices are options.
Deviation: see `agents.learning.planned` for the loop. The article names no unseen prompt and no
number of planned answers to learn from; here it is `_ANSWERS` per prompt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

from mbrl_text_env.agents.learning import ExpertIteration, FineTuneSettings, planned
from mbrl_text_env.agents.learning.stages import STAGES, LoraImprover
from mbrl_text_env.agents.values import EmbeddingValue, FittedValue, load_value
from mbrl_text_env.benchmarks import compare, options, report
from mbrl_text_env.benchmarks.demo import collect_with_progress, fitted_on
from mbrl_text_env.benchmarks.options import ArticleConfig, RewardOptions
from mbrl_text_env.benchmarks.page import Page, provenance, read_json, reading, write_page
from mbrl_text_env.benchmarks.statistics import mean_interval, prompt_means
from mbrl_text_env.benchmarks.terminal import numbers, progress_bar, table_of
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models.loading import number_format
from mbrl_text_env.language_models.registry import embedded_encoder
from mbrl_text_env.records import read_records, scores_of
from mbrl_text_env.rewards.evaluators._hub import HubReward
from mbrl_text_env.rewards.evaluators.relevance import RelevanceReward
from mbrl_text_env.types import Prompt

PROMPTS = tuple(
    Prompt.from_text(text, name)
    for name, text in (
        ("neural-network", "What is a neural network, and how does it work?"),
        ("exercise", "Which benefits does regular exercise have?"),
        ("photosynthesis", "Explain how plants live on light by photosynthesis."),
        ("machine-learning", "Explain machine learning to a beginner."),
        ("blue-sky", "For what reason does the sky look blue?"),
    )
)
UNSEEN = (Prompt.from_text("How do vaccines protect us from diseases?", "vaccines"),)
AGENTS = ("best-of-n:n=4", "lookahead")
SEEN_FOLDER, UNSEEN_FOLDER, LOOP, RECORDS = "compare-seen", "compare-unseen", "loop", "records"
ABOUT = "article.json"
_SAMPLES, _ANSWERS = 4, 2
_CAUTION = (
    "The loop trains on five prompts and is evaluated on one more. The policy memorises them, "
    "so these figures do not show how it generalises. For that, use 500 or more prompts "
    "(`mbrl-text train expert-iteration --set agent=lookahead --set value=embedding`)."
)
_TUNING = FineTuneSettings(batch_size=1, gradient_accumulation=4)


def run_article(config: ArticleConfig, judge: RewardOptions, out: Path, console: Console) -> None:
    """Run or resume the pipeline in a folder; print and write the results."""
    if "://" in config.policy:
        raise typer.BadParameter(
            f"--policy: expected a model that is loaded and tuned here, got {config.policy!r}."
        )
    device = options.usable_device(config.device)
    name, dtype = config.policy, config.dtype
    policy = options.ModelOptions(language_model=name, dtype=dtype, device=str(device))
    for line in _needs(config, judge, device):
        console.print(line)
    language_model, reward, encoder = policy.load(), judge.load(), embedded_encoder(str(device))
    put_on(reward, device)
    models = language_model, reward
    limits: dict[str, Any] = {"max_response_tokens": config.max_response_tokens}
    limits["seed"] = config.seed
    records = out / RECORDS
    collect_with_progress(models, PROMPTS, records, console, samples=_SAMPLES, **limits)
    if not (out / "value").exists():
        EmbeddingValue(language_model, encoder).fit(read_records(records)).save(out / "value")
    value = load_value(out / "value", *models, encoder)
    assert isinstance(value, FittedValue)
    console.print(f"Quality predictor: {fitted_on(value)}")
    for name, prompts in ((SEEN_FOLDER, PROMPTS), (UNSEEN_FOLDER, UNSEEN)):
        asked = options.CompareConfig(AGENTS, **limits)
        comparison = compare.Comparison(asked, prompts, *models, value)
        compare.compare_with_progress(comparison, out / name, console)
    settings = planned(
        "lookahead",
        value="embedding",
        answers_per_prompt=_ANSWERS,
        iterations=config.iterations,
        patience=None,
        **limits,
    )
    parts = {"improver": LoraImprover(_TUNING), "value_model": value, "encoder": encoder}
    loop = ExpertIteration(*models, PROMPTS, UNSEEN, out / LOOP, settings, **parts)
    _run_loop(loop, console)
    about = {**provenance(), "settings": {**asdict(config), "device": str(device)}}
    write_text(out / ABOUT, json.dumps(about, indent=2))
    page = recorded_page(out)
    write_page(out / compare.REPORT, page)
    for shown in (*page.tables, page.verdict, *page.warnings):
        console.print(shown)
    console.print(f"Report: {(out / compare.REPORT).resolve()}")


def _run_loop(loop: ExpertIteration, console: Console) -> None:
    with progress_bar(console) as bar:
        # The base model is only evaluated.
        total = len(STAGES) * (loop.settings.iterations + 1) - 3
        task = bar.add_task("The loop", total=total)

        def on_stage(iteration: int, stage: str) -> None:
            done = len(STAGES) * iteration + STAGES.index(stage) - 3
            bar.update(task, completed=done, description=f"The loop ({iteration}, {stage})")

        loop.on_stage = on_stage
        loop.run()
        bar.update(task, completed=total)


def recorded_page(out: Path) -> Page:
    """The page of a finished pipeline, from its files; a damaged file is a `CompareError`."""
    with reading(out):
        about = read_json(out / ABOUT)
        folders = [out / SEEN_FOLDER, out / UNSEEN_FOLDER]
        seen, unseen = (read_json(each / compare.SUMMARY) for each in folders)
        rows = [row for each in folders for row in compare.read_rows(each / compare.RESULTS)]
        settings = about.pop("settings")
        page = report.comparison_page(seen, rows, about)
        quality, cost = report.tables(seen)
        quality.title = f"Training prompts: {quality.title}"
        apart = table_of(
            (
                (entry["agent"], f"{entry['mean']:.3f}", f"{entry['generated_tokens']:.0f}")
                for entry in unseen["agents"]
            ),
            "agent",
            *numbers("reward", "tokens"),
            title="Unseen prompt",
            caption="There is no interval for one prompt.",
        )
        return replace(
            page,
            title=f"The article on {seen['language_model']}: {seen['reward']}",
            warnings=[*page.warnings, _CAUTION],
            tables=[quality, apart, cost, _changed(out)],
            data={**page.data, "unseen": unseen},
            settings={**page.settings, **settings},
        )


def _changed(out: Path) -> Table:
    """A table of the scores before and after each iteration of the loop."""
    shown = Table(
        "loop",
        *numbers("trained on", "sampling, five prompts", "sampling, unseen", "predictor"),
        title="Results of the loop",
        caption="Mean scores of four plain samples per prompt, and the predictor's correlation "
        "within the unseen prompt.",
    )
    for folder in sorted((out / LOOP).glob("[0-9][0-9]")):
        found = read_json(folder / "scores.json")
        number, learned = found["iteration"], found["improvement"]
        records = read_records(folder / "value" / RECORDS if number else out / RECORDS)
        means = prompt_means(scores_of(records), [record.prompt_id for record in records])
        shown.add_row(
            f"iteration {number}" if number else "base",
            f"{learned['num_examples']} answers" if learned else "-",
            f"{mean_interval(sorted(means)):.3f}",
            f"{found['validation']['mean']:.3f}",
            f"{float(found['value']['after']['within_prompt']):.2f}",
        )
    return shown


def _needs(config: ArticleConfig, judge: RewardOptions, device: Any) -> list[str]:
    dtype = number_format(None if config.dtype == "default" else config.dtype, device)
    models = [(config.policy, "AutoModelForCausalLM", dtype)] if config.policy != "embedded" else []
    _, _, source = (judge.reward or "").partition("classifier:")
    if source:
        form = number_format(None, device)
        models.append((source, "AutoModelForSequenceClassification", form))
    answers = _SAMPLES * len(PROMPTS)
    # Collected and compared responses; then planned and sampled ones of each iteration.
    count = answers + 8 * (len(PROMPTS) + 1) + 4
    count += config.iterations * (4 * _ANSWERS * len(PROMPTS) + answers + 5)
    return needs(models, count * config.max_response_tokens, device)


def put_on(reward: Any, device: torch.device) -> None:
    """Put the classifiers and encoders of a reward on a device, before its first use."""
    if isinstance(reward, HubReward):
        reward.device = device
    elif isinstance(reward, RelevanceReward) and reward.encoder is None and device.type != "cpu":
        reward.encoder = cast("Encoder", embedded_encoder(str(device)))
    for part in getattr(reward, "rewards", ()):
        put_on(part, device)


def needs(
    models: Sequence[tuple[str, str, torch.dtype]], tokens: int, device: torch.device
) -> list[str]:
    """Estimate memory, one line per model, and time, one line in all.

    `models` are names or folders, with the transformers class and number format of each.
    Each reads or writes about `tokens`. Only the config of a model on the Hub is downloaded.
    """
    lines, seconds = [], 0.0
    for name, kind, dtype in models:
        size = parameters(name, kind)
        if size is None:
            lines.append(f"{name}: memory and time are unknown: its config cannot be loaded.")
            continue
        # Fine-tuning adds a float32 copy if the policy has another format.
        is_copied = kind.endswith("CausalLM") and dtype != torch.float32
        more = f", {size * 4 / 1e9:.1f} GB more during fine-tuning" if is_copied else ""
        lines.append(
            f"{name}: {size / 1e6:,.1f} million parameters, {size * dtype.itemsize / 1e9:.1f} GB "
            f"of memory on {device} in {str(dtype).removeprefix('torch.')}{more}."
        )
        seconds += size * tokens * _seconds(device, dtype)
    if seconds:
        lines.append(
            f"At most {tokens:,} tokens are generated and scored. These models take about "
            f"{seconds / 60:.1f} minutes or more on {device}, at its present speed."
        )
    return lines


def parameters(name: str, kind: str) -> int | None:
    """The parameter count of a model, from its config alone; None if that cannot be loaded."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            return int(getattr(transformers, kind).from_config(config).num_parameters())
    except (OSError, ValueError, KeyError):
        return None


def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds per parameter and token, in a batch of 16 responses."""
    form = torch.float32 if dtype == torch.int8 else dtype
    rows, weights = (torch.ones(n, 2048, dtype=form, device=device) for n in (16, 2048))
    for _ in range(2):
        # The first try warms up; `item` waits for the device.
        began = time.perf_counter()
        for _ in range(8):
            found = rows @ weights.T
        found.sum().item()
        took = time.perf_counter() - began
    return took / (8 * rows.numel() * len(weights))
