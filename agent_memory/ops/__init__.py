"""What surrounds a running server: backends, the demonstration."""
