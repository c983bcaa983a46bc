"""Read a token store of fastmae with safetensors alone: python read_store.py photos.tokens"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

store = Path(sys.argv[1])
codec = json.loads((store / "store.json").read_text())["codec"]
shard = load_file(store / "shards" / "00000.safetensors")
codes = shard["tokens"][0]  # the first image's codes: [grid, grid, C']
if codec in ("fp16", "fp32"):
    tokens = codes.astype(np.float32)
else:
    codebooks = load_file(store / "codebooks.safetensors")
    if codec == "int8":
        tokens = codebooks["offset"] + codebooks["scale"] * codes
    else:  # pq<M>: byte m of a token selects centroid number codes[..., m] of codebook m
        pieces = codebooks["centroids"][np.arange(codes.shape[-1]), codes]  # [grid, grid, M, d]
        residual = pieces.reshape(*codes.shape[:2], -1) @ codebooks["inverse"]  # [grid, grid, C]
        tokens = shard["token_means"][0] + codebooks["offset"] + residual
jpeg = shard["jpeg"][: shard["jpeg_offsets"][1]].tobytes() if "jpeg" in shard else b""
print(json.dumps({"codec": codec, "shape": tokens.shape, "mean": float(tokens.mean()), "jpeg_bytes": len(jpeg)}))
