"""What a world model of text buys, beside what needs none.

Dynamics are fitted on plain records. Of each test prompt three instructions that a program of
counts decides are drawn anew, several times over:

- `zero_labels`: how well the mean reward of imagined endings tells the responses to a prompt apart
  before they are finished, without a label and a reward call.
- `planning`: planners with it beside best-of-N and the reward of the prefix, at matched compute.
- `label_ratio`: how many labels imagined endings are worth to a learned head.
- `expensive`: choice chunk by chunk by a cheap value, where a reward call has a price; it is that
  part of the study `verifiable`.
- `dyna`: GRPO on a learned head in place of most reward calls.
- `cost`: what fitting and asking take.

What is done is kept in the folder, and a run that was killed goes on.

    python -m mbrl_text_env.benchmarks.studies.world_model --json world-model.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import typer

from mbrl_text_env.agents.values import make_value
from mbrl_text_env.benchmarks import options, scaling
from mbrl_text_env.benchmarks.audit.run import fill_pool
from mbrl_text_env.benchmarks.compare import Comparison, run
from mbrl_text_env.benchmarks.friendly import friendly, option
from mbrl_text_env.benchmarks.matched import (
    Cell,
    Pool,
    Row,
    analyse,
    best_of_n_rows,
    pool_of,
    table,
)
from mbrl_text_env.benchmarks.statistics import percentile_tail
from mbrl_text_env.benchmarks.studies import harness, verifiable
from mbrl_text_env.benchmarks.studies.matched_compute import slug
from mbrl_text_env.benchmarks.studies.world_model_baselines import Relabelled, correlations, forest
from mbrl_text_env.benchmarks.studies.world_model_dyna import dyna
from mbrl_text_env.fitting.report import root_mean_square
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.records import Record
from mbrl_text_env.rewards import ConstraintsReward, make
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardLike, score_features, score_responses
from mbrl_text_env.rewards.verifiable.constraints.checking import check_counts, count_behind
from mbrl_text_env.types import FloatArray, Prompt, TextState
from mbrl_text_env.world_model import (
    EnsembleDynamics,
    Futures,
    IncrementDynamics,
    WorldModelValue,
    predict_futures,
)

PARTS = ("zero_labels", "planning", "label_ratio", "expensive", "dyna", "cost")
_LONG = ("expensive", "dyna")
KINDS = (
    *("min_words", "max_words", "min_sentences", "max_sentences", "num_sentences"),
    *("min_paragraphs", "max_paragraphs", "num_paragraphs", "num_bullets", "no_commas"),
    *("min_letter_count", "max_letter_count", "min_capital_words", "max_capital_words"),
)
"""Of the constraints that are drawn, three to a prompt."""
LABELLED: Mapping[str, RewardLike | str] = {
    "long words": lambda prompt, text: (
        sum(len(word) > 7 for word in text.split()) / len(text.split() or "-")
    ),
    "you": lambda prompt, text: float("you" in text.lower()),
    "sentiment": "sentiment",
    "relevance": "relevance",
}
"""Rewards of `label_ratio`: two of what is written, two of what it means."""
CHUNKWISE = "beam:chunk_tokens=16:value="
PLANNERS = (
    *(CHUNKWISE + name for name in ("nearest", "any", "prefix", "unrelated")),
    *("adaptive:value=nearest", "adaptive:value=prefix"),
    *("guarded", "particle-filter:guarded=1:value=nearest"),
)
_HOW = harness.StudyOptions(json_file=Path("world-model.json"))
_FUTURES = 64
# Shares of the records, between which a constraint that is drawn is kept.
_LEAST, _MOST = 0.1, 0.9
_ROUNDS = 20


@dataclass(frozen=True)
class Size:
    """How much is run.

    Dynamics are fitted on `train_samples` records of each train prompt. Of each test prompt the
    prefixes of `samples` responses, of so many tokens (`lengths`), are valued, and these are
    best-of-N's pool. Constraints are drawn in `sets`, and `relabelled` times for boosting;
    `budget` is a planner's, in generated tokens a prompt.
    """

    train_prompts: int = 465
    train_samples: int = 3
    prompts: int = 64
    samples: int = 16
    sets: int = 3
    relabelled: int = 150
    lengths: tuple[int, ...] = (32, 48, 64)
    budget: int = 384
    max_response_tokens: int = 96


QUICK = Size(32, 2, 8, 8, sets=1, relabelled=30, budget=288)


class Instructions(ConstraintsReward):
    """Constraints that are searched as any reward is: the program does not guard the tokens."""

    is_verifier = False


class RateSoFar(IncrementDynamics):
    """Counts go on as they did so far, up to the lengths of the donors."""

    def futures(self, states: Sequence[TextState], *asked: Any, **options: Any) -> Futures:
        """The counts of the state, as many times as the response grows."""
        found = super().futures(states, *asked, **options)
        sizes = [max(1, len(state.response_ids)) for state in states]
        growth = found.length / np.asarray(sizes)[:, None]
        return replace(found, features=self.varying(states)[:, None] * growth[..., None])


class Unrelated(IncrementDynamics):
    """Any record's increments, added to the counts of a random prefix instead of the state's."""

    def ahead(self, size: int, row: Any, *asked: Any) -> tuple[Any, Any, Any]:
        """Continue the prefix of a random record that has not ended at this length."""
        *_, rng = asked
        other = rng.choice(np.flatnonzero(self.lengths_ > size))
        return super().ahead(size, self.table_[other, size // self.stride], *asked)


INCREMENTS: Mapping[str, tuple[type[IncrementDynamics], dict[str, Any]]] = {
    "nearest": (IncrementDynamics, {}),
    "any": (IncrementDynamics, {"neighbours": None}),
    "rate": (RateSoFar, {"neighbours": None}),
    "unrelated": (Unrelated, {"neighbours": None}),
}


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
    def increments(self) -> dict[str, IncrementDynamics]:
        """By name, all of the same records, which are read once."""
        fitted, found = IncrementDynamics(self.language_model).fit(self.train), {}
        for name, (kind, settings) in INCREMENTS.items():
            made = found[name] = kind(self.language_model, **settings)
            made.constant_, made.language_model_name_ = fitted.constant_, self.language_model.name
            made.restore(fitted.arrays_)
        return found

    @cached_property
    def ensemble(self) -> EnsembleDynamics:
        """Fitted on the same records."""
        return EnsembleDynamics(self.language_model, seed=self.seed).fit(self.train)

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
        found = options.load_prompts_option("builtin", split)
        return options.choose_prompts(found, count, make("sentiment"), 0)

    def drawn(self, number: int, name: str) -> list[dict[str, Any]]:
        """Three constraints of different kinds, each kept by some of the records and not by all."""
        ends = self.increments["any"]
        counts = dict(zip(ends.names, ends.table_[:, -1].T.astype(np.float64), strict=True))
        rng = np.random.default_rng([self.seed, number, *name.encode()])
        found: dict[str, dict[str, Any]] = {}
        for kind in np.tile(rng.permutation(KINDS), _ROUNDS).tolist():
            constraint: dict[str, Any] = {"type": kind}
            if "letter" in kind:
                constraint["letter"] = chr(rng.integers(97, 123))
            share = rng.uniform(0.2, 0.8)
            [counted] = count_behind(
                {**constraint, "value": 1} if kind != "no_commas" else constraint
            )
            if counted not in counts or kind in found:
                continue
            if kind != "no_commas":
                constraint["value"] = max(1, round(float(np.quantile(counts[counted], share))))
            if _LEAST <= check_counts(constraint, counts).mean() <= _MOST:
                found[kind] = constraint
            if len(found) == 3:
                return list(found.values())
        raise options.CompareError(
            f"Expected three constraints that some records keep and others do not, got {found}. "
            "Take more records."
        )

    def values(self, reward: ConstraintsReward) -> dict[str, Any]:
        """By name, for one reward: those of the dynamics, and the reward of the prefix."""
        worlds = {name: WorldModelValue(each, reward) for name, each in self.increments.items()}
        return {**worlds, "prefix": make_value("prefix", self.language_model, reward)}

    def _records(self, folder: str, prompts: Sequence[Prompt], samples: int) -> list[list[Record]]:
        return fill_pool(
            self.out / folder,
            self.language_model,
            prompts,
            samples=samples,
            max_response_tokens=self.size.max_response_tokens,
            seed=self.seed,
        )


def zero_labels(work: Work) -> list[Row]:
    """One row a length: correlation within prompts with the final reward, and the baselines'."""
    boosted = _boosted(work)
    return [_at_length(work, length, boosted) for length in work.size.lengths]


def _boosted(work: Work) -> Relabelled:
    known = work.increments["any"]
    cuts = [length // known.stride for length in work.size.lengths]
    on = [known.lengths_ > cut * known.stride for cut in cuts]
    rows = np.vstack([known.table_[some, cut] for some, cut in zip(on, cuts, strict=True)])
    ends = np.vstack([known.table_[some, -1] for some in on])
    sets = [work.drawn(number, "relabelled") for number in range(work.size.relabelled)]
    return Relabelled(known.names).fit(rows.astype(float), ends.astype(float), sets, work.seed)


def _at_length(work: Work, length: int, boosted: Relabelled) -> Row:
    reward, known = Instructions(), work.increments["any"]
    prefix = make_value("prefix", work.language_model, reward)
    dynamics = {**work.increments, "ensemble": work.ensemble}
    del dynamics["unrelated"]
    found: dict[str, list[FloatArray]] = {}
    final, spread, cells = [], [], []
    for place, responses in enumerate(work.pool):
        going = [r for r in responses if len(r.response_ids) > length]
        if len(going) < 2:
            continue
        states = [record.prefix_state(length) for record in going]
        futures = {
            name: predict_futures(each, states, _FUTURES).features.astype(float)
            for name, each in dynamics.items()
        }
        rows = known.varying(states).astype(float)
        for number, prompts in enumerate(work.sets):
            prompt = prompts[place]
            scores = {
                name: _scored(reward, prompt, known.names, features)
                for name, features in futures.items()
            }
            told = {name: each.mean(axis=1) for name, each in scores.items()}
            told["prefix"] = prefix.predict([replace(s, prompt=prompt) for s in states]).mean
            constraints: Any = prompt.metadata["constraints"]
            told["boosting"] = boosted.predict(rows, constraints)
            for name, values in told.items():
                found.setdefault(name, []).append(values)
            spread.append(scores["nearest"].std(axis=1))
            final.append(reward.score([prompt] * len(going), [r.response for r in going]))
            cells += [(place, number)] * len(going)
    table = {name: np.concatenate(parts) for name, parts in found.items()}
    draws = correlations(table, np.concatenate(final), cells, work.seed)
    own, errors = draws.pop("nearest"), np.concatenate(final) - table["nearest"]
    return {
        "length": length,
        "prefixes": len(errors),
        **_told("correlation", own, work),
        "z": root_mean_square(errors) / root_mean_square(np.concatenate(spread)),
        "relabelled_calls": boosted.calls,
        "baselines": {
            name: {
                **_told("correlation", other, work),
                **_told("difference", own - other, work, "difference_"),
            }
            for name, other in draws.items()
        },
    }


def _scored(reward: Any, prompt: Prompt, names: Sequence[str], features: FloatArray) -> FloatArray:
    """float64[B, M], the scores of futures float64[B, M, F]."""
    columns = features.reshape(-1, len(names)).T
    scores = score_features(reward, prompt, dict(zip(names, columns, strict=True)))
    return scores.reshape(features.shape[:2])


def _told(name: str, draws: FloatArray, work: Work, prefix: str = "") -> Row:
    """The estimate, which comes first, and the ends of its interval."""
    tail = percentile_tail(work.size.prompts, 0.95)
    low, high = np.quantile(draws[1:], [tail, 1 - tail]).tolist()
    return {name: float(draws[0]), f"{prefix}low": low, f"{prefix}high": high}


def planning(work: Work, planners: Sequence[str]) -> dict[str, Any]:
    """Rows of `analyse` for each set, and over all of them by prompt, with best-of-N's own.

    Best-of-N does not stop at the first success, and neither do planners, but `guarded` does.
    Bounds and imagined endings are together in the particles under guard.
    """
    sets: list[tuple[Pool, list[Cell]]] = []
    for number, prompts in enumerate(work.sets):
        scores = work.out / "scores" / f"set-{number}"
        pool = pool_of(work.pool, scores, work.language_model, Instructions(), prompts)
        sets.append((pool, [_cell(work, spec, number, prompts) for spec in planners]))
    rows = [analyse(pool, cells) for pool, cells in sets]
    for some in rows:
        options.console.print(table(some))
    places = range(len(planners))
    told = [[row["score"] for _, cells in sets for row in cells[at].rows] for at in places]
    ids = [row["prompt_id"] for _, cells in sets for row in cells[0].rows]
    return {
        "results": [
            *chain.from_iterable(rows),
            *(_together(sets, place) for place in places),
        ],
        "best_of_n": [
            row
            for number, (pool, _) in enumerate(sets)
            for row in best_of_n_rows(f"set-{number}", pool, (work.size.budget,), "tokens")
        ],
        "differences": {
            f"{planners[one]} - {planners[two]}": harness.paired(
                told[two], told[one], ids, work.seed
            )
            for one, two in combinations(places, 2)
        },
    }


def _cell(work: Work, spec: str, number: int, prompts: Sequence[Prompt]) -> Cell:
    """An agent's answers; those that are guarded have the reward as a verifier."""
    reward = ConstraintsReward() if "guarded" in spec else Instructions()
    config = options.CompareConfig(
        (spec,),
        budget_tokens=work.size.budget,
        max_response_tokens=work.size.max_response_tokens,
        seed=work.seed + 1 + number,
        batch_prompts=len(prompts),
    )
    values = work.values(reward) if "value=" in spec else None
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
        curves, prices = (
            np.mean([getattr(pool, each) for pool in pools], axis=0)
            for each in ("curves", "cost_curves")
        )
        joined: Any = SimpleNamespace(
            shape=pools[0].shape, ns=pools[0].ns, curves=curves, cost_curves=prices
        )
        found = scaling.compute_multiplier(mean("score"), mean(costs), joined)
        row |= {**found.as_row(name), costs: float(mean(costs).mean())}
    return row


def label_ratio(work: Work) -> list[Row]:
    """How many labels a value on prefixes needs for what a head on imagined endings does with n.

    The rewards are of what the features do not count, known by n labelled responses alone.
    Both heads are the same forest. `high` is None where all labels are too few.
    """
    known, length = work.increments["nearest"], work.size.lengths[len(work.size.lengths) // 2]
    goes_on = known.lengths_ > length
    going = [
        (place, record)
        for place, row in enumerate(work.pool)
        for record in row
        if len(record.response_ids) > length
    ]
    states = [record.prefix_state(length) for _, record in going]
    futures = predict_futures(known, states, 16).features
    inputs, ends = known.table_[:, length // known.stride], known.table_[:, -1]
    most, found = len(work.train), []
    sizes = [*(n for n in (32, 64, 128, 256, 512, 1024) if n < most), most]
    order = np.random.default_rng(work.seed).permutation(most)
    for name, reward in LABELLED.items():
        labels = _labels(reward, work.train)
        told: dict[str, FloatArray] = {}
        for n in sizes:
            chosen, live = order[:n], order[:n][goes_on[order[:n]]]
            imagined = forest(ends[chosen], labels[chosen], futures.reshape(-1, len(known.names)))
            told[f"imagined {n}"] = imagined.reshape(futures.shape[:2]).mean(axis=1)
            told[f"direct {n}"] = forest(inputs[live], labels[live], known.varying(states))
        final = _labels(reward, [record for _, record in going])
        draws = correlations(told, final, [(place, 0) for place, _ in going], work.seed)
        curve = np.maximum.accumulate([draws[f"direct {n}"] for n in sizes])
        for n in sizes[:-1]:
            own = draws[f"imagined {n}"]
            needed = [
                np.interp(r, c, np.log(sizes), right=np.inf)
                for r, c in zip(own, curve.T, strict=True)
            ]
            row = _told("ratio", np.exp(np.minimum(needed, 99.0)) / n, work)
            row |= {"imagined": float(own[0]), "direct": float(draws[f"direct {n}"][0])}
            capped = {k: None if v > most else v for k, v in row.items() if k in ("ratio", "high")}
            found.append({"reward": name, "n": n, "length": length, **row, **capped})
    return found


def _labels(reward: RewardLike | str, records: Sequence[Record]) -> FloatArray:
    prompts, texts = zip(*((r.prompt(), r.response) for r in records), strict=True)
    model = make(reward) if isinstance(reward, str) else as_reward_model(reward)
    return score_responses(model, prompts, texts).total


def cost(work: Work) -> dict[str, Row]:
    """Seconds of one core that fitting takes, and milliseconds that the futures of a state take."""
    found, records = {}, work.train
    states = [r.prefix_state(len(r.response_ids) // 2) for row in work.pool for r in row[:2]]
    for kind in (IncrementDynamics, EnsembleDynamics):
        start = time.process_time()
        dynamics = kind(work.language_model).fit(records)
        fit = time.process_time() - start
        # Some of it is computed once.
        predict_futures(dynamics, states, _FUTURES)
        start = time.process_time()
        predict_futures(dynamics, states, _FUTURES)
        each = 1000 * (time.process_time() - start) / len(states)
        flops = dynamics.flops_bound(_FUTURES)
        found[dynamics.kind] = {"fit_seconds": fit, "state_ms": each, "state_flops": flops}
    return found


def expensive(work: Work, quick: bool) -> list[Row]:
    """The rows of the study `verifiable` where a reward call has a price."""
    found = []
    for study in verifiable.parts(["expensive"], quick=quick):
        sized = replace(study, seed=work.seed)
        for pool, cells, prefix in verifiable.run_part(sized, work.language_model, work.out):
            found += verifiable.result_rows(sized, pool, cells, prefix)[0]
    return found


@friendly
def main(
    how: harness.StudyOptions = _HOW,
    parts: str = option(",".join(PARTS), "Parts, with commas."),
    planners: str = option(",".join(PLANNERS), "Agents of `planning`, with commas."),
    sets: int | None = option(None, "How often constraints are drawn anew.", min=1),
    quick: bool = option(False, "8 prompts, one set of constraints, no `expensive`, no `dyna`."),
) -> None:
    """Measure what imagined endings buy."""
    names = [name.strip() for name in parts.split(",") if not (quick and name in _LONG)]
    if unknown := sorted(set(names) - set(PARTS)):
        raise options.CompareError(f"parts: expected some of {list(PARTS)}, got {unknown}.")
    size, out = QUICK if quick else Size(), how.folder("world-model", quick=quick)
    work = Work(replace(size, sets=sets or size.sets), how.load(), out, how.seed)
    result = how.heading("world_model", work.language_model)
    measures: dict[str, Callable[[], Any]] = {
        "zero_labels": lambda: zero_labels(work),
        "cost": lambda: cost(work),
        "label_ratio": lambda: label_ratio(work),
        "planning": lambda: planning(work, planners.split(",")),
        "dyna": lambda: dyna(how.load(), out, how.seed),
        "expensive": lambda: expensive(work, quick),
    }
    for name, measure in measures.items():
        if name in names:
            result[name] = measure()
            harness.write(how.json_file, result)


if __name__ == "__main__":
    typer.run(main)
