"""Laws of `pyro_vae.datasets`."""

import gzip
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from pyro_vae.data.datasets import Dataset, binarize, load
from pyro_vae.data.read import read

IDX = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, IDX[array.dtype.name], array.ndim]) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def lzma_npz(path: Path, **arrays: np.ndarray) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{name}.npy", buffer.getvalue())


ARRAY_WRITERS: dict[str, Callable[[Path, np.ndarray], object]] = {
    "x.npy": lambda path, x: np.save(path, x),
    "x.npz": lambda path, x: np.savez(path, x=x, other=x[:1]),
    "alone.npz": lambda path, x: np.savez_compressed(path, counts=x),
    "lzma.npz": lambda path, x: lzma_npz(path, images=x, labels=np.arange(len(x))),
    "x-idx3-ubyte": lambda path, x: path.write_bytes(idx_bytes(x)),
    "x.idx3-ubyte.gz": lambda path, x: path.write_bytes(gzip.compress(idx_bytes(x))),
    "x.idx": lambda path, x: path.write_bytes(idx_bytes(x)),
}


@pytest.mark.parametrize("dtype", IDX)
@pytest.mark.parametrize("name", ARRAY_WRITERS)
def test_arrays_come_back_as_written(tmp_path: Path, name: str, dtype: str) -> None:
    x = np.random.default_rng(0).normal(0, 40, (5, 3, 2)).astype(dtype)
    ARRAY_WRITERS[name](tmp_path / name, x)
    data = load(tmp_path / name)
    assert isinstance(data.x, Tensor)
    assert data.x.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(data.x.numpy(), x)


@pytest.mark.parametrize(
    "x",
    [
        np.arange(6, dtype=">f4").reshape(3, 2),
        np.asfortranarray(np.arange(6.0).reshape(3, 2)),
        np.full((3, 2), 60_000, np.uint16),
        np.full((3, 2), 4_000_000_000, np.uint32),
        np.eye(3, dtype=bool),
        np.eye(3, dtype=np.float16),
        np.array([[np.nan, 1.0]]),
    ],
    ids=lambda x: str(x.dtype),
)
def test_every_dtype_of_numbers_keeps_its_values(tmp_path: Path, x: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", x)
    data = load(tmp_path / "x.npy")
    np.testing.assert_array_equal(np.asarray(data.x), x)
    assert len(read(data.x)) == len(x)


FRAME = pd.DataFrame(
    {"alpha": [1.5, np.nan, 1e300], "beta": [0.1, 0.2, 0.3]}, index=["first", "second", "third"]
)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.csv", lambda path: FRAME.to_csv(path)),
        ("t.csv.gz", lambda path: FRAME.to_csv(path)),
        ("t.parquet", lambda path: FRAME.to_parquet(path)),
    ],
)
def test_tables_keep_values_and_names(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    data = load(tmp_path / name)
    pd.testing.assert_frame_equal(data.x, FRAME, check_exact=True, check_index_type=False)
    rows = read(data.x)
    assert rows.labels.tolist() == ["first", "second", "third"]
    assert rows.columns["x"][0].tolist() == ["alpha", "beta"]


def test_names_survive_a_split(tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "t.csv")
    train, test = load(tmp_path / "t.csv").split(test=1, seed=3)
    assert sorted([*train.x.index, *test.x.index]) == ["first", "second", "third"]


def test_labels_of_a_table_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,kind,b\n1,x,2\n3,y,4\n")
    data = load(path, label="kind")
    assert data.x.columns.tolist() == ["a", "b"]
    assert data.y.tolist() == ["x", "y"]
    assert load(path.parent / "t.csv", label="kind").split(test=1)[1].y.shape == (1,)


def test_header_is_data_only_if_said(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("1.5,2\n3,4\n5,6\n")
    assert load(path).x.shape == load(path, header=False).x.shape == (3, 2)
    assert load(path, header=True).x.columns.tolist() == ["1.5", "2"]
    assert load(path, header=False, label="1").y.tolist() == [2, 4, 6]
    pd.DataFrame(np.eye(3)).to_csv(path, index=False)
    assert load(path).x.shape == (3, 3)


def test_nullable_columns_become_plain_numbers(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"a": pd.array([1, None, 3], dtype="Int64"), "b": pd.array([1, 2, 3], dtype="Int8")}
    )
    frame.to_parquet(tmp_path / "t.parquet")
    x = load(tmp_path / "t.parquet").x
    assert [str(dtype) for dtype in x.dtypes] == ["float64", "int8"]
    assert np.isnan(x.to_numpy()[1, 0])


def test_npz_members(tmp_path: Path) -> None:
    path = tmp_path / "cells.npz"
    np.savez(
        path, counts=np.eye(3), genes=np.array(["a", "b", "c"]), kind=np.array(["u", "v", "w"])
    )
    assert load(path).x.tolist() == np.eye(3).tolist()
    np.savez(tmp_path / "two.npz", a=np.eye(3), b=np.eye(2), size=np.array(3))
    with pytest.raises(ValueError, match=r"Expected key= to name one of \['a', 'b'\] of"):
        load(tmp_path / "two.npz")
    np.savez(tmp_path / "none.npz", a=np.arange(3), b=np.arange(2))
    with pytest.raises(ValueError, match=r"Expected key= to name one of \['a', 'b'\] of"):
        load(tmp_path / "none.npz")
    data = load(path, key="counts", label="kind")
    assert data.x.tolist() == np.eye(3).tolist()
    assert data.y.tolist() == ["u", "v", "w"]


def test_idx_labels_beside_images(tmp_path: Path) -> None:
    images, labels = (
        tmp_path / "train-images-idx3-ubyte.gz",
        tmp_path / "train-labels-idx1-ubyte.gz",
    )
    images.write_bytes(gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.uint8))))
    assert load(images).y is None
    labels.write_bytes(gzip.compress(idx_bytes(np.array([7, 4], np.uint8))))
    assert load(images).y.tolist() == [7, 4]


def test_home_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "x.npy", np.eye(2))
    assert load("~/x.npy").x.shape == load(Path("~/x.npy")).x.shape == (2, 2)


def test_digits_are_counts() -> None:
    data = load("digits")
    assert data.x.shape == (1797, 64)
    assert data.x.dtype == torch.uint8
    assert (data.x.min(), data.x.max()) == (0, 16)
    assert data.y.unique().tolist() == list(range(10))


def test_wine_keeps_its_names() -> None:
    data = load("wine")
    assert data.x.shape == (178, 13)
    assert "proline" in data.x.columns
    assert data.y.bincount().tolist() == [59, 71, 48]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_openml_is_asked_only_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(title: str, **options: object) -> tuple[np.ndarray, np.ndarray]:
        asked.append((title, options["version"], options["as_frame"]))
        return np.full((4, 784), 255), np.array(["3", "1", "0", "9"], dtype=object)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    load("digits")
    assert asked == []
    data = load(name)
    assert asked == [({"mnist": "mnist_784", "fashion-mnist": "Fashion-MNIST"}[name], 1, False)]
    assert (data.x.dtype, data.x.shape, data.y.tolist()) == (torch.uint8, (4, 784), [3, 1, 0, 9])


def test_absent_network_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(title: str, **options: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    with pytest.raises(ConnectionError, match="mnist_784 in scikit-learn's cache.*no route"):
        load("mnist")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_real_images(data: Path, name: str) -> None:
    test = load(data / name / f"{name}_test.npz")
    assert test.x.shape == (10_000, 784)
    assert test.x.dtype == torch.uint8
    assert test.y.bincount().sum() == 10_000
    assert len(test.y.unique()) == 10


def test_real_tables_and_counts(data: Path) -> None:
    assert load(data / "tabular" / "Wine" / "data.csv.gz", header=False).x.shape == (6497, 13)
    cells = load(data / "single_cell" / "zeisel_subset_1464.npz", key="counts")
    assert cells.x.shape == (1464, 1000)
    assert cells.y.shape == (1464,)


@pytest.mark.parametrize("test", [0.2, 0.5, 0.01, 1, 99, np.int64(30)])
@pytest.mark.parametrize("seed", [0, 1, None])
def test_splits_are_disjoint_and_cover(test: float, seed: int | None) -> None:
    data = Dataset("rows", torch.arange(100).unsqueeze(1), torch.arange(100))
    train, held_out = data.split(test=test, seed=seed)
    assert len(held_out) == (round(100 * test) if test < 1 else test)
    assert sorted([*train.y.tolist(), *held_out.y.tolist()]) == list(range(100))
    for part in (train, held_out):
        assert part.x[:, 0].equal(part.y)
        assert part.y.equal(part.y.sort().values)


def test_splits_follow_their_seed_alone() -> None:
    data = Dataset("rows", torch.arange(30).unsqueeze(1))
    state = torch.get_rng_state()
    first = data.split(seed=0)[1].x.flatten().tolist()
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(5)
    assert data.split(seed=0)[1].x.flatten().tolist() == first == [1, 9, 15, 22, 24, 27]
    assert data.split(seed=1)[1].x.flatten().tolist() != first
    assert data.split(test=6, seed=None)[1].x.flatten().tolist() == [24, 25, 26, 27, 28, 29]


@pytest.mark.parametrize("test", [0, 1.0, -0.1, 30, 31, -1, True, 5.0, float("nan")])
def test_splits_without_rows_are_refused(test: float) -> None:
    with pytest.raises(ValueError, match=r"Expected test to be a share in \(0, 1\)"):
        Dataset("rows", torch.arange(30).unsqueeze(1)).split(test=test)


def written(name: str, content: bytes | str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return write


def saved(name: str, **arrays: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        if name.endswith(".npy"):
            np.save(folder / name, arrays["x"])
        else:
            np.savez(folder / name, **arrays)
        return folder / name

    return write


PICKLED = np.array([[{"a": 1}, None]], dtype=object)
IMAGES = idx_bytes(np.zeros((2, 3, 3), np.uint8))
BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "npy of a pickle": (saved("x.npy", x=PICKLED), "pickled"),
    "npy is a pickle": (written("x.npy", pickle.dumps([1, 2])), "NumPy array"),
    "npy is an npz": (lambda d: saved("x.npz", x=np.eye(2))(d).rename(d / "y.npy"), "NumPy array"),
    "npy truncated": (lambda d: _cut(saved("x.npy", x=np.eye(9))(d)), "NumPy array"),
    "npy empty": (written("x.npy", b""), "NumPy array"),
    "npy without rows": (saved("x.npy", x=np.empty((0, 3))), "no dim of it empty"),
    "npy without columns": (saved("x.npy", x=np.empty((3, 0))), "no dim of it empty"),
    "npy of rank 0": (saved("x.npy", x=np.array(1.0)), r"\(rows, \*event\)"),
    "npy of rank 1": (saved("x.npy", x=np.arange(3.0)), r"\(rows, \*event\)"),
    "npy of strings": (saved("x.npy", x=np.array([["a"]])), "numbers"),
    "npy of dates": (saved("x.npy", x=np.array([["2020"]], "M8[D]")), "numbers"),
    "npy of complex": (saved("x.npy", x=np.eye(2, dtype=complex)), "complex128"),
    "npz of a pickle": (saved("x.npz", x=PICKLED), "pickled"),
    "npz of pickled labels": (saved("x.npz", x=np.eye(1), y=PICKLED[0]), "pickled"),
    "npz is a npy": (lambda d: saved("x.npy", x=np.eye(2))(d).rename(d / "y.npz"), "archive"),
    "npz truncated": (lambda d: _cut(saved("x.npz", x=np.eye(9))(d)), "archive"),
    "npz empty": (written("x.npz", b""), "archive"),
    "npz without arrays": (saved("x.npz"), "key="),
    "npz of two arrays": (saved("x.npz", a=np.eye(2), b=np.eye(2)), r"\['a', 'b'\]"),
    "npz of fewer labels": (saved("x.npz", x=np.eye(3), y=np.arange(2)), "got 2 labels"),
    "npz of wide labels": (saved("x.npz", x=np.eye(3), y=np.eye(3)), r"labels of shape \(rows,\)"),
    "csv of words": (
        written("t.csv", "a,b\n1,x\n2,y\n"),
        r"column 'b' of .*got 'x' in row 0 .2 of 2",
    ),
    "csv of two separators": (written("t.csv", "a,b\n1;2\n"), "table"),
    "csv of one name twice": (written("t.csv", "a,a\n1,2\n"), "two columns named 'a'"),
    "csv empty": (written("t.csv", ""), "table"),
    "csv of a header": (written("t.csv", "a,b\n"), "rows and columns"),
    "csv of years": (written("t.csv", "2001,2002,2003\n2,3,4\n"), "header=False"),
    "csv of names or words": (written("t.csv", "Ann,1,2\nBob,2,3\n"), "header=False"),
    "csv with a long line": (written("t.csv", "a,b\n1,2\n1,2,3\n"), "table"),
    "csv with a short header": (written("t.csv", "a,b\n1,2,3\n4,5,6\n"), "table"),
    "csv is binary": (written("t.csv", bytes(range(256))), "table"),
    "csv.gz is plain": (written("t.csv.gz", "a,b\n1,2\n"), "table"),
    "parquet is a csv": (written("t.parquet", "a,b\n1,2\n"), "Parquet"),
    "parquet empty": (written("t.parquet", b""), "Parquet"),
    "parquet of words": (lambda d: _parquet(d, {"a": ["x"]}), "column 'a'.*got 'x'"),
    "parquet of dates": (
        lambda d: _parquet(d, {"a": [pd.Timestamp(0)]}),
        "column 'a'.*days since",
    ),
    "idx truncated": (written("x-idx3-ubyte", IMAGES[:-1]), "33 bytes where"),
    "idx too long": (written("x-idx3-ubyte", IMAGES + b"\0"), "35 bytes where"),
    "idx of its head": (written("x-idx3-ubyte", IMAGES[:9]), "idx array"),
    "idx empty": (written("x-idx3-ubyte", b""), "magic number"),
    "idx of another kind": (written("x-idx3-ubyte", b"\x89PNG" + IMAGES), "magic number"),
    "idx of labels": (written("x-idx1-ubyte", idx_bytes(np.zeros(3, np.uint8))), r"\*event"),
    "idx.gz truncated": (written("x-idx3-ubyte.gz", gzip.compress(IMAGES)[:-9]), "idx array"),
    "idx.gz is plain": (written("x-idx3-ubyte.gz", IMAGES), "idx array"),
    "ending unknown": (written("x.pkl", b""), "a file ending in"),
    "no ending": (written("x", b""), "a file ending in"),
}


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def _parquet(folder: Path, columns: dict[str, list[object]]) -> Path:
    pd.DataFrame(columns).to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_one_value_error(tmp_path: Path, case: str) -> None:
    write, said = BAD_FILES[case]
    path = write(tmp_path)
    with pytest.raises(ValueError, match=rf"(?s)^Expected .*{said}") as caught:
        load(path)
    assert "; got" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("digit", {}, "did you mean digits"),
        ("Digits", {}, "did you mean digits"),
        ("fashion_mnist", {}, "did you mean fashion-mnist"),
        ("x.parque", {}, "did you mean .parquet"),
        ("", {}, "digits, wine, mnist, fashion-mnist"),
        ("digits", {"key": "x"}, "key= only with a file"),
        ("wine", {"label": "alcohol"}, "label= only with a file"),
    ],
)
def test_wrong_names(name: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=f"^Expected .*{said}"):
        load(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.npz", {"key": "absent"}),
        ("x.npz", {"label": "absent"}),
        ("x.npy", {"key": "x"}),
        ("t.csv", {"key": "x"}),
        ("t.csv", {"label": "absent"}),
        ("x.idx", {"label": "x"}),
    ],
)
def test_wrong_options(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    np.savez(tmp_path / "x.npz", x=np.eye(2))
    np.save(tmp_path / "x.npy", np.eye(2))
    FRAME.to_csv(tmp_path / "t.csv")
    (tmp_path / "x.idx").write_bytes(IMAGES)
    with pytest.raises(ValueError, match=f"^Expected .*{[*options.values()][0]}"):
        load(tmp_path / name, **options)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "t.csv", "t.csv.gz", "t.parquet", "x.idx"])
def test_errors_of_the_system_pass(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError):
        load(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        load(tmp_path / "file" / name)


def test_labels_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected a label for each of the 3 rows of mine; got 2"):
        Dataset("mine", torch.zeros(3, 1), torch.zeros(2))


GREYS = torch.arange(0, 256, 15, dtype=torch.uint8)


@pytest.mark.parametrize(
    "x", [GREYS, GREYS / 255, (GREYS / 255).double()], ids=lambda x: str(x.dtype)
)
def test_binarized_frequencies_are_the_grey_levels(x: Tensor) -> None:
    draws = binarize(x.expand(20_000, -1))
    levels = GREYS / 255
    error = (levels * (1 - levels) / 20_000).sqrt()
    assert draws.dtype == (x.dtype if x.is_floating_point() else torch.float32)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert ((draws.mean(0) - levels).abs() <= 4.5 * error).all()


def test_binarize_draws_from_the_torch_generator() -> None:
    x = torch.full((4, 100), 0.5)
    torch.manual_seed(1)
    first, second = binarize(x), binarize(x)
    torch.manual_seed(1)
    assert binarize(x).equal(first)
    assert not second.equal(first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_binarize_is_fine_in_half_precision(dtype: torch.dtype) -> None:
    rare = torch.full((1_000_000,), 1e-4, dtype=dtype)
    assert abs(binarize(rare).float().sum() - 100) < 50


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, 2, dtype=torch.bool),
        torch.zeros(2, 2, dtype=torch.complex64),
        torch.tensor([[0.5, 1.5]]),
        torch.tensor([[-0.1, 0.5]]),
        torch.tensor([[0.5, torch.nan]]),
    ],
    ids=str,
)
def test_binarize_refuses_what_are_no_grey_levels(x: Tensor) -> None:
    with pytest.raises(ValueError, match="Expected grey levels .*; got"):
        binarize(x)


TABLE = pd.DataFrame(
    {"dose": [1.5, np.nan, 0.1], "age": [31, 27, 1234567]}, index=["ann", "bob", "eve"]
)
SEPARATORS = {",": ".csv", ";": ".csv", "\t": ".tsv", "|": ".txt", " ": ".txt"}


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("decimal", [".", ","])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("index", ["", "id", None])
def test_the_layout_of_a_table_is_found_and_shown(
    tmp_path: Path, separator: str, decimal: str, header: bool, index: str | None
) -> None:
    if separator == decimal:
        pytest.skip("no such table")
    path = tmp_path / f"t{SEPARATORS[separator]}"
    options = {"sep": separator, "decimal": decimal, "header": header, "na_rep": "NA"}
    TABLE.to_csv(path, index=index is not None, index_label=index if index else None, **options)
    if separator == " " and index == "":
        pytest.skip("a header without a cell for the row names")
    if index is not None and not header:
        with pytest.raises(ValueError, match="header=False"):
            load(path)
    data = load(path, header=None if index is None else header)
    expected = TABLE if index is not None else TABLE.reset_index(drop=True)
    np.testing.assert_array_equal(data.x.to_numpy(), TABLE.to_numpy())
    assert read(data).labels.tolist() == expected.index.tolist()
    assert data.x.columns.tolist() == ["dose", "age"] or not header
    mark = decimal if separator != "," else "."
    for part in (f"decimal mark {mark!r}", "in the first line" if header else "no column names"):
        assert part in data.note
    assert ("spaces" if separator == " " else repr(separator)) in data.note
    assert "decimal mark" in repr(data)
    given = {"separator": separator, "decimal": decimal, "header": header}
    pd.testing.assert_frame_equal(load(path, **given).x, data.x)


LAYOUTS: dict[str, tuple[str, dict[str, Any], list[str], list[list[float]]]] = {
    "blanks": ("a,b\n1, \n2,3\n", {}, ["a", "b"], [[1, np.nan], [2, 3]]),
    "quotes": ('"a;x","b"\n"1","2,5"\n', {"decimal": ","}, ["a;x", "b"], [[1, 2.5]]),
    "an index of numbers": ("id,a\n7,1\n8,2\n", {"index": "id"}, ["a"], [[1], [2]]),
    "an index by name": ("a,id\n1,x\n2,x\n", {"index": "id"}, ["a"], [[1], [2]]),
    "no index": (",a\n7,1\n", {"index": ""}, ["Unnamed: 0", "a"], [[7, 1]]),
    "a mark of the order of bytes": ("\ufeffa,b\n1,2\n", {}, ["a", "b"], [[1, 2]]),
    "lines of Windows": ("a;b\r\n1,5;2\r\n", {}, ["a", "b"], [[1.5, 2]]),
    "labels in front": (
        "kind,a,b\nx,1,2\ny,3,4\n",
        {"label": "kind"},
        ["a", "b"],
        [[1, 2], [3, 4]],
    ),
    "exact integers": ("a,b\n9007199254740993,2\n", {}, ["a", "b"], [[9007199254740993, 2]]),
    "one column": ("a\n1.5\n2\n", {}, ["a"], [[1.5], [2]]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_tables_of_other_forms(tmp_path: Path, case: str) -> None:
    text, options, columns, values = LAYOUTS[case]
    (tmp_path / "t.csv").write_bytes(text.encode())
    x = load(tmp_path / "t.csv", **options).x
    assert x.columns.tolist() == columns
    np.testing.assert_array_equal(x.to_numpy(), np.array(values))


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("a,b\n1,x y\n2,\n3,z\n", {}, r"column 'b' of .*got 'x y' in row 0 \(2 of 3 rows\)"),
        ("id,a,b\np1,1,?\np2,1,2\n", {"index": "id"}, r"column 'b' .*got '\?' in row 'p1' \(1 of"),
        ("a;b\n1.234,5;2\n", {}, "column 'a' of .*got '1.234,5' in row 0"),
        ("a,b\n1,2020-01-01\n", {}, "column 'b' of .*got '2020-01-01'"),
        ("a,b\n9007199254740993,2\n,1\n", {}, r"integers up to 2\*\*53 in column 'a' of"),
        ("a,b\n1,2\n,1\n3,?\n", {}, r"column 'b' of .*got '\?' in row 2 \(1 of 3 rows\)"),
        ("a,b\n1,2\n?,1\n", {}, r"column 'a' of .*got '\?' in row 1 \(1 of 2 rows\)"),
        ("a,b\n1,2\n3\n", {}, "1 cells in line 3 and 2 in the first"),
        ("a,b\n1,2\n", {"index": "c"}, "no column 'c', but a, b"),
        ("a,b\n1,2\n", {"decimal": "."}, None),
        ("a,b\n1,2\n", {"decimal": ";"}, "decimal to be '.' or ','"),
    ],
)
def test_words_and_broken_lines_are_refused_by_place(
    tmp_path: Path, text: str, options: dict[str, Any], said: str | None
) -> None:
    (tmp_path / "t.csv").write_text(text)
    if said is None:
        assert len(load(tmp_path / "t.csv", **options)) == 1
        return
    with pytest.raises(ValueError, match=f"^Expected .*{said}"):
        load(tmp_path / "t.csv", **options)


@pytest.mark.parametrize("option", ["separator", "decimal", "header", "index"])
def test_the_layout_is_that_of_a_text_table(tmp_path: Path, option: str) -> None:
    np.save(tmp_path / "x.npy", np.eye(2))
    for name in ("digits", tmp_path / "x.npy"):
        with pytest.raises(ValueError, match=f"Expected {option}= only with a"):
            load(name, **{option: ","})
