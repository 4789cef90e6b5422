"""What is decided, as pure functions of step, mask and score."""
