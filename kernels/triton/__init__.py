"""Triton kernels, as templates that Inductor completes: it adds epilogues, picks tiles and generates the launch."""
