"""What the package promises as a whole: pinned requirements, what the wheel holds, one version."""

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import spartan_mm

ROOT = Path(__file__).resolve().parents[1]


class TestInstallation:

    def test_every_requirement_is_pinned(self):
        text = (ROOT / 'requirements' / 'constraints.txt').read_text(encoding='utf-8')
        pins = {canonicalize_name(name): version
                for name, version in re.findall(r'^([\w.-]+)===?([^\s;]+)', text, re.MULTILINE)}
        for line in requires('spartan_mm'):
            requirement = Requirement(line)
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])

    def test_one_version(self):
        citation = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
        assert re.search(rf'^version: {re.escape(spartan_mm.__version__)}$', citation, re.MULTILINE)
        changelog = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
        newest = re.search(r'^## (\S+)', changelog, re.MULTILINE)
        assert newest[1] == spartan_mm.__version__
