"""Rows are read from every container, with labels, context and weights."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import nn

import pyro_vae as pv
from pyro_vae.data.read import READERS, Field, Reader, check_rows, read, transformed
from pyro_vae.data.rows import floating_like
from pyro_vae.data.source import Row, Source
from pyro_vae.data.split import split

VALUES = np.arange(12.0).reshape(4, 3)
SOURCES: dict[str, Any] = {
    "tensor": torch.from_numpy(VALUES),
    "array": VALUES,
    "list": VALUES.tolist(),
    "frame": pd.DataFrame(VALUES),
    "xarray": xr.DataArray(VALUES),
    "strided": np.asfortranarray(VALUES),
    "reversed": VALUES[::-1][::-1],
    "big endian": VALUES.astype(">f8"),
    "long double": VALUES.astype(np.longdouble),
    "objects": VALUES.astype(object),
    "half": VALUES.astype(np.float16),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_take_the_dtype_of_the_weights(name: str, dtype: torch.dtype) -> None:
    rows = read(SOURCES[name], nn.Linear(1, 1, dtype=dtype))
    assert rows.x.dtype == dtype
    assert rows.x.tolist() == VALUES.tolist()
    assert (len(rows), rows.labels.tolist()) == (4, [0, 1, 2, 3])
    assert [c.tolist() for c in rows.columns["x"]] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (np.uint8, torch.uint8),
        (np.int16, torch.int16),
        (np.int64, torch.int64),
        (np.uint16, torch.int32),
        (np.uint32, torch.int64),
        (np.uint64, torch.int64),
        (bool, torch.bool),
    ],
)
def test_integers_are_kept(dtype: Any, kept: torch.dtype) -> None:
    rows = read((VALUES % 2).astype(dtype), nn.Linear(1, 1))
    assert rows.x.dtype == kept
    assert rows.x.double().tolist() == (VALUES % 2).tolist()


def test_names_of_rows_and_columns() -> None:
    frame = pd.DataFrame(VALUES, index=list("wxyz"), columns=["a", "b", "c"])
    rows = read(frame)
    assert rows.labels.tolist() == list("wxyz")
    assert rows.columns["x"][0].tolist() == ["a", "b", "c"]
    assert list(rows.coords("x")) == ["x_dim_0"]
    days = pd.date_range("2020-01-01", periods=4)
    assert (read(frame.set_index(days)).labels == days.to_numpy()).all()
    pairs = pd.MultiIndex.from_product([["a", "b"], [1, 2]])
    assert read(frame.set_index(pairs)).labels.tolist()[0] == "('a', 1)"
    assert read(frame["a"]).columns["x"] == ()


def test_a_part_keeps_its_names() -> None:
    rows = read(pd.DataFrame(VALUES, index=list("wxyz")))
    assert rows[1:3].labels.tolist() == ["x", "y"]
    part = rows[torch.tensor([3, 0])]
    assert part.labels.tolist() == ["z", "w"]
    assert part.x.tolist() == VALUES[[3, 0]].tolist()
    assert [chunk.labels.tolist() for chunk in rows.chunks(3)] == [["w", "x", "y"], ["z"]]
    assert read(rows).labels.tolist() == list("wxyz")


def test_dicts_of_fields() -> None:
    rows = read({"a": VALUES, "b": np.arange(4), "c": VALUES[:, :, None] > 3})
    assert (len(rows), set(rows.fields)) == (4, {"a", "b", "c"})
    assert [f.dtype for f in rows.fields.values()] == [torch.float64, torch.int64, torch.bool]
    assert rows.select(slice(2))["b"].tolist() == [0, 1]
    assert {k: len(v) for k, v in rows[torch.tensor([1])].x.items()} == {"a": 1, "b": 1, "c": 1}
    assert list(rows.coords("c")) == ["c_dim_0", "c_dim_1"]
    assert rows.digest() != read({"a": VALUES, "b": np.arange(4)}).digest()


def test_what_is_given_is_not_changed_nor_tied() -> None:
    frozen = VALUES.copy()
    frozen.setflags(write=False)
    read(frozen, nn.Linear(1, 1, dtype=torch.float64)).x.add_(1.0)
    assert (frozen == VALUES).all()
    leaf = torch.ones(2, 2, requires_grad=True)
    assert not read(leaf).x.requires_grad


def test_digests_tell_data_apart() -> None:
    same = [read(VALUES), read(torch.from_numpy(VALUES)), read(pd.DataFrame(VALUES))]
    assert len({rows.digest() for rows in same}) == 1
    others = [VALUES.T, VALUES + 1e-3, VALUES.reshape(4, 3, 1), VALUES.astype(int), VALUES[::-1]]
    assert len({read(other).digest() for other in others} | {same[0].digest()}) == 6


REFUSED: dict[str, tuple[Any, str]] = {
    "no rows": (np.zeros((0, 3)), "at least one row"),
    "no columns": (np.zeros((3, 0)), "at least one row"),
    "scalar": (1.0, "got a scalar"),
    "words": (np.array(["a", "b"]), "numbers in column"),
    "objects": (np.array([1, "b"], dtype=object), "numbers in column"),
    "ragged": ([[1.0], [1.0, 2.0]], "array of numbers"),
    "words in a frame": (pd.DataFrame({"a": ["u", "v"]}), "numbers in column"),
    "complex": (torch.ones(2, dtype=torch.complex64), "real numbers"),
    "dates": (pd.DataFrame({"a": pd.date_range("2020-01-01", periods=2)}), "numbers in column"),
    "no fields": ({}, "empty dict"),
    "unequal fields": ({"a": VALUES, "b": VALUES[:2]}, r"equally many rows; got \{'a': 4, 'b': 2"),
    "nothing": (None, "got a NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_rows_is_refused(name: str) -> None:
    x, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^Expected .*({message})"):
        read(x)


class Declared(nn.Module):
    """A program that declares the shape of its rows, and refuses negative values."""

    event_shape = torch.Size([3])

    def check(self, row: Row) -> None:
        x = row["x"] if isinstance(row, dict) else row
        if (x < 0).any():
            raise ValueError("Expected values of 0 or more.")


FRAME = pd.DataFrame(VALUES, index=list("wxyz"), columns=list("abc"))
ARRAY = xr.DataArray(VALUES, {"who": list("wxyz"), "what": list("abc")}, ("who", "what"))
NAMED: dict[str, Any] = {
    "frame": FRAME,
    "frame in a data set": pv.datasets.Dataset("named", FRAME),
    "xarray": ARRAY,
    "frame of objects": FRAME.astype(object),
    "rows": read(FRAME),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("is_in_dict", [False, True])
def test_labels_of_rows_and_columns_come_along(name: str, is_in_dict: bool) -> None:
    rows = read({"x": NAMED[name]} if is_in_dict else NAMED[name])
    assert rows.labels.tolist() == list("wxyz")
    assert rows.column_names() == list("abc")
    assert rows.field("x").tolist() == VALUES.tolist()
    assert isinstance(rows.head(1), dict) == is_in_dict


def test_an_xarray_data_set_is_a_dict_of_fields() -> None:
    rows = read(xr.Dataset({"x": ARRAY, "weight": ("who", [1.0, 2.0, 3.0, 0.0])}))
    assert rows.labels.tolist() == list("wxyz")
    assert rows.event_shapes() == {"x": (3,), "weight": ()}


def test_a_reader_of_ones_own_is_one_more_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cells:
        matrix, genes = VALUES, np.array(list("abc"))

    own = Reader(Cells, lambda cells: Field(cells.matrix, (None, cells.genes)))
    monkeypatch.setattr("pyro_vae.data.read.READERS", [own, *READERS])
    assert read(Cells()).column_names() == list("abc")
    assert read(Cells(), context=Cells()).coords("context")["context_dim_0"].tolist() == [*"abc"]


class Lines:
    """A source of one's own: the rows of a file, say."""

    def __init__(self, num_rows: int | None) -> None:
        self.num_rows, self.labels = num_rows, np.array(list("wxyz"))

    def coords(self, site: str = "x") -> dict[str, np.ndarray]:
        return {f"{site}_dim_0": np.array(list("abc"))}

    def head(self, n: int) -> Row:
        return {"x": torch.from_numpy(VALUES)[:n]}

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Row]:
        yield self.head(size)

    def chunks(self, size: int) -> Iterator["Lines"]:
        yield self

    def digest(self) -> str:
        return ""


def test_a_source_of_known_length_is_read_into_memory() -> None:
    rows = read(Lines(4), nn.Linear(1, 1))
    assert (rows.labels.tolist(), rows.column_names()) == (list("wxyz"), list("abc"))
    assert isinstance(rows.head(2), dict)
    assert isinstance(rows, Source)
    with pytest.raises(ValueError, match="Lines does not say how many rows it has"):
        read(Lines(None))


def test_context_and_weights_stand_beside_x() -> None:
    rows = read(FRAME, context=FRAME[["a"]], weights=[1, 2, 3, 4.0])
    assert rows.event_shapes() == {"x": (3,), "context": (1,), "weight": ()}
    assert {tensor.dtype for tensor in rows.fields.values()} == {torch.float64}
    assert rows.coords("context")["context_dim_0"].tolist() == ["a"]
    assert rows.coords("observed", (3,))["observed_dim_0"].tolist() == list("abc")
    assert read(rows).digest() == rows.digest()
    one_by_one = read({"x": FRAME}, context=FRAME[["a"]], weights=[1, 2, 3, 4])
    assert one_by_one.digest() == rows.digest()
    assert isinstance(read({"x": FRAME}).head(1), dict)


BESIDE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "context twice": ({"x": VALUES, "context": VALUES}, {"context": VALUES}, "field 'context'"),
    "weights twice": ({"x": VALUES, "weight": np.ones(4)}, {"weights": np.ones(4)}, "field 'wei"),
    "short context": (VALUES, {"context": VALUES[:3]}, r"equally many rows.*'context': 3"),
    "short weights": (VALUES, {"weights": [1.0]}, r"equally many rows.*'weight': 1"),
    "a negative weight": (
        VALUES,
        {"weights": [1, 1, -2, 1]},
        r"0 or more; got -2.0 in row 2 .1 of",
    ),
    "a NaN weight": (VALUES, {"weights": [np.nan, 1, 1, np.nan]}, "got NaN in row 0 .2 of"),
    "an infinite weight": (VALUES, {"weights": [1, np.inf, 1, 1]}, "finite .*got inf in row 1"),
    "weights of cells": (VALUES, {"weights": VALUES}, r"one weight for each row; got .*\(4, 3\)"),
    "a weight in x": ({"x": VALUES, "weight": -np.ones(4)}, {}, "0 or more"),
    "words": (VALUES, {"context": list("abcd")}, r"numbers in column 0 \(field 'context'\)"),
    "other labels": (FRAME, {"context": FRAME[::-1]}, "same labels in the same order"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_does_not_fit_beside_x_is_refused(name: str) -> None:
    x, beside, message = BESIDE[name]
    with pytest.raises(ValueError, match=message):
        read(x, **beside)


def test_one_row_is_read_as_one() -> None:
    program = Declared()
    for one in (VALUES[1], torch.from_numpy(VALUES[1]), VALUES[1].tolist()):
        rows = read(one, program)
        assert (len(rows), rows.labels.tolist()) == (1, [0])
        assert rows.digest() == read(VALUES[1:2], program).digest()
    assert len(read(VALUES[:, :1], nn.Linear(1, 1))) == len(read(VALUES[:, 0])) == 4
    for named in (FRAME.loc["x"], ARRAY.sel(who="x"), {"x": FRAME.loc["x"]}):
        rows = read(named, program)
        assert (rows.labels.tolist(), rows.column_names()) == (["x"], list("abc"))


def test_one_row_has_one_context_and_one_weight() -> None:
    rows = read(FRAME.loc["x"], Declared(), context=FRAME.loc["x", ["a", "b"]], weights=2)
    assert rows.event_shapes() == {"x": (3,), "context": (2,), "weight": ()}
    assert rows.coords("context")["context_dim_0"].tolist() == ["a", "b"]
    assert rows.field("weight").tolist() == [2.0]


def test_the_program_checks_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.data.rows.CHECKED_AT_ONCE", 2)
    with pytest.raises(ValueError, match="0 or more. Rows are counted from row 2 here"):
        read(5 - VALUES, Declared())
    assert len(read(VALUES - 6, Declared(), check=False)) == 4
    with pytest.raises(ValueError, match="0 or more"):
        check_rows(Declared(), read(VALUES), torch.neg)
    with pytest.raises(ValueError, match="keeps the 2 rows; got 1"):
        check_rows(Declared(), read(VALUES), lambda x: x[:1])


def test_transformed_rows_keep_their_labels() -> None:
    rows = transformed(read(FRAME), lambda x: 2 * x)
    assert (rows.labels.tolist(), rows.column_names()) == (list("wxyz"), list("abc"))
    assert rows.field("x").tolist() == (2 * VALUES).tolist()
    narrow = transformed(read(FRAME), lambda x: x[:, :2])
    assert (narrow.labels.tolist(), narrow.column_names()) == (list("wxyz"), None)


@pytest.mark.parametrize("held_out", [0.5, 2, np.int64(2)])
def test_a_split_by_share_or_number(held_out: Any) -> None:
    train, test = split(read(FRAME), held_out, seed=0)
    assert sorted([*train.labels, *test.labels]) == list("wxyz")
    assert len(test) == 2
    again = split(read(FRAME), held_out, seed=0)[1]
    assert again.digest() == test.digest()
    assert len({tuple(split(read(FRAME), held_out, seed=s)[1].labels) for s in range(20)}) > 1


def test_a_split_into_rows_given() -> None:
    train, test = split(
        read(VALUES), {"x": VALUES[:1]}, nn.Linear(1, 1, dtype=torch.float64), seed=0
    )
    assert (len(train), len(test), test.field("x").dtype) == (4, 1, torch.float64)
    assert [len(part) for part in split(read(VALUES), 0.01, seed=0)] == [3, 1]
    assert [len(part) for part in split(read(VALUES), 0.99, seed=0)] == [1, 3]


def test_rows_held_out_have_the_fields_of_x() -> None:
    message = (
        r"Expected validation rows like those of x, event shapes \{'x': \(3,\)\}; got .*\(2,\)"
    )
    with pytest.raises(ValueError, match=message):
        split(read(VALUES), VALUES[:, :2], seed=0, name="validation")
    with pytest.raises(ValueError, match=r"held_out rows like .*'context': \(1,\).*; got"):
        split(read(VALUES, context=VALUES[:, :1]), VALUES, seed=0)


@pytest.mark.parametrize("held_out", [0, 0.0, 1.0, -1, 4, 2.5, float("nan")])
def test_a_split_that_leaves_one_side_empty_is_refused(held_out: float) -> None:
    with pytest.raises(ValueError, match=r"Expected held_out to be a share in \(0, 1\)"):
        split(read(VALUES), held_out, seed=0)


def test_minibatches_hold_every_row_once() -> None:
    rows = read(VALUES[:, 0])
    stored = [batch.tolist() for batch in rows.batches(3)]
    assert stored == [[0.0, 3.0, 6.0], [9.0]]
    shuffled = [torch.cat([*rows.batches(3, seed=seed)]).tolist() for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert all(sorted(order) == VALUES[:, 0].tolist() for order in shuffled)


def test_the_dtype_of_a_module() -> None:
    assert floating_like(None).dtype == torch.float32
    assert floating_like(nn.Identity()).dtype == torch.float32
    assert floating_like(nn.Linear(1, 1).bfloat16()).dtype == torch.bfloat16
    assert floating_like(nn.Embedding(2, 2, dtype=torch.float64)).dtype == torch.float64


def test_labelled_arrays() -> None:
    rows = read(pd.DataFrame(VALUES, index=list("wxyz"), columns=list("abc")))
    found = rows.labelled({"mean": torch.from_numpy(VALUES)}, note="n")
    assert found["mean"].sel(datum="x", x_dim_0="b") == VALUES[1, 1]
    assert found.attrs == {"note": "n"}
    about = {"mean": {"units": "m"}}
    assert rows.labelled({"mean": torch.from_numpy(VALUES)}, about)["mean"].attrs == about["mean"]
