"""The PyTorch engine: the declared graph on CPUs and current GPUs, from the same files, with MXNet's numbers."""

from __future__ import annotations

import contextlib
import resource

import numpy as np
import torch
from torch import Tensor

from engines.base import IGNORED_LABEL, LOSS_FLOOR, TOP_K, Batch, Metrics, TrainState, sum_batches
from engines.torch_optimizers import Optimizer
from errors import UsageError
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
    memonger: recompute the activations of every unit in the backward pass. The other arguments are those of
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
    ):
        if compile and memonger:
            raise UsageError("--compile and --memonger exclude each other; leave one out")
        self._device = _prepare_device(device, threads, tf32)
        self._dtype = DTYPES[dtype]
        self._seed = seed
        self._graph = parse(symbol_json)
        module = to_torch(self._graph, {DATA_NAME: (batch_size, *image_shape)})
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
        self._scaler = _GradientScaler(self._module, self._device) if dtype == "float16" else None
        self._updates = 0
        self._rows: list[Tensor] = []
        self._counts: list[int] = []

    def train_batch(self, batch: Batch, lr: float, total: int | None = None) -> None:
        self._module.train()
        if self._draws:
            _seed_update(self._seed, self._updates)
        labels = self._labels(batch)
        with self._precision():
            probabilities = self._train_forward(self._images(batch), labels)
        probabilities.backward(torch.ones_like(probabilities))
        self._updates += 1
        self._update(lr, 1.0 / max(total or batch.valid, 1))
        with torch.no_grad():
            self._rows.append(batch_sums(probabilities.detach(), labels))
        self._counts.append(batch.valid)

    def predict(self, batch: Batch) -> np.ndarray:
        self._module.eval()
        with torch.no_grad(), self._precision():
            return self._predict_forward(self._images(batch)).float().cpu().numpy()

    def read_metrics(self) -> Metrics:
        rows, counts = self._rows, self._counts
        self._rows, self._counts = [], []
        return sum_batches(torch.stack(rows).cpu().numpy() if rows else np.empty((0, 3), np.float32), counts)

    def get_state(self) -> TrainState:
        optimizer = {
            f"{slot}:{name}": tensor.cpu().contiguous().numpy().copy()
            for slot, tensors in self._optimizer.states.items()
            for name, tensor in tensors.items()
        }
        return TrainState(read_params(self._module), optimizer, self._updates)

    def set_state(self, state: TrainState) -> None:
        load_params(self._module, state.params)
        self._optimizer = self._new_optimizer()
        with torch.no_grad():
            for slot, tensors in self._optimizer.states.items():
                for name, tensor in tensors.items():
                    if f"{slot}:{name}" in state.optimizer:
                        tensor.copy_(torch.from_numpy(np.array(state.optimizer[f"{slot}:{name}"], np.float32)))
        self._updates = state.updates

    def peak_memory(self) -> int:
        """Most bytes held so far: by PyTorch on a GPU, by the whole process on CPUs."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _new_optimizer(self) -> Optimizer:
        return Optimizer(self._weights, self._graph, together=self._device.type == "cuda", **self._optimizer_options)

    def _precision(self):
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def _images(self, batch: Batch) -> Tensor:
        """Raw 0-255 images; their integers are exact in all three precisions."""
        images = torch.from_numpy(batch.images).to(self._device, non_blocking=True)
        return images.to(self._dtype, memory_format=torch.channels_last)

    def _labels(self, batch: Batch) -> Tensor:
        labels = np.array(batch.labels, dtype=np.int64)
        labels[batch.valid :] = IGNORED_LABEL
        return torch.from_numpy(labels).to(self._device, non_blocking=True)

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


class _GradientScaler:
    """Keeps float16 gradients from underflowing: the loss layers multiply theirs, the optimizer gets the quotient."""

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self._scale = torch.full((), FIRST_SCALE, device=device)
        self._streak = torch.zeros((), dtype=torch.int32, device=device)
        for part in module.modules():
            if isinstance(part, SoftmaxOutput):
                part.factor = self._scale

    def unscale(self, gradients: list[Tensor]) -> bool:
        """Divide in place; False when one overflowed, and this update must not happen."""
        overflow = torch.zeros((), device=self._scale.device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, overflow, self._scale.reciprocal())
        growth = SCALE_GROWTH, SCALE_BACKOFF, SCALE_INTERVAL
        torch._amp_update_scale_(self._scale, self._streak, overflow, *growth)
        return not overflow.item()


def _prepare_device(device: str, threads: int | None, tf32: bool) -> torch.device:
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("PyTorch sees no GPU: install a CUDA build of torch, or leave out --gpus for the CPU")
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"there is no GPU {chosen.index}; PyTorch sees {torch.cuda.device_count()}")
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
    if threads is not None:
        torch.set_num_threads(threads)
    return chosen


def _seed_update(seed: int, update: int) -> None:
    """Seed PyTorch's generators from (seed, update), so that a continued run draws the same dropout masks."""
    torch.manual_seed(int(np.random.SeedSequence((seed, update)).generate_state(1, np.uint64)[0]) >> 1)


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
