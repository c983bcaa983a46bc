from dataclasses import dataclass
from typing import Annotated

import msgspec
import pytest

from fastmae.errors import InputError
from fastmae.outside.documents import checked, parse_yaml, read_json, read_json_lines, read_yaml

pytestmark = pytest.mark.promise("files")


@dataclass
class Size:
    width: Annotated[int, msgspec.Meta(ge=1)]


def write(tmp_path, text):
    file = tmp_path / "file"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_document_has_the_type_that_was_asked_for(tmp_path):
    assert read_json(write(tmp_path, '{"width": 3, "more": [1]}'), Size, way_out="x") == Size(3)
    assert checked({"width": 3}, Size, name="x", way_out="x") == Size(3)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"width": 0}', r"Expected `int` >= 1 - at `\$\.width`"),
        ('{"width": true}', "Expected `int`, got `bool`"),
        ('{"width": 1e400}', "not "),
        ("{}", "missing required field `width`"),
        ('{"width": NaN}', r"""not JSON \(.*\), near '{"width": NaN}'"""),
        ("", "not JSON"),
        ("[" * 100_000, "nested too deeply|not as it should be"),
    ],
)
def test_any_other_document_is_refused_with_the_place_and_the_way_out(text, cause, tmp_path):
    with pytest.raises(InputError, match=rf"file: .*({cause}).*; bring it back$"):
        read_json(write(tmp_path, text), Size, way_out="bring it back")


def test_names_that_are_not_utf_8_are_read_as_python_writes_them(tmp_path):
    assert read_json(write(tmp_path, '["a\\udcff", "\\ud83d\\ude00"]'), list[str], way_out="x") == ["a\udcff", "😀"]
    with pytest.raises(InputError, match=r"file: .*; x$"):
        read_json(write(tmp_path, '["\\udcff"]'), list[int], way_out="x")


def test_deep_nesting_is_refused_where_any_type_goes(tmp_path):
    with pytest.raises(InputError, match="nested too deeply"):
        read_json(write(tmp_path, "[" * 100_000), way_out="x")


def test_lines_of_a_log_that_cant_be_read_are_left_out_and_counted(tmp_path):
    file = write(tmp_path, '{"width": 1}\nnot json\n{"width": "x"}\n{"width": 2}\n{"wid')
    assert read_json_lines(file, Size) == ([Size(1), Size(2)], 2)


def test_yaml_is_plain_values(tmp_path):
    assert read_yaml(write(tmp_path, "a: [1, 2]\nb: {c: x}"), way_out="x") == {"a": [1, 2], "b": {"c": "x"}}


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]", r"an alias \(\*a\); write the values out"),
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("[" * 100_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("a: [", "not YAML"),
    ],
)
def test_other_yaml_is_refused(text, cause):
    with pytest.raises(InputError, match=f"config: .*{cause}.*; see --help"):
        parse_yaml(text, name="config", way_out="see --help")
