"""Does SparK help a small SpaRTAN that then gets few labels? Pre-train, fine-tune, and compare.

    python tools/dev/pretraining.py --out-dir DIR [--docs docs]

A small SpaRTAN is pre-trained on scikit-learn's handwritten digits, without their labels. Then it
learns to tell them apart from a few of them, chosen by the seed, once from these weights and once
from random ones, with the same steps, order and learning rates. Digits that neither has seen are
tested on. DIR/pretraining.json keeps the results; what is in there is not done again, and a
training that was stopped goes on. With --docs, the table goes between its marks in train.md of that
folder, and a picture of what is drawn in hidden squares into its pictures/.
"""
import argparse
import json
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from compare_finetuning import run
from mmengine.config import Config
from readme_tables import fill_page, spread
from torch import Tensor

from spartan_mm.analysis.report.curves import read_log
from spartan_mm.classification import PyramidSparK
from spartan_mm.datasets import make_digit_folder
from spartan_mm.files import write_json, write_whole
from spartan_mm.text import markdown
from spartan_mm.zoo import get_model

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'classification'
ARCH = dict(stem_channels=8, depths=(1, 1, 2, 1), channels=(8, 16, 32, 64),
            expand_ratios=(4, 4, 2, 2), conv_types=('full', 'full', 'depthwise', 'depthwise'))
SIZE = 64  # 2 x 2 squares
BATCH, STEPS = 20, 100  # of fine-tuning
STARTS = ('random weights', 'SparK')
SHOWN = 10  # pictures


def main() -> None:
    """Train what is missing, and show all that there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--labels', type=int, nargs='+', default=[10], metavar='N',
                        help='pictures with labels of each class (default: 10)')
    parser.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2], metavar='N',
                        help='(default: 0 1 2)')
    parser.add_argument('--epochs', type=int, default=8,
                        help='of pre-training (default: %(default)s)')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/pretraining'))
    parser.add_argument('--docs', type=Path, metavar='FOLDER', help='that of the pages')
    args = parser.parse_args()
    folder = args.out_dir.resolve()
    file = folder / 'pretraining.json'
    results = json.loads(file.read_text()) if file.exists() else {}
    data = make_digit_folder(folder / 'data' / 'digit_folder')
    pretrained = pretrain(folder, data, args.epochs)
    for seed in args.seeds:
        for labels in args.labels:
            for start in STARTS:
                found = results.setdefault(str(labels), {}).setdefault(start, {})
                if str(seed) not in found:
                    found[str(seed)] = fine_tune(folder, data, labels, seed, pretrained, start)
                    write_json(file, results)
    text = table(results)
    print(text)
    picture = draw(pretrained, data)
    place = args.docs / 'pictures' if args.docs else folder
    with write_whole(place / 'pretraining.png') as target:
        target.write(cv2.imencode('.png', picture, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes())
    if args.docs:
        fill_page(args.docs / 'train.md', dict(pretraining=text))


def pretrain(folder: Path, data: Path, epochs: int) -> Path:
    """Pre-train, unless it is done; return the checkpoint, which lies beside its config."""
    digits = load_digits(data)
    config = Config.fromfile(CONFIGS / 'spark_spartan_xt.py')
    config.model.data_preprocessor.update(mean=[0, 0, 0], std=[255, 255, 255])
    config.model.backbone.arch = ARCH
    config.model.neck.feature_dim = ARCH['channels'][-1]
    config.train_dataloader = digits.train_dataloader
    config.train_dataloader.dataset.with_label = False
    config.optim_wrapper.optimizer = dict(type='AdamW', lr=2e-3, betas=(0.9, 0.95),
                                          weight_decay=0.04)
    set_length(config, epochs, warmup=50)
    work_dir = folder / 'pretrained'
    checkpoint = work_dir / f'epoch_{epochs}.pth'
    if not checkpoint.exists():
        train(config, work_dir, 0)
    return checkpoint


def fine_tune(folder: Path, data: Path, labels: int, seed: int, pretrained: Path,
              start: str) -> float:
    """Learn from so many pictures of each class; return the accuracy after the last step."""
    few = choose(data / 'train', folder / 'data' / f'{labels}_{seed}', labels, seed)
    config = load_digits(data)
    config.train_dataloader.update(batch_size=BATCH)
    config.train_dataloader.dataset.update(data_root=str(few), split='', data_prefix='train')
    config.model.backbone.update(arch=ARCH, init_cfg=dict(
        type='CheckedPretrained', checkpoint=str(pretrained), prefix='backbone.')
        if start == 'SparK' else None)
    config.model.head.in_channels = ARCH['channels'][-1]
    epochs = STEPS // (10 * labels // BATCH)
    set_length(config, epochs, warmup=15)
    config.train_cfg.val_interval = epochs
    work_dir = folder / f'{labels}_{seed}' / start.replace(' ', '_')
    train(config, work_dir, seed)
    return read_log(work_dir).evaluations[-1]['accuracy/top1']


def load_digits(data: Path) -> Config:
    """The config of the classifier of digits, on larger pictures, all in one process."""
    config = Config.fromfile(CONFIGS / 'spartan_xt_digits.py')
    for split in ('train', 'val', 'test'):
        loader = config[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data)
        for step in loader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = (SIZE, SIZE)
    return config


def set_length(config: Config, epochs: int, warmup: int) -> None:
    """Train for so many epochs, with a rate that rises for so many steps and then falls."""
    config.train_cfg.max_epochs = epochs
    config.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warmup),
        dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=epochs, eta_min=1e-5,
             convert_to_iter_based=True)]
    config.default_hooks.checkpoint = dict(type='CheckpointHook', interval=epochs)


def train(config: Config, work_dir: Path, seed: int) -> None:
    """Train in a process of its own, or go on with it."""
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    file = work_dir.with_suffix('.py')
    config.dump(file)
    began = time.monotonic()
    run('train', str(file), '--work-dir', str(work_dir), '--seed', str(seed), '--resume',
        '--save-every', '50', log=work_dir.with_suffix('.log'))
    print(f'{work_dir}: {time.monotonic() - began:.0f} s', flush=True)


def choose(source: Path, root: Path, labels: int, seed: int) -> Path:
    """Copy so many pictures of each class, by chance, unless it is done."""
    for folder in sorted(source.iterdir()):
        target = root / 'train' / folder.name
        target.mkdir(parents=True, exist_ok=True)
        pictures = sorted(folder.iterdir())
        for index in np.random.default_rng(seed).permutation(len(pictures))[:labels]:
            shutil.copy(pictures[index], target)
    return root


def draw(checkpoint: Path, data: Path) -> np.ndarray:
    """Pictures of digits that nothing was trained on, what is left visible, and what is drawn."""
    config = Config.fromfile(checkpoint.parent.with_suffix('.py'))
    model = get_model(config, checkpoint)
    files = [sorted(folder.iterdir())[0] for folder in sorted((data / 'val').iterdir())][:SHOWN]
    images = torch.stack([torch.from_numpy(cv2.resize(
        cv2.imread(str(file)), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)).permute(2, 0, 1)
        for file in files]).float() / 255
    torch.manual_seed(0)
    with torch.no_grad():
        visible = model.draw_mask(images)
        painted = paint(model, images, visible)
    seen = visible.repeat_interleave(32, 2).repeat_interleave(32, 3)
    rows = [images, torch.where(seen, images, torch.tensor(0.5)), painted]
    rows = [torch.nn.functional.pad(row, (2, 2, 2, 2), value=1) for row in rows]
    whole = torch.cat([row.permute(2, 0, 3, 1).flatten(1, 2) for row in rows])  # (H, W, 3)
    return (255 * whole[..., 0].clamp(0, 1)).round().byte().numpy()


def paint(model: PyramidSparK, images: Tensor, visible: Tensor) -> Tensor:
    """Images (N, 3, H, W) with what the model draws in hidden squares.

    It learns them with mean 0 and variance 1, so that both are taken from the image.
    """
    side = model.head.patch_size
    count, channels, height, width = images.shape
    blocks, drawn = (x.view(count, channels, height // side, side, width // side, side)
                     for x in (images, model.reconstruct(images, visible).contiguous()))
    mean, std = blocks.mean((1, 3, 5), True), blocks.var((1, 3, 5), keepdim=True).add(1e-6).sqrt()
    seen = visible[:, :, :, None, :, None]
    return torch.where(seen, blocks, drawn * std + mean).view_as(images)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Write means and spreads over the seeds."""
    rows = [['labels of each class', 'seeds', *(f'from {start}' for start in STARTS), 'difference']]
    for labels, starts in results.items():
        random, pretrained = (starts.get(start, {}) for start in STARTS)
        seeds = [seed for seed in random if seed in pretrained]
        rows.append([labels, str(len(seeds)), *(
            spread([found[seed] for seed in seeds]) for found in (random, pretrained)),
            spread([pretrained[seed] - random[seed] for seed in seeds])])
    return markdown(rows)


if __name__ == '__main__':
    main()
