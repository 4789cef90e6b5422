"""Which of a model's frames Dynamo has looked at and left to Python."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from types import CodeType

import torch
from torch import nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo import convert_frame

_PYTORCH = os.path.join(os.path.dirname(torch.__file__), "")


def skipped(modules: Iterable[nn.Module]) -> str | None:
    """The ``forward`` of ``modules``, the innermost first, that Dynamo has tried since its last reset and made no graph
    of, in words, as ``GPT.forward (model.py:12)``; None if there is none.

    Dynamo runs such a frame as it is, and keeps no word about it that could be asked for. Modules of one class share
    their frame, and its fate. Of PyTorch's own modules Dynamo makes no graph but within that of a caller, so that the
    frame that it could not make one of is the first outside of PyTorch; or the last within, as that of an LSTM.
    """
    found = [
        (name, code)
        for name, code in _frames(modules)
        if code in convert_frame.input_codes and not _debug_get_cache_entry_list(code)
    ]
    if not found:
        return None
    name, code = next((f for f in found if not f[1].co_filename.startswith(_PYTORCH)), found[-1])
    return f"{name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"


def _frames(modules: Iterable[nn.Module]) -> Iterator[tuple[str, CodeType]]:
    for module in modules:
        forward = module.forward  # one of its own perhaps, as hooks of other libraries set it
        code = getattr(getattr(forward, "__func__", forward), "__code__", None)
        if code is not None:
            yield f"{type(module).__name__}.forward", code
