"""The name of a teacher that is code: from the command line and from Python, and never from a file."""

import pytest
from torch import nn

from fastmae.config import KnnConfig, TokenizeConfig
from fastmae.config.teacher import GivenTeacher, names_code
from fastmae.errors import InputError


def made():
    return nn.Identity()


@pytest.mark.parametrize(
    ("given", "name"),
    [(nn.Identity(), "torch.nn.modules.linear:Identity"), (nn.Identity, "torch.nn.modules.linear:Identity")],
)
def test_an_object_becomes_a_readable_name_that_carries_it(given, name):
    teacher = TokenizeConfig(images="a", store="b", teacher=given).teacher
    assert isinstance(teacher, GivenTeacher)
    assert (teacher, teacher.given) == (f"python/{name}", given)
    assert GivenTeacher.of(made) == f"python/{made.__module__}:made"


def test_only_an_option_that_names_a_teacher_takes_an_object():
    assert KnnConfig(run=made, data="d").run.given is made
    with pytest.raises(InputError, match="--device"):
        KnnConfig(run="r", data="d", device=made)


@pytest.mark.parametrize(
    ("teacher", "is_code"),
    [("python/a:b", True), ("python/a.py:b", True), ("python/run", False), ("timm/python/a:b", False), (None, False)],
)
def test_a_name_with_a_colon_below_python_is_code(teacher, is_code):
    assert names_code(teacher) == is_code


@pytest.mark.promise("files")
@pytest.mark.parametrize(
    ("kind", "places", "option"),
    [(TokenizeConfig, {"images": "a", "store": "b"}, "teacher"), (KnnConfig, {"data": "d"}, "run")],
)
def test_a_yaml_file_of_options_names_no_code(kind, places, option, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(f"{option}: python/a:b\n")
    with pytest.raises(InputError, match=rf"options.yaml: {option}: python/a:b is code, which no file may run"):
        kind(**places, config=file)
    assert getattr(kind(**places, config=file, **{option: "python/c:d"}), option) == "python/c:d"
