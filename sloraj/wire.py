"""Frames between the engine process and its parent: a 4-byte length, then msgpack. No pickle."""

from __future__ import annotations

import logging
import socket
import struct
from typing import Any

import msgspec

from sloraj.config import EngineConfig
from sloraj.messages import FromEngine, ToEngine

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 30  # a guard against a torn stream, far above any real frame


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """First frame to the engine process: what to build."""

    config: EngineConfig
    core_factory: str  # "module:function"
    log_level: int = logging.WARNING  # of the project's own loggers


encode = msgspec.msgpack.Encoder().encode
decode_spec = msgspec.msgpack.Decoder(EngineSpec).decode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(list[FromEngine]).decode


def send_frame(connection: socket.socket, message: Any) -> None:
    """Encode and send. Raises OSError when the other end is gone."""
    body = encode(message)
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive_frame(connection: socket.socket) -> bytes:
    """The next frame's body. Raises EOFError at a closed end, TimeoutError as the socket says."""
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    if length > MAX_FRAME_BYTES:
        raise EOFError(f"frame of {length} bytes, allowed: {MAX_FRAME_BYTES}; the stream is torn")
    return _receive_exactly(connection, length)


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = connection.recv(min(num_bytes - len(parts), 1 << 20))
        if not part:
            raise EOFError("the other end closed the connection")
        parts += part
    return bytes(parts)
