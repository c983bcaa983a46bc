"""fastmae's own benchmarks: FastMAE's step beside MAE's, what a step does by count, the loader, and the store."""

from gpu_check.commands import Outcome
from gpu_check.every_command import tell
from gpu_check.report import Goal, Report
from gpu_check.setting import Setting

TOY_STEP = "--encoder vit_tiny_patch16_224 --encoder-depth 2 --image-size 32 --middle-size 64 --batch-size 4".split()
ROWS = "published,mae,offline,visible"
KERNELS, MEGABYTES = Goal(900, at_most=True), Goal(150, at_most=True)
"""Of the default ViT-B, by count."""
DELIVERED, HOST_MILLISECONDS, COSINE = Goal(0.9), Goal(1.5, at_most=True), Goal(0.999)
LOADER = "--sample 512 --batch-size 256 --rounds 3 --codecs fp16,pq38".split()
TOY_LOADER = "--sample 16 --batch-size 8 --rounds 1 --codecs fp16 --image-size 32 --workers 0".split()
STORE = "--limit 512 --codec-images 128 --codecs fp16,pq38 --rounds 2".split()
TOY_STORE = "--limit 16 --codec-images 8 --codecs fp16 --rounds 1 --workers 0".split()


def bench_step(setting: Setting, report: Report) -> None:
    """`bench step`: the rows that need no online teacher."""
    size = [] if setting.on_gpu else [*TOY_STEP, "--threads", "1", "--rounds", "1"]
    table = str(report.folder / "step.md")
    call = ["bench", "step", "--rows", ROWS, "--teachers", setting.sizes.teacher, "--device", setting.device]
    outcome = setting.commands.run([*call, *size, "--out", table])
    tell(report, "bench step", outcome)
    for row in outcome.result.get("rows", []):
        name = f"bench step, {row['method']}"
        report.figure(name, row["images_per_second"], "views/s")
        report.figure(f"{name}: memory", row["memory_mb"], "MB")
        report.figure(f"{name}: times MAE", row["times_mae"])


def bench_count(setting: Setting, report: Report) -> None:
    """`bench step --count`: kernels, bytes and operations of a step."""
    size = [] if setting.on_gpu else TOY_STEP
    outcome = setting.commands.run(
        ["bench", "step", "--count", "--rows", "offline", "--teachers", setting.sizes.teacher, *size]
    )
    tell(report, "bench step --count", outcome)
    if outcome.code == 0:
        report.figure("kernels of a step, by count", outcome.result["kernels"], "", KERNELS)
        report.figure("memory traffic by count", outcome.result["bytes_per_image"] / 1e6, "MB/view", MEGABYTES)
        report.figure("operations by count", outcome.result["flops_per_image"] / 1e9, "GFLOP/view")


def bench_loader(setting: Setting, report: Report) -> None:
    """`bench loader`: views that one core delivers to the training process."""
    outcome = _on_photos(setting, "loader", LOADER if setting.on_gpu else TOY_LOADER)
    tell(report, "bench loader on photos", outcome)
    for row in outcome.result.get("rows", []):
        if row["first_pass_images_per_second"] is not None:  # one row of each store
            report.figure(f"{row['method']}: delivered by a core", row["delivered_views_per_second"], "views/s")
            name = f"{row['method']}: delivered / the reader alone"
            report.figure(name, row["delivered_over_reader"], "", DELIVERED)


def bench_store(setting: Setting, report: Report) -> None:
    """`bench store`: the host's time for an image, and what precisions do to the tokens."""
    outcome = _on_photos(setting, "store", STORE if setting.on_gpu else TOY_STORE)
    tell(report, "bench store on photos", outcome)
    for row in outcome.result.get("rows", []):
        name = f"the host's time for an image, {row['codec']}"
        report.figure(name, row["host_ms_per_image"], "ms", HOST_MILLISECONDS)
    if outcome.code == 0:
        report.figure("tokenize, fp16 / the bare teacher, by bench store", outcome.result["building"]["ratio"])
    for precision, cosine in outcome.result.get("precisions", {}).items():
        report.figure(f"cosine of tokens in {precision} to fp32's", cosine, "", COSINE)


def _on_photos(setting: Setting, bench: str, options: list[str]) -> Outcome:
    size = ["--middle-size", str(setting.sizes.middle), "--device", setting.device]
    return setting.commands.run(["bench", bench, str(setting.photos), *setting.teacher, *size, *options])
