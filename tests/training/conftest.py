"""A task that trains in milliseconds: a linear layer that learns the sum of three numbers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from fastmae.config import FinetuneConfig
from fastmae.training.task import Settings, Task


class Sums(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Twelve samples of three numbers and their sum."""

    numbers = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, visit: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        _, index = visit
        return self.numbers[index], self.numbers[index].sum()


def squared_error(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    numbers, sums = batch
    return {"loss": F.mse_loss(model(numbers).squeeze(1), sums)}


@pytest.fixture
def sums_task(tmp_path: Path) -> Callable[..., Task]:
    """(attributes of Task) -> the task, with these attributes and always the same initial weights."""

    def build(**changes: Any) -> Task:
        torch.manual_seed(0)
        network = nn.Linear(3, 1)
        task = {
            "name": "sums",
            "out": tmp_path / "run",
            "headline": "sums of three numbers",
            "network": network,
            "dataset": Sums(),
            "step": squared_error,
            "parameter_groups": lambda: [{"params": list(network.parameters())}],
        }
        return Task(**(task | changes))

    return build


@pytest.fixture
def options() -> Callable[..., FinetuneConfig]:
    """(options) -> a training command's options, with these values."""

    def build(**changes: Any) -> FinetuneConfig:
        defaults = {"run": "", "data": "", "device": "cpu", "workers": 0, "log_every": 1}
        return FinetuneConfig(**(defaults | changes))

    return build


@pytest.fixture
def settings() -> Settings:
    """Twelve images, four epochs: twelve steps of four."""
    return Settings(images=12, epochs=4, batch_size=4, lr=0.1, warmup_epochs=0.0)
