"""Symbol JSON of all ages: order as MXNet lists it, legacy spellings, and files that are wrong."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from graph.symbol_json import Attributes, Entry, GraphError, load, parse
from mxnet_compat import mx
from symbols import get_symbol
from tests.graph_checks import assert_same

S = mx.sym


def legacy_file() -> dict:
    """A graph as MXNet 0.8 wrote it: `param` and `attr`, two-element inputs, no auxiliary variables."""
    variable = {"op": "null", "param": {}, "inputs": [], "backward_source_id": -1}
    conv = {"kernel": "(3L, 3L)", "num_filter": "4", "no_bias": "True", "workspace": "512"}
    return {
        "nodes": [
            {**variable, "name": "data"},
            {**variable, "name": "conv_weight", "attr": {"lr_mult": "2.0"}},
            {
                **{"op": "Convolution", "name": "conv", "param": conv, "inputs": [[0, 0], [1, 0]]},
                "attr": {"weight_wd_mult": "0.5"},
            },
            {**variable, "name": "bn_gamma"},
            {**variable, "name": "bn_beta"},
            {
                **{"op": "BatchNorm", "name": "bn", "param": {"eps": "0.001", "fix_gamma": "False"}},
                "inputs": [[2, 0], [3, 0], [4, 0]],
            },
            {**{"op": "_Plus", "name": "plus", "param": {}}, "inputs": [[5, 0], [2, 0]]},
        ],
        "arg_nodes": [0, 1, 3, 4],
        "heads": [[6, 0]],
    }


def shared_and_branching():
    """A weight used twice, a branch, two heads."""
    data, weight = S.Variable("data"), S.Variable("shared_weight")
    left = S.FullyConnected(data, weight=weight, num_hidden=4, no_bias=True, name="left")
    right = S.FullyConnected(left, weight=weight, num_hidden=4, no_bias=True, name="right")
    normal = S.BatchNorm(right, name="bn", fix_gamma=False)
    return S.Group([S.Concat(normal, left, name="joined"), right])


@pytest.mark.parametrize(
    "symbol",
    [shared_and_branching(), get_symbol("se_inception_resnet_v2"), get_symbol("se_resnext", depth=18)],
    ids=["branching", "inception", "resnext"],
)
def test_lists_are_in_the_order_of_mxnet(symbol):
    graph = parse(symbol.tojson())
    assert list(graph.arguments) == symbol.list_arguments()
    assert list(graph.auxiliary) == symbol.list_auxiliary_states()


def test_shared_weight_and_several_heads_compute_the_same():
    assert_same(shared_and_branching(), {"data": np.random.RandomState(0).normal(size=(5, 4)).astype("float32")})


def test_legacy_file_reads_as_mxnet_reads_it():
    text = json.dumps(legacy_file())
    graph, upgraded = parse(text), mx.sym.load_json(text)
    assert list(graph.arguments) == upgraded.list_arguments()
    assert list(graph.auxiliary) == upgraded.list_auxiliary_states() == ["bn_moving_mean", "bn_moving_var"]
    weight = graph.variable("conv_weight")
    assert (weight.hidden("lr_mult"), weight.hidden("wd_mult")) == ("2.0", "0.5")
    assert dict(weight.attributes).items() <= upgraded.attr_dict()["conv_weight"].items()


def test_legacy_file_computes_what_mxnet_computes():
    symbol = mx.sym.load_json(json.dumps(legacy_file()))
    data = np.random.RandomState(0).normal(size=(2, 3, 6, 5)).astype("float32")
    assert_same(symbol, {"data": data}, gradient_tolerance=2e-5)


def test_typed_reads():
    graph = parse(
        json.dumps(
            {
                "nodes": [
                    {
                        "op": "X",
                        "name": "x",
                        "inputs": [],
                        "attrs": {
                            **{"a": "(3L, 3L)", "b": "[1,2]", "c": "()", "d": "(None, -2)", "e": "7", "f": "None"},
                            **{"t": "1", "u": "true", "v": "False", "n": "1e-05", "bad": "maybe"},
                            "__hidden__": "kept out",
                        },
                    }
                ],
                "heads": [[0, 0, 0]],
            }
        )
    )
    reads = Attributes(graph.nodes[0])
    assert reads.integers("a") == (3, 3)
    assert reads.integers("b") == (1, 2)
    assert reads.integers("c", (9,)) == (9,)
    assert reads.integers("d") == (None, -2)
    assert reads.integers("e") == (7,)
    assert reads.integer("f", 4) == 4
    assert [reads.boolean(key) for key in "tuv"] == [True, True, False]
    assert reads.number("n") == 1e-5
    assert reads.number("absent", 0.5) == 0.5
    with pytest.raises(GraphError, match="'x' .X.: attribute 'bad' is 'maybe', expected True or False"):
        reads.boolean("bad")
    reads.finish()
    with pytest.raises(GraphError, match="attribute bad, n is not supported"):
        unread = Attributes(graph.nodes[0])
        unread.ignore(*"abcdeftuv")
        unread.finish()


def change(path: list, value) -> dict:
    """A sound small file with one thing changed; an Ellipsis removes the key."""
    content = json.loads(S.FullyConnected(S.Variable("data"), num_hidden=2, name="fc").tojson())
    place = copy.deepcopy(content)
    root = place
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return root


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no list of nodes"),
        (change(["nodes"], ...), "no list of nodes"),
        (change(["heads"], ...), "no heads"),
        (change(["heads"], [[9, 0, 0]]), r"heads: input \[9, 0, 0\] points to a node"),
        (change(["nodes", 3, "inputs", 1], [3, 0, 0]), r"node 3 \('fc'\): input \[3, 0, 0\] points"),
        (change(["nodes", 3, "inputs", 1], [-1, 0, 0]), r"node 3 \('fc'\): \[-1, 0, 0\] is not an input"),
        (change(["nodes", 3, "inputs", 1], "data"), r"node 3 \('fc'\): 'data' is not an input"),
        (change(["nodes", 3, "inputs"], 5), r"node 3 \('fc'\): its inputs are not a list"),
        (change(["nodes", 3, "op"], ...), r"node 3 \('fc'\) lacks"),
        (change(["nodes", 3, "name"], ...), r"node 3 \(None\) lacks"),
        (change(["nodes", 3], "fc"), "node 3 is not an object"),
        (change(["nodes", 3, "attrs"], {"num_hidden": 2}), r"node 3 \('fc'\): 'attrs' is not a mapping of texts"),
        (change(["nodes", 2, "name"], "data"), "two variables are called 'data'"),
        (change(["nodes", 2, "inputs"], [[0, 0, 0]]), r"node 2 \('fc_bias'\) is a variable with inputs"),
    ],
)
def test_malformed_files_name_the_place(content, message, tmp_path):
    path = tmp_path / "net-symbol.json"
    path.write_text(json.dumps(content))
    with pytest.raises(GraphError, match=f"net-symbol.json: .*{message}"):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00"])
def test_text_that_is_no_json(text):
    with pytest.raises(GraphError, match="not a Symbol JSON"):
        parse(text)


def test_missing_file(tmp_path):
    with pytest.raises(GraphError, match="cannot read the graph .*absent.json"):
        load(tmp_path / "absent.json")


def test_nodes_that_no_head_needs_are_not_listed():
    content = change(["heads"], [[0, 0, 0]])
    graph = parse(json.dumps(content))
    assert graph.arguments == ("data",)
    assert graph.heads == (Entry(0, 0),)
