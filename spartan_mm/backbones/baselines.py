"""The mixers that Table IV of the SpaRTAN paper compares its own with, and makes them known."""
from functools import partial

from torch import Tensor, nn

from .spartan import ACTIVATIONS, CHANNEL_MIXERS, SPATIAL_MIXERS, ConvNormAct, SqueezeExcitation


class ConvMixer(nn.Module):
    """Plain convolutions in place of the SMixer.

    NOTE: the paper says no more than "a non-linear projection using convolutions". Read here as
    what is left of the SMixer, which also explains the arguments, without its additions: two
    projections around one 3x3 convolution of the same type, norm and activation.
    """

    def __init__(self, channels: int, conv_type: str = 'full', norm: str = 'BN',
                 act: str = 'GELU', inner_channels: int | None = None):
        super().__init__()
        inner = inner_channels or channels // 2
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.conv = ConvNormAct(inner, inner, 3, norm, act, padding=1,
                                groups=inner if conv_type == 'depthwise' else 1)
        self.proj_out = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self.proj_out(self.conv(self.proj_in(x)))


class MLP(nn.Module):
    """A plain MLP, with or without squeeze-excitation, in place of the CMixer.

    NOTE: "vanilla" is taken at its word: two 1x1 convolutions and the activation between them, no
    3x3. The squeeze-excitation acts on the hidden channels and is as wide as the CMixer's.

    The arguments are the CMixer's, of which `conv_type` and `norm` have no meaning here, and
    `squeeze_excitation`: whether the hidden channels are gated.
    """

    def __init__(self, channels: int, expand_ratio: int, conv_type: str = 'full',
                 norm: str = 'BN', act: str = 'GELU', hidden_channels: int | None = None,
                 squeeze_excitation: bool = False):
        super().__init__()
        hidden = hidden_channels or channels * expand_ratio
        self.proj_in = nn.Conv2d(channels, hidden, 1)
        self.act = ACTIVATIONS[act]()
        self.se = SqueezeExcitation(hidden, channels // 4) if squeeze_excitation else nn.Identity()
        self.proj_out = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self.proj_out(self.se(self.act(self.proj_in(x))))


SPATIAL_MIXERS['conv'] = ConvMixer
CHANNEL_MIXERS.update(mlp=MLP, mlp_se=partial(MLP, squeeze_excitation=True))
