"""Processes that torchrun (or engines.torch_launch) started, as a group: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from engines.group import Group, PeerLost
from errors import UsageError, exit_status_of
from graph.torch_ops import BatchNorm
from training.heartbeat import LAUNCHER_VARIABLE
from training.launch_processes import die_with

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
# How both backends call a peer that has gone; PyTorch has no kind of error of its own for it.
_LOST = ("gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe", "Socket Timeout", "process group")


class TorchGroup(Group):
    """Joins the process group that the environment describes. device: of this process, "cpu" or "cuda:0"."""

    def __init__(self, device: str) -> None:
        self._status: int | None = None  # that the process ends with, once the training is over
        die_with(int(os.environ.get(LAUNCHER_VARIABLE) or os.getppid()))
        kind = torch.device(device).type
        check_device(device)
        if kind == "cuda":
            torch.cuda.set_device(device)
        store, self.rank, self.size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # PyTorch's agent keeps its store when it starts the processes again, with the addresses of those that
            # died in it. (On several machines the agents count restarts differently; see docs/distributed.md.)
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(_BACKENDS[kind], store=store, rank=self.rank, world_size=self.size)

    def sum(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        total = torch.from_numpy(np.array(values, np.float64))
        with peers_watched():
            dist.all_reduce(total)
        return total.numpy()

    def broadcast(self, payload: bytes) -> bytes:
        length = torch.tensor([len(payload)])
        with peers_watched():
            dist.broadcast(length, 0)
            data = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)
            if not self.leads:
                data = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def final_status(self, status: int) -> int:
        self._status = status
        return status

    def __exit__(self, kind: object, error: BaseException | None, *rest: object) -> None:
        if error is not None:
            self._status = exit_status_of(error)
        super().__exit__(kind, error, *rest)

    def close(self, failed: bool = False) -> None:
        if not failed:
            self.sum([0.0])  # all wait for each other, over gloo: NCCL's barrier would have to guess a device
        # After a failure NCCL would wait for peers that are gone; the process ends without it.
        if not failed or not torch.cuda.is_initialized():
            dist.destroy_process_group()
        if self._status is not None:
            atexit.register(_end, self._status)


def check_device(device: str) -> None:
    """UsageError where PyTorch has no such device."""
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise UsageError("PyTorch sees no GPU: install a CUDA build of torch, or leave out --gpus for the CPU")
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no GPU {chosen.index}; PyTorch sees {torch.cuda.device_count()}")


def _end(status: int) -> None:
    """End the process without taking the interpreter apart.

    gloo's threads survive destroy_process_group() once DistributedDataParallel was used, and release what they hold of
    Python's when it suits them; in an interpreter that is half gone that aborts the process (PyTorch 2.13). A process
    group with NCCL that was not destroyed complains and waits there.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None where it was closed from the start
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def peers_watched() -> Iterator[None]:
    """Turns the error that PyTorch raises when another process has gone into one line."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in _LOST):
            raise
        raise PeerLost("another process of the job ended; its own message says why") from error


class _Sum(torch.autograd.Function):
    """Sum over the processes, of values on the way forward and of gradients on the way back."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm(BatchNorm):
    """BatchNorm with the statistics of all processes' rows; every process must have equally many."""

    def _train(self, data, gamma, beta, mean, variance) -> torch.Tensor:
        kept = [axis for axis in range(data.dim()) if axis != 1]
        shape = [1, -1] + [1] * (data.dim() - 2)
        count = data.numel() // data.shape[1] * dist.get_world_size()
        exact = data.float()
        batch_mean = _Sum.apply(exact.sum(kept)) / count
        centred = exact - batch_mean.view(shape)
        batch_variance = _Sum.apply(centred.square().sum(kept)) / count
        if not self.frozen:
            with torch.no_grad():
                mean.lerp_(batch_mean, 1 - self.momentum)
                variance.lerp_(batch_variance, 1 - self.momentum)
        output = centred * torch.rsqrt(batch_variance + self.eps).view(shape)
        output = output if gamma is None else output * gamma.view(shape)
        return (output + beta.view(shape)).to(data.dtype)


def synchronize_batch_norms(module: nn.Module) -> None:
    """Replace every BatchNorm in `module` by one that shares its statistics with the other processes."""
    for name, part in list(module.named_modules()):
        if isinstance(part, BatchNorm):
            synced = SyncedBatchNorm(part.eps, part.momentum, part.fix_gamma, part.use_global_stats, part.axis)
            module.set_submodule(name, synced)
