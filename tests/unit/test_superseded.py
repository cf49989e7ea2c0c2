"""Replaced revisions that cannot be removed now are logged, and looked at again."""

import logging
from pathlib import Path

import pytest

from mlxgui_grpc import superseded
from mlxgui_grpc.catalog import Catalog, InstalledModel, Origin
from mlxgui_grpc.file_claims import FileClaims
from mlxgui_grpc.hub import Hub
from mlxgui_grpc.superseded import SupersededRevisions


async def test_a_mark_that_cannot_be_removed_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next look, which comes by itself, removes it."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--maker--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    mark = snapshot.parents[1] / ".mlxgui" / f"{snapshot.name}.superseded"
    mark.mkdir(parents=True)  # What unlink refuses, to root too.
    catalog = Catalog(tmp_path / "s.db")
    await catalog.open()
    await catalog.add(InstalledModel(name="mine", origin=Origin.HUB, path=snapshot))
    hub = Hub(endpoint=None, cache_dir=cache, token=None, offline=True)
    revisions = SupersededRevisions(catalog, hub, FileClaims(), lambda path: False)
    monkeypatch.setattr(superseded, "SWEEP_SECONDS", 0.0)
    with caplog.at_level(logging.WARNING):
        await revisions.recover([cache, tmp_path / "absent"])
    assert snapshot.name in caplog.text
    mark.rmdir()
    mark.touch()
    await revisions.sweep()
    assert not mark.exists()
    await revisions.close()
    await catalog.close()
