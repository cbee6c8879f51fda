"""The HTTP server: requests, levels and answers. Knows neurons only through `modulation`."""
