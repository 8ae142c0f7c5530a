"""remixdit."""
