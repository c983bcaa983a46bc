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
    from lightning_fabric.accelerators import CPUAccelerator
    from lightning_fabric.plugins.environments import (
        ClusterEnvironment,
        LightningEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )
    from lightning_fabric.plugins.precision import MixedPrecision
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
    from lightning_utilities.core.apply_func import apply_to_collection
finally:
    if _HIDDEN:
        del sys.modules["torchmetrics"]

__all__ = [
    "CPUAccelerator",
    "ClusterEnvironment",
    "DDPStrategy",
    "Fabric",
    "LightningEnvironment",
    "MixedPrecision",
    "ModelParallelStrategy",
    "SLURMEnvironment",
    "SingleDeviceStrategy",
    "Strategy",
    "TorchElasticEnvironment",
    "apply_to_collection",
]
