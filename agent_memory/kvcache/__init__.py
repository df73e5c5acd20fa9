"""KV in use: the block pool, runs, tails and attention over them.  MLX lives here and in model/."""
