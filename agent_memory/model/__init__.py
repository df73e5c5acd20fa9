"""The model itself.  The only package that imports mlx_lm."""
