"""How fast a training's pipeline feeds a GPU, and which of its transforms takes the time."""

import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner

from ..errors import UsageError
from ..text import markdown
from .benchmark import PartTimer, describe_machine, machine_line
from .models import read_config, task_of

# (height, width) of the usual picture of COCO and of ImageNet, and objects in one of COCO.
_SIZES = {'detection': (480, 640), 'classification': (375, 500)}
_NUM_OBJECTS = 7
_JPEG_QUALITY = 95


def measure_input(name: str, workers: int = 2, seconds: float = 10.,
                  num_images: int = 64) -> dict[str, Any]:
    """Measure the training pipeline of a config, on its data, or on made-up pictures.

    One process alone runs the pipeline with its transforms timed; then the config's data loader
    runs with workers. Neither uses more than a thread in a process, as in a training.

    NOTE: the files are read over and over, so that they come from memory: a slow disk adds to it.

    Args:
        name: A config file or the name of a model of this package.
        workers: Processes of the data loader; 0 to leave it out.
        seconds: How long either is to run.
        num_images: Pictures to make up where the data of the config is not there: JPEG files of the
            usual size of COCO's or ImageNet's.

    Returns:
        A dict fit for JSON: 'machine', 'model', 'data' ('made up', or where it lies), 'images'
        (those that the one process read), 'seconds' (it took for one), 'parts' (of that, by
        transform), 'workers', 'batch' and 'rate' (images per second with these; None without).

    Raises:
        UsageError: The config has no data for training, or neither its data is there nor is it
            clear where made-up pictures would go.
    """
    config = read_config(name)
    if config is None or 'dataset' not in config.get('train_dataloader', {}):
        raise UsageError(f'{name} has no train_dataloader with a dataset')
    if workers < 0:
        raise UsageError(f'{workers} workers: must be at least 0')

    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        with (tempfile.TemporaryDirectory() as folder,
              DefaultScope.overwrite_default_scope(config.default_scope)):
            loader = copy.deepcopy(config.train_dataloader)
            data = _find_data(loader.dataset)
            if data is None:
                _make_up(loader.dataset, task_of(config, name), Path(folder), num_images)
            images, taken, parts = _time_transforms(loader.dataset, seconds)
            batch, rate = _time_loader(loader, workers, seconds) if workers else (None, None)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    return dict(machine=describe_machine(torch.device('cpu')), model=Path(name).stem,
                data=data or 'made up', images=images, seconds=taken, parts=parts, workers=workers,
                batch=batch, rate=rate)


def input_table(measured: Sequence[Mapping[str, Any]]) -> str:
    """Lay out what :func:`measure_input` returned for some configs, in Markdown, if for any."""
    if not measured:
        return ''
    rows = [['pipeline', 'pictures', 'images/s of one process', 'workers', 'images/s with these',
             'for each worker']]
    for item in measured:
        rate = item['rate']
        rows.append([item['model'], item['data'], f"{1 / item['seconds']:.0f}",
                     str(item['workers']), f'{rate:.0f}' if rate else '–',
                     f"{rate / item['workers']:.0f}" if rate else '–'])
    text = f"{machine_line(measured[0]['machine'])}\n\n{markdown(rows)}"
    for item in measured:
        total = sum(item['parts'].values())
        parts = sorted(item['parts'].items(), key=lambda part: -part[1])
        rows = [[part, f'{1e3 * seconds:.2f}', f'{100 * seconds / total:.0f}']
                for part, seconds in parts]
        text += (f"\n{item['model']}, a picture\n\n"
                 + markdown([['transform', 'ms', '%'], *rows]))
    return text


def _find_data(dataset: Config) -> str | None:
    """Say where the data of a dataset lies, or None if it is not there."""
    root = Path(dataset.get('data_root') or '')
    needed = root / (dataset.get('ann_file') or '')
    # With neither, there is nothing that could be looked for.
    return str(needed) if needed != Path('.') and needed.exists() else None


def _make_up(dataset: Config, task: str, folder: Path, count: int) -> None:
    """Make pictures and let a dataset's config point to them."""
    if 'pipeline' not in dataset:
        raise UsageError(f'the data of {dataset.type} is not there, and pictures can be made '
                         'up only for a dataset with a pipeline of its own')
    classes = getattr(DATASETS.get(dataset.type), 'METAINFO', {}).get('classes') or ('object', )
    height, width = _SIZES[task]
    random = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(count):
        name = f'{"ab"[index % 2]}/{index}.jpg'
        path = folder / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), _draw_picture(random, height, width),
                    [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        images.append(dict(id=index, file_name=name, height=height, width=width))
        for _ in range(_NUM_OBJECTS):
            sides = random.uniform(0.05, 0.5, 2) * (width, height)
            corner = random.uniform(0, 1, 2) * ((width, height) - sides)
            annotations.append(dict(
                id=len(annotations) + 1, image_id=index, iscrowd=0, area=float(sides.prod()),
                category_id=int(random.integers(len(classes))) + 1,
                bbox=[*corner.tolist(), *sides.tolist()]))

    if task == 'detection':
        categories = [dict(id=index + 1, name=name) for index, name in enumerate(classes)]
        (folder / 'annotations.json').write_text(json.dumps(
            dict(images=images, annotations=annotations, categories=categories)))
        dataset.pop('metainfo', None)
        dataset.update(data_root=str(folder), ann_file='annotations.json',
                       data_prefix=dict(img='images/'))
    else:
        for key in dataset.keys() - {'pipeline'}:
            del dataset[key]
        dataset.update(type='CustomDataset', data_root=str(folder / 'images'))


def _draw_picture(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw noise with as much detail as a photograph: a file of it is about as large."""
    picture = np.zeros((height, width, 3), np.float32)
    for scale in (2, 4, 8, 16, 32, 64, 128):
        noise = random.normal(size=(height // scale + 1, width // scale + 1, 3)).astype(np.float32)
        # Each octave as strong as it is coarse, as in nature.
        picture += scale ** 0.75 * cv2.resize(noise, (width, height),
                                              interpolation=cv2.INTER_CUBIC)
    picture = 128 + 50 * picture / picture.std()
    return picture.clip(0, 255).astype(np.uint8)


def _time_transforms(settings: Config, seconds: float) -> tuple[int, float, dict[str, float]]:
    """Run a pipeline in this process; give images, seconds for one, and those of each part."""
    dataset = DATASETS.build(settings)
    timer = PartTimer(torch.device('cpu'))
    if not hasattr(dataset, 'pipeline'):
        raise UsageError(f'{settings.type} has no pipeline of its own to look into')
    for step, transform in enumerate(dataset.pipeline.transforms):
        _wrap(timer, transform, f'{step + 1} {type(transform).__name__}')

    order = cycle(np.random.default_rng(0).permutation(len(dataset)).tolist())
    dataset[next(order)]
    timer.seconds = {}

    def read() -> None:
        with timer.part('the rest'):
            dataset[next(order)]
    count, taken = _repeat(read, seconds)
    return count, taken, {part: total / count for part, total in timer.seconds.items()}


def _wrap(timer: PartTimer, transform: Any, name: str) -> None:
    """Time a transform; one that consists of others, these."""
    inner = getattr(transform, 'transforms', None)
    if isinstance(inner, torch.nn.Module):
        inner = inner.transforms
    for part in inner or ():
        part_name = f'{name}: {type(part).__name__}'
        timer.wrap(part, 'forward' if isinstance(part, torch.nn.Module) else 'transform', part_name)
    timer.wrap(transform, 'transform', name)


def _time_loader(settings: Config, workers: int, seconds: float) -> tuple[int, float]:
    """Run a data loader; give its batch and the images per second."""
    settings.update(num_workers=workers, persistent_workers=True)
    # Enough for the loader to be in full swing, whatever is in the folder.
    settings.dataset = dict(type='RepeatDataset', times=1000, dataset=settings.dataset)
    loader = Runner.build_dataloader(settings, seed=0)
    batches = iter(loader)
    # What was prepared before the clock starts is handed out for nothing.
    for _ in range(workers * (loader.prefetch_factor or 0) + 1):
        next(batches)
    taken = _repeat(partial(next, batches), seconds)[1]
    del batches, loader
    return settings.batch_size, settings.batch_size / taken


def _repeat(step: Callable[[], object], seconds: float) -> tuple[int, float]:
    """Repeat a step for some time; give how often, and the seconds for one."""
    count, start = 0, perf_counter()
    while perf_counter() - start < seconds or count == 0:
        step()
        count += 1
    return count, (perf_counter() - start) / count
