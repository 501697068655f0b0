"""Measure what it saves to fold batch norms that keep their statistics into their convolutions.

The table of docs/train-your-data.md: what a forward pass keeps for the backward pass, beside the
parameters, and the CPU's time for both passes. The two ways take turns in one run. SpaRTAN is in
the form for GPUs; the one for CPUs (`fuse`) computes norms again by itself. Weights are random:
nothing is downloaded.
"""
import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from readme_tables import fill_page
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook

from spartan_mm.analysis.benchmark import describe_machine, machine_line, measuring
from spartan_mm.backbones import AFFNet, CASViT, LSNet, MogaNet, SpaRTAN, UniRepLKNet
from spartan_mm.detection import ResNetVd
from spartan_mm.text import Console, markdown

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'train-your-data.md'
COUNTED, TIMED = (4, 3, 640, 640), (2, 3, 192, 192)
OPTIONS = dict(out_indices=(1, 2, 3), norm_eval=True)
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    'ResNet-18vd': lambda: ResNetVd(depth=18, **OPTIONS),
    'ResNet-50vd': lambda: ResNetVd(depth=50, **OPTIONS),
    'SpaRTAN-XT': lambda: SpaRTAN('xt', **OPTIONS), 'SpaRTAN-T': lambda: SpaRTAN('t', **OPTIONS),
    'MogaNet-XT': lambda: MogaNet('xt', **OPTIONS),
    'UniRepLKNet-A': lambda: UniRepLKNet('a', **OPTIONS),
    'CAS-ViT-XS': lambda: CASViT('xs', **OPTIONS), 'AFFNet-ET': lambda: AFFNet('et', **OPTIONS),
    'LSNet-T': lambda: LSNet('t', norm_eval=True, out_indices=(0, 1, 2))}


def plainly():
    """While a hook looks on, every module is called as it is."""
    return register_module_forward_hook(lambda module, args, output: None)


WAYS = plainly, nullcontext


def count_kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, those of the parameters aside."""
    given = {tensor.untyped_storage()._cdata
             for tensor in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []  # else one may be taken for another that is gone

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


def time_step(model: nn.Module, x: Tensor) -> float:
    """Seconds of all cores for a forward and a backward pass, whatever else they do."""
    begin = time.process_time()
    sum(y.sum() for y in model(x)).backward()
    return time.process_time() - begin


def count_both(model: nn.Module, x: Tensor) -> list[int]:
    """Bytes that are kept, of modules that are called as they are and of folded ones."""
    kept = []
    for way in WAYS:
        with way():
            kept.append(count_kept(model, x))
    return kept


def time_both(model: nn.Module, x: Tensor, rounds: int) -> list[float]:
    """Median seconds of both ways, which take turns."""
    times = []
    for _ in range(rounds + 1):
        times.append([])
        for way in WAYS:
            with way():
                times[-1].append(time_step(model, x))
    return [statistics.median(of_way) for of_way in zip(*times[1:], strict=True)]


def _times(shape: tuple[int, ...]) -> str:
    return ' x '.join(map(str, shape))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int, metavar='N', help="of the CPU (default: PyTorch's)")
    parser.add_argument('--rounds', type=int, default=3, metavar='N',
                        help='steps of each way that are timed (default: %(default)s)')
    args = parser.parse_args()

    console = Console()
    rows = [['backbone', 'kept, MB', 'in tune mode, MB', 'ratio', 'time, ratio']]
    with measuring(args.threads):
        machine = describe_machine(torch.device('cpu'))
        for name, make in BACKBONES.items():
            console.status(name)
            torch.manual_seed(0)
            times = time_both(make().train(), torch.randn(TIMED), args.rounds)
            with torch.device('meta'):  # where nothing is computed
                kept = count_both(make().train(), torch.empty(COUNTED))
            rows.append([name, *(f'{size / 1e6:,.0f}' for size in kept),
                         f'{kept[1] / kept[0]:.2f}', f'{times[1] / times[0]:.2f}'])
    text = (f'{markdown(rows)}\nKept with images {_times(COUNTED)} in float32, counted. CPU time '
            f'with {_times(TIMED)}, medians of {args.rounds} steps: {machine_line(machine)}.\n')
    fill_page(PAGE, dict(tune_mode=text))
    console.line(f'Written: {PAGE.name}')


if __name__ == '__main__':
    main()
