"""Counting: on models whose counts are known by hand."""

import pytest
import torch
from torch import nn

from spartan_mm.analysis.complexity import Complexity, measure_complexity


class Attention(nn.Module):
    """Attention of an image's pixels as tokens of 3 channels; one projection in, one out."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True, bias=False)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens + 1, tokens, need_weights=False)[0]


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('model, expected', [
    (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3 * 8 * 9 + 8, 3 * 8 * 9 * 8, 3 * 8 * 9 * 8)),
    (nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)),
     (6 + 20, 15, 15 + 2 * 3 * 32 + 3 * 32)),
    # Three projections in and one out, scores and sums of 32 x 32 pairs.
    (Attention(), (36, 4 * 32 * 9 + 2 * 32 * 32 * 3, 4 * 32 * 9 + 2 * 32 * 32 * 3)),
])
def test_counts(model, expected, device):
    assert measure_complexity(model.to_empty(device=device), 4, 8) == Complexity(*expected)
    assert torch.is_grad_enabled()
