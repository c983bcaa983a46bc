"""The README.md of an export: front matter for the hub, what the model is, how to load it and how it was made."""

from pathlib import Path

import jinja2

from fastmae import __version__
from fastmae.exporting.export_format import ExportFormat
from fastmae.exporting.exported_model import ExportedModel
from fastmae.exporting.provenance import Facts, Provenance

CARD_FILE = "README.md"
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
    network = model.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    text = _template().render(
        library=export_format.library,
        tags=_tags(model, export_format, provenance),
        title=f"{model.architecture}, {TITLES[provenance.kind]}",
        format=format_name,
        version=__version__,
        architecture=model.architecture,
        depth=len(network.blocks),
        width=network.embed_dim,
        heads=network.blocks[0].attn.num_heads,
        millions=f"{parameters / 1e6:.1f}",
        image_size=model.image_size,
        patch_size=model.patch_size,
        channels=model.channels,
        preparation=_preparation(model),
        mean=_rounded(model.mean),
        std=_rounded(model.std),
        usage=export_format.usage(model, "."),
        provenance=provenance,
        classes=model.classes,
        tables=_escape_cells(provenance.facts),
        difference=f"{difference:.1e}",
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=False, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))


def _tags(model: ExportedModel, export_format: ExportFormat, provenance: Provenance) -> list[str]:
    task = "image-classification" if model.classes else "image-feature-extraction"
    method = ["masked-image-modeling", "self-supervised-learning"] if provenance.kind == "pretraining" else []
    return ["fastmae", export_format.library, "vision-transformer", task, *method]


def _preparation(model: ExportedModel) -> str:
    resized = f"is resized to {model.image_size} x {model.image_size} px (bicubic)"
    if model.crop == "whole":
        return f"The whole picture {resized}, whatever its shape."
    if model.crop_share == 1:
        return f"The middle square of the picture {resized}."
    share = f"{100 * model.crop_share:.3g} % of the picture's shorter side"
    return f"A middle square with a side of {share} {resized}."


def _rounded(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _escape_cells(facts: Facts) -> Facts:
    """The facts with bars escaped and line breaks removed, since either would break a table row."""
    return {
        heading: {name: " ".join(value.replace("|", "\\|").split()) for name, value in rows.items()}
        for heading, rows in facts.items()
    }
