"""Build engines of exported ONNX files on this machine's GPU, check them and time them.

    spartan-mm export rtdetr_spartan_t FILE.pth --to tensorrt --precision fp16 --out-dir exported
    python tools/dev/tensorrt_bench.py exported/rtdetr_spartan_t.onnx --images photos/

Needs tensorrt and PyTorch for CUDA. Every engine, in float32 and float16 and for batches of 1 and
8, is compared with ONNX Runtime on the CPU in float32, and timed by CUDA's events: what the GPU
computes, and with copies to and fro.
"""
import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from spartan_mm.errors import InputError
from spartan_mm.export.tensorrt import Engine, build_engine, engine_of, find_shapes
from spartan_mm.files import write_json
from spartan_mm.runtime import Runtime
from spartan_mm.text import markdown

PRECISIONS = ('fp32', 'fp16')
COLUMNS = ('model', 'precision', 'batch', 'build, s', 'MiB', 'ms on the GPU', 'p90', 'images/s',
           'ms with copies', 'largest difference', 'same')


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the table and its numbers."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', type=Path, metavar='FILE',
                        help='ONNX files in float32; those in float16 lie beside them')
    parser.add_argument('--images', type=Path, help='folder to check on (default: noise)')
    parser.add_argument('--precisions', nargs='+', default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument('--batches', nargs='+', type=int, default=(1, 8))
    parser.add_argument('--rounds', type=int, default=200, help='timed runs of each engine')
    parser.add_argument('--out', type=Path, default=Path('tensorrt_bench.json'))
    args = parser.parse_args(argv)

    results = []
    for source, precision, batch in plan(args.files, args.precisions, args.batches):
        images, sizes = read_images(source, args.images, batch)
        results.append(measure(source, precision, batch, images, sizes, args.rounds))
        # After each, so that a machine that is taken away leaves what was measured.
        write_json(args.out, dict(machine=describe_machine(), results=results))
        print(markdown([COLUMNS, row(results[-1])]).splitlines()[-1], flush=True)
    print('\n' + markdown([COLUMNS, *map(row, results)]))


def plan(files: Sequence[Path], precisions: Sequence[str], batches: Sequence[int]
         ) -> Iterator[tuple[Path, str, int]]:
    """What is measured, one engine after the other; all files must be there before it starts."""
    wanted = [(source, precision, batch) for source in files for precision in precisions
              for batch in batches]
    for source, precision, _ in wanted:
        if not graph_of(source, precision).is_file():
            raise InputError(f'{graph_of(source, precision)} is not there; write it by '
                             f'spartan-mm export --to tensorrt --precision {precision}')
    yield from wanted


def graph_of(source: Path, precision: str) -> Path:
    """The ONNX file whose own types are those of a precision."""
    return source if precision == 'fp32' else source.with_name(f'{source.stem}_{precision}.onnx')


def read_images(source: Path, folder: Path | None, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, H, W) in the size of a graph, and their widths and heights (N, 2)."""
    runtime = Runtime(source)
    height, width = runtime.size
    sizes = np.tile(np.array([[width, height]], np.int64), (batch, 1))
    if folder is None:
        noise = np.random.default_rng(0).integers(0, 256, (batch, 3, height, width))
        return noise.astype(np.uint8), sizes
    paths = sorted(path for path in folder.iterdir()
                   if path.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    if not paths:
        raise InputError(f'{folder} has no JPEG or PNG files')
    images = [runtime.preprocess(paths[place % len(paths)]) for place in range(batch)]
    return np.stack(images), sizes


def measure(source: Path, precision: str, batch: int, images: np.ndarray, sizes: np.ndarray,
            rounds: int) -> dict[str, Any]:
    """Build, check and time an engine."""
    import torch
    runtime = Runtime(source)
    path = graph_of(source, precision)
    engine_path = engine_of(path, precision).with_suffix(f'.{batch}.engine')
    start = time.perf_counter()
    build_engine(source, path, engine_path, find_shapes(source, batch, batch))
    built = time.perf_counter() - start

    engine = Engine(engine_path)
    expected, found = runtime.run(images, sizes), engine.run(images, sizes)

    def compute() -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record(engine.stream)
        engine.enqueue()
        events[1].record(engine.stream)
        events[1].synchronize()
        return events[0].elapsed_time(events[1])

    def with_copies() -> float:
        start = time.perf_counter()
        engine.run(images, sizes)
        return 1e3 * (time.perf_counter() - start)

    return dict(model=source.stem, precision=precision, batch=batch, build_s=built,
                bytes=engine_path.stat().st_size, gpu_ms=repeat(compute, rounds),
                total_ms=repeat(with_copies, rounds), **compare(expected, found))


def repeat(step: Callable[[], float], rounds: int) -> list[float]:
    """Times of a step, after some that don't count."""
    return [step() for _ in range(max(10, rounds // 10) + rounds)][-rounds:]


def compare(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, Any]:
    """How far outputs are apart.

    Returns:
        Of a detector, `same`: the share of detections of at least 0.3 (of the ten best where there
        is none) that have a partner of the same class, within 1 % of the largest coordinate and
        0.05 of the score; of a classifier, the share of images with the same best class. And
        `difference`, the largest one of the scores of those.
    """
    if 'labels' not in expected:
        name = next(iter(expected))
        best = [x[name].argmax(1) for x in (expected, found)]
        return dict(same=float((best[0] == best[1]).mean()),
                    difference=float(np.abs(expected[name] - found[name]).max()))
    same, differences = [], [0.]
    scale = 0.01 * np.abs(expected['boxes']).max()
    for image, scores in enumerate(expected['scores']):
        best = np.flatnonzero(scores >= 0.3)
        for row in best if len(best) else range(10):
            apart = np.abs(found['boxes'][image] - expected['boxes'][image, row]).max(1)
            error = np.abs(found['scores'][image] - scores[row])
            fits = ((found['labels'][image] == expected['labels'][image, row]) & (apart <= scale)
                    & (error <= 0.05))
            same.append(bool(fits.any()))
            differences += [float(error[fits].min())] if fits.any() else []
    return dict(same=float(np.mean(same)), difference=max(differences))


def row(result: dict[str, Any]) -> list[str]:
    """A result as cells of the table."""
    typical = median(result['gpu_ms'])
    return [result['model'], result['precision'], str(result['batch']), f"{result['build_s']:.0f}",
            f"{result['bytes'] / 2**20:.1f}", f'{typical:.3f}',
            f"{np.percentile(result['gpu_ms'], 90):.3f}", f"{1e3 * result['batch'] / typical:.0f}",
            f"{median(result['total_ms']):.3f}", f"{result['difference']:.1e}",
            f"{100 * result['same']:.1f} %"]


def describe_machine() -> dict[str, str]:
    """The GPU and the versions that decide about times."""
    import tensorrt
    import torch
    return dict(gpu=torch.cuda.get_device_name(), tensorrt=tensorrt.__version__,
                torch=torch.__version__, cuda=str(torch.version.cuda))


if __name__ == '__main__':
    main()
