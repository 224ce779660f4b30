"""Initial parameters: MXNet's rules, numpy's numbers, independent of order."""

from __future__ import annotations

import numpy as np
import pytest

from errors import ProjectError
from training.initializer import initial_state

SHAPES = {
    "arg:conv_weight": (64, 32, 3, 3),
    "arg:conv_bias": (64,),
    "arg:bn_gamma": (64,),
    "arg:bn_beta": (64,),
    "arg:fc_weight": (10, 64),
    "aux:bn_moving_mean": (64,),
    "aux:bn_moving_var": (64,),
}


def test_rules_by_suffix():
    params = initial_state(SHAPES, seed=1).params
    assert list(params) == list(SHAPES)
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

    reference = mx.nd.zeros(SHAPES["arg:conv_weight"])
    mx.init.Xavier(rnd_type="gaussian", factor_type="in", magnitude=2)(mx.init.InitDesc("conv_weight"), reference)
    ours = initial_state(SHAPES, seed=1).params["arg:conv_weight"]
    assert ours.std() == pytest.approx(float(reference.asnumpy().std()), rel=0.02)


def test_value_depends_on_name_and_seed_alone():
    whole = initial_state(SHAPES, seed=3).params
    alone = initial_state({"arg:fc_weight": (10, 64)}, seed=3).params
    assert np.array_equal(whole["arg:fc_weight"], alone["arg:fc_weight"])
    other = initial_state({"arg:fc_weight": (10, 64)}, seed=4).params
    assert not np.array_equal(other["arg:fc_weight"], alone["arg:fc_weight"])


def test_declared_initializer_wins():
    declared = {"prelu_gamma": '["constant", {"value": 0.25}]', "last_weight": '["zero", {}]'}
    params = initial_state({"arg:prelu_gamma": (1,), "arg:last_weight": (3, 3)}, 0, declared).params
    assert (params["arg:prelu_gamma"] == 0.25).all()
    assert not params["arg:last_weight"].any()


@pytest.mark.parametrize(
    ("shapes", "declared", "message"),
    [
        ({"arg:table": (3, 3)}, None, "'table' has no known initial value"),
        ({"arg:a_weight": (3,)}, None, "no fan-in"),
        ({"arg:a_weight": (3, 3)}, {"a_weight": '["orthogonal", {}]'}, "not supported"),
    ],
)
def test_undecided_parameters_are_named(shapes, declared, message):
    with pytest.raises(ProjectError, match=message):
        initial_state(shapes, 0, declared)
