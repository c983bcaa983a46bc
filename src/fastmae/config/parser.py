"""argparse, as the command line uses it: its errors are `InputError`s in words of our own."""

import argparse
import re
from typing import Any, NoReturn

from fastmae.errors import InputError

ARGPARSE_ERRORS = {
    r"argument (--\S+): expected one argument": r"\1: give a value",
    r"argument (--\S+): expected (\d+) arguments": r"\1: give \2 values",
    r"argument (--[^\s/]+)/--no-\S+: ignored explicit argument .*": r"\1: takes no value",
}
"""What argparse says -> what is said."""


class Parser(argparse.ArgumentParser):
    """Raises where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        """Raise the error.

        Raises:
            InputError: always.
        """
        for pattern, what in ARGPARSE_ERRORS.items():
            message = re.sub(pattern, what, message)
        raise InputError(f"{message}; see --help")


class Added(argparse.Action):
    """An option of values with commas between them: given again, its values are added."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """See `argparse.Action`."""
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")
