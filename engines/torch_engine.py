"""The PyTorch engine: the declared graph on CPUs and current GPUs, from the same files, with MXNet's numbers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from engines.base import (
    LOSS_FLOOR,
    TOP_K,
    Batch,
    Metrics,
    TrainState,
    even_shares,
    peak_process_memory,
    spread_padding,
    sum_batches,
)
from engines.group import Group
from engines.torch_group import check_device, peers_watched, synchronize_batch_norms
from engines.torch_optimizers import Optimizer
from errors import UsageError
from graph.memory import keep_freed_memory
from graph.recompute import RecomputedGraph
from graph.symbol_json import parse
from graph.to_torch import load_params, named_tensors, names_of, read_params, to_torch
from graph.torch_ops import Dropout, SoftmaxOutput

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DATA_NAME = "data"
# Gradient scale for float16: where it starts (SoftmaxOutput's gradient is summed over the batch, so lower than usual)
# and how it follows overflows (PyTorch's own defaults).
FIRST_SCALE, SCALE_GROWTH, SCALE_BACKOFF, SCALE_INTERVAL = 2.0**8, 2.0, 0.5, 2000


class TorchEngine:
    """Trains a Symbol JSON with PyTorch; see engines.base.Engine for the methods.

    symbol_json: a graph that ends in SoftmaxOutput(use_ignore=True, ignore_label=-1). device: "cpu" or "cuda:0".
    dtype: of the arithmetic under autocast; weights stay float32. compile: let torch.compile generate the kernels.
    threads: of the CPU, None for PyTorch's choice. tf32: let GPUs multiply float32 with TF32's 10-bit mantissa.
    memonger: recompute the activations of every unit in the backward pass. group: the processes that train together,
    each with its part of a batch; batch_size is this one's. sync_bn: let them share the statistics of BatchNorms.
    accumulate: cut a batch into so many micro-batches, whose gradients are summed. The other arguments are those of
    SymbolEngine. Raises UsageError for a device that is not there and for combinations that cannot work. Nothing can
    be trained before set_state().
    """

    def __init__(
        self,
        symbol_json: str,
        *,
        image_shape: tuple[int, int, int],
        batch_size: int,
        optimizer: str = "nag",
        momentum: float = 0.9,
        wd: float = 1e-4,
        seed: int = 0,
        device: str = "cpu",
        dtype: str = "float32",
        compile: bool = False,
        threads: int | None = None,
        tf32: bool = True,
        memonger: bool = False,
        group: Group | None = None,
        sync_bn: bool = False,
        accumulate: int = 1,
    ):
        if compile and memonger:
            raise UsageError("--compile and --memonger exclude each other; leave one out")
        self._device = _prepare_device(device, threads, tf32)
        self._dtype = DTYPES[dtype]
        self._seed = seed
        self._group = group or Group()
        self._accumulate = accumulate
        self._graph = parse(symbol_json)
        module = to_torch(self._graph, {DATA_NAME: (batch_size, *image_shape)})
        self._own_statistics = self._group.size > 1 and not sync_bn
        if sync_bn and self._group.size > 1:
            synchronize_batch_norms(module)
        # Convolutions and BatchNorms are fastest on interleaved channels, on CPUs as on GPUs.
        self._module = module.to(self._device, memory_format=torch.channels_last)
        tensors = named_tensors(self._module)
        self._weights = {key[4:]: tensor for key, tensor in tensors.items() if key.startswith("arg:")}
        self._fixed = [self._weights[name] for name in names_of(self._module).fixed_gammas]
        self._optimizer_options = {"optimizer": optimizer, "momentum": momentum, "wd": wd}
        self._optimizer = self._new_optimizer()
        self._draws = any(isinstance(part, Dropout) for part in self._module.modules())
        self._train_forward = RecomputedGraph(self._module) if memonger else self._module
        self._predict_forward = self._module
        if compile:
            self._train_forward = self._predict_forward = torch.compile(self._module)
        if self._group.size > 1:
            self._train_forward = self._replicate()
        self._scaler = _GradientScaler(self._module, self._device) if dtype == "float16" else None
        self._updates = 0
        self._merged = True  # whether all processes have the same moving statistics
        self._tried: set[str] = set()
        self._peak = 0
        self._rows: list[Tensor] = []
        self._counts: list[int] = []

    def train_batch(self, batch: Batch, lr: float, total: int | None = None) -> None:
        with self._trials("train"):
            self._train_batch(batch, lr, total)

    def _train_batch(self, batch: Batch, lr: float, total: int | None) -> None:
        self._module.train()
        if self._draws:
            _seed_update(self._seed, self._updates, self._group.rank)
        images, labels = spread_padding(batch, self._accumulate)
        parts = np.cumsum(even_shares(len(labels), self._accumulate))[:-1]
        sums = [
            self._gradients(*part, last=number == self._accumulate)
            for number, part in enumerate(zip(np.split(images, parts), np.split(labels, parts)), 1)
        ]
        self._updates += 1
        # DistributedDataParallel averages gradients over the processes; the rule here is a mean over rows.
        self._update(lr, self._group.size / max(total or batch.valid, 1))
        self._rows.append(torch.stack(sums).sum(0))
        self._counts.append(batch.valid)
        self._merged = False

    def predict(self, batch: Batch) -> np.ndarray:
        self._merge_statistics()
        self._module.eval()
        with self._trials("predict"), torch.no_grad(), self._precision():
            return self._predict_forward(self._images(batch.images)).float().cpu().numpy()

    def read_metrics(self) -> Metrics:
        rows, counts = self._rows, self._counts
        self._rows, self._counts = [], []
        return sum_batches(torch.stack(rows).cpu().numpy() if rows else np.empty((0, 3), np.float32), counts)

    def get_state(self) -> TrainState:
        self._merge_statistics()
        optimizer = {
            f"{slot}:{name}": tensor.cpu().contiguous().numpy().copy()
            for slot, tensors in self._optimizer.states.items()
            for name, tensor in tensors.items()
        }
        loss_scale = self._scaler.state() if self._scaler else None
        return TrainState(read_params(self._module), optimizer, self._updates, loss_scale)

    def set_state(self, state: TrainState) -> None:
        load_params(self._module, state.params)
        self._optimizer = self._new_optimizer()
        with torch.no_grad():
            for slot, tensors in self._optimizer.states.items():
                for name, tensor in tensors.items():
                    if f"{slot}:{name}" in state.optimizer:
                        tensor.copy_(torch.from_numpy(np.array(state.optimizer[f"{slot}:{name}"], np.float32)))
        if self._scaler:
            self._scaler.set_state(*(state.loss_scale or (FIRST_SCALE, 0)))
        self._updates = state.updates
        self._merged = True

    def peak_memory(self) -> int:
        if self._device.type == "cuda":
            return max(self._peak, torch.cuda.max_memory_allocated(self._device))
        return peak_process_memory()

    def close(self) -> None:
        self._train_forward = self._module  # DistributedDataParallel must not outlive the process group

    def _new_optimizer(self) -> Optimizer:
        return Optimizer(self._weights, self._graph, together=self._device.type == "cuda", **self._optimizer_options)

    def _replicate(self) -> torch.nn.Module:
        """The forward pass under DistributedDataParallel, which averages gradients while the backward pass runs."""
        for gamma in self._fixed:
            gamma.requires_grad_(False)  # they never get a gradient, for which the others would wait
        ids = [self._device.index or 0] if self._device.type == "cuda" else None
        replica = _Replica(self._module, self._train_forward)
        with warnings.catch_warnings():
            # broadcast_buffers got another name in PyTorch 2.13; older releases know this one alone.
            warnings.simplefilter("ignore", FutureWarning)
            return torch.nn.parallel.DistributedDataParallel(replica, device_ids=ids, broadcast_buffers=False)

    def _gradients(self, images: np.ndarray, labels: np.ndarray, last: bool) -> Tensor:
        """Add the gradients of a micro-batch to those that are there; returns batch_sums(). last: of its batch."""
        own = self._on_device(labels)
        alone = self._group.size == 1
        waits = contextlib.nullcontext() if alone or last else self._train_forward.no_sync()
        with waits, contextlib.nullcontext() if alone else peers_watched():
            with self._precision():
                probabilities = self._train_forward(self._images(images), own)
            probabilities.backward(torch.ones_like(probabilities))
        with torch.no_grad():
            return batch_sums(probabilities.detach(), own)

    def _merge_statistics(self) -> None:
        """Average the moving statistics over the processes, which go on from the average, as SymbolEngine does."""
        if not self._own_statistics or self._merged:
            return
        tensors = {key: t for key, t in named_tensors(self._module).items() if key.startswith("aux:")}
        means = self._group.mean({key: tensor.cpu().numpy() for key, tensor in tensors.items()})
        for key, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(means[key]))
        self._merged = True

    @contextlib.contextmanager
    def _trials(self, what: str) -> Iterator[None]:
        """Around a batch: leaves out of the peak what cuDNN takes in the first one to try its algorithms."""
        if self._device.type != "cuda" or what in self._tried:
            yield
            return
        self._peak = self.peak_memory() if self._tried else 0
        self._tried.add(what)
        yield
        torch.cuda.reset_peak_memory_stats(self._device)

    def _precision(self):
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def _images(self, images: np.ndarray) -> Tensor:
        """Raw 0-255 images; their integers are exact in all three precisions."""
        return self._on_device(images).to(self._dtype, memory_format=torch.channels_last)

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            # Out of pageable memory the copy would wait for everything that the GPU has been given before.
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    @torch.no_grad()
    def _update(self, lr: float, rescale: float) -> None:
        for gamma in self._fixed:
            # MXNet writes the 1 that it computes with into the stored value; weight decay then acts on that.
            gamma.fill_(1.0)
            gamma.grad = torch.zeros_like(gamma)
        gradients = {name: weight.grad for name, weight in self._weights.items()}
        if self._scaler is None or self._scaler.unscale(list(gradients.values())):
            self._optimizer.update(gradients, lr, rescale, self._updates)
        for weight in self._weights.values():
            weight.grad = None


class _Replica(torch.nn.Module):
    """A module whose forward pass is `forward`: the module's own, compiled, or one that recomputes activations."""

    def __init__(self, module: torch.nn.Module, forward: Callable):
        super().__init__()
        self.module = module
        self._forward = forward if forward is not module else None

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        # "or" would ask a compiled module for its length, which it does not have.
        return (self.module if self._forward is None else self._forward)(images, labels)


class _GradientScaler:
    """Keeps float16 gradients from underflowing: the loss layers multiply theirs, the optimizer gets the quotient."""

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self._scale = torch.full((), FIRST_SCALE, device=device)
        self._streak = torch.zeros((), dtype=torch.int32, device=device)
        for part in module.modules():
            if isinstance(part, SoftmaxOutput):
                part.factor = self._scale

    def state(self) -> tuple[float, int]:
        """The scale, and the updates since it last changed."""
        return self._scale.item(), int(self._streak.item())

    def set_state(self, scale: float, streak: int) -> None:
        self._scale.fill_(scale)
        self._streak.fill_(streak)

    def unscale(self, gradients: list[Tensor]) -> bool:
        """Divide in place; False when one overflowed, and this update must not happen."""
        overflow = torch.zeros((), device=self._scale.device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, overflow, self._scale.reciprocal())
        growth = SCALE_GROWTH, SCALE_BACKOFF, SCALE_INTERVAL
        torch._amp_update_scale_(self._scale, self._streak, overflow, *growth)
        return not overflow.item()


def _prepare_device(device: str, threads: int | None, tf32: bool) -> torch.device:
    chosen = torch.device(device)
    check_device(device)
    if chosen.type == "cuda":
        # Pinned memory and compiled kernels belong to the current device, which would be the first one otherwise.
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
        if not tf32:
            # What torch.compile says about it is no news then.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores .* available but not enabled")
    else:
        keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    return chosen


def _seed_update(seed: int, update: int, rank: int) -> None:
    """Seed PyTorch's generators from (seed, update, rank): a continued run draws the same dropout masks."""
    entropy = (seed, update, rank) if rank else (seed, update)
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1)


def batch_sums(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(3,): summed loss, top-1 and top-5 hits of a batch, on the device; rows labelled -1 count nowhere.

    The definition is that of training.metrics.batch_metrics.
    """
    counted = labels >= 0
    own = probabilities.gather(1, labels.clamp(min=0).unsqueeze(1))
    earlier = torch.arange(probabilities.shape[1], device=labels.device) < labels.unsqueeze(1)
    rank = ((probabilities > own) | ((probabilities == own) & earlier)).sum(1)
    loss = -torch.log(own.squeeze(1) + LOSS_FLOOR)
    return torch.stack([loss * counted, (rank < 1) & counted, (rank < TOP_K) & counted]).sum(1)
