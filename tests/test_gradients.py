"""Every backward pass, op by op and for whole models, against central differences in float64."""

import numpy as np
import pytest

import grassmann as G

# ---- ops -----------------------------------------------------------------------------------------

D, R, N = 8, 4, 6  # width, rank, Plücker coordinates
TOKENS = np.array([[3, 0, 3, 1], [4, 3, 3, 0]])  # of 6: some repeated, two missing
TARGETS = np.array([4, 0, 1, 1, 3, 0, 2, 1])

RED = {"W_red": (D, R), "b_red": (R,)}
GATE = {"W_plu": (N, D), "b_plu": (D,), "W_gate": (2 * D, D), "b_gate": (D,)}
ATTENTION = {"W_qkv": (D, 3 * D), "b_qkv": (3 * D,), "W_out": (D, D), "b_out": (D,)}
FFN = {"W_1": (D, 10), "b_1": (10,), "W_2": (10, D), "b_2": (D,)}


def config(**changes):
    return G.Config(**{"vocab_size": 6, "n_layer": 1, "d_model": D, "rank": R} | changes)


def scaled(name, size):
    """The op on inputs of another size; the differences are taken in units of it."""
    forward, backward = getattr(G, f"{name}_forward"), getattr(G, f"{name}_backward")

    def scaled_backward(dout, cache):
        dx, *others = np.atleast_1d(backward(dout, cache)) if name == "gelu" else backward(dout, cache)
        return size * dx, *others

    return lambda x, *rest: forward(size * x, *rest), scaled_backward
