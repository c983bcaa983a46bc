import io
import os
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.images.entries import key_of
from fastmae.images.image_list import write_list
from fastmae.images.sources import open_source

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def png(value):
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def save(rows, folder, column="photo", **more):
    """Save a dataset of (name, bytes); `more` names further columns with the same images."""
    features = datasets.Features(
        {"label": datasets.Value("int64"), column: datasets.Image(), **{name: datasets.Image() for name in more}}
    )
    images = [None if row is None else {"path": row[0], "bytes": row[1]} for row in rows]
    table = {"label": list(range(len(rows))), column: images, **dict.fromkeys(more, images)}
    dataset = datasets.Dataset.from_dict(table, features=features)
    dataset.save_to_disk(folder)
    return dataset


def contents(source):
    return {key_of(entry): source.open(entry).read() for entry in source.entries()}


ROWS = [("a.png", png(1)), ("b.png", png(2)), (None, png(3)), ("a.png", png(4)), ("", png(5)), ("cat/c.png", png(6))]


def test_each_row_has_its_own_key_and_gives_the_bytes_that_were_saved(tmp_path):
    save(ROWS, tmp_path / "set")
    source = open_source(tmp_path / "set")
    assert (source.kind, source.path) == ("datasets", tmp_path / "set")
    images = contents(source)
    assert sorted(images.values()) == sorted(data for _, data in ROWS)
    assert images["b.png"] == png(2)
    assert images["cat/c.png" if "cat/c.png" in images else "c.png"] == png(6)
    assert sorted(key.split("#")[0] for key, data in images.items() if data in (png(1), png(4))) == ["a.png", "a.png"]
    assert all(key.startswith("xxh3-") for key, data in images.items() if data in (png(3), png(5)))


def test_the_keys_depend_neither_on_the_order_of_the_rows_nor_on_the_columns_name(tmp_path):
    dataset = save(ROWS * 20, tmp_path / "set")
    dataset.shuffle(seed=3).rename_column("photo", "picture").save_to_disk(tmp_path / "shuffled", num_shards=3)
    lists = [
        write_list(open_source(tmp_path / name).entries(), tmp_path / f"{name}.list") for name in ("set", "shuffled")
    ]
    assert lists[0] == lists[1]
    assert lists[0].images == len(ROWS)  # each image occurs twenty times


def test_the_train_split_is_taken_and_if_there_is_none_the_splits_are_named(tmp_path):
    train, test = save(ROWS[:2], tmp_path / "1"), save(ROWS[2:], tmp_path / "2")
    datasets.DatasetDict({"test": test, "train": train}).save_to_disk(tmp_path / "both")
    assert len(list(open_source(tmp_path / "both").entries())) == 2
    assert len(list(open_source(tmp_path / "both" / "test").entries())) == 4
    datasets.DatasetDict({"test": test, "dev": train}).save_to_disk(tmp_path / "others")
    with pytest.raises(InputError, match=r"splits test, dev and none called train; give one of them, as .*others/test"):
        list(open_source(tmp_path / "others").entries())
    (tmp_path / "both" / "dataset_dict.json").write_text('{"split": 3}')
    with pytest.raises(InputError, match=r"dataset_dict\.json: not as it should be .*save the dataset again"):
        list(open_source(tmp_path / "both").entries())


def test_a_plain_column_of_bytes_and_path_counts_as_images(tmp_path):
    features = datasets.Features({"picture": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    rows = [{"path": name, "bytes": data} for name, data in ROWS]
    datasets.Dataset.from_dict({"picture": rows}, features=features).save_to_disk(tmp_path / "set")
    assert sorted(contents(open_source(tmp_path / "set")).values()) == sorted(data for _, data in ROWS)


def test_a_format_saved_with_the_dataset_changes_nothing(tmp_path):
    save(ROWS, tmp_path / "set").with_format("numpy").save_to_disk(tmp_path / "formatted")
    assert contents(open_source(tmp_path / "formatted")) == contents(open_source(tmp_path / "set"))


def test_a_dataset_without_exactly_one_column_of_images_is_refused_with_its_columns(tmp_path):
    datasets.Dataset.from_dict({"label": [1], "text": ["x"]}).save_to_disk(tmp_path / "none")
    with pytest.raises(InputError, match=r"no column of images \(its columns: label, text\)"):
        list(open_source(tmp_path / "none").entries())
    save(ROWS, tmp_path / "two", mask=True)
    with pytest.raises(InputError, match="columns photo, mask all hold images; keep one"):
        list(open_source(tmp_path / "two").entries())


def test_a_row_without_an_image_is_refused_with_its_number(tmp_path):
    save([*ROWS, None], tmp_path / "set")
    with pytest.raises(InputError, match="row 6 holds no image"):
        list(open_source(tmp_path / "set").entries())


def test_files_outside_the_dataset_are_opened_only_by_their_full_path(tmp_path):
    (tmp_path / "1.png").write_bytes(png(1))
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    rows = [{"path": name, "bytes": None} for name in (str(tmp_path / "1.png"), "2.png", str(tmp_path / "1.png"))]
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set")
    first, second, third = source.entries()
    assert key_of(first) == key_of(third) == str(tmp_path / "1.png")
    with source.open(first) as file:
        assert file.read() == png(1)
    with pytest.raises(InputError, match=r"row 1 \('2.png'\) holds no image, only a name"):
        source.open(second)


def test_a_damaged_or_changed_dataset_is_an_input_error(tmp_path):
    save(ROWS, tmp_path / "set")
    source = open_source(tmp_path / "set")
    for entry in (b"a.png", b"a.png\x01-1", b"a.png\x01x", b"a.png\x016"):
        with pytest.raises(InputError, match=r"does not say where|names row 6"):
            source.open(entry)
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    arrow.write_bytes(b"no arrow")
    with pytest.raises(InputError, match="can't be read as a saved dataset"):
        list(open_source(tmp_path / "set").entries())
    arrow.unlink()
    os.mkfifo(arrow)
    with pytest.raises(InputError, match=r"\.arrow: is a named pipe, not a file"):
        list(open_source(tmp_path / "set").entries())
    (tmp_path / "set" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state\.json: not JSON .*save the dataset again"):
        list(open_source(tmp_path / "set").entries())


def test_a_source_is_pickled_without_its_open_table(tmp_path):
    save([(f"{n}.png", np.random.default_rng(n).bytes(20_000)) for n in range(20)], tmp_path / "set")
    source = open_source(tmp_path / "set")
    entries = list(source.entries())
    copy = pickle.dumps(source)
    assert len(copy) < 1000
    assert pickle.loads(copy).open(entries[3]).read() == source.open(entries[3]).read()


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    save(ROWS, tmp_path / "set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'fastmae\[datasets\]'"):
        list(open_source(tmp_path / "set").entries())
