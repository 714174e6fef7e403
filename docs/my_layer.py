"""A mixing layer to start from: each token's numbers times a weighted sum of earlier tokens'.

    python train_char.py --mixer docs/my_layer.py

Copy this file and change it. Section 12 of the tutorial says what the three functions get and give.
"""

import numpy as np

from grassmann import linear_backward, linear_forward, partner_backward, partner_forward


def forward(h, w, config, layer, past=None):
    """h (B, L, d) -> (B, L, d), and what backward needs. `past` keeps what later tokens need."""
    z, c_red = linear_forward(h, w["W_red"], w["b_red"])  # (B, L, r)
    length, seen = z.shape[1], z
    if past is not None:
        seen = np.concatenate([past["z"], z], 1) if past else z
        past["z"] = seen[:, -max(config.offsets[layer]) :]
    s, c_partner = partner_forward(seen, w["taps"], config.offsets[layer], False)
    s = s[:, -length:]  # only the rows of the new tokens
    out, c_out = linear_forward(z * s, w["W_mix"], w["b_mix"])
    return out, {"red": c_red, "partner": c_partner, "out": c_out, "z": z, "s": s}


def backward(dout, cache):
    """dout (B, L, d) -> dh, and the gradient of each parameter."""
    dp, dW_mix, db_mix = linear_backward(dout, cache["out"])
    dz, dtaps = partner_backward(dp * cache["z"], cache["partner"])
    dz = dz + dp * cache["s"]  # z is a factor here, and a partner of later tokens
    dh, dW_red, db_red = linear_backward(dz, cache["red"])
    return dh, {"W_red": dW_red, "b_red": db_red, "taps": dtaps, "W_mix": dW_mix, "b_mix": db_mix}


def shapes(config, layer):
    """The names and shapes of the layer's parameters."""
    d, r, m = config.d_model, config.rank, len(config.offsets[layer])
    return {"W_red": (d, r), "b_red": (r,), "taps": (m, r), "W_mix": (r, d), "b_mix": (d,)}
