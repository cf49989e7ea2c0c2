"""What decides whether .venv is made anew, and where its packages come from."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/bootstrap.py, in another folder and with this interpreter as its .venv's."""
    spec = importlib.util.spec_from_file_location("bootstrap", CHECKOUT / "tools" / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", str(tmp_path))
    monkeypatch.setattr(module, "VENV", str(tmp_path))
    monkeypatch.setattr(module, "VENV_PYTHON", sys.executable)
    monkeypatch.chdir(CHECKOUT)
    return module


def test_a_moved_checkout_makes_its_environment_anew(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts of the old one name an interpreter elsewhere."""
    assert not bootstrap.is_of_this_place()
    (tmp_path / ".stamp").write_text(bootstrap.fingerprint("run"))
    (tmp_path / ".origin").write_text(str(tmp_path))
    assert bootstrap.is_installed("run") and bootstrap.is_of_this_place()

    monkeypatch.setattr(bootstrap, "ROOT", str(tmp_path / "moved"))

    assert not bootstrap.is_installed("run") and not bootstrap.is_of_this_place()


def test_the_index_of_pip_s_files_is_found(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv reads none of them."""
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nindex-url = http://mirror.invalid/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    assert bootstrap.index_of_pip_files() == "http://mirror.invalid/simple"
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert bootstrap.index_of_pip_files() == ""
