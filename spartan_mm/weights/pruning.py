"""Smaller models made of trained ones: what matters least is left out, the rest stays as it is.

Left out are waves that no argmax can pick, inner channels of SMixers, feed-forward networks and
fusion blocks, and whole blocks. Widths are the same in all blocks of a stage, and in all layers of
a decoder; which channels stay is each one's own. The stage widths stay: a channel less would change
which one is the strongest, and the statistics of the norms.

NOTE: Libraries that find by a trace what goes together, such as torch-pruning, do not see that the
first C waves of a CMixer may be picked, and that a modulation holds them in pairs.
"""
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ..backbones.arch import wave_unit
from ..backbones.spartan import CMixer, SMixer, SpaRTAN
from ..errors import CheckpointError, UsageError
from ..files import check_writable, write_whole
from ..text import count, join
from .forms import is_deployed
from .initialize import without_pretrained
from .loading import find_meta, load_all_weights, load_for_inference
from .saving import save_checkpoint

StateDict = Mapping[str, Tensor]

#: What a share can be given of, and what has it.
PRUNABLE = {
    'waves': 'CMixer with waves that no argmax can pick',
    'inner': 'SMixer',
    'ffn': 'feed-forward network in neck or decoder',
    'csp': 'fusion block with RepVGG blocks in the neck'}


class Group(NamedTuple):
    """Channels that stand at the same places of several tensors.

    Attributes:
        module: Name of the module that all of it lies in.
        channels: How many there are.
        units: In how many units of equal size they stay or go.
        made: Parts of the module, modules or parameters, that make these channels: their first
            dimension. With each, how often all channels follow each other in it.
        used: Parts that take them: their second dimension.
        first: Units before this one stay.
    """

    module: str
    channels: int
    units: int
    made: Mapping[str, int]
    used: Mapping[str, int]
    first: int = 0

    def tensors(self, state_dict: StateDict) -> Iterator[tuple[str, int, Tensor]]:
        """Names and dimensions of what to cut, each as (copies, units, ...) from there on."""
        for dim, parts in enumerate((self.made, self.used)):
            for part, copies in parts.items():
                whole = f'{self.module}.{part}'
                for name, tensor in state_dict.items():
                    if f'{name}.'.startswith(f'{whole}.') and tensor.dim() > dim:
                        yield name, dim, tensor.unflatten(dim, (copies, self.units, -1))

    def importance(self, state_dict: StateDict) -> Tensor:
        """How much each unit adds to what takes it, (units,), as far as weights can tell.

        The size of the units where they are made, that of a norm where there is one, times the
        weights that they are multiplied by.
        """
        made, norms, used = [], [], []
        for name, dim, tensor in self.tensors(state_dict):
            sizes = tensor.movedim(dim + 1, 0).flatten(1).double().square().sum(1)
            if dim:
                used += [sizes] if name.endswith('.weight') else []
            elif name.endswith(('norm.weight', 'norm.bias')):
                norms.append(sizes)
            elif name.endswith('.weight'):
                made.append(sizes)
        return sum(norms or made) * sum(used)

    def choose(self, removed: int, state_dict: StateDict) -> Tensor:
        """The units that stay, ascending, if so many are removed."""
        order = self.importance(state_dict)[self.first:].argsort(stable=True) + self.first
        return torch.cat([torch.arange(self.first), order[removed:].sort().values])


def wave_group(name: str, mixer: CMixer) -> Group:
    """The waves of a CMixer: those below C stay, an argmax may pick them."""
    unit = wave_unit(mixer.refine.conv.weight.shape[1])
    hidden = mixer.proj_out.in_channels
    return Group(name, hidden, hidden // unit,
                 {'proj_in': 2, 'complex_weight': 1, 'refine': 1, 'se.expand': 1},
                 {'se.squeeze': 1, 'proj_out': 1}, -(-mixer.proj_in.in_channels // unit))


def inner_groups(name: str, mixer: SMixer) -> list[Group]:
    """The inner channels of an SMixer, number k of both branches together.

    Full convolutions have others behind them than before them.
    """
    inner = mixer.proj_in.out_channels
    gates = {'high_se.expand': 1, 'low_se.expand': 1}
    used = {'high_se.squeeze': 1, 'low_se.squeeze': 1, 'proj_out': 2}
    if mixer.high_freq.conv.weight.shape[1] == 1:
        return [Group(name, inner, inner, {'proj_in': 1, 'high_freq': 1, 'low_freq': 1} | gates,
                      {'gamma': 1} | used)]
    stack = [f'low_freq.{i}' for i in (0, 1)] if isinstance(
        mixer.low_freq, nn.Sequential) and len(mixer.low_freq) == 2 else ['low_freq']
    return [Group(name, inner, inner, {'proj_in': 1}, {'gamma': 1, 'high_freq': 1, stack[0]: 1}),
            *(Group(name, inner, inner, {before: 1}, {after: 1})
              for before, after in pairwise(stack)),
            Group(name, inner, inner, {'high_freq': 1, stack[-1]: 1} | gates, used)]


def ffn_groups(name: str, layer: nn.Module) -> list[Group]:
    """The hidden channels of a transformer layer's feed-forward network."""
    hidden = layer.linear1.out_features
    return [Group(name, hidden, hidden, {'linear1': 1}, {'linear2': 1})]


def csp_groups(name: str, layer: nn.Module) -> list[Group]:
    """The channels before and between the RepVGG blocks of a fusion block."""
    width = layer.conv1.conv.out_channels
    chain = ['conv1', *(f'blocks.{i}' for i in range(len(layer.blocks)))]
    return [Group(name, width, width, {before: 1}, {after: 1}) for before, after in pairwise(chain)]


class Pruning:
    """A model while it gets smaller: its config, its weights, and what was changed.

    Args:
        model: In training form; it stays as it is.
        config: Its config, which is changed.

    Attributes:
        state_dict: The weights that are left.
        changes: Settings of the model's config as they were and as they are, by their names.
    """

    def __init__(self, model: nn.Module, config: Config):
        self.modules = dict(model.named_modules())
        self.settings = config.model
        self.state_dict = dict(model.state_dict())
        self.archs = {name: part.arch for name, part in self.modules.items()
                      if isinstance(part, SpaRTAN)}
        self.changes: dict[str, tuple[Any, Any]] = {}

    def narrow(self, kind: str, share: float) -> None:
        """Leave out a share of what may go of a kind, a key of PRUNABLE.

        Raises:
            UsageError: The model has none, or too little would be left.
        """
        widths = defaultdict(list)
        for (owner, key, _), groups in self._find_groups(kind).items():
            free = groups[0].units - groups[0].first
            removed = int(share * free + 0.5)
            if groups[0].units - removed < 2:
                raise UsageError(f'--{kind} {share:g} leaves less than two of the '
                                 f'{groups[0].channels} channels of {groups[0].module}; take a '
                                 'smaller share')
            for group in groups:
                kept = group.choose(removed, self.state_dict)
                for name, dim, tensor in [*group.tensors(self.state_dict)]:
                    self.state_dict[name] = tensor.index_select(dim + 1, kept).flatten(dim, dim + 2)
            unit = groups[0].channels // groups[0].units
            widths[owner, key].append((groups[0].channels, groups[0].channels - removed * unit))
        if not widths:
            raise UsageError(f'--{kind}: the model has no {PRUNABLE[kind]}; drop the flag')
        for (owner, key), pairs in widths.items():
            before, after = zip(*pairs, strict=True)
            if before != after:
                self._set(owner, key, before, after)

    def drop_blocks(self, wanted: int | Sequence[str]) -> None:
        """Leave out whole blocks of SpaRTAN.

        Args:
            wanted: How many, those that add least, or the names of modules.

        Raises:
            UsageError: There are no such blocks, or a stage would lose its last one.
        """
        stages = {f'{name}.stages.{stage}': [
            f'{name}.stages.{stage}.blocks.{block}' for block in range(depth)]
            for name, arch in self.archs.items() for stage, depth in enumerate(arch['depths'])}
        blocks = sum(stages.values(), [])
        if isinstance(wanted, int):
            # Of each stage all may go but the block that adds most.
            free = [name for names in stages.values()
                    for name in sorted(names, key=self._block_size)[:-1]]
            if wanted > len(free):
                raise UsageError(f'--blocks {wanted}: SpaRTAN has {count(len(blocks), "block")} '
                                 f'here, of which {len(free)} may go, since each stage keeps one')
            wanted = sorted(free, key=self._block_size)[:wanted]
        if unknown := [name for name in wanted if name not in blocks]:
            raise UsageError(f'--blocks: there is no block {join(unknown, 3)}; there are '
                             f'{join(blocks, 3, "none")}')
        if empty := [stage for stage, names in stages.items() if not {*names} - {*wanted}]:
            raise UsageError(f'--blocks: {empty[0]} would lose all its blocks; leave one')

        numbers = {}
        for stage, names in stages.items():
            left = [name for name in names if name not in wanted]
            numbers |= {name: f'{stage}.blocks.{number}' for number, name in enumerate(left)}
        tensors, self.state_dict = self.state_dict, {}
        for name, tensor in tensors.items():
            block, rest = re.fullmatch(r'(.*\.stages\.\d+\.blocks\.\d+|)(.*)', name).groups()
            if block not in wanted:
                self.state_dict[numbers.get(block, block) + rest] = tensor
        for name, arch in self.archs.items():
            depths = tuple(len({*stages[f'{name}.stages.{stage}']} - {*wanted})
                           for stage in range(len(arch['depths'])))
            if depths != arch['depths']:
                self._set(name, 'depths', arch['depths'], depths)

    def _find_groups(self, kind: str) -> dict[tuple, list[Group]]:
        """Groups by what has one width: the part of the model, the key in its config, a number."""
        found = defaultdict(list)
        for name, part in self.modules.items():
            owner, _, rest = name.partition('.stages.')
            if kind == 'waves' and isinstance(part, CMixer):
                found[owner, 'hidden_channels', rest.partition('.')[0]] += [wave_group(name, part)]
            elif kind == 'inner' and isinstance(part, SMixer):
                found[owner, 'inner_channels', rest.partition('.')[0]] += inner_groups(name, part)
            owner = name.partition('.')[0]
            if kind == 'ffn' and owner in ('neck', 'decoder') and hasattr(part, 'linear1'):
                found[owner, 'ffn_dims', ''] += ffn_groups(name, part)
            elif (kind == 'csp' and owner == 'neck' and len(getattr(part, 'blocks', ()))
                    and hasattr(part, 'conv3')):
                found[owner, 'block_channels', ''] += csp_groups(name, part)
        return found

    def _block_size(self, name: str) -> float:
        """How much a block adds to a channel, as far as its last weights can tell."""
        return sum((self.state_dict[f'{name}.{mixer}.proj_out.weight'].flatten(1)
                    * self.state_dict[f'{name}.{scale}'].view(-1, 1)).square().sum().item()
                   for mixer, scale in (('smixer', 'layer_scale1'), ('cmixer', 'layer_scale2')))

    def _set(self, part: str, key: str, before: tuple, after: tuple) -> None:
        """Let the config say what the weights are."""
        settings = self.settings
        for word in part.split('.'):
            settings = settings[word]
        if part in self.archs:
            self.archs[part] = settings['arch'] = dict(self.archs[part], **{key: after})
            key = f'arch.{key}'
        else:
            (before, ), (after, ) = before, after
            settings[key] = after
        self.changes[f'{part}.{key}'] = before, after


class Pruned(NamedTuple):
    """What was written."""

    config: Path
    checkpoint: Path
    changes: dict[str, tuple[Any, Any]]  # see Pruning
    parameters: tuple[int, int]  # their number before and after


def prune_checkpoint(config: Config, checkpoint: str | Path, stem: str | Path,
                     shares: Mapping[str, float], blocks: int | Sequence[str] = 0) -> Pruned:
    """Write a smaller model, config and checkpoint, which can be trained, tested and deployed.

    The config starts a training from the checkpoint.

    Args:
        config: The model's; it stays as it is.
        checkpoint: The weights after training, a path or a URL.
        stem: The files to write, without '.py' and '.pth'.
        shares: How much to leave out of what, a key of PRUNABLE.
        blocks: Blocks of SpaRTAN to leave out, see :meth:`Pruning.drop_blocks`.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        CheckpointError: It does not fit the config, or is of the deploy form.
        UsageError: The model has nothing of that kind, or too little would be left.
        UnwritableError: The files cannot be written.
    """
    stem = Path(stem)
    paths = [check_writable(stem.with_name(stem.name + suffix), checkpoint, config.filename or '')
             for suffix in ('.py', '.pth')]
    config = Config(config.to_dict())
    config.model = without_pretrained(config.model)
    with DefaultScope.overwrite_default_scope(config.get('default_scope')):
        model = MODELS.build(config.model)
        meta = find_meta(load_for_inference(model, checkpoint))
        if is_deployed(model):
            raise CheckpointError(f'{checkpoint} is of the deploy form, which cannot be pruned; '
                                  'take the one that it was made of, and deploy what '
                                  'becomes of it')
        pruning = Pruning(model, config)
        for kind, share in shares.items():
            pruning.narrow(kind, share)
        pruning.drop_blocks(blocks)
        smaller = MODELS.build(config.model)
        load_all_weights(smaller, pruning.state_dict, str(checkpoint))

    config.pop('work_dir', None)  # Its training is another one.
    config.resume, config.load_from = False, str(paths[1])
    text = config.pretty_text
    # What a training leaves to the one that resumes it is of no use.
    meta = {key: value for key, value in meta.items() if key != 'config'} | dict(cfg=text)
    save_checkpoint(dict(meta=meta, state_dict=pruning.state_dict), paths[1])
    with write_whole(paths[0]) as file:
        file.write(text.encode())
    return Pruned(*paths, pruning.changes, tuple(
        sum(parameter.numel() for parameter in part.parameters()) for part in (model, smaller)))
