"""The parts of the soak: what is asked, how it is judged, who asks, and what the operator does meanwhile."""
