"""The command line's contract: exit codes, one line an error, --json, --config, --print-config."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

import fastmae
from fastmae import cli
from fastmae.cli import parse, run
from fastmae.config.commands import COMMANDS, Command
from fastmae.config.recipes import load_recipe, recipe_names
from fastmae.errors import InputError, add_note

# (arguments, what the one line must name)
BAD_USAGE = [
    (["tokenise"], "did you mean 'tokenize'"),
    (["pretrain", "a.tokens", "run", "--epohcs", "3"], "did you mean --epochs"),
    (["knn", "run", ".", "--sed", "3", "--bock=2"], "no option --sed (did you mean --seed?), --bock=2 (did you mean"),
    (["pretrain", "a.tokens"], "RUN"),
    (["inspect", "a.tokens", "extra"], "extra"),
    (["pretrain", "run"], "RUN"),
    (["pretrain", "a.tokens", "run", "--epochs", "many"], "--epochs"),
    (["pretrain", "a.tokens", "run", "--norm", "patc"], "'patch'"),
    (["pretrain", "a.tokens", "run", "--recipe", "vit_tiny_cpuu"], "did you mean 'vit_tiny_cpu'"),
    (["pretrain", "no-such.tokens", "run"], "no-such.tokens: does not exist; STORE is: "),
    (["tokenize", "no-such-folder", "out"], "no-such-folder: does not exist"),
    (["knn", "no-such-run", "data", "--device", "cpu"], "data: does not exist; DATA is: Folder with train/"),
    (["knn", "run", ".", "--k"], "--k: give a value"),
    (["pretrain", "a", "b", "--betas", "0.9"], "--betas: give 2 values"),
    (["inspect", "a", "--quality=3"], "--quality: takes no value"),
    (["knn", "run", ".", "--device", "cud"], "did you mean 'cuda'"),
    (["features", "run", ".", "out.csv"], "out.csv: give a file name that ends in .safetensors or .parquet"),
    (["features", "run", ".", "out.parquet", "--dense"], "--dense"),
    (["tokenize", ".", "out", "--middle-size", "100"], "--middle-size 100"),
    (["tokenize", ".", "out", "--codec", "zip"], "--codec zip"),
    (["tokenize", ".", "out", "--rank", "1"], "--world-size"),
    (["bench", "loader", ".", "--codecs", "fp16,fp16"], "--codecs fp16,fp16"),
    (["bench", "store", ".", "--jpeg-qualities", "90,x"], "--jpeg-qualities"),
    (["bench", "step", "--image-size", "100"], "--image-size 100"),
    (["bench", "step", "--teachers", "a", "--teachers", "a"], "--teachers a,a: a name is given twice"),
    (["linear", "run", ".", "--devices", "2"], "--augment none"),
    (["export", "run", "out", "--classifier", "--format", "transformers"], "--classifier"),
    (["bench"], "give what to do: bench step, bench loader, "),
    (["bench", "stepp"], "did you mean 'bench step'? there are bench step, bench loader, "),
    (["help", "knnn"], "did you mean 'knn'?"),
    (["inspect", "."], "not a token store"),
    (["pretrain", "a", "b", "--config", "no-such.yaml"], "no-such.yaml"),
    (["inspect", "a", "--device"], "--device"),
    (["inspect", "a", "--seed", "-1"], "--seed -1"),
]


@pytest.mark.parametrize(("args", "named"), BAD_USAGE, ids=[" ".join(args) for args, _ in BAD_USAGE])
def test_bad_usage_is_one_line_and_code_2(args, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert named in err
    assert list(tmp_path.iterdir()) == []


def test_what_the_arguments_tell_is_refused_before_torch_is_imported(fastmae_command, tmp_path):
    """All calls of BAD_USAGE but those that need to look into a file, in one process."""
    calls = [args for args, named in BAD_USAGE if named != "not a token store"]
    code = f"""
import sys
from fastmae.cli import run
assert [run(args) for args in {calls}] == {len(calls)} * [2]
sys.exit("torch" in sys.modules or "timm" in sys.modules)
"""
    done = subprocess.run([fastmae_command[0], "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(calls)


@pytest.mark.parametrize("args", [["help"], ["-h"], ["bench", "-h"], ["help", "bench"], ["bench", "--help"]])
def test_help_lists_the_commands(args, capsys):
    assert run(args) == 0
    out = capsys.readouterr().out
    assert "  bench accuracy  " in out
    assert ("  knn  " in out) == ("bench" not in args)


def test_help_with_a_command_is_the_commands_own(capsys):
    for args in (["help", "knn"], ["knn", "-h"], ["help", "bench", "step"]):
        with pytest.raises(SystemExit) as end:
            run(args)
        assert end.value.code == 0
        assert "usage: fastmae knn RUN DATA" in (out := capsys.readouterr().out) or "usage: fastmae bench step" in out


def test_both_flags_print_the_version(capsys):
    assert [run(["-V"]), run(["--version"])] == [0, 0]
    assert capsys.readouterr().out.splitlines() == 2 * [fastmae.__version__]


def test_the_values_of_an_option_that_takes_several_add_up():
    assert parse("report", ["run", "--also", "a,b", "--also", "c"]).also == "a,b,c"
    assert parse("knn", ["run", "data", "--k", "3", "--k", "4"]).k == 4  # as usual, the last one


def failing(error):
    """`Command.load` of a command that fails."""

    def work(_):
        raise error

    return lambda _: work


@pytest.mark.promise("machine")
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TypeError("a bug\nin two lines"), 1, "an error of fastmae's own: TypeError: a bug (cli.py:"),
        (KeyError("x"), 1, "an error of fastmae's own: KeyError: 'x' (cli.py:"),
        (MemoryError(), 2, "out of memory; step 3 is saved; give a smaller --batch-size and fewer --workers, and the"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory; step 3 is saved; "),
        (InputError("photo.jpg: damaged"), 2, "photo.jpg: damaged; step 3 is saved"),
    ],
)
def test_whatever_a_command_raises_is_one_line_with_what_was_saved(error, code, line, monkeypatch, capsys, tmp_path):
    add_note(error, "step 3 is saved")
    monkeypatch.setattr(Command, "load", failing(error))
    assert run(["knn", "r", str(tmp_path)]) == code
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith(f"fastmae knn: {line}")
    assert "step 3 is saved" in err
    assert err.rstrip().endswith("; --traceback shows all") == (code == 1)
    assert run(["knn", "r", str(tmp_path), "--traceback"]) == code
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.splitlines()[-1] == err.rstrip()


def test_a_crash_in_a_loading_process_names_the_place_in_the_process(monkeypatch, capsys):
    text = (
        'Caught TypeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "{}", '
    )
    text += 'line 7, in fetch\n  File "/torch/fetch.py", line 3\nTypeError: a bug'
    monkeypatch.setattr(Command, "load", failing(TypeError(text.format(Path(cli.__file__).parent / "decode.py"))))
    assert run(["recipes"]) == 1
    assert "own: TypeError: a bug (decode.py:7); --traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_common_flags(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run([command, "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--json", "--seed", "--device", "--config", "--print-config", "--traceback"))


@pytest.mark.parametrize("command", COMMANDS)
def test_print_config_prints_what_config_reads_back(command, capsys, tmp_path):
    assert run([command, "--print-config", "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["seed"] == 7
    file = tmp_path / "options.yaml"
    file.write_text(printed)
    assert run([command, "--print-config", "--config", str(file)]) == 0
    assert capsys.readouterr().out == printed


def test_each_layer_of_options_goes_over_the_one_before(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("epochs: 7\nbatch-size: 32\nflip: false\nbetas: [0.8, 0.9]\nstores: from-file.tokens\n")
    config = parse(
        "pretrain", ["--recipe", "vit_tiny_cpu", "--config", str(file), "--print-config", "--batch-size", "16"]
    )
    assert config.image_size == load_recipe("vit_tiny_cpu")["image_size"]  # recipe over default
    assert config.epochs == 7  # file over recipe
    assert config.batch_size == 16  # flag over file
    assert config.flip is False
    assert config.betas == (0.8, 0.9)
    assert config.stores == ("from-file.tokens",)


def test_words_after_two_dashes_may_begin_with_a_dash():
    config = parse("pretrain", ["--epochs", "3", "--", "-a.tokens", "--run"])
    assert (config.stores, config.run, config.epochs) == (("-a.tokens",), Path("--run"), 3)


def test_the_first_word_of_several_commands_lists_them(capsys):
    assert run(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS if command.startswith("bench "))
    assert "tokenize" not in out


@pytest.mark.parametrize(
    "args", ["a b run --epochs 3 --no-flip", "a --epochs 3 b --no-flip run", "--no-flip --epochs=3 a b run"]
)
def test_several_stores_and_the_run_may_stand_among_the_options(args):
    config = parse("pretrain", args.split())
    assert (config.stores, config.run, config.epochs, config.flip) == (("a", "b"), Path("run"), 3, False)


def test_the_pixel_target_brings_maes_decoder_and_loss_unless_told_otherwise():
    config = parse("pretrain", ["a", "b", "--target", "pixels"])
    assert (config.decoder_depth, config.loss, config.all_layers) == (8, "mse", False)
    assert parse("pretrain", ["a", "b", "--target", "pixels", "--decoder-depth", "2"]).decoder_depth == 2
    assert parse("pretrain", ["a", "b"]).decoder_depth == 1


def test_mask_ratio_0_brings_no_decoder_and_refuses_one():
    assert parse("pretrain", ["a", "b", "--mask-ratio", "0"]).decoder_depth == 0
    assert parse("pretrain", ["a", "b", "--mask-ratio", "0", "--recipe", "vit_base_60ep"]).decoder_depth == 0
    with pytest.raises(InputError, match="--decoder-depth 2"):
        parse("pretrain", ["a", "b", "--mask-ratio", "0", "--decoder-depth", "2"])


def test_muon_refuses_sharded_matrices():
    with pytest.raises(InputError, match="--optimizer muon"):
        parse("pretrain", ["a", "b", "--optimizer", "muon", "--strategy", "fsdp"])


@pytest.mark.parametrize("options", ["--fusion", "--decoder-class-token", "--loss-on all", "--target pixels"])
def test_without_a_decoder_what_needs_one_is_refused(options):
    with pytest.raises(InputError, match=options):
        parse("pretrain", ["a", "b", "--decoder-depth", "0", *options.split()])


def test_another_target_than_the_recipes_brings_its_own_values_over_the_recipe(tmp_path):
    def values(*args):
        config = parse("pretrain", ["a", "b", *args])
        return config.decoder_depth, config.loss, config.norm, config.all_layers

    assert values("--recipe", "vit_base_60ep", "--target", "pixels") == (8, "mse", "none", False)
    assert values("--recipe", "vit_base_60ep", "--target", "pixels", "--decoder-depth", "2") == (
        2,
        "mse",
        "none",
        False,
    )
    assert values("--recipe", "mae_300ep", "--target", "teacher") == (1, "auto", "auto", True)
    assert values("--recipe", "mae_300ep", "--target", "pixels") == values("--recipe", "mae_300ep")
    file = tmp_path / "options.yaml"
    file.write_text("recipe: mae_300ep\ntarget: tokens\nloss: cosine\n")
    assert values("--config", str(file)) == (1, "cosine", "auto", True)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epcohs: 3\n", "did you mean 'epochs'"),
        ("epochs: many\n", "--epochs"),
        ("- a\n- b\n", "option: value"),
        ("a: [", "YAML"),
    ],
)
def test_a_bad_config_file_is_named_with_the_way_out(text, named, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    assert run(["pretrain", "a", "b", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert str(file) in err
    assert named in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves(name, capsys):
    assert run(["pretrain", "--recipe", name, "--print-config"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for key, value in load_recipe(name).items():
        assert resolved[key] == (float(value) if isinstance(resolved[key], float) else value)


def test_recipes_as_json_end_with_one_object(capsys):
    assert run(["recipes", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["recipes"] == recipe_names()
    assert len(out.splitlines()) == 1


def python_lines(fastmae_command, code, modules):
    """What Python prints when it runs some code, and then which of the named modules were imported."""
    code = f"""
try:
    {code}
except SystemExit:
    pass
print(sorted(set({modules!r}.split()) & set(sys.modules)))
"""
    done = subprocess.run([fastmae_command[0], "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_help_imports_no_heavy_library(fastmae_command):
    probe = "import sys, fastmae.cli; fastmae.cli.run(['pretrain', '--help'])"
    lines = python_lines(fastmae_command, probe, "torch timm lightning_fabric")
    assert "usage: fastmae pretrain STORE... RUN [options]" in lines
    assert lines[-1] == "[]"


@pytest.mark.slow
def test_pretraining_starts_without_what_it_does_not_need(fastmae_command):
    probe = "import sys, fastmae.pretraining.pretrain"
    assert python_lines(fastmae_command, probe, "torchmetrics transformers scipy sklearn pandas") == ["[]"]


def test_a_reader_that_has_enough_is_no_error(fastmae_command):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*fastmae_command, "recipes"], check=False, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
