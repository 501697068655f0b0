"""ResNet-vd as RT-DETR uses it."""
from itertools import accumulate
from operator import mul

from mmcv.cnn import build_conv_layer, build_norm_layer
from mmdet.models.backbones import ResNetV1d
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.registry import MODELS
from torch import Tensor, nn

from ..backbones.layers import FoldingSequential, call_in_turn, recompute


class FoldingBlock:
    """What folds norms in mmdet's blocks, see :func:`call_in_turn`; the rest is theirs."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        if getattr(self, 'with_plugins', False):  # which stand between the layers
            return super().forward(x)
        return self.relu(recompute(self, self.add, x) if self.with_cp else self.add(x))

    def add(self, x: Tensor) -> Tensor:
        """The residual and the shortcut, before the last activation."""
        layers = [self.conv1, self.norm1, self.relu, self.conv2, self.norm2]
        if self.expansion > 1:
            layers += [self.relu, self.conv3, self.norm3]
        y = call_in_turn(layers, x)
        y += x if self.downsample is None else self.downsample(x)
        return y


class FoldingBasicBlock(FoldingBlock, BasicBlock):
    """mmdet's block of depths 18 and 34."""


class FoldingBottleneck(FoldingBlock, Bottleneck):
    """mmdet's block of larger depths."""


FORMS = {BasicBlock: FoldingBasicBlock, Bottleneck: FoldingBottleneck,
         nn.Sequential: FoldingSequential}


@MODELS.register_module()
class ResNetVd(ResNetV1d):
    """Variant d of `ResNet <https://arxiv.org/abs/1812.01187>`_, with a projection in every stage.

    NOTE: mmdet's ResNetV1d leaves the first stage's shortcut an identity in depths 18 and 34.
    RT-DETR's (and PaddlePaddle's) has a 1x1 convolution there as well. Depths 50 and up are
    mmdet's.

    Args:
        depth: 18, 34, 50 or 101.
        kwargs: See mmdet's ResNet.

    The attributes `out_channels` and `strides` are those of the returned maps.

    Examples:
        >>> import torch
        >>> backbone = ResNetVd(depth=18, out_indices=(1, 2, 3)).eval()
        >>> backbone.out_channels, backbone.strides
        ((128, 256, 512), (8, 16, 32))
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 64))]
        [(1, 128, 8, 8), (1, 256, 4, 4), (1, 512, 2, 2)]
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        for part in self.modules():
            part.__class__ = FORMS.get(type(part), type(part))
        strides = [4 * stride for stride in accumulate(self.strides, mul)]  # the stem's is 4
        self.out_channels = tuple(
            self.base_channels * 2**stage * self.block.expansion for stage in self.out_indices)
        # NOTE: mmdet's attribute of this name has the stride of each stage, and is read no more.
        self.strides = tuple(strides[stage] for stage in self.out_indices)

    def make_res_layer(self, **kwargs) -> nn.Sequential:
        """Pack the blocks of a stage, the first with a projection in its shortcut."""
        stage = super().make_res_layer(**kwargs)
        if stage[0].downsample is None:
            channels = kwargs['planes'] * kwargs['block'].expansion
            stage[0].downsample = nn.Sequential(
                build_conv_layer(kwargs['conv_cfg'], kwargs['inplanes'], channels, 1, bias=False),
                build_norm_layer(kwargs['norm_cfg'], channels)[1])
        return stage

    def train(self, mode: bool = True) -> 'ResNetVd':
        """Switch the mode; unlike mmdet's ResNet, return the module, as PyTorch's modules do."""
        super().train(mode)
        return self
