"""One ONNX graph: normalised images in; a vector an image, its patch tokens and its class token out. Any batch size."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmae import __version__
from fastmae.config.exporting import ExportConfig
from fastmae.errors import InputError, first_line
from fastmae.exporting.format import CLASS, EMBEDDING, LOGITS, PATCHES, Exported, Format, outputs_of, package

GRAPH_FILE = "model.onnx"
INPUT = "images"
LOWEST_OPSET, HIGHEST_OPSET = 18, 23
"""Between which torch's exporter writes, and onnxruntime reads."""
LARGEST_FILE = 1 << 30
"""Bytes of weights beyond which they lie in a file beside the graph: a graph of 2 GB can't be read."""


class Graph(nn.Module):
    """A network that gives `outputs_of` it, in that order.

    Args:
        network: in evaluation mode.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.network: Any = network

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, K, S, S] -> the outputs."""
        return tuple(outputs_of(self.network, images).values())


def check(_: Exported) -> None:
    """Whether the packages are there.

    Raises:
        InputError: one is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        package(name)


def write(model: Exported, folder: Path, config: ExportConfig) -> None:
    """Write the graph; mean, deviation and the like are in its metadata.

    Raises:
        InputError: an opset that is not to be had, or a network that torch can't export.
    """
    if not LOWEST_OPSET <= config.opset <= HIGHEST_OPSET:
        raise InputError(f"--opset {config.opset}: give {LOWEST_OPSET} to {HIGHEST_OPSET}")
    two = torch.zeros(2, model.channels, model.image_size, model.image_size)
    with torch.inference_mode():
        names = list(outputs_of(model.network, two))
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                Graph(model.network).eval(), (two,), dynamo=True, opset_version=config.opset, verbose=False,
                input_names=[INPUT], output_names=names, dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(
            f"--format onnx: torch can't export {model.source} ({first_line(error)}); take --format timm"
        ) from error
    program.model.metadata_props.update(metadata(model))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.network.state_dict().values())
    program.save(str(folder / GRAPH_FILE), external_data=weights > LARGEST_FILE)


def metadata(model: Exported) -> dict[str, str]:
    """What a graph says of its input."""
    facts: dict[str, Any] = {
        "mean": model.mean,
        "std": model.std,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
    }
    facts |= {"classes": model.classes} if model.classes else {}
    values = {name: json.dumps(value) for name, value in facts.items()}
    return {
        **values,
        "crop": model.crop,
        "crop_share": str(model.crop_share),
        "architecture": model.architecture,
        "fastmae": __version__,
    }


def read(folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All outputs, from onnxruntime on the CPU."""
    session = package("onnxruntime").InferenceSession(str(folder / GRAPH_FILE), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {
        name: torch.from_numpy(value)
        for name, value in zip(names, session.run(None, {INPUT: images.numpy()}), strict=True)
    }


def usage(model: Exported, folder: str) -> str:
    """How onnxruntime loads it."""
    shapes = {EMBEDDING: f"[B, {model.dim}]", PATCHES: f"[B, {model.network.patch_embed.num_patches}, {model.dim}]"}
    shapes |= {CLASS: f"[B, {model.dim}]"} if model.network.cls_token is not None else {}
    shapes |= {LOGITS: f"[B, {len(model.classes)}]"} if model.classes else {}
    lines = [
        f'{name} = session.run(["{name}"], {{"{INPUT}": images}})[0]  # float32 {shape}'
        for name, shape in shapes.items()
    ]
    return f"""\
import onnxruntime

session = onnxruntime.InferenceSession("{folder}/{GRAPH_FILE}")
# images: a numpy array, float32 [B, {model.shape}], normalised
{chr(10).join(lines)}
"""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


ONNX = Format("onnx", check, write, read, usage)
