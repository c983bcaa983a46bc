"""The command line: parse the arguments, run the command, turn its outcome into an exit code.

argparse gives only what was typed, so that one resolver (`config.resolve`) serves flags, files and Python alike.
"""

import argparse
import contextlib
import difflib
import errno
import inspect
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, TextIO, get_args, get_origin, get_type_hints

import yaml

from fastmae.config.commands import COMMANDS
from fastmae.config.common import Common
from fastmae.config.options import help_texts, positionals
from fastmae.config.resolve import CALLER_ONLY, converted, flag, label, placeholder, range_of
from fastmae.errors import FailedCheckError, InputError, InterruptedRunError, OneProcessError
from fastmae.runtime import console, startup
from fastmae.runtime.processes import this_process

OK, CLOSED_PIPE = 0, 141
EXIT_CODES: dict[type[BaseException], int] = {
    FailedCheckError: 1,
    InputError: 2,
    OSError: 2,
    InterruptedRunError: 130,
    KeyboardInterrupt: 130,
}


def main(args: Sequence[str] | None = None) -> None:
    """The `fastmae` command, once the process is prepared; exits with the contract's code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        code = run(sys.argv[1:] if args is None else list(args))
    except KeyboardInterrupt:  # a second Ctrl-C, while the first one was being reported
        code = EXIT_CODES[KeyboardInterrupt]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done: Ctrl-C now would only change the exit code
    for stream in (sys.stdout, sys.stderr):
        _close(stream)
    sys.exit(code)


def run(args: list[str]) -> int:
    """Run one command.

    Returns:
        0 done, 1 failed check, 2 bad input or usage (one line on standard error for both), 130 interrupted.
    """
    if not args or args[0] in {"-h", "--help"}:
        print(overview())
        return OK
    if args[0] == "--version":
        print(import_module("fastmae").__version__)
        return OK
    command, rest = _command_name(args)
    if _two_word_names(args[0]) and args[1:] in (["-h"], ["--help"]):
        print(overview(_two_word_names(args[0])))
        return OK
    console.show()
    try:
        try:
            _do(command, rest)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `fastmae ... | head`: the reader has what it wanted
        return CLOSED_PIPE
    except tuple(EXIT_CODES) as error:
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        message = _os_message(error) if isinstance(error, OSError) else str(error) or "interrupted"
        # All processes of a run meet most errors; the first one on a machine reports them.
        local_rank = int(os.environ.get("LOCAL_RANK", this_process().local_rank))
        if isinstance(error, OneProcessError) or local_rank == 0:
            with contextlib.suppress(OSError):  # nobody can be told
                print(f"fastmae {command}: {' '.join(message.split())}", file=sys.stderr, flush=True)
        return code
    return OK


def overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    """The text of `fastmae --help`, or of `fastmae bench --help`."""
    lines = [f"  {name:15} {(COMMANDS[name].kind.__doc__ or '').splitlines()[0]}" for name in names]
    return "\n".join(["usage: fastmae COMMAND ...; fastmae COMMAND --help for its options", "", *lines])


def parse(command: str, args: Sequence[str]) -> Any:
    """The options of a command.

    Raises:
        InputError: an unknown command or option, or a bad value.
        SystemExit: with code 0, after --help.
    """
    if command not in COMMANDS:
        known = _two_word_names(command.partition(" ")[0]) or list(COMMANDS)
        near = difflib.get_close_matches(command, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"no such command{hint}; give one of {', '.join(known)}")
    kind = COMMANDS[command].kind
    typed, words = _typed(command, args)
    given = {**_assigned(kind, words), **typed}
    missing = [name for name in positionals(kind) if name not in given]
    if missing and not {"config", "print_config"} & typed.keys():
        raise InputError(f"give {' and '.join(label(kind, name) for name in missing)}: {_usage(command)}")
    return kind(**given)


def as_yaml(config: Common) -> str:
    """Every option that a --config file can set, as YAML."""
    hints = get_type_hints(type(config))
    left_out = {
        name: converted(hints[name], placeholder(hints[name], name), name) for name in positionals(type(config))
    }
    values = {
        name: _plain(value)
        for name, value in vars(config).items()
        if name not in CALLER_ONLY and left_out.get(name) != value
    }
    return yaml.safe_dump(values, sort_keys=False)


def _command_name(args: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and what follows it."""
    words = 2 if _two_word_names(args[0]) else 1
    return " ".join(args[:words]), args[words:]


def _two_word_names(first_word: str) -> list[str]:
    return [name for name in COMMANDS if name.startswith(f"{first_word} ")]


def _do(command: str, args: list[str]) -> None:
    config = parse(command, args)
    if config.print_config:
        print(as_yaml(config), end="")
        return
    try:
        # With --json, the messages for people move to standard error, so that the last line of standard output is JSON.
        with contextlib.redirect_stdout(sys.stderr) if config.json else contextlib.nullcontext():
            work = COMMANDS[command].load()
            startup.begin()
            result = work(config)
    except FailedCheckError as failed:
        if config.json and failed.result is not None:
            _print_result(failed.result)
        raise
    if config.json and result is not None:
        _print_result(result)


def _print_result(result: dict[str, Any]) -> None:
    try:
        print(json.dumps(result), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _close(stream: TextIO) -> None:
    """Write what is left. If that fails, it has failed before: keep the interpreter's last attempt silent."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def _typed(command: str, args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The flags that were typed, as option -> value, and the words among them."""
    kind = COMMANDS[command].kind
    parser = _Parser(
        usage=_usage(command),
        description=inspect.cleandoc(kind.__doc__ or ""),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints, texts = get_type_hints(kind, include_extras=True), help_texts(kind)
    arguments = parser.add_argument_group("arguments")
    own, shared = parser.add_argument_group("options"), parser.add_argument_group("options of every command")
    for name in positionals(kind):
        text = texts[name].replace("%", "%%")
        arguments.add_argument(f"_{name}", metavar=label(kind, name), nargs="*", help=text)
    for option in sorted(fields(kind), key=lambda option: _owner_depth(kind, option.name)):
        if option.default is not MISSING:
            text = texts[option.name].replace("%", "%%")
            group = shared if option.name in Common.__annotations__ else own
            _add_flag(group, option.name, hints[option.name], option.default, text)
    shared.add_argument("-h", "--help", action="help", help="Show this text and exit.")
    parser.add_argument("_words", nargs="*", help=argparse.SUPPRESS)
    options, protected = _split_at_dashes(args)
    typed, unknown = parser.parse_known_intermixed_args([_dashed(arg) for arg in options])
    values = {name: value for name, value in vars(typed).items() if not name.startswith("_")}
    if unknown:
        flags = [action for option in parser._actions for action in option.option_strings]
        near = difflib.get_close_matches(unknown[0], flags, 1)
        raise InputError(f"no option {unknown[0]}{f'; did you mean {near[0]}?' if near else ''}; see --help")
    words = [word for name, words in vars(typed).items() if name.startswith("_") for word in words]
    return values, words + protected


def _usage(command: str) -> str:
    """How the command is called: `fastmae pretrain STORE... RUN [options]`."""
    kind = COMMANDS[command].kind
    return " ".join(["fastmae", command, *(label(kind, name) for name in positionals(kind)), "[options]"])


def _owner_depth(kind: type, name: str) -> int:
    """How far up among the bases an option is declared; 0 for the command's own."""
    return next(depth for depth, owner in enumerate(kind.__mro__) if name in getattr(owner, "__annotations__", {}))


def _add_flag(parser: argparse._ArgumentGroup, name: str, hint: Any, default: Any, text: str) -> None:
    """A flag for an option: its values stay text, which the resolver converts."""
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if plain is bool:
        help_text = f"{text} (default: {'on' if default else 'off'})"
        parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=help_text)
        return
    kinds = [kind for kind in get_args(plain) or [plain] if kind is not NoneType]
    if get_origin(plain) is Literal:
        metavar: Any = "{" + ",".join(kinds) + "}"
    else:
        metavar = getattr(kinds[0], "__name__", "value").upper()
    span = range_of(hint)
    notes = [*([str(span)] if span else []), *([f"default: {_shown(default)}"] if default not in (None, "") else [])]
    parser.add_argument(
        flag(name),
        metavar=metavar,
        nargs=len(kinds) if get_origin(plain) is tuple else None,
        help=f"{text} ({'; '.join(notes)})" if notes else text,
    )


def _assigned(kind: type[Common], words: list[str]) -> dict[str, Any]:
    """Words to positional arguments, in their order; one that takes several (STORE...) gets the surplus."""
    names = positionals(kind)
    hints = get_type_hints(kind)
    several = next((name for name in names if get_origin(hints[name]) is tuple), None)
    surplus = len(words) - len(names)
    if surplus > 0 and several is None:
        raise InputError(f"unexpected argument {words[len(names)]!r}; see --help")
    given: dict[str, Any] = {}
    rest = list(words)
    for name in names:
        take = 1 + max(0, surplus) if name == several else 1
        if rest:
            given[name] = rest[:take] if name == several else rest[0]
            del rest[:take]
    return given


def _split_at_dashes(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and the words after it, which may begin with a dash."""
    before = args.index("--") if "--" in args else len(args)
    return list(args[:before]), list(args[before + 1 :])


def _dashed(arg: str) -> str:
    """A flag as argparse knows it: `--batch_size=8` -> `--batch-size=8`."""
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if arg.startswith("--") else arg


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _os_message(error: OSError) -> str:
    path = f"{error.filename}: " if error.filename is not None else ""
    full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    way_out = "; free some space and give the same command again, it continues" if full else ""
    return f"{path}{error.strerror or error}{way_out}"
