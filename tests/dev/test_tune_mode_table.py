"""The table of what frozen statistics save: what is counted."""
import torch
from torch import nn
from tune_mode import count_both, count_kept, time_both

from spartan_mm.backbones.layers import FoldingSequential


def test_the_map_between_convolution_and_norm_is_not_kept():
    model = FoldingSequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.GELU()).eval()
    x = torch.randn(2, 3, 16, 16)
    plain, folded = count_both(model, x)
    assert plain == 2 * x.nbytes
    assert folded == x.nbytes + 4 * (9 + 3 * 3)  # a weight of nine numbers, made of three vectors
    assert len(time_both(Listed(model), x, 1)) == 2
    with torch.no_grad():
        assert count_kept(model, x) == 0


class Listed(nn.Module):
    """Gives its one map as backbones do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x),
