"""GRPO and RLOO: train policies on any reward with TRL's trainers and LoRA.

TRL computes advantages, losses and updates; prompts, sampling and scores are this package's.
`train_dyna` is GRPO with a learned head that replaces most reward calls.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl_text_env.agents.learning import lora, training
from mbrl_text_env.agents.learning.training import CURVE, LEDGER, TuningError, expect
from mbrl_text_env.language_models.base import SamplingParams, spawn_seed
from mbrl_text_env.mdp import initial, response_limit
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import RewardModel, reward_name, score_responses
from mbrl_text_env.rewards.learning.lora_classifier import quiet
from mbrl_text_env.runs import identity, prompt_digests
from mbrl_text_env.types import Ledger, Prompt, Usage

if TYPE_CHECKING:
    from mbrl_text_env.language_models import TransformersLM
    from mbrl_text_env.rewards.learning.features import Features

USAGE, FLAT = "usage/", "flat_share"
"""Names in the trainer's log, which checkpoints save: a prefix, and the share of flat groups."""

# Work per token in forward passes: the loss and the activation gradients (frozen weights have
# none), and for RLOO also the log-probabilities before the step.
_PASSES = {"grpo": 2, "rloo": 3}


@dataclass(frozen=True)
class PolicyGradientSettings(lora.AdapterSettings):
    """GRPO and RLOO settings; for the adapter's fields see `AdapterSettings`.

    Args:
        steps: Number of optimizer steps.
        num_generations: Responses per prompt in a step (the group size), at least 2.
        max_completion_length: Maximum number of tokens in a response.
        learning_rate: Initial learning rate; it decays linearly to 0.
        beta: Coefficient of the KL divergence from the initial policy; 0 skips its computation.
        batch_size: Responses per forward pass; a divisor of the responses per step.
        save_steps: Steps between checkpoints.
        flat_steps: An error is raised if in this many first steps all groups have equal scores.
    """

    steps: int = 60
    prompts_per_step: int = 4
    num_generations: int = 8
    max_completion_length: int = 64
    temperature: float = 0.7
    learning_rate: float = 1e-3
    beta: float = 0.0
    batch_size: int = 16
    save_steps: int = 10
    flat_steps: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("steps", "prompts_per_step", "max_completion_length", "batch_size")
        rates = ("temperature", "learning_rate", "save_steps", "flat_steps")
        training.check_above_zero(self, *counts, *rates)
        judged = "at least 2, because responses are compared with each other"
        expect(self, "num_generations", self.num_generations >= 2, judged)
        expect(self, "beta", self.beta >= 0, "0 or more")
        count = self.responses_per_step
        divisor = f"a divisor of prompts_per_step * num_generations ({count})"
        expect(self, "batch_size", count % self.batch_size == 0, divisor)

    @property
    def responses_per_step(self) -> int:
        """Number of responses that each step samples and learns from."""
        return self.prompts_per_step * self.num_generations


@dataclass(frozen=True)
class StepReport:
    """One training step (numbered from 1), with the mean score of its responses.

    `flat_share` is the fraction of prompts whose responses all have the same score, which teach
    nothing. `kl` is the divergence (nats per token) from the initial policy; None if beta is 0.
    """

    step: int
    reward: float
    reward_std: float
    flat_share: float
    mean_tokens: float
    kl: float | None = None

    @classmethod
    def from_log(cls, entry: Mapping[str, Any]) -> StepReport:
        """Read a step from the trainer's log."""
        same = {name: entry[name] for name in ("step", "reward", "reward_std", FLAT)}
        return cls(**same, mean_tokens=entry["completions/mean_length"], kl=entry.get("kl"))


@dataclass(frozen=True, kw_only=True)
class PolicyGradientReport(training.TrainingReport):
    """Results and cost of a training, with one curve entry per step; see `TrainingReport`.

    The `seconds` of its usage cover all steps, including updates, each counted once.
    """

    reward_name: str
    language_model: str
    curve: tuple[StepReport, ...]

    @classmethod
    def from_log(cls, log_history: Sequence[Mapping[str, Any]], **names: str) -> Any:
        """Read all steps from the trainer's log."""
        steps = [entry for entry in log_history if "reward" in entry]

        def total(name: str) -> float:
            return float(sum(entry[name] for entry in steps))

        # The log stores float32, which is exact for counts up to 2**24.
        amounts: dict[str, Any] = {
            f.name: round(total(USAGE + f.name)) if f.type == "int" else total(USAGE + f.name)
            for f in fields(Usage)
        }
        return cls(
            **names,
            curve=tuple(map(StepReport.from_log, steps)),
            usage=Usage(**{**amounts, "seconds": total("step_time")}),
            training_flops=total(USAGE + "training_flops"),
        )

    def ledger(self) -> dict[str, Any]:
        """The cost of training, as JSON values."""
        names = {"reward": self.reward_name, "language_model": self.language_model}
        return super().ledger() | names | {"steps": len(self.curve)}


_DEFAULTS = PolicyGradientSettings()


def train_grpo(
    language_model: TransformersLM,
    reward_model: Any,
    prompts: Sequence[Prompt],
    folder: str | Path,
    settings: PolicyGradientSettings = _DEFAULTS,
    *,
    start_from: str | Path | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> PolicyGradientReport:
    """Train a LoRA adapter with Group Relative Policy Optimization.

    Each step samples a group of responses for each of several prompts. Responses that score above
    the group's mean become more likely, in units of the group's standard deviation.

    Source: Shao et al., "DeepSeekMath", 2024, by TRL's `GRPOTrainer`. Deviations, which are TRL's
    defaults: token losses are averaged over the batch (DAPO, Yu et al., 2025) instead of over each
    response; one update per sample, so nothing is clipped; no KL penalty unless `beta` is set.
    Interruption, checkpoints and the output folder work as in `fine_tune`.

    Args:
        language_model: The base model. It samples in its own number format; with int8 or bfloat16
            products, samples differ slightly from the float32 distribution that is trained.
        reward_model: Anything that `as_reward_model` accepts.
        prompts: At least `settings.prompts_per_step` prompts with distinct ids.
        folder: Output folder of the adapter, with `ledger.json` and `curve.json`; load it with
            `mbrl_text_env.agents.learning.serve`.
        start_from: Folder of an adapter to continue from; None for a new one.
        on_step: Called after each step, for progress.

    Raises:
        TuningError: Prompts are missing, duplicated or unsuited to this reward, every group in the
            first steps has equal scores, or an error of `fine_tune`.
        RewardError: The reward failed, or `trl` or `peft` is not installed.
        KeyboardInterrupt: The run was stopped; a checkpoint is saved and the same call resumes it.

    Example:
        >>> report = train_grpo(embedded(), make("sentiment"), prompts, "kind")  # doctest: +SKIP
        >>> policy = serve(embedded(), "kind")  # doctest: +SKIP
    """
    experience = Experience("grpo", language_model, reward_model, prompts, settings)
    return experience.train(folder, start_from, on_step)


def train_rloo(
    language_model: TransformersLM,
    reward_model: Any,
    prompts: Sequence[Prompt],
    folder: str | Path,
    settings: PolicyGradientSettings = _DEFAULTS,
    *,
    start_from: str | Path | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> PolicyGradientReport:
    """Train a LoRA adapter with REINFORCE Leave-One-Out; arguments and errors: `train_grpo`.

    The baseline of a response is the mean score of the others in its group, in units of the reward.
    The loss uses the probability of the whole response, and `beta` its KL divergence.

    Source: Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning
    from Human Feedback in LLMs", 2024, by TRL's `RLOOTrainer`. Deviation: TRL clips the ratio of
    probabilities as PPO does; with one update per sample, the ratio is 1.
    """
    experience = Experience("rloo", language_model, reward_model, prompts, settings)
    return experience.train(folder, start_from, on_step)


class Experience:
    """Samples and scores each step's responses; called by TRL's trainers.

    TRL gets prompt ids instead of prompts, so that metadata and tokens are not changed.
    """

    def __init__(
        self,
        algorithm: str,
        language_model: TransformersLM,
        reward_model: Any,
        prompts: Sequence[Prompt],
        settings: PolicyGradientSettings,
    ) -> None:
        self.algorithm, self.language_model, self.settings = algorithm, language_model, settings
        self.reward_model: RewardModel = as_reward_model(reward_model)
        listed = as_prompts(prompts)
        models = self.reward_model, language_model
        training.check_prompts(listed, *models, least=settings.prompts_per_step)
        self.prompts = {prompt.id: prompt for prompt in listed}
        self.__name__ = reward_name(self.reward_model)
        self._ledger = Ledger()

    def train(
        self,
        folder: str | Path,
        start_from: str | Path | None,
        on_step: Callable[[StepReport], None] | None,
    ) -> PolicyGradientReport:
        """Run or resume the training to the end and write the adapter; see `train_grpo`."""
        lm, settings = self.language_model, self.settings
        described = {
            "algorithm": self.algorithm,
            "dtype": str(lm.dtype),
            "reward": identity(self.reward_model),
            "prompts": [*prompt_digests([*self.prompts.values()]).items()],
        }
        make = functools.partial(_trainer, self, on_step)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'")
            trainer = lora.train_adapter(lm, folder, settings, start_from, described, make)
        names = {"reward_name": self.__name__, "language_model": lm.name}
        names["algorithm"] = self.algorithm
        report: PolicyGradientReport = PolicyGradientReport.from_log(
            trainer.state.log_history, **names
        )
        notes = {LEDGER: report.ledger(), CURVE: [asdict(step) for step in report.curve]}
        lora.write(folder, trainer.model, lm, notes)
        return report

    def rows(self) -> list[str]:
        """Prompt ids of all steps, with a new random order for each epoch.

        The order of TRL's own sampler would change after resuming from a checkpoint.
        """
        rng = np.random.default_rng(self.settings.seed)
        ids: list[str] = []
        wanted = self.settings.steps * self.settings.prompts_per_step
        # Drop the rest of an epoch that does not fill a step, so that no step repeats a prompt.
        whole = len(self.prompts) - len(self.prompts) % self.settings.prompts_per_step
        while len(ids) < wanted:
            ids += rng.permutation(list(self.prompts)).tolist()[:whole]
        return ids[:wanted]

    def sample(self, ids: Sequence[str], trainer: Any) -> dict[str, Any]:
        """Sample a step's responses with the current policy; `ids` has one entry per response."""
        settings, count = self.settings, self.settings.num_generations
        self._ledger = Ledger()
        # The policy is loaded as for inference.
        with quiet(), tempfile.TemporaryDirectory() as folder:
            trainer.model.save_pretrained(
                folder, selected_adapters=["default"], save_embedding_layers=False
            )
            policy = self.language_model.with_adapter(folder, self.language_model.name)
        states = [initial(self.prompts[i], policy) for i in ids[::count]]
        rows = policy.sample(
            states,
            count,
            min(response_limit(s, policy, settings.max_completion_length) for s in states),
            seeds=[spawn_seed(settings.seed, trainer.state.global_step)] * len(states),
            params=SamplingParams(temperature=settings.temperature),
            ledgers=[self._ledger] * len(states),
        )
        return {
            "prompt_ids": [list(s.prompt_ids) for s in states for _ in range(count)],
            "completion_ids": [list(chunk.token_ids) for row in rows for chunk in row],
            "logprobs": None,
        }

    def __call__(
        self,
        prompts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        trainer_state: Any,
        log_metric: Any,
        **columns: Any,
    ) -> list[float]:
        """Score the responses of a step and log the usage."""
        lm, asked = self.language_model, [self.prompts[i] for i in prompts]
        texts = [lm.decode(ids) for ids in completion_ids]
        ledgers = [self._ledger] * len(asked)
        scores = score_responses(self.reward_model, asked, texts, ledgers=ledgers).total
        log_metric(FLAT, self._check_signal(scores, trainer_state.log_history))
        for name, amount in self._ledger.usage.as_dict().items():
            log_metric(USAGE + name, amount)
        passes = _PASSES[self.algorithm] + (self.settings.beta > 0)
        forward = sum(
            lm.usage_bound(len(lm.encode_prompt(prompt)) + len(ids), []).lm_flops
            for prompt, ids in zip(asked, completion_ids, strict=True)
        )
        log_metric(USAGE + "training_flops", passes * forward)
        return [float(score) for score in scores]

    def _check_signal(self, scores: Any, log_history: Sequence[Mapping[str, Any]]) -> float:
        """Fraction of groups with equal scores; raise if all groups of the first steps are."""
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
                    "num_generations, or raise flat_steps to continue."
                )
            warnings.warn(f"{said}: step {len(before) + 1} teaches nothing.", stacklevel=2)
        return float(flat.mean())


def _trainer(
    experience: Experience,
    on_step: Callable[[StepReport], None] | None,
    common: Mapping[str, Any],
    **parts: Any,
) -> Any:
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class ReportSteps(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_step is not None and "reward" in state.log_history[-1]:
                on_step(StepReport.from_log(state.log_history[-1]))

    class SampledRLOOTrainer(trl.RLOOTrainer):  # type: ignore[misc, name-defined, unused-ignore]
        """TRL's `RLOOTrainer` with the `rollout_func` argument of its `GRPOTrainer`."""

        def __init__(self, rollout_func: Any, **options: Any) -> None:
            self._sample = rollout_func
            super().__init__(**options)

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[Any, None, dict[str, Any]]:
            self._sampled = self._sample(prompts, self)
            return self._sampled["prompt_ids"], None, {}

        def _generate_single_turn(self, *inputs: Any) -> Any:
            return self._sampled["completion_ids"]

    settings = experience.settings
    made: dict[str, tuple[Any, Any]] = {
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (SampledRLOOTrainer, trl.RLOOConfig),
    }
    trainer, config = made[experience.algorithm]
    same = ("save_steps", "num_generations", "max_completion_length", "temperature", "beta")
    arguments = config(
        **common,
        **{name: getattr(settings, name) for name in same},
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.responses_per_step // settings.batch_size,
        # The rows are in order already.
        shuffle_dataset=False,
    )
    return trainer(
        args=arguments,
        reward_funcs=experience,
        train_dataset=Dataset.from_dict({"prompt": experience.rows()}),
        callbacks=[ReportSteps()],
        rollout_func=experience.sample,
        **parts,
    )


@dataclass(frozen=True)
class DynaSettings(PolicyGradientSettings):
    """Settings of GRPO with few reward calls; for other fields see `PolicyGradientSettings`.

    Args:
        max_calls: Maximum number of reward calls in total.
        first_calls: Number of first responses that are all scored by the reward.
        calls_per_step: Reward calls per step once there is a head.
        audited: How many of these score random responses, which evaluate the head; the others
            score the responses that the head is least certain of.
        members: Number of heads in the ensemble.
    """

    max_calls: int = 240
    first_calls: int = 32
    calls_per_step: int = 3
    audited: int = 1
    members: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = {"audited": 0, "calls_per_step": self.audited, "first_calls": 2, "members": 2}
        for name, least in {**limits, "max_calls": self.first_calls}.items():
            expect(self, name, getattr(self, name) >= least, f"{least} or more")


def train_dyna(
    language_model: TransformersLM,
    reward_model: Any,
    prompts: Sequence[Prompt],
    folder: str | Path,
    settings: DynaSettings = DynaSettings(),
    *,
    start_from: str | Path | None = None,
    labels: str | Path | None = None,
    features: Features | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> PolicyGradientReport:
    """Train a LoRA adapter with GRPO on a `SurrogateReward`; see `train_grpo` for the rest.

    The reward scores a few responses of each step. A head that is fitted on these scores predicts
    the others. Labels are kept with the head's earlier predictions, which show whether the policy
    has learned to exploit the head. The report's curve has the scores used in training, most of
    them from the head; its usage counts only the calls of the reward.

    Source: Sutton, "Dyna, an Integrated Architecture for Learning, Planning, and Reacting", 1991.
    Deviation: the learned model is of the reward, not of transitions; responses are the policy's
    own, because sampling is cheap compared with the update.

    Args:
        labels: Folder of the labels; `<folder>-labels` by default. The labels and calls of an
            earlier training on the same reward in this folder count.
        features: See `SurrogateReward`; None for the language model's `TokenFeatures`.

    Example:
        >>> report = train_dyna(embedded(), make("sentiment"), prompts, "kind")  # doctest: +SKIP
        >>> report.usage.reward_calls  # doctest: +SKIP
        240
    """
    from mbrl_text_env.rewards.learning.features import TokenFeatures
    from mbrl_text_env.rewards.learning.surrogate import SurrogateReward

    names = ("max_calls", "first_calls", "audited", "members")
    reward = SurrogateReward(
        reward_model,
        labels_of(Path(folder)) if labels is None else labels,
        features=TokenFeatures(language_model) if features is None else features,
        calls_per_batch=settings.calls_per_step,
        **{name: getattr(settings, name) for name in names},
    )
    given = (language_model, reward, prompts, folder, settings)
    return train_grpo(*given, start_from=start_from, on_step=on_step)


def labels_of(folder: Path) -> Path:
    """Folder of a training's labels, next to its policy."""
    return folder.with_name(f"{folder.name}-labels")
