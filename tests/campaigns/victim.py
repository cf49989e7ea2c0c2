"""A server that is killed again and again, what its clients do meanwhile, and what must be true of its folders then."""

import os
import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from google.protobuf import field_mask_pb2

from mlxgui.v1 import model_pb2, model_pb2_grpc, system_pb2, system_pb2_grpc
from mlxgui_grpc.failpoints import ENVIRONMENT
from mlxgui_grpc.hub_cache import RepositoryFolder, is_complete, sweep_partials
from tests.campaigns.cache_check import all_files, check_repository, leftovers, orphans
from tests.campaigns.ledger import Ledger
from tests.loopback_hub import LoopbackHub
from tests.support_calls import CALL_SECONDS, failure_of
from tests.support_metrics import wait_until
from tests.support_server import RunningServer, ServerDidNotStartError, start

SETTINGS = "settings"
"""What the ledger calls them; everything else in it is the name of a model."""

DIRECTORY = "directory"
KILLED = -9
CHECKED_OPERATIONS = 100
"""The newest; a server forgets the oldest of a thousand."""


@dataclass(frozen=True)
class Commit:
    """What the hub has published: a larger number is newer."""

    number: int
    contents: dict[str, bytes]


@dataclass(frozen=True)
class Installed:
    """What the registry says of a model: a repository or a directory, and whether it is pinned."""

    source: str
    is_pinned: bool = False

    @classmethod
    def of(cls, model: model_pb2.Model) -> "Installed":
        return cls(model.huggingface_id or DIRECTORY, model.pinned)


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Victim:
    """One state folder and one cache, the servers that run on them one after another, and the ledger of both.

    The hub has `acme/a`, `acme/b` and so on: the files in `model`, and one that is another in every revision.
    """

    def __init__(self, folder: Path, hub: LoopbackHub, model: Path, repository_count: int = 2) -> None:
        self.home, self.cache = folder / "home", folder / "cache"
        self._hub = hub
        self._directory = model
        self.ledger = Ledger()
        self.start_seconds: list[float] = []
        """Each start, from its exec to the banner."""
        self.start_cpu_seconds: list[float] = []
        """What each took of the processor, which says more on a busy machine."""
        self.repositories = [f"acme/{letter}" for letter in "abcdefgh"[:repository_count]]
        self._files = {path.name: path.read_bytes() for path in model.iterdir()}
        self._commits: dict[str, Commit] = {}
        self._acknowledged_commits: dict[str, int] = {}
        """By model, the number of the commit that it has, or an earlier one."""
        for repository in self.repositories:
            self._publish(repository)
        self.server: RunningServer | None = None

    # One life.

    def start(self, failpoint: str = "") -> bool:
        """Start a server; False when `failpoint` killed it before it was ready."""
        environment = {"HF_ENDPOINT": self._hub.endpoint, ENVIRONMENT: failpoint}
        options = {"bridge": False, "standby_count": 0, "register_demo": False, "hub_cache": str(self.cache)}
        began = time.monotonic()
        try:
            self.server = start(self.home, environment, **options)
        except ServerDidNotStartError as error:
            assert failpoint and error.status == KILLED, error.words
            return False
        self.start_seconds.append(time.monotonic() - began)
        used = psutil.Process(self.server.process.pid).cpu_times()
        self.start_cpu_seconds.append(used.user + used.system)
        channel = self.server.channel(unix=True)
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        self.system = system_pb2_grpc.SystemServiceStub(channel)
        return True

    def kill(self) -> None:
        """kill -9, and wait for the end of everything that the server had started."""
        assert self.server is not None
        descendants = self.server.descendants()
        self.server.process.kill()
        self.server.process.wait()
        wait_until(lambda: not any(map(is_running, descendants)), "its processes end with it")

    def bury(self) -> None:
        """Kill the server, if it is not dead yet; nobody calls it any more."""
        assert self.server is not None
        if self.server.process.poll() is None:
            self.kill()
        self.server.kill()
        self.server = None

    # What clients do. Each raises the RpcError it got; one without a reason says that the server is gone.

    def act(self, choice: random.Random, name: str) -> None:
        """One random action on the model of that name, or on the settings."""
        actions: list[tuple[int, Callable[[], None]]] = [
            (4, lambda: self.install(name, choice.choice(self.repositories))),
            (2, lambda: self.install_directory(name)),
            (3, lambda: self.delete(name)),
            (2, lambda: self.pin(name, choice.random() < 0.5)),
            (2, lambda: self.update(name)),
            (1, lambda: self.load(name)),
        ]
        weights, calls = zip(*actions, strict=True)
        choice.choices(calls, weights)[0]()

    def install(self, name: str, repository: str) -> None:
        """From the hub; a name that has another source is freed before."""
        self._install(name, repository, model_pb2.InstallModelRequest(model_id=repository, name=name))

    def install_directory(self, name: str) -> None:
        request = model_pb2.InstallModelRequest(local_directory=str(self._directory), name=name)
        self._install(name, DIRECTORY, request)

    def _install(self, name: str, source: str, request: model_pb2.InstallModelRequest) -> None:
        if (found := self._found(name)) is not None and found.source != source:
            self.delete(name)
            found = None
        # Installed again it stays pinned.
        with self.ledger.writing(name, found or Installed(source)):
            self._follow(name, self.models.InstallModel(request, timeout=CALL_SECONDS))
        # Others delete models with the same files at this moment.
        reply = self.models.GetModel(model_pb2.GetModelRequest(name=name), timeout=CALL_SECONDS)
        assert is_complete(Path(reply.model.path)), f"{name} was installed without files"

    def update(self, name: str) -> None:
        """To a revision that was not there before."""
        found = self._found(name)
        if found is not None and found.source != DIRECTORY:
            self._publish(found.source)
            request = model_pb2.UpdateModelRequest(name=name)
            with self.ledger.writing(name, found):
                self._follow(name, self.models.UpdateModel(request, timeout=CALL_SECONDS))

    def delete(self, name: str) -> None:
        """With its files; a name that is not there is no error."""
        if self._found(name) is not None:
            self._acknowledged_commits.pop(name, None)
            with self.ledger.writing(name, None):
                request = model_pb2.DeleteModelRequest(name=name, force=True)
                self.models.DeleteModel(request, timeout=CALL_SECONDS)

    def pin(self, name: str, is_pinned: bool) -> None:
        if (found := self._found(name)) is not None:
            with self.ledger.writing(name, Installed(found.source, is_pinned)):
                if is_pinned:
                    self.models.PinModel(model_pb2.PinModelRequest(name=name), timeout=CALL_SECONDS)
                else:
                    self.models.UnpinModel(model_pb2.UnpinModelRequest(name=name), timeout=CALL_SECONDS)

    def load(self, name: str) -> None:
        if self._found(name) is not None:
            request = model_pb2.LoadModelRequest(name=name)
            self._follow(name, self.models.LoadModel(request, timeout=CALL_SECONDS))

    def set(self, number: int) -> None:
        """Two settings in one write, which belong together ever after."""
        settings = system_pb2.Settings(
            model_inactivity_timeout_minutes=number, max_context_length=1000 + number
        )
        mask = field_mask_pb2.FieldMask(paths=["model_inactivity_timeout_minutes", "max_context_length"])
        request = system_pb2.UpdateSettingsRequest(settings=settings, update_mask=mask)
        with self.ledger.writing(SETTINGS, number):
            self.system.UpdateSettings(request, timeout=CALL_SECONDS)

    def _publish(self, repository: str) -> None:
        """A new commit of its main branch."""
        number = len(self._commits)
        contents = {**self._files, "README.md": f"{repository} {number}\n".encode() * 100}
        self._commits[self._hub.add(repository, contents)] = Commit(number, contents)

    def _follow(self, name: str, snapshots: Any) -> None:
        for snapshot in snapshots:
            operation = snapshot.operation
            self.ledger.operations[operation.id] = operation.HasField("success")
            if operation.success.revision:
                self._acknowledged_commits[name] = self._commits[operation.success.revision].number

    def _found(self, name: str) -> "Installed | None":
        try:
            reply = self.models.GetModel(model_pb2.GetModelRequest(name=name), timeout=CALL_SECONDS)
        except grpc.RpcError as error:
            if failure_of(error).reason == "MODEL_NOT_FOUND":
                return None
            raise
        return Installed.of(reply.model)

    # What has to be true whenever a server has started.

    def check(self) -> None:
        """Everything that was acknowledged is there, and nothing is by halves."""
        with closing(sqlite3.connect(self.home / "state.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        self._check_models()
        self._check_settings()
        self._check_operations()
        for repository in self.repositories:
            self.check_files(repository)
        assert not list((self.home / "views").iterdir())

    def _check_models(self) -> None:
        reply = self.models.ListModels(model_pb2.ListModelsRequest(page_size=1000), timeout=CALL_SECONDS)
        found = {model.name: model for model in reply.models}
        for name in (self.ledger.things() | set(found)) - {SETTINGS}:
            model = found.get(name)
            self.ledger.find(name, Installed.of(model) if model else None)
            if model is not None:
                assert is_complete(Path(model.path)), "an entry without files"
            if model is not None and model.revision:
                number = self._commits[model.revision].number
                assert number >= self._acknowledged_commits.get(name, 0), "an update was lost"
                self._acknowledged_commits[name] = number

    def _check_settings(self) -> None:
        settings = self.system.GetSettings(system_pb2.GetSettingsRequest(), timeout=CALL_SECONDS).settings
        minutes, tokens = settings.model_inactivity_timeout_minutes, settings.max_context_length
        assert tokens in (0, 1000 + minutes), "half of a write"
        self.ledger.find(SETTINGS, minutes if tokens else None)

    def _check_operations(self) -> None:
        for operation_id, was_done in list(self.ledger.operations.items())[-CHECKED_OPERATIONS:]:
            request = model_pb2.GetOperationRequest(id=operation_id)
            operation = self.models.GetOperation(request, timeout=CALL_SECONDS).operation
            assert operation.done
            assert not was_done or not operation.HasField("error"), f"{operation_id} had succeeded"

    def check_files(self, repository: str) -> bool:
        """Whether revisions of a repository are in the cache: then each is whole."""
        contents = {commit: published.contents for commit, published in self._commits.items()}
        return bool(check_repository(RepositoryFolder(self.cache, repository), contents))

    def leftover(self, age_seconds: float) -> Path:
        """Half a file that a download of some other repository left so long ago."""
        part = self.cache / f"models--acme--left-{age_seconds:.0f}" / ".mlxgui" / f"{'0' * 40}.part"
        part.parent.mkdir(parents=True)
        part.write_bytes(b"half")
        os.utime(part, (0, time.time() - age_seconds))
        return part

    # What has to be possible at the end.

    def finish(self, *, loads: bool) -> None:
        """Every install can be repeated, every model loads and can be deleted.

        What stays behind is whole revisions that an interrupted update had fetched, and parts of such, until they are
        old enough to be swept.
        """
        folders = [RepositoryFolder(self.cache, repository) for repository in self.repositories]
        for number, folder in enumerate(folders):
            self.install(f"last-{number}", folder.model_id)
            if loads:
                self.load(f"last-{number}")
            assert self.check_files(folder.model_id)
        for name in self.ledger.things() - {SETTINGS}:
            self.delete(name)
        sweep_partials(self.cache, older_than_seconds=0)
        for folder in folders:
            assert not leftovers(folder) and not orphans(folder), all_files(folder.path)
