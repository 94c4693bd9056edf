"""What a world model of text buys, beside what needs none.

Dynamics are fitted on plain records. Of each test prompt three instructions that a program of
counts decides are drawn anew, several times over:

- `zero_labels`: how well the mean reward of imagined endings tells the responses to a prompt apart
  before they are finished, without a label and a reward call.
- `planning`: planners with it beside best-of-N and the reward of the prefix, at matched compute.
- `expensive`: choice chunk by chunk by a cheap value, where a reward call has a price; it is that
  part of the study `verifiable`.
- `cost`: what fitting and asking take.

What is done is kept in the folder, and a run that was killed goes on.

    python -m mbrl_text_env.benchmarks.studies.world_model --json world-model.json
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer

from mbrl_text_env.agents.values import make_value
from mbrl_text_env.benchmarks import options, scaling
from mbrl_text_env.benchmarks.audit.run import fill_pool
from mbrl_text_env.benchmarks.compare import Comparison, run
from mbrl_text_env.benchmarks.friendly import friendly
from mbrl_text_env.benchmarks.matched import (
    Cell,
    Pool,
    Row,
    analyse,
    best_of_n_rows,
    multiplier,
    pool_of,
)
from mbrl_text_env.benchmarks.report import png
from mbrl_text_env.benchmarks.statistics import Interval, percentile_tail
from mbrl_text_env.benchmarks.studies import harness, verifiable
from mbrl_text_env.benchmarks.studies.matched_compute import slug
from mbrl_text_env.fitting.report import root_mean_square
from mbrl_text_env.language_models.base import LanguageModel, stream
from mbrl_text_env.records import Record
from mbrl_text_env.rewards import ConstraintsReward, make
from mbrl_text_env.rewards.verifiable.constraints.checking import check_counts, count_behind
from mbrl_text_env.types import FloatArray, Prompt, TextState
from mbrl_text_env.world_model import Futures, IncrementDynamics, WorldModelValue

PARTS = ("zero_labels", "planning", "expensive", "cost")
KINDS = (
    *("min_words", "max_words", "min_sentences", "max_sentences", "num_sentences"),
    *("min_paragraphs", "max_paragraphs", "num_paragraphs", "num_bullets", "no_commas"),
    *("min_letter_count", "max_letter_count", "min_capital_words", "max_capital_words"),
)
"""Of the constraints that are drawn, three to a prompt."""
CHUNKWISE = "beam:chunk_tokens=16:value="
PLANNERS = (
    *(CHUNKWISE + name for name in ("nearest", "any", "prefix", "unrelated")),
    *("adaptive:value=nearest", "adaptive:value=prefix", "guarded"),
)
_HOW = harness.StudyOptions(json_file=Path("world-model.json"))
_RESAMPLES = 2000
# Of the records, what a constraint that is drawn is kept by.
_LEAST, _MOST = 0.1, 0.9
_ROUNDS = 20


@dataclass(frozen=True)
class Size:
    """How much is run.

    Args:
        train_prompts, train_samples: Records of the dynamics.
        prompts, samples: Test prompts, and responses to each in the pool of best-of-N.
        judged: Of these, responses whose prefixes are valued.
        sets: How often constraints are drawn anew.
        lengths: Tokens of the prefixes.
        budget: Of a planner, in generated tokens a prompt.
        relabelled: Sets of constraints that boosting is fitted on.
    """

    train_prompts: int = 465
    train_samples: int = 3
    prompts: int = 64
    samples: int = 32
    judged: int = 16
    sets: int = 3
    lengths: tuple[int, ...] = (32, 48, 64)
    budget: int = 384
    max_response_tokens: int = 96
    relabelled: int = 150


QUICK = Size(48, 2, 12, 8, 8, 1, relabelled=30)


class Instructions(ConstraintsReward):
    """Constraints that are searched as any reward is: the program does not guard the tokens."""

    is_verifier = False


class RateSoFar(IncrementDynamics):
    """Counts go on as they did so far, up to the lengths of the donors."""

    def futures(
        self,
        states: Sequence[TextState],
        num_futures: int,
        horizon: int | None = None,
        seed: int = 0,
    ) -> Futures:
        """The counts of the state, as many times as the response grows."""
        found = super().futures(states, num_futures, horizon, seed)
        sizes = [max(1, len(state.response_ids)) for state in states]
        growth = found.length / np.asarray(sizes)[:, None]
        return replace(found, features=self.varying(states)[:, None] * growth[..., None])


class Unrelated(IncrementDynamics):
    """Any record's increments, after counts that have nothing to do with the state."""

    def futures(
        self,
        states: Sequence[TextState],
        num_futures: int,
        horizon: int | None = None,
        seed: int = 0,
    ) -> Futures:
        """What permuted prefixes would become."""
        found = super().futures(states, num_futures, horizon, seed)
        others = np.empty((len(states), len(self.names)), np.float32)
        for i, state in enumerate(states):
            cut = self._cut(len(state.response_ids))
            donors = np.flatnonzero(self.lengths_ > cut * self.stride)
            others[i] = self.table_[stream(seed, state, 1).choice(donors), cut]
        features = found.features - self.varying(states)[:, None] + others[:, None]
        return replace(found, features=features)


DYNAMICS: Mapping[str, tuple[type[IncrementDynamics], dict[str, Any]]] = {
    "nearest": (IncrementDynamics, {}),
    "any": (IncrementDynamics, {"neighbours": None}),
    "rate": (RateSoFar, {"neighbours": None}),
    "unrelated": (Unrelated, {"neighbours": None}),
}


@dataclass
class Relabelled:
    """Boosting on prefixes and constraints, each record relabelled with many of them."""

    names: tuple[str, ...]

    def fit(self, rows: FloatArray, ends: FloatArray, sets: Sequence[Any], seed: int) -> Relabelled:
        """Fit on rows float64[N, F], with what they became, each under its share of constraints."""
        from sklearn.ensemble import HistGradientBoostingClassifier

        rng, inputs, labels = np.random.default_rng(seed), [], []
        for constraint in (each for some in sets for each in some):
            chosen = rng.choice(len(rows), max(1, len(rows) // 9), replace=False)
            inputs.append(self._inputs(rows[chosen], constraint))
            labels.append(check_counts(constraint, self._named(ends[chosen])))
        self.calls = sum(map(len, labels))
        self.head = HistGradientBoostingClassifier(random_state=seed)
        self.head.fit(np.vstack(inputs), np.concatenate(labels))
        return self

    def predict(self, rows: FloatArray, constraints: Sequence[Any]) -> FloatArray:
        """The mean probability of the constraints, float64[N]."""
        found = [self.head.predict_proba(self._inputs(rows, each))[:, 1] for each in constraints]
        return np.asarray(np.mean(found, axis=0))

    def _named(self, rows: FloatArray) -> dict[str, FloatArray]:
        return dict(zip(self.names, rows.T, strict=True))

    def _inputs(self, rows: FloatArray, constraint: Mapping[str, Any]) -> FloatArray:
        now = self._named(rows)[count_behind(constraint)[0]]
        value = np.full(len(rows), float(constraint.get("value", 0)))
        sort = np.full(len(rows), ("min", "max", "num", "no").index(_sort(constraint)))
        return np.column_stack([sort, value, now, value - now, rows])


def _sort(constraint: Mapping[str, Any]) -> str:
    return str(constraint["type"]).partition("_")[0]


@dataclass(frozen=True)
class Work:
    """What the parts share."""

    size: Size
    language_model: LanguageModel
    out: Path
    seed: int

    @cached_property
    def train(self) -> list[Record]:
        """The records of the dynamics; their scores are not looked at."""
        prompts = self.prompts("train", self.size.train_prompts)
        return [r for row in self._records("train", prompts, self.size.train_samples) for r in row]

    @cached_property
    def pool(self) -> list[list[Record]]:
        """The pool of the test prompts."""
        return self._records("pool", self.prompts("test", self.size.prompts), self.size.samples)

    @cached_property
    def dynamics(self) -> dict[str, IncrementDynamics]:
        """By name, all fitted on the same records."""
        return {
            name: kind(self.language_model, **settings).fit(self.train)
            for name, (kind, settings) in DYNAMICS.items()
        }

    @cached_property
    def sets(self) -> list[list[Prompt]]:
        """The test prompts with constraints, as often as they are drawn."""
        prompts = self.prompts("test", self.size.prompts)
        return [
            [replace(p, metadata={"constraints": self.drawn(number, p.id)}) for p in prompts]
            for number in range(self.size.sets)
        ]

    def prompts(self, split: str, count: int) -> list[Prompt]:
        """Builtin prompts."""
        return harness.prompts_for(make("sentiment"), split, count)

    def drawn(self, number: int, name: str) -> list[dict[str, Any]]:
        """Three constraints of different kinds, each kept by some of the records and not by all."""
        ends = self.dynamics["any"]
        counts = dict(zip(ends.names, ends.table_[:, -1].T.astype(np.float64), strict=True))
        rng = np.random.default_rng([self.seed, number, *name.encode()])
        found: dict[str, dict[str, Any]] = {}
        for kind in np.tile(rng.permutation(KINDS), _ROUNDS).tolist():
            letter = {"letter": chr(rng.integers(97, 123))} if "letter" in kind else {}
            constraint = {"type": kind, **letter, "value": 1}
            if kind == "no_commas":
                del constraint["value"]
            [counted] = count_behind(constraint)
            share = rng.uniform(0.2, 0.8)
            if counted not in counts or kind in found:
                continue
            if kind != "no_commas":
                constraint["value"] = max(1, round(float(np.quantile(counts[counted], share))))
            if _LEAST <= check_counts(constraint, counts).mean() <= _MOST:
                found[kind] = constraint
            if len(found) == 3:
                return list(found.values())
        raise harness.StudyError(
            f"Expected three constraints that some records keep and others do not, got {found}. "
            "Take more records."
        )

    def values(self, reward: ConstraintsReward) -> dict[str, Any]:
        """By name, for one reward: those of the dynamics, and the reward of the prefix."""
        worlds = {name: WorldModelValue(each, reward) for name, each in self.dynamics.items()}
        return {**worlds, "prefix": make_value("prefix", self.language_model, reward)}

    def _records(self, folder: str, prompts: Sequence[Prompt], samples: int) -> list[list[Record]]:
        return fill_pool(
            self.out / folder,
            self.language_model,
            prompts,
            samples=samples,
            max_response_tokens=self.size.max_response_tokens,
            shared=True,
            seed=self.seed,
        )


def zero_labels(work: Work) -> list[Row]:
    """One row a length: correlation within prompts with the final reward, and the baselines'."""
    boosted = _boosted(work)
    return [_at_length(work, length, boosted) for length in work.size.lengths]


def _boosted(work: Work) -> Relabelled:
    known = work.dynamics["any"]
    cuts = [length // known.stride for length in work.size.lengths]
    on = [known.lengths_ > cut * known.stride for cut in cuts]
    rows = np.vstack([known.table_[some, cut] for some, cut in zip(on, cuts, strict=True)])
    ends = np.vstack([known.table_[some, -1] for some in on])
    sets = [work.drawn(number, "relabelled") for number in range(work.size.relabelled)]
    return Relabelled(known.names).fit(rows.astype(float), ends.astype(float), sets, work.seed)


def _at_length(work: Work, length: int, boosted: Relabelled) -> Row:
    reward, known = Instructions(), work.dynamics["any"]
    found: dict[str, list[FloatArray]] = {}
    final, stds, cells = [], [], []
    for number, prompts in enumerate(work.sets):
        values = work.values(reward)
        del values["unrelated"]
        for place, (prompt, row) in enumerate(zip(prompts, work.pool, strict=True)):
            going = [r for r in row[: work.size.judged] if len(r.response_ids) > length]
            states = [replace(r.prefix_state(length), prompt=prompt) for r in going]
            if len(states) < 2:
                continue
            for name, value in values.items():
                estimate = value.predict(states)
                found.setdefault(name, []).append(estimate.mean)
                if name == "nearest":
                    stds.append(estimate.std)
            constraints: Any = prompt.metadata["constraints"]
            told = boosted.predict(known.varying(states).astype(float), constraints)
            found.setdefault("boosting", []).append(told)
            final.append(reward.score([prompt] * len(going), [r.response for r in going]))
            cells += [(place, number)] * len(going)
    table = {name: np.concatenate(parts) for name, parts in found.items()}
    draws = correlations(table, np.concatenate(final), cells, work.seed)
    own = draws.pop("nearest")
    errors = np.concatenate(final) - table["nearest"]
    return {
        "length": length,
        "prefixes": len(errors),
        **_told("correlation", own),
        "z": root_mean_square(errors) / root_mean_square(np.concatenate(stds)),
        "relabelled_calls": boosted.calls,
        "baselines": {
            name: {**_told("correlation", other), **_told("difference", own - other, "difference_")}
            for name, other in draws.items()
        },
    }


def correlations(
    predicted: Mapping[str, FloatArray],
    final: FloatArray,
    cells: Sequence[tuple[int, int]],
    seed: int,
) -> dict[str, FloatArray]:
    """Correlations within (prompt, set) cells: of all, then of resamples of prompts, in one array.

    The resamples of all predictions are the same, so that differences are paired. The first ends of
    an interval are those of `percentile_tail`; see `_told`.
    """
    _, cell = np.unique(cells, axis=0, return_inverse=True)
    _, prompt = np.unique([place for place, _ in cells], return_inverse=True)
    cell, count = cell.reshape(-1), int(prompt.max()) + 1
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    weights = np.vstack([np.ones(count), weights])

    def centred(values: FloatArray) -> FloatArray:
        return np.asarray(values - (np.bincount(cell, values) / np.bincount(cell))[cell])

    def summed(values: FloatArray) -> FloatArray:
        return np.asarray(weights @ np.bincount(prompt, values))

    y = centred(final)
    return {
        name: summed(x * y) / np.sqrt(np.maximum(summed(x * x) * summed(y * y), 1e-300))
        for name, x in ((name, centred(values)) for name, values in predicted.items())
    }


def _told(name: str, draws: FloatArray, prefix: str = "", prompts: int = 64) -> Row:
    """The estimate, which comes first, and the ends of its interval."""
    tail = percentile_tail(prompts, 0.95)
    low, high = np.quantile(draws[1:], [tail, 1 - tail]).tolist()
    return {name: float(draws[0]), f"{prefix}low": low, f"{prefix}high": high}


def planning(work: Work) -> dict[str, Any]:
    """Rows of `analyse` for each set, and over all of them by prompt, with best-of-N's own."""
    size, together = work.size, []
    results: list[Row] = []
    baseline: list[Row] = []
    for number, prompts in enumerate(work.sets):
        name, scores = f"set-{number}", work.out / "scores" / f"set-{number}"
        pool = pool_of(work.pool, scores, work.language_model, Instructions(), prompts)
        cells = [_cell(work, spec, number, prompts) for spec in PLANNERS]
        results += analyse(pool, cells)
        baseline += best_of_n_rows(name, pool, (size.budget,), "tokens")
        together.append((pool, cells))
    results += [_together(together, place) for place in range(len(PLANNERS))]
    pairs = [
        (PLANNERS[0], other) for other in PLANNERS if other not in (PLANNERS[0], PLANNERS[4])
    ] + [(PLANNERS[4], other) for other in (PLANNERS[0], PLANNERS[5], PLANNERS[6])]
    differences = {
        f"{one} - {other}": harness.paired(*_scores(together, other, one), work.seed)
        for one, other in pairs
    }
    return {"results": results, "best_of_n": baseline, "differences": differences}


def _cell(work: Work, spec: str, number: int, prompts: Sequence[Prompt]) -> Cell:
    """An agent's answers; `guarded` alone has the reward as a verifier."""
    reward = ConstraintsReward() if spec == "guarded" else Instructions()
    config = options.CompareConfig(
        (spec,),
        budget_tokens=work.size.budget,
        max_response_tokens=work.size.max_response_tokens,
        seed=work.seed + 1 + number,
        batch_prompts=len(prompts),
    )
    values = None if spec == "guarded" else work.values(reward)
    options.console.print(f"set {number}: {spec}")
    comparison = Comparison(config, prompts, work.language_model, reward, values)
    rows = run(comparison, work.out / "runs" / f"set-{number}" / slug(spec))[spec]
    return Cell(f"set-{number}", spec, work.size.budget, "tokens", rows)


def _together(sets: Sequence[tuple[Pool, Sequence[Cell]]], place: int) -> Row:
    """Multipliers over all sets; the unit is the prompt, with its mean over the sets."""
    cells = [cells[place] for _, cells in sets]

    def mean(name: str) -> FloatArray:
        return np.mean([[{**r["usage"], **r}[name] for r in c.rows] for c in cells], axis=0)

    row: Row = {"reward": "all", "agent": cells[0].agent, "mean": float(mean("score").mean())}
    for name, unit, costs in (
        ("multiplier", "in_flops", "flops"),
        ("multiplier_tokens", "in_tokens", "generated_tokens"),
    ):
        pools = [getattr(pool, unit) for pool, _ in sets]
        joined: Any = SimpleNamespace(
            shape=pools[0].shape,
            ns=pools[0].ns,
            curves=np.mean([pool.curves for pool in pools], axis=0),
            cost_curves=np.mean([pool.cost_curves for pool in pools], axis=0),
        )
        found = scaling.compute_multiplier(mean("score"), mean(costs), joined)
        told = found.as_dict()
        parts = ("low", "high", "is_lower_bound", "is_upper_bound")
        row |= {name: found.estimate, **{f"{name}_{part}": told[part] for part in parts}}
        row[costs] = float(mean(costs).mean())
    return row


def _scores(
    sets: Sequence[tuple[Pool, Sequence[Cell]]], *specs: str
) -> tuple[list[float], list[float], list[str]]:
    """Scores of two agents, and their prompts, in the same order."""
    rows = [[r for _, cells in sets for c in cells if c.agent == s for r in c.rows] for s in specs]
    one, two = ([row["score"] for row in some] for some in rows)
    return one, two, [row["prompt_id"] for row in rows[0]]


def cost(work: Work) -> Row:
    """Seconds of one core that fitting takes, and milliseconds that a state takes."""
    start = time.process_time()
    value = WorldModelValue(IncrementDynamics(work.language_model).fit(work.train), Instructions())
    fit = time.process_time() - start
    prompts = work.sets[0]
    rows = zip(prompts, work.pool, strict=True)
    states = [
        replace(r.prefix_state(min(48, len(r.response_ids) - 1)), prompt=p)
        for p, row in rows
        for r in row[:4]
    ]
    value.predict(states)
    start = time.process_time()
    value.predict(states)
    each = 1000 * (time.process_time() - start) / len(states)
    flops = value.dynamics.flops_bound(value.num_futures)
    return {"records": len(work.train), "fit_seconds": fit, "state_ms": each, "state_flops": flops}


def expensive(work: Work, quick: bool) -> list[Row]:
    """The rows of the study `verifiable` where a reward call has a price."""
    found = []
    for part in verifiable.parts(["expensive"], quick=quick):
        sized = replace(part, study=replace(part.study, seed=work.seed))
        for pool, cells, prefix in verifiable.run_part(sized, work.language_model, work.out):
            found += verifiable.result_rows(sized, pool, cells, prefix)[0]
    return found


def tables(result: Mapping[str, Any]) -> list[harness.Shown]:
    """What was found, for the terminal and a page."""
    found = []
    if rows := result.get("zero_labels"):
        names = list(rows[0]["baselines"])

        def cell(row: Row) -> str:
            return f"{Interval(row['correlation'], row['low'], row['high']):.3f}"

        lines = [
            [
                str(row["length"]),
                cell(row),
                *(cell(row["baselines"][name]) for name in names),
                f"{row['z']:.2f}",
            ]
            for row in rows
        ]
        title = "Correlation with the final reward within prompts, by tokens of the prefix"
        found.append(harness.Shown(title, ["tokens", "nearest", *names, "z"], lines))
    if plans := result.get("planning"):
        rows = [row for row in plans["results"] if row["reward"] == "all"]
        keys = ("multiplier", "multiplier_tokens")
        lines = [
            [row["agent"], f"{row['mean']:.3f}", *(multiplier(row, key) for key in keys)]
            for row in rows
        ]
        columns = ["agent", "mean", "x FLOPs", "x tokens"]
        found.append(harness.Shown("How many times its compute best-of-N needs", columns, lines))
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """Correlations by length, with their intervals."""
    with png(path, figsize=(5.2, 4.0)) as figure:
        axes = figure.subplots()
        lengths = [row["length"] for row in rows]
        for name in ("nearest", *rows[0]["baselines"]):
            own = [row if name == "nearest" else row["baselines"][name] for row in rows]
            middle = np.array([each["correlation"] for each in own])
            ends = np.array([[each["low"], each["high"]] for each in own]).T
            axes.errorbar(lengths, middle, yerr=np.abs(ends - middle), capsize=2, label=name)
        axes.set_xlabel("tokens of the prefix")
        axes.set_ylabel("correlation with the final reward, within prompts")
        axes.legend(fontsize=7)


@friendly
def main(
    how: harness.StudyOptions = _HOW,
    parts: Annotated[str, typer.Option(help="Parts, with commas.")] = ",".join(PARTS),
    quick: Annotated[
        bool, typer.Option(help="12 prompts, one set of constraints, no expensive rewards.")
    ] = False,
) -> None:
    """Measure what imagined endings buy."""
    names = [name.strip() for name in parts.split(",") if not (quick and name == "expensive")]
    if unknown := sorted(set(names) - set(PARTS)):
        raise options.CompareError(f"parts: expected some of {list(PARTS)}, got {unknown}.")
    work = Work(
        QUICK if quick else Size(), how.load(), how.folder("world-model", quick=quick), how.seed
    )
    result: dict[str, Any] = {
        **harness.heading("world_model"),
        "language_model": work.language_model.name,
        "dtype": how.dtype,
        "seed": how.seed,
    }
    if "zero_labels" in names:
        result["zero_labels"] = zero_labels(work)
        plot(result["zero_labels"], work.out / "zero-labels.png")
        how.write(result)
    if "cost" in names:
        result["cost"] = cost(work)
    if "planning" in names:
        result["planning"] = planning(work)
        how.write(result)
    if "expensive" in names:
        result["expensive"] = expensive(work, quick)
    for shown in tables(result):
        options.console.print(shown.table())
    how.write(result)


if __name__ == "__main__":
    typer.run(main)
