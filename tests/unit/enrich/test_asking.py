"""Asking /proc: what it says, and that nobody waits for it longer than told."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from stalld.enrich import procfs
from stalld.enrich.asking import MAX_QUESTIONS, WAIT_S, Answer, Asking, Question, Unknown
from stalld.enrich.identity import Asked
from stalld.enrich.procfs import GoneError, find_cgroup, is_there, read_task, unified_mount

Tell = Callable[[Asked], None]
FULL = Asked(b"a\0", 1, 2, b"p", None, (b"/x",))
GONE = 102
SLACK_S = 0.5
"""Another process may have the CPU."""


def question(seq: int = 1, cgroup_id: int | None = None) -> Question:
    """Of the stall ``seq``."""
    return Question(0, seq, 100, 101, b"spinner", cgroup_id)


def eventually(asking: Asking, wanted: Unknown | None, seq: int = 1) -> Answer:
    """The answer that a later line gets."""
    deadline = time.monotonic() + 5
    while (known := asking.answer(question(seq))).unknown is not wanted:
        assert time.monotonic() < deadline, known
        time.sleep(0.005)
    return known


class Proc:
    """Answers when it is let."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked = 0
        self.error: Exception | None = None

    def __call__(self, tgid: int, tid: int, comm: bytes, tell: Tell) -> None:
        """Tell a part, wait, tell the rest."""
        self.asked += 1
        if self.error:
            raise self.error
        tell(Asked(uid=1))
        self.go.wait(10)
        tell(FULL)


@pytest.fixture
def proc() -> Proc:
    """It hangs until told otherwise."""
    return Proc()


@pytest.fixture
def asking(proc: Proc) -> Iterator[Asking]:
    """The thread, ended with the test."""
    made = Asking(proc, lambda wanted: b"/found" if wanted == 7 else None, lambda tid: tid != GONE)
    yield made
    proc.go.set()
    made.close()


def test_at_once(asking: Asking, proc: Proc) -> None:
    """What comes soon is in the first line."""
    proc.go.set()
    assert eventually(asking, None) == Answer(FULL, None)
    assert proc.asked == 1


def test_too_late(asking: Asking, proc: Proc) -> None:
    """The first line has what was there in time, a later one all; the reason is counted."""
    begun = time.monotonic()
    known = asking.answer(question())
    assert time.monotonic() - begun < WAIT_S + SLACK_S
    assert known.unknown is Unknown.LATE
    assert known.asked in (Asked(), Asked(uid=1))
    proc.go.set()
    assert eventually(asking, None).asked == FULL
    assert asking.counts["late"] >= 1
    assert asking.longest_wait_s < WAIT_S + SLACK_S


def test_one_that_hangs_delays_nobody(asking: Asking, proc: Proc) -> None:
    """While a question has no answer nothing is waited for, and the queue has an end."""
    asking.answer(question())
    while not proc.asked:
        time.sleep(0.001)
    begun = time.monotonic()
    for seq in range(2, 200):
        assert asking.answer(question(seq)).unknown is Unknown.BUSY
    assert time.monotonic() - begun < 198 * WAIT_S / 2
    assert asking.counts["busy"] == 198
    proc.go.set()
    eventually(asking, None, seq=MAX_QUESTIONS)
    assert proc.asked <= MAX_QUESTIONS + 1


def test_moved_only_while_it_sleeps(asking: Asking, proc: Proc) -> None:
    """It works where the asker is; at work, perhaps on the stuck CPU, nobody waits to move it."""
    allowed = os.sched_getaffinity(0)
    thread = asking._thread.native_id
    assert thread is not None
    try:
        for number, cpu in enumerate(sorted(allowed)[:2]):
            os.sched_setaffinity(0, {cpu})
            asking.answer(question(number))
            # The first question hangs.
            assert os.sched_getaffinity(thread) == {min(allowed)}
    finally:
        os.sched_setaffinity(0, allowed)


def test_waits_are_rare(asking: Asking, proc: Proc) -> None:
    """A storm of stalls that each would wait does not: a small part of the time at most."""
    waited = 0
    for seq in range(1, 9):
        asking._working = False  # As if the one before had been answered.
        asking._questions.clear()
        begun = time.monotonic()
        asking.answer(question(seq))
        waited += time.monotonic() - begun >= WAIT_S
    assert waited <= 2


@pytest.mark.parametrize(
    ("error", "unknown"),
    [(GoneError(), Unknown.GONE), (PermissionError(), Unknown.DENIED)],
)
def test_errors(asking: Asking, proc: Proc, error: Exception, unknown: Unknown) -> None:
    """A task that is gone is said to be, and so is one that is hidden."""
    proc.error = error
    assert eventually(asking, unknown).asked == Asked()


def test_the_cgroup_of_one_that_is_gone(asking: Asking, proc: Proc) -> None:
    """It is looked for by its number, and remembered."""
    proc.error = GoneError()
    for seq in (1, 2):
        deadline = time.monotonic() + 5
        while asking.answer(question(seq, 7)).asked.cgroups != (b"/found",):
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_one_that_has_ended(asking: Asking, proc: Proc) -> None:
    """Nobody is asked but where its cgroup is, and that once."""
    proc.error = GoneError()
    ended = question()._replace(tid=GONE)
    assert asking.answer(ended) == Answer(Asked(), Unknown.GONE)
    assert asking.counts["gone"] == 1
    assert proc.asked == 0
    found = Answer(Asked(cgroups=(b"/found",)), Unknown.GONE)
    deadline = time.monotonic() + 5
    while asking.answer(ended._replace(cgroup_id=7)) != found:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert asking.answer(ended._replace(seq=2, cgroup_id=7)) == found
    assert proc.asked == 1


def test_who_is_there() -> None:
    """Threads count each for itself, children that wait for us are still there."""
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(threading.get_native_id()))
    thread.start()
    thread.join()
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert is_there(os.getpid())
    assert is_there(child)
    os.waitpid(child, 0)
    assert not is_there(child)
    deadline = time.monotonic() + 5
    while is_there(ended[0]):
        assert time.monotonic() < deadline


def test_ourselves() -> None:
    """The real /proc: what it says of this process."""
    told: list[Asked] = []
    comm = Path("/proc/self/comm").read_bytes().rstrip(b"\n")
    read_task(os.getpid(), os.getpid(), comm, told.append)
    known = told[-1]
    assert known.args is not None
    assert known.args[:9] == Path("/proc/self/cmdline").read_bytes()[:9]
    assert (known.uid, known.parent_pid) == (os.getuid(), os.getppid())
    assert known.cgroups
    assert [t.args for t in told[:-1]] == [None] * (len(told) - 1)


def test_somebody_else() -> None:
    """A number that another task has by now is not that task."""
    with pytest.raises(GoneError):
        read_task(os.getpid(), os.getpid(), b"somebody", lambda asked: None)
    with pytest.raises(GoneError):
        read_task(2**22 + 1, 2**22 + 1, b"x", lambda asked: None)


def made_proc(root: Path, cgroup: str) -> str:
    """A /proc with one process."""
    own = root / "10"
    (own / "task/11").mkdir(parents=True)
    (own / "task/11/comm").write_text("spinner\n")
    (own / "status").write_text("Name:\tx\nPPid:\t3\nUid:\t5\t5\t5\t5\nNSpid:\t10\t4\n")
    (own / "cgroup").write_text(cgroup)
    (own / "cmdline").write_bytes(b"a\0b\0")
    (root / "3").mkdir()
    (root / "3/comm").write_text("shim\n")
    return str(root)


@pytest.mark.parametrize(
    ("cgroup", "paths"),
    [
        ("0::/a.service\n", (b"/a.service",)),
        (
            "5:memory:/docker/x\n3:cpu,cpuacct:/y:z\n1:name=systemd:/s\n0::/u (deleted)\n",
            (b"/u", b"/docker/x", b"/y:z", b"/s"),
        ),
        ("4:freezer:/\n", ()),
        ("", ()),
    ],
)
def test_another_proc(tmp_path: Path, cgroup: str, paths: tuple[bytes, ...]) -> None:
    """Every field, and the hierarchies that tell most, in that order."""
    told: list[Asked] = []
    read_task(10, 11, b"spinner", told.append, made_proc(tmp_path, cgroup))
    assert told[-1] == Asked(b"a\0b\0", 5, 3, b"shim", 4, paths)


@pytest.mark.parametrize(
    ("found", "comm", "same"),
    [
        (b"kworker/0:0H-kblockd", b"kworker/0:0H", True),
        (b"kworker/0:0-x", b"kworker/0:0", True),
        (b"a_thread_of_the_kernel", b"a_thread_of_the", True),
        (b"spinner\n", b"spinner\n", True),
        (b"spinner2", b"spinner", False),
        (b"spinner", b"spinner\n", False),
    ],
)
def test_names(tmp_path: Path, found: bytes, comm: bytes, same: bool) -> None:
    """Of kernel threads /proc tells more than the kernel's own name; of others it must be that."""
    proc = made_proc(tmp_path, "")
    (tmp_path / "10/task/11/comm").write_bytes(found + b"\n")
    told: list[Asked] = []
    with nullcontext() if same else pytest.raises(GoneError):
        read_task(10, 11, comm, told.append, proc)
    assert bool(told) is same


def test_nonsense_does_not_end_the_thread(tmp_path: Path) -> None:
    """What is not understood is told as unknown, and the next question has its answer."""
    proc = made_proc(tmp_path, "")
    (tmp_path / "10").rename(tmp_path / "100")
    (tmp_path / "100/task/11").rename(tmp_path / "100/task/101")
    status = tmp_path / "100/status"
    status.write_text("PPid:\tx\n")
    asking = Asking(partial(read_task, proc=proc), is_there=lambda _: True)
    try:
        eventually(asking, Unknown.DENIED, 1)
        status.write_text("PPid:\t3\n")
        assert eventually(asking, None, 2).asked.parent_pid == 3
    finally:
        asking.close()


def test_mounts(tmp_path: Path) -> None:
    """The unified hierarchy is found wherever it is mounted as a whole."""
    (tmp_path / "self").mkdir()
    info = tmp_path / "self/mountinfo"
    assert unified_mount(str(tmp_path)) is None
    info.write_bytes(
        b"30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n"
        b"29 24 0:25 / /usb/a\x0cb\x85\xff rw - fuse x rw\n\n"
        b"31 30 0:27 /part /mnt rw shared:9 - cgroup2 cgroup2 rw\n"
        b"31 30 0:27 / /sys/fs/cgroup/a\\040b\xff rw shared:9 - cgroup2 cgroup2 rw\n"
    )
    assert unified_mount(str(tmp_path)) == "/sys/fs/cgroup/a b\udcff"


def test_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By inode, at any depth; what is not there, or too far, is None."""
    deep = tmp_path / "a.slice/b\udcff.scope"
    deep.mkdir(parents=True)
    (tmp_path / "file").touch()
    mount = str(tmp_path)
    assert find_cgroup(mount, deep.stat().st_ino) == b"/a.slice/b\xff.scope"
    assert find_cgroup(mount, tmp_path.stat().st_ino) == b"/"
    assert find_cgroup(mount, (tmp_path / "file").stat().st_ino) is None
    assert find_cgroup(mount, 2**63) is None
    assert find_cgroup(str(tmp_path / "none"), 5) is None
    monkeypatch.setattr(procfs, "SCANNED_MAX", 0)
    assert find_cgroup(mount, deep.stat().st_ino) is None
