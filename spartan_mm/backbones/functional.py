"""SpaRTAN's mixers after their first projection, with hand-written gradients.

Automatic differentiation stores the result of every elementwise operation. Here a mixer stores
what its convolutions gave; the rest is recomputed in the backward pass, where that costs less than
the memory traffic it saves. On a CPU a batch is worked on in parts that fit the cache, activated
maps are kept, and without a gradient to record a convolution and what follows it are one step of
oneDNN.
``torch.compile`` fuses and recomputes on its own: for it, and wherever the conditions are not met,
the same algebra is left to autograd.

Shapes: maps are (N, C, H, W) in either memory format; R hidden channels; I channels of a branch.
"""
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd import Function
from torch.autograd.function import once_differentiable

aten = torch.ops.aten

_HAS_AVX = (torch.backends.mkldnn.is_available()
            and torch.backends.cpu.get_cpu_capability().startswith('AVX'))

# What is worked on at once on a CPU, in bytes: about half of a last-level cache.
_SLICE_BYTES = 16 * 2 ** 20


class Activation(NamedTuple):
    """An activation in the three forms that a fused step needs.

    Args:
        apply: Out of place, differentiable.
        apply_: In place, not differentiable.
        backward: (gradient, input, out) to the input's gradient, written to `out`.
        onednn: What oneDNN calls it.
    """

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    onednn: str


# nn.GELU and nn.SiLU as they are used here: exact, not approximate.
ACTIVATIONS = {
    nn.GELU: Activation(
        F.gelu, aten.gelu_,
        lambda grad, x, out: aten.gelu_backward.grad_input(grad, x, grad_input=out),
        'gelu'),
    nn.SiLU: Activation(
        F.silu, aten.silu_,
        lambda grad, x, out: aten.silu_backward.grad_input(grad, x, grad_input=out),
        'swish'),
}


class Branch(NamedTuple):
    """What a gated projection reads: ``gate * act(norm(map))``.

    Args:
        map: (N, I, H, W), held by nobody else.
        norm: The norm of it; an ``nn.Identity`` if there is none.
        act: The activation after the norm; an ``nn.Identity`` if the map has gone through it.
        squeeze_excitation: Module that gives the gates (N, I) for the channels' averages (N, I);
            None for no gate.
    """

    map: Tensor | None
    norm: nn.Module
    act: nn.Module
    squeeze_excitation: nn.Module | None


class Scale(NamedTuple):
    """What a residual branch is multiplied by before it is added.

    Args:
        channels: Layer scale, (1, C, 1, 1).
        samples: (N,), 0 for a sample whose branch is dropped; None for 1 everywhere.
    """

    channels: Tensor
    samples: Tensor | None = None


def records() -> bool:
    """Whether results are needed as they are, for a gradient, a compiler or a tracer."""
    return torch.is_grad_enabled() or _traces()


def _traces() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that convolutions are autocast to on the device of `x`, None for no autocast."""
    device = x.device.type
    # Some devices, meta for one, know no autocast and raise at the question.
    if is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _no_autocast(x: Tensor) -> AbstractContextManager:
    return nullcontext() if _autocast_dtype(x) is None else torch.autocast(
        x.device.type, enabled=False)


def knows(act: nn.Module) -> bool:
    """Whether an activation is one of ``ACTIVATIONS``."""
    return type(act) in ACTIVATIONS and getattr(act, 'approximate', 'none') == 'none'


def finish(branch: Branch) -> Tensor:
    """Apply norm and activation of a branch, in place where nothing is recorded."""
    x, act = branch.map, branch.act
    if not isinstance(branch.norm, nn.Identity):
        x = branch.norm(x)
    if isinstance(act, nn.Identity):
        return x
    return act(x) if records() or not knows(act) else ACTIVATIONS[type(act)].apply_(x)


def convolve(x: Tensor, conv: nn.Conv2d, norm: nn.Module, act: nn.Module,
             squeeze_excitation: nn.Module | None = None, weight: Tensor | None = None) -> Branch:
    """Convolve a map, in one step with the activation where no norm stands between them.

    Args:
        x: (N, C, H, W).
        conv: The convolution.
        norm: See :class:`Branch`.
        act: See :class:`Branch`.
        squeeze_excitation: See :class:`Branch`.
        weight: What is used in place of the convolution's own; None for that.

    Returns:
        The result, and what it is still to go through.
    """
    kernel = conv.weight if weight is None else weight
    settings = conv.stride, conv.padding, conv.dilation
    # What hooks expect is the convolution alone.
    if (isinstance(norm, nn.Identity) and _takes_one_step(x, kernel, act)
            and not conv._forward_hooks and not conv._forward_pre_hooks):
        kernel, groups = merge_groups(kernel, conv.groups, x)
        x = _convolve_and_activate(x, kernel, conv.bias, act, *settings, groups)
        return Branch(x, norm, nn.Identity(), squeeze_excitation)
    if weight is None:
        x = conv(x)
    else:
        kernel, groups = merge_groups(weight, conv.groups, x)
        x = F.conv2d(x, kernel, conv.bias, *settings, groups)
    return Branch(x, norm, act, squeeze_excitation)


def _takes_one_step(x: Tensor, weight: Tensor, act: nn.Module) -> bool:
    """Whether oneDNN computes a convolution and what follows it in one step."""
    return (not torch.is_grad_enabled() and knows(act) and _is_on_x86(x) and has_fast_kernels(x)
            and x.dtype == weight.dtype and x.numel() > 0)


def has_fast_kernels(x: Tensor) -> bool:
    """Whether a map is on a CPU, and of a type, that oneDNN has joined steps for."""
    return (_HAS_AVX and x.device.type == 'cpu' and torch.backends.mkldnn.enabled
            and x.dtype == torch.float32 and _autocast_dtype(x) is None)


def _is_on_x86(x: Tensor) -> bool:
    """Whether a map is computed at once on a CPU whose kernels in oneDNN were measured."""
    # Neither subclasses of tensors nor tools that watch the operations, such as counters, know
    # other than the usual ones.
    return (_HAS_AVX and x.device.type == 'cpu' and type(x) is Tensor and not _traces()
            and not torch._C._len_torch_dispatch_stack())


def _convolve_and_activate(x: Tensor, weight: Tensor, bias: Tensor | None, act: nn.Module,
                           stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0),
                           dilation: Sequence[int] = (1, 1), groups: int = 1) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, ACTIVATIONS[type(act)].onednn, [],
        'none')


def _project_and_multiply(x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, factor, weight, bias, [0, 0], [1, 1], [1, 1], 1, 'mul', None, None, [], None)


def cache_parts(x: Tensor, channels: int) -> list[int]:
    """Parts of a batch to work on one after the other, as numbers of samples.

    On a CPU a part fits the cache and is allocated without asking the system for fresh pages; other
    devices want all work at once.

    Args:
        x: (N, C, H, W).
        channels: Channels of the widest map made of it.
    """
    samples = len(x)
    if x.device.type != 'cpu' or samples < 2:
        return [samples]
    sample = channels * x.shape[2] * x.shape[3] * x.element_size()
    number = -(-samples // max(1, _SLICE_BYTES // max(1, sample)))
    size = -(-samples // number)  # about the same for all
    whole, rest = divmod(samples, size)
    return [size] * whole + [rest] * (rest > 0)


def split(x: Tensor, parts: Sequence[int]) -> Sequence[Tensor]:
    """The parts of a batch, see :func:`cache_parts`."""
    return (x, ) if len(parts) == 1 else x.split(parts)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _head(x: Tensor, samples: int) -> Tensor:
    """The first samples of a batch."""
    return x if len(x) == samples else x[:samples]


# ------------------------------------------------------------------------------------------ norm


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group norm with one group, in the memory format of the input.

    Args:
        x: (N, C, H, W).
        weight: (C,), None for 1.
        bias: (C,), None for 0.
        eps: Added to the variance.

    Returns:
        (N, C, H, W).
    """
    if records() and not x.requires_grad and weight is not None and weight.requires_grad:
        # NOTE: PyTorch 2.13 crashes in channels_last on a CPU when asked for the gradients of the
        # parameters alone.
        x = x.detach().requires_grad_()
    if x.device.type == 'cpu' or torch.compiler.is_compiling() or not _is_channels_last(x):
        return F.group_norm(x, 1, weight, bias, eps)
    # Elsewhere PyTorch would copy the map to the contiguous format.
    if _autocast_dtype(x):
        x = x.float()
    if weight is None:
        weight, bias = x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
    return _LayerNorm.apply(x, weight, bias, eps)


class _LayerNorm(Function):
    """:func:`layer_norm` out of reductions and multiplications that work in any layout."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        variance, mean = torch.var_mean(x.to(_wide(x)), (1, 2, 3), correction=0, keepdim=True)
        rstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        slope = rstd * weight.view(-1, 1, 1)  # (N, C, 1, 1)
        return torch.addcmul(bias.view(-1, 1, 1) - mean * slope, x, slope).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        total = grad.sum((2, 3), keepdim=True, dtype=mean.dtype)  # (N, C, 1, 1)
        product = (grad * x).sum((2, 3), keepdim=True, dtype=mean.dtype)
        covariance = (product - mean * total) * rstd
        view = weight.view(-1, 1, 1)
        count = x[0].numel()
        along = -rstd ** 2 * (covariance * view).sum(1, keepdim=True) / count  # (N, 1, 1, 1)
        offset = -rstd * (total * view).sum(1, keepdim=True) / count - along * mean
        grad_x = torch.addcmul(offset, x, along).addcmul_(grad.to(mean.dtype), rstd * view)
        return (grad_x.to(x.dtype), covariance.sum((0, 2, 3)).to(weight.dtype),
                total.sum((0, 2, 3)).to(bias.dtype), None)


# ------------------------------------------------------------------------------------------ waves


def modulate(wave: Tensor, complex_weight: Tensor) -> Tensor:
    """Multiply channels 2j and 2j + 1, as one complex number, by complex weight j (Eq. 9).

    Two real terms a channel, so that the memory format survives. Type promotion with a float32
    weight makes the result of a float16 or bfloat16 wave float32, as in the released model.

    Args:
        wave: (N, R, H, W).
        complex_weight: (R / 2, 2), real and imaginary parts.

    Returns:
        (N, R, H, W).
    """
    real, imag = complex_weight.unbind(1)
    direct = torch.stack([real, real], dim=1).view(-1, 1, 1)  # (R, 1, 1)
    cross = torch.stack([-imag, imag], dim=1).view(-1, 1, 1)

    partner = wave.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)  # 2j and 2j + 1 exchanged
    return wave * direct + partner * cross


def fold_modulation(complex_weight: Tensor, kernel: Tensor) -> Tensor:
    """Put the modulation into the grouped convolution that reads the modulated wave.

    The modulation is linear, acts on each position alone and maps zero padding to itself, so the
    order of the two can be changed where the groups hold whole pairs.

    Args:
        complex_weight: (R / 2, 2), real and imaginary parts.
        kernel: Weight of the convolution (R, channels of a group, k, k), the second an even number.

    Returns:
        The weight, in its shape and type, that gives for the wave what `kernel` gives for the
        modulated wave.
    """
    out_channels, group = kernel.shape[:2]
    groups = 2 * len(complex_weight) // group
    # Pairs (groups, 1, pairs of a group, 1, 1) of the group that an output channel belongs to.
    pairs = complex_weight.to(kernel.dtype).view(groups, 1, group // 2, 2, 1, 1)
    real, imag = pairs.unbind(3)
    kernels = kernel.unflatten(1, (-1, 2)).unflatten(0, (groups, -1))
    on_real, on_imag = kernels.unbind(3)  # (groups, outputs of a group, pairs, k, k)
    folded = torch.stack([on_real * real + on_imag * imag, on_imag * real - on_real * imag], 3)
    return folded.flatten(2, 3).flatten(0, 1)


def merge_groups(kernel: Tensor, groups: int, x: Tensor) -> tuple[Tensor, int]:
    """The weight and the groups of the same convolution, with larger groups where that is faster.

    oneDNN's kernels for a CPU fill vector registers with the channels of a group. They take half
    the time for eight channels, three quarters of the weights zero, that they take for two.

    Args:
        kernel: Weight (R, channels of a group, k, k).
        groups: Groups of the convolution.
        x: A map that tells where and how it will be computed.

    Returns:
        The weight, (R, 8, k, k) if groups were merged, and the number of groups.
    """
    group = kernel.shape[1]
    merged = 8 // group
    if (group * merged != 8 or merged in (1, 8) or groups % merged or records()
            or not _is_on_x86(x)):
        return kernel, groups
    # (larger groups, merged, outputs of a group, channels of a group, k, k)
    kernels = kernel.unflatten(0, (groups // merged, merged, -1))
    own = torch.eye(merged, dtype=kernel.dtype, device=kernel.device)
    kernels = kernels[:, :, :, None] * own.view(merged, 1, merged, 1, 1, 1)
    return kernels.flatten(3, 4).flatten(0, 2), groups // merged


def _split_groups(grad: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """The gradient of a weight, for that of what :func:`merge_groups` made of it."""
    merged = grad.shape[1] // kernel.shape[1]
    grads = grad.unflatten(1, (merged, -1)).unflatten(0, (groups // merged, merged, -1))
    return grads.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 2)


def waves(x: Tensor, strongest: Tensor, weight: Tensor, bias: Tensor, act: nn.Module,
          complex_weight: Tensor | None = None) -> Tensor:
    """Project to phases and amplitudes, add the strongest wave to all, and modulate (Eqs. 7 to 9).

    Args:
        x: (N, C, H, W).
        strongest: (N, 1, H, W), index of the wave that is added to all.
        weight: (2 R, C, 1, 1), the phases' channels before the amplitudes'.
        bias: (2 R,).
        act: Activation of the phase.
        complex_weight: (R / 2, 2), or None for waves that are not modulated.

    Returns:
        (N, R, H, W).
    """
    if _takes_one_step(x, weight, act):
        (phase, amplitude), (phase_bias, amplitude_bias) = weight.chunk(2), bias.chunk(2)
        wave = _convolve_and_activate(x, phase, phase_bias, act)
        wave = _project_and_multiply(x, amplitude, amplitude_bias, wave)
        wave = wave.add_(_pick(wave, strongest))
        return wave if complex_weight is None else _modulate(wave, complex_weight, wave)

    phase, amplitude = F.conv2d(x, weight, bias).chunk(2, dim=1)
    if not records():
        factor = act(phase)
        added = _pick(factor, strongest) * _pick(amplitude, strongest)
        wave = _superpose(factor, amplitude, added, factor)
        return wave if complex_weight is None else _modulate(wave, complex_weight, wave)
    wave = amplitude * act(phase)
    # One gather of the product gives what gathering both factors would.
    wave = wave + wave.gather(1, strongest)
    return wave if complex_weight is None else modulate(wave, complex_weight)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """``x.gather(1, index)`` of one channel, faster where the channels come last."""
    if not _is_channels_last(x):
        return x.gather(1, index)
    return _rows(x).gather(1, index.view(-1, 1)).view(index.shape)


def _add_at(x: Tensor, index: Tensor, source: Tensor) -> None:
    """``x.scatter_add_(1, index, source)`` of one channel, faster where the channels come last."""
    if _is_channels_last(x):
        x, index, source = _rows(x), index.view(-1, 1), source.view(-1, 1)
    x.scatter_add_(1, index, source)


def _superpose(factor: Tensor, amplitude: Tensor, added: Tensor, out: Tensor) -> Tensor:
    """The waves of the phases' activations and the amplitudes, with one wave added to all."""
    return torch.addcmul(added, factor, amplitude, out=out)


def _superpose_backward(grad: Tensor, waves: '_Waves', factor: Tensor, strongest: Tensor,
                        act: Activation, out: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of phases, into the memory of `grad`, and of amplitudes, into that of `out`."""
    # The strongest wave stands in all channels: it gets the sum of their gradients.
    total = grad.sum(1, keepdim=True)
    grad_amplitude = torch.mul(grad, factor, out=out)
    _add_at(grad_amplitude, strongest, total * act.apply(waves.picked_phase))

    grad_phase = act.backward(grad.mul_(waves.amplitude), waves.phase, grad)
    total *= waves.picked_amplitude
    _add_at(grad_phase, strongest, act.backward(total, waves.picked_phase, torch.empty_like(total)))
    return grad_phase, grad_amplitude


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


def _is_complex_in_memory(x: Tensor, complex_weight: Tensor) -> bool:
    """Whether pairs of channels lie next to each other, in a type that has complex numbers."""
    return (x.dtype == complex_weight.dtype and x.dtype in (torch.float32, torch.float64)
            and _is_channels_last(x))


def _as_complex(x: Tensor) -> Tensor:
    """(N, R, H, W) to (N, H, W, R / 2), a view where the channels come last."""
    return torch.view_as_complex(x.permute(0, 2, 3, 1).unflatten(-1, (-1, 2)))


def _modulate(wave: Tensor, complex_weight: Tensor, out: Tensor) -> Tensor:
    """:func:`modulate` without a gradient, in the type of the wave; `out` may be the wave."""
    if _is_complex_in_memory(wave, complex_weight):
        # A complex product takes one pass.
        weight = torch.view_as_complex(complex_weight)
        torch.mul(_as_complex(wave), weight, out=_as_complex(out))
        return out
    return out.copy_(modulate(wave, complex_weight))


def _modulate_backward(grad: Tensor, wave: Tensor, complex_weight: Tensor,
                       scratch: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the wave, into the memory of `grad`, and of the weight."""
    if _is_complex_in_memory(wave, complex_weight) and _is_complex_in_memory(grad, complex_weight):
        weight = torch.view_as_complex(complex_weight)
        product = torch.conj_physical(_as_complex(wave), out=_as_complex(scratch))
        product *= _as_complex(grad)
        grad_weight = _sum_by_channel(scratch).view_as(complex_weight)
        _as_complex(grad).mul_(weight.conj())
        return grad, grad_weight

    pairs, grads = (x.to(complex_weight.dtype).unflatten(1, (-1, 2)) for x in (wave, grad))
    direct = (pairs * grads).sum((0, 2, 3, 4))
    cross = (pairs[:, :, 0] * grads[:, :, 1] - pairs[:, :, 1] * grads[:, :, 0]).sum((0, 2, 3))
    conjugate = complex_weight * complex_weight.new_tensor([1, -1])
    return grad.copy_(modulate(grad, conjugate)), torch.stack([direct, cross], 1)


# ------------------------------------------------------------------------------- gated projection


def gated_projection(branches: Sequence[Branch], weight: Tensor, bias: Tensor,
                     scale: Scale | None = None, residual: Tensor | None = None) -> Tensor:
    """Gate the branches, concatenate them, project them, scale the result and add the residual.

    Gates and scale are numbers for a sample and a channel, and the projection is linear: both are
    multiplied into one weight matrix for each sample instead of into the maps, and the
    concatenation becomes a sum of products.

    Args:
        branches: One or more, with I channels each.
        weight: (C, sum of I, 1, 1).
        bias: (C,).
        scale: Factors of the projection, None for 1.
        residual: (N, C, H, W), None for 0.

    Returns:
        (N, C, H, W), in the memory format of the first branch's map.
    """
    if has_own_gradient(branches):
        channels, samples = scale or (None, None)
        return _GatedProjection.apply(
            [_Tail.of(branch) for branch in branches], samples, residual, channels, weight, bias,
            *[tensor for branch in branches for tensor in (branch.map, *_Tail.parameters(branch))])

    scale, total = _flat(scale), None
    for branch, columns in zip(branches, weight.flatten(1).split(
            [branch.map.shape[1] for branch in branches], 1), strict=True):
        x = finish(branch)
        gated = branch.squeeze_excitation is not None
        if (gated and scale is None and _gates_maps(x, len(columns)) and not records()
                and not _autocast_dtype(x)):
            if total is None:
                total = _constant(bias, scale, x, residual)
            gate = branch.squeeze_excitation(x.mean((2, 3)))
            _add_shared_product(total, x.mul_(gate[:, :, None, None]), columns)
            continue
        matrix = columns[None]
        if scale is not None:
            matrix = scale.channels[:, None] * matrix
            if scale.samples is not None:
                matrix = matrix * scale.samples[:, None, None]
        if gated:
            matrix = matrix * branch.squeeze_excitation(x.mean((2, 3)))[:, None]
        if total is None:
            total = _constant(bias, scale, x, residual)
        if len(matrix) != len(x):
            matrix = matrix.expand(len(x), -1, -1)
        total = _add_product(total, x, matrix.to(x.dtype))
    return total


def has_own_gradient(branches: Sequence[Branch]) -> bool:
    """Whether hand-written gradients are wanted and know what the branches do."""
    return torch.is_grad_enabled() and not _traces() and all(
        # Not a subclass, which may compute something else.
        type(branch.norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and branch.norm.affine
        and branch.norm.track_running_stats and branch.norm.momentum is not None
        and knows(branch.act) and branch.squeeze_excitation is not None
        for branch in branches)


def _flat(scale: Scale | None) -> Scale | None:
    """The scale with (C,) channels."""
    return scale and scale._replace(channels=scale.channels.flatten())


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N * H * W, C), a view where the channels come last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _sum_by_channel(x: Tensor) -> Tensor:
    """(N, C, H, W) to (C,)."""
    return _rows(x).sum(0) if _is_channels_last(x) else x.sum((0, 2, 3))


def _matrices(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H * W, C), a view in either memory format."""
    return x.flatten(2).transpose(1, 2)


def _constant(bias: Tensor, scale: Scale | None, x: Tensor, residual: Tensor | None) -> Tensor:
    """``residual + scale * bias``, a new map in the layout of `x`."""
    bias = bias[None]
    if scale is not None:
        bias = bias * scale.channels
        if scale.samples is not None:
            bias = bias * scale.samples[:, None]
    bias = bias[:, :, None, None]
    if residual is None:
        residual = x.new_zeros(()).expand(len(x), bias.shape[1], *x.shape[2:])
    return (residual + bias).contiguous(memory_format=_layout(x))


def _add_product(total: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """Add a product of (N, C, I) and (N, I, H, W), in place where nothing is recorded."""
    if total.dtype != x.dtype:
        # Under autocast the sum stays in float32 while the product is computed in less.
        product = torch.bmm(_matrices(x), matrix.transpose(1, 2))
        product = product.transpose(1, 2).unflatten(2, total.shape[2:])
        return total + product if records() else total.add_(product)
    if records():
        result = torch.baddbmm(_matrices(total), _matrices(x), matrix.transpose(1, 2))
        return result.transpose(1, 2).unflatten(2, total.shape[2:])
    if total.is_contiguous():
        total.flatten(2).baddbmm_(matrix, x.flatten(2))
    else:
        _matrices(total).baddbmm_(_matrices(x), matrix.transpose(1, 2))
    return total


def _add_shared_product(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add the product of (C, I) and maps (N, I, H, W) in place; the channels come last."""
    if total.dtype == x.dtype:
        _rows(total).addmm_(_rows(x), weight.T)
    else:
        _rows(total).add_(_rows(x) @ weight.T)


def _gates_maps(x: Tensor, channels: int) -> bool:
    """Whether a map is smaller than a weight matrix for each sample, so that it is gated itself."""
    return x.shape[2] * x.shape[3] < channels and _is_channels_last(x)


def _keeps(x: Tensor) -> bool:
    """Whether maps are kept that take longer to compute again than to read, and more memory."""
    return x.device.type == 'cpu'


class _Tail:
    """One branch of a gated projection from its norm on, forwards and backwards, part by part."""

    NUM_PARAMETERS = 6

    def __init__(self, norm: nn.BatchNorm2d | nn.SyncBatchNorm, act: Activation):
        self.norm, self.act = norm, act
        self.training = norm.training
        self.group = _find_group(norm)
        self.unused = ()

    @classmethod
    def of(cls, branch: Branch) -> '_Tail':
        return cls(branch.norm, ACTIVATIONS[type(branch.act)])

    @staticmethod
    def parameters(branch: Branch) -> list[Tensor]:
        """Weight and bias of the norm, of the squeeze and of the excitation."""
        squeeze, expand = branch.squeeze_excitation.squeeze, branch.squeeze_excitation.expand
        return [branch.norm.weight, branch.norm.bias, squeeze.weight, squeeze.bias, expand.weight,
                expand.bias]

    def statistics(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance (I,) that the norm uses; in training its own are updated."""
        norm = self.norm
        if not self.training:
            return norm.running_mean, norm.running_var
        norm.num_batches_tracked.add_(1)
        if len(maps) == 1 and self.group is None and maps[0].device.type == 'cpu' and (
                maps[0].dtype == norm.running_mean.dtype == _wide(norm.running_mean)):
            self.count = maps[0].numel() // maps[0].shape[1]
            return torch.batch_norm_update_stats(
                maps[0], norm.running_mean, norm.running_var, norm.momentum)
        counts = [x.numel() // x.shape[1] for x in maps]
        moments = [self._moments(x) for x in maps]
        dtype = moments[0][0].dtype
        if len(maps) == 1:
            (mean, variance), self.count = moments[0], counts[0]
        else:
            means, variances = map(torch.stack, zip(*moments, strict=True))
            mean, variance = _pool(means, variances, means.new_tensor(counts))
            self.count = sum(counts)
        below = max(1, self.count - 1)
        if self.group is not None:
            # Filled, not copied from the host.
            count = mean.new_full((1, ), self.count, dtype=_wide(mean))
            own = torch.cat([mean, variance, count])
            every = own.new_empty(dist.get_world_size(self.group), len(own))
            dist.all_gather(list(every), own, self.group)
            means, variances, counts = every.tensor_split((len(mean), -1), 1)
            mean, variance = _pool(means, variances, counts.flatten())
            self.count = counts.sum()
            below = (self.count - 1).clamp(min=1)

        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        unbiased = variance * (self.count / below)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
        return mean.to(dtype), variance.to(dtype)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (I,) of a map."""
        norm = self.norm
        if x.device.type == 'cuda':
            mean, rstd = torch.batch_norm_stats(x, norm.eps)
        elif x.device.type == 'cpu' and x.dtype == _wide(x):
            return torch.batch_norm_update_stats(x, None, None, 0.)
        else:
            # The affine's type is the statistics', too.
            _, mean, rstd = torch.native_batch_norm(
                x, norm.weight, norm.bias, None, None, True, 0., norm.eps)
        return mean, rstd ** -2 - norm.eps

    def normalise(self, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor,
                  bias: Tensor, out: Tensor) -> Tensor:
        if not self.unused:
            self.unused = mean.new_empty(0), mean.new_empty(0)
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0., self.norm.eps,
                                       out=(out, *self.unused))[0]

    def forward(self, total: Tensor, maps: Sequence[Tensor], parts: Sequence[int],
                weight: Tensor, samples: Tensor | None, parameters: Sequence[Tensor]
                ) -> list[Tensor]:
        """Add the branch's projection to `total`.

        Args:
            total: (N, C, H, W).
            maps: (n, I, H, W) of each part.
            parts: The numbers of samples in them.
            weight: (C, I), the projection's with its scale.
            samples: (N,), see :class:`Scale`.
            parameters: See :meth:`parameters`.

        Returns:
            What the backward pass needs: mean and variance, (N, I) averages, (N, S) hidden layer
            and (N, I) gates, and the activated maps if they are kept.
        """
        mean, variance = self.statistics(maps)
        norm_weight, norm_bias, *se = parameters
        self.se = _flatten(se, weight.dtype)
        factors = [None] * len(parts) if samples is None else split(samples, parts)
        numbers, activated = [], []
        for x, target, factor in zip(maps, split(total, parts), factors, strict=True):
            y = self.act.apply_(self.normalise(x, mean, variance, norm_weight, norm_bias,
                                               torch.empty_like(x)))
            average = y.mean((2, 3), dtype=weight.dtype)
            hidden, gate = _gate(average, *self.se)
            numbers.append((average, hidden, gate))
            if factor is not None:
                gate = gate * factor[:, None]
            if _gates_maps(y, len(weight)):
                gated = y * gate[:, :, None, None].to(y.dtype)
                _add_shared_product(target, gated, weight.to(y.dtype))
            else:
                _add_product(target, y, (weight * gate[:, None]).to(y.dtype))
            if _keeps(y):
                activated.append(y)
        return [mean, variance, *map(_join, zip(*numbers, strict=True)), *activated]

    def backward(self, grad: Tensor, maps: Sequence[Tensor], parts: Sequence[int],
                 grad_maps: Sequence[Tensor] | None, weight: Tensor, samples: Tensor | None,
                 parameters: Sequence[Tensor], saved: Sequence[Tensor]
                 ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Gradients of the maps, of the parameters, and what the projection needs.

        Args:
            grad: (N, C, H, W).
            maps: As for :meth:`forward`, and so are the next.
            parts: Numbers of samples.
            grad_maps: Where the maps' gradients go; None for new tensors.
            weight: (C, I).
            samples: (N,).
            parameters: See :meth:`parameters`.
            saved: What the forward pass returned.

        Returns:
            The gradients, and (C, I), the product of gradient and gated map.
        """
        mean, variance, average, hidden, gate, *activated = saved
        norm_weight, norm_bias, *_ = parameters
        dtype = maps[0].dtype
        scratch = torch.empty_like(maps[0])

        def normalise(x: Tensor) -> Tensor:
            # Again what followed from the map.
            return self.normalise(x, mean, variance, norm_weight, norm_bias,
                                  _head(scratch, len(x)))

        recomputed = None
        if not activated:
            recomputed = [normalise(x) for x in maps]
            activated = [self.act.apply(y) for y in recomputed]
        weights = gate if samples is None else gate * samples[:, None]
        kind = _GatedMaps if _gates_maps(maps[0], len(weight)) else _GatedMatrices
        step = kind(
            split(grad.to(dtype), parts), activated, parts, weight, weights)
        grad_gate = step.grad_gate if samples is None else step.grad_gate * samples[:, None]
        grad_average, grad_se = _gate_backward(grad_gate, average, hidden, gate, *self.se)
        direct = (grad_average / (grad.shape[2] * grad.shape[3])).to(dtype)

        grads = []
        for number, (x, addend) in enumerate(zip(maps, split(direct, parts), strict=True)):
            y = normalise(x) if recomputed is None else recomputed[number]
            free = None if recomputed is None else activated[number]
            buffer = step.grad_activated(number, addend, free)
            out = buffer if grad_maps is None else grad_maps[number]
            grads.append(self.act.backward(buffer, y, out))

        grad_norm = self._norm_backward(grads, maps, mean, variance, norm_weight, scratch)
        return grads, [*grad_norm, *grad_se], step.product

    def _norm_backward(self, grads: list[Tensor], maps: Sequence[Tensor], mean: Tensor,
                       variance: Tensor, weight: Tensor, scratch: Tensor
                       ) -> tuple[Tensor, Tensor]:
        """Turn the gradients of the normalised maps into those of the maps."""
        rstd = (variance + self.norm.eps).rsqrt()
        if len(maps) == 1 and self.group is None:
            grad, grad_weight, grad_bias = aten.native_batch_norm_backward(
                grads[0], maps[0], weight, mean, variance, mean, rstd, self.training,
                self.norm.eps, [True, True, True])
            grads[0] = grad
            return grad_weight, grad_bias

        # The gradients of weight and bias are sums over all maps, those of the maps need them.
        sums = 0.
        for x, grad in zip(maps, grads, strict=True):
            _, *addends = aten.native_batch_norm_backward(
                grad, x, weight, mean, variance, mean, rstd, False, self.norm.eps,
                [False, True, True])
            sums = sums + torch.stack(addends)
        grad_weight, grad_bias = sums
        slope = (rstd * weight).view(-1, 1, 1)
        if not self.training:
            for grad in grads:
                grad.mul_(slope)
            return grad_weight, grad_bias
        if self.group is not None:
            sums = sums.clone()  # The parameters' gradients are left to whoever averages them.
            dist.all_reduce(sums, group=self.group)
        share_weight, share_bias = (sums / self.count)[:, :, None, None]
        along = -slope * rstd.view(-1, 1, 1) * share_weight
        offset = -slope * share_bias - along * mean.view(-1, 1, 1)
        for x, grad in zip(maps, grads, strict=True):
            affine = torch.addcmul(offset, x, along, out=_head(scratch, len(x)))
            torch.addcmul(affine, grad, slope, out=grad)
        return grad_weight, grad_bias


def _pool(means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (I,) of all values, for those (P, I) of P parts and their numbers (P,)."""
    share = (counts / counts.sum())[:, None]
    mean = (means * share).sum(0)
    return mean, ((variances + (means - mean) ** 2) * share).sum(0)


def _find_group(norm: nn.Module) -> 'dist.ProcessGroup | None':
    """The processes whose batches a norm looks at together; None for this one alone."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available()
            and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class _GatedMatrices:
    """The backward pass through gates that were multiplied into a weight matrix for each sample.

    Args:
        grads: (n, C, H, W) of each part.
        activated: (n, I, H, W) of each part, what was gated.
        parts: The numbers of samples in them.
        weight: (C, I), the projection's with its scale.
        weights: (N, I), the gates with the samples' factors.

    Attributes:
        grad_gate: (N, I), the gradient of `weights`.
        product: (C, I), the product of gradient and gated map.
    """

    def __init__(self, grads: Sequence[Tensor], activated: Sequence[Tensor], parts: Sequence[int],
                 weight: Tensor, weights: Tensor):
        self.grads = [_matrices(grad) for grad in grads]
        # (N, C, I): all that the small tensors need of the maps.
        product = _join([torch.bmm(grad.transpose(1, 2), _matrices(y)).to(weight.dtype)
                         for grad, y in zip(self.grads, activated, strict=True)])
        self.grad_gate = (product * weight).sum(1)
        self.product = product.mul_(weights[:, None]).sum(0)
        self.like = activated
        self.matrices = split((weight * weights[:, None]).to(activated[0].dtype), parts)

    def grad_activated(self, number: int, addend: Tensor, out: Tensor | None) -> Tensor:
        """The gradient of an activated map, plus (n, I) everywhere, in `out` if there is one."""
        out = torch.empty_like(self.like[number]) if out is None else out
        grad, matrix = self.grads[number], self.matrices[number]
        if _is_channels_last(out):
            torch.baddbmm(addend[:, None], grad, matrix, out=_matrices(out))
        else:
            torch.baddbmm(addend[:, :, None], matrix.transpose(1, 2), grad.transpose(1, 2),
                          out=out.flatten(2))
        return out


class _GatedMaps:
    """The backward pass through gates that were multiplied into the maps: as above."""

    def __init__(self, grads: Sequence[Tensor], activated: Sequence[Tensor], parts: Sequence[int],
                 weight: Tensor, weights: Tensor):
        self.weights = split(weights.to(activated[0].dtype)[:, :, None, None], parts)
        grad_gates, products, self.grads = [], [], []
        for grad, y, factors in zip(grads, activated, self.weights, strict=True):
            rows = _rows(grad)
            grad_gated = torch.empty_like(y)
            torch.mm(rows, weight.to(y.dtype), out=_rows(grad_gated))
            product = grad_gated * y
            grad_gates.append(product.sum((2, 3), dtype=weight.dtype))
            products.append(rows.T @ _rows(torch.mul(y, factors, out=product)))
            self.grads.append(grad_gated)
        self.grad_gate = _join(grad_gates)
        self.product = sum(products[1:], products[0]).to(weight.dtype)

    def grad_activated(self, number: int, addend: Tensor, out: Tensor | None) -> Tensor:
        grad = self.grads[number]
        return torch.addcmul(addend[:, :, None, None], grad, self.weights[number], out=grad)


def _flatten(se: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Weights and biases of a squeeze-excitation as matrices and vectors of a type."""
    squeeze, squeeze_bias, expand, expand_bias = _cast(se, dtype)
    return [squeeze.flatten(1), squeeze_bias, expand.flatten(1), expand_bias]


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]


def _gate(average: Tensor, squeeze: Tensor, squeeze_bias: Tensor, expand: Tensor,
          expand_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden layer (N, S) and the gates (N, I) of a squeeze-excitation."""
    hidden = F.linear(average, squeeze, squeeze_bias).relu_()
    return hidden, F.linear(hidden, expand, expand_bias).sigmoid_()


def _gate_backward(grad: Tensor, average: Tensor, hidden: Tensor, gate: Tensor, squeeze: Tensor,
                   squeeze_bias: Tensor, expand: Tensor, expand_bias: Tensor
                   ) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the averages (N, I) and of the four parameters, for that of the gates."""
    grad = aten.sigmoid_backward.default(grad, gate)
    grad_hidden = aten.threshold_backward.default(grad @ expand, hidden, 0)
    return grad_hidden @ squeeze, [
        grad_hidden.T @ average, grad_hidden.sum(0), grad.T @ hidden, grad.sum(0)]


def _wide(x: Tensor) -> torch.dtype:
    """The type that small tensors are computed in: at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scaled(weight: Tensor, channels: Tensor | None) -> Tensor:
    """The projection's weight (C, sum of I) times the layer scale."""
    weight = weight.flatten(1)
    if weight.dtype != _wide(weight):
        weight = weight.to(_wide(weight))
    return weight if channels is None else weight * channels.view(-1, 1)


def _project_backward(grad: Tensor, product: Tensor, weight: Tensor, bias: Tensor,
                      channels: Tensor | None, samples: Tensor | None
                      ) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of layer scale, weight and bias of the projection.

    Args:
        grad: (N, C, H, W).
        product: (C, sum of I), products of `grad` and the gated maps.
        weight: (C, sum of I, 1, 1).
        bias: (C,).
        channels: (1, C, 1, 1), of :class:`Scale`.
        samples: (N,), see :class:`Scale`.
    """
    total = grad.sum((2, 3), dtype=product.dtype)  # (N, C)
    total = total.sum(0) if samples is None else samples.to(total.dtype) @ total
    if channels is None:
        return None, product, total
    channels = channels.flatten()
    grad_channels = (product * weight.flatten(1)).sum(1).addcmul_(total, bias)
    return grad_channels, product * channels[:, None], total * channels


class _GatedProjection(Function):
    """:func:`gated_projection`; what is saved is the branches' maps, and activated if kept."""

    @staticmethod
    def forward(ctx, tails, samples, residual, channels, weight, bias, *tensors):
        saved = []
        # The small tensors are computed in float32 whatever the maps are.
        with _no_autocast(weight):
            scale = None if channels is None else Scale(channels.flatten(), samples)
            total = _constant(bias, scale, tensors[0], residual)
            ctx.scaled = _scaled(weight, channels)
            for tail, columns, x, parameters in _per_branch(tails, ctx.scaled, tensors):
                parts = cache_parts(x, x.shape[1])
                saved += tail.forward(total, split(x, parts), parts, columns, samples, parameters)
        ctx.tails = tails
        ctx.save_for_backward(samples, channels, weight, bias, *tensors, *saved)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        samples, channels, weight, bias, *rest = ctx.saved_tensors
        number = len(ctx.tails) * (1 + _Tail.NUM_PARAMETERS)
        tensors, saved = rest[:number], rest[number:]
        per_tail = len(saved) // len(ctx.tails)
        products, grad_tensors = [], []
        for tail, columns, x, parameters in _per_branch(ctx.tails, ctx.scaled, tensors):
            parts = cache_parts(x, x.shape[1])
            grad_x = torch.empty_like(x) if len(parts) > 1 else None
            grads, grad_parameters, product = tail.backward(
                grad, split(x, parts), parts, None if grad_x is None else split(grad_x, parts),
                columns, samples, parameters, saved[:per_tail])
            saved = saved[per_tail:]
            products.append(product)
            grad_tensors += [grads[0] if grad_x is None else grad_x, *grad_parameters]
        grad_channels, grad_weight, grad_bias = _project_backward(
            grad, torch.cat(products, 1), weight, bias, channels, samples)
        return (None, None, grad if ctx.needs_input_grad[2] else None,
                *_like((grad_channels, grad_weight, grad_bias), (channels, weight, bias)),
                *_like(grad_tensors, tensors))


def _per_branch(tails: Sequence[_Tail], weight: Tensor, tensors: Sequence[Tensor]
                ) -> Iterator[tuple[_Tail, Tensor, Tensor, Sequence[Tensor]]]:
    """Each tail, its columns (C, I) of the weight, its map and its parameters."""
    step = 1 + _Tail.NUM_PARAMETERS
    branches = [tensors[start:start + step] for start in range(0, len(tensors), step)]
    columns = weight.split([x.shape[1] for x, *_ in branches], 1)
    for tail, own, (x, *parameters) in zip(tails, columns, branches, strict=True):
        yield tail, own, x, parameters


def _like(grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients in the shapes and types of what they belong to."""
    like = []
    for grad, tensor in zip(grads, tensors, strict=True):
        if grad is not None and grad.shape != tensor.shape:
            grad = grad.view(tensor.shape)
        if grad is not None and grad.dtype != tensor.dtype:
            grad = grad.to(tensor.dtype)
        like.append(grad)
    return like


# ------------------------------------------------------------------------------------ wave mixing


def mix_waves(x: Tensor, strongest: Tensor, proj_in: nn.Conv2d, act: nn.Module,
              complex_weight: Tensor | None, conv: nn.Conv2d, conv_weight: Tensor, tail: Branch,
              proj_out: nn.Conv2d, scale: Scale | None, residual: Tensor | None) -> Tensor:
    """:func:`waves`, the convolution that refines them, and :func:`gated_projection`.

    Args:
        x: (N, C, H, W).
        strongest: (N, 1, H, W), see :func:`waves`.
        proj_in: The projection to phases and amplitudes.
        act: Activation of the phase.
        complex_weight: See :func:`waves`.
        conv: The convolution that refines the waves.
        conv_weight: What is used in place of its weight.
        tail: What follows it, without a map.
        proj_out: The projection of what this gives.
        scale: See :func:`gated_projection`.
        residual: See :func:`gated_projection`.

    Returns:
        (N, C, H, W).
    """
    if not (knows(act) and has_own_gradient([tail])):
        wave = waves(x, strongest, proj_in.weight, proj_in.bias, act, complex_weight)
        branch = convolve(wave.to(x.dtype), conv, tail.norm, tail.act, tail.squeeze_excitation,
                          conv_weight)
        return gated_projection([branch], proj_out.weight, proj_out.bias, scale, residual)

    channels, samples = scale or (None, None)
    weight, bias = proj_in.weight, proj_in.bias
    dtype = _autocast_dtype(x)
    if dtype:
        x, weight, bias, conv_weight = (
            tensor.to(dtype) for tensor in (x, weight, bias, conv_weight))
    return _MixWaves.apply(
        _Tail.of(tail), conv, ACTIVATIONS[type(act)], samples, strongest, residual, x, weight, bias,
        complex_weight, conv_weight, channels, proj_out.weight, proj_out.bias,
        *_Tail.parameters(tail))


class _MixWaves(Function):
    """:func:`mix_waves`; what is saved is the input and what the first two convolutions gave."""

    @staticmethod
    def forward(ctx, tail, conv, act, samples, strongest, residual, x, proj_weight, proj_bias,
                complex_weight, conv_weight, channels, weight, bias, *parameters):
        # Casts are done, and the small tensors are computed in float32 whatever the maps are.
        with _no_autocast(x):
            parts = cache_parts(x, len(proj_weight))
            kernel, groups = merge_groups(conv_weight, conv.groups, x)
            # Two maps, because each is worked on in one piece.
            projections = list(zip(proj_weight.chunk(2), proj_bias.chunk(2), strict=True))
            kept = []
            for x_part, index in zip(split(x, parts), split(strongest, parts), strict=True):
                phase, amplitude = (F.conv2d(x_part, *each) for each in projections)
                factor = act.apply(phase)
                keep = _keeps(factor)
                picked = _pick(phase, index), _pick(amplitude, index)
                wave = _superpose(factor, amplitude, act.apply(picked[0]) * picked[1],
                                  torch.empty_like(factor) if keep else factor)
                if complex_weight is not None:
                    wave = _modulate(wave, complex_weight, wave)
                refined = F.conv2d(wave, kernel, None, conv.stride, conv.padding, conv.dilation,
                                   groups)
                kept.append(_Waves(phase, amplitude, refined, *picked, factor if keep else None))
            scale = None if channels is None else Scale(channels.flatten(), samples)
            total = _constant(bias, scale, x, residual)
            ctx.scaled = _scaled(weight, channels)
            saved = tail.forward(total, [waves.refined for waves in kept], parts, ctx.scaled,
                                 samples, parameters)
        ctx.tail, ctx.conv, ctx.act, ctx.parts = tail, conv, act, parts
        # Not saved, since it may not be the same when it is recomputed.
        ctx.kernel, ctx.groups = kernel, groups
        ctx.save_for_backward(samples, strongest, x, proj_weight, proj_bias, complex_weight,
                              conv_weight, channels, weight, bias, *parameters,
                              *chain(*kept), *saved)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (samples, strongest, x, proj_weight, proj_bias, complex_weight, conv_weight, channels,
         weight, bias, *rest) = ctx.saved_tensors
        conv, act, parts = ctx.conv, ctx.act, ctx.parts
        parameters, rest = rest[:_Tail.NUM_PARAMETERS], rest[_Tail.NUM_PARAMETERS:]
        kept = [_Waves(*rest[start:start + 6]) for start in range(0, 6 * len(parts), 6)]

        grads, grad_parameters, product = ctx.tail.backward(
            grad, [waves.refined for waves in kept], parts, None, ctx.scaled, samples,
            parameters, rest[6 * len(parts):])
        grad_channels, grad_weight, grad_bias = _project_backward(
            grad, product, weight, bias, channels, samples)

        grad_x, sums = torch.empty_like(x), _Sums()
        # The same for all parts, so that it is in the cache.
        scratch = [torch.empty_like(kept[0].phase)
                   for _ in range(1 if complex_weight is None else 2)]
        halves = proj_weight.chunk(2)
        for number, (waves, x_part, index, out) in enumerate(zip(
                kept, *(split(each, parts) for each in (x, strongest, grad_x)), strict=True)):
            factor = act.apply(waves.phase) if waves.factor is None else waves.factor
            added = act.apply(waves.picked_phase) * waves.picked_amplitude
            wave = _superpose(factor, waves.amplitude, added, _head(scratch[0], len(factor)))
            modulated = wave
            if complex_weight is not None:
                modulated = _modulate(wave, complex_weight, _head(scratch[1], len(wave)))

            grad_wave, addend, _ = aten.convolution_backward(
                grads[number], modulated, ctx.kernel, None, conv.stride, conv.padding,
                conv.dilation, False, [0, 0], ctx.groups, [True, True, False])
            sums.add('kernel', addend)
            grads[number] = None
            if complex_weight is not None:
                grad_wave, addend = _modulate_backward(grad_wave, wave, complex_weight, modulated)
                sums.add('complex', addend)
            grad_waves = _superpose_backward(grad_wave, waves, factor, index, act, wave)
            del factor
            addends = []
            for half, (each, half_weight) in enumerate(zip(grad_waves, halves, strict=True)):
                addend, *grad_half = aten.convolution_backward(
                    each, x_part, half_weight, half_weight.shape[:1], [1, 1], [0, 0], [1, 1],
                    False, [0, 0], 1, [True, True, True])
                addends.append(addend)
                for name, value in zip(('weight', 'bias'), grad_half, strict=True):
                    sums.add((name, half), value)
            torch.add(*addends, out=out)
        grad_proj, grad_proj_bias = (
            torch.cat([sums[name, half] for half in range(2)]) for name in ('weight', 'bias'))
        grad_conv = _split_groups(sums['kernel'], conv_weight, conv.groups)

        tensors = (proj_weight, proj_bias, complex_weight, conv_weight, channels, weight, bias,
                   *parameters)
        return (None, None, None, None, None, grad if ctx.needs_input_grad[5] else None, grad_x,
                *_like((grad_proj, grad_proj_bias, sums.get('complex'), grad_conv, grad_channels,
                        grad_weight, grad_bias, *grad_parameters), tensors))


class _Waves(NamedTuple):
    """What is kept of a part of a batch; picked is what belongs to the strongest wave."""

    phase: Tensor
    amplitude: Tensor
    refined: Tensor
    picked_phase: Tensor
    picked_amplitude: Tensor
    factor: Tensor | None


class _Sums(dict):
    """Sums by name."""

    def add(self, name: Hashable, addend: Tensor) -> None:
        self[name] = self[name] + addend if name in self else addend
