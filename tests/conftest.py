"""Parts that many tests share: the real models, loaded once, and the worlds with known answers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same cases in every run, and none that fails because the machine was busy.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# Tests never reach for the network; models come from the wheels.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Consoles are as wide as their tables in a pipe; pytest's workers would have 80 columns.
os.environ.pop("COLUMNS", None)

# A shell that starts a job in the background has it ignore Ctrl-C; tests send that signal.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Iterator[object]:
    from mbrl_text_env.language_models import embedded

    return embedded()


@pytest.fixture(scope="session")
def minilm() -> Iterator[object]:
    from mbrl_text_env.language_models import embedded_encoder

    return embedded_encoder()
