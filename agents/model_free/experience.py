"""What policies learn from: responses to a step's prompts, and their scores."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl_text_env.agents.learning.lora import TuningError
from mbrl_text_env.agents.model_free.policy_gradient import FLAT, USAGE, PolicyGradientSettings
from mbrl_text_env.language_models.base import SamplingParams, spawn_seed
from mbrl_text_env.ledger import Ledger
from mbrl_text_env.mdp import initial, response_limit
from mbrl_text_env.rewards.base import RewardModel, reward_name, score_responses
from mbrl_text_env.rewards.learning.lora_classifier import quiet
from mbrl_text_env.types import Prompt

if TYPE_CHECKING:
    from mbrl_text_env.language_models import TransformersLM

# Forward passes' worth of work a token: the loss, the gradients of the activations (frozen weights
# have none), and for RLOO the log-probabilities before the step.
_PASSES = {"grpo": 2, "rloo": 3}


class Experience:
    """Samples and scores the responses of each step.

    To TRL a prompt is its id, so that neither its metadata nor its tokens change on their way
    through a data set. Its trainers call `sample` and, as a reward function, the object itself.
    """

    def __init__(
        self,
        algorithm: str,
        language_model: TransformersLM,
        reward_model: RewardModel,
        prompts: Sequence[Prompt],
        settings: PolicyGradientSettings,
    ) -> None:
        self.algorithm = algorithm
        self.language_model = language_model
        self.reward_model = reward_model
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.settings = settings
        self.__name__ = reward_name(reward_model)
        self._ledger = Ledger()

    def rows(self) -> list[str]:
        """Ids of the prompts of all steps, in their order: each pass in another random order.

        A trainer that goes on from a checkpoint skips the steps that are done, and then needs the
        rest in the order of the first run, which TRL's own sampler has for the first pass alone.
        """
        rng = np.random.default_rng(self.settings.seed)
        ids: list[str] = []
        wanted = self.settings.steps * self.settings.prompts_per_step
        # What a pass has beyond whole steps is left out of it, so that no step has a prompt twice.
        whole = len(self.prompts) - len(self.prompts) % self.settings.prompts_per_step
        while len(ids) < wanted:
            ids += rng.permutation(list(self.prompts)).tolist()[:whole]
        return ids[:wanted]

    def sample(self, ids: Sequence[str], trainer: Any) -> dict[str, Any]:
        """Draw the responses of a step with the policy as it is now.

        Args:
            ids: Prompts of the step, each `num_generations` times in a row.
            trainer: TRL's.

        Returns:
            Token ids of prompts and responses; log-probabilities are left to TRL, which computes
            them at the temperature.
        """
        settings = self.settings
        chosen = [self.prompts[i] for i in ids[:: settings.num_generations]]
        self._ledger = Ledger()
        ledgers = [Ledger() for _ in chosen]
        policy = self._policy(trainer.model)
        states = [initial(prompt, policy) for prompt in chosen]
        room = min(response_limit(s, policy, settings.max_completion_length) for s in states)
        rows = policy.sample(
            states,
            settings.num_generations,
            room,
            seeds=[spawn_seed(settings.seed, trainer.state.global_step)] * len(states),
            params=SamplingParams(temperature=settings.temperature),
            ledgers=ledgers,
        )
        for ledger in ledgers:
            self._ledger.charge(ledger.usage)
        return {
            "prompt_ids": [
                list(state.prompt_ids) for state, row in zip(states, rows, strict=True) for _ in row
            ],
            "completion_ids": [list(chunk.token_ids) for row in rows for chunk in row],
            "logprobs": None,
        }

    def _policy(self, model: Any) -> TransformersLM:
        """The language model with the adapter as it is now, as it would be served."""
        with quiet(), tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(
                folder, selected_adapters=["default"], save_embedding_layers=False
            )
            return self.language_model.with_adapter(folder, self.language_model.name)

    def __call__(
        self,
        prompts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        trainer_state: Any,
        log_metric: Any,
        **columns: Any,
    ) -> list[float]:
        """Score the responses of a step, and log what it took.

        Raises:
            RewardError: The reward failed.
            TuningError: There is nothing to learn.
        """
        of_responses = [self.prompts[i] for i in prompts]
        ledgers = [Ledger() for _ in prompts]
        scores = score_responses(
            self.reward_model,
            of_responses,
            [self.language_model.decode(ids) for ids in completion_ids],
            ledgers=ledgers,
        ).total
        flat_share = self._check_signal(scores, trainer_state.log_history)
        log_metric(FLAT, flat_share)
        for ledger in ledgers:
            self._ledger.charge(ledger.usage)
        for name, amount in self._ledger.usage.as_dict().items():
            log_metric(USAGE + name, amount)
        log_metric(USAGE + "training_flops", self._training_flops(of_responses, completion_ids))
        return [float(score) for score in scores]

    def _training_flops(
        self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]]
    ) -> float:
        lm = self.language_model
        lengths = [
            len(lm.encode_prompt(prompt)) + len(ids)
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        passes = _PASSES[self.algorithm] + (self.settings.beta > 0)
        return passes * sum(lm.usage_bound(length, []).lm_flops for length in lengths)

    def _check_signal(self, scores: Any, log_history: Sequence[Mapping[str, Any]]) -> float:
        """Share of groups whose scores are all the same, which leaves nothing to learn from.

        Raises:
            TuningError: There were no others in all of the first steps.
        """
        groups = np.reshape(scores, (-1, self.settings.num_generations))
        flat = np.ptp(groups, axis=1) == 0
        if flat.all():
            before = [entry[FLAT] for entry in log_history if FLAT in entry]
            said = (
                f"Reward model {self.__name__!r} gave all {self.settings.num_generations} "
                f"responses to a prompt the same score (prompts' scores: {groups.min():.4g} to "
                f"{groups.max():.4g})"
            )
            if all(share == 1 for share in before) and len(before) + 1 >= self.settings.flat_steps:
                raise TuningError(
                    f"{said} in all of the first {len(before) + 1} steps: there is no learning "
                    "signal. Choose another reward or easier prompts, raise temperature or "
                    "num_generations, or raise flat_steps to go on looking."
                )
            warnings.warn(f"{said}: step {len(before) + 1} teaches nothing.", stacklevel=2)
        return float(flat.mean())
