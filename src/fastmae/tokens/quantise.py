"""What the codecs int8 and pq<M> learn from a sample of the teacher's tokens. What they do with it is `codec`'s matter.

pq's rotation is OPQ's parametric solution (Ge et al. 2013): principal directions, dealt out so that the groups' products of
variances are alike. On a ViT-S's tokens at 48 bytes that beat 50 rounds of OPQ's alternation (cosine 0.966 against 0.959) in
3 s against 97, and residual quantisation (0.963), which encodes at a hundredth of the rate.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastmae.errors import InputError
from fastmae.tokens.codec import (
    ENTRIES,
    Codec,
    ProductQuantiser,
    ScalarQuantiser,
    check_finite,
    code_layout,
    keeps_means,
    load_codec,
    parse_codec,
)

LEAST_SAMPLE = {"int8": 2, "pq": ENTRIES}
"""Tokens without which a codec can't learn; `learn_codec` says how many are well spent."""
CLIPPED, MARGIN = 1e-3, 0.25
"""int8's range: between these quantiles of the sample (below and above), widened at both ends by this part of it. A few tokens gone
astray do not coarsen a channel, and of held-out numbers 6 in a million (a CNN's: 56) were clamped."""


def learn_from(name: str, tokens: torch.Tensor, means: torch.Tensor, seed: int) -> Codec:
    """A codec fitted to what `sample_tokens` gives: to the tokens without their images' means, where it keeps those."""
    return learn_codec(name, tokens - means if keeps_means(name) else tokens, seed)


def learn_codec(name: str, sample: torch.Tensor, seed: int) -> Codec:
    """A codec fitted to a sample; the same sample and seed give the same `tensors`, whatever the number of threads.

    Measured with pq48 on a ViT-S (384 channels) and photos held out: cosine 0.960 from 2,000 tokens, 0.964 from 20,000, no
    more from 120,000. Many images matter more than many tokens: 20,000 out of 42 images gave 0.956, out of 256 images 0.964.

    Args:
        name: of the codec; one that does not learn takes only the sample's width.
        sample: float32 [m, C], tokens drawn at random from many images; m of 65,536 is plenty.
        seed: of the random start of pq's clustering.

    Raises:
        InputError: no such codec, or one that does not go with C; a sample too small or not finite; pq without faiss.
    """
    sample = sample.detach().float().cpu()
    codec, token_dim = parse_codec(name), sample.shape[-1]
    code_layout(name, token_dim)
    if codec.family not in LEAST_SAMPLE:
        return load_codec(name, token_dim, {})
    least = LEAST_SAMPLE[codec.family]
    if len(sample) < least:
        raise InputError(
            f"--codec {name}: {len(sample)} tokens are too few to learn from ({least} at least); use --codec fp16"
        )
    check_finite(sample)
    return Codec(
        name, token_dim, learn_range(sample) if codec.family == "int8" else learn_product(sample, codec.size, seed)
    )


def learn_range(sample: torch.Tensor) -> ScalarQuantiser:
    """int8 from a sample float32 [m, C]."""
    low, high = np.quantile(sample.numpy(), [CLIPPED, 1 - CLIPPED], axis=0)
    width = _never_zero((high - low) * (1 + 2 * MARGIN))
    offset = (low + high - width) / 2
    return ScalarQuantiser(offset.astype(np.float32), (width / (ENTRIES - 1)).astype(np.float32))


def learn_product(sample: torch.Tensor, groups: int, seed: int) -> ProductQuantiser:
    """pq from a sample float32 [m, C], m at least 256, with `groups` bytes a token, at most C.

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
    """By what the channels are divided before clustering, from their deviations [C]: the geometric mean of each and of all.

    Undivided, the raw token would be kept best; divided by the whole deviation, what patch norm makes of it, where all
    channels count alike. Half-way (48 bytes, ViT-S) costs the one little and has most of the other: cosine 0.964 raw and
    0.898 after patch norm, against 0.966 and 0.890, or 0.960 and 0.899.
    """
    std = torch.from_numpy(_never_zero(std.numpy()))
    return (std * std.square().mean().sqrt()).sqrt()


def share_variance(tokens: torch.Tensor, groups: int) -> torch.Tensor:
    """Principal directions of centred tokens float32 [m, C], in groups of d = ceil(C / groups) and of like products of variances.

    Returns:
        float32 [groups * d, C], a direction a row; rows of zeros at the end of groups that have fewer.
    """
    dim = tokens.shape[1]
    width = -(-dim // groups)
    variances, directions = torch.linalg.eigh((tokens.T @ tokens).double())  # in ascending order
    floor = variances[-1].clamp(min=1e-30) * 1e-9  # where the sample does not vary: 0 but for rounding, or below
    members = deal((variances.clamp(min=floor) / floor).log().flip(0).tolist(), groups, width)
    rotation = torch.zeros(groups, width, dim)
    for group, places in enumerate(members):
        rotation[group, : len(places)] = directions.flip(1).T[places].float()
    return rotation.flatten(0, 1)


def deal(loads: list[float], groups: int, width: int) -> list[list[int]]:
    """Deal out loads, largest first: each to the group that bears least so far and has fewer than `width`.

    Returns:
        Of each group the places in `loads`.
    """
    members: list[list[int]] = [[] for _ in range(groups)]
    borne = [0.0] * groups
    for place, load in enumerate(loads):
        group = min((g for g in range(groups) if len(members[g]) < width), key=lambda g: (borne[g], len(members[g])))
        members[group].append(place)
        borne[group] += load
    return members


def _cluster(faiss: Any, turned: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """k-means of each group of columns of float32 [m, M d] -> centroids float32 [M, 256, d]."""
    quantizer = faiss.ProductQuantizer(turned.shape[1], groups, 8)  # 8 bits: 256 centroids
    quantizer.cp.seed = seed % 2**31
    quantizer.cp.min_points_per_centroid = 1  # a small sample is the caller's matter, and no reason to print warnings
    quantizer.cp.max_points_per_centroid = len(turned)  # all of the sample
    quantizer.train(np.ascontiguousarray(turned))
    return faiss.vector_to_array(quantizer.centroids).reshape(groups, ENTRIES, -1)


def _faiss(groups: int) -> Any:
    try:
        import faiss  # noqa: PLC0415 - large, and needed only where codebooks are learnt
    except ImportError as error:
        need = f"--codec pq{groups}: learning its codebooks needs faiss, which is not installed"
        raise InputError(f"{need}; pip install 'fastmae[pq]'") from error
    return faiss


@contextlib.contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    """So that the codebooks do not depend on how many threads share their sums."""
    threads, of_faiss = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(of_faiss)


def _never_zero(spreads: np.ndarray) -> np.ndarray:
    """Spreads [C] by which one divides: at least a thousandth of their mean, for channels that are constant in the sample."""
    return np.maximum(spreads, 1e-3 * float(spreads.mean()) or 1.0).astype(spreads.dtype)
