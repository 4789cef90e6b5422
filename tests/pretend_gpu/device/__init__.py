"""The device that does not exist: what torch, Inductor and triton are told about it."""
