"""SpaRTAN on images of which squares are hidden: what is hidden reaches nothing that is visible.

For pre-training by SparK, "Designing BERT for Convolutional Networks: Sparse and Hierarchical
Masked Modeling" (arXiv 2301.03580), Sec. 3.1. The parts below take the place of SpaRTAN's own; they
share a ``Visible`` that knows the mask, and without one they are SpaRTAN's.

NOTE: SparK zeroes what is hidden after each convolution. Here it is zeroed before those that look
around, which is the same for what is visible, and lets nothing through where a map was changed in
between: the SMixer adds a share of the average to every position, hidden ones included.
"""
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..errors import UsageError
from .layers import GroupNorm1
from .spartan import SMixer, SpaRTAN, SqueezeExcitation


class Visible:
    """The positions of a batch of maps that are visible, at any resolution.

    Maps are (N, C, H, W); P is the number of visible positions of a sample, the same for all.
    """

    def __init__(self):
        self.show(None)

    def show(self, mask: Tensor | None) -> None:
        """Set the mask, (N, 1, h, w), True where a square is visible; None for no mask."""
        self.mask = mask
        self._by_size = {}

    def at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mask at the resolution of a map, (N, 1, H, W), and its visible rows, (N * P, )."""
        size = x.shape[2:]
        if size not in self._by_size:
            mask = self.mask
            for dim in (2, 3):
                mask = mask.repeat_interleave(x.shape[dim] // mask.shape[dim], dim)
            self._by_size[size] = mask, mask.flatten().nonzero().flatten()
        return self._by_size[size]

    def hide(self, x: Tensor) -> Tensor:
        """The map with zeros where it is hidden."""
        return x if self.mask is None else x.masked_fill(~self.at(x)[0], 0)

    def gather(self, x: Tensor) -> Tensor:
        """The visible positions of a map, (N, C, 1, P).

        NOTE: not (N, C, P, 1), of which PyTorch 2.13 computes wrong gradients on a CPU: a batch
        norm's, its input with the channels last and the gradient of its output with them first.
        """
        if self.mask is None:
            return x
        rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).index_select(0, self.at(x)[1])
        return rows.view(len(x), 1, -1, x.shape[1]).permute(0, 3, 1, 2)

    def scatter(self, gathered: Tensor, like: Tensor) -> Tensor:
        """Put what was gathered back into a map of the size of `like`, zeros elsewhere."""
        if self.mask is None:
            return gathered
        count, channels, height, width = like.shape
        rows = gathered.permute(0, 2, 3, 1).reshape(-1, channels)
        x = rows.new_zeros(count * height * width, channels).index_copy(0, self.at(like)[1], rows)
        return x.view(count, height, width, channels).permute(0, 3, 1, 2)


class _Norm:
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape; statistics are those of visible positions."""
        return self.visible.scatter(super().forward(self.visible.gather(x)), x)


class _Average:
    def average(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 1, 1), over visible positions."""
        return super().average(self.visible.gather(x))


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees zeros where its input is hidden."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        # One that does not look around takes nothing elsewhere.
        return super().forward(x if self.kernel_size == (1, 1) else self.visible.hide(x))


class MaskedBatchNorm2d(_Norm, nn.BatchNorm2d):
    """A batch norm of visible positions."""


class MaskedSyncBatchNorm(_Norm, nn.SyncBatchNorm):
    """The same over several GPUs, which `sync_bn` of a config puts in its place."""


class MaskedGroupNorm1(_Norm, GroupNorm1):
    """A group norm of visible positions."""


class MaskedSqueezeExcitation(_Average, SqueezeExcitation):
    """A squeeze-excitation by the averages of visible positions."""


class MaskedSMixer(_Average, SMixer):
    """An SMixer that decomposes by the average of visible positions."""


#: What takes the place of SpaRTAN's parts.
MASKED = {nn.Conv2d: MaskedConv2d, nn.BatchNorm2d: MaskedBatchNorm2d,
          nn.SyncBatchNorm: MaskedSyncBatchNorm, GroupNorm1: MaskedGroupNorm1,
          SqueezeExcitation: MaskedSqueezeExcitation, SMixer: MaskedSMixer}


@MODELS.register_module()
class MaskedSpaRTAN(SpaRTAN):
    """A SpaRTAN that can be given images of which squares are hidden.

    Arguments, parameters and their names are SpaRTAN's, and so are the maps where nothing is
    hidden: a checkpoint of one fits the other.

    Example:
        >>> import torch
        >>> backbone = MaskedSpaRTAN('xt')
        >>> visible = torch.tensor([[True, False, True]]).view(1, 1, 1, 3)
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 32, 96), visible)]
        [(1, 192, 1, 3)]
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.visible = Visible()

    # What is gathered has sizes that torch.compile would find out anew each time.
    @torch.compiler.disable
    def forward(self, x: Tensor, visible: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute the maps.

        Args:
            x: Images (N, in_channels, H, W).
            visible: (N, 1, H / 32, W / 32), True where a square of 32 x 32 pixels is visible; as
                many of each image. None for all, of images of any size.

        Returns:
            One (N, C, H', W') map for each of `out_indices`. What it has at hidden positions means
            nothing; it depends on visible pixels alone.

        Raises:
            UsageError: The squares are not those of the images, or none or unequal numbers of them
                are visible.
        """
        if visible is not None:
            self.check_visible(x, visible)
        self.visible.show(visible)
        # Here, as norms may have been replaced since by those of several GPUs, or parts by copies.
        for part in self.modules():
            if type(part) in MASKED:
                part.__class__ = MASKED[type(part)]
            part.visible = self.visible
        return super().forward(x)

    def check_visible(self, x: Tensor, visible: Tensor) -> None:
        """Refuse a mask that does not fit the images."""
        height, width = x.shape[2:]
        side = self.min_size
        if height % side or width % side:
            raise UsageError(
                f'{type(self).__name__} hides squares of {side} x {side} pixels, and images of '
                f'{width} x {height} are no whole number of them; crop or resize them in the '
                f'pipeline to multiples of {side}')
        wanted = len(x), 1, height // side, width // side
        if visible.shape != wanted:
            raise UsageError(f'{type(self).__name__}: visible has the shape {(*visible.shape, )}, '
                             f'must be {wanted} for images of {width} x {height}')
        least, most = visible.sum((1, 2, 3)).aminmax()
        if least != most or not least:
            raise UsageError(f'{type(self).__name__}: from {least} to {most} squares of an image '
                             'are visible, must be the same number of each, at least 1')
