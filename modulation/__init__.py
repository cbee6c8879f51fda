"""Safety and utility neurons: find them, weigh them, modulate them. Knows nothing of HTTP or engines."""
