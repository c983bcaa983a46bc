import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastmae.errors import InputError
from fastmae.images import path_lists
from fastmae.images.entries import key_of
from fastmae.images.image_list import write_list
from fastmae.images.sources import open_source


def keys(path):
    return [key_of(entry) for entry in open_source(path).entries()]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_list_gives_one_path_a_line_without_blank_lines_and_comments(tmp_path):
    text = "# mine\na/1.jpg\r\n\n   \nb c/2.jpg\n../elsewhere/3.jpg\n/data/4.jpg\n#5.jpg\nlast.png"
    assert keys(write(tmp_path / "list.txt", text)) == [
        "a/1.jpg",
        "b c/2.jpg",
        "../elsewhere/3.jpg",
        "/data/4.jpg",
        "last.png",
    ]
    assert keys(write(tmp_path / "bom.TXT", b"\xef\xbb\xbfa.jpg\n")) == ["a.jpg"]
    assert keys(write(tmp_path / "empty.txt", "")) == []


def test_relative_paths_start_at_the_lists_folder_and_absolute_paths_are_allowed(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    write(tmp_path / "1.jpg", b"one")
    write(tmp_path / "lists" / "2.jpg", b"two")
    write(tmp_path / "lists" / "list.txt", f"2.jpg\n../1.jpg\n{tmp_path / '1.jpg'}\nnone.jpg\n")
    monkeypatch.chdir(tmp_path)
    source = pickle.loads(pickle.dumps(open_source(tmp_path.relative_to(tmp_path) / "lists" / "list.txt")))
    monkeypatch.chdir("/")
    two, one, absolute, none = source.entries()
    assert (source.kind, source.path) == ("list", tmp_path / "lists" / "list.txt")
    for entry, content in ((two, b"two"), (one, b"one"), (absolute, b"one")):
        with source.open(entry) as file:
            assert file.read() == content
    with pytest.raises(FileNotFoundError):
        source.open(none)


def test_paths_that_are_not_utf8_keep_their_bytes(tmp_path):
    write(tmp_path / "caf\udce9.jpg", b"latin")
    for name, content in {"list.txt": b"caf\xe9.jpg\n", "list.csv": b"path,label\ncaf\xe9.jpg,x\n"}.items():
        source = open_source(write(tmp_path / name, content))
        (entry,) = source.entries()
        assert entry == b"caf\xe9.jpg"
        with source.open(entry) as file:
            assert file.read() == b"latin"


@pytest.mark.parametrize("name", ["path", "Image", "FILE", "filename", "file_name"])
def test_the_column_of_paths_is_found_by_its_name_in_every_table_format(name, tmp_path):
    rows = [("cat", "a, b.jpg"), ("dog", 'c "d".jpg'), ("", "e")]
    quoted = [(label, '"' + path.replace('"', '""') + '"') for label, path in rows]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        text = "\r\n".join(delimiter.join(row) for row in [("label", name), *quoted])
        assert keys(write(tmp_path / f"list{suffix}", text)) == [path for _, path in rows]
    pq.write_table(
        pa.table({"label": [label for label, _ in rows], name: [path for _, path in rows]}), tmp_path / "list.parquet"
    )
    assert keys(tmp_path / "list.parquet") == [path for _, path in rows]


def test_a_table_without_a_header_has_its_paths_in_the_first_column(tmp_path):
    assert keys(write(tmp_path / "list.csv", "a/1.jpg,cat\n\nb/2.PNG,dog\n")) == ["a/1.jpg", "b/2.PNG"]
    write(tmp_path / "no suffix", b"x")
    assert keys(write(tmp_path / "list.csv", "no suffix,cat\n")) == ["no suffix"]
    assert keys(write(tmp_path / "list.csv", "")) == []


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_paths_in_parquet_may_have_any_text_type_and_are_read_in_batches(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(path_lists, "BATCH_ROWS", 7)
    paths = [f"{n:03d}.jpg" for n in range(100)]
    pq.write_table(pa.table({"path": pa.array(paths).cast(kind)}), tmp_path / "list.parquet", row_group_size=30)
    assert keys(tmp_path / "list.parquet") == paths


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "list.csv",
            "img,label\na.jpg,cat\n",
            r"no column is called path, image, file, filename or file_name, .* 'img'",
        ),
        ("list.csv", "x" * 5000 + ",label\n", "no column is called"),
        ("list.csv", "path,label,Image\na.jpg,cat,b.jpg\n", r"which column holds the paths, 'path', 'Image'\?"),
        ("list.csv", "label,path\ncat,a.jpg\ndog\n", "line 3 has no path in column 'path'"),
        ("list.csv", "label,path\ncat,  \n", "line 2 has no path in column 'path'"),
        ("list.csv", 'path\n"' + "x" * 200_000, "is not csv: field larger"),
        ("list.csv", "a" * 2_000_000, "line 1 is too long"),
        ("list.tsv", "a.jpg\t1\n\t2\n", "line 2 has no path in the first column"),
        ("list.txt", "a.jpg\n" + "b" * 2_000_000, "line 2 is too long"),
        ("list.txt", "a.jpg\nb.jpg\n".encode("utf-16"), "holds a byte 0 or 1; .*UTF-8"),
        ("list.parquet", b"", r"can't be read as \.parquet"),
        ("list.parquet", b"PAR1" + bytes(100) + b"PAR1", r"can't be read as \.parquet"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_in_one_line_that_names_it(name, content, reason, tmp_path):
    with pytest.raises(InputError, match=reason) as caught:
        keys(write(tmp_path / name, content))
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"img": ["a.jpg"], "label": ["cat"]}, "no column is called .* 'img', 'label'"),
        ({"path": ["a.jpg"], "file": ["b.jpg"]}, "which column holds the paths, 'path', 'file'"),
        ({"path": ["a.jpg", None]}, "row 1 has no path in column 'path'"),
        ({"path": ["a.jpg", " "]}, "row 1 has no path in column 'path'"),
        ({"path": [1, 2]}, "column 'path' holds int64, not paths"),
        ({"image": [{"bytes": b"x", "path": "a.jpg"}]}, "column 'image' holds the images themselves.*save_to_disk"),
        ({"jpg": [b"\xff\xd8\xff\xe0\0"], "cls": [7]}, "column 'jpg' holds the images themselves.*save_to_disk"),
        ({"jpg": [{"bytes": b"x", "path": "a"}]}, "column 'jpg' holds the images themselves.*save_to_disk"),
        ({"image": [b"\xff\xd8\xff\xe0\0"]}, "column 'image' holds the images themselves.*save_to_disk"),
        ({"path": ["a.jpg", "b" * (1 << 20)]}, "a cell of 1.049 MB is too long for a path"),
    ],
)
def test_a_parquet_without_one_clear_column_of_paths_is_refused_with_a_reason(table, reason, tmp_path):
    pq.write_table(pa.table(table), tmp_path / "list.parquet")
    with pytest.raises(InputError, match=reason):
        keys(tmp_path / "list.parquet")


@pytest.mark.promise("files")
def test_a_parquet_that_unfolds_to_more_than_paths_take_is_refused_from_its_metadata(tmp_path, monkeypatch):
    pq.write_table(pa.table({"path": ["x" * 300_000_000]}), tmp_path / "list.parquet", compression="zstd")
    assert (tmp_path / "list.parquet").stat().st_size < 200_000
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *args, **options: pytest.fail("it was unfolded"))
    with pytest.raises(InputError, match=r"column 'path' unfolds to 300 MB in one row group of 1 rows; give"):
        keys(tmp_path / "list.parquet")
    monkeypatch.setattr(path_lists, "LARGEST_CHUNK", 10_000)
    pq.write_table(pa.table({"path": [f"{n:09d}.jpg" for n in range(5000)]}), tmp_path / "list.parquet")
    with pytest.raises(InputError, match=r"unfolds to 0\.\d+ MB in one row group of 5000 rows"):
        keys(tmp_path / "list.parquet")


@pytest.mark.promise("files")
def test_a_long_cell_that_a_parquet_repeats_is_unfolded_a_few_times_at_once(tmp_path, monkeypatch):
    cells = pa.DictionaryArray.from_arrays(pa.array([0, None, 1] * 1000, pa.int32()), pa.array(["x" * 1000, "y"]))
    monkeypatch.setattr(path_lists, "UNFOLDED_BYTES", 5000)
    lengths = [0 if cell is None else len(cell) for cell in path_lists._cells(tmp_path, cells)]
    assert lengths == [1000, 0, 1] * 1000


@pytest.mark.promise("files")
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".parquet"])
def test_a_list_that_is_no_file_is_refused(suffix, tmp_path):
    os.mkfifo(tmp_path / f"list{suffix}")
    with pytest.raises(InputError, match=rf"list{suffix}: is a named pipe, not a file"):
        keys(tmp_path / f"list{suffix}")


def test_columns_may_be_separated_by_semicolons(tmp_path):
    assert keys(write(tmp_path / "list.csv", "\nlabel;Path\ncat;a.jpg\ndog;b, c.jpg\n")) == ["a.jpg", "b, c.jpg"]
    assert keys(write(tmp_path / "list.csv", '"path";"label"\n"a;1.jpg";"cat"\n')) == ["a;1.jpg"]
    assert keys(write(tmp_path / "list.csv", "a.jpg;cat\nb.jpg;dog\n")) == ["a.jpg", "b.jpg"]
    assert keys(write(tmp_path / "list.csv", "path,label\na;1.jpg,cat\n")) == ["a;1.jpg"]


def test_a_path_with_dots_that_lead_nowhere_is_the_same_path_without_them(tmp_path):
    text = "./001.png\n001.png\na/.//./b.png\n/a//c.png\n../a/../d.png\n./#1.jpg\n.hidden.png\n"
    source = open_source(write(tmp_path / "list.txt", text))
    assert [key_of(entry) for entry in source.entries()] == [
        *("001.png", "001.png", "a/b.png", "/a/c.png", "../a/../d.png", "#1.jpg", ".hidden.png"),
    ]
    info = write_list(source.entries(), tmp_path / "images.list")
    assert (info.images, info.repeated) == (6, 1)


@pytest.mark.promise("images")
def test_comments_in_a_text_list_are_counted(tmp_path, caplog):
    assert keys(write(tmp_path / "list.txt", "#1.jpg\n./#2.jpg\n# mine\n")) == ["#2.jpg"]
    assert "list.txt: lines that begin with #, which are left out as comments: 2; write ./#... " in caplog.text


def test_a_damaged_parquet_is_an_input_error_but_a_missing_one_is_an_os_error(tmp_path):
    pq.write_table(pa.table({"path": [f"{n}.jpg" for n in range(5000)]}), tmp_path / "list.parquet")
    source = open_source(tmp_path / "list.parquet")
    content = bytearray((tmp_path / "list.parquet").read_bytes())
    content[100:400] = bytes(300)
    (tmp_path / "list.parquet").write_bytes(content)
    with pytest.raises(InputError, match="write it again"):
        list(source.entries())
    (tmp_path / "list.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        list(source.entries())


def test_the_image_list_does_not_depend_on_the_order_of_the_paths_and_holds_each_once(tmp_path):
    one = open_source(write(tmp_path / "one.txt", "b.jpg\na.jpg\nc.jpg\nb.jpg\n"))
    other = open_source(write(tmp_path / "other.csv", "n,path\n1,c.jpg\n2,a.jpg\n3,b.jpg\n"))
    assert write_list(one.entries(), tmp_path / "1") == write_list(other.entries(), tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == b"a.jpg\0b.jpg\0c.jpg\0"
