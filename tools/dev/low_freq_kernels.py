"""Train small SpaRTANs that differ in the low-frequency kernel alone, by several seeds each.

The table of docs/recipes.md. Data are scikit-learn's handwritten digits: a fifth of them to learn
from, the rest to test on, enlarged to 48 x 48. A training takes some seconds on a core that does
nothing else; nothing is downloaded.
"""
import argparse
import math
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from readme_tables import fill_page, spread
from torch import Tensor, nn

from spartan_mm import zoo
from spartan_mm.analysis.benchmark import describe_machine, machine_line, measuring
from spartan_mm.analysis.sizes import Complexity, measure_modules
from spartan_mm.backbones import SpaRTAN
from spartan_mm.backbones.arch import LOW_FREQ_KERNELS
from spartan_mm.backbones.dcls import DCLSConv2d
from spartan_mm.backbones.fused import fuse
from spartan_mm.datasets.digits import share_out_digits
from spartan_mm.text import Console, markdown

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'recipes.md'
# Depthwise in both stages, whose maps are 12 and 6 positions wide.
ARCH = dict(stem_channels=8, depths=(1, 1), channels=(16, 32), expand_ratios=(2, 2),
            conv_types=('depthwise', ) * 2)
SIZE, BATCH, WARMUP, RATE = 48, 32, 20, 4e-3
TITLES = {3: 'stacked 3x3', 5: '5x5', 7: '7x7', 11: '11x11', 'dcls': 'DCLS, bilinear',
          'dcls_gaussian': 'DCLS, Gaussian'}


def load_digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images (N, 3, 48, 48) and labels to train on and to test on."""
    samples, indices = share_out_digits(0)
    data = {}
    for ours, theirs in (('train', 'val'), ('test', 'train')):  # a task that is not too easy
        labels = torch.cat([torch.full((len(of_class), ), label)
                            for label, of_class in enumerate(indices[theirs])])
        chosen = torch.cat([*map(torch.from_numpy, indices[theirs])])
        images = torch.from_numpy(samples).float()[chosen, None]
        images = F.interpolate(images, (SIZE, SIZE), mode='bicubic', align_corners=False)
        data[ours] = images.expand(-1, 3, -1, -1), labels
    return data


class Classifier(nn.Module):
    """A backbone, global average pooling and a linear layer."""

    def __init__(self, kernel: int | str):
        super().__init__()
        self.backbone = SpaRTAN(
            ARCH, out_indices=-1, low_freq_kernel=kernel, drop_path_rate=0.)
        self.head = nn.Linear(ARCH['channels'][-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to scores (N, 10)."""
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def train(kernel: int | str, seed: int, epochs: int,
          data: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Train a classifier and return its top-1 on the test images, in percent."""
    torch.manual_seed(seed)
    model = fuse(Classifier(kernel)).train()
    # Groups of the recipe: which decay, and the faster positions.
    settings = zoo.get_config('spartan_xt_dcls_224').optim_wrapper
    settings.optimizer.lr = RATE
    optimizer = build_optim_wrapper(model, settings).optimizer
    images, labels = data['train']
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (
        (step + 1) / WARMUP if step < WARMUP else 0.5 + 0.5 * math.cos(math.pi * step / steps)))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            if len(batch) < BATCH:
                continue
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for module in model.modules():
                if isinstance(module, DCLSConv2d):
                    module.clamp_positions()
    model.eval()
    images, labels = data['test']
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item()
                    for x, y in zip(images.split(256), labels.split(256), strict=True))
    return 100 * right / len(labels)


def count(kernel: int | str) -> Complexity:
    """Sizes of a classifier, which computes nothing."""
    with torch.device('meta'):
        model = Classifier(kernel)
    return measure_modules(model, SIZE, SIZE)['']


def make_table(results: Mapping[int | str, Sequence[float]],
               sizes: Mapping[int | str, Complexity]) -> str:
    """Means and standard deviations over seeds, with the sizes."""
    rows = [['kernel', '`low_freq_kernel`', 'parameters', 'multiply-adds, M', 'top-1, %']]
    for kernel, values in results.items():
        size = sizes[kernel]
        rows.append([TITLES[kernel], f'`{kernel!r}`', f'{size.parameters:,}',
                     f'{size.multiply_adds / 1e6:.2f}', spread(values, digits=2)])
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N',
                        help='a training each (default: 0 1 2)')
    parser.add_argument('--epochs', type=int, default=12, metavar='N',
                        help='of 11 steps (default: %(default)s)')
    parser.add_argument('--threads', type=int, metavar='N', help="of the CPU (default: PyTorch's)")
    args = parser.parse_args()

    console, data = Console(), load_digits()
    results: dict[int | str, list[float]] = {kernel: [] for kernel in LOW_FREQ_KERNELS}
    with measuring(args.threads):
        machine = describe_machine(torch.device('cpu'))
        for seed, kernel in product(args.seeds, LOW_FREQ_KERNELS):
            begin = time.perf_counter()
            results[kernel].append(train(kernel, seed, args.epochs, data))
            console.line(f'{TITLES[kernel]}, seed {seed}: {results[kernel][-1]:.2f} %, '
                         f'{time.perf_counter() - begin:.0f} s')
    sizes = {kernel: count(kernel) for kernel in LOW_FREQ_KERNELS}
    text = (f'{make_table(results, sizes)}\nSeeds {", ".join(map(str, args.seeds))}, {args.epochs} '
            f'epochs, float32: {machine_line(machine)}.\n')
    fill_page(PAGE, dict(kernels=text))
    console.line(f'Written: {PAGE.name}')


if __name__ == '__main__':
    main()
