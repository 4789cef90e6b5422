"""Messages between processes: a length of 8 bytes, little endian, and that many bytes of `torch.save`."""

from __future__ import annotations

import io
import struct
from typing import IO, Any

import torch


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message (lists, dictionaries, strings, numbers, tensors) and flush."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(struct.pack("<Q", buffer.tell()))
    stream.write(buffer.getbuffer())
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message; EOFError when the other side is gone."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError("the other process has ended")
    body = stream.read(struct.unpack("<Q", head)[0])
    # Only tensors and plain values: nothing in a message may run code.
    return torch.load(io.BytesIO(body), weights_only=True)
