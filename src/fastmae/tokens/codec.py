"""How a token's numbers lie on disk: a codec's name, how many numbers a token has under it, and there and back.

fp32, fp16   the C numbers themselves
int8         a byte a channel: token = offset + scale * code. codebooks.safetensors keeps `offset` and `scale`, float32 [C]
pq<M>        M bytes a token (pq48: 48), product quantisation (Jegou et al. 2011) after a rotation:
             token = offset + (centroids[0, code[0]], centroids[1, code[1]], ... one after the other) @ inverse
             code[m] = the centroid nearest to the m-th d numbers of (token - offset) @ forward,  d = ceil(C / M)
             codebooks.safetensors keeps, all float32, `offset` [C], `forward` [C, M d], `inverse` [M d, C], `centroids` [M, 256, d]

pq<M> keeps the mean token of each image beside its codes, float16 [C], and learns and encodes what is left of the tokens without it:
token = mean + what the codes give. The mean is the one that makes the decoded tokens' mean the image's own, where its category lies.

So pq is a sum, too: of the rows code[m] of  tables[m] = centroids[m] @ inverse[m d : (m + 1) d].  The tables are not kept: at
C = 768, M = 48 they have 38 MB, what is kept 5.5. How int8 and pq learn is `quantise`'s matter.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.errors import InputError

Family = Literal["fp32", "fp16", "int8", "pq"]
DTYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.uint8, "pq": np.uint8}
"""Family -> dtype on disk. The paper's 0.94 TB for ImageNet is fp16 (Table 2)."""
ENTRIES = 256
"""Centroids of a group: what a byte can name."""
BLOCK = 64
"""Tokens that pq encodes at a time, the last ones filled up with zeros. A matrix product of another shape may sum in another order
and turn a near-tie the other way; and a block's scores, 64 x M x 256, stay in a core's cache (119 k tokens/s at C = 384, M = 48;
81 k with blocks of 1024)."""


@dataclass(frozen=True)
class CodecName:
    """A codec's name, taken apart: its family, and for pq the bytes a token, M (0 for the others)."""

    family: Family
    size: int = 0


class Quantiser(Protocol):
    """What a codec does to rows of tokens."""

    def tensors(self) -> dict[str, np.ndarray]:
        """What the store must keep of it."""
        ...

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [n, C], finite -> codes [n, C']."""
        ...

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [n, C'] -> float32 [n, C], on the same device."""
        ...


class Codec:
    """A codec ready for use; made by `load_codec`, or by `quantise.learn_codec`.

    Args:
        name: as in `parse_codec`.
        token_dim: channels of a token, C.
        quantiser: what does the work.

    Attributes:
        code_dim: numbers a token on disk, C'.
        dtype: of those numbers.
    """

    def __init__(self, name: str, token_dim: int, quantiser: Quantiser):
        self.name, self.token_dim, self.quantiser = name, token_dim, quantiser
        self.code_dim, self.dtype = code_layout(name, token_dim)

    def tensors(self) -> dict[str, np.ndarray]:
        """What codebooks.safetensors keeps, by name; nothing for fp16 and fp32."""
        return self.quantiser.tensors()

    def encode(self, tokens: torch.Tensor) -> np.ndarray:
        """float32 tokens [..., C] -> the array [..., C'] that a shard keeps.

        A token's codes are the same in whatever batch, process or number of threads it comes, so several machines of a
        kind can fill one store.

        Raises:
            InputError: tokens that are not finite, or beyond what fp16 can hold (65504).
        """
        check_finite(tokens)
        codes = self.quantiser.encode(tokens.detach().float().reshape(-1, self.token_dim))
        return codes.reshape(*tokens.shape[:-1], self.code_dim).contiguous().cpu().numpy()

    def encode_grids(self, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What a shard keeps of whole images: codes [n, grid, grid, C'] and means, float16 [n, C], or [n, 0] where none are kept.

        Args:
            tokens: float32 [n, grid, grid, C].

        Raises:
            InputError: as `encode`.
        """
        if not keeps_means(self.name):
            return self.encode(tokens), np.zeros((len(tokens), 0), np.float16)
        check_finite(tokens)
        means = tokens.mean((1, 2), keepdim=True)
        codes = self.encode(tokens - means)
        exact = tokens.mean((1, 2)) - self.decode(torch.from_numpy(codes)).mean((1, 2))
        return codes, FloatCast(torch.float16).encode(exact).numpy()

    def decode_grids(self, codes: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """The tokens of images or of views of them, float32 [n, ..., C], from what `encode_grids` gave of each, on the codes' device."""
        tokens = self.decode(codes)
        return tokens + means.float().view(len(means), *[1] * (tokens.dim() - 2), -1) if means.shape[1] else tokens

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [..., C'] -> float32 tokens [..., C], on the codes' device.

        Raises:
            ValueError: codes of another shape or dtype than this codec's.
        """
        if codes.shape[-1] != self.code_dim or str(codes.dtype) != f"torch.{self.dtype}":
            raise ValueError(
                f"codes of {codes.shape[-1]} {codes.dtype}; {self.name} has {self.code_dim} torch.{self.dtype}"
            )
        return self.quantiser.decode(codes.reshape(-1, self.code_dim)).reshape(*codes.shape[:-1], self.token_dim)


class FloatCast:
    """fp32 and fp16: the numbers themselves."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def tensors(self) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 -> float16 or float32.

        Raises:
            InputError: numbers beyond what fp16 can hold (65504).
        """
        stored = tokens.to(self.dtype)
        if not torch.isfinite(stored).all():
            raise InputError(
                f"the teacher's features reach {tokens.abs().max():.0f}, beyond fp16's 65504; use --codec fp32"
            )
        return stored

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """float16 or float32 -> float32."""
        return codes.float()


class ScalarQuantiser:
    """int8: each channel by itself, rounded to one of 256 equal steps; what lies beyond them is clamped.

    Args:
        offset: float32 [C], of code 0.
        scale: float32 [C], of a step.
    """

    def __init__(self, offset: np.ndarray, scale: np.ndarray):
        self._copies = _Copies(offset=offset, scale=scale)

    def tensors(self) -> dict[str, np.ndarray]:
        """`offset` and `scale`."""
        return self._copies.arrays

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [n, C] -> uint8 [n, C]."""
        kept = self._copies.on(tokens.device)
        return ((tokens - kept["offset"]) / kept["scale"]).round().clamp(0, ENTRIES - 1).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [n, C] -> float32 [n, C]."""
        kept = self._copies.on(codes.device)
        return kept["offset"] + kept["scale"] * codes.float()


class ProductQuantiser:
    """pq<M>: the rotated token in M pieces, each kept as the number of the nearest of 256 centroids.

    Args:
        offset: float32 [C].
        forward: float32 [C, M d].
        inverse: float32 [M d, C].
        centroids: float32 [M, 256, d].
    """

    def __init__(self, offset: np.ndarray, forward: np.ndarray, inverse: np.ndarray, centroids: np.ndarray):
        self.groups, _, self.width = centroids.shape
        self._copies = _Copies(offset=offset, forward=forward, inverse=inverse, centroids=centroids)
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {
            **self.__dict__,
            "_tables": None,
        }  # as large as a thousand images: made again in the process that decodes

    def tensors(self) -> dict[str, np.ndarray]:
        """`offset`, `forward`, `inverse` and `centroids`."""
        return self._copies.arrays

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [n, C] -> uint8 [n, M]."""
        count = len(tokens)
        padded = F.pad(tokens, (0, 0, 0, -count % BLOCK))
        kept = self._copies.on(tokens.device)
        centroids = kept["centroids"].transpose(1, 2)
        half_norms = kept["centroids"].square().sum(2)[:, None] / 2
        with torch.no_grad(), _float32(tokens.device):
            blocks = [
                self._nearest((block - kept["offset"]) @ kept["forward"], centroids, half_norms)
                for block in padded.split(BLOCK)
            ]
        return torch.cat(blocks)[:count]

    def _nearest(self, turned: torch.Tensor, centroids: torch.Tensor, half_norms: torch.Tensor) -> torch.Tensor:
        """[B, M d] -> uint8 [B, M]: the least of |z - c|^2 / 2, less |z|^2 / 2, which is the same for every centroid c."""
        pieces = turned.unflatten(1, (self.groups, self.width)).transpose(0, 1)
        scores = torch.baddbmm(half_norms, pieces, centroids, alpha=-1)  # [M, B, 256]
        # NumPy's argmin takes a fraction of torch's time on a CPU: 119 k tokens/s of encoding against 61 k.
        nearest = torch.from_numpy(scores.numpy().argmin(2)) if scores.device.type == "cpu" else scores.argmin(2)
        return nearest.T.to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [n, M] -> float32 [n, C].

        On a CPU by sums of the tables' rows, measured 4 to 7 times as fast there; the product is at home on every device.
        """
        return self.decode_by_sums(codes) if codes.device.type == "cpu" else self.decode_by_product(codes)

    def decode_by_sums(self, codes: torch.Tensor) -> torch.Tensor:
        """offset + sum_m tables[m, code[m]], on a CPU; 32 views of 196 tokens in 11 ms on a core at C = 768, M = 48."""
        peaks, tables = self._tables or self._make_tables()
        summed = F.embedding_bag(codes.int() + self._first(codes.device), tables, mode="sum")
        return self._copies.on(codes.device)["offset"] + peaks * summed.float()

    def decode_by_product(self, codes: torch.Tensor) -> torch.Tensor:
        """offset + (the codes' centroids, one after the other) @ inverse: the same, on any device."""
        kept = self._copies.on(codes.device)
        with _float32(codes.device):
            pieces = F.embedding(codes.int() + self._first(codes.device), kept["centroids"].flatten(0, 1))
            return kept["offset"] + pieces.flatten(1) @ kept["inverse"]

    def _first(self, device: torch.device) -> torch.Tensor:
        """The place of each group's first centroid, all groups' being in one list."""
        return torch.arange(0, ENTRIES * self.groups, ENTRIES, dtype=torch.int32, device=device)

    def _make_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each channel's peak, float32 [C], and float16 [M 256, C] in units of it: half float32's memory traffic, half its time."""
        arrays = self._copies.arrays
        tables = arrays["centroids"] @ arrays["inverse"].reshape(self.groups, self.width, -1)
        peaks = np.maximum(np.abs(tables).max((0, 1)), np.finfo(np.float32).tiny)
        self._tables = torch.from_numpy(peaks), torch.from_numpy((tables / peaks).astype(np.float16)).flatten(0, 1)
        return self._tables


class _Copies:
    """Arrays as tensors, on each device that has asked; only the arrays travel to other processes."""

    def __init__(self, **arrays: np.ndarray):
        self.arrays = arrays
        self._tensors: dict[torch.device, dict[str, torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"arrays": self.arrays, "_tensors": {}}

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        if device not in self._tensors:
            self._tensors[device] = {name: torch.tensor(array, device=device) for name, array in self.arrays.items()}
        return self._tensors[device]


def parse_codec(name: str) -> CodecName:
    """Take a codec's name apart.

    Raises:
        InputError: no such codec.
    """
    if name in ("fp32", "fp16", "int8"):
        return CodecName(cast(Family, name))
    product = re.fullmatch(r"pq([1-9][0-9]{0,4})", name)
    if product is None:
        raise InputError(f"--codec {name}: no such codec; give fp16, fp32, int8, or pq<M> with M bytes a token (pq48)")
    return CodecName("pq", int(product[1]))


def code_layout(name: str, token_dim: int) -> tuple[int, np.dtype[Any]]:
    """How many numbers a token has on disk, and their dtype; known before anything is learnt.

    Raises:
        InputError: no such codec, or more bytes than the token has channels.
    """
    codec = parse_codec(name)
    if codec.size > token_dim:
        raise InputError(
            f"--codec {name}: more bytes than a token has channels, {token_dim}; give pq{token_dim} at most, or int8"
        )
    return codec.size or token_dim, np.dtype(DTYPES[codec.family])


def learns(name: str) -> bool:
    """Whether the codec needs a sample of tokens before it can encode.

    Raises:
        InputError: no such codec.
    """
    return parse_codec(name).family in ("int8", "pq")


def keeps_means(name: str) -> bool:
    """Whether the mean token of each image lies beside its codes.

    Raises:
        InputError: no such codec.
    """
    return parse_codec(name).family == "pq"


def load_codec(name: str, token_dim: int, tensors: Mapping[str, np.ndarray]) -> Codec:
    """A codec as it was learnt, from what `Codec.tensors` gave.

    Args:
        name: of the codec.
        token_dim: channels of a token, C.
        tensors: the contents of codebooks.safetensors; none are needed for fp16 and fp32.

    Raises:
        InputError: no such codec, one that does not go with C, or tensors that are not this codec's.
    """
    family, arrays = parse_codec(name).family, _checked(tensors, learnt_shapes(name, token_dim))
    if family == "int8":
        return Codec(name, token_dim, ScalarQuantiser(**arrays))
    if family == "pq":
        return Codec(name, token_dim, ProductQuantiser(**arrays))
    return Codec(name, token_dim, FloatCast(torch.float32 if family == "fp32" else torch.float16))


def learnt_shapes(name: str, token_dim: int) -> dict[str, tuple[int, ...]]:
    """What codebooks.safetensors keeps of a codec, all of it float32: name -> shape.

    Raises:
        InputError: as `code_layout`.
    """
    codec, _ = parse_codec(name), code_layout(name, token_dim)
    if codec.family == "int8":
        return {"offset": (token_dim,), "scale": (token_dim,)}
    if codec.family == "pq":
        width = -(-token_dim // codec.size)
        turned = codec.size * width
        square = {"forward": (token_dim, turned), "inverse": (turned, token_dim)}
        return {"offset": (token_dim,), **square, "centroids": (codec.size, ENTRIES, width)}
    return {}


def check_finite(tokens: torch.Tensor) -> None:
    """See that tokens are numbers.

    Raises:
        InputError: they are not.
    """
    if not torch.isfinite(tokens).all():
        raise InputError(
            "the teacher's features hold NaN or infinity; check its weights file, or tap another --teacher-block"
        )


def _float32(device: torch.device) -> contextlib.AbstractContextManager:
    """Products of float32 numbers, whatever autocast does around them (on CUDA in TF32, where that is allowed)."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def _checked(tensors: Mapping[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    way_out = "bring back the file that belongs to this store, or tokenize into a new one"
    for name, shape in shapes.items():
        held = tensors.get(name)
        if held is None:
            raise InputError(f"codebooks.safetensors: holds no '{name}'; {way_out}")
        if held.dtype != np.float32 or held.shape != shape:
            raise InputError(
                f"codebooks.safetensors: '{name}' is {held.dtype} {list(held.shape)}, not float32 {list(shape)}; {way_out}"
            )
        if not np.isfinite(held).all() or (name == "scale" and held.min() <= 0):
            raise InputError(f"codebooks.safetensors: '{name}' holds numbers that can't be; {way_out}")
    return {name: np.ascontiguousarray(tensors[name]) for name in shapes}
