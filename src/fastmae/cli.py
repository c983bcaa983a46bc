"""The commands: nothing but parsing and calling. Each stage's module is imported when its command runs."""

import contextlib
import dataclasses
import difflib
import errno
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import tyro
import yaml

from fastmae import config as configs
from fastmae.errors import FailedCheckError, InputError, InterruptedRunError, OneProcessError
from fastmae.runtime.processes import this_process

COMMANDS: dict[str, tuple[type[configs.Common], str]] = {
    "tokenize": (configs.TokenizeConfig, "fastmae.offline.tokenize:tokenize"),
    "inspect": (configs.InspectConfig, "fastmae.offline.inspect:inspect"),
    "verify": (configs.VerifyConfig, "fastmae.offline.verify:verify"),
    "pretrain": (configs.PretrainConfig, "fastmae.pretraining.pretrain:pretrain"),
    "knn": (configs.KnnConfig, "fastmae.evaluate.knn:knn"),
    "linear": (configs.LinearConfig, "fastmae.evaluate.linear:linear"),
    "finetune": (configs.FinetuneConfig, "fastmae.evaluate.finetune:finetune"),
    "segment": (configs.SegmentConfig, "fastmae.evaluate.segmentation.segment:segment"),
    "detect": (configs.DetectConfig, "fastmae.evaluate.detection.detect:detect"),
    "features": (configs.FeaturesConfig, "fastmae.evaluate.features:features"),
    "export": (configs.ExportConfig, "fastmae.exporting.export:export"),
    "report": (configs.ReportConfig, "fastmae.reporting.report:report"),
    "ablate": (configs.AblateConfig, "fastmae.studies.ablate:ablate"),
    "bench step": (configs.BenchStepConfig, "fastmae.bench.bench_step:bench_step"),
    "bench loader": (configs.BenchLoaderConfig, "fastmae.bench.bench_loader:bench_loader"),
    "bench store": (configs.BenchStoreConfig, "fastmae.bench.bench_store:bench_store"),
    "bench accuracy": (configs.BenchAccuracyConfig, "fastmae.bench.bench_accuracy:bench_accuracy"),
    "recipes": (configs.RecipesConfig, "fastmae.config.recipes:list_recipes"),
    "demo": (configs.DemoConfig, "fastmae.studies.demo:demo"),
}
"""Name, of one word or two -> its options, and the function that does it: takes the config, returns the keys of its JSON."""

SETTABLE_BY_FLAG_ONLY = {"json", "config", "print_config"}
OK, CLOSED_PIPE = 0, 141
EXIT_CODES: dict[type[BaseException], int] = {
    FailedCheckError: 1,
    InputError: 2,
    OSError: 2,
    InterruptedRunError: 130,
    KeyboardInterrupt: 130,
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the `fastmae` command; exits with the contract's code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold what the terminal's encoding has no sign for
            stream.reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:] if args is None else list(args))
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # all is done; in the interpreter's last second Ctrl-C would only spoil the code
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
        print(importlib.import_module("fastmae").__version__)
        return OK
    command, rest = _command(args)
    try:
        try:
            _do(command, rest)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `fastmae ... | head`: the reader has what it wanted
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # nor does the interpreter's own flush at the end complain
        return CLOSED_PIPE
    except (InputError, FailedCheckError, OSError, KeyboardInterrupt, InterruptedRunError) as error:
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        message = _os_message(error) if isinstance(error, OSError) else str(error) or "interrupted"
        # Of several processes on a machine, one speaks.
        if isinstance(error, OneProcessError) or int(os.environ.get("LOCAL_RANK", this_process().local_rank)) == 0:
            print(f"fastmae {command}: {' '.join(message.split())}", file=sys.stderr, flush=True)
        return code
    return OK


def overview() -> str:
    """The text of `fastmae --help`."""
    lines = [f"  {name:12} {(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    return "\n".join(["usage: fastmae COMMAND ...; fastmae COMMAND --help for its options", "", *lines])


def _command(args: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and what follows it."""
    words = 2 if _beginning_with(args[0]) else 1
    return " ".join(args[:words]), args[words:]


def _beginning_with(word: str) -> list[str]:
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def parse(command: str, args: list[str]) -> Any:
    """Resolve a command's options: defaults, target, recipe, config file, flags, each over the one before.

    Raises:
        InputError: an unknown command, option, recipe or key, or a value of the wrong type.
        SystemExit: with code 0, after --help.
    """
    if command not in COMMANDS:
        known = _beginning_with(command.partition(" ")[0]) or list(COMMANDS)
        near = [] if _beginning_with(command) else difflib.get_close_matches(command, known, 1)
        raise InputError(
            f"no such command{f'; did you mean {near[0]!r}' if near else ''}; commands: {', '.join(known)}"
        )
    kind = COMMANDS[command][0]
    prog = f"fastmae {command}"
    _check_flags(kind, args)
    layers = _layers(kind, args)
    complete = "--print-config" in args  # then the places to read and write need not be named
    default: Any = cast(Any, kind)(
        **{name: _placeholder(kind, name) if complete else tyro.MISSING for name in _positionals(kind)}
    )
    for source, values in layers:
        default = _apply(kind, prog, default, source, values)
    return _parse_args(kind, prog, default, args)


def as_yaml(config: configs.Common) -> str:
    """Every option that can stand in a --config file, as YAML."""
    values = {
        name: _plain(value)
        for name, value in vars(config).items()
        if name not in SETTABLE_BY_FLAG_ONLY
        and (name not in _positionals(type(config)) or value != _placeholder(type(config), name))
    }
    return yaml.safe_dump(values, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _positional(kind: type, name: str, given: Any) -> Any:
    """A positional argument's value out of what a YAML file gives for it."""
    hint = get_type_hints(kind)[name]
    if get_origin(hint) is tuple:
        return tuple(str(part) for part in (given if isinstance(given, list) else [given]))
    return Path(str(given)) if hint is Path else str(given)


def _placeholder(kind: type, name: str) -> Any:
    """Stands for a positional argument that is not given yet, or that --print-config leaves out: STORE, say."""
    hint = get_type_hints(kind)[name]
    return get_args(hint)[0] if get_origin(hint) is Literal else _positional(kind, name, name.upper())


def _do(command: str, args: list[str]) -> None:
    config = parse(command, args)
    if not 0 <= config.seed < 2**31:
        raise InputError(f"--seed {config.seed}: give 0 to {2**31 - 1}")
    if config.print_config:
        print(as_yaml(config), end="")
        return
    try:
        result = _call(command, config)
    except FailedCheckError as failed:
        if config.json and failed.result is not None:
            print(json.dumps(failed.result), flush=True)
        raise
    if config.json and result is not None:
        print(json.dumps(result), flush=True)


def _call(command: str, config: configs.Common) -> Any:
    module, function = COMMANDS[command][1].split(":")
    # Human-readable lines are for people: with --json they move to standard error, and the last line stays JSON.
    with contextlib.redirect_stdout(sys.stderr) if config.json else contextlib.nullcontext():
        return getattr(importlib.import_module(module), function)(config)


def _layers(kind: type, args: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
    """The layers below the flags, lowest first: (where from, option -> value)."""
    layers: list[tuple[str, Mapping[str, Any]]] = []
    file = _peek(args, "--config")
    if file is not None:
        layers.append((file, _read_yaml(Path(file))))
    if {"recipe", "target"} <= {
        field.name for field in dataclasses.fields(kind)
    }:  # of pretrain; ablate lays its rows over a recipe itself
        layers[:0] = _recipe_and_target(args, layers)
    return layers


def _recipe_and_target(
    args: Sequence[str], above: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[tuple[str, Mapping[str, Any]]]:
    """The layers of a recipe and of a target, asked for in a flag or in the layers above them."""
    from fastmae.config.recipes import load_recipe

    def asked(name: str) -> str | None:
        return _peek(args, f"--{name}") or next(
            (str(values[name]) for _, values in reversed(above) if values.get(name)), None
        )

    name, target = asked("recipe"), asked("target")
    recipe = {} if name is None else load_recipe(name)
    own = recipe.get("target", "tokens")
    layers: list[tuple[str, Mapping[str, Any]]] = [(f"target {own}", configs.implied_values(own))]
    if name is not None:
        layers.append((f"recipe {name}", {**recipe, "recipe": name}))
    if target is not None:
        layers.append((f"target {target}", configs.implied_values(target, recipe)))
    return layers


def _peek(args: Sequence[str], flag: str) -> str | None:
    """The value of a flag, before the parser runs; the last one where it stands twice."""
    value = None
    for here, following in zip(args, [*args[1:], None], strict=False):
        if here == flag:
            value = following
        elif here.startswith(f"{flag}="):
            value = here.split("=", 1)[1]
    return value


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: can't be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path}: not a list of `option: value` lines; see --print-config")
    return values


def _apply(kind: type, prog: str, default: Any, source: str, values: Mapping[str, Any]) -> Any:
    """Lay one layer over the defaults, checked by the same parser as flags are."""
    known = {field.name for field in dataclasses.fields(kind)} - SETTABLE_BY_FLAG_ONLY
    args: list[str] = []
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InputError(f"{source}: no option '{key}'{f'; did you mean {near[0]!r}' if near else ''}")
        if name in _positionals(kind):
            default = dataclasses.replace(default, **{name: _positional(kind, name, value)})
        elif isinstance(value, bool):
            args.append(f"--{'' if value else 'no-'}{name}".replace("_", "-"))
        else:
            args.append("--" + name.replace("_", "-"))
            args += [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
    missing = {name: _placeholder(kind, name) for name in _positionals(kind) if getattr(default, name) is tyro.MISSING}
    try:
        parsed = _parse_args(kind, prog, dataclasses.replace(default, **missing), args)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return dataclasses.replace(parsed, **dict.fromkeys(missing, tyro.MISSING))


def _positionals(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]


def _parse_args(kind: type, prog: str, default: Any, args: list[str]) -> Any:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=prog, default=default, args=_positionals_last(kind, args))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(complaint.getvalue())) from None


def _positionals_last(kind: type, args: Sequence[str]) -> list[str]:
    """Options first: of several positional arguments in a row the parser gives the last one its own place only at the end."""
    hints = get_type_hints(kind)
    options: list[str] = []
    positionals: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positionals.append(word)
            continue
        hint = hints.get(word[2:].replace("-", "_"), bool)  # --no-name and --help take no value either
        values = 0 if hint is bool or "=" in word else len(get_args(hint)) if get_origin(hint) is tuple else 1
        if len(rest) < values:  # left for the parser to say
            return list(args)
        options += [word, *rest[:values]]
        del rest[:values]
    return [*options, *positionals]


def _check_flags(kind: type, args: Sequence[str]) -> None:
    """A mistyped flag is named as such: the parser would first miss what the flag pushed out of its place."""
    names = {field.name for field in dataclasses.fields(kind)} - set(_positionals(kind))
    flags = {f"--{prefix}{name.replace('_', '-')}" for name in names for prefix in ("", "no-")} | {"--help"}
    for given in (arg.split("=", 1)[0].replace("_", "-") for arg in args if arg.startswith("--")):
        if given not in flags:
            near = difflib.get_close_matches(given, flags, 1)
            raise InputError(f"no option {given}{f'; did you mean {near[0]}' if near else ''}; see --help")


def _one_line(panel: str) -> str:
    """The parser's framed message as one line: frame and rules go, the sentences stay."""
    lines = [line.strip(" │╭╮╰╯─") for line in panel.splitlines()]
    sentences = [
        line for line in lines if line and not line.startswith(("For full helptext", "fastmae ", "Argument helptext"))
    ]
    return ": ".join([*sentences[:1], " ".join(sentences[1:])]) or "can't read the command line; see --help"


def _os_message(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename is not None else ""
    full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    way_out = "; free some space and give the same command again, it continues" if full else ""
    return f"{place}{error.strerror or error}{way_out}"
