"""Teachers: a name -> a frozen network that gives patch features on the student's grid."""

from fastmae.teachers.factory import load_teacher
from fastmae.teachers.teacher import Teacher

__all__ = ["Teacher", "load_teacher"]
