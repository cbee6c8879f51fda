"""One module per group of endpoints. Routes see the Engine protocol, never an engine."""
