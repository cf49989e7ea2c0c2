"""A disk that fails under SQLite, at the n-th operation: below the library, in the functions that it writes files with.

SQLite calls the system through a table of functions (its VFS). Here that table's opening, writing, syncing, truncating
and deleting count what passes and, when told to, answer as they do when the disk is full or broken.
"""

import _sqlite3
import contextlib
import ctypes
from collections.abc import Iterator
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import pytest

OK, FULL, CANTOPEN = 0, 13, 14
IOERR_WRITE, IOERR_FSYNC, IOERR_TRUNCATE, IOERR_DELETE, IOERR_SHMSIZE = (
    10 | n << 8 for n in (3, 4, 6, 10, 19)
)
_OPEN_CREATE = 0x4

# Names go through as pointers: SQLite reads the name of an open file again, later.
_Open = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_Delete = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int)
_Write = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_Truncate = CFUNCTYPE(c_int, c_void_p, c_int64)
_Sync = CFUNCTYPE(c_int, c_void_p, c_int)
_ShmMap = CFUNCTYPE(c_int, c_void_p, c_int, c_int, c_int, c_void_p)


class _Methods(Structure):
    """sqlite3_io_methods, version 3."""

    _fields_ = (
        ("version", c_int),
        ("close", c_void_p),
        ("read", c_void_p),
        ("write", _Write),
        ("truncate", _Truncate),
        ("sync", _Sync),
        *(
            (name, c_void_p)
            for name in ("size", "lock", "unlock", "is_locked", "control", "sector", "traits")
        ),
        ("shm_map", _ShmMap),
        *((name, c_void_p) for name in ("shm_lock", "shm_barrier", "shm_unmap", "fetch", "unfetch")),
    )


class _File(Structure):
    """sqlite3_file."""

    _fields_ = (("methods", POINTER(_Methods)),)


class _Vfs(Structure):
    """sqlite3_vfs, as far as it is needed."""

    _fields_ = (
        ("version", c_int),
        ("file_size", c_int),
        ("max_path", c_int),
        ("next", c_void_p),
        ("name", c_char_p),
        ("data", c_void_p),
        ("open", _Open),
        ("delete", _Delete),
    )


@dataclass
class FailingDisk:
    """Every SQLite database that is opened while it is installed lies on it."""

    passed: int = 0
    """Operations so far that change something."""
    first_failure: int | None = None
    last_failure: int | None = None
    is_full: bool = False

    def fail(self, after: int, *, is_full: bool) -> None:
        """Fail the operation that is `after` ones away, 1 is the next: a broken disk once, a full one from then on,
        though only what needs room."""
        self.first_failure = self.passed + after
        self.last_failure = None if is_full else self.first_failure
        self.is_full = is_full

    def heal(self) -> None:
        """There is room again."""
        self.first_failure = None

    def _fails(self, *, needs_room: bool) -> bool:
        self.passed += 1
        return (
            self.first_failure is not None
            and (needs_room or not self.is_full)
            and self.passed >= self.first_failure
            and (self.last_failure is None or self.passed <= self.last_failure)
        )

    @contextlib.contextmanager
    def installed(self) -> Iterator["FailingDisk"]:
        """Put it under SQLite, and take it away again."""
        library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
        library.sqlite3_vfs_find.restype = POINTER(_Vfs)
        vfs = library.sqlite3_vfs_find(None).contents
        real_open, real_delete = _Open.from_buffer_copy(vfs.open), _Delete.from_buffer_copy(vfs.delete)
        copies: dict[int, Any] = {}

        def open_file(this: Any, path: Any, file: Any, flags: int, out: Any) -> int:
            if flags & _OPEN_CREATE and self._fails(needs_room=True):
                return CANTOPEN
            status = int(real_open(this, path, file, flags, out))
            opened = _File.from_address(file)
            if status == OK and opened.methods:
                address = ctypes.addressof(opened.methods.contents)
                if address not in copies:
                    copies[address] = self._failing(opened.methods.contents)
                opened.methods = ctypes.pointer(copies[address])
            return status

        def delete(this: Any, path: Any, sync: int) -> int:
            return IOERR_DELETE if self._fails(needs_room=False) else int(real_delete(this, path, sync))

        _kept.extend((real_open, real_delete, copies))
        vfs.open, vfs.delete = _keep(_Open(open_file)), _keep(_Delete(delete))
        try:
            yield self
        finally:
            vfs.open, vfs.delete = real_open, real_delete

    def _failing(self, real: _Methods) -> _Methods:
        methods = _Methods.from_buffer_copy(real)

        def failing(call: Any, kind: Any, broken: int, full: int | None = None) -> Any:
            def answer(*given: Any) -> int:
                if self._fails(needs_room=full is not None):
                    return full if self.is_full and full is not None else broken
                return int(call(*given))

            return _keep(kind(answer))

        methods.write = failing(real.write, _Write, IOERR_WRITE, FULL)
        methods.truncate = failing(real.truncate, _Truncate, IOERR_TRUNCATE)
        methods.sync = failing(real.sync, _Sync, IOERR_FSYNC)
        if real.version >= 2 and real.shm_map:
            methods.shm_map = failing(real.shm_map, _ShmMap, IOERR_SHMSIZE, IOERR_SHMSIZE)
        return methods


_kept: list[Any] = []


def _keep(function: Any) -> Any:
    """C holds no reference to what it may call, also long after the test: a file that is open still."""
    _kept.append(function)
    return function


@pytest.fixture
def disk() -> Iterator[FailingDisk]:
    """Fails under the databases of this test."""
    with FailingDisk().installed() as failing:
        yield failing
