"""`ttame serve`: a page on which photographs are explained live.

`Live` does the work and does not know the page. The rest is the page, which Gradio draws.
"""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from ttame_jax import pictures
from ttame_jax.data.transforms import MAX_PIXELS, UnreadableImage, open_picture
from ttame_jax.data.views import View, ViewName
from ttame_jax.experiments.cost import estimate, is_slow
from ttame_jax.experiments.explain import ExplainerConfig
from ttame_jax.explainer import Explainer
from ttame_jax.explanation import Explanation
from ttame_jax.labels import label
from ttame_jax.masking import upsample
from ttame_jax.methods import load_method
from ttame_jax.methods.ttame import TrainedMethod
from ttame_jax.metrics.ad_ic import average_drop
from ttame_jax.metrics.confidence import masked_confidences
from ttame_jax.metrics.selection import relevance_rank
from ttame_jax.preprocessing import Preprocessing, to_float

COMPARED = "gradcam"
"""The method whose maps are shown beside those of the page's own."""

SCREEN = 1024
"""Longest side of the pictures on the page, in pixels."""

LIKELIEST = 10
"""Classes that are listed."""

SESSIONS = 50
"""Photographs that are kept, one for each open page. The oldest is forgotten first."""

COLOUR_MAPS = ("inferno", "viridis", "magma", "turbo", "jet")

HOUR = 3600


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(ExplainerConfig):
    """A classifier and a method, and where their page is served."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine only, 0.0.0.0 from others."""
    port: int | None = None
    """Port to listen on. The default is the first free one from 7860."""
    max_megabytes: int = 20
    """Larger uploads are refused."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_megabytes < 1:
            raise ValueError(f"--max-megabytes must be at least 1, not {self.max_megabytes}")
        if self.port is not None and not 0 < self.port < 2**16:
            raise ValueError(f"--port must lie in 1 to {2**16 - 1}, not {self.port}")


@dataclasses.dataclass(frozen=True, eq=False)
class Photograph:
    """A photograph, and what is known about it.

    Attributes:
      screen: uint8 ``[H, W, 3]``, the photograph, no side longer than `SCREEN`.
      view: what the classifier is shown of it.
      screen_box: the box of the view, in pixels of `screen`.
      probabilities: float32 ``[num_classes]``, the classifier's answer.
      maps: float32 ``[h, w]`` in [0, 1] by the method's name and the class. They are computed when
        they are first asked for, those of a trained method all at once.
    """

    screen: np.ndarray
    view: View
    screen_box: tuple[float, float, float, float]
    probabilities: np.ndarray
    maps: dict[tuple[str, int], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """The classifier's answer for an image that is masked by a map.

    Attributes:
      image: uint8 ``[h, w, 3]``, the masked image.
      confidence: psi, the confidence in the class on the image, in [0, 1].
      masked_confidence: psi', the confidence in the class on the masked image, in [0, 1].
      drop: ``max(0, psi - psi') / psi``, in [0, 1]; NaN if psi is 0.
    """

    image: np.ndarray
    confidence: float
    masked_confidence: float
    drop: float


class Live:
    """Explains photographs, each with as few passes of the network as possible.

    A trained method needs one pass for the maps of all classes. Other methods need their own
    passes for each class. A masked image needs one pass.

    Args:
      explainer: the classifier, and the method of the page.
      view: what the classifier is shown, see `Explainer.explain_picture`.
      max_pixels: largest number of pixels of a photograph.

    Attributes:
      explainers: by name of their methods: that of the page, and that for `COMPARED`.

    Raises:
      ValueError: the whole picture cannot be shown to the classifier in one input.
    """

    def __init__(
        self, explainer: Explainer, view: ViewName | None = None, max_pixels: int = MAX_PIXELS
    ):
        if view == "whole" and not explainer.backbone.any_size:
            raise ValueError(
                f"{explainer.backbone.name} takes inputs of one size, so the page shows it the "
                "centre crop: leave out --view whole"
            )
        self.explainer, self._view, self._max_pixels = explainer, view, max_pixels
        self.explainers = {explainer.method.name: explainer}
        if COMPARED not in self.explainers:
            method = load_method(COMPARED, explainer.backbone)
            self.explainers[COMPARED] = Explainer(method, explainer.class_names)
        self._predict = functools.partial(_predict, *nnx.split(explainer.backbone))

    def open(self, picture: str | os.PathLike | Image.Image) -> Photograph:
        """Opens a photograph and classifies it, in one pass.

        Raises:
          UnreadableImage: it is not an image, or it is damaged or too large.
          ValueError: it is too elongated, or its pixels have an unknown range.
        """
        opened = open_picture(picture, self._max_pixels)
        view = self.explainer.view(opened, self._view)
        screen = opened.copy()
        screen.thumbnail((SCREEN, SCREEN), Image.Resampling.LANCZOS)
        across, down = screen.width / opened.width, screen.height / opened.height
        left, top, right, bottom = view.box
        box = (left * across, top * down, right * across, bottom * down)
        probabilities, maps = self._classify(_batch(view))
        return Photograph(np.asarray(screen), view, box, probabilities, maps)

    def _classify(self, images: jax.Array):
        """The probabilities of an image, and the maps that take no further pass."""
        method = self.explainer.method
        if not isinstance(method, TrainedMethod):
            standardised = method.backbone.preprocessing.standardise(images)
            return np.asarray(self._predict(standardised)[0]), {}
        explained = jax.device_get(self.explainer(images, "all"))
        maps = {(method.name, i): one for i, one in enumerate(explained.maps[0])}
        return explained.probabilities[0], maps

    def explain(self, photograph: Photograph, classes: Sequence[int], method: str) -> Explanation:
        """The maps of some classes over the photograph as it is on the screen.

        Args:
          photograph: the photograph.
          classes: ids of the classes.
          method: a name in `explainers`.
        """
        maps = np.stack([self._map(photograph, one, method) for one in classes])
        labels = tuple(label(one, self.explainer.class_names) for one in classes)
        chosen = np.asarray(classes, np.int32)
        probabilities = photograph.probabilities[chosen]
        return Explanation(
            photograph.screen, maps, chosen, probabilities, labels, photograph.screen_box
        )

    def _map(self, photograph: Photograph, class_id: int, method: str) -> np.ndarray:
        key = (method, class_id)
        if key not in photograph.maps:
            explained = self.explainers[method](_batch(photograph.view), [class_id])
            photograph.maps[key] = np.asarray(explained.maps[0, 0])
        return photograph.maps[key]

    def mask(self, photograph: Photograph, class_id: int, method: str, percent: float) -> Masked:
        """Masks the image with the top v % of a map and classifies it again, in one pass.

        Args:
          photograph: the photograph.
          class_id: id of the class.
          method: a name in `explainers`.
          percent: v, in [0, 100].

        Raises:
          ValueError: the percentage is outside [0, 100].
        """
        images, backbone = _batch(photograph.view), self.explainer.backbone
        maps = jnp.asarray(self._map(photograph, class_id, method)[None])
        maps = upsample(maps, images.shape[1:3])
        seen = []

        def predict(standardised: jax.Array) -> jax.Array:
            seen.append(standardised)
            return self._predict(standardised)

        after = masked_confidences(
            predict,
            images,
            maps,
            relevance_rank(maps),
            jnp.array([class_id]),
            backbone.preprocessing,
            backbone.masking,
            [percent],
        )
        before = photograph.probabilities[class_id]
        drop = average_drop(before[None], np.asarray(after))[0] / 100 if before else math.nan
        image = _pixels(seen[0][0], backbone.preprocessing)
        return Masked(image, float(before), float(after[0, 0]), float(drop))

    def title(self, photograph: Photograph, class_id: int) -> str:
        """The name and the probability of a class."""
        name = label(class_id, self.explainer.class_names)
        return f"{name}: {photograph.probabilities[class_id]:.1%}"

    def likeliest(self, photograph: Photograph, count: int) -> list[int]:
        """The ids of the most probable classes, most probable first."""
        order = np.argsort(-photograph.probabilities, kind="stable")
        return order[:count].tolist()

    def save(
        self, photograph: Photograph, classes: Sequence[int], path: Path, **style: Any
    ) -> None:
        """Writes the page's own maps: a figure, or the arrays that `ttame explain` writes.

        Args:
          photograph: the photograph.
          classes: ids of the classes.
          path: a .png or .npz file.
          **style: of the figure, as for `Explanation.draw`.
        """
        explanation = self.explain(photograph, classes, self.explainer.method.name)
        if path.suffix == ".npz":  # whose box is in pixels of the photograph itself
            explanation = dataclasses.replace(explanation, box=photograph.view.box)
        explanation.save(path, **style)


@functools.partial(jax.jit, static_argnames="graph")
def _predict(graph, state, standardised):
    return jax.nn.softmax(nnx.merge(graph, state)(standardised)[0])


def _batch(view: View) -> jax.Array:
    return jnp.asarray(to_float(view.pixels[None]))


def _pixels(standardised: jax.Array, preprocessing: Preprocessing) -> np.ndarray:
    """A standardised image ``[h, w, 3]`` as uint8."""
    image = np.asarray(standardised) * np.array(preprocessing.std) + preprocessing.mean
    return (255 * image.clip(0, 1) + 0.5).astype(np.uint8)


def serve_page(config: ServeConfig) -> None:
    """Serves the page until Ctrl-C or SIGTERM.

    Raises:
      ImportError: Gradio is not installed.
      ValueError: wrong arguments, see `open_explainer` and `Live`.
      OSError: the port is in use.
    """
    _gradio()  # before the weights are loaded
    live = Live(config.open(), config.view, config.max_pixels)
    if is_slow(live.explainer.method):
        print(estimate(live.explainer.method, 1), file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        serving(live, config.host, config.port, config.max_megabytes) as address,
    ):
        print(f"{address} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()


@contextlib.contextmanager
def serving(
    live: Live, host: str = "127.0.0.1", port: int | None = None, max_megabytes: int = 20
) -> Iterator[str]:
    """Serves the page while its body runs. All files lie in a folder that is removed at the end.

    Args:
      live: what explains the photographs.
      host: address to listen on.
      port: port to listen on; None is the first free one from 7860.
      max_megabytes: larger uploads are refused.

    Yields:
      The address of the page.

    Raises:
      OSError: the port is in use.
    """
    with tempfile.TemporaryDirectory(prefix="ttame-serve-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        _gradio().routes.DEFAULT_TEMP_DIR = folder  # read from the environment at its import
        page = build_page(live, Path(folder))
        try:
            _, address, _ = page.queue(max_size=SESSIONS).launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=f"{max_megabytes}mb",
                state_session_capacity=SESSIONS,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                mcp_server=False,
                ssr_mode=False,
            )
            yield address
        finally:
            page.close(verbose=False)
            os.environ.pop("GRADIO_TEMP_DIR", None)


def _gradio():
    """Gradio, which sends no statistics and looks for no newer version."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


NONE = -1
"""The second class, if there is none."""

NUMBERS = """**ψ** is the classifier's confidence in the class, **ψ′** that on the masked image, in
which the top v % of the map's pixels are kept, and the **drop** is max(0, ψ − ψ′) / ψ."""

# Typing replaces the class that a search box shows.
SELECT = "() => setTimeout(() => document.activeElement.select(), 100)"

CLICK = "() => document.querySelector('#{0}, #{0} a, #{0} button').click()"


def build_page(live: Live, folder: Path) -> Any:
    """The page, a `gradio.Blocks`. It writes into the folder only."""
    gr = _gradio()
    page = gr.Blocks(title="T-TAME", analytics_enabled=False, delete_cache=(HOUR, HOUR))
    with page:
        _Page(gr, live, folder).connect()
    return page


class _Page:
    """The components of the page, and what happens when a user changes one of them.

    A handler returns a value for each of its outputs. Only `open`, `draw` of maps that are not known
    yet, and `measure` run the network.
    """

    def __init__(self, gr, live: Live, folder: Path):
        self.gr, self.live, self.folder = gr, live, folder
        self.methods = list(live.explainers)  # the page's own first
        backbone = live.explainer.backbone
        gr.Markdown(f"# {live.explainer.method.title}: {backbone.name}")
        self.kept = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self._build_choice()
            with gr.Column(scale=3, min_width=320, visible=False) as self.results:
                self._build_results()

    def _build_choice(self) -> None:
        gr = self.gr
        self.file = gr.Image(
            label="Photograph", type="filepath", sources=["upload", "clipboard"], height=260
        )
        # Gradio would decode the file, whatever its size.
        self.file.preprocess = lambda payload: payload and payload.path
        with gr.Column(visible=False) as self.choice:
            self.likeliest = gr.Radio([], label="Most probable classes")
            self.first = gr.Dropdown([], label="Class (type to search)")
            self.second = gr.Dropdown([], label="Second class, side by side (type to search)")

    def _build_results(self) -> None:
        gr = self.gr
        with gr.Row():
            self.opacity = gr.Slider(0, 1, pictures.OPACITY, step=0.05, label="Opacity")
            self.colours = gr.Dropdown(
                COLOUR_MAPS, value=pictures.COLOUR_MAP, label="Colour map", filterable=False
            )
            self.percent = gr.Slider(1, 100, 50, step=1, label="Pixels kept: v %")
        with gr.Row():
            self.columns = [_Column(gr, self.live), _Column(gr, self.live)]
        gr.Markdown(NUMBERS)
        with gr.Row():
            self.buttons = {
                name: gr.Button(f"Download {text}")
                for name, text in (("maps.png", "figure (PNG)"), ("maps.npz", "maps (NPZ)"))
            }
            self.downloads = {
                name: gr.DownloadButton(elem_id=f"download-{name[-3:]}", visible="hidden")
                for name in self.buttons
            }

    def connect(self) -> None:
        """Says which handlers follow which change."""
        chosen = [self.kept, self.first, self.second]
        style = [self.opacity, self.colours]
        names = [column.title for column in self.columns]
        maps = [[column.maps[method] for column in self.columns] for method in self.methods]
        measured = [part for column in self.columns for part in column.measured]
        lists = [self.likeliest, self.first, self.second]
        quick = {"show_progress": "hidden", "trigger_mode": "always_last"}

        def show(event, **options):
            """The page's own maps first, then what takes a pass of the network."""
            own = [self.likeliest, *names, *maps[0]]
            event = event(self.choose, [*chosen, *style], own, **options)
            for method, images in zip(self.methods[1:], maps[1:]):
                draw = functools.partial(self.draw, method)
                event = event.success(draw, [*chosen, *style], images, show_progress="minimal")
            measure = [*chosen, self.percent]
            event.success(self.measure, measure, measured, show_progress="minimal")

        second = self.columns[1].box
        everything = [self.kept, self.results, self.choice, *lists, second]
        opened = self.file.change(self.open, self.file, everything)
        opened.failure(self.forget, None, everything)
        show(opened.success)
        show(self.likeliest.input(None, self.likeliest, self.first, js="one => one").success)
        show(self.first.input, **quick)
        show(self.second.input(self.widen, self.second, second, **quick).success)
        for method, images in zip(self.methods, maps):
            draw = functools.partial(self.draw, method)
            self.gr.on([one.input for one in style], draw, [*chosen, *style], images, **quick)
        for one in (self.first, self.second):
            one.focus(None, js=SELECT)
        self.percent.input(self.measure, [*chosen, self.percent], measured, **quick)
        for name, button in self.buttons.items():
            file = self.downloads[name]
            saved = button.click(functools.partial(self.save, name), [*chosen, *style], file)
            saved.success(None, js=CLICK.format(file.elem_id))

    def open(self, file: str | None) -> dict:
        """Explains a new photograph, or forgets the one that is taken away."""
        if file is None:
            return self.forget()
        try:
            photograph = self.live.open(file)
        except (UnreadableImage, ValueError) as error:
            message = str(error).replace(file, Path(file).name)
            raise self.gr.Error(message, print_exception=False) from error
        classes = [
            (self.live.title(photograph, one), one)
            for one in self.live.likeliest(photograph, len(photograph.probabilities))
        ]
        best = classes[0][1]
        return {
            self.kept: photograph,
            self.results: self.gr.Column(visible=True),
            self.choice: self.gr.Column(visible=True),
            self.likeliest: self.gr.Radio(classes[:LIKELIEST], value=best),
            self.first: self.gr.Dropdown(classes, value=best),
            self.second: self.gr.Dropdown([("none", NONE), *classes], value=NONE),
            self.columns[1].box: self.gr.Column(visible=False),
        }

    def forget(self) -> dict:
        """Hides everything but the place for a photograph."""
        hidden = self.gr.Column(visible=False)
        return {self.kept: None, self.results: hidden, self.choice: hidden}

    def widen(self, second: int):
        """Makes room for a second class."""
        return self.gr.Column(visible=second != NONE)

    def choose(self, photograph, first, second, opacity, colours) -> list:
        """The class in the list, the names of the chosen classes and the page's own maps."""
        chosen = (photograph, first, second)
        listed = photograph and first in self.live.likeliest(photograph, LIKELIEST)
        names = _per_column(*chosen, lambda one: f"### {self.live.title(photograph, one)}")
        maps = self.draw(self.methods[0], *chosen, opacity, colours)
        return [first if listed else None, *names, *maps]

    def draw(self, method: str, photograph, first, second, opacity, colours) -> list:
        """The maps of a method over the photograph."""

        def overlay(one: int) -> np.ndarray:
            return self.live.explain(photograph, [one], method).overlay(0, opacity, colours)

        return _per_column(photograph, first, second, overlay)

    def measure(self, photograph, first, second, percent) -> list:
        """The masked images, and what the classifier says about them."""
        titles = [self.live.explainers[method].method.title for method in self.methods]

        def measured(one: int) -> list:
            left, top, right, bottom = map(round, photograph.screen_box)
            size = (right - left, bottom - top)  # as large as the maps
            masked = [self.live.mask(photograph, one, method, percent) for method in self.methods]
            images = [Image.fromarray(each.image).resize(size) for each in masked]
            return [*images, _table(zip(titles, masked))]

        nothing = [None] * len(self.columns[0].measured)
        columns = _per_column(photograph, first, second, measured)
        return [value for column in columns for value in column or nothing]

    def save(self, name: str, photograph, first, second, opacity, colours) -> str:
        """Writes a file to download."""
        path = Path(tempfile.mkdtemp(dir=self.folder)) / name
        classes = [one for one in (first, second) if one != NONE]
        self.live.save(photograph, classes, path, opacity=opacity, colour_map=colours)
        return str(path)


def _per_column(photograph, first: int, second: int, value: Callable[[int], Any]) -> list:
    """A value for the class of each column, None for a column that is not in use."""
    used = [photograph is not None and one != NONE for one in (first, second)]
    return [value(one) if use else None for one, use in zip((first, second), used)]


class _Column:
    """The part of the page about one class."""

    def __init__(self, gr, live: Live):
        titles = {name: one.method.title for name, one in live.explainers.items()}

        def image(text: str):
            return gr.Image(
                label=text,
                alt_text=text,
                format="jpeg",
                interactive=False,
                buttons=["download", "fullscreen"],
                min_width=120,  # two in a row on a phone
            )

        with gr.Column(min_width=320) as self.box:
            self.title = gr.Markdown()
            with gr.Row():
                self.maps = {name: image(title) for name, title in titles.items()}
            with gr.Row():
                self.masked = {name: image(f"{title}, masked") for name, title in titles.items()}
            self.table = gr.Markdown()
        self.measured = [*self.masked.values(), self.table]


def _table(rows: Iterable[tuple[str, Masked]]) -> str:
    """What the classifier says about the masked images, in Markdown."""
    lines = ["| | ψ | ψ′ | drop |", "|---|---|---|---|"]
    for title, masked in rows:
        numbers = (masked.confidence, masked.masked_confidence, masked.drop)
        cells = ("–" if math.isnan(number) else f"{number:.1%}" for number in numbers)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)
