"""Starts the command line: `mlxgui`, or `python -m mlxgui_grpc`."""

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run one command and exit with its code.

    A failure is one sentence on stderr; with MLX_GUI_DEBUG it is a traceback.
    """
    # gRPC's C core writes to stderr by itself otherwise; whatever matters reaches the caller as an error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from mlxgui_grpc.cli.app import app

    try:
        app(prog_name="mlxgui")
    except Exception as error:
        if os.environ.get("MLX_GUI_DEBUG"):
            raise
        from mlxgui_grpc.cli.failures import explain

        sentence, exit_code = explain(error)
        print(f"mlxgui: {sentence}", file=sys.stderr)
        sys.exit(exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
