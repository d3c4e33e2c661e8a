"""Makes docs/photographs.jpg: photographs of scikit-image (CC0) explained without training.

pip install scikit-image 'ttame-jax[convert]'
python docs/pictures.py tf_efficientnet_lite0 --weights timm
"""

import argparse
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

from ttame_jax.explaining import open_explainer

NAMES = ("coffee", "chelsea")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone")
    parser.add_argument("--weights")
    arguments = parser.parse_args()
    explainer = open_explainer(backbone=arguments.backbone, weights=arguments.weights)
    photographs = [getattr(skimage.data, name)() for name in NAMES]
    rows = [explainer.explain_picture(image, "top2").figure() for image in photographs]
    whole = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for row, top in zip(rows, np.cumsum([0, *(row.height for row in rows)])):
        whole.paste(row, (0, int(top)))
    whole.save(Path(__file__).with_name("photographs.jpg"), quality=85)


if __name__ == "__main__":
    main()
