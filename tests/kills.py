"""Kill `collect`, `compare` and `fit` at random moments, resume, compare with undisturbed runs.

    python -m tests.kills --kills 200

Each command runs in a process of its own, forked from one that has imported everything, so that a
run takes about a second. It is killed with SIGKILL, one to three times, and then run to its end.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
COMMANDS = ("collect", "compare", "fit")
_SMALL = ("--max-response-tokens", "6", "--reward", "sentiment")


def make_model(folder: Path) -> None:
    """A random Llama of one layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mbrl_text_env.language_models import embedded_tokenizer

    tokenizer = embedded_tokenizer().tokenizer
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=2, **sizes, **heads
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def arguments(command: str, folder: Path, out: Path) -> list[str]:
    model = ["--language-model", str(folder / "model")]
    return {
        "collect": ["collect", "--num-prompts", "48", "--samples", "5", *_SMALL, *model],
        "compare": [
            "compare", "--agents", "sampling,best-of-n", "--num-prompts", "24", "--batch-prompts",
            "4", "--budget-tokens", "24", *_SMALL, *model,
        ],
        "fit": ["fit", "--records", str(folder / "whole-collect"), "--kind", "calibrated", *model],
    }[command] + ["--out", str(out)]  # fmt: skip


def started(words: list[str]) -> int:
    """Run the command line in a forked process; its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        if "KILLS_SHOW" not in os.environ:
            os.dup2(silent, 2)
        from mbrl_text_env.benchmarks.cli import app

        app(words)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    finally:
        os._exit(code)


def finished(words: list[str]) -> None:
    status = os.waitpid(started(words), 0)[1]
    if status != 0:
        raise RuntimeError(f"{words}: exit status {status}")


def rows_of(command: str, out: Path) -> Counter[str]:
    """The rows, times aside, with how often each is there."""
    if command == "collect":
        from mbrl_text_env.records import read_records

        records = [vars(record) for record in read_records(out)]
        rows = [{**row, "usage": {**row["usage"], "seconds": 0}} for row in records]
    elif command == "compare":
        from mbrl_text_env.benchmarks.compare import read_rows

        rows = [{**row, "seconds": 0} for row in read_rows(out / "results.jsonl")]
    else:
        return Counter(f"{path.name} {path.read_bytes()!r}" for path in out.iterdir())
    return Counter(repr(sorted(row.items())) for row in rows)


class Kills:
    """Kills of one command.

    Args:
        command: One of `COMMANDS`.
        folder: Holds the model and the undisturbed runs.
        seed: Of the moments.
    """

    def __init__(self, command: str, folder: Path, seed: int) -> None:
        self.command, self.folder = command, folder
        self.moments = random.Random(seed)  # noqa: S311 - moments of kills are no secret
        self.table = Counter[str]()
        whole = folder / f"whole-{command}"
        begin = time.perf_counter()
        finished(arguments(command, folder, whole))
        self.seconds = time.perf_counter() - begin
        self.wanted = rows_of(command, whole)
        self.old = folder / "old-value"
        if command == "fit":
            # Another value, which the new one takes the place of.
            words = arguments(command, folder, self.old)
            finished([*words[: words.index("calibrated")], "hidden-state", *words[-4:]])

    def run(self, kills: int) -> Counter[str]:
        while self.table["kills"] < kills:
            out = self.folder / "killed"
            shutil.rmtree(out, ignore_errors=True)
            if self.command == "fit":
                shutil.copytree(self.old, out)
            for _ in range(min(self.moments.randint(1, 3), kills - self.table["kills"])):
                self._kill(out)
            finished(arguments(self.command, self.folder, out))
            found = rows_of(self.command, out)
            self.table["resumed"] += 1
            self.table["equal"] += found == self.wanted
            self.table["lost"] += sum((self.wanted - found).values())
            self.table["doubled"] += sum((found - self.wanted).values())
            left = [p for p in self.folder.iterdir() if p.name.startswith(".")]
            self.table["scratch left"] += len(left)
        return self.table

    def _kill(self, out: Path) -> None:
        process = started(arguments(self.command, self.folder, out))
        time.sleep(self.moments.uniform(0.0, 1.1 * self.seconds))
        done, _ = os.waitpid(process, os.WNOHANG)
        self.table["kills"] += 1
        if not done:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            self.table["while working"] += 1
        if self.command == "fit":
            there = rows_of("fit", out) if out.is_dir() else None
            is_one = there in (self.wanted, rows_of("fit", self.old))
            self.table["neither old nor new"] += not is_one


def prepared(folder: Path) -> None:
    """Import everything once, and make the model."""
    import torch

    import mbrl_text_env.benchmarks.cli
    import mbrl_text_env.benchmarks.compare
    import mbrl_text_env.benchmarks.report  # noqa: F401 - for the processes that are forked
    from mbrl_text_env.rewards import SentimentReward
    from mbrl_text_env.types import Prompt

    torch.set_num_threads(1)
    SentimentReward().score([Prompt.from_text("Hi")], ["It was good."])
    make_model(folder / "model")


def main(say: Callable[[Any], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder))
        tables = {}
        for i, command in enumerate(COMMANDS):
            share = options.kills // 3 + (i < options.kills % 3)
            tables[command] = Kills(command, Path(folder), options.seed + i).run(share)
            say(f"{command}: {dict(tables[command])}")
    bad = [t["resumed"] - t["equal"] + t["neither old nor new"] for t in tables.values()]
    return 1 if any(bad) else 0


if __name__ == "__main__":
    sys.exit(main())
