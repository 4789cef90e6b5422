"""Tests of the library `pretend_gpu`: one file a room, and one of all together."""
