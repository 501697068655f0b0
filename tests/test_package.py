"""What the package promises as a whole: what the wheel holds, one version."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import spartan_mm

ROOT = Path(__file__).resolve().parents[1]


class TestInstallation:

    def test_wheel_holds_configs_and_tools(self, tmp_path):
        source = tmp_path / 'source'
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
            '.*', 'work_dirs', 'data', 'outputs', 'build', '*.egg-info', '__pycache__'))
        subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps',
                        '--no-build-isolation', '--wheel-dir', tmp_path, source], check=True)
        with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as wheel:
            names = set(wheel.namelist())
        shipped = [path for folder in ('configs', 'tools') for path in (source / folder).rglob('*')
                   if path.is_file() and 'dev' not in path.relative_to(source).parts]
        assert shipped and not any('/dev/' in name for name in names)
        for path in shipped:
            assert f'spartan_mm/.mim/{path.relative_to(source).as_posix()}' in names
        assert 'spartan_mm/.mim/model-index.yml' in names
        assert not [name for name in names if name.startswith(('tests/', 'tools/', 'configs/'))]

    def test_every_requirement_is_pinned(self):
        text = (ROOT / 'requirements' / 'constraints.txt').read_text(encoding='utf-8')
        pins = {canonicalize_name(name): version
                for name, version in re.findall(r'^([\w.-]+)===?(\S+)$', text, re.MULTILINE)}
        for line in requires('spartan_mm'):
            requirement = Requirement(line)
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])

    def test_one_version(self):
        citation = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
        assert re.search(rf'^version: {re.escape(spartan_mm.__version__)}$', citation, re.MULTILINE)
        changelog = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
        newest = re.search(r'^## (\S+)', changelog, re.MULTILINE)
        assert newest[1] == spartan_mm.__version__
