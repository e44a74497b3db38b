"""Helper processes: started, asked and ended by the injector, never outliving it.

Requests and answers are JSON lines on the child's stdin and stdout. A child ends when its
stdin closes, and the kernel kills it when the thread that started it ends.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.injector.kinds import InjectorError, UnsupportedError
from tests.injector.system import die_with, set_comm
from tests.slowness import slow

Handler = Callable[[Mapping[str, Any]], Mapping[str, Any]]

_ROOT = Path(__file__).parents[2]


class Child:
    """The injector's end.

    Args:
        module: of this package, run as the child; it calls :func:`serve`.
        arguments: its command line after the parent's pid.
        pass_fds: descriptors it inherits.
    """

    def __init__(self, module: str, arguments: Sequence[str], pass_fds: Sequence[int] = ()) -> None:
        self._buffer = b""
        self._module = module
        # A session of its own: Ctrl-C is for the parent, which then ends its children.
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"tests.injector.{module}", str(os.getpid()), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=_ROOT,
            pass_fds=pass_fds,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def call(self, request: Mapping[str, Any], timeout_s: float = 20.0) -> dict[str, Any]:
        """Ask and wait for the answer.

        Raises:
            UnsupportedError, InjectorError: as raised in the child, or it died or hung.
        """
        assert self._process.stdin is not None
        # Should it have died, the reason is in its answer, if it gave one.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        answer = self._answer(timeout_s)
        if "error" in answer:
            error = UnsupportedError if answer["unsupported"] else InjectorError
            raise error(answer["error"])
        return answer

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + slow(timeout_s)
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise InjectorError(f"no answer from the {self._module} in {timeout_s:g} s")
            chunk = os.read(self._process.stdout.fileno(), 65536)
            if not chunk:
                raise InjectorError(f"the {self._module} ended: {self._process.wait(timeout_s)}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the child and wait for it; may be called twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(slow(1.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def be_child(comm: str) -> list[str]:
    """Prepare a child process; return its own command-line arguments."""
    die_with(int(sys.argv[1]))
    set_comm(comm)
    return sys.argv[2:]


def serve(handle: Handler) -> None:
    """Answer requests until the parent closes the pipes or is gone."""
    for line in sys.stdin:
        try:
            answer = dict(handle(json.loads(line)))
        except InjectorError as error:
            answer = {"error": str(error), "unsupported": isinstance(error, UnsupportedError)}
        try:
            os.write(sys.stdout.fileno(), json.dumps(answer).encode() + b"\n")
        except BrokenPipeError:
            return
