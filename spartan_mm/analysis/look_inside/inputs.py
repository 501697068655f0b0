"""Models and images that the commands of this folder take, whoever's the models are."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import Tensor, nn

from ... import zoo
from ...datasets.images import decoding_of, load_image
from ...engine.launch import choose_device
from ...errors import UsageError
from ...weights.stored_config import find_test_dataset
from ..models import NamedModel, load_named_model, read_config, title_of

#: The config whose test pipeline a backbone alone gets.
_BACKBONE_CONFIG = 'spartan_xt_224'


def read_picture(path: str | Path, **decoding: Any) -> np.ndarray:
    """Read an image, (H, W, 3) in BGR order; a DataError says what is wrong with the file."""
    return load_image(str(path), f'picture {str(path)!r}', 'Leave it out or replace it.',
                      **decoding)


@dataclass(frozen=True)
class GivenModel:
    """A model as a command was given it, and how it sees images.

    A backbone alone sees them as SpaRTAN does at 224 pixels, a model of timm as timm shows them.

    Args:
        title: What to call it, with a remark if its weights are random.
        named: The model.
        origin: What it was made of, fit for JSON.
    """

    title: str
    named: NamedModel
    origin: dict[str, Any]

    @cached_property
    def read(self) -> Callable[[Path], Tensor]:
        """Reads a file as the model's test pipeline does, to the normalized image, (3, H, W).

        Raises:
            UsageError: The model's config has no test pipeline.
        """
        if self.named.source == 'timm':
            import timm
            options = timm.data.resolve_data_config({}, model=self.named.model)
            transform = timm.data.create_transform(**options)
            return lambda path: transform(Image.fromarray(
                read_picture(path)[..., ::-1])).to(self._device)

        scope, dataset = self._config.default_scope, find_test_dataset(self._config)
        if not dataset.get('pipeline'):
            raise UsageError(f'the config of {self.named.name} has no test_dataloader with a '
                             'pipeline, which says how the model sees an image')
        loader, *steps = dataset.pipeline
        decoding = decoding_of(loader)
        with DefaultScope.overwrite_default_scope(scope):
            pipeline = Compose([step for step in steps if step['type'] != 'LoadAnnotations'])

        def read(path: Path) -> Tensor:
            image = read_picture(path, **decoding)
            size = image.shape[:2]
            image = image.astype(np.float32) if loader.get('to_float32') else image
            with DefaultScope.overwrite_default_scope(scope), torch.no_grad():
                packed = pipeline(dict(img=image, img_shape=size, ori_shape=size, img_id=0,
                                       img_path=str(path)))
                batch = {key: [value] for key, value in packed.items()}
                return self._preprocessor(batch, False)['inputs'][0]

        return read

    def normalize(self, image: np.ndarray) -> Tensor:
        """Make of an image of bytes (H, W, 3) what the model takes, (1, 3, H, W)."""
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return self._preprocessor(dict(inputs=[pixels], data_samples=None), False)['inputs']

    @cached_property
    def digest(self) -> str:
        """A short text that two models share if all their weights are equal."""
        digest = hashlib.sha256()
        for name, value in self.named.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @property
    def _device(self) -> torch.device:
        return next(self.named.model.parameters()).device

    @cached_property
    def _config(self) -> Config:
        return self.named.config or zoo.get_config(_BACKBONE_CONFIG)

    @cached_property
    def _preprocessor(self) -> nn.Module:
        model = self.named.model
        if hasattr(model, 'data_preprocessor'):
            return model.data_preprocessor
        if self.named.source == 'timm':
            return ImgDataPreprocessor(bgr_to_rgb=True, **{
                key: [255 * value for value in model.pretrained_cfg[key]]
                for key in ('mean', 'std')}).to(self._device)
        config = self._config
        settings = config.model.get('data_preprocessor') or config.data_preprocessor
        with DefaultScope.overwrite_default_scope(config.default_scope):
            return MODELS.build(dict(type='ClsDataPreprocessor') | settings).to(self._device)


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
        UsageError: Two would be called the same; a model has no weights, and random ones are not
            asked for; or there is no such device.
        UnknownModelError: A name stands for nothing.
        FileNotFoundError: There is no such checkpoint.
        CheckpointError: A checkpoint belongs to another architecture.
    """
    given = []
    for title, model in zip(title_models(models, titles), models, strict=True):
        name, checkpoint = split_checkpoint(model)
        device, trained = choose_device(device), has_weights(name, checkpoint)
        read_config(name)  # a name that stands for nothing is the first thing to say
        if not trained and not random:
            raise UsageError(f'{name} is a model without weights: name a checkpoint, too, as '
                             f'{name}=CHECKPOINT, or take random ones with --random')
        torch.manual_seed(seed)
        given.append(GivenModel(
            title if trained else f'{title} (random weights)',
            load_named_model(name, checkpoint, device),
            dict(model=name, checkpoint=checkpoint, random_weights=not trained)))
    return given


def title_models(models: Sequence[str], titles: Sequence[str] | None = None) -> list[str]:
    """Call models as the user does, by their own names, or by their checkpoints' if these differ.

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


def has_weights(name: str, checkpoint: str | None = None) -> bool:
    """Whether a model comes with weights: those of a checkpoint, which its name may be."""
    return checkpoint is not None or zoo.is_checkpoint(name)


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
    """Draw some of the images, or all, so that fewer are among those that more would be."""
    order = np.random.default_rng(seed).permutation(len(images))[:count]
    return [images[index] for index in order]
