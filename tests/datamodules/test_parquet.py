"""Parquet files that hold far more than they seem to, or claim what is not there."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules import parquet
from datamodules.sources import TextFormat, open_source

LONG = "a" * 2**20
PLAIN = {"compression": "zstd", "use_dictionary": False}
BOMBS = {
    "pages": ([LONG] * 4, PLAIN),
    "a dictionary": (pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int8()), pa.array([LONG[: 2**13]])), {}),
    "rows of nothing": ([""] * 50_000, {}),
    "a nested row": ([[{"role": "user"}] * 50_000], {"compression": "zstd"}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_unpacks_to_far_more_is_refused(tmp_path, monkeypatch, name):
    column, how = BOMBS[name]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": column}), path, **how)
    monkeypatch.setattr("datamodules.reading.LEAST_INFLATED", 2**20)
    source = open_source(str(path), TextFormat())
    for read in (source.rows, source.documents):
        with pytest.raises(ValueError, match=r"t\.parquet: unpacks to more than 200 times its size"):
            list(read())


def test_the_pages_are_believed_and_not_the_end_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [LONG] * 4}), path, **PLAIN)
    size = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    content, claim = path.read_bytes(), as_varint(size)
    path.write_bytes(content.replace(claim, as_varint(9, len(claim))))
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 9
    monkeypatch.setattr("datamodules.reading.LEAST_INFLATED", 2**20)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", None)  # nothing is unpacked
    with pytest.raises(ValueError, match="unpacks to more than"):
        list(parquet.rows_of(path))


def as_varint(number, length=0):
    """Of at least so many bytes; as Thrift's compact form has a number that is not negative."""
    number, out = 2 * number, []
    while number or len(out) < length or not out:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out[:-1], out[-1] & 127])


def test_rows_that_are_not_there_are_not_waited_for(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(20_000)]}), path, compression=None)
    content = path.read_bytes()
    start = len(content) - int.from_bytes(content[-8:-4], "little") - 8
    footer = content[start:-8].replace(as_varint(20_000), as_varint(2**40))
    path.write_bytes(content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert pq.read_metadata(path).num_rows == 2**40
    assert [row["text"] for row in parquet.rows_of(path)] == [str(i) for i in range(20_000)]


@pytest.mark.parametrize(
    "how",
    [
        {"data_page_version": "2.0", "data_page_size": 200, "compression": "zstd", "write_page_checksum": True},
        {"row_group_size": 70, "write_page_index": True, "compression": "gzip"},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ],
)
def test_pages_account_for_all_of_a_file(tmp_path, how):
    path, words = tmp_path / "t.parquet", ["a word", "another", None, "", "b" * 5000]
    rows = [{"text": words[i % 5], "list": [{"i": i}] * (i % 3), "binary": b"\0" * i} for i in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), path, **how)
    assert list(parquet.rows_of(path)) == rows
    assert list(parquet.rows_of(path, "text")) == [{"text": row["text"]} for row in rows]
    metadata, content = pq.read_metadata(path), path.read_bytes()
    end, place = parquet._struct(content, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
    assert place == len(content) - 8
    for i in range(metadata.num_row_groups):
        for j in range(3):
            chunk, fields = metadata.row_group(i).column(j), end[4, parquet.LIST][i][1, parquet.LIST][j]
            pages = list(parquet._pages(content, fields[3, parquet.STRUCT]))
            assert sum(values for _, values, _ in pages) == chunk.num_values
            assert 0 < sum(size for size, _, _ in pages) <= chunk.total_uncompressed_size
            assert sum(is_dictionary for *_, is_dictionary in pages) == chunk.has_dictionary_page


def test_entries_of_a_large_dictionary_are_not_repeated_a_thousand_times_at_once(tmp_path, monkeypatch):
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int8()), pa.array(["a" * 1000]))
    pq.write_table(pa.table({"text": repeated}), tmp_path / "t.parquet")
    monkeypatch.setattr(parquet, "LARGEST_BATCH", 10_500)
    sizes, read = [], pq.ParquetFile.iter_batches

    def iter_batches(self, **options):
        sizes.append(options["batch_size"])
        return read(self, **options)

    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", iter_batches)
    assert len(list(parquet.rows_of(tmp_path / "t.parquet"))) == 100
    assert sizes == [10]


ODD = {
    "a time out of range": pa.array([2**62], pa.timestamp("us")),
    "a day out of range": pa.array([2**30], pa.date32()),
    "a zone that is none": pa.array([1], pa.timestamp("us", "No/Where")),
    "no UTF-8": pa.Array.from_buffers(pa.string(), 1, [*pa.array(["ab"]).buffers()[:2], pa.py_buffer(b"\xff\xfe")]),
}


@pytest.mark.parametrize("name", ODD)
def test_what_python_has_no_value_for_is_named(tmp_path, name):
    pq.write_table(pa.table({"text": ODD[name]}), tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"), TextFormat())
    for read in (source.rows, source.documents):
        with pytest.raises(ValueError, match=r"t\.parquet: no parquet file, or corrupted: "):
            list(read())


def test_a_flipped_byte_ends_in_rows_or_in_a_line(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["one", "two", None] * 9}), path, compression=None, write_page_checksum=True)
    content, draw, ends = path.read_bytes(), random.Random(0), set()
    for _ in range(150):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            ends.add(len(list(parquet.rows_of(path))))
        except ValueError as error:
            ends.add(str(error).startswith(f"{path}: "))
    assert ends == {27, True}
