import io
import os
import pickle
import tarfile

import pytest

from fastmae.errors import InputError
from fastmae.images import tar_shards
from fastmae.images.decode import UndecodableError
from fastmae.images.entries import key_of
from fastmae.images.image_list import ImageList, write_list
from fastmae.images.sources import open_source


def pack(path, members, layout=tarfile.PAX_FORMAT):
    """Write a tar of {name: content}; None as content makes a folder."""
    with tarfile.open(path, "w", format=layout, errors="surrogateescape") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return path


def contents(source):
    images = {}
    for entry in source.entries():
        with source.open(entry) as file:
            images[key_of(entry)] = file.read()
    return images


MEMBERS = {
    "a": None,
    "a/1.jpg": b"one",
    "a/1.cls": b"7",
    "a/1.json": b"{}",
    "2.PNG": b"two" * 1000,
    "3.npy": b"",
    "README": b"no",
}
IMAGES = {"a/1.jpg": b"one", "2.PNG": b"two" * 1000, "3.npy": b""}


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_or_a_folder_of_tars_gives_the_bytes_of_each_image(layout, tmp_path):
    for name in ("00.tar", "01.TAR"):
        pack(tmp_path / name, MEMBERS, layout)
    (tmp_path / "notes.txt").write_bytes(b"x")
    (tmp_path / "._00.tar").write_bytes(b"metadata of macOS")
    (tmp_path / "below.tar").mkdir()
    source = open_source(tmp_path)
    assert (source.kind, source.path) == ("tar", tmp_path)
    assert contents(source) == {
        f"{tar}/{name}": content for tar in ("00.tar", "01.TAR") for name, content in IMAGES.items()
    }
    one = open_source(tmp_path / "00.tar")
    assert (one.kind, one.path) == ("tar", tmp_path / "00.tar")
    assert contents(one) == {f"00.tar/{name}": content for name, content in IMAGES.items()}


def test_keys_do_not_depend_on_the_order_of_tars_and_members(tmp_path):
    for folder, members in (("one", IMAGES), ("other", dict(reversed(IMAGES.items())))):
        (tmp_path / folder).mkdir()
        pack(tmp_path / folder / "x.tar", members)
    digests = {
        write_list(open_source(tmp_path / folder).entries(), tmp_path / "list").sha256 for folder in ("one", "other")
    }
    assert len(digests) == 1


def test_hostile_names_are_only_keys_and_never_paths_on_the_disk(tmp_path):
    hostile = {
        "../../out.jpg": b"1",
        "/etc/passwd.jpg": b"2",
        "a.jpg": b"3",
        "..\\b.jpg": b"4",
        "x" * 300 + ".jpg": b"5",
        "n\ne\tw.jpg": b"6",
    }
    pack(tmp_path / "x.tar", hostile)
    before = sorted(tmp_path.rglob("*"))
    assert contents(open_source(tmp_path)) == {f"x.tar/{name}": content for name, content in hostile.items()}
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are_not_utf8_keep_their_bytes(tmp_path):
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        pack(tmp_path / "x.tar", {"caf\udce9.jpg": b"latin", "名.jpg": b"utf8"}, layout)
        entries = list(open_source(tmp_path).entries())
        assert [entry.partition(b"\x01")[0] for entry in entries] == [b"x.tar/caf\xe9.jpg", "x.tar/名.jpg".encode()]


@pytest.mark.promise("images")
def test_only_regular_members_are_listed_and_links_are_counted(tmp_path, caplog):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("real.jpg"), io.BytesIO())
        for name, kind in {
            "link.jpg": tarfile.SYMTYPE,
            "hard.jpg": tarfile.LNKTYPE,
            "pipe.jpg": tarfile.FIFOTYPE,
            "disk.jpg": tarfile.BLKTYPE,
        }.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert list(contents(open_source(tmp_path))) == ["x.tar/real.jpg"]
    (line,) = caplog.messages
    assert (
        f"{tmp_path}: hard and symbolic links among the images, which are left out: 2 ('x.tar/link.jpg' first)" in line
    )


@pytest.mark.promise("images")
@pytest.mark.parametrize("others", [0, 1, 5, 6, 9, 100])
def test_of_members_with_the_same_name_the_last_one_counts(others, tmp_path):
    members = [("000.png", b"first"), *((f"x{n}.png", b"") for n in range(others)), ("./000.png", b"last")]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = open_source(tmp_path)
    info = write_list(source.entries(), tmp_path / "list")
    assert (info.images, info.repeated) == (others + 1, 1)
    entry = next(iter(ImageList(tmp_path / "list")))
    with source.open(entry) as file:
        assert (key_of(entry), file.read()) == ("x.tar/000.png", b"last")


@pytest.mark.promise("files")
def test_a_tar_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(InputError, match=r"x\.tar: is a named pipe, not a file"):
        list(open_source(tmp_path / "x.tar").entries())


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1024, 1500, 2048, 2560])
def test_a_tar_that_is_cut_off_anywhere_is_refused_in_one_line_that_names_it(keep, tmp_path):
    whole = pack(tmp_path / "x.tar", {"1.jpg": bytes(600), "2.jpg": bytes(10)}, tarfile.USTAR_FORMAT).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:keep])
    with pytest.raises(InputError, match="cut off") as caught:
        list(open_source(tmp_path).entries())
    assert str(caught.value).startswith(f"{tmp_path / 'x.tar'}: ")
    assert "\n" not in str(caught.value)


def with_size(content, size):
    """The tar with another size field in its first header, and the checksum to match."""
    header = bytearray(content[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


@pytest.mark.parametrize(
    "damage",
    [
        # Python would take the first for the end of the tar.
        lambda content: content[:1536] + b"garbage!" * 64 + content[2048:],
        lambda content: b"garbage!" * 64 + content[512:],
        lambda content: content[:1536] + bytes(512) + content[2048:],  # zeros where a header was
        lambda content: content + content,
        lambda content: with_size(content, b"\xff" * 10 + b"\xfe\x00"),  # -512 bytes: leads back to this header
        lambda content: with_size(content, b"\xff" * 11 + b"\x00"),
        lambda content: with_size(content, b"\x80" + b"\xff" * 11),  # about 2^95 bytes
        lambda content: with_size(content, b"77777777777\0"),
    ],
)
def test_a_damaged_header_neither_ends_the_tar_nor_leads_out_of_it(damage, tmp_path):
    whole = pack(tmp_path / "x.tar", {"1.jpg": b"1" * 600, "2.jpg": b"2" * 10}, tarfile.USTAR_FORMAT).read_bytes()
    (tmp_path / "x.tar").write_bytes(damage(whole))
    with pytest.raises(InputError, match=r"x\.tar: a damaged tar"):
        list(open_source(tmp_path).entries())


@pytest.mark.parametrize(
    ("name", "mode"),
    [("x.tar.gz", "w:gz"), ("x.tgz", "w:gz"), ("x.tar.bz2", "w:bz2"), ("x.tar.xz", "w:xz"), ("x.tar", "w:gz")],
)
def test_a_compressed_tar_is_refused_and_the_message_says_what_to_do(name, mode, tmp_path):
    with tarfile.open(tmp_path / name, mode) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=r"a compressed tar, .* unpack it, or decompress it"):
            list(open_source(path).entries())


def test_a_compressed_tar_among_plain_ones_is_not_ignored(tmp_path):
    pack(tmp_path / "0.tar", IMAGES)
    (tmp_path / "1.tar.zst").write_bytes(b"x")
    with pytest.raises(InputError, match=r"1\.tar\.zst: a compressed tar"):
        open_source(tmp_path)


def test_an_entry_that_was_changed_by_hand_opens_no_other_bytes(tmp_path):
    (tmp_path / "in").mkdir()
    pack(tmp_path / "out.tar", IMAGES)
    pack(tmp_path / "in" / "x.tar", IMAGES)
    pack(tmp_path / "in" / "y.tar", IMAGES)
    folder, single = open_source(tmp_path / "in"), open_source(tmp_path / "in" / "x.tar")
    for entry in (b"../out.tar/1.jpg\x01512,3", b"/etc/passwd\x010,3", b"\x010,3", b"..\x010,3", b".tar\x010,3"):
        for source in (folder, single):
            with pytest.raises((InputError, FileNotFoundError)):
                source.open(entry)
    with pytest.raises(InputError, match="not there"):
        single.open(b"y.tar/a/1.jpg\x01512,3")
    for location in (
        b"",
        b"\x01",
        b"\x015",
        b"\x01-5,3",
        b"\x01a,b",
        b"\x011,2,3",
        b"\x01" + b"9" * 30 + b",1",
        "\x01²,³".encode(),
    ):
        with pytest.raises(InputError, match="does not say where"):
            folder.open(b"x.tar/a/1.jpg" + location)
    with pytest.raises(InputError, match=r"x\.tar ends before"):
        folder.open(b"x.tar/a/1.jpg\x01512,99999999999999")


def test_a_member_larger_than_the_memory_for_decoding_is_not_read(tmp_path, monkeypatch):
    pack(tmp_path / "x.tar", {"a.jpg": bytes(1000)})
    source = open_source(tmp_path)
    (entry,) = source.entries()
    monkeypatch.setattr(tar_shards, "MAX_BYTES", 999)
    with pytest.raises(UndecodableError, match=r"a file of 0.00 GB, more than"):
        source.open(entry)


def test_a_source_keeps_few_tars_open_and_is_pickled_without_them(tmp_path):
    for number in range(30):
        pack(tmp_path / f"{number:02d}.tar", {"x.jpg": b"%d" % number})
    source = open_source(tmp_path)
    entries = list(source.entries())
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH208, PTH112
    assert [source.open(entry).read() for entry in entries] == [b"%d" % number for number in range(30)]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + tar_shards.MAX_OPEN_TARS  # noqa: PTH208
    again = pickle.loads(pickle.dumps(source))
    assert again.open(entries[7]).read() == b"7"
    assert (again.kind, again.path) == (source.kind, source.path)


def test_a_sparse_member_is_refused(tmp_path):
    member = tarfile.TarInfo("x.jpg")
    member.size, member.pax_headers = 3, {"GNU.sparse.map": "0,3", "GNU.sparse.size": "600"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(b"one"))
    with pytest.raises(InputError, match="stored with holes"):
        list(open_source(tmp_path).entries())
