"""Agent Memory: a server that keeps what your local agents have in mind."""

__version__ = "0.1.0"
