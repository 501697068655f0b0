"""What imports what: no circles, and the directions in which rooms may know each other."""
import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'spartan_mm'
FILES = {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
         for path in sorted(PACKAGE.rglob('*.py'))}

# A room may import those named here. Any may import what belongs to none: errors, files, text,
# requirements, compat, version, runtime.
FOUNDATIONS = {'errors', 'files', 'text', 'requirements', 'compat', 'version', 'model_index',
               'runtime'}
BELOW = {
    'backbones': set(),
    'weights': {'backbones'},
    'datasets': set(),
    'engine': {'backbones', 'weights', 'datasets'},
    'detection': {'backbones', 'weights', 'datasets', 'engine'},
    'classification': {'backbones', 'weights', 'datasets', 'engine'},
}
BELOW['zoo'] = {*BELOW}
BELOW['drawing'] = {'datasets'}
BELOW['results'] = {'datasets'}
BELOW['tiling'] = BELOW['tracking'] = set()
BELOW['inference'] = {*BELOW}
BELOW['serving'] = {*BELOW}
BELOW['analysis'] = {*BELOW}
BELOW['export'] = {*BELOW} - {'analysis'}
BELOW['page'] = {*BELOW}
BELOW['demo'] = {*BELOW}
BELOW['commands'] = {*BELOW}
BELOW['cli'] = {*BELOW}


@cache
def find_imports(name, top_level_only=False):
    """List what a file imports, as absolute names: modules, and with each what is taken of it."""
    tree = ast.parse(FILES[name].read_text(encoding='utf-8'))
    package = name.split('.') if FILES[name].name == '__init__.py' else name.split('.')[:-1]
    names = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package) - node.level + 1]) if node.level else ''
            module = '.'.join(part for part in (base, node.module) if part)
            names += [module, *(f'{module}.{alias.name}' for alias in node.names)]
    return names


@cache
def find_own_imports(name):
    """The files of this package that a file imports."""
    found = {other for other in find_imports(name) if other in FILES}
    # `from . import part` takes a file, and of the package itself nothing.
    taken = {other.rpartition('.')[0] for other in found}
    return found - {name, *(package for package in taken if package in FILES
                            and not _takes_more_than_files(name, package))}


def _takes_more_than_files(name, package):
    return any(other.startswith(f'{package}.') and other.count('.') == package.count('.') + 1
               and other not in FILES for other in find_imports(name))


def room(name):
    return name.split('.')[1] if '.' in name else ''


def find_circle(graph):
    """The first circle in a graph, as a list of its nodes; None if there is none."""
    finished, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node):], node]
        if node in finished:
            return None
        path.append(node)
        circle = next(filter(None, map(visit, sorted(graph.get(node, ())))), None)
        path.pop()
        finished.add(node)
        return circle

    return next(filter(None, map(visit, sorted(graph))), None)


def inside(name, packages):
    return any(name == package or name.startswith(f'{package}.') for package in packages)


def modules_after(statement):
    """List what is in sys.modules of a new interpreter after a statement."""
    code = f'{statement}\nimport sys\nprint(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


class TestCircles:

    def test_one_is_found(self):
        assert find_circle(dict(a={'b'}, b={'c', 'd'}, c=set(), d={'b'})) == ['b', 'd', 'b']

    def test_none_between_files(self):
        assert find_circle({name: find_own_imports(name) for name in FILES}) is None

    def test_none_between_rooms(self):
        graph = {}
        for name in FILES:
            others = {room(other) for other in find_own_imports(name)}
            graph.setdefault(room(name), set()).update(others - {room(name)})
        assert find_circle(graph) is None


class TestDirections:

    @pytest.mark.parametrize('name', FILES)
    def test_rooms(self, name):
        own = room(name)
        others = {room(other) for other in find_own_imports(name)} - {own, ''}
        wrong = {other for other in others - FOUNDATIONS
                 if own not in ('', '__main__') and other not in BELOW.get(own, ())}
        assert not wrong

    def test_every_room_is_known(self):
        assert {room(name) for name in FILES} <= {'', *FOUNDATIONS, *BELOW}

    @pytest.mark.parametrize('name', FILES)
    def test_nothing_imports_tools_or_tests(self, name):
        assert not [other for other in find_imports(name) if inside(other, ['tools', 'tests'])]

    @pytest.mark.parametrize('name', FILES)
    def test_toolboxes_are_loaded_only_by_their_task(self, name):
        own = dict(detection='mmdet', classification='mmpretrain').get(room(name))
        loaded = [other for other in find_imports(name, top_level_only=True)
                  if inside(other, ['mmdet', 'mmpretrain'])]
        assert not [other for other in loaded if not inside(other, [own])]


class TestWhatIsLoaded:

    def test_runtime_can_be_copied(self):
        roots = {name.partition('.')[0] for name in find_imports('spartan_mm.runtime')}
        assert roots - sys.stdlib_module_names == {'numpy', 'PIL', 'cv2', 'supervision'}

    def test_package_registers_backbone_and_initializers_and_loads_no_toolbox(self):
        statement = ('import spartan_mm\n'
                     'from mmengine.registry import MODELS, WEIGHT_INITIALIZERS\n'
                     "assert MODELS.get('SpaRTAN') is spartan_mm.SpaRTAN\n"
                     "assert 'CheckedPretrained' in WEIGHT_INITIALIZERS\n"
                     "assert 'ConvertedPretrained' in WEIGHT_INITIALIZERS")
        loaded = modules_after(statement)
        assert not [name for name in loaded if inside(name, ['mmcv.ops', 'mmdet', 'mmpretrain'])]

    def test_detection_does_not_load_classification(self):
        assert 'spartan_mm.classification' not in modules_after('import spartan_mm.detection')

    def test_converting_a_classifier_loads_no_toolbox(self):
        loaded = modules_after('import spartan_mm.commands.convert')
        assert not [name for name in loaded if inside(name, ['mmdet', 'mmpretrain'])]
