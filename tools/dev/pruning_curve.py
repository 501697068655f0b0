"""Prune a trained model in steps, fine-tune what is left, and draw accuracy against what it costs.

    python tools/dev/pruning_curve.py classifier CONFIG CHECKPOINT --epochs 3 --out-dir DIR
    python tools/dev/pruning_curve.py detector CONFIG CHECKPOINT --epochs 1 --out-dir DIR
    python tools/dev/pruning_curve.py --out-dir DIR                       the table and the picture

DIR/pruning.json keeps what was measured, a title each, and what is in there is not done again.
Latencies are not measured: `spartan-mm compare CONFIG DIR/.../pruned.py --deploy` does it.
"""
import argparse
import json
import logging
from pathlib import Path
from typing import Any

from mmengine.config import Config

from spartan_mm.analysis.sizes import count_model
from spartan_mm.analysis.style import COLOURS, finish, new_figure, write_figure
from spartan_mm.backbones.fused import fuse
from spartan_mm.engine import launch
from spartan_mm.engine.class_order import OrderedCheckpointHook
from spartan_mm.engine.finetune import FineTuneHook
from spartan_mm.files import write_json
from spartan_mm.text import markdown
from spartan_mm.weights.pruning import prune_checkpoint

#: What is left out, in lines of the picture; a detector has the last two, too.
LINES = {
    'waves': [dict(waves=share) for share in (0.25, 0.5, 0.75, 1)],
    'inner channels': [dict(inner=share) for share in (0.25, 0.5, 0.75)],
    'blocks': [dict(blocks=number) for number in (4, 8, 12)],
    'together': [dict(waves=0.5, inner=0.25), dict(waves=1, inner=0.5, blocks=4),
                 dict(waves=1, inner=0.75, blocks=10)],
    'FFN': [dict(ffn=share) for share in (0.5, 0.75)],
    'fusion blocks': [dict(csp=share) for share in (0.25, 0.5, 0.75)],
}
METRICS = {'accuracy/top1': 'top-1 in %', 'coco/bbox_mAP': 'AP'}
FULL = 'nothing'


def main() -> None:
    """Measure what is named and missing, and show all that there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', nargs='*', metavar='TITLE CONFIG CHECKPOINT', help='what to prune')
    parser.add_argument('--lines', nargs='+', choices=LINES, default=[*LINES], metavar='LINE',
                        help=f'which of {", ".join(LINES)}; those that the model lacks are left '
                             'out (default: all)')
    parser.add_argument('--epochs', type=int, default=1, help='of fine-tuning; 0 for none')
    parser.add_argument('--lr', type=float, default=5e-4, help='at its beginning')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/pruning'))
    args = parser.parse_args()
    file = args.out_dir / 'pruning.json'
    results = json.loads(file.read_text()) if file.exists() else {}
    if args.model:
        title, config, checkpoint = args.model
        measured = results.setdefault(title, {})
        detects = 'decoder' in launch.load_config(config).model
        lines = [line for line in args.lines if detects or line not in ('FFN', 'fusion blocks')]
        steps = {name_of(settings): settings
                 for settings in [{}, *(step for line in lines for step in LINES[line])]}
        folders = {name: args.out_dir / title / name.replace(' ', '_') for name in steps}
        for name, settings in steps.items():
            if name not in measured:
                measured[name] = measure(config, checkpoint, settings, folders[name])
                write_json(file, results)
        for name in steps if args.epochs else ():
            if 'tuned' not in measured[name]:
                measured[name] |= tune(folders[name], args.epochs, args.lr)
                write_json(file, results)
    print(table(results))
    draw(results, args.out_dir / 'pruning.png')


def name_of(settings: dict[str, float]) -> str:
    """Such as 'waves 0.5 inner 0.25'."""
    return ' '.join(f'{key} {value:g}' for key, value in settings.items()) or FULL


def measure(config: str, checkpoint: str, settings: dict[str, float],
            folder: Path) -> dict[str, float]:
    """Prune, count and evaluate."""
    shares = {key: value for key, value in settings.items() if key != 'blocks'}
    pruned = prune_checkpoint(launch.load_config(config), checkpoint, folder / 'pruned', shares,
                              settings.get('blocks', 0))
    size = count_model(pruned.config, deploy=True).total
    return dict(parameters=pruned.parameters[1], multiply_adds=size.multiply_adds,
                pruned=evaluate(pruned.config, pruned.checkpoint, folder / 'test'))


def evaluate(config: Path, checkpoint: Path, folder: Path) -> float:
    """The metric of a checkpoint on the test data."""
    cfg = load(config, folder)
    launch.load_weights(cfg, str(checkpoint))
    runner = launch.build_runner(cfg)
    runner.register_hook(OrderedCheckpointHook(None), priority='HIGHEST')
    return find_metric(runner.test())


def tune(folder: Path, epochs: int, lr: float) -> dict[str, float]:
    """Fine-tune with a rate that falls to nothing; return the metric of the last weights."""
    cfg = load(folder / 'pruned.py', folder / 'tuned')
    cfg.train_cfg.max_epochs = epochs
    cfg.train_cfg.val_interval = epochs
    cfg.optim_wrapper.optimizer.lr = lr
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=10),
        dict(type='PolyLR', power=1., by_epoch=True, begin=0, end=epochs,
             convert_to_iter_based=True)]
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=epochs, max_keep_ckpts=1)
    launch.set_randomness(cfg, 0)
    runner = launch.build_runner(cfg, 'train')
    runner.register_hook(FineTuneHook(), priority='HIGHEST')
    fuse(runner.model)
    runner.train()
    return dict(tuned=evaluate(folder / 'pruned.py', folder / 'tuned' / f'epoch_{epochs}.pth',
                               folder / 'test'), epochs=epochs)


def load(config: Path, folder: Path) -> Config:
    """A config of a run of its own that says little."""
    cfg = launch.load_config(str(config), str(folder))
    cfg.log_level = logging.getLevelName(logging.WARNING)
    cfg.experiment_name = f'{folder}{len(load.__dict__.setdefault("names", []))}'
    load.names.append(cfg.experiment_name)
    return cfg


def find_metric(metrics: dict[str, float]) -> float:
    """The one that counts."""
    return next(metrics[name] for name in METRICS if name in metrics)


def table(results: dict[str, Any]) -> str:
    """All numbers, in Markdown."""
    rows = [['model', 'left out', 'parameters', 'multiply-adds', 'pruned', 'fine-tuned']]
    for title, entries in results.items():
        full = entries[FULL]
        rows += [[title, name, *(f'{entry[key] / full[key]:.0%}'
                                 for key in ('parameters', 'multiply_adds')),
                  *(f'{entry[key]:.4g}' if key in entry else '–' for key in ('pruned', 'tuned'))]
                 for name, entry in entries.items()]
    return markdown(rows)


def draw(results: dict[str, Any], path: Path) -> None:
    """Metric against multiply-adds, axes for each model and a colour for each line."""
    figure = new_figure(6 * len(results), 4.4)
    for axes, (title, entries) in zip(figure.subplots(1, len(results), squeeze=False)[0],
                                      results.items(), strict=True):
        full = entries[FULL]
        for colour, (line, steps) in zip(COLOURS, LINES.items(), strict=False):
            shown = [full, *(entries[name] for name in map(name_of, steps) if name in entries)]
            if len(shown) == 1:
                continue
            for key, style in (('pruned', '--'), ('tuned', '-')):
                points = [(entry['multiply_adds'] / full['multiply_adds'], entry[key])
                          for entry in shown if key in entry]
                if len(points) > 1:
                    axes.plot(*zip(*points, strict=True), style, color=colour, marker='o',
                              markersize=4, label=line if key == 'pruned' else None)
        finish(axes, title)
        axes.invert_xaxis()
        axes.xaxis.set_major_formatter('{x:.0%}')
        axes.set_xlabel('multiply-adds of the deploy form (dashed: before fine-tuning)')
        axes.set_ylabel('top-1 in %' if full['pruned'] > 1 else 'AP')
        axes.legend(frameon=False)
    write_figure(path, figure)


if __name__ == '__main__':
    main()
