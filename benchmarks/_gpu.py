"""The GPU part of benchmarks.torch_train: graph, hand-written module and timm's seresnext50_32x4d, compiled and not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Callable

from benchmarks._contenders import (
    CLASSES,
    LR,
    MOMENTUM,
    SIDE,
    WD,
    graph_loss,
    graph_module,
    hand_loss,
    hand_module,
    has_timm,
    timm_module,
)

BATCH = 256
# Steps between two looks at the clock, and before the first: compilation, cuDNN's choice of algorithms.
STEPS, WARM_STEPS = 10, 5


def measure_gpu(params: Path, rounds: int) -> dict:
    """Training in bfloat16, channels_last: images/s and peak memory of every contender, or why there are none."""
    import torch

    title = f"Training on a GPU, bfloat16, batch {BATCH}"
    if not torch.cuda.is_available():
        return {"title": title, "note": "Not measured: PyTorch saw no GPU."}
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    steps, peaks = contenders(params)
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in steps if number % 2 else reversed(steps):
            speeds[name].append(speed(steps[name]))
    base = "timm" if "timm" in steps else "hand-written"
    pairs = [("graph", base), ("graph, compiled", f"{base}, compiled")]
    ratios = [
        {"of": of, "to": to, "wanted": None, "rounds": [a / b for a, b in zip(speeds[of], speeds[to])]}
        for of, to in pairs
    ]
    found = {"title": f"{title}, {torch.cuda.get_device_name()}", "images_per_second": speeds, "ratios": ratios}
    return {**found, "peak_gib": peaks}


def contenders(params: Path) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """A warm training step for every contender, and the GiB that it needs at most, its weights included."""
    import torch

    from graph.params_file import read_arrays

    arrays = read_arrays(params)
    makers = {"graph": lambda: graph_module(arrays), "hand-written": lambda: hand_module(arrays)}
    if has_timm():
        makers["timm"] = timm_module
    else:
        print("timm is not installed (pip install timm): the hand-written module takes its place", flush=True)
    steps, peaks = {}, {}
    for name, make in makers.items():
        for compiled in (False, True):
            before = torch.cuda.memory_allocated()
            step = training_step(make(), graph_loss if name == "graph" else hand_loss, compiled)
            for _ in range(WARM_STEPS):
                step()
            # Without what cuDNN took to try its algorithms, which it does for the first contender only.
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            title = f"{name}, compiled" if compiled else name
            steps[title], peaks[title] = step, (torch.cuda.max_memory_allocated() - before) / 2**30
    return steps, peaks


def training_step(module, loss: Callable, compiled: bool) -> Callable[[], None]:
    """Forward, backward and update of one batch that is on the GPU already."""
    import torch

    module = module.cuda().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=LR / BATCH, momentum=MOMENTUM, weight_decay=WD, nesterov=True)
    forward = torch.compile(module) if compiled else module
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), device="cuda").float()
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (BATCH,), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            value = loss(forward, images, labels)
        value.backward(torch.ones_like(value))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def speed(step: Callable[[], None]) -> float:
    """Images/s over STEPS steps."""
    import torch

    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return STEPS * BATCH / (time.perf_counter() - begin)
