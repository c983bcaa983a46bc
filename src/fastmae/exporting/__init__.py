"""Writes a trained encoder, with a model card, in the layout that timm, transformers or an ONNX runtime loads."""
