"""Models and images that the commands of this folder take, whoever's the models are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import Tensor, nn

from ... import zoo
from ...datasets.images import load_image
from ...engine.launch import choose_device
from ...errors import UsageError
from ...weights.stored_config import find_test_dataset
from ..models import NamedModel, load_named_model, read_config, title_of

#: The config whose test pipeline a backbone alone gets.
_BACKBONE_CONFIG = 'spartan_xt_224'

_REMEDY = 'Leave it out or replace it.'


class ImageReader:
    """Reads image files the way a model's test pipeline does, the normalization included.

    A model of timm gets timm's transforms, a backbone alone those of SpaRTAN at 224 pixels.

    Args:
        named: The model.

    Raises:
        UsageError: If its config has no test pipeline.
        ImportError: If the package is missing whose pipeline it is.
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
            The normalized image, (3, H, W), on the model's device.

        Raises:
            DataError: If it does not exist, cannot be read or is no image.
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


@dataclass(frozen=True)
class GivenModel:
    """A model as a command was given it.

    Args:
        title: What to call it, with a remark if its weights are random.
        name: See :func:`load_named_model`.
        checkpoint: Its weights; None if `name` is a checkpoint, or for random ones.
        trained: Whether it has weights of its own.
        named: The model.
    """

    title: str
    name: str
    checkpoint: str | None
    trained: bool
    named: NamedModel


def load_models(models: Sequence[str], titles: Sequence[str] | None = None, random: bool = False,
                device: str | None = None, seed: int = 0) -> list[GivenModel]:
    """Load models for a look at what they have learnt.

    Args:
        models: As commands take them, see :func:`split_checkpoint`.
        titles: What to call them; None for their own names.
        random: Whether models without weights get random ones, all of the same seed.
        device: Where to put them; None for a GPU if there is one.
        seed: Of random weights.

    Raises:
        UsageError: If two would be called the same; and what :func:`load_with_weights` raises.
    """
    given = []
    for title, model in zip(title_models(models, titles), models, strict=True):
        name, checkpoint = split_checkpoint(model)
        torch.manual_seed(seed)
        named = load_with_weights(name, checkpoint, random, device)
        trained = has_weights(name, checkpoint)
        given.append(GivenModel(title if trained else f'{title} (random weights)', name, checkpoint,
                                trained, named))
    return given


def title_models(models: Sequence[str], titles: Sequence[str] | None = None) -> list[str]:
    """Call models as the user does, by their own names, or by their checkpoints' if these differ.

    Args:
        models: As commands take them, see :func:`split_checkpoint`.
        titles: What the user calls them, if anything.

    Raises:
        UsageError: If two would be called the same, or there is another number of titles.
    """
    if titles and len(titles) != len(models):
        raise UsageError(f'--names: {len(titles)} names for {len(models)} models')
    if not titles:
        parts = [split_checkpoint(model) for model in models]
        own = [title_of(name) for name, _ in parts]
        titles = [title if own.count(title) == 1 else Path(checkpoint or name).stem
                  for title, (name, checkpoint) in zip(own, parts, strict=True)]
    for title in titles:
        if titles.count(title) > 1:
            raise UsageError(f'two models are called {title}: give each a name with --names')
    return list(titles)


def load_with_weights(name: str, checkpoint: str | None = None, random: bool = False,
                      device: str | None = None) -> NamedModel:
    """Load a model for a look at what it has learnt.

    Args:
        name: See :func:`load_named_model`.
        checkpoint: The weights; None if `name` is a checkpoint.
        random: Whether a model without weights gets random ones.
        device: Where to put it; None for a GPU if there is one.

    Raises:
        UsageError: If there are no weights, and random ones are not asked for; or no such device.
        UnknownModelError: If the name stands for nothing.
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If the checkpoint belongs to another architecture.
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


def choose_images(images: Sequence[Path], count: int | None, seed: int) -> list[Path]:
    """Draw some of the images, so that fewer are among those that more would be.

    Args:
        images: The files.
        count: Number of images; None for all.
        seed: Of the choice.
    """
    order = np.random.default_rng(seed).permutation(len(images))[:count]
    return [images[index] for index in order]
