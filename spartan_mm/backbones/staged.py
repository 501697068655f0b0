"""What backbones of several stages have in common, whatever a stage is made of."""
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .arch import check_choice, check_images, check_out_indices

torch.fx.wrap('check_images')  # A step that tracers take as a whole.


class StagedBackbone(BaseModule):
    """A stem and stages, each of twice the stride of the one before, and the maps of some of them.

    A subclass makes `stem` and `stages`, and calls `freeze` when it has initialized them.

    Args:
        channels: Channels of each stage's map.
        first_stride: Stride of the first stage's map.
        out_indices: Stages whose maps are returned, ascending; negative ones count from the last.
        drop_path_rate: Greatest probability of dropping a branch, in [0, 1).
        frozen_stages: 0 freezes the stem, n > 0 the first n stages as well, -1 nothing.
        norm_eval: Whether batch norms stay in evaluation mode, and so are trained within their
            convolutions, see :func:`.call_in_turn`.
        init_cfg: See mmengine's BaseModule.

    Raises:
        ValueError: An option is not legal; the message says what is.
    """

    deploy = False

    def __init__(self, channels: Sequence[int], first_stride: int,
                 out_indices: int | Sequence[int], drop_path_rate: float, frozen_stages: int,
                 norm_eval: bool, init_cfg: dict | list[dict] | None):
        super().__init__(init_cfg)
        check_choice('frozen_stages', frozen_stages, range(-1, len(channels) + 1))
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate} is not in [0, 1)')
        self.out_indices = check_out_indices(out_indices, len(channels))
        self.out_channels = tuple(channels[i] for i in self.out_indices)
        self.strides = tuple(first_stride * 2**i for i in self.out_indices)
        self.min_size = first_stride * 2**(len(channels) - 1)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps.

        Args:
            x: Images (N, in_channels, H, W). H and W are at least `min_size` and otherwise free.

        Returns:
            One (N, C, H', W') map for each of `out_indices`.

        Raises:
            ValueError: The images are smaller.
        """
        x = self.stem(check_images(x, self.min_size, type(self).__name__))
        maps = []
        for i, stage in enumerate(self.stages[:self.out_indices[-1] + 1]):
            x = stage(x)
            if i in self.out_indices:
                maps.append(x)
        return tuple(maps)

    def train(self, mode: bool = True) -> 'StagedBackbone':
        """Switch between training and evaluation, except for what is frozen or under `norm_eval`.

        The deploy form raises a RuntimeError if training is asked of it.
        """
        if mode and self.deploy:
            raise RuntimeError(f'{type(self).__name__} is in deploy form, whose folded weights '
                               'cannot be trained: build it anew and load the checkpoint of the '
                               'training')
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        for module in self.modules():
            if self.norm_eval and isinstance(module, _BatchNorm):
                module.eval()
        return self

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Take the form for inference: the same function with less to compute, for good.

        Batch norms, scales and parallel branches are folded into convolutions. A second call
        changes nothing.
        """
        if not self.deploy:
            self.eval().requires_grad_(False)
            for module in [*self.modules()][1:]:
                if hasattr(module, 'switch_to_deploy'):
                    module.switch_to_deploy()
            self.deploy = True

    def frozen_modules(self) -> list[nn.Module]:
        """The stem and the stages that `frozen_stages` names."""
        return [self.stem, *self.stages][:self.frozen_stages + 1]

    def freeze(self) -> None:
        """Take the gradients from what is frozen."""
        for module in self.frozen_modules():
            module.requires_grad_(False)
