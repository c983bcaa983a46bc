from fastmae.runtime.table import text_table


def test_the_first_column_is_aligned_left_and_the_others_right():
    rows = [{"codec": "int8", "bytes": "1,536", "note": ""}, {"codec": "pq12", "bytes": "24", "note": "learned"}]
    assert text_table(rows).splitlines() == [
        "codec  bytes     note",
        "int8   1,536",
        "pq12      24  learned",
    ]
