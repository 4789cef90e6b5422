"""Weights cut into blocks: the grid, the packed index, bulk operations on the blocks of a tensor."""
