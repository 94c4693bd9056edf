"""Compare agents on the same prompts, budget and seed.

A comparison is a folder. Rows are written by batch of prompts. A resumed run computes what is
missing or damaged, and ends with the same rows. A run with more prompts adds them to the folder;
one with fewer reads them from it.

If an answer cannot be scored, only its prompt is lost: the row has the error and no score, the
prompt is left out on both sides of every paired difference, and it is counted.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mbrl_text_env.agents.base import Agent, Generation
from mbrl_text_env.agents.registry import make
from mbrl_text_env.benchmarks.audit.exploit_warnings import trust_warnings
from mbrl_text_env.benchmarks.options import CompareConfig, CompareError
from mbrl_text_env.benchmarks.page import (
    Page,
    provenance,
    read_json,
    reading,
    token_ends,
    write_page,
)
from mbrl_text_env.benchmarks.report import baseline_of, comparison_page
from mbrl_text_env.benchmarks.statistics import mean_interval, win_rate
from mbrl_text_env.benchmarks.terminal import progress_bar
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models.base import LanguageModel, Tokenizer
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardModel,
    Scores,
    applies_to,
    isolate_failures,
    reward_name,
    score_responses,
)
from mbrl_text_env.runs import Each, claimed, identity, in_turn, prompt_digests, writing
from mbrl_text_env.types import Prompt
from mbrl_text_env.values import ValueModel

Row = dict[str, Any]
OnBatch = Callable[[str, int, list[Row]], None]
RESULTS, SUMMARY, REPORT, PARTS = "results.jsonl", "summary.json", "report.html", "parts"
_ABOUT = "run.json"
_FORMAT = 2
# Minimum seconds between reports of a running comparison.
_REPORT_SECONDS = 15.0
_MEANS = ("generated_tokens", "prompt_tokens", "reward_calls", "value_calls", "flops")


@dataclass(frozen=True)
class Comparison:
    """The parts of a comparison.

    Agents use the language model, or one of `policies` if their spec names it. `prompts` can be
    strings; ids must be unique. `value_model` can be a mapping by name (see
    `agents.registry.make`). The `gold_model` also scores the answers that it applies to, to reveal
    reward exploitation; no agent sees it. `labels` are further entries of the config file.
    """

    config: CompareConfig
    prompts: Sequence[Prompt]
    language_model: LanguageModel
    reward_model: RewardModel
    value_model: ValueModel | Mapping[str, ValueModel] | None = None
    gold_model: RewardModel | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    policies: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward_model", as_reward_model(self.reward_model))
        if self.gold_model is not None:
            object.__setattr__(self, "gold_model", as_reward_model(self.gold_model))
        object.__setattr__(self, "prompts", as_prompts(self.prompts))
        ids = Counter(prompt.id for prompt in self.prompts)
        repeated = sorted(name for name, count in ids.items() if count > 1)
        if repeated:
            raise CompareError(
                f"Expected prompts with different ids, got {repeated[:5]} more than once. Answers "
                "are paired by prompt id: remove the duplicates, or rename them."
            )

    def agent(self, spec: str) -> Agent:
        """Make the agent of a spec."""
        return make(
            spec,
            self.language_model,
            self.reward_model,
            self.value_model,
            policies=self.policies,
            max_response_tokens=self.config.max_response_tokens,
        )

    def batches(self) -> dict[int, Sequence[Prompt]]:
        """The batches of the shard, by the index of their first prompt.

        The cost of an answer depends on its batch, so shards consist of whole batches.
        """
        size, (shard, shards) = self.config.batch_prompts, self.config.shard_of
        starts = range(0, len(self.prompts), size)
        if shards > len(starts):
            raise CompareError(
                f"shard: expected no more shards than batches, which are {len(starts)} (of "
                f"{size} prompts; {len(self.prompts)} in all), got {self.config.shard}. Use fewer "
                "shards, or lower --batch-prompts for all of them."
            )
        return {start: self.prompts[start : start + size] for start in starts[shard - 1 :: shards]}

    def record(self) -> dict[str, Any]:
        """A readable description of the comparison."""
        policies = {name: model.name for name, model in self.policies.items()}
        config = json.loads(json.dumps(asdict(self.config)))
        if self.config.shard is None:
            del config["shard"]
        return {
            "format": _FORMAT,
            **config,
            "language_model": self.language_model.name,
            "reward": reward_name(self.reward_model),
            "gold": None if self.gold_model is None else reward_name(self.gold_model),
            "prompts": [prompt.id for batch in self.batches().values() for prompt in batch],
            **self.labels,
            **({"policies": policies} if policies else {}),
        }

    def depends_on(self) -> dict[str, Any]:
        """The content of the config file: all that the rows depend on."""
        parts = ("language_model", "reward_model", "value_model", "gold_model", "policies")
        return {
            **self.record(),
            "prompts": prompt_digests(self.prompts),
            "models": {name: identity(getattr(self, name)) for name in parts},
        }


def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    on_batch: OnBatch | None = None,
    each: Each = in_turn,
) -> dict[str, Any]:
    """Run or resume a comparison and write `results.jsonl`, `summary.json` and `report.html`.

    Returns the content of `summary.json`. `on_batch` is called with spec, number of prompts and
    rows after each batch. The report is also written during the run. `each` runs the batches, for
    example on `RayWorkers`.

    Raises:
        CompareError: The folder holds another comparison, or an agent has no scored prompt.
        BudgetError: The budget is too small for a complete response.
    """
    folder = Path(out)
    record = comparison.record()
    so_far: dict[str, list[Row]] = {spec: [] for spec in comparison.config.agents}
    about, written = provenance(), time.monotonic()

    def on_rows(spec: str, count: int, made: list[Row]) -> None:
        nonlocal written
        so_far[spec].extend(made)
        is_late = spec == comparison.config.agents[-1] and all(so_far.values())
        if is_late and time.monotonic() - written > _REPORT_SECONDS:
            # An agent without a score yet is a `CompareError`: skip the report.
            with writing(folder, CompareError), suppress(CompareError):
                page = comparison_page(_summary(record, so_far), _flat(so_far), about)
                write_page(folder / REPORT, page)
            written = time.monotonic()
        if on_batch is not None:
            on_batch(spec, count, made)

    rows = run(comparison, folder, on_batch=on_rows, each=each)
    return write_results(folder, record, rows, about)


def write_results(
    folder: Path, record: Mapping[str, Any], rows: Mapping[str, list[Row]], about: dict[str, Any]
) -> dict[str, Any]:
    """Write the results and the report from the rows by agent, and return the summary."""
    flat = _flat(rows)
    with writing(folder, CompareError):
        write_rows(folder / RESULTS, flat)
        summary = _summary(record, rows)
        write_text(folder / SUMMARY, json.dumps(summary, indent=2))
        write_text(folder / _ABOUT, json.dumps(about, indent=2))
        write_page(folder / REPORT, comparison_page(summary, flat, about))
    return summary


def recorded_page(folder: Path) -> Page:
    """Make the page of a finished comparison, from its files.

    Raises:
        CompareError: A file is damaged.
    """
    with reading(folder):
        summary, about = read_json(folder / SUMMARY), read_json(folder / _ABOUT)
        return comparison_page(summary, read_rows(folder / RESULTS), about)


def _flat(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    return [row for own in rows.values() for row in own]


def _summary(record: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    flat = _flat(rows)
    gold = None if record["gold"] is None else [row.get("gold") for row in flat]
    return {
        **record,
        "agents": summarise(rows),
        "warnings": trust_warnings(flat, gold=gold, gold_name=str(record["gold"])),
    }


def compare_with_progress(
    comparison: Comparison, out: Path, console: Console, each: Each = in_turn
) -> dict[str, Any]:
    """Run `compare` with a progress bar."""
    total = len(comparison.config.agents) * sum(map(len, comparison.batches().values()))
    with progress_bar(console) as bar:
        task = bar.add_task("Comparing", total=total)

        def on_batch(spec: str, count: int, rows: list[Row]) -> None:
            bar.update(task, advance=count, description=f"Comparing ({spec})")

        return compare(comparison, out, on_batch=on_batch, each=each)


def run(
    comparison: Comparison,
    folder: Path,
    *,
    on_batch: OnBatch | None = None,
    each: Each = in_turn,
) -> dict[str, list[Row]]:
    """Run or resume a comparison and return its rows by agent; see `compare`."""
    config, batches = comparison.config, comparison.batches()
    agents = {spec: comparison.agent(spec) for spec in config.agents}
    for agent in agents.values():
        agent.check_budget(comparison.prompts, config.budget)
    with claimed(folder, comparison.depends_on(), "comparison", CompareError, grows=("prompts",)):
        with writing(folder, CompareError):
            parts = read_parts(folder / PARTS)
        there = _by_key(row for part in parts.values() for row in part)

        def tell(spec: str, batch: Sequence[Prompt]) -> None:
            if on_batch is not None:
                on_batch(spec, len(batch), [there[spec, prompt.id] for prompt in batch])

        places, jobs = [], []
        for start, batch in batches.items():
            for number, spec in enumerate(agents):
                missing = [prompt for prompt in batch if (spec, prompt.id) not in there]
                if missing:
                    places.append((f"{start:06d}-{number:02d}.jsonl", batch))
                    jobs.append((spec, missing))
                else:
                    tell(spec, batch)
        # Each job carries its own prompts.
        answer = partial(_answers, replace(comparison, prompts=()), agents)
        for job, made in each(answer, jobs):
            name, batch = places[job]
            # After a run with other prompts, the part can hold rows of another batch: keep them.
            parts[name] = [*parts.get(name, []), *made]
            with writing(folder, CompareError):
                write_rows(folder / PARTS / name, parts[name])
            there.update(_by_key(made))
            tell(jobs[job][0], batch)
    asked = [prompt.id for batch in batches.values() for prompt in batch]
    return {spec: [there[spec, name] for name in asked] for spec in agents}


def _answers(
    comparison: Comparison, agents: Mapping[str, Agent], job: tuple[str, Sequence[Prompt]]
) -> list[Row]:
    """Rows of a batch; the row of a prompt that cannot be scored has the error."""
    spec, prompts = job
    config, agent, budget = comparison.config, agents[spec], comparison.config.budget

    def answer(some: Sequence[Prompt]) -> list[Row]:
        # Agents must not use prefixes that another agent computed, and a resumed run must compute
        # the same as an uninterrupted one.
        agent.language_model.clear_cache()
        generations = agent.generate(some, budget, seed=config.seed)
        # Score the answers of agents that did not; this does not count as their usage.
        scores = _scored(comparison.reward_model, generations)
        rows = [
            {
                "prompt_id": generation.prompt.id,
                "agent": spec,
                "seed": generation.seed,
                "score": float(scores.total[i]),
                "parts": scores.parts_of(i),
                **_outcome(generation, agent.language_model),
                "budget_tokens": budget.tokens,
                "budget_flops": budget.flops,
                "budget_seconds": budget.seconds,
            }
            for i, generation in enumerate(generations)
        ]
        if comparison.gold_model is not None:
            golds = _gold_scores(comparison.gold_model, generations)
            rows = [{**row, "gold": gold} for row, gold in zip(rows, golds, strict=True)]
        return rows

    return [
        {
            "prompt_id": prompt.id,
            "agent": spec,
            "seed": config.seed,
            "score": None,
            "error": str(result),
            "prompt": prompt.text,
            "budget_tokens": budget.tokens,
        }
        if isinstance(result, RewardError)
        else result
        for prompt, result in zip(prompts, isolate_failures(answer, prompts), strict=True)
    ]


def _scored(reward_model: RewardModel, generations: Sequence[Generation]) -> Scores:
    return score_responses(
        reward_model, [g.prompt for g in generations], [g.text for g in generations]
    )


def _gold_scores(gold: RewardModel, generations: Sequence[Generation]) -> list[float | None]:
    """The gold score of each answer; None if the gold does not apply or fails."""
    places = [i for i, g in enumerate(generations) if applies_to(gold, g.prompt)]
    results = isolate_failures(
        lambda some: _scored(gold, [generations[i] for i in some]).total.tolist(), places
    )
    found = dict(zip(places, results, strict=True))
    scores = (found.get(i) for i in range(len(generations)))
    return [None if isinstance(score, RewardError) else score for score in scores]


def _outcome(generation: Generation, tokenizer: Tokenizer) -> Row:
    usage = generation.usage.as_dict()
    seconds = usage.pop("seconds")
    state, logprobs = generation.completion.state, generation.completion.logprobs
    return {
        "prompt": generation.prompt.text,
        "response": generation.text,
        "response_tokens": len(state.response_ids),
        "finish_reason": state.finish_reason,
        "logprob": sum(logprobs) if logprobs else None,
        "token_logprobs": [round(each, 3) for each in logprobs],
        "token_ends": token_ends(tokenizer.decode, state.response_ids) if logprobs else [],
        "usage": usage,
        "seconds": seconds,
    }


def read_parts(folder: Path) -> dict[str, list[Row]]:
    """Read the rows of each part, without damaged or truncated lines."""
    parts = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
        parts[path.name] = [row for row in map(_whole_row, lines) if row is not None]
    return parts


def _whole_row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"agent", "prompt_id", "score"} <= set(row) else None


def _by_key(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    return {(row["agent"], row["prompt_id"]): row for row in rows}


def read_rows(path: Path) -> list[Row]:
    """Read JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def summarise(rows: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Summarise each agent: mean score with its interval, difference from best-of-N, and cost.

    Raises:
        CompareError: No prompt of an agent could be scored.
    """
    scored = {
        spec: {row["prompt_id"]: row for row in own if row["score"] is not None}
        for spec, own in rows.items()
    }
    for spec, own in rows.items():
        if not scored[spec]:
            raise CompareError(
                f"Agent {spec!r}: none of {len(own)} prompts could be scored. The first error: "
                f"{own[0]['error']}"
            )
    baseline = baseline_of(rows)
    entries = []
    for spec, by_prompt in scored.items():
        kept = list(by_prompt.values())
        entry: dict[str, Any] = {
            "agent": spec,
            "prompts": len(kept),
            "failed": len(rows[spec]) - len(kept),
            **mean_interval([row["score"] for row in kept]).as_mean(),
            "parts": {name: _mean(row["parts"][name] for row in kept) for name in kept[0]["parts"]},
        }
        golds = [row["gold"] for row in kept if row.get("gold") is not None]
        if golds:
            entry["gold"] = _mean(golds)
        if baseline is not None:
            entry["vs_best_of_n"] = _paired(by_prompt, scored[baseline])
        means = {key: _mean(row["usage"][key] for row in kept) for key in _MEANS}
        entries.append({**entry, **means, "seconds": _mean(row["seconds"] for row in kept)})
    return entries


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _paired(scored: dict[str, Row], reference: dict[str, Row]) -> dict[str, Any] | None:
    """The difference from the reference over the prompts that both have a score for."""
    both = [prompt_id for prompt_id in scored if prompt_id in reference]
    if not both:
        return None
    own, other = (np.array([of[name]["score"] for name in both]) for of in (scored, reference))
    paired, wins = mean_interval(own - other), win_rate(own, other)
    return {
        "prompts": len(both),
        "difference": paired.estimate,
        "low": paired.low,
        "high": paired.high,
        **asdict(wins),
        "win_rate": wins.rate,
    }
