"""Addresses, tokens and channel settings: what both sides have to agree on before the first message."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import grpc

from rewards_bridge.errors import UsageError
from rewards_bridge.protocol import messages

TOKEN_KEY = "authorization"
MIN_TOKEN_LENGTH = 16

MAX_ERROR_CHARACTERS = 32_000
# An error's text travels in the trailing metadata, percent-encoded (up to 3 bytes a byte), which gRPC by default drops
# above 8 to 16 KiB; a traceback is easily longer.
_MAX_METADATA_BYTES = 512 << 10

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", messages.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", messages.MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
]
SERVER_OPTIONS = [*OPTIONS, ("grpc.so_reuseport", 0)]  # a second server on one port is an error, not half the answers
CHANNEL_OPTIONS = [
    *OPTIONS,
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def is_local(address: str) -> bool:
    """Whether only this machine can reach the address; UsageError unless it is unix:/path or HOST:PORT."""
    if address.startswith("unix:"):
        if not address.removeprefix("unix:").startswith("/"):
            raise UsageError(f"address {address!r}: a unix socket is written unix:/path/to/socket")
        return True
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"address {address!r}: wanted unix:/path/to/socket, HOST:PORT or [IPV6]:PORT")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(path: str) -> str:
    """Return the token in this file, at least 16 printable characters."""
    token = read_file(path).decode(errors="replace").strip()
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"token file {path}: wanted one word of at least {MIN_TOKEN_LENGTH} printable ASCII characters; "
            f"python -c 'import secrets; print(secrets.token_hex())' > {path} makes one"
        )
    return token


def read_file(path: str) -> bytes:
    """Return the bytes of a token, key or certificate file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def call_metadata(token: str | None) -> tuple[tuple[str, str | bytes], ...]:
    """Return what a client sends with every call."""
    return ((TOKEN_KEY, f"Bearer {token}"),) if token else ()


def channel_credentials(tls_ca: str) -> grpc.ChannelCredentials:
    """Credentials that trust the certificates in this PEM file."""
    return grpc.ssl_channel_credentials(root_certificates=read_file(tls_ca))


def shorten(text: str, limit: int = MAX_ERROR_CHARACTERS) -> str:
    """Return the text, without its middle if it is longer than limit: a traceback's first and last lines matter."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
