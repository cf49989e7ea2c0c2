"""Where the server's log goes: a file that rotates, and warnings to standard error."""

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOG_FILE = "mlxgui.log"
MAX_LOG_BYTES = 10 * 1024 * 1024
KEPT_LOGS = 5


def configure_logging(directory: Path, level: str) -> Path:
    """Log to a file in `directory` at `level`, warnings to standard error too; returns the file."""
    file = directory / LOG_FILE
    rotating = RotatingFileHandler(file, maxBytes=MAX_LOG_BYTES, backupCount=KEPT_LOGS, encoding="utf-8")
    rotating.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[rotating, console], force=True)
    set_log_level(level)
    return file


def set_log_level(level: str) -> None:
    """Least level from now on, in the log and of what other processes say, which comes through this one's log.

    DEBUG is for what we say: gRPC's own would drown it.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger().setLevel(max(number, logging.INFO))
    logging.getLogger("mlxgui_grpc").setLevel(number)
