"""Kernels, by device."""
