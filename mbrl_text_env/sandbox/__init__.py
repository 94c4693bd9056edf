"""Untrusted Python programs, each run in a box of its own.

    >>> from mbrl_text_env.sandbox import Limits, run_program
    >>> run_program("print(6 * 7)", limits=Limits(wall_seconds=2)).stdout  # doctest: +SKIP
    '42\\n'

What is assumed of a program: nothing. It may be written to do harm, know this code, and fork,
thread, call the kernel directly and map machine code.

What is protected, and how (Linux 5.14 or newer on x86_64 or aarch64, for root and ordinary users):

- The caller's secrets. The program is a new interpreter with an environment of two constants
  (`PYTHONHASHSEED` and `PYTHONCOERCECLOCALE`, both 0) and no open files but the three standard
  ones; if the caller is root, it is "nobody" to the rest of the system. Of the host's files it
  sees, read-only, the interpreter, the standard library, the system's shared libraries, the
  loader's cache and four devices (null, zero, random, urandom); `/dev/stdin` is a copy of its
  input. There is no /proc, no /sys, no home, no other program, and no installed package.
- The host's files. All that can be written is a tmpfs of limited size and number of files, noexec,
  which is the program's folder, /tmp and /dev/shm, and disappears with the box.
- The network, and the host's sockets: an empty network namespace, and no sockets but AF_UNIX.
- Other processes. The box has a PID, an IPC and a user namespace of its own; when its first process
  dies (the program has ended, a limit is reached, the caller dies), the kernel kills every process
  in it, whatever these have done to their signals, sessions and parents.
- The kernel, as far as one can: no capabilities, no_new_privs, and a seccomp filter that refuses
  new namespaces, mounts, ptrace, keys, bpf, perf, io_uring, userfaultfd, shared memory beyond the
  limits, calls of other architectures, and calls newer than the filter.
- The machine's resources: see `Limits`. Limits of a process are the kernel's (rlimits); the sums of
  a box's processor time and memory are measured every 20 ms, so that for so long a box of n
  processes can have n times the memory. Output beyond its limit ends the program, and is not kept.

What is not protected:

- Holes in the kernel or the processor. Where they matter, use a virtual machine.
- Side channels: time, load, caches. `uname`, the number of processors, the amount of memory and the
  interpreter's path can be read.
- Fairness. A box may use all processors that the caller may, at a lower priority (nice 5).
- The result against its own program. What it prints and its exit code are its own word: a score
  that is read from them can be forged. `rewards.UnitTestReward` says how it is done instead.
- Anything, if `allow_weaker=True` and `facilities()` says that something is missing: then there
  are limits and a process group, and a `SandboxWarning`, once.

Own code, because nothing that pip installs does this, and bubblewrap has neither limits nor a
filter of its own. Starting and ending a program takes about 45 ms on one core.

Sources: the manual pages user_namespaces(7), pid_namespaces(7), pivot_root(2), mount_setattr(2),
seccomp(2), prctl(2), getrlimit(2) and capabilities(7).
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
