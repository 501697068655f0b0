"""The commands that look at data and runs, ours and those that come with mmdet and mmpretrain."""

import csv
import json
import pickle
import runpy
import shutil
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch
from PIL import Image

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


@pytest.fixture(autouse=True)
def project(user_project, tmp_path, monkeypatch):
    """Go to a copy of the user's folder."""
    shutil.copytree(user_project, tmp_path / 'project', ignore=shutil.ignore_patterns('work_dirs'))
    monkeypatch.chdir(tmp_path / 'project')


@pytest.fixture
def run_packaged(monkeypatch):
    """Run a command that comes with a package, in this process."""
    def run_tool(package, name, *arguments):
        path = Path(__import__(package).__file__).parent / '.mim' / 'tools' / name
        if not path.is_file():
            pytest.skip(f'this {package} comes without its tools')
        monkeypatch.setattr(sys, 'argv', [str(path), *arguments])
        runpy.run_path(str(path), run_name='__main__')
    return run_tool


@pytest.fixture
def detections():
    """Predictions for the user's pictures: a false alarm, two found objects and one missed."""
    found = [[(0, (50, 10, 80, 40), 0.9)], [(0, (10, 10, 40, 40), 0.8)],
             [(1, (10, 10, 40, 40), 0.7)], []]
    samples = [dict(img_id=index, img_path=f'pictures/{index}.png', pred_instances=dict(
        labels=torch.tensor([label for label, *_ in boxes], dtype=torch.long),
        bboxes=torch.tensor([box for _, box, _ in boxes]).reshape(-1, 4).float(),
        scores=torch.tensor([score for *_, score in boxes])))
        for index, boxes in enumerate(found)]
    Path('found.pkl').write_bytes(pickle.dumps(samples))
    return 'found.pkl'


@pytest.fixture
def classifications():
    """Predictions for the user's pictures: the last one is taken for a square."""
    truths = {'disc/2': 0, 'disc/3': 0, 'square/0': 1, 'square/1': 1}
    scores = [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]]
    samples = [dict(img_path=f'classes/{name}.png', gt_label=torch.tensor([truth]),
                    pred_score=torch.tensor(score), pred_label=torch.tensor([score[1] > 0.5]),
                    num_classes=2)
               for (name, truth), score in zip(truths.items(), scores, strict=True)]
    Path('classified.pkl').write_bytes(pickle.dumps(samples))
    return 'classified.pkl'


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.reader(file))


class TestConfusionMatrix:

    def test_detector(self, run_here, detections):
        output = run_here('confusion', 'user_detector.py', detections)
        assert '1 of 3 objects found (33.3 %), 1 of 3 detections right (33.3 %)' in output
        assert 'square -> missed: 1 of 3' in output
        assert read_csv('work_dirs/confusion_matrix/confusion_matrix.csv') == [
            ['true \\ predicted', 'square', 'disc', 'missed'], ['square', '1', '1', '1'],
            ['disc', '0', '0', '0'], ['no object left', '1', '0', '0']]
        with Image.open('work_dirs/confusion_matrix/confusion_matrix.png') as image:
            assert image.width > 300

    def test_classifier(self, run_here, classifications):
        output = run_here('confusion', 'user_classifier.py', classifications,
                          '--out-dir', 'elsewhere')
        assert '3 of 4 right (75.00 %)' in output and 'disc -> square: 1 of 2' in output
        assert read_csv('elsewhere/confusion_matrix.csv')[1:] == [
            ['disc', '1', '1'], ['square', '0', '2']]


@pytest.mark.parametrize('command', ['confusion', 'errors'])
class TestFilesOfBoth:

    @pytest.mark.parametrize('config, predictions, status, message', [
        ('none.py', 'found.pkl', 2, 'error: config none.py does not exist'),
        ('user_detector.py', 'none.pkl', 1, 'error: predictions none.pkl do not exist'),
        ('user_classifier.py', 'found.pkl', 2, 'error: found.pkl holds no predictions of a classi'),
        ('user_detector.py', 'part.pkl', 2, 'error: there is no prediction for image 3'),
    ])
    def test_mistakes(self, fail_here, detections, command, config, predictions, status, message):
        Path('part.pkl').write_bytes(pickle.dumps(pickle.loads(Path(detections).read_bytes())[:3]))
        said, code = fail_here(command, config, predictions)
        assert said.startswith(message) and code == status

    @pytest.mark.parametrize('score', ['1.5', '-0.1', 'nan', 'high'])
    def test_a_score_that_is_none(self, fail_here, command, score):
        said, code = fail_here(command, 'user_detector.py', 'a.pkl', f'--score-thr={score}')
        assert code == 2 and f'{score} must be a number from 0 to 1' in said

    def test_damaged_predictions(self, fail_here, detections, command):
        torch.save(dict(state_dict={}), 'found.pth')
        Path('half.pkl').write_bytes(Path(detections).read_bytes()[:100])
        for name in ('found.pth', 'half.pkl'):
            said, _ = fail_here(command, 'user_detector.py', name)
            assert said.startswith(f'error: {name} cannot be read as predictions (')
            assert said.endswith('make it with `spartan-mm test CONFIG CHECKPOINT --out FILE.pkl`')

    @pytest.mark.parametrize('place', ['pictures/1.png', 'pictures/1.png/deeper'])
    def test_no_place(self, fail_here, detections, command, place):
        said, _ = fail_here(command, 'user_detector.py', detections, '--out-dir', place)
        assert said.startswith('error: ') and '1.png is a file, not a folder' in said


class TestWorstErrors:

    def test_detector(self, run_here, detections):
        output = run_here('errors', 'user_detector.py', detections, '--number', 3)
        assert 'missed: 1\nbackground: 1\nclass: 1\nlocation: 0\n' in output
        errors = json.loads(Path('work_dirs/worst_errors/errors.json').read_text())
        assert [(Path(error['file']).name, error['kind']) for error in errors] == [
            ('3.png', 'missed'), ('0.png', 'background'), ('2.png', 'class')]
        with Image.open('work_dirs/worst_errors/errors.png') as image:
            assert image.height > 3 * 180

    def test_classifier(self, run_here, classifications):
        output = run_here('errors', 'user_classifier.py', classifications)
        assert '1 of 4 misclassified' in output
        assert json.loads(Path('work_dirs/worst_errors/mistakes.json').read_text()) == [
            dict(file='classes/disc/3.png', true_class='disc', predicted_class='square', score=0.8)]
        assert Path('work_dirs/worst_errors/mistakes.png').is_file()


class TestBrowseDataset:

    def test_stages(self, run_here):
        run_here('browse', 'user_detector.py', '--stage', 'original', 'model',
                 '--number', 3, '--columns', 3, '--side', 100)
        assert {path.name for path in Path('work_dirs/browse_dataset').iterdir()} == {
            'train_original.png', 'train_model.png'}
        with Image.open('work_dirs/browse_dataset/train_model.png') as image:
            assert image.width == 3 * 112 + 12

    def test_mistakes(self, fail_here):
        assert fail_here('browse', 'none.py')[0].startswith('error: config none.py does not')
        said, _ = fail_here('browse', 'user_detector.py', '--out-dir', 'pictures/1.png')
        assert said.startswith('error: ') and '1.png is a file, not a folder' in said
        Path('pictures/1.png').write_text('no picture')
        said, _ = fail_here('browse', 'user_detector.py', '--stage', 'original')
        assert said.startswith('error: ') and 'pictures/1.png' in said
        shutil.rmtree('pictures')
        said, _ = fail_here('browse', 'user_detector.py')
        assert said.startswith('error: ') and 'pictures/annotations.json' in said


class TestCheckData:

    def test_sound(self, run_here):
        output = run_here('check-data', 'user_detector.py', '--decode', '--workers', 1, '--out',
                          'out')
        assert '4 images, 3 objects of 2 classes' in output
        assert '0 errors, ' in output and output.endswith('see out\n')
        report = json.loads(Path('out/report.json').read_text(encoding='utf-8'))
        assert report['errors'] == 0 and report['datasets'][0]['objects'] == 3
        for name in ('classes.png', 'box_sizes.png'):
            with Image.open(Path('out', name)) as image:
                assert image.width > 400

    def test_faults(self, run_here):
        Path('pictures/2.png').write_text('no picture')
        output = run_here('check-data', 'user_detector.py', '--decode', '--workers', 1, '--split',
                          'train', '--out-dir', 'out', status=1)
        assert '  error: ' in output and '2.png' in output and '1 errors, ' in output
        assert Path('out/suspects_train_0.png').is_file()

    def test_mistakes(self, fail_here):
        said, code = fail_here('check-data', 'user_detector.py', '--workers', 0)
        assert code == 2 and '0 must be a whole number, at least 1' in said
        said, code = fail_here('check-data', 'user_detector.py', '--split', 'test',
                               '--cfg-options', 'test_dataloader=None')
        assert said == 'error: user_detector.py has no dataloader for test' and code == 2


class TestPlotCurves:

    @pytest.fixture
    def runs(self):
        for name, factor in (('first', 1), ('second', 2)):
            path = Path(name, '20200101_000000', 'vis_data', 'scalars.json')
            path.parent.mkdir(parents=True)
            records = [dict(lr=1e-3, loss=factor / step, loss_cls=factor / step, step=step, epoch=1,
                            time=0.5) for step in (1, 2)]
            records.append({'coco/bbox_mAP': 0.1 * factor, 'coco/bbox_mAP_s': 0.1, 'step': 1})
            path.write_text(''.join(json.dumps(record) + '\n' for record in records))

    @pytest.mark.parametrize('arguments', [
        ['first'], ['first', 'second', '--names', 'a', 'b', '--x', 'hours'],
        ['first', 'second/20200101_000000', '--metrics', 'coco/bbox_mAP_s']])
    def test_curves(self, runs, run_here, arguments):
        assert 'see out/curves.png' in run_here('curves', *arguments, '--out', 'out/curves.png')
        with Image.open('out/curves.png') as image:
            assert image.width == 1500

    @pytest.mark.parametrize('arguments, message', [
        (['nowhere'], 'error: nowhere does not exist'),
        (['.'], 'error: . has no log of a training'),
        (['first', 'found.pkl'], 'error: found.pkl is no record of a training ('),
        (['first', '--out', 'pictures/1.png/a.png'],
         'error: pictures/1.png/a.png cannot be written: '),
        (['first', 'empty.json'], 'error: empty.json is empty: the run ended before it logged'),
        (['first', '--metrics', 'AP'],
         'error: no validation has AP; there is coco/bbox_mAP, coco/bbox_mAP_s'),
    ])
    def test_mistakes(self, runs, fail_here, arguments, message):
        Path('empty.json').touch()
        Path('found.pkl').write_bytes(b'\x80\x04')
        assert fail_here('curves', *arguments)[0].startswith(message)

    @pytest.mark.parametrize('arguments, message', [
        (['first', 'second', '--names', 'a'], 'there are 2 runs, but 1 names'),
        (['first', 'second', '--names', 'a', 'a'], 'two runs have the same name'),
        (['first', '--out', 'curves.doc'], 'the name must end in .png, .svg or .pdf'),
    ])
    def test_wrong_flags(self, runs, fail_here, arguments, message):
        said, code = fail_here('curves', *arguments)
        assert message in said and code == 2


@pytest.mark.parametrize('tool, arguments, status', [
    ('check_dataset.py', ['user_detector.py', '--out', 'out'], 0),
    ('report.py', ['nowhere', '--images', '3'], 1),
    ('analysis_tools/browse_dataset.py', ['user_detector.py', '--number', '1', '--side', '90'], 0),
    ('analysis_tools/plot_curves.py', ['nowhere'], 1),
    ('analysis_tools/worst_errors.py', ['none.py', 'none.pkl', '--number', '3'], 2),
    ('analysis_tools/confusion_matrix.py', ['none.py', 'none.pkl'], 2),
])
def test_tools_of_old_names(monkeypatch, capsys, tool, arguments, status):
    """Commands under tools/ are the same, with their old flags."""
    monkeypatch.setattr(sys, 'argv', [tool, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOLS / tool), run_name='__main__')
    code = stopped.value.code
    said, code = (code, 1) if isinstance(code, str) else (capsys.readouterr().err, code)
    assert code == status
    assert not status or said.startswith('error: ') and arguments[0] in said


class TestPackagedTools:
    """What mmdet's and mmpretrain's own commands do with our configs and files."""

    def test_mmdets_browsing(self, run_packaged):
        run_packaged('mmdet', 'analysis_tools/browse_dataset.py', 'user_detector.py',
                 '--not-show', '--output-dir', 'out', '--cfg-options', 'visualizer.name=browsing')
        assert len(list(Path('out').glob('*.png'))) == 4

    def test_mmpretrains_browsing(self, run_packaged):
        run_packaged('mmpretrain', 'visualization/browse_dataset.py', 'user_classifier.py',
                 '--not-show', '--output-dir', 'out', '--mode', 'pipeline', '--show-number', '2',
                 '--cfg-options', 'visualizer.type=UniversalVisualizer')
        assert len(list(Path('out').glob('*.png'))) == 2

    @pytest.mark.slow
    def test_mmdets_ranking_of_pictures(self, run_packaged, detections, monkeypatch):
        # It forks four processes for each picture, which takes seconds with all that is loaded.
        monkeypatch.setattr('multiprocessing.Pool', ThreadPool)
        monkeypatch.setattr('mmdet.evaluation.functional.mean_ap.Pool', ThreadPool)
        Path('two.pkl').write_bytes(pickle.dumps(pickle.loads(Path(detections).read_bytes())[1:3]))
        run_packaged('mmdet', 'analysis_tools/analyze_results.py', 'user_detector.py',
                 'two.pkl', 'out', '--topk', '1', '--cfg-options',
                 'test_dataloader.dataset.indices=[1,2]')
        assert len(list(Path('out').glob('*/*.png'))) == 2

    def test_mmdets_confusion_matrix(self, run_packaged, detections):
        run_packaged('mmdet', 'analysis_tools/confusion_matrix.py', 'user_detector.py',
                 detections, 'out')
        assert Path('out/confusion_matrix.png').is_file()

    def test_mmpretrains_confusion_matrix(self, run_packaged, classifications):
        run_packaged('mmpretrain', 'analysis_tools/confusion_matrix.py',
                 'user_classifier.py', classifications, '--out', 'matrix.pkl')
        assert pickle.loads(Path('matrix.pkl').read_bytes()).tolist() == [[1, 1], [0, 2]]
