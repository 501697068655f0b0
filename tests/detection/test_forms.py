import pytest
import torch
from mmdet.models.backbones import ResNet
from torch import nn
from torch.testing import assert_close

from spartan_mm.detection import ResNetVd
from spartan_mm.detection.forms import fold_batch_norms


def randomize_norms(module):
    """Give the BatchNorms values as after a training."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias, 0, 0.2)
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)


@pytest.mark.parametrize('backbone, depth', [(ResNetVd, 18), (ResNetVd, 50), (ResNet, 18)])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_backbones_stay_the_same_function(backbone, depth, layout):
    backbone = backbone(depth=depth, base_channels=8, stem_channels=8, out_indices=(1, 2, 3),
                        norm_cfg=dict(type='BN', requires_grad=False))
    randomize_norms(backbone)
    backbone.eval()
    backbone = backbone.to(memory_format=layout)
    image = torch.rand(1, 3, 64, 48)
    expected = backbone(image)
    for _ in range(2):
        fold_batch_norms(backbone)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    assert_close(backbone(image), expected, rtol=1e-5, atol=1e-5)


class NormWithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize('layers', [
    lambda: (nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
    lambda: (nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)),
    lambda: (nn.Conv2d(3, 3, 1), NormWithActivation(3)),
    lambda: (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))])
def test_what_is_no_plain_pair_stays(layers):
    model = nn.Sequential(*layers()).eval()
    types = [type(layer) for layer in model]
    fold_batch_norms(model)
    assert [type(layer) for layer in model] == types
