"""How a policy is made to give selected answers more often."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from mbrl_text_env.agents.learning.fine_tuning import FineTuneSettings, fine_tune
from mbrl_text_env.agents.learning.lora import serve
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.ledger import Usage
from mbrl_text_env.records import Record

if TYPE_CHECKING:
    from mbrl_text_env.language_models import TransformersLM

# What transformers accepts as a seed.
_SEEDS = 2**31


@dataclass(frozen=True)
class Improvement:
    """What an improver did.

    Args:
        num_examples: Records that were learned.
        usage: What it took.
        details: What else there is to say. JSON values.
    """

    num_examples: int
    usage: Usage = field(default_factory=Usage)
    details: Mapping[str, Any] = field(default_factory=dict)


class Improver(Protocol):
    """Makes a policy's folder from answers, and a language model from a policy's folder.

    Example:
        >>> class Copying:  # serves the base, whatever it is shown
        ...     def described(self):
        ...         return {"kind": "copying"}
        ...     def improve(self, base, records, folder, *, start_from=None, seed=0):
        ...         Path(folder).mkdir()
        ...         return Improvement(len(records))
        ...     def serve(self, base, folder):
        ...         return base
    """

    def described(self) -> Mapping[str, Any]:
        """Kind and settings, as JSON values: whatever its results depend on."""
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
        """Write a policy that gives the recorded answers more often.

        Args:
            base: The base model.
            records: At least two.
            folder: Where the policy is written, as a whole or not at all.
            start_from: Folder of a policy to go on from; None for the base.
            seed: All randomness follows from it.
        """
        ...

    def serve(self, base: LanguageModel, folder: Path) -> LanguageModel:
        """The policy of a folder, with the base's tokens and a name of its own.

        The name differs between policies, since it is how a value model knows whose responses it
        was fitted on.
        """
        ...


class LoraImprover:
    """Supervised fine-tuning with LoRA: `fine_tune`.

    Args:
        settings: See `FineTuneSettings`; None for its defaults, which are the article's. Its seed
            is replaced by the loop's.
    """

    def __init__(self, settings: FineTuneSettings | None = None) -> None:
        self.settings = FineTuneSettings() if settings is None else settings

    def described(self) -> Mapping[str, Any]:
        """The settings."""
        settings = dataclasses.asdict(self.settings)
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
        settings = dataclasses.replace(self.settings, seed=seed % _SEEDS)
        report = fine_tune(_trainable(base), records, folder, settings, start_from=start_from)
        usage = Usage(lm_flops=report.flops, seconds=report.seconds)
        return Improvement(report.num_examples, usage, report.to_dict())

    def serve(self, base: LanguageModel, folder: Path) -> LanguageModel:
        """The base with the adapter, named after the adapter's weights."""
        return serve(_trainable(base), folder)


def _trainable(base: LanguageModel) -> TransformersLM:
    if not hasattr(base, "with_adapter"):
        raise TypeError(
            f"Expected a language model that runs here (TransformersLM) to fine-tune, got "
            f"{base.name!r} ({type(base).__name__}). Load it here, or give the loop an improver "
            "of its own."
        )
    return cast("TransformersLM", base)
