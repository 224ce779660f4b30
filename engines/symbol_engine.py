"""The reference engine: MXNet's Module executes the declared graph on one or several contexts."""

from __future__ import annotations

import json

import numpy as np

from engines.base import IGNORED_LABEL, LOSS_FLOOR, TOP_K, Batch, Metrics, TrainState, sum_batches
from mxnet_compat import mx

DATA_NAME, LABEL_NAME = "data", "softmax_label"
# Names of the arrays that an MXNet optimizer keeps for a parameter, in MXNet's order.
STATE_SLOTS = {"nag": ("momentum",), "sgd": ("momentum",), "adam": ("mean", "variance")}


class SymbolEngine:
    """Trains `symbol` with mx.mod.Module; see engines.base.Engine for the methods.

    symbol: ends in SoftmaxOutput(use_ignore=True, ignore_label=-1). image_shape: (3, H, W). batch_size: rows of all
    contexts together. wd acts on parameters whose name ends in _weight or _gamma (MXNet's rule). seed decides the
    dropout masks, which are drawn from (seed, update) so that a continued run draws the same ones.
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
        kv_store: str = "device",
        seed: int = 0,
    ):
        self._symbol, self._contexts = symbol, contexts
        self._shapes = [(DATA_NAME, (batch_size, *image_shape))], [(LABEL_NAME, (batch_size,))]
        self._module = mx.mod.Module(symbol, [DATA_NAME], [LABEL_NAME], context=contexts)
        self._module.bind(*self._shapes)
        self._inference: mx.mod.Module | None = None  # bound while weights stay as they are
        self._optimizer_name = optimizer
        self._optimizer_args = {"wd": wd}
        if optimizer != "adam":
            self._optimizer_args["momentum"] = momentum
        self._kv_store = kv_store
        self._seed = seed
        # Seeding costs a call into every device; only dropout draws random numbers.
        self._draws = any(node["op"] == "Dropout" for node in json.loads(symbol.tojson())["nodes"])
        self._updates = 0
        self._rows: list[mx.nd.NDArray] = []
        self._counts: list[int] = []

    def train_batch(self, batch: Batch, lr: float) -> None:
        self._inference = None
        if self._draws:
            mx.random.seed(int(np.random.SeedSequence((self._seed, self._updates)).generate_state(1)[0] >> 1))
        labels = batch.labels.astype(np.float32)
        labels[batch.valid :] = IGNORED_LABEL
        labels = mx.nd.array(labels)
        self._module.forward(mx.io.DataBatch([self._images(batch)], [labels], pad=batch.pad), is_train=True)
        self._module.backward()
        optimizer = self._module._optimizer
        optimizer.lr = lr
        optimizer.rescale_grad = 1.0 / max(batch.valid, 1)
        self._module.update()
        self._updates += 1
        self._rows.append(_batch_sums(self._module.get_outputs()[0], labels))
        self._counts.append(batch.valid)

    def predict(self, batch: Batch) -> np.ndarray:
        if self._inference is None:
            self._inference = self._bind_inference()
        self._inference.forward(mx.io.DataBatch([self._images(batch)], None), is_train=False)
        return self._inference.get_outputs()[0].asnumpy()

    def read_metrics(self) -> Metrics:
        rows, counts = self._rows, self._counts
        self._rows, self._counts = [], []
        return sum_batches(mx.nd.stack(*rows).asnumpy() if rows else np.empty((0, 3), np.float32), counts)

    def get_state(self) -> TrainState:
        arg_params, aux_params = self._read_params()
        if len(self._module._context) > 1:
            # Moving statistics differ between devices and were averaged just now. The devices go on from the
            # average, as a run does that is continued from these files (Module.fit does the same after an epoch).
            self._module.set_params(arg_params, aux_params)
        symbol = self._module.symbol
        params = {f"arg:{name}": arg_params[name].asnumpy() for name in symbol.list_arguments() if name in arg_params}
        params.update({f"aux:{name}": aux_params[name].asnumpy() for name in symbol.list_auxiliary_states()})
        return TrainState(params, self._read_optimizer(), self._updates)

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
        self._write_optimizer(state.optimizer)

    def close(self) -> None:
        mx.nd.waitall()

    def _bind_inference(self) -> mx.mod.Module:
        """A module of its own for inference with the weights of now.

        On CPUs, inference leaves weights in oneDNN's layouts behind, and training on such arrays is not reproducible:
        which kernel meets which layout is a race. And its fused convolutions keep what they folded from the first
        weights they saw, so new weights need a new binding.
        """
        module = mx.mod.Module(self._symbol, [DATA_NAME], [LABEL_NAME], context=self._contexts)
        module.bind(*self._shapes, for_training=False)
        arg_params, aux_params = self._read_params()
        module.init_params(arg_params=arg_params, aux_params=aux_params)
        return module

    def _read_params(self) -> tuple[dict, dict]:
        """Arguments and auxiliary states on the host, the latter averaged over the devices."""
        # BatchNorm writes its moving statistics behind the dependency engine's back (on CPUs, in the backward pass).
        mx.nd.waitall()
        return self._module.get_params()

    def _images(self, batch: Batch) -> mx.nd.NDArray:
        return mx.nd.array(batch.images, dtype="float32")

    def _updater(self):
        module = self._module
        return module._kvstore._updater if module._update_on_kvstore else module._updater

    def _state_keys(self) -> list[tuple[str, list]]:
        """(parameter name, its keys in the updater): the name where the KVStore updates, else a number a device."""
        names = self._module._exec_group.param_names
        if self._module._update_on_kvstore:
            return [(name, [name]) for name in names]
        devices = len(self._module._context)
        return [(name, [index * devices + k for k in range(devices)]) for index, name in enumerate(names)]

    def _slots(self) -> tuple[str, ...]:
        plain = self._optimizer_args.get("momentum") == 0.0
        return () if plain else STATE_SLOTS[self._optimizer_name]

    def _read_optimizer(self) -> dict[str, np.ndarray]:
        states = self._updater().states
        arrays = {}
        for name, keys in self._state_keys():
            if keys[0] in states:
                for slot, array in zip(self._slots(), _as_tuple(states[keys[0]])):
                    arrays[f"{slot}:{name}"] = array.asnumpy()
        return arrays

    def _write_optimizer(self, arrays: dict[str, np.ndarray]) -> None:
        """Put saved optimizer arrays where MXNet's updater looks for them; without any, it starts from zeros."""
        if not arrays or not self._slots():
            return
        updater = self._updater()
        for name, keys in self._state_keys():
            if f"{self._slots()[0]}:{name}" not in arrays:
                continue
            values = [arrays[f"{slot}:{name}"] for slot in self._slots()]
            for key, context in zip(keys, self._module._context):
                state = tuple(mx.nd.array(value, ctx=context, dtype=value.dtype) for value in values)
                updater.states[key] = state if len(state) > 1 else state[0]
                updater.states_synced[key] = True


def _batch_sums(probabilities: mx.nd.NDArray, labels: mx.nd.NDArray) -> mx.nd.NDArray:
    """(3,): summed loss, top-1 and top-5 hits of a batch, on the device; rows labelled -1 count nowhere.

    The definition is that of training.metrics.batch_metrics.
    """
    labels = labels.as_in_context(probabilities.context)
    counted = labels >= 0
    own = mx.nd.pick(probabilities, mx.nd.maximum(labels, 0), axis=1, keepdims=True)
    classes = mx.nd.arange(probabilities.shape[1], ctx=probabilities.context).expand_dims(0)
    earlier = mx.nd.broadcast_lesser(classes, labels.expand_dims(1))
    before = mx.nd.broadcast_greater(probabilities, own) + mx.nd.broadcast_equal(probabilities, own) * earlier
    rank = before.sum(axis=1)
    loss = -mx.nd.log(own.reshape((-1,)) + LOSS_FLOOR)
    return mx.nd.stack(loss * counted, (rank < 1) * counted, (rank < TOP_K) * counted).sum(axis=1)


def _as_tuple(state) -> tuple:
    return state if isinstance(state, tuple) else (state,)
