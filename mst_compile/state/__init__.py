"""What changes while a sparse model trains."""
