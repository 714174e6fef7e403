"""A mixing layer to start from: each token's numbers times a weighted sum of earlier tokens'.

    python train_char.py --mixer docs/my_layer.py

Copy this file and change it. Section 12 of the tutorial says what the three functions get and give.
"""

import numpy as np

from grassmann import linear_backward, linear_forward, partner_backward, partner_forward


def forward(h, w, config, layer, past=None):
    """h (B, L, d) -> (B, L, d), and what backward needs. `past` keeps what later tokens need."""
    offsets = config.offsets[layer]
    z, c_red = linear_forward(h, w["W_red"], w["b_red"])  # (B, L, r)
    length = z.shape[1]
    seen = z
    if past is not None:
        seen = np.concatenate([past["z"], z], 1) if past else z
        past["z"] = seen[:, -max(offsets) :]
    s, c_partner = partner_forward(seen, w["taps"], offsets, False)
    s = s[:, -length:]  # only the rows of the new tokens
    out, c_out = linear_forward(z * s, w["W_mix"], w["b_mix"])
    cache = {"red": c_red, "partner": c_partner, "out": c_out}
    return out, cache | {"z": z, "s": s}


def backward(dout, cache):
    """dout (B, L, d) -> dh, and the gradient of each parameter."""
    grads = {}
    dp, grads["W_mix"], grads["b_mix"] = linear_backward(dout, cache["out"])
    dz = dp * cache["s"]
    dz_partner, grads["taps"] = partner_backward(dp * cache["z"], cache["partner"])
    dz = dz + dz_partner  # z is a factor here, and a partner of later tokens
    dh, grads["W_red"], grads["b_red"] = linear_backward(dz, cache["red"])
    return dh, grads


def shapes(config, layer):
    """The names and shapes of the layer's parameters, in the order in which forward uses them."""
    d = config.d_model
    r = config.rank
    m = len(config.offsets[layer])
    return {
        "W_red": (d, r),
        "b_red": (r,),
        "taps": (m, r),
        "W_mix": (r, d),
        "b_mix": (d,),
    }
