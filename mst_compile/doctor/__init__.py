"""``python -m mst_compile doctor``: what this machine has, whether the kernels are right on it, and how fast."""
