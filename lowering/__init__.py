"""Inductor lowerings of the ``mst::`` operators."""
