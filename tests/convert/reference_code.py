"""The authors' side of a checkpoint: random tensors under their names, and the maps they give.

The formulas are the paper's (section III): a branch is up(ReLU(BN(Conv1x1(L)) + L)), the fusion
a 1x1 convolution, and a map is min-max scaled before the sigmoid. They are computed in float64,
since scaling a map of small range enlarges float32's rounding on either side.
"""

import math

import torch
from torch.nn import functional as F

CHANNELS = {
    "squeezenet1_0": (256, 512, 512),
    "resnet18": (128, 256, 512),
    "resnet50": (512, 1024, 2048),
    "vgg16": (256, 512, 512),
    "vit_b_16": (768, 768, 768),
}


def attention_state(
    channels, classes=1000, *, batch_norm=True, lcam=False, class_wide=False, steps=7, seed=0
):
    """Random tensors of the attention mechanism, without prefix."""
    generator = torch.Generator().manual_seed(seed)

    def conv(name, outputs, inputs):
        weight = torch.randn(outputs, inputs, 1, 1, generator=generator) / math.sqrt(inputs)
        return {f"{name}.weight": weight, f"{name}.bias": torch.randn(outputs, generator=generator)}

    if lcam:
        return conv("op", classes, channels[-1])
    state = {}
    widths = [classes if class_wide else count for count in channels]
    for i, sizes in enumerate(zip(widths, channels)):
        state |= conv(f"convs.{i}", *sizes)
    for i, count in enumerate(widths if batch_norm else ()):
        for name in ("weight", "bias", "running_mean"):
            state[f"bns.{i}.{name}"] = torch.randn(count, generator=generator)
        state[f"bns.{i}.running_var"] = 0.5 + torch.rand(count, generator=generator)
        state[f"bns.{i}.num_batches_tracked"] = torch.tensor(steps)
    return state | conv("fuser", classes, sum(widths))


def class_maps(state, features, *, skip=True, activation=torch.relu):
    """[B, Cls, h, w] of feature maps [B, C, h, w] in float64, before any scaling."""
    state = {key: tensor.double() for key, tensor in state.items()}
    if "op.weight" in state:
        return F.conv2d(features[-1], state["op.weight"], state["op.bias"])
    size = max(feature.shape[-2:] for feature in features)
    branches = []
    for i, feature in enumerate(features):
        x = F.conv2d(feature, state[f"convs.{i}.weight"], state[f"convs.{i}.bias"])
        if f"bns.{i}.weight" in state:
            names = ("running_mean", "running_var", "weight", "bias")
            x = F.batch_norm(x, *(state[f"bns.{i}.{name}"] for name in names), eps=1e-5)
        x = activation(x + feature if skip else x)
        branches.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
    return F.conv2d(torch.cat(branches, 1), state["fuser.weight"], state["fuser.bias"])


def scaled(maps):
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low)


def checkpoint(state, body=None, **hyper_parameters):
    """A Lightning checkpoint as the authors' code writes it."""
    vit = hyper_parameters["model_name"].startswith("vit")
    prefix = "generic.attn_mech.1." if vit else "generic.attn_mech."
    tensors = {f"generic.body.{key}": tensor for key, tensor in (body or {}).items()}
    tensors |= {prefix + key: tensor for key, tensor in state.items()}
    tensors |= {f"generic.arrangement.body.{key}": value for key, value in (body or {}).items()}
    return {
        "epoch": 7,
        "global_step": 7,
        "pytorch-lightning_version": "2.1.2",
        "state_dict": tensors,
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
    }


def layers(model, features="norm"):
    """What the authors' scripts read of a model."""
    return {
        "squeezenet1_0": ["features.6", "features.11", "features.12"],
        "vgg16": ["features.16", "features.23", "features.30"],
        "vit_b_16": [
            f"encoder.layers.encoder_layer_{i}.{'ln' if features == 'norm' else 'add_1'}"
            for i in (9, 10, 11)
        ],
    }.get(model, ["layer2", "layer3", "layer4"])
