"""Make a LiteRT or Core ML file of a program that `spartan-mm export` left.

    python convert_program.py model.tflite.pt2         gives model.tflite
    python convert_program.py model.mlpackage.pt2      gives model.mlpackage

This file needs PyTorch and litert-torch or coremltools, and nothing else: it runs in an environment
without OpenMMLab's packages, which the former doesn't go together with. Of a program, use the
PyTorch that it was written with.
"""
import json
import sys
from pathlib import Path


def program_of(path) -> Path:
    """Where the program lies that a file is made of."""
    return Path(f'{path}.pt2')


def metadata_of(path) -> Path:
    """Where it stands what a file, or the file to be made of a program, says of itself."""
    path = Path(path)
    if path.suffix == '.pt2' and path.with_suffix('').suffix in CONVERTERS:
        path = path.with_suffix('')
    return Path(f'{path}.json')


def to_litert(program, path: Path, metadata: dict) -> None:
    """Convert to LiteRT, inputs args_0, args_1, outputs output_0, ... in the program's order."""
    import litert_torch
    # It traces the program again, which goes wrong on operations in place: these are gone by then.
    module = program.run_decompositions({}).module()
    litert_torch.convert(module, program.example_inputs[0]).export(str(path))


def to_coreml(program, path: Path, metadata: dict) -> None:
    """Convert to a Core ML program, with the metadata inside, too."""
    import coremltools as ct
    import torch
    from torch._decomp import get_decompositions
    aten = torch.ops.aten

    def clamp(x, low=None, high=None):
        # Of integers it would make floats, which cannot be indices.
        if x.is_floating_point():
            return NotImplemented
        x = x if low is None else torch.maximum(x, torch.full_like(x, low))
        return x if high is None else torch.minimum(x, torch.full_like(x, high))

    program = program.run_decompositions({
        **get_decompositions([aten.lerp.Tensor, aten.lerp.Scalar, aten.addcmul.default]),
        aten.clamp.default: clamp, aten.__and__.Tensor: torch.logical_and,
        aten.floor_divide.default: lambda x, y: (x.float() / y).floor().int()})
    half = metadata['precision'] == 'fp16'
    model = ct.convert(
        program, minimum_deployment_target=ct.target.iOS17,
        outputs=[ct.TensorType(name=name) for name in metadata['outputs']],
        compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32)
    model.user_defined_metadata.update(
        {f'spartan_mm.{key}': json.dumps(value) for key, value in metadata.items()})
    model.save(str(path))


CONVERTERS = {'.tflite': to_litert, '.mlpackage': to_coreml}


def main(arguments: list) -> int:
    """Convert the program that is named."""
    program = Path(arguments[0]) if len(arguments) == 1 else Path('-')
    path = program.with_suffix('')
    if program.suffix != '.pt2' or path.suffix not in CONVERTERS:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    import torch
    metadata = json.loads(metadata_of(path).read_text(encoding='utf-8'))
    with torch.no_grad():
        CONVERTERS[path.suffix](torch.export.load(str(program)), path, metadata)
    print(f'wrote {path}')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
