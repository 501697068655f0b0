"""The paper's tables: what is counted, what needs a note, and the page that has both."""

import re
import shutil
import sys
from dataclasses import replace
from math import isnan
from pathlib import Path

import paper_tables
import pytest
from paper_tables import (
    NOWHERE,
    TABLES,
    TOLERANCE,
    Count,
    Recipe,
    Row,
    UnexplainedError,
    count_row,
    fill_in,
    find_differences,
    list_rows,
    make_table,
    measure,
    read_tables,
    write_notes,
    write_row,
)
from torch import nn

from spartan_mm import zoo

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs' / 'tables.md'


@pytest.fixture(scope='module')
def page():
    return read_tables(PAGE.read_text(encoding='utf-8'))


@pytest.fixture
def row():
    """A row without a model: it counts as 2 M and 3 G of multiply-adds."""
    return Row('V', 'a model', 'a library', Recipe(nn.Identity), 'multiply-adds',
               dict(parameters='2.0', operations='3.00'))


COUNT = Count(parameters=2., multiply_adds=3., in_training=3.5, without_products=2.5)


class Tiny(nn.Module):
    """(N, 3, 4, 8) -> (N, 5), with a product of the map with itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.fc = nn.Linear(2, 5)

    def forward(self, x):
        x = self.norm(self.conv(x))
        tokens = x.flatten(2)
        return self.fc(x.mean((2, 3)) + (tokens @ tokens.transpose(1, 2)).mean(2))


# ---- counting ------------------------------------------------------------------------------------


def test_measure():
    count = measure(Recipe(lambda: Tiny().to('meta'), (4, 8)))
    layers, product, normed, pooled = 32 * 6 + 10, 32 * 4, 32 * 2, 32 * 2 + 4
    assert count.parameters * 1e6 == pytest.approx(6 + 4 + 15)
    assert count.multiply_adds * 1e9 == pytest.approx(layers + product)
    assert count.in_training * 1e9 == pytest.approx(layers + product + 5 * normed + pooled)
    assert count.without_products * 1e9 == pytest.approx(layers + 2 * normed + pooled)
    assert count.flops == 2 * count.multiply_adds


def test_parameters_alone():
    count = measure(Recipe(Tiny, None))
    assert count.parameters * 1e6 == pytest.approx(25)
    assert isnan(count.multiply_adds)


@pytest.mark.slow
@pytest.mark.parametrize('table, label', [('II', 'SpaRTAN-XT, 224 x 224'), ('II', 'DeiT-T')])
def test_a_row_is_what_the_page_says(table, label, page):
    """One of this package, and one of another. `make tables ARGS=--check` does it for all."""
    row, = (row for row in list_rows(table) if row.label == label)
    counts = count_row(row)
    lines = page[table].splitlines()
    assert write_row(row, counts) in lines, 'run make tables'
    assert [line for line in lines if line.startswith(f'- **{label}**')] == write_notes(row, counts)


@pytest.mark.slow
def test_boxes_of_all_positions():
    row, = (row for row in list_rows('III') if row.source.startswith('[`rtdetr_r18vd`'))
    counts = count_row(row)
    branch = 2 * 256 * 256 + 256 * 4
    assert counts['boxes'].multiply_adds - counts['row'].multiply_adds == pytest.approx(
        (8400 - 300) * branch / 1e9)


# ---- the rows ------------------------------------------------------------------------------------


def test_rows_are_the_papers():
    labels = {table: [row.label for row in list_rows(table)] for table in TABLES}
    assert labels['II'] == [
        'ResNet-18', 'DeiT-T', 'PVT-T', 'ViT-C', 'VAN-B0', 'EfficientFormerV2-S0', 'MobileOne-S1',
        'EfficientNet-B0', 'MogaNet-XT', 'Swin-1G', 'ConvNeXt-XT', 'SpaRTAN-XT, 224 x 224',
        'SpaRTAN-XT, 256 x 256', 'SpaRTAN-T, 224 x 224', 'SpaRTAN-T, 256 x 256']
    assert labels['III'] == [
        'Deformable-DETR, ResNet-50', 'RT-DETR, ResNet-18', 'DAB-Deformable-DETR, ResNet-50',
        'DN-Deformable-DETR, ResNet-50', 'RT-DETR, ResNet-34', 'RT-DETR, SpaRTAN-XT',
        'RT-DETR, SpaRTAN-T']
    assert [len(labels[table]) for table in ('IV', 'V', 'VIII')] == [6, 2, 3]


@pytest.mark.parametrize('table', TABLES)
def test_every_row_of_a_metafile_is_there(table):
    expected = {name for name, entry in zoo.read_metafiles().items()
                if entry['Metadata'].get('Paper', {}).get('Table') == table}
    sources = ' '.join(row.source for row in list_rows(table))
    assert expected <= set(re.findall(r'\[`(\w+)`\]', sources))


def test_models_that_no_library_has():
    nowhere = {row.label.partition(',')[0] for table in TABLES for row in list_rows(table)
               if row.source == NOWHERE}
    assert nowhere == {'ViT-C', 'MogaNet-XT', 'Swin-1G', 'ConvNeXt-XT', 'DAB-Deformable-DETR',
                       'DN-Deformable-DETR'}


def test_unknown_table():
    with pytest.raises(ValueError, match="no table 'VI'; choose from II, III, IV, V, VIII"):
        list_rows('VI')


# ---- differences ---------------------------------------------------------------------------------


@pytest.mark.parametrize('printed, expected', [
    ('2.0', {}),
    ('2', {}),
    ('1.9', dict(parameters=100 * (2 / 1.9 - 1))),
    ('2.5', dict(parameters=-20.)),
])
def test_differences(row, printed, expected):
    row = replace(row, printed=dict(parameters=printed))
    assert find_differences(row, COUNT) == pytest.approx(expected)


@pytest.mark.parametrize('convention, expected', [
    ('multiply-adds', {}), ('with norms', dict(operations=100 / 6)),
    ('2 per multiply-add', dict(operations=100.))])
def test_conventions(row, convention, expected):
    differences = find_differences(replace(row, convention=convention), COUNT)
    assert differences == pytest.approx(expected)


def test_what_needs_a_note(row):
    explained = replace(row, printed=dict(parameters='1.9'),
                        why=dict(parameters='{row.flops:.1f} G and {other.flops:.1f} G'))
    counts = dict(row=COUNT, other=replace(COUNT, multiply_adds=1.))
    assert write_notes(explained, counts) == ['- **a model**, parameters +5.3 %: 6.0 G and 2.0 G']
    with pytest.raises(UnexplainedError, match=r'Table V, a model: parameters differ by \+5.3 %'):
        write_notes(replace(explained, why={}), counts)
    with pytest.raises(UnexplainedError, match='parameters are explained, but within 2 %'):
        write_notes(replace(explained, printed={}), counts)


def test_a_row_without_a_model(row):
    row = replace(row, recipe=None, remark='nobody has it.')
    cells = write_row(row, {}).split(' | ')
    assert cells[2:8] == ['–', '–', '2.0', '–', '–', 'multiply-adds']
    assert write_notes(row, {}) == ['- **a model**: nobody has it.']


# ---- the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize('table', TABLES)
def test_the_page_has_every_row_and_note(table, page):
    """What it has of figures that are quoted is what the rows say."""
    lines = page[table].splitlines()
    head, _, *rows = (re.split(r' ?\| ?', line)[1:-1] for line in lines if line.startswith('|'))
    notes = re.findall(r'^- \*\*(.+?)\*\*, (\w+) ([-+][\d.]+) %: \S', page[table], re.MULTILINE)
    expected = list_rows(table)
    assert [cells[0] for cells in rows] == [row.label for row in expected], 'run make tables'
    beyond = []
    for row, cells in zip(expected, rows, strict=True):
        assert cells[1] == row.source
        for key, column in dict(accuracy='top-1, % (paper)', AP='AP, % (paper)').items():
            assert row.printed.get(key) == (cells[head.index(column)] if column in head else None)
        # A count, what the paper prints, and the difference stand next to each other.
        for place, key in zip((at for at, title in enumerate(head) if title == '%'),
                              ('parameters', 'macs', 'operations') if table == 'VIII'
                              else ('parameters', 'operations'), strict=True):
            count, printed, percent = cells[place - 2:place + 1]
            assert printed == row.printed.get(key, '–')
            if percent != '–' and abs(float(percent)) > TOLERANCE:
                digits = len(printed.partition('.')[2])
                if f'{float(count):.{digits}f}' != printed:
                    beyond.append((row.label, key, percent))
    assert notes == beyond


def test_tables_are_replaced():
    text = ''.join(f'<!-- table {name}: begin -->\nold {name}\n<!-- table {name}: end -->\n'
                   for name in 'ab')
    assert read_tables(fill_in(text, dict(b='new\n'))) == dict(a='old a\n', b='new\n')
    with pytest.raises(ValueError, match='marks for the tables'):
        fill_in(text, dict(c=''))


def test_a_table_shows_what_is_counted(row):
    lines = make_table('V', [replace(row, recipe=Recipe(lambda: Tiny().to('meta'), (4, 8)),
                                     printed={})]).splitlines()
    assert lines[0].startswith('| model | counted | input |')
    assert lines[2].startswith('| a model | a library | 4 x 8 | 0.000 | – | – | 0.000 |')
    assert len(lines) == 3


def test_command(tmp_path, monkeypatch, row):
    """On a copy of the page, with a table of one small model."""
    page = tmp_path / 'docs' / 'tables.md'
    page.parent.mkdir()
    shutil.copy(PAGE, page)
    monkeypatch.setattr(paper_tables, 'ROOT', tmp_path)
    monkeypatch.setattr(paper_tables, 'PAGE', page)
    small = replace(row, recipe=Recipe(lambda: Tiny().to('meta'), (4, 8)), printed={})
    monkeypatch.setattr(paper_tables, 'list_rows', lambda table: [small])

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['paper_tables.py', '--only', 'V', *arguments])
        paper_tables.main()

    with pytest.raises(SystemExit, match='error: Table V of docs/tables.md is not what is count'):
        run('--check')
    run()
    run('--check')
    old, new = read_tables(PAGE.read_text()), read_tables(page.read_text())
    assert {name for name in TABLES if old[name] != new[name]} == {'V'}
    small = replace(small, printed=dict(parameters='9.0'))
    with pytest.raises(SystemExit, match='error: Table V, a model: parameters differ by -100.0 %'):
        run()
