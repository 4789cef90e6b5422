"""Public door to counting FLOPs; see :mod:`mst_compile.cost.flops`."""

from .cost.flops import CompiledFlopCounter, Meter, attention_saving, dense_linear_training, linear_training

__all__ = ["CompiledFlopCounter", "Meter", "attention_saving", "dense_linear_training", "linear_training"]
