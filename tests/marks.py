"""Which cases of a test are fast ones."""

import pytest


def first_is_fast(first: object, *others: object) -> list[object]:
    """What to parametrize with, so that the others run only where every test does."""
    slow = [other if isinstance(other, tuple) else (other,) for other in others]
    return [first, *(pytest.param(*values, marks=pytest.mark.slow) for values in slow)]
