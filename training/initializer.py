"""Initial parameters, the same numbers for every engine.

The rules are MXNet's: an initializer declared on the variable (`__init__`) wins, then the name's suffix
decides, and weights get Xavier(gaussian, factor "in", magnitude 2), that is a standard deviation of
sqrt(2 / fan_in) as in He et al. 2015. The random numbers are numpy's, one generator a parameter, so neither
the order of parameters nor the engine nor the presence of other parameters changes a value.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Callable

import numpy as np

from engines.base import TrainState
from errors import ProjectError

XAVIER_MAGNITUDE = 2.0

Shape = tuple
Rule = Callable[[str, Shape, np.random.Generator], np.ndarray]


def xavier(name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Gaussian of standard deviation sqrt(2 / fan_in), fan_in = shape[1] * prod(kernel)."""
    if len(shape) < 2:
        raise ProjectError(
            f"parameter {name!r} of shape {tuple(shape)} has no fan-in for Xavier; declare its initializer"
        )
    fan_in = int(np.prod(shape[1:]))
    scale = np.float32(np.sqrt(XAVIER_MAGNITUDE / fan_in))
    return rng.standard_normal(shape, dtype=np.float32) * scale


def constant(value: float) -> Rule:
    """The rule that fills an array with `value`."""
    return lambda name, shape, rng: np.full(shape, value, dtype=np.float32)


# In MXNet's order of checks; "_gamma" of a PReLU declares its own initializer.
SUFFIX_RULES: tuple[tuple[str, Rule], ...] = (
    ("weight", xavier),
    ("bias", constant(0.0)),
    ("gamma", constant(1.0)),
    ("beta", constant(0.0)),
    ("moving_mean", constant(0.0)),
    ("running_mean", constant(0.0)),
    ("moving_var", constant(1.0)),
    ("running_var", constant(1.0)),
)


def declared_rule(name: str, text: str) -> Rule:
    """The rule that an `__init__` attribute names: JSON `["constant", {"value": 0.25}]`, or a bare name."""
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = text
    kind, options = parsed if isinstance(parsed, list) and len(parsed) == 2 else (parsed, {})
    kind = str(kind).lower()
    if kind in ("zero", "zeros"):
        return constant(0.0)
    if kind in ("one", "ones"):
        return constant(1.0)
    if kind == "constant":
        return constant(float(options["value"]))
    if kind == "normal":
        sigma = np.float32(options.get("sigma", 0.01))
        return lambda name, shape, rng: rng.standard_normal(shape, dtype=np.float32) * sigma
    if kind == "uniform":
        scale = float(options.get("scale", 0.07))
        return lambda name, shape, rng: rng.uniform(-scale, scale, shape).astype(np.float32)
    if kind == "xavier":
        return xavier
    raise ProjectError(f"parameter {name!r} declares the initializer {text!r}, which is not supported")


def suffix_rule(name: str) -> Rule:
    """The rule that a parameter's name implies."""
    for suffix, rule in SUFFIX_RULES:
        if name.endswith(suffix):
            return rule
    endings = ", ".join(suffix for suffix, _ in SUFFIX_RULES)
    raise ProjectError(f"parameter {name!r} has no known initial value: its name ends in none of {endings}")


def initial_array(name: str, shape: Shape, seed: int, declared: str | None = None) -> np.ndarray:
    """The initial value of one parameter, float32; `declared` is its variable's `__init__` attribute."""
    rule = declared_rule(name, declared) if declared else suffix_rule(name)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])))
    return rule(name, tuple(shape), rng)


def initial_state(shapes: Mapping[str, Shape], seed: int, declared: Mapping[str, str] | None = None) -> TrainState:
    """The state at update 0 of a network.

    shapes: "arg:NAME" and "aux:NAME" -> shape (see `graph.shapes.parameter_shapes`). declared: name -> `__init__`
    attribute of the variables that have one (see `Symbol.attr_dict`). Raises ProjectError for a parameter that
    neither declaration nor suffix decides.
    """
    declared = declared or {}
    named = {key: key.split(":", 1)[1] for key in shapes}
    return TrainState({key: initial_array(name, shapes[key], seed, declared.get(name)) for key, name in named.items()})
