"""From a function to the text that Inductor writes for it, and the kernels in that text."""
