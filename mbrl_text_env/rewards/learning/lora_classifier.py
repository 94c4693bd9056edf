"""What every training of a LoRA adapter needs: silence, and a folder that nothing executes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What a folder holds; nothing of it is executed when it is read.
_SAFE = (".json", ".jinja", ".model", ".safetensors", ".txt")


def write_adapter(folder: Path, model: Any, tokenizer: Any, base: str) -> None:
    """Write adapter, tuned heads and tokenizer, and nothing that is executed when it is read."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        if path.suffix not in _SAFE:
            path.unlink()


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of things that are meant, such as heads that start random."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # TRL sets arguments that transformers is about to rename.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
