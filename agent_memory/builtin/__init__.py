"""The small model that ships with the package, so that the server answers before any download.

What it can do and how it was made: docs/builtin-model.md.  Any thread.
"""

from pathlib import Path

PATH = Path(__file__).parent
"""A model directory as mlx_lm loads it."""
