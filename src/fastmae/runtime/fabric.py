"""The names of Lightning Fabric that the package uses, imported without torchmetrics.

To learn the version of torchmetrics, Fabric imports all of it, and with it scipy and transformers if they are
installed. A command took 7 s of CPU time to start, and 4 s without it. Fabric needs the version only to detect loss
spikes, which is not used here.
"""

import sys

_HIDDEN = "torchmetrics" not in sys.modules
if _HIDDEN:
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # makes Python believe that it is not installed
try:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import (
        ClusterEnvironment,
        LightningEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )
    from lightning_fabric.strategies import ModelParallelStrategy, Strategy
    from lightning_utilities.core.apply_func import apply_to_collection
finally:
    if _HIDDEN:
        del sys.modules["torchmetrics"]

__all__ = [
    "ClusterEnvironment",
    "Fabric",
    "LightningEnvironment",
    "ModelParallelStrategy",
    "SLURMEnvironment",
    "Strategy",
    "TorchElasticEnvironment",
    "apply_to_collection",
]
