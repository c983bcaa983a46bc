"""The order of a study's runs."""

from fastmae.probes.labelled import open_labelled
from fastmae.runtime.durable import write_json
from fastmae.studies.jobs import Outcome
from fastmae.studies.study_call import StudyCall
from fastmae.studies.study_results import speed_key
from fastmae.studies.worker import DONE

STUDY = """
base: {encoder_depth: 2, encoder_width: 64, encoder_heads: 2, image_size: 64, epochs: 1}
seeds: 2
arms: {a: {tune: {base_lr: [8.0e-3, 1.6e-2]}}}
"""


def test_a_candidate_is_chosen_when_the_jobs_of_all_have_ended(runs_of, photos):
    runs = runs_of(STUDY)
    speeds = {speed_key(one): {"images_per_second": 9.0, "embed_images_per_second": 9.0} for one in runs.variants()}
    call = StudyCall(runs, {"photos": open_labelled(photos)}, speeds)
    tuning = call.first_jobs()
    assert [job.about[1:] for job in tuning] == [(0, "held-out")] * 2
    call.announce()
    for job, accuracy in zip(tuning, (40.0, 60.0), strict=True):
        call.begin(job)
        write_json(job.file.with_name("held-out.json"), {"knn": accuracy, "linear": 50.0})
    assert call.finished(tuning[0], Outcome(DONE, "")) == []  # the other one is measured, but its job runs
    chosen = call.finished(tuning[1], Outcome(DONE, ""))
    assert [job.about for job in chosen] == [(tuning[1].about[0], seed, "val") for seed in (0, 1)]
