"""What the tests of the checkers share."""

import pytest

from mbrl_text_env.language_models import NGramLM

TEXT, CANDIDATES = "mbrl_text_env/TextGeneration-v0", "mbrl_text_env/CandidateChunks-v0"
LM = NGramLM("abcde", seed=1)


def broken(cls, match):
    """A faulty implementation, and what the message has to say about it."""
    return pytest.param(cls, match, id=cls.__name__)
