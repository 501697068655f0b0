"""Compare SpaRTAN with other light backbones: the table and the picture of docs/neighbours.md.

Parameters and multiply-adds are counted, accuracies are the papers', latencies are measured here,
all models in turns in one run. That takes a quiet machine and some minutes; with --no-times the
page has counts alone. Weights are random: nothing is downloaded.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from readme_tables import fill_page

from spartan_mm import zoo
from spartan_mm.analysis.benchmark import Workload, machine_line, measuring
from spartan_mm.analysis.comparison import Comparison, Row, compare, draw_comparison
from spartan_mm.analysis.style import write_figure
from spartan_mm.text import Console, markdown

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'neighbours.md'
PICTURE = ROOT / 'docs' / 'pictures' / 'neighbours.png'

# Of classifiers that need no port: top-1 as SpaRTAN's paper prints it (Table II).
OTHERS = {'mmpretrain:van-tiny_3rdparty_in1k': ('VAN-B0', 75.4),
          'timm:efficientformerv2_s0': ('EfficientFormerV2-S0', 75.7)}
_NONE = '–'


def list_classifiers() -> list[str]:
    """SpaRTAN's and the others', as `compare` takes them."""
    ours = ['spartan_xt_224', 'spartan_t_224', 'spartan_xt', 'spartan_t']
    return [*ours, *_neighbours('classification'), *OTHERS]


def list_detectors() -> list[str]:
    """RT-DETR with the R50 head on SpaRTAN and on the others."""
    return ['rtdetr_spartan_xt', 'rtdetr_spartan_t', *_neighbours('detection')]


def make_table(comparison: Comparison) -> str:
    """Lay a comparison out, with links to the configs."""
    accuracy = 'top-1, % (paper)' if any(
        row.accuracy and row.accuracy.metric != 'box AP' for row in comparison.rows) else \
        'AP (paper)'
    rows = [['model', 'input', 'parameters, M', 'multiply-adds, G', 'latency, ms', accuracy]]
    for row in comparison.rows:
        size = row.count.total
        rows.append([_link(row), '{} x {}'.format(*row.count.shape),
                     f'{size.parameters / 1e6:.3f}', f'{size.multiply_adds / 1e9:.3f}',
                     row.latency.write(1e3) if row.latency else _NONE,
                     f'{row.accuracy.value:g}' if row.accuracy else _NONE])
    machine = (f'Latency of one image, median and quartiles: {machine_line(comparison.machine)}; '
               f'{comparison.dtype}.' if comparison.machine else
               'Latency was not measured: `python tools/dev/neighbours.py` on a quiet machine.')
    return f'{markdown(rows)}\n{machine}\n'


def _neighbours(task: str) -> list[str]:
    return [name for name in zoo.list_models(task=task)
            if Path(zoo.config_path(name)).parent.name == 'neighbours']


def _link(row: Row) -> str:
    if row.name in OTHERS:
        return f'{row.title} (`{row.name}`)'
    return f"[{row.title}](../{zoo.read_metafiles()[row.name]['Config']})"


def _compare(names: Sequence[str], workload: Workload | None, rounds: int | None,
             console: Console) -> Comparison:
    given = {name: accuracy for name, (_, accuracy) in OTHERS.items() if name in names}
    comparison = compare(names, accuracies=given, workload=workload, rounds=rounds,
                         report=console.status)
    problems = [row.problem for row in comparison.rows if row.problem]
    if problems:
        raise SystemExit('\n'.join(f'error: {problem}' for problem in problems))
    shown = {name: zoo.read_metafiles()[name]['Metadata']['Architecture'][0] for name in names
             if name in zoo.read_metafiles()}
    return comparison.call(shown | {name: title for name, (title, _) in OTHERS.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--no-times', action='store_true', help='measure no latencies')
    parser.add_argument('--threads', type=int, metavar='N', help="of the CPU (default: PyTorch's)")
    parser.add_argument('--rounds', type=int, metavar='N', help='how often each model is timed')
    parser.add_argument('--device', default='cpu', help='such as cuda:0 (default: %(default)s)')
    args = parser.parse_args()

    console = Console()
    workload = None if args.no_times else Workload(device=args.device)
    with measuring(args.threads):
        classifiers, detectors = (_compare(names(), workload, args.rounds, console)
                                  for names in (list_classifiers, list_detectors))
    fill_page(PAGE, dict(classifiers=make_table(classifiers), detectors=make_table(detectors)))
    write_figure(PICTURE, draw_comparison(classifiers))
    console.line(f'Written: {PAGE.relative_to(ROOT)}, {PICTURE.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
