"""Run agents on the same prompts at the same budget with the same seed.

A comparison is a folder. The rows of a batch of prompts are written as a whole, so a run that was
killed goes on with what is missing or damaged and ends with the same rows. More prompts are added
to those that are there; fewer are read.

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
from mbrl_text_env.benchmarks.audit.exploit_warnings import trust_warnings
from mbrl_text_env.benchmarks.settings import CompareConfig, CompareError
from mbrl_text_env.benchmarks.statistics import mean_interval, win_rate
from mbrl_text_env.files import write_text
from mbrl_text_env.language_models.base import LanguageModel, clear_cache
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
from mbrl_text_env.runs import claimed, identity, prompt_digests, writing
from mbrl_text_env.types import Budget, FloatArray, Prompt
from mbrl_text_env.values import ValueModel

BASELINE = "best-of-n"
Row = dict[str, Any]
OnBatch = Callable[[str, int, list[Row]], None]
_FORMAT = 2
_MEANS = ("generated_tokens", "prompt_tokens", "reward_calls", "value_calls", "flops")


@dataclass(frozen=True)
class Comparison:
    """The parts of a comparison.

    Args:
        config: What is compared and how.
        prompts: The agents answer all of them. Texts stand for prompts.
        language_model: Shared by the agents that name no other policy.
        reward_model: Shared by the agents, and the judge of their answers; whatever
            `as_reward_model` takes.
        value_model: For agents that take one, or several by name (see `agents.registry.make`).
        gold_model: A trusted reward that no agent sees; it scores the answers too, where it applies
            and can, so that a reward that is being exploited shows.
        labels: What else belongs into the config file, such as names on the command line.
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
        items = [i for i in spec.split(":") if i.partition("=")[0].strip() != "budget_tokens"]
        return make(
            ":".join(items),
            self.language_model,
            self.reward_model,
            self.value_model,
            policies=self.policies,
            max_response_tokens=self.config.max_response_tokens,
        )

    def record(self) -> dict[str, Any]:
        """What was compared, for people."""
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
        """Whatever the rows depend on: the content of the config file."""
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
    comparison: Comparison, out: str | Path, *, on_batch: OnBatch | None = None
) -> dict[str, Any]:
    """Run or resume a comparison and write `results.jsonl`, `summary.json` and `comparison.png`.

    Returns the content of `summary.json`. `on_batch` is called with spec, number of prompts and
    rows after each batch.

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
    comparison: Comparison, folder: Path, *, on_batch: OnBatch | None = None
) -> dict[str, list[Row]]:
    """Run or resume a comparison and return its rows by agent; see `compare`."""
    config = comparison.config
    agents = {spec: comparison.agent(spec) for spec in config.agents}
    for spec, agent in agents.items():
        agent.check_budget(comparison.prompts, config.budgets[spec])
    size = config.batch_prompts
    rows: dict[str, list[Row]] = {spec: [] for spec in agents}
    with claimed(folder, comparison.depends_on(), "comparison", CompareError, grows=("prompts",)):
        with writing(folder, CompareError):
            parts = _read_parts(folder / "parts")
        there = _by_key(row for part in parts.values() for row in part)
        for start in range(0, len(comparison.prompts), size):
            batch = comparison.prompts[start : start + size]
            for number, (spec, agent) in enumerate(agents.items()):
                missing = [prompt for prompt in batch if (spec, prompt.id) not in there]
                if missing:
                    made = _answers(comparison, spec, agent, missing)
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


def _answers(
    comparison: Comparison, spec: str, agent: Agent, prompts: Sequence[Prompt]
) -> list[Row]:
    """Rows of a batch; prompts whose answers cannot be scored have an error in theirs."""

    def answer(some: Sequence[Prompt]) -> list[Row]:
        # No agent lives on prefixes that another one computed, and a run that is resumed computes
        # what it would have computed at once.
        clear_cache(agent.language_model)
        generations = agent.generate(some, budget, seed=comparison.config.seed)
        # Agents that asked for no score are judged here. That is the comparison's work, not theirs.
        scores = _scored(comparison.reward_model, generations)
        rows = [
            _row(spec, generation, float(scores.total[i]), scores.parts_of(i), budget)
            for i, generation in enumerate(generations)
        ]
        if comparison.gold_model is not None:
            golds = _gold_scores(comparison.gold_model, generations)
            rows = [{**row, "gold": gold} for row, gold in zip(rows, golds, strict=True)]
        return rows

    budget = comparison.config.budgets[spec]
    return [
        {
            "prompt_id": prompt.id,
            "agent": spec,
            "seed": comparison.config.seed,
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
    """The gold score of each answer; None where it does not apply or fails."""
    places = [i for i, g in enumerate(generations) if applies_to(gold, g.prompt)]
    results = isolate_failures(
        lambda some: _scored(gold, [generations[i] for i in some]).total.tolist(), places
    )
    scores: list[float | None] = [None] * len(generations)
    for i, result in zip(places, results, strict=True):
        scores[i] = None if isinstance(result, RewardError) else result
    return scores


def _row(
    spec: str, generation: Generation, score: float, parts: dict[str, float], budget: Budget
) -> Row:
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


def _read_parts(folder: Path) -> dict[str, list[Row]]:
    """The rows of each part; lines that are damaged or cut off are left out."""
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


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))


def summarise(rows: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """One entry an agent: mean score with its interval, paired with best-of-N, and what it cost.

    Raises:
        CompareError: All prompts of an agent have failed.
    """
    scored = {
        spec: {row["prompt_id"]: row for row in own if row["score"] is not None}
        for spec, own in rows.items()
    }
    baseline = next((spec for spec in rows if parse_spec(spec)[0] == BASELINE), None)
    for spec, own in rows.items():
        if not scored[spec]:
            raise CompareError(
                f"Agent {spec!r}: none of {len(own)} prompts could be scored. The first error: "
                f"{own[0]['error']}"
            )
    return [
        _entry(spec, len(rows[spec]), own, None if baseline is None else scored[baseline])
        for spec, own in scored.items()
    ]


def _entry(
    spec: str, asked: int, scored: dict[str, Row], reference: dict[str, Row] | None
) -> dict[str, Any]:
    kept = list(scored.values())
    interval = mean_interval(_scores(kept))
    entry: dict[str, Any] = {
        "agent": spec,
        "prompts": len(kept),
        "failed": asked - len(kept),
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
    means = {key: float(np.mean([row["usage"][key] for row in kept])) for key in _MEANS}
    return {**entry, **means, "seconds": float(np.mean([row["seconds"] for row in kept]))}


def _paired(scored: dict[str, Row], reference: dict[str, Row]) -> dict[str, Any] | None:
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


def _scores(rows: Sequence[Row]) -> FloatArray:
    return np.array([row["score"] for row in rows], dtype=np.float64)
