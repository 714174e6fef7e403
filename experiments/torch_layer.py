"""The mixing layer of grassmann.py as one PyTorch module. Copy this file into your project.

    GrassmannMix(128, (1, 2, 4))                         # our layer, with per-offset weights (taps)
    GrassmannMix(128, (4,), taps=False, normalize=True)  # the paper's: averaged unit bivectors
    load("out/best.npz", 0)                              # the first layer of a trained model

Offsets say how far back a layer looks, and every layer has its own. OFFSETS are good ones for four
layers. For other depths take `grassmann.Config(vocab_size, context, n_layer).offsets`. The paper
has one offset a layer: 1, 2, 4, 8, …

Three lines in nanoGPT's model.py replace its attention. The last two belong in GPT.__init__, before
`self.lm_head`:

    from torch_layer import OFFSETS, GrassmannMix
    for block, offsets in zip(self.transformer.h, OFFSETS, strict=True):
        block.attn = nn.Sequential(GrassmannMix(config.n_embd, offsets), nn.Dropout(config.dropout))
"""

import json

import numpy as np
import torch
from torch import Tensor, nn

OFFSETS = (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 4, 8, 12, 16)


def unit_area(u: Tensor, v: Tensor) -> Tensor:
    """v / |u ∧ v|, or 0 where u and v span no plane.

    The area |u ∧ v| is the length of u times the height of v above u.
    """
    uu = (u * u).sum(-1, keepdim=True)
    vv = (v * v).sum(-1, keepdim=True)
    uv = (u * v).sum(-1, keepdim=True)
    tiny = torch.finfo(uu.dtype).tiny
    height = v - uv / uu.clamp(min=tiny) * u
    area = uu * height.square().sum(-1, keepdim=True)  # squared
    plane = area > 1e-10 * uu * vv
    length = torch.where(plane, area, 1).sqrt()
    return torch.where(plane, v / length, 0)


def random(*shape: int, scale: float = 0.02) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(shape))


def zeros(d: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(d))


class GrassmannMix(nn.Module):
    """Blends each token with the plane that it spans with earlier ones: (B, L, d) -> (B, L, d)."""

    def __init__(
        self,
        d: int,
        offsets: tuple[int, ...],
        rank: int = 32,
        taps: bool = True,
        normalize: bool = False,
    ):
        super().__init__()
        self.offsets = offsets
        self.normalize = normalize
        pairs = torch.triu_indices(rank, rank, 1)  # all i < j
        self.register_buffer("pairs", pairs, persistent=False)  # it moves with the model
        # No nn.Linear here: nanoGPT draws the weights of each anew, and smaller ones cripple W_red.
        self.W_red = random(d, rank, scale=d**-0.5)
        self.b_red = zeros(rank)
        self.taps = random(len(offsets), rank, scale=0.5) if taps else None
        self.W_plu = random(rank * (rank - 1) // 2, d)
        self.b_plu = zeros(d)
        self.W_gate = random(2 * d, d)
        self.b_gate = zeros(d)

    def forward(self, h: Tensor) -> Tensor:
        g = self.message(h @ self.W_red + self.b_red)
        hg = torch.cat([h, g], -1)
        alpha = torch.sigmoid(hg @ self.W_gate + self.b_gate)
        return alpha * h + (1 - alpha) * g

    def message(self, z: Tensor) -> Tensor:
        """The wedges of z_t with all earlier tokens add up to one wedge, z_t ∧ s_t."""
        s = self.partner(z)
        i, j = self.pairs
        # index_select has a faster gradient than z[..., i]
        z_i = z.index_select(-1, i)
        z_j = z.index_select(-1, j)
        s_i = s.index_select(-1, i)
        s_j = s.index_select(-1, j)
        p = z_i * s_j - z_j * s_i
        return p @ self.W_plu + self.b_plu

    def partner(self, z: Tensor) -> Tensor:
        """s_t: the sum of z_{t-offset} times its tap, or the average of those that exist."""
        length = z.shape[1]
        s = torch.zeros_like(z)
        valid = z.new_zeros(length, 1)  # how many of the offsets stay in the text
        for k, offset in enumerate(self.offsets):
            back = min(offset, length)
            earlier = nn.functional.pad(z, (0, 0, back, -back))  # z_{t-offset}, or 0
            if self.taps is not None:
                earlier = self.taps[k] * earlier
            elif self.normalize:
                earlier = unit_area(z, earlier)
            s = s + earlier
            valid[back:] += 1
        if self.taps is None:
            return s / valid.clamp(min=1)
        return unit_area(z, s) if self.normalize else s


def load(path: str, layer: int) -> GrassmannMix:
    """A layer of a model that train_char.py wrote. Layer 0 is the first."""
    with np.load(path) as file:
        config = json.loads(file["meta"].tobytes())["config"]
        if config["mixer"] != "grassmann" or config["memory"]:
            raise ValueError(f"{path} has layers of another kind: a memory, or another mixer")
        mix = GrassmannMix(
            config["d_model"],
            config["offsets"][layer],
            config["rank"],
            config["taps"],
            config["normalize"],
        )
        prefix = f"param/blocks.{layer}.mix."
        weights = {name: torch.tensor(file[prefix + name]) for name in mix.state_dict()}
    mix.load_state_dict(weights)
    return mix
