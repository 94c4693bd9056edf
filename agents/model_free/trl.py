"""GRPO and RLOO: policies that learn from any reward, through TRL's trainers and LoRA.

TRL computes advantages, losses and updates; prompts, sampling and scores are the package's own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbrl_text_env.agents.learning.lora import (
    adapter_digest,
    base_of,
    check_target,
    tokenizer_of,
    trainable,
    write,
)
from mbrl_text_env.agents.learning.training import (
    checkpoints_of,
    claim,
    common_arguments,
    run,
    storage,
)
from mbrl_text_env.agents.model_free.experience import Experience
from mbrl_text_env.agents.model_free.policy_gradient import (
    PolicyGradientReport,
    PolicyGradientSettings,
    StepReport,
)
from mbrl_text_env.agents.model_free.train_prompts import check_prompts
from mbrl_text_env.identity import identity
from mbrl_text_env.prompts import as_prompts
from mbrl_text_env.rewards.adapters import as_reward_model
from mbrl_text_env.rewards.base import reward_name
from mbrl_text_env.rewards.learning.lora_classifier import quiet, required
from mbrl_text_env.training import own_randomness
from mbrl_text_env.types import Prompt

if TYPE_CHECKING:
    from mbrl_text_env.language_models import TransformersLM

LEDGER, CURVE = "ledger.json", "curve.json"
"""Files beside the adapter: what training took, and the reward at each step."""

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

    Each step samples several responses to each of a few prompts, and makes those likelier that
    score above the mean of their group, in units of its standard deviation.

    Source: Shao et al., "DeepSeekMath", 2024, by TRL's `GRPOTrainer`. Deviations, which are TRL's
    defaults: token losses are averaged over the batch (DAPO, Yu et al., 2025) instead of over each
    response; one update a sample, so that nothing is clipped; no KL penalty unless `beta` asks for
    it. Responses are sampled by the language model as it serves: with int8 or bfloat16 products
    they come from a distribution a little beside the float32 one that is trained.

    Checkpoints lie in `<folder>-checkpoints`, from which a call that was stopped goes on if
    prompts, reward and settings are the same; on a CPU it ends as if it had not been stopped. They
    are removed at the end. They hold the optimizer's state in torch's format and
    `training_args.bin`, a pickle, which nothing here reads: keep checkpoints of others out of that
    folder. The final folder has safetensors and JSON alone, and is there as a whole or not at all.

    Args:
        language_model: The base. It samples all responses, in its own number format; int8 is the
            fastest on a CPU.
        reward_model: A reward model, or whatever `as_reward_model` accepts.
        prompts: With different ids, at least `settings.prompts_per_step`.
        folder: Where the adapter is written, with `ledger.json` and `curve.json`;
            `mbrl_text_env.agents.learning.serve` takes it.
        settings: See `PolicyGradientSettings`.
        start_from: Folder of an adapter to go on training; None for a new one.
        on_step: Called after each step, for progress.

    Raises:
        TuningError: There are too few prompts, two have one id, the reward does not apply to one,
            it gives all responses of the first steps to a prompt the same score (there is nothing
            to learn), the checkpoints are of another run, or there is no space left.
        RewardError: The reward failed, or `trl` or `peft` is not installed.
        KeyboardInterrupt: It was stopped; a checkpoint is saved and the same call goes on.

    Example:
        >>> report = train_grpo(embedded(), make("sentiment"), prompts, "kind")  # doctest: +SKIP
        >>> report.curve[-1].reward > report.curve[0].reward  # doctest: +SKIP
        True
        >>> policy = serve(embedded(), "kind")  # doctest: +SKIP
    """
    return _train(
        "grpo", language_model, reward_model, prompts, folder, settings, start_from, on_step
    )


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
    """Train a LoRA adapter with REINFORCE Leave-One-Out.

    As `train_grpo`, but a response is judged against the mean score of the others in its group, in
    units of the reward, and its probability counts as a whole.

    Source: Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning
    from Human Feedback in LLMs", 2024, by TRL's `RLOOTrainer`. Deviation: TRL clips the ratio of
    probabilities as PPO does; with one update a sample that ratio is 1.

    Args:
        language_model: See `train_grpo`.
        reward_model: See `train_grpo`.
        prompts: See `train_grpo`.
        folder: See `train_grpo`.
        settings: See `train_grpo`; `beta` weighs the KL divergence of a whole response, which is
            taken off its score.
        start_from: See `train_grpo`.
        on_step: See `train_grpo`.

    Raises:
        TuningError: See `train_grpo`.
        RewardError: See `train_grpo`.
        KeyboardInterrupt: See `train_grpo`.
    """
    return _train(
        "rloo", language_model, reward_model, prompts, folder, settings, start_from, on_step
    )


def _train(
    algorithm: str,
    language_model: TransformersLM,
    reward: Any,
    prompts: Sequence[Prompt],
    folder: str | Path,
    settings: PolicyGradientSettings,
    start_from: str | Path | None,
    on_step: Callable[[StepReport], None] | None,
) -> PolicyGradientReport:
    target = Path(folder)
    check_target(target)
    for package in ("trl", "peft"):
        required(package)
    reward_model, prompts = as_reward_model(reward), as_prompts(prompts)
    check_prompts(prompts, reward_model, language_model, settings.prompts_per_step)
    checkpoints = checkpoints_of(target)
    rows = [[p.id, p.text, json.dumps(dict(p.metadata), default=str)] for p in prompts]
    resumed = claim(
        checkpoints,
        {
            "algorithm": algorithm,
            "settings": asdict(settings),
            "base": base_of(language_model),
            "dtype": str(language_model.dtype),
            "reward": identity(reward_model),
            "prompts": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
            "start_from": adapter_digest(start_from),
        },
    )
    with own_randomness(settings.seed):
        model = trainable(language_model, settings, start_from)
        experience = Experience(algorithm, language_model, reward_model, prompts, settings)
        trainer = _trainer(experience, model, checkpoints)
        if on_step is not None:
            _report_steps(trainer, on_step)
        run(trainer, checkpoints, resumed)
    report = PolicyGradientReport.from_log(
        algorithm, reward_name(reward_model), language_model.name, trainer.state.log_history
    )
    with storage(target):
        notes = {LEDGER: report.ledger(), CURVE: [asdict(step) for step in report.curve]}
        write(target, trainer.model, language_model, notes)
    shutil.rmtree(checkpoints)
    return report


def _trainer(experience: Experience, model: Any, checkpoints: Path) -> Any:
    import trl
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    settings = experience.settings
    is_grpo = experience.algorithm == "grpo"
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using 'rollout_func'")
        config: Any = trl.GRPOConfig if is_grpo else trl.RLOOConfig
        arguments = config(
            **common_arguments(checkpoints, settings.seed, settings.save_steps),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.responses_per_step // settings.batch_size,
            num_generations=settings.num_generations,
            max_completion_length=settings.max_completion_length,
            temperature=settings.temperature,
            learning_rate=settings.learning_rate,
            beta=settings.beta,
            # The rows are in their order.
            shuffle_dataset=False,
        )
        rollouts = {"rollout_func": experience.sample}
        make: Any = trl.GRPOTrainer if is_grpo else functools.partial(_rloo_class(), experience)
        trainer = make(
            model=model,
            reward_funcs=experience,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": experience.rows()}),
            processing_class=tokenizer_of(experience.language_model),
            **(rollouts if is_grpo else {}),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


@functools.cache
def _rloo_class() -> Any:
    """TRL's `RLOOTrainer` with what its `GRPOTrainer` has as `rollout_func`."""
    import trl

    class SampledRLOOTrainer(trl.RLOOTrainer):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self, experience: Experience, **options: Any) -> None:
            self._experience = experience
            super().__init__(**options)

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[Any, None, dict[str, Any]]:
            self._sampled = self._experience.sample(prompts, self)
            return self._sampled["prompt_ids"], None, {}

        def _generate_single_turn(self, *inputs: Any) -> Any:
            return self._sampled["completion_ids"]

    return SampledRLOOTrainer


def _report_steps(trainer: Any, on_step: Callable[[StepReport], None]) -> None:
    """Have the trainer call a function after each step."""
    from transformers import TrainerCallback

    class ReportSteps(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "reward" in state.log_history[-1]:
                on_step(StepReport.from_log(state.log_history[-1]))

    trainer.add_callback(ReportSteps())
