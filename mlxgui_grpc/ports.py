"""Who listens on a port of this machine, and whether a server could."""

import errno
import socket

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


def why_not_free(host: str, port: int) -> str:
    """Why a server could not listen there now, for example `it is used by process 7 (nginx)`; empty when it could."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a port whose last connections are only lingering counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"it is used by {port_holder(port) or 'another program'}"
        return error.strerror or str(error)
    return ""


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens there."""
    return not why_not_free(host, port).startswith("it is used")
