from fastmae.runtime.processes import Process, this_process

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "3(x2)"}


def test_the_innermost_launcher_numbers_a_process(monkeypatch):
    assert this_process() == Process()
    monkeypatch.setenv("SLURM_PROCID", "0")  # the shell of a batch script, outside any step
    monkeypatch.setenv("SLURM_NTASKS", "6")
    assert this_process() == Process()
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert this_process() == Process(2, 6, 2, 3, "srun")
    for name, value in TORCHRUN.items():  # torchrun inside an srun step
        monkeypatch.setenv(name, value)
    assert this_process() == Process(5, 8, 1, 4, "torchrun")
