"""The commands: for each, its options, and the function that runs it."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from fastmae import config as configs
from fastmae.config.common import Common


class Command(NamedTuple):
    """A command.

    Attributes:
        kind: the class of its options.
        home: `module:function`. The function takes the options and returns the keys of the command's JSON.
    """

    kind: type[Common]
    home: str

    def load(self) -> Callable[[Common], Any]:
        """The function. Its module is imported only now: torch and timm take seconds."""
        module, function = self.home.split(":")
        loaded: Callable[[Common], Any] = getattr(importlib.import_module(module), function)
        return loaded

    def run(self, config: Common) -> Any:
        """Run it."""
        return self.load()(config)


COMMANDS = {
    "tokenize": Command(configs.TokenizeConfig, "fastmae.offline.tokenize:tokenize"),
    "inspect": Command(configs.InspectConfig, "fastmae.offline.inspect:inspect"),
    "verify": Command(configs.VerifyConfig, "fastmae.offline.verify:verify"),
    "pretrain": Command(configs.PretrainConfig, "fastmae.pretraining.pretrain:pretrain_command"),
    "knn": Command(configs.KnnConfig, "fastmae.evaluate.knn:knn"),
    "linear": Command(configs.LinearConfig, "fastmae.evaluate.linear:linear"),
    "finetune": Command(configs.FinetuneConfig, "fastmae.evaluate.finetune:finetune"),
    "segment": Command(configs.SegmentConfig, "fastmae.evaluate.segmentation.segment:segment"),
    "detect": Command(configs.DetectConfig, "fastmae.evaluate.detection.detect:detect"),
    "features": Command(configs.FeaturesConfig, "fastmae.evaluate.features:features"),
    "export": Command(configs.ExportConfig, "fastmae.exporting.export:export"),
    "upload": Command(configs.UploadConfig, "fastmae.exporting.upload:upload"),
    "report": Command(configs.ReportConfig, "fastmae.reporting.report:report"),
    "ablate": Command(configs.AblateConfig, "fastmae.studies.ablate:ablate"),
    "bench step": Command(configs.BenchStepConfig, "fastmae.bench.bench_step:bench_step"),
    "bench loader": Command(configs.BenchLoaderConfig, "fastmae.bench.bench_loader:bench_loader"),
    "bench store": Command(configs.BenchStoreConfig, "fastmae.bench.bench_store:bench_store"),
    "bench accuracy": Command(configs.BenchAccuracyConfig, "fastmae.bench.bench_accuracy:bench_accuracy"),
    "recipes": Command(configs.RecipesConfig, "fastmae.config.recipes:list_recipes"),
    "doctor": Command(configs.DoctorConfig, "fastmae.runtime.doctor:doctor"),
    "demo": Command(configs.DemoConfig, "fastmae.studies.demo:demo"),
}
"""Name, of one word or two -> the command."""
