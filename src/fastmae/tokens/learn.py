"""How the codecs int8 and pq<M> learn from a sample of the teacher's tokens. `codec` says what they learn.

pq's rotation is OPQ's parametric solution (Ge et al. 2013): principal directions, dealt out to groups with similar
products of variances. On a ViT-S's tokens at 48 bytes it beat 50 rounds of OPQ's alternating optimisation (cosine
0.966 against 0.959; 3 s against 97 s), and residual quantisation (cosine 0.963), which encodes at a hundredth of the
rate.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastmae.errors import InputError
from fastmae.outside.codec_names import parse_codec
from fastmae.runtime.progress import counted_through
from fastmae.runtime.wording import counted
from fastmae.tokens.codec import Codec, check_finite, code_layout, keeps_means, load_codec
from fastmae.tokens.quantisers import ENTRIES, ProductQuantiser, ScalarQuantiser

LEAST_SAMPLE = {"int8": 2, "pq": ENTRIES}
"""Fewest tokens that a codec can learn from; `learn_codec` says how many are worth sampling."""
CLIPPED, MARGIN = 1e-3, 0.25
"""int8's range: from the 0.001 to the 0.999 quantile of the sample, widened by a quarter at each end. So a few
outlying tokens do not coarsen a channel's steps. Of held-out numbers, 6 in a million were clamped (of a CNN's, 56)."""


def learn_from(name: str, tokens: torch.Tensor, means: torch.Tensor, seed: int) -> Codec:
    """Fit a codec to sampled tokens; where it stores means, to the tokens without the means of their images.

    Args:
        name: the codec's name.
        tokens: float32 [m, C].
        means: float32 [m, C], the mean token of the image that each token comes from.
        seed: as in `learn_codec`.

    Raises:
        InputError: as `learn_codec`.
    """
    return learn_codec(name, tokens - means if keeps_means(name) else tokens, seed)


def learn_codec(name: str, sample: torch.Tensor, seed: int) -> Codec:
    """Fit a codec to a sample. The same sample and seed give the same `tensors`, whatever the number of threads.

    Measured with pq48 on a ViT-S (384 channels) and held-out photos: cosine 0.960 from 2,000 tokens, 0.964 from
    20,000, and no more from 120,000. Many images matter more than many tokens: 20,000 tokens of 42 images gave 0.956,
    of 256 images 0.964.

    Args:
        name: the codec's name. For a codec that does not learn, only the sample's width matters.
        sample: float32 [m, C], tokens drawn at random from many images; m = 65,536 is plenty.
        seed: of the random start of pq's clustering.

    Raises:
        InputError: no such codec, or one that does not suit C; a sample that is too small or not finite; pq
            without faiss.
    """
    sample = sample.detach().float().cpu()
    codec, token_dim = parse_codec(name), sample.shape[-1]
    code_layout(name, token_dim)
    if codec.family not in LEAST_SAMPLE:
        return load_codec(name, token_dim, {})
    least = LEAST_SAMPLE[codec.family]
    if len(sample) < least:
        problem = f"{counted(len(sample), 'token')}: too few to learn from ({least} at least)"
        raise InputError(f"--codec {name}: {problem}; use --codec fp16")
    check_finite(sample)
    if codec.family == "int8":
        return Codec(name, token_dim, learn_range(sample))
    return Codec(name, token_dim, learn_product(sample, codec.size, seed))


def check_can_learn(name: str) -> None:
    """Check that what learning a codec takes is installed.

    Raises:
        InputError: pq without faiss.
    """
    codec = parse_codec(name)
    if codec.family == "pq":
        _faiss(codec.size)


def learn_range(sample: torch.Tensor) -> ScalarQuantiser:
    """Fit int8 to a sample, float32 [m, C]."""
    low, high = np.quantile(sample.numpy(), [CLIPPED, 1 - CLIPPED], axis=0)
    width = _never_zero((high - low) * (1 + 2 * MARGIN))
    offset = (low + high - width) / 2
    return ScalarQuantiser(offset.astype(np.float32), (width / (ENTRIES - 1)).astype(np.float32))


def learn_product(sample: torch.Tensor, groups: int, seed: int) -> ProductQuantiser:
    """Fit pq to a sample.

    Args:
        sample: float32 [m, C], m at least 256.
        groups: bytes a token, M, at most C.
        seed: of the random start of the clustering.

    Raises:
        InputError: faiss, which does the clustering, is not installed.
    """
    faiss = _faiss(groups)
    with _one_thread(faiss):
        std, offset = torch.std_mean(sample, dim=0, correction=0)
        scale = balanced_scale(std)
        rotation = share_variance((sample - offset) / scale, groups)
        forward, inverse = (rotation / scale).T.contiguous(), rotation * scale
        centroids = _cluster(faiss, ((sample - offset) @ forward).numpy(), groups, seed)
    return ProductQuantiser(offset.numpy(), forward.numpy(), inverse.numpy(), centroids)


def balanced_scale(std: torch.Tensor) -> torch.Tensor:
    """What channels are divided by before clustering: the geometric mean of a channel's std and all channels' std.

    Without a division, raw tokens would be reproduced best; divided by each channel's whole std, the tokens after
    patch norm, where all channels count alike. Half-way (48 bytes, ViT-S) costs little of the one and gains most of
    the other: cosine 0.964 raw and 0.898 after patch norm, against 0.966 and 0.890, or 0.960 and 0.899.

    Args:
        std: float32 [C].

    Returns:
        float32 [C].
    """
    std = torch.from_numpy(_never_zero(std.numpy()))
    return (std * std.square().mean().sqrt()).sqrt()


def share_variance(tokens: torch.Tensor, groups: int) -> torch.Tensor:
    """Principal directions of tokens, dealt out to groups of d = ceil(C / groups) with similar products of variances.

    Args:
        tokens: float32 [m, C], centred.
        groups: number of groups.

    Returns:
        float32 [groups * d, C], a direction in each row. A group with fewer than d directions ends in rows of zeros.
    """
    dim = tokens.shape[1]
    width = -(-dim // groups)
    variances, directions = torch.linalg.eigh((tokens.T @ tokens).double())  # in ascending order
    floor = variances[-1].clamp(min=1e-30) * 1e-9  # below it, the sample does not vary but for rounding
    members = deal((variances.clamp(min=floor) / floor).log().flip(0).tolist(), groups, width)
    rotation = torch.zeros(groups, width, dim)
    for group, indices in enumerate(members):
        rotation[group, : len(indices)] = directions.flip(1).T[indices].float()
    return rotation.flatten(0, 1)


def deal(loads: list[float], groups: int, width: int) -> list[list[int]]:
    """Deal out loads in their order, each to the group with the smallest sum so far that has fewer than `width`.

    Args:
        loads: largest first.
        groups: number of groups.
        width: most loads in a group.

    Returns:
        For each group, the indices of its loads.
    """
    members: list[list[int]] = [[] for _ in range(groups)]
    sums = [0.0] * groups
    for index, load in enumerate(loads):
        group = min((g for g in range(groups) if len(members[g]) < width), key=lambda g: (sums[g], len(members[g])))
        members[group].append(index)
        sums[group] += load
    return members


def _cluster(faiss: Any, rotated: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """k-means of each group of columns of float32 [m, M d] -> centroids, float32 [M, 256, d].

    They are those of faiss's ProductQuantizer, which doesn't tell how far it is.
    """
    width = rotated.shape[1] // groups
    options = faiss.ProductQuantizer(rotated.shape[1], groups, 8).cp
    options.seed = seed % 2**31
    options.min_points_per_centroid = 1  # or faiss prints a warning for a small sample
    options.max_points_per_centroid = len(rotated)  # use the whole sample
    centroids = np.empty((groups, ENTRIES, width), np.float32)
    for group in counted_through(range(groups), f"cluster for pq{groups}", "groups", groups):
        clustering = faiss.Clustering(width, ENTRIES, options)
        clustering.train(
            np.ascontiguousarray(rotated[:, group * width : (group + 1) * width]), faiss.IndexFlatL2(width)
        )
        centroids[group] = faiss.vector_to_array(clustering.centroids).reshape(ENTRIES, width)
    return centroids


def _faiss(groups: int) -> Any:
    try:
        import faiss  # noqa: PLC0415 - large, and used only to learn codebooks
    except ImportError as error:
        need = f"--codec pq{groups}: learning its codebooks needs faiss, which is not installed"
        raise InputError(f"{need}; pip install 'fastmae[pq]'") from error
    return faiss


@contextlib.contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    """Compute on one thread, so that codebooks do not depend on how many threads share a sum."""
    torch_threads, faiss_threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        faiss.omp_set_num_threads(faiss_threads)


def _never_zero(spreads: np.ndarray) -> np.ndarray:
    """Spreads [C] to divide by: at least a thousandth of their mean, as a channel may be constant in the sample."""
    return np.maximum(spreads, 1e-3 * float(spreads.mean()) or 1.0).astype(spreads.dtype)
