"""Text of the user's: read, split, and cut into batches of bytes."""

from __future__ import annotations

import codecs
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mst_compile.errors import DataError

PIECE = 16_384  # characters; train and validation text are interleaved in pieces of about this length
_CHUNK = 1 << 20
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
HELD_OUT = 0.02
LEAST = 20  # windows that a text must have at the least: fewer leave nothing to hold out


def load(files: Sequence[Path], context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Training and validation text of all files together, uint8.

    Raises:
        DataError: a file is missing, cannot be read or is no text; or there is too little text for windows of
            ``context`` bytes.
    """
    text = "\n\n".join(map(_read, files))
    size, least = len(text.strip().encode()), LEAST * context
    names = ", ".join(map(str, files))
    if not size:
        raise DataError(f"{names}: there is no text in it")
    if size < least:
        raise DataError(
            f"{names}: {size} bytes of text are too few to train on and to hold some out for validation; at least "
            f"{least} are needed, and some hundred thousand give a model that writes words"
        )
    parts = split_text(text, seed)
    if len(text) < 10 * PIECE or min(map(len, parts)) <= 2 * context:  # few pieces, or one that is too short
        parts = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    train, validation = (torch.frombuffer(bytearray(part.encode()), dtype=torch.uint8) for part in parts)
    return train, validation


def _read(file: Path) -> str:
    """A text file, in UTF-8 or Latin-1, or in UTF-16 with its mark."""
    data = bytearray()
    try:
        with open(file, "rb") as source:
            while chunk := source.read(_CHUNK):
                data += chunk
                if b"\0" in chunk and not data.startswith(_UTF_16):  # not to its end: devices have none
                    raise DataError(f"{file} is no text file: it holds bytes of 0; pass plain text")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}; pass the path of a text file") from error
    if data.startswith(_UTF_16):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} begins like a text in UTF-16, and is none ({error}); save it in UTF-8") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def tidy(text: str) -> str:
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cuts = (text.find(mark, start + PIECE, start + 2 * PIECE) for mark in ("\n\n", "\n", ". "))
        end = next((c + 1 for c in cuts if c >= 0), min(start + PIECE, len(text)))
        yield text[start:end].strip()
        start = end


def split_text(text: str, seed: int) -> tuple[str, str]:
    """Train and validation text, from shuffled pieces, so that both hold every part of the text."""
    pieces = [piece for piece in _pieces(tidy(text)) if piece]
    if len(pieces) < 2:
        half = len(text) * 9 // 10
        return text[:half], text[half:]
    random.Random(seed).shuffle(pieces)
    held_out = max(1, round(len(pieces) * HELD_OUT))
    return "\n\n".join(pieces[held_out:]), "\n\n".join(pieces[:held_out])


def training_batch(text: Tensor, batch: int, context: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Random windows and what follows each of their bytes, int64 ``[batch, context]``: a pure function of seed and
    step, so every run sees the same data."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, len(text) - context, (batch,), generator=generator)
    rows = torch.stack([text[s : s + context + 1] for s in starts.tolist()]).long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def validation_batches(text: Tensor, batch: int, context: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """At most ``count`` batches of windows spread evenly over a text, in the form of :func:`training_batch`."""
    windows = len(text) // (context + 1)
    rows = text[: windows * (context + 1)].view(windows, -1).long()
    wanted = min(windows, batch * count)
    chosen = rows[torch.arange(wanted) * windows // wanted]
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in chosen.split(batch)]
