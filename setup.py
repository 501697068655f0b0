"""Package metadata, and the step that puts configs and tools into the wheel."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((ROOT / 'spartan_mm' / 'version.py').read_text(), VERSION)

# The OpenMMLab packages stand in extras, not in install_requires: two families of distributions
# (the original mmengine, mmcv, mmdet, mmpretrain and the maintained onedl-*) provide the same
# modules, and requiring one would overwrite the other where that is installed.
# spartan_mm/requirements.py checks what can be imported. The extras name the family whose wheels
# install without a compiler.
MMENGINE = ['onedl-mmengine>=0.10.8', 'opencv-python-headless>=4.5']
MMCV = [*MMENGINE, 'onedl-mmcv>=2.3', 'torchvision>=0.21']
EXTRAS = {
    'backbone': MMENGINE,
    'detection': [*MMCV, 'onedl-mmdetection>=3.5', 'pycocotools>=2.0.6', 'scipy>=1.9',
                  'rich>=10'],
    'classification': [*MMCV, 'onedl-mmpretrain>=1.3'],
    # Backbones of timm for detectors.
    'timm': [*MMENGINE, 'timm>=1.0.4'],
    # COCO's figures in a fraction of pycocotools' time.
    'faster-coco-eval': ['faster-coco-eval>=1.6'],
    # Pictures, tables and reports of models, data and runs.
    'analysis': ['matplotlib>=3.6', 'opencv-python-headless>=4.5', 'tqdm>=4.60', 'jinja2>=3.0',
                 'scikit-learn>=1.2', 'grad-cam>=1.5', 'adjustText>=1.3'],
    # Files for other runtimes; OpenVINO's own, and 8 bits for it.
    'export': ['onnx>=1.17', 'onnxscript>=0.7', 'onnxruntime>=1.20', 'scipy>=1.9'],
    'openvino': ['openvino>=2024.4', 'nncf>=2.13'],
    # Runs LiteRT files; what makes them needs an environment of its own.
    'litert': ['ai-edge-litert>=2.0; platform_system != "Darwin" or platform_machine == "arm64"'],
    'demo': ['scikit-learn>=1.2'],
    # Curves and pictures of a training in TensorBoard or MLflow.
    'loggers': ['tensorboard>=2.12', 'mlflow-skinny>=2.10'],
    # Tracks, tiles of large pictures, results for supervision.
    'video': ['supervision>=0.25', 'trackers>=2.1', 'sahi>=0.12'],
    # The page to try a model on, and the server.
    'web': ['gradio>=6.0', 'fastapi>=0.110', 'uvicorn>=0.25', 'python-multipart>=0.0.13'],
    # Weights from and to the Hugging Face Hub.
    'hub': ['huggingface_hub>=0.25'],
    'tests': ['pytest>=8.2', 'pytest-xdist>=3.6', 'cloudpickle>=2', 'hypothesis>=6.100',
              'ruff>=0.6', 'codespell[toml]>=2.4', 'setuptools>=77', 'scikit-learn>=1.2',
              'matplotlib>=3.6', 'tqdm>=4.60', 'httpx>=0.27', 'nbclient>=0.8',
              'nbformat>=5.7', 'ipykernel>=6.20', 'playwright>=1.40'],
    # The pages as a site: make docs.
    'docs': ['mkdocs-material>=9.5'],
}
EXTRAS['all'] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})


class BuildWithConfigsAndTools(build_py):
    """Copies configs, tools and ``model-index.yml`` to ``spartan_mm/.mim``, where ``mim`` looks."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # An editable install uses the checkout's own.
        target = Path(self.build_lib) / 'spartan_mm' / '.mim'
        # A build directory may hold files that are gone from the checkout by now.
        shutil.rmtree(target, ignore_errors=True)
        for folder in ('configs', 'tools'):
            shutil.copytree(ROOT / folder, target / folder,
                            ignore=shutil.ignore_patterns('__pycache__', 'dev'))
        shutil.copy(ROOT / 'model-index.yml', target)


setup(
    name='spartan_mm',
    version=VERSION['__version__'],
    description='SpaRTAN backbones and RT-DETR detectors for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords=['computer vision', 'object detection', 'RT-DETR', 'OpenMMLab'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=['spartan_mm', 'spartan_mm.*']),
    package_data={'spartan_mm.analysis.report': ['*.html']},
    cmdclass={'build_py': BuildWithConfigsAndTools},
    install_requires=['torch>=2.6', 'numpy>=1.24', 'packaging>=21', 'safetensors>=0.4'],
    extras_require=EXTRAS,
    entry_points={'console_scripts': ['spartan-mm = spartan_mm.cli:main']},
)
