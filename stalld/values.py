"""What the configuration's values may be: rules for addresses, paths, names. Pure."""

from __future__ import annotations

import re
import socket
from collections.abc import Hashable
from pathlib import PurePosixPath

from stalld.records import VECTORS
from stalld.tables import closest, number, one_of, string, strings

FACILITIES = (
    *("kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron"),
    *("authpriv", "ftp", "ntp", "security", "console", "solaris-cron"),
    *(f"local{number}" for number in range(8)),
)
"""syslog facilities by number (RFC 5424, table 1)."""
# PATH_MAX counts the last NUL. So does struct sockaddr_un, which holds 108 bytes.
_MAX_PATH = 4095
_MAX_SOCKET_PATH = 107


def _vector_fault(name: str) -> str:
    if name in VECTORS:
        return ""
    meant = closest(name.upper(), VECTORS)
    return "is no softirq vector" + (f" (did you mean {meant}?)" if meant else "")


def _pattern_fault(pattern: str) -> str:
    return "" if 1 <= len(pattern) <= 64 else f"has {len(pattern)} characters"


def _path_fault(path: str, most: int = _MAX_PATH) -> str:
    if not path.startswith("/"):
        return "is no absolute path"
    if path.rpartition("/")[2] in ("", ".", ".."):
        return "is the path of a directory"
    return f"is longer than {most} bytes" if len(path.encode()) > most else ""


def _socket_fault(path: str) -> str:
    return _path_fault(path, _MAX_SOCKET_PATH)


def _optional_path_fault(path: str) -> str:
    return _path_fault(path) if path else ""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[address]:port``.

    Raises:
        ValueError: it is neither.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise ValueError("no host and port")
    bracketed = re.fullmatch(r"\[(.*)\]", host)
    if bracketed is None and (_is_ip(socket.AF_INET6, address) or _is_ip(socket.AF_INET6, host)):
        raise ValueError("an IPv6 address stands in brackets")
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65_535:
        raise ValueError("the port is no number from 1 to 65535")
    if bracketed is not None:
        host = bracketed[1]
        if not _is_ip(socket.AF_INET6, host):
            raise ValueError("no IPv6 address stands in the brackets")
    elif not _is_host(host):
        raise ValueError("the host is neither a name nor an IP address")
    return host, int(port)


def _is_ip(family: int, text: str) -> bool:
    address, percent, scope = text.partition("%")
    if percent and not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", scope):
        return False
    try:
        socket.inet_pton(family, address)
    except (OSError, ValueError):
        return False
    return True


def _is_host(name: str) -> bool:
    """Whether the resolver can be asked for it: it raises UnicodeError for some names."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+){3}", name):
        return _is_ip(socket.AF_INET, name)
    try:
        encoded = name.encode("idna").decode() if len(name) <= 253 else ""
    except UnicodeError:
        return False
    label = "[A-Za-z0-9_-]{1,63}"
    return bool(re.fullmatch(rf"{label}(\.{label})*\.?", encoded)) and len(encoded) <= 253


def _address_fault(address: str) -> str:
    try:
        split_address(address)
    except ValueError as error:
        return f"is no address: {error}"
    return ""


def _syslog_fault(address: str) -> str:
    return _socket_fault(address) if address.startswith("/") else _address_fault(address)


def place(name: str) -> Hashable:
    """The same for all spellings of a path or an address."""
    if name.startswith("/"):
        return PurePosixPath("/" + name.lstrip("/"))
    host, port = split_address(name)
    return host.lower().rstrip("."), port


def _host_fault(name: str) -> str:
    right = not name or _is_host(name) or _is_ip(socket.AF_INET6, name)
    return "" if right else "is neither a host name nor an IP address"


def _word_fault(word: str) -> str:
    if not word or len(word) > 48:
        return f"has {len(word)} characters"
    return "" if re.fullmatch("[!-~]+", word) else "has other characters"


def _group_fault(name: str) -> str:
    if len(name) > 64:
        return f"has {len(name)} characters"
    # As /etc/group could not hold it.
    return "" if not name or (name.isprintable() and ":" not in name) else "is no name of a group"


VECTOR_NAMES = strings(
    f"an array of one or more of {', '.join(VECTORS)}, none twice", _vector_fault, distinct=True
)
PATTERNS = strings("an array, maybe empty, of shell patterns of 1 to 64 characters", _pattern_fault)
PATH = string("the absolute path of a file", _path_fault)
OPTIONAL_PATH = string('the absolute path of a file, or "" for none', _optional_path_fault)
ADDRESS = string("host:port, an IPv6 address in brackets", _address_fault)
QUEUE_KIB = number(int, 64, 1_048_576)
HOST = string('a host name or IP address, or "" for the one in address', _host_fault)
SYSLOG = string("host:port (TCP) or the absolute path of a unix socket", _syslog_fault)
FACILITY = one_of(*FACILITIES)
WORD = string("1 to 48 printable ASCII characters without spaces", _word_fault)
SOCKET = string(f"an absolute path of at most {_MAX_SOCKET_PATH} bytes", _socket_fault)
GROUP = string('the name of a group, or "" for our own', _group_fault)
