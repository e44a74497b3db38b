"""The probe child: ``python -m stalld.probe`` with a socket as standard input."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path

from stalld.errors import MissingAbilityError, ProbeError
from stalld.probe import loader, protocol

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Load, hand over, exit. The answer also carries every foreseeable failure."""
    # A daemon that dies while we compile must leave nothing behind.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=os.dup(0)) as sock:
        message, _ = protocol.receive(sock)
        request = protocol.Request(**message)
        try:
            with loader.structs_directory() as directory:
                description, fds = loader.load(request, Path(directory))
        except ProbeError as error:
            kind = "missing" if isinstance(error, MissingAbilityError) else "probe"
            protocol.send(sock, {"error": str(error), "kind": kind}, [])
            return 1
        except OSError as error:
            said = (
                f"the BPF programs cannot be prepared: {error}; is there room in $TMPDIR or /tmp?"
            )
            protocol.send(sock, {"error": said, "kind": "probe"}, [])
            return 1
        protocol.send(sock, asdict(description), fds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
