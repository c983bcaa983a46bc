"""A study file: what it means, what the command line changes in it, and how its mistakes are reported."""

import pytest
import yaml

from fastmae.config import AblateConfig
from fastmae.config.options import help_texts
from fastmae.errors import InputError
from fastmae.studies.study_file import FOLDER, load_study, study_names


@pytest.fixture
def study_of(tmp_path):
    def load(text, **options):
        file = tmp_path / "mine.yaml"
        file.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
        return load_study(AblateConfig(study=file, data=(tmp_path,), **options))

    return load


@pytest.mark.parametrize("name", study_names())
def test_every_study_of_the_package_can_be_read(name, tmp_path):
    study = load_study(AblateConfig(study=name, data=(tmp_path,)))
    assert study.title != study.name
    assert study.baseline in study.arms


def test_the_help_names_the_studies_of_the_package():
    assert all(f"{name} (" in help_texts(AblateConfig)["study"] for name in study_names())


def test_an_arm_is_options_or_a_longer_description(study_of):
    study = study_of(
        {"arms": {"a": {"loss": "cosine"}, "b": {"options": {"norm": "none"}, "note": "84.5", "share": 0.5}, "c": None}}
    )
    assert dict(study.arms["a"].options) == {"loss": "cosine"}
    assert (dict(study.arms["b"].options), study.arms["b"].note, study.arms["b"].share) == (
        {"norm": "none"},
        "84.5",
        0.5,
    )
    assert dict(study.arms["c"].options) == {}
    assert study.baseline == "a"


def test_the_grid_of_an_arm_holds_every_combination(study_of):
    study = study_of({"arms": {"a": {"tune": {"base_lr": [1, 2], "norm": ["patch", "none"]}}}})
    assert [tuple(candidate.values()) for candidate in study.arms["a"].candidates] == [
        (1, "patch"),
        (1, "none"),
        (2, "patch"),
        (2, "none"),
    ]


def test_flags_go_over_the_file(study_of):
    text = {"recipe": "mae_tiny_cpu", "base": {"epochs": 3, "flip": True}, "seeds": 2, "arms": {"a": {}}}
    study = study_of(text, epochs=5, seeds=4, recipe="vit_tiny_cpu", base="flip=false,batch-size=8", middle_size="48")
    assert (study.epochs, study.seeds) == (5, 4)
    assert dict(study.base) == {"recipe": "vit_tiny_cpu", "flip": False, "batch_size": 8}
    assert study.tokenize["middle_size"] == "48"
    timed = study_of(text, seconds=7)
    assert (timed.epochs, timed.seconds) == (None, 7)


def test_flags_go_over_the_sections_of_data_sets_too(study_of):
    own = {"tokenize": {"middle_size": 48, "patch_size": 4}, "base": {"image-size": 32, "epochs": 2, "flip": False}}
    text = {"base": {"recipe": "mae_tiny_cpu"}, "data": {2024: own}, "arms": {"a": {}}}
    study = study_of(text, epochs=5, recipe="vit_tiny_cpu", base="image_size=48", middle_size="64")
    assert study.data == {"2024": {"base": {"flip": False}, "tokenize": {"patch_size": 4}}}
    assert (study.epochs, dict(study.base)) == (5, {"recipe": "vit_tiny_cpu", "image_size": 48})
    assert study.tokenize["middle_size"] == "64"


def test_a_comma_in_brackets_or_quotes_belongs_to_the_value(study_of):
    study = study_of("arms: {a: {}}", base="betas=[0.9, 0.95],relation-layers='2,3',flip=false")
    assert dict(study.base) == {
        "recipe": "vit_tiny_cpu",
        "betas": [0.9, 0.95],
        "relation_layers": "2,3",
        "flip": False,
    }


def test_teachers_can_be_replaced_on_the_command_line(study_of, tmp_path):
    text = {"teachers": {"vit": "timm/x"}, "stores": {"d/vit": "s"}, "arms": {"a": {}}}
    assert list(study_of(text, teacher="efficientnet-lite0,efficientnet-lite2").teachers) == [
        "efficientnet-lite0",
        "efficientnet-lite2",
    ]
    assert dict(study_of(text, teacher_block=3).teachers["vit"]) == {"teacher": "timm/x", "teacher_block": 3}
    with pytest.raises(InputError, match="--teacher-block"):
        study_of(text, teacher="efficientnet-lite0,efficientnet-lite2", teacher_block=3)


def test_paths_are_relative_to_the_file(study_of, tmp_path):
    (tmp_path / "start").mkdir()
    study = study_of(
        {
            "teachers": {"vit": {"teacher": "timm/x", "teacher_weights": "w/x.safetensors"}},
            "tokenize": {"teacher_weights": "w/y.safetensors"},
            "stores": {"d/vit": "s.tokens", "e/vit": "s3://bucket/s.tokens"},
            "arms": {"a": {"init": "start"}, "b": {"tune": {"init": ["start", ""]}}, "c": {"init": "timm/x"}},
        }
    )
    assert study.teachers["vit"]["teacher_weights"] == str(tmp_path / "w" / "x.safetensors")
    assert study.tokenize["teacher_weights"] == str(tmp_path / "w" / "y.safetensors")
    assert [arm.options.get("init") for arm in study.arms.values()] == [str(tmp_path / "start"), None, "timm/x"]
    assert [one["init"] for one in study.arms["b"].candidates] == [str(tmp_path / "start"), ""]
    assert dict(study.stores) == {"d/vit": str(tmp_path / "s.tokens"), "e/vit": "s3://bucket/s.tokens"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("arms: {a: {los: cosine}}", ["arm a", "'los'", "'loss'"]),
        ("arms: {a: {options: {}, tun: {base_lr: [1]}}}", ["arm a", "'tun'", "'tune'"]),
        ("arm: {a: {}}", ["'arm'", "'arms'"]),
        ("title: x", ["arms"]),
        ("arms: [a, b]", ["arms"]),
        ("arms: {a: 3}", ["arm a"]),
        ("arms: {a: {}, a: {loss: mse}}", ["'a'", "twice"]),
        ("arms: {no: {}}", ["arms", "False"]),
        ("arms: {1: {}, '1': {}}", ["'1'", "twice"]),
        ("arms: {'..': {}}", ["arms", "'..'"]),
        ("arms: {a: {teachers: []}}", ["arm a", "teachers"]),
        ("arms: {a: {tune: {target: [tokens, pixels]}}}", ["arm a", "tune", "target"]),
        ("{teachers: {both: []}, arms: {a: {}}}", ["teacher both"]),
        ("{seconds: 3, arms: {a: {epochs: 2}}}", ["seconds", "arm a", "epochs"]),
        ("{seconds: 3, data: {d: {base: {epochs: 2}}}, arms: {a: {}}}", ["seconds", "data d", "epochs"]),
        ("arms: {a b: {}, a_b: {}}", ["a b"]),
        ("arms: {a: {seed: 3}}", ["arm a", "seed"]),
        ("arms: {a: {tune: {base_lr: 3}}}", ["arm a", "tune", "base_lr"]),
        ("arms: {a: {options: {base_lr: 3}, tune: {base_lr: [1, 3]}}}", ["arm a", "tune", "base_lr"]),
        ("arms: {a: {tune: {epochs: [1, 3]}}}", ["arm a", "tune", "epochs"]),
        ("arms: {a: {share: -1}}", ["arm a", "share"]),
        ("arms: {a: {teachers: [efficientnet-lite]}}", ["arm a", "efficientnet-lite0"]),
        ("{base: {epoch: 3}, arms: {a: {}}}", ["base", "'epoch'", "'epochs'"]),
        ("{base: [1], arms: {a: {}}}", ["base"]),
        ("{base: {epochs: many}, arms: {a: {}}}", ["base", "epochs", "many"]),
        ("{seconds: 3, base: {epochs: 2}, arms: {a: {}}}", ["seconds", "epochs"]),
        ("{tokenize: {middlesize: 96}, arms: {a: {}}}", ["tokenize", "'middle_size'"]),
        ("{teachers: {v: {teacher_block: 3}}, arms: {a: {}}}", ["teacher v"]),
        ("{teachers: {v: timm/x, w: [v, u]}, arms: {a: {}}}", ["teacher w", "'u'"]),
        ("{data: {d: {bas: {}}}, arms: {a: {}}}", ["data d", "'base'"]),
        ("{finetune: {epoch: 1}, arms: {a: {}}}", ["finetune", "'epochs'"]),
        ("{baseline: papr, arms: {paper: {}}}", ["baseline", "'paper'"]),
        ("{tune_by: finetune, arms: {a: {}}}", ["tune_by", "knn"]),
        ("{seeds: 0, arms: {a: {}}}", ["seeds"]),
        ("arms: {a: {}", ["YAML"]),
        ("just text", ["arms"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(text, named, study_of):
    with pytest.raises(InputError) as refused:
        study_of(text)
    message = str(refused.value)
    assert "mine.yaml" in message
    assert "\n" not in message
    assert all(name in message for name in named), message


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("flp=false", ["--base", "'flip'"]),
        ("flip", ["--base flip"]),
        ("init=[", ["--base init"]),
        ("flip=@x", ["--base"]),
    ],
)
def test_a_mistake_in_the_flag_base_names_the_flag(flag, named, study_of):
    with pytest.raises(InputError) as refused:
        study_of("arms: {a: {}}", base=flag)
    assert all(name in str(refused.value) for name in named)


def test_a_wrong_name_is_answered_with_the_nearest_study(tmp_path):
    with pytest.raises(InputError, match="'tricks'"):
        load_study(AblateConfig(study="trick", data=(tmp_path,)))
    with pytest.raises(InputError, match=r"none\.yaml"):
        load_study(AblateConfig(study="none.yaml", data=(tmp_path,)))


def test_the_studies_lie_in_the_package():
    assert (FOLDER / "tricks.yaml").is_file()
