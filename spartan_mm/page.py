"""A page to try a model on: drop a picture or take one, see what is found and where it looks.

Everything that the page needs comes from this machine, and pictures stay on it.
"""
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from .drawing import class_colour, class_name
from .errors import ExplainedError, UsageError
from .inference import (
    Classification,
    Classifier,
    Detections,
    Detector,
    draw_classification,
    draw_detections,
)
from .requirements import require
from .runtime import Runtime
from .serving.limits import Limits
from .serving.models import check_picture
from .text import count, printable, shorten

#: What an upload may weigh. How many pixels it may have, the server's limits say.
MAX_FILE_SIZE = '32mb'

# The longer side of pictures on the page, in pixels; the model gets them as they came.
_MAX_SIDE = 1280

# Of a table of detections, and of a classifier's bars.
_MAX_ROWS, _MAX_BARS = 50, 5

# How long pictures of visitors are kept, in seconds, and how often it is looked at.
_KEPT, _LOOKED = 3600, 600

_STYLE = """
.gradio-container {width: 100% !important; max-width: 1240px !important; margin: auto}
.found table {width: 100%; border-collapse: collapse; font-size: .95em}
.found table, .found table * {border: 0 !important}
.found td, .found th {padding: .2em .6em !important; text-align: left}
.found td.number, .found th.number {text-align: right; font-variant-numeric: tabular-nums}
.found tr + tr {box-shadow: 0 -1px #8884}
.found .colour {display: inline-block; width: .8em; height: .8em; margin-right: .5em;
                border-radius: 2px}
.found .table {max-height: 17em; overflow: auto}
.found .note {opacity: .7; font-size: .9em; margin: .5em 0}
.found .error {border-left: 4px solid #d33; padding: .5em .8em; background: #d331;
               overflow-wrap: anywhere}
"""


@dataclass
class Look:
    """What a model made of a picture.

    Args:
        path: Of the file.
        picture: As it is shown, BGR, shape (H, W, 3).
        found: In pixels of the picture as it is shown.
        size: Width and height of the file's picture, in pixels.
        seconds: How long steps took, by what they are called.
    """

    path: str
    picture: np.ndarray
    found: Detections | Classification
    size: tuple[int, int]
    seconds: dict[str, float]


class Viewer:
    """What the page shows of pictures.

    Args:
        model: A detector or classifier with its weights, or an exported one.
        name: What to call it.
    """

    def __init__(self, model: Detector | Classifier | Runtime, name: str) -> None:
        self.model, self.title = model, shorten(name, 60)
        self.exported = isinstance(model, Runtime)
        self.detects = model.task == 'detection'
        number = count(len(model.classes), 'class')
        self.kind = (f'{"detector" if self.detects else "classifier"}, {number}'
                     + (', exported' if self.exported else ''))
        self._layer: str | None = None

    def look(self, path: str) -> Look:
        """Read a picture and run the model, once.

        Raises:
            InputError: It cannot be read.
            Refusal: It is no picture, or decoding it would take too much.
        """
        start = time.perf_counter()
        check_picture(Path(path).read_bytes(), Limits.max_pixels)
        image = (np.asarray(self.model.read(path))[..., ::-1] if self.exported
                 else self.model.read(path))
        ready = time.perf_counter()
        found = self._find(image)
        end = time.perf_counter()
        picture, scale = _shrink(image)
        if self.detects:
            found = replace(found, boxes=found.boxes * scale)
        return Look(path, picture, found, image.shape[1::-1],
                    dict(reading=ready - start, model=end - ready))

    def show(self, look: Look, threshold: float) -> tuple[np.ndarray, str]:
        """Draw and list what has at least a score; the model does not run.

        Returns:
            A picture, RGB, shape (H, W, 3), and HTML.
        """
        found = look.found.above(threshold) if self.detects else look.found.select(
            slice(_MAX_BARS))
        draw = draw_detections if self.detects else draw_classification
        picture = draw(look.picture, found)[..., ::-1]
        return picture, self._list(look, found)

    def explain(self, look: Look, threshold: float, label: int | None) -> tuple[np.ndarray, str]:
        """Draw where the model finds a class, or None for what it finds.

        Returns:
            An overlay, RGB, shape (H, W, 3), and HTML that says what it explains.

        Raises:
            UsageError: Nothing of the class is found with at least the score.
            ImportError: What makes the maps is not installed.
        """
        # It takes the libraries of the analyses along.
        from .analysis.look_inside.class_activation import Explainer, overlay
        explainer = Explainer(self.model, self._layer, score_threshold=threshold)
        explanation = explainer.explain(self.model.read(look.path), label)
        if explanation.map is None:
            raise UsageError(f'{explanation.caption} with a score of at least {threshold:.2f}: '
                             'move the slider, or choose another class')
        self._layer = explainer.layer
        return (_shrink(overlay(explanation)[..., ::-1])[0],
                f'<p class="note"><b>{escape(explanation.caption)}</b>. Bright is what speaks for '
                f'it, at {escape(self._layer)}.</p>')

    def _find(self, image: np.ndarray) -> Detections | Classification:
        return self.model([image])[0].best_first()

    def _list(self, look: Look, found: Detections | Classification) -> str:
        """Write what was found and how long it took as HTML; names come from anywhere."""
        rows = []
        for index, (label, score) in enumerate(zip(found.labels, found.scores, strict=True)):
            name = escape(shorten(class_name(self.model.classes, label), 60))
            colour = '#{:02x}{:02x}{:02x}'.format(*class_colour(label))
            row = (f'<td><span class="colour" style="background:{colour}"></span>{name}</td>'
                   f'<td class="number">{score:.3f}</td>')
            if self.detects:
                scale = look.size[0] / look.picture.shape[1]
                left, top, right, bottom = found.boxes[index] * scale
                row += (f'<td class="number">{right - left:.0f} × {bottom - top:.0f}</td>'
                        f'<td class="number">{left:.0f}, {top:.0f}</td>')
            rows.append(f'<tr>{row}</tr>')
        titles = ['class', 'score', *(['size', 'at'] if self.detects else [])]
        head = ''.join(f'<th{" class=number" if number else ""}>{title}</th>'
                       for number, title in enumerate(titles))
        table = (f'<div class="table"><table><tr>{head}</tr>{"".join(rows[:_MAX_ROWS])}</table>'
                 '</div>') if rows else ''
        more = f' ({_MAX_ROWS} are listed)' if len(rows) > _MAX_ROWS else ''
        total = f'<b>{count(len(rows), "detection")}</b>{more}. ' if self.detects else ''
        times = ', '.join(f'{name} {1000 * seconds:.0f} ms'
                          for name, seconds in look.seconds.items())
        width, height = look.size
        return f'{table}<p class="note">{total}{width} × {height} pixels; {times}</p>'


def make_page(viewer: Viewer, threshold: float = 0.3, examples: Sequence[str | Path] = ()
              ) -> Any:
    """Make the page of a model, a ``gradio.Blocks``.

    Args:
        viewer: The model.
        threshold: Where the slider stands, from 0 to 1.
        examples: Pictures to choose from.

    Raises:
        ImportError: Gradio is not installed.
    """
    gradio = _import_gradio()

    def look(path: str | None, threshold: float) -> tuple[Any, ...]:
        if path is None:
            return None, None, '', None, ''
        seen = viewer.look(path)
        return seen, *viewer.show(seen, threshold), None, ''

    def show(seen: Look | None, threshold: float) -> tuple[Any, ...]:
        return viewer.show(seen, threshold) if seen else (None, '')

    def explain(seen: Look | None, threshold: float, label: int) -> tuple[Any, ...]:
        if seen is None:
            raise UsageError('there is no picture yet')
        return viewer.explain(seen, threshold, None if label < 0 else label)

    classes = viewer.model.classes
    shown = dict(interactive=False, format='png', show_label=False, height=380,
                 buttons=['download', 'fullscreen'])
    with gradio.Blocks(title=viewer.title, analytics_enabled=False, fill_width=True,
                       delete_cache=(_LOOKED, _KEPT)) as page:
        state = gradio.State(time_to_live=_KEPT)
        gradio.HTML(f'<h2>{escape(viewer.title)}</h2><p class="note">{escape(viewer.kind)}</p>',
                    elem_classes='found')
        with gradio.Row():
            with gradio.Column(min_width=320):
                picture = gradio.Image(show_label=False, height=430, placeholder=(
                    '#Drop a picture here\nor click to choose one'))
                # Nobody opens it before our own checks do.
                picture.preprocess = partial(_take_upload, picture.GRADIO_CACHE)
                slider = gradio.Slider(0., 1., threshold, step=0.01, visible=viewer.detects,
                                       label='Least score', buttons=[])
            with gradio.Column(min_width=320), gradio.Tabs():
                with gradio.Tab('What is found'):
                    result = gradio.Image(**shown, elem_id='result')
                    listed = gradio.HTML(elem_id='listed', elem_classes='found')
                with gradio.Tab('Where it looks', visible=not viewer.exported):
                    overlay = gradio.Image(**shown, elem_id='overlay')
                    told = gradio.HTML(elem_id='told', elem_classes='found')
                    label = gradio.Dropdown(
                        [('what is found', -1), *((class_name(classes, number), number)
                                                  for number in range(len(classes)))],
                        value=-1, label='What to explain')
                    button = gradio.Button('Show where it looks', variant='primary')
        if examples:
            gradio.Examples([[str(path)] for path in examples], picture, label='Pictures to try')

        # The model runs for one visitor at a time.
        alone = dict(concurrency_id='model', concurrency_limit=1, api_visibility='private')
        picture.change(_explained(look, 5, 2), [picture, slider],
                       [state, result, listed, overlay, told], **alone)
        slider.change(show, [state, slider], [result, listed], trigger_mode='always_last',
                      show_progress='hidden', concurrency_limit=4, api_visibility='private')
        button.click(_explained(explain, 2, 1), [state, slider, label], [overlay, told], **alone)
    return page


@contextmanager
def serve(viewer: Viewer, host: str = '127.0.0.1', port: int | None = None,
          threshold: float = 0.3, examples: Sequence[str | Path] = ()) -> Iterator[str]:
    """Serve the page of a model as long as the block lasts.

    Pictures of visitors lie in a folder of their own, which is removed at the end.

    Args:
        viewer: The model.
        host: The address to listen at; '127.0.0.1' is open to this machine alone.
        port: The port; None for the first from 7860 that is free.
        threshold: See :func:`make_page`.
        examples: See :func:`make_page`.

    Yields:
        The address of the page.

    Raises:
        UsageError: It cannot listen there.
        ImportError: Gradio is not installed.
    """
    gradio = _import_gradio()
    with _upload_folder():
        page = make_page(viewer, threshold, examples)
        page.queue(max_size=32)
        theme = gradio.themes.Default(font=['system-ui', 'sans-serif'],
                                      font_mono=['ui-monospace', 'monospace'])
        try:
            try:
                page.launch(
                    server_name=host, server_port=port, share=False, quiet=True,
                    prevent_thread_lock=True, max_file_size=MAX_FILE_SIZE, ssr_mode=False,
                    show_error=False, footer_links=[], pwa=False, enable_monitoring=False,
                    state_session_capacity=64, css=_STYLE, inbrowser=False, theme=theme)
            except (OSError, OverflowError) as error:
                raise UsageError(f'the page cannot be served at {host}'
                                 f'{"" if port is None else f":{port}"}: it is taken or not of '
                                 'this machine; choose another with --host or --port') from error
            yield page.local_url
        finally:
            page.close(verbose=False)


@contextmanager
def _upload_folder() -> Iterator[None]:
    """Have gradio keep files in a folder of their own, which is removed at the end."""
    before = os.environ.get('GRADIO_TEMP_DIR')
    try:
        with tempfile.TemporaryDirectory(prefix='spartan_mm_page_') as folder:
            os.environ['GRADIO_TEMP_DIR'] = folder
            yield
    finally:
        os.environ.pop('GRADIO_TEMP_DIR', None)
        if before is not None:
            os.environ['GRADIO_TEMP_DIR'] = before


def wait() -> None:
    """Wait until Ctrl-C, or until the process is asked to end."""
    threading.Event().wait()


def _import_gradio() -> ModuleType:
    # They are read on import.
    for name, value in (('GRADIO_ANALYTICS_ENABLED', 'False'), ('GRADIO_RUN_HISTORY', 'False'),
                        ('HF_HUB_DISABLE_TELEMETRY', '1')):
        os.environ[name] = value
    # Each request would be a line.
    logging.getLogger('httpx').setLevel(logging.WARNING)
    return require('gradio', '6.0', 'web')


def _explained(function: Callable, outputs: int, place: int) -> Callable:
    """Let the page say what is wrong, where one of a function's outputs goes."""
    def answer(*args: Any) -> tuple[Any, ...]:
        try:
            return function(*args)
        except ExplainedError as error:
            message = printable(error)
            for path in (arg for arg in args if isinstance(arg, str)):
                message = message.replace(path, Path(path).name)
            message = escape(message)
            return *(f'<p class="error">{message}</p>' if number == place else None
                     for number in range(outputs)),
    return answer


def _take_upload(folder: str, upload: Any) -> str | None:
    """Take the path of an upload, and no other.

    NOTE: gradio lets a client name any path that it does not mark as a file's.

    Raises:
        UsageError: It is not in the folder of uploads.
    """
    if not upload or not upload.path:
        return None
    path = os.path.realpath(upload.path)
    if Path(os.path.realpath(folder)) not in Path(path).parents or not os.path.isfile(path):
        raise UsageError('this is no upload')
    return path


def _shrink(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Make a picture fit for a page, unless it is; and by how much."""
    scale = min(1., _MAX_SIDE / max(image.shape[:2]))
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return image, scale
