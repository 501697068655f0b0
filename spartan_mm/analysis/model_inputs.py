"""Images as a model sees them, whoever's the model is, for the commands that look into models."""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import Tensor, nn

from .. import zoo
from ..datasets.images import load_image
from ..engine.launch import UsageError, choose_device
from ..weights.stored_config import find_test_dataset
from .named_models import NAMES, NamedModel, load_named_model, read_config

#: The config whose test pipeline a backbone alone gets.
_BACKBONE_CONFIG = 'spartan_xt_224'

_REMEDY = 'Leave it out or replace it.'


class ImageReader:
    """Reads image files the way a model's test pipeline does, the normalisation included.

    A model of timm gets timm's transforms, a backbone alone those of SpaRTAN at 224 pixels.

    Args:
        named: the model.

    Raises:
        UsageError: if its config has no test pipeline.
        ImportError: if the package is missing whose pipeline it is.
    """

    def __init__(self, named: NamedModel) -> None:
        self._device = next(named.model.parameters()).device
        if named.source == 'timm':
            import timm
            options = timm.data.resolve_data_config({}, model=named.model)
            self._transform = timm.data.create_transform(**options)
            return
        self._transform = None
        config = named.config or zoo.get_config(_BACKBONE_CONFIG)
        dataset = find_test_dataset(config)
        if not dataset.get('pipeline'):
            raise UsageError(f'the config of {named.name} has no test_dataloader with a pipeline, '
                             'which says how the model sees an image')
        self._scope = config.default_scope
        loader, *steps = dataset.pipeline
        self._decoding = dict(flag=loader.get('color_type', 'color'),
                              backend=loader.get('imdecode_backend'))
        self._float = loader.get('to_float32', False)
        with DefaultScope.overwrite_default_scope(self._scope):
            self._pipeline = Compose([step for step in steps if step['type'] != 'LoadAnnotations'])
            self._preprocessor = self._find_preprocessor(named.model, config).to(self._device)

    @staticmethod
    def _find_preprocessor(model: nn.Module, config: Config) -> nn.Module:
        found = getattr(model, 'data_preprocessor', None)
        if found is not None:
            return found
        settings = dict(config.model.get('data_preprocessor') or config.data_preprocessor)
        settings.setdefault('type', 'ClsDataPreprocessor')
        return MODELS.build(settings)

    def __call__(self, path: str | Path) -> Tensor:
        """Read a file.

        Returns:
            The normalised image, (3, H, W), on the model's device.

        Raises:
            DataError: if it does not exist, cannot be read or is no image.
        """
        described = f'picture {str(path)!r}'
        if self._transform is not None:
            image = load_image(str(path), described, _REMEDY)
            image = Image.fromarray(np.ascontiguousarray(image[..., ::-1]))
            return self._transform(image).to(self._device)
        image = load_image(str(path), described, _REMEDY, **self._decoding)
        size = image.shape[:2]
        image = image.astype(np.float32) if self._float else image
        with DefaultScope.overwrite_default_scope(self._scope), torch.no_grad():
            packed = self._pipeline(dict(img=image, img_shape=size, ori_shape=size, img_id=0,
                                         img_path=str(path)))
            batch = {key: [value] for key, value in packed.items()}
            return self._preprocessor(batch, False)['inputs'][0]


def add_model_arguments(parser: argparse.ArgumentParser, out_dir: str) -> None:
    """Add the flags that tools have in common which show what several models make of images.

    Args:
        parser: of the tool.
        out_dir: default of ``--out-dir``.
    """
    parser.add_argument('images', help='an image, or a folder; it is searched with its subfolders')
    parser.add_argument('models', nargs='+', metavar='MODEL[=CHECKPOINT]',
                        help=f'models, each with its weights, a file or URL. MODEL is {NAMES}')
    parser.add_argument('--names', nargs='+', metavar='NAME',
                        help='what to call the models (default: their own names)')
    parser.add_argument('--out-dir', type=Path, default=Path(out_dir), metavar='DIR',
                        help='where to write (default: %(default)s)')
    parser.add_argument('--device',
                        help="such as 'cpu' or 'cuda:0' (default: a GPU if there is one)")


def load_with_weights(name: str, checkpoint: str | None = None, random: bool = False,
                      device: str | None = None) -> NamedModel:
    """Load a model for a look at what it has learnt.

    Args:
        name: see :func:`load_named_model`.
        checkpoint: the weights; None if `name` is a checkpoint.
        random: whether a model without weights gets random ones.
        device: where to put it; None for a GPU if there is one.

    Raises:
        UsageError: if there are no weights, and random ones are not asked for; or no such device.
        UnknownModelError: if the name stands for nothing.
        FileNotFoundError: if there is no such checkpoint.
        CheckpointError: if the checkpoint belongs to another architecture.
    """
    device = choose_device(device)
    read_config(name)
    if not random and not has_weights(name, checkpoint):
        raise UsageError(f'{name} is a model without weights: name a checkpoint, too, as '
                         f'{name}=CHECKPOINT, or take random ones with --random')
    return load_named_model(name, checkpoint, device)


def has_weights(name: str, checkpoint: str | None = None) -> bool:
    """Whether a model comes with weights: those of a checkpoint, which its name may be."""
    return checkpoint is not None or zoo.is_checkpoint(name)


def digest_weights(model: nn.Module) -> str:
    """Compute a short text that two models share if all their weights are equal."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def split_checkpoint(argument: str) -> tuple[str, str | None]:
    """Split what a command takes for a model, MODEL or MODEL=CHECKPOINT.

    Example:
        >>> split_checkpoint('spartan_xt=run/epoch_300.pth')
        ('spartan_xt', 'run/epoch_300.pth')
        >>> split_checkpoint('spartan_xt.pth')
        ('spartan_xt.pth', None)
    """
    # A file may have the sign in its name.
    if Path(argument).is_file():
        return argument, None
    name, _, checkpoint = argument.partition('=')
    return name, checkpoint or None
