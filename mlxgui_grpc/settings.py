"""The settings while the server runs: which value is in effect and why, and changing them for good."""

import asyncio
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlxgui_grpc.catalog import Catalog, InstalledModel
from mlxgui_grpc.config import ServerConfig
from mlxgui_grpc.errors import (
    DiskFullError,
    InvalidRequestError,
    ModelNotFoundError,
    SettingNotFoundError,
)
from mlxgui_grpc.options import Options, Source
from mlxgui_grpc.ports import why_not_free
from mlxgui_grpc.setting_table import (
    SETTINGS,
    Setting,
    Value,
    checked,
    from_option,
    read_stored,
    why_not_writable,
)

log = logging.getLogger(__name__)

_LAST_GOOD = "last_good"
"""Where the catalog keeps the settings of the last start that went well. No setting is called so."""
_ADDRESS = ("server_port", "bind_to_all_interfaces")
"""Where the REST API listens. If it cannot, both are at fault."""
_CACHE = "huggingface_cache_dir"


@dataclass(frozen=True, slots=True)
class Detail:
    """What there is to know about one setting."""

    key: str
    source: Source
    pending_restart: bool
    note: str


class Settings:
    """The settings of a server, from its start on. Use on the event loop only."""

    def __init__(self, options: Options, catalog: Catalog) -> None:
        """Take what is stored, but for what the server could not start with."""
        self._options = options
        self._catalog = catalog
        self._lock = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._stored, self._failed = read_stored(catalog.settings())
        """What is stored, and why some of it is not in use, by key."""
        self._last_good = _last_good(catalog)
        if reason := self._why_not_usable(_CACHE, self._stored):
            self._failed[_CACHE] = reason
        instead = {
            key: self._last_good[key]
            for key in self._failed
            if key in self._last_good and not self._why_not_usable(key, self._last_good)
        }
        self._used = {key: value for key, value in self._stored.items() if key not in self._failed} | instead
        """What is stored and in effect, or in effect in its place."""
        self._other_addresses = [self._last_good, {}]
        self.rest_port = 0
        """Where the REST API listens, once it does."""
        self.grpc_port = 0
        """Where gRPC listens over TCP, once it does."""
        self.on_change: Callable[[ServerConfig], None] = lambda config: None
        """Hears what is in effect after a change."""
        self.config = options.config()
        """What is in effect."""
        try:
            self.config = options.config(_by_option(self._used))
        except InvalidRequestError as error:
            # Every stored value is good by itself: what is missing is the key that goes with this one.
            if not self._take_other(_ADDRESS[1:], [self._last_good, {}], error.message, tried=None):
                raise

    # The start.

    def fall_back(self, reason: str) -> bool:
        """The REST API cannot have its address: take that of the last good start, else what counts when none is stored.
        False: there is no other address."""
        return self._take_other(
            _ADDRESS, self._other_addresses, reason, tried=(self.config.host, self.config.port)
        )

    def _take_other(
        self,
        keys: Collection[str],
        others: list[dict[str, Value]],
        reason: str,
        tried: tuple[str, int] | None,
    ) -> bool:
        """Take the values of `keys` from the first of `others` that makes another address; those are used up."""
        while others:
            values = others.pop(0)
            used = _changed(self._used, {key: values[key] for key in keys if key in values}, keys)
            try:
                config = self._options.config(_by_option(used))
            except InvalidRequestError:
                continue
            if (config.host, config.port) != tried:
                for key in keys:
                    if self._source(key) is Source.STORED and self._stored.get(key) != used.get(key):
                        self._failed.setdefault(key, reason)
                self._used, self.config = used, config
                return True
        return False

    def _why_not_usable(self, key: str, values: Mapping[str, Value]) -> str:
        """Why the server cannot start with that one of these stored values; empty when it can, or need not."""
        folder, source = self._options.find(SETTINGS[key].option, _by_option(values))
        if key != _CACHE or source is not Source.STORED or folder is None:
            return ""
        return why_not_writable(folder)

    async def note_start(self) -> None:
        """The server has come up: tell what was left out, and keep what is good for the next time."""
        for key, reason in self._failed.items():
            log.error(  # Whatever the level of the log is: it is on the console too.
                "started with %s = %s, as the stored %s cannot be used: %s",
                key,
                json.dumps(self.value(key)),
                self._catalog.settings().get(key, "default"),
                reason,
            )
        good = {
            key: values[key]
            for key in SETTINGS
            # What did not count is neither good nor bad by now.
            if key in (values := self._used if self._is_tried(key) else self._last_good)
        }
        if good != self._last_good:
            self._last_good = good
            try:
                await self._catalog.save_settings({_LAST_GOOD: json.dumps(good)})
            except DiskFullError as error:  # The next start can do without.
                log.warning("the settings of this start are not kept as good ones: %s", error.message)

    async def check_restart(self) -> None:
        """Raises InvalidRequestError where the next start would fail by what is in config.toml now."""
        config = (await asyncio.to_thread(self._options.read_again)).config()
        ports = [("grpc_port", config.grpc_host, config.grpc_port, self.grpc_port)]
        if config.bridge and "server_port" not in self._stored:  # What is stored can be done without.
            ports.append(("port", config.host, config.port, self.rest_port))
        for name, host, port, own_port in ports:
            if port not in (0, own_port) and (reason := await asyncio.to_thread(why_not_free, host, port)):
                raise InvalidRequestError(
                    f"{name} {port} cannot be had: {reason}; choose another, or 0 for any free one",
                    field=name,
                )

    def _is_tried(self, key: str) -> bool:
        """Whether this start has shown what is stored under a key, or that nothing is, to be good."""
        return self._source(key) <= Source.STORED and (self.config.bridge or key not in _ADDRESS)

    # Reading.

    def value(self, key: str) -> Value:
        """The value in effect."""
        return from_option(SETTINGS[key], getattr(self.config, SETTINGS[key].option))

    def detail(self, key: str, *, has_gpu: bool | None = None) -> Detail:
        """Where the value in effect comes from, and what else to know. `has_gpu`: None is not known yet."""
        setting = SETTINGS[key]
        source = self._source(key)
        is_overridden = source > Source.STORED
        next_value = from_option(setting, self._options.find(setting.option, _by_option(self._stored))[0])
        is_failed = key in self._failed  # It waits for more than a restart.
        is_pending = not is_overridden and not is_failed and next_value != self.value(key)
        stored = self._catalog.settings().get(key)
        notes = [self._note(setting, next_value, has_gpu)]
        if stored is not None and is_overridden:
            notes.insert(0, f"{self._options.words(setting.option, source)} goes before the stored {stored}.")
        elif is_failed:
            notes.insert(0, f"The stored {stored} could not be used at the start: {self._failed[key]}.")
        elif is_pending:
            notes.insert(0, f"{json.dumps(next_value)} takes effect after a restart.")
        return Detail(key, source, is_pending, " ".join(note for note in notes if note))

    def find_model(self, name: str) -> InstalledModel:
        """The model that a request names, or the default one where it names none; raises ModelNotFoundError, or
        InvalidRequestError where there is no default."""
        default = self.config.default_model
        if name and (name.casefold() != "default" or self._catalog.find(name) is not None or not default):
            return self._catalog.get(name)
        if not default:
            raise InvalidRequestError(
                "model must not be empty: name one, or set default_model", field="model"
            )
        model = self._catalog.find(default)
        if model is None:
            raise ModelNotFoundError(
                f"Model '{default}' not found: the setting default_model names it; set default_model to "
                "another, or pull it",
                model=default,
                hint=f"mlxgui pull {default}",
            )
        return model

    def _source(self, key: str) -> Source:
        return self._options.find(SETTINGS[key].option, _by_option(self._used))[1]

    # Changing.

    async def update(self, values: Mapping[str, Value], reset: Collection[str] = ()) -> None:
        """Store values and forget others, all or none; durable, and in effect as far as can be, when it returns.

        Cancelling it undoes nothing. Raises SettingNotFoundError, and InvalidRequestError for a value out of its range
        or one that the next start would fail with.
        """
        for key in (*values, *reset):
            if key not in SETTINGS:
                raise SettingNotFoundError(f"Setting '{key}' not found", setting=key)
        if both := sorted(set(values) & set(reset)):
            raise InvalidRequestError(f"{both[0]} cannot be set and reset at once", field="reset_mask")
        values = {key: checked(SETTINGS[key], value) for key, value in values.items()}
        change = asyncio.get_running_loop().create_task(self._update(values, reset))
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)
        await asyncio.shield(change)

    async def _update(self, values: Mapping[str, Value], reset: Collection[str]) -> None:
        touched = {*values, *reset}
        async with self._lock:
            used = _changed(self._used, values, touched)
            config = self._checked_config(self._options, used)
            await self._check_start(self._options.without(_by_option(values)), used, touched)
            texts = {key: json.dumps(value) for key, value in values.items()}
            await self._catalog.save_settings({**dict.fromkeys(reset), **texts})
            self._used, self._stored = used, _changed(self._stored, values, touched)
            self._failed = {key: reason for key, reason in self._failed.items() if key not in touched}
            at_once = [setting.option for setting in SETTINGS.values() if not setting.after_restart]
            self.config = replace(self.config, **{option: getattr(config, option) for option in at_once})
        log.info("settings changed: %s", ", ".join(sorted(touched)))
        self.on_change(self.config)

    def _checked_config(self, options: Options, used: Mapping[str, Value]) -> ServerConfig:
        """What a start would have; raises InvalidRequestError, in words for who sets settings."""
        try:
            return options.config(_by_option(used))
        except InvalidRequestError as error:
            if error.field != "host":
                raise
            raise InvalidRequestError(
                "bind_to_all_interfaces lets other machines in, and no key is set: start the server with "
                "MLX_GUI_API_KEY or --api-key, or with --insecure",
                field="settings.bind_to_all_interfaces",
            ) from error

    async def _check_start(
        self, options: Options, used: Mapping[str, Value], touched: Collection[str]
    ) -> None:
        """Raises InvalidRequestError where a start with the touched values would fail."""
        config = self._checked_config(options, used)
        reason = ""
        if "server_port" in touched and config.bridge and config.port not in (0, self.rest_port):
            reason = await asyncio.to_thread(why_not_free, config.host, config.port)
        if reason:
            raise InvalidRequestError(
                f"server_port {config.port} cannot be had: {reason}; choose another, or 0 for any free one",
                field="settings.server_port",
            )
        if _CACHE in touched and config.hub_cache is not None:
            reason = await asyncio.to_thread(why_not_writable, config.hub_cache)
        if reason:
            raise InvalidRequestError(
                f"{_CACHE}: {reason}; name another folder, or none for the Hugging Face cache",
                field=f"settings.{_CACHE}",
            )

    def _note(self, setting: Setting, next_value: Value, has_gpu: bool | None) -> str:
        """What is so wherever the value comes from."""
        key = setting.key
        if key == "enable_system_tray":
            return "Without effect: this version has no icon in the system's tray."
        if key == "enable_gpu_acceleration" and has_gpu is False and self.config.enable_gpu_acceleration:
            return "Without effect: MLX has no GPU on this machine."
        if key in _ADDRESS and not self.config.bridge:
            return "Without effect: the server was started without its REST API."
        if key in ("default_model", "preload_models"):
            names = next_value if isinstance(next_value, list) else [str(next_value)] if next_value else []
            missing = [name for name in names if self._catalog.find(name) is None]
            return f"Not installed: {', '.join(missing)}." if missing else ""
        return ""


def _changed(
    before: Mapping[str, Value], values: Mapping[str, Value], touched: Collection[str]
) -> dict[str, Value]:
    return {key: value for key, value in before.items() if key not in touched} | dict(values)


def _by_option(values: Mapping[str, Value]) -> dict[str, Any]:
    return {SETTINGS[key].option: value for key, value in values.items()}


def _last_good(catalog: Catalog) -> dict[str, Value]:
    try:
        values = json.loads(catalog.settings().get(_LAST_GOOD, "{}"))
        texts = {key: json.dumps(value) for key, value in values.items()}
    except (ValueError, AttributeError):
        return {}
    return read_stored(texts)[0]
