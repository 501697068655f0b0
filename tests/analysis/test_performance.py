"""The standard table, measured at tiny size, and laid out."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from spartan_mm.analysis import performance
from spartan_mm.analysis.benchmark import Form, run_group
from spartan_mm.analysis.performance import (
    Growth,
    draw_growth,
    fill_in,
    make_tables,
    read_results,
    standard_jobs,
    write_docs,
)

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / 'docs' / 'performance.md'


def test_the_page_shows_the_results_beside_it():
    assert fill_in(DOCUMENT) == DOCUMENT.read_text(encoding='utf-8')


@pytest.mark.parametrize('kind', performance.KINDS)
def test_what_the_table_has(kind):
    jobs = {job.name: job for job in standard_jobs(kind)}
    for model in ('t', 'xt'):
        forms = jobs[f'backbone_{model}_inference'].groups[0].forms
        assert {(form.deploy, bool(form.compile), form.oracle) for form in forms} == {
            (False, False, False), (True, False, False), (False, True, False), (True, True, False),
            (False, False, True), (False, True, True)}
        assert jobs[f'backbone_{model}_training'].groups[0].workload.train
    for model in ('spartan_t', 'spartan_xt', 'r18vd', 'r34vd', 'r50vd'):
        inference, = jobs[f'detector_rtdetr_{model}_inference'].groups
        assert inference.workload.sizes == ((640, 640), )
        assert [(form.deploy, bool(form.compile)) for form in inference.forms] == [
            (False, False), (True, False), (True, True)]
        training, = jobs[f'detector_rtdetr_{model}_training'].groups
        assert training.parts and training.workload.multi_scale == (kind == 'gpu')
    assert len(jobs['growth'].groups) > 10


def test_nothing_measured():
    tables = make_tables('gpu', None)
    assert tables['gpu_machine'] == tables['gpu_growth'] == tables['gpu_input'] == '–\n'
    row = next(line for line in tables['gpu_backbones'].splitlines() if '| SpaRTAN-T |' in line)
    assert row == '| SpaRTAN-T | inference | eager | – | – | – | – | – | – |'


@pytest.fixture
def small_models(monkeypatch, user_project):
    """The arch and the config of the tests in the place of the standard ones."""
    monkeypatch.setattr(performance, 'BACKBONES', {'xt': 'SpaRTAN-XT'})
    monkeypatch.setattr(performance, 'DETECTORS',
                        {str(user_project / 'user_detector.py'): 'small detector'})


@pytest.fixture
def make_oracle():
    spec = importlib.util.spec_from_file_location('spartan_oracle',
                                                  ROOT / 'tests' / 'oracle' / 'spartan.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_oracle


def test_what_a_gpu_measures_at_tiny_size(small_models, make_oracle, tmp_path):
    results = tmp_path / 'results'
    results.mkdir()
    for job in standard_jobs('gpu', quick=True):
        measured = [run_group(group, make_oracle) for group in job.groups]
        (results / f'{job.name}.json').write_text(json.dumps(measured))
    collected = read_results(results)
    assert collected['jobs'].keys() == {job.name for job in standard_jobs('gpu')}

    page = tmp_path / 'performance.md'
    shutil.copy(DOCUMENT, page)
    write_docs(page, 'gpu', collected)
    assert (tmp_path / 'performance' / 'gpu_growth.png').stat().st_size > 10_000
    assert fill_in(page) == page.read_text(encoding='utf-8')

    tables = make_tables('gpu', collected)
    for name in ('gpu_backbones', 'gpu_detectors', 'gpu_limit'):
        rows = [line for line in tables[name].splitlines() if line.startswith('| ')][1:]
        measured = [row for row in rows if 'compiled' not in row.split('|')[3]]
        assert measured and not [row for row in measured if row.endswith('| – |')]
    assert '| backward |' in tables['gpu_parts']
    assert '](performance/gpu_growth.png)' in tables['gpu_growth']


def growth_results(sweeps):
    return [dict(workload=dict(train=True), results=[dict(
        form=dict(model='t'), batch=batch, sizes=[[side, side]],
        times=[0.01 + 1e-7 * batch * side**2] * 3, peak_memory=2**20 * batch * side**2)])
        for batch, side in sweeps]


def test_growth_is_sorted_out():
    groups = growth_results([(4, 96), (4, 128), (4, 160), (2, 128), (4, 128), (8, 128)])
    found = performance.growths(groups)
    assert [(growth.along, growth.what) for growth in found] == [
        ('pixels of an image', 'ms'), ('pixels of an image', 'peak, MiB'),
        ('images in a batch', 'ms'), ('images in a batch', 'peak, MiB')]
    assert [[x for x, _ in growth.points] for growth in found] == [
        [96**2, 128**2, 160**2], [96**2, 128**2, 160**2], [2, 4, 8], [2, 4, 8]]
    slope, start, rest = found[0].fit()
    assert (slope, start) == (pytest.approx(4e-4), pytest.approx(10.))
    assert rest < 1e-9
    assert len(draw_growth(groups).axes) == 4


def test_what_is_not_linear_shows():
    points = tuple((x, x**3) for x in (1., 2., 3., 4., 5.))
    assert Growth('', '', '', points).fit()[2] > 0.05


def test_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no results; measure first'):
        read_results(tmp_path)


def test_labels():
    assert Form('t').label == 'eager'
    assert Form('t', deploy=True, compile='default').label == 'deploy, compiled'
    assert Form('t', oracle=True, compile='reduce-overhead', channels_last=True).label == (
        'oracle, compiled (reduce-overhead), channels last')
