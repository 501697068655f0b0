"""What low precision does to SpaRTAN's argmax, emulated in float32 with rounding in between.

    python tools/dev/low_precision.py --seeds 0 1 2                 # random weights, photographs
    python tools/dev/low_precision.py --checkpoints FILE.pth ...    # of spartan_xt_digits, digits

Each line is a recipe: what is rounded of the convolutions, of the residual stream and of what
argmax sees. Figures are the share of positions where argmax picks another channel, the relative
error of the logits (RMS), the same error where argmax picks what float32 picks, and how often the
class is the same, or right; means over the networks with their standard deviations. They stay in a
file: a run that was stopped goes on where it was.
"""
import argparse
import copy
import json
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image
from readme_tables import spread
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import spartan_mm
from spartan_mm.backbones import spartan
from spartan_mm.datasets.digits import share_out_digits
from spartan_mm.export.graph import make_graph
from spartan_mm.files import write_json
from spartan_mm.text import markdown
from spartan_mm.weights.forms import switch_to_deploy


class Recipe(NamedTuple):
    """Types of the convolutions' weights and maps, of the stream, and of what argmax sees."""

    weights: str = 'float32'
    maps: str = 'float32'
    stream: str = 'float32'
    argmax: str = 'float32'


RECIPES = {
    'fp16: all': Recipe(*['float16'] * 4),
    'fp16: all but norm and argmax': Recipe('float16', 'float16', 'float16'),
    'fp16: mixers alone': Recipe('float16', 'float16'),
    'bf16: all': Recipe(*['bfloat16'] * 4),
    'bf16: all but norm and argmax': Recipe('bfloat16', 'bfloat16', 'bfloat16'),
    'bf16: mixers alone': Recipe('bfloat16', 'bfloat16'),
    'bf16: weights alone': Recipe('bfloat16'),
    'bf16: stream alone': Recipe(stream='bfloat16'),
    'bf16: argmax alone': Recipe(argmax='bfloat16'),
    'int8: all': Recipe(*['int8'] * 4),
    'int8: all but norm and argmax': Recipe('int8', 'int8', 'int8'),
    'int8: mixers and argmax': Recipe('int8', 'int8', argmax='int8'),
    'int8: mixers alone': Recipe('int8', 'int8'),
    'int8: mixers, stream of bf16': Recipe('int8', 'int8', 'bfloat16'),
    'int8: maps alone': Recipe(maps='int8'),
    'int8: weights alone': Recipe('int8'),
}


#: Decimals of the figures.
DECIMALS = dict(flips=2, error=3, error_same_picks=4, same=1, right=1)


class Grid:
    """Rounds maps to a type; int8 has one scale, of the range that was seen while watching."""

    def __init__(self, kind: str):
        self.kind = kind
        self.low = self.high = 0.
        self.watching = kind == 'int8'

    def __call__(self, x: Tensor) -> Tensor:
        if self.watching:
            self.low, self.high = min(self.low, x.min().item()), max(self.high, x.max().item())
            return x
        if self.kind != 'int8':
            return x.to(getattr(torch, self.kind)).float()
        scale = (self.high - self.low) / 255 or 1.
        zero = round(-self.low / scale)
        return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def round_weight(weight: Tensor, kind: str) -> Tensor:
    """Round a convolution's weight to a type; int8 has a scale for each output channel."""
    if kind != 'int8':
        return weight.to(getattr(torch, kind)).float()
    scale = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    scale = scale.view(-1, *[1] * (weight.dim() - 1))
    return (weight / scale).round() * scale


class RoundedBlock(spartan.Block):
    """A block whose sums are rounded."""

    def add(self, x: Tensor, layer_scale: Tensor | None, branch: Tensor) -> Tensor:
        """See ``Block.add``."""
        return self.rounding(super().add(x, layer_scale, branch))


def emulate(graph: nn.Module, recipe: Recipe, calibration: Tensor) -> nn.Module:
    """Make a copy of a model that rounds as a recipe says."""
    graph, grids = copy.deepcopy(graph), []

    def round_input(module: nn.Module, kind: str) -> None:
        grids.append(Grid(kind))
        module.register_forward_pre_hook(lambda _, args, grid=grids[-1]: (grid(args[0]),))

    for module in graph.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.copy_(round_weight(module.weight, recipe.weights))
            round_input(module, recipe.maps)
            if recipe.maps != 'int8':
                grid = Grid(recipe.maps)
                module.register_forward_hook(lambda _, args, out, grid=grid: grid(out))
        elif isinstance(module, spartan.CMixer):
            round_input(module, recipe.argmax)
        elif isinstance(module, spartan.Block):
            module.__class__ = RoundedBlock
            round_input(module, recipe.stream)
            module.rounding = Grid(recipe.stream)
            grids.append(module.rounding)
    graph(calibration)
    for grid in grids:
        grid.watching = False
    return graph


def run(graph: nn.Module, images: Tensor, given: list[Tensor] | None = None
        ) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what argmax picks in each block; `given` takes its place."""
    seen, real = [], spartan.superpose

    def superpose(amplitude: Tensor, phase: Tensor, strongest: Tensor, channels: int) -> Tensor:
        seen.append(strongest)
        return real(amplitude, phase, given[len(seen) - 1] if given else strongest, channels)

    with mock.patch.object(spartan, 'superpose', superpose):
        return graph(images), seen


def compare(graph: nn.Module, rounded: nn.Module, images: Tensor, labels: Tensor | None
            ) -> dict[str, float]:
    """The figures of a recipe."""
    wanted, picked = run(graph, images)
    found, others = run(rounded, images)
    same_picks = run(rounded, images, picked)[0]
    flips = sum((one != other).sum() for one, other in zip(picked, others, strict=True))

    def error(logits: Tensor) -> float:
        return ((logits - wanted).square().mean() / wanted.square().mean()).sqrt().item()

    result = dict(flips=100 * flips.item() / sum(map(torch.numel, picked)), error=error(found),
                  error_same_picks=error(same_picks),
                  same=100 * (found.argmax(1) == wanted.argmax(1)).float().mean().item())
    if labels is not None:
        result['right'] = 100 * (found.argmax(1) == labels).float().mean().item()
    return result


def random_case(seed: int, side: int = 96) -> tuple[nn.Module, Tensor, Tensor, None]:
    """A network in which everything counts; parts of photographs to calibrate with and to test."""
    torch.manual_seed(seed)
    model = spartan_mm.get_model('spartan_xt')
    for name, parameter in model.named_parameters():
        if 'layer_scale' in name or name.endswith('gamma'):
            nn.init.uniform_(parameter, 0.1, 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    rng, parts = np.random.default_rng(seed), []
    for index in range(48):
        photograph = load_sample_images().images[index % 2]
        size = rng.integers(side, 400)
        top, left = (rng.integers(whole - size + 1) for whole in photograph.shape[:2])
        part = Image.fromarray(photograph[top:top + size, left:left + size])
        parts.append(np.asarray(part.resize((side, side), Image.BILINEAR)))
    images = torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2)
    return model, images[:16], images[16:], None


def digits_case(checkpoint: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The network of a checkpoint of spartan_xt_digits; digits to calibrate with and to test."""
    samples, split = share_out_digits(0)

    def enlarge(index: int) -> np.ndarray:
        image = Image.fromarray((255 * samples[index]).round().astype(np.uint8))
        return np.asarray(image.resize((32, 32), Image.BICUBIC))

    def images(indices: np.ndarray) -> Tensor:
        maps = np.stack([enlarge(index) for index in indices])
        return torch.from_numpy(maps)[:, None].repeat(1, 3, 1, 1)

    labels = torch.arange(10).repeat_interleave(torch.tensor([*map(len, split['val'])]))
    return (spartan_mm.get_model('spartan_xt_digits', pretrained=checkpoint),
            images(np.concatenate(split['train'])[::20]), images(np.concatenate(split['val'])),
            labels)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--checkpoints', nargs='+', help='of spartan_xt_digits')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0],
                        help='of random weights, without checkpoints')
    parser.add_argument('--recipes', nargs='+', default=[*RECIPES], choices=RECIPES, metavar='NAME')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/low_precision.json'))
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    cases, load = ((args.checkpoints, digits_case) if args.checkpoints else
                   (args.seeds, random_case))
    for case in cases:
        done = results.setdefault(str(case), {})
        if all(name in done for name in args.recipes):
            continue
        model, calibration, images, labels = load(case)
        graph = make_graph(switch_to_deploy(model), raw=True)
        for name in args.recipes:
            if name not in done:
                rounded = emulate(graph, RECIPES[name], calibration)
                done[name] = compare(graph, rounded, images, labels)
                write_json(args.out, results)
    rows = []
    for name in args.recipes:
        found = [results[str(case)][name] for case in cases]
        rows.append([name, *(spread([each[key] for each in found], digits=digits)
                             for key, digits in DECIMALS.items() if key in found[0])])
    print(markdown([['recipe', *found[0]], *rows]))


if __name__ == '__main__':
    main()
