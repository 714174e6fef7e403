"""The mixing layer of grassmann.py as one PyTorch module. Copy this file into your project: it needs nothing else.

    GrassmannMix(128, (1, 2, 4))                           # our layer: learned weights for each offset, the "taps"
    GrassmannMix(128, (4,), taps=False, normalize=True)    # the paper's layer: the average of unit bivectors

Offsets say how far back a layer looks, and every layer has its own. OFFSETS are good ones for four layers; for other
depths take `grassmann.Config(vocab_size, context, n_layer).offsets`. The paper has one offset a layer: 1, 2, 4, 8, …

Three lines in nanoGPT's model.py replace its attention. The last two belong in GPT.__init__, before `self.lm_head`:

    from torch_layer import OFFSETS, GrassmannMix
    for block, offsets in zip(self.transformer.h, OFFSETS, strict=True):
        block.attn = nn.Sequential(GrassmannMix(config.n_embd, offsets), nn.Dropout(config.dropout))
"""

import torch
from torch import Tensor, nn

OFFSETS = (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 4, 8, 12, 16)


def unit_area(u: Tensor, v: Tensor) -> Tensor:
    """v / |u ∧ v|, or 0 where u and v span no plane. The area |u ∧ v| is base |u| times the height of v."""
    uu, vv, uv = ((a * b).sum(-1, keepdim=True) for a, b in ((u, u), (v, v), (u, v)))
    height = v - uv / uu.clamp(min=torch.finfo(uu.dtype).tiny) * u
    area = uu * height.square().sum(-1, keepdim=True)  # squared
    plane = area > 1e-10 * uu * vv
    return torch.where(plane, v / torch.where(plane, area, 1).sqrt(), 0)


class GrassmannMix(nn.Module):
    """Blends each token with the plane that it spans with earlier tokens: h (B, L, d) -> (B, L, d)."""

    def __init__(
        self,
        d: int,
        offsets: tuple[int, ...],
        rank: int = 32,
        taps: bool = True,
        normalize: bool = False,
    ):
        super().__init__()
        self.offsets, self.normalize, n = offsets, normalize, rank * (rank - 1) // 2
        self.register_buffer(
            "pairs", torch.triu_indices(rank, rank, 1), persistent=False
        )  # it moves with the model
        # Smaller first weights cripple the layer. nanoGPT draws those of every nn.Linear anew, so there is none here.
        self.W_red, self.b_red = (
            nn.Parameter(torch.randn(d, rank) * d**-0.5),
            nn.Parameter(torch.zeros(rank)),
        )
        self.taps = nn.Parameter(0.5 * torch.randn(len(offsets), rank)) if taps else None
        self.W_plu, self.b_plu = (
            nn.Parameter(0.02 * torch.randn(n, d)),
            nn.Parameter(torch.zeros(d)),
        )
        self.W_gate, self.b_gate = (
            nn.Parameter(0.02 * torch.randn(2 * d, d)),
            nn.Parameter(torch.zeros(d)),
        )

    def forward(self, h: Tensor) -> Tensor:
        g = self.message(h @ self.W_red + self.b_red)
        alpha = torch.sigmoid(torch.cat([h, g], -1) @ self.W_gate + self.b_gate)
        return alpha * h + (1 - alpha) * g

    def message(self, z: Tensor) -> Tensor:
        """The wedges of z_t with all earlier tokens add up to one wedge, z_t ∧ s_t, which is projected."""
        L, scaled = z.shape[1], unit_area if self.normalize else lambda z, v: v
        earlier = [
            nn.functional.pad(z, (0, 0, min(k, L), -min(k, L))) for k in self.offsets
        ]  # z_{t-k}, or 0 if t < k
        if self.taps is not None:
            s = scaled(z, sum(tap * v for tap, v in zip(self.taps, earlier, strict=True)))
        else:
            valid = sum(torch.arange(L, device=z.device) >= k for k in self.offsets)
            s = sum(scaled(z, v) for v in earlier) / valid.clamp(min=1)[:, None]
        (z_i, s_i), (z_j, s_j) = ([a.index_select(-1, k) for a in (z, s)] for k in self.pairs)
        return (
            z_i * s_j - z_j * s_i
        ) @ self.W_plu + self.b_plu  # (index_select has a faster gradient than z[..., i])
