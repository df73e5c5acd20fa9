"""The small model that ships with the package; how it was made is in benchmarks/builtin_model/."""

from pathlib import Path

PATH = Path(__file__).parent
