"""Whose operators declare a graph: MXNet's, or those of `graph.declare`, which need no MXNet and give the same JSON.

An input decides for all that is built on it: `declared_input` starts a graph that MXNet never sees, `native_input` one
of `mx.sym.Symbol`s where MXNet can be imported.
"""

from __future__ import annotations

from typing import Protocol

from graph import declare


class Symbol(Protocol):
    """What both kinds of symbols have in common."""

    def tojson(self) -> str: ...

    def list_arguments(self) -> list[str]: ...

    def list_auxiliary_states(self) -> list[str]: ...


def declared_input(name: str) -> Symbol:
    """A variable to build on without MXNet."""
    return declare.Variable(name)


def native_input(name: str) -> Symbol:
    """A variable to build on with MXNet, or without where it cannot be imported."""
    try:
        from mxnet_compat import mx
    except ImportError:
        return declared_input(name)
    return mx.sym.Variable(name)


def operators(symbol: Symbol):
    """The namespace of operators that take `symbol` as an input: `mx.sym`, or its stand-in."""
    if isinstance(symbol, declare.Symbol):
        return declare.operators
    from mxnet_compat import mx

    return mx.sym
