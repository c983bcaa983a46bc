"""The README.md of an export: what it is, how to load it, how it was made, with front matter as the hub reads it."""

from pathlib import Path

import jinja2

from fastmae import __version__
from fastmae.exporting.format import Exported, Format
from fastmae.exporting.provenance import Facts, Provenance

CARD_FILE = "README.md"
TITLES = {"pretraining": "pre-trained with fastmae", "supervised": "trained with fastmae", "other": "as it was"}
"""A `Provenance.kind` in words."""


def write_card(
    folder: Path, model: Exported, format_name: str, how: Format, made: Provenance, difference: float
) -> None:
    """Write the card; its lines of Python run in the folder.

    Args:
        folder: of the export.
        model: what was exported.
        format_name: as it is asked for.
        how: the format.
        made: how it was made.
        difference: the largest that the check found.
    """
    network = model.network
    text = _template().render(
        library=how.library, tags=_tags(model, how, made), title=f"{model.architecture}, {TITLES[made.kind]}", format=format_name,
        version=__version__, architecture=model.architecture, depth=len(network.blocks), width=network.embed_dim,
        heads=network.blocks[0].attn.num_heads, millions=f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}",
        image_size=model.image_size, patch_size=model.patch_size, channels=model.channels, preparation=_preparation(model),
        mean=_rounded(model.mean), std=_rounded(model.std), usage=how.usage(model, "."), made=made, classes=model.classes,
        tables=_for_tables(made.facts), difference=f"{difference:.1e}",
    )  # fmt: skip
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))


def _tags(model: Exported, how: Format, made: Provenance) -> list[str]:
    use = "image-classification" if model.classes else "image-feature-extraction"
    method = ["masked-image-modeling", "self-supervised-learning"] if made.kind == "pretraining" else []
    return ["fastmae", how.library, "vision-transformer", use, *method]


def _preparation(model: Exported) -> str:
    side = f"resized to {model.image_size} x {model.image_size} px (bicubic)"
    if model.crop == "whole":
        return f"the whole picture, whatever its shape, {side}"
    part = "" if model.crop_share == 1 else f", of {100 * model.crop_share:.3g} % of its shorter side"
    return f"the middle square of the picture{part}, {side}"


def _rounded(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _for_tables(facts: Facts) -> Facts:
    """A bar or a line break in a value would break its row."""
    return {
        heading: {name: " ".join(value.replace("|", "\\|").split()) for name, value in rows.items()}
        for heading, rows in facts.items()
    }
