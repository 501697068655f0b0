"""What README and docs/ name exists: links, anchors, commands, flags, files, configs."""

import re
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import spartan_mm
from spartan_mm.cli import COMMANDS, make_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for pattern in (
    '*.md', 'docs/*.md', 'configs/*/README.md') for path in ROOT.glob(pattern))
TEXTS = {page: (ROOT / page).read_text(encoding='utf-8') for page in PAGES}
BLOCKS = [(page, block) for page in PAGES
          for block in re.findall(r'^```python\n(.*?)^```', TEXTS[page], re.DOTALL | re.MULTILINE)]


def anchors_of(page):
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r'^#+ +(.*)$', re.sub(r'```.*?```', '', TEXTS[page], flags=re.DOTALL),
                          re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    prose = re.sub(r'^```.*?^```', '', TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r'`[^`\n]*`', 'code', prose)
    for text, target in re.findall(r'\[([^\]]*)\]\(([^)\s]+)\)', prose):
        assert text, f'{target} has no words'
        if target.startswith('https://'):
            continue
        file, _, anchor = target.partition('#')
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.is_file(), target
        if anchor:
            assert anchor in anchors_of(path.resolve().relative_to(ROOT).as_posix()), target


def test_named_files_exist():
    folders = 'tools|tests|spartan_mm|configs|requirements|docs|\\.ci'
    named = {(page, name) for page, text in TEXTS.items() for name in
             re.findall(rf'(?<![\w/.])(?:{folders})/[\w./*-]*\w/?', text)}
    assert any(name == 'tools/dist_train.sh' for _, name in named)
    generated = re.compile(r'spartan_mm/\.mim|spartan_mm/commands/WORD.py')
    missing = [f'{page}: {name}' for page, name in sorted(named)
               if not generated.match(name) and not any(ROOT.glob(name))
               and not any((ROOT / page).parent.glob(name))]
    assert not missing


def test_named_make_targets_exist():
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
    named = {name for text in TEXTS.values()
             for name in re.findall(r'(?:^    |^|`)make ([a-z][\w-]*)', text, re.MULTILINE)}
    assert 'demo' in named and named <= {*targets, 'demo'}


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_are_documented_with_flags_that_exist(command):
    uses = [line for text in TEXTS.values()
            for line in re.findall(rf'spartan-mm {command}\b[^`#\n]*', text)]
    assert uses
    flags = make_parser(command)._option_string_actions
    for line in uses:
        assert {*re.findall(r'(?<=\s)--[a-z-]+', line)} <= flags.keys(), line


def test_no_other_commands_are_named():
    named = {word for text in TEXTS.values() for word in re.findall(r'spartan-mm ([a-z-]+)', text)}
    assert named <= COMMANDS.keys()


def test_python_compiles():
    for page, block in BLOCKS:
        compile(block, page, 'exec')


@pytest.mark.parametrize('block', [
    block for page, block in BLOCKS if page == 'docs/train-your-data.md' and 'model = ' in block])
def test_configs_build(block, tmp_path):
    path = tmp_path / 'my_config.py'
    path.write_text(block)
    config = Config.fromfile(path)
    for part in ('backbone', 'neck'):
        config.model[part].pop('init_cfg', None)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        MODELS.build(config.model)


def test_first_lines_of_python_run():
    [block] = [block for page, block in BLOCKS if page == 'README.md' and 'maps =' in block]
    names = {}
    exec(block, names)
    assert [224 // maps.shape[-1] for maps in names['maps']] == [8, 16, 32]


def test_names_of_the_package_exist():
    for text in TEXTS.values():
        for name in re.findall(r'`spartan_mm\.(\w+)`|spartan_mm\.(\w+)\(', text):
            assert hasattr(spartan_mm, ''.join(name)) or (
                ROOT / 'spartan_mm' / ''.join(name)).is_dir()


def test_every_page_is_in_the_site():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry)
                for file in files(part)]

    site = yaml.safe_load((ROOT / 'mkdocs.yml').read_text(encoding='utf-8'))
    assert sorted(files(site['nav'])) == PAGES


def test_readme_is_short():
    assert TEXTS['README.md'].count('\n') <= 130
