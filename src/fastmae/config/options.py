"""What makes a dataclass a command's options.

A class marked with `@options` is a dataclass whose constructor resolves its fields (see `resolve`): for every caller,
`PretrainConfig(recipe="vit_tiny_cpu", ...)` is the same as the flags `--recipe vit_tiny_cpu ...`.
"""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from fastmae.config.resolve import Layer, resolved

if sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:
    from typing_extensions import dataclass_transform

Kind = TypeVar("Kind", bound=type)


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
        self.check()

    built.__init__ = resolve_and_assign
    return built


class Options:
    """The base of every command's options."""

    @classmethod
    def layers(cls, asked: Mapping[str, Any]) -> list[Layer]:
        """Named sets of values that the options ask for (a recipe), lowest first. They lie above the defaults.

        Args:
            asked: the options given in a file or by the caller.
        """
        return []

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
