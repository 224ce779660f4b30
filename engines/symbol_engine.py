"""The reference engine: MXNet's Module executes the declared graph on one or several contexts."""

from __future__ import annotations

import numpy as np

from engines.base import Batch, Metrics, TrainState, even_shares
from engines.group import Group
from engines.mxnet_common import (
    DATA_NAME,
    LABEL_NAME,
    DeviceMetrics,
    Places,
    device_images,
    draws_random_numbers,
    optimizer_arguments,
    peak_memory,
    read_optimizer,
    seed_update,
    state_slots,
    training_rows,
    write_optimizer,
)
from graph.cpu_training import for_cpu_training
from mxnet_compat import mx


class SymbolEngine:
    """Trains `symbol` with mx.mod.Module; see engines.base.Engine for the methods.

    symbol: ends in SoftmaxOutput(use_ignore=True, ignore_label=-1). image_shape: (3, H, W). batch_size: rows of all
    contexts together. wd acts on parameters whose name ends in _weight or _gamma (MXNet's rule). seed decides the
    dropout masks, which are drawn from (seed, update, rank) so that a continued run draws the same ones.
    kv_store: a name, or the KVStore of `group`, the processes that train together; batch_size is this one's part.
    Nothing can be trained before set_state().
    """

    def __init__(
        self,
        symbol: mx.sym.Symbol,
        contexts: list[mx.Context],
        *,
        image_shape: tuple[int, int, int],
        batch_size: int,
        optimizer: str = "nag",
        momentum: float = 0.9,
        wd: float = 1e-4,
        kv_store: str | mx.kv.KVStore = "device",
        seed: int = 0,
        group: Group | None = None,
    ):
        self._symbol, self._contexts = symbol, contexts
        self._shapes = [(DATA_NAME, (batch_size, *image_shape))], [(LABEL_NAME, (batch_size,))]
        self._shares = even_shares(batch_size, len(contexts))
        on_cpu = all(context.device_type == "cpu" for context in contexts)
        self._module = self._new_module(mx.sym.load_json(for_cpu_training(symbol.tojson())) if on_cpu else symbol)
        self._module.bind(*self._shapes)
        self._inference: mx.mod.Module | None = None  # bound while weights stay as they are
        self._optimizer_name = optimizer
        self._optimizer_args = optimizer_arguments(optimizer, momentum, wd)
        self._slots = state_slots(optimizer, momentum)
        self._kv_store = kv_store
        self._seed = seed
        self._group = group or Group()
        # Seeding costs a call into every device; only dropout draws random numbers.
        self._draws = draws_random_numbers(symbol)
        self._updates = 0
        self._metrics = DeviceMetrics()

    def train_batch(self, batch: Batch, lr: float, total: int | None = None) -> None:
        self._inference = None
        if self._draws:
            seed_update(self._seed, self._updates, self._group.rank)
        images, labels = training_rows(batch, len(self._contexts))
        self._module.forward(mx.io.DataBatch([images], [labels], pad=batch.pad), is_train=True)
        self._module.backward()
        self._prepare_optimizer(lr, total or batch.valid)
        self._module.update()
        self._updates += 1
        self._metrics.add(self._module.get_outputs()[0], labels, batch.valid)

    def predict(self, batch: Batch) -> np.ndarray:
        if self._inference is None:
            self._inference = self._bind_inference()
        self._inference.forward(mx.io.DataBatch([device_images(batch)], None), is_train=False)
        return self._inference.get_outputs()[0].asnumpy()

    def read_metrics(self) -> Metrics:
        return self._metrics.read()

    def get_state(self) -> TrainState:
        arg_params, aux_params = self._read_params()
        symbol = self._module.symbol
        if len(self._module._context) > 1 or self._group.size > 1:
            # Moving statistics differ between devices and were averaged just now. The devices go on from the
            # average, as a run does that is continued from these files (Module.fit does the same after an epoch).
            self._module.set_params(arg_params, aux_params)
        params = {f"arg:{name}": arg_params[name].asnumpy() for name in symbol.list_arguments() if name in arg_params}
        params.update({f"aux:{name}": aux_params[name].asnumpy() for name in symbol.list_auxiliary_states()})
        return TrainState(params, read_optimizer(self._places(), self._slots), self._updates)

    def set_state(self, state: TrainState) -> None:
        # Arrays of an empty dictionary cannot be told from a missing one by Module, so both kinds are always passed.
        groups = {"arg": {}, "aux": {}}
        for key, value in state.params.items():
            kind, name = key.split(":", 1)
            groups[kind][name] = mx.nd.array(value, dtype=value.dtype)
        self._module.init_params(arg_params=groups["arg"], aux_params=groups["aux"], force_init=True)
        self._updates = state.updates
        self._inference = None
        # The KVStore copies the weights when the optimizer is set up, so that always comes after the weights.
        self._module.init_optimizer(
            self._kv_store,
            self._optimizer_name,
            {**self._optimizer_args, "begin_num_update": state.updates},
            force_init=True,
        )
        write_optimizer(self._places(), self._slots, state.optimizer)

    def peak_memory(self) -> int:
        return peak_memory(self._contexts)

    def close(self) -> None:
        mx.nd.waitall()

    def _new_module(self, symbol: mx.sym.Symbol) -> mx.mod.Module:
        return mx.mod.Module(symbol, [DATA_NAME], [LABEL_NAME], context=self._contexts, work_load_list=self._shares)

    def _prepare_optimizer(self, lr: float, rows: int) -> None:
        """Rate and scale of the next update; `rows` count in it."""
        optimizer = self._module._optimizer
        if self._group.lockstep:
            optimizer.lr = lr
            optimizer.rescale_grad = 1.0 / max(rows, 1)
        elif optimizer.lr != lr:
            # The servers of dist_async work with a copy, which is sent anew (and forgets its momentum) when the rate
            # changes. Its scale stays that of a whole batch: rows of padding have no gradient.
            optimizer.lr = lr
            if self._group.leads:
                self._kv_store.set_optimizer(optimizer)

    def _bind_inference(self) -> mx.mod.Module:
        """A module of its own for inference with the weights of now.

        On CPUs, inference leaves weights in oneDNN's layouts behind, and training on such arrays is not reproducible:
        which kernel meets which layout is a race. And its fused convolutions keep what they folded from the first
        weights they saw, so new weights need a new binding.
        """
        module = self._new_module(self._symbol)
        module.bind(*self._shapes, for_training=False)
        arg_params, aux_params = self._read_params()
        module.init_params(arg_params=arg_params, aux_params=aux_params)
        return module

    def _read_params(self) -> tuple[dict, dict]:
        """Arguments and auxiliary states on the host, the latter averaged over all devices of all processes."""
        # BatchNorm writes its moving statistics behind the dependency engine's back (on CPUs, in the backward pass).
        mx.nd.waitall()
        arg_params, aux_params = self._module.get_params()
        if self._group.size > 1:
            means = self._group.mean({name: array.asnumpy() for name, array in aux_params.items()})
            aux_params = {name: mx.nd.array(array) for name, array in means.items()}
        return arg_params, aux_params

    def _places(self) -> Places:
        """The name is the key where the KVStore updates; else every device has a number for every parameter."""
        module = self._module
        names = module._exec_group.param_names
        if not self._group.lockstep:
            return {}  # on the servers, which do not hand it out
        if module._update_on_kvstore:
            return {name: [(module._kvstore._updater, name)] for name in names}
        devices = len(module._context)
        return {
            name: [(module._updater, index * devices + device) for device in range(devices)]
            for index, name in enumerate(names)
        }
