"""The imperative engine: a hybridized Gluon network, autograd and gluon.Trainer, on one or several contexts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engines.base import IGNORED_LABEL, Batch, Metrics, TrainState, even_shares
from engines.group import Group
from engines.mxnet_common import (
    DATA_NAME,
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

import mxnet.gluon as mxgluon  # isort: skip - after mxnet_compat


class GluonEngine:
    """Trains a HybridBlock with gluon.Trainer; see engines.base.Engine for the methods.

    net: maps images (N, 3, H, W), raw 0-255 float32, to logits (N, classes); its parameters need no initialisation,
    and weight decay follows their `wd_mult`. hybridize: execute the network as one static graph; False executes it
    operator by operator. The other arguments are those of SymbolEngine. Nothing can be trained before set_state().
    """

    def __init__(
        self,
        net: mxgluon.HybridBlock,
        contexts: list[mx.Context],
        *,
        optimizer: str = "nag",
        momentum: float = 0.9,
        wd: float = 1e-4,
        kv_store: str | mx.kv.KVStore = "device",
        seed: int = 0,
        group: Group | None = None,
        hybridize: bool = True,
    ):
        data = mx.sym.var(DATA_NAME, dtype="float32")
        logits = net(data)
        self._arguments = [name for name in logits.list_arguments() if name != DATA_NAME]
        self._aux = logits.list_auxiliary_states()
        self._draws = draws_random_numbers(logits)
        # Inference has arrays of its own. On CPUs it leaves weights in oneDNN's layouts behind, and training on such
        # arrays is not reproducible: which kernel meets which layout is a race.
        self._inference = mxgluon.SymbolBlock(mx.sym.softmax(logits), data)
        self._inference_updates: int | None = None  # updates in the weights that inference holds
        own = net.collect_params()
        if hybridize and all(context.device_type == "cpu" for context in contexts):
            # The trace of the network, as hybridize() would take it, in faster operators.
            net = mxgluon.SymbolBlock(mx.sym.load_json(for_cpu_training(logits.tojson())), data, params=own)
        self._net = net
        if hybridize:
            net.hybridize(static_alloc=True, static_shape=True)
            self._inference.hybridize(static_alloc=True, static_shape=True)
        self._parameters = {name: own[name] for name in [*self._arguments, *self._aux]}
        self._contexts = contexts
        self._optimizer_name = optimizer
        self._optimizer_args = optimizer_arguments(optimizer, momentum, wd)
        self._slots = state_slots(optimizer, momentum)
        self._kv_store = kv_store
        self._seed = seed
        self._group = group or Group()
        self._trainer: mxgluon.Trainer | None = None
        self._updates = 0
        self._metrics = DeviceMetrics()

    def train_batch(self, batch: Batch, lr: float, total: int | None = None) -> None:
        if self._draws:
            seed_update(self._seed, self._updates, self._group.rank)
        images, labels = training_rows(batch, len(self._contexts))
        with mx.autograd.record():
            outputs = [
                self._probabilities(self._net(own), own_labels)
                for own, own_labels in zip(self._split(images), self._split(labels))
            ]
        mx.autograd.backward(outputs)
        self._trainer.set_learning_rate(lr)
        self._trainer.step(max(total or batch.valid, 1))
        self._updates += 1
        gathered = [output.as_in_context(self._contexts[0]) for output in outputs]
        self._metrics.add(mx.nd.concat(*gathered, dim=0), labels, batch.valid)

    def predict(self, batch: Batch) -> np.ndarray:
        if self._inference_updates != self._updates:
            self._load(self._inference.collect_params(), self._read_params())
            self._inference_updates = self._updates
        outputs = [self._inference(images) for images in self._split(device_images(batch))]
        return np.concatenate([output.asnumpy() for output in outputs])

    def read_metrics(self) -> Metrics:
        return self._metrics.read()

    def get_state(self) -> TrainState:
        arrays = self._read_params()
        if len(self._contexts) > 1 or self._group.size > 1:
            # Moving statistics differ between devices and were averaged just now. The devices go on from the
            # average, as a run does that is continued from these files (and as SymbolEngine does).
            for name in self._aux:
                self._parameters[name].set_data(mx.nd.array(arrays[name]))
        params = {f"arg:{name}": arrays[name] for name in self._arguments}
        params.update({f"aux:{name}": arrays[name] for name in self._aux})
        return TrainState(params, read_optimizer(self._places(), self._slots), self._updates)

    def set_state(self, state: TrainState) -> None:
        self._load(self._parameters, {key.split(":", 1)[1]: value for key, value in state.params.items()})
        self._updates = state.updates
        self._inference_updates = None
        # A new trainer forgets the old one's state; its KVStore copies the weights, so it comes after them.
        arguments = {**self._optimizer_args, "begin_num_update": state.updates}
        parameters = [self._parameters[name] for name in self._arguments]
        self._trainer = mxgluon.Trainer(parameters, self._optimizer_name, arguments, kvstore=self._kv_store)
        self._trainer._init_kvstore()
        self._trainer._init_params()
        write_optimizer(self._places(), self._slots, state.optimizer)

    def peak_memory(self) -> int:
        return peak_memory(self._contexts)

    def close(self) -> None:
        mx.nd.waitall()

    @staticmethod
    def _probabilities(logits: mx.nd.NDArray, labels: mx.nd.NDArray) -> mx.nd.NDArray:
        """The end of the declared graphs: its gradient is that of the summed cross entropy, 0 in padding rows.

        gluon.loss.SoftmaxCrossEntropyLoss has the same gradient but for rounding; with this operator both engines
        compute the same bits.
        """
        return mx.nd.SoftmaxOutput(logits, labels, use_ignore=True, ignore_label=IGNORED_LABEL)

    def _split(self, array: mx.nd.NDArray) -> list[mx.nd.NDArray]:
        """Rows for every device."""
        if len(self._contexts) == 1:
            return [array.as_in_context(self._contexts[0])]
        bounds = np.cumsum([0, *even_shares(len(array), len(self._contexts))]).tolist()
        return [
            array[begin:end].as_in_context(context) for context, begin, end in zip(self._contexts, bounds, bounds[1:])
        ]

    def _load(self, parameters: Mapping[str, mxgluon.Parameter], arrays: dict[str, np.ndarray]) -> None:
        """Fill parameters on all devices; arrays are replaced in place, since a static graph has bound them."""
        for name, parameter in parameters.items():
            if parameter._data is None:
                parameter.shape = arrays[name].shape
                parameter.initialize("zeros", ctx=self._contexts)
            parameter.set_data(mx.nd.array(arrays[name], dtype=arrays[name].dtype))

    def _read_params(self) -> dict[str, np.ndarray]:
        """All parameters on the host, moving statistics averaged over all devices of all processes."""
        # BatchNorm writes its moving statistics behind the dependency engine's back (on CPUs, in the backward pass).
        mx.nd.waitall()
        arrays = {name: self._parameters[name].data(self._contexts[0]).asnumpy() for name in self._arguments}
        for name in self._aux:
            own = [array.as_in_context(mx.cpu()) for array in self._parameters[name].list_data()]
            arrays[name] = (mx.nd.add_n(*own) / len(own)).asnumpy()
        arrays.update(self._group.mean({name: arrays[name] for name in self._aux}))
        return arrays

    def _places(self) -> Places:
        trainer = self._trainer
        updaters = [trainer._kvstore._updater] if trainer._update_on_kvstore else trainer._updaters
        return {name: [(updater, index) for updater in updaters] for index, name in enumerate(self._arguments)}
