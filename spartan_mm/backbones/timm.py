"""Backbones of `timm <https://github.com/huggingface/pytorch-image-models>`_ for detectors."""
import difflib
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CheckpointError
from ..requirements import require
from ..text import first_line
from .pyramid import describe, refuse_size


@MODELS.register_module()
class TIMMFeatures(BaseModule):
    """Maps of any timm model that gives some, with their channels and strides published.

    NOTE mmpretrain's TIMMBackbone downloads pretrained weights when it is built, also where a
    checkpoint replaces them right afterwards, and doesn't tell the channels of its maps. Here
    building never downloads anything.

    Args:
        model_name: timm's name of the model, with or without the tag of its weights, such as
            'resnet18d' or 'resnet18d.ra2_in1k'.
        out_indices: Maps to return, finest first; negative values count from the coarsest.
        pretrained: Whether `init_weights`, which mmengine calls before a training, loads timm's
            pretrained weights; they are downloaded unless `pretrained_cfg_overlay=dict(file=...)`
            names a local file.
        normalize: Whether images come in RGB with values from 0 to 1 and are normalized here as the
            model was pretrained, which every model of timm knows about itself.
        init_cfg: See mmengine's BaseModule; must be None, see `pretrained`.
        norm_eval: Whether BatchNorms keep their statistics and their weights in training.
        frozen: Names of timm's parts whose weights aren't trained, such as 'stem'.
        kwargs: What else `timm.create_model` takes, such as `drop_path_rate`.

    Raises:
        ImportError: timm is missing or too old.
        ValueError: There is no such model, map or part.

    Examples:
        >>> backbone = TIMMFeatures('resnet10t')
        >>> backbone.out_channels, backbone.strides
        ((128, 256, 512), (8, 16, 32))
    """

    def __init__(self, model_name: str, out_indices: Sequence[int] = (-3, -2, -1),
                 pretrained: bool = False, normalize: bool = False, init_cfg: None = None,
                 norm_eval: bool = False, frozen: Sequence[str] = (), **kwargs):
        if init_cfg is not None:
            raise ValueError('TIMMFeatures takes no init_cfg: pretrained=True loads weights, from '
                             'a local file by pretrained_cfg_overlay=dict(file=...)')
        super().__init__()
        timm = require('timm', '1.0.4', 'timm')
        if not timm.is_model(model_name):
            known = difflib.get_close_matches(model_name, timm.list_models(), 3, 0.)
            raise ValueError(f'timm {timm.__version__} has no model {model_name!r}; the closest '
                             f'names are {", ".join(known)}')
        self._settings = dict(model_name=model_name, features_only=True,
                              out_indices=tuple(out_indices), **kwargs)
        try:
            self.model = timm.create_model(**self._settings)
        except (AssertionError, IndexError) as error:
            raise ValueError(f'{model_name} has no maps out_indices={tuple(out_indices)}: '
                             f'{error or "an index is out of range"}') from error
        except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
            raise ValueError(f'timm {timm.__version__} does not build {model_name} with maps and '
                             f'{kwargs or "no more arguments"}: {first_line(error)}') from error
        self.model_name = model_name
        self.pretrained = pretrained
        self.norm_eval = norm_eval
        parts = dict(self.model.named_children())
        if unknown := [name for name in frozen if name not in parts]:
            raise ValueError(f'{model_name} has no part to freeze called {unknown[0]!r}; it has '
                             f'{", ".join(parts)}')
        for part in (*(parts[name] for name in frozen), *self._frozen_norms()):
            part.requires_grad_(False)
        self.out_channels = tuple(self.model.feature_info.channels())
        self.strides = tuple(self.model.feature_info.reduction())
        # Swin and its like keep the channels last.
        self.channels_last = str(getattr(self.model, 'output_fmt', 'NCHW')).endswith('NHWC')

        trained_as = timm.get_pretrained_cfg(model_name) if normalize else None
        mean, std = (trained_as.mean, trained_as.std) if trained_as else ((0.,), (1.,))
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def init_weights(self) -> None:
        """Load the pretrained weights if `pretrained`; else timm has initialized everything.

        Raises:
            CheckpointError: They lack weights of the model.
        """
        if self.pretrained:
            import timm
            # timm leaves random what a file lacks: it differs from one time to the next.
            trained, again = (timm.create_model(**self._settings, pretrained=True)
                              for _ in range(2))
            again = dict(again.named_parameters())
            missing = [name for name, weight in trained.named_parameters()
                       if not weight.equal(again[name])]
            if missing:
                raise CheckpointError(
                    f'the pretrained weights of {self.model_name} lack {len(missing)} of its '
                    f'{len(again)} weights, {missing[0]} first: a local file must be of this '
                    'model, with its names as timm has them')
            self.model.load_state_dict(trained.state_dict())
        self._is_init = True

    def _frozen_norms(self) -> list[nn.Module]:
        return [part for part in self.model.modules()
                if self.norm_eval and isinstance(part, _BatchNorm)]

    def train(self, mode: bool = True) -> 'TIMMFeatures':
        """Switch between training and evaluation, which norms may stay in."""
        super().train(mode)
        for norm in self._frozen_norms():
            norm.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps.

        Args:
            x: Images (N, 3, H, W).

        Returns:
            One (N, C, H / stride, W / stride) map for each of `out_indices`.

        Raises:
            ValueError: The model does not take images of this size.
        """
        try:
            maps = self.model((x - self.mean) / self.std)
        except AssertionError as error:
            raise ValueError(refuse_size(describe(self), x.shape[-2:], error)) from error
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return tuple(maps)
