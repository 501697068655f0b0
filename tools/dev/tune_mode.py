"""Measure what it saves to fold batch norms that keep their statistics into their convolutions.

The table of docs/train-your-data.md: what a forward pass keeps for the backward pass, beside the
parameters, and the time of both passes. The two ways take turns in one run. SpaRTAN is in the form
for GPUs; the one for CPUs (`fuse`) keeps less by itself. Weights are random: nothing is downloaded.
"""
import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from readme_tables import insert_tables
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook

from spartan_mm.analysis.benchmark import describe_machine, machine_line, measuring
from spartan_mm.backbones import AFFNet, CASViT, LSNet, MogaNet, SpaRTAN, UniRepLKNet
from spartan_mm.detection import ResNetVd
from spartan_mm.files import write_whole
from spartan_mm.text import Console, markdown

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'train-your-data.md'
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


def count_kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, those of the parameters aside."""
    given = {tensor.untyped_storage().data_ptr()
             for tensor in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []  # else the memory of one may be that of the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


def time_step(model: nn.Module, x: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    begin = time.perf_counter()
    sum(y.sum() for y in model(x)).backward()
    return time.perf_counter() - begin


def compare(model: nn.Module, x: Tensor, rounds: int) -> tuple[list[int], list[float]]:
    """Bytes and median seconds, of modules that are called as they are and of folded ones."""
    ways = plainly, nullcontext
    kept, times = [], [[], []]
    for way in ways:
        with way():
            kept.append(count_kept(model, x))
            time_step(model, x)
    for _ in range(rounds):
        for way, of_way in zip(ways, times, strict=True):
            with way():
                of_way.append(time_step(model, x))
    return kept, [*map(statistics.median, times)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int, metavar='N', help="of the CPU (default: PyTorch's)")
    parser.add_argument('--rounds', type=int, default=5, metavar='N',
                        help='steps of each way (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=2, metavar='N',
                        help='images (default: %(default)s)')
    parser.add_argument('--size', type=int, default=256, metavar='N',
                        help='of an image (default: %(default)s)')
    args = parser.parse_args()

    console = Console()
    rows = [['backbone', 'kept, MB', 'in tune mode, MB', 'ratio', 'time, ratio']]
    with measuring(args.threads):
        machine = describe_machine(torch.device('cpu'))
        for name, make in BACKBONES.items():
            console.status(name)
            torch.manual_seed(0)
            x = torch.randn(args.batch_size, 3, args.size, args.size)
            kept, times = compare(make().train(), x, args.rounds)
            rows.append([name, *(f'{size / 1e6:.0f}' for size in kept),
                         f'{kept[1] / kept[0]:.2f}', f'{times[1] / times[0]:.2f}'])
    text = (f'{markdown(rows)}\n{args.batch_size} images of {args.size} x {args.size} in float32, '
            f'medians of {args.rounds} steps each: {machine_line(machine)}.\n')
    page = insert_tables(PAGE.read_text(encoding='utf-8'), dict(tune_mode=text))
    with write_whole(PAGE) as file:
        file.write(page.encode())
    console.line(f'Written: {PAGE.name}')


if __name__ == '__main__':
    main()
