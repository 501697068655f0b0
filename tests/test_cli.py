"""``spartan-mm``: its overview, its statuses, and that its commands have one vocabulary."""
import pytest

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


def test_ctrl_c_while_modules_are_imported(monkeypatch, capsys):
    def make_parser(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, 'make_parser', make_parser)
    assert cli.main(['list']) == 130
    assert capsys.readouterr().err == 'stopped by Ctrl-C\n'
