"""The commands that count, measure and compare, and the tools that they were."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from spartan_mm.analysis import input_speed
from spartan_mm.cli import make_parser

TOOLS = Path(__file__).resolve().parents[2] / 'tools' / 'analysis_tools'


class TestBenchmark:

    def test_beside_the_authors_code(self, run, tmp_path):
        output = run('benchmark', 'user_classifier.py', '--train', '--batch-size', 2, '--device',
                     'cpu', '--rounds', 2, '--against', 'authors', '--channels-last', '--json',
                     tmp_path / 'out.json')
        rows = [line for line in output.splitlines() if line.startswith('| user_classifier |')]
        assert ['channels last' in row for row in rows] == [True, False]
        assert ["| authors' code |" in row for row in rows] == [False, True]
        results = json.loads((tmp_path / 'out.json').read_text())['results']
        assert [len(result['times']) for result in results] == [2, 2]

    def test_beside_another_model(self, run):
        output = run('benchmark', 'user_detector.py', '--device', 'cpu', '--rounds', 1, '--against',
                     'user_classifier.py', '--size', 64)
        assert '| user_detector | eager | inference | 1 | 64×64 |' in output
        assert '| user_classifier | eager | inference | 1 | 64×64 |' in output

    def test_count(self, run, tmp_path):
        output = run('benchmark', 'user_classifier.py', '--train', '--size', 32, 32, '--count',
                     '--against', 'authors', '--json', tmp_path / 'out.json')
        name = 'user_classifier'
        assert (f"| operation | {name}, eager: kernels | {name}, eager: GB | {name}, "
                "authors' code: ker") in output
        assert '\n| total | ' in output and '\n| convolution | ' in output
        counts = json.loads((tmp_path / 'out.json').read_text())
        assert list(counts) == [f'{name}, eager', f"{name}, authors' code"]

    def test_pipeline(self, run, monkeypatch):
        monkeypatch.setattr(input_speed.measure_input, '__defaults__', (0, 0.2, 4))
        output = run('benchmark', 'user_detector.py', '--data', '--workers', 0)
        assert '| user_detector | pictures/annotations.json |' in output
        assert '| 3 Resize |' in output


def test_flops(run, tmp_path):
    path = tmp_path / 'a.json'
    output = run('flops', 'xt', '--size', 64, '--deploy', '--depth', 1, '--json', path)
    assert '| training form | 64 x 64 | 2,029,792 |' in output
    assert 'deploy form, module by module' in output and '\n  stages (ModuleList)' in output
    forms = json.loads(path.read_text())
    assert [form['form'] for form in forms] == ['training form', 'deploy form']
    assert forms[0]['modules']['']['parameters'] == 2029792


def test_compare(run, tmp_path):
    output = run('compare', 'spartan_xt', 'timm:test_resnet', '--names', 'ours', 'small',
                 '--accuracy', 'timm:test_resnet=50.5', '--no-times', '--size', 64, '--out-dir',
                 tmp_path)
    assert '| ours | spartan_mm | training form | 64 x 64 | 2.22 |' in output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'compare.csv', 'compare.md', 'compare.png']
    assert (tmp_path / 'compare.md').read_text() in output and 'took turns' not in output


def test_models_that_cannot_be_compared(run, tmp_path):
    message = run('compare', 'timm:vit_tiny_patch16_224', '--no-times', '--size', 9, '--out-dir',
                  tmp_path, status=1)
    assert message.startswith('error: 1 of 1 models could not be run: timm:vit_tiny_patch16_224 '
                              'cannot be run')


@pytest.mark.parametrize('arguments, message', [
    (['flops', 'none.py'], 'error: config none.py does not exist'),
    (['compare', 'xt', 'spartan-t', '--no-times'], "error: there is no model 'spartan-t'"),
    (['compare', 'xt', '--no-times', '--accuracy', 't=3'], 'error: an accuracy is given for t,'),
    (['benchmark', 'none.py'], 'error: config none.py does not exist'),
    (['benchmark', 'xt', '--train', '--deploy'], 'error: the deploy form cannot be trained'),
    (['benchmark', 'xt', '--count', '--amp', 'float16'], 'error: kernels are counted in float32'),
    (['benchmark', 'xt', '--parts'], 'error: parts are those of a training step'),
    (['compare', 'xt', '--accuracy', 'xt'], "'xt' is no MODEL=PERCENT"),
    (['compare', 'xt', '--batch-size', '0'], '0 must be a whole number, at least 1'),
    (['compare', 'xt', 't', '--names', 'a'], '--names: 1 names for 2 models'),
    (['benchmark', 'xt', '--against-deploy'], 'say how --against CONFIG runs'),
    (['benchmark', 'xt', '--threads', '0'], '0 must be a whole number, at least 1'),
])
def test_mistakes(run, arguments, message):
    assert message in run(*arguments, status=2)


@pytest.mark.parametrize('arguments, message', [
    (['flops', 'timm:resnet18', '--deploy'], 'error: ResNet has no deploy form'),
    (['flops', 'xt', '--json', 'pictures/0.png/a.json'], 'a.json cannot be written: '),
    (['compare', 'xt', '--out-dir', 'pictures/0.png'], 'compare.md cannot be written: '),
])
def test_what_cannot_be_done(run, arguments, message):
    assert message in run(*arguments, status=1)


# ---- the tools -----------------------------------------------------------------------------------

WORDS = dict(compare='compare', get_flops='flops', benchmark='benchmark', grad_cam='cam',
             effective_receptive_field='receptive-field', interaction_order='interactions',
             spectra='spectra')


@pytest.mark.parametrize('tool', WORDS)
def test_tools_are_the_commands(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [tool, '--help'])
    with pytest.raises(SystemExit, match='0'):
        runpy.run_path(str(TOOLS / f'{tool}.py'), run_name='__main__')
    assert capsys.readouterr().out.startswith(f'usage: spartan-mm {WORDS[tool]} ')


@pytest.mark.slow
def test_a_tool_in_a_process_of_its_own(user_project):
    done = subprocess.run([sys.executable, TOOLS / 'plot_curves.py', 'nowhere'],
                          cwd=user_project, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == 'error: nowhere does not exist'


@pytest.mark.parametrize('command, flags, expected', [
    ('compare', '--shape 64 96 --batch 2', dict(size=(64, 96), batch_size=2)),
    ('flops', '--shape 64 96', dict(size=(64, 96))),
    ('benchmark', '--batch 2 --repeats 3', dict(batch_size=2, rounds=3)),
    ('receptive-field', 'model --num-images 3', dict(images=3)),
    ('interactions', 'model --num-images 3', dict(images=3)),
    ('spectra', 'model --num-images 3', dict(images=3)),
])
def test_older_names_of_flags(command, flags, expected):
    args = vars(make_parser(command).parse_args(['first', *flags.split()]))
    assert {name: args[name] for name in expected} == expected
