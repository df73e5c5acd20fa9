"""KV on disk: block files, their index, who owns them, and the threads that read and write.  No MLX."""
