"""The commands as functions: positional arguments in the command line's order, its flags as keywords.

    fastmae.pretrain("photos.tokens", "runs/photos", recipe="vit_tiny_cpu", epochs=1)
    fastmae.knn("runs/photos", "photos-labelled")["top1"]

Each returns what the command prints with --json. Nothing is printed: messages go to the logger "fastmae", so
`logging.basicConfig(level="INFO")` shows them. A command that can't be run raises `fastmae.InputError`; one whose check
fails, `fastmae.FailedCheckError`; one that a signal stopped after saving, `fastmae.InterruptedRunError`.

In a run of several processes (`devices=2`, torchrun, srun), only the first process gets the result; the others get {}.
"""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from inspect import Parameter, Signature, cleandoc, signature
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from fastmae.config.commands import COMMANDS
from fastmae.config.options import help_texts
from fastmae.config.resolve import COMMAND_LINE_ONLY
from fastmae.errors import InputError

Location = str | Path
Function = TypeVar("Function", bound=Callable[..., dict[str, Any]])


def _run(command: str, **given: Any) -> dict[str, Any]:
    kind = COMMANDS[command].kind
    for name in given.keys() & COMMAND_LINE_ONLY:
        raise InputError(f"{name}: is a flag of the command line alone; leave it out")
    return COMMANDS[command].run(kind(**given)) or {}


def _documented(command: str) -> Callable[[Function], Function]:
    """Give a function the signature of its options, and their help, for `help()` and for completion."""

    def document(function: Function) -> Function:
        kind = COMMANDS[command].kind
        hints, texts = get_type_hints(kind), help_texts(kind)
        own = [p for p in signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = {*(parameter.name for parameter in own), *COMMAND_LINE_ONLY}
        flags = [option for option in fields(kind) if option.name not in named and option.default is not MISSING]
        keywords = [
            Parameter(o.name, Parameter.KEYWORD_ONLY, default=o.default, annotation=hints[o.name]) for o in flags
        ]
        whole = Signature([*own, *keywords], return_annotation=dict[str, Any])
        function.__signature__ = whole  # type: ignore[attr-defined]  # known to inspect, not to mypy
        lines = [f"    {name}: {texts[name]}" for name in whole.parameters]
        function.__doc__ = "\n".join([cleandoc(kind.__doc__ or ""), "", "Args:", *lines])
        return function

    return document


@_documented("tokenize")
def tokenize(images: Location, store: Location, **options: Any) -> dict[str, Any]:
    return _run("tokenize", images=images, store=store, **options)


@_documented("inspect")
def inspect(store: Location, **options: Any) -> dict[str, Any]:
    return _run("inspect", store=store, **options)


@_documented("verify")
def verify(store: Location, **options: Any) -> dict[str, Any]:
    return _run("verify", store=store, **options)


@_documented("pretrain")
def pretrain(stores: Location | Sequence[Location], run: Location, **options: Any) -> dict[str, Any]:
    return _run("pretrain", stores=stores, run=run, **options)


@_documented("knn")
def knn(run: Location, data: Location, **options: Any) -> dict[str, Any]:
    return _run("knn", run=run, data=data, **options)


@_documented("linear")
def linear(run: Location, data: Location, **options: Any) -> dict[str, Any]:
    return _run("linear", run=run, data=data, **options)


@_documented("finetune")
def finetune(run: Location, data: Location, **options: Any) -> dict[str, Any]:
    return _run("finetune", run=run, data=data, **options)


@_documented("segment")
def segment(run: Location, data: Location, **options: Any) -> dict[str, Any]:
    return _run("segment", run=run, data=data, **options)


@_documented("detect")
def detect(run: Location, data: Location, **options: Any) -> dict[str, Any]:
    return _run("detect", run=run, data=data, **options)


@_documented("features")
def features(run: Location, images: Location, out: Location, **options: Any) -> dict[str, Any]:
    return _run("features", run=run, images=images, out=out, **options)


@_documented("export")
def export(run: Location, out: Location, **options: Any) -> dict[str, Any]:
    return _run("export", run=run, out=out, **options)


@_documented("upload")
def upload(folder: Location, url: str, **options: Any) -> dict[str, Any]:
    return _run("upload", folder=folder, url=url, **options)


@_documented("report")
def report(run: Location, **options: Any) -> dict[str, Any]:
    return _run("report", run=run, **options)


@_documented("ablate")
def ablate(study: Location, data: Location | Sequence[Location], **options: Any) -> dict[str, Any]:
    return _run("ablate", study=study, data=data, **options)


@_documented("bench step")
def bench_step(**options: Any) -> dict[str, Any]:
    return _run("bench step", **options)


@_documented("bench loader")
def bench_loader(images: Location, **options: Any) -> dict[str, Any]:
    return _run("bench loader", images=images, **options)


@_documented("bench store")
def bench_store(images: Location, **options: Any) -> dict[str, Any]:
    return _run("bench store", images=images, **options)


@_documented("bench accuracy")
def bench_accuracy(images: Location, **options: Any) -> dict[str, Any]:
    return _run("bench accuracy", images=images, **options)


@_documented("demo")
def demo(**options: Any) -> dict[str, Any]:
    return _run("demo", **options)


@_documented("doctor")
def doctor(**options: Any) -> dict[str, Any]:
    return _run("doctor", **options)


@_documented("recipes")
def recipes(**options: Any) -> dict[str, Any]:
    return _run("recipes", **options)
