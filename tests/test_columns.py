"""The columns kept beside a long index are the index: the same rows, order, split and hashes, or they are not used."""

import os

import numpy as np
import pytest
from test_data import make_ct, make_split

import data as d


@pytest.fixture
def long(tmp_path, monkeypatch):
    """A data folder whose columns are kept, opened once."""
    monkeypatch.setattr(d, "KEPT_ROWS", 1)
    make_ct(tmp_path / "ct")
    d.open_source(tmp_path / "ct")
    return tmp_path / "ct"


@pytest.fixture
def reads(monkeypatch):
    """Paths of CSV files that were read as text."""
    seen, read = [], d.read_index
    monkeypatch.setattr(d, "read_index", lambda path: seen.append(path) or read(path))
    return seen


def facts(source):
    """All that a run takes from a source."""
    rows = [source.rows[i] for i in range(len(source))]
    orders = [source.order(3, step, 4).tolist() for step in range(5)]
    return source.index_sha256, source.encoding, source.groups, rows, orders


def same(one, other):
    assert facts(one) == (other if isinstance(other, tuple) else facts(other))
    return True


def test_columns_are_the_index_and_are_mapped(long, reads, monkeypatch):
    mapped = d.open_source(long)
    assert not reads and isinstance(mapped.rows.columns["z_mm"].base, np.memmap)
    monkeypatch.setattr(d, "KEPT_ROWS", 10**9)
    (long / "_index" / "columns").rename(long / "_index" / "away")
    text = d.open_source(long)
    assert len(reads) == 1 and same(mapped, text) and not (long / "_index" / "columns").exists()


def test_the_door_sees_the_same_through_columns(long, reads, monkeypatch):
    make_split(long, {f"toy/P{k}": "train" if k < 4 else "val_select" for k in range(7)})
    one = d.open_for(long, ["fit", "select"])
    half = d.open_for(long, "fit", limit=7, z_stride=2)
    assert not reads
    monkeypatch.setattr(d, "open_index", lambda path: (d.read_index(path), d.file_sha256(path)))
    assert same(one, d.open_for(long, ["fit", "select"])) and same(half, d.open_for(long, "fit", limit=7, z_stride=2))
    assert set(half.splits) == {"train"} and len(half.splits) == len(half)
    text = d.open_for(long, ["fit", "select"])
    assert [one.read(i).sum() for i in range(4)] == [text.read(i).sum() for i in range(4)]


def test_another_csv_makes_them_anew(long, reads):
    index, before = long / "_index" / "index.csv", d.open_source(long)
    stamp = index.stat()
    os.utime(index, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**9))  # touched: the hash tells it is the same
    assert same(d.open_source(long), before) and not reads
    text = index.read_text()
    index.write_text(text.replace(",2.5,0.7,", ",2.6,0.7,", 1))  # of the same size
    changed = d.open_source(long)
    assert len(reads) == 1 and changed.index_sha256 == d.file_sha256(index) != before.index_sha256
    assert changed.rows[0]["z_mm"] == 2.6 and d.open_source(long).rows[0]["z_mm"] == 2.6 and len(reads) == 1
    index.write_text(text.replace(",2.5,0.7,", ",nan,0.7,", 1))
    with pytest.raises(ValueError, match="z_mm is not a number"):
        d.open_source(long)


@pytest.mark.parametrize("damage", ["short", "cut", "about", "codes", "gone"])
def test_damaged_columns_are_not_used(long, reads, damage):
    folder, before = long / "_index" / "columns", facts(d.open_source(long))
    if damage == "short":
        np.save(folder / "z.npy", np.load(folder / "z.npy")[:-1])
    elif damage == "cut":
        (folder / "path.npy").write_bytes((folder / "path.npy").read_bytes()[:-1])
    elif damage == "about":
        (folder / "about.json").write_text("{}")
    elif damage == "codes":
        np.save(folder / "group.npy", np.load(folder / "group.npy") + 100)
    else:
        (folder / "group.npy").unlink()
    assert same(d.open_source(long), before) and len(reads) == 1
    assert same(d.open_source(long), before) and len(reads) == 1, "made anew"


def test_a_folder_that_cannot_be_written_is_read_as_text(long, reads, monkeypatch, capsys):
    before = d.open_source(long)
    (long / "_index" / "columns" / "about.json").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert same(d.open_source(long), before) and len(reads) == 1
    assert "No space left on device" in capsys.readouterr().out
    assert not [path for path in (long / "_index").iterdir() if path.name.startswith(".")]


def test_a_short_index_keeps_none(tmp_path):
    make_ct(tmp_path / "ct")
    d.open_source(tmp_path / "ct")
    assert [path.name for path in (tmp_path / "ct" / "_index").iterdir()] == ["index.csv"]


@pytest.mark.parametrize("n, series, batch", [(1, 1, 1), (7, 3, 4), (3, 2, 8), (1000, 37, 32), (70_001, 66_000, 64)])
def test_the_order_is_that_of_a_stable_sort(n, series, batch):
    """By the plain way, which takes three times the memory: sort by the place of the series, deal in turns."""

    class Few:
        def __init__(self):
            self.series = np.random.default_rng(1).integers(0, series, n).astype(np.int32)
            self.series[-1] = series - 1

        def __len__(self):
            return n

    source = Few()
    for epoch in range(2):
        random = d.rng(5, "order", epoch)
        ids = random.permutation(n)
        if n < batch:
            more = [random.permutation(n) for _ in range(-(-batch // n) - 1)]
            plain = np.concatenate([ids, *more])[None, :batch]
        else:
            updates = n // batch
            ids = ids[: updates * batch]
            shuffled = random.permutation(series)[source.series[ids]]
            dealt = ids[np.argsort(shuffled, kind="stable")].reshape(batch, updates).T
            plain = random.permuted(dealt[random.permutation(updates)], axis=1)
        assert np.array_equal(d.epoch_order(source, 5, epoch, batch), plain)
