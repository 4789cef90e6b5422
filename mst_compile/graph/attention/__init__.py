"""Find attention in a graph and give it a pattern."""
