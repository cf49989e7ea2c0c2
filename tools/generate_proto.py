"""Generate the Python of `proto/mlxgui/v1` beside its .proto files, or check that it is up to date.

Messages become `*_pb2.py` with stubs `*_pb2.pyi`, services `*_pb2_grpc.py` with stubs `*_pb2_grpc.pyi`. The
stubs are mypy-protobuf's: those of protoc itself do not pass mypy's strict mode and leave services untyped.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
PACKAGE = Path("mlxgui/v1")
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def main() -> int:
    """Run the command line; the exit status is 1 when `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a file would change")
    check = parser.parse_args().check

    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        wanted = contents(Path(folder))
    present = contents(PROTO)
    changed = sorted(path for path in wanted.keys() | present.keys() if wanted.get(path) != present.get(path))

    if check:
        for path in changed:
            print(f"proto/{path} is not what its .proto file says; run `make proto`.", file=sys.stderr)
        return 1 if changed else 0
    for path in changed:
        if path in wanted:
            (PROTO / path).write_bytes(wanted[path])
        else:
            (PROTO / path).unlink()
        print(f"{'wrote' if path in wanted else 'removed'} proto/{path}")
    return 0


def generate(folder: Path) -> None:
    """Generate everything into `folder`, laid out as below `proto/`."""
    protos = sorted((PROTO / PACKAGE).glob("*.proto"))
    protoc(
        protos,
        f"--python_out={folder}",
        plugin_argument("protoc-gen-mypy"),
        f"--mypy_out=quiet:{folder}",
    )
    # Concrete stubs: a servicer need not write the RPCs that it leaves to a later release.
    protoc(
        [path for path in protos if "\nservice " in path.read_text("utf-8")],
        f"--grpc_python_out={folder}",
        plugin_argument("protoc-gen-mypy_grpc"),
        f"--mypy_grpc_out=quiet,generate_concrete_servicer_stubs:{folder}",
    )


def protoc(protos: list[Path], *arguments: str) -> None:
    """Run the protoc of grpcio-tools on `protos`; ends the program when it fails: protoc has said why."""
    names = [path.relative_to(PROTO).as_posix() for path in protos]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTO}", *arguments, *names]
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        sys.exit(status)


def plugin_argument(name: str) -> str:
    """Name the plugin of this very environment, which need not be on PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        sys.exit(f"{name} is not installed beside {sys.executable}; run `make env-dev`.")
    return f"--plugin={name}={path}"


def contents(folder: Path) -> dict[str, bytes]:
    """Read the generated files below `folder`, by their path in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for pattern in GENERATED
        for path in (folder / PACKAGE).glob(pattern)
    }


if __name__ == "__main__":
    sys.exit(main())
