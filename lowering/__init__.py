"""How our operators run on each device. Importing it registers the records of the devices that we have kernels for."""

from . import cpu, cuda  # noqa: F401
