"""The address that a server listens on: bound before anything is loaded, released at the end."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import grpc

from rewards_bridge import transport
from rewards_bridge.errors import UsageError


def bind(server: grpc.Server, address: str, tls_cert: str | None, tls_key: str | None) -> str:
    """Bind the address and return it in full; call before loading the scorer, so that a used address fails early.

    The files are PEM; without them the connection is not encrypted. UsageError if the address cannot be bound.
    """
    if address.startswith("unix:") and _answers(address.removeprefix("unix:")):
        raise UsageError(f"cannot listen on {address}: another server already uses it")
    previous = os.umask(0o077)  # only the owner may use a unix socket
    try:
        if tls_cert and tls_key:
            pair = (transport.read_file(tls_key), transport.read_file(tls_cert))
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise UsageError(f"cannot listen on {address}: {error}") from error
    finally:
        os.umask(previous)
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _answers(path: str) -> bool:
    """Return whether a server listens on this unix socket; gRPC itself would silently take it over."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def remove_socket(address: str) -> None:
    """Remove the file of a unix socket; do nothing for other addresses."""
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)
