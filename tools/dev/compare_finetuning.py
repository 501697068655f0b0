"""Compare the recipe for fine-tuning with RT-DETR's own on small data, at the same number of steps.

    python tools/dev/compare_finetuning.py --out-dir DIR [--data digits_100] [--seeds 0 1]
    python tools/dev/compare_finetuning.py --out-dir DIR --seeds --docs PAGE.md     the table alone

A small RT-DETR starts from the backbone of a classifier of digits, which is trained first. There
are three sets: 100 and 500 pictures of digits on photographs, and 100 of drawn shapes. The best
checkpoint on 60 more pictures is tested on another 200. DIR/finetuning.json keeps the results; what
is in there is not done again, and a training that was stopped goes on. The table goes to stdout,
and between its marks into the page of --docs.
"""
import argparse
import copy
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.fileio import dump, load
from readme_tables import fill_page, spread

from spartan_mm.analysis.report.curves import read_log
from spartan_mm.datasets import make_digit_folder, make_digits
from spartan_mm.files import write_json
from spartan_mm.text import markdown

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'detection'
RECIPES = {'for fine-tuning': 'finetune', "RT-DETR's": 'schedule_72e'}
#: Its name: what to make, number of training pictures, what to call it.
DATA = {'digits_100': ('digits', 100, 'digits on photographs, 100 pictures'),
        'shapes_100': ('shapes', 100, 'drawn shapes, 100 pictures'),
        'digits_500': ('digits', 500, 'digits on photographs, 500 pictures')}
NUM_VAL, NUM_TEST = 60, 200
SHAPES = ('disc', 'ring', 'square', 'triangle', 'cross')
BATCH, SIZE = 8, 128
BACKBONE = dict(
    type='SpaRTAN', arch=dict(
        stem_channels=16, depths=(1, 1, 2, 1), channels=(16, 32, 64, 96),
        expand_ratios=(4, 4, 4, 4), conv_types=('full', 'full', 'depthwise', 'depthwise')))
METRIC = 'coco/bbox_mAP'


def main() -> None:
    """Train and test what is missing, and show all that there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', nargs='+', choices=DATA, default=[*DATA], metavar='SET',
                        help=f'which of {", ".join(DATA)} (default: all)')
    parser.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2], metavar='N',
                        help='(default: 0 1 2)')
    parser.add_argument('--steps', type=int, default=400,
                        help='of a training, in whole epochs (default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='override settings of all trainings')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/compare_finetuning'))
    parser.add_argument('--docs', type=Path, metavar='PAGE.md', help='page to write the table into')
    args = parser.parse_args()
    file = args.out_dir.resolve() / 'finetuning.json'
    results = json.loads(file.read_text()) if file.exists() else {}
    for seed in args.seeds:
        for data in args.data:
            for recipe in RECIPES:
                found = results.setdefault(data, {}).setdefault(recipe, {})
                if str(seed) not in found:
                    found[str(seed)] = measure(data, recipe, seed, args)
                    write_json(file, results)
    text = table(results, args.steps)
    print(text)
    if args.docs:
        fill_page(args.docs, dict(finetuning=text))


def measure(data: str, recipe: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train, and test the best checkpoint."""
    kind, number, _ = DATA[data]
    root = args.out_dir.resolve() / 'data' / data
    make_data(kind, root, number)
    work_dir = args.out_dir.resolve() / data / f'{RECIPES[recipe]}_{seed}'
    config = work_dir.with_suffix('.py')
    config.parent.mkdir(parents=True, exist_ok=True)
    epochs = round(args.steps / (number // BATCH))
    classifier = make_classifier(args.out_dir.resolve())
    make_config(kind, root, RECIPES[recipe], epochs, classifier).dump(config)
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    run('train', str(config), '--work-dir', str(work_dir), '--seed', str(seed), '--resume',
        '--save-every', '50', *options, log=work_dir.with_suffix('.log'))
    best, = work_dir.glob(f'best_{METRIC.replace("/", "_")}_*.pth')
    folder = work_dir / 'test'
    run('test', str(config), str(best), '--work-dir', str(folder), *options,
        log=work_dir.with_suffix('.log'))
    tested = load(max(folder.glob('*/*.json')))
    evaluations = read_log(work_dir).evaluations
    return dict(AP=tested[METRIC], AP50=tested[f'{METRIC}_50'], epochs=len(evaluations),
                best_epoch=int(best.stem.rpartition('_')[2]),
                steps=len(evaluations) * (number // BATCH))


def run(command: str, *arguments: str, log: Path) -> None:
    """Run a command in a process of its own; leave if it fails."""
    with open(log, 'a') as file:
        done = subprocess.run([sys.executable, '-m', 'spartan_mm.cli', command, *arguments],
                              stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f'error: {command} failed, see {log}')


def make_classifier(out_dir: Path) -> Path:
    """Train the classifier to start from, unless it is there; return its checkpoint."""
    root = make_digit_folder(out_dir / 'data' / 'digit_folder')
    config = Config.fromfile(ROOT / 'configs' / 'classification' / 'spartan_xt_digits.py')
    config.model.backbone = dict(BACKBONE)
    config.model.head.in_channels = BACKBONE['arch']['channels'][-1]
    for split in ('train', 'val', 'test'):
        config[f'{split}_dataloader'].dataset.data_root = str(root)
        config[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    work_dir = out_dir / 'classifier'
    checkpoint = work_dir / f'epoch_{config.train_cfg.max_epochs}.pth'
    if not checkpoint.exists():
        config.dump(work_dir.with_suffix('.py'))
        run('train', f'{work_dir}.py', '--work-dir', str(work_dir), '--resume',
            log=work_dir.with_suffix('.log'))
    return checkpoint


def make_config(kind: str, root: Path, recipe: str, epochs: int, classifier: Path) -> Config:
    """Make the config of a training: the demo's detector and data, and a recipe."""
    config = Config.fromfile(CONFIGS / 'rtdetr_spartan_xt_digits.py')
    config.update({key: value for key, value in
                   Config.fromfile(CONFIGS / '_base_' / f'{recipe}.py').items()
                   if key in ('train_cfg', 'optim_wrapper', 'param_scheduler', 'custom_hooks',
                              'default_hooks', 'auto_scale_lr', 'sync_bn')})
    config.train_cfg.max_epochs = epochs
    # The demo's, in place of 1e-4, at which so small a model learns next to nothing in few steps.
    config.optim_wrapper.optimizer.lr = 1e-3
    config.default_hooks.checkpoint.max_keep_ckpts = 1
    config.default_hooks.logger.interval = 10
    # As small as will learn in minutes on a core.
    model = config.model
    model.num_queries, model.dn_cfg.num_queries = 30, 20
    model.backbone = dict(BACKBONE, out_indices=(1, 2, 3), init_cfg=dict(
        type='CheckedPretrained', checkpoint=str(classifier), prefix='backbone.'))
    model.neck.update(embed_dims=64, ffn_dims=128)
    model.decoder.update(in_channels=[64] * 3, embed_dims=64, num_layers=2, num_heads=4,
                         ffn_dims=128)
    model.bbox_head.update(embed_dims=64, num_classes=len(SHAPES) if kind == 'shapes' else 10)
    for split in ('train', 'val', 'test'):
        # Validation and test may be the same object.
        loader = config[f'{split}_dataloader'] = copy.deepcopy(config[f'{split}_dataloader'])
        loader.batch_size = BATCH
        loader.num_workers, loader.persistent_workers = 0, False
        loader.dataset.update(data_root=str(root), ann_file=f'annotations/{split}.json')
        for step in loader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = (SIZE, SIZE)
        if split != 'train':
            config[f'{split}_evaluator'] = dict(
                config.val_evaluator, ann_file=str(root / f'annotations/{split}.json'))
    return config


def make_data(kind: str, root: Path, number: int) -> None:
    """Make a dataset: pictures to train on, to choose by, and to test with."""
    if (root / 'annotations' / 'test.json').exists():
        return
    if kind == 'digits':
        make_digits(root, number, NUM_VAL + NUM_TEST)
    else:
        make_shapes(root, number, NUM_VAL + NUM_TEST)
    content = load(root / 'annotations' / 'val.json')
    ids = [image['id'] for image in content['images']]
    for name, kept in (('val', {*ids[:NUM_VAL]}), ('test', {*ids[NUM_VAL:]})):
        part = dict(content, images=[item for item in content['images'] if item['id'] in kept],
                    annotations=[item for item in content['annotations']
                                 if item['image_id'] in kept])
        dump(part, root / 'annotations' / f'{name}.json')


def make_shapes(root: Path, num_train: int, num_val: int) -> None:
    """Make drawn shapes, filled with a colour, on two colours that run into each other."""
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    for stream, (split, number) in enumerate((('train', num_train), ('val', num_val))):
        (root / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for index in range(number):
            picture, objects = draw_picture(np.random.default_rng([stream, index]))
            name = f'{index:06d}.png'
            cv2.imwrite(str(root / split / name), picture)
            height, width = picture.shape[:2]
            images.append(dict(id=index, file_name=name, width=width, height=height))
            annotations += [dict(id=len(annotations) + place, image_id=index, iscrowd=0, **item)
                            for place, item in enumerate(objects)]
        categories = [dict(id=number, name=name) for number, name in enumerate(SHAPES)]
        dump(dict(images=images, annotations=annotations, categories=categories),
             root / 'annotations' / f'{split}.json')


def draw_picture(rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw a picture (256, 320, 3) of one to six shapes that don't touch, and noise."""
    height, width = 256, 320
    ends = rng.uniform(40, 216, (2, 1, 1, 3))
    slope = np.linspace(0, 1, width)[None, :, None]
    canvas = np.broadcast_to(ends[0] * (1 - slope) + ends[1] * slope, (height, width, 3))
    canvas = np.ascontiguousarray(np.clip(canvas + rng.normal(0, 6, canvas.shape), 0, 255),
                                  np.uint8)
    objects, taken = [], np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 7)):
        side = int(np.exp(rng.uniform(np.log(24), np.log(130))))
        left, top = (int(rng.integers(0, length - side)) for length in (width, height))
        here = np.s_[top:top + side, left:left + side]
        if taken[here].any():
            continue
        label = int(rng.integers(len(SHAPES)))
        mask = draw_shape(SHAPES[label], side, rng.uniform(0, 2 * np.pi))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [left + columns[0], top + rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
        taken[here] = True
        canvas[here][mask] = rng.uniform(0, 255, 3)
        objects.append(dict(category_id=label, bbox=[int(value) for value in box],
                            area=int(mask.sum())))
    return canvas, objects


def draw_shape(name: str, side: int, angle: float) -> np.ndarray:
    """Draw a shape that fits into a square, turned, as a mask (side, side)."""
    mask = np.zeros((side, side), np.uint8)
    centre, radius = (side - 1) / 2, side / 2 - 1
    if name in ('disc', 'ring'):
        cv2.circle(mask, (round(centre), round(centre)), int(radius), 1, -1)
        if name == 'ring':
            cv2.circle(mask, (round(centre), round(centre)), int(radius * 0.6), 0, -1)
        return mask > 0
    angles = {'square': np.arange(4) * np.pi / 2, 'triangle': np.arange(3) * 2 * np.pi / 3}
    corners = [angles.get(name)] if name in angles else [
        turn + np.array([-0.25, 0.25, np.pi - 0.25, np.pi + 0.25]) for turn in (0, np.pi / 2)]
    for turned in corners:
        points = centre + radius * np.stack([np.cos(turned + angle), np.sin(turned + angle)], 1)
        cv2.fillPoly(mask, [points.round().astype(np.int32)], 1)
    return mask > 0


def table(results: dict[str, Any], steps: int) -> str:
    """Write means and spreads over the seeds, '–' for what is not measured."""
    rows = [['data', 'recipe', 'seeds', 'AP', 'AP50', 'steps']]
    for data, (_, number, title) in DATA.items():
        for recipe in RECIPES:
            found = [*results.get(data, {}).get(recipe, {}).values()]
            whole = round(steps / (number // BATCH)) * (number // BATCH)
            rows.append([title, recipe, str(len(found) or '–'),
                         *(spread([100 * item[key] for item in found]) for key in ('AP', 'AP50')),
                         f'{statistics.mean(item["steps"] for item in found):.0f} of {whole}'
                         if found else f'– of {whole}'])
    return markdown(rows)


if __name__ == '__main__':
    main()
