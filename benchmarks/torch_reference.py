"""T-TAME's training step in plain PyTorch, on torchvision's models, as JSON: the other side of
`train_step.py --compare`.

    python benchmarks/torch_reference.py --backbone vit_b16 --batch-size 8

Written from the paper the literal way: each branch is upsampled, all are concatenated and fused to
the maps of all classes, of which Psi are those of the batch's model truths. The backbone is
frozen and in inference mode. Reading and decoding images do not count.
"""

import contextlib
from dataclasses import dataclass

import tyro
from common import Setting, main, median_seconds

from ttame_jax.convert.pytorch.torch_import import import_torchvision

torchvision = import_torchvision()

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Options(Setting):
    compile: bool = False
    """Whether to run the step under torch.compile."""


class Backbone(nn.Module):
    """A frozen torchvision classifier with the feature maps that section III-B reads."""

    def __init__(self, name: str, image_size: int):
        super().__init__()
        self.is_vit = name.startswith("vit")
        if self.is_vit:
            model = torchvision.models.get_model(name.replace("b16", "b_16"), image_size=image_size)
            nodes = [f"encoder.layers.encoder_layer_{i}.add_1" for i in (9, 10, 11)]
            logits = "heads.head"
        else:
            model = torchvision.models.get_model(name)
            is_vgg = name.startswith("vgg")
            pools = [
                f"features.{i}"
                for i, module in enumerate(model.features if is_vgg else ())
                if isinstance(module, nn.MaxPool2d)
            ]
            nodes = pools[-3:] or ["layer2", "layer3", "layer4"]
            logits = "classifier.6" if is_vgg else "fc"
        outputs = {**{node: str(i) for i, node in enumerate(nodes)}, logits: "logits"}
        self.body = create_feature_extractor(model.eval(), outputs)
        self.requires_grad_(False)

    def forward(self, images):
        outputs = self.body(images)
        logits = outputs.pop("logits")
        return logits, [self._spatial(features) for features in outputs.values()]

    def _spatial(self, features):
        if not self.is_vit:
            return features
        tokens = features[:, 1:]
        side = int(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, side))


class Attention(nn.Module):
    """Feature branches and fusion (Fig. 3): class maps before the activation, [B, Cls, h, w]."""

    def __init__(self, channels: list[int], num_classes: int):
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(c, c, 1) for c in channels])
        self.norms = nn.ModuleList([nn.BatchNorm2d(c) for c in channels])
        self.fusion = nn.Conv2d(sum(channels), num_classes, 1)

    def forward(self, features):
        size = features[0].shape[2:]
        branches = [
            F.interpolate(F.relu(norm(conv(x)) + x), size, mode="bilinear")
            for x, conv, norm in zip(features, self.convolutions, self.norms)
        ]
        return self.fusion(torch.cat(branches, dim=1))


class Reference:
    """Backbone, attention and optimiser; `step` trains on one batch."""

    def __init__(self, options: Options):
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        self.autocast = options.precision == "bfloat16"
        self.backbone = Backbone(options.backbone, options.image_size).to(self.device)
        images = torch.zeros(1, 3, options.image_size, options.image_size, device=self.device)
        logits, features = self.backbone(images)
        self.attention = Attention([f.shape[1] for f in features], logits.shape[1]).to(self.device)
        decayed, biases = [], []
        for name, parameter in self.attention.named_parameters():
            (biases if name.endswith("bias") else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": biases}]
        self.optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=1e-3, total_steps=10**6
        )
        self.mean, self.std = (
            torch.tensor(values, device=self.device)[:, None, None] for values in (MEAN, STD)
        )
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        self._loss = torch.compile(self.loss) if options.compile else self.loss

    def loss(self, images):
        """The paper's loss of images [B, 3, H, W] in [0, 1]."""
        standardised = (images - self.mean) / self.std
        with torch.no_grad():
            logits, features = self.backbone(standardised)
        classes = logits.argmax(dim=1)
        psi = self.attention(features).sigmoid()[:, classes]  # [B, B, h, w]
        masks = psi[torch.arange(len(psi)), torch.arange(len(psi))][:, None]
        masks = F.interpolate(masks, images.shape[2:], mode="bilinear")
        if self.backbone.is_vit:
            masked = masks * standardised
        else:
            masked = (masks * images - self.mean) / self.std
        logits, _ = self.backbone(masked)
        psi = psi.float()
        vertical, horizontal = psi.diff(dim=2), psi.diff(dim=3)
        variation = ((vertical**2).sum() + (horizontal**2).sum()) / (2 * psi.numel())
        area = (psi.clamp(min=1e-12) ** 0.3).mean()
        return 1.5 * F.cross_entropy(logits, classes) + 2 * (area + 0.005 * variation)

    def step(self, images):
        """Trains on uint8 images [B, 3, H, W]; returns the loss."""
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self.autocast else _nothing()
        with mixed:
            loss = self._loss(images.to(self.device).float() / 255)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss

    def synchronise(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


_nothing = contextlib.nullcontext


def training(options: Options):
    """A function that makes a number of training steps and waits for the last."""
    reference = Reference(options)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=reference.device)

    def steps(count: int):
        for _ in range(count):
            reference.step(images)
        reference.synchronise()

    return steps


def run(options: Options) -> dict:
    seconds = median_seconds({"torch": training(options)}, options.rounds)["torch"]
    result = {"images_per_second": options.batch_size / seconds, "seconds_per_step": seconds}
    if options.device == "cuda":
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return result


if __name__ == "__main__":
    main(run, tyro.cli(Options, description=__doc__))
