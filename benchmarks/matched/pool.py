"""Best-of-N's pool: many scored responses to each prompt, with what each of them costs.

From one pool the mean reward of best-of-N follows without bias for every N, so best-of-N is never
run again for another budget. All rewards score the same responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbrl_text_env.benchmarks.audit.pool import fill_pool, score_pool
from mbrl_text_env.language_models.base import LanguageModel
from mbrl_text_env.records import Record
from mbrl_text_env.rewards.base import RewardModel
from mbrl_text_env.types import FloatArray, Prompt, Usage, initial


@dataclass(frozen=True)
class Pool:
    """Scored samples of P prompts, n to each.

    Args:
        prompt_ids: The P prompts.
        scores: float64[P, n].
        tokens: float64[P, n], generated tokens of each sample.
        flops: float64[P, n], floating-point operations of each sample, those of its score included
            and those of its prompt not.
        prompt_flops: float64[P], floating-point operations of the prompt, which best-of-N computes
            once.
        logprobs: float64[P, n], summed log-probability (nats) of each sample.
    """

    prompt_ids: tuple[str, ...]
    scores: FloatArray
    tokens: FloatArray
    flops: FloatArray
    prompt_flops: FloatArray
    logprobs: FloatArray

    def rows(self, prompt_ids: Sequence[str]) -> Pool:
        """The same for some of the prompts, in their order."""
        place = {name: i for i, name in enumerate(self.prompt_ids)}
        at = [place[name] for name in prompt_ids]
        kept = {name: values[at] for name, values in vars(self).items() if name != "prompt_ids"}
        return Pool(tuple(prompt_ids), **kept)


def make_pool(
    folder: Path,
    scores_folder: Path,
    language_model: LanguageModel,
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    max_response_tokens: int,
    seed: int,
    on_batch: Callable[[int], None] | None = None,
) -> Pool:
    """Read the pool of some prompts; what is missing is generated and scored, and kept.

    Args:
        folder: Records of all prompts and rewards.
        scores_folder: Scores of this reward.
        language_model: Writes the responses, at temperature 0.7.
        reward_model: Scores them.
        prompts: P prompts that the reward applies to.
        samples: n.
        max_response_tokens: See `benchmarks.audit.pool.fill_pool`, as of the rest.
        seed: Of the sampling.
        on_batch: Called with the number of responses that are there, for progress.

    Raises:
        AuditError: The folder holds something else.
        RewardError: The reward model failed.
    """
    records = fill_pool(
        folder,
        language_model,
        prompts,
        samples=samples,
        max_response_tokens=max_response_tokens,
        shared=True,
        seed=seed,
        on_batch=on_batch,
    )
    texts = [[record.response for record in row] for row in records]
    scores, _ = score_pool(scores_folder, reward_model, prompts, texts, tried=0)
    costs = [
        _costs(language_model, reward_model, p, r) for p, r in zip(prompts, records, strict=True)
    ]
    return Pool(
        tuple(prompt.id for prompt in prompts),
        scores,
        _table(records, lambda record: float(len(record.response_ids))),
        np.array([flops for _, flops in costs]),
        np.array([prompt.flops for prompt, _ in costs]),
        _table(records, lambda record: sum(record.logprobs)),
    )


def _costs(
    language_model: LanguageModel,
    reward_model: RewardModel,
    prompt: Prompt,
    records: Sequence[Record],
) -> tuple[Usage, FloatArray]:
    """What the prompt costs, and each sample beside it."""
    start = initial(prompt, language_model)
    prefix = len(start.prompt_ids)
    alone = language_model.usage_bound(prefix, [])
    lengths = [len(record.response_ids) for record in records]
    drawn = {n: (language_model.usage_bound(prefix, [n]) - alone).flops for n in set(lengths)}
    texts = [record.response for record in records]
    scoring = np.asarray(reward_model.flops([prompt] * len(texts), texts), dtype=np.float64)
    return alone, np.array([drawn[n] for n in lengths]) + scoring


def _table(records: Sequence[Sequence[Record]], value: Callable[[Record], float]) -> FloatArray:
    return np.array([[value(record) for record in row] for row in records], dtype=np.float64)
