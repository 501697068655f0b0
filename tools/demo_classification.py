"""From nothing to a trained classifier: make data, train, evaluate, draw, report.

SpaRTAN-XT learns scikit-learn's handwritten digits, from scratch, on a GPU if there is one, and is
evaluated on digits that were held out. Each step is a command that can be run alone, too; it is
printed first.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A checkout that is not installed; what is installed comes first.
sys.path.append(str(ROOT))

from spartan_mm import demo as steps  # noqa: E402

CONFIG = ROOT / 'configs' / 'classification' / 'spartan_xt_digits.py'

NUM_SHOWN = 8  # pictures that are classified by tools/infer.py

# --quick: a look at every step, in which nothing is learnt; a few pictures of each class.
QUICK_INDICES = ','.join(map(str, range(0, 352, 22)))
QUICK_OPTIONS = (
    'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1',
    *(f'{split}_dataloader.{setting}' for split in ('train', 'val', 'test')
      for setting in ('batch_size=8', 'num_workers=0', 'persistent_workers=False',
                      f'dataset.indices=[{QUICK_INDICES}]')))


class Demo(steps.Demo):
    """The steps of the classifier."""

    goals = (steps.Goal('top-1', 'accuracy/top1', 97., '.2f', ' %'), )
    train_flags = ('--channels-last', )

    def __init__(self, work_dir: Path, data_root: Path, options: list[str], quick: bool) -> None:
        options = [*(QUICK_OPTIONS if quick else ()), *options]
        super().__init__(ROOT, CONFIG, work_dir, data_root, options, quick)
        data = self.commands.shown(data_root)
        if data != str(Path('data', 'digit_folder')):
            self.options = [*(f'{split}_dataloader.dataset.data_root={data}'
                              for split in ('train', 'val', 'test')), *self.options]
        self.confusion = work_dir / 'confusion.png'
        self.mistakes = work_dir / 'mistakes.png'
        self.classified = work_dir / 'classified'
        self._num_evaluated = 0

    def make_data(self) -> None:
        from spartan_mm.datasets import make_digit_folder
        root = make_digit_folder(self.data_root)
        train, val = (len(list((root / split).glob('*/*.png'))) for split in ('train', 'val'))
        self.console.line(f'{train} digits to learn from and {val} held out, in '
                          f'{self.commands.shown(root)}')

    def keeps(self, line: str) -> bool:
        return False

    def draw_sheets(self) -> list[str]:
        from mmengine.config import Config
        from mmengine.registry import DATASETS, init_default_scope

        from spartan_mm.analysis.mistakes.confusion import count_confusions, draw_confusion
        from spartan_mm.analysis.mistakes.pictures import draw_mistakes
        from spartan_mm.analysis.mistakes.predictions import read_outcomes, spread
        from spartan_mm.analysis.report.curves import draw_curves, read_log
        draw_curves(read_log(self.work_dir)).savefig(self.curves)

        config = Config.fromfile(self.config)
        init_default_scope(config.default_scope)
        classes = DATASETS.build(config.test_dataloader.dataset).metainfo['classes']
        outcomes = read_outcomes(self.predictions)
        self._num_evaluated = len(outcomes)
        draw_confusion(count_confusions(outcomes), classes).savefig(self.confusion)
        draw_mistakes(outcomes, classes).save(self.mistakes)
        return [outcomes.paths[index] for index in spread(len(outcomes), NUM_SHOWN)]

    def infer(self, checkpoint: str, pictures: list[str]) -> None:
        self.run_on_folder(checkpoint, pictures, self.work_dir / 'samples', self.classified)

    @property
    def evaluated_on(self) -> str:
        return f'{self._num_evaluated} digits that were held out'

    @property
    def results(self) -> dict[str, Path]:
        return {'loss, accuracy and learning rate': self.curves,
                'what is taken for what': self.confusion,
                'the misclassified pictures': self.mistakes,
                'classified by tools/infer.py': self.classified}


def main() -> int:
    # On a CPU: with maps this small, threads wait for each other longer than they work.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    args = steps.parse_args(__doc__, ROOT, 'demo_classification', 'digit_folder')
    return steps.run_demo(Demo(args.work_dir, args.data_root, args.cfg_options, args.quick))


if __name__ == '__main__':
    sys.exit(main())
