"""Studies on the small photos."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fastmae.config import AblateConfig
from fastmae.studies.study_file import load_study
from fastmae.studies.study_runs import Runs


@pytest.fixture
def runs_of(photos: Path, vit_store: Path, tmp_path: Path) -> Callable[..., Runs]:
    """(text of a study, store) -> its runs, with plans made."""

    def runs(text: str, store: Path = vit_store) -> Runs:
        file = tmp_path / "mine.yaml"
        file.write_text(f"teachers: {{vit: timm/x}}\ntokenize: {{patch_size: 16}}\n{text}")
        config = AblateConfig(study=file, data=(photos,), out=tmp_path / "out")
        made = Runs(load_study(config), config, {"photos": photos}, tmp_path / "out")
        made.stores["photos", "vit"] = str(store)
        made.check_plans()
        return made

    return runs
