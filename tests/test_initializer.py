"""Initial parameters: MXNet's rules, numpy's numbers, independent of order."""

from __future__ import annotations

import numpy as np
import pytest

from errors import ProjectError
from training.initializer import initial_params

ARGUMENTS = {
    "conv_weight": (64, 32, 3, 3),
    "conv_bias": (64,),
    "bn_gamma": (64,),
    "bn_beta": (64,),
    "fc_weight": (10, 64),
}
AUX = {"bn_moving_mean": (64,), "bn_moving_var": (64,)}


def test_rules_by_suffix():
    params = initial_params(ARGUMENTS, AUX, seed=1).params
    assert list(params) == [f"arg:{name}" for name in ARGUMENTS] + [f"aux:{name}" for name in AUX]
    assert all(value.dtype == np.float32 for value in params.values())
    for name in ("arg:conv_bias", "arg:bn_beta", "aux:bn_moving_mean"):
        assert not params[name].any()
    for name in ("arg:bn_gamma", "aux:bn_moving_var"):
        assert (params[name] == 1).all()
    weight = params["arg:conv_weight"]
    assert weight.std() == pytest.approx(np.sqrt(2 / (32 * 9)), rel=0.02)
    assert abs(weight.mean()) < 0.002


def test_same_distribution_as_mxnet():
    from mxnet_compat import mx

    reference = mx.nd.zeros(ARGUMENTS["conv_weight"])
    mx.init.Xavier(rnd_type="gaussian", factor_type="in", magnitude=2)(mx.init.InitDesc("conv_weight"), reference)
    ours = initial_params(ARGUMENTS, AUX, seed=1).params["arg:conv_weight"]
    assert ours.std() == pytest.approx(float(reference.asnumpy().std()), rel=0.02)


def test_value_depends_on_name_and_seed_alone():
    whole = initial_params(ARGUMENTS, AUX, seed=3).params
    alone = initial_params({"fc_weight": (10, 64)}, {}, seed=3).params
    assert np.array_equal(whole["arg:fc_weight"], alone["arg:fc_weight"])
    other = initial_params({"fc_weight": (10, 64)}, {}, seed=4).params
    assert not np.array_equal(other["arg:fc_weight"], alone["arg:fc_weight"])


def test_declared_initializer_wins():
    declared = {"prelu_gamma": '["constant", {"value": 0.25}]', "last_weight": '["zero", {}]'}
    params = initial_params({"prelu_gamma": (1,), "last_weight": (3, 3)}, {}, 0, declared).params
    assert (params["arg:prelu_gamma"] == 0.25).all()
    assert not params["arg:last_weight"].any()


@pytest.mark.parametrize(
    ("shapes", "declared", "message"),
    [
        ({"table": (3, 3)}, None, "'table' has no known initial value"),
        ({"a_weight": (3,)}, None, "no fan-in"),
        ({"a_weight": (3, 3)}, {"a_weight": '["orthogonal", {}]'}, "not supported"),
    ],
)
def test_undecided_parameters_are_named(shapes, declared, message):
    with pytest.raises(ProjectError, match=message):
        initial_params(shapes, {}, 0, declared)
