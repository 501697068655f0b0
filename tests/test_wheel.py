"""The wheel: what it holds, and that it works in an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import spartan_mm

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """A copy of the sources, and the wheel of it."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
        '.*', 'work_dirs', 'data', 'outputs', 'build', 'site', '*.egg-info', '__pycache__'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps',
                    '--no-build-isolation', '--wheel-dir', folder, source], check=True)
    [wheel] = folder.glob('*.whl')
    return source, wheel


def test_wheel_holds_configs_and_tools(built):
    source, path = built
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        [entry_points] = [name for name in names if name.endswith('/entry_points.txt')]
        assert 'spartan-mm = spartan_mm.cli:main' in wheel.read(entry_points).decode()
    shipped = [path for folder in ('configs', 'tools') for path in (source / folder).rglob('*')
               if path.is_file() and 'dev' not in path.relative_to(source).parts]
    assert shipped and not any('/dev/' in name for name in names)
    for path in shipped:
        assert f'spartan_mm/.mim/{path.relative_to(source).as_posix()}' in names
    assert 'spartan_mm/.mim/model-index.yml' in names
    assert not [name for name in names if name.startswith(('tests/', 'tools/', 'configs/'))]


@pytest.mark.slow
def test_wheel_works_in_an_empty_folder(built, tmp_path):
    site, empty = tmp_path / 'site', tmp_path / 'empty'
    empty.mkdir()
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target',
                    site, built[1]], check=True)

    def run(*command):
        done = subprocess.run(command, cwd=empty, env=dict(os.environ, PYTHONPATH=str(site)),
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    names = [line.split()[0] for line in run(site / 'bin' / 'spartan-mm', 'list').splitlines()]
    assert names == spartan_mm.list_models()
    found = run(sys.executable, '-c', 'import runpy, sys, spartan_mm\n'
                'print(spartan_mm.config_path("rtdetr_spartan_t"), flush=True)\n'
                'sys.argv = [str(spartan_mm.zoo.root() / "tools" / "infer.py"), "--help"]\n'
                'runpy.run_path(sys.argv[0], run_name="__main__")').splitlines()
    assert Path(found[0]).is_relative_to(site / 'spartan_mm' / '.mim')
    assert found[1].startswith('usage: spartan-mm infer') and not list(empty.iterdir())
