"""Processes that train one network together, as the training loop sees them: sums, and what the first one decides.

Gradients are not exchanged here: the engines leave that to MXNet's KVStore or to PyTorch's DistributedDataParallel.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Callable, TypeVar

import numpy as np

from engines.base import Metrics
from errors import ProjectError, SaidElsewhere

T = TypeVar("T")


class PeerLost(ProjectError):
    """Another process of the group ended before its work was done.

    The exit status of its own tells launchers that this process is not the one that failed.
    """

    exit_status = 3


class Group:
    """A group of one, and the base of larger ones.

    rank: number of this process, from 0. size: processes in all. lockstep: whether the processes do their updates
    together; where they do not, only `gather_sum` and `decide` keep them together, and every process stops on its own.
    Every method must be called by all processes in the same order.
    """

    rank = 0
    size = 1
    lockstep = True

    @property
    def leads(self) -> bool:
        """Whether this process writes checkpoints and logs."""
        return self.rank == 0

    def sum(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Sums over the processes, element by element: float64 in the shape of `values`."""
        return np.asarray(values, np.float64)

    def broadcast(self, payload: bytes) -> bytes:
        """The bytes of rank 0; what the others hand in does not matter."""
        return payload

    def final_status(self, status: int) -> int:
        """What this process should end with when the training ended with `status`."""
        return status

    def close(self, failed: bool = False) -> None:
        """Leave the group. failed: the others will not come to the end, so do not wait for them."""

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)

    def mean(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same arrays averaged over the processes, each in its own type."""
        if self.size == 1 or not arrays:
            return arrays
        flat = np.concatenate([array.ravel().astype(np.float64) for array in arrays.values()])
        parts = np.split(self.sum(flat) / self.size, np.cumsum([array.size for array in arrays.values()])[:-1])
        return {
            name: part.reshape(array.shape).astype(array.dtype) for part, (name, array) in zip(parts, arrays.items())
        }

    def sum_metrics(self, metrics: Metrics) -> Metrics:
        """Metrics of all processes."""
        if self.size == 1:
            return metrics
        count, loss, top1, top5 = self.sum([metrics.count, metrics.loss_sum, metrics.top1_sum, metrics.top5_sum])
        return Metrics(int(count), float(loss), int(top1), int(top5))

    def decide(self, choose: Callable[[], T]) -> T:
        """What `choose` returns on rank 0; where it raises a ProjectError there, the others raise SaidElsewhere."""
        if self.size == 1:
            return choose()
        chosen: object = None
        if self.leads:
            try:
                chosen = choose()
            except ProjectError as error:
                chosen = error
        # Between the processes of one run, which trust each other; nothing of this reaches a file.
        result = pickle.loads(self.broadcast(pickle.dumps(chosen) if self.leads else b""))
        if isinstance(result, ProjectError):
            raise result if self.leads else SaidElsewhere(result.exit_status)
        return result

    def attempt(self, action: Callable[[], T]) -> T:
        """What `action` returns here, once it has succeeded in all processes.

        Where it raises a ProjectError in some of them, the first of those raises its own and the others
        SaidElsewhere, so that all end and the user reads one message.
        """
        if self.size == 1:
            return action()
        own, result = None, None
        try:
            result = action()
        except ProjectError as error:
            own = error
        statuses = np.zeros(self.size)
        statuses[self.rank] = own.exit_status if own else 0
        statuses = self.sum(statuses)
        failed = np.flatnonzero(statuses)
        if not len(failed):
            return result
        if own and failed[0] == self.rank:
            raise own
        raise SaidElsewhere(int(statuses[failed[0]])) from own


class StarGroup(Group):
    """A group whose ranks 1, 2, ... each hold a connection to rank 0. peers: rank 0's, in the order of ranks."""

    def __init__(self, rank: int, size: int, peers: Sequence[Connection], *, lockstep: bool = True) -> None:
        self.rank, self.size, self.lockstep = rank, size, lockstep
        self._peers = list(peers)

    def sum(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        values = np.ascontiguousarray(values, np.float64)
        if self.leads:
            # In the order of ranks, so that the rounding is the same every time.
            total = values.copy()
            for peer in range(len(self._peers)):
                total += np.frombuffer(self._receive(peer), np.float64).reshape(values.shape)
            self._tell_all(total.tobytes())
            return total
        self._send(0, values.tobytes())
        return np.frombuffer(self._receive(0), np.float64).reshape(values.shape).copy()

    def broadcast(self, payload: bytes) -> bytes:
        if not self.leads:
            return self._receive(0)
        self._tell_all(payload)
        return payload

    def close(self, failed: bool = False) -> None:
        for peer in self._peers:
            peer.close()

    def _tell_all(self, payload: bytes) -> None:
        for peer in range(len(self._peers)):
            self._send(peer, payload)

    def _send(self, peer: int, payload: bytes) -> None:
        try:
            self._peers[peer].send_bytes(payload)
        except OSError as error:
            raise self._lost(peer) from error

    def _receive(self, peer: int) -> bytes:
        try:
            return self._peers[peer].recv_bytes()
        except (EOFError, OSError) as error:
            raise self._lost(peer) from error

    def _lost(self, peer: int) -> PeerLost:
        rank = peer + 1 if self.leads else 0
        return PeerLost(f"rank {rank} ended before rank {self.rank} was done; its own message says why")
