"""The standard table, measured at tiny size, and laid out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import performance_docs
import pytest
from performance_docs import (
    Growth,
    draw_growth,
    fill_in,
    make_tables,
    read_results,
    standard_jobs,
    write_docs,
)

from spartan_mm.analysis import roofline
from spartan_mm.analysis.benchmark import Form, run_group

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / 'docs' / 'performance.md'


def test_the_page_shows_the_results_beside_it():
    assert fill_in(DOCUMENT) == DOCUMENT.read_text(encoding='utf-8')


LABELS = {
    'cpu': [['eager', 'deploy', 'deploy, compiled', "authors' code", "authors' code, compiled"],
            ['eager', 'fused', 'compiled', "authors' code", "authors' code, compiled"]],
    'gpu': [['eager', 'channels last', 'deploy', 'deploy, channels last',
             'deploy, compiled, channels last', "authors' code", "authors' code, compiled"],
            ['eager', 'channels last', 'compiled, channels last', "authors' code",
             "authors' code, compiled"]],
}


@pytest.mark.parametrize('kind', performance_docs.KINDS)
def test_what_the_table_has(kind):
    jobs = {job.name: job for job in standard_jobs(kind)}
    for model in ('t', 'xt'):
        inference, = jobs[f'backbone_{model}_inference'].groups
        training, = jobs[f'backbone_{model}_training'].groups
        labels = [[form.label for form in group.forms] for group in (inference, training)]
        assert labels == LABELS[kind] and training.workload.train
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
    assert tables.pop('gpu_machine') == (
        'Not measured yet; on a machine with a GPU: `make benchmark ARGS="--kind gpu --docs"`.\n')
    assert not any(tables.values())


@pytest.fixture
def small_models(monkeypatch, user_project):
    """The arch and the config of the tests in the place of the standard ones."""
    # Products of matrices in bfloat16 take minutes on a CPU that doesn't know it.
    monkeypatch.setitem(roofline._SIDE, 'cpu', 256)
    monkeypatch.setitem(roofline._COPIED, 'cpu', 2**22)
    monkeypatch.setattr(performance_docs, '_QUICK_SIZE', 32)
    monkeypatch.setattr(performance_docs, 'BACKBONES', {'xt': 'SpaRTAN-XT'})
    monkeypatch.setattr(performance_docs, 'DETECTORS',
                        {str(user_project / 'user_detector.py'): 'small detector'})


@pytest.mark.slow
def test_what_a_gpu_measures_at_tiny_size(small_models, tmp_path):
    results = tmp_path / 'results'
    results.mkdir()
    for job in standard_jobs('gpu', quick=True):
        measured = [run_group(group) for group in job.groups]
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
        assert rows and not [row for row in rows if row.endswith('| – |') or 'compiled' in row]
    assert '| backward |' in tables['gpu_parts']
    assert '](performance/gpu_growth.png)' in tables['gpu_growth']


def growth_results(sweeps):
    return [dict(workload=dict(train=True), results=[dict(
        form=dict(model='t'), batch=batch, sizes=[[side, side]],
        times=[0.01 + 1e-7 * batch * side**2] * 3, peak_memory=2**20 * batch * side**2)])
        for batch, side in sweeps]


def test_growth_is_sorted_out():
    groups = growth_results([(4, 96), (4, 128), (4, 160), (2, 128), (4, 128), (8, 128)])
    found = performance_docs.growths(groups)
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
    assert Form('t', deploy=True, fused=True, compile='default').label == 'deploy, fused, compiled'
    assert Form('t', authors=True, compile='reduce-overhead', channels_last=True).label == (
        "authors' code, compiled (reduce-overhead), channels last")


@pytest.mark.slow
def test_command(tmp_path):
    """A job is measured in a process of its own, and laid out; the others are not measured yet."""
    environment = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    done = subprocess.run([sys.executable, performance_docs.__file__, '--quick', '--only', 'growth',
                           '--out-dir', tmp_path], env=environment, text=True, cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert '[1/1] growth' in done.stdout
    assert {'growth.json', 'growth.png', 'tables.md'} <= set(os.listdir(tmp_path))
    assert len(json.loads((tmp_path / 'growth.json').read_text())) == 4


@pytest.mark.parametrize('arguments, message', [
    (['--only', 'none'], 'error: --only none is none of backbone_xt_inference'),
    (['--no-measuring', '--out-dir', 'nowhere'], 'error: nowhere holds no results; measure first'),
    (['--quick', '--docs'], 'error: what --quick measures is not for --docs'),
])
def test_mistakes(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['performance_docs.py', *arguments])
    with pytest.raises(SystemExit) as stopped:
        performance_docs.main()
    assert str(stopped.value.code).startswith(message)
