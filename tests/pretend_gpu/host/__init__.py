"""Programs run whole on a device that does nothing: what the host does between launches."""
