"""One VAE in each system it is compared in: one hidden layer, Bernoulli pixels, Adam 1e-3.

`PEERS` takes steps: `make(shape)` returns a function without arguments that takes `steps` of them
on a batch that lies ready. `EPOCHS` passes over rows of grey levels, binarised anew at each visit:
`take(grey, shape, epochs)` returns the seconds of each. A peer whose packages are not installed
says so by `missing`.

Nothing global is left changed: Pyro's parameter store, its checks, the precision of matrix
products and seeds are as before. Steps draw from torch's generator, which runs on.
"""

import contextlib
import importlib.util
import io
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.data import datasets
from pyro_vae.engine.replay import at_precision
from pyro_vae.engine.running import kept_generators, seeded

LR = 1e-3

Call: TypeAlias = Callable[[], Any]
Update: TypeAlias = Callable[[Tensor], Any]


class Shape(NamedTuple):
    batch_size: int
    pixels: int
    hidden: int
    latent: int


MNIST, TABLE = "B128, 784-400-20", "B128, 16-64-4"
SHAPES = {
    MNIST: Shape(128, 784, 400, 20),
    "B512, 784-400-20": Shape(512, 784, 400, 20),
    TABLE: Shape(128, 16, 64, 4),
}


@dataclass(frozen=True)
class Peer:
    """A system whose steps are timed."""

    make: Callable[[Shape], Call]
    packages: tuple[str, ...] = ()
    steps: int = 1

    @property
    def missing(self) -> list[str]:
        return missing(self.packages)


@dataclass(frozen=True)
class EpochPeer:
    """A system whose epochs are timed."""

    take: Callable[[Tensor, Shape, int], list[float]]
    packages: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return missing(self.packages)


def missing(packages: tuple[str, ...]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def bits(shape: Shape, rows: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (rows or shape.batch_size, shape.pixels)
    return torch.empty(size).bernoulli_(0.3, generator=generator)


def grey_levels(rows: int, pixels: int) -> Tensor:
    """Levels from 0 to 255, four in five of them 0, as in handwritten digits."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(256, (rows, pixels), generator=generator, dtype=torch.uint8)
    return levels.mul_(torch.randint(5, levels.shape, generator=generator, dtype=torch.uint8) == 0)


def our_vae(shape: Shape) -> pv.VAE:
    return pv.VAE(
        shape.pixels,
        shape.latent,
        pv.likelihoods.Bernoulli(),
        encoder=pv.networks.MLP(shape.hidden),
        decoder=pv.networks.MLP(shape.hidden),
        seed=0,
    )


def our_step(shape: Shape, engine: str, precision: str | None = None) -> Call:
    vae, x = our_vae(shape), bits(shape)
    svi = pv.svi.SVI(
        vae.model,
        vae.guide,
        torch.optim.Adam,
        pv.elbos.Trace_ELBO(),
        lr=LR,
        engine=engine,
        precision=precision,
    )
    step = partial(svi.step, x)
    return unchecked(step) if engine == "eager" else step  # a replay has no checks to turn off


def unchecked(step: Call) -> Call:
    def call() -> Any:
        with pyro.validation_enabled(False):
            return step()

    return call


class Encoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.hidden = nn.Linear(shape.pixels, shape.hidden)
        self.loc = nn.Linear(shape.hidden, shape.latent)
        self.scale = nn.Linear(shape.hidden, shape.latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.hidden(x))
        return self.loc(h), F.softplus(self.scale(h)) + 1e-6


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.hidden = nn.Linear(shape.latent, shape.hidden)
        self.logits = nn.Linear(shape.hidden, shape.pixels)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(F.relu(self.hidden(z)))


def networks(shape: Shape) -> tuple[Encoder, Decoder]:
    with seeded(0):
        return Encoder(shape), Decoder(shape)


def hand_update(shape: Shape, *, is_compiled: bool = False) -> Update:
    """Plain PyTorch, with the KL terms in closed form."""
    encoder, decoder = networks(shape)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LR, fused=True)

    def loss_of(x: Tensor) -> Tensor:
        loc, scale = encoder(x)
        logits = decoder(loc + scale * torch.randn_like(scale))
        cross = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return cross + 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum()

    objective = torch.compile(loss_of, dynamic=False) if is_compiled else loss_of

    def update(x: Tensor) -> Tensor:
        adam.zero_grad()
        loss = objective(x)
        loss.backward()
        adam.step()
        return loss

    return update


def hand_step(shape: Shape, *, is_compiled: bool = False, precision: str | None = None) -> Call:
    update, x = hand_update(shape, is_compiled=is_compiled), bits(shape)
    if precision is None:
        return partial(update, x)

    def step() -> Tensor:
        with at_precision(precision):
            return update(x)

    return step


def pyro_update(shape: Shape) -> Update:
    """The VAE as the examples of Pyro write it."""
    encoder, decoder = networks(shape)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), shape.latent)
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": LR}), pyro.infer.Trace_ELBO())
    store: Any = {"params": {}, "constraints": {}}

    def update(x: Tensor) -> float:
        # a store of its own costs 8 microseconds a step, its checks off 3
        with pyro.get_param_store().scope(store), pyro.validation_enabled(False):
            return svi.step(x)

    return update


def pyro_step(shape: Shape) -> Call:
    return partial(pyro_update(shape), bits(shape))


def numpyro_svi(shape: Shape) -> Any:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as jax_dist
    from jax.example_libraries import stax
    from numpyro.infer import SVI, Trace_ELBO

    _, pixels, hidden, latent = shape
    scale = stax.serial(stax.Dense(latent), stax.Softplus)
    heads = stax.parallel(stax.Dense(latent), scale)
    encoder = stax.serial(stax.Dense(hidden), stax.Relu, stax.FanOut(2), heads)
    decoder = stax.serial(stax.Dense(hidden), stax.Relu, stax.Dense(pixels))

    def model(x: Any) -> None:
        decode = numpyro.module("decoder", decoder, (len(x), latent))
        with numpyro.plate("data", len(x)):
            prior = jax_dist.Normal(jnp.zeros(latent), jnp.ones(latent)).to_event(1)
            z = numpyro.sample("z", prior)
            numpyro.sample("x", jax_dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        encode = numpyro.module("encoder", encoder, (len(x), pixels))
        with numpyro.plate("data", len(x)):
            loc, scale = encode(x)
            numpyro.sample("z", jax_dist.Normal(loc, scale + 1e-6).to_event(1))

    return SVI(model, guide, numpyro.optim.Adam(LR), Trace_ELBO())


def numpyro_step(shape: Shape, scanned: int | None = None) -> Call:
    """A step whose loss is read, or some in one call whose losses are waited for."""
    import jax

    svi, x = numpyro_svi(shape), jax.numpy.asarray(bits(shape).numpy())
    state = svi.init(jax.random.PRNGKey(0), x)

    def scan(state: Any, x: Any) -> Any:
        return jax.lax.scan(lambda s, _: svi.update(s, x), state, None, length=scanned)

    update = jax.jit(svi.update if scanned is None else scan)

    def step() -> Any:
        nonlocal state
        state, loss = update(state, x)
        return float(loss) if scanned is None else loss.block_until_ready()

    return step


_NUMPYRO = ("jax", "numpyro")
PEERS: dict[str, Peer] = {
    "pyro_vae, eager": Peer(partial(our_step, engine="eager")),
    "pyro_vae, traced": Peer(partial(our_step, engine="traced")),
    "pyro_vae, compiled": Peer(partial(our_step, engine="compiled")),
    "pyro_vae, compiled, medium": Peer(partial(our_step, engine="compiled", precision="medium")),
    "pyro.infer.SVI": Peer(pyro_step),
    "by hand": Peer(hand_step),
    "by hand, medium": Peer(partial(hand_step, precision="medium")),
    "by hand, torch.compile": Peer(partial(hand_step, is_compiled=True)),
    "by hand, torch.compile, medium": Peer(
        partial(hand_step, is_compiled=True, precision="medium")
    ),
    "NumPyro, jit": Peer(numpyro_step, _NUMPYRO),
    "NumPyro, scan of 8": Peer(partial(numpyro_step, scanned=8), _NUMPYRO, steps=8),
}


def our_epochs(
    x: Tensor,
    shape: Shape,
    epochs: int,
    *,
    engine: str,
    precision: str | None = None,
    transform: Any = datasets.binarize,
) -> list[float]:
    history = pv.fit(
        our_vae(shape),
        x,
        lr=LR,
        batch_size=shape.batch_size,
        max_epochs=epochs,
        transform=transform,
        engine=engine,
        precision=precision,
        device="cpu",
        seed=0,
        progress=False,
    )
    return history.table["seconds"].tolist()


def timed(epoch: Call, epochs: int) -> list[float]:
    seconds = []
    with kept_generators():
        for _ in range(epochs):
            start = time.perf_counter()
            epoch()
            seconds.append(time.perf_counter() - start)
    return seconds


def hand_epochs(grey: Tensor, shape: Shape, epochs: int) -> list[float]:
    update, levels = hand_update(shape), grey / 255

    def epoch() -> None:
        for index in torch.randperm(len(levels)).split(shape.batch_size):
            x = levels.index_select(0, index)
            update((torch.rand_like(x) < x).to(x.dtype))

    return timed(epoch, epochs)


def pyro_epochs(grey: Tensor, shape: Shape, epochs: int) -> list[float]:
    """The loop of Pyro's examples: a loader over a data set, one row at a time."""
    update = pyro_update(shape)
    loader = DataLoader(TensorDataset(grey / 255), shape.batch_size, shuffle=True)

    def epoch() -> None:
        for (x,) in loader:
            update((torch.rand_like(x) < x).to(x.dtype))

    return timed(epoch, epochs)


@contextlib.contextmanager
def kept_quiet() -> Iterator[None]:
    """Keeps what other packages print to themselves, and the seeds that they set."""
    before = random.getstate(), np.random.get_state(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    swallowed = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(swallowed),
            contextlib.redirect_stderr(swallowed),
            kept_generators(),
        ):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        logging.disable(before[2])


def pythae_vae(shape: Shape) -> Any:
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encodes(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = Encoder(shape)

        def forward(self, x: Tensor) -> Any:
            loc, scale = self.network(x)
            return ModelOutput(embedding=loc, log_covariance=2 * scale.log())

    class Decodes(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = Decoder(shape)

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(z).sigmoid())

    config = VAEConfig(
        input_dim=(shape.pixels,), latent_dim=shape.latent, reconstruction_loss="bce"
    )
    return VAE(config, Encodes(), Decodes())


def pythae_epochs(grey: Tensor, shape: Shape, epochs: int) -> list[float]:
    with kept_quiet(), tempfile.TemporaryDirectory() as folder:
        from pythae.data.datasets import BaseDataset, DatasetOutput
        from pythae.trainers import BaseTrainer, BaseTrainerConfig
        from pythae.trainers.training_callbacks import TrainingCallback

        class Binarised(BaseDataset):
            def __getitem__(self, index: int) -> Any:
                x = self.data[index]
                drawn = (torch.rand_like(x) < x).to(x.dtype)
                return DatasetOutput(data=drawn, labels=self.labels[index])

        class Clock(TrainingCallback):
            ticks: list[float] = []

            def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
                self.ticks.append(time.perf_counter())

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                self.ticks.append(time.perf_counter())

        config = BaseTrainerConfig(
            output_dir=folder,
            per_device_train_batch_size=shape.batch_size,
            num_epochs=epochs,
            learning_rate=LR,
            no_cuda=True,
        )
        rows = Binarised(grey / 255, torch.zeros(len(grey)))
        clock = Clock()
        BaseTrainer(pythae_vae(shape), rows, None, config, callbacks=[clock]).train()
        return np.diff(clock.ticks).tolist()


def scvi_epochs(grey: Tensor, shape: Shape, epochs: int) -> list[float]:
    """PEAKVI, its model of binary counts, cut down to this one; its rows are binarised once.

    scvi-tools 1.4 asks for pandas below 3, which pyro_vae refuses: both are in one environment
    only by force.
    """
    with kept_quiet(), tempfile.TemporaryDirectory() as folder:
        import anndata
        from lightning.pytorch.callbacks import Callback
        from scvi.model import PEAKVI

        class Clock(Callback):
            def __init__(self) -> None:
                self.ticks: list[float] = []

            def on_train_epoch_start(self, *args: Any) -> None:
                self.ticks.append(time.perf_counter())

            def on_train_end(self, *args: Any) -> None:
                self.ticks.append(time.perf_counter())

        rows = anndata.AnnData(datasets.binarize(grey).numpy())
        PEAKVI.setup_anndata(rows)
        plain: Any = {"model_depth": False, "region_factors": False, "use_layer_norm": "none"}
        layers = {"n_layers_encoder": 1, "n_layers_decoder": 1, "dropout_rate": 0.0}
        model = PEAKVI(rows, shape.hidden, shape.latent, **layers, **plain)
        clock = Clock()
        model.train(
            epochs,
            lr=LR,
            accelerator="cpu",
            train_size=1.0,
            batch_size=shape.batch_size,
            early_stopping=False,
            n_epochs_kl_warmup=None,
            callbacks=[clock],
            default_root_dir=folder,
            enable_progress_bar=False,
        )
        return np.diff(clock.ticks).tolist()


EPOCHS: dict[str, EpochPeer] = {
    "pyro_vae, traced": EpochPeer(partial(our_epochs, engine="traced")),
    "pyro_vae, compiled": EpochPeer(partial(our_epochs, engine="compiled")),
    "pyro_vae, compiled, medium": EpochPeer(
        partial(our_epochs, engine="compiled", precision="medium")
    ),
    "pyro.infer.SVI, DataLoader": EpochPeer(pyro_epochs),
    "by hand, index_select": EpochPeer(hand_epochs),
    "pythae": EpochPeer(pythae_epochs, ("pythae",)),
    "scvi-tools, PEAKVI": EpochPeer(scvi_epochs, ("scvi", "anndata", "lightning")),
}
