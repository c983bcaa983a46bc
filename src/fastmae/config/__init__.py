"""What can be set, one typed dataclass a command; the fields' docstrings are the command line's help.

A value comes from, each over the one before: the default here, the recipe (recipes/*.yaml) on top of what its target implies
(`TARGET_DEFAULTS`), what another target implies that is asked for instead, `--config FILE`, the flag. Constants of the paper
stand here with their section, and nowhere else.
"""

from fastmae.config.benches import BenchStepConfig
from fastmae.config.common import DEFAULT_TEACHER, OFFLINE_TEACHER, Common, Precision
from fastmae.config.detection import DetectConfig
from fastmae.config.downstream import FinetuneConfig, LinearConfig, SupervisedConfig
from fastmae.config.evaluation import KnnConfig
from fastmae.config.exporting import ExportConfig, FeaturesConfig
from fastmae.config.pretraining import TARGET_DEFAULTS, PretrainConfig, implied_values
from fastmae.config.reporting import ReportConfig
from fastmae.config.segmentation import SegmentConfig
from fastmae.config.stores import InspectConfig, TokenizeConfig, VerifyConfig
from fastmae.config.studies import (
    AblateConfig,
    BenchAccuracyConfig,
    BenchLoaderConfig,
    BenchStoreConfig,
    DemoConfig,
    RecipesConfig,
)

__all__ = [
    "DEFAULT_TEACHER",
    "OFFLINE_TEACHER",
    "TARGET_DEFAULTS",
    "AblateConfig",
    "BenchAccuracyConfig",
    "BenchLoaderConfig",
    "BenchStepConfig",
    "BenchStoreConfig",
    "Common",
    "DemoConfig",
    "DetectConfig",
    "ExportConfig",
    "FeaturesConfig",
    "FinetuneConfig",
    "InspectConfig",
    "KnnConfig",
    "LinearConfig",
    "Precision",
    "PretrainConfig",
    "RecipesConfig",
    "ReportConfig",
    "SegmentConfig",
    "SupervisedConfig",
    "TokenizeConfig",
    "VerifyConfig",
    "implied_values",
]
