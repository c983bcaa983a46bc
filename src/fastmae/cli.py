"""The command line: parse the arguments, run the command, turn its outcome into an exit code.

argparse gives only what was typed, so that one resolver (`config.resolve`) serves flags, files and Python alike.
"""

import argparse
import contextlib
import difflib
import gc
import inspect
import io
import json
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TextIO, get_args, get_origin, get_type_hints

import yaml

from fastmae.config.commands import COMMANDS
from fastmae.config.common import Common
from fastmae.config.options import help_texts, positionals
from fastmae.config.parser import Added, Parser
from fastmae.config.ranges import COMMAS
from fastmae.config.resolve import CALLER_ONLY, converted, flag, label, placeholder, range_of, words_or_numbers
from fastmae.errors import (
    FailedCheckError,
    InputError,
    InterruptedRunError,
    OneProcessError,
    is_out_of_memory,
    notes_of,
    os_message,
)
from fastmae.runtime import console, ending, startup
from fastmae.runtime.processes import this_process

OK, CRASHED, CLOSED_PIPE = 0, 1, 141
EXIT_CODES: dict[type[BaseException], int] = {
    FailedCheckError: 1,
    InputError: 2,
    OSError: 2,
    InterruptedRunError: 130,
    KeyboardInterrupt: 130,
}
SIMILAR = 0.7
"""Of two words of which one may be meant by the other: difflib's ratio."""
LONGEST_CRASH = 300
"""Characters of a crash that are shown in its line."""


def main(args: Sequence[str] | None = None) -> None:
    """The `fastmae` command, once the process is prepared; exits with the contract's code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    startup.prepare()  # has happened before, unless this is called from elsewhere
    try:
        code = run(sys.argv[1:] if args is None else list(args))
    except KeyboardInterrupt:  # a second Ctrl-C, while the first one was being reported
        code = EXIT_CODES[KeyboardInterrupt]
    ending.finish()
    for stream in (sys.stdout, sys.stderr):
        _close(stream)
    gc.freeze()  # or Python would look for garbage in all modules once more: 2 s, with torch and timm
    sys.exit(code)


def run(args: list[str]) -> int:
    """Run one command.

    Returns:
        0 done, 1 failed check or an error of ours, 2 bad input or usage (one line on standard error for all of them),
        130 interrupted.
    """
    if args[:1] == ["help"]:
        args = [*args[1:], "--help"]  # `fastmae help knn` is `fastmae knn --help`
    if not args or args[0] in {"-h", "--help"}:
        print(overview())
        return OK
    if args[0] in {"-V", "--version"}:
        print(import_module("fastmae").__version__)
        return OK
    command, rest = _command_name(args)
    if _two_word_names(args[0]) and args[1:2] in (["-h"], ["--help"]):
        print(overview(_two_word_names(args[0])))
        return OK
    console.show()
    ending.begin(f"fastmae {command}")
    try:
        try:
            _do(command, rest)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `fastmae ... | head`: the reader has what it wanted
        return CLOSED_PIPE
    except (Exception, KeyboardInterrupt) as error:
        code, message = _outcome(command, error)
        # All processes of a run meet most errors that are foreseen; the first one on a machine reports them.
        met_by_all = isinstance(error, tuple(EXIT_CODES)) and not isinstance(error, OneProcessError)
        if not met_by_all or int(os.environ.get("LOCAL_RANK", this_process().local_rank)) == 0:
            with contextlib.suppress(OSError):  # nobody can be told
                print(f"fastmae {command}: {' '.join(message.split())}", file=sys.stderr, flush=True)
        ending.report(code)
        return code
    ending.report(OK)
    return OK


def overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    """The text of `fastmae --help`, or of `fastmae bench --help`."""
    lines = [f"  {name:15} {(COMMANDS[name].kind.__doc__ or '').splitlines()[0]}" for name in names]
    first_words = {name.partition(" ")[0] for name in names}
    command = f"{first_words.pop()} WHAT" if len(first_words) == 1 else "COMMAND"
    return "\n".join([f"usage: fastmae {command} ...; fastmae {command} --help for its options", "", *lines])


def parse(command: str, args: Sequence[str]) -> Any:
    """The options of a command.

    Raises:
        InputError: an unknown command or option, or a bad value.
        SystemExit: with code 0, after --help.
    """
    if command not in COMMANDS:
        first, _, second = command.partition(" ")
        known = _two_word_names(first) or list(COMMANDS)
        if known != list(COMMANDS) and not second:
            raise InputError(f"give what to do: {', '.join(known)}; fastmae {first} --help tells them apart")
        near = difflib.get_close_matches(command, known, 1, SIMILAR)
        if near:
            others = "fastmae --help lists all" if known == list(COMMANDS) else f"there are {', '.join(known)}"
            raise InputError(f"no such command; did you mean {near[0]!r}? {others}")
        raise InputError(f"no such command; give one of {', '.join(known)}")
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
    words = 2 if _two_word_names(args[0]) and args[1:] and not args[1].startswith("-") else 1
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
            config.check_inputs()
            from fastmae.runtime.progress import Progress

            with Progress("start", minor=True, style="lines"):  # imports: seconds, or many on a busy machine
                work = COMMANDS[command].load()
            startup.begin()
            result = work(config)
    except (Exception, KeyboardInterrupt) as error:
        if config.traceback:
            traceback.print_exc()
        if config.json and isinstance(error, FailedCheckError) and error.result is not None:
            _print_result(error.result)
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


def _typed(command: str, args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The flags that were typed, as option -> value, and the words among them."""
    kind = COMMANDS[command].kind
    parser = Parser(
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
    options = _joined([_dashed(arg) for arg in options], hints)
    typed, unknown = parser.parse_known_intermixed_args(options)
    values = {name: value for name, value in vars(typed).items() if not name.startswith("_")}
    if unknown:
        flags = [action for option in parser._actions for action in option.option_strings]
        wrong = [word for word in unknown if word.startswith("--")] or unknown[:1]
        near = [difflib.get_close_matches(word, flags, 1) for word in wrong]
        named = [f"{word} (did you mean {like[0]}?)" if like else word for word, like in zip(wrong, near, strict=True)]
        raise InputError(f"no option {', '.join(named)}; see --help")
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
    elif word_or_numbers := words_or_numbers(plain):
        words, numbers = word_or_numbers
        metavar = "{" + ",".join(words) + "}|" + " ".join(kind.__name__.upper() for kind in get_args(numbers))
    else:
        metavar = getattr(kinds[0], "__name__", "value").upper()
    span = range_of(hint)
    notes = [*([str(span)] if span else []), *([f"default: {_shown(default)}"] if default not in (None, "") else [])]
    parser.add_argument(
        flag(name),
        action=Added if COMMAS in getattr(hint, "__metadata__", ()) else "store",
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


def _joined(args: list[str], hints: dict[str, Any]) -> list[str]:
    """The arguments with the numbers of an option that takes a word or several numbers in one: argparse can't tell."""
    joined, rest = [], deque(args)
    while rest:
        arg = rest.popleft()
        either = words_or_numbers(hints.get(arg.removeprefix("--").replace("-", "_"))) if arg.startswith("--") else None
        if rest and either:
            words, numbers = either
            count = 1 if rest[0] in words else len(get_args(numbers))
            arg += "=" + " ".join(rest.popleft() for _ in range(min(count, len(rest))))
        joined.append(arg)
    return joined


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _outcome(command: str, error: BaseException) -> tuple[int, str]:
    """The exit code for what a command has raised, and what to say about it."""
    code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), None)
    interrupted = EXIT_CODES[KeyboardInterrupt]
    if ending.is_requested() and code != interrupted:  # a loading process that the signal has ended, say
        return interrupted, "; ".join(["interrupted", *notes_of(error)])
    if code is not None:
        message = os_message(error) if isinstance(error, OSError) else str(error) or "interrupted"
        return code, "; ".join([message, *notes_of(error)])
    if is_out_of_memory(error):
        return EXIT_CODES[OSError], "; ".join(["out of memory", *notes_of(error), _less_memory(command)])
    crash = f"an error of fastmae's own: {_crash(error)}"
    return CRASHED, "; ".join([crash, *notes_of(error), "--traceback shows all"])


def _less_memory(command: str) -> str:
    """The options that let a command take less memory."""
    names = {option.name for option in fields(COMMANDS[command].kind)} if command in COMMANDS else set()
    size = next((f"a smaller {flag(name)}" for name in ("micro_batch", "batch_size") if name in names), "")
    ways = " and ".join(filter(None, [size, "fewer --workers" if "workers" in names else ""]))
    return f"give {ways}, and the same call continues" if ways else "close other programs, and call it again"


def _crash(error: BaseException) -> str:
    """`TypeError: what it says (file.py:123)`: the innermost place in this package, or in the library it came from.

    torch hands on what a loading process met as a text that ends in the process's own traceback.
    """
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Caught ") and "Original Traceback" in str(error):
        places = re.findall(r'File "(.+)", line (\d+)', str(error))
        text = lines[-1]
    else:
        places = [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(error.__traceback__)]
        text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    own = [place for place in places if Path(place[0]).is_relative_to(Path(__file__).parent)]
    file, line = (own or places or [("?", "0")])[-1]
    return f"{text[:LONGEST_CRASH].strip().removesuffix(':')} ({Path(file).name}:{line})"
