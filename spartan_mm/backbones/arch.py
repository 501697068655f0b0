"""What SpaRTAN is given, checked: architecture, options, images, and the weights it loads."""
import math
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .dcls import DCLS

CONV_TYPES = ('full', 'depthwise')

#: Of SMixers: plain ones by their size, and those whose weights find their places.
LOW_FREQ_KERNELS = (3, 5, 7, 11, *DCLS)

#: Keys that an arch dict may have beside the usual ones: widths inside the mixers of each stage.
PRUNED_WIDTHS = ('hidden_channels', 'inner_channels')


def check_choice(name: str, value: Any, choices: Iterable, alternative: str = '') -> None:
    """Raise a ValueError that lists the choices if `value` is none of them."""
    choices = list(choices)  # a value that cannot be hashed can be looked up in a list
    if value not in choices:
        allowed = f'{", ".join(map(repr, choices))} {alternative}'.rstrip()
        raise ValueError(f'{name}={value!r} is not available, choose from: {allowed}')


def check_arch(arch: str | Mapping, conv_types: str | Sequence[str] | None,
               known: Mapping[str, Mapping]) -> dict[str, Any]:
    """Return an architecture, a key of `known` or a dict like its values, as a dict of tuples.

    `conv_types`, for all stages or one for each, stand in place of its own unless they are None. A
    dict may have PRUNED_WIDTHS besides. A ValueError says what is allowed.
    """
    keys = next(iter(known.values())).keys()
    pruned = [key for key in PRUNED_WIDTHS if isinstance(arch, Mapping) and key in arch]
    if not isinstance(arch, Mapping):
        check_choice('arch', arch, known, f'or a dict with {", ".join(keys)}')
        arch = known[arch]
    elif arch.keys() - pruned != keys:
        raise ValueError(
            f'the arch dict must have the keys {", ".join(keys)}, and may have '
            f'{" and ".join(PRUNED_WIDTHS)}: missing {sorted(keys - arch.keys())}, '
            f'unknown {sorted(arch.keys() - keys - {*pruned})}')

    arch = {key: arch[key] if key == 'stem_channels' else tuple(arch[key])
            for key in (*keys, *pruned)}
    if isinstance(conv_types, str):
        arch['conv_types'] = (conv_types, ) * len(arch['depths'])
    elif conv_types is not None:
        arch['conv_types'] = tuple(conv_types)

    lengths = {key: len(arch[key]) for key in arch if key != 'stem_channels'}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError('arch: each stage needs one entry in every list, '
                         f'their lengths are {lengths}')
    for key in ('depths', 'channels', 'expand_ratios', 'stem_channels', *pruned):
        values = (arch[key], ) if key == 'stem_channels' else arch[key]
        if not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(f'arch: {key}={arch[key]} must be positive integers')
    for stage, width in enumerate(arch['channels'], start=1):
        if width % 8:
            below = width // 8 * 8
            nearest = f'{below} or {below + 8}' if below else '8'
            raise ValueError(f'arch: stage {stage} has {width} channels, which is not '
                             f'divisible by 8; take {nearest}')
    for stage, conv_type in enumerate(arch['conv_types'], start=1):
        check_choice(f'conv_types of stage {stage}', conv_type, CONV_TYPES)
    for stage, hidden in enumerate(arch.get('hidden_channels', ()), start=1):
        width, ratio, conv_type = (
            arch[key][stage - 1] for key in ('channels', 'expand_ratios', 'conv_types'))
        unit = wave_unit(ratio if conv_type == 'depthwise' else 1)
        if hidden < width or hidden % unit:
            raise ValueError(f'arch: stage {stage} has {hidden} hidden channels, which must be at '
                             f'least its {width} channels, any of which may be the strongest, and '
                             f'a multiple of {unit}, in whole pairs and groups')
    if min(arch.get('inner_channels', (2, ))) < 2:
        raise ValueError(f'arch: inner_channels={arch["inner_channels"]} must be at least 2')
    return arch


def check_low_freq_kernels(kernels: int | str | Sequence[int | str], conv_types: Sequence[str]
                           ) -> tuple[int | str, ...]:
    """Return the low-frequency kernel of each stage, given one for all or one for each.

    DCLS is depthwise: for all stages it means those of depthwise convolutions. A ValueError says
    what is allowed.
    """
    if isinstance(kernels, Sequence) and not isinstance(kernels, str):
        kernels = tuple(kernels)
        if len(kernels) != len(conv_types):
            raise ValueError(f'low_freq_kernel={kernels} has {len(kernels)} entries for '
                             f'{len(conv_types)} stages; give one for each, or one for all')
    else:
        check_choice('low_freq_kernel', kernels, LOW_FREQ_KERNELS, 'or one of them for each stage')
        if kernels in DCLS and 'depthwise' in conv_types:
            return tuple(kernels if conv_type == 'depthwise' else 3 for conv_type in conv_types)
        kernels = (kernels, ) * len(conv_types)
    for stage, (kernel, conv_type) in enumerate(zip(kernels, conv_types, strict=True), start=1):
        check_choice(f'low_freq_kernel of stage {stage}', kernel, LOW_FREQ_KERNELS)
        if kernel in DCLS and conv_type != 'depthwise':
            raise ValueError(f'low_freq_kernel={kernel!r} is depthwise, but the convolutions of '
                             f'stage {stage} are {conv_type}: take a size for it, or set its '
                             "conv_types to 'depthwise'")
    return kernels


def find_low_freq_kernels(shapes: Mapping[str, Sequence[int]]) -> dict[int, int | str]:
    """The low-frequency kernel of each stage, from 0, by names and shapes of a backbone's tensors.

    In the deploy form, in which no kernel of DCLS differs from another, it is 'dcls'.
    """
    kernels: dict[int, int | str] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r'stages\.(\d+)\.blocks\.0\.smixer\.low_freq\.(.*)', name)
        stage, part = (int(match[1]), match[2]) if match else (0, '')
        if part == '0.weight':
            kernels[stage] = 3
        elif part == 'conv.weight' and len(shape) == 4:
            kernels[stage] = 'dcls' if shape[-1] == DCLS['dcls']['kernel_size'] else shape[-1]
        elif part == 'conv.widths':
            kernels[stage] = 'dcls_gaussian'
        elif part == 'conv.positions':
            kernels.setdefault(stage, 'dcls')
    return kernels


def wave_unit(group: int) -> int:
    """How many waves of a CMixer stay or go together: whole pairs, and whole groups of so many."""
    return math.lcm(2, group)


def check_out_indices(out_indices: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Return indices of stages as ascending numbers from 0; raise a ValueError for others."""
    given = (out_indices, ) if isinstance(out_indices, int) else tuple(out_indices)
    indices = tuple(i + num_stages if i < 0 else i for i in given)
    if (not indices or list(indices) != sorted(set(indices))
            or not set(indices) <= set(range(num_stages))):
        raise ValueError(f'out_indices={out_indices} must be different stages in ascending '
                         f'order, each from {-num_stages} to {num_stages - 1}')
    return indices


def check_images(x: Tensor, min_size: int, name: str) -> Tensor:
    """Refuse images (N, C, H, W) that are too small, and lay them out as the device likes it.

    `name` is that of the backbone, for the error message.
    """
    if min(x.shape[-2:]) < min_size:
        raise ValueError(
            f'the input is {x.shape[-2]} x {x.shape[-1]} pixels (height x width), {name} needs at '
            f'least {min_size} x {min_size}: enlarge or pad it')
    if x.device.type != 'cpu' or torch._C._are_functorch_transforms_active():
        return x  # as the caller has decided; vmap knows one layout alone
    return x.contiguous(memory_format=torch.channels_last)  # twice as fast there


def check_state_dict(backbone: nn.Module, state_dict: MutableMapping[str, Any], prefix: str
                     ) -> None:
    """Refuse weights of another architecture or form than the backbone's: a RuntimeError.

    mmengine loads pretrained weights leniently and only logs what did not fit: such weights would
    leave most of the backbone random without stopping anybody. `prefix` is what its names begin
    with in `state_dict`, which gets what an older deploy form had no need to hold.
    """
    given = {name[len(prefix):]: tuple(getattr(value, 'shape', ()))
             for name, value in state_dict.items() if name.startswith(prefix)}
    expected = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    if not prefix and given and not given.keys() & expected.keys():
        raise RuntimeError(
            f'no tensor of the state dict belongs to SpaRTAN, it begins with '
            f'{next(iter(given))!r}. Convert a checkpoint of the authors with '
            'spartan-mm convert FILE OUT --to mm; for the checkpoint of a classifier or detector '
            "give init_cfg the prefix 'backbone.'")

    # A folded convolution has a bias, which no other form has.
    deploy = 'stem.0.conv.bias' in given
    if given and 'stem.0.conv.weight' in given and deploy != backbone.deploy and (
            'stem.0.norm.running_mean' in expected or backbone.deploy):
        forms = ['training form', 'deploy form']
        raise RuntimeError(
            f'the state dict is that of SpaRTAN in {forms[deploy]}, the model is in '
            f'{forms[backbone.deploy]}: '
            + ('call switch_to_deploy() before loading it' if deploy
               else 'load it before switch_to_deploy() is called'))

    # Deploy forms were written that have the affines of norms before linear mixers folded, too.
    waves = any('.cmixer.refine.' in name for name in expected)  # their argmax is not linear
    norms = ('.norm1.', ) if waves else ('.norm1.', '.norm2.')
    if deploy and not any('.norm1.' in name for name in given):
        state_dict.update({prefix + name: torch.full(shape, float('weight' in name))
                           for name, shape in expected.items()
                           if any(norm in name for norm in norms) and name not in given})

    differences = [
        f'stage {i + 1} has {found} blocks instead of {depth}'
        for i, depth in enumerate(backbone.arch['depths'])
        if (found := len({name.split('.')[3] for name in given
                          if name.startswith(f'stages.{i}.blocks.')})) not in (0, depth)
    ]
    kernels = find_low_freq_kernels(given)
    differences += [
        f'stage {stage + 1} has low_freq_kernel={kernels[stage]!r} instead of {kernel!r}'
        for stage, kernel in find_low_freq_kernels(expected).items()
        if kernels.get(stage, kernel) != kernel]
    differences += [f'{prefix}{name} is {given[name]} instead of {shape}'
                    for name, shape in expected.items() if given.get(name, shape) != shape]
    if differences:
        more = f' (and {len(differences) - 5} more)' if len(differences) > 5 else ''
        raise RuntimeError(
            f'the state dict is of another SpaRTAN than this one: {"; ".join(differences[:5])}'
            f'{more}. Give `arch` and the other options that the weights were trained with')
