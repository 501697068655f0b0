"""Race a model's exported files against PyTorch, in one process, in turns: a table in Markdown.

    python tools/dev/export_race.py spartan_xt_224 exported/spartan_xt_224.onnx \
        exported/spartan_xt_224.xml exported/spartan_xt_224_int8.xml --threads 1 2

One image goes in, of the size that the first file says. The weights of PyTorch's forms are random;
times don't depend on them. The authors' form is what SpaRTAN was released as.
"""
import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from spartan_mm.analysis.authors_form import to_authors_form
from spartan_mm.analysis.benchmark import describe_machine, machine_line
from spartan_mm.analysis.models import load_named_model
from spartan_mm.backbones import SpaRTAN
from spartan_mm.engine.compile import compile_model
from spartan_mm.export.graph import make_graph
from spartan_mm.export.race import race
from spartan_mm.runtime import Runtime
from spartan_mm.text import markdown
from spartan_mm.weights.forms import switch_to_deploy

PAUSE = 0.1  # seconds
LIBRARIES = {'.onnx': 'ONNX Runtime', '.xml': 'OpenVINO', '.tflite': 'LiteRT'}


def main() -> None:
    """Race, for each number of threads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', help='config file, or the name of a model')
    parser.add_argument('files', nargs='+', type=Path, metavar='FILE',
                        help='.onnx, .xml or .tflite')
    parser.add_argument('--threads', nargs='+', type=int, default=[1], metavar='N')
    parser.add_argument('--seconds', type=float, default=40., help='for each number of threads')
    parser.add_argument('--no-compile', action='store_true', help='leave out torch.compile')
    args = parser.parse_args()

    metadata = Runtime(args.files[0]).metadata
    height, width = metadata['input']['size']
    images = np.random.default_rng(0).integers(0, 256, (1, 3, height, width), np.uint8)
    sizes = np.array([[width, height]])
    forms = torch_forms(args.config, not args.no_compile)
    times: dict[str, list[float]] = {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        runs = {name: torch_run(graph, images, sizes) for name, graph in forms.items()}
        for path in args.files:
            runtime = Runtime(path, threads=threads)
            name = f'{LIBRARIES[path.suffix]} {runtime.metadata["precision"]}'
            runs[name] = lambda run=runtime.run: run(images, sizes)
        for name, time in zip(runs, race([*runs.values()], args.seconds, PAUSE), strict=True):
            times.setdefault(name, []).append(time)
    deploy = times['torch, deploy form']
    head = ['form', *(f'{threads} thread{"s" * (threads > 1)}, ms (as fast as deploy)'
                      for threads in args.threads)]
    print(f'{args.config}, one image of {height}x{width}, least time in turns; '
          f'{machine_line(describe_machine(torch.device("cpu")))}\n')
    print(markdown([head, *([name, *(f'{time:.1f} ({base / time:.2f}x)' for time, base in zip(
        own, deploy, strict=True))] for name, own in times.items())]))


def torch_forms(config: str, compiled: bool) -> dict[str, torch.nn.Module]:
    """The graph of a model in each of PyTorch's forms."""
    model = load_named_model(config).model
    deployed = switch_to_deploy(copy.deepcopy(model))
    forms = {}
    if isinstance(model.backbone, SpaRTAN):
        released = copy.deepcopy(model)
        to_authors_form(released.backbone)
        forms['authors\' backbone'] = released
    forms |= {'torch, as trained': model, 'torch, deploy form': deployed}
    if compiled:
        forms['torch, deploy form, compiled'] = copy.deepcopy(deployed)
        compile_model(forms['torch, deploy form, compiled'])
    return {name: make_graph(each) for name, each in forms.items()}


def torch_run(graph: torch.nn.Module, images: np.ndarray, sizes: np.ndarray
              ) -> Callable[[], object]:
    """Run a graph as the files are run, arrays in, arrays out."""
    def run() -> object:
        with torch.inference_mode():
            given = [torch.from_numpy(each) for each in (images, sizes)[:len(graph.input_names)]]
            return graph(*given)

    return run


if __name__ == '__main__':
    main()
