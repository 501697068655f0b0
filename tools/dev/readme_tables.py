"""Write the tables of models into the READMEs, from configs/*/metafile.yml.

With --check, nothing is written: the sizes in the metafiles are compared with those of the models,
which takes a second for each, and the READMEs with the metafiles. With --count, the sizes in the
metafiles are counted anew first.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from spartan_mm import zoo
from spartan_mm.analysis.models import build_without_weights
from spartan_mm.analysis.sizes import Complexity, measure_modules
from spartan_mm.files import write_whole

ROOT = Path(__file__).resolve().parents[2]

_TABLE = re.compile(r'(<!-- table (?P<name>\w+): begin -->\n).*?(<!-- table (?P=name): end -->\n)',
                    re.DOTALL)
_NONE = '–'  # what nobody has measured, printed or counted

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: What stands at its top.
        cell: Makes the text for a model and one of its results.
    """

    title: str
    cell: Callable[[Entry, Entry], str]


# ---- counts --------------------------------------------------------------------------------------


def count(name: str) -> dict[str, int]:
    """Count what the metafile says under ``Metadata`` of a model's size.

    Args:
        name: One of :func:`spartan_mm.list_models`.

    Returns:
        Numbers by the metafile's keys. Those with 'deploy' are of the form that only predicts, for
        models that have one (`switch_to_deploy`).
    """
    height, width = zoo.read_metafiles()[name]['Metadata']['Input Size']
    model = build_without_weights(zoo.get_config(name))
    counted = _sizes(measure_modules(model, height, width)[''], zoo.task_of(name))
    if hasattr(model, 'switch_to_deploy'):
        model.switch_to_deploy()
        deployed = _sizes(measure_modules(model, height, width)[''], zoo.task_of(name))
        counted |= {f'{key} (deploy)': number for key, number in deployed.items()}
    return counted


def find_wrong_counts(models: Mapping[str, Entry]) -> list[str]:
    """Compare the numbers of metafiles with those of the models that are built.

    Args:
        models: Entries of metafiles by name, see :func:`spartan_mm.zoo.read_metafiles`.

    Returns:
        A sentence for each number that is wrong or missing.
    """
    problems = []
    for name, model in models.items():
        said, counted = model['Metadata'], count(name)
        for key in [*counted, *(key for key in said if _is_count(key) and key not in counted)]:
            if said.get(key) != counted.get(key):
                problems.append(f'{name}: {key} is {said.get(key)} in the metafile, counted are '
                                f'{counted.get(key)}')
    return problems


def write_counts(text: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    """Put numbers that :func:`count` found into a metafile.

    Args:
        text: The metafile, each number on a line of its own.
        counts: For each model by its name, numbers by their keys.
    """
    model, lines = {}, []
    for line in text.splitlines():
        key, colon, value = line.partition(': ')
        if key == '  - Name':
            model = counts.get(value, {})
        number = model.get(key.strip())
        lines.append(line if number is None else f'{key}{colon}{number}')
    return '\n'.join(lines) + '\n'


def _is_count(key: str) -> bool:
    return key.startswith(('Parameters', 'Multiply-Adds', 'FLOPs'))


def _sizes(complexity: Complexity, task: str) -> dict[str, int]:
    sizes = {'Parameters': complexity.parameters, 'Multiply-Adds': complexity.multiply_adds,
             'FLOPs': 2 * complexity.multiply_adds}
    if task == 'classification':
        sizes['Multiply-Adds with Norms and Pools'] = complexity.operations
    return sizes


# ---- tables --------------------------------------------------------------------------------------


def make_texts(root: Path, models: Mapping[str, Entry] | None = None) -> dict[Path, str]:
    """Write the READMEs anew, with the tables as the metafiles have them.

    Args:
        root: The checkout.
        models: Entries of metafiles by name; None for those of the package.

    Returns:
        The text of each file; nothing is written.

    Raises:
        ValueError: If a README has no place for one of its tables.
    """
    models = zoo.read_metafiles() if models is None else models
    return {root / file: insert_tables((root / file).read_text(encoding='utf-8'),
                                       {name: make(models) for name, make in tables.items()})
            for file, tables in TABLES.items()}


def insert_tables(text: str, tables: Mapping[str, str]) -> str:
    """Replace what stands between the marks for each table.

    Args:
        text: Text with marks ``<!-- table NAME: begin -->`` and ``<!-- table NAME: end -->``.
        tables: Tables by name.

    Raises:
        ValueError: If marks and tables are not the same.
    """
    marked = {match['name'] for match in _TABLE.finditer(text)}
    if marked != tables.keys():
        raise ValueError(f'the text has marks for the tables {sorted(marked)}, not for '
                         f'{sorted(tables)}')
    return _TABLE.sub(lambda match: f'{match[1]}{tables[match["name"]]}{match[3]}', text)


def fill_page(page: Path, tables: Mapping[str, str]) -> None:
    """Replace tables of a page between their marks; its others stay.

    Raises:
        ValueError: The page has no marks for one of them.
    """
    text = page.read_text(encoding='utf-8')
    there = {match['name']: match[0].removeprefix(match[1]).removesuffix(match[3])
             for match in _TABLE.finditer(text)}
    with write_whole(page) as file:
        file.write(insert_tables(text, there | dict(tables)).encode())


def spread(values: Sequence[float], sign: str = '', digits: int = 1) -> str:
    """Such as '31.2 ± 0.8', the standard deviation of a sample; '–' for none."""
    if not values:
        return _NONE
    deviation = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{sign}.{digits}f}{deviation}'


def classification_table(models: Mapping[str, Entry]) -> str:
    """All classifiers: sizes beside the paper's, accuracies and where they come from."""
    columns = [
        Column('table', lambda model, result: _paper(model, 'Table')),
        Column('config', lambda model, result:
               f"[{_paper(model, 'Row', model['Name'])}]({_link(model)})"),
        Column('input', lambda model, result: _input(model)),
        Column('parameters, M', lambda model, result:
               _compare(model, 'Parameters', 1e6, 3, 'Parameters (M)')),
        Column('multiply-adds, M', lambda model, result:
               _compare(model, 'Multiply-Adds', 1e6, 1, 'MACs (M)')),
        Column('FLOPs, M', lambda model, result: _number(model, 'FLOPs', 1e6, 1)),
        Column('with norms and pools, G', lambda model, result:
               _compare(model, 'Multiply-Adds with Norms and Pools', 1e9, 3, 'FLOPs (G)')),
        Column('top-1, %', lambda model, result: _metric(result, 'Top 1 Accuracy')),
        Column('accuracy from', lambda model, result: _source(result)),
    ]
    return _table(columns, _of_task(models, 'classification'))


def detection_table(models: Mapping[str, Entry]) -> str:
    """All detectors: sizes in both forms and the paper's, average precisions and their source."""
    metrics = {'AP': 'box AP', 'AP50': 'box AP50', 'AP75': 'box AP75', 'APs': 'box AP small',
               'APm': 'box AP medium', 'APl': 'box AP large'}
    columns = [
        Column('config', lambda model, result: f"[{model['Name']}]({_link(model)})"),
        Column('input', lambda model, result: _input(model)),
        Column('parameters, M', lambda model, result: _number(model, 'Parameters', 1e6, 2)),
        Column('deploy, M', lambda model, result: _number(model, 'Parameters (deploy)', 1e6, 2)),
        Column('paper, M', lambda model, result: _paper(model, 'Parameters (M)')),
        Column('multiply-adds, G', lambda model, result: _number(model, 'Multiply-Adds', 1e9, 1)),
        Column('FLOPs, G', lambda model, result: _number(model, 'FLOPs', 1e9, 1)),
        Column('deploy, G', lambda model, result: _number(model, 'FLOPs (deploy)', 1e9, 1)),
        Column('paper, G', lambda model, result: _paper(model, 'FLOPs (G)')),
        *(Column(title, lambda model, result, key=key: _metric(result, key))
          for title, key in metrics.items()),
        Column('AP from', lambda model, result: _source(result)),
    ]
    return _table(columns, _of_task(models, 'detection'))


def detection_summary(models: Mapping[str, Entry]) -> str:
    """What COCO's detectors are, in short: the paper's, not other recipes for them."""
    columns = [
        Column('config', lambda model, result: f"`{model['Name']}`"),
        Column('backbone', lambda model, result: model['Metadata']['Architecture'][0]),
        Column('parameters, M', lambda model, result: _number(model, 'Parameters', 1e6, 2)),
        Column('FLOPs, G', lambda model, result: _number(model, 'FLOPs', 1e9, 1)),
        Column('epochs', lambda model, result: str(model['Metadata']['Epochs'])),
        Column('AP (paper)', lambda model, result: _metric(_result(model, 'paper'), 'box AP')),
        Column('AP (measured here)', lambda model, result:
               _metric(_result(model, 'measured here'), 'box AP')),
    ]
    return _table(columns, [model for model in _of_task(models, 'detection')
                            if model['Name'].startswith(('rtdetr_', 'retinanet_'))
                            and not model['Name'].endswith(('_digits', '_fdr'))
                            and '_distill_' not in model['Name']
                            and '/neighbours/' not in model['Config']], by_result=False)


def classification_summary(models: Mapping[str, Entry]) -> str:
    """What the paper's classifiers are, in short."""
    columns = [
        Column('config', lambda model, result: f"`{model['Name']}`"),
        Column('input', lambda model, result: _input(model)),
        Column('parameters, M', lambda model, result: _number(model, 'Parameters', 1e6, 2)),
        Column('multiply-adds, G', lambda model, result: _number(model, 'Multiply-Adds', 1e9, 2)),
        Column('epochs', lambda model, result: str(model['Metadata']['Epochs'])),
        Column('top-1, % (paper)', lambda model, result:
               _metric(_result(model, 'paper'), 'Top 1 Accuracy')),
        Column('top-1, % (measured here)', lambda model, result:
               _metric(_result(model, 'measured here'), 'Top 1 Accuracy')),
    ]
    return _table(columns, [model for model in _of_task(models, 'classification')
                            if _paper(model, 'Table') == 'II'], by_result=False)


# Per README: what stands in the place of each name.
TABLES: dict[str, dict[str, Callable[[Mapping[str, Entry]], str]]] = {
    'README.md': dict(detection=detection_summary, classification=classification_summary),
    'configs/classification/README.md': dict(models=classification_table),
    'configs/detection/README.md': dict(models=detection_table),
}


def _table(columns: list[Column], models: Iterable[Entry], by_result: bool = True) -> str:
    """Lay out a row for each model, or, if `by_result`, for each of its results."""
    rows = [[column.title for column in columns], ['---'] * len(columns)]
    for model in models:
        for result in (model.get('Results') or [{}]) if by_result else [{}]:
            rows.append([column.cell(model, result) for column in columns])
    return ''.join(f"| {' | '.join(row)} |\n" for row in rows)


def _of_task(models: Mapping[str, Entry], task: str) -> list[Entry]:
    return [model for name, model in models.items() if zoo.task_of(name) == task]


def _link(model: Entry) -> str:
    return model['Config'].split('/', 2)[2]


def _input(model: Entry) -> str:
    return ' x '.join(map(str, model['Metadata']['Input Size']))


def _paper(model: Entry, key: str, otherwise: str = _NONE) -> str:
    return model['Metadata'].get('Paper', {}).get(key, otherwise)


def _number(model: Entry, key: str, unit: float, digits: int) -> str:
    number = model['Metadata'].get(key)
    return _NONE if number is None else f'{number / unit:.{digits}f}'


def _compare(model: Entry, key: str, unit: float, digits: int, printed: str) -> str:
    """Write a count, and beside it the paper's figure as it is printed and the difference."""
    text, paper = _number(model, key, unit, digits), _paper(model, printed)
    if paper == _NONE:
        return text
    percent = 100 * (model['Metadata'][key] / unit / float(paper) - 1)
    return f'{text} (paper {paper}, {round(percent, 1) + 0.:+.1f} %)'  # no minus before a zero


def _metric(result: Entry, key: str) -> str:
    return str(result.get('Metrics', {}).get(key, _NONE))


def _source(result: Entry) -> str:
    """Say where figures come from, with the circumstances of what was measured."""
    if not result:
        return _NONE
    circumstances = ', '.join(map(str, result.get('Measured', {}).values()))
    return f"{result['Source']}: {circumstances}" if circumstances else result['Source']


def _result(model: Entry, source: str) -> Entry:
    return next((result for result in model.get('Results', ()) if result['Source'] == source), {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument('--check', action='store_true', help='compare, and write nothing')
    choice.add_argument('--count', action='store_true', help='write the sizes, too')
    args = parser.parse_args()
    if args.count:
        names = [name for name in zoo.list_models() if zoo.task_of(name) != 'pretraining']
        counts = {name: count(name) for name in track(names, description='counting')}
        for task in dict.fromkeys(zoo.TASKS.values()):
            metafile = ROOT / 'configs' / task / 'metafile.yml'
            text = write_counts(metafile.read_text(encoding='utf-8'), counts)
            metafile.write_text(text, encoding='utf-8')
        zoo.read_metafiles.cache_clear()
    try:
        texts = make_texts(ROOT)
    except (OSError, ValueError) as error:
        sys.exit(f'error: {error}')

    if not args.check:
        for path, text in texts.items():
            path.write_text(text, encoding='utf-8')
        return
    problems = [f'{path.relative_to(ROOT)} is not what the metafiles say; run '
                'tools/dev/readme_tables.py' for path, text in texts.items()
                if text != path.read_text(encoding='utf-8')]
    for name, model in track(zoo.read_metafiles().items(), description='counting'):
        if zoo.task_of(name) != 'pretraining':
            problems += find_wrong_counts({name: model})
    if problems:
        sys.exit('\n'.join(f'error: {problem}' for problem in problems))


if __name__ == '__main__':
    main()
