"""Options from flags, environment and file: what they cannot be is refused by name, before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from mlxgui_grpc.config import ServerConfig, load_config
from mlxgui_grpc.errors import InvalidRequestError


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
        ("max_concurrent_requests", "max_concurrent_requests = 0", "between 1 and 256"),
        ("max_concurrent_requests", "max_concurrent_requests = 257", "between 1 and 256"),
        ("max_waiting_requests", "max_waiting_requests = -1", "between 0"),
        ("bridge", 'bridge = "maybe"', "is not true or false"),
        ("api_key", "require_key = true\ninsecure = true", "a key is required"),
        ("tls_key", 'tls_certificate = "/c.pem"', "go together"),
        ("colour", 'colour = "red"', "unknown option"),
    ],
)
def test_what_an_option_cannot_be_is_refused_by_name(
    tmp_path: Path, field: str, toml: str, words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as raised:
        load(tmp_path, toml)
    assert raised.value.field == field


def test_tls_files_that_are_none_are_refused(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    certificate.write_text("not a certificate")
    key.write_text("not a key")
    for path in (certificate, tmp_path / "missing.pem"):
        with pytest.raises(InvalidRequestError, match="cannot be used"):
            load(tmp_path, tls_certificate=path, tls_key=key)
