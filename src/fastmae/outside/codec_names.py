"""The names of codecs, as options and stores give them. What the codecs do is in `tokens.codec`."""

import re
from dataclasses import dataclass
from typing import Literal, cast

from fastmae.errors import InputError

Family = Literal["fp32", "fp16", "int8", "pq"]


@dataclass(frozen=True)
class CodecName:
    """The parts of a codec's name.

    Attributes:
        family: the name without its number.
        size: M of pq<M>, bytes a token; 0 for the other families.
    """

    family: Family
    size: int = 0


def parse_codec(name: str) -> CodecName:
    """Parse a codec's name.

    Raises:
        InputError: no such codec.
    """
    if name in ("fp32", "fp16", "int8"):
        return CodecName(cast(Family, name))
    product = re.fullmatch(r"pq([1-9][0-9]{0,4})", name)
    if product is None:
        known = "fp16, fp32, int8, or pq<M> with M bytes per token, as pq48; `tokenize` also takes auto"
        raise InputError(f"--codec {name}: no such codec; give {known}")
    return CodecName("pq", int(product[1]))


def codec_names(option: str) -> list[str]:
    """The value of `--codecs`: codec names separated by commas.

    Raises:
        InputError: no name, an unknown name, or the same name twice.
    """
    names = [name.strip() for name in option.split(",")]
    for name in names:
        parse_codec(name)
    if len(set(names)) < len(names):
        raise InputError(f"--codecs {option}: lists a codec twice")
    return names
