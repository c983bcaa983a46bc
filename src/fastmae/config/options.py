"""What makes a dataclass a command's options.

A class marked with `@options` is a dataclass whose constructor resolves its fields (see `resolve`): for every caller,
`PretrainConfig(recipe="vit_tiny_cpu", ...)` is the same as the flags `--recipe vit_tiny_cpu ...`.
"""

import ast
import functools
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from fastmae.config.resolve import Layer, label, resolved
from fastmae.errors import InputError

if sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:
    from typing_extensions import dataclass_transform

Kind = TypeVar("Kind", bound=type)
URL = r"\w+:/"
"""How a URL begins, also as a `Path`, which has one slash after the colon."""


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def options(kind: Kind) -> Kind:
    """Make a class a dataclass with keyword arguments, whose constructor resolves and checks its values.

    The constructor raises `InputError` for an unknown option, a value of the wrong type or out of its range, or options
    that contradict each other (`Options.check`).
    """
    built: Any = dataclass(kw_only=True)(kind)
    assign = built.__init__

    @functools.wraps(assign)
    def resolve_and_assign(self: Any, **given: Any) -> None:
        assign(self, **resolved(type(self), given))
        self.check_shared()
        self.check()

    built.__init__ = resolve_and_assign
    return built


class Options:
    """The base of every command's options."""

    inputs: ClassVar[tuple[str, ...]] = ()
    """Options that name files or folders which must be there."""

    @classmethod
    def layers(cls, asked: Mapping[str, Any]) -> list[Layer]:
        """Named sets of values that the options ask for (a recipe), lowest first. They lie above the defaults.

        Args:
            asked: the options given in a file or by the caller.
        """
        return []

    def check_inputs(self) -> None:
        """Check that what `inputs` name is there. The command line does so before it imports what takes seconds.

        Raises:
            InputError: names what is missing.
        """
        for name in self.inputs:
            value = getattr(self, name)
            for path in value if isinstance(value, tuple) else (value,):
                if not re.match(URL, str(path)) and not os.path.lexists(path):
                    what = help_texts(type(self))[name].split(". ")[0].rstrip(".")
                    raise InputError(f"{path}: does not exist; {label(type(self), name).rstrip('.')} is: {what}")

    def check_shared(self) -> None:
        """Check the options that all commands have.

        Raises:
            InputError: a value that can't be meant.
        """

    def check(self) -> None:
        """Check options against each other.

        Raises:
            InputError: two options that contradict each other.
        """


def positionals(kind: type) -> list[str]:
    """The options without a default: the command's positional arguments, in their order."""
    return [option.name for option in fields(kind) if option.default is MISSING]


def help_texts(kind: type) -> dict[str, str]:
    """Each option's help: the docstring below its field. A subclass's text goes over that of its base."""
    texts: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not issubclass(owner, Options) or owner is Options:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                assert isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant)
                texts[statement.target.id] = " ".join(str(following.value.value).split())
    return texts
