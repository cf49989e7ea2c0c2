"""Our own server, started as a user starts it, in a state folder of its own."""

import subprocess
import sys

from bench.process_tree import Roles
from bench.systems.base import (
    CannotRun,
    Running,
    RunningServer,
    Site,
    end_process,
    free_port,
    spawn,
    wait_for_http,
)

ROLES = Roles("control", (("mlxgui_grpc.engine.worker", "worker"), ("rest_bridge", "bridge")))
INSTALL_LIMIT_SECONDS = 120.0


class Ours:
    """Starts `serve`, installs the model's folder in place, and serves both gRPC and SSE from it."""

    def start(self, site: Site) -> Running:
        rest_port, grpc_port = free_port(), free_port()
        # No BLAS is preloaded here: the server does that for its workers, and only for them.
        # The user's own settings must not decide what is measured.
        environment = {
            name: value for name, value in site.environment.items() if not name.startswith("MLX_GUI_")
        }
        environment |= {
            "MLX_GUI_HOST": "127.0.0.1",
            "MLX_GUI_HOME": str(site.folder / "home"),
            "MLX_GUI_PORT": str(rest_port),
            "MLX_GUI_GRPC_PORT": str(grpc_port),
            "HF_HOME": str(site.folder / "hub"),
        }
        log = site.folder / "ours.log"
        process = spawn([sys.executable, "-m", "mlxgui_grpc", "serve"], environment, log)
        address = f"http://127.0.0.1:{rest_port}"
        wait_for_http(f"{address}/health", process, log)
        install = [sys.executable, "-m", "mlxgui_grpc", "pull", str(site.model_folder), "--name", site.model]
        try:
            answer = subprocess.run(
                install, env=environment, capture_output=True, text=True, timeout=INSTALL_LIMIT_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            end_process(process)
            raise CannotRun(f"installing the model took over {INSTALL_LIMIT_SECONDS:.0f} s") from error
        if answer.returncode != 0:
            end_process(process)
            said = (answer.stderr or answer.stdout).strip().splitlines()
            raise CannotRun(f"the model could not be installed: {said[-1] if said else 'no reason given'}")
        endpoints = {"sse": f"{address}/v1", "grpc": f"127.0.0.1:{grpc_port}", "rest": address}
        return RunningServer(process, ROLES, endpoints, site.model)
