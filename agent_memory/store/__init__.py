"""KV on disk: block files, their index, their owners, the threads that read and write.  No MLX."""
