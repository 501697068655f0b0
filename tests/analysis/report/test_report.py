"""A report shows what a run has left, and says what is missing."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from spartan_mm.analysis.report import report
from spartan_mm.analysis.report.report import make_report
from spartan_mm.analysis.report.work_dir import Run, make_predictions
from spartan_mm.cli import main
from spartan_mm.zoo import get_model

CLASSES = ('square', 'disc')
SYSTEM = """2026/01/02 10:00:00 - mmengine - INFO -
------------------------------------------------------------
System environment:
    sys.platform: linux
    GPU 0: <b>Fast & new</b>
    PyTorch compiling details: PyTorch built with:
  - GCC 13.3

Runtime environment:
    seed: 42
------------------------------------------------------------
2026/01/02 10:00:01 - mmengine - INFO - Config:
    not: this
2026/01/02 11:30:00 - mmengine - INFO - Epoch(train)
"""


def write_run(folder, kind, metric, epochs=2):
    """Write what a training of a user's config leaves, in the folder of the user."""
    vis_data = folder / '20260102_100000' / 'vis_data'
    vis_data.mkdir(parents=True)
    config = Path(f'user_{kind}.py').read_text() + '\ntrain_cfg.update(max_epochs=2)\n'
    for path in (vis_data / 'config.py', folder / f'user_{kind}.py'):
        path.write_text(config)
    records = [dict(lr=0.1, loss=float(9 - step), loss_cls=1., time=1., epoch=step // 2 + 1,
                    step=step + 1, memory=100 * step) for step in range(2 * epochs)]
    records += [{metric: 0.25 * epoch, 'step': epoch} for epoch in range(1, epochs + 1)]
    (vis_data / 'scalars.json').write_text(''.join(f'{json.dumps(record)}\n' for record in records))
    (vis_data.parent / '20260102_100000.log').write_text(SYSTEM)
    (folder / f'epoch_{epochs}.pth').write_bytes(b'weights')
    (folder / 'last_checkpoint').write_text(f'/elsewhere/epoch_{epochs}.pth')
    return folder


def write_detections(path):
    """Find all squares but one, which is called a disc."""
    samples = []
    for image in range(4):
        count = min(image, 1)
        samples.append(dict(img_id=image, ori_shape=(48, 96), pred_instances=dict(
            bboxes=torch.tensor([[10., 10, 40, 40]] * count).reshape(-1, 4),
            labels=torch.tensor([int(image == 3)] * count, dtype=torch.long),
            scores=torch.tensor([0.9] * count))))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(samples))


@pytest.fixture
def user(user_project, monkeypatch):
    monkeypatch.chdir(user_project)


@pytest.fixture
def detector(user, tmp_path):
    return write_run(tmp_path / 'run', 'detector', 'coco/bbox_mAP')


@pytest.fixture
def no_curves(monkeypatch):
    """Leaves out what takes most of the time, and is drawn in other tests."""
    monkeypatch.setattr(report, 'draw_panels', lambda log: [])


@pytest.fixture
def render(read_self_contained):
    """Makes a report; returns its HTML and the lines that say what is missing."""
    def render(folder, **options):
        html = make_report(Run(folder), **options).render()
        read_self_contained(html)
        return html, [line.partition('">')[2].removesuffix('</p>') for line in html.splitlines()
                      if line.startswith('<p class="missing">')]
    return render


@pytest.mark.slow
def test_detector(detector, render):
    write_detections(detector / 'evaluation' / 'predictions.pkl')
    html, missing = render(detector, images=3)
    assert not missing
    # Two of three squares, each found before the false alarm.
    ap = f'{67 / 101:.3f}'
    assert f'<li><b>{ap}</b><span>AP</span></li>' in html
    assert f'<td>square</td><td>3</td><td>{ap}</td>' in html
    assert '<td>disc</td><td>0</td><td>–</td>' in html
    assert '4 images, 3 objects, 3 detections of any score' in html
    assert html.count('annotated: ') == html.count('detected: ') == 3
    assert '<td>wrong class: a detection of the right place</td><td>1</td>' in html
    for title in ('Results', 'Curves', 'Classes', 'Precision and recall', 'Environment', 'Config'):
        assert f'<h2>{title}</h2>' in html
    # The best validation stands out.
    assert '<tr class="marked"><td>2</td><td>0.500</td></tr>' in html
    assert 'finished, 2 epochs' in html and '1 h 30 min' in html and '300 MB at most' in html
    assert '<td>epoch_2.pth</td><td>last</td>' in html
    assert '&lt;b&gt;Fast &amp; new&lt;/b&gt;' in html and '<dt>seed</dt><dd>42</dd>' in html
    assert 'GCC 13.3' not in html and '<dt>not</dt>' not in html
    assert 'custom_imports' in html


def test_training_in_progress(user, tmp_path, render, no_curves):
    folder = write_run(tmp_path / 'run', 'detector', 'coco/bbox_mAP', epochs=1)
    html, missing = render(folder)
    assert 'unfinished, epoch 1 of 2' in html and '<b>0.250</b><span>AP, last validation' in html
    assert len(missing) == 6 and set(missing) == {
        f'no predictions in {folder}: `spartan-mm report {folder} --test` makes them'}


def test_hardly_anything_left(detector, render, no_curves):
    for path in [*detector.glob('*.p*'), detector / 'last_checkpoint',
                 *detector.glob('*/*.log'), *detector.glob('*/*/config.py')]:
        path.unlink()
    html, missing = render(detector)
    assert '<h1>run</h1>' in html and '<h2>Curves</h2>' in html
    assert [line.partition(': ')[0].partition(' in ')[0] for line in missing] == [
        'no predictions', 'no text log beside ' + str(Run(detector).log_path)
        + ' that describes the machine', 'no checkpoint', f'{detector} has no config']


def test_missing_pictures(detector, monkeypatch, render, no_curves):
    write_detections(detector / 'predictions.pkl')
    monkeypatch.chdir(detector)
    _, missing = render(detector)
    assert len(missing) == 6 and 'annotations.json' in missing[0]
    assert 'does not exist here: run this in the folder that the training was started in' in (
        missing[0])


def test_damaged_predictions(detector, render, no_curves):
    write_detections(detector / 'predictions.pkl')
    path = detector / 'predictions.pkl'
    path.write_bytes(path.read_bytes()[:-20])
    _, missing = render(detector)
    assert len(missing) == 6 and f'{path} cannot be read as ' in missing[0]
    with pytest.raises(ValueError, match='predictions.pkl cannot be read'):
        render(detector, predictions=path)


def test_predictions_older_than_the_checkpoint(detector):
    path = detector / 'predictions.pkl'
    write_detections(path)
    os.utime(path, (1, 1))
    text = make_report(Run(detector)).show_measured()[-1].text
    assert 'predictions: predictions.pkl, which are older than epoch_2.pth' in text


def test_classifier(user, tmp_path, render):
    folder = write_run(tmp_path / 'run', 'classifier', 'accuracy/top1')
    # In the order of the folders: discs, then squares; one of each four is wrong.
    paths = sorted(Path('classes').glob('*/*.png'))
    right = [0.9, 0.2, 0.8, 0.7]
    samples = [dict(img_path=str(path), gt_label=torch.tensor([int(index > 1)]),
                    pred_score=torch.tensor([share, 1 - share] if index < 2 else [1 - share, share])
                    ) for index, (path, share) in enumerate(zip(paths, right, strict=True))]
    (folder / 'any name.pkl').write_bytes(pickle.dumps(samples))
    html, missing = render(folder)
    assert not missing
    assert '<li><b>75.00 %</b><span>top-1</span></li>' in html and 'top-5</span>' not in html
    assert '<tr><td>disc</td><td>2</td><td>1</td><td>50.0 %</td></tr>' in html
    assert '1 of 4 misclassified, the most confident first' in html
    assert '<span>is disc (0.20)</span><span>taken for square (0.80)</span>' in html


@pytest.mark.slow
def test_predictions_are_made(detector):
    model = get_model(Run(detector).config)
    torch.save(dict(meta=dict(dataset_meta=dict(classes=CLASSES)), state_dict=model.state_dict()),
               detector / 'epoch_2.pth')
    run = Run(detector)
    path = make_predictions(run)
    assert path == detector / 'evaluation' / 'predictions.pkl'
    assert '80 detections of any score' in make_report(run).show_measured()[-1].text


def test_command(detector, capsys):
    out = detector / 'here.html'
    assert main(['report', str(detector), '--out', str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f'{out} (0.')
    assert out.read_text(encoding='utf-8').startswith('<!DOCTYPE html>')


@pytest.mark.parametrize('damage, arguments, message', [
    (None, ['{}/nowhere'], 'nowhere is no folder: name the work dir of a training'),
    ('log', ['{}'], 'has no log of a training'),
    ('empty', ['{}'], 'scalars.json is empty: the run ended before it logged an iteration'),
    (None, ['{}', '--predictions', 'none.pkl'], 'predictions none.pkl do not exist'),
    (None, ['{}', '--predictions', 'user_detector.py'], 'user_detector.py'),
    ('weights', ['{}', '--test'], 'has no checkpoint to make predictions with'),
    (None, ['{}', '--out', 'pictures'], 'pictures cannot be written: it is a folder'),
])
def test_errors(damage, arguments, message, detector, capsys):
    [log] = detector.glob('*/vis_data/scalars.json')
    if damage == 'log':
        log.unlink()
    elif damage == 'empty':
        log.write_text('')
    elif damage == 'weights':
        (detector / 'epoch_2.pth').unlink()
    try:
        assert main(['report', *(argument.format(detector) for argument in arguments)]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
    except SystemExit as stopped:
        said = stopped.code
    assert said.startswith('error: ') and message in said and '\n' not in said
