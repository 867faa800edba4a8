"""What a row is, of tensors, arrays, frames and dicts of them."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import nn

from pyro_vae.data.read import read
from pyro_vae.data.rows import floating_like

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
    assert [f.dtype for f in rows.fields.values()] == [torch.float32, torch.int64, torch.bool]
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
    "words": (np.array(["a", "b"]), "hold numbers"),
    "objects": (np.array([1, "b"], dtype=object), "hold numbers"),
    "ragged": ([[1.0], [1.0, 2.0]], "array of numbers"),
    "words in a frame": (pd.DataFrame({"a": ["u", "v"]}), "hold numbers"),
    "complex": (torch.ones(2, dtype=torch.complex64), "real numbers"),
    "dates": (pd.DataFrame({"a": pd.date_range("2020-01-01", periods=2)}), "hold numbers"),
    "no fields": ({}, "empty dict"),
    "unequal fields": ({"a": VALUES, "b": VALUES[:2]}, r"equally many rows; got \{'a': 4, 'b': 2"),
    "nothing": (None, "got a scalar|hold numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_rows_is_refused(name: str) -> None:
    x, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^Expected .*({message})"):
        read(x)


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
