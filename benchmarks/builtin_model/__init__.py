"""How the built-in model is made: `python -m benchmarks.builtin_model.make OUT`."""
