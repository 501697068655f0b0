"""What the package promises as a whole: what imports what, pinned requirements, one version."""

import ast
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import spartan_mm

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'spartan_mm'
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob('*.py'))


def imported_names(path, top_level_only=False):
    """List what a file imports, as absolute names."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    package = path.relative_to(ROOT).parent.parts
    names = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package) - node.level + 1]) if node.level else ''
            module = '.'.join(part for part in (base, node.module) if part)
            names += [module, *(f'{module}.{alias.name}' for alias in node.names)]
    return names


def modules_after(statement):
    """List what is in sys.modules of a new interpreter after a statement."""
    code = f'{statement}\nimport sys\nprint(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def inside(name, packages):
    return any(name == package or name.startswith(f'{package}.') for package in packages)


class TestImports:

    def test_package_registers_the_backbone_and_loads_no_toolbox(self):
        statement = ("import spartan_mm\nfrom mmengine.registry import MODELS\n"
                     "assert MODELS.get('SpaRTAN') is spartan_mm.SpaRTAN")
        loaded = modules_after(statement)
        assert not [name for name in loaded if inside(name, ['mmcv.ops', 'mmdet', 'mmpretrain'])]

    def test_detection_does_not_load_classification(self):
        assert 'spartan_mm.classification' not in modules_after('import spartan_mm.detection')

    @pytest.mark.parametrize('module', MODULES)
    def test_directions(self, module):
        names = imported_names(ROOT / module)
        assert not [name for name in names if inside(name, ['tools', 'tests'])]
        for task, other in [('detection', 'classification'), ('classification', 'detection')]:
            if inside(module, [f'spartan_mm/{task}']) or f'/{task}/' in module:
                assert not [name for name in names if inside(name, [f'spartan_mm.{other}'])]

    @pytest.mark.parametrize('module', MODULES)
    def test_toolboxes_are_loaded_only_by_their_task(self, module):
        toolboxes = {'detection': ['mmdet'], 'classification': ['mmpretrain']}
        own = toolboxes.get(module.split('/')[1], [])
        loaded = [name for name in imported_names(ROOT / module, top_level_only=True)
                  if inside(name, ['mmdet', 'mmpretrain'])]
        assert not [name for name in loaded if not inside(name, own)]


class TestInstallation:

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
