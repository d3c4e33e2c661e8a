"""Real images, from the folder that is not part of the project."""

import io
import tarfile

import numpy as np
from PIL import Image


def read_images(shared, preprocessing, count):
    """The first real images, [count, S, S, 3], standardised."""
    size, images = preprocessing.image_size, []
    with tarfile.open(shared / "imagenet_sample/manual/ILSVRC2012_img_val.tar") as tar:
        for member in tar.getmembers()[:count]:
            image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
            images.append(np.asarray(image.resize((size, size)), np.float32) / 255)
    return np.asarray(preprocessing.standardise(np.stack(images)))
