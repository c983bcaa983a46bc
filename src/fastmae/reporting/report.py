"""`fastmae report`: one HTML page of a run: settings, data, curves, what it predicts, where it looks, what it finds alike, results."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastmae.config import ReportConfig
from fastmae.errors import InputError
from fastmae.reporting.charts import Curves
from fastmae.reporting.insight import attention_maps, nearest_neighbours
from fastmae.reporting.page import Section, write_page
from fastmae.reporting.pictures import predictions
from fastmae.runs.encoder import load_encoder
from fastmae.runs.folder import CHECKPOINT_FILE, RUN_FILE, read_evaluations, read_inputs, read_metrics, read_run
from fastmae.tokens import TokenStore
from fastmae.tokens.reader import open_scales

SETTINGS = (
    "encoder", "encoder_width", "encoder_depth", "encoder_heads", "image_size", "mask_ratio", "mask", "target", "norm", "loss", "loss_on",
    "all_layers", "all_layers_weight", "fusion", "decoder_depth", "decoder_width", "decoder_heads", "flip", "epochs", "warmup_epochs",
    "batch_size", "base_lr", "min_lr", "weight_decay", "betas", "clip_grad", "ema", "init", "seed", "precision",
)  # fmt: skip
PICTURES_OF = ("confusion.png", "predictions.png", "detections.png")
"""What finetune and linear, segment, and detect draw."""
MOST_POINTS = 1000
"""Of a curve."""


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page; the command's JSON.

    Raises:
        InputError: no run of pre-training there, or a store or another input that can't be had.
    """
    description = read_run(config.run)
    if "store" not in description:
        raise InputError(
            f"{config.run}: a run of `fastmae {description.get('task')}`; give a pre-training run, and this one as --also"
        )
    if config.images < 1 or config.gallery < 2:
        raise InputError(f"--images {config.images}, --gallery {config.gallery}: give at least 1 and 2")
    also = [_also(Path(part)) for part in config.also.split(",") if part]
    entries, evaluations = read_metrics(config.run), read_evaluations(config.run)
    if not entries or not (config.run / CHECKPOINT_FILE).exists():
        raise InputError(f"{config.run}: nothing to show; the run has not saved a checkpoint yet")
    sections = [
        *_curves(entries, evaluations),
        *_pictures(config, _store(config)),
        *also,
        Section(
            "Settings", rows=[{"option": name, "value": _plain(description["options"].get(name))} for name in SETTINGS]
        ),
        Section(
            "Images and store",
            rows=[{"what": name, "value": value} for name, value in _data(description["store"]).items()],
        ),
    ]
    page = config.out or config.run / "report.html"
    write_page(page, f"{config.run.resolve().name}", _lead(description, entries[-1], evaluations), sections)
    print(f"{page}: open it in a browser")
    return {"html": str(page), "sections": [section.heading for section in sections]}


def _lead(description: dict[str, Any], last: dict[str, Any], evaluations: list[dict[str, Any]]) -> str:
    options, store = description["options"], description["store"]
    teacher = ", ".join(teacher["spec"] for teacher in store["teachers"])
    learnt = f"; kNN {evaluations[-1]['knn_top1']:.1f} %" if evaluations and "knn_top1" in evaluations[-1] else ""
    what = {"pixels": "MAE's pixels", "hog": "HOG", "teacher": f"{teacher}, online"}.get(
        options["target"], f"{teacher}'s stored tokens"
    )
    return (
        f"{options['encoder']} at {options['image_size']} px on {store['images']:,} images, predicting {what}: "
        f"{last['epoch']:.0f} of {options['epochs']} epochs in {last['seconds']:.0f} s, loss {last['loss']:.4f}{learnt}."
    )


def _curves(entries: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[Section]:
    shown = entries[:: max(1, len(entries) // MOST_POINTS)]
    layers = (
        {"layers, visible patches": [{**e, "loss": e["layers_loss"]} for e in shown]}
        if shown[-1]["layers_loss"]
        else {}
    )
    losses = {"decoder, masked patches": [{**e, "loss": e["decoder_loss"]} for e in shown], **layers}
    charts = [Curves(losses, "epoch", "loss", "epoch", "loss").svg()]
    measured = [entry for entry in evaluations if "knn_top1" in entry]
    if measured:
        knn = {"top-1": measured, "top-5": [{**entry, "knn_top1": entry["knn_top5"]} for entry in measured]}
        charts.append(Curves(knn, "epoch", "knn_top1", "epoch", "kNN %").svg())
    for key, label in (
        ("lr", "learning rate"),
        ("images_per_second", "images a second"),
        ("grad_norm", "norm of the gradient"),
    ):
        charts.append(Curves({label: shown}, "epoch", key, "epoch", label).svg())
    return [Section("How it went", charts=charts)]


def _pictures(config: ReportConfig, store: TokenStore) -> list[Section]:
    images = min(config.images, len(store))
    encoder = load_encoder(config.run)
    sections = [
        Section(
            "What it predicts",
            "Features as colours, by the first three principal components of the wanted ones. The encoder saw the visible patches alone.",
            picture=predictions(config.run, store, images, config.seed),
        )
    ]
    try:
        heads = attention_maps(encoder, store, images)
        sections.append(
            Section(
                "Where the last block looks",
                "Attention of the class token; the heads shown are the sharpest.",
                picture=heads,
            )
        )
    except InputError as error:
        sections.append(Section("Where the last block looks", f"Not drawn: {error}."))
    found = nearest_neighbours(encoder, store, images, config.gallery)
    text = f"By the cosine of mean patch tokens, among {min(config.gallery, len(store)):,} images of the store; no label was seen."
    return [*sections, Section("What it finds alike", text, picture=found)]


def _store(config: ReportConfig) -> TokenStore:
    location = config.store or next(iter(read_inputs(config.run).get("stores", ())), "")
    if not location:
        raise InputError(f"{config.run}: does not say where its token store is; give --store STORE")
    try:
        store = open_scales(location, config.cache.expanduser(), int(config.cache_size * 1e9))[-1]
    except InputError as error:
        raise InputError(f"{error}; where it was moved, give --store STORE") from error
    made_of = read_run(config.run)["store"]["images_sha256"]
    if store.info.images_sha256 != made_of:
        raise InputError(f"{location}: holds other images than the run was trained on; give --store STORE")
    return store


def _also(path: Path) -> Section:
    """A section of a supervised run, or of a bench's table."""
    table = path / "accuracy.md"  # in the folder of `bench accuracy`
    if path.suffix == ".md" or table.is_file():
        return _table_of(path if path.suffix == ".md" else table)
    if not (path / RUN_FILE).is_file():
        raise InputError(
            f"--also {path}: no such run; give folders of finetune, linear, segment, detect or bench accuracy, or a table (.md)"
        )
    description, evaluations = read_run(path), read_evaluations(path)
    if "task" not in description or not evaluations:
        raise InputError(f"{path}: no finished run of finetune, linear, segment or detect, and no table of bench (.md)")
    last = {name: value for name, value in evaluations[-1].items() if name not in ("step", "seconds")}
    picture = next((path / name for name in PICTURES_OF if (path / name).exists()), None)
    settings = description["settings"]
    text = f"{settings['images']:,} images, {settings['epochs']} epochs of batches of {settings['batch_size']}, rate {settings['lr']:.2e}."
    rows = [{"figure": name, "value": _plain(value)} for name, value in last.items()]
    return Section(f"{description['task']}: {path.name}", text, rows, picture.read_bytes() if picture else None)


def _table_of(path: Path) -> Section:
    """What a bench wrote: its table, and the figure of the same name beside it."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give what `fastmae bench ... --out` wrote")
    lines = path.read_text(encoding="utf-8").splitlines()
    table = [
        [cell.strip().replace("\\|", "|") for cell in line.strip("| ").split(" | ")]
        for line in lines
        if line.startswith("|")
    ]
    if len(table) < 3 or any(len(row) != len(table[0]) for row in table):
        raise InputError(f"{path}: holds no table; give what `fastmae bench ... --out` wrote")
    title = next((line.lstrip("# ") for line in lines if line.startswith("#")), path.stem)
    text = "; ".join(line[2:] for line in lines if line.startswith("- "))
    after = next(number for number, line in reversed(list(enumerate(lines))) if line.startswith("|"))
    notes = [line for line in lines[after + 1 :] if line]
    figure = path.with_suffix(".png")
    picture = figure.read_bytes() if figure.is_file() else None
    return Section(title, text, [dict(zip(table[0], row, strict=True)) for row in table[2:]], picture, notes=notes)


def _data(store: dict[str, Any]) -> dict[str, str]:
    return {
        "images": f"{store['images']:,}",
        "list (SHA-256)": store["images_sha256"],
        "middle image": ", ".join(f"{size} px" for size in store["middle_sizes"]),
        "patch": f"{store['patch_size']} px",
        "codec": store["codec"],
        "pixels": f"jpeg, quality {store['jpeg_quality']}" if store["pixels"] == "jpeg" else store["pixels"],
        "teacher": "; ".join(
            f"{t['spec']}{_weights(t)}, block {t['block']}, norm {t['norm']}" for t in store["teachers"]
        ),
        "teacher's weights (SHA-256)": "; ".join(t["weights_sha256"] for t in store["teachers"]),
    }


def _weights(teacher: dict[str, Any]) -> str:
    """The name of the file that a teacher's weights came from, where it is not the hub's."""
    file = teacher.get("weights_file")
    return f" with {Path(file).name}" if file and not teacher["spec"].endswith(Path(file).name) else ""


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "the encoder's own"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return (
        ", ".join(_plain(part) for part in value)
        if isinstance(value, Iterable) and not isinstance(value, str)
        else str(value)
    )
