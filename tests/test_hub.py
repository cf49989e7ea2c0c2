"""Downloads and lookups through the real huggingface_hub client, from a hub on loopback that misbehaves on demand."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlxgui_grpc import errors
from mlxgui_grpc.hub import DownloadProgress, Hub, Snapshot
from mlxgui_grpc.hub_cache import RepositoryFolder
from mlxgui_grpc.hub_frames import Listed
from mlxgui_grpc.hub_lookups import HubLookups
from mlxgui_grpc.secrets import hub_token
from tests.loopback_hub import TOKEN, LoopbackHub

MODEL = "maker/tiny-model"
WEIGHTS = "model.safetensors"
WEIGHT_BYTES = 3_000_000


def content(name: str, byte_count: int = WEIGHT_BYTES) -> bytes:
    """Bytes that no compression and no shift leaves equal."""
    return hashlib.shake_128(name.encode()).digest(byte_count)


def model_files(version: str = "1") -> dict[str, bytes]:
    return {
        "config.json": json.dumps({"model_type": "llama", "version": version}).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"# Tiny\n",
        "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
        WEIGHTS: content(version),
    }


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as loopback:
        yield loopback


def client(
    hub: LoopbackHub, cache_dir: Path, *, token: str | None = None, offline: bool = False, reserve: int = 0
) -> Hub:
    return Hub(
        endpoint=hub.endpoint, cache_dir=cache_dir, token=token, offline=offline, disk_reserve_bytes=reserve
    )


async def pull(
    hub: Hub, model_id: str = MODEL, revision: str | None = None
) -> tuple[Snapshot, list[DownloadProgress]]:
    seen: list[DownloadProgress] = []
    snapshot = await asyncio.wait_for(hub.download(model_id, revision, seen.append), 60)
    return snapshot, seen


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def leftovers(cache_dir: Path, model_id: str = MODEL) -> set[str]:
    return {path.suffix for path in RepositoryFolder(cache_dir, model_id).partials.glob("*.*")}


def child_processes(module: str = "hub_download") -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children()
        if f"mlxgui_grpc.{module}" in " ".join(process.cmdline())
    ]


def lookups(
    hub: LoopbackHub, *, token: str | None = None, offline: bool = False, seconds: float = 30.0
) -> HubLookups:
    return HubLookups(endpoint=hub.endpoint, token=token, offline=offline, time_limit_seconds=seconds)


async def find(hub_lookups: HubLookups, words: str = "") -> Listed:
    return await hub_lookups.search(words, ("mlx",), "downloads", 10, "")


async def test_a_download_is_laid_out_as_every_hugging_face_tool_expects(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    """The library itself finds the snapshot, offline, by branch and by commit."""
    commit = hub.add(MODEL, model_files())

    snapshot, _ = await pull(client(hub, tmp_path))

    assert snapshot.revision == commit
    assert read_files(snapshot.path) == model_files()
    assert (snapshot.file_count, snapshot.size_bytes) == (6, sum(map(len, model_files().values())))
    assert snapshot.is_ours
    script = (
        "import sys, json, huggingface_hub as h\n"
        "model, cache, commit = sys.argv[1:]\n"
        "scan = h.scan_cache_dir(cache)\n"
        "print(json.dumps([h.snapshot_download(model, cache_dir=cache, local_files_only=True),"
        " h.snapshot_download(model, cache_dir=cache, revision=commit, local_files_only=True),"
        " h.try_to_load_from_cache(model, '1_Pooling/config.json', cache_dir=cache),"
        " [[repo.repo_id, sorted(repo.refs)] for repo in scan.repos], [str(w) for w in scan.warnings]]))"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, MODEL, str(tmp_path), commit],
        capture_output=True,
        text=True,
        check=True,
    )
    by_branch, by_commit, pooling, repositories, warnings = json.loads(child.stdout)
    assert by_branch == by_commit == str(snapshot.path)
    assert pooling == str(snapshot.path / "1_Pooling/config.json")
    assert repositories == [[MODEL, ["main"]]]
    assert warnings == []


def test_the_control_process_does_not_import_the_library() -> None:
    """Its 40 MB and its second of start belong to the child."""
    script = (
        "import sys, mlxgui_grpc.hub; print(sorted({'huggingface_hub', 'httpx2', 'tqdm'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"


async def test_progress_counts_bytes_and_files_up_to_all(hub: LoopbackHub, tmp_path: Path) -> None:
    """Phases come in order, bytes only grow, and the last report has everything."""
    hub.add(MODEL, model_files())
    total_bytes = sum(map(len, model_files().values()))

    _, seen = await pull(client(hub, tmp_path))

    phases = list(dict.fromkeys(progress.phase for progress in seen))
    assert phases == ["resolving", "downloading", "verifying"]
    counts = [progress.done_bytes for progress in seen]
    assert counts == sorted(counts)
    assert (seen[-1].done_bytes, seen[-1].total_bytes) == (total_bytes, total_bytes)
    assert (seen[-1].done_file_count, seen[-1].total_file_count) == (6, 6)
    assert seen[-1].eta_seconds in (0, None)


async def test_a_revision_can_be_named_and_what_is_there_is_not_fetched_again(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    """A branch with a slash, then main with equal weights: the weights come once."""
    hub.add(MODEL, model_files() | {"tokenizer.json": b"{}"}, branch="team/next")
    hub.add(MODEL, model_files())

    first, _ = await pull(client(hub, tmp_path), revision="team/next")
    second, _ = await pull(client(hub, tmp_path))
    third, seen = await pull(client(hub, tmp_path), revision=second.revision)

    assert first.revision != second.revision == third.revision
    assert (first.path / "tokenizer.json").read_bytes() == b"{}"
    assert len(hub.fetches(WEIGHTS)) == 1
    assert seen[1].done_bytes == seen[1].total_bytes
    refs = RepositoryFolder(tmp_path, MODEL).refs
    assert (refs / "team/next").read_text() == first.revision
    assert (refs / "main").read_text() == second.revision


async def test_force_fetches_again_what_is_damaged_and_only_that(hub: LoopbackHub, tmp_path: Path) -> None:
    """Damage that leaves the size as it is shows in the hash only, in a blob and in a file on its way."""
    hub.add(MODEL, model_files())
    snapshot, _ = await pull(client(hub, tmp_path))
    folder = RepositoryFolder(tmp_path, MODEL)
    (folder.blobs / hub.file(MODEL, WEIGHTS).etag).write_bytes(bytes(WEIGHT_BYTES))
    config = hub.file(MODEL, "config.json")
    folder.verified(config.etag).write_bytes(bytes(config.size_bytes))

    again = await client(hub, tmp_path).download(MODEL, None, lambda progress: None, force=True)

    assert again == snapshot
    assert read_files(snapshot.path) == model_files()
    assert (len(hub.fetches(WEIGHTS)), len(hub.fetches("config.json"))) == (2, 1)
    assert leftovers(tmp_path) == {".ours"}


async def test_the_child_has_no_keys_and_is_out_of_reach_of_ctrl_c(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its environment names none of them, and the terminal's process group is not its own."""
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    monkeypatch.setenv("MLX_GUI_API_KEY", "sk-secret")
    hub.add(MODEL, model_files())
    hold = hub.hold(WEIGHTS, 1_000_000)
    pulling = asyncio.create_task(pull(client(hub, tmp_path)))
    assert await asyncio.to_thread(hold.reached.wait, 60)

    [child] = child_processes()
    assert not {"HF_TOKEN", "MLX_GUI_API_KEY"} & set(child.environ())
    assert os.getpgid(child.pid) == child.pid
    hold.release()
    await pulling


async def test_a_broken_line_is_resumed_within_the_download(hub: LoopbackHub, tmp_path: Path) -> None:
    """The rest is asked for with a range, and the content is right."""
    hub.add(MODEL, model_files())
    hub.cut(WEIGHTS, 1_500_000)

    snapshot, _ = await pull(client(hub, tmp_path))

    assert read_files(snapshot.path) == model_files()
    first, second = hub.fetches(WEIGHTS)
    assert first.range_start is None
    assert second.range_start is not None and 0 < second.range_start <= 1_500_000


@pytest.mark.parametrize("ending", ["kill", "cancel"])
async def test_an_interrupted_download_goes_on_where_it_stopped(
    hub: LoopbackHub, tmp_path: Path, ending: str
) -> None:
    """After SIGKILL or a cancel nothing is registered, and the next attempt fetches only the rest."""
    hub.add(MODEL, model_files())
    hold = hub.hold(WEIGHTS, 2_000_000)
    first = asyncio.create_task(pull(client(hub, tmp_path)))
    assert await asyncio.to_thread(hold.reached.wait, 60)
    await until_part_has(tmp_path, 1_000_000)

    [child] = child_processes()
    if ending == "kill":
        child.kill()
        with pytest.raises(errors.HubUnavailableError, match="signal 9"):
            await first
    else:
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
    hold.release()
    assert child_processes() == []
    assert list(RepositoryFolder(tmp_path, MODEL).snapshots.iterdir()) == []
    assert list(RepositoryFolder(tmp_path, MODEL).blobs.iterdir()) == []
    assert client(hub, tmp_path).find_cached(MODEL) is None

    snapshot, _ = await pull(client(hub, tmp_path))

    assert read_files(snapshot.path) == model_files()
    resumed = hub.fetches(WEIGHTS)[-1].range_start
    assert resumed is not None and resumed >= 1_000_000
    assert len(hub.fetches("config.json")) == 1
    assert leftovers(tmp_path) == {".ours"}


async def until_part_has(cache_dir: Path, byte_count: int) -> None:
    """Wait until the small files are verified and a part is that large: sockets hold what the hub sent."""
    partials = RepositoryFolder(cache_dir, MODEL).partials
    while len(list(partials.glob("*.done"))) < 5 or not any(
        path.stat().st_size >= byte_count for path in partials.glob("*.part")
    ):
        await asyncio.sleep(0.01)


async def test_the_child_ends_when_its_server_is_gone(hub: LoopbackHub, tmp_path: Path) -> None:
    """A server killed in the middle of a download leaves no process behind."""
    hub.add(MODEL, model_files())
    hold = hub.hold(WEIGHTS, 1_000_000)
    script = (
        "import asyncio, sys, pathlib\n"
        "from mlxgui_grpc.hub import Hub\n"
        "hub = Hub(endpoint=sys.argv[1], cache_dir=pathlib.Path(sys.argv[2]), token=None, offline=False)\n"
        "asyncio.run(hub.download(sys.argv[3], None, lambda progress: None))"
    )
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, hub.endpoint, str(tmp_path), MODEL
    )
    assert await asyncio.to_thread(hold.reached.wait, 60)
    [child] = psutil.Process(server.pid).children()

    server.kill()
    await server.wait()

    await asyncio.to_thread(child.wait, 30)
    hold.release()
    snapshot, _ = await pull(client(hub, tmp_path))
    assert read_files(snapshot.path) == model_files()


async def test_a_hub_without_ranges_sends_the_file_again(hub: LoopbackHub, tmp_path: Path) -> None:
    """An answer with the whole file to a request for the rest is not appended."""
    hub.add(MODEL, model_files())
    hub.has_ranges = False
    hub.cut(WEIGHTS, 1_500_000)

    snapshot, _ = await pull(client(hub, tmp_path))

    assert read_files(snapshot.path) == model_files()
    assert len(hub.fetches(WEIGHTS)) == 2


async def test_a_bad_part_is_fetched_anew(hub: LoopbackHub, tmp_path: Path) -> None:
    """A power cut can leave a part with the wrong bytes: the hash finds it, one fresh attempt mends it."""
    hub.add(MODEL, model_files())
    folder = RepositoryFolder(tmp_path, MODEL)
    folder.prepare()
    folder.part(hashlib.sha256(content("1")).hexdigest()).write_bytes(bytes(1_000_000))

    snapshot, seen = await pull(client(hub, tmp_path))

    assert read_files(snapshot.path) == model_files()
    assert [request.range_start for request in hub.fetches(WEIGHTS)] == [1_000_000, None]
    assert seen[-1].done_bytes == seen[-1].total_bytes


@pytest.mark.parametrize("lie", ["content", "short", "long", "small file"])
async def test_content_that_is_not_what_was_announced_is_refused(
    hub: LoopbackHub, tmp_path: Path, lie: str
) -> None:
    """Wrong hashes and sizes end the download; no snapshot appears and no bad part stays to be resumed."""
    hub.add(MODEL, model_files())
    name = "config.json" if lie == "small file" else WEIGHTS
    if lie in ("content", "small file"):
        hub.corrupt(MODEL, name)
    elif lie == "short":
        hub.file(MODEL, name).size_bytes += 1000
    else:
        hub.file(MODEL, name).size_bytes -= 1000

    with pytest.raises(errors.HubUnavailableError, match=f"'{name}'.* announced") as refused:
        await pull(client(hub, tmp_path))

    assert refused.value.metadata == {"model_id": MODEL, "file": name}
    folder = RepositoryFolder(tmp_path, MODEL)
    assert list(folder.snapshots.iterdir()) == []
    assert list(folder.blobs.iterdir()) == []
    etag = hub.file(MODEL, name).etag
    assert not folder.verified(etag).exists()
    assert not folder.part(etag).exists() or folder.part(etag).stat().st_size == 0


async def test_code_and_pickles_are_never_fetched(hub: LoopbackHub, tmp_path: Path) -> None:
    """Only what is on the allow-list is asked for; the rest is not in the snapshot either."""
    unwanted = [
        "modeling_tiny.py", "sub/evil.py", "pytorch_model.bin", "model.pt", "model.pth", "x.pkl", "x.ckpt",
        "tokenizer.pickle", ".gitattributes", ".hidden/config.json", "run.sh", "lib.so", "photo.png",
        "original/model.safetensors", "onnx/config.json", "model.gguf",
    ]  # fmt: skip
    hub.add(MODEL, model_files() | {name: b"import os" for name in unwanted})

    snapshot, _ = await pull(client(hub, tmp_path))

    assert set(read_files(snapshot.path)) == set(model_files())
    assert {request.file for request in hub.requests} & set(unwanted) == set()


async def test_every_shard_comes_and_equal_files_come_once(hub: LoopbackHub, tmp_path: Path) -> None:
    """Sharded and consolidated weights and voices in a folder are all part of the model."""
    files = model_files() | {
        "model-00001-of-00002.safetensors": content("a", 10_000),
        "model-00002-of-00002.safetensors": content("b", 10_000),
        "voices/one.safetensors": content("voice", 5_000),
        "voices/two.safetensors": content("voice", 5_000),
        "weights.npz": content("npz", 4_000),
        "tokenizer.model": content("sentencepiece", 3_000),
        "empty.txt": b"",
    }
    hub.add(MODEL, files)

    snapshot, _ = await pull(client(hub, tmp_path))

    assert read_files(snapshot.path) == files
    assert len(hub.fetches("voices/one.safetensors") + hub.fetches("voices/two.safetensors")) == 1


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json", "a/../../evil.json", "/etc/evil.json", "a//b.json", "./a.json", "a\\..\\b.json",
        "C:evil.json", "nul\0.json", "line\n.json", "x" * 300 + ".json", "a/" * 300 + "b.json", "..",
    ],
)  # fmt: skip
async def test_a_file_name_that_leaves_its_folder_refuses_the_repository(
    hub: LoopbackHub, tmp_path: Path, name: str
) -> None:
    """Not one file of such a repository is fetched, and nothing is written outside the cache."""
    cache_dir = tmp_path / "cache"
    hub.add(MODEL, model_files() | {name: b"{}"})

    with pytest.raises(errors.ModelUnsafeError, match="file name"):
        await pull(client(hub, cache_dir))

    assert hub.fetches() == []
    assert not cache_dir.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [("Config.json",), ("a.json", "a.json/b.json")])
async def test_names_that_collide_on_some_file_system_are_refused(
    hub: LoopbackHub, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """macOS ignores case: the second file would take the place of the first."""
    hub.add(MODEL, model_files() | {name: b"{}" for name in names})

    with pytest.raises(errors.ModelUnsafeError, match="same path"):
        await pull(client(hub, tmp_path))


async def test_a_repository_of_other_formats_is_refused_by_name_of_the_formats(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    """Pickles only: the message says what was found and what to choose."""
    hub.add(MODEL, {"config.json": b"{}", "pytorch_model.bin": b"x", "model.gguf": b"x"})

    with pytest.raises(errors.ModelIncompatibleError, match=r"no \*\.safetensors .*only \.bin, \.gguf"):
        await pull(client(hub, tmp_path))

    assert hub.fetches() == []


async def test_weights_without_a_configuration_are_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    """No loader of ours can say what such weights are."""
    hub.add(MODEL, {WEIGHTS: b"x"})

    with pytest.raises(errors.ModelIncompatibleError, match=r"no config\.json"):
        await pull(client(hub, tmp_path))


async def test_a_missing_repository_says_what_to_check(hub: LoopbackHub, tmp_path: Path) -> None:
    """With a token and without: the real hub answers 404 and 401 to it."""
    for token in (None, TOKEN):
        with pytest.raises(errors.HubRepositoryNotFoundError) as missing:
            await pull(client(hub, tmp_path, token=token), "maker/absent")
        assert missing.value.message == (
            "Repository 'maker/absent' not found on the hub; check the id, or set HF_TOKEN if it is private."
        )


async def test_a_missing_revision_is_named(hub: LoopbackHub, tmp_path: Path) -> None:
    """The repository is there; the branch is what is wrong."""
    hub.add(MODEL, model_files())

    with pytest.raises(errors.HubRepositoryNotFoundError, match="Revision 'v9' of"):
        await pull(client(hub, tmp_path), revision="v9")


async def test_a_gated_repository_asks_for_terms_and_a_token(hub: LoopbackHub, tmp_path: Path) -> None:
    """Refused without a token and with a wrong one, never shown; open with the right one."""
    hub.add(MODEL, model_files(), gated=True)

    with pytest.raises(
        errors.HubAccessDeniedError, match=f"terms at {hub.endpoint}/{MODEL} and set HF_TOKEN"
    ):
        await pull(client(hub, tmp_path))
    with pytest.raises(errors.HubAccessDeniedError, match="with the account of HF_TOKEN") as refused:
        await pull(client(hub, tmp_path, token="hf_wrong"))
    assert "hf_wrong" not in repr(refused.value.args) + repr(refused.value.metadata)

    snapshot, _ = await pull(client(hub, tmp_path, token=TOKEN))
    assert read_files(snapshot.path) == model_files()


async def test_the_token_stays_with_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    """It is not in the arguments or environment of the child, not sent to the file host, not on disk."""
    hub.add(MODEL, model_files(), private=True)
    hold = hub.hold(WEIGHTS, 1_000_000)
    download = asyncio.create_task(pull(client(hub, tmp_path, token=TOKEN)))
    assert await asyncio.to_thread(hold.reached.wait, 60)
    [child] = child_processes()

    assert TOKEN not in " ".join(child.cmdline())
    assert TOKEN not in child.environ().values()
    hold.release()
    await download

    assert {request.host for request in hub.requests if request.is_authorized} == {"hub"}
    assert [request.is_authorized for request in hub.fetches(WEIGHTS)] == [False]
    small = b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size < 100_000
    )
    assert TOKEN.encode() not in small


async def test_a_rate_limit_is_passed_on_with_its_waiting_time(hub: LoopbackHub, tmp_path: Path) -> None:
    """For the description and for files; a long wait is the caller's decision, a short one is waited for."""
    hub.add(MODEL, model_files())
    hub.fail(429, prefix="/api/models/", times=1, headers={"Retry-After": "3"})
    with pytest.raises(errors.HubRateLimitedError) as limited:
        await pull(client(hub, tmp_path))
    assert limited.value.retry_after_seconds == 3

    hub.fail(429, prefix=f"/{MODEL}/resolve/", times=6, headers={"Retry-After": "300"})
    with pytest.raises(errors.HubRateLimitedError) as limited:
        await pull(client(hub, tmp_path))
    assert limited.value.retry_after_seconds == 300
    hub.recover()

    hub.fail(429, prefix="/content/", times=1, headers={"Retry-After": "0"})
    snapshot, _ = await pull(client(hub, tmp_path))
    assert read_files(snapshot.path) == model_files()


async def test_a_failing_or_absent_hub_is_named(hub: LoopbackHub, tmp_path: Path) -> None:
    """Error pages, nonsense and closed ports are one reason, and what is cached is still found."""
    hub.add(MODEL, model_files())
    snapshot, _ = await pull(client(hub, tmp_path))
    for status in (500, 503):
        hub.fail(status, times=1)
        with pytest.raises(errors.HubUnavailableError, match=f"{hub.endpoint} answered HTTP {status}"):
            await pull(client(hub, tmp_path))
    hub.fail(200, times=1)
    with pytest.raises(errors.HubUnavailableError, match="not a model hub's"):
        await pull(client(hub, tmp_path))
    hub.close()
    with pytest.raises(errors.HubUnavailableError, match="cannot be reached"):
        await pull(client(hub, tmp_path))

    assert client(hub, tmp_path).find_cached(MODEL) == snapshot


async def test_offline_no_child_is_started(hub: LoopbackHub, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE says so; nothing is asked of anybody."""
    with pytest.raises(errors.HubUnavailableError, match="HF_HUB_OFFLINE"):
        await pull(client(hub, tmp_path, offline=True))

    assert hub.requests == []


@pytest.mark.parametrize("cause", ["a reserve", "a claim"])
async def test_a_download_that_cannot_fit_is_refused_before_it_starts(
    hub: LoopbackHub, tmp_path: Path, cause: str
) -> None:
    """A terabyte that somebody claims is not begun, and the reserve of the disk is kept."""
    hub.add(MODEL, model_files())
    if cause == "a claim":
        shards = [f"model-{number}.safetensors" for number in range(4000)]
        hub.add(MODEL, model_files() | dict.fromkeys(shards, b""))
        for number, shard in enumerate(shards):
            hub.file(MODEL, shard).size_bytes = 49 * 1000**3
            hub.file(MODEL, shard).sha256 = f"{number:064x}"
    reserve = 1 << 60 if cause == "a reserve" else 0

    with pytest.raises(errors.DiskFullError, match=r"needs .* GB more and .* free some space") as full:
        await pull(client(hub, tmp_path, reserve=reserve))

    assert int(full.value.metadata["needed_bytes"]) > 0
    assert hub.fetches() == []


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small disk")
async def test_a_disk_that_fills_up_meanwhile_is_reported(hub: LoopbackHub, tmp_path: Path) -> None:
    """Somebody else takes the space: DISK_FULL, and the part stays for a repeat with more room."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        hub.add(MODEL, model_files())
        hold = hub.hold(WEIGHTS, 500_000)
        download = asyncio.create_task(pull(client(hub, tmp_path)))
        assert await asyncio.to_thread(hold.reached.wait, 60)
        (tmp_path / "of-somebody").write_bytes(bytes(2_500_000))
        hold.release()
        with pytest.raises(errors.DiskFullError, match="is full"):
            await download

        (tmp_path / "of-somebody").unlink()
        snapshot, _ = await pull(client(hub, tmp_path))
        assert read_files(snapshot.path) == model_files()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def test_two_downloads_of_one_repository_fetch_it_once(hub: LoopbackHub, tmp_path: Path) -> None:
    """The second waits for the first, as if it were another server's."""
    hub.add(MODEL, model_files())

    first, second = await asyncio.gather(pull(client(hub, tmp_path)), pull(client(hub, tmp_path)))

    assert first[0] == second[0]
    assert len(hub.fetches(WEIGHTS)) == 1


async def test_delete_removes_one_revision_and_only_that(hub: LoopbackHub, tmp_path: Path) -> None:
    """Shared files stay while the other revision needs them; then the folder goes."""
    old_commit = hub.add(MODEL, model_files("1"))
    hub_client = client(hub, tmp_path)
    await pull(hub_client)
    hub.add("other/model", model_files("other"))
    other, _ = await pull(hub_client, "other/model")
    hub.add(MODEL, model_files("2"))
    new, _ = await pull(hub_client)
    folder = RepositoryFolder(tmp_path, MODEL)
    shared = (new.path / "tokenizer.json").resolve()

    freed_bytes = await asyncio.to_thread(hub_client.delete_revision, MODEL, old_commit)

    assert freed_bytes == WEIGHT_BYTES + len(model_files()["config.json"])
    assert not (folder.snapshots / old_commit).exists()
    assert read_files(new.path) == model_files("2")
    assert shared.is_file()
    assert await asyncio.to_thread(hub_client.delete_revision, MODEL, old_commit) == 0

    await asyncio.to_thread(hub_client.delete_revision, MODEL, new.revision)
    assert not folder.path.exists()
    assert hub_client.cached_models() == [other]
    assert read_files(other.path) == model_files("other")


async def test_delete_takes_nothing_from_outside_or_from_a_fork(hub: LoopbackHub, tmp_path: Path) -> None:
    """A link out of the snapshot loses the link only; a repository with the same commit keeps its files."""
    cache_dir, precious = tmp_path / "cache", tmp_path / "precious.json"
    precious.write_text("{}")
    hub_client = client(hub, cache_dir)
    first = hub.add(MODEL, model_files("1"))
    await pull(hub_client)
    hub.add(MODEL, model_files("2"))
    await pull(hub_client)
    (RepositoryFolder(cache_dir, MODEL).snapshots / first / "extra.json").symlink_to(precious)
    # What a fork looks like: another name, the same hash.
    fork = RepositoryFolder(cache_dir, "fork/model")
    fork.prepare()
    (fork.snapshots / first).mkdir()
    (fork.snapshots / first / "config.json").write_text("{}")

    await asyncio.to_thread(hub_client.delete_revision, MODEL, first)

    assert precious.read_text() == "{}"
    assert not (RepositoryFolder(cache_dir, MODEL).snapshots / first).exists()
    assert (fork.snapshots / first / "config.json").read_text() == "{}"


async def test_delete_waits_for_nobody(hub: LoopbackHub, tmp_path: Path) -> None:
    """While another revision of the repository is fetched the answer is MODEL_IN_USE, at once."""
    hub.add(MODEL, model_files("1"))
    hub_client = client(hub, tmp_path)
    snapshot, _ = await pull(hub_client)
    hub.add(MODEL, model_files("2"))
    hold = hub.hold(WEIGHTS, 1_000_000)
    download = asyncio.create_task(pull(hub_client))
    assert await asyncio.to_thread(hold.reached.wait, 60)

    with pytest.raises(errors.ModelInUseError, match="being downloaded"):
        await asyncio.to_thread(hub_client.delete_revision, MODEL, snapshot.revision)
    freed_bytes = await asyncio.to_thread(lambda: hub_client.sweep_partials(older_than_seconds=0))

    hold.release()
    await download
    assert freed_bytes == 0
    assert read_files(snapshot.path) == model_files("1")


async def test_the_sweep_takes_stale_parts_and_nothing_else(hub: LoopbackHub, tmp_path: Path) -> None:
    """Fresh parts, models to be resumed, snapshots and other tools' files stay."""
    hub_client = client(hub, tmp_path)
    hub.add("done/model", model_files("done"))
    done, _ = await pull(hub_client, "done/model")
    hub.add(MODEL, model_files())
    hub.corrupt(MODEL, WEIGHTS)
    with pytest.raises(errors.HubUnavailableError):
        await pull(hub_client)
    folder = RepositoryFolder(tmp_path, MODEL)
    part = folder.part("0" * 64)
    part.write_bytes(bytes(1000))

    assert hub_client.sweep_partials() == 0
    assert hub_client.sweep_partials(keep={MODEL}, older_than_seconds=0) == 0
    assert part.exists()

    left_bytes = sum(path.stat().st_size for path in folder.partials.iterdir())
    assert hub_client.sweep_partials(older_than_seconds=0) == left_bytes >= 1000
    assert not folder.path.exists()
    assert hub_client.cached_models() == [done]


async def test_a_commit_that_was_cut_short_is_repeated_or_swept(hub: LoopbackHub, tmp_path: Path) -> None:
    """Killed between the blobs and the snapshot: the next attempt fetches nothing; a sweep leaves nothing."""
    hub.add(MODEL, model_files())
    hub_client = client(hub, tmp_path)
    snapshot, _ = await pull(hub_client)
    folder = RepositoryFolder(tmp_path, MODEL)

    def undo() -> None:
        snapshot.path.rename(folder.staged(snapshot.revision))
        (folder.refs / "main").unlink()

    undo()
    again, _ = await pull(hub_client)
    assert again == snapshot
    assert len(hub.fetches(WEIGHTS)) == 1

    undo()
    folder.mark_of_ours(snapshot.revision).unlink()
    assert hub_client.sweep_partials(older_than_seconds=0) == snapshot.size_bytes
    assert list(folder.path.rglob("*.safetensors")) == []
    assert not folder.blobs.exists()


async def test_a_model_of_another_tool_is_found_and_is_not_ours(hub: LoopbackHub, tmp_path: Path) -> None:
    """Complete: found, taken as it is. Incomplete: not listed, and completed by a download."""
    hub.add(MODEL, model_files())
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    fetch = (
        "import sys, huggingface_hub as h\n"
        "h.snapshot_download(sys.argv[1], cache_dir=sys.argv[2], allow_patterns=sys.argv[3])"
    )

    def with_the_library(pattern: str) -> None:
        command = [sys.executable, "-c", fetch, MODEL, str(tmp_path), pattern]
        subprocess.run(command, env=environment, check=True, capture_output=True)

    hub_client = client(hub, tmp_path)
    await asyncio.to_thread(with_the_library, "*.json")
    assert hub_client.find_cached(MODEL) is None
    assert hub_client.cached_models() == []

    await asyncio.to_thread(with_the_library, "*")
    found = hub_client.find_cached(MODEL)
    assert found is not None and not found.is_ours
    snapshot, _ = await pull(hub_client)
    assert not snapshot.is_ours
    assert len(hub.fetches(WEIGHTS)) == 1


async def test_an_index_that_names_an_absent_shard_is_not_complete(hub: LoopbackHub, tmp_path: Path) -> None:
    """What another tool left half done is not offered as a model."""
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {name: data for name, data in model_files().items() if name != WEIGHTS}
    files |= {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
    }
    hub.add(MODEL, files)
    hub_client = client(hub, tmp_path)
    snapshot, _ = await pull(hub_client)
    assert hub_client.find_cached(MODEL) == snapshot

    (snapshot.path / "model-00002-of-00002.safetensors").unlink()

    assert hub_client.find_cached(MODEL) is None


@pytest.mark.parametrize(
    "model_id",
    [
        "", "name", "a/b/c", "../x", "a/..", "a/.hidden", "a/b--c", "a/b.git", "/a", "a/", "a\\b",
        "a/b\0", "a/b c", "a/" + "x" * 97, "ä/b", "-a/b", "a/b\n",
    ],
)  # fmt: skip
async def test_a_hub_id_that_is_none_is_the_callers_mistake(
    hub: LoopbackHub, tmp_path: Path, model_id: str
) -> None:
    """Said with the field's name, before anything is started."""
    with pytest.raises(errors.InvalidRequestError) as invalid:
        await pull(client(hub, tmp_path), model_id)

    assert invalid.value.field == "model_id"
    assert hub.requests == []


@pytest.mark.parametrize(
    "revision", ["", "../main", "a/../../b", "/main", "a//b", "x\0", "-x", "a" * 200, "a b"]
)
async def test_a_revision_that_is_none_is_the_callers_mistake(
    hub: LoopbackHub, tmp_path: Path, revision: str
) -> None:
    """It becomes a path under refs."""
    with pytest.raises(errors.InvalidRequestError) as invalid:
        await pull(client(hub, tmp_path), revision=revision)

    assert invalid.value.field == "revision"
    assert hub.requests == []


async def test_a_hub_that_does_not_answer_is_given_up_in_time(hub: LoopbackHub) -> None:
    """For one lookup only: the process of it goes on with the next."""
    hub.add(MODEL, model_files())
    patient, hasty = lookups(hub), lookups(hub, seconds=1.0)
    stall = hub.stall("/api/models")
    waiting = asyncio.create_task(find(patient))
    for lookup in (find(hasty), hasty.describe(MODEL)):
        with pytest.raises(errors.HubUnavailableError, match="did not answer in time"):
            await lookup
    assert not waiting.done()
    stall.release()
    assert [repository.id for repository in (await waiting).repositories] == [MODEL]
    hub.recover()
    assert (await hasty.describe(MODEL)).repository.id == MODEL
    await asyncio.gather(patient.close(), hasty.close())


async def test_lookups_share_a_warm_process_which_ends_with_them(hub: LoopbackHub) -> None:
    """It knows no token but the job's, and a caller who leaves takes no answer from the next one."""
    hub.add(MODEL, model_files(), private=True)
    hub_lookups = lookups(hub, token=TOKEN)
    await find(hub_lookups)
    [child] = child_processes("hub_lookup")
    assert TOKEN not in " ".join(child.cmdline()) and TOKEN not in child.environ().values()
    assert (await hub_lookups.describe(MODEL)).repository.id == MODEL
    assert child_processes("hub_lookup") == [child]

    stall = hub.stall("/api/models")
    left = asyncio.create_task(find(hub_lookups, "left"))
    assert await asyncio.to_thread(stall.reached.wait, 60)
    left.cancel()
    hub.recover()
    assert (await hub_lookups.describe(MODEL)).repository.id == MODEL
    await hub_lookups.close()
    assert child_processes("hub_lookup") == []


def test_both_documented_variables_have_the_token() -> None:
    """The first wins; an empty one is none."""
    assert hub_token({}) is None
    assert hub_token({"HF_TOKEN": "hf_a", "HUGGINGFACE_HUB_TOKEN": "hf_b"}) == "hf_a"
    assert hub_token({"HF_TOKEN": " ", "HUGGINGFACE_HUB_TOKEN": "hf_b\n"}) == "hf_b"


async def test_a_lookup_needs_a_hub(hub: LoopbackHub) -> None:
    """Offline nothing is started; a closed port is said at once."""
    with pytest.raises(errors.HubUnavailableError, match="HF_HUB_OFFLINE"):
        await find(lookups(hub, offline=True))
    assert child_processes("hub_lookup") == []

    hub_lookups = lookups(hub)
    hub.close()
    with pytest.raises(errors.HubUnavailableError, match="cannot be reached"):
        await find(hub_lookups)
    await hub_lookups.close()


async def test_nonsense_in_an_answer_is_nothing_known(hub: LoopbackHub) -> None:
    """A repository's page is anybody's text."""
    hub.add(
        MODEL,
        model_files(),
        likes=-1,
        downloads=-5,
        tags=("mlx", "x" * 10_000, *(f"tag-{number}" for number in range(500))),
        safetensors={"parameters": {"F16": -1}, "total": 0},
        config={"model_type": ["llama"], "num_hidden_layers": "many"},
        cardData={"base_model": {"a": 1}, "description": "line\n\x00line " * 1000},
        gated=True,
    )
    hub_lookups = lookups(hub)
    [found] = (await find(hub_lookups)).repositories
    assert (found.likes, found.downloads, found.tensor_bytes, found.base_model) == (0, 0, None, "")
    assert (found.architecture, found.kv_bytes_per_token, found.is_gated) == ("", 0, True)
    assert len(found.tags) == 100 and max(map(len, found.tags)) <= 500
    assert len(found.card_description) <= 500 and "\n" not in found.card_description
    await hub_lookups.close()


async def test_another_cache_is_for_new_downloads(hub: LoopbackHub, tmp_path: Path) -> None:
    """What was downloaded before is deleted where it is."""
    hub.add(MODEL, model_files())
    hub_client = client(hub, tmp_path / "first")
    old, _ = await pull(hub_client)
    hub_client.cache_dir = tmp_path / "second"
    new, _ = await pull(hub_client)
    assert new.path.is_relative_to(tmp_path / "second")

    await asyncio.to_thread(hub_client.delete_revision, MODEL, old.revision, old.path)
    assert not old.path.exists() and new.path.exists()
