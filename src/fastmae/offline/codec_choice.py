"""`--codec auto`: the smallest codec whose tokens keep a cosine of 0.95 to the teacher's, on held-out images.

The candidates are pq<M> of growing M, then int8, fp16 and fp32. The codec is then learnt from the whole sample, exactly
as if its name had been given.
"""

import importlib.util
import logging
from collections.abc import Callable, Sequence

import torch

from fastmae.errors import InputError
from fastmae.offline.sample import TokenSample
from fastmae.outside.codec_names import parse_codec
from fastmae.teachers.precision import mean_cosine
from fastmae.tokens.codec import Codec
from fastmae.tokens.learn import LEAST_SAMPLE, learn_from

log = logging.getLogger(__name__)

MIN_COSINE = 0.95
"""Least mean cosine of decoded tokens to the teacher's."""
GROUPS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Candidates for M. One of more than half the channels would be hardly smaller than int8."""
HELD_OUT_EVERY = 8
"""Every so many images of the sample are held out to measure the cosine on."""
TRIAL_TOKENS = 1 << 14
"""Tokens that a candidate learns from, about. More of them take longer and gain next to nothing (`learn_codec`)."""


def choose_codec(sample: TokenSample, seed: int, now: Callable[[str], object] = lambda _: None) -> tuple[Codec, float]:
    """The smallest codec that keeps the cosine, and the cosine that it was found to keep.

    Args:
        sample: with grids of every `HELD_OUT_EVERY`-th image.
        seed: of the codecs' learning.
        now: called with what is done next, for progress.
    """
    held_out = sample.images % sample.grid_every == 0
    learning = torch.nonzero(~held_out).flatten()
    measured: dict[str, float] = {}

    def cosine(name: str) -> float:
        if name not in measured:
            now(f"trying {name}")
            trial = learning[:: max(1, len(learning) // _trial_tokens(name))]
            codec = learn_from(name, sample.tokens[trial], sample.means[trial], seed)
            measured[name] = _round_trip_cosine(codec, sample.grids)
        return measured[name]

    choice = _smallest(product_codecs(sample.tokens.shape[1], len(learning)), cosine)
    rest = ["int8"] if len(learning) >= LEAST_SAMPLE["int8"] else []
    choice = choice or next(name for name in [*rest, "fp16", "fp32"] if cosine(name) >= MIN_COSINE or name == "fp32")
    found = ", ".join(f"{name} {measured[name]:.3f}" for name in sorted(measured, key=lambda name: measured[name]))
    wanted = f"the smallest with a cosine of {MIN_COSINE} or more is taken"
    log.info(f"--codec auto: {choice}; {wanted}; on {len(sample.grids)} held-out images: {found}")
    now(f"learning {choice}")
    return learn_from(choice, sample.tokens, sample.means, seed), measured[choice]


def _trial_tokens(name: str) -> int:
    """Tokens that a candidate learns from, about: fewer with a large M, whose clustering takes longer."""
    return TRIAL_TOKENS * 64 // max(64, parse_codec(name).size)


def product_codecs(token_dim: int, sample_size: int) -> list[str]:
    """The names of the pq<M> that can be tried, smallest first.

    Args:
        token_dim: channels of a token, C.
        sample_size: number of tokens to learn from.
    """
    if sample_size < LEAST_SAMPLE["pq"]:
        return []
    if importlib.util.find_spec("faiss") is None:
        log.warning("--codec auto: pq<M>, the smallest codecs, need faiss to learn; pip install 'fastmae[pq]' for them")
        return []
    return [f"pq{groups}" for groups in GROUPS if groups <= token_dim // 2]


def _smallest(names: Sequence[str], cosine: Callable[[str], float]) -> str | None:
    """The first of the names, smallest first, that keeps the cosine; None if none does.

    The largest of each three is tried first. A codec that is much larger than needed is not tried at all.
    """
    for first in range(0, len(names), 3):
        group = names[first : first + 3]
        if cosine(group[-1]) >= MIN_COSINE:
            return next(name for name in group if cosine(name) >= MIN_COSINE)
    return None


def _round_trip_cosine(codec: Codec, grids: torch.Tensor) -> float:
    """Mean cosine of decoded tokens to those that were encoded; 0 if the codec can't hold them."""
    try:
        codes, means = codec.encode_grids(grids)
    except InputError:
        return 0.0
    return mean_cosine(codec.decode_grids(torch.from_numpy(codes), torch.from_numpy(means)), grids)
