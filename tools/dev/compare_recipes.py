"""Train a small detector by several recipes, for as many iterations and by several seeds each.

    python tools/dev/compare_recipes.py --work-dir DIR                    all rows, three seeds each
    python tools/dev/compare_recipes.py --work-dir DIR --rows baseline '+ MAL' --seeds 0 1
    python tools/dev/compare_recipes.py --work-dir DIR --seeds            the table of what there is

The data are handwritten digits on photographs in few pictures: small and large ones, overlapping,
in crowds. It is a proxy: nothing of this size tells what a recipe gains on COCO.

A recipe with distillation has a teacher, which is trained once, before the first of them: a larger
detector on the same pictures, for twice the epochs. It is a row by itself.

DIR/recipes.json keeps the results, and what is in there is not trained again; a training that was
interrupted is resumed. DIR/recipes.md is the table; it also goes between its marks into the page of
--docs.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from readme_tables import fill_page, spread

from spartan_mm.analysis.report.curves import read_log
from spartan_mm.datasets import make_digits
from spartan_mm.files import write_json, write_whole
from spartan_mm.text import markdown

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / 'configs' / 'detection' / 'rtdetr_spartan_xt_digits.py'
# A fifth of its parameters: four minutes a training on a core that does nothing else.
SMALL = {
    'backbone.arch': dict(
        stem_channels=16, depths=(1, 1, 2, 1), channels=(16, 32, 64, 96),
        expand_ratios=(2, 2, 2, 2), conv_types=('full', 'full', 'depthwise', 'depthwise')),
    'neck.embed_dims': 64, 'neck.ffn_dims': 128,
    'decoder.in_channels': [64, 64, 64], 'decoder.embed_dims': 64, 'decoder.ffn_dims': 128,
    'bbox_head.embed_dims': 64}
METRICS = {'AP': 'coco/bbox_mAP', 'AP50': 'coco/bbox_mAP_50', 'AP small': 'coco/bbox_mAP_s'}
BASELINE = 'baseline'
TEACHER = 'teacher'

# ---- what recipes are made of: each changes a config in place ------------------------------------


def use_matchability(cfg: Config) -> None:
    """Another loss of the classes."""
    cfg.model.bbox_head.loss_cls = dict(type='MatchabilityAwareLoss')


def use_dense(cfg: Config) -> None:
    """Mosaics and mixed batches in the first half of the epochs, as ECDet has them."""
    plain, half = cfg.train_dataloader.dataset.pipeline, cfg.train_cfg.max_epochs // 2
    *load, distort, resize, small, pack = plain
    mosaic = [dict(type='DenseMosaic', side=resize.scale[0] // 2), distort]
    dense = dict(type='RandomChoice', transforms=[mosaic, [distort]], prob=[0.75, 0.25])
    cfg.train_dataloader.dataset.pipeline = [*load, dense, small, resize, small, pack]
    cfg.custom_hooks = [*cfg.custom_hooks, dict(
        type='CheckedPipelineSwitchHook', switch_epoch=half, switch_pipeline=plain)]
    cfg.model.data_preprocessor.batch_augments = [dict(type='BatchMixUp', stop_epoch=half)]


def use_flat_cosine(cfg: Config) -> None:
    """A constant rate in the first half of the epochs, then a cosine to a twentieth."""
    cfg.param_scheduler = [dict(
        type='FlatCosineLR', by_epoch=True, convert_to_iter_based=True, warmup=1,
        flat=cfg.train_cfg.max_epochs // 2, tail=1, gamma=0.05)]


def use_distributions(cfg: Config) -> None:
    """Boxes as distributions of their edges; the rest of the model stays."""
    cfg.model.decoder.update(type='DFINEDecoder', gate=False, project_values=True)
    cfg.model.bbox_head.type = 'DFINEHead'


def use_larger(cfg: Config) -> None:
    """A backbone and a neck twice as wide, and twice the epochs."""
    arch = cfg.model.backbone.arch
    arch.update(stem_channels=32, channels=tuple(2 * width for width in arch.channels))
    cfg.model.neck.update(embed_dims=128, ffn_dims=256)
    cfg.model.decoder.in_channels = [128] * 3
    epochs = 2 * cfg.train_cfg.max_epochs
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    cfg.default_hooks.checkpoint.interval = epochs


class Row(NamedTuple):
    """A recipe, what its authors say that it gains on COCO, in AP, and whether it has a teacher."""

    parts: Sequence[Callable[[Config], None]]
    published: str = '–'
    taught: bool = False


#: The rows of the table. Another recipe is a function above and a line here.
ROWS = {
    BASELINE: Row([]),
    '+ MAL': Row([use_matchability]),
    '+ dense one-to-one': Row([use_dense]),
    '+ both': Row([use_matchability, use_dense]),
    '+ both, flat-cosine rate': Row([use_matchability, use_dense, use_flat_cosine],
                                    '+0.9 to +1.3 (R18 to R101; rate doubled, too)'),
    '+ FDR': Row([use_distributions], '+1.0 (D-FINE-L)'),
    '+ all': Row([use_matchability, use_dense, use_flat_cosine, use_distributions]),
    '+ distillation': Row([], '+2.6 to +5.2 (KD-DETR, other detectors)', taught=True),
    TEACHER: Row([use_larger]),
}

# ---- trainings -----------------------------------------------------------------------------------


def main() -> None:
    """Train what is missing, and show all that there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/recipes'), metavar='DIR')
    parser.add_argument('--rows', nargs='+', choices=ROWS, metavar='ROW',
                        default=[name for name in ROWS if name != TEACHER],
                        help=f'which of: {"; ".join(ROWS)} (default: all)')
    parser.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2], metavar='N')
    parser.add_argument('--epochs', type=int, default=12, metavar='N')
    parser.add_argument('--pictures', type=int, default=320, metavar='N', help='of training')
    parser.add_argument('--val-pictures', type=int, default=200, metavar='N')
    parser.add_argument('--docs', type=Path, metavar='PAGE.md', help='page to write the table into')
    args = parser.parse_args()
    work_dir = args.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    file = work_dir / 'recipes.json'
    settings = dict(epochs=args.epochs, pictures=args.pictures, val_pictures=args.val_pictures)
    content = json.loads(file.read_text()) if file.exists() else dict(settings=settings, rows={})
    if content['settings'] != settings and args.seeds:
        parser.error(f'{file} has results of {content["settings"]}, not of {settings}; name '
                     'another --work-dir')
    if args.seeds:
        data = make_digits(work_dir / 'digits', args.pictures, args.val_pictures)
    # Seed by seed, so that there is a whole table early.
    wanted = [(name, seed) for seed in args.seeds for name in args.rows]
    first = next((i for i, (name, _) in enumerate(wanted) if ROWS[name].taught), None)
    if first is not None:
        wanted.insert(first, (TEACHER, 0))
    for name, seed in wanted:
        results = content['rows'].setdefault(name, {})
        if str(seed) not in results:
            config = write_config(name, data.root, args.epochs, work_dir)
            results[str(seed)] = train(config, seed, work_dir / config.stem / f'seed{seed}')
            write_json(file, content)
            write_table(content, work_dir)
    text = write_table(content, work_dir)
    print(text)
    if args.docs:
        fill_page(args.docs, dict(recipes=text))


def write_config(name: str, data: Path, epochs: int, folder: Path) -> Path:
    """Write the config of a row."""
    cfg = Config.fromfile(BASE)
    cfg.model.backbone.pop('arch')
    cfg.merge_from_dict({f'model.{key}': value for key, value in SMALL.items()})
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = f'{data}/'
        loader.update(num_workers=0, persistent_workers=False)
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = f'{data}/annotations/val.json'
    cfg.default_hooks.checkpoint.update(interval=epochs, max_keep_ckpts=1, save_best=None)
    for change in ROWS[name].parts:
        change(cfg)
    if ROWS[name].taught:
        checkpoint = (folder / TEACHER / 'seed0' / 'last_checkpoint').read_text()
        cfg.model.distillation = dict(type='DetectorDistillation',
                                      teacher=dict(checkpoint=checkpoint))
    path = folder / f'{"_".join("".join(c if c.isalnum() else " " for c in name).split())}.py'
    cfg.dump(path)
    return path


def train(config: Path, seed: int, folder: Path) -> dict[str, Any]:
    """Train, or go on with it, and return the metrics of the last weights."""
    start = time.monotonic()
    subprocess.run([sys.executable, '-m', 'spartan_mm.cli', 'train', str(config), '--work-dir',
                    str(folder), '--seed', str(seed), '--resume', '--save-every', '100'],
                   check=True, stdout=subprocess.DEVNULL)
    evaluation = read_log(folder).evaluations[-1]
    return dict({title: evaluation[key] for title, key in METRICS.items()},
                minutes=round((time.monotonic() - start) / 60, 2),
                device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU',
                torch=torch.__version__)


# ---- the table -----------------------------------------------------------------------------------


def write_table(content: Mapping[str, Any], folder: Path) -> str:
    """Write what there is as a table in Markdown, and return it."""
    rows = [['recipe', *METRICS, 'AP beside the baseline', 'seeds', 'published on COCO, *paper*',
             'minutes']]
    baseline = content['rows'].get(BASELINE, {})
    for name, results in content['rows'].items():
        if results:
            paired = [100 * (results[seed]['AP'] - baseline[seed]['AP'])
                      for seed in results if seed in baseline and name != BASELINE]
            rows.append([
                name,
                *(spread([100 * result[title] for result in results.values()])
                  for title in METRICS),
                spread(paired, '+'), str(len(results)),
                ROWS[name].published if name in ROWS else '–',
                f'{statistics.median(result["minutes"] for result in results.values()):.1f}'])
    text = markdown(rows)
    with write_whole(folder / 'recipes.md') as file:
        file.write(text.encode())
    return text


if __name__ == '__main__':
    main()
