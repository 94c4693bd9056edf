"""An ensemble of probabilistic networks that predict the change of a state by its next chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from mbrl_text_env.fitting.folder import Arrays
from mbrl_text_env.fitting.report import split_by_group
from mbrl_text_env.language_models.base import Tokenizer
from mbrl_text_env.types import FloatArray, check_positive, one_of
from mbrl_text_env.world_model.dynamics import Dynamics
from mbrl_text_env.world_model.features import DEFAULT_FEATURES, TextFeature, TextFeatures

if TYPE_CHECKING:
    from mbrl_text_env.records import Record

Propagation = Literal["random_model", "fixed_model", "expectation"]

_HELD_OUT = 0.2
_BATCH, _EPOCHS = 256, 200
_LEARNING_RATE, _WEIGHT_DECAY = 1e-3, 5e-5
# Weight of the loss term that keeps the log-variance bounds close together.
_BOUNDS = 0.01
_LOWEST, _HIGHEST = -10.0, 0.5
_TINY = 1e-6
_Rows = npt.NDArray[np.float32]


class EnsembleDynamics(Dynamics):
    """Probabilistic networks that predict, chunk by chunk, the change of features and the end.

    Each member maps the features of a prefix to the mean and variance of their change in the next
    `stride` tokens, and to the probability that the response ends in these tokens. The final
    features are rounded if they are integers in all records, and counts never fall below those of
    the state. Intermediate steps are not rounded, because that would remove rare increments.

    Source: PETS (Chua et al., "Deep Reinforcement Learning in a Handful of Trials using
    Probabilistic Dynamics Models", NeurIPS 2018), as in mbrl-lib's `GaussianMLP`: training stops
    after `patience` epochs without an improvement of any member's validation error, and the members
    with the lowest error are the elites. Deviations: hold-out and bootstrap are by prompt; the end
    is also predicted and is part of the validation error; any improvement counts, not only 1%,
    because most of the error is noise; by default each future keeps its member, so that the members
    separate epistemic from aleatoric uncertainty.

    Args:
        members, elites: Number of networks that are fitted, and number of the best that are used.
        hidden: Units of each of the two hidden layers.
        stride: Tokens of a chunk.
        propagation: The elite that predicts each step of a future: "fixed_model", always the same;
            "random_model", a random one; "expectation", the mean of all.

    Example:
        >>> dynamics = EnsembleDynamics(lm).fit(read_records("records"))  # doctest: +SKIP
        >>> dynamics.futures([state], 64, 16).ended.mean()  # doctest: +SKIP
        0.31
    """

    kind = "ensemble"

    def __init__(
        self,
        tokenizer: Tokenizer,
        features: Sequence[TextFeature] = DEFAULT_FEATURES,
        *,
        members: int = 7,
        elites: int = 5,
        hidden: int = 200,
        stride: int = 8,
        propagation: Propagation = "fixed_model",
        patience: int = 5,
        seed: int = 0,
    ) -> None:
        check_positive(elites=elites, hidden=hidden, stride=stride, patience=patience)
        one_of("propagation", propagation, Propagation)
        if elites > members:
            raise ValueError(f"elites: expected at most members ({members}), got {elites}.")
        self.features = TextFeatures(tokenizer, features)
        self.members, self.elites, self.hidden, self.stride = members, elites, hidden, stride
        self.propagation, self.patience, self.seed = propagation, patience, seed
        names = ("members", "elites", "hidden", "stride", "propagation", "patience", "seed")
        self.settings = {name: getattr(self, name) for name in names}

    def fit(self, records: Sequence[Record]) -> Self:
        """See `Dynamics.fit`; also raises FitError for fewer than five prompts."""
        table, lengths, groups = self.read(records)
        starts = np.arange(table.shape[1] - 1) * self.stride
        goes_on = lengths[:, None] > starts
        ended = (lengths[:, None] <= starts + self.stride)[goes_on]
        prompts = np.broadcast_to(groups[:, None], goes_on.shape)[goes_on]
        inputs, changes = table[:, :-1][goes_on], np.diff(table, axis=1)[goes_on]
        units = {
            "centre": inputs.mean(axis=0),
            "spread": np.maximum(inputs.std(axis=0), _TINY),
            "shift": changes.mean(axis=0),
            "unit": np.maximum(changes.std(axis=0), _TINY),
            "whole": (table == np.rint(table)).all(axis=(0, 1)).astype(np.float32),
            "longest": np.asarray([self.longest_]),
        }
        held = split_by_group(prompts.tolist(), _HELD_OUT, self.seed)
        x, y = _scaled(inputs, units), (changes - units["shift"]) / units["unit"]
        self.arrays_ = units | self._trained(x, y.astype(np.float32), ended, prompts, held)
        return self

    def ahead(
        self, size: int, row: Any, num_futures: int, horizon: int | None, rng: np.random.Generator
    ) -> tuple[Any, Any, Any]:
        """See `Dynamics.ahead`."""
        rows, over = np.tile(row, (num_futures, 1)), np.zeros(num_futures, dtype=bool)
        member = self.draw_members(num_futures, rng)
        left = self.longest_ - size if horizon is None else horizon
        for step in range(-(-left // self.stride)):
            is_new = self.propagation == "random_model" and step
            own = self.draw_members(num_futures, rng) if is_new else member
            after, ends = self.advance(rows, own, rng)
            rows, over = np.where(over[:, None], rows, after), over | ends
        return self.settled(row, rows), over, member

    def draw_members(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Indices of elites in equal numbers, int64[count]; all 0 for "expectation"."""
        if self.propagation == "expectation":
            return np.zeros(count, dtype=np.int64)
        return rng.permutation(np.arange(count) % self.elites)

    def advance(
        self, rows: _Rows, member: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[_Rows, npt.NDArray[np.bool_]]:
        """Add one chunk to N responses: features float32[N, F] after it, and ended bool[N].

        `rows` are the predicted features (`varying`); `member`, int[N], are the elites. In the
        result, only `tokens` is rounded (see `settled`).
        """
        predicted = self._predicted(rows)
        if self.propagation == "expectation":
            mean, variance, ends = (part.mean(axis=0) for part in predicted)
        else:
            mean, variance, ends = (part[member, np.arange(len(rows))] for part in predicted)
        noise = rng.standard_normal(mean.shape)
        scaled = mean + np.sqrt(variance) * noise
        change = self.arrays_["shift"] + scaled * self.arrays_["unit"]
        ended = rng.random(len(rows)) < ends
        tokens = np.where(ended, np.clip(np.rint(change[:, 0]), 1, self.stride), self.stride)
        change[:, 0] = np.minimum(tokens, self.longest_ - rows[:, 0])
        after = (rows + change).astype(np.float32)
        return after, ended | (after[:, 0] >= self.longest_)

    def settled(self, start: _Rows, rows: _Rows) -> _Rows:
        """Round the features that are integers in the records; keep counts at least `start`."""
        found = np.where(self.arrays_["whole"] > 0, np.rint(rows), rows)
        falls = {feature.name for feature in self.features.features if feature.falls}
        return np.where([name in falls for name in self.names], found, np.maximum(found, start))

    def flops_bound(self, num_futures: int) -> float:
        """FLOPs of the elites' matrix products for every chunk of the longest response."""
        weights = sum(self.arrays_[name][0].size for name in ("w0", "w1", "w2"))
        steps = -(-self.longest_ // self.stride)
        return float(2 * self.elites * weights * steps * num_futures)

    def restore(self, arrays: Arrays) -> None:
        """Set `arrays_` from a folder; ValueError if a shape is wrong."""
        width = len(self.names)
        shapes = dict.fromkeys(("centre", "spread", "shift", "unit", "whole"), (width,))
        weights = _begun(self.elites, width, self.hidden, 0)
        shapes |= {"longest": (1,), **{name: tuple(w.shape) for name, w in weights.items()}}
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name} of shape {arrays[name].shape}, expected {shape}")
        self.arrays_, self.longest_ = arrays, int(arrays["longest"][0])

    def scaled(self, rows: _Rows) -> _Rows:
        """Standardize features with the mean and standard deviation of the records' prefixes."""
        return _scaled(rows, self.arrays_)

    def _predicted(self, rows: _Rows) -> list[FloatArray]:
        """Means and variances float64[E, N, F] and end probabilities [E, N] of the elites."""
        import torch

        weights = {name: torch.from_numpy(values) for name, values in self.arrays_.items()}
        with torch.no_grad():
            inputs = torch.from_numpy(self.scaled(rows)).expand(self.elites, -1, -1)
            mean, logvar, logit = _forward(weights, inputs)
            parts = mean, logvar.exp(), logit.sigmoid()
            return [part.numpy().astype(np.float64) for part in parts]

    def _trained(
        self,
        x: _Rows,
        y: _Rows,
        ended: npt.NDArray[np.bool_],
        prompts: npt.NDArray[np.int64],
        held: npt.NDArray[np.bool_],
    ) -> Arrays:
        """The weights of the elites."""
        import torch

        rng = np.random.default_rng(self.seed)
        weights = _begun(self.members, x.shape[1], self.hidden, self.seed)
        optimizer = torch.optim.Adam(
            weights.values(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
        )
        data = [torch.from_numpy(a) for a in (x, y, ended.astype(np.float32))]
        rows = self._bootstrapped(prompts, np.flatnonzero(~held), rng)
        outside = [
            part[torch.from_numpy(held)].expand(self.members, *[-1] * part.ndim) for part in data
        ]
        best, least, idle = dict(weights), np.full(self.members, np.inf), 0
        for _ in range(_EPOCHS):
            order = rng.permuted(rows, axis=1)
            for start in range(0, order.shape[1], _BATCH):
                at = torch.from_numpy(order[:, start : start + _BATCH])
                optimizer.zero_grad()
                _loss(weights, *(part[at] for part in data)).backward()
                optimizer.step()
            errors = _errors(weights, *outside)
            better = errors < least
            least, idle = np.where(better, errors, least), 0 if better.any() else idle + 1
            mask = torch.from_numpy(better)[:, None, None]
            best = {k: torch.where(mask, w.detach(), best[k].detach()) for k, w in weights.items()}
            if idle >= self.patience:
                break
        elites = np.argsort(least, kind="stable")[: self.elites]
        return {name: value.detach().numpy()[elites] for name, value in best.items()}

    def _bootstrapped(
        self, prompts: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """Bootstrap by prompt: N row indices for each member, int64[members, N]."""
        own, drawn = prompts[rows], []
        for _ in range(self.members):
            chosen = rng.choice(np.unique(own), len(np.unique(own)))
            found = np.concatenate([rows[own == prompt] for prompt in chosen])
            drawn.append(np.resize(rng.permutation(found), len(rows)))
        return np.stack(drawn)


def _scaled(rows: _Rows, units: Arrays) -> _Rows:
    return np.asarray((rows - units["centre"]) / units["spread"], dtype=np.float32)


def _begun(members: int, width: int, hidden: int, seed: int) -> dict[str, Any]:
    """Initial weights: normal with std 1 / (2 sqrt(inputs)), as in mbrl-lib."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    sizes = (width, hidden, hidden, 2 * width + 1)
    weights: dict[str, Any] = {}
    for layer, (inputs, outputs) in enumerate(pairwise(sizes)):
        drawn = torch.randn(members, inputs, outputs, generator=generator)
        weights[f"w{layer}"] = (drawn / (2 * inputs**0.5)).requires_grad_()
        weights[f"b{layer}"] = torch.zeros(members, 1, outputs, requires_grad=True)
    for name, bound in (("low", _LOWEST), ("high", _HIGHEST)):
        weights[name] = torch.full((members, 1, width), bound, requires_grad=True)
    return weights


def _forward(weights: Mapping[str, Any], x: Any) -> tuple[Any, Any, Any]:
    """Means and log-variances [E, N, F] and logits of the end [E, N] for inputs [E, N, F]."""
    from torch.nn.functional import silu, softplus

    for layer in ("0", "1"):
        x = silu(weights[f"b{layer}"].baddbmm(x, weights[f"w{layer}"]))
    out, width = weights["b2"].baddbmm(x, weights["w2"]), weights["low"].shape[-1]
    low, high = weights["low"], weights["high"]
    logvar = high - softplus(high - out[..., width : 2 * width])
    return out[..., :width], low + softplus(logvar - low), out[..., -1]


def _loss(weights: Mapping[str, Any], x: Any, y: Any, ended: Any) -> Any:
    """Negative log-likelihood of changes and ends, summed over members."""
    from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

    mean, logvar, logit = _forward(weights, x)
    nats = 0.5 * ((mean - y) ** 2 * (-logvar).exp() + logvar)
    total = nats.mean(dim=(1, 2)) + cross_entropy(logit, ended, reduction="none").mean(dim=1)
    return total.sum() + _BOUNDS * (weights["high"].sum() - weights["low"].sum())


def _errors(weights: Mapping[str, Any], x: Any, y: Any, ended: Any) -> FloatArray:
    """For each member, the mean squared error of changes plus that of the end."""
    import torch

    with torch.no_grad():
        mean, _, logit = _forward(weights, x)
        found = ((mean - y) ** 2).mean(dim=(1, 2)) + ((logit.sigmoid() - ended) ** 2).mean(dim=1)
    return np.asarray(found.numpy(), dtype=np.float64)
