"""Sparse weights over several processes."""
