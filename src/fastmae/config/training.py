"""The options that every command that trains has."""

from typing import Annotated, ClassVar

from fastmae.config.common import Common, Precision
from fastmae.config.options import options
from fastmae.config.ranges import (
    BATCH_OR_0,
    COUNT,
    FRACTION,
    LEARNING_RATE_OR_0,
    MINUTES_OR_0,
    WEIGHT_OR_0,
    WORKERS,
    Range,
)
from fastmae.config.resolve import CALLER_ONLY, near, shown
from fastmae.errors import InputError

LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")
"""What --logger may name."""


@options
class TrainingConfig(Common):
    """What pretrain, finetune, linear, segment and detect share."""

    may_change: ClassVar[tuple[str, ...]] = (
        *CALLER_ONLY,
        *("resume", "device", "devices", "workers", "save_every", "log_every", "logger"),
        *("micro_batch", "checkpoint_activations", "deterministic"),
    )
    """Options that may change when a run is continued: they change where and how fast it trains, but not what."""

    min_lr: Annotated[float, LEARNING_RATE_OR_0] = 0.0
    """Learning rate at the end."""
    weight_decay: Annotated[float, WEIGHT_OR_0] = 0.05
    """Weight decay of AdamW, on weights with two or more dimensions."""
    betas: Annotated[tuple[float, float], FRACTION] = (0.9, 0.999)
    """Betas of AdamW."""
    clip_grad: Annotated[float, WEIGHT_OR_0] = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    ema: Annotated[float, FRACTION] = 0.0
    """Decay of a moving average of the weights, 0.9999 say; the average is then what is evaluated and exported.
    0: none."""
    micro_batch: Annotated[int, BATCH_OR_0] = 0
    """Most images that a device takes at once; a larger share of the batch is accumulated over several passes.
    0: no limit."""
    precision: Precision = "auto"
    """auto: bf16-mixed on a GPU that supports it, 16-mixed on other GPUs, 32-true elsewhere. tf32: float32, but NVIDIA
    GPUs since Ampere round the factors of matrix products and convolutions to 10 bits; 32-true never does."""
    deterministic: bool = False
    """Take only kernels that give the same bits each time, so that a run on GPUs can be repeated, and continued after a
    kill, with exactly the same losses. Slower. Without it they agree to rounding. CPUs need no such kernels."""
    checkpoint_activations: bool = False
    """Recompute the activations of the encoder blocks in the backward pass: less memory, about a third more time."""
    devices: Annotated[int, Range(ge=1, le=1024)] = 1
    """Processes on this machine, one device each; or start them with torchrun or srun."""
    workers: Annotated[int, WORKERS] = -1
    """Loading processes per device; -1: its share of the cores but two, at least one."""
    save_every: Annotated[float, MINUTES_OR_0] = 10.0
    """Minutes between checkpoints."""
    log_every: Annotated[int, COUNT] = 10
    """Steps between log entries."""
    logger: str = "tensorboard"
    """Where figures and pictures go besides the run's own metrics.jsonl: tensorboard, csv, wandb, mlflow, several of
    them as `tensorboard,csv`, or none."""
    resume: bool = True
    """Continue from the checkpoint; --no-resume sets it aside and starts over."""

    @property
    def loggers(self) -> tuple[str, ...]:
        """The names in --logger, each once."""
        return tuple(name for name in dict.fromkeys(self.logger.split(",")) if name != "none")

    def check(self) -> None:
        """Refuse loggers that there are not."""
        for name in self.logger.split(","):
            if name not in (*LOGGERS, "none"):
                raise InputError(
                    f"--logger {shown(self.logger)}: give {', '.join(LOGGERS)}, or none; several with commas between "
                    f"them{near(name, LOGGERS)}"
                )
        if "none" in self.logger.split(",") and self.loggers:
            raise InputError(f"--logger {self.logger}: none stands alone; leave it out")
