"""Dilated convolution with learnable spacings: kernels of few weights that find their places.

arXiv 2112.03740; 2306.00817 for the Gaussian.
"""
import torch
from torch import Tensor, nn

#: What stands in place of a dilated pair of 3x3, in a window of its field. The pair has 18
#: parameters for each channel; here a weight has two coordinates, and two widths if Gaussian: 6 x 3
#: are as many, and 4 x 5 come near.
DCLS = {'dcls': dict(kernel_size=9, count=6, version='bilinear'),
        'dcls_gaussian': dict(kernel_size=9, count=4, version='gaussian')}

# Of a Gaussian: what its width starts from, and what is added to it so that it reaches a neighbour.
_WIDTH, _LEAST_WIDTH = 0.23, 0.27


class DCLSConv2d(nn.Conv2d):
    """Depthwise convolution whose weights stand at positions that are learned (2112.03740, Sec. 2).

    The kernel is the sum of the weights, each spread over the window: bilinear, to the four nearest
    positions; Gaussian, to all, with a width for each direction that is learned, too. What a weight
    gives the window sums to itself.

    NOTE: `positions` (C, 1, M, 2) and `widths` have the direction last, rows before columns, and
    channels first as `weight` (C, 1, M) has them; the authors' P and SIG have the direction first,
    columns before rows.

    Args:
        channels: Channels C of the map.
        kernel_size: Side of the window, odd.
        count: Weights M in it.
        version: 'bilinear' or 'gaussian'.
    """

    def __init__(self, channels: int, kernel_size: int, count: int, version: str = 'bilinear'):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2,
                         groups=channels, bias=False)
        self.version = version
        self.weight = nn.Parameter(torch.empty(channels, 1, count))
        self.positions = nn.Parameter(torch.empty(channels, 1, count, 2))
        self.widths = nn.Parameter(
            torch.empty(channels, 1, count, 2)) if version == 'gaussian' else None
        self.init_parameters()

    def init_parameters(self) -> None:
        """Scatter the weights around the centre."""
        nn.init.normal_(self.weight, std=(2 / self.weight.shape[2]) ** 0.5)
        nn.init.normal_(self.positions, std=0.5)
        self.clamp_positions()
        if self.widths is not None:
            nn.init.constant_(self.widths, _WIDTH)

    @torch.no_grad()
    def clamp_positions(self) -> None:
        """Take positions back into the window, which is due after each step of an optimizer."""
        reach = self.kernel_size[0] // 2
        self.positions.clamp_(-reach, reach)

    def make_kernel(self) -> Tensor:
        """The kernel (C, 1, K, K) that the weights make, differentiable in all parameters."""
        size = self.kernel_size[0]
        grid = torch.arange(size, device=self.positions.device) - size // 2
        distances = grid - self.positions[..., None]  # (C, 1, M, 2, K)
        if self.widths is None:
            shares = (1 - distances.abs()).relu()
        else:
            shares = (-0.5 * (distances / (self.widths.abs() + _LEAST_WIDTH)[..., None]) ** 2).exp()
        rows, columns = shares.unbind(-2)  # (C, 1, M, K)
        weight = self.weight / (rows.sum(-1) * columns.sum(-1) + 1e-7)
        # NOTE: not a product of matrices, which autocast would compute in half precision.
        return ((weight[..., None] * rows)[..., None] * columns[..., None, :]).sum(2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self._conv_forward(x, self.make_kernel(), None)

    @torch.no_grad()
    def to_conv(self) -> nn.Conv2d:
        """The ordinary convolution that computes the same."""
        kernel = self.make_kernel()
        conv = nn.Conv2d(len(kernel), len(kernel), self.kernel_size, padding=self.padding,
                         groups=self.groups, bias=False).to(kernel)
        conv.weight.copy_(kernel)
        return conv.eval().requires_grad_(False)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f'{super().extra_repr()}, count={self.weight.shape[2]}, version={self.version}'
