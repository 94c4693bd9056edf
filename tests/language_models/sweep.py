"""How `TransformersLM` computes each causal family of transformers, and with what error.

`python -m tests.language_models.sweep results.json [family ...]` measures tiny models and resumes.
`... --page docs/architectures.md RESULTS...` writes the page, for one or more versions.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from mbrl_text_env.language_models.hf_tokenizer import ModelLoadError
from tests.language_models.architectures import FAMILIES, largest_error, tiny_model
from tests.language_models.conftest import train_tokenizer

TOLERANCE = 1e-3
_SECONDS = 90
NOT_TINY, REFUSED, FAILED, WRONG = "not tiny", "refused", "failed", "wrong"

Result = tuple[str, str]


def result_of(family: str, tokenizer: Any) -> Result:
    """How a family is computed and its largest error, or what is wrong and why."""
    try:
        model = tiny_model(family)
    except Exception as error:
        return NOT_TINY, _line(error)
    try:
        way, error = largest_error(model, tokenizer)
    except ModelLoadError as refusal:
        return REFUSED, _line(refusal)
    except Exception as failure:
        return FAILED, f"{type(failure).__name__}: {_line(failure)}"
    # "<" is false for NaN too.
    return (way, f"{error:.1e}") if error < TOLERANCE else (WRONG, f"{way}: {error:.1e}")


def in_a_process(family: str, tokenizer: Any) -> Result:
    """The same in a process of its own: some families take minutes, whatever their size."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, family, tokenizer))
    process.start()
    sender.close()
    try:
        if receiver.poll(_SECONDS):
            result: Result = receiver.recv()
            return result
        return NOT_TINY, f"took more than {_SECONDS} s"
    except EOFError:
        return FAILED, "the process ended"
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, family: str, tokenizer: Any) -> None:
    sender.send(result_of(family, tokenizer))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_INTRODUCTION = """# Architectures

How `TransformersLM` computes each causal family, measured on tiny models with random weights:

{counts}

A real model can be computed in another way than its tiny one: each is tested when it is loaded.
The results of `sample` (random and greedy), `logprobs`, `next_tokens` and `features`, with and
without cached prefixes, alone and in batches of different lengths, were compared with the model's
own forward pass. The column is the largest difference of a log-probability (nats) or a feature.
Measured with {versions}, in float32 on a CPU. A row names a version if they differ.

```console
python -m tests.language_models.sweep results.json
python -m tests.language_models.sweep --page docs/architectures.md results.json
```
"""
_SECTIONS = {
    "prefix cache": "With the prefix cache",
    "no prefix cache": "Without the prefix cache; samples of a state share one pass over it",
    "no prefix cache, one sequence at a time": "Without the prefix cache, one sequence at a time",
    "no cache, one sequence at a time": "A full forward pass for each token",
    REFUSED: "Refused with `ModelLoadError`",
    WRONG: "Wrong",
    FAILED: "Failed",
    NOT_TINY: "Not measured: no tiny model could be built",
}


def page(sweeps: list[dict[str, Any]]) -> str:
    """Markdown of the results of one or more versions."""
    rows: dict[str, dict[str, list[tuple[str, str]]]] = {section: {} for section in _SECTIONS}
    for sweep in sweeps:
        for family, (section, detail) in sweep["families"].items():
            rows[section].setdefault(family, []).append((sweep["transformers"], detail))
    counts = [
        f"- transformers {s['transformers']}: {sum(r[0] in list(_SECTIONS)[:4] for r in found)} "
        f"of {len(found)} agree to {TOLERANCE:g}, {sum(r[0] == REFUSED for r in found)} are refused"
        for s in sweeps
        for found in [list(s["families"].values())]
    ]
    versions = " and ".join(
        f"transformers {s['transformers']} (torch {s['torch']})" for s in sweeps
    )
    parts = [_INTRODUCTION.format(counts="\n".join(counts), versions=versions)]
    for section, title in _SECTIONS.items():
        if rows[section]:
            head = "largest error (nats)" if section in list(_SECTIONS)[:4] else "reason"
            lines = [_row(f, found, len(sweeps)) for f, found in sorted(rows[section].items())]
            parts.append(
                "\n".join([f"## {title}\n", f"| family | {head} |", "|---|---|", *lines, ""])
            )
    return "\n".join(parts)


def _row(family: str, found: list[tuple[str, str]], sweeps: int) -> str:
    same = len(found) == sweeps and len({detail for _, detail in found}) == 1
    named = [detail if same else f"{version}: {detail}" for version, detail in found]
    text = named[0] if same else "; ".join(named)
    return f"| `{family}` | {text.replace('|', chr(92) + '|')} |"


def main(arguments: list[str]) -> None:
    """Write results, or the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if arguments[0] == "--page":
        Path(arguments[1]).write_text(
            page([json.loads(Path(f).read_text()) for f in arguments[2:]])
        )
        return
    file = Path(arguments[0])
    found = json.loads(file.read_text()) if file.exists() else {}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    results = found.get("families", {})
    tokenizer = train_tokenizer()
    for family in arguments[1:] or [f for f in FAMILIES if f not in results]:
        results[family] = in_a_process(family, tokenizer)
        print(f"{family:28s}", *results[family], flush=True)
        ordered = dict(sorted(results.items()))
        file.write_text(json.dumps({**versions, "families": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
