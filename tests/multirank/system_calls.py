"""System calls that the kernel refuses to this thread and to those that it starts, as in containers."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

NUMBERS = {
    "x86_64": {"process_vm_readv": 310, "pidfd_open": 434},
    "aarch64": {"process_vm_readv": 270, "pidfd_open": 434},
}.get(platform.machine(), {})

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # instructions of the kernel's packet filters
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def forbid(name: str) -> None:
    instructions = [
        (_LOAD_WORD, 0, 0, 0),  # the number of the call
        (_JUMP_IF_EQUAL, 0, 1, NUMBERS[name]),
        (_RETURN, 0, 0, _FAIL | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    program = _Program(len(instructions), code)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), f"this system cannot forbid {name}")
