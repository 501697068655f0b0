"""What the mixers of a SpaRTAN do to the low and the high frequencies of a feature map.

The paper claims that the SMixer's branches extract high and low frequencies (Sec. III-B) and that
the CMixer's modulation gives waves of varying frequencies (Sec. III-C). Here the power of the maps
before, between and after these parts is averaged over all directions, to one number for each
spatial frequency.

Frequencies are in parts of the Nyquist frequency, pi for each position, of which there are maps up
to 1 along the axes and the square root of 2 along the diagonals. A map's average, frequency 0, is
left out.

NOTE: the modulation multiplies a pair of channels by one complex number at every position, so the
power of the pair at every frequency is multiplied by one number, the square of the weight's
absolute value: no power moves from a frequency to another, and the wave is shown after it alone.

NOTE: after Park and Kim, "How Do Vision Transformers Work?" (ICLR 2022), curves are logarithms of
amplitudes, relative to a low frequency. Theirs run along the diagonal and are relative to frequency
0; these are averages over directions, relative to the lowest frequency above 0.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...backbones.spartan import CMixer, SMixer, SpaRTAN
from ...errors import UsageError
from ..style import COLOURS, Axes, Figure, finish, new_figure, ticker

WINDOWS = ('hann', 'none')

#: Maps with a side below this have no spectrum worth the name.
MIN_SIDE = 4

#: The share of the power above this frequency is told, in parts of the Nyquist frequency.
CUTOFF = 0.5

# Colours and styles by part; the input is the same grey in both mixers.
_STYLES = {
    'input': dict(color='0.45', linestyle='--'),
    'high-frequency branch': dict(color=COLOURS[1]),
    'low-frequency branch': dict(color=COLOURS[0]),
    'modulated wave': dict(color=COLOURS[3]),
    'refined wave': dict(color=COLOURS[4]),
}
_TITLES = {'smixer': 'SMixer', 'cmixer': 'CMixer'}


# ------------------------------------------------------------------------------------ power spectra


def power_spectrum(maps: Tensor, window: str = 'hann') -> Tensor:
    """Compute the power of each frequency of maps, without their averages.

    The average over all frequencies is that of the squares of the (windowed) deviations from the
    average: white noise of variance v has v at each.

    Args:
        maps: (..., H, W).
        window: 'hann' fades the maps out towards their borders, which would otherwise look like an
            edge where opposite ones meet; 'none' takes them as they are.

    Returns:
        (..., H, W), in float64 on the CPU, in the order of ``torch.fft.fft2``.
    """
    maps = maps.cpu().double()
    # Without the zeros at both ends, which would waste the border positions of a small map.
    rows, columns = (
        torch.hann_window(length + 2, periodic=False, dtype=maps.dtype)[1:-1]
        if window == 'hann' else maps.new_ones(length) for length in maps.shape[-2:])
    weights = rows[:, None] * columns
    average = (maps * weights).sum((-2, -1), keepdim=True) / weights.sum()
    transformed = torch.fft.fft2((maps - average) * weights)
    return transformed.abs().square() / weights.square().sum()


def _radii(height: int, width: int) -> Tensor:
    """The distance of each frequency from 0, in parts of the Nyquist frequency, (H, W)."""
    rows, columns = (torch.fft.fftfreq(length, dtype=torch.float64) for length in (height, width))
    return 2 * torch.hypot(rows[:, None], columns)


def radial_average(power: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average a power spectrum over rings, one for each frequency of the shorter side.

    Args:
        power: (..., H, W), in the order of ``torch.fft.fft2``.

    Returns:
        The frequency in the middle of each ring, in parts of the Nyquist frequency, (R,), the
        average power, (..., R), and the number of frequencies in each ring, (R,). The first ring is
        frequency 0.
    """
    step = 2 / min(power.shape[-2:])
    ring = (_radii(*power.shape[-2:]) / step).round().long().flatten()
    counts = ring.bincount().to(power.dtype)
    sums = power.new_zeros(*power.shape[:-2], len(counts))
    sums.index_add_(-1, ring, power.flatten(-2))
    return step * torch.arange(len(counts), dtype=power.dtype), sums / counts, counts


def share_above(power: Tensor) -> Tensor:
    """Compute the share of the power, frequency 0 left out, that lies above ``CUTOFF``.

    Args:
        power: (..., H, W), in the order of ``torch.fft.fft2``.

    Returns:
        (...), from 0 to 1; NaN where there is no power.
    """
    distance = _radii(*power.shape[-2:])
    return (power * (distance > CUTOFF)).sum((-2, -1)) / (power * (distance > 0)).sum((-2, -1))


def white_share(height: int, width: int) -> float:
    """The share of power above ``CUTOFF`` in white noise of a size."""
    return float(share_above(torch.ones(height, width, dtype=torch.float64)))


# ------------------------------------------------------------------------------------------ mixers


#: Of each mixer, the maps by name: the submodule ('' for the mixer), and whether it is its input.
PARTS = {
    SMixer: {'input': ('', True), 'high-frequency branch': ('high_se', False),
             'low-frequency branch': ('low_se', False)},
    CMixer: {'input': ('', True), 'modulated wave': ('refine', True),
             'refined wave': ('se', False)},
}


def find_backbone(model: nn.Module, name: str) -> SpaRTAN:
    """Find the SpaRTAN in a model, which messages call `name`.

    Raises:
        UsageError: If there is none, it is in deploy form, or has neither SMixers nor CMixers.
    """
    backbone = next((part for part in model.modules() if isinstance(part, SpaRTAN)), None)
    if backbone is None:
        found = type(getattr(model, 'backbone', model)).__name__
        raise UsageError(f'{name} has no SpaRTAN, whose mixers this is about; it is a {found}')
    if backbone.deploy:
        raise UsageError(f'{name} is in deploy form, in which the parts of the mixers are folded '
                         'into each other: take the checkpoint of the training')
    if not any(isinstance(part, SMixer | CMixer) for part in backbone.modules()):
        raise UsageError(f'{name} has neither SMixers nor CMixers, but what the paper compares '
                         'them with')
    return backbone


# --------------------------------------------------------------------------------------- collecting


@dataclass
class Spectrum:
    """The spectrum of a map, averaged over images, each of which counts the same.

    Attributes:
        sizes: Of the maps seen, (H, W).
        frequencies: In parts of the Nyquist frequency, (R,), those of the first map.
        rings: Of each image with any power, the power in each ring, in parts of the image's average
            over all frequencies, (R,): 1 everywhere is white noise.
        shares: Of each such image, the share above ``CUTOFF``.
    """

    sizes: set[tuple[int, int]] = field(default_factory=set)
    frequencies: np.ndarray | None = None
    rings: list[np.ndarray] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def add(self, maps: Tensor, window: str) -> None:
        """Add the map (N, C, H, W) of N images; channels are weighed by their power."""
        self.sizes.add(tuple(maps.shape[-2:]))
        if min(maps.shape[-2:]) < MIN_SIDE:
            return
        power = power_spectrum(maps, window).sum(1)  # (N, H, W)
        power = power[power.sum((1, 2)) > 0]
        frequencies, rings, counts = radial_average(power)
        frequencies = frequencies[1:].numpy()
        if self.frequencies is None:
            self.frequencies = frequencies
        rings = rings / (rings * counts).sum(-1, keepdim=True) * (counts.sum() - 1)
        # Where sizes of images differ, those of the first map are kept to.
        self.rings += [np.interp(self.frequencies, frequencies, values)
                       for values in rings[:, 1:].numpy()]
        self.shares += share_above(power).tolist()


#: Of stages, blocks, mixers ('smixer' or 'cmixer') and their parts.
Spectra = dict[tuple[int, int, str, str], Spectrum]


@torch.no_grad()
def collect(backbone: SpaRTAN, images: Iterable[Tensor], window: str = 'hann') -> Spectra:
    """Send images through a backbone and collect the spectra of what its mixers get and give.

    Args:
        backbone: In the training form; it is put in evaluation mode.
        images: As the model sees them, each (3, H, W).
        window: See :func:`power_spectrum`.
    """
    spectra: Spectra = {}

    def listen(spectrum: Spectrum, to_input: bool, _: nn.Module, inputs: tuple[Tensor, ...],
               output: Tensor) -> None:
        spectrum.add(inputs[0] if to_input else output, window)

    backbone.eval()
    with ExitStack() as hooks:
        for stage_number, stage in enumerate(backbone.stages, start=1):
            for block_number, block in enumerate(stage.blocks, start=1):
                for mixer in (block.smixer, block.cmixer):
                    for part, (name, to_input) in PARTS.get(type(mixer), {}).items():
                        key = stage_number, block_number, type(mixer).__name__.lower(), part
                        spectra[key] = Spectrum()
                        hooks.enter_context(mixer.get_submodule(name).register_forward_hook(
                            partial(listen, spectra[key], to_input)))
        for image in images:
            backbone(image[None])
    # A backbone need not run its last stages.
    return {key: spectrum for key, spectrum in spectra.items() if spectrum.sizes}


def describe(spectra: Spectra) -> list[dict[str, Any]]:
    """Average over the blocks of each stage, each of which counts the same.

    Returns:
        One record fit for JSON for each stage: its number, the sizes of its maps, the share of
        power above ``CUTOFF`` that white noise of the first size has, and for each mixer and part
        that share, on average and for each block, the frequencies, the power (1 is the average over
        all frequencies) and the logarithm of the amplitude relative to the lowest frequency. A
        stage whose maps are too small has no parts.
    """
    records = []
    for stage in sorted({stage for stage, *_ in spectra}):
        own = {key: spectrum for key, spectrum in spectra.items() if key[0] == stage}
        sizes = sorted(set().union(*(spectrum.sizes for spectrum in own.values())))
        blocks: dict[tuple[str, str], list[Spectrum]] = {}
        for (_, _, mixer, part), spectrum in own.items():
            if spectrum.shares:
                blocks.setdefault((mixer, part), []).append(spectrum)
        record: dict[str, Any] = dict(
            stage=stage, maps=[list(size) for size in sizes],
            white_noise_share=white_share(*sizes[0]) if blocks else None)
        for (mixer, part), found in blocks.items():
            power = np.mean([np.mean(spectrum.rings, axis=0) for spectrum in found], axis=0)
            shares = [float(np.mean(spectrum.shares)) for spectrum in found]
            with np.errstate(divide='ignore', invalid='ignore'):
                relative = np.log(power / power[0]) / 2
            record.setdefault(mixer, {})[part] = dict(
                share_above_half_nyquist=float(np.mean(shares)), share_by_block=shares,
                frequencies=found[0].frequencies.tolist(), power=power.tolist(),
                relative_log_amplitude=[value if np.isfinite(value) else None
                                        for value in relative.tolist()])
        records.append(record)
    return records


# ------------------------------------------------------------------------------------------ drawing


def draw_spectra(stages: list[dict[str, Any]], title: str) -> Figure:
    """Draw the spectra of each stage, see :func:`describe`, and the shares of high frequencies.

    Raises:
        UsageError: If the maps of every stage are too small.
    """
    mixers = [mixer for mixer in _TITLES if any(mixer in stage for stage in stages)]
    if not mixers:
        largest = '×'.join(map(str, stages[0]['maps'][-1]))
        raise UsageError(f'the maps of all stages are too small for a spectrum, at most {largest} '
                         f'where {MIN_SIDE}×{MIN_SIDE} is the least: take larger images')
    columns = len(stages) + 1
    figure = new_figure(2.3 * columns + 2.2, 2.6 * len(mixers) + 0.5)
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    figure.suptitle(title, x=0.01, ha='left', fontsize=13, fontweight='bold')
    grid = figure.add_gridspec(len(mixers), columns, width_ratios=[1] * len(stages) + [1.1])
    for row, mixer in enumerate(mixers):
        first = None
        for column, stage in enumerate(stages):
            axes = figure.add_subplot(grid[row, column], sharey=first)
            first = first or axes
            _draw_stage(axes, stage, mixer)
            axes.tick_params(labelleft=column == 0)
        first.set_ylabel(f'{_TITLES[mixer]}: Δ log amplitude', fontsize=11)
        axes = figure.add_subplot(grid[row, -1])
        _draw_shares(axes, stages, mixer)
        axes.legend(loc='center left', bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=11)
    return figure


def _draw_stage(axes: Axes, stage: Mapping[str, Any], mixer: str) -> None:
    sizes = [f'{height}×{width}' for height, width in stage['maps']]
    size = sizes[0] if len(sizes) == 1 else f'{sizes[0]} to {sizes[-1]}'
    finish(axes, f'stage {stage["stage"]}, {size}')
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ['0', 'π/2', 'π'])
    axes.set_xlabel('frequency', fontsize=11)
    for part, record in stage.get(mixer, {}).items():
        frequencies = np.array(record['frequencies'])
        values = np.array(record['relative_log_amplitude'], dtype=float)
        within = frequencies <= 1 + 1e-9
        axes.plot(frequencies[within], values[within], linewidth=1.8, **_STYLES[part])
    if mixer not in stage:
        axes.text(0.5, 0.5, 'maps too small', transform=axes.transAxes, ha='center', fontsize=11,
                  color='0.4')


def _draw_shares(axes: Axes, stages: list[dict[str, Any]], mixer: str) -> None:
    finish(axes, 'power above π/2, in %')
    axes.set_xlabel('stage', fontsize=11)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    stages = [stage for stage in stages if mixer in stage]
    numbers = [stage['stage'] for stage in stages]
    for part in stages[0][mixer]:
        shares = [100 * stage[mixer][part]['share_above_half_nyquist'] for stage in stages]
        axes.plot(numbers, shares, linewidth=1.8, marker='o', markersize=5, label=part,
                  clip_on=False, **_STYLES[part])
    axes.plot(numbers, [100 * stage['white_noise_share'] for stage in stages], linewidth=1.2,
              linestyle=':', color='0.2', label='white noise')
    axes.set_ylim(0, 100)
