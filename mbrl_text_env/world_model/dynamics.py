"""Dynamics of text: predict futures of a state, learned from records without rewards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from mbrl_text_env.fitting.folder import Arrays, FolderKind
from mbrl_text_env.fitting.heads import scaled_ridge
from mbrl_text_env.fitting.report import FitError
from mbrl_text_env.language_models.base import Tokenizer, stream
from mbrl_text_env.types import FloatArray, Ledgers, TextState, Usage, check_positive, timed
from mbrl_text_env.world_model.features import DEFAULT_FEATURES, TextFeature, TextFeatures

if TYPE_CHECKING:
    from mbrl_text_env.records import Record


class WorldModelError(RuntimeError):
    """Futures that cannot be predicted, or a folder without a valid world model."""


FOLDER = FolderKind(
    noun="world model",
    writer="`Dynamics.save`",
    config="world_model.json",
    weights="world_model.safetensors",
    version=1,
    error=WorldModelError,
)
_TINY = 1e-6


@dataclass(frozen=True)
class Futures:
    """M predicted futures for each of B states.

    Args:
        features: float32[B, M, F], features of the future response, ordered as `Dynamics.names`.
        length: int64[B, M], number of tokens of the future response.
        ended: bool[B, M], whether the future response has ended.
        member: int64[B, M], index of the model or group of records that made the prediction.
    """

    features: npt.NDArray[np.float32]
    length: npt.NDArray[np.int64]
    ended: npt.NDArray[np.bool_]
    member: npt.NDArray[np.int64]


class Dynamics(ABC):
    """Predicts the features of a prefix's continuation; call it with `predict_futures`.

    Attributes:
        features: The features to predict, except `constant_` ones, which never vary in the records.
        language_model_name_: The policy whose responses it was fitted on.
        longest_: Number of tokens of the longest response in the records.
        arrays_: The fitted arrays, which `save` writes.
        stride: Number of tokens between the prefixes taken from a record.
        kind, settings: Its name in `load_dynamics`, and the arguments of its constructor.
    """

    features: TextFeatures
    constant_: tuple[str, ...] = ()
    language_model_name_: str | None = None
    longest_: int
    arrays_: Arrays
    stride: int
    kind: str = ""
    settings: Mapping[str, Any]

    @property
    def is_fitted(self) -> bool:
        """Whether `futures` can be called."""
        return hasattr(self, "arrays_")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the F predicted features."""
        return tuple(name for name in self.features.names if name not in self.constant_)

    def futures(
        self,
        states: Sequence[TextState],
        num_futures: int,
        horizon: int | None = None,
        seed: int = 0,
    ) -> Futures:
        """Futures after `horizon` tokens (None: at the end), determined by state and seed.

        The horizon must be a multiple of `stride`.
        """
        if horizon is not None and horizon % self.stride:
            raise WorldModelError(
                f"horizon: expected a multiple of the stride, {self.stride}, got {horizon}. Change "
                "it, or fit with another stride."
            )
        rows = self.varying(states)
        shape = len(states), num_futures
        features = np.zeros((*shape, rows.shape[1]), dtype=np.float32)
        ended, member = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
        # State by state: the batch size can change the rounding of a matrix product.
        for i, (state, row) in enumerate(zip(states, rows, strict=True)):
            rng, size = stream(seed, state, 0), len(state.response_ids)
            features[i], ended[i], member[i] = self.ahead(size, row, num_futures, horizon, rng)
        return Futures(features, features[..., 0].astype(np.int64), ended, member)

    @abstractmethod
    def ahead(
        self, size: int, row: Any, num_futures: int, horizon: int | None, rng: np.random.Generator
    ) -> tuple[Any, Any, Any]:
        """Features float32[M, F], ended bool[M] and member int64[M] of the futures of one state.

        The state has `size` tokens and the features `row`, float32[F]; the first one is `tokens`.
        """

    @abstractmethod
    def fit(self, records: Sequence[Record]) -> Self:
        """Fit on responses of one policy, scored or not.

        Raises:
            FitError: The records have several policies, a policy other than the tokenizer's, or
                fewer than two prompts; tokens do not decode to the response; a count decreases; or
                all features are constant.
            ValueError: A feature is not finite.
        """

    def flops_bound(self, num_futures: int) -> float:
        """An upper bound on the FLOPs of `num_futures` futures of one state."""
        return 0.0

    def save(self, folder: str | Path) -> None:
        """Save as JSON and safetensors; replaces a world model in the folder."""
        if not self.is_fitted:
            raise WorldModelError("Only fitted dynamics can be saved. Call fit(records).")
        config = {
            "kind": self.kind,
            "settings": dict(self.settings),
            "features": list(self.features.names),
            "constant": list(self.constant_),
            "language_model": self.language_model_name_,
        }
        FOLDER.write(folder, config, self.arrays_)

    def varying(self, states: Sequence[TextState]) -> npt.NDArray[np.float32]:
        """The predicted features of states as they are now, float32[B, F]."""
        kept = [name not in self.constant_ for name in self.features.names]
        return self.features(states)[:, kept]

    def read(
        self, records: Sequence[Record]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The data for `fit`: features float32[N, cuts, F], lengths and prompt indices int64[N].

        Cuts after the end repeat the end. Sets `constant_`, `language_model_name_`, `longest_`.
        """
        self._check_records(records)
        lengths = np.asarray([len(record.response_ids) for record in records], dtype=np.int64)
        cuts = range(0, int(lengths.max()) + self.stride, self.stride)
        table = np.stack(
            [
                self.features([r.prefix_state(min(cut, len(r.response_ids))) for cut in cuts])
                for r in records
            ]
        )
        counts = np.asarray([True, *(not feature.falls for feature in self.features.features)])
        for record, cut, column in np.argwhere((np.diff(table, axis=1) < 0) & counts):
            raise FitError(
                "Expected counts that never fall as tokens arrive, got one that falls after "
                f"feature {self.features.names[column]!r} of prompt {records[record].prompt_id!r}, "
                f"token {cut * self.stride}. Count what is `settled` alone, or say `falls=True`."
            )
        # Tokens vary within a response, even if all responses have the same length.
        varies = np.ptp(table.reshape(-1, table.shape[-1]), axis=0) > 0
        if not varies[1:].any():
            raise FitError(
                f"Expected features that vary, got constant ones alone: {self.features.names[1:]}. "
                "Add features of what differs between responses."
            )
        _, groups = np.unique([record.prompt_id for record in records], return_inverse=True)
        self.constant_ = tuple(np.asarray(self.features.names)[~varies].tolist())
        self.language_model_name_ = records[0].language_model
        self.longest_ = int(lengths.max())
        return table[:, :, varies], lengths, groups.astype(np.int64)

    def _check_records(self, records: Sequence[Record]) -> None:
        tokenizer: Any = self.features.tokenizer
        policies, own = {record.language_model for record in records}, policy_of(tokenizer)
        if len(policies) > 1 or (own is not None and policies and policies != {own}):
            raise FitError(
                f"Expected responses of one policy{f', {own!r}' if own else ''}, got those of "
                f"{sorted(policies)}. Dynamics are those of what one model writes: fit one for "
                "each."
            )
        prompts = {record.prompt_id for record in records}
        if len(prompts) < 2:
            raise FitError(
                f"Expected records of at least 2 prompts, got {len(prompts)}. Collect more with "
                "`mbrl-text collect`."
            )
        for record in records:
            if not record.response_ids or tokenizer.decode(record.response_ids) != record.response:
                raise FitError(
                    f"Record of prompt {record.prompt_id!r}: expected tokens that decode to the "
                    f"response, got {len(record.response_ids)} for {record.response[:80]!r}. Use "
                    "the tokenizer that wrote the records."
                )


def policy_of(tokenizer: Any) -> str | None:
    """The name of a language model; None for a plain tokenizer."""
    return getattr(tokenizer, "name", None)


def predict_futures(
    dynamics: Dynamics,
    states: Sequence[TextState],
    num_futures: int,
    horizon: int | None = None,
    *,
    seed: int = 0,
    ledgers: Ledgers = None,
) -> Futures:
    """Predict futures of states that have not ended; charges `num_futures` calls per state.

    Raises:
        WorldModelError: The dynamics are not fitted; a state has ended; a prefix plus the horizon
            is longer than the longest response in the fit; or a number is below 1.

    Example:
        >>> futures = predict_futures(dynamics, [state], 64)  # doctest: +SKIP
        >>> futures.features.shape  # doctest: +SKIP
        (1, 64, 44)
    """
    name = type(dynamics).__name__
    if not dynamics.is_fitted:
        raise WorldModelError(f"{name} is not fitted. Call fit(records), or load a saved one.")
    if num_futures < 1 or (horizon is not None and horizon < 1):
        raise WorldModelError(
            f"Expected num_futures and horizon of at least 1, got {num_futures} and {horizon}."
        )
    for state in states:
        size = len(state.response_ids)
        if state.finish_reason is not None:
            raise WorldModelError(
                f"The response to prompt {state.prompt.id!r} has ended "
                f"(finish_reason={state.finish_reason!r}), so it has no future. Use "
                "`dynamics.features([state])`, its features now."
            )
        if size + (horizon or 1) > dynamics.longest_:
            raise WorldModelError(
                f"Prompt {state.prompt.id!r}: expected at most {dynamics.longest_} tokens, those "
                f"of the longest record, got a prefix of {size} and a horizon of {horizon}. Use "
                "a shorter horizon or response limit, or fit on longer responses."
            )
    with timed(ledgers):
        found = dynamics.futures(states, num_futures, horizon, seed)
    flops = dynamics.flops_bound(num_futures)
    for ledger in ledgers or ():
        ledger.charge(Usage(dynamics_calls=num_futures, dynamics_flops=flops))
    return found


class IncrementDynamics(Dynamics):
    """Predict futures by adding increments of recorded responses to the features of the state.

    Increments come from donors: records that had not ended at the state's length, or the nearest
    of them. Distances are measured between predicted increments to the end, in units of their
    standard deviations; a ridge regression predicts them from the features. Donors are drawn
    without replacement until all are used. `member` is one of `NUM_MEMBERS` groups of prompts.

    Source: k-nearest-neighbour resampling of analogues (Lall and Sharma, "A nearest neighbor
    bootstrap for resampling hydrologic time series", 1996). Deviations: increments are resampled
    instead of values, and the neighbours are nearest in the space of predicted increments.

    Args:
        tokenizer: Tokenizer of the responses; a language model must also match the records'.
        neighbours: Number of nearest donors; None for all records.
        stride: Number of tokens between cuts of a record; other lengths use the nearest cut.
        alpha: Penalty of the ridge regression, on inputs of variance 1.

    Example:
        >>> dynamics = IncrementDynamics(lm).fit(read_records("records"))  # doctest: +SKIP
        >>> dynamics.futures([state], 64).length.mean()  # doctest: +SKIP
        71.3
    """

    NUM_MEMBERS = 5
    kind = "increment"

    def __init__(
        self,
        tokenizer: Tokenizer,
        features: Sequence[TextFeature] = DEFAULT_FEATURES,
        *,
        neighbours: int | None = 40,
        stride: int = 8,
        alpha: float = 10.0,
    ) -> None:
        check_positive(stride=stride, neighbours=neighbours)
        if not alpha > 0:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}.")
        self.features = TextFeatures(tokenizer, features)
        self.neighbours, self.stride, self.alpha = neighbours, stride, alpha
        self.settings = {"neighbours": neighbours, "stride": stride, "alpha": alpha}

    def fit(self, records: Sequence[Record]) -> Self:
        """See `Dynamics.fit`."""
        self._set(*self.read(records))
        return self

    def _set(self, table: Any, lengths: Any, groups: Any) -> None:
        """Set the fitted arrays; the ridges are fitted when they are needed."""
        self.arrays_ = {"table": table, "lengths": lengths, "groups": groups}
        self.table_, self.lengths_, self.groups_ = table, lengths, groups
        self._spaces: dict[int, tuple[Any, FloatArray, FloatArray]] = {}

    def ahead(
        self, size: int, row: Any, num_futures: int, horizon: int | None, rng: np.random.Generator
    ) -> tuple[Any, Any, Any]:
        """See `Dynamics.ahead`."""
        # The nearest cut at which a record has not ended.
        cut = min(
            (size + (self.stride - 1) // 2) // self.stride, (self.longest_ - 1) // self.stride
        )
        donors = self._donors(cut, row)
        rounds = -(-num_futures // len(donors))
        drawn = np.concatenate([rng.permutation(donors) for _ in range(rounds)])[:num_futures]
        last = self.table_.shape[1] - 1
        then = last if horizon is None else cut + horizon // self.stride
        ends = np.minimum(self.lengths_[drawn], then * self.stride)
        most = self.longest_ if horizon is None else size + horizon
        features = row + (self.table_[drawn, min(then, last)] - self.table_[drawn, cut])
        features[:, 0] = np.minimum(np.maximum(size + ends - cut * self.stride, size), most)
        ended = self.lengths_[drawn] <= then * self.stride
        return features, ended, self.groups_[drawn] % self.NUM_MEMBERS

    def flops_bound(self, num_futures: int) -> float:
        """FLOPs of the ridge prediction and the distances to all records."""
        count, _, width = self.table_.shape
        return float(2 * width**2 + 3 * count * width)

    def restore(self, arrays: Arrays) -> None:
        """Set `arrays_` from a folder; ValueError if the shapes are inconsistent."""
        table, lengths, groups = arrays["table"], arrays["lengths"], arrays["groups"]
        self.longest_ = int(lengths.max())
        cuts = (self.longest_ + 2 * self.stride - 1) // self.stride
        shape = len(lengths), cuts, len(self.names)
        if table.shape != shape or groups.shape != lengths.shape or lengths.min() < 1:
            raise ValueError("arrays that do not fit each other")
        self._set(table, lengths, groups)

    def _donors(self, cut: int, row: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        donors = np.flatnonzero(self.lengths_ > cut * self.stride)
        if self.neighbours is None or len(donors) <= self.neighbours:
            return donors
        if cut not in self._spaces:
            inputs = self.table_[donors, cut].astype(np.float64)
            increments = self.table_[donors, -1] - inputs
            head = scaled_ridge(self.alpha).fit(inputs, increments)
            scale = np.maximum(increments.std(axis=0), _TINY)
            self._spaces[cut] = head, scale, head.predict(inputs) / scale
        # The ridge at the cut, the unit of its outputs, and the donors' positions.
        head, scale, places = self._spaces[cut]
        place = head.predict(row[None].astype(np.float64))[0] / scale
        distances = ((places - place) ** 2).sum(axis=1)
        return donors[np.argsort(distances, kind="stable")[: self.neighbours]]


def load_dynamics(
    folder: str | Path, tokenizer: Tokenizer, features: Sequence[TextFeature] = DEFAULT_FEATURES
) -> Dynamics:
    """Load dynamics saved by `Dynamics.save`, with the same policy and features as in the fit.

    Functions are not saved, so pass your own features again.

    Raises:
        WorldModelError: The folder has no world model or a damaged one, or one with another format,
            other features or another language model.

    Example:
        >>> dynamics = load_dynamics("world", lm)  # doctest: +SKIP
    """
    from mbrl_text_env.world_model.ensemble import EnsembleDynamics

    kinds: dict[str, type[IncrementDynamics | EnsembleDynamics]] = {
        kind.kind: kind for kind in (IncrementDynamics, EnsembleDynamics)
    }
    with FOLDER.reading(folder) as (config, arrays):
        if config["kind"] not in kinds:
            raise ValueError(f"kind {config['kind']!r}, expected one of {list(kinds)}")
        dynamics = kinds[config["kind"]](tokenizer, features, **config["settings"])
        names, own = config["features"], list(dynamics.features.names)
        if names != own:
            raise ValueError(f"features {sorted({*names} ^ {*own})} that it or the caller lacks")
        name, found = config["language_model"], policy_of(tokenizer)
        if found is not None and found != name:
            raise ValueError(f"the language model {name!r}, expected {found!r}")
        dynamics.constant_, dynamics.language_model_name_ = tuple(config["constant"]), name
        dynamics.restore(arrays())
    return dynamics
