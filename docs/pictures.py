"""Makes docs/photographs.jpg and docs/figure.jpg: photographs of scikit-image (CC0) explained
without training.

pip install scikit-image 'ttame-jax[convert,plots]'
python docs/pictures.py tf_efficientnet_lite0 --weights timm
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

from ttame_jax.experiments.figures import FiguresConfig, figures
from ttame_jax.explaining import open_explainer

FOLDER = Path(__file__).parent
NAMES = ("coffee", "chelsea")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone")
    parser.add_argument("--weights")
    arguments = parser.parse_args()
    photographs = {name: getattr(skimage.data, name)() for name in NAMES}
    explainer = open_explainer(backbone=arguments.backbone, weights=arguments.weights)
    rows = [explainer.explain_picture(image, "top2").figure() for image in photographs.values()]
    whole = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for row, top in zip(rows, np.cumsum([0, *(row.height for row in rows)])):
        whole.paste(row, (0, int(top)))
    whole.save(FOLDER / "photographs.jpg", quality=85)
    _figure(arguments, photographs)


def _figure(arguments: argparse.Namespace, photographs: dict[str, np.ndarray]) -> None:
    """A figure of `ttame figures --classes top3`."""
    with tempfile.TemporaryDirectory() as folder:
        files = tuple(Path(folder, f"{name}.png") for name in photographs)
        for path, image in zip(files, photographs.values()):
            Image.fromarray(image).save(path)
        config = FiguresConfig(
            images=files,
            backbone=(arguments.backbone,),
            weights=(arguments.weights,) if arguments.weights else (),
            classes="top3",
            output=Path(folder),
        )
        figures(config)
        with Image.open(Path(folder, "top3.png")) as figure:
            figure.convert("RGB").reduce(2).save(FOLDER / "figure.jpg", quality=85)


if __name__ == "__main__":
    main()
