"""The commands about the hub: search, show for what is not installed, update."""

import json
from collections.abc import Iterator

import pytest

from tests.conftest import TinyModels
from tests.loopback_hub import LoopbackHub
from tests.support_commands import CommandLine


@pytest.fixture(scope="module", autouse=True)
def published(hub: LoopbackHub, tiny_models: TinyModels) -> Iterator[None]:
    """Three models that only these tests look for."""
    files = {path.name: path.read_bytes() for path in tiny_models.llama.iterdir() if path.is_file()}
    hub.add("cli-search/needle-small", files, downloads=1_234_567, likes=5)
    hub.add("cli-search/needle-liked", files, downloads=10, likes=900)
    hub.add("cli-search/needle-embedder", files, pipeline_tag="feature-extraction", downloads=1)
    yield


def ids(commands: CommandLine, *arguments: str) -> list[str]:
    """What a search finds, in order."""
    found = json.loads(commands.succeed("search", "needle", *arguments, "--json"))["models"]
    return [model["id"].removeprefix("cli-search/needle-") for model in found]


def test_a_search_is_sorted_limited_and_narrowed(commands: CommandLine) -> None:
    """As the flags say."""
    assert ids(commands) == ["small", "liked", "embedder"]
    assert ids(commands, "--sort", "likes")[0] == "liked"
    assert ids(commands, "--sort", "created")[0] == "embedder"
    assert ids(commands, "--limit", "2") == ["small", "liked"]
    assert ids(commands, "--embeddings") == ids(commands, "--kind", "embedding") == ["embedder"]
    assert set(ids(commands, "--fits")) <= {"small", "liked", "embedder"}
    assert ids(commands, "--memory", "0.0001") == []
    assert "small" in ids(commands, "--memory", "64")


def test_a_search_is_a_table_that_marks_what_is_installed(commands: CommandLine) -> None:
    """With size, memory and downloads, and the way to more."""
    commands.succeed("pull", "cli-search/needle-small", "--name", "cli-needle")
    try:
        header, *rows = commands.succeed("search", "needle").splitlines()
        assert header.split() == [
            "ID",
            "TYPE",
            "SIZE",
            "MEMORY",
            "DOWNLOADS",
            "LIKES",
            "UPDATED",
            "INSTALLED",
        ]
        (mine,) = (row for row in rows if row.startswith("cli-search/needle-small"))
        assert "1,234,567" in mine and "kB" in mine and " MB" in mine
        assert [row.split()[0] for row in rows if row.endswith("cli-needle")] == ["cli-search/needle-small"]
    finally:
        commands.succeed("rm", "cli-needle")
    assert "nothing of 'no-such-thing'" in commands.succeed("search", "no-such-thing")


def test_show_asks_the_hub_for_what_is_not_installed(commands: CommandLine) -> None:
    """It says whether this machine can run it, and how to install it; a name without owner is never asked for."""
    shown = commands.succeed("show", "cli-search/needle-liked")
    assert "`mlxgui pull cli-search/needle-liked` installs it" in shown
    model = json.loads(commands.succeed("show", "cli-search/needle-liked", "--json"))
    assert model["system_compatible"] is True and model["compatibility_message"] in shown
    assert "cli-search/no-such" in commands.refuse(4, "show", "cli-search/no-such")
    assert "needle-liked" in commands.refuse(4, "show", "needle-liked")


def test_categories_need_no_search(commands: CommandLine) -> None:
    """Hub ids below titles, and the same as JSON."""
    groups = json.loads(commands.succeed("search", "--categories", "--json"))["categories"]
    text = commands.succeed("search", "--categories").splitlines()
    assert groups and all(group["title"] in text for group in groups)
    assert f"  {groups[0]['model_ids'][0]}" in text


def test_a_hub_that_fails_is_a_sentence_and_not_an_empty_list(
    commands: CommandLine, hub: LoopbackHub
) -> None:
    """Exit code 1."""
    hub.fail(503, prefix="/api/models")
    try:
        assert "hub" in commands.refuse(1, "search", "needle-that-nobody-asked-for")
    finally:
        hub.recover()


def test_an_update_goes_to_the_newer_revision_once(
    commands: CommandLine, hub: LoopbackHub, tiny_models: TinyModels
) -> None:
    """Then there is nothing newer; a directory has nowhere to get one from."""
    files = {path.name: path.read_bytes() for path in tiny_models.llama.iterdir() if path.is_file()}
    first = hub.add("cli-search/updated", files)
    commands.succeed("pull", "cli-search/updated")
    try:
        assert commands.succeed("update", "updated") == f"updated is up to date ({first[:12]})\n"
        second = hub.add("cli-search/updated", {**files, "README.md": b"newer"})
        said = commands.succeed("update", "cli-search/updated")
        assert said == f"Updated updated from {first[:12]} to {second[:12]}\n"
        assert commands.succeed("update", "updated", "--revision", first) == (
            f"Updated updated from {second[:12]} to {first[:12]}\n"
        )
    finally:
        commands.succeed("rm", "updated")
    assert "demo" in commands.refuse(1, "update", "demo")
