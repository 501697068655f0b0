"""SpaRTAN's mixers after their first projection, with hand-written gradients.

Automatic differentiation stores the result of every elementwise operation. Here a mixer stores
what its convolutions gave; the rest is recomputed in the backward pass, where that costs less than
the memory traffic it saves. On a CPU a batch is worked on in parts that fit the cache.
``torch.compile`` fuses and recomputes on its own: for it, and wherever the conditions are not met,
the same algebra is left to autograd.

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

# What is worked on at once on a CPU, in bytes: about half of a last-level cache.
_SLICE_BYTES = 16 * 2 ** 20


class Activation(NamedTuple):
    """An activation in the three forms that a fused step needs.

    Args:
        apply: Out of place, differentiable.
        apply_: In place, not differentiable.
        backward: (gradient, input, out) to the input's gradient, written to `out`.
    """

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


# nn.GELU and nn.SiLU as they are used here: exact, not approximate.
ACTIVATIONS = {
    nn.GELU: Activation(
        F.gelu, aten.gelu_, lambda grad, x, out: aten.gelu_backward(grad, x, grad_input=out)),
    nn.SiLU: Activation(
        F.silu, aten.silu_, lambda grad, x, out: aten.silu_backward(grad, x, grad_input=out)),
}


class Branch(NamedTuple):
    """What a gated projection reads: ``gate * act(norm(map))``.

    Args:
        map: (N, I, H, W), held by nobody else.
        norm: The norm of it; an ``nn.Identity`` if there is none.
        act: The activation after the norm.
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


def activate(act: nn.Module, x: Tensor) -> Tensor:
    """Apply an activation to a map that nobody else holds, in place where nothing is recorded."""
    return act(x) if records() else ACTIVATIONS[type(act)].apply_(x)


def cache_slices(x: Tensor, channels: int) -> list[slice]:
    """Parts of a batch to work on one after the other.

    On a CPU a part fits the cache and is allocated without asking the system for fresh pages; other
    devices want all work at once.

    Args:
        x: (N, C, H, W).
        channels: Channels of the widest map made of it.
    """
    if x.device.type != 'cpu':
        return [slice(None)]
    sample = channels * x[0, 0].numel() * x.element_size()
    size = max(1, _SLICE_BYTES // sample)
    return [slice(start, start + size) for start in range(0, len(x), size)]


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
    groups = out_channels * 2 * len(complex_weight) // group // out_channels
    # Pairs (groups, 1, pairs of a group, 1, 1) of the group that an output channel belongs to.
    pairs = complex_weight.to(kernel.dtype).view(groups, 1, group // 2, 2, 1, 1)
    real, imag = pairs.unbind(3)
    kernels = kernel.unflatten(1, (-1, 2)).unflatten(0, (groups, -1))
    on_real, on_imag = kernels.unbind(3)  # (groups, outputs of a group, pairs, k, k)
    folded = torch.stack([on_real * real + on_imag * imag, on_imag * real - on_real * imag], 3)
    return folded.flatten(2, 3).flatten(0, 1)



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
    phase, amplitude = F.conv2d(x, weight, bias).chunk(2, dim=1)
    if not records():
        wave = _superpose(act(phase), amplitude, strongest)
        return wave if complex_weight is None else _modulate(wave, complex_weight, wave)
    wave = amplitude * act(phase)
    # One gather of the product gives what gathering both factors would.
    wave = wave + wave.gather(1, strongest)
    return wave if complex_weight is None else modulate(wave, complex_weight)


def _superpose(factor: Tensor, amplitude: Tensor, strongest: Tensor,
               out: Tensor | None = None) -> Tensor:
    """The wave of the phase's activation and the amplitude, with the strongest added to all."""
    wave = torch.mul(factor, amplitude, out=factor if out is None else out)
    return wave.add_(wave.gather(1, strongest))


def _superpose_backward(grad: Tensor, projected: Tensor, factor: Tensor, strongest: Tensor,
                        act: Activation) -> Tensor:
    """The gradient of phases and amplitudes (N, 2 R, H, W)."""
    phase, amplitude = projected.chunk(2, dim=1)
    grad_projected = torch.empty_like(projected)
    grad_phase, grad_amplitude = grad_projected.chunk(2, dim=1)
    torch.mul(grad, factor, out=grad_amplitude)
    torch.mul(grad, amplitude, out=grad_phase)
    act.backward(grad_phase, phase, grad_phase)

    # The strongest wave stands in all channels: it gets the sum of their gradients.
    total = grad.sum(1, keepdim=True)
    phase, amplitude = phase.gather(1, strongest), amplitude.gather(1, strongest)
    grad_amplitude.scatter_add_(1, strongest, total * act.apply(phase))
    amplitude = amplitude * total
    grad_phase.scatter_add_(
        1, strongest, act.backward(amplitude, phase, torch.empty_like(amplitude)))
    return grad_projected


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


def _modulate_backward(grad: Tensor, wave: Tensor,
                       complex_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the wave, into the memory of `grad`, and of the weight."""
    if _is_complex_in_memory(wave, complex_weight) and _is_complex_in_memory(grad, complex_weight):
        weight = torch.view_as_complex(complex_weight)
        wave_grad, grad, factor = grad, _as_complex(grad), _as_complex(wave)
        grad_weight = torch.mul(factor.conj(), grad).sum((0, 1, 2))
        grad.mul_(weight.conj())
        return wave_grad, torch.view_as_real(grad_weight)

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
    if fusible(branches):
        channels, samples = _flat(scale) or (None, None)
        return _GatedProjection.apply(
            [_Tail.of(branch) for branch in branches], samples, residual, channels,
            weight.flatten(1), bias,
            *[tensor for branch in branches for tensor in (branch.map, *_Tail.parameters(branch))])

    scale, total = _flat(scale), None
    for branch, columns in zip(branches, weight.flatten(1).split(
            [branch.map.shape[1] for branch in branches], 1), strict=True):
        x = activate(branch.act, branch.norm(branch.map))
        matrix = columns[None]
        if scale is not None:
            matrix = scale.channels[:, None] * matrix
            if scale.samples is not None:
                matrix = matrix * scale.samples[:, None, None]
        if branch.squeeze_excitation is not None:
            matrix = matrix * branch.squeeze_excitation(x.mean((2, 3)))[:, None]
        if total is None:
            total = _constant(bias, scale, x, residual)
        total = _add_product(total, x, matrix.expand(len(x), -1, -1).to(x.dtype))
    return total


def fusible(branches: Sequence[Branch]) -> bool:
    """Whether hand-written gradients are wanted and know what the branches do."""
    return torch.is_grad_enabled() and not _traces() and all(
        # Not a subclass, which may compute something else.
        type(branch.norm) is nn.BatchNorm2d and branch.norm.affine
        and branch.norm.track_running_stats and branch.norm.momentum is not None
        and type(branch.act) in ACTIVATIONS and branch.squeeze_excitation is not None
        for branch in branches)


def _flat(scale: Scale | None) -> Scale | None:
    """The scale with (C,) channels."""
    return scale and scale._replace(channels=scale.channels.flatten())


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


def _matrix(columns: Tensor, gate: Tensor, channels: Tensor | None,
            samples: Tensor | None) -> Tensor:
    """A weight matrix for each sample (N, C, I), with everything it is scaled by."""
    if channels is not None:
        columns = channels[:, None] * columns
    if samples is not None:
        gate = gate * samples[:, None]
    return columns * gate[:, None]


class _Tail:
    """One branch of a gated projection from its norm on, forwards and backwards, part by part."""

    NUM_PARAMETERS = 6

    def __init__(self, norm: nn.BatchNorm2d, act: Activation):
        self.norm, self.act = norm, act
        self.training = norm.training

    @classmethod
    def of(cls, branch: Branch) -> '_Tail':
        return cls(branch.norm, ACTIVATIONS[type(branch.act)])

    @staticmethod
    def parameters(branch: Branch) -> list[Tensor]:
        """Weight and bias of the norm, of the squeeze and of the excitation."""
        return [branch.norm.weight, branch.norm.bias, *branch.squeeze_excitation.parameters()]

    def statistics(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance (I,) that the norm uses; in training its own are updated."""
        norm = self.norm
        if not self.training:
            return norm.running_mean, norm.running_var
        means, variances, counts = [], [], []
        for x in maps:
            if x.device.type == 'cuda':
                mean, rstd = torch.batch_norm_stats(x, norm.eps)
            else:
                # The affine's type is the statistics', too.
                _, mean, rstd = aten.native_batch_norm(
                    x, norm.weight, norm.bias, None, None, True, 0., norm.eps)
            means.append(mean)
            variances.append(rstd ** -2 - norm.eps)
            counts.append(x.numel() // x.shape[1])
        mean, variance, count = means[0], variances[0], sum(counts)
        if len(maps) > 1:
            share = mean.new_tensor(counts)[:, None] / count
            means = torch.stack(means)
            mean = (means * share).sum(0)
            variance = ((torch.stack(variances) + (means - mean) ** 2) * share).sum(0)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        unbiased = variance * (count / max(count - 1, 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
        norm.num_batches_tracked.add_(1)
        return mean, variance

    def normalise(self, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor,
                  bias: Tensor) -> Tensor:
        return aten.native_batch_norm(
            x, weight, bias, mean, variance, False, 0., self.norm.eps)[0]

    def forward(self, total: Tensor, maps: Sequence[Tensor], parts: Sequence[slice],
                columns: Tensor, channels: Tensor | None, samples: Tensor | None,
                parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Add the branch's projection to `total`; what the backward pass needs is returned."""
        mean, variance = self.statistics(maps)
        norm_weight, norm_bias, *se = parameters
        averages = []
        for x, part in zip(maps, parts, strict=True):
            y = self.act.apply_(self.normalise(x, mean, variance, norm_weight, norm_bias))
            averages.append(y.mean((2, 3), dtype=columns.dtype))
            gate = _gate(averages[-1], *se)[1]
            matrix = _matrix(columns, gate, channels, None if samples is None else samples[part])
            _add_product(total[part], y, matrix.to(x.dtype))
        return mean, variance, torch.cat(averages)

    def backward(self, grad: Tensor, maps: Sequence[Tensor], parts: Sequence[slice],
                 grad_maps: Sequence[Tensor] | None, columns: Tensor, channels: Tensor | None,
                 samples: Tensor | None, parameters: Sequence[Tensor], mean: Tensor,
                 variance: Tensor, average: Tensor
                 ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Gradients of the maps, of the parameters, and what the projection needs.

        Args:
            grad: (N, C, H, W).
            maps: (n, I, H, W) of each part.
            parts: The samples in each of them.
            grad_maps: Where the maps' gradients go; None for new tensors.
            columns: (C, I), the projection's weight.
            channels: (C,), of :class:`Scale`.
            samples: (N,), see :class:`Scale`.
            parameters: See :meth:`parameters`.
            mean: (I,).
            variance: (I,).
            average: (N, I), of the activated map.

        Returns:
            The gradients, and (C, I), the product of gradient and gated map.
        """
        norm_weight, norm_bias, *se = parameters
        hidden, gate = _gate(average, *se)
        kept = gate if samples is None else gate * samples[:, None]
        matrix = _matrix(columns, gate, channels, samples).to(maps[0].dtype)
        scaled = columns if channels is None else channels[:, None] * columns

        grads, grad_gates, product_sum = [], [], 0.
        for number, (x, part) in enumerate(zip(maps, parts, strict=True)):
            # Again what followed from the map.
            y = self.normalise(x, mean, variance, norm_weight, norm_bias)
            activated = self.act.apply(y)

            # (N, C, I): all that the small tensors need of the maps.
            narrow = _matrices(grad[part].to(x.dtype))
            product = torch.bmm(narrow.transpose(1, 2), _matrices(activated)).to(columns.dtype)
            grad_gate = (product * scaled).sum(1)
            if samples is not None:
                grad_gate = grad_gate * samples[part, None]
            grad_gates.append(grad_gate)
            product_sum = product_sum + product.mul_(kept[part, None]).sum(0)

            direct = _gate_input_gradient(grad_gate, hidden[part], gate[part], *se)
            direct = (direct / x[0, 0].numel()).to(x.dtype)
            if _is_channels_last(x):
                torch.baddbmm(direct[:, None], narrow, matrix[part], out=_matrices(activated))
            else:
                torch.baddbmm(direct[:, :, None], matrix[part].transpose(1, 2),
                              narrow.transpose(1, 2), out=activated.flatten(2))
            out = activated if grad_maps is None else grad_maps[number]
            grads.append(self.act.backward(activated, y, out))

        grad_norm = self._norm_backward(grads, maps, mean, variance, norm_weight)
        grad_se = _gate_backward(torch.cat(grad_gates), average, hidden, gate, *se)
        return grads, [*grad_norm, *grad_se], product_sum

    def _norm_backward(self, grads: list[Tensor], maps: Sequence[Tensor], mean: Tensor,
                       variance: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the gradients of the normalised maps into those of the maps."""
        rstd = (variance + self.norm.eps).rsqrt()
        if len(maps) == 1:
            grad, grad_weight, grad_bias = aten.native_batch_norm_backward(
                grads[0], maps[0], weight, mean, variance, mean, rstd, self.training,
                self.norm.eps, [True, True, True])
            grads[0] = grad
            return grad_weight, grad_bias

        view = (-1, 1, 1)
        grad_bias, covariance = 0., 0.
        for x, grad in zip(maps, grads, strict=True):
            grad_bias = grad_bias + _sum_by_channel(grad)
            covariance = covariance + _sum_by_channel((x - mean.view(view)).mul_(grad))
        slope = rstd * weight
        if self.training:
            count = sum(x.numel() // x.shape[1] for x in maps)
            by_map = -slope * rstd ** 2 * covariance / count
            offset = -slope * grad_bias / count - by_map * mean
        for x, grad in zip(maps, grads, strict=True):
            grad.mul_(slope.view(view))
            if self.training:
                grad.addcmul_(x, by_map.view(view)).add_(offset.view(view))
        return covariance * rstd, grad_bias


def _sum_by_channel(x: Tensor) -> Tensor:
    """(N, C, H, W) to (C,)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).sum(0) if _is_channels_last(x) else x.sum((0, 2, 3))


def _gate(average: Tensor, squeeze: Tensor, squeeze_bias: Tensor, expand: Tensor,
          expand_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden layer (N, S) and the gates (N, I) of a squeeze-excitation."""
    squeeze, expand = (w.flatten(1).to(average.dtype) for w in (squeeze, expand))
    hidden = F.linear(average, squeeze, squeeze_bias.to(average.dtype)).relu_()
    return hidden, F.linear(hidden, expand, expand_bias.to(average.dtype)).sigmoid_()


def _gate_input_gradient(grad: Tensor, hidden: Tensor, gate: Tensor, squeeze: Tensor,
                         squeeze_bias: Tensor, expand: Tensor, expand_bias: Tensor) -> Tensor:
    """The gradient of the averages (N, I), for that of the gates."""
    grad_hidden = (grad * gate * (1 - gate)) @ expand.flatten(1).to(grad.dtype) * (hidden > 0)
    return grad_hidden @ squeeze.flatten(1).to(grad.dtype)


def _gate_backward(grad: Tensor, average: Tensor, hidden: Tensor, gate: Tensor, squeeze: Tensor,
                   squeeze_bias: Tensor, expand: Tensor, expand_bias: Tensor) -> list[Tensor]:
    """The gradients of the four parameters, for that of the gates (N, I)."""
    grad = grad * gate * (1 - gate)
    grad_hidden = grad @ expand.flatten(1).to(grad.dtype) * (hidden > 0)
    return [(grad_hidden.T @ average).view_as(squeeze), grad_hidden.sum(0),
            (grad.T @ hidden).view_as(expand), grad.sum(0)]


def _wide(x: Tensor) -> torch.dtype:
    """The type that small tensors are computed in: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _project_backward(grad: Tensor, product: Tensor, weight: Tensor, bias: Tensor,
                      channels: Tensor | None, samples: Tensor | None
                      ) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of layer scale, weight and bias of the projection.

    Args:
        grad: (N, C, H, W).
        product: (C, sum of I), products of `grad` and the gated maps.
        weight: (C, sum of I).
        bias: (C,).
        channels: (C,), of :class:`Scale`.
        samples: (N,), see :class:`Scale`.
    """
    total = grad.sum((2, 3), dtype=product.dtype)  # (N, C)
    total = total.sum(0) if samples is None else samples.to(total.dtype) @ total
    if channels is None:
        return None, product, total
    return total * bias + (product * weight).sum(1), product * channels[:, None], total * channels


class _GatedProjection(Function):
    """:func:`gated_projection`; what is saved is the branches' maps."""

    @staticmethod
    def forward(ctx, tails, samples, residual, channels, weight, bias, *tensors):
        step = 1 + _Tail.NUM_PARAMETERS
        branches = [tensors[start:start + step] for start in range(0, len(tensors), step)]
        saved, start = [], 0
        # The small tensors are computed in float32 whatever the maps are.
        with _no_autocast(weight):
            scale = None if channels is None else Scale(channels, samples)
            total = _constant(bias, scale, tensors[0], residual)
            for tail, (x, *parameters) in zip(tails, branches, strict=True):
                parts = cache_slices(x, x.shape[1])
                columns = weight[:, start:start + x.shape[1]].to(_wide(weight))
                start += x.shape[1]
                saved += tail.forward(total, [x[part] for part in parts], parts, columns, channels,
                                      samples, parameters)
        ctx.tails = tails
        ctx.save_for_backward(samples, channels, weight, bias, *tensors, *saved)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        samples, channels, weight, bias, *rest = ctx.saved_tensors
        step = 1 + _Tail.NUM_PARAMETERS
        products, grad_tensors, start = [], [], 0
        for number, tail in enumerate(ctx.tails):
            x, *parameters = rest[number * step:(number + 1) * step]
            saved = rest[len(ctx.tails) * step:][3 * number:3 * number + 3]
            parts = cache_slices(x, x.shape[1])
            columns = weight[:, start:start + x.shape[1]].to(_wide(weight))
            start += x.shape[1]
            grad_x = torch.empty_like(x) if len(parts) > 1 else None
            grads, grad_parameters, product = tail.backward(
                grad, [x[part] for part in parts], parts,
                None if grad_x is None else [grad_x[part] for part in parts],
                columns, channels, samples, parameters, *saved)
            products.append(product)
            grad_tensors += [grads[0] if grad_x is None else grad_x, *grad_parameters]
        grad_channels, grad_weight, grad_bias = _project_backward(
            grad, torch.cat(products, 1), weight, bias, channels, samples)
        return (None, None, grad if ctx.needs_input_grad[2] else None,
                *_like((grad_channels, grad_weight, grad_bias), (channels, weight, bias)),
                *_like(grad_tensors, rest[:len(ctx.tails) * step]))


def _like(grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients in the types of what they belong to."""
    return [None if grad is None else grad.to(tensor.dtype)
            for grad, tensor in zip(grads, tensors, strict=True)]


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
    if not fusible([tail]):
        wave = waves(x, strongest, proj_in.weight, proj_in.bias, act, complex_weight)
        wave = F.conv2d(wave.to(x.dtype), conv_weight, conv.bias, conv.stride, conv.padding,
                        conv.dilation, conv.groups)
        return gated_projection([tail._replace(map=wave)], proj_out.weight, proj_out.bias, scale,
                                residual)

    channels, samples = _flat(scale) or (None, None)
    weight, bias = proj_in.weight, proj_in.bias
    dtype = _autocast_dtype(x)
    if dtype:
        x, weight, bias, conv_weight = (
            tensor.to(dtype) for tensor in (x, weight, bias, conv_weight))
    return _MixWaves.apply(
        _Tail.of(tail), conv, ACTIVATIONS[type(act)], samples, strongest, residual, x, weight, bias,
        complex_weight, conv_weight, channels, proj_out.weight.flatten(1), proj_out.bias,
        *_Tail.parameters(tail))


class _MixWaves(Function):
    """:func:`mix_waves`; what is saved is the input and what the first two convolutions gave."""

    @staticmethod
    def forward(ctx, tail, conv, act, samples, strongest, residual, x, proj_weight, proj_bias,
                complex_weight, conv_weight, channels, weight, bias, *parameters):
        # Casts are done, and the small tensors are computed in float32 whatever the maps are.
        with _no_autocast(x):
            parts = cache_slices(x, len(proj_weight))
            keep = x.device.type == 'cpu'
            projected, refined, factors, unmodulated = [], [], [], []
            for part in parts:
                projected.append(F.conv2d(x[part], proj_weight, proj_bias))
                phase, amplitude = projected[-1].chunk(2, dim=1)
                factor = act.apply(phase)
                wave = _superpose(factor, amplitude, strongest[part],
                                  torch.empty_like(factor) if keep else None)
                if keep:
                    factors.append(factor)
                    unmodulated.append(wave)
                if complex_weight is not None:
                    wave = _modulate(wave, complex_weight,
                                     torch.empty_like(wave) if keep else wave)
                refined.append(F.conv2d(wave, conv_weight, None, conv.stride, conv.padding,
                                        conv.dilation, conv.groups))
            scale = None if channels is None else Scale(channels, samples)
            total = _constant(bias, scale, x, residual)
            saved = tail.forward(total, refined, parts, weight.to(_wide(weight)), channels, samples,
                                 parameters)
        ctx.tail, ctx.conv, ctx.act = tail, conv, act
        ctx.save_for_backward(samples, strongest, x, proj_weight, proj_bias, complex_weight,
                              conv_weight, channels, weight, bias, *parameters, *saved, *projected,
                              *refined, *factors, *unmodulated)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (samples, strongest, x, proj_weight, proj_bias, complex_weight, conv_weight, channels,
         weight, bias, *rest) = ctx.saved_tensors
        parameters, rest = rest[:_Tail.NUM_PARAMETERS], rest[_Tail.NUM_PARAMETERS:]
        saved, maps = rest[:3], rest[3:]
        conv, act = ctx.conv, ctx.act
        parts = cache_slices(x, len(proj_weight))
        projected, refined, factors, unmodulated = (
            maps[start:start + len(parts)] for start in range(0, 4 * len(parts), len(parts)))

        grads, grad_parameters, product = ctx.tail.backward(
            grad, refined, parts, None, weight.to(_wide(weight)), channels, samples, parameters,
            *saved)
        grad_channels, grad_weight, grad_bias = _project_backward(
            grad, product, weight, bias, channels, samples)

        grad_x, grad_complex = torch.empty_like(x), None
        grad_proj, grad_proj_bias, grad_conv = 0., 0., 0.
        for number, part in enumerate(parts):
            if factors:
                factor, wave = factors[number], unmodulated[number]
            else:
                # Again the wave.
                phase, amplitude = projected[number].chunk(2, dim=1)
                factor = act.apply(phase)
                wave = _superpose(factor, amplitude, strongest[part], torch.empty_like(factor))
            modulated = wave
            if complex_weight is not None:
                modulated = _modulate(wave, complex_weight, torch.empty_like(wave))

            grad_wave, addend, _ = aten.convolution_backward(
                grads[number], modulated, conv_weight, None, conv.stride, conv.padding,
                conv.dilation, False, [0, 0], conv.groups, [True, True, False])
            grad_conv = grad_conv + addend
            grads[number] = modulated = None
            if complex_weight is not None:
                grad_wave, addend = _modulate_backward(grad_wave, wave, complex_weight)
                grad_complex = addend if grad_complex is None else grad_complex + addend
            grad_projected = _superpose_backward(
                grad_wave, projected[number], factor, strongest[part], act)
            del wave, factor, grad_wave
            grad_x[part], addend, addend_bias = aten.convolution_backward(
                grad_projected, x[part], proj_weight, proj_bias.shape, [1, 1], [0, 0], [1, 1],
                False, [0, 0], 1, [True, True, True])
            grad_proj, grad_proj_bias = grad_proj + addend, grad_proj_bias + addend_bias

        tensors = (proj_weight, proj_bias, complex_weight, conv_weight, channels, weight, bias,
                   *parameters)
        return (None, None, None, None, None, grad if ctx.needs_input_grad[5] else None, grad_x,
                *_like((grad_proj, grad_proj_bias, grad_complex, grad_conv, grad_channels,
                        grad_weight, grad_bias, *grad_parameters), tensors))
