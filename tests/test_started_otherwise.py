"""Interpreters that are started in other ways: what a user sets for a process changes nothing."""
