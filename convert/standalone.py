"""Explanation maps of an image classifier in one forward pass: T-TAME in PyTorch.

It needs only this file, its weights, PyTorch and the classifier's library (see CONFIG):

    explainer = load("explainer.pt")
    logits, maps = explainer(images)               # maps of the predicted classes
    logits, maps = explainer(images, classes)      # maps of classes [B, K]

Images are [B, 3, H, W] in [0, 1], not standardised. Maps are [B, K, h, w] in [0, 1]. Resize them to
the image by bilinear interpolation.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

CONFIG: dict = {}


class Attention(nn.Module):
    """Computes class maps from feature maps, with a branch for each and their fusion.

    A branch is `up(activation(BatchNorm(Conv1x1(features)) + features))`.
    """

    def __init__(self, channels, widths, num_classes, skip, batch_norm, activation, branches):
        super().__init__()
        self.skip, self.activation = skip, activation
        if not branches:  # L-CAM-Img
            self.convs, self.bns = None, None
            self.op = nn.Conv2d(channels[0], num_classes, 1)
            return
        self.convs = nn.ModuleList([nn.Conv2d(*sizes, 1) for sizes in zip(channels, widths)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(w) for w in widths]) if batch_norm else None
        self.fuser = nn.Conv2d(sum(widths), num_classes, 1)

    def forward(self, features):
        if self.convs is None:
            return self.op(features[0])
        height = max(feature.shape[2] for feature in features)
        width = max(feature.shape[3] for feature in features)
        branches = []
        for i, feature in enumerate(features):
            x = self.convs[i](feature)
            if self.bns is not None:
                x = self.bns[i](x)
            if self.skip:
                x = x + feature
            x = torch.sigmoid(x) if self.activation == "sigmoid" else torch.relu(x)
            size = (height, width)
            branches.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
        return self.fuser(torch.cat(branches, dim=1))


class Explainer(nn.Module):
    """A frozen classifier and the attention mechanism trained on its feature maps."""

    def __init__(self, config=CONFIG):
        super().__init__()
        self.backbone = create_backbone(config)
        self.attention = Attention(**config["attention"])
        self.sigmoid_maps = config["sigmoid_maps"]
        # The attention reads the last feature maps of the classifier, usually all three.
        self.nodes = config["nodes"][-len(config["attention"]["channels"]) :]
        self.channels_last = config["channels_last"]
        self.prefix_tokens = config["prefix_tokens"]
        for name in ("mean", "std"):
            values = torch.tensor(config[name]).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images, classes=None):
        logits, features = self.features((images - self.mean) / self.std)
        if classes is None:
            classes = logits.argmax(dim=1, keepdim=True)
        class_maps = self.attention(features)
        if self.sigmoid_maps:
            class_maps = class_maps.sigmoid()
        indices = classes[:, :, None, None].expand(-1, -1, *class_maps.shape[2:])
        return logits, min_max_scale(class_maps.gather(1, indices))

    def features(self, images):
        """Logits [B, Cls] and feature maps [B, C, h, w] of standardised images."""
        found = []
        hooks = [
            self.backbone.get_submodule(node).register_forward_hook(
                lambda module, inputs, output: found.append(output)
            )
            for node in self.nodes
        ]
        try:
            logits = self.backbone(images)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, [self.spatial(feature) for feature in found]

    def spatial(self, feature):
        """A ViT's tokens [B, prefix + N, C], or feature maps of another layout, as [B, C, h, w]."""
        if feature.ndim == 4:
            return feature.permute(0, 3, 1, 2) if self.channels_last else feature
        patches = feature[:, self.prefix_tokens :]
        side = math.isqrt(patches.shape[1])
        return patches.transpose(1, 2).unflatten(2, (side, side))


def min_max_scale(maps):
    """Scales each map [..., h, w] to [0, 1]. A constant map becomes zero."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, torch.ones_like(high))


def create_backbone(config):
    """Builds the classifier with its library, without weights."""
    if config["library"] == "timm":
        import timm

        return timm.create_model(config["model"], **config["options"])
    from torchvision import models

    return getattr(models, config["model"])(**config["options"])


def load(weights, config=CONFIG):
    """Loads the explainer with the weights of a file."""
    explainer = Explainer(config)
    explainer.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return explainer
