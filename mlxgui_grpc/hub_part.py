"""A file on its way from the hub, and the meter that counts what arrived."""

import collections
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from mlxgui_grpc.hub_files import RepositoryFile
from mlxgui_grpc.hub_frames import JobError, Progress

PROGRESS_INTERVAL_SECONDS = 0.1
SPEED_WINDOW_SECONDS = 5.0


class PartFile:
    """A file on its way: appends to disk, hashes and counts what it appends.

    Has the few methods of a binary file that `http_get` calls. Unbuffered, so that a killed process
    loses nothing that it was given.
    """

    def __init__(self, raw: BinaryIO, file: RepositoryFile, model_id: str, meter: "Meter") -> None:
        self._raw = raw
        self._file = file
        self._model_id = model_id
        self._meter = meter
        self.size_bytes = 0
        self._hash = file.new_hash()

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path, file: RepositoryFile, model_id: str, meter: "Meter") -> Iterator["PartFile"]:
        """Open or create the part; what an earlier attempt left is hashed and counted."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        with open(descriptor, "r+b", buffering=0) as raw:
            part = cls(cast(BinaryIO, raw), file, model_id, meter)
            part._take_up()
            yield part

    def _take_up(self) -> None:
        while chunk := self._raw.read(1024 * 1024):
            self._hash.update(chunk)
            self.size_bytes += len(chunk)
        self._meter.advance(self.size_bytes)
        if self.size_bytes > self._file.size_bytes:
            self.discard()

    def write(self, data: bytes) -> int:
        if self.size_bytes + len(data) > self._file.size_bytes:
            self.discard()
            raise wrong_size(self._model_id, self._file)
        view = memoryview(data)
        while view:
            view = view[self._raw.write(view) :]
        self._hash.update(data)
        self.size_bytes += len(data)
        self._meter.advance(len(data), is_fetched=True)
        return len(data)

    def tell(self) -> int:
        return self.size_bytes

    def seek(self, position: int) -> int:
        # http_get starts over when the hub ignored its range, and only then.
        assert position == 0, position
        self.discard()
        return 0

    def truncate(self) -> int:
        return self.size_bytes

    def discard(self) -> None:
        """Start over with an empty file."""
        self._raw.seek(0)
        self._raw.truncate()
        self._meter.advance(-self.size_bytes)
        self.size_bytes = 0
        self._hash = self._file.new_hash()

    def sync(self) -> None:
        os.fsync(self._raw.fileno())

    def etag(self) -> str:
        """The hash by which the hub and the cache name this content."""
        return self._hash.hexdigest()


class Meter:
    """Counts bytes and files of all threads and reports them, a few times a second."""

    def __init__(
        self, emit: Callable[[Progress], None], contents: list[RepositoryFile], missing: list[RepositoryFile]
    ) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self._total_bytes = sum(file.size_bytes for file in contents)
        self._done_bytes = self._total_bytes - sum(file.size_bytes for file in missing)
        self._total_file_count = len(contents)
        self._done_file_count = len(contents) - len(missing)
        self._current_file = ""
        self._under_way: list[str] = []
        self._fetched: collections.deque[tuple[float, int]] = collections.deque([(time.monotonic(), 0)])
        self._fetched_bytes = 0
        self._last_report = 0.0
        self.report("downloading")

    def start(self, file: RepositoryFile) -> None:
        with self._lock:
            self._current_file = file.name
            self._under_way.append(file.name)

    def advance(self, byte_count: int, *, is_fetched: bool = False) -> None:
        """Count bytes; negative when they have to be fetched again."""
        with self._lock:
            self._done_bytes += byte_count
            now = time.monotonic()
            if is_fetched:
                self._fetched_bytes += byte_count
            if now - self._last_report < PROGRESS_INTERVAL_SECONDS:
                return
            self._last_report = now
            self._fetched.append((now, self._fetched_bytes))
            while now - self._fetched[0][0] > SPEED_WINDOW_SECONDS and len(self._fetched) > 2:
                self._fetched.popleft()
            progress = self._progress("downloading")
        self._emit(progress)

    def finish(self, file: RepositoryFile) -> None:
        with self._lock:
            self._done_file_count += 1
            self._under_way.remove(file.name)
            # Small files come and go beside a large one, which is what the user waits for.
            self._current_file = self._under_way[-1] if self._under_way else file.name
            progress = self._progress("downloading")
        self._emit(progress)

    def report(self, phase: str) -> None:
        with self._lock:
            progress = self._progress(phase)
        self._emit(progress)

    def _progress(self, phase: str) -> Progress:
        (first_time, first_bytes), (last_time, last_bytes) = self._fetched[0], self._fetched[-1]
        elapsed_seconds = last_time - first_time
        speed = (last_bytes - first_bytes) / elapsed_seconds if elapsed_seconds > 0 else 0.0
        return Progress(
            phase=phase,
            done_bytes=self._done_bytes,
            total_bytes=self._total_bytes,
            done_file_count=self._done_file_count,
            total_file_count=self._total_file_count,
            current_file=self._current_file,
            bytes_per_second=speed,
            eta_seconds=(self._total_bytes - self._done_bytes) / speed if speed > 0 else None,
        )


def wrong_size(model_id: str, file: RepositoryFile) -> JobError:
    """The error for a file that ends before or after the size that the hub announced."""
    return JobError(
        "HUB_UNAVAILABLE",
        f"'{file.name}' of '{model_id}' does not have the {file.size_bytes} bytes that the hub announced; "
        "repeat the install.",
        model_id=model_id,
        file=file.name,
    )
