"""The engine thread: which sequence computes when, and what is remembered of it."""
