"""``spartan-mm``: its overview, its statuses, and that its commands have one vocabulary."""
import shutil

import pytest
import torch
from PIL import Image

import spartan_mm
from spartan_mm import cli
from spartan_mm.errors import UsageError


@pytest.mark.parametrize('argv', [[], ['--help'], ['-h']])
def test_overview_names_every_command(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for name, text in cli.COMMANDS.items():
        assert f'  {name} ' in printed and text in printed


def test_unknown_command_lists_those_that_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(['trian'])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert 'trian' in printed and 'train' in printed


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, '--help'])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f'\n    spartan-mm {name}' in printed


#: Second names, which OpenMMLab's tools have or ours had.
OLDER = {'--out-dir': {'--out'}, '--images': {'--num-images', '--number'}, '--size': {'--shape'},
         '--batch-size': {'--batch'}, '--rounds': {'--repeats'}}


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_flags_have_the_names_of_the_vocabulary(name):
    for action in cli.make_parser(name)._actions:
        for flag, older in OLDER.items():
            if flag in action.option_strings:
                assert action.option_strings[0] == flag
            elif action.type is not None and name not in ('report', 'curves', 'test'):
                assert not older & set(action.option_strings), action.option_strings


@pytest.mark.parametrize('command, words, expected', [
    ('flops', '--size 640 CONFIG', dict(size=(640, 640), config='CONFIG')),
    ('flops', '--size 640 480 CONFIG', dict(size=(640, 480), config='CONFIG')),
    ('flops', '--shape 640x480 CONFIG', dict(size=(640, 480), config='CONFIG')),
    ('flops', 'CONFIG --size=320', dict(size=(320, 320), config='CONFIG')),
    ('flops', '--size 64 -- CONFIG', dict(size=(64, 64), config='CONFIG')),
    ('train', '--cfg-options a=1 b.c=2 CONFIG --cfg-options d=x',
     dict(cfg_options={'a': 1, 'b.c': 2, 'd': 'x'}, config='CONFIG')),
    ('browse', '--stage original model CONFIG', dict(stage=['original', 'model'], config='CONFIG')),
    ('check-data', '--split val CONFIG', dict(split=['val'], config='CONFIG')),
    ('compare', '--accuracy a=50 --size 32 a b=b.pth', dict(accuracy=[('a', 50.)], size=(32, 32),
                                                           models=['a', 'b=b.pth'])),
    ('interactions', '--orders 0.1 0.5 IN MODEL', dict(orders=[0.1, 0.5], input='IN'))])
def test_flags_of_many_values_leave_what_follows(command, words, expected):
    args = vars(cli.make_parser(command).parse_args(words.split()))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize('size', ['CONFIG', '0', '1 2 3', '64x', '3x4 5', '-4'])
def test_sizes_that_are_none(size, capsys):
    with pytest.raises(SystemExit):
        cli.make_parser('flops').parse_args(f'--size {size} CONFIG'.split())
    assert 'error: ' in capsys.readouterr().err


def test_errors_of_flags_are_printable(capsys):
    with pytest.raises(SystemExit):
        cli.main(['flops', 'CONFIG', '--size', '\x1b[2J'])
    printed = capsys.readouterr().err
    assert r'\x1b[2J' in printed and '\x1b' not in printed


def test_list(capsys):
    assert cli.main(['list', 'rtdetr_spartan_?']) == 0
    assert capsys.readouterr().out.split() == ['rtdetr_spartan_t', 'detection']
    assert cli.main(['list', 'no_such_*']) == 1
    assert capsys.readouterr().err == "error: no model's name matches 'no_such_*'\n"


@pytest.mark.parametrize('error, status, message', [
    (UsageError('no such thing'), 2, 'error: no such thing\n'),
    (KeyboardInterrupt(), 130, 'stopped by Ctrl-C\n')])
def test_statuses(error, status, message, monkeypatch, capsys):
    from spartan_mm.commands import list as command

    def run(args):
        raise error
    monkeypatch.setattr(command, 'run', run)
    assert cli.main(['list']) == status
    assert capsys.readouterr().err == message


#: A command and what it writes, of which FILE is a file in the way.
NO_PLACE = {
    'train': 'CONFIG --work-dir FILE', 'test': 'CONFIG x.pth --work-dir FILE',
    'test ': 'CONFIG x.pth --out FILE/p.pkl', 'infer': 'a.png CONFIG x.pth --out-dir FILE',
    'check-data': 'CONFIG --out-dir FILE', 'report': '. --out FILE/r.html',
    'compare': 'CONFIG --out-dir FILE', 'flops': 'CONFIG --json FILE/f.json',
    'benchmark': 'CONFIG --json FILE/b.json', 'cam': 'a.png CONFIG=x.pth --out-dir FILE',
    'receptive-field': 'a.png CONFIG --random --out-dir FILE',
    'interactions': 'a.png CONFIG=x.pth --out-dir FILE',
    'spectra': 'a.png CONFIG --random --out-dir FILE', 'browse': 'CONFIG --out-dir FILE',
    'curves': '. --out FILE/c.png', 'errors': 'CONFIG p.pkl --out-dir FILE',
    'confusion': 'CONFIG p.pkl --out-dir FILE', 'deploy': 'CONFIG x.pth FILE/d.pth',
    'convert': 'x.pth FILE/o.pth --to spartan', 'publish': 'x.pth FILE/p --config CONFIG',
    'train ': 'CONFIG --work-dir .'}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'x.pth'
    model = spartan_mm.get_model('spartan_xt_digits')
    torch.save(dict(state_dict=model.state_dict(), meta=dict(
        dataset_meta=dict(classes=tuple('0123456789')))), path)
    return path


@pytest.fixture
def folder(weights, tmp_path, monkeypatch):
    """A folder with an image, a config, weights, and a file where results are to go."""
    shutil.copy(weights, tmp_path)
    (tmp_path / 'config.py').write_text(
        "_base_ = __import__('spartan_mm').config_path('spartan_xt_digits')\n")
    Image.new('RGB', (32, 32)).save(tmp_path / 'a.png')
    (tmp_path / 'FILE').write_text('mine')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('deeper', ['', '/deeper'])
@pytest.mark.parametrize('command', NO_PLACE)
def test_results_without_a_place_end_in_a_line(command, deeper, folder, capsys):
    words = NO_PLACE[command].replace('CONFIG', 'config.py').replace('FILE', f'FILE{deeper}')
    with pytest.raises(SystemExit) as stopped:
        raise SystemExit(cli.main([command.strip(), *words.split()]))
    # The message is the code, or is printed.
    message = f'{stopped.value.code}\n{capsys.readouterr().err}'
    problem = ('would replace config.py; name another folder' if command == 'train ' else
               f'cannot be written: {folder}/FILE is a file, not a folder; name another place')
    assert problem in message and 'Traceback' not in message
    assert sorted(path.name for path in folder.iterdir()) == [
        'FILE', 'a.png', 'config.py', 'x.pth']


@pytest.mark.parametrize('words', [
    'convert x.pth x.pth --to spartan', 'deploy config.py x.pth x.pth',
    'deploy config.py x.pth ./folder/../link.pth', 'flops config.py --json config.py',
    'benchmark config.py --json config.py', 'test config.py x.pkl --out x.pkl',
    'report . --predictions x.pkl --out link.pth', 'publish p.pth p'])
def test_results_do_not_overwrite_what_is_read(words, folder, capsys):
    (folder / 'folder').mkdir()
    (folder / 'link.pth').symlink_to('x.pth')
    (folder / 'x.pkl').symlink_to('x.pth')
    if 'publish' in words:
        cli.main('publish x.pth p --config config.py'.split())
        words = words.replace('p.pth', next(folder.glob('p-*.pth')).name)
    before = (folder / 'x.pth').read_bytes()
    with pytest.raises(SystemExit, match='cannot be written: it is what is read; name another'):
        cli.main(words.split())
    assert (folder / 'x.pth').read_bytes() == before
    assert (folder / 'config.py').read_text().startswith('_base_')


def test_ctrl_c_while_modules_are_imported(monkeypatch, capsys):
    def make_parser(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, 'make_parser', make_parser)
    assert cli.main(['list']) == 130
    assert capsys.readouterr().err == 'stopped by Ctrl-C\n'
