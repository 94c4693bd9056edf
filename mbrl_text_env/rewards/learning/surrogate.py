"""A surrogate that replaces most reward calls, with real calls where it is least certain."""

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
    """M ridge regressions, float64[D, M] and float64[M], each on a bootstrap sample of prompts.

    Predictions are clipped to the range of observed scores, `low` to `high`. `error` is the root
    mean square error on the prompts outside each head's sample.
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
        """Fit on N labelled responses, with the penalty of the lowest leave-one-out error."""
        inputs = features.fit(raw).transform(raw)
        # Leave-one-out errors need several rows.
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
        """Return the mean and standard deviation over the heads, float64[B] each."""
        told = self.features.transform(raw) @ self.weights + self.intercepts
        told = np.clip(told, self.low, self.high)
        return told.mean(axis=1), told.std(axis=1)


class Batch(NamedTuple):
    """A batch of B responses, of which K were scored by the reward.

    Args:
        scores: float64[B], the returned scores.
        rows: int64[K], indices of the K responses: `num_audited` random ones, then the others.
        labels: float64[K], the reward's scores.
        told, stds: float64[K], the heads' earlier predictions; NaN if there were no heads.
        error: The heads' error on left-out prompts; NaN if there were no heads.
        raw: Features of the K responses.
        responses: Prompt ids and texts of all B responses.
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
        """Heads minus reward on the random responses, float64[num_audited]."""
        return (self.told - self.labels)[: self.num_audited]


class Audit(NamedTuple):
    """A comparison of heads and reward on random responses from consecutive batches.

    Args:
        batches, calls: Total numbers of batches and calls, up to the last of these batches.
        errors: float64[K], heads minus reward, before the heads were fitted on these responses.
        error: Their root mean square; NaN if there are none.
        band: The 95% upper limit of `error` if errors are as large as on left-out prompts.
    """

    batches: int
    calls: int
    errors: FloatArray
    error: float
    band: float


def audits(batches: Sequence[Batch], count: int) -> list[Audit]:
    """Return the audits of up to `count` parts of the batches, without batches before any heads."""
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
    """Return the indices of `count` responses: `audited` random ones, then the least certain.

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
    """A surrogate of an expensive reward: heads fitted on the scores of a few responses.

    In each batch, the real reward scores `calls_per_batch` responses: `audited` random ones, which
    measure the heads on unseen responses, and those on which the heads disagree most. Then the
    heads are fitted again on all labels. They predict the scores of the other responses, within the
    range of the labels. The real reward scores all of the first `first_calls` responses.

    A batch is saved before its scores are returned, and a repeated batch is read from the folder,
    so a training run that was killed gets the same scores again. Calls are counted before they are
    made, so `max_calls` is never exceeded, but calls interrupted by a kill are lost.

    Sources: Janner et al., "When to Trust Your Model", NeurIPS 2019 (a model refitted as the policy
    changes); Settles, "Active Learning Literature Survey", 2009 (query by committee); Coste et al.,
    "Reward Model Ensembles Help Mitigate Overoptimization", 2024. Deviation: the score is the
    ensemble's mean, not its minimum; audits reveal exploitation of the surrogate.

    Args:
        reward: The real reward.
        folder: Stores the labels; continue with the same reward, features, members and seed.
        features: The features of prompt and response; `EmbeddingFeatures()` by default.
        max_calls: Maximum total number of calls of the real reward.
        members: Number of heads in the ensemble.

    Raises:
        RewardError: A setting is out of range, or the folder is damaged or of another surrogate.
            When scoring, if the reward fails or returns a number that is not finite.

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
        """All batches so far, in order."""
        return [*self._known.values()]

    def identity(self) -> Any:
        """Return the identity of the real reward and the settings, without the learned heads."""
        calls = ("max_calls", "first_calls", "calls_per_batch", "audited")
        return {"surrogate": self._settings, **{name: getattr(self, name) for name in calls}}

    @property
    def calls(self) -> int:
        """Number of calls of the real reward so far, including calls lost to a kill."""
        path = self._folder / _CALLS
        return int(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else 0

    def applies_to(self, prompt: Prompt) -> bool:
        """Return whether the reward and the features apply to `prompt`."""
        return self._reward.applies_to(prompt) and self._features.applies_to(prompt)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the real reward's scores where it was called, else the heads'."""
        pairs = zip(prompts, responses, strict=True)
        key = digest(*(f"{prompt_digest(p)} {response}".encode() for p, response in pairs))
        if key not in self._known:
            self._add(key, prompts, responses)
        batch = self._known[key]
        self._asked = np.isin(np.arange(len(responses)), batch.rows).astype(int).tolist()
        return batch.scores.copy()

    def reward_calls(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[int]:
        """Return int[B], 1 where the real reward was called in the batch just scored, else 0."""
        return self._asked

    def flops(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        """Return float64[B], the FLOPs of the features, plus the real reward's where called."""
        own = np.asarray(self._reward.flops(prompts, responses), dtype=np.float64)
        return self._features.flops(prompts, responses) + np.asarray(self._asked) * own

    def flops_bound(self) -> float:
        """Return the upper bound for one response: features and real reward."""
        return self._features.flops_bound() + self._reward.flops_bound()

    def _add(self, key: str, prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
        """Score a new batch, fit the heads again, and save the batch."""
        count, raw = len(responses), self._features.read(prompts, responses)
        heads, calls, number = self._heads, self.calls, len(self._known)
        labelled = sum(len(batch.labels) for batch in self._known.values())
        told, stds = heads.predict(raw) if heads else np.full((2, count), np.nan)
        wanted = max(self.calls_per_batch, self.first_calls - labelled)
        wanted = max(0, min(wanted, self.max_calls - calls, count))
        if heads is None and wanted < 1:
            raise RewardError(
                f"{self.name}: expected remaining calls of the reward, but all {calls} calls of "
                f"max_calls were lost to kills before the first labels were saved. Raise max_calls."
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
    """Return the batches of a folder of labels, in order, by their keys.

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
                f"{error}). Restore it from a copy, or start with an empty folder."
            ) from error
    return found


def _write_batch(path: Path, key: str, batch: Batch) -> None:
    arrays = {**{name: getattr(batch, name) for name in _ARRAYS}, **batch.raw}
    arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    # Write the error as text, because JSON has no NaN.
    about = {"key": key, "num_audited": batch.num_audited, "error": repr(batch.error)}
    about["responses"] = batch.responses
    with writing(path.parent, RewardError), write_file(path) as scratch:
        scratch.write_bytes(save(arrays, metadata={"batch": json.dumps(about)}))
