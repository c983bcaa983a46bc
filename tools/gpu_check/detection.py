"""Detection on real boxes, which a checkout does not hold: `--detect RUN DATA`."""

from gpu_check.every_command import tell
from gpu_check.report import Report
from gpu_check.setting import Setting

EPOCHS = "12"


def detection(setting: Setting, report: Report) -> None:
    """A Mask R-CNN on the given encoder and data finds something."""
    assert setting.detect is not None
    run, data = map(str, setting.detect)
    call = ["detect", run, data, "--out", str(setting.work / "detect"), "--epochs", EPOCHS]
    outcome = setting.commands.run([*call, "--device", setting.device])
    tell(report, "detect on real boxes", outcome)
    if outcome.code == 0:
        found = outcome.result["box_ap"]
        report.check("detect finds boxes", found > 0, "an AP above 0", f"AP {found:.2f}")
