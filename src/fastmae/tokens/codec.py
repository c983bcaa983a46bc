"""The codecs of a token store: their names, what they store of a token, and how it becomes the token again.

fp32, fp16   The C numbers themselves.
int8         A byte for each channel: token = offset + scale * code.
             codebooks.safetensors holds `offset` and `scale`, float32 [C].
pq<M>        M bytes a token (pq48: 48): product quantisation (Jegou et al. 2011) of the rotated token.
             token = offset + (centroids[0, code[0]], centroids[1, code[1]], ... concatenated) @ inverse
             code[m] = index of the centroid nearest to numbers m d to (m + 1) d of (token - offset) @ forward
             d = ceil(C / M)
             codebooks.safetensors holds, all float32, `offset` [C], `forward` [C, M d], `inverse` [M d, C] and
             `centroids` [M, 256, d].

pq<M> also stores the mean token of each image, float16 [C], and encodes what remains of the tokens without it:
token = mean + decoded codes. The stored mean makes the decoded tokens' mean exact, and there an image's category lies.

Decoding pq is also a sum over m of row code[m] of  tables[m] = centroids[m] @ inverse[m d : (m + 1) d].  The tables are
not stored: at C = 768, M = 48 they take 38 MB, the codebooks 5.5 MB.

`quantisers` computes all this, `learn` fits int8 and pq<M> to a sample.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastmae.errors import InputError
from fastmae.outside.codec_names import parse_codec
from fastmae.tokens.quantisers import ENTRIES, FloatCast, ProductQuantiser, Quantiser, ScalarQuantiser

DTYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.uint8, "pq": np.uint8}
"""Family -> dtype on disk. The paper's 0.94 TB for ImageNet is fp16 (Table 2)."""
ROUNDED_TO_INFINITY = 65520.0
"""The smallest number that becomes infinite in float16; 65504 is the largest that float16 holds."""
LARGEST_TOKEN = 1e9
"""Largest magnitude of a stored number. No network's features come near it, and sums of their squares fit into fp32."""
NOT_FINITE = "the teacher's features hold NaN or infinity; check its weights file, or tap another --teacher-block"


class Codec:
    """A codec that is ready to use; `load_codec` and `learn.learn_codec` return one.

    Args:
        name: as in `parse_codec`.
        token_dim: channels of a token, C.
        quantiser: encodes and decodes rows of tokens.

    Attributes:
        code_dim: numbers stored for a token, C'.
        dtype: dtype of those numbers.
    """

    def __init__(self, name: str, token_dim: int, quantiser: Quantiser):
        self.name, self.token_dim, self.quantiser = name, token_dim, quantiser
        self.code_dim, self.dtype = code_layout(name, token_dim)

    def tensors(self) -> dict[str, np.ndarray]:
        """The contents of codebooks.safetensors; empty for fp16 and fp32."""
        return self.quantiser.arrays

    def encode(self, tokens: torch.Tensor) -> np.ndarray:
        """Tokens, float32 [..., C] -> codes [..., C'].

        A token's codes do not depend on the batch, the process or the number of threads, so several machines of one
        kind can fill one store.

        Raises:
            InputError: tokens that are not finite, or beyond what fp16 can hold (65504).
        """
        codes = self._quantised(tokens)
        self.check_peak(float(peak_of(tokens)))
        return codes.cpu().numpy()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [..., C'] -> tokens, float32 [..., C], on the codes' device.

        Raises:
            ValueError: codes that have another shape or dtype than this codec's.
        """
        return self._dequantised(codes).float()

    def encode_grids(self, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Encode whole images, as a shard stores them.

        Args:
            tokens: float32 [n, grid, grid, C].

        Returns:
            Codes [n, grid, grid, C'] and mean tokens, float16 [n, C], or [n, 0] where the codec stores none.

        Raises:
            InputError: as `encode`.
        """
        codes, means = self.encode_unchecked(tokens)
        self.check_peak(float(peak_of(tokens)))
        self.check_means(means)
        return codes.cpu().numpy(), means.cpu().numpy()

    def encode_unchecked(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `encode_grids`, with tensors on the tokens' device, and without waiting for it.

        What comes of tokens that can't be encoded has no meaning: see `check_peak` and `check_means`.
        """
        if not keeps_means(self.name):
            return self._quantised(tokens), tokens.new_zeros((len(tokens), 0), dtype=torch.float16)
        means = tokens.mean((1, 2))
        codes = self._quantised(tokens - means[:, None, None])
        return codes, (means - self._mean_of_decoded(codes)).half()

    def check_peak(self, peak: float) -> None:
        """Check by their largest magnitude that the codec can hold tokens.

        Args:
            peak: from `peak_of`.

        Raises:
            InputError: tokens that are not finite, beyond `LARGEST_TOKEN`, or beyond what fp16 can hold (65504).
        """
        if not math.isfinite(peak):
            raise InputError(NOT_FINITE)
        if peak > LARGEST_TOKEN:
            way_out = "check its weights file, or tap another --teacher-block"
            raise InputError(f"the teacher's features reach {peak:.1e}, more than any network's should; {way_out}")
        if self.name == "fp16" and peak >= ROUNDED_TO_INFINITY:
            raise InputError(f"the teacher's features reach {peak:.0f}, beyond fp16's 65504; use --codec fp32")

    def check_means(self, means: torch.Tensor) -> None:
        """Check the means that `encode_unchecked` returned.

        Raises:
            InputError: means beyond what fp16 can hold.
        """
        if not torch.isfinite(means).all():
            raise InputError("the means of the teacher's features are beyond fp16's 65504; use --codec fp32")

    def decode_grids(self, codes: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """Decode whole images, or views of them.

        Args:
            codes: [n, ..., C'], a part of what `encode_grids` returned for each image.
            means: float16 [n, C] or [n, 0], as `encode_grids` returned them.

        Returns:
            float32 [n, ..., C], on the codes' device.
        """
        return self.read_grids(codes, means).float()

    def read_grids(self, codes: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """As `decode_grids`, but fp16 tokens stay float16. What computes in float32 reads them without a copy."""
        tokens = self._dequantised(codes)
        if not means.shape[1]:
            return tokens
        return tokens + means.float().view(len(means), *[1] * (tokens.dim() - 2), -1)

    def _quantised(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [..., C] -> codes [..., C'], on their device."""
        codes = self.quantiser.encode(tokens.detach().float().reshape(-1, self.token_dim))
        return codes.reshape(*tokens.shape[:-1], self.code_dim).contiguous()

    def _dequantised(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [..., C'] -> tokens [..., C], float16 for fp16 and else float32."""
        if codes.shape[-1] != self.code_dim or str(codes.dtype) != f"torch.{self.dtype}":
            expected = f"{self.name} has {self.code_dim} torch.{self.dtype}"
            raise ValueError(f"codes of {codes.shape[-1]} {codes.dtype}; {expected}")
        return self.quantiser.decode(codes.reshape(-1, self.code_dim)).reshape(*codes.shape[:-1], self.token_dim)

    def _mean_of_decoded(self, codes: torch.Tensor) -> torch.Tensor:
        """Mean decoded token of each image: codes [n, grid, grid, C'] -> float32 [n, C]."""
        if codes.device.type != "cpu" and isinstance(self.quantiser, ProductQuantiser):
            return self.quantiser.mean_by_product(codes)
        return self.decode(codes).mean((1, 2))


def code_layout(name: str, token_dim: int) -> tuple[int, np.dtype[Any]]:
    """How many numbers a codec stores for a token of C channels, and their dtype.

    Raises:
        InputError: no such codec, or more bytes than the token has channels.
    """
    codec = parse_codec(name)
    if codec.size > token_dim:
        way_out = f"give pq{token_dim} at most, or int8"
        raise InputError(f"--codec {name}: more bytes than a token has channels, {token_dim}; {way_out}")
    return codec.size or token_dim, np.dtype(DTYPES[codec.family])


def learns(name: str) -> bool:
    """Whether the codec must learn from a sample of tokens before it can encode.

    Raises:
        InputError: no such codec.
    """
    return parse_codec(name).family in ("int8", "pq")


def keeps_means(name: str) -> bool:
    """Whether the store keeps the mean token of each image beside its codes.

    Raises:
        InputError: no such codec.
    """
    return parse_codec(name).family == "pq"


def learnt_shapes(name: str, token_dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the float32 tensors in a codec's codebooks.safetensors, by name.

    Raises:
        InputError: as `code_layout`.
    """
    codec, _ = parse_codec(name), code_layout(name, token_dim)
    if codec.family == "int8":
        return {"offset": (token_dim,), "scale": (token_dim,)}
    if codec.family == "pq":
        width = -(-token_dim // codec.size)
        rotated = codec.size * width
        return {
            "offset": (token_dim,),
            "forward": (token_dim, rotated),
            "inverse": (rotated, token_dim),
            "centroids": (codec.size, ENTRIES, width),
        }
    return {}


def load_codec(name: str, token_dim: int, tensors: Mapping[str, np.ndarray]) -> Codec:
    """A codec as it was learnt.

    Args:
        name: the codec's name.
        token_dim: channels of a token, C.
        tensors: the contents of codebooks.safetensors, from `Codec.tensors`; none are needed for fp16 and fp32.

    Raises:
        InputError: no such codec, one that does not suit C, or tensors that are not this codec's.
    """
    family, arrays = parse_codec(name).family, _checked(tensors, learnt_shapes(name, token_dim))
    if family == "int8":
        return Codec(name, token_dim, ScalarQuantiser(**arrays))
    if family == "pq":
        return Codec(name, token_dim, ProductQuantiser(**arrays))
    return Codec(name, token_dim, FloatCast(torch.float32 if family == "fp32" else torch.float16))


def peak_of(tokens: torch.Tensor) -> torch.Tensor:
    """Largest magnitude, float32 []: NaN if one of the numbers is, 0 if there are none."""
    if not tokens.numel():
        return tokens.new_zeros(())
    low, high = torch.aminmax(tokens)
    return torch.maximum(-low, high)


def check_finite(tokens: torch.Tensor) -> None:
    """Check that all tokens are finite.

    Raises:
        InputError: some are NaN or infinite.
    """
    if not torch.isfinite(tokens).all():
        raise InputError(NOT_FINITE)


def _checked(tensors: Mapping[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The tensors of a codebooks.safetensors, each of the right dtype and shape and with numbers that can be used."""
    file, way_out = (
        "codebooks.safetensors",
        "bring back the file that belongs to this store, or tokenize into a new one",
    )
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise InputError(f"{file}: holds no '{name}'; {way_out}")
        if tensor.dtype != np.float32 or tensor.shape != shape:
            actual = f"{tensor.dtype} {list(tensor.shape)}"
            raise InputError(f"{file}: '{name}' is {actual}, not float32 {list(shape)}; {way_out}")
        if not np.isfinite(tensor).all() or (name == "scale" and tensor.min() <= 0):
            raise InputError(f"{file}: '{name}' holds impossible numbers; {way_out}")
    if shapes and _largest_decoded(tensors) > LARGEST_TOKEN:
        raise InputError(f"{file}: decodes tokens beyond {LARGEST_TOKEN:.0e}; {way_out}")
    return {name: np.ascontiguousarray(tensors[name]) for name in shapes}


def _largest_decoded(tensors: Mapping[str, np.ndarray]) -> float:
    """A bound on the magnitude of decoded tokens: no code gives a larger one."""
    peaks = {name: float(np.abs(tensor).max()) for name, tensor in tensors.items()}
    if "scale" in tensors:
        return peaks["offset"] + peaks["scale"] * (ENTRIES - 1)
    return peaks["offset"] + peaks["centroids"] * peaks["inverse"] * len(tensors["inverse"])
