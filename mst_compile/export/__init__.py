"""A sparse model for others: a plain copy, block-sparse tensors, and a safetensors file that holds the masks.

Nothing that these functions make needs mst_compile where it is read; only :func:`load` makes a model sparse again.
"""

from .copies import plain, to_bsr
from .files import load, save

__all__ = ["load", "plain", "save", "to_bsr"]
