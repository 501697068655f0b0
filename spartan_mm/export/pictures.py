"""Pictures to check and calibrate exported files with, as a config's test pipeline makes them."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from ..datasets.images import decoding_of, take_image
from ..errors import ExplainedError, UsageError
from ..inference import find_images
from ..text import count, first_line, printable
from ..weights.stored_config import find_test_dataset
from ..zoo import quiet

#: The most pictures that are taken of a folder.
MOST = 32


@dataclass
class Pictures:
    """Pictures that went through a test pipeline.

    Args:
        source: What they are, in words.
        names: What to call each.
        images: RGB bytes, (3, H, W) each.
        sizes: Width and height of each before the pipeline.
    """

    source: str
    names: list[str] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def add(self, name: str, image: np.ndarray, size: tuple[int, int]) -> None:
        """Add one."""
        self.names.append(name)
        self.images.append(image)
        self.sizes.append(size)


def find_pictures(config: Config, wanted: int | str | Path = 8, seed: int = 0) -> Pictures:
    """Find pictures and run them through the test pipeline of a config.

    A number is one of the config's test data. Where these are missing, parts of the two photographs
    that scikit-learn comes with take their place, or without it smooth random pictures.

    Args:
        config: The config.
        wanted: How many; or an image or a folder of images, of which no more than `MOST` are taken.
        seed: Of what is drawn.

    Raises:
        InputError: There are no images at the path, or one that cannot be read.
        UsageError: The config has no test pipeline, or one that makes no bytes.
    """
    dataset, rng = find_test_dataset(config), np.random.default_rng(seed)
    if not dataset.get('pipeline'):
        raise UsageError('the config has no test_dataloader with a pipeline, which says how the '
                         'model sees an image')
    loader, *steps = dataset.pipeline
    scope = config.get('default_scope')
    with DefaultScope.overwrite_default_scope(scope):
        pipeline = Compose([step for step in steps if step['type'] != 'LoadAnnotations'])

    def prepare(image: np.ndarray) -> np.ndarray:
        size = image.shape[:2]
        with DefaultScope.overwrite_default_scope(scope):
            return to_rgb(pipeline(dict(img=image, img_shape=size, ori_shape=size, img_id=0,
                                        img_path=None))['inputs'])

    if not isinstance(wanted, int):
        # Nothing is written; what could be replaced is none of the images.
        found = find_images(wanted, Path(wanted, '.none'))
        chosen = sorted(rng.permutation(len(found.images))[:MOST])
        # Metadata tell nobody where things lie on this machine.
        pictures = Pictures(f'{len(chosen)} of {count(len(found.images), "image")} in '
                            f'{Path(wanted).resolve().name}')
        for path in (found.images[index] for index in chosen):
            image = take_image(path, **decoding_of(loader))
            pictures.add(found.name_of(path), prepare(image),
                         image.shape[1::-1])
        return pictures
    try:
        return _of_dataset(config, wanted, rng)
    except (ExplainedError, OSError) as error:
        print(f'The test data of the config cannot be used: {printable(first_line(error))}')
    return _of_photographs(prepare, wanted, rng, seed)


def to_rgb(image) -> np.ndarray:
    """Make RGB bytes of what a pipeline packs, a tensor (3, H, W) in BGR order.

    Raises:
        UsageError: Its numbers are no bytes.
    """
    image = image.numpy()
    pixels = image.astype(np.uint8)
    if (pixels != image).any():
        raise UsageError('the test pipeline of the config makes no whole numbers from 0 to 255, '
                         'which exported files take: they normalize by themselves')
    return np.ascontiguousarray(pixels[::-1])


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (3, H, W) to another height and width."""
    if image.shape[1:] == tuple(size):
        return image
    picture = Image.fromarray(image.transpose(1, 2, 0)).resize(size[::-1], Image.BILINEAR)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _of_dataset(config: Config, number: int, rng: np.random.Generator) -> Pictures:
    with DefaultScope.overwrite_default_scope(config.get('default_scope')), quiet():
        dataset = DATASETS.build(config.test_dataloader.dataset)
        chosen = sorted(rng.permutation(len(dataset))[:number])
        pictures = Pictures(f'{len(chosen)} of {len(dataset)} test images of the config')
        for index in chosen:
            item = dataset[int(index)]
            image, meta = to_rgb(item['inputs']), item['data_samples'].metainfo
            pictures.add(str(meta.get('img_path', index)), image,
                         meta.get('ori_shape', image.shape[1:])[1::-1])
    return pictures


def _of_photographs(prepare: Callable, number: int, rng: np.random.Generator, seed: int
                    ) -> Pictures:
    try:
        from sklearn.datasets import load_sample_images
        photographs, kind = load_sample_images().images, "parts of scikit-learn's photographs"
    except ImportError:
        photographs, kind = None, 'smooth random pictures, for there is no scikit-learn'
    pictures = Pictures(f'{number} {kind} (seed {seed})')
    for index, image in zip(range(number), _cut(photographs, rng), strict=False):
        pictures.add(f'picture {index}', prepare(image), image.shape[1::-1])
    return pictures


def _cut(photographs: list[np.ndarray] | None, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Cut parts of at least half the side at random places, without end, in BGR order."""
    while photographs:
        photograph = photographs[rng.integers(len(photographs))]
        height, width = (int(side * rng.uniform(0.5, 1)) for side in photograph.shape[:2])
        top, left = (rng.integers(whole - part + 1) for whole, part in zip(
            photograph.shape[:2], (height, width), strict=True))
        yield np.ascontiguousarray(photograph[top:top + height, left:left + width, ::-1])
    while True:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        yield np.array(coarse.resize((640, 480), Image.BICUBIC))
