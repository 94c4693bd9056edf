"""Run untrusted Python programs, each in its own sandbox.

    >>> from mbrl_text_env.sandbox import Limits, run_program
    >>> run_program("print(6 * 7)", limits=Limits(wall_seconds=2)).stdout  # doctest: +SKIP
    '42\\n'

A program can be malicious and know this code. docs/sandbox.md describes what is protected, how, and
what is not. A program controls its own output and exit code, so a score that is read from them can
be forged. `rewards.UnitTestReward` does not rely on them.
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
