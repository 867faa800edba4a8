"""Signal-to-noise ratio of gradients against the number of particles K, in a conjugate model.

The model and the guide are those of Rainforth et al. (2018, section 4), in 5 dims instead of 20:

    z ~ N(mu, I),    x | z ~ N(z, I),    q(z | x) = N(A x + b, (2/3) I)

The parameters are those that are optimal for 1024 rows, each with noise from N(0, 0.02^2) added.
With these parameters, called a state, the gradient of one row is drawn many times. Its
signal-to-noise ratio is |mean| / s.d. The result is the median over the parameters of the encoder
(A, b) or of the decoder (mu), and the mean over several states. If the true mean is 0, R repeats
still give a ratio of about 0.6745 / sqrt(R): the noise floor.

Top: with more particles, the ratio of `IWAE` rises in the decoder and falls in the encoder
(Rainforth et al., 2018). Bottom: with `DReG`, it rises in the encoder too (Tucker et al., 2019);
`STL` is the mean of K one-sample bounds.

    python examples/signal_to_noise.py
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv

DATA_ROWS = 1024
NUMBERS_AT_ONCE = 2e5  # in the draws of a chunk, so that they fit into the cache
ESTIMATORS: dict[str, Callable[[int], pv.elbos.Estimator]] = {
    "IWAE": pv.elbos.IWAE,
    "STL": pv.elbos.STL,
    "DReG": pv.elbos.DReG,
}


class LinearGaussian(nn.Module):
    """The program. If each row has its own parameters, one backward pass gives all gradients."""

    def __init__(self, mu: Tensor, A: Tensor, b: Tensor) -> None:
        super().__init__()
        self.mu, self.A, self.b = (nn.Parameter(values) for values in (mu, A, b))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = (self.A @ x.unsqueeze(-1)).squeeze(-1) + self.b
            pyro.sample("z", dist.Normal(loc, (2 / 3) ** 0.5).to_event(1))

    def repeated(self, rows: int) -> "LinearGaussian":
        copies = (p.detach().expand(rows, *p.shape).clone() for p in (self.mu, self.A, self.b))
        return LinearGaussian(*copies)

    def gradients(self, elbo: pv.elbos.Estimator, x: Tensor) -> dict[str, Tensor]:
        """Returns one gradient per row, shape (rows, parameters)."""
        loss = elbo.estimate(self.model, self.guide, x).loss
        mu, A, b = torch.autograd.grad(loss, (self.mu, self.A, self.b))
        return {"encoder": torch.cat([A.flatten(1), b], 1), "decoder": mu}


def near_optimum(dim: int, distance: float, seed: int) -> tuple[LinearGaussian, Tensor]:
    """Returns a program close to the optimum of the data set, and one row of the data."""
    fixed = torch.Generator().manual_seed(0)
    noise = torch.randn(1 + DATA_ROWS, dim, generator=fixed, dtype=torch.float64)
    x = noise[0] + 2**0.5 * noise[1:]
    best = (x.mean(0), torch.eye(dim, dtype=x.dtype) / 2, x.mean(0) / 2)
    drawn = torch.Generator().manual_seed(seed)
    moved = (p + distance * torch.randn(p.shape, generator=drawn, dtype=p.dtype) for p in best)
    return LinearGaussian(*moved), x[torch.randint(DATA_ROWS, (), generator=drawn)]


def measure(
    elbo: pv.elbos.Estimator, program: LinearGaussian, row: Tensor, num_repeats: int
) -> pd.DataFrame:
    """Returns signal-to-noise ratio and variance of the gradients of encoder and decoder."""
    elbo.max_plate_nesting = 1  # set here, so that it is not determined for each chunk
    chunk = max(1, int(NUMBERS_AT_ONCE / (elbo.num_particles * len(row))))
    sums = {"encoder": torch.zeros(()), "decoder": torch.zeros(())}
    with pyro.validation_enabled(False):
        for start in range(0, num_repeats, chunk):
            rows = min(chunk, num_repeats - start)
            gradients = program.repeated(rows).gradients(elbo, row.expand(rows, -1))
            for part, values in gradients.items():
                sums[part] = sums[part] + torch.stack([values.sum(0), values.square().sum(0)])
    table = {}
    for part, (total, squares) in sums.items():
        mean = total / num_repeats
        variance = (squares / num_repeats - mean.square()) * num_repeats / (num_repeats - 1)
        ratio = (mean.abs() / variance.sqrt()).median()
        table[part] = {"snr": ratio.item(), "variance": variance.mean().item()}
    return pd.DataFrame(table).T.rename_axis("part")


def floor(num_repeats: int) -> float:
    """Returns the ratio without any signal: the median of |N(0, 1)| / sqrt(R)."""
    return 0.6745 / num_repeats**0.5


def signal_to_noise(
    estimators: dict[str, Callable[[int], pv.elbos.Estimator]],
    num_particles: Sequence[int],
    seeds: Sequence[int],
    *,
    num_repeats: int,
    dim: int = 5,
    distance: float = 0.02,
) -> pd.DataFrame:
    """Returns `snr` and `variance` by estimator, K, seed of the state, and part."""
    tables = {}
    for seed in seeds:
        program, row = near_optimum(dim, distance, seed)
        torch.manual_seed(seed)
        for name, make in estimators.items():
            for K in num_particles:
                tables[name, K, seed] = measure(make(K), program, row, num_repeats)
    return pd.concat(tables, names=["estimator", "K", "seed"])


def draw(table: pd.DataFrame, num_repeats: int) -> Figure:
    """Plots the figures of Rainforth et al. (2018), above, and of Tucker et al. (2019), below."""
    figure = Figure(figsize=(10.0, 7.6), layout="constrained")
    panels = figure.subplot_mosaic([["encoder", "decoder"], ["all", "variance"]], sharex=True)
    ratios = [panels[name] for name in ("encoder", "decoder", "all")]
    for axes, part, power in zip(ratios, ("encoder", "decoder"), (-0.5, 0.5)):
        curve(axes, table["snr"].loc["IWAE", :, :, part], "IWAE", "C0")
        reference(axes, table["snr"].loc["IWAE", :, :, part], power)
        axes.set_title(f"IWAE, {part}: signal-to-noise ratio")
    for axes, column in ((panels["all"], "snr"), (panels["variance"], "variance")):
        for i, name in enumerate(ESTIMATORS):
            curve(axes, table[column].loc[name, :, :, "encoder"], name, f"C{i}")
    panels["all"].set_title("Encoder: signal-to-noise ratio")
    panels["variance"].set_title("Encoder: variance")
    low, high = floor(num_repeats) / 2, 1.5 * table["snr"].max()
    for axes in ratios:
        axes.axhspan(low, floor(num_repeats), color="0.9", zorder=0, label="noise floor")
        axes.set(ylim=(low, high), ylabel="|mean| / s.d. of the gradient")
    panels["variance"].set_ylabel(r"variance of the gradient, nats$^2$")
    ticks = sorted(set(table.index.get_level_values("K")))
    for axes in (panels["all"], panels["variance"]):
        axes.set_xlabel("particles K")
        axes.set_xticks(ticks, ticks)
        axes.set_xticks([], minor=True)
    handles = [axes.get_legend_handles_labels() for axes in (panels["all"], panels["encoder"])]
    labelled = {name: handle for pair in handles for handle, name in zip(*pair)}
    figure.legend(labelled.values(), labelled.keys(), loc="outside right center", fontsize="small")
    figure.suptitle(f"Gradients of one row, {num_repeats} repeats (thin: states, thick: mean)")
    return figure


def curve(axes: Axes, values: pd.Series, name: str, color: str) -> None:
    by_seed = values.unstack("seed")
    axes.loglog(by_seed.index, by_seed, color=color, alpha=0.3, linewidth=0.7)
    axes.loglog(by_seed.index, by_seed.mean(axis=1), "o-", color=color, markersize=4, label=name)


def reference(axes: Axes, values: pd.Series, power: float) -> None:
    """Plots a line of slope `power` through the middle of the curve."""
    mean = values.groupby("K").mean()
    K = mean.index.to_numpy(dtype=np.float64)
    height = np.median(mean / K**power)
    axes.loglog(
        K, height * K**power, color="0.5", linewidth=0.8, zorder=1, label=r"slope $\pm 1/2$"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-particles", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--num-repeats", type=int, default=10_000)
    parser.add_argument("--num-seeds", type=int, default=5, help="number of states")
    parser.add_argument("--out", default="signal_to_noise.png")
    args = parser.parse_args(argv)

    seeds = range(args.num_seeds)
    repeats = args.num_repeats
    table = signal_to_noise(ESTIMATORS, args.num_particles, seeds, num_repeats=repeats)
    mean = table["snr"].groupby(["estimator", "part", "K"], sort=False).mean().unstack("K")
    print("Signal-to-noise ratio of the gradient against K:")
    print(mean.round(4).to_string())
    print(f"Noise floor of {repeats} repeats: {floor(repeats):.4f}")
    draw(table, repeats).savefig(args.out, dpi=150)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
