"""Untrusted Python programs, each run in a box of its own.

    >>> from mbrl_text_env.sandbox import Limits, run_program
    >>> run_program("print(6 * 7)", limits=Limits(wall_seconds=2)).stdout  # doctest: +SKIP
    '42\\n'

Nothing is assumed of a program: it may be written to do harm, and know this code. docs/sandbox.md
says what is protected, how, and what is not. What a program prints and its exit code are its own
word: a score that is read from them can be forged. `rewards.UnitTestReward` does it otherwise.
"""

from mbrl_text_env.sandbox.programs import (
    Facility,
    Limits,
    Program,
    ProgramResult,
    SandboxError,
    SandboxUnavailable,
    SandboxWarning,
    facilities,
    run_program,
    run_programs,
)

__all__ = [
    "Facility",
    "Limits",
    "Program",
    "ProgramResult",
    "SandboxError",
    "SandboxUnavailable",
    "SandboxWarning",
    "facilities",
    "run_program",
    "run_programs",
]
