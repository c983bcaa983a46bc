"""Lightning Fabric, and of its parts what is used here, imported without torchmetrics.

Fabric asks for the version of torchmetrics by importing all of it, and with it scipy and transformers where they are installed: a command
took 7 s of CPU time to start, without it 4 s. It wants to know for its detection of loss spikes alone, which is not used here.
"""

import sys

_HIDDEN = "torchmetrics" not in sys.modules
if _HIDDEN:
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # how Python is told that there is none
try:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import (
        ClusterEnvironment,
        LightningEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )
    from lightning_fabric.strategies import ModelParallelStrategy, Strategy
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
]
