"""The type of an option that names a teacher, and of a teacher that a caller from Python gives as an object.

A teacher may be code of the user's own: `python/MODULE:FUNCTION`. Only the user names code, on the command line or in
Python. A file never does, whether it is a YAML file of options, a study or a store.
"""

from typing import Annotated, Any

from fastmae.errors import InputError

PYTHON = "python/"
"""Prefix of the name of a teacher that is code."""
TEACHER = "teacher"
"""Marks, in an annotation, an option that names a teacher."""
TeacherName = Annotated[str, TEACHER]
OptionalTeacherName = Annotated[str | None, TEACHER]


class GivenTeacher(str):
    """The readable name of a teacher that a caller from Python gives as an object; it carries the object.

    Attributes:
        given: a torch module, or what returns one: a function or a class.
    """

    given: Any

    @classmethod
    def of(cls, given: Any) -> "GivenTeacher":
        """`python/tissue:Tissue`, for the class Tissue of the module tissue, for a function, or for an instance."""
        kind = given if hasattr(given, "__qualname__") else type(given)
        name = cls(f"{PYTHON}{kind.__module__}:{kind.__qualname__}")
        name.given = given
        return name


def names_code(teacher: object) -> bool:
    """Whether a teacher's name leads to code that would run."""
    return isinstance(teacher, str) and teacher.startswith(PYTHON) and ":" in teacher


def as_name(value: Any) -> Any:
    """The name of a teacher that is given as an object; any other value as it is."""
    return value if isinstance(value, str) or not callable(value) else GivenTeacher.of(value)


def refuse_code(value: object, where: str, flag: str) -> None:
    """Refuse the name of code in a file.

    Args:
        value: what the file gives.
        where: the file, and the place in it.
        flag: how the user can name the same.

    Raises:
        InputError: it names code.
    """
    parts = value.split(",") if isinstance(value, str) else ()  # a study takes several
    if any(map(names_code, parts)):
        raise InputError(f"{where}: {value} is code, which no file may run; name it on the command line: {flag}")
