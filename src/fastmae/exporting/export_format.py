"""What every export format implements: check, write, read back, and the lines of Python that load it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmae.config import ExportConfig
from fastmae.errors import InputError
from fastmae.exporting.exported_model import ExportedModel, model_outputs


@dataclass(frozen=True)
class ExportFormat:
    """One way to write a model.

    Attributes:
        library: name of the library on the hub.
        check: runs before anything is written; raises an InputError if the model does not fit or a package is missing.
        write: writes the model's files into a folder.
        read: (model, folder, images [B, K, S, S]) -> some of the expected outputs, computed from the files. By the
            library alone, or, if it is seldom there when a model is exported, by timm: see `read_by`.
        usage: (model, folder name to print) -> lines of Python that load the folder and put `images` through the model.
        read_by: what computes the outputs from the files in `read`; empty: the library.
        expected: (network in evaluation mode, images) -> the outputs that the files must reproduce.
    """

    library: str
    check: Callable[[ExportedModel], None]
    write: Callable[[ExportedModel, Path, ExportConfig], None]
    read: Callable[[ExportedModel, Path, torch.Tensor], dict[str, torch.Tensor]]
    usage: Callable[[ExportedModel, str], str]
    read_by: str = ""
    expected: Callable[[Any, torch.Tensor], dict[str, torch.Tensor]] = model_outputs

    @property
    def reader(self) -> str:
        """What computes the outputs from the files."""
        return self.read_by or self.library


def import_extra(package: str) -> Any:
    """Import a package of the `export` extra.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"this format needs {package}; pip install 'fastmae[export]'") from error
