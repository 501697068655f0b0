"""What SpaRTAN's mixers consist of: convolutions in one step with what follows, waves, gates.

On a CPU a batch is worked on in parts that fit the cache, and without a gradient to record a
convolution and what follows it are one step of oneDNN. With one, the mixers have hand-written
gradients (``gradients.py``). ``torch.compile`` fuses and recomputes on its own: for it, and
wherever the conditions of these are not met, the same algebra is left to autograd.

Shapes: maps are (N, C, H, W) in either memory format; R hidden channels; I channels of a branch.
"""
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
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
        map: (N, I, H, W), held by nobody else; None where it is yet to be computed.
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
    return torch.is_grad_enabled() or traces()


def traces() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that convolutions are autocast to on the device of `x`, None for no autocast."""
    device = x.device.type
    # Some devices, meta for one, know no autocast and raise at the question.
    if is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def no_autocast(x: Tensor) -> AbstractContextManager:
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(
        x.device.type, enabled=False)


def knows(act: nn.Module) -> bool:
    """Whether an activation is one of ``ACTIVATIONS``."""
    return type(act) in ACTIVATIONS and getattr(act, 'approximate', 'none') == 'none'


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody expects that the module is called, and its own result."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


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
    if (isinstance(norm, nn.Identity) and _takes_one_step(x, kernel, act)
            and not has_hooks(conv)):
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
    return (not torch.is_grad_enabled() and knows(act) and is_on_x86(x) and has_fast_kernels(x)
            and x.dtype == weight.dtype and x.numel() > 0)


def has_fast_kernels(x: Tensor) -> bool:
    """Whether a map is on a CPU, and of a type, that oneDNN has joined steps for."""
    return (_HAS_AVX and x.device.type == 'cpu' and torch.backends.mkldnn.enabled
            and x.dtype == torch.float32 and autocast_dtype(x) is None)


def is_on_x86(x: Tensor) -> bool:
    """Whether a map is computed at once on a CPU whose kernels in oneDNN were measured."""
    # Neither subclasses of tensors nor tools that watch the operations, such as counters, know
    # other than the usual ones.
    return (_HAS_AVX and x.device.type == 'cpu' and type(x) is Tensor and not traces()
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


def wide(x: Tensor) -> torch.dtype:
    """The type that small tensors are computed in: at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    if x.device.type == 'cpu' or torch.compiler.is_compiling() or not is_channels_last(x):
        return F.group_norm(x, 1, weight, bias, eps)
    # Elsewhere PyTorch would copy the map to the contiguous format.
    if autocast_dtype(x):
        x = x.float()
    if weight is None:
        weight, bias = x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
    return _LayerNorm.apply(x, weight, bias, eps)


class _LayerNorm(Function):
    """:func:`layer_norm` out of reductions and multiplications that work in any layout."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        variance, mean = torch.var_mean(x.to(wide(x)), (1, 2, 3), correction=0, keepdim=True)
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


def folds_modulation(kernel: Tensor) -> bool:
    """Whether the groups of a convolution hold whole pairs, see :func:`fold_modulation`."""
    return kernel.shape[1] % 2 == 0


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
            or not is_on_x86(x)):
        return kernel, groups
    # (larger groups, merged, outputs of a group, channels of a group, k, k)
    kernels = kernel.unflatten(0, (groups // merged, merged, -1))
    own = torch.eye(merged, dtype=kernel.dtype, device=kernel.device)
    kernels = kernels[:, :, :, None] * own.view(merged, 1, merged, 1, 1, 1)
    return kernels.flatten(3, 4).flatten(0, 2), groups // merged


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
        wave = wave.add_(Places(strongest, wave).pick(wave))
        return wave if complex_weight is None else modulate_into(wave, complex_weight, wave)

    phase, amplitude = F.conv2d(x, weight, bias).chunk(2, dim=1)
    if not records():
        factor = act(phase)
        places = Places(strongest, factor)
        added = places.pick(factor) * places.pick(amplitude)
        wave = superpose(factor, amplitude, added, factor)
        return wave if complex_weight is None else modulate_into(wave, complex_weight, wave)
    wave = amplitude * act(phase)
    # One gather of the product gives what gathering both factors would.
    wave = wave + wave.gather(1, strongest)
    return wave if complex_weight is None else modulate(wave, complex_weight)


class Places:
    """Where the strongest waves of a part of a batch stand in a map of the waves.

    Args:
        strongest: (N, 1, H, W), indices of channels.
        like: (N, R, H, W), a map of the waves.
    """

    def __init__(self, strongest: Tensor, like: Tensor):
        self.strongest, self.flat = strongest, None
        if is_channels_last(like):
            size, channels = like.numel(), like.shape[1]
            self.flat = torch.arange(0, size, channels, device=like.device).add_(
                strongest.flatten())

    def pick(self, x: Tensor) -> Tensor:
        """(N, R, H, W) to (N, 1, H, W)."""
        if self.flat is None:
            return x.gather(1, self.strongest)
        return rows(x).flatten().index_select(0, self.flat).view(self.strongest.shape)

    def add(self, x: Tensor, addend: Tensor) -> None:
        """Add (N, 1, H, W) to a map (N, R, H, W), in place."""
        if self.flat is None:
            x.scatter_add_(1, self.strongest, addend)
        else:
            rows(x).flatten().index_add_(0, self.flat, addend.flatten())


def superpose(factor: Tensor, amplitude: Tensor, added: Tensor, out: Tensor) -> Tensor:
    """The waves of the phases' activations and the amplitudes, with one wave added to all."""
    return torch.addcmul(added, factor, amplitude, out=out)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def is_complex_in_memory(x: Tensor, complex_weight: Tensor) -> bool:
    """Whether pairs of channels lie next to each other, in a type that has complex numbers."""
    return (x.dtype == complex_weight.dtype and x.dtype in (torch.float32, torch.float64)
            and is_channels_last(x))


def as_complex(x: Tensor) -> Tensor:
    """(N, R, H, W) to (N, H, W, R / 2), a view where the channels come last."""
    return torch.view_as_complex(x.permute(0, 2, 3, 1).unflatten(-1, (-1, 2)))


def modulate_into(wave: Tensor, complex_weight: Tensor, out: Tensor) -> Tensor:
    """:func:`modulate` without a gradient, in the type of the wave; `out` may be the wave."""
    if is_complex_in_memory(wave, complex_weight):
        # A complex product takes one pass.
        weight = torch.view_as_complex(complex_weight)
        torch.mul(as_complex(wave), weight, out=as_complex(out))
        return out
    return out.copy_(modulate(wave, complex_weight))


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
    scale, total = _flat(scale), None
    for branch, columns in zip(branches, weight.flatten(1).split(
            [branch.map.shape[1] for branch in branches], 1), strict=True):
        x = finish(branch)
        gated = branch.squeeze_excitation is not None
        if (gated and scale is None and gates_maps(x, len(columns)) and not records()
                and not autocast_dtype(x)):
            if total is None:
                total = constant(bias, scale, x, residual)
            gate = branch.squeeze_excitation(x.mean((2, 3)))
            add_shared_product(total, x.mul_(gate[:, :, None, None]), columns)
            continue
        matrix = columns[None]
        if scale is not None:
            matrix = scale.channels[:, None] * matrix
            if scale.samples is not None:
                matrix = matrix * scale.samples[:, None, None]
        if gated:
            matrix = matrix * branch.squeeze_excitation(x.mean((2, 3)))[:, None]
        if total is None:
            total = constant(bias, scale, x, residual)
        if len(matrix) != len(x):
            matrix = matrix.expand(len(x), -1, -1)
        total = add_product(total, x, matrix.to(x.dtype))
    return total


def _flat(scale: Scale | None) -> Scale | None:
    """The scale with (C,) channels."""
    return scale and scale._replace(channels=scale.channels.flatten())


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N * H * W, C), a view where the channels come last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def sum_by_channel(x: Tensor) -> Tensor:
    """(N, C, H, W) to (C,)."""
    return rows(x).sum(0) if is_channels_last(x) else x.sum((0, 2, 3))


def matrices(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H * W, C), a view in either memory format."""
    return x.flatten(2).transpose(1, 2)


def constant(bias: Tensor, scale: Scale | None, x: Tensor, residual: Tensor | None) -> Tensor:
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


def add_product(total: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """Add a product of (N, C, I) and (N, I, H, W), in place where nothing is recorded."""
    if total.dtype != x.dtype:
        # Under autocast the sum stays in float32 while the product is computed in less.
        product = torch.bmm(matrices(x), matrix.transpose(1, 2))
        product = product.transpose(1, 2).unflatten(2, total.shape[2:])
        return total + product if records() else total.add_(product)
    if records():
        result = torch.baddbmm(matrices(total), matrices(x), matrix.transpose(1, 2))
        return result.transpose(1, 2).unflatten(2, total.shape[2:])
    if total.is_contiguous():
        total.flatten(2).baddbmm_(matrix, x.flatten(2))
    else:
        matrices(total).baddbmm_(matrices(x), matrix.transpose(1, 2))
    return total


def add_shared_product(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add the product of (C, I) and maps (N, I, H, W) in place; the channels come last."""
    if total.dtype == x.dtype:
        rows(total).addmm_(rows(x), weight.T)
    else:
        rows(total).add_(rows(x) @ weight.T)


def gates_maps(x: Tensor, channels: int) -> bool:
    """Whether a map is smaller than a weight matrix for each sample, so that it is gated itself."""
    return x.shape[2] * x.shape[3] < channels and is_channels_last(x)
