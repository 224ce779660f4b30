"""The workers of MXNet's parameter server as a group: `--kv-store dist_sync`, `dist_device_sync`, `dist_async`.

A KVStore carries sums of float arrays under keys, and with dist_async not even those, since the servers treat whatever
arrives as a gradient. So the KVStore carries one thing for us, the address of rank 0; sums and decisions of the loop
then go through connections to it. They need open ports between the workers, as the parameter server itself does.
"""

from __future__ import annotations

import os
import secrets
import socket
from multiprocessing.connection import Client, Connection, Listener

import numpy as np

from engines.group import StarGroup
from mxnet_compat import mx

_ADDRESS_BYTES = 256
# A KVStore has either names or numbers for keys; Module uses names, Gluon's Trainer small numbers.
_ADDRESS_KEYS = {str: "group address", int: 2**30}


class KVStoreGroup(StarGroup):
    """Joins the parameter server that the DMLC_* variables describe; waits until all workers are there.

    kind: dist_sync, dist_device_sync or dist_async. key_type: what the engine names parameters with in the KVStore,
    str or int. store: the KVStore, which this process must not create a second time.
    """

    def __init__(self, kind: str, key_type: type = str) -> None:
        self.store = mx.kv.create(kind)
        rank, size = self.store.rank, self.store.num_workers
        peers = _connect(self.store, rank, size, _ADDRESS_KEYS[key_type])
        super().__init__(rank, size, peers, lockstep="async" not in kind)

    def close(self, failed: bool = False) -> None:
        super().close(failed)
        if failed:
            # KVStores end with a barrier, which the others will never reach.
            mx.base.check_call(mx.base._LIB.MXKVStoreSetBarrierBeforeExit(self.store.handle, 0))


def _connect(store: mx.kv.KVStore, rank: int, size: int, key: object) -> list[Connection]:
    """Connections of rank 0 to all others, in the order of ranks, or of another rank to rank 0."""
    if rank:
        host, port, secret = _exchange(store, key, "").split()
        connection = Client((host, int(port)), authkey=bytes.fromhex(secret))
        connection.send(rank)
        return [connection]
    secret = secrets.token_bytes(16)
    with Listener(("", 0), backlog=size, authkey=secret) as listener:
        _exchange(store, key, f"{_own_host()} {listener.address[1]} {secret.hex()}")
        accepted = [listener.accept() for _ in range(size - 1)]
    by_rank = {connection.recv(): connection for connection in accepted}
    return [by_rank[other] for other in range(1, size)]


def _exchange(store: mx.kv.KVStore, key: object, text: str) -> str:
    """The text of rank 0, through the KVStore: one float32 a byte."""
    codes = np.frombuffer(text.encode().ljust(_ADDRESS_BYTES, b"\0"), np.uint8)
    store.init(key, mx.nd.array(codes, dtype="float32"))
    received = mx.nd.zeros((_ADDRESS_BYTES,))
    store.pull(key, out=received)
    return bytes(received.asnumpy().astype(np.uint8)).rstrip(b"\0").decode()


def _own_host() -> str:
    """The address under which the other workers reach this machine: that of its way to the scheduler."""
    if os.environ.get("DMLC_NODE_HOST"):
        return os.environ["DMLC_NODE_HOST"]
    scheduler = (os.environ["DMLC_PS_ROOT_URI"], int(os.environ["DMLC_PS_ROOT_PORT"]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(scheduler)
        return probe.getsockname()[0]
