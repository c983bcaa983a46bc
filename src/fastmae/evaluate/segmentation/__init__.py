"""Semantic segmentation with UperNet on a ViT, trained on photos with a class id for each pixel, measured by mIoU."""
