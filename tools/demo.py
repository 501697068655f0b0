"""From nothing to a trained detector: make data, train, evaluate, draw, report.

A small RT-DETR with a SpaRTAN backbone learns handwritten digits on photographs, from scratch, on
a GPU if there is one. Each step is a command that can be run alone, too; it is printed first.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A checkout that is not installed; what is installed comes first.
sys.path.append(str(ROOT))

from spartan_mm import demo as steps  # noqa: E402

CONFIG = ROOT / 'configs' / 'detection' / 'rtdetr_spartan_xt_digits.py'

NUM_TRAIN, NUM_VAL = 2000, 200  # pictures

NUM_SHOWN = 8  # pictures in the gallery
SCORE_THRESHOLD = 0.4  # of detections that are drawn

# --quick: a look at every step, in which nothing is learnt.
QUICK_TRAIN, QUICK_VAL = 8, 4
QUICK_OPTIONS = (
    'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1', 'train_dataloader.batch_size=4',
    'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False')


class Demo(steps.Demo):
    """The steps of the detector."""

    goals = (steps.Goal('AP', 'coco/bbox_mAP', 0.30), steps.Goal('AP50', 'coco/bbox_mAP_50', 0.55))
    report_flags = ('--score-thr', str(SCORE_THRESHOLD))

    def __init__(self, work_dir: Path, data_root: Path, options: list[str], quick: bool) -> None:
        options = [*(QUICK_OPTIONS if quick else ()), *options]
        super().__init__(ROOT, CONFIG, work_dir, data_root, options, quick)
        self.options = [*self._data_options(), *self.options]
        self.num_train, self.num_val = (QUICK_TRAIN, QUICK_VAL) if quick else (NUM_TRAIN, NUM_VAL)
        self.gallery = work_dir / 'gallery.png'
        self.detections = work_dir / 'detections'

    def make_data(self) -> None:
        from spartan_mm.datasets import make_digits
        paths = make_digits(self.data_root, self.num_train, self.num_val)
        self.console.line(f'{self.num_train} training and {self.num_val} validation pictures in '
                          f'{self.commands.shown(paths.root)}')

    def keeps(self, line: str) -> bool:
        return 'Average Precision' in line or 'Average Recall' in line

    def draw_sheets(self) -> list[str]:
        from mmengine.config import Config
        from mmengine.registry import DATASETS, init_default_scope

        from spartan_mm.analysis.mistakes.pictures import draw_gallery
        from spartan_mm.analysis.mistakes.predictions import read_predictions, spread
        from spartan_mm.analysis.report.curves import draw_curves, read_log
        draw_curves(read_log(self.work_dir)).savefig(self.curves)

        config = Config.fromfile(self.config)
        init_default_scope(config.default_scope)
        dataset = DATASETS.build(config.test_dataloader.dataset)
        indices = spread(len(dataset), NUM_SHOWN)
        sheet = draw_gallery(dataset, read_predictions(self.predictions), indices, SCORE_THRESHOLD)
        sheet.save(self.gallery)
        return [dataset.get_data_info(index)['img_path'] for index in indices]

    def infer(self, checkpoint: str, pictures: list[str]) -> None:
        self.run_on_folder(checkpoint, pictures, self.work_dir / 'samples', self.detections,
                           ['--score-thr', str(SCORE_THRESHOLD)])

    @property
    def evaluated_on(self) -> str:
        return f'{self.num_val} validation pictures'

    @property
    def results(self) -> dict[str, Path]:
        return {'loss, AP and learning rate': self.curves,
                'predictions beside ground truth': self.gallery,
                'detections by tools/infer.py': self.detections}

    def _data_options(self) -> list[str]:
        """Point the config to a dataset that does not lie where the config says."""
        root = self.commands.shown(self.data_root)
        if root == str(Path('data', 'digits')):
            return []
        loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
        evaluators = ('val_evaluator', 'test_evaluator')
        annotations = Path(root, 'annotations', 'val.json')
        return [*(f'{loader}.dataset.data_root={root}' for loader in loaders),
                *(f'{evaluator}.ann_file={annotations}' for evaluator in evaluators)]


def main() -> int:
    args = steps.parse_args(__doc__, ROOT, 'demo', 'digits')
    return steps.run_demo(Demo(args.work_dir, args.data_root, args.cfg_options, args.quick))


if __name__ == '__main__':
    sys.exit(main())
