"""Helpers for training LoRA adapters: silence warnings, and write safe folders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The file types kept in a folder; reading them does not execute code.
_SAFE = (".json", ".jinja", ".model", ".safetensors", ".txt")


def write_adapter(folder: Path, model: Any, tokenizer: Any, base: str) -> None:
    """Write adapter, tuned heads and tokenizer, only in formats that cannot execute code."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        if path.suffix not in _SAFE:
            path.unlink()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings about intended things, such as randomly initialised heads."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # TRL sets arguments that transformers will rename.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
