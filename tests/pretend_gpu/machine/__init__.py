"""From a kernel to machine code of the device, and what that says."""
