"""A sparse model for others: a plain copy, block-sparse tensors, a safetensors file that holds the masks; and for
inference, with its active blocks alone.

Nothing that :func:`plain`, :func:`to_bsr` and :func:`save` make needs mst_compile where it is read; :func:`load` makes
a model sparse again.
"""

from .copies import plain, to_bsr
from .files import load, save
from .serving import PackedLinear, PackedWeight, packed

__all__ = ["PackedLinear", "PackedWeight", "load", "packed", "plain", "save", "to_bsr"]
