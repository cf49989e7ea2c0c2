"""The bridge as a program, without a server behind it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests

from rest_bridge import __main__ as program
from rest_bridge.metrics import BridgeMetrics


def test_alone_it_says_where_it_serves_and_that_no_server_answers(tmp_path: Path) -> None:
    """It goes on serving, and its routes say the same."""
    target = f"unix:{tmp_path}/no.sock"
    bridge = subprocess.Popen(
        [sys.executable, "-m", "rest_bridge", "--target", target, "--port", "0"],
        env={key: value for key, value in os.environ.items() if key != "MLX_GUI_API_KEY"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(60, bridge.kill)
    watchdog.start()
    try:
        assert bridge.stdout is not None
        name, url = bridge.stdout.readline().split()
        assert name == "REST"
        assert requests.get(url + "/health", timeout=60).status_code == 503
        forged = requests.post(url + "/v1/chat/completions", headers={"Origin": "http://["}, timeout=60)
        assert forged.status_code == 403
        bridge.terminate()
        _, errors = bridge.communicate()
        assert bridge.returncode == 0
        assert target in errors and len(errors.splitlines()) == 1
    finally:
        watchdog.cancel()
        bridge.kill()
        bridge.communicate()


def test_hosts_and_origins_may_be_written_in_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What names no host is refused at the start, not at the first request."""
    monkeypatch.delenv("MLX_GUI_API_KEY", raising=False)
    options = ["--target", f"unix:{tmp_path}/no.sock", "--cors-origin", "HTTPS://Page.Test/"]
    config = program._read_config([*options, "--allowed-host", "Box.Local.:8000"])
    assert not isinstance(config, str)
    assert config.allowed_hosts == {"box.local"} and config.cors_origins == {"https://page.test"}
    assert program.main([*options, "--allowed-host", "http://box.local"]) == program.EXIT_USAGE
    assert "--allowed-host" in capsys.readouterr().err


def test_an_invented_method_makes_no_new_series() -> None:
    """Whoever sends thousands of them fills no memory."""
    metrics = BridgeMetrics()
    for number in range(10):
        metrics.count(f"M{number}", "other", 405)
    assert b'method="other"' in metrics.exposition() and b"M1" not in metrics.exposition()
