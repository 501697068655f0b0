"""Layers that SpaRTAN uses and its paper takes as known, and the gradient of a superposition."""
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

EPS = 1e-6  # NOTE: PyTorch's default is 1e-5; the released weights were trained with this.


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each position on its own, as ConvNeXt has it."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupNorm1(nn.GroupNorm):
    """Group norm of one group: statistics over the channels and positions of a sample together."""

    def __init__(self, channels: int, eps: float = EPS):
        super().__init__(1, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return super().forward(avoid_crash(x, self.weight))


@torch.fx.wrap
def avoid_crash(x: Tensor, weight: Tensor | None) -> Tensor:
    """NOTE: PyTorch 2.13 crashes on a CPU, the channels last, in the backward pass of a group
    norm that is asked for the gradients of its parameters alone: the first one after frozen stages.
    """
    alone = weight is not None and weight.requires_grad and not x.requires_grad
    return x.contiguous() if alone and torch.is_grad_enabled() else x


# NOTE: the paper's LayerNorm is, in the released model, a group norm of one group, 'LN'.
NORMS = {
    'BN': partial(nn.BatchNorm2d, eps=EPS),
    'LN': partial(GroupNorm1, eps=EPS),
    'LN2d': partial(LayerNorm2d, eps=EPS),
}
ACTIVATIONS = {'GELU': nn.GELU, 'SiLU': nn.SiLU}


def fold_norm(norm: nn.Module, conv: nn.Conv2d) -> nn.Module:
    """Fold a batch norm into the 1x1 convolution after it; what stays of a norm is returned."""
    if not isinstance(norm, _BatchNorm):
        return norm  # It looks at the map, and its weights cost nothing beside that.
    if conv.bias is None:
        conv.bias = nn.Parameter(conv.weight.new_zeros(len(conv.weight)), requires_grad=False)
    slope = norm.weight * (norm.running_var + norm.eps).rsqrt()
    conv.bias.add_(conv.weight.flatten(1) @ (norm.bias - norm.running_mean * slope))
    conv.weight.mul_(slope.view(-1, 1, 1))
    return nn.Identity()


class FoldingSequential(nn.Sequential):
    """Modules in turn; a batch norm that keeps its statistics is computed with its convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """See :func:`call_in_turn`."""
        return call_in_turn(self, x)


def call_in_turn(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Call modules one after the other, in tune mode where that is possible.

    Tune mode (arXiv 2305.11624): a convolution and a batch norm in evaluation mode are one
    convolution, whose weight is made anew in each step. The gradients of all parameters are those
    of the two, but the map between them is neither computed nor stored.

    It takes a gradient to record, and a pair of PyTorch's own modules without a hook on either.
    """
    modules, done = [*modules], 0
    while done < len(modules):
        pair = modules[done:done + 2]
        if isinstance(x, Tensor) and is_foldable(pair):  # else a tracer is at work
            x = call_folded(*pair, x)
        else:
            x, pair = pair[0](x), pair[:1]
        done += len(pair)
    return x


def is_foldable(pair: list[nn.Module]) -> bool:
    """Whether two modules are to be computed as one convolution, as things stand."""
    kinds = [type(module) for module in pair]
    if nn.Conv2d not in kinds or not {nn.BatchNorm2d, nn.SyncBatchNorm} & {*kinds}:
        return False
    conv, norm = pair if kinds[0] is nn.Conv2d else pair[::-1]
    return (not norm.training and norm.running_var is not None and torch.is_grad_enabled()
            and conv.weight.dtype in (torch.float32, torch.float64)
            and (kinds[0] is nn.Conv2d or _mixes_channels_alone(conv))
            # A compiler joins the norm with what follows anyway, and exporters know what it is.
            and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
            and not nn.modules.module._has_any_global_hook()
            and not is_hooked(conv) and not is_hooked(norm))


def _mixes_channels_alone(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to know, or has changed, what a module computes."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or 'forward' in module.__dict__)


def call_folded(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    """A convolution and a batch norm in evaluation mode, or the other way round, as one step."""
    conv, norm = (first, second) if isinstance(first, nn.Conv2d) else (second, first)
    slope = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        slope = slope * norm.weight
    shift = -norm.running_mean * slope
    if norm.affine:
        shift = shift + norm.bias
    bias = conv.bias
    if conv is first:
        weight = conv.weight * slope.view(-1, 1, 1, 1)
        bias = shift if bias is None else torch.addcmul(shift, bias, slope)
    else:
        weight = conv.weight * slope.view(-1, 1, 1)
        # NOTE: not a product of matrices, which autocast would compute in half precision.
        shift = (conv.weight.flatten(1) * shift).sum(1)
        bias = shift if bias is None else bias + shift
    return conv._conv_forward(x, weight, bias)


class DropPath(nn.Module):
    """Drop a residual branch for some samples of a batch and scale up the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f'rate={self.rate:.4g}'


class KeepStatistics:
    """Context, free to enter again, in which batch norms leave their running statistics alone."""

    def __init__(self, module: nn.Module):
        self.norms = [m for m in module.modules()
                      if isinstance(m, _BatchNorm) and m.track_running_stats]

    def __enter__(self):
        # Not track_running_stats: without it a norm saves fewer tensors, which checkpoint refuses.
        self.saved = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.

    def __exit__(self, *exception):
        for norm, (momentum, num_batches_tracked) in zip(self.norms, self.saved, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches_tracked)


def recompute(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a function of a module, whose maps the backward pass computes again."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    # A second pass over the same batch must not count twice in the running statistics.
    contexts = nullcontext(), KeepStatistics(module)
    return checkpoint(function, x, use_reentrant=False, context_fn=lambda: contexts)


class Superposition(Function):
    """Waves (Eq. 7), and the one of the strongest channel added to all of them (Eq. 8).

    NOTE: by itself autograd would write and add three more maps for what is picked.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(amplitude: Tensor, phase: Tensor, strongest: Tensor,
                channels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Two maps (N, R, H, W) and indices (N, 1, H, W) below `channels` to a map (N, R, H, W).

        What was picked of the two maps is returned besides, (N, 1, H, W) each.
        """
        picked = [x.narrow(1, 0, channels).gather(1, strongest) for x in (amplitude, phase)]
        return torch.addcmul(picked[0] * picked[1], amplitude, phase), *picked

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep what the gradients consist of."""
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad: Tensor | None, *grad_picked: Tensor | None) -> tuple:
        """The gradients of both maps, for those of the three results."""
        amplitude, phase, strongest, *picked = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(amplitude)
        total = grad.sum(1, keepdim=True)  # The strongest wave stands in every channel.
        grads = []
        for other, picked_of_other, addend in zip(
                (phase, amplitude), reversed(picked), grad_picked, strict=True):
            added = total * picked_of_other
            # Of a second derivative alone; nobody else uses what was picked.
            added = added if addend is None else added + addend
            grads.append((grad * other).scatter_add_(1, strongest, added))
        return *grads, None, None


def superpose(amplitude: Tensor, phase: Tensor, strongest: Tensor, channels: int) -> Tensor:
    """See ``Superposition``; without a gradient to record it is the forward step alone."""
    if torch.is_grad_enabled() and not torch.jit.is_tracing():
        return Superposition.apply(amplitude, phase, strongest, channels)[0]
    return Superposition.forward(amplitude, phase, strongest, channels)[0]
