"""Do PPO and DQN learn to choose among candidates better than chance, on prompts not seen before?

A policy is trained on train prompts to choose among K chunks that the language model proposes. On
test prompts its choices are compared with random ones, paired by prompt and seed, and with always
taking the candidate of the highest prefix reward, which needs no training. A run that was stopped
goes on.

python -m mbrl_text_env.benchmarks.choice_tuning --reward sentiment --json choice_tuning.json
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from mbrl_text_env.benchmarks.options import (
    DtypeOption,
    LanguageModelOption,
    errors,
    friendly,
    load_language_model,
)
from mbrl_text_env.benchmarks.paired import chosen_prompts, kept, paired
from mbrl_text_env.benchmarks.statistics import holm
from mbrl_text_env.files import write_text
from mbrl_text_env.identity import identity
from mbrl_text_env.runs import claimed, prompt_digests

if TYPE_CHECKING:
    from mbrl_text_env.agents.model_free import CandidatePolicy
    from mbrl_text_env.agents.model_free.choice_settings import ChoiceSettings
    from mbrl_text_env.language_models import LanguageModel
    from mbrl_text_env.rewards.base import RewardModel
    from mbrl_text_env.types import Prompt

RANDOM, HIGHEST = "random", "highest prefix reward"


class ChoiceTuningError(ValueError):
    """A measurement that cannot be made as asked."""


@dataclass(frozen=True)
class Test:
    """What policies are measured on.

    Args:
        language_model: Proposes the candidates.
        reward: Scores.
        prompts: Test prompts.
        episodes: Of each prompt.
        seed: Of the candidates.
    """

    language_model: LanguageModel
    reward: RewardModel
    prompts: Sequence[Prompt]
    episodes: int
    seed: int

    def scores(self, policy: CandidatePolicy, choice: str = "") -> dict[str, Any]:
        """Scores of episodes, and what they took; by another choice than the policy's if named."""
        from mbrl_text_env.agents.model_free import evaluate
        from mbrl_text_env.ledger import Ledger

        ledger = Ledger()
        found = evaluate(
            policy,
            self.language_model,
            self.reward,
            self.prompts,
            episodes=self.episodes,
            seed=self.seed,
            ledger=ledger,
            choose=_choices(policy, self.seed).get(choice),
        )
        return {
            "scores": found.tolist(),
            "usage": ledger.usage.as_dict(),
        }


def _choices(policy: CandidatePolicy, seed: int) -> dict[str, Any]:
    """Choices that need no training."""
    layout, rng = policy.scorer.layout, np.random.default_rng(seed)
    return {
        RANDOM: lambda rows: rng.integers(layout.num_candidates, size=len(rows)),
        HIGHEST: lambda rows: layout.split(rows).rewards[..., 0].argmax(axis=1),
    }


def comparison(results: dict[str, dict[str, Any]], prompts: Sequence[str], seed: int) -> Any:
    """Each choice against the random one; p-values after Holm's correction."""
    names = [prompt for prompt in prompts for _ in results[RANDOM]["scores"][0]]
    flat = {name: np.ravel(found["scores"]).tolist() for name, found in results.items()}
    rows = [
        {"choice": name, **paired(flat[RANDOM], scores, names, seed)}
        for name, scores in flat.items()
        if name != RANDOM
    ]
    for row, p in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = float(p)
    return rows


@dataclass(frozen=True)
class Run:
    """What is trained and measured, and the folder in which all of it is kept.

    Args:
        folder: Of the run. What is there is not made again.
        settings: Of each algorithm.
        prompts: Train prompts.
        test: What the policies are measured on.
    """

    folder: Path
    settings: dict[str, ChoiceSettings]
    prompts: Sequence[Prompt]
    test: Test

    def results(self) -> dict[str, dict[str, Any]]:
        """What each choice scores: first those that need no training, then the policies."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.settings:
            policy = self._policy(name)
            if not found:
                # The policy only says what is proposed and seen, which is the same for all.
                for choice in (RANDOM, HIGHEST):
                    found[choice] = self._scores(choice, policy, choice)
            found[name] = self._scores(name, policy)
        return found

    def training(self) -> dict[str, Any]:
        """What the training of each policy took, and the scores of its episodes."""
        from mbrl_text_env.agents.model_free.sb3 import CURVE, LEDGER

        found = {}
        for name in self.settings:
            ledger, curve = (
                json.loads((self.folder / name / file).read_text(encoding="utf-8"))
                for file in (LEDGER, CURVE)
            )
            found[name] = {"ledger": ledger, "curve": curve["episodes"]}
        return found

    def _policy(self, name: str) -> CandidatePolicy:
        """Trained now, unless it has been."""
        from mbrl_text_env.agents.model_free import load_policy, train_dqn, train_ppo
        from mbrl_text_env.agents.model_free.sb3 import CURVE

        trainers: dict[str, Any] = {"ppo": train_ppo, "dqn": train_dqn}
        folder, settings = self.folder / name, self.settings[name]
        models = self.test.language_model, self.test.reward
        if not (folder / CURVE).is_file():
            errors.print(f"{name}: {settings.total_steps:,} steps")
            trainers[name](*models, self.prompts, folder, settings)
        return load_policy(folder, *models)

    def _scores(self, name: str, policy: CandidatePolicy, choice: str = "") -> dict[str, Any]:
        path = self.folder / f"{name.replace(' ', '-')}.json"
        return kept(path, lambda: self.test.scores(policy, choice))


def _settings(algorithms: str, total_steps: int, **common: Any) -> dict[str, ChoiceSettings]:
    """Settings of the algorithms that are named, with commas between them."""
    from mbrl_text_env.agents.model_free import DQNSettings, PPOSettings

    kinds: dict[str, Any] = {"ppo": PPOSettings, "dqn": DQNSettings}
    # Short trainings are one rollout.
    rollouts = {
        "rollout_steps": min(512, total_steps),
        "batch_size": min(128, total_steps),
    }
    names = [name.strip() for name in algorithms.split(",")]
    if not set(names) <= set(kinds):
        raise typer.BadParameter(f"--algorithms: expected ppo, dqn or both, got {algorithms!r}.")
    return {
        name: kinds[name](total_steps=total_steps, **common, **(rollouts if name == "ppo" else {}))
        for name in names
    }


@friendly
def main(
    reward: Annotated[str, typer.Option(help="A reward's name.")] = "sentiment",
    algorithms: Annotated[str, typer.Option(help="'ppo', 'dqn', or both.")] = "ppo,dqn",
    total_steps: Annotated[int, typer.Option(min=1, help="Environment steps.")] = 3584,
    num_candidates: Annotated[int, typer.Option(min=2)] = 4,
    chunk_tokens: Annotated[int, typer.Option(min=1)] = 16,
    max_response_tokens: Annotated[int, typer.Option(min=1)] = 96,
    num_envs: Annotated[int, typer.Option(min=1)] = 16,
    encoder: Annotated[
        str,
        typer.Option(
            help="What embeds the candidates: 'embedded' (MiniLM), 'language_model' or 'none'. "
            "Embedding a candidate takes more than drawing it from a small model."
        ),
    ] = "embedded",
    prompts: Annotated[int, typer.Option(min=2, help="Test prompts.")] = 64,
    episodes: Annotated[int, typer.Option(min=1, help="Of each test prompt.")] = 4,
    language_model: LanguageModelOption = "embedded",
    dtype: DtypeOption = "int8",
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same one goes on.")] = Path(
        "choice-tuning"
    ),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Train, measure, print."""
    from mbrl_text_env.rewards import make

    settings = _settings(
        algorithms,
        total_steps,
        num_candidates=num_candidates,
        chunk_tokens=chunk_tokens,
        max_response_tokens=max_response_tokens,
        num_envs=num_envs,
        encoder=None if encoder == "none" else encoder,
        seed=seed,
    )
    record = {
        "reward": reward,
        "settings": json.loads(json.dumps({n: asdict(s) for n, s in settings.items()})),
        "test": [prompts, episodes],
        "language_model": [language_model, dtype],
    }
    lm, reward_model = load_language_model(language_model, dtype), make(reward)
    train = chosen_prompts(reward_model, "train", None, ChoiceTuningError)
    held_out = chosen_prompts(reward_model, "test", prompts, ChoiceTuningError)
    depends_on = {
        **record,
        "models": [identity(lm), identity(reward_model)],
        "data": {"train": prompt_digests(train), "test": prompt_digests(held_out)},
    }
    with claimed(out, depends_on, "measurement of choices", ChoiceTuningError):
        run = Run(out, settings, train, Test(lm, reward_model, held_out, episodes, seed))
        results = run.results()
        shown = {**record, "result": comparison(results, [prompt.id for prompt in held_out], seed)}
        figures = {
            **shown,
            "use": {name: found["usage"] for name, found in results.items()},
            "training": run.training(),
            "num_train_prompts": len(train),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "cpus": os.cpu_count(),
            "command": shlex.join(
                ["python", "-m", "mbrl_text_env.benchmarks.choice_tuning", *sys.argv[1:]]
            ),
        }
        print(json.dumps(shown, indent=2))
        if json_file is not None:
            write_text(json_file, json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
