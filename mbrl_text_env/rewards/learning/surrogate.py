"""A learned head in place of most calls of a reward: real calls where it is least sure."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy.stats import chi2
from sklearn.linear_model import Ridge, RidgeCV

from mbrl_text_env.files import write_file, write_text
from mbrl_text_env.fitting.report import IntArray, root_mean_square
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardError, RewardLike, RewardModel, score_responses
from mbrl_text_env.rewards.learning.features import EmbeddingFeatures, Features, Raw
from mbrl_text_env.runs import claim_file, digest, identity, prompt_digest, writing
from mbrl_text_env.types import FloatArray, Prompt

_CALLS, _CONFIG = "calls.json", "surrogate.json"
_PENALTIES = tuple(10.0**power for power in range(-2, 6))
_BAND = 0.95


class Heads(NamedTuple):
    """Ridge regressions, float64[D, M] and float64[M], each on a bootstrap sample of the prompts.

    `low` and `high` are scores that were seen, which no prediction leaves; `error` is the root mean
    square error on the prompts that are not in a head's sample.
    """

    features: Features
    weights: FloatArray
    intercepts: FloatArray
    low: float
    high: float
    error: float

    @classmethod
    def fit(
        cls, features: Features, raw: Raw, scores: FloatArray, prompts: Any, members: int, seed: int
    ) -> Heads:
        """Fit on N labelled responses; the penalty is chosen by leave-one-out errors."""
        inputs = features.fit(raw).transform(raw)
        # One row has no others to be predicted from.
        alpha = RidgeCV(_PENALTIES).fit(inputs, scores).alpha_ if len(scores) > 2 else 1.0
        groups = np.unique(prompts, return_inverse=True)[1]
        count, rng = groups.max() + 1, np.random.default_rng([seed, len(scores)])
        samples = rng.multinomial(count, np.full(count, 1 / count), size=members)[:, groups]
        heads = [Ridge(alpha).fit(inputs, scores, sample_weight=weights) for weights in samples]
        weights = np.stack([head.coef_ for head in heads], axis=1)
        intercepts = np.array([head.intercept_ for head in heads])
        low, high = float(scores.min()), float(scores.max())
        errors = np.clip(inputs @ weights + intercepts, low, high) - scores[:, None]
        left_out = samples.T == 0
        found = [own[out].mean() for own, out in zip(errors, left_out, strict=True) if out.any()]
        error = root_mean_square(np.array(found)) if found else float("nan")
        return cls(features, weights, intercepts, low, high, error)

    def predict(self, raw: Raw) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation over the heads, float64[B] each."""
        told = self.features.transform(raw) @ self.weights + self.intercepts
        told = np.clip(told, self.low, self.high)
        return told.mean(axis=1), told.std(axis=1)


class Batch(NamedTuple):
    """What was done with a batch of B responses, K of which the reward was asked for.

    Args:
        scores: float64[B], as returned.
        rows: int64[K], which were asked for, `num_audited` drawn at random before the least sure.
        labels: float64[K], what the reward said.
        told, stds: float64[K], what the heads had said before; NaN while there were none.
        error: Of the heads on prompts left out; NaN while there were none.
        raw: Features of the K responses.
        responses: Prompt ids and texts of all B.
    """

    scores: FloatArray
    rows: IntArray
    num_audited: int
    labels: FloatArray
    told: FloatArray
    stds: FloatArray
    error: float
    raw: Raw
    responses: Sequence[tuple[str, str]]

    @property
    def audit(self) -> FloatArray:
        """float64[num_audited]: heads minus reward, on responses drawn at random."""
        return (self.told - self.labels)[: self.num_audited]


class Audit(NamedTuple):
    """Heads against the reward, on responses drawn at random from some batches in a row.

    Args:
        batches, calls: So many there were up to the last of them.
        errors: float64[K], heads minus reward, before the heads had seen these.
        error: Their root mean square; NaN without one.
        band: What `error` stays below in 95% of audits, if errors are as on prompts left out.
    """

    batches: int
    calls: int
    errors: FloatArray
    error: float
    band: float


def audits(batches: Sequence[Batch], count: int) -> list[Audit]:
    """The audits of batches, in up to `count` parts; the first ones, without heads, have none."""
    found = []
    for part in np.array_split(np.arange(len(batches)), min(count, len(batches))):
        told = [batches[at] for at in part if not np.isnan(batches[at].error)]
        errors = np.concatenate([np.zeros(0), *(batch.audit for batch in told)])
        error = band = float("nan")
        if size := len(errors):
            error = root_mean_square(errors)
            expected = root_mean_square(np.array([b.error for b in told for _ in b.audit]))
            band = float(np.sqrt(chi2.ppf(_BAND, size) / size) * expected)
        calls = sum(len(batch.rows) for batch in batches[: part[-1] + 1])
        found.append(Audit(int(part[-1]) + 1, calls, errors, error, band))
    return found


def choose_calls(stds: FloatArray, count: int, audited: int, rng: np.random.Generator) -> IntArray:
    """Which of B responses to ask the reward for: `audited` at random, then the least sure.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> choose_calls(np.array([0.1, 0.4, 0.2, 0.3]), 2, 0, rng).tolist()
        [1, 3]
    """
    order = rng.permutation(len(stds))[: min(audited, count)]
    ranked = np.argsort(-stds, kind="stable")
    rest = ranked[~np.isin(ranked, order)][: count - len(order)]
    return np.concatenate([order, rest])


@dataclass(eq=False, repr=False)
class SurrogateReward(RewardModel):
    """A reward that answers by a head fitted on the scores of a few of the responses it was shown.

    Of each batch, `calls_per_batch` responses are scored by the reward itself: `audited` of them
    drawn at random, which measures the heads on what they have not seen, and those about which the
    heads differ most. The heads are fitted anew on all labels, and say the scores of the others,
    within the range of the labels. The first `first_calls` responses are all asked for.

    A batch is written before its scores are returned, and one that was seen is looked up: a
    training that was killed sees the same scores again. Calls are counted before they are made, so
    that a kill in between costs them, and `max_calls` is never exceeded.

    Sources: Janner et al., "When to Trust Your Model", NeurIPS 2019 (a model fitted anew as the
    policy moves); Settles, "Active Learning Literature Survey", 2009 (disagreement of a committee);
    Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", 2024. Deviation: the
    ensemble's mean is the score, not its minimum; audits show what is exploited.

    Args:
        reward: The real one.
        folder: Where labels are kept; the same reward, features, members and seed go on with it.
        features: What heads see of prompt and response; `EmbeddingFeatures()` by default.
        max_calls: Of the real reward, in all.
        members: Heads of the ensemble.

    Raises:
        RewardError: A setting is out of range; the folder is of another surrogate, or damaged.
            When scoring: the reward failed, or said what is no finite number.

    Example:
        >>> from mbrl_text_env.rewards import SentimentReward
        >>> reward = SurrogateReward(SentimentReward(), "labels", max_calls=64)  # doctest: +SKIP
        >>> reward.score([Prompt.from_text("Hi")] * 2, ["Good.", "Bad."])  # doctest: +SKIP
        array([ 0.4404, -0.5423])
    """

    reward: RewardLike
    folder: str | Path
    _: KW_ONLY
    features: Features = field(default_factory=EmbeddingFeatures)
    max_calls: int = 240
    calls_per_batch: int = 8
    first_calls: int = 32
    audited: int = 2
    members: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        self._reward, self._features = as_reward_model(self.reward), copy.copy(self.features)
        self.name = f"surrogate({self._reward.name})"
        limits = {"audited": 0, "calls_per_batch": self.audited, "first_calls": 2, "members": 2}
        for name, least in {**limits, "max_calls": self.first_calls}.items():
            if getattr(self, name) < least:
                raise RewardError(f"{name}: expected {least} or more, got {getattr(self, name)}.")
        self._folder = Path(self.folder)
        self._settings = {
            "reward": identity(self._reward),
            "features": identity(self._features),
            "members": self.members,
            "seed": self.seed,
        }
        with writing(self._folder, RewardError):
            self._folder.mkdir(parents=True, exist_ok=True)
            claim_file(self._folder / _CONFIG, self._settings, "surrogate reward", RewardError)
        self._known = read_batches(self._folder)
        self._heads = self._fit() if self._known else None
        self._asked: list[int] = []

    @property
    def batches_(self) -> list[Batch]:
        """What was done with each batch, in order."""
        return [*self._known.values()]

    def identity(self) -> Any:
        """The real reward and the settings; not what was learned so far."""
        calls = ("max_calls", "first_calls", "calls_per_batch", "audited")
        return {"surrogate": self._settings, **{name: getattr(self, name) for name in calls}}

    @property
    def calls(self) -> int:
        """Calls of the real reward so far, those that a kill has lost among them."""
        path = self._folder / _CALLS
        return int(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else 0

    def applies_to(self, prompt: Prompt) -> bool:
        """Whether the reward can score answers to `prompt`, and the features be read."""
        return self._reward.applies_to(prompt) and self._features.applies_to(prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B]: what the reward said where it was asked, else what the heads say."""
        pairs = zip(prompts, responses, strict=True)
        key = digest(*(f"{prompt_digest(p)} {response}".encode() for p, response in pairs))
        if key not in self._known:
            self._add(key, prompts, responses)
        batch = self._known[key]
        self._asked = np.isin(np.arange(len(responses)), batch.rows).astype(int).tolist()
        return batch.scores.copy()

    def reward_calls(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[int]:
        """int[B], 1 where the reward was asked in the batch that was just scored."""
        return self._asked

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """float64[B]: reading the features, and the reward's own where it was asked."""
        own = np.asarray(self._reward.flops(prompts, responses), dtype=np.float64)
        return self._features.flops(prompts, responses) + np.asarray(self._asked) * own

    def flops_bound(self) -> float:
        """Features and the reward."""
        return self._features.flops_bound() + self._reward.flops_bound()

    def _add(self, key: str, prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
        """Score a new batch, learn from it, and write it."""
        count, raw = len(responses), self._features.read(prompts, responses)
        heads, calls, number = self._heads, self.calls, len(self._known)
        labelled = sum(len(batch.labels) for batch in self._known.values())
        told, stds = heads.predict(raw) if heads else np.full((2, count), np.nan)
        wanted = max(self.calls_per_batch, self.first_calls - labelled)
        wanted = max(0, min(wanted, self.max_calls - calls, count))
        if heads is None and wanted < 1:
            raise RewardError(
                f"{self.name}: expected calls of the reward to be left, got all {calls} of "
                f"max_calls lost to kills before the first labels were written. Raise max_calls."
            )
        audited = min(self.audited if heads else wanted, wanted)
        rng = np.random.default_rng([self.seed, number])
        rows = choose_calls(stds, wanted, audited, rng)
        write_text(self._folder / _CALLS, json.dumps(calls + wanted))
        labels = told[:0]
        if len(rows):
            asked = [prompts[i] for i in rows], [responses[i] for i in rows]
            labels = score_responses(self._reward, *asked).total
        error = heads.error if heads else float("nan")
        own = {name: values[rows] for name, values in raw.items()}
        texts = [(p.id, text) for p, text in zip(prompts, responses, strict=True)]
        batch = Batch(told, rows, audited, labels, told[rows], stds[rows], error, own, texts)
        if heads is None or len(rows):
            heads = self._fit(batch)
        scores = heads.predict(raw)[0]
        scores[rows] = labels
        batch = batch._replace(scores=scores)
        _write_batch(self._folder / f"{number:05d}.safetensors", key, batch)
        self._known[key], self._heads = batch, heads

    def _fit(self, *more: Batch) -> Heads:
        batches = [batch for batch in (*self._known.values(), *more) if len(batch.rows)]
        names = batches[0].raw
        raw = {name: np.concatenate([batch.raw[name] for batch in batches]) for name in names}
        scores = np.concatenate([batch.labels for batch in batches])
        prompts = [batch.responses[row][0] for batch in batches for row in batch.rows]
        return Heads.fit(self._features, raw, scores, prompts, self.members, self.seed)


_ARRAYS = ("scores", "rows", "labels", "told", "stds")


def read_batches(folder: str | Path) -> dict[str, Batch]:
    """The batches of a folder of labels, in order, by what they are looked up with.

    Raises:
        RewardError: A file is damaged.
    """
    found = {}
    for path in sorted(Path(folder).glob("[0-9]*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads(file.metadata()["batch"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            own = {name: arrays.pop(name) for name in _ARRAYS}
            responses = [(prompt, text) for prompt, text in about["responses"]]
            number = {"num_audited": about["num_audited"], "error": float(about["error"])}
            found[about["key"]] = Batch(**own, **number, raw=arrays, responses=responses)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RewardError(
                f"{path}: expected a batch of labels, got a damaged file ({type(error).__name__}: "
                f"{error}). Restore it from a copy, or begin with an empty folder."
            ) from error
    return found


def _write_batch(path: Path, key: str, batch: Batch) -> None:
    arrays = {**{name: getattr(batch, name) for name in _ARRAYS}, **batch.raw}
    arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    # The error as text: JSON has no NaN.
    about = {"key": key, "num_audited": batch.num_audited, "error": repr(batch.error)}
    about["responses"] = batch.responses
    with writing(path.parent, RewardError), write_file(path) as scratch:
        scratch.write_bytes(save(arrays, metadata={"batch": json.dumps(about)}))
