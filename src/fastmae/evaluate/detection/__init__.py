"""Object detection and instance segmentation: Mask R-CNN on a plain ViT (Sec. 4.1.5, Table 8)."""

from importlib.util import find_spec

from fastmae.errors import InputError

if find_spec("pycocotools") is None:
    raise InputError("detect needs pycocotools; pip install 'fastmae[detect]'")
