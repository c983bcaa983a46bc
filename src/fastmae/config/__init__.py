"""What can be set: one typed class of options per command. The text below each field is its help on the command line.

The constants of the paper stand here, each with its section. `resolve` says where a value comes from.
"""

from fastmae.config.ablate import AblateConfig
from fastmae.config.bench_accuracy import BenchAccuracyConfig
from fastmae.config.bench_loader import BenchLoaderConfig
from fastmae.config.bench_step import BenchStepConfig
from fastmae.config.bench_store import BenchStoreConfig
from fastmae.config.common import DEFAULT_TEACHER, OFFLINE_TEACHER, Common, Precision
from fastmae.config.demo import DemoConfig
from fastmae.config.detect import DetectConfig
from fastmae.config.doctor import DoctorConfig
from fastmae.config.export import ExportConfig
from fastmae.config.features import FeaturesConfig
from fastmae.config.finetune import FinetuneConfig
from fastmae.config.inspect import InspectConfig
from fastmae.config.knn import KnnConfig
from fastmae.config.linear import LinearConfig
from fastmae.config.pretrain import PretrainConfig
from fastmae.config.recipes import RecipesConfig
from fastmae.config.report import ReportConfig
from fastmae.config.segment import SegmentConfig
from fastmae.config.study import StudyConfig
from fastmae.config.supervised import SupervisedConfig
from fastmae.config.tokenize import TokenizeConfig
from fastmae.config.training import TrainingConfig
from fastmae.config.upload import UploadConfig
from fastmae.config.verify import VerifyConfig

__all__ = [
    "DEFAULT_TEACHER",
    "OFFLINE_TEACHER",
    "AblateConfig",
    "BenchAccuracyConfig",
    "BenchLoaderConfig",
    "BenchStepConfig",
    "BenchStoreConfig",
    "Common",
    "DemoConfig",
    "DetectConfig",
    "DoctorConfig",
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
    "StudyConfig",
    "SupervisedConfig",
    "TokenizeConfig",
    "TrainingConfig",
    "UploadConfig",
    "VerifyConfig",
]
