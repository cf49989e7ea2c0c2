"""Who listens on a port of this machine, for messages about ports in use."""

import psutil


def port_holder(port: int) -> str:
    """`process N (name)`; empty where the system does not tell."""
    try:
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if (
                connection.status == psutil.CONN_LISTEN
                and address
                and address.port == port
                and connection.pid
            ):
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):
        pass
    return ""
