from functools import partial

import pytest
import torch
import torch_cam_rows
from PIL import Image
from safetensors.torch import save_file

from ttame_jax.convert.pytorch.torch_import import import_torchvision

torchcam = pytest.importorskip("torchcam")


def test_the_rows_are_those_of_torch_cam(pictures, tmp_path):
    import_torchvision()
    from torchcam.metrics import ClassificationMetric
    from torchvision import models
    from torchvision.transforms import transforms as T

    torch.manual_seed(0)
    model = models.resnet18(weights=None).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    options = torch_cam_rows.Options(
        dataset=f"folder:{pictures}",
        backbones=("resnet18",),
        weights=str(tmp_path / "weights.safetensors"),
        limit=8,
        batch_size=8,
    )
    ours = torch_cam_rows.run(options)

    transform = T.Compose(
        [
            T.Resize(256),
            T.CenterCrop(224),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    source = torch_cam_rows.load_source(options.dataset, options.split)
    names = sorted((pictures / "validation").iterdir())
    chosen = torch_cam_rows.select(source, None, 8)
    pictures = [Image.open(names[i]).convert("RGB") for i in chosen]
    images = torch.stack([transform(picture) for picture in pictures]).requires_grad_()
    for row in ours["rows"]:
        with getattr(torchcam.methods, row["method"])(model, ["layer4"]) as cam:
            metric = ClassificationMetric(cam, partial(torch.softmax, dim=-1))
            metric.update(images)
        theirs = metric.summary()
        assert row["AD"] == pytest.approx(100 * theirs["avg_drop"], abs=0.02)
        assert row["IC"] == 100 * theirs["conf_increase"]
