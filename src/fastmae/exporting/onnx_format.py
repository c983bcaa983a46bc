"""One ONNX graph: normalised images in, embedding and patch tokens (or feature map) out, for any batch size."""

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
from fastmae.config import ExportConfig
from fastmae.errors import InputError, first_line
from fastmae.exporting.export_format import ExportFormat, import_extra
from fastmae.exporting.exported_model import ExportedModel, model_outputs

GRAPH_FILE = "model.onnx"
INPUT = "images"
MAX_EMBEDDED_BYTES = 1 << 30
"""Larger weights go into a file beside the graph, since a graph of 2 GB or more can't be read."""


class Graph(nn.Module):
    """A network that returns its `model_outputs` as a tuple, in their order.

    Args:
        network: in evaluation mode.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.network: Any = network

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images [B, K, S, S] -> the outputs."""
        return tuple(model_outputs(self.network, images).values())


def check(_: ExportedModel) -> None:
    """Check that the packages are installed.

    Raises:
        InputError: one is missing.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(name)


def write(model: ExportedModel, folder: Path, config: ExportConfig) -> None:
    """Write the graph, with mean, std, sizes and class names in its metadata.

    Raises:
        InputError: torch can't export the network.
    """
    example = torch.zeros(2, model.channels, model.image_size, model.image_size)
    output_names = list(model.output_shapes())
    try:
        with _quiet_exporter(), torch.no_grad():
            program: Any = torch.onnx.export(
                Graph(model.network).eval(),
                (example,),
                dynamo=True,
                opset_version=config.opset,
                verbose=False,
                input_names=[INPUT],
                output_names=output_names,
                # Without a maximum, torch 2.6 fixes the batch size at the example's.
                dynamic_shapes=({0: torch.export.Dim("batch", max=2**31 - 1)},),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(
            f"--format onnx: torch can't export {model.source} ({first_line(error)}); use --format timm"
        ) from error
    program.model.metadata_props.update(metadata(model))
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.network.state_dict().values())
    program.save(str(folder / GRAPH_FILE), external_data=weight_bytes > MAX_EMBEDDED_BYTES)


def metadata(model: ExportedModel) -> dict[str, str]:
    """How to prepare the graph's input; the classes of its logits."""
    numbers: dict[str, Any] = {
        "mean": model.mean,
        "std": model.std,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
    }
    if model.classes:
        numbers["classes"] = model.classes
    return {
        **{name: json.dumps(value) for name, value in numbers.items()},
        "crop": model.crop,
        "crop_share": str(model.crop_share),
        "architecture": model.architecture,
        "fastmae": __version__,
    }


def read(_: ExportedModel, folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All outputs, from onnxruntime on the CPU."""
    onnxruntime = import_extra("onnxruntime")
    session = onnxruntime.InferenceSession(str(folder / GRAPH_FILE), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(None, {INPUT: images.numpy()})
    return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}


def usage(model: ExportedModel, folder: str) -> str:
    """Python code that loads the graph with onnxruntime."""
    outputs = "\n".join(
        f'{name} = session.run(["{name}"], {{"{INPUT}": images}})[0]  # float32 [B, {", ".join(map(str, shape))}]'
        for name, shape in model.output_shapes().items()
    )
    return f"""\
import onnxruntime

session = onnxruntime.InferenceSession("{folder}/{GRAPH_FILE}")
# images: a numpy array, float32 [B, {model.image_shape}], normalised
{outputs}
"""


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's messages and warnings, which are about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


ONNX = ExportFormat("onnx", check, write, read, usage)
