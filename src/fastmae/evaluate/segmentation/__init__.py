"""Semantic segmentation with UperNet on a ViT: pictures with a class id a pixel in, mIoU out."""
