"""The value models of a study by name, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mbrl_text_env.agents.values import FITTED, READY, FittedValue, make_value
from mbrl_text_env.benchmarks.audit.pool import fill_pool
from mbrl_text_env.benchmarks.compare import choose_prompts
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.prompts import load_prompts
from mbrl_text_env.records import Record
from mbrl_text_env.rewards.base import RewardModel, reward_name, score_responses
from mbrl_text_env.values import ValueModel

_KINDS = (*READY, *FITTED)


class ValueShelf(Mapping[str, ValueModel]):
    """Value models for one reward, by name; the fitted ones are fitted on the training split.

    Args:
        language_model: Whose responses are valued.
        reward_model: Whose scores are predicted.
        folder: Where the records are kept; those that rewards share are generated once.
        prompts: Prompts of the training split.
        samples: Responses to each.
        max_response_tokens: Token limit of a response.
        seed: Of the choice of the prompts and of the sampling.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        reward_model: RewardModel,
        folder: Path,
        *,
        prompts: int,
        samples: int,
        max_response_tokens: int,
        seed: int,
    ) -> None:
        self.language_model = language_model
        self.reward_model = reward_model
        self.folder = folder
        self.prompts = prompts
        self.samples = samples
        self.max_response_tokens = max_response_tokens
        self.seed = seed
        self._made: dict[str, ValueModel] = {}

    def identity(self) -> dict[str, Any]:
        """What the values follow from; none is made for it."""
        names = ("prompts", "samples", "max_response_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def __getitem__(self, name: str) -> ValueModel:
        if name not in _KINDS:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_KINDS)

    def __len__(self) -> int:
        return len(_KINDS)

    def __contains__(self, name: object) -> bool:
        return name in _KINDS

    def _make(self, name: str) -> ValueModel:
        value = make_value(
            name,
            self.language_model,
            self.reward_model,
            max_response_tokens=self.max_response_tokens,
            seed=self.seed,
        )
        if name not in FITTED:
            return value
        assert isinstance(value, FittedValue)
        return value.fit(self.records())

    def records(self) -> list[Record]:
        """The scored responses that the value models are fitted on."""
        chosen = choose_prompts(
            load_prompts(split="train"), self.prompts, self.reward_model, self.seed
        )
        pool = fill_pool(
            self.folder,
            self.language_model,
            chosen,
            samples=self.samples,
            max_response_tokens=self.max_response_tokens,
            shared=True,
            seed=self.seed,
        )
        records = [record for row in pool for record in row]
        scores = score_responses(
            self.reward_model,
            [record.prompt() for record in records],
            [record.response for record in records],
        )
        name = reward_name(self.reward_model)
        return [
            replace(
                record,
                score=float(scores.total[i]),
                rewards=dict(scores.parts_of(i)),
                reward_name=name,
            )
            for i, record in enumerate(records)
        ]
