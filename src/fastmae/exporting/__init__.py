"""An encoder out of fastmae: for timm, for transformers, for ONNX runtimes, each with a model card."""
