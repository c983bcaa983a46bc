"""The commands as functions: what they take, what they return, that they print nothing."""

import inspect
import json
import subprocess

import pytest
import timm
import torch

import fastmae
from fastmae import api
from fastmae.cli import run
from fastmae.config.commands import COMMANDS
from fastmae.config.options import positionals
from fastmae.config.resolve import COMMAND_LINE_ONLY


def test_every_command_is_a_function_of_the_package():
    for name in COMMANDS:
        assert callable(getattr(fastmae, name.replace(" ", "_"))), name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_function_takes_the_commands_arguments_in_their_order_and_its_flags_as_keywords(command):
    kind = COMMANDS[command].kind
    parameters = inspect.signature(getattr(api, command.replace(" ", "_"))).parameters
    in_order = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert in_order == positionals(kind)
    assert set(parameters) == {*vars(kind(**dict.fromkeys(positionals(kind), "targets")))} - {*COMMAND_LINE_ONLY}
    assert all(parameter.annotation is not parameter.empty for parameter in parameters.values())


def test_a_function_returns_what_the_command_prints_as_json_and_prints_nothing(vit_store, capsys):
    assert run(["inspect", str(vit_store), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert fastmae.inspect(vit_store) == printed


def test_training_from_python_prints_nothing_and_logs_its_progress(vit_store, photos, tmp_path, fastmae_command):
    script = f"""
import logging, fastmae
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("fastmae").addHandler(handler)
logging.getLogger("fastmae").setLevel("INFO")
options = dict(recipe="vit_tiny_cpu", epochs=1, image_size=64, encoder_depth=2, workers=0, device="cpu")
result = fastmae.pretrain({str(vit_store)!r}, {str(tmp_path / "run")!r}, **options)
assert result["epochs"] == 1 and result["checkpoint"].endswith("checkpoint.pt"), result
top1 = fastmae.knn({str(tmp_path / "run")!r}, {str(photos)!r}, workers=0, device="cpu")["top1"]
assert 0 <= top1 <= 100
assert any("1 epoch =" in message for message in messages), messages
assert any("k-NN top-1" in message for message in messages), messages
"""
    done = subprocess.run([fastmae_command[0], "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bad_input_raises_an_input_error(vit_store, tmp_path):
    with pytest.raises(fastmae.InputError, match="no-such"):
        fastmae.knn(tmp_path / "no-such-run", tmp_path / "no-such-data", device="cpu")
    with pytest.raises(fastmae.InputError, match="--epochs"):
        fastmae.pretrain(vit_store, tmp_path / "run", epochs=0)
    with pytest.raises(fastmae.InputError, match="did you mean"):
        fastmae.pretrain(vit_store, tmp_path / "run", epcohs=1)
    with pytest.raises(fastmae.InputError, match="print_config"):
        fastmae.pretrain(vit_store, tmp_path / "run", print_config=True)
    with pytest.raises(TypeError):
        fastmae.knn(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_load_encoder_takes_every_form_of_run(tiny_run, vit_weights, tmp_path):
    images = torch.randn(1, 3, 64, 64)
    expected = fastmae.load_encoder(tiny_run).forward_features(images)
    fastmae.export(tiny_run, tmp_path / "exported", device="cpu")
    for form in (tiny_run / "checkpoint.pt", tmp_path / "exported", tmp_path / "exported" / "model.safetensors"):
        torch.testing.assert_close(fastmae.load_encoder(form).forward_features(images), expected)
    by_name = fastmae.load_encoder("timm/vit_tiny_patch16_224", weights=vit_weights, image_size=64)
    assert isinstance(by_name, timm.models.VisionTransformer)
    random = fastmae.load_encoder("timm/vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True)
    assert random.forward_features(torch.randn(1, 3, 96, 32)).shape == (1, 1 + 6 * 2, 192)
