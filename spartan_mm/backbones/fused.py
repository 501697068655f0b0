"""SpaRTAN's blocks in a form for training on a CPU: same function and weights, less memory traffic.

Automatic differentiation stores the result of every operation on a map, and visits a node for each.
Here a mixer is one node with a hand-written gradient. It stores what its convolutions gave and what
was activated, computes the rest again, and works on parts of a batch that fit the cache.

Maps are (N, C, H, W) with the channels last. R is the number of hidden channels of a CMixer, I of a
branch of an SMixer, S of the hidden layer of a squeeze-excitation.
"""
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .dcls import DCLSConv2d
from .layers import DropPath, is_hooked
from .spartan import Block, CMixer, ConvNormAct, SMixer, SqueezeExcitation, fold_modulation

aten = torch.ops.aten

#: What is worked on at once, in bytes of the widest map: about half of a last-level cache.
PART_BYTES = 16 * 2 ** 20


class Activation(NamedTuple):
    """An activation in place, out of place, and (gradient, input, out) to the input's gradient."""

    apply_: Callable[[Tensor], Tensor]
    apply: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


ACTIVATIONS = {
    kind: Activation(apply_, apply, lambda grad, x, out, backward=backward: backward.grad_input(
        grad, x, grad_input=out))
    for kind, apply_, apply, backward in (
        (nn.GELU, aten.gelu_, F.gelu, aten.gelu_backward),
        (nn.SiLU, aten.silu_, F.silu, aten.silu_backward))}


def fuse(module: nn.Module) -> nn.Module:
    """Give the blocks of a SpaRTAN a faster form for training on a CPU.

    Their class changes, in place; parameters, buffers and submodules stay. Where such a block is
    not trained on a CPU in float32 or float64 (inference, mixed precision, ``torch.compile``, other
    devices) it computes as before, and so does a block of which a submodule has a hook, or is of
    another class than the paper's mixers consist of: in a fused block no submodule is called.
    """
    for part in module.modules():
        if type(part) is Block:
            part.__class__ = FusedBlock
    return module


class FusedBlock(Block):
    """A block whose mixers have hand-written gradients, see :func:`fuse`."""

    told = False  # whether it was said already that a block computes in its plain form

    def mix(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not is_trained_here(x):
            return super().mix(x)
        if reason := find_obstacle(self):
            if not FusedBlock.told:
                FusedBlock.told = True
                print_log('SpaRTAN: a block is trained in its plain form, the slower one on a CPU: '
                          f'{reason}', 'current')
            return super().mix(x)
        x = mix_space(self.smixer, self.norm1(x), x, self.layer_scale1, self.draw(x))
        return mix_channels(self.cmixer, self.norm2(x), x, self.layer_scale2, self.draw(x))

    def draw(self, x: Tensor) -> Tensor:
        """What each sample's branch is multiplied by, (N, 1)."""
        return self.drop_path(x.new_ones(len(x), 1, 1, 1)).flatten(1)


def is_trained_here(x: Tensor) -> bool:
    """Whether a map is computed on a CPU, in full precision and at once, for a gradient."""
    return (not torch.compiler.is_compiling() and not torch.jit.is_tracing()
            and torch.is_grad_enabled() and type(x) is Tensor and x.device.type == 'cpu'
            and x.dtype in (torch.float32, torch.float64) and x.numel() > 0
            and not torch.is_autocast_enabled('cpu')
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._are_functorch_transforms_active()
            and not nn.modules.module._has_any_global_hook())


KNOWN = (nn.Sequential, nn.Conv2d, DCLSConv2d, nn.BatchNorm2d, nn.GELU, nn.SiLU, ConvNormAct,
         SqueezeExcitation, SMixer, CMixer, DropPath)


def find_obstacle(block: Block) -> str:
    """Say why a block cannot be fused; nothing if it can."""
    parts = [(name, part) for name, part in block.named_modules()
             if name not in ('', 'norm1', 'norm2')]
    for name, part in parts:
        if type(part) not in KNOWN:
            return f'{name} is a {type(part).__name__}'
        if is_hooked(part):
            return f'{name} has a hook'
    modules = [id(part) for _, part in parts]
    if block.__dict__.get('checked') != modules:
        smixer, cmixer = block.smixer, block.cmixer
        if not (type(smixer) is SMixer and type(cmixer) is CMixer):
            return 'its mixers are not SMixer and CMixer'
        channels, hidden = smixer.proj_in.in_channels, cmixer.proj_out.in_channels
        conv = getattr(smixer.high_freq, 'conv', smixer.proj_in)
        conv_type = 'full' if conv.groups == 1 else 'depthwise'
        options = dict(conv_type=conv_type, act=type(cmixer.act).__name__)
        group = cmixer.refine.conv.weight.shape[1] if type(cmixer.refine) is ConvNormAct else 1
        with torch.device('meta'):
            usual = (SMixer(channels, low_freq_kernel=smixer.low_freq_kernel,
                            inner_channels=smixer.proj_in.out_channels, **options),
                     CMixer(channels, group, hidden_channels=hidden, **options))
        for mixer, like in zip((smixer, cmixer), usual, strict=True):
            if repr(mixer) != repr(like):
                return f"a {type(mixer).__name__} is not as the paper's: {mixer}"
        block.checked = modules
    return 'it is in deploy form' if block.layer_scale1 is None else ''


def branch(module: nn.Module) -> tuple[list[nn.Conv2d], nn.Module, nn.Module]:
    """The convolutions, the norm and the activation of a branch."""
    *convs, last = module if type(module) is nn.Sequential else [module]
    return [*convs, last.conv], last.norm, last.act


def kernel_of(conv: nn.Conv2d) -> Tensor:
    """What a convolution slides over a map, (R', R / groups, k, k)."""
    return conv.make_kernel() if type(conv) is DCLSConv2d else conv.weight


def lay_out(x: Tensor) -> Tensor:
    """The same map with the channels last, itself as a rule."""
    return x.contiguous(memory_format=torch.channels_last)


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N * H * W, C), a view."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def matrices(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H * W, C), a view."""
    return x.permute(0, 2, 3, 1).view(len(x), -1, x.shape[1])


def as_complex(x: Tensor) -> Tensor:
    """(N, R, H, W) to complex (N, H, W, R / 2), a view."""
    return torch.view_as_complex(x.permute(0, 2, 3, 1).unflatten(-1, (-1, 2)))


def split(x: Tensor, channels: int) -> tuple[Tensor, ...]:
    """The parts of a batch to work on one by one, where the widest map has so many channels."""
    sample = channels * x.shape[2] * x.shape[3] * x.element_size()
    number = -(-len(x) // max(1, PART_BYTES // sample))
    return x.split(-(-len(x) // number))  # about the same for all


def convolve(x: Tensor, kernel: Tensor, conv: nn.Conv2d) -> Tensor:
    """(N, R, H, W) to (N, R', H, W), by the kernel and with the settings of a convolution."""
    return lay_out(F.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation,
                            x.shape[1] // kernel.shape[1]))


def convolve_backward(grad: Tensor, x: Tensor, kernel: Tensor, conv: nn.Conv2d
                      ) -> tuple[Tensor, Tensor]:
    """The gradients of a map and of a kernel."""
    alone = kernel.shape[1] == 1
    grad_x, grad_kernel, _ = aten.convolution_backward(
        grad, x, kernel, None, conv.stride, conv.padding, conv.dilation, False, [0, 0],
        x.shape[1] // kernel.shape[1], [not alone, True, False])
    if alone:  # oneDNN has it faster forwards, where kernels are dilated
        grad_x = convolve(grad, kernel.flip((2, 3)), conv)
    return lay_out(grad_x), grad_kernel


def unpair(kernel: Tensor) -> list[Tensor]:
    """Kernels (R, 2, k, k) of pairs to those of the own channel and of the other, (R, 1, k, k).

    oneDNN needs ten times as long for groups of two channels as for single ones. Such a group is
    each channel by itself, and each with what the other one holds, see :func:`exchange`.
    """
    even, odd = kernel[0::2], kernel[1::2]
    return [torch.stack([even[:, i], odd[:, 1 - i]], 1).flatten(0, 1)[:, None] for i in range(2)]


def exchange(x: Tensor) -> Tensor:
    """Channels 2j and 2j + 1 exchanged: i times the conjugate, where they are complex numbers."""
    exchanged = torch.empty_like(x)
    torch.conj_physical(as_complex(x), out=as_complex(exchanged)).mul_(1j)
    return exchanged


def project_backward(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a map, of a kernel (O, C, 1, 1) and of a bias (O,)."""
    grad_x, grad_kernel, _ = aten.convolution_backward(
        grad, x, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False])
    return lay_out(grad_x), grad_kernel, rows(grad).sum(0)  # by oneDNN it would take longer


class Sums(list):
    """Sums of tensors, each in its place."""

    def add(self, *addends: Tensor) -> None:
        """Add one to each."""
        self[:] = [x.add_(y) for x, y in zip(self, addends, strict=True)] if self else addends


class Tail:
    """What follows a branch's convolutions: norm, activation, gates, and its share of a projection.

    `samples` is what each sample's branch is multiplied by, (N, 1).
    """

    def __init__(self, norm: nn.BatchNorm2d, act: nn.Module, samples: Tensor):
        self.norm, self.act, self.samples = norm, ACTIVATIONS[type(act)], samples
        self.training = norm.training  # in the forward pass

    @staticmethod
    def parameters(norm: nn.BatchNorm2d, se: SqueezeExcitation) -> list[Tensor]:
        """Weights and biases of norm, squeeze and excitation, as matrices and vectors."""
        return [norm.weight, norm.bias, se.squeeze.weight.flatten(1), se.squeeze.bias,
                se.expand.weight.flatten(1), se.expand.bias]

    def normalize(self, x: Tensor, parameters: Sequence[Tensor], out: Tensor) -> Tensor:
        """Normalize a map into the memory of another."""
        unused = self.mean.new_empty(0)
        return torch.native_batch_norm(x, *parameters[:2], self.mean, self.variance, False, 0.,
                                       self.norm.eps, out=(out, unused, unused))[0]

    def forward(self, total: Tensor, maps: Sequence[Tensor], weight: Tensor,
                parameters: Sequence[Tensor]) -> list[Tensor]:
        """Add to `total` (N, C, H, W) the projection of maps (n, I, H, W), one for each part.

        `weight` is (C, I). The activated maps are returned, which :meth:`backward` needs.
        """
        self._find_statistics(maps)
        self.sizes, self.small, activated = [len(x) for x in maps], [], []
        for x, target, factor in zip(maps, total.split(self.sizes),
                                     self.samples.split(self.sizes), strict=True):
            y = self.act.apply_(self.normalize(x, parameters, torch.empty_like(x)))
            average = y.mean((2, 3))
            hidden = torch.addmm(parameters[3], average, parameters[2].t()).relu_()
            gate = torch.addmm(parameters[5], hidden, parameters[4].t()).sigmoid_()
            scale = gate * factor
            # Gates in one matrix for each sample, instead of in the map.
            matrices(target).baddbmm_(matrices(y), (weight * scale[:, None]).transpose(1, 2))
            self.small.append((average, hidden, gate, scale, factor))
            activated.append(y)
        return activated

    def backward(self, grad: Tensor, maps: Sequence[Tensor], activated: Sequence[Tensor],
                 outs: Sequence[Tensor], weight: Tensor, parameters: Sequence[Tensor]
                 ) -> tuple[Iterator[Tensor], Tensor, list[Tensor]]:
        """The gradients of the maps, one at a time into `outs`, of weight and parameters."""
        squeeze, expand = parameters[2], parameters[4]
        scratch = torch.empty_like(maps[0])
        rstd = (self.variance + self.norm.eps).rsqrt()
        of_weight, of_norm, of_gates = Sums(), Sums(), Sums()
        for x, y, grad_y, grad_part, (average, hidden, gate, scale, factor) in zip(
                maps, activated, outs, grad.split(self.sizes), self.small, strict=True):
            # Through the projection and the gates.
            product = torch.bmm(matrices(grad_part).transpose(1, 2), matrices(y))  # (n, C, I)
            grad_gate = aten.sigmoid_backward((product * weight).sum(1).mul_(factor), gate)
            of_weight.add(product.mul_(scale[:, None]).sum(0))
            grad_hidden = aten.threshold_backward(grad_gate @ expand, hidden, 0)
            of_gates.add(grad_hidden.t() @ average, grad_hidden.sum(0),
                         grad_gate.t() @ hidden, grad_gate.sum(0))
            direct = (grad_hidden @ squeeze).div_(x.shape[2] * x.shape[3])
            torch.baddbmm(direct[:, None], matrices(grad_part), weight * scale[:, None],
                          out=matrices(grad_y))

            # Through the activation, and what the norm's parameters get.
            self.act.backward(grad_y, self.normalize(x, parameters, scratch[:len(y)]), grad_y)
            of_norm.add(*aten.native_batch_norm_backward(
                grad_y, x, parameters[0], self.mean, self.variance, self.mean, rstd, False,
                self.norm.eps, [False, True, True])[1:])

        def finish() -> Iterator[Tensor]:
            # Through the norm, whose statistics depend on all parts.
            slope = (rstd * parameters[0]).view(-1, 1, 1)
            share_weight, share_bias = (x.div(self.count).view(-1, 1, 1) for x in of_norm)
            along = -slope * rstd.view(-1, 1, 1) * share_weight
            offset = -slope * share_bias - along * self.mean.view(-1, 1, 1)
            for x, grad_x in zip(maps, outs, strict=True):
                if self.training:
                    affine = torch.addcmul(offset, x, along, out=scratch[:len(x)])
                    yield torch.addcmul(affine, grad_x, slope, out=grad_x)
                else:
                    yield grad_x.mul_(slope)

        return finish(), of_weight[0], [*of_norm, *of_gates]

    def _find_statistics(self, maps: Sequence[Tensor]) -> None:
        """Find mean and variance (I,) of all parts, and update the norm's own in training."""
        norm = self.norm
        if not self.training:
            self.count, self.mean, self.variance = 1, norm.running_mean, norm.running_var
            return
        counts = torch.tensor([x.numel() // x.shape[1] for x in maps], dtype=maps[0].dtype)
        self.count = int(counts.sum())
        means, variances = map(torch.stack, zip(
            *(torch.batch_norm_update_stats(x, None, None, 0.) for x in maps), strict=True))
        share = (counts / self.count)[:, None]
        self.mean = (means * share).sum(0)
        self.variance = ((variances + (means - self.mean) ** 2) * share).sum(0)
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(self.mean, norm.momentum)
        norm.running_var.lerp_(self.variance * (self.count / max(1, self.count - 1)),
                               norm.momentum)


def scale_projection(proj_out: nn.Conv2d, layer_scale: Tensor, samples: Tensor
                     ) -> tuple[Tensor, Tensor]:
    """Bias (N, C, 1, 1) and weight (C, sum of I) of a projection with what it is scaled by."""
    bias = samples * (proj_out.bias * layer_scale.flatten())
    return bias[:, :, None, None], proj_out.weight.flatten(1) * layer_scale.view(-1, 1)


def mix_space(mixer: SMixer, x: Tensor, residual: Tensor, layer_scale: Tensor,
              samples: Tensor) -> Tensor:
    """residual + samples * layer_scale * mixer(x), (N, C, H, W).

    With z = W x + b, the decomposition z + gamma (z - GAP(z)) of Eq. 3 is (1 + gamma) W x + b -
    gamma W GAP(x): a projection, and a number for each sample and channel.
    """
    gamma, weight = mixer.gamma.flatten(), mixer.proj_in.weight
    average = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    shift = mixer.proj_in.bias - gamma * (average @ weight.flatten(1).t())  # (N, I)
    bias, weight_out = scale_projection(mixer.proj_out, layer_scale, samples)
    convs, tails, tensors = [], [], []
    for module, se in ((mixer.high_freq, mixer.high_se), (mixer.low_freq, mixer.low_se)):
        stack, norm, act = branch(module)
        convs.append(stack)
        tails.append(Tail(norm, act, samples))
        tensors += [*map(kernel_of, stack), *Tail.parameters(norm, se)]
    weight_in = weight * (1 + gamma.view(-1, 1, 1, 1))
    return MixSpace.apply(convs, tails, residual, bias, lay_out(x), weight_in, shift, weight_out,
                          *tensors)


class MixSpace(Function):
    """See :func:`mix_space`."""

    @staticmethod
    def forward(ctx, convs, tails, residual, bias, x, weight_in, shift, weight_out, *tensors):
        """Every tensor after the first two is differentiable."""
        decomposed = lay_out(F.conv2d(x, weight_in)).add_(shift[:, :, None, None])
        total = lay_out(residual + bias)
        ctx.convs, ctx.tails, saved = convs, tails, []
        for stack, tail, columns, kernels, parameters in _branches(ctx, weight_out, tensors):
            y = decomposed
            for conv, kernel in zip(stack, kernels, strict=True):
                y = convolve(y, kernel, conv)
                saved.append(y)
            saved += tail.forward(total, split(y, y.shape[1]), columns, parameters)
        ctx.save_for_backward(x, weight_in, weight_out, decomposed, *tensors, *saved)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The gradients of all."""
        x, weight_in, weight_out, decomposed, *rest = ctx.saved_tensors
        grad = lay_out(grad)
        number = sum(len(stack) + 6 for stack in ctx.convs)
        saved = iter(rest[number:])
        grad_decomposed, grad_weights, grad_tensors = None, [], []
        for stack, tail, columns, kernels, parameters in _branches(ctx, weight_out, rest[:number]):
            *maps, y = decomposed, *(next(saved) for _ in stack)
            parts, grad_y = split(y, y.shape[1]), torch.empty_like(y)
            finished, grad_columns, grad_parameters = tail.backward(
                grad, parts, [next(saved) for _ in parts], split(grad_y, y.shape[1]), columns,
                parameters)
            for _ in finished:
                pass  # It lies in grad_y.
            grad_kernels = []
            for conv, kernel, z in reversed([*zip(stack, kernels, maps, strict=True)]):
                grad_y, grad_kernel = convolve_backward(grad_y, z, kernel, conv)
                grad_kernels.insert(0, grad_kernel)
            grad_decomposed = grad_y if grad_decomposed is None else grad_decomposed.add_(grad_y)
            grad_weights.append(grad_columns)
            grad_tensors += [*grad_kernels, *grad_parameters]
        grad_x, grad_weight_in, _ = project_backward(grad_decomposed, x, weight_in)
        return (None, None, grad, grad.sum((2, 3), keepdim=True), grad_x, grad_weight_in,
                grad_decomposed.sum((2, 3)), torch.cat(grad_weights, 1), *grad_tensors)


def _branches(ctx, weight: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple]:
    """Convolutions, tail, columns (C, I) of a weight, kernels, and parameters of the tail."""
    tensors = iter(tensors)
    for stack, tail, columns in zip(ctx.convs, ctx.tails, weight.chunk(2, 1), strict=True):
        yield (stack, tail, columns, [next(tensors) for _ in stack],
               [next(tensors) for _ in range(6)])


def mix_channels(mixer: CMixer, x: Tensor, residual: Tensor, layer_scale: Tensor,
                 samples: Tensor) -> Tensor:
    """residual + samples * layer_scale * mixer(x), (N, C, H, W)."""
    kernels, modulation = [mixer.refine.conv.weight], mixer.complex_weight
    if kernels[0].shape[1] % 2 == 0:  # whole pairs in a group
        kernels, modulation = [fold_modulation(modulation, kernels[0])], None
    if kernels[0].shape[1] == 2:
        kernels = unpair(kernels[0])
    bias, weight_out = scale_projection(mixer.proj_out, layer_scale, samples)
    tail = Tail(mixer.refine.norm, mixer.refine.act, samples)
    return MixChannels.apply(
        mixer.refine.conv, ACTIVATIONS[type(mixer.act)], tail, x.argmax(1, keepdim=True), residual,
        bias, lay_out(x), *mixer.proj_in.weight.chunk(2), *mixer.proj_in.bias.chunk(2), modulation,
        weight_out, *Tail.parameters(mixer.refine.norm, mixer.se), *kernels)


class Waves(NamedTuple):
    """What is kept of a part of a batch."""

    phase: Tensor  # (n, R, H, W), and so are the next three
    amplitude: Tensor
    factor: Tensor  # the activated phase
    refined: Tensor
    flat: Tensor  # where the strongest waves stand in such a map, (n * H * W,)
    picked_phase: Tensor  # theirs, (n, 1, H, W)
    picked_amplitude: Tensor

    def superpose(self, act: Activation, out: Tensor) -> Tensor:
        """The waves, the strongest added to all (Eqs. 7 and 8)."""
        added = act.apply(self.picked_phase) * self.picked_amplitude
        return torch.addcmul(added, self.factor, self.amplitude, out=out)

    def superpose_backward(self, grad: Tensor, act: Activation, out: Tensor
                           ) -> tuple[Tensor, Tensor]:
        """The gradient of the phase, in the memory of `grad` in the end, and of the amplitude."""
        # The strongest wave stands in all channels: it gets the sum of their gradients.
        total = grad.sum(1, keepdim=True)
        grad_amplitude = torch.mul(grad, self.factor, out=out)
        self._add(grad_amplitude, total * act.apply(self.picked_phase))
        grad_phase = act.backward(grad.mul_(self.amplitude), self.phase, grad)
        total *= self.picked_amplitude
        self._add(grad_phase, act.backward(total, self.picked_phase, torch.empty_like(total)))
        return grad_phase, grad_amplitude

    def _add(self, x: Tensor, addend: Tensor) -> None:
        rows(x).view(-1).index_add_(0, self.flat, addend.flatten())


class MixChannels(Function):
    """See :func:`mix_channels`."""

    @staticmethod
    def forward(ctx, conv, act, tail, strongest, residual, bias, x, weight_phase, weight_amplitude,
                bias_phase, bias_amplitude, modulation, weight_out, *tensors):
        """Every tensor after the fourth argument is differentiable."""
        parameters, kernels = tensors[:6], tensors[6:]
        waves, parts = [], split(x, 2 * len(weight_phase))
        for x_part, index in zip(parts, strongest.split(len(parts[0])), strict=True):
            phase = lay_out(F.conv2d(x_part, weight_phase, bias_phase))
            amplitude = lay_out(F.conv2d(x_part, weight_amplitude, bias_amplitude))
            flat = torch.arange(0, phase.numel(), phase.shape[1]).add_(index.flatten())
            picked = (rows(m).view(-1).index_select(0, flat).view(index.shape)
                      for m in (phase, amplitude))
            part = Waves(phase, amplitude, act.apply(phase), None, flat, *picked)
            wave = part.superpose(act, torch.empty_like(phase))
            if modulation is not None:
                as_complex(wave).mul_(torch.view_as_complex(modulation))  # Eq. 9
            refined = convolve(wave, kernels[0], conv)
            for kernel in kernels[1:]:
                refined.add_(convolve(exchange(wave), kernel, conv))
            waves.append(part._replace(refined=refined))
        total = lay_out(residual + bias)
        activated = tail.forward(total, [part.refined for part in waves], weight_out, parameters)
        ctx.conv, ctx.act, ctx.tail = conv, act, tail
        ctx.number = len(tensors)
        ctx.save_for_backward(x, weight_phase, weight_amplitude, modulation, weight_out, *tensors,
                              *activated, *(m for part in waves for m in part))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The gradients of all."""
        saved = ctx.saved_tensors
        x, *halves, modulation, weight_out = saved[:5]
        end = 5 + ctx.number
        parameters, kernels, rest = saved[5:11], saved[11:end], saved[end:]
        grad, grad_x = lay_out(grad), torch.empty_like(x)
        x_parts, outs = (split(each, 2 * len(halves[0])) for each in (x, grad_x))
        activated, rest = rest[:len(x_parts)], iter(rest[len(x_parts):])
        waves = [Waves(*(next(rest) for _ in Waves._fields)) for _ in x_parts]
        finished, grad_out, grad_parameters = ctx.tail.backward(
            grad, [part.refined for part in waves], activated,
            [torch.empty_like(part.refined) for part in waves], weight_out, parameters)

        sums, scratch = Sums(), [torch.empty_like(waves[0].phase) for _ in range(2)]
        for grad_refined, part, x_part, out in zip(finished, waves, x_parts, outs, strict=True):
            wave = part.superpose(ctx.act, scratch[0][:len(x_part)])
            modulated, grad_modulation = wave, ()
            if modulation is not None:
                weight = torch.view_as_complex(modulation)
                modulated = scratch[1][:len(x_part)]
                torch.mul(as_complex(wave), weight, out=as_complex(modulated))
            grad_wave, *grad_kernels = convolve_backward(
                grad_refined, modulated, kernels[0], ctx.conv)
            for kernel in kernels[1:]:
                exchanged, grad_kernel = convolve_backward(
                    grad_refined, exchange(modulated), kernel, ctx.conv)
                grad_wave.add_(exchange(exchanged))
                grad_kernels.append(grad_kernel)
            if modulation is not None:
                # Of a product of complex numbers: that of the result times the other's conjugate.
                product = torch.conj_physical(as_complex(wave), out=as_complex(modulated))
                product.mul_(as_complex(grad_wave))
                grad_modulation = rows(modulated).sum(0).view_as(modulation),
                as_complex(grad_wave).mul_(weight.conj())
            grads = [project_backward(each, x_part, half) for each, half in zip(
                part.superpose_backward(grad_wave, ctx.act, wave), halves, strict=True)]
            torch.add(grads[0][0], grads[1][0], out=out)
            sums.add(*(each[1] for each in grads), *(each[2] for each in grads), *grad_kernels,
                     *grad_modulation)
        end = 4 + len(kernels)
        return (None, None, None, None, grad, grad.sum((2, 3), keepdim=True), grad_x, *sums[:4],
                *(sums[end:] or [None]), grad_out, *grad_parameters, *sums[4:end])
