"""A check that several benchmarks share, for which the teacher must be there."""

from collections.abc import Sequence

from fastmae.teachers import Teacher
from fastmae.tokens.codec import code_layout


def check_codecs_fit(codecs: Sequence[str], teacher: Teacher) -> None:
    """Check that every codec can hold this teacher's tokens.

    Raises:
        InputError: one that can't.
    """
    for name in codecs:
        code_layout(name, teacher.token_dim)
