"""Settings: what each may be, which value counts, what a change that would lock the user out is told."""

import asyncio
import json
import math
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxgui.v1 import system_pb2
from mlxgui_grpc.catalog import Catalog, InstalledModel, Origin
from mlxgui_grpc.config import ServerConfig
from mlxgui_grpc.errors import InvalidRequestError, ModelNotFoundError, SettingNotFoundError
from mlxgui_grpc.options import Options, Source, load_options
from mlxgui_grpc.setting_table import SETTINGS, checked
from mlxgui_grpc.settings import Settings

KINDS = {"int32": int, "bool": bool, "string": str, "double": float}


@pytest.fixture
async def catalog(tmp_path: Path) -> Any:
    opened = Catalog(tmp_path / "state.db")
    await opened.open()
    yield opened
    await opened.close()


def options(home: Path, toml: str = "", environ: dict[str, str] | None = None, **flags: Any) -> Options:
    (home / "config.toml").write_text(toml)
    return load_options({"home": home, **flags}, environ or {})


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_table_is_the_contract_s_message() -> None:
    """Same keys in the same order, same types; every option exists."""
    fields = system_pb2.Settings.DESCRIPTOR.fields
    assert list(SETTINGS) == [field.name for field in fields]
    names = {field.name: list if field.is_repeated else KINDS[_type_name(field.type)] for field in fields}
    assert {key: setting.kind for key, setting in SETTINGS.items()} == names
    assert all(hasattr(ServerConfig(), setting.option) for setting in SETTINGS.values())


def _type_name(number: int) -> str:
    return {1: "double", 5: "int32", 8: "bool", 9: "string"}[number]


async def test_the_defaults_are_the_documented_ones(catalog: Catalog, tmp_path: Path) -> None:
    settings = Settings(options(tmp_path), catalog)
    assert {key: settings.value(key) for key in SETTINGS} == {
        "server_port": 8000,
        "max_concurrent_requests": 32,
        "auto_unload_inactive_models": True,
        "model_inactivity_timeout_minutes": 30,
        "enable_system_tray": True,
        "log_level": "INFO",
        "huggingface_cache_dir": "",
        "enable_gpu_acceleration": True,
        "bind_to_all_interfaces": False,
        "max_concurrent_models": 3,
        "default_model": "",
        "preload_models": [],
        "max_context_length": 0,
        "max_model_memory_gb": 0.0,
        "image_url_fetch": "on",
    }
    assert {settings.detail(key).source for key in SETTINGS} == {Source.DEFAULT}
    assert not any(settings.detail(key).pending_restart for key in SETTINGS)


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("server_port", [0, 65_535], [-1, 65_536, True, "80"]),
        ("max_concurrent_requests", [1, 1024], [0, 1025, 1.0]),
        ("auto_unload_inactive_models", [True, False], [1, "true"]),
        ("model_inactivity_timeout_minutes", [1, 10_080], [0, 10_081]),
        ("enable_system_tray", [False], [0]),
        ("log_level", ["DEBUG", "ERROR"], ["", "LOUD", 10]),
        ("huggingface_cache_dir", ["", "/models", "/"], ["models", "~/models", "/a\0b", "/" + "x" * 5000]),
        ("enable_gpu_acceleration", [False], [None]),
        ("bind_to_all_interfaces", [True], ["yes"]),
        ("max_concurrent_models", [1, 64], [0, 65]),
        ("default_model", ["", "m", "acme/m"], ["x" * 513, " ", ["m"]]),
        ("preload_models", [[], ["m"] * 16], [["m"] * 17, [""], ["x" * 513], "m", [1]]),
        ("max_context_length", [0, 16, 16_777_216], [-1, 1, 15, 16_777_217]),
        ("max_model_memory_gb", [0, 0.5, 65_536.0], [-0.1, math.nan, math.inf, "8"]),
        (
            "image_url_fetch",
            ["on", "off", "a.example", "a.example,*.b.example,8.8.8.8"],
            ["", ",", "yes", "a.example:80", "http://a.example", "*", "x" * 5000, True, ["a.example"]],
        ),
    ],
)
def test_a_value_is_of_its_type_and_in_its_range(key: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert checked(SETTINGS[key], value) == value
    for value in bad:
        with pytest.raises(InvalidRequestError, match=key) as refused:
            checked(SETTINGS[key], value)
        assert refused.value.field == f"settings.{key}"


def test_a_folder_has_one_spelling() -> None:
    """Two slashes at its beginning mean nothing else than one."""
    for text in ("/models/", "//models", "///models", "/a/../models/."):
        assert checked(SETTINGS["huggingface_cache_dir"], text) == "/models"


def test_hosts_to_fetch_from_have_one_spelling() -> None:
    """As what a URL says is compared with them."""
    for text, spelling in (
        (" ON ", "on"),
        ("B.Example , bücher.example.", "b.example,xn--bcher-kva.example"),
    ):
        assert checked(SETTINGS["image_url_fetch"], text) == spelling


async def test_a_change_is_in_effect_and_durable_and_all_or_none(catalog: Catalog, tmp_path: Path) -> None:
    settings = Settings(options(tmp_path, "max_concurrent_models = 5"), catalog)
    heard: list[int] = []
    settings.on_change = lambda config: heard.append(config.max_concurrent_models)
    await settings.update({"max_concurrent_models": 2, "log_level": "debug", "max_model_memory_gb": 4})
    assert heard == [2] and settings.value("log_level") == "DEBUG"
    with sqlite3.connect(tmp_path / "state.db") as database:
        rows = dict(database.execute("SELECT key, value FROM settings"))
    assert rows == {"max_concurrent_models": "2", "log_level": '"DEBUG"', "max_model_memory_gb": "4.0"}
    for values, reset, error in (
        ({"max_concurrent_models": 9, "max_concurrent_requests": 0}, [], InvalidRequestError),
        ({"max_concurrent_models": 9, "colour": 1}, [], SettingNotFoundError),
        ({"max_concurrent_models": 9}, ["colour"], SettingNotFoundError),
        ({"max_concurrent_models": 9}, ["max_concurrent_models"], InvalidRequestError),
    ):
        with pytest.raises(error):
            await settings.update(values, reset)
    assert settings.value("max_concurrent_models") == 2 and catalog.settings() == rows
    again = Settings(options(tmp_path, "max_concurrent_models = 5"), catalog)
    assert again.value("max_concurrent_models") == 2
    await again.update({}, ["max_concurrent_models"])
    assert again.value("max_concurrent_models") == 5
    assert again.detail("max_concurrent_models").source is Source.CONFIG_FILE
    assert "max_concurrent_models" not in catalog.settings()


async def test_cancelling_a_change_undoes_nothing(catalog: Catalog, tmp_path: Path) -> None:
    settings = Settings(options(tmp_path), catalog)
    heard = asyncio.Event()
    settings.on_change = lambda config: heard.set()
    change = asyncio.get_running_loop().create_task(settings.update({"max_concurrent_models": 1}))
    await asyncio.sleep(0)
    change.cancel()
    await heard.wait()
    assert settings.value("max_concurrent_models") == 1 and catalog.settings() == {
        "max_concurrent_models": "1"
    }


async def test_a_flag_or_variable_goes_before_what_is_stored_and_the_note_says_so(
    catalog: Catalog, tmp_path: Path
) -> None:
    given = options(tmp_path, "", {"MLX_GUI_LOG_LEVEL": "error"}, port=1234)
    settings = Settings(given, catalog)
    await settings.update({"server_port": free_port(), "log_level": "DEBUG"})
    for key, value, source, word in (
        ("server_port", 1234, Source.FLAG, "--port"),
        ("log_level", "ERROR", Source.ENVIRONMENT, "MLX_GUI_LOG_LEVEL"),
    ):
        detail = settings.detail(key)
        assert (settings.value(key), detail.source, detail.pending_restart) == (value, source, False)
        assert word in detail.note and catalog.settings()[key] in detail.note
    assert Settings(options(tmp_path), catalog).value("log_level") == "DEBUG"


async def test_what_a_flag_hides_is_checked_as_if_it_counted(catalog: Catalog, tmp_path: Path) -> None:
    """And is no good value of a start: that has not tried it."""
    before = Settings(options(tmp_path), catalog)
    good = free_port()
    await before.update({"server_port": good, "max_concurrent_models": 2})
    await Settings(options(tmp_path), catalog).note_start()
    hidden = options(tmp_path, "", {"MLX_GUI_HUB_CACHE": str(tmp_path)}, port=1234, host="127.0.0.1")
    settings = Settings(hidden, catalog)
    with taken_port() as port:
        for values in (
            {"server_port": port},
            {"huggingface_cache_dir": "/proc/nope"},
            {"bind_to_all_interfaces": True},
        ):
            with pytest.raises(InvalidRequestError) as refused:
                await settings.update(values)
            assert refused.value.field == f"settings.{next(iter(values))}"
        await settings.update({"server_port": free_port(), "max_concurrent_models": 5})
        flagged = Settings(hidden, catalog)
        await flagged.note_start()
        no_bridge = Settings(options(tmp_path, bridge=False), catalog)
        await no_bridge.note_start()
        assert json.loads(catalog.settings()["last_good"]) == {
            "server_port": good,
            "max_concurrent_models": 5,
        }
    again = Settings(options(tmp_path), catalog)
    assert again.config.port not in (good, 1234) and again.fall_back("no") and again.config.port == good


async def test_a_folder_that_was_good_once_and_has_gone_is_given_up(catalog: Catalog, tmp_path: Path) -> None:
    """Its disk is not there: what was good at the last start is as bad as what is stored now."""
    cache = tmp_path / "disk" / "cache"
    cache.mkdir(parents=True)
    await Settings(options(tmp_path), catalog).update({"huggingface_cache_dir": str(cache)})
    await Settings(options(tmp_path), catalog).note_start()
    assert str(cache) in catalog.settings()["last_good"]
    cache.rmdir()
    cache.parent.rmdir()
    cache.parent.write_text("not mounted")
    settings = Settings(options(tmp_path), catalog)
    await settings.note_start()
    assert settings.config.hub_cache is None and settings.value("huggingface_cache_dir") == ""
    assert "cannot be written to" in settings.detail("huggingface_cache_dir").note
    cache.parent.unlink()
    assert Settings(options(tmp_path), catalog).config.hub_cache == cache


async def test_a_restart_that_could_not_start_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    """By config.toml as it is then, below the flags and variables of this start."""
    settings = Settings(options(tmp_path, "port = 1234", max_concurrent_models=2), catalog)
    settings.rest_port, settings.grpc_port = 1234, 50051
    await settings.check_restart()
    file = tmp_path / "config.toml"
    with taken_port() as port:
        for text, field in (
            ('port = "x"', "port"),
            ("port = ", "config.toml"),
            ("colour = 1", "colour"),
            ('host = "0.0.0.0"', "host"),
            ("max_concurrent_requests = 0", "max_concurrent_requests"),
            (f"grpc_port = {port}", "grpc_port"),
            (f"port = {port}", "port"),
        ):
            file.write_text(text)
            with pytest.raises(InvalidRequestError) as refused:
                await settings.check_restart()
            assert refused.value.field == field
        await settings.update({"server_port": 0})
        await settings.check_restart()
    file.unlink()
    await settings.check_restart()


async def test_the_address_and_the_preloads_wait_for_a_restart(catalog: Catalog, tmp_path: Path) -> None:
    given = options(tmp_path, "", {"MLX_GUI_API_KEY": "k"})
    settings = Settings(given, catalog)
    port = free_port()
    await settings.update({"server_port": port, "bind_to_all_interfaces": True, "preload_models": ["demo"]})
    pending = {key for key in SETTINGS if settings.detail(key).pending_restart}
    assert pending == {"server_port", "bind_to_all_interfaces", "preload_models"}
    assert (settings.value("server_port"), settings.value("preload_models")) == (8000, [])
    assert str(port) in settings.detail("server_port").note
    assert "Not installed: demo" in settings.detail("preload_models").note
    config = Settings(given, catalog).config
    assert (config.port, config.host, config.preload_models) == (port, "0.0.0.0", ("demo",))
    await settings.update({"server_port": 8000}, ["bind_to_all_interfaces", "preload_models"])
    assert not any(settings.detail(key).pending_restart for key in SETTINGS)


async def test_a_change_with_which_the_next_start_would_fail_is_refused_with_the_way_out(
    catalog: Catalog, tmp_path: Path
) -> None:
    settings = Settings(options(tmp_path), catalog)
    a_file = tmp_path / "file"
    a_file.write_text("")
    with taken_port() as port:
        changes: list[tuple[dict[str, Any], list[str]]] = [
            ({"bind_to_all_interfaces": True}, ["MLX_GUI_API_KEY", "--api-key"]),
            ({"server_port": port}, [str(port), "choose another"]),
            ({"huggingface_cache_dir": str(a_file / "cache")}, [str(a_file), "another folder"]),
            ({"huggingface_cache_dir": "/proc/cache"}, ["/proc/cache"]),
        ]
        for values, words in changes:
            with pytest.raises(InvalidRequestError) as refused:
                await settings.update({**values, "max_concurrent_models": 9})
            (key,) = values
            assert refused.value.field == f"settings.{key}"
            assert all(word in refused.value.message for word in words), refused.value.message
        settings.rest_port = port  # Its own port is no other program's.
        await settings.update({"server_port": port})
    assert settings.value("max_concurrent_models") == 3
    await settings.update({"huggingface_cache_dir": str(tmp_path / "new" / "cache")})
    assert not (tmp_path / "new").exists()
    secured = Settings(options(tmp_path, insecure=True), catalog)
    await secured.update({"bind_to_all_interfaces": True})


async def test_stored_values_that_cannot_be_used_are_passed_over_and_named(
    catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Garbage, a range that has changed, a folder that has gone: each on its own, all others count."""
    gone = tmp_path / "disk"
    gone.write_text("not mounted")
    await catalog.save_settings(
        {
            "max_concurrent_requests": "oh",
            "max_concurrent_models": "1000",
            "huggingface_cache_dir": json.dumps(str(gone / "cache")),
            "model_inactivity_timeout_minutes": "7",
            "of_a_newer_version": "1",
        }
    )
    settings = Settings(options(tmp_path), catalog)
    await settings.note_start()
    assert settings.value("model_inactivity_timeout_minutes") == 7
    for key, value in (
        ("max_concurrent_requests", 32),
        ("max_concurrent_models", 3),
        ("huggingface_cache_dir", ""),
    ):
        assert settings.value(key) == value
        assert "could not be used at the start" in settings.detail(key).note
        assert any(key in record.message and record.levelname == "ERROR" for record in caplog.records)
        assert not settings.detail(key).pending_restart, "it waits for more than a restart"
    await settings.update({"max_concurrent_models": 4})
    assert settings.value("max_concurrent_models") == 4 and not settings.detail("max_concurrent_models").note


async def test_a_start_that_fails_falls_back_to_the_last_good_address_then_to_none(
    catalog: Catalog, tmp_path: Path
) -> None:
    first = Settings(options(tmp_path), catalog)
    good, bad = free_port(), free_port()
    await first.update({"server_port": good})
    second = Settings(options(tmp_path), catalog)
    assert second.config.port == good
    await second.note_start()
    await second.update({"server_port": bad, "max_concurrent_models": 2})

    third = Settings(options(tmp_path), catalog)
    assert third.config.port == bad
    assert third.fall_back("it is used by process 1") and third.config.port == good
    detail = third.detail("server_port")
    assert not detail.pending_restart and "process 1" in detail.note and str(bad) in detail.note
    assert third.value("max_concurrent_models") == 2
    assert third.fall_back("that too") and third.config.port == 8000
    assert not third.fall_back("and that")
    await third.update(
        {"max_concurrent_models": 5}
    )  # What failed does not stand in the way of other changes.
    assert "process 1" in third.detail("server_port").note and third.value("server_port") == 8000

    flagged = Settings(options(tmp_path, port=bad), catalog)
    assert not flagged.fall_back("the flag is to blame")


async def test_a_start_without_the_key_that_was_there_is_not_bound_to_all(
    catalog: Catalog, tmp_path: Path
) -> None:
    with_key = Settings(options(tmp_path, "", {"MLX_GUI_API_KEY": "k"}), catalog)
    port = free_port()
    await with_key.update({"bind_to_all_interfaces": True, "server_port": port})
    without = Settings(options(tmp_path), catalog)
    assert without.config.port == port and not without.detail("server_port").note, "it is not to blame"
    assert without.config.host == "127.0.0.1" and without.value("bind_to_all_interfaces") is False
    detail = without.detail("bind_to_all_interfaces")
    assert not detail.pending_restart and "MLX_GUI_API_KEY" in detail.note


async def test_what_has_no_effect_says_so(catalog: Catalog, tmp_path: Path) -> None:
    settings = Settings(options(tmp_path), catalog)
    assert "Without effect" in settings.detail("enable_system_tray").note

    def note(has_gpu: bool | None) -> str:
        return settings.detail("enable_gpu_acceleration", has_gpu=has_gpu).note

    assert "Without effect" in note(False) and not note(True) and not note(None)
    no_bridge = Settings(options(tmp_path, bridge=False), catalog)
    assert "without its REST API" in no_bridge.detail("server_port").note


async def test_a_request_without_a_model_is_for_the_default_one(catalog: Catalog, tmp_path: Path) -> None:
    await catalog.add(InstalledModel(name="m", origin=Origin.DIRECTORY, path=tmp_path))
    settings = Settings(options(tmp_path), catalog)
    assert settings.find_model("M").name == "m"
    with pytest.raises(InvalidRequestError, match="default_model") as refused:
        settings.find_model("")
    assert refused.value.field == "model"
    with pytest.raises(ModelNotFoundError):
        settings.find_model("default")
    await settings.update({"default_model": "gone"})
    assert "gone" in settings.detail("default_model").note
    with pytest.raises(ModelNotFoundError, match=r"'gone' not found: .* set default_model .* pull"):
        settings.find_model("")
    await settings.update({"default_model": "m"})
    assert settings.find_model("").name == settings.find_model("Default").name == "m"
    assert not settings.detail("default_model").note
    with pytest.raises(ModelNotFoundError):
        settings.find_model("other")
    await catalog.add(InstalledModel(name="default", origin=Origin.DIRECTORY, path=tmp_path))
    assert settings.find_model("default").name == "default"
