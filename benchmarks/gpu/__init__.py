"""The GPU benchmark: ``python -m benchmarks.gpu``; see :mod:`benchmarks.gpu.__main__`."""

from . import checkout

checkout.make_importable()
