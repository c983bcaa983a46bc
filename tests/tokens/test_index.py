"""The index of a store costs no more memory than its file allows, whatever it declares."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastmae.errors import InputError
from fastmae.tokens.format import read_store_info
from fastmae.tokens.index import decoded_rows, read_index
from tokens.edited_store import build

pytestmark = pytest.mark.promise("files")


@pytest.fixture
def store(tmp_path):
    return build(tmp_path / "s", "fp32")


def rewritten(store, table, **options):
    pq.write_table(table, store / "index.parquet", **options)
    return store / "index.parquet"


def test_texts_that_many_rows_name_are_not_unfolded(store):
    table = pq.read_table(store / "index.parquet")
    text = "x" * (1 << 17)
    column = pa.array([text] * len(table))
    index = rewritten(store, table.set_column(0, "path", column))
    paths = read_index(index, read_store_info(store), ["path"])["path"]
    assert paths.nbytes < 2 * len(text)
    assert paths[3].as_py() == text


@pytest.mark.parametrize("compression", ["zstd", "gzip", "brotli"])
def test_a_compression_that_makes_gigabytes_of_little_is_refused(compression, store):
    index = rewritten(store, pq.read_table(store / "index.parquet"), compression=compression)
    with pytest.raises(InputError, match="would unfold to more than an index of"):
        decoded_rows(index, read_store_info(store))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda table: table.slice(1), "lists 9 images, store.json 10"),
        (lambda table: table.drop_columns(["label"]), "damaged"),
        (lambda table: table.drop_columns(["width"]), "not this store's index"),
        (lambda table: table.set_column(2, "shard", table["shard"].cast(pa.int64())), "not this store's index"),
        (lambda table: table.set_column(3, "row", pa.array([None] * 10, pa.int32())), "rows without values"),
        (lambda table: table.set_column(3, "row", pa.array([-1] * 10, pa.int32())), "no image that could be decoded"),
        (lambda table: table.set_column(3, "row", pa.array([-2] * 10, pa.int32())), "shards or rows that can't exist"),
        (lambda table: table.set_column(2, "shard", pa.array([3] * 10, pa.int32())), "shards or rows that can't exist"),
    ],
)
def test_another_index_is_refused(change, cause, store):
    index = rewritten(store, change(pq.read_table(store / "index.parquet")))
    with pytest.raises(InputError, match=cause):
        decoded_rows(index, read_store_info(store))
