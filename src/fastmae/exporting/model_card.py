"""The README.md of an export: front matter for the hub, what the model is, how to load it and how it was made."""

from pathlib import Path

import jinja2

from fastmae import __version__
from fastmae.exporting.export_format import ExportFormat
from fastmae.exporting.exported_model import ExportedModel
from fastmae.exporting.provenance import Facts, Provenance
from fastmae.images.value_range import AUTO, PERCENTILES, bounds_of
from fastmae.runtime.cards import CARD_FILE, signed
from fastmae.runtime.wording import counted
from fastmae.student.encoder import number_of_heads

TITLES = {
    "pretraining": "pre-trained with fastmae",
    "supervised": "trained with fastmae",
    "other": "exported unchanged",
}
"""`Provenance.kind` in words."""


def write_model_card(
    folder: Path,
    model: ExportedModel,
    format_name: str,
    export_format: ExportFormat,
    provenance: Provenance,
    difference: float,
) -> None:
    """Write the card. Its Python code runs as it stands in the exported folder.

    Args:
        folder: the exported folder.
        model: the exported model.
        format_name: value of `--format`.
        export_format: the format of that name.
        provenance: how the weights were made.
        difference: largest difference between the model's outputs and those computed from the exported files.
    """
    text = _template().render(
        library=export_format.library,
        read_by=export_format.read_by,
        tags=_tags(model, export_format, provenance),
        title=f"{model.architecture}, {TITLES[provenance.kind]}",
        format=format_name,
        version=__version__,
        network=_network(model),
        channels=model.channels,
        preparation=_preparation(model) + _mapping(model.value_range),
        mean=_rounded(model.mean),
        std=_rounded(model.std),
        usage=export_format.usage(model, "."),
        provenance=provenance,
        classes=model.classes,
        tables=_escape_cells(provenance.facts),
        difference=f"{difference:.1e}",
    )
    (folder / CARD_FILE).write_text(signed(text), encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))


def _network(model: ExportedModel) -> str:
    """The network in a sentence or two."""
    network, size = model.network, f"{model.image_size} x {model.image_size} px"
    millions = f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} M parameters"
    if model.is_vit:
        return (
            f"A vision transformer ({model.architecture}: {counted(len(network.blocks), 'block')} of width "
            f"{model.dim}, {counted(number_of_heads(network), 'head')}, {millions}).\n"
            f"It takes images of {size} in patches of {model.patch_size} px."
        )
    return (
        f"A network of timm ({model.architecture}, {millions}).\n"
        f"Of images of {size} it gives a map of {model.grid} x {model.grid} positions with {model.dim} features. "
        "The mean of the map is the image's embedding."
    )


def _tags(model: ExportedModel, export_format: ExportFormat, provenance: Provenance) -> list[str]:
    task = "image-classification" if model.classes else "image-feature-extraction"
    method = []
    if provenance.kind == "pretraining":
        is_masked = provenance.facts["Pre-training settings"]["mask ratio"] != "0"
        method = ["masked-image-modeling" if is_masked else "knowledge-distillation", "self-supervised-learning"]
    kind = ["vision-transformer"] if model.is_vit else []
    return ["fastmae", export_format.library, *kind, task, *method]


def _preparation(model: ExportedModel) -> str:
    resized = f"is resized to {model.image_size} x {model.image_size} px (bicubic)"
    if model.crop == "whole":
        return f"The whole picture {resized}, whatever its shape."
    if model.crop_share == 1:
        return f"The middle square of the picture {resized}."
    share = f"{100 * model.crop_share:.3g} % of the picture's shorter side"
    return f"A middle square with a side of {share} {resized}."


def _mapping(value_range: str) -> str:
    """How values of more than 8 bits are brought to 8, in a sentence; nothing for `auto`."""
    if value_range == AUTO:
        return ""
    bounds = bounds_of(value_range)
    low, high = value_range.split() if bounds else (f"its {percent:g}th percentile" for percent in PERCENTILES)
    image = "Values" if bounds else "Each image's values"
    return f" {image} of more than 8 bits are first mapped linearly, from {low} (0) to {high} (255), and clipped."


def _rounded(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _escape_cells(facts: Facts) -> Facts:
    """The facts with bars escaped and line breaks removed, since either would break a table row."""
    return {
        heading: {name: " ".join(value.replace("|", "\\|").split()) for name, value in rows.items()}
        for heading, rows in facts.items()
    }
