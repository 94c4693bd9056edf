"""Run agents on the same prompts at the same budget with the same seed.

A comparison is a folder. The rows of a batch of prompts are written as a whole, so a run that was
killed goes on with the first batch that is missing and ends with the same rows. A part that is
damaged or lacks rows is made again. With more prompts, those that are missing are answered; with
fewer, the rows that are there are used.

A prompt whose answers the reward model cannot score costs that prompt alone: its row has the error
and no score, it is left out on both sides of every paired difference, and it is counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mbrl_text_env.agents.base import Agent, Generation
from mbrl_text_env.agents.registry import make, parse_spec
from mbrl_text_env.benchmarks.audit.trust import trust_warnings
from mbrl_text_env.benchmarks.statistics import mean_interval, win_rate
from mbrl_text_env.files import write_text
from mbrl_text_env.identity import identity
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.ledger import Budget
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import (
    RewardError,
    RewardModel,
    applies_to,
    isolate_failures,
    reward_name,
    score_responses,
)
from mbrl_text_env.runs import claimed, prompt_digests, writing
from mbrl_text_env.types import Prompt
from mbrl_text_env.values import ValueModel

BASELINE = "best-of-n"
_FORMAT = 2


class CompareError(ValueError):
    """A comparison that cannot be run as asked."""


@dataclass(frozen=True)
class CompareConfig:
    """What a comparison is; two runs with equal configs give equal rows, times aside.

    Args:
        agents: Agent specs (see `agents.registry.make`). `budget_tokens` may stand among the
            options of one, if unequal budgets are allowed.
        budget_tokens: Generated tokens that each agent may spend on a prompt; None for no cap.
        budget_flops: Floating-point operations of all models that it may spend; None for no cap.
        budget_seconds: Wall time after which it begins nothing new; None for no cap.
        max_response_tokens: Token limit of a response.
        seed: Of the prompts' choice and of all sampling.
        batch_prompts: Prompts that are answered together.
        allow_unequal_budgets: Whether agents may have budgets of their own.
    """

    agents: tuple[str, ...]
    budget_tokens: int | None = None
    max_response_tokens: int = 256
    seed: int = 0
    batch_prompts: int = 32
    allow_unequal_budgets: bool = False
    budget_flops: float | None = None
    budget_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.agents or len(set(self.agents)) != len(self.agents):
            raise CompareError(f"Expected one or more different agents, got {list(self.agents)}.")
        if self.batch_prompts < 1:
            raise CompareError(f"batch_prompts: expected at least 1, got {self.batch_prompts}.")
        budgets = {spec: self.budget_of(spec) for spec in self.agents}
        if len(set(budgets.values())) > 1 and not self.allow_unequal_budgets:
            raise CompareError(
                f"The budgets differ: {budgets} tokens. A comparison at unequal budgets says "
                "little; make them equal, or allow it (--allow-unequal-budgets)."
            )

    def budget_of(self, spec: str) -> int | None:
        """The token budget of an agent."""
        own = parse_spec(spec)[1].get("budget_tokens")
        return self.budget_tokens if own is None else int(own)

    def caps(self, spec: str) -> Budget:
        """All caps of an agent."""
        return Budget(self.budget_of(spec), self.budget_flops, seconds=self.budget_seconds)


@dataclass(frozen=True)
class Comparison:
    """The parts of a comparison.

    Args:
        config: What is compared and how.
        prompts: The prompts; the agents answer all of them. Texts stand for prompts.
        language_model: Shared by the agents that name no other policy.
        reward_model: Shared by the agents, and the judge of their answers; whatever
            `as_reward_model` takes.
        value_model: For agents that take one, or several by name (see `agents.registry.make`).
        gold_model: A trusted reward that no agent sees; it scores the answers too, where it applies
            and can, so that a reward that is being exploited shows.
        labels: What else belongs into the config file, such as the names given on the command line.
        policies: By the names that specs use (`policy=tuned`); see `agents.registry.make`.

    Raises:
        CompareError: Two prompts have the same id.
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
                "are paired by the prompt's id: leave out the repetitions, or rename them."
            )

    def agent(self, spec: str) -> Agent:
        """Make the agent of a spec."""
        name, options = parse_spec(spec)
        options.pop("budget_tokens", None)
        plain = ":".join([name, *(f"{key}={value}" for key, value in options.items())])
        return make(
            plain,
            self.language_model,
            self.reward_model,
            self.value_model,
            policies=self.policies,
            max_response_tokens=self.config.max_response_tokens,
        )

    def record(self) -> dict[str, Any]:
        """What the comparison is called by, for people; `depends_on` tells it from others."""
        policies = {name: model.name for name, model in self.policies.items()}
        return {
            "format": _FORMAT,
            **json.loads(json.dumps(asdict(self.config))),
            "language_model": self.language_model.name,
            "reward": reward_name(self.reward_model),
            "gold": None if self.gold_model is None else reward_name(self.gold_model),
            "prompts": [prompt.id for prompt in self.prompts],
            **self.labels,
            **({"policies": policies} if policies else {}),
        }

    def depends_on(self) -> dict[str, Any]:
        """The config file's content: whatever the rows depend on."""
        parts = ("language_model", "reward_model", "value_model", "gold_model", "policies")
        return {
            **self.record(),
            "prompts": prompt_digests(self.prompts),
            "models": {name: identity(getattr(self, name)) for name in parts},
        }


def choose_prompts(
    prompts: Sequence[Prompt], count: int, reward_model: RewardModel, seed: int
) -> list[Prompt]:
    """Choose `count` of the prompts that the reward model applies to, by a seeded shuffle.

    Raises:
        CompareError: There are fewer.
    """
    fitting = [prompt for prompt in prompts if applies_to(reward_model, prompt)]
    if not fitting:
        raise CompareError(
            f"Reward {reward_name(reward_model)!r} applies to none of {len(prompts)} prompts: they "
            "lack what it reads of a prompt's metadata. Give other prompts, or another reward."
        )
    if not 1 <= count <= len(fitting):
        raise CompareError(
            f"Expected 1 to {len(fitting)} prompts (as many as reward "
            f"{reward_name(reward_model)!r} applies to), got {count}."
        )
    order = np.random.default_rng(seed).permutation(len(fitting))
    return [fitting[i] for i in order[:count]]


def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    on_batch: Callable[[str, int, list[dict[str, Any]]], None] | None = None,
) -> dict[str, Any]:
    """Run or resume a comparison and write `results.jsonl`, `summary.json` and `comparison.png`.

    Args:
        comparison: What to run.
        out: The comparison's folder.
        on_batch: Called with spec, number of prompts and rows after each batch, for progress.

    Returns:
        The content of `summary.json`.

    Raises:
        CompareError: The folder holds another comparison, or an agent got no prompt scored.
        BudgetError: The budget allows no complete response.
    """
    from mbrl_text_env.benchmarks.report import plot

    folder = Path(out)
    rows = run(comparison, folder, on_batch=on_batch)
    flat = [row for own in rows.values() for row in own]
    with writing(folder, CompareError):
        _write_rows(folder / "results.jsonl", flat)
    record = comparison.record()
    gold = None if comparison.gold_model is None else [row.get("gold") for row in flat]
    summary = {
        **record,
        "agents": summarise(rows),
        "warnings": trust_warnings(flat, gold=gold, gold_name=str(record["gold"])),
    }
    with writing(folder, CompareError):
        write_text(folder / "summary.json", json.dumps(summary, indent=2))
        plot(summary, folder / "comparison.png")
    return summary


def run(
    comparison: Comparison,
    folder: Path,
    *,
    on_batch: Callable[[str, int, list[dict[str, Any]]], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run or resume a comparison and return its rows by agent; nothing is summarised.

    Args:
        comparison: What to run.
        folder: The comparison's folder.
        on_batch: As in `compare`.

    Raises:
        CompareError: The folder holds another comparison.
        BudgetError: The budget allows no complete response.
    """
    agents = {spec: comparison.agent(spec) for spec in comparison.config.agents}
    for spec, agent in agents.items():
        agent.check_budget(comparison.prompts, comparison.config.caps(spec))
    size = comparison.config.batch_prompts
    rows: dict[str, list[dict[str, Any]]] = {spec: [] for spec in agents}
    with claimed(folder, comparison.depends_on(), "comparison", CompareError, grows=("prompts",)):
        with writing(folder, CompareError):
            parts = _read_parts(folder / "parts")
        there = _by_key(row for part in parts.values() for row in part)
        for start in range(0, len(comparison.prompts), size):
            batch = comparison.prompts[start : start + size]
            for number, (spec, agent) in enumerate(agents.items()):
                missing = [prompt for prompt in batch if (spec, prompt.id) not in there]
                if missing:
                    made = _answer_all(comparison, spec, agent, missing)
                    name = f"{start:06d}-{number:02d}.jsonl"
                    # With other prompts the part may hold rows of another batch: they stay.
                    parts[name] = [*parts.get(name, []), *made]
                    with writing(folder, CompareError):
                        _write_rows(folder / "parts" / name, parts[name])
                    there.update(_by_key(made))
                done = [there[spec, prompt.id] for prompt in batch]
                rows[spec].extend(done)
                if on_batch is not None:
                    on_batch(spec, len(batch), done)
    return rows


def _read_parts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each part; lines that are damaged or cut off are left out."""
    parts = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
        parts[path.name] = [row for row in map(_row_of, lines) if row is not None]
    return parts


def _row_of(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    is_row = isinstance(row, dict) and {"agent", "prompt_id", "score"} <= set(row)
    return row if is_row else None


def _by_key(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["agent"], row["prompt_id"]): row for row in rows}


def summarise(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One entry an agent: mean score with its interval, paired with best-of-N, and what it cost.

    Raises:
        CompareError: All prompts of an agent have failed.
    """
    baseline = next((spec for spec in rows if parse_spec(spec)[0] == BASELINE), None)
    reference = None if baseline is None else _scored(rows[baseline])
    return [_entry(spec, agent_rows, reference) for spec, agent_rows in rows.items()]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _entry(
    spec: str, rows: list[dict[str, Any]], reference: dict[str, dict[str, Any]] | None
) -> dict[str, Any]:
    scored = _scored(rows)
    if not scored:
        raise CompareError(
            f"Agent {spec!r}: none of {len(rows)} prompts could be scored. The first error: "
            f"{rows[0]['error']}"
        )
    kept = list(scored.values())
    interval = mean_interval(_scores(kept))
    entry: dict[str, Any] = {
        "agent": spec,
        "prompts": len(kept),
        "failed": len(rows) - len(kept),
        "mean": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "parts": {
            name: float(np.mean([row["parts"][name] for row in kept])) for name in kept[0]["parts"]
        },
    }
    golds = [row["gold"] for row in kept if row.get("gold") is not None]
    if golds:
        entry["gold"] = float(np.mean(golds))
    if reference is not None:
        entry["vs_best_of_n"] = _paired(scored, reference)
    for key in ("generated_tokens", "prompt_tokens", "reward_calls", "value_calls", "flops"):
        entry[key] = float(np.mean([row["usage"][key] for row in kept]))
    entry["seconds"] = float(np.mean([row["seconds"] for row in kept]))
    return entry


def _paired(
    scored: dict[str, dict[str, Any]], reference: dict[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """The difference to the reference over the prompts that both have a score for."""
    both = [prompt_id for prompt_id in scored if prompt_id in reference]
    if not both:
        return None
    own, other = (_scores([rows[name] for name in both]) for rows in (scored, reference))
    paired, wins = mean_interval(own - other), win_rate(own, other)
    return {
        "prompts": len(both),
        "difference": paired.estimate,
        "low": paired.low,
        "high": paired.high,
        "wins": wins.wins,
        "ties": wins.ties,
        "losses": wins.losses,
        "win_rate": wins.rate,
    }


def _scored(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows that have a score, by prompt."""
    return {row["prompt_id"]: row for row in rows if row["score"] is not None}


def _scores(rows: list[dict[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray([row["score"] for row in rows], dtype=np.float64)


def _answer_all(
    comparison: Comparison, spec: str, agent: Agent, prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """Rows of a batch; prompts whose answers cannot be scored have an error in theirs."""
    results = isolate_failures(lambda some: _answer(comparison, spec, agent, some), list(prompts))
    return [
        _failed_row(comparison, spec, prompt, result) if isinstance(result, RewardError) else result
        for prompt, result in zip(prompts, results, strict=True)
    ]


def _answer(
    comparison: Comparison, spec: str, agent: Agent, prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    config = comparison.config
    budget = config.caps(spec)
    # No agent lives on prefixes that another one computed, and a run that is resumed computes what
    # it would have computed at once.
    clear_cache = getattr(agent.language_model, "clear_cache", None)
    if clear_cache is not None:
        clear_cache()
    generations = agent.generate(prompts, budget, seed=config.seed)
    # Agents that asked for no score are judged here. That is the comparison's work, not theirs.
    scores = score_responses(
        comparison.reward_model,
        [generation.prompt for generation in generations],
        [generation.text for generation in generations],
    )
    rows = [
        _row(spec, generation, float(scores.total[i]), scores.parts_of(i), budget)
        for i, generation in enumerate(generations)
    ]
    if comparison.gold_model is not None:
        for row, gold in zip(rows, _gold_scores(comparison.gold_model, generations), strict=True):
            row["gold"] = gold
    return rows


def _gold_scores(gold: RewardModel, generations: Sequence[Generation]) -> list[float | None]:
    """The gold score of each answer; None where it does not apply or fails."""
    places = [i for i, g in enumerate(generations) if applies_to(gold, g.prompt)]
    results = isolate_failures(
        lambda some: score_responses(
            gold,
            [generations[i].prompt for i in some],
            [generations[i].text for i in some],
        ).total.tolist(),
        places,
    )
    scores: list[float | None] = [None] * len(generations)
    for i, result in zip(places, results, strict=True):
        scores[i] = None if isinstance(result, RewardError) else result
    return scores


def _row(
    spec: str, generation: Generation, score: float, parts: dict[str, float], budget: Budget
) -> dict[str, Any]:
    usage = generation.usage.as_dict()
    seconds = usage.pop("seconds")
    state = generation.completion.state
    return {
        "prompt_id": generation.prompt.id,
        "agent": spec,
        "seed": generation.seed,
        "score": score,
        "parts": parts,
        "prompt": generation.prompt.text,
        "response": generation.text,
        "response_tokens": len(state.response_ids),
        "finish_reason": state.finish_reason,
        "logprob": sum(generation.completion.logprobs) if generation.completion.logprobs else None,
        "budget_tokens": budget.tokens,
        "budget_flops": budget.flops,
        "budget_seconds": budget.seconds,
        "usage": usage,
        "seconds": seconds,
    }


def _failed_row(
    comparison: Comparison, spec: str, prompt: Prompt, error: RewardError
) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "agent": spec,
        "seed": comparison.config.seed,
        "score": None,
        "error": str(error),
        "prompt": prompt.text,
        "budget_tokens": comparison.config.budget_of(spec),
    }


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))
