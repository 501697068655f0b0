"""SpaRTAN in the arithmetic of its authors' released code, to compare speed, memory and rounding.

The function and the weights are those of ``backbones/spartan.py``; here is what is computed
otherwise, line by line as the formulas stand.
"""
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..backbones.spartan import Block, CMixer, SMixer, SpaRTAN


class AuthorsSMixer(SMixer):
    """Feature decomposition by four operations."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = self.proj_in(x)
        x = x + self.gamma * (x - x.mean((2, 3), keepdim=True))
        high = self.high_se(self.high_freq(x))
        low = self.low_se(self.low_freq(x))
        return self.proj_out(torch.cat([high, low], 1))


class AuthorsCMixer(CMixer):
    """Two projections, two picked maps, and a modulation that changes the layout to and fro."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        strongest = x.argmax(1, keepdim=True)
        phase = self.act(self.theta(x))
        amplitude = self.proj(x)
        wave = amplitude * phase + amplitude.gather(1, strongest) * phase.gather(1, strongest)

        # At least float32; no step of it is one whose type autocast would choose.
        wide = torch.promote_types(wave.dtype, torch.float32)
        pairs = wave.to(wide).permute(0, 2, 3, 1).contiguous()  # (N, H, W, R)
        pairs = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))
        pairs = pairs * torch.view_as_complex(self.complex_weight.to(wide))
        modulated = torch.view_as_real(pairs).flatten(-2).permute(0, 3, 1, 2).contiguous()
        return self.proj_out(self.se(self.refine(modulated.to(wave.dtype))))


class AuthorsBlock(Block):
    """Scaling, dropping and adding one after the other."""

    def add(self, x: Tensor, layer_scale: Tensor, branch: Tensor) -> Tensor:
        """x + drop_path(layer_scale * branch)."""
        return x + self.drop_path(layer_scale * branch)


class AuthorsSpaRTAN(SpaRTAN):
    """The images stay in the layout that they come in."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See ``SpaRTAN.forward``."""
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages[:self.out_indices[-1] + 1]):
            x = stage(x)
            if i in self.out_indices:
                maps.append(x)
        return tuple(maps)


FORMS = {SMixer: AuthorsSMixer, CMixer: AuthorsCMixer, Block: AuthorsBlock, SpaRTAN: AuthorsSpaRTAN}


@torch.no_grad()
def to_authors_form(backbone: SpaRTAN) -> SpaRTAN:
    """Turn a backbone into the authors' form, in place and for good; it has no deploy form.

    Args:
        backbone: In training form, with the options of the released models; its `arch` is free.

    Returns:
        The backbone, whose `proj_in` of each CMixer are two convolutions then, `theta` (phases) and
        `proj` (amplitudes).

    Raises:
        ValueError: The backbone has other options, or is in another form.
    """
    with torch.device('meta'):
        released = SpaRTAN(backbone.arch)
    expected, found = ({name: type(part).__name__ for name, part in model.named_modules()}
                       for model in (released, backbone))
    for name in expected | found:
        wanted, given = expected.get(name, 'nothing'), found.get(name, 'nothing')
        if given != wanted:
            raise ValueError("the authors' form is that of a SpaRTAN in training form with the "
                             f'released options: {name or "it"} is {given} instead of {wanted}')

    for part in [*backbone.modules()]:
        if isinstance(part, CMixer):
            part.theta, part.proj = part.proj_in, deepcopy(part.proj_in)
            for conv, half in ((part.theta, 0), (part.proj, 1)):
                conv.out_channels //= 2
                for name, values in conv.named_parameters():
                    setattr(conv, name, nn.Parameter(values.chunk(2)[half].clone(),
                                                     values.requires_grad))
            del part.proj_in
            weight = part.complex_weight
            part.complex_weight = nn.Parameter(weight[None, None, None].clone(),
                                               weight.requires_grad)
        part.__class__ = FORMS.get(type(part), type(part))
    return backbone
