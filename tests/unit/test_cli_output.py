"""What people and programs read: quantities in words, tables, JSON, sentences."""

import io
import json
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console

from mlxgui.v1 import common_pb2, model_pb2, system_pb2
from mlxgui_grpc.cli import doctor, failures, lifetime, models, output, progress, residents, settings, top
from mlxgui_grpc.cli.chat import one_shot_text
from mlxgui_grpc.cli.serve import banner, first_command
from mlxgui_grpc.cli.spans import parse_seconds
from mlxgui_grpc.client import ServerUnreachableError, management
from mlxgui_grpc.errors import (
    BY_REASON,
    ModelInUseError,
    ModelNotFoundError,
    ModelNotLoadedError,
    ModelServerError,
)


@pytest.mark.parametrize(
    ("byte_count", "words"),
    [
        (0, ""),
        (-1, ""),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3_742_331, "3.7 MB"),
        (322_442_752, "322 MB"),
        (999_900_000, "1.0 GB"),
        (5_000_000_000_000, "5.0 TB"),
    ],
)
def test_sizes_are_in_decimal_units(byte_count: int, words: str) -> None:
    """As disks and downloads are counted."""
    assert output.size(byte_count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3599, "59 min"),
        (7500, "2 h 5 min"),
        (90000, "1 d"),
    ],
)
def test_spans_have_two_units_at_most(seconds: float, words: str) -> None:
    """The larger ones."""
    assert output.span(seconds) == words


def test_moments_are_told_from_now() -> None:
    """Past, future, and never."""
    now = datetime(2025, 1, 4, 10, 30, tzinfo=UTC)
    model = model_pb2.Model(last_use_time=Timestamp(seconds=int(now.timestamp()) - 300))
    loaded = model_pb2.LoadedModel(expire_time=Timestamp(seconds=int(now.timestamp()) + 30))
    assert output.moment(model, "last_use_time", now) == "5 min ago"
    assert output.moment(loaded, "expire_time", now) == "in 30 s"
    assert output.moment(model, "create_time", now) == ""


def test_plain_tables_are_aligned_and_never_cut() -> None:
    """A pipe has no width."""
    assert output.plain_table(["A", "LONG"], [["x" * 120, "1"], ["y", ""]]) == [
        "A" + " " * 121 + "LONG",
        "x" * 120 + "  1",
        "y",
    ]


def test_what_a_terminal_would_obey_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Text of a hub or a model's author, in tables and pairs: no title, no colour, one line."""
    evil, tame = "\x1b]0;title\x07a\nb\x9b2J", "\ufffd]0;title\ufffda b\ufffd2J"
    assert output.plain_table(["A"], [[evil]]) == ["A", tame]
    output.print_pairs([("description", evil)])
    assert capsys.readouterr().out == f"description  {tame}\n"
    assert drawn(80, ["A"], [[evil]])[1] == tame
    assert output.printable("日本語 ✅ é") == "日本語 ✅ é"


def drawn(width: int, columns: list[str], rows: list[list[str]]) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(output.rich_table(columns, rows, width))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_table_on_a_narrow_terminal_keeps_its_first_column() -> None:
    """The others are cut, and those to the right go, before a name is; one that is very long is cut too."""
    columns = ["NAME", "STATE", "MEMORY", "NOTE"]
    row = ["a" * 30, "queued, place 1", "999.5 MB", "words " * 10]
    assert drawn(200, columns, [row])[1].split("  ") == [row[0], row[1], row[2], row[3].rstrip()]
    assert drawn(80, columns, [row])[1].startswith(f"{row[0]}  queued, place 1  999.5 MB  words")
    for width, count in ((60, 3), (50, 2), (35, 1), (30, 1)):
        lines = drawn(width, columns, [row])
        assert lines[0].split() == columns[:count] and lines[1].startswith(row[0])
        assert all(len(line) <= width for line in lines) and len(lines) == 2
    assert "999.5 MB" in drawn(60, columns, [row])[1]
    assert drawn(62, columns, [["b" * 100, *row[1:]]])[1].startswith("b" * 39 + "…  queued")
    assert drawn(20, columns, [row])[1] == "a" * 19 + "…"
    assert drawn(20, columns, []) == ["NAME  STATE  MEMORY"]


def test_json_has_numbers_words_and_nulls() -> None:
    """64-bit integers are numbers, enums words, instants ISO 8601, unset members of a oneof absent."""
    operation = model_pb2.Operation(
        id="7",
        kind=model_pb2.Operation.KIND_INSTALL,
        create_time=Timestamp(seconds=0),
        install=model_pb2.InstallProgress(
            phase=model_pb2.InstallProgress.PHASE_DOWNLOADING,
            total_bytes=2**40,
            remaining=Duration(nanos=500_000_000),
        ),
    )
    value = output.to_json(operation)

    assert value["kind"] == "install"
    assert value["create_time"] == "1970-01-01T00:00:00Z"
    assert value["update_time"] is None
    assert value["done"] is False
    assert value["install"]["phase"] == "downloading"
    assert value["install"]["total_bytes"] == 2**40
    assert value["install"]["remaining"] == 0.5
    assert not {"load", "error", "success", "adapter"} & value.keys()
    assert json.loads(json.dumps(value)) == value
    assert output.to_json(model_pb2.LoadedModel())["queue_position"] is None


def test_an_enum_value_of_a_newer_server_is_its_number() -> None:
    """Nothing to fail about."""
    assert output.enum_word(model_pb2.ModelState.DESCRIPTOR, 99) == "99"
    assert output.enum_word(model_pb2.ModelState.DESCRIPTOR, model_pb2.MODEL_STATE_LOADED) == "loaded"


def test_progress_says_phase_amount_speed_and_time_left() -> None:
    """What is not known is not said."""
    operation = model_pb2.Operation(
        install=model_pb2.InstallProgress(
            phase=model_pb2.InstallProgress.PHASE_DOWNLOADING,
            done_bytes=5,
            total_bytes=10,
            bytes_per_second=2_000_000,
            remaining=Duration(seconds=61),
        )
    )
    assert progress.phase(operation) == "downloading"
    assert progress.amounts(operation) == (5, 10)
    assert progress.speed(operation) == "2.0 MB/s, 1 min 1 s left"
    queued = model_pb2.LoadProgress(phase=model_pb2.LoadProgress.PHASE_QUEUED, queue_position=2)
    assert progress.phase(model_pb2.Operation(load=queued)) == "queued, place 2"
    assert progress.phase(model_pb2.Operation()) == "starting"
    assert progress.speed(model_pb2.Operation()) == ""


def test_memory_is_in_binary_units() -> None:
    """As it is sold, and as the server's own sentences count it."""
    assert [output.memory(count) for count in (0, -1, 1, 350 * 2**20, 18.5 * 2**30, 2**40)] == [
        "0",
        "0",
        "1 MB",
        "350 MB",
        "18.5 GB",
        "1024.0 GB",
    ]


def test_models_in_memory_come_before_the_loads_that_wait() -> None:
    """Each model once; what is pinned, in use or for ever says so instead of a time."""
    loaded = model_pb2.MODEL_STATE_LOADED
    idle = model_pb2.LoadedModel(
        name="idle",
        state=loaded,
        memory_bytes=2**30,
        tokens_per_second=1.25,
        expire_time=Timestamp(seconds=2**32),
        process_id=7,
    )
    snapshot = model_pb2.ManagerSnapshot(
        loaded_models=[
            idle,
            model_pb2.LoadedModel(name="pinned", state=loaded, pinned=True),
            model_pb2.LoadedModel(name="busy", state=loaded, running_request_count=3),
            model_pb2.LoadedModel(name="kept", state=loaded),
            model_pb2.LoadedModel(
                name="next",
                state=model_pb2.MODEL_STATE_QUEUED,
                estimated_memory_bytes=2**20,
                queue_position=1,
            ),
        ],
        queue=[
            model_pb2.QueuedLoad(model="next", position=1),
            model_pb2.QueuedLoad(model="later", position=2, priority=-5),
        ],
    )
    table = [dict(zip(residents.COLUMNS, row, strict=True)) for row in residents.rows(snapshot)]
    assert [row["NAME"] for row in table] == ["idle", "pinned", "busy", "kept", "next", "later"]
    assert (table[0]["MEMORY"], table[0]["TOKENS/S"], table[0]["PID"]) == ("1.0 GB", "1.2", "7")
    assert table[0]["UNLOADS"].startswith("in ")
    assert [row["UNLOADS"] for row in table[1:]] == ["never, pinned", "in use", "never", "", ""]
    assert [row["STATE"] for row in table[3:]] == [
        "loaded",
        "queued, place 1",
        "queued, place 2, priority -5",
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30.0),
        ("-1", -1.0),
        ("0.5", 0.5),
        ("90s", 90.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("250ms", 0.25),
        ("-5m", -300.0),
    ],
)
def test_spans_are_read_as_users_write_them(text: str, seconds: float) -> None:
    """A bare number is seconds."""
    assert parse_seconds(text, "--grace") == seconds


@pytest.mark.parametrize("text", ["", "soon", "5x", "m", "5m soon", "5 m", "--5"])
def test_what_is_no_span_is_refused_by_the_name_of_its_flag(text: str) -> None:
    """With a form that is one."""
    with pytest.raises(failures.CommandError, match=r"--grace .*5m") as refused:
        parse_seconds(text, "--grace")
    assert refused.value.exit_code == failures.EXIT_USAGE


@pytest.mark.parametrize(
    ("key", "words", "value"),
    [
        ("server_port", ["9000"], 9000),
        ("auto_unload_inactive_models", ["off"], False),
        ("enable_gpu_acceleration", ["TRUE"], True),
        ("log_level", ["debug"], "debug"),
        ("huggingface_cache_dir", [""], ""),
        ("max_model_memory_gb", ["1.5"], 1.5),
        ("preload_models", ["a", "b"], ["a", "b"]),
        ("preload_models", ["a,b"], ["a", "b"]),
        ("preload_models", [""], []),
    ],
)
def test_a_setting_is_read_by_its_own_type(key: str, words: list[str], value: object) -> None:
    """Which the contract gives."""
    assert settings.parse(key, words) == value
    assert type(settings.parse(key, words)) is type(value)


@pytest.mark.parametrize(
    ("key", "words", "sentence"),
    [
        ("server_port", ["many"], "a whole number, not 'many'"),
        ("server_port", ["1.5"], "a whole number"),
        ("server_port", ["1", "2"], "one value"),
        ("auto_unload_inactive_models", ["maybe"], "true or false"),
        ("max_model_memory_gb", ["big"], "a number"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, words: list[str], sentence: str) -> None:
    """By the name of the setting, before any server is asked."""
    with pytest.raises(failures.CommandError, match=sentence) as refused:
        settings.parse(key, words)
    assert key in str(refused.value) and refused.value.exit_code == failures.EXIT_USAGE


def test_every_setting_of_the_contract_can_be_read_and_typed() -> None:
    """Also one that is added later: what `get` prints, `set` takes."""
    defaults = system_pb2.Settings()
    for key in settings.FIELDS:
        value = settings.value_of(defaults, key)
        assert settings.parse(key, [settings.text(value)]) == value
    assert set(settings.FIELDS) == set(management.SettingValues.__annotations__)


def test_a_verdict_is_yes_no_or_needless() -> None:
    """And says why not."""
    refused = model_pb2.EstimateLoadResponse(refusal=common_pb2.OperationError(message="Too large"))
    assert residents.verdict(refused) == "it would be refused: Too large"
    assert residents.verdict(model_pb2.EstimateLoadResponse(accepted=True)) == "it can be loaded"
    assert "already" in residents.verdict(model_pb2.EstimateLoadResponse(accepted=True, already_loaded=True))


def test_who_stops_a_server_hears_of_the_requests_that_run() -> None:
    """How many, and for how long they may go on."""
    assert lifetime.waiting_words(0, None) == "no request runs"
    assert lifetime.waiting_words(1, None).startswith("1 request runs on, as long as the server's grace")
    assert lifetime.waiting_words(2, 90.0).startswith("2 requests run on, 1 min 30 s at most")
    assert lifetime.waiting_words(3, 0.0) == "3 requests run and must end now"


def test_the_bar_shows_a_share_and_survives_any_numbers() -> None:
    """No budget, and more than the budget."""
    assert top.bar(1, 2).count("#") == top.BAR_CELLS // 2 and "50%" in top.bar(1, 2)
    assert "0%" in top.bar(5, 0)
    assert top.bar(9, 3).count("#") == top.BAR_CELLS


def test_a_source_is_a_path_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its look, and by what is there."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert models.parse_source("owner/name", must_exist=True) == tmp_path / "owner" / "name"
    assert models.parse_source("owner/name", must_exist=False) == "owner/name"
    assert models.parse_source("owner/other", must_exist=True) == "owner/other"
    assert models.parse_source("./owner", must_exist=True) == tmp_path / "owner"
    assert models.parse_source("/elsewhere/model", must_exist=False) == Path("/elsewhere/model")
    for text in ("/elsewhere/model", "name", "a/b/c", "other/", "/other", ""):
        with pytest.raises(failures.CommandError):
            models.parse_source(text, must_exist=True)


def test_words_of_a_question_are_paragraphs() -> None:
    """The message, then the prompt; blank ones do not count."""
    assert one_shot_text(["Shorten:", "a b"]) == "Shorten:\n\na b"
    with pytest.raises(failures.CommandError):
        one_shot_text(["  "])


def test_every_failure_has_a_sentence_and_a_documented_exit_code() -> None:
    """Whatever the server answers."""
    kinds: list[type[ModelServerError]] = [*BY_REASON.values(), ServerUnreachableError]
    for cls in kinds:
        sentence, exit_code = failures.explain(cls("The thing is so"))
        assert sentence.startswith("The thing is so")
        assert exit_code in (1, 2, 3, 4)
        if cls.status.name == "NOT_FOUND":
            assert exit_code == failures.EXIT_NOT_FOUND


def test_sentences_name_commands_of_this_program() -> None:
    """Not routes of the REST API."""
    missing, code = failures.explain(ModelNotFoundError.of("owner/name"))
    assert "`mlxgui pull owner/name`" in missing and code == failures.EXIT_NOT_FOUND
    assert "`mlxgui load m`" in failures.explain(ModelNotLoadedError.of("m"))[0]
    assert "--force" in failures.explain(ModelInUseError("Model 'm' has 2 requests running", model="m"))[0]
    assert (
        failures.explain(FileNotFoundError(2, "No such file or directory", "x"))[0]
        == "x: No such file or directory"
    )
    assert "bug" in failures.explain(KeyError("x"))[0]


@dataclass
class _Addresses:
    rest_url: str = "http://127.0.0.1:8000"
    grpc_address: str = "127.0.0.1:50051"
    unix_address: str = "unix:/h/run/grpc.sock"
    log_file: Path = Path("/h/logs/mlxgui.log")
    demo_model: str | None = "demo"


def test_the_banner_has_both_addresses_the_log_and_one_line_to_paste() -> None:
    """The line is one that a shell takes apart into a request for the demo model."""
    text = banner(_Addresses(), needs_key=False)
    for words in ("http://127.0.0.1:8000", "127.0.0.1:50051", "/h/logs/mlxgui.log"):
        assert words in text
    curl = shlex.split(next(line for line in text.splitlines() if line.strip().startswith("curl ")))
    body = json.loads(curl[curl.index("-d") + 1])
    assert curl[1] == "http://127.0.0.1:8000/v1/chat/completions"
    assert body["model"] == "demo"
    assert body["messages"][0]["content"] == "What is the capital of France?"


def test_the_line_to_paste_fits_the_server() -> None:
    """With a key it sends one, which is not on the screen; without a bridge or a demo model it needs neither."""
    assert "$MLX_GUI_API_KEY" in first_command(_Addresses(), needs_key=True)
    assert first_command(_Addresses(rest_url=""), needs_key=False).startswith("mlxgui run demo ")
    assert "/v1/models" in first_command(_Addresses(demo_model=None), needs_key=False)


def test_doctor_says_where_the_token_is_and_never_what_it_is(tmp_path: Path) -> None:
    """Presence only, whichever way it was set."""
    for variable in ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        finding = doctor.check_token({variable: "hf_secret", "HF_HOME": str(tmp_path)})
        assert variable in finding.detail
        assert "hf_secret" not in repr(finding)
    (tmp_path / "token").write_text("hf_secret")
    finding = doctor.check_token({"HF_HOME": str(tmp_path)})
    assert str(tmp_path / "token") in finding.detail
    assert "hf_secret" not in repr(finding)
    assert "none" in doctor.check_token({"HF_HOME": str(tmp_path / "empty")}).detail


def test_doctor_gives_a_way_out_for_whatever_is_wrong(tmp_path: Path) -> None:
    """Every verdict but ok comes with one."""
    open_folder = tmp_path / "open"
    open_folder.mkdir(mode=0o755)
    open_folder.chmod(0o755)
    file = tmp_path / "file"
    file.write_text("")
    bad = [
        doctor.check_python((3, 10, 1)),
        doctor.check_platform("darwin", "x86_64"),
        doctor.check_platform("win32", "AMD64"),
        doctor.check_openblas(None),
        doctor.check_state_directory(open_folder),
        doctor.check_state_directory(file),
    ]
    assert [finding.verdict for finding in bad] == ["fail", "fail", "fail", "warn", "warn", "fail"]
    assert all(finding.way_out for finding in bad)
    good = [
        doctor.check_python((3, 11, 0)),
        doctor.check_platform("darwin", "arm64"),
        doctor.check_platform("linux", "aarch64"),
        doctor.check_state_directory(tmp_path / "new"),
    ]
    assert all(finding.verdict == "ok" for finding in good)
