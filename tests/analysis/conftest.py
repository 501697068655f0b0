"""What tests of pages have in common, and those that measure."""

import re
import sys
from html.parser import HTMLParser

import pytest

from spartan_mm.analysis import roofline
from spartan_mm.cli import main


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    """Products of matrices in bfloat16 take minutes on a CPU that doesn't know it."""
    monkeypatch.setitem(roofline._SIDE, 'cpu', 256)
    monkeypatch.setitem(roofline._COPIED, 'cpu', 2**22)


@pytest.fixture
def run(user_project, monkeypatch, capfd):
    """Run a command in the user's folder; return what it printed, or its errors if it fails."""
    monkeypatch.chdir(user_project)

    def run_command(*arguments, status=0):
        try:
            found = main([*map(str, arguments)])
        except SystemExit as leaving:
            found = leaving.code
            if isinstance(found, str):
                print(found, file=sys.stderr)
                found = 1
        printed = capfd.readouterr()
        assert found == status, printed
        return printed.err if status else printed.out
    return run_command


class Reader(HTMLParser):
    """Collects the tags with their attributes, and the text outside of <style>."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self._inside = [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside != 'style':
            self.texts.append(data)


def check_self_contained(html):
    """Fail if anything would be loaded; return what was read."""
    reader = Reader(html)
    names = {tag for tag, _ in reader.tags}
    assert not names & {'script', 'iframe', 'object', 'embed', 'video', 'audio', 'base', 'form'}
    for _, attributes in reader.tags:
        assert attributes.get('src', 'data:').startswith('data:')
        assert attributes.get('href', '#').startswith(('#', 'data:,'))
        assert not [name for name in attributes if name.startswith('on')]
    styles = ''.join(re.findall('<style>(.*?)</style>', html, re.DOTALL))
    assert styles and 'url(' not in styles and '@import' not in styles
    assert "default-src 'none'" in html
    return reader


@pytest.fixture
def read_self_contained():
    """Reads a page, fails if anything would be loaded."""
    return check_self_contained
