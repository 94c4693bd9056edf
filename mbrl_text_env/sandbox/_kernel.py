"""The system calls that build a box, and the filter of those that may be made inside.

It runs in the small helper process, so it imports nothing heavy. Constants are
those of the Linux headers; the numbers of system calls are the pairs (x86_64, aarch64).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Any

NAMESPACES = {
    "user": 0x10000000, "PID": 0x20000000, "mount": 0x00020000, "network": 0x40000000,
    "IPC": 0x08000000, "UTS": 0x04000000, "cgroup": 0x02000000,
}  # fmt: skip
"""Flags of clone(2), CLONE_NEW..., by the kinds of namespaces."""

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_SECCOMP_MODE_FILTER = 2
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of `_NUMBERS` and audit architecture by `os.uname().machine`."""

_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # Other processes: their memory, files and limits.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    # The file system's shape, and namespaces.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "unshare": (272, 97), "setns": (308, 268),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "lookup_dcookie": (212, 18),
    "quotactl": (179, 60), "fanotify_init": (300, 262),
    # Parts of the kernel that have been ways out of boxes before.
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "userfaultfd": (323, 282), "modify_ldt": (154, None),
    "personality": (135, 92),
    # Memory that the limits do not see: it outlives its mapping, or its process.
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "mbind": (237, 235),
    # A number of these is allowed to a user, over all boxes and outside.
    "inotify_init": (253, None), "inotify_init1": (294, 26), "set_mempolicy": (238, 237),
    # The machine itself. These need capabilities too, which the box does not have.
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "iopl": (172, None), "ioperm": (173, None), "vhangup": (153, 58),
    "sethostname": (170, 161), "setdomainname": (171, 162),
}  # fmt: skip
_PIVOT_ROOT = _NUMBERS["pivot_root"]
_MOUNT_SETATTR = 442
_CLONE, _CLONE3, _SOCKET = (56, 220), 435, (41, 198)
_SETRLIMIT, _PRLIMIT64 = (160, 164), (302, 261)
# The newest call that is known to be harmless, epoll_pwait2. The C library does without newer ones.
_NEWEST = 441

_libc: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


def _call(function: str, *args: object) -> int:
    result: int = getattr(_libc, function)(*args)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def unshare(*kinds: str) -> None:
    """Put this process, or of "PID" its children, into namespaces of their own."""
    _call("unshare", ctypes.c_int(sum({NAMESPACES[kind] for kind in kinds})))


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """See mount(2)."""
    texts = [os.fsencode(text) for text in (source, target, kind, options)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def make_readonly(path: str) -> None:
    """Forbid writing and set-user-id programs in everything that is mounted at or below `path`.

    Unlike a remount, mount_setattr(2) sees to the mounts below and keeps the locked flags.
    """
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    number, folder, flags, size = map(
        ctypes.c_long, (_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, len(attributes))
    )
    _call("syscall", number, folder, os.fsencode(path), flags, attributes, size)


def change_root(path: str) -> None:
    """Make `path`, a mount point, the root, and let go of the old one; see pivot_root(2)."""
    number = _PIVOT_ROOT[MACHINES[os.uname().machine][0]]
    os.chdir(path)
    _call("syscall", ctypes.c_long(number or 0), b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/")


def set_host_name(name: str) -> None:
    """Set the name of this machine in the present UTS namespace."""
    _call("sethostname", name.encode(), ctypes.c_size_t(len(name)))


def ignore_signal(number: int) -> None:
    """Ignore a signal; the `signal` module would cost 5 ms to import."""
    _libc.signal(number, ctypes.c_void_p(1))


def reset_signals() -> None:
    """Give every signal its default action: ignored ones would stay so in a new program."""
    for number in range(1, 65):
        _libc.signal(number, None)


def die_with_parent() -> None:
    """Be killed when the parent dies. To be called after the last change of user."""
    _call("prctl", _PR_SET_PDEATHSIG, ctypes.c_ulong(9), *_ZEROS)


def bound_capabilities() -> None:
    """No program that this process becomes gains a capability; takes CAP_SETPCAP."""
    for capability in range(64):
        try:
            _call("prctl", _PR_CAPBSET_DROP, ctypes.c_ulong(capability), *_ZEROS)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # The first one that this kernel does not know.


def drop_capabilities() -> None:
    """Give up all capabilities."""
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    _call("capset", header, bytes(24))


def forbid_new_privileges() -> None:
    """No set-user-id bit or file capability counts from here on."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), *_ZEROS)


def install_filter(machine: str) -> None:
    """Filter the system calls of this process and its children; see `filter_program`."""
    code = filter_program(machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    _call("prctl", _PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), program, *_ZEROS[:2])


_ZEROS = (ctypes.c_ulong(0),) * 3

# Classic BPF, see linux/filter.h and linux/seccomp.h: (code, jump if true, jump if false, operand).
_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_GT, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06
_AT_NUMBER, _AT_ARCH, _AT_FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
_AF_UNIX, _RLIMIT_CORE = 1, 4
_X32_BIT = 0x40000000


def filter_program(machine: str) -> bytes:
    """The filter as classic BPF, 8 bytes an instruction.

    A program of another architecture is killed, for its calls have other numbers. Calls newer than
    the table do not exist, and neither does clone3, whose flags no filter can read: the C library
    then uses clone. Sockets are of the family AF_UNIX alone, processes get no namespaces, and the
    limits of other processes cannot be set, nor that of core files: see `programs`.
    """
    column, architecture = MACHINES[machine]
    denied = sorted(pair[column] or 0 for pair in _NUMBERS.values() if pair[column] is not None)
    code = [
        (_LOAD, 0, 0, _AT_ARCH),
        (_JUMP_EQ, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _AT_NUMBER),
        (_JUMP_GE, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
        (_JUMP_GT, 0, 1, _NEWEST),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_JUMP_EQ, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        *_refuse(_CLONE[column], 0, (_JUMP_SET, 0, 1, sum(NAMESPACES.values())), _EPERM),
        *_refuse(_SOCKET[column], 0, (_JUMP_EQ, 1, 0, _AF_UNIX), _EAFNOSUPPORT),
        *_refuse(_PRLIMIT64[column], 0, (_JUMP_EQ, 1, 0, 0), _EPERM),
        *_refuse(_PRLIMIT64[column], 1, (_JUMP_EQ, 0, 1, _RLIMIT_CORE), _EPERM),
        *_refuse(_SETRLIMIT[column], 0, (_JUMP_EQ, 0, 1, _RLIMIT_CORE), _EPERM),
        (_LOAD, 0, 0, _AT_NUMBER),
    ]
    for number in denied:
        code += [(_JUMP_EQ, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _refuse(
    number: int, argument: int, test: tuple[int, int, int, int], error: int
) -> list[tuple[int, int, int, int]]:
    """Refuse a call by the low 32 bits of an argument; `test` skips one instruction if not."""
    return [
        (_LOAD, 0, 0, _AT_NUMBER),
        (_JUMP_EQ, 0, 3, number),
        (_LOAD, 0, 0, _AT_FIRST_ARGUMENT + 8 * argument),
        test,
        (_RETURN, 0, 0, _ERRNO | error),
    ]
