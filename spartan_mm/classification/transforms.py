"""torchvision's transforms in mmpretrain's pipelines."""

from collections.abc import Sequence

import cv2
import torch
from mmcv.transforms import BaseTransform
from mmpretrain.registry import TRANSFORMS
from torchvision.transforms import v2

from ..datasets.images import image_of_bytes


@TRANSFORMS.register_module()
class TorchvisionTransforms(BaseTransform):
    """Applies transforms of ``torchvision.transforms.v2`` to the image, one after the other.

    The image is the RGB tensor that they were made for while they run, and mmpretrain's BGR array
    before and after, so that this fits between any of mmpretrain's transforms.

    NOTE: mmpretrain has transforms of the same names that mean something else, so a recipe for
    torchvision needs torchvision's. By default:

    - ``RandAugment``: a magnitude of 7 is 7/30 of each range in torchvision, 7/10 in mmpretrain;
      each drawn operation is applied, there only every second time; there are Identity,
      translations by up to 150/331 of the side and Posterize from 8 bits down to 4 here, Invert,
      SolarizeAdd, translations by up to 0.45 of the side and Posterize from 4 bits down to 0 there;
      what a shifted image leaves open is black here and grey (128) there; one interpolation serves
      all here, there shears are bicubic and the others nearest.
    - ``RandomErasing``: up to 0.33 of the area at side ratios from 0.3 to 3.3 here, up to 0.4 at
      0.3 to 3.33 there; grey (128) there.
    - ``RandomResizedCrop`` and ``Resize`` smooth before they shrink (``antialias``), OpenCV's,
      mmpretrain's default, do not.

    Args:
        transforms: The transforms in order, each a dict with the name of a class as ``type`` and
            its arguments; ``interpolation`` by name, such as 'bilinear'; colours in RGB.

    Raises:
        ValueError: If torchvision has no such transform or no such interpolation.

    Example:
        >>> import numpy as np
        >>> flip = TorchvisionTransforms([dict(type='RandomHorizontalFlip', p=1.)])
        >>> flip(dict(img=np.uint8([[[1, 2, 3], [4, 5, 6]]])))['img'].tolist()
        [[[4, 5, 6], [1, 2, 3]]]
    """

    def __init__(self, transforms: Sequence[dict]):
        self.transforms = v2.Compose([_build(transform) for transform in transforms])

    def transform(self, results: dict) -> dict:
        """Transform ``img``, (H, W, 3) in BGR order, and set ``img_shape``.

        Raises:
            TypeError: The image is not of 8 bits, or has not three channels.
        """
        image = image_of_bytes(results, type(self).__name__, 3)
        rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        # Not copied to planes: resizing is faster where the channels of a pixel lie together.
        image = self.transforms(torch.from_numpy(rgb).permute(2, 0, 1))  # (3, H, W)
        results['img'] = image.flip(0).permute(1, 2, 0).numpy()
        results['img_shape'] = results['img'].shape[:2]
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.transforms})'


def _build(transform: dict) -> v2.Transform:
    options = dict(transform)
    name = options.pop('type')
    found = getattr(v2, name, None)
    if not (isinstance(found, type) and issubclass(found, v2.Transform)):
        raise ValueError(f'torchvision.transforms.v2 has no transform {name!r}')
    if 'interpolation' in options:
        # Their names are taken as they are only by newer versions of torchvision.
        try:
            options['interpolation'] = v2.InterpolationMode(options['interpolation'])
        except ValueError as error:
            modes = ', '.join(mode.value for mode in v2.InterpolationMode)
            raise ValueError(f'{name}: torchvision has no interpolation '
                             f"{options['interpolation']!r}, choose one of {modes}") from error
    return found(**options)
