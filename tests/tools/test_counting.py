"""The commands that count and compare, run as a user runs them."""

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools' / 'analysis_tools'


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in this process, which spares the imports; return what it printed."""
    monkeypatch.chdir(tmp_path)

    def run_tool(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, arguments)])
        runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
        return capsys.readouterr().out
    return run_tool


def test_get_flops(run):
    output = run('get_flops', 'xt', '--shape', 64, 64, '--deploy', '--depth', 1, '--json', 'a.json')
    assert '| training form | 64 x 64 | 2,029,792 |' in output
    assert 'deploy form, module by module' in output and '\n  stages (ModuleList)' in output
    forms = json.loads(Path('a.json').read_text())
    assert [form['form'] for form in forms] == ['training form', 'deploy form']
    assert forms[0]['modules']['']['parameters'] == 2029792


def test_compare(run):
    output = run('compare', 'spartan_xt', 'timm:test_resnet', '--names', 'ours', 'small',
                 '--accuracy', 'timm:test_resnet=50.5', '--no-times', '--out-dir', 'out')
    assert '| ours | spartan_mm | training form | 256 x 256 | 2.22 |' in output
    assert sorted(path.name for path in Path('out').iterdir()) == [
        'compare.csv', 'compare.md', 'compare.png']
    assert Path('out/compare.md').read_text() in output and 'took turns' not in output


@pytest.mark.parametrize('tool, arguments, message', [
    ('get_flops', ['none.py'], 'error: config none.py does not exist'),
    ('get_flops', ['timm:resnet18', '--deploy'], 'error: ResNet has no deploy form'),
    ('compare', ['xt', 'spartan-t', '--no-times'], "error: there is no model 'spartan-t'"),
    ('get_flops', ['xt', '--json', 'file/a.json'], 'error: file/a.json cannot be written: '),
    ('compare', ['xt', '--out-dir', 'file'], 'error: file/compare.md cannot be written: '),
    ('compare', ['xt', '--batch', '0', '--device', 'cpu'], 'error: batch 0 must be at least 1'),
    ('compare', ['xt', '--no-times', '--accuracy', 't=3'], 'error: an accuracy is given for t,'),
    ('compare', ['timm:vit_tiny_patch16_224', '--no-times', '--shape', '9', '9'],
     'error: 1 of 1 models could not be run: timm:vit_tiny_patch16_224 cannot be run'),
])
def test_mistakes(run, tool, arguments, message):
    Path('file').touch()
    with pytest.raises(SystemExit) as stopped:
        run(tool, *arguments)
    assert str(stopped.value.code).startswith(message)


def test_unreadable_accuracy(run, capsys):
    with pytest.raises(SystemExit):
        run('compare', 'xt', '--accuracy', 'xt')
    assert "'xt' is no MODEL=PERCENT" in capsys.readouterr().err
