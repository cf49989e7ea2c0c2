"""Options from flags, environment and file: what they cannot be is refused by name, before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from mlxgui_grpc.config import ServerConfig
from mlxgui_grpc.errors import InvalidRequestError
from mlxgui_grpc.options import Source, load_config, load_options


def load(home: Path, toml: str = "", environ: dict[str, str] | None = None, **flags: Any) -> ServerConfig:
    (home / "config.toml").write_text(toml)
    return load_config({"home": home, **flags}, environ or {})


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        'port = 1\ngrpc_port = 1\nmax_waiting_requests = 7\nmodel_roots = ["/models"]\ninference_seconds = 5',
        {"MLX_GUI_PORT": "2", "MLX_GUI_GRPC_PORT": "2"},
        port=3,
    )
    assert (config.port, config.grpc_port, config.max_waiting_requests) == (3, 2, 7)
    assert (config.model_roots, config.inference_seconds) == ((Path("/models"),), 5.0)


def test_what_is_stored_goes_between_the_environment_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('port = 1\nmax_concurrent_models = 1\ndefault_model = "file"\n')
    options = load_options(
        {"home": tmp_path, "max_context_length": 50}, {"MLX_GUI_MAX_CONCURRENT_MODELS": "2"}
    )
    stored = {"port": 7, "max_concurrent_models": 7, "max_context_length": 70, "hub_cache": "/models"}
    config = options.config(stored)
    assert (config.port, config.max_concurrent_models, config.max_context_length) == (7, 2, 50)
    assert (config.default_model, config.hub_cache) == ("file", Path("/models"))
    assert [options.find(name, stored)[1] for name in (*stored, "default_model", "log_level")] == [
        Source.STORED,
        Source.ENVIRONMENT,
        Source.FLAG,
        Source.STORED,
        Source.CONFIG_FILE,
        Source.DEFAULT,
    ]
    assert options.words("max_concurrent_models", Source.ENVIRONMENT) == "MLX_GUI_MAX_CONCURRENT_MODELS"
    assert options.words("max_context_length", Source.FLAG) == "--max-context-length"
    assert options.config().port == 1


def test_a_variable_with_commas_is_a_list(tmp_path: Path) -> None:
    config = load(tmp_path, 'preload_models = ["z"]', {"MLX_GUI_PRELOAD_MODELS": "a, b,,"})
    assert config.preload_models == ("a", "b")


@pytest.mark.parametrize(
    ("flags", "stored", "toml", "host", "to_all", "source"),
    [
        ({}, {}, "", "127.0.0.1", False, Source.DEFAULT),
        ({}, {"bind_to_all_interfaces": True}, "", "0.0.0.0", True, Source.STORED),
        ({}, {"bind_to_all_interfaces": True}, 'host = "192.0.2.1"', "0.0.0.0", True, Source.STORED),
        ({}, {"bind_to_all_interfaces": False}, 'host = "0.0.0.0"', "127.0.0.1", False, Source.STORED),
        ({}, {"bind_to_all_interfaces": False}, 'host = "192.0.2.1"', "192.0.2.1", False, Source.STORED),
        ({"host": "192.0.2.1"}, {"bind_to_all_interfaces": True}, "", "192.0.2.1", False, Source.FLAG),
        ({"host": "::"}, {"bind_to_all_interfaces": False}, "", "::", True, Source.FLAG),
        ({}, {}, 'host = "0.0.0.0"', "0.0.0.0", True, Source.CONFIG_FILE),
        ({"bind_to_all_interfaces": True}, {}, "", "0.0.0.0", True, Source.FLAG),
    ],
)
def test_host_and_all_interfaces_are_one_option_and_the_stronger_source_says(
    tmp_path: Path,
    flags: dict[str, Any],
    stored: dict[str, Any],
    toml: str,
    host: str,
    to_all: bool,
    source: Source,
) -> None:
    (tmp_path / "config.toml").write_text(toml)
    options = load_options({"home": tmp_path, "insecure": True, **flags}, {})
    config = options.config(stored)
    assert (config.host, config.bind_to_all_interfaces) == (host, to_all)
    assert options.find("bind_to_all_interfaces", stored) == (to_all, source)


@pytest.mark.parametrize(
    ("field", "toml", "words"),
    [
        ("model_roots", 'model_roots = "/models"', "is not a list of paths"),
        ("allowed_hosts", 'allowed_hosts = "example"', "is not a list of names"),
        ("cors_origins", "cors_origins = [1]", "is not a list of names"),
        ("port", "port = true", "is not a whole number"),
        ("port", "port = 80.5", "is not a whole number"),
        ("port", "port = 65536", "between 0 and 65535"),
        ("stall_seconds", "stall_seconds = true", "is not a number"),
        ("stall_seconds", "stall_seconds = 0", "more than 0"),
        ("inference_seconds", "inference_seconds = inf", "finite"),
        ("drain_seconds", "drain_seconds = nan", "finite"),
        ("max_concurrent_requests", "max_concurrent_requests = 0", "between 1 and 1024"),
        ("max_concurrent_requests", "max_concurrent_requests = 1025", "between 1 and 1024"),
        ("max_concurrent_models", "max_concurrent_models = 0", "between 1 and 64"),
        ("model_inactivity_timeout_minutes", "model_inactivity_timeout_minutes = 0", "between 1 and 10080"),
        ("max_model_memory_gb", "max_model_memory_gb = nan", "between 0 and 65536"),
        ("max_context_length", "max_context_length = -1", "between 16 and 16777216"),
        ("max_context_length", "max_context_length = 15", "between 16 and 16777216"),
        ("preload_models", f"preload_models = {['m'] * 17}", "more than 16"),
        ("preload_models", 'preload_models = "m"', "is not a list of names"),
        ("image_url_fetch", 'image_url_fetch = "localhost"', "'localhost' is no host"),
        ("image_url_ports", 'image_url_ports = ["80"]', "is not a list of whole numbers"),
        ("image_url_ports", "image_url_ports = [0]", "between 1 and 65535"),
        ("image_url_trusted_addresses", 'image_url_trusted_addresses = ["a"]', "must be IP addresses"),
        ("max_waiting_requests", "max_waiting_requests = -1", "between 0"),
        ("bridge", 'bridge = "maybe"', "is not true or false"),
        ("api_key", "require_key = true\ninsecure = true", "a key is required"),
        ("tls_key", 'tls_certificate = "/c.pem"', "go together"),
        ("colour", 'colour = "red"', "unknown option"),
        ("server_port", "server_port = 1", "called port here"),
        ("huggingface_cache_dir", 'huggingface_cache_dir = "/"', "called hub_cache here"),
        ("home", 'home = "/"', "--home or MLX_GUI_HOME"),
    ],
)
def test_what_an_option_cannot_be_is_refused_by_name(
    tmp_path: Path, field: str, toml: str, words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as raised:
        load(tmp_path, toml)
    assert raised.value.field == field


def test_a_value_of_another_type_is_refused_by_its_place(tmp_path: Path) -> None:
    """Not by a place where it could have been said as well."""
    for toml, environ, flags, place in (
        ('port = "x"', {}, {}, str(tmp_path / "config.toml")),
        ("", {"MLX_GUI_PORT": "x"}, {}, "MLX_GUI_PORT"),
        ("", {}, {"port": "x"}, "--port"),
    ):
        with pytest.raises(InvalidRequestError) as refused:
            load(tmp_path, toml, environ, **flags)
        assert refused.value.message == f"port in {place}: 'x' is not a whole number"


def test_tls_files_that_are_none_are_refused(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    certificate.write_text("not a certificate")
    key.write_text("not a key")
    for path in (certificate, tmp_path / "missing.pem"):
        with pytest.raises(InvalidRequestError, match="cannot be used"):
            load(tmp_path, tls_certificate=path, tls_key=key)
