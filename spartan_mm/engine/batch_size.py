"""How many images a step of training takes: as many as the memory of the GPU holds."""
import copy
from collections.abc import Callable
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, FUNCTIONS, MODELS, DefaultScope

from ..errors import UsageError
from ..weights.initialize import without_pretrained

# The share of the free memory that a step may take: images differ in their number of objects.
_SHARE = 0.85


def find_batch_size(cfg: Config, most: int) -> tuple[int | None, str]:
    """Find how many images a training step can take on the GPU.

    Steps of one and of two of the config's own images, in the largest size that it draws, tell how
    the memory grows; a step of what should fit is made, too.

    Args:
        cfg: The config.
        most: The most images to take.

    Returns:
        The number, None where there is no GPU; and how it was found.
    """
    if get_device() != 'cuda':
        return None, 'without a GPU, where memory is no limit, the number of the model'
    free, _ = torch.cuda.mem_get_info()
    step = make_step(cfg)
    size = choose(step, int(_SHARE * free), most)
    del step
    torch.cuda.empty_cache()
    return size, (f'up to {most} were tried, of the largest size, in the {free / 2**30:.0f} GiB '
                  'that are free on the GPU')


def choose(step: Callable[[int], int], limit: int, most: int) -> int:
    """Choose the number of images whose step takes no more than `limit` bytes.

    Args:
        step: Makes a step of so many images; returns the bytes that it took at most.
        limit: Bytes that may be taken.
        most: The most images to take.

    Raises:
        UsageError: There is no memory for a single one.

    Example:
        >>> choose(lambda images: 100 + 50 * images, 420, 16)
        6
    """
    try:
        first = step(1)
    except torch.OutOfMemoryError as error:
        raise UsageError('the memory of the GPU is too small for a step of one image: give a '
                         'smaller --size or --model, or free some memory') from error
    if most == 1:
        return 1
    try:
        growth = max(1, step(2) - first)
    except torch.OutOfMemoryError:
        return 1
    size = max(1, min(most, 1 + (limit - first) // growth))
    while size > 1:
        try:
            if step(size) <= limit:
                break
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
        size = size * 3 // 4
    return size


def make_step(cfg: Config) -> Callable[[int], int]:
    """Build the model on the GPU, and make of it what :func:`choose` calls."""
    settings = copy.deepcopy(dict(model=without_pretrained(cfg.model)))['model']
    for augment in (settings.get('data_preprocessor') or {}).get('batch_augments') or []:
        if augment.get('type') == 'BatchRandomResize':
            with DefaultScope.overwrite_default_scope(cfg.default_scope):
                augment['sizes'] = [max(MODELS.build(augment).sizes)]
    collate = cfg.train_dataloader.get('collate_fn') or dict(type='pseudo_collate')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(settings).cuda().train()
        optimizer = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        join = FUNCTIONS.get(collate['type'])

    def step(images: int) -> int:
        samples: list[Any] = [dataset[index % len(dataset)] for index in range(images)]
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):  # the first makes the optimizer's state
            model.train_step(join(samples), optimizer)
        return torch.cuda.max_memory_allocated()

    return step
