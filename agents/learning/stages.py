"""What the loop's stages are made of: their notes and folders, improvers, and value models.

A stage is a folder and a note, which is written last: a folder without its note is what a kill left
behind; it is removed, and the stage is made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mbrl_text_env.agents.learning.lora import FineTuneSettings, fine_tune, serve
from mbrl_text_env.agents.learning.presets import LoopSettings
from mbrl_text_env.agents.learning.reports import write_json
from mbrl_text_env.agents.values import READY, FittedValue, load_value, make_value
from mbrl_text_env.encoders import Encoder
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.records import Record
from mbrl_text_env.rewards.base import ObjectReward, RewardModel, Scores, score_responses
from mbrl_text_env.runs import read_config
from mbrl_text_env.types import FloatArray, Ledger, Prompt, Usage
from mbrl_text_env.values import ValueModel, check_value_fits

STAGES = ("collected", "selected", "policy", "validation", "value")
"""In the order in which they are made; the first three are not there for the base model."""

# What transformers accepts as a seed.
_SEEDS = 2**31
_MODEL = "model"


class LoopError(RuntimeError):
    """A loop that cannot go on, or a folder that is not one of this loop."""


class NoSignalError(LoopError):
    """All answers have the same score: there is nothing to learn."""


@dataclass(frozen=True)
class Stage:
    """One of `STAGES` of an iteration (0 for the base model), in the iteration's folder `root`."""

    iteration: int
    name: str
    root: Path

    @property
    def folder(self) -> Path:
        """Where its data lie."""
        return self.root / self.name

    @property
    def note(self) -> Path:
        """What says that it is whole."""
        return self.root / f"{self.name}.json"

    @property
    def is_done(self) -> bool:
        """Whether it is whole."""
        return self.note.is_file()

    def begin(self) -> None:
        """Remove what a kill left behind, and make the folder of the iteration."""
        self.root.mkdir(parents=True, exist_ok=True)
        # Names that begin with a dot are of files and folders that were being written.
        for left in (self.folder, *self.root.glob(f".{self.name}[-.]*")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)

    def end(self, values: Mapping[str, Any]) -> None:
        """Write the note."""
        write_json(self.note, values)

    def read(self) -> dict[str, Any]:
        """The note; `LoopError` where it is not there, or damaged."""
        if not self.is_done:
            raise LoopError(
                f"{self.root}: iteration {self.iteration} has no {self.name!r}: the loop has not "
                "come to it yet, has none, or stopped before. Ask for another iteration."
            )
        try:
            return read_config(self.note, LoopError)
        except LoopError as error:
            again = "those of the stages and iterations after it; the loop then makes them again."
            raise LoopError(f"{error} Or remove the file, and {again}") from error


@contextmanager
def told_where(folder: str | Path, where: str) -> Iterator[None]:
    """Say how to go on after Ctrl-C, or (`LoopError`) when nothing can be written."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if str(stopped).startswith("Stopped in"):
            raise
        told = f" ({stopped})" if str(stopped) else ""
        raise KeyboardInterrupt(
            f"Stopped in {where}{told}. All stages before it are kept in {folder}: the same call "
            "goes on with this one."
        ) from stopped
    except OSError as error:
        raise LoopError(
            f"{folder}, {where}: it cannot be written or read ({error}). Free some space, or fix "
            "the folder's permissions; then the same call goes on with this stage."
        ) from error


@dataclass(frozen=True)
class Improvement:
    """What an improver learned, what that took, and what else there is to say, as JSON values."""

    num_examples: int
    usage: Usage = field(default_factory=Usage)
    details: Mapping[str, Any] = field(default_factory=dict)


class Improver(Protocol):
    """Makes a policy's folder from answers, and a language model from a policy's folder.

    Example:
        >>> class Copying:  # always serves the base
        ...     def described(self):
        ...         return {"kind": "copying"}
        ...     def improve(self, base, records, folder, *, start_from=None, seed=0):
        ...         Path(folder).mkdir()
        ...         return Improvement(len(records))
        ...     def serve(self, base, folder):
        ...         return base
    """

    def described(self) -> Mapping[str, Any]:
        """Kind and settings, as JSON values: all that its results depend on."""
        ...

    def improve(
        self,
        base: LanguageModel,
        records: Sequence[Record],
        folder: Path,
        *,
        start_from: Path | None = None,
        seed: int = 0,
    ) -> Improvement:
        """Write a policy that gives the recorded answers (at least two) more often.

        The folder is written as a whole or not at all. It goes on from the policy in `start_from`,
        or from the base. All randomness follows from the seed.
        """
        ...

    def serve(self, base: LanguageModel, folder: Path) -> LanguageModel:
        """The policy of a folder, with the base's tokens and a name that no other policy has.

        By the name a value model knows whose responses it was fitted on.
        """
        ...


@dataclass(eq=False)
class LoraImprover:
    """Supervised fine-tuning with LoRA: `fine_tune`, whose seed is the loop's."""

    settings: FineTuneSettings = field(default_factory=FineTuneSettings)

    def described(self) -> Mapping[str, Any]:
        """The settings."""
        settings = asdict(self.settings)
        settings.pop("seed")
        return {"kind": "lora", **settings}

    def improve(
        self,
        base: LanguageModel,
        records: Sequence[Record],
        folder: Path,
        *,
        start_from: Path | None = None,
        seed: int = 0,
    ) -> Improvement:
        """Tune an adapter; see `fine_tune`, which raises the same."""
        settings = replace(self.settings, seed=seed % _SEEDS)
        report = fine_tune(_trainable(base), records, folder, settings, start_from=start_from)
        usage = Usage(lm_flops=report.flops, seconds=report.seconds)
        return Improvement(report.num_examples, usage, report.to_dict())

    def serve(self, base: LanguageModel, folder: Path) -> LanguageModel:
        """The base with the adapter, named after the adapter's weights."""
        return serve(_trainable(base), folder)


def _trainable(base: LanguageModel) -> Any:
    if not hasattr(base, "with_adapter"):
        raise TypeError(
            f"Expected a language model that runs here (TransformersLM) to fine-tune, got "
            f"{base.name!r} ({type(base).__name__}). Load it here, or give the loop an improver "
            "of its own."
        )
    return base


ValueFactory = Callable[[LanguageModel, RewardModel], FittedValue]
"""Makes a value model to fit, of a class that `load_value` reads."""


class _Charged(ObjectReward):
    """A reward model that charges a ledger for all that it scores; fits charge nothing."""

    def __init__(self, reward_model: RewardModel, ledger: Ledger) -> None:
        super().__init__(reward_model)
        self._ledger = ledger

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> FloatArray:
        return self.score_parts(prompts, responses).total

    def score_parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scores:
        charged = [self._ledger] * len(responses)
        return score_responses(self.reward, prompts, responses, ledgers=charged)


@dataclass
class LoopValues:
    """Makes, keeps and reads a loop's value models; the fields are `ExpertIteration`'s."""

    settings: LoopSettings
    reward_model: RewardModel
    encoder: Encoder | None
    factory: ValueFactory | None
    first: FittedValue | None

    @property
    def is_wanted(self) -> bool:
        """Whether the loop has a value model."""
        given = (self.settings.value, self.factory, self.first)
        return any(part is not None for part in given)

    @property
    def is_ready(self) -> bool:
        """Whether it needs no fit, and is that of any policy."""
        return self.settings.value in READY and self.factory is None and self.first is None

    def load(self, folder: Path, policy: LanguageModel) -> ValueModel:
        """The value model of a stage's folder; `ValueModelError` if it is another policy's."""
        return self._made(policy, self.reward_model) if self.is_ready else self.read(folder, policy)

    def read(self, folder: Path, policy: LanguageModel) -> FittedValue:
        """A fitted value model."""
        return load_value(folder / _MODEL, policy, self.reward_model, self.encoder)

    def keep(self, value: FittedValue, folder: Path, policy: LanguageModel) -> FittedValue:
        """Write it and read it again: what looks into a policy then looks into this one."""
        check_value_fits(value, policy, self.reward_model)
        value.save(folder / _MODEL)
        return self.read(folder, policy)

    def fitted(
        self, records: Sequence[Record], policy: LanguageModel, ledger: Ledger
    ) -> FittedValue:
        """Fitted, and to be kept: this one goes on charging the ledger."""
        value = self._made(policy, _Charged(self.reward_model, ledger))
        assert isinstance(value, FittedValue)
        return value.fit(records)

    def _made(self, policy: LanguageModel, reward_model: RewardModel) -> ValueModel:
        if self.factory is not None:
            return self.factory(policy, reward_model)
        settings = self.settings
        if settings.value is None:
            raise ValueError(
                "value_model: expected settings.value or a value_factory beside it, which say what "
                "is fitted for the next policies; got neither."
            )
        limits = {"max_response_tokens": settings.max_response_tokens, "seed": settings.seed}
        return make_value(settings.value, policy, reward_model, encoder=self.encoder, **limits)
