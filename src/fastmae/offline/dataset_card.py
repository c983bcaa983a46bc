"""The README.md of a token store: front matter for the hub, what the store holds, who may see what, how it was made.

All of it follows from the store, so a continued store gets the same card. Licences are left to be filled in.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from fastmae import __version__
from fastmae.images.value_range import AUTO
from fastmae.outside.regular_file import read_bounded
from fastmae.runtime.cards import CARD_FILE, LARGEST_CARD, is_unedited, signed
from fastmae.runtime.durable import write_whole
from fastmae.tokens import TokenStore

log = logging.getLogger(__name__)

SIZES = (
    ("n<1K", 1e3),
    ("1K<n<10K", 1e4),
    ("10K<n<100K", 1e5),
    ("100K<n<1M", 1e6),
    ("1M<n<10M", 1e7),
    ("10M<n<100M", 1e8),
)
"""The hub's names for numbers of images, and where each ends."""


def keep_card(folder: Path, stores: Sequence[TokenStore]) -> None:
    """Write a finished store's card, or bring it up to date. One that somebody has edited stays as it is.

    Args:
        folder: of the whole store, with all its middle sizes.
        stores: one for each middle size.
    """
    file, card = folder / CARD_FILE, dataset_card(stores).encode()
    try:
        there = read_bounded(file, LARGEST_CARD) if file.exists() else None
        if there is not None and not is_unedited(there):
            log.info(f"{file}: was edited, and stays as it is")
        elif there != card:
            write_whole(file, lambda aside: aside.write_bytes(card))
    except OSError as error:  # a store on a read-only disk, say, needs none
        log.warning(f"{file}: could not be written ({error.strerror}); the store is complete without it")


def dataset_card(stores: Sequence[TokenStore], address: str = ".") -> str:
    """The text of the card.

    Args:
        stores: one for each middle size.
        address: the store's URL. By default, its commands are for somebody who is in the store's folder: the same
            store has the same card, whatever its folder is called.
    """
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(Path(__file__).with_name("dataset_card.md").read_text(encoding="utf-8"))
    info = stores[0].info
    quality = f"JPEG, quality {info.jpeg_quality}" if info.pixels == "jpeg" else "raw pixels"
    contents = {name: value.replace("|", "\\|") for name, value in _contents(stores).items()}
    text = template.render(
        title="Token store" if address == "." else address.rstrip("/").rpartition("/")[2],
        images=f"{len(stores[0]):,}",
        size_category=next((name for name, end in SIZES if len(stores[0]) < end), "100M<n<1B"),
        middle_sizes=_sizes(stores, " and "),
        pixels=quality,
        address=address,
        usage=_usage(stores, address),
        contents=contents,
        command=_command(stores),
        version=__version__,
    )
    return signed(text)


def _usage(stores: Sequence[TokenStore], address: str) -> str:
    """Three lines of Python that open the store."""
    folder = address if len(stores) == 1 else f"{address}/{stores[0].info.middle_size}"
    view = "store.view(index=0, row=0, col=0, size=1)  # a patch: its pixels and its tokens"
    return f'import fastmae\n\nstore = fastmae.TokenStore("{folder}")\nview = {view}'


def _contents(stores: Sequence[TokenStore]) -> dict[str, str]:
    info = stores[0].info
    teacher = info.teacher
    grids = ", ".join(f"{store.grid} x {store.grid}" for store in stores)
    averaged = f", averaged with the {teacher['last'] - 1} before it" if teacher["last"] > 1 else ""
    values = {
        "images": f"{len(stores[0]):,}",
        "files that could not be decoded": f"{stores[0].skipped:,}",
        "size": f"{sum(store.manifest.total_bytes() for store in stores) / 1e6:,.1f} MB",
        "shards": f"{sum(store.info.shards for store in stores):,} of up to {info.shard_size} images",
        "middle images": f"{_sizes(stores, ', ')} px, {info.channels} channels, resize {info.resize}, {info.pixels}",
        "tokens": f"{grids} of {info.token_dim} channels for each image, patches of {info.patch_size} px",
        "codec": info.codec,
        "flips": info.flips,
        "teacher": _teacher_name(stores[0]),
        "teacher: features": f"block {teacher['block']}{averaged}, norm {teacher['norm']}, "
        f"input of {teacher['input_size']} px, {teacher.get('precision', '32-true')}",
        "teacher: SHA-256 of the weights": teacher["weights_sha256"],
        "SHA-256 of the image list": info.images_sha256,
    }
    return values if info.value_range == AUTO else {**values, "value range": info.value_range}


def _command(stores: Sequence[TokenStore]) -> str:
    """The call of `tokenize` that makes such a store, without the user's paths."""
    info = stores[0].info
    teacher = info.teacher
    options = {
        "teacher": _teacher_name(stores[0]),
        "teacher-block": teacher["block"],
        **({"teacher-last": teacher["last"]} if teacher["last"] > 1 else {}),
        "teacher-norm": teacher["norm"],
        "teacher-size": teacher["input_size"],
        **({"teacher-weights": Path(teacher["weights_file"]).name} if _has_own_weights(teacher) else {}),
        "precision": teacher.get("precision", "32-true"),
        "middle-size": _sizes(stores, ","),
        "patch-size": info.patch_size,
        **({"channels": info.channels} if info.channels != 3 else {}),
        "teacher-channels": ",".join(map(str, teacher["channels"])),
        "resize": info.resize,
        **({"value-range": info.value_range} if info.value_range != AUTO else {}),
        "codec": info.codec,
        "flips": info.flips,
        "pixels": info.pixels,
        **({"jpeg-quality": info.jpeg_quality} if info.pixels == "jpeg" else {}),
        "shard-size": info.shard_size,
    }
    words = [f"--{name} {value}" for name, value in options.items()]
    lines = [" ".join(words[start : start + 4]) for start in range(0, len(words), 4)]
    added = "\n".join(["", *["fastmae tokenize IMAGES STORE ... --add"] * (len(info.parts) - 1)])
    return " \\\n  ".join(["fastmae tokenize IMAGES STORE", *lines]) + added.rstrip()


def _teacher_name(store: TokenStore) -> str:
    """The teacher as on the command line; of a file or a folder of the user's, only the last part."""
    spec: str = store.info.teacher["spec"]
    kind, _, name = spec.partition("/")
    is_local = kind == "file" or (kind == "hf" and store.info.teacher["weights_file"])
    return f"{kind}/{Path(name).name}" if is_local else spec


def _has_own_weights(teacher: dict[str, Any]) -> bool:
    """Whether the user gave a file of weights for a network that has its own."""
    return bool(teacher["weights_file"]) and teacher["spec"].startswith(("timm/", "clip/"))


def _sizes(stores: Sequence[TokenStore], between: str) -> str:
    return between.join(str(store.info.middle_size) for store in stores)
