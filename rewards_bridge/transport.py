"""Addresses, tokens and channel settings, on which both sides must agree before the first message."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import grpc

from rewards_bridge.errors import UsageError
from rewards_bridge.protocol import messages

TOKEN_KEY = "authorization"
MIN_TOKEN_LENGTH = 16

MAX_ERROR_CHARACTERS = 32_000
# gRPC sends an error's text as trailing metadata, percent-encoded (up to 3 bytes per byte), and by default drops it
# above 8 to 16 KiB; tracebacks are often longer.
_MAX_METADATA_BYTES = 512 << 10

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", messages.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", messages.MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
]
SERVER_OPTIONS = [*OPTIONS, ("grpc.so_reuseport", 0)]  # a second server on the same port is an error
CHANNEL_OPTIONS = [
    *OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def is_local(address: str) -> bool:
    """Return whether only this machine can reach the address; UsageError unless it is unix:/path or HOST:PORT."""
    if address.startswith("unix:"):
        if not address.removeprefix("unix:").startswith("/"):
            raise UsageError(f"address {address!r}: expected an absolute path, as in unix:/path/to/socket")
        return True
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"address {address!r}: expected unix:/path/to/socket, HOST:PORT or [IPV6]:PORT")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(path: str) -> str:
    """Return the token in this file: one word of at least 16 printable characters."""
    token = read_file(path).decode(errors="replace").strip()
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"token file {path}: expected one word of at least {MIN_TOKEN_LENGTH} printable ASCII characters; "
            f"create one with: python -c 'import secrets; print(secrets.token_hex())' > {path}"
        )
    return token


def read_file(path: str) -> bytes:
    """Return the bytes of a token, key or certificate file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def call_metadata(token: str | None) -> tuple[tuple[str, str | bytes], ...]:
    """Return the metadata that a client sends with every call."""
    return ((TOKEN_KEY, f"Bearer {token}"),) if token else ()


def channel_credentials(tls_ca: str) -> grpc.ChannelCredentials:
    """Return credentials that trust the certificates in this PEM file."""
    return grpc.ssl_channel_credentials(root_certificates=read_file(tls_ca))


def shorten(text: str, limit: int = MAX_ERROR_CHARACTERS) -> str:
    """Return the text, without its middle if it exceeds limit: the ends of a traceback say the most."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
