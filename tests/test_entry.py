"""What comes in: every kind of container, dtype, index and name of columns, or one sentence."""

import datetime
import decimal
import fractions
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
import xarray as xr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.cli.runs import json_labels
from pyro_vae.data.cells import shown
from pyro_vae.data.read import read, transformed
from pyro_vae.data.split import split

QUICK: dict[str, Any] = {"max_epochs": 1, "seed": 0, "device": "cpu", "progress": False}
GENERATOR = np.random.default_rng(0)
FRAME = pd.DataFrame(
    GENERATOR.normal(size=(30, 3)) + [0.0, 5.0, 50.0],
    index=[f"p{i}" for i in range(30)],
    columns=["dose", "age", "weight"],
)


class Own(nn.Module):
    """A program of one's own, with covariates."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(5, 3), nn.Linear(3, 2)

    def model(self, row: dict[str, torch.Tensor]) -> None:
        with pyro.plate("data", len(row["x"])):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(row["x"]), 2), 1.0).to_event(1))
            context = row["context"].expand(*z.shape[:-1], 3)
            loc = self.decoder(torch.cat([z, context], -1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=row["x"])

    def guide(self, row: dict[str, torch.Tensor]) -> None:
        with pyro.plate("data", len(row["x"])):
            pyro.sample("z", dist.Normal(self.encoder(row["x"]), 1.0).to_event(1))


@functools.cache
def fitted() -> pv.VAE:
    vae = pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0)
    pv.fit(vae, FRAME, **QUICK)
    return vae


LABELS: dict[str, list[Any]] = {
    "text": ["dose", "age", "weight"],
    "numbers": [2001, 2002, 2003],
    "positions": [0, 1, 2],
    "dates": [*pd.date_range("2020-01-01", periods=3)],
    "pairs": [*pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)])],
    "floats": [0.5, 1.5, 2.5],
}
FORMS: dict[str, Callable[[pd.DataFrame], Any]] = {
    "frame": lambda frame: frame,
    "dict": lambda frame: {"x": frame},
    "data set": lambda frame: pv.datasets.Dataset("table", frame),
    "rows": read,
    "xarray": lambda frame: xr.DataArray(
        frame.to_numpy(), {"c": frame.columns, "r": frame.index}, ("r", "c")
    ),
    "one row": lambda frame: frame.iloc[0],
}
ASKED: dict[str, Callable[[pv.VAE, Any], Any]] = {
    "log_evidence": lambda vae, x: pv.log_evidence(vae, x, 8, seed=0, progress=False),
    "embed": lambda vae, x: pv.embed(vae, x, seed=0),
    "baselines": lambda vae, x: vae.baselines(x),
}


@pytest.mark.parametrize("kind", LABELS)
def test_columns_are_put_in_the_order_of_the_fit(kind: str) -> None:
    frame = FRAME.set_axis(pd.Index(LABELS[kind]), axis=1)
    vae = pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0).initialize(frame)
    assert read(frame.iloc[:, ::-1], vae).field("x").equal(read(frame, vae).field("x"))
    assert read(frame.to_numpy(), vae).field("x").equal(read(frame, vae).field("x"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ASKED)
def test_every_form_and_every_question_matches_names(form: str, name: str) -> None:
    make, ask, vae = FORMS[form], ASKED[name], fitted()
    one, other = ask(vae, make(FRAME)), ask(vae, make(FRAME[["weight", "dose", "age"]]))
    assert one.drop_attrs().identical(other.drop_attrs())


WRONG: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "another name": (lambda f: f.rename(columns={"age": "Age"}), "missing.*'age'.*them: 'Age'"),
    "one too many": (lambda f: f.assign(height=1.0), "not among them: 'height'"),
    "one missing": (lambda f: f.drop(columns="dose"), "missing columns: 'dose'"),
    "one twice": (lambda f: f.set_axis(["dose", "age", "age"], axis=1), "of one name: 'age'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_columns_are_refused_by_name(case: str) -> None:
    change, said = WRONG[case]
    vae = fitted()
    for refused in (
        lambda: vae.check(change(FRAME)),
        lambda: pv.log_evidence(vae, change(FRAME), 8),
        lambda: pv.fit(vae, change(FRAME), **QUICK),
        lambda: split(read(FRAME), change(FRAME), seed=0, name="validation"),
    ):
        with pytest.raises(ValueError, match=f"columns of the training rows.*{said}"):
            refused()


def test_validation_is_matched_to_the_training_rows() -> None:
    histories = []
    for validation in (FRAME[:9], FRAME[:9].iloc[:, ::-1]):
        vae = pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0)
        histories.append(pv.fit(vae, FRAME, validation=validation, **QUICK).table)
    pd.testing.assert_frame_equal(*[h.drop(columns="seconds") for h in histories])


@pytest.mark.parametrize("transform", [None, lambda row: {k: v.abs() for k, v in row.items()}])
def test_own_programs_match_x_and_context(transform: Any, tmp_path: Path) -> None:
    program = Own()
    pv.fit(program, FRAME, context=FRAME, transform=transform, **QUICK)
    turned = FRAME.iloc[:, ::-1]
    for own in (program, pv.load(pv.save(program, tmp_path / "own"), into=Own())):
        rows = read(turned, own, context=turned)
        assert rows.digest() == read(FRAME, own, context=FRAME).digest()
        with pytest.raises(ValueError, match="Expected context with the columns.*'age'"):
            read(FRAME, own, context=FRAME.rename(columns={"age": "years"}))


def test_names_are_saved_with_a_vae(tmp_path: Path) -> None:
    vae = fitted()
    loaded = pv.load(pv.save(vae, tmp_path / "vae"))
    assert loaded.fitted_columns == vae.fitted_columns == {"x": [["dose", "age", "weight"]]}
    with pytest.raises(ValueError, match="not among them: 'Age'"):
        loaded.check(FRAME.rename(columns={"age": "Age"}))


VALUES = np.arange(12.0).reshape(4, 3)
TABLE = pd.DataFrame(VALUES, columns=list("abc"))
GAPS = np.where(VALUES == 4.0, np.nan, VALUES)
QUIET = pytest.mark.filterwarnings("ignore:.*(Sparse|nested tensors)")


class Foreign:
    """A table of another library."""

    def to_pandas(self) -> pd.DataFrame:
        return TABLE


def read_only(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.setflags(write=False)
    return values


READ: dict[str, tuple[Any, np.ndarray]] = {
    "CSR matrix": (scipy.sparse.csr_matrix(VALUES), VALUES),
    "COO array": (scipy.sparse.coo_array(VALUES), VALUES),
    "sparse tensor": (lambda: torch.from_numpy(VALUES).to_sparse(), VALUES),
    "sparse tensor of duplicates": (
        lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0]),
        [[0, 3]],
    ),
    "CSC tensor": (lambda: torch.from_numpy(VALUES).to_sparse_csc(), VALUES),
    "oneDNN tensor": (lambda: torch.from_numpy(VALUES).float().to_mkldnn(), VALUES),
    "sparse columns": (TABLE.astype(pd.SparseDtype("float", 0.0)), VALUES),
    "nullable integers": (TABLE.astype("Int64"), VALUES),
    "nullable integers with gaps": (TABLE.astype("Int64").mask(TABLE == 4.0), GAPS),
    "nullable floats with gaps": (TABLE.astype("Float32").mask(TABLE == 4.0), GAPS),
    "Arrow floats with gaps": (TABLE.astype("float64[pyarrow]").mask(TABLE == 4.0), GAPS),
    "nullable booleans": (pd.DataFrame({"a": pd.array([True, None], "boolean")}), [[1], [np.nan]]),
    "a nullable series": (pd.Series([1, None], dtype="UInt8"), [1, np.nan]),
    "columns of several kinds": (TABLE.astype({"a": "Int8", "b": "float32", "c": bool}), None),
    "categories that are numbers": (pd.DataFrame({"a": pd.Categorical([20, 10])}), [[20], [10]]),
    "objects": (np.array([[1, 2.5, None], [True, np.float32(3), pd.NA]], object), None),
    "decimals": (pd.DataFrame({"a": [decimal.Decimal("0.1"), None]}), [[0.1], [np.nan]]),
    "fractions": (np.array([[fractions.Fraction(1, 4)]]), [[0.25]]),
    "large Python integers": ([[2**70]], [[2.0**70]]),
    "masked floats": (np.ma.masked_equal(VALUES, 4.0), GAPS),
    "masked integers": (np.ma.masked_equal(VALUES.astype(int), 4), GAPS),
    "masked without a mask": (np.ma.masked_array(VALUES), VALUES),
    "a structured array": (TABLE.to_records(index=False), VALUES),
    "a table of another library": (Foreign(), VALUES),
    "an Arrow table": (pyarrow.table(TABLE), VALUES),
    "xarray with gaps": (xr.DataArray(VALUES).where(VALUES != 4.0), GAPS),
    "half": (VALUES.astype(np.float16), VALUES),
    "bfloat16": (torch.from_numpy(VALUES).bfloat16(), VALUES),
    "eight bits": (torch.from_numpy(VALUES).to(torch.float8_e4m3fn), VALUES),
    "big-endian": (VALUES.astype(">i2"), VALUES),
    "big-endian floats": (VALUES.astype(">f4"), VALUES),
    "unsigned": (VALUES.astype(np.uint64), VALUES),
    "an unsigned tensor": (torch.from_numpy(VALUES.astype(np.uint16)), VALUES),
    "read-only": (read_only(VALUES), VALUES),
    "a matrix": (VALUES.view(np.matrix), VALUES),
    "reversed": (VALUES[::-1, ::-1], VALUES[::-1, ::-1]),
    "broadcast": (np.broadcast_to(VALUES[0], (2, 3)), VALUES[[0, 0]]),
    "channels last in memory": (
        torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last),
        np.arange(48.0).reshape(2, 2, 3, 4),
    ),
    "a view of an imaginary part": (torch.full((2, 1), 1 - 2j).conj().imag, [[2], [2]]),
    "a list of tensors": ([torch.ones(3), torch.zeros(3)], [[1, 1, 1], [0, 0, 0]]),
    "a range": (range(3), [0, 1, 2]),
}


@QUIET
@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("is_in_dict", [False, True])
def test_every_container_keeps_its_values(case: str, is_in_dict: bool) -> None:
    x, values = READ[case]
    x = x() if callable(x) else x
    if case == "objects":
        values = np.array([[1, 2.5, np.nan], [1, 3, np.nan]])
    elif values is None:
        values = x.to_numpy(np.float64)
    rows = read({"x": x} if is_in_dict else x, nn.Linear(1, 1, dtype=torch.float64))
    np.testing.assert_array_equal(rows.field("x").double(), np.asarray(values, np.float64))
    own = rows.field("x")
    assert own.layout == torch.strided
    assert len(rows[torch.tensor([0])].digest()) == 64
    if isinstance(x, pd.DataFrame | Foreign | pyarrow.Table):
        assert rows.column_names() == list("abc")[: own.shape[1]]


def test_a_file_in_memory_is_read_and_not_written(tmp_path: Path) -> None:
    for mode in ("r", "r+"):
        np.save(tmp_path / "x.npy", VALUES.astype(np.float32))
        mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
        transformed(read(mapped), lambda x: x.mul_(2.0))
        assert read(mapped).x.tolist() == np.load(tmp_path / "x.npy").tolist() == VALUES.tolist()


DAYS = pd.date_range("2020-01-01", periods=2)
TWO: dict[str, Any] = {"a": [1.0, 2.0]}
REFUSED: dict[str, tuple[Any, str]] = {
    "numbers as text": (np.array([["1.5", "1_000"]], object), "column 0; got '1.5' in row 0"),
    "words": (pd.DataFrame(TWO | {"b": ["u", "v"]}), "column 'b'; got 'u' in row 0 .2 of 2"),
    "a blank": (pd.DataFrame(TWO | {"b": [1.0, " "]}), "column 'b'; got ' ' in row 1 .1 of 2"),
    "categories": (pd.DataFrame(TWO | {"b": pd.Categorical(["u", "v"])}), "'b'; got 'u'.*dummies"),
    "dates": (pd.DataFrame(TWO | {"b": DAYS}), "column 'b'; got 2020-01-01.*days since a date"),
    "dates of a zone": (pd.DataFrame(TWO | {"b": DAYS.tz_localize("UTC")}), "'b'; got 2020-01-01"),
    "one date": (pd.DataFrame({"b": pd.array([1, DAYS[0]], object)}), "'b'; got 2020.* in row 1"),
    "durations": (pd.DataFrame(TWO | {"b": DAYS - DAYS[0]}), "column 'b'; got .*Timedelta"),
    "periods": (pd.DataFrame(TWO | {"b": DAYS.to_period("D")}), "column 'b'; got .*2020-01-01"),
    "intervals": (
        pd.DataFrame(TWO | {"b": pd.interval_range(0, 2)}),
        "column 'b'; got .*Interval",
    ),
    "complex": (pd.DataFrame(TWO | {"b": [1j, 2.0]}), "'b'; got .*1j.* in row 0.*real and"),
    "complex objects": (np.array([[1.0, 1j]], object), "column 1; got 1j.*real and the imag"),
    "a complex tensor": (torch.ones(2, 2) * 1j, "real numbers.*complex64.*real and the imag"),
    "bytes": (np.array([b"a"]), "numbers in column 0; got .*b'a'"),
    "lists": (pd.DataFrame({"a": [[1, 2], [3, 4]]}), r"column 'a'; got \[1, 2\]"),
    "integers beyond 2**53": (
        pd.DataFrame(TWO | {"b": [1, 2**53 + 1]}),
        r"2\*\*53 in column 'b',.* 9007199254740993 in row 1.*offset",
    ),
    "nullable integers beyond 2**53": (
        pd.DataFrame({"b": pd.array([None, 2**53 + 1], "Int64")}),
        r"column 'b',.* 9007199254740993 in row 1",
    ),
    "Python integers beyond 2**53": (np.array([[2**70 + 1, 1.5]], object), "column 0,.* in row 0"),
    "large numbers of Python": ([[10**400]], "below 1.8e308 in column 0"),
    "unsigned beyond 2**63": (
        np.array([[2**63]], np.uint64),
        "below 2.*; got 9223372036854775808",
    ),
    "an unsigned tensor beyond 2**63": (
        torch.tensor([[2**63]], dtype=torch.uint64),
        "below 2.*; got 9223372036854775808",
    ),
    "a long double beyond float64": (np.array([np.longdouble("1e999")]), "below 1.8e308"),
    "a loader": (
        DataLoader(TensorDataset(torch.ones(2, 2))),
        "got a DataLoader. Pass its rows as",
    ),
    "a data set": (TensorDataset(torch.ones(2, 2)), "got a TensorDataset. Pass its rows as one"),
    "pairs": (TensorDataset(torch.ones(2, 2), torch.ones(2)), "got a TensorDataset"),
    "a generator": ((row for row in VALUES), "got a generator. Pass its rows as one"),
    "a set": ({1.0, 2.0}, "got a set"),
    "a name": ("wine.csv", "got a str"),
    "ragged": ([[1.0], [1.0, 2.0]], "an array of numbers; got"),
    "a nested tensor": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "nested tensor, whose rows differ in shape",
    ),
    "a tensor without values": (torch.ones(2, 2, device="meta"), "a tensor on meta"),
}


@QUIET
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", ["x", "dose"])
def test_what_has_no_values_to_keep_is_refused_in_a_sentence(case: str, name: str) -> None:
    x, said = REFUSED[case]
    x, said = x() if callable(x) else x, said.replace("; got", ".*; got")
    with pytest.raises(ValueError, match=f"(?s)^Expected .*{said}") as e:
        read({name: x}, nn.Linear(1, 1))
    assert ("field 'dose'" in str(e.value)) == (name == "dose")
    assert str(e.value).count("Expected") == 1


def test_values_that_a_program_cannot_hold_are_refused_or_warned_of() -> None:
    frame = pd.DataFrame({"small": [1.0, 2.0], "large": [1.0, 1e300]}, index=["u", "v"])
    with pytest.raises(ValueError, match=r"float32 holds; got 1e\+300 in row 'v', column 'large'"):
        read(frame, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="values of context that .*column 'large'"):
        read(frame[["small"]], nn.Linear(1, 1), context=frame)
    read(frame, nn.Linear(1, 1).double())
    read(frame, pv.VAE(2, 1, pv.likelihoods.Normal()))
    close = pd.DataFrame({"small": [1.0, 2.0], "year": [2000.0, 2000.00001]})
    with pytest.warns(UserWarning, match="x in column 'year' differ by less than torch.float32"):
        read(close, nn.Linear(1, 1))
    read(close, pv.VAE(2, 1, pv.likelihoods.Normal()))
    with pytest.raises(ValueError, match=r"integers up to 2\*\*53.* in row 1, column 0"):
        read([[1], [2**53 + 1]], pv.VAE(1, 1, pv.likelihoods.Normal()))


IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "of a tensor": lambda x: x.mul_(2.0),
    "of a dict": lambda row: row | {"x": row["x"].mul_(2.0)},
    "of the dict itself": lambda row: row.update(x=row["x"].mul_(2.0)) or row,
}


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("batch_size", [7, 128])
def test_a_transform_changes_no_data(kind: str, batch_size: int) -> None:
    x, change = torch.from_numpy(FRAME.to_numpy(copy=True)).float(), IN_PLACE[kind]
    before = x.clone()
    is_dict = "dict" in kind
    beside = {"context": FRAME.to_numpy()} if is_dict else {}
    program = Own() if is_dict else pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0)
    options = QUICK | {"max_epochs": 3, "batch_size": batch_size}
    pv.fit(program, x, transform=change, validation=5 if is_dict else x[:9], **beside, **options)
    pv.log_evidence(program, x, 8, seed=0, transform=change, progress=False, **beside)
    assert x.equal(before)


INDEXES: dict[str, pd.Index] = {
    "pairs": pd.MultiIndex.from_product([["u", "v"], [1, 2]], names=["site", "visit"]),
    "days": pd.date_range("2020-01-01", periods=4),
    "seconds": pd.date_range("2020-01-01", periods=4, unit="s"),
    "a zone": pd.date_range("2020-01-01", periods=4, tz="Europe/Berlin"),
    "Arrow days": pd.Index(pd.date_range("2020", periods=4)).astype("timestamp[us][pyarrow]"),
    "no time": pd.DatetimeIndex(["2020-01-01", None, "2021-01-01", "2022-01-01"]),
    "durations": pd.to_timedelta([1, 2, 3, 4], "min"),
    "periods": pd.period_range("2020-01", periods=4, freq="M"),
    "intervals": pd.interval_range(0, 4),
    "categories": pd.CategoricalIndex(["u", "v", "w", "u"]),
    "categories of numbers": pd.CategoricalIndex([4, 3, 2, 1]),
    "duplicates": pd.Index(["u", "u", "v", "v"]),
    "duplicate numbers": pd.Index([1, 1, 2, 2]),
    "objects": pd.Index([1, "u", None, 2.5], dtype=object),
    "Python dates": pd.Index([datetime.date(2020, 1, day) for day in range(1, 5)]),
    "tuples": pd.Index([("u", 1), ("v", 2), ("w", 3), ("x", 4)], tupleize_cols=False),
    "nullable": pd.Index([1, None, 3, 4], dtype="Int64"),
    "Arrow text": pd.Index(list("uvwx"), dtype="string[pyarrow]"),
    "gaps": pd.Index([0.5, np.nan, 1.5, 2.5]),
    "booleans": pd.Index([True, False, True, False]),
    "complex": pd.Index([1j, 2, 3, 4]),
    "bytes": pd.Index([b"u", b"v", b"w", b"x"]),
    "unsigned": pd.Index(np.arange(4, dtype=np.uint64) + 2**63),
    "a broken character": pd.Index(["\ud800", "v", "w", "x"], dtype=object),
    "a zero": pd.Index(["u\0v", "u\0", "w", "x"], dtype=object),
    "empty text": pd.Index(["", "v", "w", "x"]),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_every_index_is_written_to_every_file(kind: str, tmp_path: Path) -> None:
    frame = pd.DataFrame(FRAME.to_numpy()[:4], INDEXES[kind])
    vae = pv.VAE(3, 1, pv.likelihoods.Normal(), seed=0)
    rows = read(frame, vae, context=frame, check=False)
    evidence = pv.log_evidence(vae, frame, 4, seed=0, progress=False)
    assert read(pd.DataFrame({"a": evidence.log_evidence}, INDEXES[kind])).labels.size == 4
    named = frame.T.set_axis(["u", "v", "w"])
    wide = pv.reconstruct(
        pv.VAE(4, 1, pv.likelihoods.Normal(), seed=0), named, num_samples=20, prob=0.5, seed=0
    )
    for number, result in enumerate((evidence, wide)):
        result.to_netcdf(tmp_path / f"{number}.nc", engine="h5netcdf")
        with xr.open_dataset(tmp_path / f"{number}.nc", engine="h5netcdf") as again:
            sizes = dict(again.load().sizes)
        assert sizes == dict(result.sizes)
        table = xr.Dataset(result.variables).to_dataframe()
        table.to_csv(tmp_path / f"{number}.csv")
        table.to_parquet(tmp_path / f"{number}.parquet")
        assert len(pd.read_csv(tmp_path / f"{number}.csv")) == len(table)
        assert len(pd.read_parquet(tmp_path / f"{number}.parquet")) == len(table)
    assert len(json.dumps(json_labels(rows.labels))) > 2


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
@pytest.mark.parametrize("is_in_dict", [False, True])
def test_one_row_is_one_row_of_the_programs_too(shape: tuple[int, ...], is_in_dict: bool) -> None:
    vae = pv.VAE(shape, 2, pv.likelihoods.Normal(), seed=0)
    one = torch.ones(shape)
    x: Any = {"x": one} if is_in_dict else one
    for program in (vae.model, vae.guide):
        with pyro.poutine.trace() as traced:
            program(x)
        sites = traced.trace.nodes
        assert sites["data"]["value"].numel() == 1
        assert sites["z"]["value"].shape == (1, 2)
        assert "x" not in sites or sites["x"]["fn"].log_prob(one[None]).shape == (1,)
    assert pv.log_evidence(vae, x, 8, seed=0, progress=False).sizes == {"datum": 1}


def test_channels_that_are_last_are_refused_in_a_sentence() -> None:
    images = torch.rand(5, 8, 8, 3)
    vae = pv.VAE((3, 8, 8), 2, pv.likelihoods.Normal(), seed=0)
    with pytest.raises(ValueError, match="channels come first: .*movedim"):
        vae.check(images)
    vae.check(images.movedim(-1, 1))
    with pytest.raises(ValueError, match="channels last: move them"):
        pv.VAE((8, 8, 3), 2, pv.likelihoods.Normal(), encoder=pv.networks.Convolution(4))
    with pytest.raises(ValueError, match=r"Reshape the data to \(rows, 192\)"):
        pv.VAE(192, 2, pv.likelihoods.Normal(), seed=0).check(images)


NAMED = FRAME.abs() + 0.1
BAD: dict[str, tuple[Any, float, str]] = {
    "a blank": (pv.likelihoods.Normal(), np.nan, "without NaN .missing values.; got NaN in"),
    "infinite": (pv.likelihoods.Normal(), np.inf, "finite data; got inf in"),
    "zero under Gamma": (pv.likelihoods.Gamma(), 0.0, "Gamma, values > 0 .*; got 0.0 in"),
    "negative under Gamma": (pv.likelihoods.Gamma(), -2.0, "Gamma, values > 0 .*; got -2.0 in"),
    "one under Beta": (pv.likelihoods.Beta(), 2.0, r"Beta, values in \(0, 1\); got .* in"),
    "zero under LogNormal": (pv.likelihoods.LogNormal(), 0.0, "LogNormal, values > 0; got 0.0 in"),
    "half a count": (pv.likelihoods.Poisson(), 0.5, "Poisson, integers >= 0; got 0.5 in"),
    "a large count": (pv.likelihoods.Poisson(), 1e9, "counts below 16777216.*got 1000000000.0 in"),
    "grey": (pv.likelihoods.Bernoulli(), 0.5, "Bernoulli, 0 or 1 .*; got 0.5 in"),
    "above a total": (
        pv.likelihoods.Binomial(3),
        4.0,
        "integers from 0 to 3; got 4.0 in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_refused_cell_is_named_by_the_labels_of_row_and_column(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_vae.data.rows.CHECKED_AT_ONCE", 8)
    likelihood, value, said = BAD[case]
    frame = (NAMED * 0.0 + 1.0) if "Beta" not in case else NAMED * 0.0 + 0.5
    vae = pv.VAE(3, 1, likelihood, seed=0)
    frame.loc[["p20", "p29"], "age"] = value
    place = rf"{said} row 'p20', column 'age' \(2 of {{}} rows\)"
    array = place.replace("'p20'", "20").replace("'age'", "1")
    train = place.replace("2 of", "[12] of").replace("'p20'", "'p2[09]'")
    calls = {
        "check": (lambda: vae.check(frame), place.format(30)),
        "array": (lambda: vae.check(frame.to_numpy()), array.format(30)),
        "log_evidence": (lambda: pv.log_evidence(vae, frame, 8), place.format(30)),
        "fit": (lambda: pv.fit(vae, frame, validation=None, **QUICK), place.format(30)),
        "split": (lambda: pv.fit(vae, frame, validation=10, **QUICK), train.format("[12]0")),
        "validation": (
            lambda: pv.fit(vae, frame[:9], validation=frame[9:], **QUICK),
            place.format(21),
        ),
        "transform": (
            lambda: pv.fit(vae, frame, transform=lambda x: x * 1.0, validation=None, **QUICK),
            place.format(30),
        ),
    }
    for name, (call, message) in calls.items():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "Rows are counted" not in str(caught.value), name


def test_refused_weights_and_missing_values_of_evidence_are_named() -> None:
    weights = pd.Series(1.0, FRAME.index)
    weights["p7"] = -1.0
    with pytest.raises(ValueError, match=r"0 or more; got -1.0 in row 'p7' \(1 of 30 rows\)"):
        read(FRAME, weights=weights)
    bad = FRAME.copy()
    bad.loc["p7", "age"] = np.nan
    with pytest.raises(ValueError, match="x without NaN.*; got NaN in row 'p7', column 'age'"):
        pv.log_evidence(fitted(), bad, 8, on_invalid="inf")


@pytest.mark.parametrize("kind", INDEXES)
def test_every_label_is_named(kind: str) -> None:
    frame = pd.DataFrame([[0.0], [0.0], [0.0], [np.nan]], INDEXES[kind])
    label = shown(read(frame).labels, 3)
    with pytest.raises(ValueError, match="got NaN in row ") as caught:
        pv.VAE(1, 1, pv.likelihoods.Normal()).check(frame)
    assert f"row {label}, column 0 (1 of 4 rows)" in str(caught.value)


def test_a_transform_and_a_failing_step_name_the_cell() -> None:
    grey = FRAME * 0.0 + 0.5
    grey.loc["p7", "age"] = 1.5
    vae = pv.VAE(3, 1, pv.likelihoods.Bernoulli(), seed=0)
    with pytest.raises(ValueError, match=r"\[0, 1\]; got 1.5 in row 'p7', column 'age' \(1 of 30"):
        pv.fit(vae, grey, transform=pv.datasets.binarize, **QUICK)
    x, program = FRAME.copy(), Own()
    x.loc["p7", "age"] = 1e30
    nn.init.zeros_(program.encoder.weight)
    with pytest.warns(UserWarning, match="'x' is -inf in row p7, column 'age'"):
        with pytest.raises(FloatingPointError, match="row p7, column 'age'"):
            pv.fit(program, x, context=FRAME, **QUICK | {"max_epochs": 3})
