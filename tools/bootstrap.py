"""Makes the environment that the Makefile runs things in, from Python alone.

`python3 tools/bootstrap.py run` creates .venv and installs requirements.lock and this project into it;
`dev` installs requirements-dev.lock (the same and the tools for tests and checks) and buf (node_modules).
Done again with nothing changed it costs a few milliseconds. Standard library only; written so that an
older Python reaches the sentence that says which one is needed.
"""

import ast
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
LOCKS = {"run": "requirements.lock", "dev": "requirements-dev.lock"}
NPM_LOCK = "package-lock.json"
OLDEST = (3, 11)
NEWER_NAMES = ("python3.14", "python3.13", "python3.12", "python3.11")


def main() -> None:
    profile = sys.argv[1] if len(sys.argv) == 2 else ""
    if profile not in LOCKS:
        fail("usage: python3 tools/bootstrap.py run|dev")
    os.chdir(ROOT)
    use_new_enough_python()
    if not is_installed(profile):
        with one_at_a_time():
            if not is_installed(profile):
                install(profile)
    if profile == "dev":
        install_buf()


def use_new_enough_python() -> None:
    """Goes on in a newer interpreter of the PATH when this one is too old (macOS ships 3.9 as python3)."""
    if sys.version_info >= OLDEST:
        return
    for name in NEWER_NAMES:
        path = shutil.which(name)
        if path:
            os.execv(path, [path, *sys.argv])
    have = "%d.%d" % sys.version_info[:2]
    fail(
        "Python 3.11 or newer is needed, %s is %s: install one and name it, make PYTHON=python3.12 ..."
        % (sys.executable, have)
    )


def is_installed(profile: str) -> bool:
    """Whether .venv holds this profile, or `dev`, which has all of `run`, as the files now say."""
    if not os.path.exists(VENV_PYTHON):
        return False
    wanted = ("run", "dev") if profile == "run" else ("dev",)
    try:
        with open(stamp_path(), encoding="utf-8") as file:
            return file.read() in [fingerprint(name) for name in wanted]
    except OSError:
        return False


def install(profile: str) -> None:
    started = time.monotonic()
    lock = LOCKS[profile]
    say("installing %s into .venv (the first time this downloads about 200 MB)" % lock)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(stamp_path())
    if not (os.path.exists(os.path.join(VENV, "bin", "uv")) and is_of_this_place()):
        create_venv()
        install_uv(lock)
    # The tests start processes by the hundred, each of which would compile 650 modules for itself where Python
    # may not write (PYTHONDONTWRITEBYTECODE); a user's one server compiles what it needs the first time.
    compiling = ["--compile-bytecode"] if profile == "dev" else []
    uv("pip", "sync", "--require-hashes", *compiling, lock)
    uv("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ".")
    with open(stamp_path(), "w", encoding="utf-8") as file:
        file.write(fingerprint(profile))
    say("installed in %.0f s" % (time.monotonic() - started))


def create_venv() -> None:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        fail("%s has no venv module: install it (Debian: apt-get install python3-venv)" % sys.executable)
    run("creating .venv", [sys.executable, "-m", "venv", "--clear", VENV])
    with open(origin_path(), "w", encoding="utf-8") as file:
        file.write(ROOT)


def is_of_this_place() -> bool:
    """Whether .venv works and was made here: its scripts name their interpreter, so a moved or copied one fails."""
    try:
        with open(origin_path(), encoding="utf-8") as file:
            return os.path.exists(VENV_PYTHON) and file.read() == ROOT
    except OSError:
        return False


def install_uv(lock: str) -> None:
    """Installs uv by pip, at the version and hashes of the lock."""
    pip = [VENV_PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as only_uv:
        only_uv.write(lock_entry(lock, "uv"))
        only_uv.flush()
        run(
            "installing uv",
            [*pip, "--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", only_uv.name],
        )


def lock_entry(lock: str, package: str) -> str:
    """The lines of one package: its pin and, indented under it, its hashes."""
    entry: "list[str]" = []
    with open(lock, encoding="utf-8") as file:
        for line in file:
            if line.startswith(package + "==") or (entry and line.startswith(" ")):
                entry.append(line)
            elif entry:
                break
    if not entry:
        fail("%s does not pin %s: make lock" % (lock, package))
    return "".join(entry)


def install_buf() -> None:
    """Installs buf by npm; without npm the tests that need it say so, and CI fails."""
    with open(NPM_LOCK, "rb") as file:
        wanted = hashlib.sha256(file.read()).hexdigest()
    stamp = os.path.join("node_modules", ".stamp")
    with contextlib.suppress(OSError), open(stamp, encoding="utf-8") as file:
        if file.read() == wanted:
            return
    npm = shutil.which("npm")
    if npm is None:
        sentence = "npm not found: buf (lint, breaking changes, reflection client) comes from it"
        if os.environ.get("CI"):
            fail(sentence)
        say(sentence)
        return
    # The package's install script only saves a few milliseconds a start; nothing foreign needs to run here.
    run("installing buf", [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"])
    with open(stamp, "w", encoding="utf-8") as file:
        file.write(wanted)


def uv(*arguments: str) -> None:
    environment = dict(os.environ, VIRTUAL_ENV=VENV)
    # A mirror told to pip is meant for uv too, which reads neither pip's variables nor its files.
    if not {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & set(os.environ):
        index = os.environ.get("PIP_INDEX_URL") or index_of_pip_files()
        if index:
            environment["UV_DEFAULT_INDEX"] = index
    run("uv " + " ".join(arguments[:2]), [os.path.join(VENV, "bin", "uv"), *arguments], environment)


def index_of_pip_files() -> str:
    """The index that pip's configuration files name; empty when none does."""
    # `config get` would read one of the files, `list` merges all as `install` does: NAME='VALUE', a line each.
    pip = [VENV_PYTHON, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    answer = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
    values = dict(line.split("=", 1) for line in answer.stdout.splitlines() if "=" in line)
    value = values.get("install.index-url") or values.get("global.index-url")
    return ast.literal_eval(value) if value else ""


def run(what: str, command: "list[str]", environment: "dict[str, str] | None" = None) -> None:
    code = subprocess.call(command, env=environment, stdin=subprocess.DEVNULL)
    if code:
        fail("%s failed (exit code %d); the reason is above, running make again continues" % (what, code))


def fingerprint(profile: str) -> str:
    """Changes with everything that an installed environment depends on."""
    digest = hashlib.sha256((profile + ROOT).encode())
    for name in (LOCKS[profile], "pyproject.toml"):
        with open(name, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


@contextlib.contextmanager
def one_at_a_time() -> "Iterator[None]":
    """Lets a second make wait for the one that installs."""
    with open(".venv.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stamp_path() -> str:
    return os.path.join(VENV, ".stamp")


def origin_path() -> str:
    return os.path.join(VENV, ".origin")


def say(sentence: str) -> None:
    print("bootstrap: " + sentence, file=sys.stderr, flush=True)


def fail(sentence: str) -> None:
    say(sentence)
    sys.exit(1)


if __name__ == "__main__":
    main()
