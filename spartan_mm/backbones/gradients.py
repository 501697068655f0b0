"""The mixers with hand-written gradients.

Automatic differentiation stores the result of every elementwise operation, and visits a node for
each. Here a mixer is one node. It stores what its convolutions gave; the rest is computed again in
the backward pass, where that costs less than the memory traffic it saves. On a CPU a batch is
worked on in parts that fit the cache, and activated maps are kept.

Shapes: maps are (N, C, H, W) in either memory format; R hidden channels; I channels of a branch; S
of the hidden layer of a squeeze-excitation.
"""
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .functional import (
    ACTIVATIONS,
    Activation,
    Branch,
    Places,
    Scale,
    add_product,
    add_shared_product,
    as_complex,
    autocast_dtype,
    cache_parts,
    constant,
    fold_modulation,
    folds_modulation,
    gates_maps,
    has_hooks,
    is_channels_last,
    is_complex_in_memory,
    is_on_x86,
    knows,
    matrices,
    merge_groups,
    modulate,
    modulate_into,
    no_autocast,
    rows,
    split,
    sum_by_channel,
    superpose,
    traces,
    wide,
)

aten = torch.ops.aten


def has_own_gradient(tails: Sequence[Branch], convs: Sequence[nn.Conv2d]) -> bool:
    """Whether hand-written gradients are wanted, and know what tails and convolutions do."""
    return torch.is_grad_enabled() and not traces() and all(
        # Not a subclass, which may compute something else.
        type(tail.norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and tail.norm.affine
        and tail.norm.track_running_stats and tail.norm.momentum is not None
        and knows(tail.act) and tail.squeeze_excitation is not None
        for tail in tails) and all(
        type(conv) is nn.Conv2d and not has_hooks(conv) and conv.bias is None
        and conv.padding_mode == 'zeros' and not isinstance(conv.padding, str)
        for conv in convs)


# ------------------------------------------------------------------------------------------ tails


class _Tail:
    """One branch of a gated projection from its norm on, forwards and backwards, part by part."""

    NUM_PARAMETERS = 6

    def __init__(self, branch: Branch):
        self.norm, self.act = branch.norm, ACTIVATIONS[type(branch.act)]
        self.training = self.norm.training
        self.group = _find_group(self.norm)
        self.unused = ()

    @staticmethod
    def parameters(branch: Branch) -> list[Tensor]:
        """Weight and bias of the norm, of the squeeze and of the excitation."""
        squeeze, expand = branch.squeeze_excitation.squeeze, branch.squeeze_excitation.expand
        return [branch.norm.weight, branch.norm.bias, squeeze.weight, squeeze.bias, expand.weight,
                expand.bias]

    def statistics(self, maps: Sequence[Tensor], moments: Sequence[tuple[Tensor, Tensor]]
                   ) -> tuple[Tensor, Tensor]:
        """Mean and variance (I,) that the norm uses; in training its own are updated."""
        norm = self.norm
        if not self.training:
            return norm.running_mean, norm.running_var
        norm.num_batches_tracked.add_(1)
        if len(maps) == 1 and self.group is None and maps[0].device.type == 'cpu' and (
                maps[0].dtype == norm.running_mean.dtype == wide(norm.running_mean)):
            self.count = maps[0].numel() // maps[0].shape[1]
            return torch.batch_norm_update_stats(
                maps[0], norm.running_mean, norm.running_var, norm.momentum)
        counts = [x.numel() // x.shape[1] for x in maps]
        moments = moments or [self.moments(x) for x in maps]
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
            count = mean.new_full((1, ), self.count, dtype=wide(mean))
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

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (I,) of a map."""
        norm = self.norm
        if x.device.type == 'cuda':
            mean, rstd = torch.batch_norm_stats(x, norm.eps)
        elif x.device.type == 'cpu' and x.dtype == wide(x):
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
                weight: Tensor, samples: Tensor | None, parameters: Sequence[Tensor],
                moments: Sequence[tuple[Tensor, Tensor]] = ()) -> list[Tensor]:
        """Add the branch's projection to `total`.

        Args:
            total: (N, C, H, W).
            maps: (n, I, H, W) of each part.
            parts: The numbers of samples in them.
            weight: (C, I), the projection's with its scale.
            samples: (N,), see :class:`Scale`.
            parameters: See :meth:`parameters`.
            moments: :meth:`moments` of each part, if they are known.

        Returns:
            What the backward pass needs: mean and variance, (N, I) averages, (N, S) hidden layer
            and (N, I) gates, and the activated maps if they are kept.
        """
        mean, variance = self.statistics(maps, moments)
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
            if gates_maps(y, len(weight)):
                gated = y * gate[:, :, None, None].to(y.dtype)
                add_shared_product(target, gated, weight.to(y.dtype))
            else:
                add_product(target, y, (weight * gate[:, None]).to(y.dtype))
            if _keeps(y):
                activated.append(y)
        return [mean, variance, *map(_join, zip(*numbers, strict=True)), *activated]

    def backward(self, grad: Tensor, maps: Sequence[Tensor], parts: Sequence[int],
                 grad_maps: Sequence[Tensor] | None, weight: Tensor, samples: Tensor | None,
                 parameters: Sequence[Tensor], saved: Sequence[Tensor]
                 ) -> tuple[Callable[[int], Tensor], list[Tensor], Tensor]:
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
            What gives the gradient of the map of a number, each once; the parameters' gradients;
            and (C, I), the product of gradient and gated map.
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
        kind = _GatedMaps if gates_maps(maps[0], len(weight)) else _GatedMatrices
        step = kind(
            split(grad.to(dtype), parts), activated, parts, weight, weights)
        grad_gate = step.grad_gate if samples is None else step.grad_gate * samples[:, None]
        grad_average, grad_se = _gate_backward(grad_gate, average, hidden, gate, *self.se)
        direct = (grad_average / (grad.shape[2] * grad.shape[3])).to(dtype)

        rstd = (variance + self.norm.eps).rsqrt()
        alone = len(maps) == 1 and self.group is None
        grads, sums = [], 0.
        for number, (x, addend) in enumerate(zip(maps, split(direct, parts), strict=True)):
            y = normalise(x) if recomputed is None else recomputed[number]
            free = None if recomputed is None else activated[number]
            buffer = step.grad_activated(number, addend, free)
            out = buffer if grad_maps is None else grad_maps[number]
            grad_y = self.act.backward(buffer, y, out)
            # One map's gradient all at once; of several, the sums that the gradients need.
            grad_x, *addends = aten.native_batch_norm_backward(
                grad_y, x, norm_weight, mean, variance, mean, rstd, alone and self.training,
                self.norm.eps, [alone, True, True])
            grads.append(grad_x if alone else grad_y)
            sums = addends if alone else sums + torch.stack(addends)
        complete = None if alone else self._complete(mean, rstd, norm_weight, sums, scratch)

        def finish(number: int) -> Tensor:
            grad_x, grads[number] = grads[number], None
            return grad_x if complete is None else complete(grad_x, maps[number])

        return finish, [*sums, *grad_se], step.product

    def _complete(self, mean: Tensor, rstd: Tensor, weight: Tensor, sums: Tensor, scratch: Tensor
                  ) -> Callable[[Tensor, Tensor], Tensor]:
        """What turns the gradient of a normalised map into that of the map, in its memory.

        One at a time, so that each can be used while it is in the cache.
        """
        slope = (rstd * weight).view(-1, 1, 1)
        if not self.training:
            return lambda grad, x: grad.mul_(slope)
        if self.group is not None:
            sums = sums.clone()  # The parameters' gradients are left to whoever averages them.
            dist.all_reduce(sums, group=self.group)
        share_weight, share_bias = (sums / self.count)[:, :, None, None]
        along = -slope * rstd.view(-1, 1, 1) * share_weight
        offset = -slope * share_bias - along * mean.view(-1, 1, 1)

        def complete(grad: Tensor, x: Tensor) -> Tensor:
            affine = torch.addcmul(offset, x, along, out=_head(scratch, len(x)))
            return torch.addcmul(affine, grad, slope, out=grad)

        return complete


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
        self.grads = [matrices(grad) for grad in grads]
        # (N, C, I): all that the small tensors need of the maps.
        product = _join([torch.bmm(grad.transpose(1, 2), matrices(y)).to(weight.dtype)
                         for grad, y in zip(self.grads, activated, strict=True)])
        self.grad_gate = (product * weight).sum(1)
        self.product = product.mul_(weights[:, None]).sum(0)
        self.like = activated
        self.matrices = split((weight * weights[:, None]).to(activated[0].dtype), parts)

    def grad_activated(self, number: int, addend: Tensor, out: Tensor | None) -> Tensor:
        """The gradient of an activated map, plus (n, I) everywhere, in `out` if there is one."""
        out = torch.empty_like(self.like[number]) if out is None else out
        grad, matrix = self.grads[number], self.matrices[number]
        if is_channels_last(out):
            torch.baddbmm(addend[:, None], grad, matrix, out=matrices(out))
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
            grad_gated, grad = torch.empty_like(y), rows(grad)
            torch.mm(grad, weight.to(y.dtype), out=rows(grad_gated))
            product = grad_gated * y
            grad_gates.append(product.sum((2, 3), dtype=weight.dtype))
            products.append(grad.T @ rows(torch.mul(y, factors, out=product)))
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
    grad_hidden = aten.threshold_backward.default(grad.mm(expand), hidden, 0)
    return grad_hidden.mm(squeeze), [
        grad_hidden.t().mm(average), grad_hidden.sum(0), grad.t().mm(hidden), grad.sum(0)]


def _scaled(weight: Tensor, channels: Tensor | None) -> Tensor:
    """The projection's weight (C, sum of I) times the layer scale."""
    weight = weight.flatten(1)
    if weight.dtype != wide(weight):
        weight = weight.to(wide(weight))
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


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _head(x: Tensor, samples: int) -> Tensor:
    """The first samples of a batch."""
    return x if len(x) == samples else x[:samples]


def _keeps(x: Tensor) -> bool:
    """Whether maps are kept that take longer to compute again than to read, and more memory."""
    return x.device.type == 'cpu'


# ----------------------------------------------------------------------------------- convolutions


def _convolve(x: Tensor, kernel: Tensor, conv: nn.Conv2d, groups: int) -> Tensor:
    return F.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation, groups)


def _convolve_backward(grad: Tensor, x: Tensor, kernel: Tensor, conv: nn.Conv2d, groups: int
                       ) -> tuple[Tensor, Tensor]:
    """The gradients of a map, and of the weight of a convolution.

    Args:
        grad: (N, R, H', W').
        x: (N, R, H, W).
        kernel: The weight, or what :func:`merge_groups` made of it.
        conv: The convolution.
        groups: Those of `kernel`.
    """
    settings = conv.stride, conv.padding, conv.dilation
    centred = all(
        stride == 1 and 2 * padding == dilation * (size - 1)
        for stride, padding, dilation, size in zip(*settings, kernel.shape[2:], strict=True))
    # For groups oneDNN has a faster way forwards than backwards, and for single channels another.
    mirrors = groups > 1 and centred and is_on_x86(x)
    pairs = groups != conv.groups and conv.weight.shape[1] == 2 and is_complex_in_memory(x, x)

    def backward(x: Tensor, groups: int, *wanted: bool) -> tuple[Tensor, Tensor]:
        like = kernel if groups != len(kernel) else kernel[:, :1]
        return aten.convolution_backward(
            grad, x, like, None, *settings, False, [0, 0], groups, [*wanted, False])[:2]

    grad_x, grad_kernel = None, None
    if not (mirrors and pairs):
        grad_x, grad_kernel = backward(x, groups, not mirrors, not pairs)
    if mirrors:
        mirrored = kernel.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip((2, 3))
        grad_x = _convolve(grad, mirrored, conv, groups)
    if pairs:
        # For each channel its own, and with i times the conjugate, the other of the pair.
        own, other = (backward(each, len(kernel), False, True)[1].unflatten(0, (-1, 2))
                      for each in (x, _exchange(x)))
        grad_kernel = torch.stack([own[:, 0], other[:, 0], other[:, 1], own[:, 1]], 1)
        return grad_x, grad_kernel.view(len(kernel), 2, *kernel.shape[2:])
    return grad_x, _split_groups(grad_kernel, conv.weight, conv.groups)


def _exchange(x: Tensor) -> Tensor:
    """Channels 2j and 2j + 1 exchanged, where the channels come last."""
    exchanged = torch.empty_like(x)
    torch.conj_physical(as_complex(x), out=as_complex(exchanged)).mul_(1j)
    return exchanged


def _split_groups(grad: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """The gradient of a weight, for that of what :func:`merge_groups` made of it."""
    merged = grad.shape[1] // kernel.shape[1]
    if merged == 1:
        return grad
    grads = grad.unflatten(1, (merged, -1)).unflatten(0, (groups // merged, merged, -1))
    return grads.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 2)


# ---------------------------------------------------------------------------------- spatial mixing


def mix_space(x: Tensor, proj_in: nn.Conv2d, gamma: Tensor, stacks: Sequence[Sequence[nn.Conv2d]],
              tails: Sequence[Branch], proj_out: nn.Conv2d, scale: Scale | None,
              residual: Tensor | None) -> Tensor:
    """Decompose, convolve in branches, and :func:`gated_projection`.

    Args:
        x: (N, C, H, W).
        proj_in: The projection to the branches' width.
        gamma: (1, I, 1, 1), what the difference from the average is weighed with.
        stacks: The convolutions of each branch.
        tails: What follows them, without a map; :func:`has_own_gradient` of all.
        proj_out: The projection of what these give.
        scale: See :func:`gated_projection`.
        residual: See :func:`gated_projection`.

    Returns:
        (N, C, H, W).
    """
    channels, samples = scale or (None, None)
    dtype = autocast_dtype(x) or x.dtype
    tensors = [tensor for stack, tail in zip(stacks, tails, strict=True) for tensor in (
        *_cast([conv.weight for conv in stack], dtype), *_Tail.parameters(tail))]
    return _MixSpace.apply(
        stacks, [_Tail(tail) for tail in tails], samples, residual, x.to(dtype), proj_in.weight,
        proj_in.bias, gamma, channels, proj_out.weight, proj_out.bias, *tensors)


class _MixSpace(Function):
    """:func:`mix_space`; what is saved is what the convolutions gave, and activated if kept."""

    @staticmethod
    def forward(ctx, stacks, tails, samples, residual, x, proj_weight, proj_bias, gamma, channels,
                weight, bias, *tensors):
        # Casts are done, and the small tensors are computed in float32 whatever the maps are.
        with no_autocast(x):
            ctx.decomposition = _Decomposition(x, proj_weight, proj_bias, gamma)
            decomposed = ctx.decomposition.forward(x)
            scale = None if channels is None else Scale(channels.flatten(), samples)
            total = constant(bias, scale, decomposed, residual)
            ctx.scaled = _scaled(weight, channels)
            saved, ctx.ends = [], []
            for stack, tail, columns, kernels, parameters in _per_branch(
                    stacks, tails, ctx.scaled, tensors):
                y = decomposed
                for conv, kernel in zip(stack, kernels, strict=True):
                    y = _convolve(y, kernel, conv, conv.groups)
                    saved.append(y)
                parts = cache_parts(y, y.shape[1])
                saved += tail.forward(total, split(y, parts), parts, columns, samples, parameters)
                ctx.ends.append(len(saved))
        ctx.stacks, ctx.tails = stacks, tails
        ctx.save_for_backward(samples, x, proj_weight, proj_bias, gamma, channels, weight, bias,
                              *tensors, decomposed, *saved)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with no_autocast(grad):
            return _MixSpace._backward(ctx, grad)

    @staticmethod
    def _backward(ctx, grad):
        (samples, x, proj_weight, proj_bias, gamma, channels, weight, bias,
         *rest) = ctx.saved_tensors
        num_tensors = sum(map(len, ctx.stacks)) + len(ctx.tails) * _Tail.NUM_PARAMETERS
        tensors, decomposed, saved = (
            rest[:num_tensors], rest[num_tensors], rest[num_tensors + 1:])
        grad_decomposed, products, grad_tensors = None, [], []
        for (stack, tail, columns, kernels, parameters), (start, end) in zip(
                _per_branch(ctx.stacks, ctx.tails, ctx.scaled, tensors),
                pairwise([0, *ctx.ends]), strict=True):
            *maps, y = decomposed, *saved[start:start + len(stack)]
            parts = cache_parts(y, y.shape[1])
            grad_y = torch.empty_like(y) if len(parts) > 1 else None
            finish, grad_parameters, product = tail.backward(
                grad, split(y, parts), parts, None if grad_y is None else split(grad_y, parts),
                columns, samples, parameters, saved[start + len(stack):end])
            products.append(product)
            finished = [finish(number) for number in range(len(parts))]
            if grad_y is None:
                grad_y, = finished
            grad_kernels = []
            for conv, kernel, z in reversed(list(zip(stack, kernels, maps, strict=True))):
                grad_y, grad_kernel = _convolve_backward(grad_y, z, kernel, conv, conv.groups)
                grad_kernels = [grad_kernel, *grad_kernels]
            grad_decomposed = (
                grad_y if grad_decomposed is None else grad_decomposed.add_(grad_y))
            grad_tensors += [*grad_kernels, *grad_parameters]
        grad_projection = _project_backward(
            grad, torch.cat(products, 1), weight, bias, channels, samples)
        grad_x, *grad_proj = ctx.decomposition.backward(grad_decomposed, x)
        return (None, None, None, grad if ctx.needs_input_grad[3] else None, grad_x,
                *_like([*grad_proj, *grad_projection, *grad_tensors],
                       [proj_weight, proj_bias, gamma, channels, weight, bias, *tensors]))


def _per_branch(stacks: Sequence[Sequence[nn.Conv2d]], tails: Sequence[_Tail], weight: Tensor,
                tensors: Sequence[Tensor]) -> Iterator[tuple[
                    Sequence[nn.Conv2d], _Tail, Tensor, list[Tensor], list[Tensor]]]:
    """Convolutions, tail, columns (C, I) of the weight, kernels and parameters of each branch."""
    remaining = iter(tensors)
    for stack, tail, columns in zip(stacks, tails, weight.chunk(len(tails), 1), strict=True):
        yield (stack, tail, columns, [next(remaining) for _ in stack],
               [next(remaining) for _ in range(_Tail.NUM_PARAMETERS)])


class _Decomposition:
    """The feature decomposition, see ``SMixer.decompose``, forwards and backwards.

    Args:
        x: (N, C, H, W).
        weight: (I, C, 1, 1).
        bias: (I,).
        gamma: (1, I, 1, 1).
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor):
        dtype = wide(weight)
        self.weight, self.bias, self.gamma = _cast(
            (weight.flatten(1), bias, gamma.flatten()), dtype)
        self.average = x.mean((2, 3), dtype=dtype)  # (N, C)
        self.projected = self.average.mm(self.weight.t())  # (N, I)
        self.kernel = torch.addcmul(self.weight, self.weight, self.gamma[:, None])[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, I, H, W)."""
        shift = torch.addcmul(self.bias, self.projected, self.gamma, value=-1)
        y = F.conv2d(x, self.kernel.to(x.dtype))
        return y.add_(shift.to(x.dtype)[:, :, None, None])

    def backward(self, grad: Tensor, x: Tensor) -> list[Tensor]:
        """The gradients of x, weight, bias and gamma for that of the result."""
        grad_x, grad_kernel, _ = aten.convolution_backward(
            grad, x, self.kernel.to(x.dtype), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
            [True, True, False])
        grad_kernel = grad_kernel.flatten(1).to(self.weight.dtype)
        total = grad.sum((2, 3), dtype=self.weight.dtype)  # (N, I)
        # The averages' part, in which gamma has the opposite sign.
        weighed = total * self.gamma
        grad_average = weighed.mm(self.weight)[:, :, None, None]
        grad_x.sub_((grad_average / (x.shape[2] * x.shape[3])).to(x.dtype))
        grad_gamma = (grad_kernel * self.weight).sum(1) - (total * self.projected).sum(0)
        grad_weight = torch.addcmul(grad_kernel, grad_kernel, self.gamma[:, None])
        grad_weight.addmm_(weighed.t(), self.average, alpha=-1)
        return [grad_x, grad_weight, total.sum(0), grad_gamma]


# ------------------------------------------------------------------------------------ wave mixing


def _superpose_backward(grad: Tensor, kept: '_Waves', factor: Tensor, places: Places,
                        act: Activation, out: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The gradient of the amplitudes, in the memory of `out`, then of the phases, in `grad`'s.

    One after the other, so that each is used while it is in the cache.
    """
    # The strongest wave stands in all channels: it gets the sum of their gradients.
    total = grad.sum(1, keepdim=True)
    grad_amplitude = torch.mul(grad, factor, out=out)
    places.add(grad_amplitude, total * act.apply(kept.picked_phase))
    yield 'amplitude', grad_amplitude

    grad_phase = act.backward(grad.mul_(kept.amplitude), kept.phase, grad)
    total *= kept.picked_amplitude
    places.add(grad_phase, act.backward(total, kept.picked_phase, torch.empty_like(total)))
    yield 'phase', grad_phase


def _modulate_backward(grad: Tensor, wave: Tensor, complex_weight: Tensor,
                       scratch: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the wave, into the memory of `grad`, and of the weight."""
    if is_complex_in_memory(wave, complex_weight) and is_complex_in_memory(grad, complex_weight):
        weight = torch.view_as_complex(complex_weight)
        product = torch.conj_physical(as_complex(wave), out=as_complex(scratch))
        product *= as_complex(grad)
        grad_weight = sum_by_channel(scratch).view_as(complex_weight)
        as_complex(grad).mul_(weight.conj())
        return grad, grad_weight

    pairs, grads = (x.to(complex_weight.dtype).unflatten(1, (-1, 2)) for x in (wave, grad))
    direct = (pairs * grads).sum((0, 2, 3, 4))
    cross = (pairs[:, :, 0] * grads[:, :, 1] - pairs[:, :, 1] * grads[:, :, 0]).sum((0, 2, 3))
    conjugate = complex_weight * complex_weight.new_tensor([1, -1])
    return grad.copy_(modulate(grad, conjugate)), torch.stack([direct, cross], 1)


def _fold_backward(grad: Tensor, complex_weight: Tensor, kernel: Tensor
                   ) -> tuple[Tensor, Tensor]:
    """The gradients of the kernel and of the weight, for that of :func:`fold_modulation`."""
    groups = 2 * len(complex_weight) // kernel.shape[1]

    def parts(x: Tensor) -> Sequence[Tensor]:
        # Each (groups, outputs of a group, pairs, k, k).
        return x.to(wide(kernel)).unflatten(1, (-1, 2)).unflatten(0, (groups, -1)).unbind(3)

    (grad_real, grad_imag), (on_real, on_imag) = parts(grad), parts(kernel)
    real, imag = complex_weight.to(wide(kernel)).view(groups, 1, -1, 2, 1, 1).unbind(3)
    grad_kernel = torch.stack([
        grad_real * real - grad_imag * imag, grad_imag * real + grad_real * imag], 3)
    grad_weight = torch.stack([
        (grad_real * on_real + grad_imag * on_imag).sum((1, 3, 4)).flatten(),
        (grad_real * on_imag - grad_imag * on_real).sum((1, 3, 4)).flatten()], 1)
    return grad_kernel.flatten(2, 3).flatten(0, 1), grad_weight


def mix_waves(x: Tensor, strongest: Tensor, proj_in: nn.Conv2d, act: nn.Module,
              complex_weight: Tensor, conv: nn.Conv2d, tail: Branch, proj_out: nn.Conv2d,
              scale: Scale | None, residual: Tensor | None) -> Tensor:
    """:func:`waves`, the convolution that refines them, and :func:`gated_projection`.

    Args:
        x: (N, C, H, W).
        strongest: (N, 1, H, W), see :func:`waves`.
        proj_in: The projection to phases and amplitudes.
        act: Activation of the phase; :func:`knows` it.
        complex_weight: What the waves are modulated by, (R / 2, 2).
        conv: The convolution that refines the waves.
        tail: What follows it, without a map; :func:`has_own_gradient` of both.
        proj_out: The projection of what this gives.
        scale: See :func:`gated_projection`.
        residual: See :func:`gated_projection`.

    Returns:
        (N, C, H, W).
    """
    channels, samples = scale or (None, None)
    x, weight, bias = _cast((x, proj_in.weight, proj_in.bias), autocast_dtype(x) or x.dtype)
    return _MixWaves.apply(
        _Tail(tail), conv, ACTIVATIONS[type(act)], samples, strongest, residual, x, weight,
        bias, complex_weight, conv.weight, channels, proj_out.weight, proj_out.bias,
        *_Tail.parameters(tail))


class _MixWaves(Function):
    """:func:`mix_waves`; what is saved is the input, what the convolutions gave, :class:`_Waves`.

    On a CPU the activated maps as well.
    """

    @staticmethod
    def forward(ctx, tail, conv, act, samples, strongest, residual, x, proj_weight, proj_bias,
                complex_weight, conv_weight, channels, weight, bias, *parameters):
        with no_autocast(x):
            parts = cache_parts(x, len(proj_weight))
            ctx.folds = folds_modulation(conv_weight)
            kernel, modulation = conv_weight, complex_weight
            if ctx.folds:
                kernel, modulation = fold_modulation(complex_weight, kernel), None
            kernel, groups = merge_groups(kernel.to(x.dtype), conv.groups, x)
            # Two maps, because each is worked on in one piece.
            projections = list(zip(proj_weight.chunk(2), proj_bias.chunk(2), strict=True))
            kept, moments = [], []
            for x_part, index in zip(split(x, parts), split(strongest, parts), strict=True):
                phase, amplitude = (F.conv2d(x_part, *each) for each in projections)
                factor, places = act.apply(phase), Places(index, phase)
                keep = _keeps(factor)
                picked = places.pick(phase), places.pick(amplitude)
                wave = superpose(factor, amplitude, act.apply(picked[0]) * picked[1],
                                 torch.empty_like(factor) if keep else factor)
                if modulation is not None:
                    wave = modulate_into(wave, modulation, wave)
                refined = _convolve(wave, kernel, conv, groups)
                kept.append(_Waves(phase, amplitude, refined, *picked, factor if keep else None))
                if tail.training and len(parts) > 1:
                    moments.append(tail.moments(refined))
            scale = None if channels is None else Scale(channels.flatten(), samples)
            total = constant(bias, scale, x, residual)
            ctx.scaled = _scaled(weight, channels)
            saved = tail.forward(total, [each.refined for each in kept], parts, ctx.scaled,
                                 samples, parameters, moments)
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
        with no_autocast(grad):
            return _MixWaves._backward(ctx, grad)

    @staticmethod
    def _backward(ctx, grad):
        (samples, strongest, x, proj_weight, proj_bias, complex_weight, conv_weight, channels,
         weight, bias, *rest) = ctx.saved_tensors
        conv, act, parts = ctx.conv, ctx.act, ctx.parts
        modulation = None if ctx.folds else complex_weight
        parameters, rest = rest[:_Tail.NUM_PARAMETERS], rest[_Tail.NUM_PARAMETERS:]
        every = [_Waves(*rest[start:start + 6]) for start in range(0, 6 * len(parts), 6)]

        finish, grad_parameters, product = ctx.tail.backward(
            grad, [each.refined for each in every], parts, None, ctx.scaled, samples,
            parameters, rest[6 * len(parts):])
        grad_channels, grad_weight, grad_bias = _project_backward(
            grad, product, weight, bias, channels, samples)

        grad_x, sums = torch.empty_like(x), _Sums()
        # The same for all parts, so that it is in the cache.
        scratch = [torch.empty_like(every[0].phase)
                   for _ in range(1 if modulation is None else 2)]
        halves = dict(zip(('phase', 'amplitude'), proj_weight.chunk(2), strict=True))
        for number, (kept, x_part, index, out) in enumerate(zip(
                every, *(split(each, parts) for each in (x, strongest, grad_x)), strict=True)):
            factor = act.apply(kept.phase) if kept.factor is None else kept.factor
            added = act.apply(kept.picked_phase) * kept.picked_amplitude
            wave = superpose(factor, kept.amplitude, added, _head(scratch[0], len(factor)))
            modulated = wave
            if modulation is not None:
                modulated = modulate_into(wave, modulation, _head(scratch[1], len(wave)))

            grad_wave, addend = _convolve_backward(
                finish(number), modulated, ctx.kernel, conv, ctx.groups)
            sums.add('kernel', addend)
            if modulation is not None:
                grad_wave, addend = _modulate_backward(grad_wave, wave, modulation, modulated)
                sums.add('complex', addend)
            addends = []
            for half, each in _superpose_backward(
                    grad_wave, kept, factor, Places(index, factor), act, wave):
                addend, grad_half, _ = aten.convolution_backward(
                    each, x_part, halves[half], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
                    [True, True, False])
                addends.append(addend)
                sums.add(('weight', half), grad_half)
                # By oneDNN it would take longer.
                sums.add(('bias', half), sum_by_channel(each))
            torch.add(*addends, out=out)
        grad_proj, grad_proj_bias = (
            torch.cat([sums[name, half] for half in halves]) for name in ('weight', 'bias'))
        grad_conv, grad_complex = sums['kernel'], sums.get('complex')
        if ctx.folds:
            grad_conv, grad_complex = _fold_backward(grad_conv, complex_weight, conv_weight)

        tensors = (proj_weight, proj_bias, complex_weight, conv_weight, channels, weight, bias,
                   *parameters)
        return (None, None, None, None, None, grad if ctx.needs_input_grad[5] else None, grad_x,
                *_like((grad_proj, grad_proj_bias, grad_complex, grad_conv, grad_channels,
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
