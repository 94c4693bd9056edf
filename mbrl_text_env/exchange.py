"""Exchange records with other libraries, and upload fitted folders to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import pyarrow as pa

from mbrl_text_env import __version__
from mbrl_text_env.mdp import initial
from mbrl_text_env.records import SCHEMA, Record, RecordsError, as_batch, from_row, to_row
from mbrl_text_env.rewards.base import reward_name
from mbrl_text_env.spaces import ChunkSpace
from mbrl_text_env.task import TextTask
from mbrl_text_env.types import Prompt

if TYPE_CHECKING:
    import datasets
    import minari

# Fields of a record that an episode's observations, actions and infos do not contain.
_BESIDES = (
    *("messages", "metadata", "split", "prompt_ids", "logprobs", "rewards", "score"),
    *("reward_name", "agent", "language_model", "seed", "usage", "sample"),
)
# By the file that tells a folder: what it holds, and where and how it is read.
_FOLDERS = {
    "policy.json": ("policy", "agents.model_free", "load_policy", "folder"),
    "value.json": ("value model", "agents.values", "load_value", "folder, lm, reward"),
    "world_model.json": ("world model", "world_model", "load_dynamics", "folder, lm"),
    "reward.json": ("reward", "rewards.learning.learned", "LearnedReward", "folder"),
    "base.json": ("policy (LoRA)", "language_models", "TransformersLM", "base, adapter=folder"),
}
_CARD = """\
# {name}

A {noun} of [mbrl-text-env](https://github.com/mbrl-text-env/mbrl-text-env) {version}.

```python
from huggingface_hub import snapshot_download
from mbrl_text_env.{module} import {function}

folder = snapshot_download("{repo_id}")
loaded = {function}({arguments})
```

`{config}`:

```json
{content}
```
"""


def to_dataset(records: Iterable[Record]) -> datasets.Dataset:
    """Convert records to a `datasets.Dataset` with the columns of `records.SCHEMA`.

    Raises:
        RecordsError: A record cannot be written (see `RecordWriter.append`).

    Example:
        >>> to_dataset(read_records("scored")).push_to_hub("me/scored")  # doctest: +SKIP
    """
    import datasets

    return datasets.Dataset(pa.Table.from_batches(map(as_batch, records), schema=SCHEMA))


def from_dataset(dataset: datasets.Dataset) -> list[Record]:
    """Convert a data set made by `to_dataset` to records; other columns are ignored.

    Raises:
        RecordsError: A column is missing or has another content.

    Example:
        >>> from_dataset(datasets.load_dataset("me/scored", split="train"))  # doctest: +SKIP
    """
    missing = {*SCHEMA.names} - {*dataset.column_names}
    if missing:
        raise RecordsError(
            f"Expected a data set with the columns of records, got one without {sorted(missing)}. "
            "Make it with `to_dataset`, or add the columns."
        )
    try:
        return [from_row(row) for row in dataset.select_columns(SCHEMA.names).to_list()]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise RecordsError(
            f"Expected columns as `to_dataset` writes them, got {dataset.features} "
            f"({type(error).__name__}: {error})."
        ) from error


def to_minari(
    records: Iterable[Record], dataset_id: str, env: gym.Env[Any, Any], **options: Any
) -> minari.MinariDataset:
    """Write records as a Minari data set, with one episode per record and one step per chunk.

    Nothing is scored: the reward of the last step is the record's score. Other fields of the
    record, such as log-probabilities and cost, are in the last info, under `record`.

    Args:
        records: A record without `chunk_ends` becomes one chunk.
        dataset_id: Minari's name of the data set, such as `"text/scored-v0"`.
        env: `mbrl_text_env/TextGeneration-v0` with `action_format="padded"`; it determines the
            observations and the maximum chunk length.
        options: Options of `minari.create_dataset_from_buffers`, such as `author` and
            `data_format` (by default `"arrow"`).

    Raises:
        RecordsError: `env` is another environment, or a record is not an episode of it.

    Example:
        >>> to_minari(read_records("scored"), "text/scored-v0", env)  # doctest: +SKIP
    """
    import minari

    task, episodes = _task_of(env), []
    for record in records:
        try:
            episodes.append(_episode(record, task))
        except ValueError as error:
            raise RecordsError(
                f"Record of prompt {record.prompt_id!r}: expected an episode of this environment, "
                f"got {type(error).__name__}: {error}. Make the environment with the record's "
                "tokenizer and larger limits."
            ) from error
    return minari.create_dataset_from_buffers(
        dataset_id,
        episodes,
        action_space=env.action_space,
        observation_space=env.observation_space,
        **{"data_format": "arrow", **options},
    )


def from_minari(dataset: minari.MinariDataset, env: gym.Env[Any, Any]) -> list[Record]:
    """Convert episodes from `to_minari` or Minari's `DataCollector` to records.

    Args:
        dataset: A data set with infos (`record_infos=True`).
        env: The environment of the episodes. Nothing is scored.

    Raises:
        RecordsError: `env` is another environment, or the episodes do not fit it.

    Example:
        >>> from_minari(minari.load_dataset("text/scored-v0"), env)  # doctest: +SKIP
    """
    task = _task_of(env)
    prompts = {prompt.id: prompt for prompt in task.prompts}
    agent = dataset.storage.metadata.get("algorithm_name") or ""
    found = []
    for episode in dataset.iterate_episodes():
        try:
            found.append(_record(episode, task, prompts, agent))
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            raise RecordsError(
                f"Episode {episode.id}: expected one of this environment, with its infos, got "
                f"{type(error).__name__}: {error}. Pass the environment that it was collected in, "
                "and collect with record_infos=True."
            ) from error
    return found


def push_to_hub(
    folder: str | Path, repo_id: str, *, token: str | None = None, private: bool | None = None
) -> str:
    """Upload a fitted folder with a model card, and return its address on the Hub.

    The folder can be a policy, value model, world model or learned reward, as written by `save` or
    by training. Download it with `huggingface_hub.snapshot_download(repo_id)`. If the folder has a
    `README.md`, that is used as the model card.

    Args:
        folder: The folder to upload completely.
        repo_id: Name such as `"me/my-reward"`; created if it does not exist.
        token: Access token; by default the one stored by `hf auth login`, or `HF_TOKEN`.
        private: Whether a new repository is private; None for the user's default.

    Raises:
        ValueError: The folder contains none of these.
        HfHubHTTPError: The Hub rejects the upload.

    Example:
        >>> push_to_hub("my-reward", "me/my-reward")  # doctest: +SKIP
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    path = Path(folder)
    files = {str(p.relative_to(path).as_posix()): p for p in path.rglob("*") if p.is_file()}
    contents: dict[str, Any] = {"README.md": model_card(path, repo_id).encode(), **files}
    api = HfApi(token=token)
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in contents.items()],
        commit_message=f"Upload with mbrl-text-env {__version__}",
    )
    return str(address)


def model_card(folder: str | Path, repo_id: str) -> str:
    """The model card that `push_to_hub` writes, as Markdown with the Hub's metadata.

    Raises:
        ValueError: See `push_to_hub`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder)
    config = next((name for name in _FOLDERS if (path / name).is_file()), None)
    if config is None:
        raise ValueError(
            f"{folder}: expected a folder with one of {', '.join(_FOLDERS)}, got none of them. "
            "Save a policy, value, world model or reward first."
        )
    noun, module, function, arguments = _FOLDERS[config]
    content = json.dumps(json.loads((path / config).read_text(encoding="utf-8")), indent=2)
    text = _CARD.format(
        name=repo_id.rpartition("/")[2],
        version=__version__,
        **{"noun": noun, "module": module, "function": function, "arguments": arguments},
        **{"repo_id": repo_id, "config": config, "content": content},
    )
    data = ModelCardData(
        library_name="mbrl-text-env", tags=["reinforcement-learning", noun.replace(" ", "-")]
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _task_of(env: gym.Env[Any, Any]) -> TextTask:
    task = getattr(env.unwrapped, "task", None)
    if (
        not isinstance(task, TextTask)
        or task.action_format != "padded"
        or task.reward != "terminal"
    ):
        raise RecordsError(
            "env: expected mbrl_text_env/TextGeneration-v0 with action_format='padded' and "
            f"reward='terminal', got {env}. Make it with these options."
        )
    return task


def _episode(record: Record, task: TextTask) -> Any:
    """Minari's buffer of a record; ValueError if it is not an episode of the task."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    ends = (0, *(record.chunk_ends or (len(record.response_ids),)))
    task.check_state(record.state())
    chunks = [task.rules.chunk(record.response_ids[i:j]).token_ids for i, j in pairwise(ends)]
    outcomes = [task.resume(record.prefix_state(end)) for end in ends]
    infos: dict[str, Any] = {key: [o.info[key] for o in outcomes] for key in outcomes[0].info}
    del infos["score_parts"]  # Minari keeps no empty mapping; they are in `record`.
    infos["score"] = [0.0] * len(chunks) + [record.score or 0.0]
    row = to_row(record)
    besides = json.dumps({name: row[name] for name in _BESIDES})
    infos["record"] = [""] * len(chunks) + [besides]
    space = ChunkSpace(task.rules)
    return EpisodeBuffer(
        observations=_columns(task.observe(outcomes)),
        actions=[gym.spaces.flatten(space, chunk) for chunk in chunks],
        rewards=infos["score"][1:],
        terminations=[outcome.terminated for outcome in outcomes[1:]],
        truncations=[outcome.truncated for outcome in outcomes[1:]],
        infos=infos,
    )


def _columns(rows: list[Any]) -> Any:
    """Observations in Minari's form: a list for each part."""
    if not isinstance(rows[0], dict):
        return rows
    return {key: [row[key] for row in rows] for key in rows[0]}


def _record(episode: Any, task: TextTask, prompts: dict[str, Prompt], agent: str) -> Record:
    last = {name: _last(values) for name, values in episode.infos.items()}
    besides = json.loads(last.get("record", "{}"))
    text = Prompt(last["prompt_id"], last["prompt"])
    state = initial(prompts.get(text.id, text), task.tokenizer)
    for action in np.asarray(episode.actions):
        state, _ = task.append(state, action)
    record = Record.from_state(
        replace(state, finish_reason=last["finish_reason"] or None),
        response=last["response"],
        score=float(last["score"]),
        rewards=last.get("score_parts", {}),
        reward_name=reward_name(task.reward_model),
        agent=agent,
        language_model="",
        seed=0,
    )
    return from_row({**to_row(record), **besides})


def _last(values: Any) -> Any:
    """The last of an info's values; nested ones come as a mapping of lists, or a list of them."""
    if isinstance(values, dict):
        return {name: _last(each) for name, each in values.items()}
    last = values[-1]
    return last.decode() if isinstance(last, bytes) else last
