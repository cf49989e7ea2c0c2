"""Reads the memory control group of a process on Linux, version 1 or 2: its limits and whom the kernel killed in it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class GroupLimit:
    """One control group's limit and what its processes use of it."""

    name: str
    used_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """The memory control group of a process on Linux, version 1 or 2."""

    folder: Path
    root: Path
    is_version_2: bool

    @classmethod
    def of(
        cls, pid: int, proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")
    ) -> "MemoryGroup | None":
        """The group that limits the memory of `pid`; None where there is none, or the process is gone."""
        try:
            lines = (proc / str(pid) / "cgroup").read_text().splitlines()
        except OSError:
            return None
        # Where both versions are mounted, one has the memory controller: the first, if it names it.
        for _, controllers, path in sorted(
            (line.split(":", 2) for line in lines), key=lambda line: not line[1]
        ):
            if "memory" in controllers.split(","):
                root, is_version_2 = mount / "memory", False
            elif not controllers:
                root, is_version_2 = mount, True
            else:
                continue
            # In a container the path may be the host's: the mount point is then the group itself.
            folder = root / path.lstrip("/")
            folder = folder if folder.is_dir() else root
            if (folder / ("memory.events" if is_version_2 else "memory.oom_control")).exists():
                return cls(folder, root, is_version_2)
        return None

    def limits(self) -> list[GroupLimit]:
        """The limit of the group and of those above it, where they have one."""
        limit_name, used_name = (
            ("memory.max", "memory.current")
            if self.is_version_2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        found = []
        for folder in (self.folder, *self.folder.parents):
            try:
                limit = (folder / limit_name).read_text().strip()
                if limit.isdigit() and int(limit) < 1 << 60:  # "max", or version 1's number for it
                    used = int((folder / used_name).read_text())
                    droppable = _numbers(folder / "memory.stat").get("inactive_file", 0)
                    found.append(GroupLimit(folder.name, max(0, used - droppable), int(limit)))
            except (OSError, ValueError):
                pass
            if folder == self.root:
                break
        return found

    def kill_count(self) -> int:
        """Processes of the group that the kernel killed because its memory ran out."""
        name = "memory.events" if self.is_version_2 else "memory.oom_control"
        try:
            return _numbers(self.folder / name).get("oom_kill", 0)
        except (OSError, ValueError):
            return 0


def _numbers(path: Path) -> dict[str, int]:
    """A file of lines `name number`."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
