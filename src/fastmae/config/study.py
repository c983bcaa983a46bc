"""The options of commands that tokenise images and train small students on them."""

from pathlib import Path
from typing import Annotated, Any

from fastmae.config.common import BLOCK, OFFLINE_TEACHER, Common
from fastmae.config.options import options
from fastmae.config.pretrain import PretrainConfig
from fastmae.config.ranges import PATCH, SEEDS, WORKERS
from fastmae.config.teacher import TeacherName
from fastmae.config.tokenize import TokenizeConfig


@options
class StudyConfig(Common):
    """What a command needs for tokenising images and comparing small students on them."""

    seeds: Annotated[int, SEEDS] = 1
    """Runs of every method, from --seed on. With more than one, mean and standard deviation are given."""
    recipe: str = "vit_tiny_cpu"
    """Recipe of FastMAE."""
    mae_recipe: str = "mae_tiny_cpu"
    """Recipe of MAE: the same encoder, image size and batch size, with a learning rate of its own."""
    teacher: TeacherName = OFFLINE_TEACHER
    """As in tokenize."""
    teacher_weights: Path | None = None
    """As in tokenize."""
    teacher_block: Annotated[int | None, BLOCK] = None
    """As in tokenize."""
    middle_size: str = "96"
    """As in tokenize."""
    patch_size: Annotated[int, PATCH] = 8
    """As in tokenize."""
    flip: bool = True
    """As in pretrain."""
    workers: Annotated[int, WORKERS] = -1
    """Loading processes; -1: all cores but two, at least one."""

    def tokenize_options(self, images: Path, store: Path, teacher: str) -> TokenizeConfig:
        """The options for tokenising the images."""
        return TokenizeConfig(
            images=images,
            store=store,
            teacher=teacher,
            teacher_weights=self.teacher_weights,
            teacher_block=self.teacher_block,
            middle_size=self.middle_size,
            patch_size=self.patch_size,
            workers=self.workers,
            device=self.device,
            seed=self.seed,
        )

    def pretrain_options(self, store: Path, run: Path, seed: int, **given: Any) -> PretrainConfig:
        """The options of one run; `given` goes over the study's recipe."""
        shared = {"flip": self.flip, "workers": self.workers, "device": self.device}
        return PretrainConfig(stores=(str(store),), run=run, seed=seed, **{"recipe": self.recipe, **shared, **given})
