"""Who a task is: from the kernel's record, else from /proc, else null."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.enrich.cgroup import Place
from stalld.enrich.identity import MAX_CMDLINE, Asked, Identity, command, identify, lacks
from stalld.enrich.syscalls import ON_A_DESCRIPTOR, by_number, of_stack
from stalld.records import NAME_LEN, PF_KTHREAD, Known, NamePath
from tests.unit.make import task

ALL = Known.ARGS | Known.CGROUP | Known.SYSCALL
NONE = NamePath((), cut=False)
LONG = b"c" * (NAME_LEN - 1)
"""As long a name as a record has room for: of what was longer this is left."""


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (b"cadvisor\0-port\0" + b"8080\0", "cadvisor -port 8080"),
        (b"sh\0-c\0sleep 1; echo 'x'\0", "sh -c 'sleep 1; echo '\"'\"'x'\"'\"''"),
        (b"a\0\0b\0", "a '' b"),
        (b"nginx: worker process\0\0\0\0", "nginx: worker process"),
        (b"no end", "no end"),
        (b"caf\xc3\xa9\0\xff\0", "café '\\xff'"),
        (b"a\nb\0\x1b[2J\0", "'a\nb' '\x1b[2J'"),
        (b"", None),
        (b"\0\0\0", None),
    ],
)
def test_command(args: bytes, shown: str | None) -> None:
    """As a shell would take it; a single argument is a title and stands as it is."""
    assert command(args) == shown


def test_a_long_command() -> None:
    """It ends in an ellipsis, at the limit, and in no half of a character."""
    assert command(b"x\0" * 128) == " ".join("x" * 128)
    cut = command(b"x" * 300 + b"\0")
    assert cut == "x" * 253 + "…"
    assert command(b"x\0" + "é".encode() * 126 + b"\xc3", cut=True) == "x " + "é" * 125 + "…"
    assert command(b"ab\0c", cut=True) == "ab c…"


@given(st.binary(max_size=300), st.booleans())
def test_any_command(args: bytes, cut: bool) -> None:
    """Never longer than told, and always text."""
    text = command(args, cut)
    assert text is None or len(text.encode()) <= MAX_CMDLINE


def known(**changes: Any) -> Identity:
    """From a record alone, in the kernel."""
    return identify(task(**{"known": ALL} | changes), Asked(), (), "kernel")


def test_from_the_kernel() -> None:
    """Everything that a record tells."""
    assert known(
        cgroup=NamePath((b"cron.service", b"system.slice"), cut=False),
        file_system=b"cgroup2",
        file=NamePath((b"memory.stat", b"pod", b"kubepods"), cut=False),
        ns_pid=7,
    ) == Identity(
        "spinner -v",
        "/usr/bin/spinner",
        1000,
        (1, "init"),
        "read",
        "cgroup2:/kubepods/pod/memory.stat",
        7,
        Place("/system.slice/cron.service", "cron.service", "system.slice"),
    )


@pytest.mark.parametrize(
    ("kind", "names", "cut", "shown"),
    [
        (b"sockfs", (b"",), False, "socket:[77]"),
        (b"pipefs", (b"",), False, "pipe:[77]"),
        (b"anon_inodefs", (b"[eventpoll]",), False, "anon_inode:[eventpoll]"),
        (b"proc", (b"stat",), False, "proc:/stat"),
        (b"ext4", (b"/",), False, "ext4:/"),
        (b"ext4", (b"c", b"b"), True, "ext4:…/b/c"),
        (b"ext4", (b"\xff\n",), False, "ext4:/\\xff\n"),
        (b"", (), False, None),
    ],
)
def test_files(kind: bytes, names: tuple[bytes, ...], cut: bool, shown: str | None) -> None:
    """A path in its file system, or what stands for one."""
    found = known(file_system=kind, file=NamePath(names, cut), file_inode=77)
    assert found.file == shown


def test_calls_without_a_descriptor() -> None:
    """Whatever else the first argument is, it is no file."""
    file = {"file_system": b"proc", "file": NamePath((b"stat",), cut=False)}
    assert known(syscall=110, **file)[4:6] == ("getppid", None)
    assert known(syscall=0, **file)[4:6] == ("read", "proc:/stat")
    assert known(known=Known.ARGS, **file)[4:6] == (None, None)


def test_user_code_is_in_no_call() -> None:
    """Also if the task was in one when it was seen first."""
    found = identify(task(known=ALL), Asked(), (), "user")
    assert (found.syscall, found.file) == (None, None)


def test_another_call_than_the_first_sample() -> None:
    """The stack is what the line is about."""
    frames = ("f+0x1", "__x64_sys_write+0x2", "do_syscall_64+0x3")
    file = NamePath((b"stat",), cut=False)
    found = identify(task(known=ALL, file_system=b"proc", file=file), Asked(), frames, "kernel")
    assert (found.syscall, found.file) == ("write", None)
    assert identify(None, Asked(), frames, "kernel").syscall == "write"


ASKED = Asked(b"asked\0", 5, 6, b"p", 8, (b"/docker/" + b"a" * 64, b"/"))


def test_from_proc() -> None:
    """Without a record all comes from /proc, but what that does not tell."""
    assert identify(None, ASKED, (), "kernel") == Identity(
        *("asked", None, 5, (6, "p"), None, None, 8),
        Place("/docker/" + "a" * 64, None, None, "docker", "a" * 64),
    )
    assert identify(None, Asked(), (), None) == Identity()


def test_the_rest_from_proc() -> None:
    """What a record lacks is taken from there, what it has is not."""
    bare = task(known=Known(0), args=b"", parent_pid=0, exe=NONE)
    found = identify(bare, ASKED, (), "kernel")
    assert (found.cmdline, found.uid, found.parent, found.exe) == ("asked", 1000, (6, "p"), None)
    assert found.place.container_id == "a" * 64
    full = identify(task(known=ALL), ASKED, (), "kernel")
    assert (full.cmdline, full.parent, full.place.path) == ("spinner -v", (1, "init"), "/")


def test_the_controller_s_hierarchy() -> None:
    """On a hybrid host it may tell what the unified one does not."""
    names = (b"a" * 64, b"docker")
    assert known(controller=NamePath(names, cut=False)).place.container_id == "a" * 64
    deep = known(cgroup=NamePath((b"a" * 64, b"docker"), cut=True)).place
    assert (deep.path, deep.container_id) == (f"/…/docker/{'a' * 64}", "a" * 64)


@pytest.mark.parametrize("cut", [NamePath((b"x", b"x"), cut=True), NamePath((LONG,), cut=False)])
def test_a_cut_cgroup(cut: NamePath) -> None:
    """/proc knows the whole path; where that says nothing the part is better than none."""
    assert identify(task(cgroup=cut), ASKED, (), "kernel").place.container_id == "a" * 64
    assert identify(task(cgroup=cut), Asked(), (), "kernel").place.path is not None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"known": Known.CGROUP}, True),
        ({"known": Known.CGROUP, "task_flags": PF_KTHREAD}, False),
        ({"known": Known.ARGS}, True),
        ({"parent_pid": 0}, True),
        ({"cgroup": NamePath((b"c", b"b"), cut=True)}, True),
        ({"cgroup": NamePath((LONG,), cut=False)}, True),
        ({"cgroup": NamePath((LONG[1:],), cut=False)}, False),
        ({"controller": NamePath((LONG,), cut=False)}, True),
    ],
)
def test_lacks(changes: dict[str, Any], expected: bool) -> None:
    """/proc is asked only for what it can add: kernel threads have no command line."""
    assert lacks(task(**changes)) is expected
    assert lacks(None)


@pytest.mark.parametrize(
    ("frames", "name"),
    [
        (("vfs_read+0x1", "ksys_read+0x1", "__x64_sys_read+0x5", "do_syscall_64+0x1"), "read"),
        (("__arm64_sys_sendto+0x5", "invoke_syscall+0x1"), "sendto"),
        (("__ia32_compat_sys_ioctl+0x5",), "ioctl"),
        (("__do_sys_newstat+0x5",), "stat"),
        (("__x64_sys_bpf+0x5 [module]",), "bpf"),
        (("__se_sys_bpf.isra.0+0x5",), "bpf"),
        (("__sys_sendto+0x5",), None),
        (("__bpf_trace_sys_enter+0xc", "syscall_trace_enter+0x1"), None),
        ((), None),
    ],
)
def test_calls_of_stacks(frames: tuple[str, ...], name: str | None) -> None:
    """The outermost function of a system call names it."""
    assert of_stack(frames) == name


def test_numbers() -> None:
    """Names of x86-64, the first and last of each block, x32, and what is not known."""
    numbers = {0: "read", 110: "getppid", 334: "rseq", 424: "pidfd_send_signal", 462: "mseal"}
    assert {number: by_number(number) for number in numbers} == numbers
    assert by_number(0x40000000) == "read"
    assert by_number(400) == "syscall_400"
    names = {by_number(number) for number in range(500)}
    assert names >= ON_A_DESCRIPTOR
