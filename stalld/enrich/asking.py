"""A thread that asks /proc, since that may wait for the very task that is stuck.

``cmdline`` wants a lock of the task's memory, ``cgroup`` one that a writer may
hold. So nobody waits for an answer longer than :data:`WAIT_S`, and not at all
while an earlier question has none yet.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple

from stalld.enrich import procfs
from stalld.enrich.identity import Asked

WAIT_S = 0.002
"""The longest that a stall's first line waits."""
WAIT_PART = 20
"""Of the time, no more than one part in so many is spent waiting."""
MAX_QUESTIONS = 16
MAX_ANSWERS = 64
SCAN_EVERY_S = 1.0
"""The cgroups are not searched more often."""


class Unknown(StrEnum):
    """Why something is null.

    GONE: the task had ended. LATE: the answer came after the line. BUSY: too many questions, or
    one that hangs. DENIED: /proc may not be read, or says what is not understood. (``hidepid``
    hides a task as if it were gone.)
    """

    GONE = "gone"
    LATE = "late"
    BUSY = "busy"
    DENIED = "denied"


class Question(NamedTuple):
    """Who is asked for, in which stall. ``cgroup_id``: where it was then; None: not known."""

    cpu: int
    seq: int
    tgid: int
    tid: int
    comm: bytes
    cgroup_id: int | None


class Answer(NamedTuple):
    """What is known by now, and why it is not all; ``unknown`` None: it is."""

    asked: Asked
    unknown: Unknown | None


_UNTIL_THEN = Answer(Asked(), Unknown.LATE)


class Asking:
    """Questions to /proc, answered by a thread of its own.

    Args:
        read: asks for one task; see :func:`procfs.read_task`.
        find: the path of a cgroup by its number.
        is_there: whether there is such a thread; must not wait.
    """

    def __init__(
        self,
        read: Callable[[int, int, bytes, Callable[[Asked], None]], None] = procfs.read_task,
        find: Callable[[int], bytes | None] | None = None,
        is_there: Callable[[int], bool] = procfs.is_there,
    ) -> None:
        self._read = read
        self._is_there = is_there
        self._find = find or _find
        self._news = threading.Condition()
        self._questions: deque[Question] = deque()
        self._answers: OrderedDict[Question, Answer] = OrderedDict()
        self._found: OrderedDict[int, bytes] = OrderedDict()
        self._working = False
        self._stopping = False
        self._wait_again_s = 0.0
        self._scan_again_s = 0.0
        self._runs_on: set[int] = set()
        self.counts: Counter[str] = Counter()
        """Lines with something unknown, by reason."""
        self.longest_wait_s = 0.0
        self._thread = threading.Thread(target=self._run, name="stalld-asking", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, unless it hangs."""
        with self._news:
            self._stopping = True
            self._news.notify_all()
        self._thread.join(0.1)

    def answer(self, question: Question) -> Answer:
        """What is known by now; the first time, wait a moment for it."""
        with self._news:
            known = self._answers.get(question)
            if known is None:
                known = self._ask(question)
        if known.unknown is not None:
            self.counts[known.unknown] += 1
        return known

    def _ask(self, question: Question) -> Answer:
        gone = self._gone(question)
        if gone is not None:
            self._keep(question, gone)
            return gone
        hangs = self._working or bool(self._questions)
        if len(self._questions) >= MAX_QUESTIONS:
            return Answer(Asked(), Unknown.BUSY)
        self._keep(question, _UNTIL_THEN)
        if not hangs:
            # It sleeps, so it moves at once. At work it may stand on the CPU that is stuck, and
            # whoever moves it then has to wait for that.
            self._stay_off_the_stuck_cpu()
        self._questions.append(question)
        self._news.notify_all()
        begun_s = time.monotonic()
        if hangs:
            return Answer(Asked(), Unknown.BUSY)
        if begun_s < self._wait_again_s:
            return _UNTIL_THEN
        while self._answers.get(question, _UNTIL_THEN).unknown is Unknown.LATE:
            left_s = begun_s + WAIT_S - time.monotonic()
            if left_s <= 0:
                break
            self._news.wait(left_s)
        waited_s = time.monotonic() - begun_s
        self.longest_wait_s = max(self.longest_wait_s, waited_s)
        self._wait_again_s = begun_s + WAIT_PART * waited_s
        return self._answers.get(question, _UNTIL_THEN)

    def _gone(self, question: Question) -> Answer | None:
        """What there is to know of a task that has ended; None: it must be asked for.

        Short tasks may stall a CPU one after the other: nobody has to be woken for them.
        """
        if self._is_there(question.tid):
            return None
        if not question.cgroup_id:
            return Answer(Asked(), Unknown.GONE)
        path = self._found.get(question.cgroup_id)
        return None if path is None else Answer(Asked(cgroups=(path,)), Unknown.GONE)

    def _keep(self, question: Question, answer: Answer) -> None:
        self._answers[question] = answer
        if len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)

    def _stay_off_the_stuck_cpu(self) -> None:
        """Whoever reads a record runs where nothing is stuck (decision 1)."""
        here = os.sched_getaffinity(0)
        thread = self._thread.native_id
        if here != self._runs_on and thread is not None:
            with suppress(OSError):
                os.sched_setaffinity(thread, here)
            self._runs_on = here

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._questions and not self._stopping:
                    self._news.wait()
                if self._stopping:
                    return
                question = self._questions.popleft()
                self._working = True
            asked, unknown = self._work(question)
            with self._news:
                self._working = False
                self._keep(question, Answer(asked, unknown))
                self._news.notify_all()

    def _work(self, question: Question) -> tuple[Asked, Unknown | None]:
        known = Asked()

        def tell(asked: Asked) -> None:
            nonlocal known
            known = asked
            with self._news:
                self._keep(question, Answer(asked, Unknown.LATE))

        try:
            self._read(question.tgid, question.tid, question.comm, tell)
        except procfs.GoneError:
            if known.cgroups is None and question.cgroup_id:
                known = known._replace(cgroups=self._search(question.cgroup_id))
            return known, Unknown.GONE
        except (OSError, ValueError):
            return known, Unknown.DENIED
        return known, None

    def _search(self, cgroup_id: int) -> tuple[bytes, ...] | None:
        """Numbers are not used again, so what was found stays true."""
        path = self._found.get(cgroup_id)
        if path is None and time.monotonic() >= self._scan_again_s:
            path = self._find(cgroup_id)
            self._scan_again_s = time.monotonic() + SCAN_EVERY_S
        if path is None:
            return None
        self._found[cgroup_id] = path
        if len(self._found) > MAX_ANSWERS:
            self._found.popitem(last=False)
        return (path,)


def _find(cgroup_id: int) -> bytes | None:
    mount = procfs.unified_mount()
    return procfs.find_cgroup(mount, cgroup_id) if mount else None
