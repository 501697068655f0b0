"""SparK, masked pre-training without labels (arXiv 2301.03580), for backbones of any widths."""
from typing import Any

import torch
from mmpretrain.models.selfsup import BaseSelfSupervisor
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ..errors import UsageError
from ..text import count


@MODELS.register_module()
class PyramidSparK(BaseSelfSupervisor):
    """Hides squares of the images, and learns to draw what is in them.

    The maps of all stages go into the decoder, where each is normalized, gets a learnt token at
    hidden positions and is projected to the decoder's width (Sec. 3.2 and 3.3).

    NOTE: mmpretrain's ``SparK`` takes backbones whose width doubles from stage to stage, which
    SpaRTAN-XT's (32, 64, 96, 192) does not, and images of one size. Decoder, head and loss are
    mmpretrain's.

    NOTE: batch norms look at the images of their own process, as in our training with labels;
    SparK's are synchronized, which `sync_bn='torch'` in a config does.

    Args:
        backbone: One that takes images and a mask, such as :class:`.MaskedSpaRTAN`, with the maps
            of all its stages.
        neck: The decoder, mmpretrain's ``SparKLightDecoder``. Its `feature_dim` is the width that
            the coarsest map is projected to, and is halved from there to the finest.
        head: mmpretrain's ``SparKPretrainHead``, whose `patch_size` is the backbone's stride.
        mask_ratio: Share of the squares that are hidden, in (0, 1).
        data_preprocessor: By default mmpretrain's ``SelfSupDataPreprocessor``.
        init_cfg: See mmengine's BaseModule.

    Raises:
        UsageError: The parts do not fit each other.
    """

    def __init__(self, backbone: dict, neck: dict, head: dict, mask_ratio: float = 0.6,
                 data_preprocessor: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(backbone, neck, head, data_preprocessor=data_preprocessor,
                         init_cfg=init_cfg)
        self.mask_ratio = mask_ratio
        strides = self.backbone.strides[::-1]  # from here on the coarsest map is the first
        if not 0 < mask_ratio < 1:
            raise UsageError(f'PyramidSparK: mask_ratio={mask_ratio} is not in (0, 1)')
        side = strides[0]
        if self.head.patch_size != side or 2 ** len(self.neck.decoder) != side:
            raise UsageError(
                f"PyramidSparK: the backbone's coarsest map has a stride of {side}, so that "
                f'head.patch_size={self.head.patch_size} and neck.upsample_ratio='
                f'{2 ** len(self.neck.decoder)} must both be {side}')
        if strides != tuple(side // 2**i for i in range(len(strides))):
            raise UsageError(f'PyramidSparK: the backbone gives maps of strides {strides[::-1]}, '
                             'must be those of all its last stages; set backbone.out_indices')

        self.norms, self.projections = nn.ModuleList(), nn.ModuleList()
        self.mask_tokens = nn.ParameterList()
        for i, width in enumerate(self.backbone.out_channels[::-1]):
            self.norms.append(nn.BatchNorm2d(width))
            token = torch.empty(1, width, 1, 1)
            self.mask_tokens.append(nn.Parameter(nn.init.trunc_normal_(token, 0, .02, -.02, .02)))
            wanted = self.neck.feature_dim // 2**i
            if i:
                self.projections.append(nn.Conv2d(width, wanted, 3, padding=1))
            else:
                self.projections.append(nn.Identity() if width == wanted else
                                        nn.Conv2d(width, wanted, 1))

    def loss(self, inputs: Tensor, data_samples: Any = None) -> dict[str, Tensor]:
        """Hide squares anew, and compare what is drawn in them with the images.

        Args:
            inputs: Images (N, 3, H, W), normalized; H and W are multiples of the stride.
            data_samples: Not used; nothing needs labels.

        Raises:
            UsageError: The images are of another size.
        """
        visible = self.draw_mask(inputs)
        return dict(loss=self.head(self.reconstruct(inputs, visible), inputs, visible))

    def draw_mask(self, images: Tensor) -> Tensor:
        """Draw which squares of images (N, 3, H, W) are visible, (N, 1, H / stride, W / stride)."""
        height, width = (side // self.head.patch_size for side in images.shape[2:])
        total = height * width
        kept = round(total * (1 - self.mask_ratio))
        if not 0 < kept < total:
            raise UsageError(
                f'PyramidSparK: images of {images.shape[3]} x {images.shape[2]} pixels have '
                f'{count(total, "square")} of {self.head.patch_size} x {self.head.patch_size}, too '
                f'few to hide {self.mask_ratio:.0%} and show the others; take larger images')
        ranks = torch.rand(len(images), total, device=images.device).argsort(1).argsort(1)
        return (ranks < kept).view(-1, 1, height, width)

    def reconstruct(self, images: Tensor, visible: Tensor) -> Tensor:
        """Draw images, hidden squares included, from visible squares alone.

        Args:
            images: (N, 3, H, W), normalized.
            visible: (N, 1, H / stride, W / stride), True where a square is visible.

        Returns:
            (N, 3, H, W), each square of mean 0 and variance 1 if the head has `norm_pix`.
        """
        maps = self.backbone(images, visible)[::-1]
        seen, filled = self.backbone.visible, []
        for x, norm, token, project in zip(maps, self.norms, self.mask_tokens, self.projections,
                                           strict=True):
            x = seen.scatter(norm(seen.gather(x)), x)
            filled.append(project(torch.where(seen.at(x)[0], x, token.type_as(x))))
        return self.neck(filled)
