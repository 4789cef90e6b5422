"""Doors for other people's trainers, to be imported by hand: nothing here is imported with ``mst_compile``."""
