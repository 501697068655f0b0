"""What passes as a config inside of a checkpoint: plain data of what is registered.

mmengine runs a config of text as Python, and whatever its form, objects are built of what it names.
"""
import ast
import importlib.util
import json
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

# Modules whose classes a config may name, and all below them: parts of models, transforms,
# datasets, what trainings are made of. Of other packages, this one included, classes may be named
# that they registered, for somebody imported these packages; of the ones here and in _FETCHING
# nothing else.
_MODULES = (
    'torch.nn', 'torch.optim', 'torchvision.transforms',
    'mmcv.cnn.bricks', 'mmcv.ops', 'mmcv.transforms',
    'mmengine.dataset', 'mmengine.evaluator', 'mmengine.hooks', 'mmengine.model', 'mmengine.optim',
    'mmengine.runner.log_processor', 'mmengine.runner.loops', 'mmengine.utils.dl_utils',
    'mmengine.visualization',
    *(f'mmdet.{part}' for part in ('datasets', 'engine', 'evaluation', 'visualization')),
    *(f'mmdet.models.{part}' for part in (
        'backbones', 'data_preprocessors', 'dense_heads', 'detectors', 'layers', 'losses', 'necks',
        'reid', 'roi_heads', 'seg_heads', 'task_modules', 'test_time_augs')),
    *(f'mmpretrain.{part}' for part in ('datasets', 'engine', 'evaluation', 'visualization')),
    *(f'mmpretrain.models.{part}' for part in (
        'backbones', 'classifiers', 'heads', 'losses', 'necks', 'tta', 'utils')))

# Of these, what evaluates text, fetches code, or opens a path or an address that is an argument.
_EXCLUDED = (
    'mmdet.datasets.refcoco', 'mmdet.datasets.transforms.text_transformers',
    'mmdet.datasets.transforms.transforms.Albu',
    'mmdet.models.dense_heads.atss_vlfusion_head', 'mmdet.models.task_modules.tracking',
    *(f'mmdet.models.detectors.{part}' for part in (
        'd2_wrapper', 'glip', 'grounding_dino', 'kd_one_stage', 'lad')),
    *(f'mmengine.visualization.vis_backend.{part}VisBackend' for part in (
        'Aim', 'ClearML', 'DVCLive', 'MLflow', 'Neptune', 'Wandb')),
    'mmpretrain.datasets.refcoco', 'mmpretrain.datasets.transforms.processing.Albumentations',
    'mmpretrain.engine.hooks.swav_hook', 'mmpretrain.models.backbones.timm_backbone',
    'mmpretrain.models.classifiers.hugging_face', 'mmpretrain.models.classifiers.timm',
    'mmpretrain.models.heads.margin_head', 'mmpretrain.models.heads.vqa_head',
    'mmpretrain.models.utils.huggingface', 'mmpretrain.models.utils.tokenizer',
    'mmpretrain.models.utils.vector_quantizer')
_FETCHING = ('diffusers', 'functools', 'huggingface_hub', 'timm', 'transformers')

# What is no class and may be named all the same: two functions that make batches; and parts of
# mmcv.ops, which are not looked up in a registry, but evaluated; and words that mmdet compares.
_FUNCTIONS = frozenset(('mmengine.dataset.utils.default_collate',
                        'mmengine.dataset.utils.pseudo_collate'))
_WORDS = frozenset((
    'nms', 'nms_match', 'nms_rotated', 'soft_nms', 'RoIAlign', 'RoIAlignRotated', 'RoIPool',
    'DeformRoIPoolPack', 'PSAMask', 'ModulatedDeformRoIPoolPack', 'SimpleRoIAlign',
    'dilation', 'offset', 'conv', 'interpolation_conv', 'last_conv'))

# OpenMMLab's packages.
_SCOPES = frozenset((
    'mmaction', 'mmagic', 'mmcls', 'mmcv', 'mmdet', 'mmdet3d', 'mmedit', 'mmengine', 'mmocr',
    'mmpose', 'mmpretrain', 'mmrazor', 'mmrotate', 'mmseg', 'mmselfsup', 'mmtrack', 'mmyolo'))

# Files that the toolboxes' readers of annotations run code of.
_RUN = ('.np', '.pickle', '.pkl', '.yaml', '.yml')

# How a dump shows the numbers that have no literal.
_NUMBERS = dict(inf=float('inf'), nan=float('nan'))


class CodeError(ValueError):
    """What a config would run or build, and must not."""


def read_text(text: str) -> dict[str, Any]:
    """Read a config of text without running it, and look through it.

    The configs that mmengine writes are assignments of literals, and this is all that passes.

    Args:
        text: A config, as ``Config.pretty_text`` gives it.

    Returns:
        What it assigns.

    Raises:
        CodeError: It does more than that, or :func:`check` refuses a value.
        SyntaxError: It is no Python at all.
        ValueError: The same.

    Example:
        >>> read_text("model = dict(type='SpaRTAN', out_indices=(1, 2, 3))")
        {'model': {'type': 'SpaRTAN', 'out_indices': (1, 2, 3)}}
        >>> read_text("model = dict(type='os.system', command='ls')")
        Traceback (most recent call last):
        spartan_mm.weights.config_text.CodeError: type='os.system'
    """
    # mmengine replaces these in the text before it runs it.
    if '{{' in text:
        raise CodeError("'{{', a placeholder")
    content = {}
    try:
        for statement in ast.parse(text).body:
            try:
                content |= _read_assignment(statement)
            except CodeError as error:
                raise CodeError(f'line {statement.lineno}: {error}') from None
    except (RecursionError, MemoryError):
        raise CodeError('too deep a nesting to be looked through') from None
    check(content)
    return content


def check(content: Mapping[str, Any]) -> None:
    """Insist that a config names nothing but what is meant for configs, and import what it names.

    Objects are built from whatever ``type`` names, functions of any installed package included, of
    which some hand all that a config says on. What passes is a *class*, by its name in a registry
    or by its path, of the modules in `_MODULES`, or of another package than OpenMMLab's that
    registered it. No value may be the name of a file that runs code when it is read, as pickles do.
    Modules in ``custom_imports``, ``default_scope`` and ``_scope_`` must be
    installed or imported already: no file of the current folder is run, nor a module of Python's
    own library, nor tests.

    Args:
        content: What the config holds, of Python's plain types.

    Raises:
        CodeError: It names something else.
    """
    try:
        imports = content.get('custom_imports') or {}
        names = imports.get('imports') if isinstance(imports, Mapping) else imports
        entries = list(_walk_items(content))
        modules = [*([names] if isinstance(names, str) else names or []),
                   *(value for key, value in entries
                     if key in ('default_scope', '_scope_') and value is not None)]
        for name in modules:
            _check_module(name)
        for key, value in entries:
            _check_entry(key, value, modules)
        for value in _walk(content):
            if isinstance(value, str) and value.endswith(_RUN):
                raise CodeError(f'it reads {value!r}'[:80])
    except RecursionError:
        raise CodeError('too deep a nesting to be looked through') from None


def _check_module(name: Any) -> None:
    """Insist that a module is installed, or that its package is imported, and no test.

    A package without a file, which Python makes up of all folders of its name, is as good as these.
    """
    parts = str(name).split('.')
    top = parts[0]
    if not isinstance(name, str) or top in sys.stdlib_module_names or any(
            part.startswith('__') or part in ('test', 'tests', 'conftest') for part in parts):
        raise CodeError(f'it imports {name!r}'[:80])
    if name in sys.modules or getattr(sys.modules.get(top), '__file__', None):
        return
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    places = spec and (spec.submodule_search_locations or [spec.origin]) or []
    folders = _installed_folders(top)
    if not places or not all(any(Path(place).resolve().is_relative_to(folder)
                                 for folder in folders) for place in places):
        raise CodeError(f'it imports {name!r}, which is neither installed nor imported')


@cache
def _installed_folders(package: str) -> list[Path]:
    """Folders that installed packages lie in, and that of this one if it is installed editable."""
    folders = [Path(place).resolve() for place in (
        *sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages())
        if Path(place).name in ('site-packages', 'dist-packages')]
    for distribution in distributions(path=[*map(str, folders)]):
        source = json.loads(distribution.read_text('direct_url.json') or '{}')
        names = (distribution.read_text('top_level.txt') or distribution.name).split()
        if package in names and source.get('dir_info', {}).get('editable'):
            folders.append(Path(url2pathname(urlparse(source['url']).path)).resolve())
    return folders


def _check_entry(key: Any, value: Any, modules: Iterable[str]) -> None:
    """Insist that an entry of a dict names nothing that must not be built or opened."""
    shown = f'{key}={value!r}'[:80]
    if key in ('trust_remote_code', 'checkpoint_path', 'save_dir') and value:
        raise CodeError(shown)
    if key in ('backend_args', 'file_client_args') and value is not None and not (
            isinstance(value, Mapping) and value.get('backend') in ('local', 'disk')):
        raise CodeError(shown)
    if key == 'type' and not isinstance(value, str):
        if isinstance(value, (list, tuple, set, Mapping, float)):
            raise CodeError(shown)
    elif key == 'type' or isinstance(value, str) and (
            key == 'constructor' or isinstance(key, str) and key.endswith('_type')):
        found = _find(value, modules)
        # What is not called 'type' may be any word, but no path to something.
        unknown = not found and value not in _WORDS and (key == 'type' or '.' in value)
        if unknown or not all(map(_is_harmless, found)):
            raise CodeError(shown)


def _find(name: str, modules: Iterable[str]) -> list[Any]:
    """All that mmengine may take a name for: what registries know by it, else what it leads to."""
    found = list(_registered(name))
    if not found:
        # As mmengine does before it gives up.
        for package in dict.fromkeys([*modules, *({name.partition('.')[0]} & _SCOPES), 'mmcv']):
            _import_registered(package)
        found = list(_registered(name))
    if not found and (_is_inside(name, _MODULES) or name.isidentifier()):
        # By its path, or as a transform of ours for classifiers names one of torchvision's.
        path = name if '.' in name else f'torchvision.transforms.v2.{name}'
        try:
            found = [get_object_from_string(path)]
        except Exception:  # whatever keeps a module from being imported
            pass
    return [item for item in found if item is not None]


def _is_harmless(item: Any) -> bool:
    """Whether an object may be built of it."""
    name = f'{getattr(item, "__module__", "")}.{getattr(item, "__qualname__", "")}'
    if not isinstance(item, type):
        return name in _FUNCTIONS
    if _is_inside(name, _MODULES):
        return not _is_inside(name, _EXCLUDED)
    return name.partition('.')[0] not in (*_SCOPES, *_FETCHING, 'torch', 'torchvision',
                                          *sys.stdlib_module_names)


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f'{module}.') for module in modules)


def _read_assignment(statement: ast.stmt) -> dict[str, Any]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 \
            and isinstance(statement.targets[0], ast.Name):
        name = statement.targets[0].id
        if not name.startswith('__') and name not in ('_base_', 'dict', 'set', *_NUMBERS):
            return {name: _read_value(statement.value)}
    raise _as_error(statement)


def _read_value(node: ast.expr) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name(id=name) if name in _NUMBERS:
            return _NUMBERS[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float())
                         | ast.Name()):
            value = _read_value(node.operand)
            return -value if isinstance(node.op, ast.USub) else value
        case ast.List() | ast.Tuple() | ast.Set():
            kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
            return kind(map(_read_value, node.elts))
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_read_value(key): _read_value(value)
                    for key, value in zip(keys, values, strict=True)}
        case ast.Call(func=ast.Name(id='set'), args=[], keywords=[]):
            return set()
        # As dumps have it where a key is no name.
        case ast.Call(func=ast.Name(id='dict'), args=[ast.Dict() as content], keywords=[]):
            return _read_value(content)
        case ast.Call(func=ast.Name(id='dict'), args=[], keywords=keywords) if all(
                keyword.arg is not None for keyword in keywords):
            return {keyword.arg: _read_value(keyword.value) for keyword in keywords}
    raise _as_error(node)


def _as_error(node: ast.AST) -> CodeError:
    return CodeError(ast.unparse(node)[:80])


def _walk(value: Any) -> Iterator[Any]:
    """Go through a value and all that is in it."""
    yield value
    parts = value if isinstance(value, (list, tuple, set)) else ()
    for part in [*value, *value.values()] if isinstance(value, Mapping) else parts:
        yield from _walk(part)


def _walk_items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Go through the entries of all dicts in a value."""
    for part in _walk(value):
        if isinstance(part, Mapping):
            yield from part.items()


def _registries() -> list[Registry]:
    """The registries of mmengine and of OpenMMLab's packages, and those derived from them."""
    waiting = [item for package in sorted(_SCOPES) if f'{package}.registry' in sys.modules
               for item in vars(sys.modules[f'{package}.registry']).values()
               if isinstance(item, Registry)]
    found = {}
    while waiting:
        registry = waiting.pop()
        if id(registry) not in found:
            found[id(registry)] = registry
            waiting.extend(registry.children.values())
    return list(found.values())


def _known_scopes() -> set[str]:
    return {registry.scope for registry in _registries()}


def _registered(name: str) -> Iterator[Any]:
    """Go through all that registries have under a name, under its rest behind a scope, or there."""
    scope, _, rest = name.partition('.')
    for registry in _registries():
        for known, item in registry.module_dict.items():
            if known == name or (known == rest and scope in _known_scopes()) or '.' in rest and (
                    name == f'{getattr(item, "__module__", "")}.{getattr(item, "__name__", "")}'):
                yield item


@cache
def _import_registered(package: str) -> None:
    """Import a package, and of one of OpenMMLab all that it registers, if it is installed."""
    try:
        _check_module(package)
        import_module(package)
        if package.partition('.')[0] in _SCOPES:
            import_module(f'{package.partition(".")[0]}.registry')
        for registry in _registries():
            if registry.scope == package:
                registry.import_from_location()
    except Exception:  # whatever keeps a package from being imported
        pass
