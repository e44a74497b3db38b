"""As much of libbpf as the injector needs, through ctypes."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
from collections.abc import Mapping, Sequence
from ctypes import c_char_p, c_int, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Self

from tests.injector.kinds import InjectorError, UnsupportedError

INGRESS = 1
EGRESS = 2
_BPF_F_TEST_RUN_ON_CPU = 1
_LOG_LINE = 4096
_LOG_KEPT = 400


class _TcHook(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("ifindex", c_int),
        ("attach_point", c_int),
        ("parent", c_uint32),
    )


class _TcOpts(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("prog_fd", c_int),
        ("flags", c_uint32),
        ("prog_id", c_uint32),
        ("handle", c_uint32),
        ("priority", c_uint32),
    )


class _TestRunOpts(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class _MapInfo(ctypes.Structure):
    """``struct bpf_map_info`` up to the name."""

    _fields_ = (*((f"word{n}", c_uint32) for n in range(6)), ("name", ctypes.c_char * 16))


_Print = ctypes.CFUNCTYPE(c_int, c_int, c_void_p, c_void_p)

_POINTERS = {
    "bpf_object__open_file": (c_char_p, c_void_p),
    "bpf_object__find_program_by_name": (c_void_p, c_char_p),
    "bpf_object__find_map_by_name": (c_void_p, c_char_p),
    "bpf_object__next_program": (c_void_p, c_void_p),
    "bpf_program__attach_raw_tracepoint": (c_void_p, c_char_p),
}
_INTEGERS = {
    "bpf_object__load": (c_void_p,),
    "bpf_program__fd": (c_void_p,),
    "bpf_program__set_autoload": (c_void_p, ctypes.c_bool),
    "bpf_map__fd": (c_void_p,),
    "bpf_map__reuse_fd": (c_void_p, c_int),
    "bpf_map_get_fd_by_id": (c_uint32,),
    "bpf_obj_get_info_by_fd": (c_int, c_void_p, c_void_p),
    "bpf_map_lookup_elem": (c_int, c_void_p, c_void_p),
    "bpf_map_update_elem": (c_int, c_void_p, c_void_p, ctypes.c_uint64),
    "bpf_prog_test_run_opts": (c_int, c_void_p),
    "bpf_tc_hook_create": (c_void_p,),
    "bpf_tc_attach": (c_void_p, c_void_p),
    "bpf_link__destroy": (c_void_p,),
}


class _Library:
    """libbpf with typed functions, and what it has to say kept instead of printed."""

    def __init__(self) -> None:
        try:
            self.so = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise UnsupportedError("libbpf.so.1 is missing: install libbpf1") from error
        for names, result in ((_POINTERS, c_void_p), (_INTEGERS, c_int)):
            for name, arguments in names.items():
                function = getattr(self.so, name)
                function.restype, function.argtypes = result, arguments
        self.so.bpf_object__close.argtypes = (c_void_p,)
        self.so.bpf_object__close.restype = None
        self.said: list[str] = []
        self._libc = ctypes.CDLL(None)
        self._callback = _Print(self._print)
        self.so.libbpf_set_print(self._callback)

    def _print(self, level: int, text: int, arguments: int) -> int:
        # A va_list reaches a callback as a pointer on all 64-bit machines we know.
        if level <= 1:
            line = ctypes.create_string_buffer(_LOG_LINE)
            self._libc.vsnprintf(line, c_size_t(_LOG_LINE), c_void_p(text), c_void_p(arguments))
            self.said = [*self.said[-_LOG_KEPT:], line.value.decode("utf-8", "replace")]
        return 0

    def fail(self, what: str, error: int) -> InjectorError:
        """Build the error for a failed call, with what libbpf and the verifier said."""
        message = f"{what}: {os.strerror(error)}\n{''.join(self.said)}".strip()
        if error in (errno.ENOENT, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.E2BIG):
            return UnsupportedError(message)
        return InjectorError(message)


@functools.cache
def _library() -> _Library:
    return _Library()


def process_map(pid: int, name: str) -> int:
    """A descriptor, to be closed, of the map of that name that a process has one of.

    Raises:
        InjectorError: it has none.
        UnsupportedError: we may not have it: CAP_SYS_ADMIN is missing.
    """
    lib = _library()
    for map_id in _map_ids(pid):
        fd: int = lib.so.bpf_map_get_fd_by_id(map_id)
        if fd == -errno.ENOENT:
            continue  # it has gone meanwhile
        if fd < 0:
            raise lib.fail(f"cannot open the map {map_id}", -fd)
        info, size = _MapInfo(), c_uint32(ctypes.sizeof(_MapInfo))
        error = lib.so.bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
        if not error and info.name == name.encode():
            return fd
        os.close(fd)
        if error:
            raise lib.fail(f"cannot ask after the map {map_id}", -error)
    raise InjectorError(f"process {pid} has no BPF map {name}")


def _map_ids(pid: int) -> set[int]:
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").glob("*"):
        try:
            text = path.read_text()
        except FileNotFoundError:
            continue  # it was closed meanwhile
        found |= {int(number) for number in re.findall(r"^map_id:\s*(\d+)$", text, re.MULTILINE)}
    return found


class BpfObject:
    """A loaded BPF object. Closing it detaches and frees everything but tc filters.

    Args:
        path: the compiled object.
        programs: those to load; None for all.
        reused: name → descriptor of maps that take the place of its own; the caller's to close.

    Raises:
        UnsupportedError: this kernel refuses it; the message holds the verifier's log.
    """

    def __init__(
        self,
        path: Path,
        programs: Sequence[str] | None = None,
        reused: Mapping[str, int] | None = None,
    ) -> None:
        self._lib = _library()
        self._so = self._lib.so
        self._lib.said = []
        self._links: list[int] = []
        self._object: int | None = self._so.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            raise self._lib.fail(f"cannot open {path}", ctypes.get_errno())
        try:
            if programs is not None:
                self._load_only(programs)
            for name, fd in (reused or {}).items():
                if error := self._so.bpf_map__reuse_fd(self._map(name), fd):
                    raise self._lib.fail(f"cannot reuse a map as {name}", -error)
            if error := self._so.bpf_object__load(self._object):
                raise self._lib.fail(f"cannot load {programs or path.name}", -error)
        except InjectorError:
            self.close()
            raise

    def _load_only(self, names: Sequence[str]) -> None:
        wanted = {self._program(name) for name in names}
        program = self._so.bpf_object__next_program(self._object, None)
        while program:
            self._so.bpf_program__set_autoload(program, program in wanted)
            program = self._so.bpf_object__next_program(self._object, program)

    def _program(self, name: str) -> int:
        program: int | None = self._so.bpf_object__find_program_by_name(self._object, name.encode())
        if not program:
            raise InjectorError(f"no program {name}")
        return program

    def map_fd(self, name: str) -> int:
        """Descriptor of a map, ours to use until :meth:`close`."""
        return int(self._so.bpf_map__fd(self._map(name)))

    def _map(self, name: str) -> int:
        bpf_map: int | None = self._so.bpf_object__find_map_by_name(self._object, name.encode())
        if not bpf_map:
            raise InjectorError(f"no map {name}")
        return bpf_map

    def update(self, map_fd: int, index: int, value: bytes) -> None:
        """Set an array element; ``value`` has exactly the map's value size."""
        key = index.to_bytes(4, "little")
        if error := self._so.bpf_map_update_elem(map_fd, key, value, 0):
            raise self._lib.fail("map update", -error)

    def lookup(self, map_fd: int, index: int, size: int) -> bytes:
        """Read an array element of ``size`` bytes, which must be the map's value size."""
        value = ctypes.create_string_buffer(size)
        if error := self._so.bpf_map_lookup_elem(map_fd, index.to_bytes(4, "little"), value):
            raise self._lib.fail("map lookup", -error)
        return value.raw

    def attach_raw_tracepoint(self, program: str, tracepoint: str) -> None:
        """Attach until :meth:`close`.

        Raises:
            UnsupportedError: this kernel has no such tracepoint.
        """
        link = self._so.bpf_program__attach_raw_tracepoint(
            self._program(program), tracepoint.encode()
        )
        if not link:
            raise self._lib.fail(f"cannot attach to {tracepoint}", ctypes.get_errno())
        self._links.append(link)

    def attach_tc(self, program: str, ifindex: int, attach_point: int) -> None:
        """Attach as a tc filter in the calling thread's namespace; it goes with the interface."""
        fd = self._so.bpf_program__fd(self._program(program))
        hook = _TcHook(ctypes.sizeof(_TcHook), ifindex, attach_point)
        error = self._so.bpf_tc_hook_create(ctypes.byref(hook))
        if error not in (0, -errno.EEXIST):
            raise self._lib.fail("cannot create clsact", -error)
        opts = _TcOpts(ctypes.sizeof(_TcOpts), fd)
        if error := self._so.bpf_tc_attach(ctypes.byref(hook), ctypes.byref(opts)):
            raise self._lib.fail(f"cannot attach {program} to tc", -error)

    def run_on_cpu(self, program: str, cpu: int) -> None:
        """Run a raw tracepoint program once on another CPU, in an IPI, and wait for it."""
        opts = _TestRunOpts(sz=ctypes.sizeof(_TestRunOpts), flags=_BPF_F_TEST_RUN_ON_CPU, cpu=cpu)
        fd = self._so.bpf_program__fd(self._program(program))
        if error := self._so.bpf_prog_test_run_opts(fd, ctypes.byref(opts)):
            raise self._lib.fail(f"test run on CPU {cpu}", -error)

    def close(self) -> None:
        """Detach and free; may be called twice."""
        while self._links:
            self._so.bpf_link__destroy(self._links.pop())
        if self._object:
            self._so.bpf_object__close(self._object)
            self._object = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
