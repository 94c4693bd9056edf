"""The demo: collect, fit the article's value model, compare planners with best-of-N.

It runs the embedded language model and two reward models, and compares on prompts that the value
model was not fitted on. At the end it reports how many times a planner's compute best-of-N needs
for the same reward.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mbrl_text_env.agents.collection import collect, missing_samples
from mbrl_text_env.agents.sampling import Sampling
from mbrl_text_env.agents.values import EmbeddingValue, FittedValue, make_value
from mbrl_text_env.benchmarks import compare, matched, report
from mbrl_text_env.benchmarks.audit.run import fill_pool
from mbrl_text_env.benchmarks.options import CompareConfig, CompareError, DemoConfig, choose_prompts
from mbrl_text_env.benchmarks.terminal import panel, progress_bar
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models import embedded
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.language_models.networks import make_product
from mbrl_text_env.mdp import initial
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.records import RecordWriter, has_records, read_records, rescore
from mbrl_text_env.rewards import make
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.types import Prompt

REWARDS = ("sentiment", "relevance")
# Budget per agent and prompt, in responses of full length.
_BUDGET = 400 / 96
# The matrix product that number formats are timed on: rows of a batch, inputs and outputs. It is
# that of SmolLM2's largest layer, whose weights do not fit in a CPU cache.
_PRODUCT = (48, 576, 49152)
# Responses, and tokens per response, to time the fastest format on.
_TIMED = (16, 8)
# Time limit of the demo, the part of it that is not sampling, and the speedup of its larger batches
# over the timed ones (measured on two x86 cores without AVX-512).
_SECONDS, _OTHER_SECONDS, _FASTER = 230, 40, 1.24
# Tokens per response: planners choose every 16, and a search needs four chunks or so.
_SHORTEST, _LONGEST = 56, 96
AGENTS = ("sampling", "best-of-n", "lookahead:value=embedding", matched.DEFAULT_PLANNER)


@dataclass(frozen=True)
class Pace:
    """The fastest number format on this processor, and the demo that fits in the time limit."""

    dtype: str
    rewards: Sequence[str]
    pool_samples: int
    max_response_tokens: int
    tokens_a_second: float


def find_pace(out: Path, console: Console, config: DemoConfig) -> Pace:
    """Time number formats on a product, and choose rewards and the length of responses.

    The result is kept in `out`, so that a resumed run uses the same. Rewards do not differ
    measurably between formats (docs/language_models.md).
    """
    path = out / "pace.json"
    if path.is_file():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return Pace(**{**kept, "rewards": tuple(kept["rewards"])})
        except (ValueError, KeyError, TypeError) as error:
            raise CompareError(
                f"{path}: expected the timings of an earlier run, got a damaged file "
                f"({type(error).__name__}: {error}). Delete it to measure again."
            ) from error
    console.print("Finding the fastest number format ...")
    seconds = {dtype: _product_seconds(dtype) for dtype in ("float32", "bfloat16", "int8")}
    best = min(seconds, key=lambda dtype: seconds[dtype])
    rate = _rate(load(best))
    pace = Pace(best, *fit_in_time(rate, config), rate)
    shown = ", ".join(f"{dtype} {1e3 * each:.0f}" for dtype, each in seconds.items())
    console.print(
        f"Milliseconds per matrix product: {shown}. The demo runs in {best}, at "
        f"{rate:.0f} tokens per second. In four minutes it can run: {' and '.join(pace.rewards)}, "
        f"with {pace.max_response_tokens} tokens per response."
    )
    write_text(path, json.dumps(asdict(pace)))
    return pace


def fit_in_time(tokens_a_second: float, config: DemoConfig) -> tuple[Sequence[str], int, int]:
    """Rewards, samples of best-of-N's pool and tokens per response that fit in four minutes.

    Fewer prompts would save little: batches would be smaller, with the same number of steps.
    """
    tokens = (_SECONDS - _OTHER_SECONDS) * _FASTER * tokens_a_second
    most = config.pool_samples
    for rewards, samples in ((REWARDS, most), (REWARDS[:1], most), (REWARDS[:1], most * 2 // 3)):
        compared = len(rewards) * ((len(AGENTS) - 1) * _BUDGET + 1) + samples
        responses = config.train_prompts * config.samples + config.test_prompts * compared
        if (fit := int(tokens / responses) // 8 * 8) >= _SHORTEST:
            break
    return rewards, samples, min(max(fit, _SHORTEST), _LONGEST)


def load(dtype: str) -> LanguageModel:
    """Load the embedded language model in this number format."""
    # Leave memory to other programs on a laptop; more makes the demo hardly faster.
    return embedded(kv_bytes=768 << 20, dtype=dtype)


def _product_seconds(dtype: str) -> float:
    """Seconds of the faster of two products in this format."""
    rows, inputs, outputs = _PRODUCT
    layer, x = torch.nn.Linear(inputs, outputs, bias=False), torch.ones(rows, inputs)
    best = math.inf
    with torch.inference_mode():
        if dtype != "int8":
            layer = layer.to(getattr(torch, dtype))
        product = make_product([layer], getattr(torch, dtype))
        for _ in range(2):
            began = time.perf_counter()
            product(x)
            best = min(best, time.perf_counter() - began)
    return best


def _rate(language_model: LanguageModel) -> float:
    """Tokens per second, the better of two runs."""
    [prompt] = load_prompts(split="validation", limit=1)
    state, rates = initial(prompt, language_model), []
    for seed in range(2):
        language_model.clear_cache()
        began = time.perf_counter()
        [row] = language_model.sample([state], *_TIMED, seeds=[seed])
        rates.append(sum(map(len, row)) / (time.perf_counter() - began))
    return max(rates)


def run_demo(
    language_model: LanguageModel,
    out: Path,
    console: Console,
    config: DemoConfig,
    pace: Pace,
) -> dict[str, dict[str, Any]]:
    """Run or resume the demo and print it; returns each reward's summary.

    `pace` applies if `config` gives no response length; if it gives one, both rewards are compared.
    """
    if any(out.glob("records-*")):
        console.print(f"Resuming in {out}: finished steps are not run again.")
    rewards: Sequence[str] = REWARDS
    longest = config.max_response_tokens
    if longest is None:
        rewards, longest = pace.rewards, pace.max_response_tokens
        config = replace(config, pool_samples=pace.pool_samples)
    budget = config.budget_tokens or round(_BUDGET * longest)
    demo = _Demo(language_model, out, console, config, rewards, longest, budget)
    [first] = load_prompts(split="validation", limit=1)
    agent = Sampling(language_model, max_response_tokens=32)
    [generation] = agent.generate([first], seed=config.seed)
    text = f"{generation.text.strip()} ..."
    console.print(panel(text, first.text, f"written by {language_model.name}"))
    demo.collect()
    summaries = {name: demo.compared(name) for name in rewards}
    for name, summary in summaries.items():
        rows = demo.rows(name)
        first_id = rows[0]["prompt_id"]
        console.print(report.side_by_side([row for row in rows if row["prompt_id"] == first_id]))
        console.print(report.table(summary))
        console.print(matched.table(summary["multipliers"]))
    console.print(f"Records, value models, rows and summaries: {out.resolve()}")
    for name in rewards:
        console.print(f"Report: {demo.place(name).resolve() / compare.REPORT}")
    return summaries


def collect_with_progress(
    models: tuple[LanguageModel, RewardModel],
    prompts: Sequence[Prompt],
    folder: Path,
    console: Console,
    *,
    samples: int,
    **options: Any,
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Run `collect` with these options and a progress bar.

    Returns the samples of each prompt that were missing, and the errors of prompts that failed.
    """
    with progress_bar(console) as bar, RecordWriter(folder) as writer:
        missing = missing_samples(writer.existing(), prompts, samples)
        task = bar.add_task("Collecting", total=sum(map(len, missing.values())))

        def on_batch(records: Sequence[Any]) -> None:
            bar.advance(task, len(records))

        options |= {"samples_per_prompt": samples, "on_batch": on_batch}
        return missing, collect(*models, prompts, writer, **options)


def fitted_on(value: FittedValue) -> str:
    """Describe the fit and quality of a value model in one sentence."""
    found = value.report_
    return (
        f"fitted on {found.num_records} responses to {found.num_prompts} prompts; on held-out "
        f"prompts its correlation with the score is {found.correlation:.2f}, and within a prompt "
        f"{found.within_prompt:.2f}."
    )


@dataclass(frozen=True)
class _Demo:
    language_model: LanguageModel
    out: Path
    console: Console
    config: DemoConfig
    rewards: Sequence[str]
    max_response_tokens: int
    budget_tokens: int

    def collect(self) -> None:
        """Sample once; all rewards score the same responses."""
        config = self.config
        first, *others = self.rewards
        reward, every = make(first), load_prompts(split="train")
        prompts = choose_prompts(every, config.train_prompts, reward, config.seed)
        source = self.out / f"records-{first}"
        collect_with_progress(
            (self.language_model, reward),
            prompts,
            source,
            self.console,
            samples=config.samples,
            max_response_tokens=self.max_response_tokens,
            seed=config.seed,
        )
        for name in others:
            target = self.out / f"records-{name}"
            if not has_records(target, expected=len(read_records(source))):
                shutil.rmtree(target, ignore_errors=True)
                rescore(source, make(name), target)

    def place(self, name: str) -> Path:
        """The folder of a reward's comparison."""
        return self.out / f"compare-{name}"

    def rows(self, name: str) -> list[compare.Row]:
        return compare.read_rows(self.place(name) / compare.RESULTS)

    def compared(self, name: str) -> dict[str, Any]:
        """Compare agents on a reward; returns the summary, with multipliers."""
        config, reward = self.config, make(name)
        comparison = compare.Comparison(
            CompareConfig(
                AGENTS,
                budget_tokens=self.budget_tokens,
                max_response_tokens=self.max_response_tokens,
                seed=config.seed,
            ),
            choose_prompts(load_prompts(split="test"), config.test_prompts, reward, config.seed),
            self.language_model,
            reward,
            {
                "embedding": self._fit(name),
                "prefix": make_value("prefix", self.language_model, reward),
            },
        )
        summary = compare.compare_with_progress(comparison, self.place(name), self.console)
        return {**summary, "multipliers": self._multipliers(comparison, name)}

    def _fit(self, name: str) -> EmbeddingValue:
        value = EmbeddingValue(self.language_model).fit(read_records(self.out / f"records-{name}"))
        value.save(self.out / f"value-{name}")
        self.console.print(f"Value model for {name!r}: {fitted_on(value)}")
        return value

    def _multipliers(self, comparison: compare.Comparison, name: str) -> list[dict[str, Any]]:
        """The compute that best-of-N needs to match each agent, from a shared pool."""
        config = self.config
        with progress_bar(self.console) as bar:
            total = len(comparison.prompts) * config.pool_samples
            task = bar.add_task("Sampling the pool of best-of-N", total=total)
            records = fill_pool(
                self.out / "pool",
                self.language_model,
                comparison.prompts,
                samples=config.pool_samples,
                max_response_tokens=self.max_response_tokens,
                # Agents must not be compared with their own samples.
                seed=config.seed + 1,
                on_batch=lambda count: bar.advance(task, count),
            )
        models = self.language_model, comparison.reward_model
        scores = self.out / f"pool-scores-{name}"
        pool = matched.pool_of(records, scores, *models, comparison.prompts)
        rows, budget = self.rows(name), self.budget_tokens
        cells = [
            matched.Cell(name, agent, budget, "tokens", [r for r in rows if r["agent"] == agent])
            for agent in AGENTS[1:]
        ]
        return matched.analyse(pool, cells)
