"""Running generated text on the CPU, in a process of its own, where Triton's interpreter is repaired."""
