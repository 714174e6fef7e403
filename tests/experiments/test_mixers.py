"""The mixers that are compared with the layer: gradients, and nothing from the future."""

import numpy as np
import pytest

import grassmann
from experiments import mixers

mixers.install()

@pytest.fixture(params=mixers.MIXERS)
def config(request, tiny_config):
    return tiny_config(mixer=request.param, n_head=2, offsets=((1, 2), (1, 3)), positions=True)

def test_gradients(config, ordinary_params, batch, check_gradients):
    params, (x, y) = ordinary_params(config), batch(2)

    def loss():
        return grassmann.cross_entropy_forward(grassmann.forward(params, config, x), y)[0]

    _, grads = grassmann.loss_and_grads(params, config, x, y)
    check_gradients(config.mixer, loss, params, grads, entries=5)

def test_causality(config, ordinary_params):
    params, x = ordinary_params(config), np.arange(18).reshape(2, 9) % 11
    logits = grassmann.forward(params, config, x)
    for t in range(8):
        later = x.copy()
        later[:, t + 1 :] = (later[:, t + 1 :] + 1) % 11
        changed = np.abs(grassmann.forward(params, config, later) - logits).max(-1)
        assert changed[:, : t + 1].max() < 1e-12 < 1e-3 < changed[:, t + 1].min()
