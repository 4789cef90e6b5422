"""Small random models of every type that transformers has; see :mod:`benchmarks.model_coverage`."""
