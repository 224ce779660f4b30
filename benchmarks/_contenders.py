"""What benchmarks.torch_train measures: one training step or one inference of SE-ResNeXt-50, by name.

A process of its own for each framework (and for each setting of the memory allocator), which answers one line for each
line it reads: `python -m benchmarks._contenders KIND PARAMS`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from engines.base import Batch, TrainState
from graph.params_file import read_arrays, write_arrays
from graph.symbol_json import parse
from symbols import get_symbol, get_symbol_json

NETWORK, OPTIONS, CLASSES, SIDE = "se_resnext", {"depth": 50, "num_group": 32}, 1000, 224
MOMENTUM, WD = 0.9, 1e-4
# Small, and labels random: a diverged network computes with denormal numbers, which are slow.
LR = 1e-4
WARM_STEPS = 2
# A measurement takes at least so many images.
IMAGES = 16


class Task(NamedTuple):
    """who: a contender. mode: "train" or "infer". dtype: "float32" or "bfloat16". rows: images a step."""

    who: str
    mode: str
    dtype: str
    rows: int


def batch_of(rows: int) -> Batch:
    random = np.random.default_rng(rows)
    images = random.integers(0, 256, (rows, 3, SIDE, SIDE), dtype=np.uint8)
    return Batch(images, random.integers(0, CLASSES, rows))


def write_params(path: Path) -> None:
    """Initial weights, and moving statistics as training would have left them: those of a batch."""
    import torch

    from graph.shapes import parameter_shapes
    from graph.to_torch import load_params, read_params, to_torch
    from graph.torch_ops import BatchNorm
    from training.initializer import initial_state

    graph = parse(get_symbol_json(NETWORK, **OPTIONS))
    shapes = parameter_shapes(graph, {"data": (1, 3, SIDE, SIDE), "softmax_label": (1,)})
    module = to_torch(graph).to(memory_format=torch.channels_last)
    load_params(module, initial_state(shapes, seed=0).params)
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.momentum = 0.0
    with torch.no_grad():
        module(torch.from_numpy(batch_of(8).images).float())
    write_arrays(path, read_params(module))


class TorchContenders:
    """The translated graph, its optimized forms, the hand-written module and the engine, in one process."""

    def __init__(self, params: Mapping[str, np.ndarray]):
        self.params = params
        self.modules: dict[str, object] = {}

    def step(self, task: Task) -> Callable[[], object]:
        """A function that does one step of `task` from start to end."""
        if task.who == "engine":
            return self._engine_step(task)
        import torch

        module = self._module(task.who)
        data = torch.from_numpy(batch_of(task.rows).images).float().contiguous(memory_format=torch.channels_last)
        if task.mode == "infer":
            return lambda: self._infer(task, module, data)
        labels = torch.from_numpy(batch_of(task.rows).labels)
        loss = graph_loss if task.who == "graph" else hand_loss
        optimizer = torch.optim.SGD(
            module.parameters(), lr=LR / task.rows, momentum=MOMENTUM, weight_decay=WD, nesterov=True
        )
        return lambda: self._train(task, module, optimizer, lambda: loss(module, data, labels))

    def _infer(self, task: Task, module, data) -> None:
        import torch

        module.eval()
        with torch.inference_mode(), self._precision(task):
            output = module(data)
            if task.who in ("hand", "timm"):
                torch.softmax(output.float(), 1)

    def _train(self, task: Task, module, optimizer, loss: Callable) -> None:
        import torch

        module.train()
        with self._precision(task):
            value = loss()
        value.backward(torch.ones_like(value))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _precision(self, task: Task):
        import torch

        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=task.dtype == "bfloat16")

    def _module(self, who: str):
        if who not in self.modules:
            self.modules[who] = self._make(who)
        return self.modules[who]

    def _make(self, who: str):
        from graph.optimize import optimize_for_inference

        if who == "graph":
            return graph_module(self.params)
        if who == "hand":
            return hand_module(self.params)
        if who == "timm":
            return timm_module()
        if who == "folded":
            return optimize_for_inference(graph_module(self.params), prepack=False)
        assert who == "packed"
        return optimize_for_inference(graph_module(self.params))

    def _engine_step(self, task: Task) -> Callable[[], object]:
        from engines.torch_engine import TorchEngine

        engine = TorchEngine(
            get_symbol_json(NETWORK, **OPTIONS), image_shape=(3, SIDE, SIDE), batch_size=task.rows,
            momentum=MOMENTUM, wd=WD, dtype=task.dtype,
        )  # fmt: skip
        return engine_step(engine, self.params, task)


def engine_step(engine, params: Mapping[str, np.ndarray], task: Task) -> Callable[[], object]:
    """One step of an engine, results read."""
    engine.set_state(TrainState(dict(params)))
    batch = batch_of(task.rows)
    if task.mode == "infer":
        return lambda: engine.predict(batch)

    def train() -> None:
        engine.train_batch(batch, LR)
        engine.read_metrics()

    return train


def graph_module(params: Mapping[str, np.ndarray]):
    """The declared graph on PyTorch."""
    import torch

    from graph.to_torch import load_params, to_torch

    module = to_torch(parse(get_symbol_json(NETWORK, **OPTIONS)))
    load_params(module, params)
    return module.to(memory_format=torch.channels_last)


def hand_module(params: Mapping[str, np.ndarray]):
    """The hand-written module with the same weights: both list their tensors in the same order."""
    import torch

    from benchmarks._handwritten import SEResNeXt50

    module = SEResNeXt50(CLASSES)
    ours = {kind: [array for name, array in params.items() if name.startswith(kind)] for kind in ("arg:", "aux:")}
    statistics = [tensor for name, tensor in module.named_buffers() if "num_batches" not in name]
    with torch.no_grad():
        for tensors, arrays in ((list(module.parameters()), ours["arg:"]), (statistics, ours["aux:"])):
            assert len(tensors) == len(arrays)
            for tensor, array in zip(tensors, arrays):
                assert tensor.shape == array.shape
                tensor.copy_(torch.from_numpy(np.array(array)))
    return module.to(memory_format=torch.channels_last)


def has_timm() -> bool:
    """Whether timm can be compared with; it is not among the project's requirements, only benchmarks know it."""
    return importlib.util.find_spec("timm") is not None


def timm_module():
    """timm's network of the same shape, with weights of its own."""
    import torch

    module = importlib.import_module("timm").create_model("seresnext50_32x4d", num_classes=CLASSES)
    return module.to(memory_format=torch.channels_last)


def graph_loss(module, data, labels):
    """Probabilities; the graph's own loss ignores the gradient that comes from outside."""
    return module(data, labels)


def hand_loss(module, data, labels):
    import torch

    return torch.nn.functional.cross_entropy(module(data).float(), labels, reduction="sum")


class MXNetContenders:
    """The symbol engine; as "original", with the operators as declared instead of those that are fast on CPUs."""

    def __init__(self, params: Mapping[str, np.ndarray]):
        self.params = params

    def step(self, task: Task) -> Callable[[], object]:
        from engines import symbol_engine
        from mxnet_compat import mx

        faster = symbol_engine.for_cpu_training
        if task.who == "original":
            symbol_engine.for_cpu_training = lambda text: text
        try:
            engine = symbol_engine.SymbolEngine(
                get_symbol(NETWORK, **OPTIONS), [mx.cpu()], image_shape=(3, SIDE, SIDE), batch_size=task.rows,
                momentum=MOMENTUM, wd=WD,
            )  # fmt: skip
        finally:
            symbol_engine.for_cpu_training = faster
        return engine_step(engine, self.params, task)


def largest_difference(params: Mapping[str, np.ndarray]) -> float:
    """Between the logits of graph, optimized graphs and hand-written module, as a part of the largest probability."""
    import torch

    contenders = TorchContenders(params)
    data = torch.from_numpy(batch_of(2).images).float()
    with torch.inference_mode():
        found = {who: contenders._module(who).eval()(data) for who in ("graph", "folded", "packed")}
        found["hand"] = torch.softmax(contenders._module("hand").eval()(data), 1)
    largest = found["graph"].abs().max()
    return float(max((value - found["graph"]).abs().max() / largest for value in found.values()))


def serve(contenders, lines, out) -> None:
    """Answer every task with the mean seconds of a step; the first time after warm-up steps.

    Short steps are repeated, after one that brings weights back into the caches that the last contender used.
    """
    steps: dict[Task, Callable] = {}
    for line in lines:
        task = Task(*json.loads(line))
        if task not in steps:
            steps[task] = contenders.step(task)
            for _ in range(WARM_STEPS):
                steps[task]()
        repeats = max(1, IMAGES // task.rows)
        if repeats > 1:
            steps[task]()
        begin = time.perf_counter()
        for _ in range(repeats):
            steps[task]()
        print(json.dumps((time.perf_counter() - begin) / repeats), file=out, flush=True)


def main() -> int:
    kind, path = sys.argv[1:]
    if kind == "prepare":
        write_params(Path(path))
        print(json.dumps(largest_difference(read_arrays(path))))
        return 0
    # Results go to the pipe, whatever a framework prints to the terminal.
    out, sys.stdout = sys.stdout, sys.stderr
    if kind == "kept":
        from graph.memory import keep_freed_memory

        keep_freed_memory()
    contenders = (MXNetContenders if kind == "mxnet" else TorchContenders)(read_arrays(path))
    serve(contenders, sys.stdin, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
