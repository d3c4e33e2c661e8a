"""The command `ttame convert`. Each function is a subcommand and its docstring the help."""

from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

Library = Literal["torchvision", "timm"]


def backbone(
    name: Annotated[str, tyro.conf.arg(metavar="NAME"), tyro.conf.Positional],
    *,
    output: Path,
    weights: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
) -> None:
    """Convert a backbone's PyTorch weights to a .safetensors file of Flax parameters.

    load_backbone(NAME, FILE) and ttame train --weights FILE need no PyTorch afterwards.

    Args:
      name: Name of the backbone, such as vgg16, vit_b16 or timm:resnet50d.
      output: The file to write.
      weights: A .safetensors, .pth, .pt or .ckpt file, torchvision, timm or timm:MODEL; by default
        torchvision, or timm for a name of timm's.
      num_classes: Number of classes, if it is not the model's own.
      image_size: Height and width of the input, if they are not the model's own.
    """
    from ttame_jax.files import check_output_file
    from ttame_jax.weights import load_backbone, save_backbone
    from ttame_jax.weights.backbones import default_weights
    from ttame_jax.weights.transfer import parameters

    check_output_file(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"--output is a .safetensors file, not {output}")
    weights = weights or default_weights(name)
    model = load_backbone(name, weights, num_classes=num_classes, image_size=image_size)
    save_backbone(model, output)
    count = sum(value.size for value in parameters(model).values())
    print(f"{output}: {name} from {weights}, {count:,} values, {model.num_classes} classes")


def import_(
    model: Annotated[str, tyro.conf.arg(metavar="MODEL"), tyro.conf.Positional],
    *,
    output: Path,
    weights: str | None = None,
    image_size: int | None = None,
    features: tuple[str, ...] | None = None,
    prefix_tokens: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    class_names: Path | None = None,
) -> None:
    """Import any PyTorch classifier as one file that needs no PyTorch.

    The file has the computation and the weights. load_backbone(FILE) and --backbone FILE load it.
    The result is compared with PyTorch before it is written.

    $ ttame convert import timm:mixer_s16_224 --output mixer.safetensors

    $ ttame convert import module.py:make_model --output mine.safetensors

    Args:
      model: timm:MODEL, or FILE.py:FUNCTION for a function without arguments that returns an
        nn.Module. The file's code is run.
      output: The .safetensors file to write.
      weights: A .safetensors, .pth, .pt or .ckpt file with the model's state dict, or random for
        timm's initialisation; by default timm's published weights, or what the function sets.
      image_size: Height and width of the input, if they are not the model's own or 224.
      features: Names of the modules whose outputs are the feature maps, by default those of the last
        three resolutions or blocks.
      prefix_tokens: Number of tokens before the patches, if it cannot be seen from their number.
      mean: Mean of the input for each channel (RGB, in [0, 1]), if it is not the model's own or
        ImageNet's.
      std: Standard deviation, likewise.
      class_names: A file with one class name per line; it becomes part of the imported classifier.
    """
    from ttame_jax.convert.importing import import_model
    from ttame_jax.labels import read_names

    lines = import_model(
        model,
        output,
        weights=weights,
        image_size=image_size,
        mean=mean,
        std=std,
        features=features,
        prefix_tokens=prefix_tokens,
        class_names=None if class_names is None else read_names(class_names),
    )
    for line in lines:
        print(line)


def from_reference(
    checkpoint: Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT"), tyro.conf.Positional],
    *,
    output: Path,
    weights: str = "torchvision",
) -> None:
    """Convert a T-TAME or L-CAM checkpoint of the authors' PyTorch code to a run.

    The run can be explained with and evaluated. It has the settings of the checkpoint's training
    and is evaluated with pixel masking, as in the authors' code.

    Args:
      checkpoint: A .ckpt file of the authors' code, or an attention.safetensors of to-torch.
      output: Folder of the run, created here.
      weights: Weights of the backbone: torchvision, a file, or checkpoint for those in the
        checkpoint (whose BatchNorm statistics drifted from torchvision's during training).
    """
    from ttame_jax.convert.authors import from_reference

    config = from_reference(checkpoint, output, weights)
    print(f"{output}: {config.variant} on {config.backbone}, with the authors' settings:")
    for name in ("backbone_config", "masking", "evaluation_masking", "epochs", "learning_rate"):
        print(f"  {name}: {getattr(config, name)}")
    print(f"  loss: {config.loss.recipe}")
    print(f"next: ttame explain IMAGE --run {output} --output DIR")


def to_torch(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN"), tyro.conf.Positional],
    *,
    output: Path,
    module: bool = False,
    library: Library | None = None,
    weights: str | None = None,
) -> None:
    """Export a run as PyTorch files.

    Writes the attention under the authors' names (.safetensors, and a .ckpt if their code can
    load it) and the backbone in torchvision's and timm's layouts.

    Args:
      run: The run's folder.
      output: Folder for the files, created here.
      module: Also write explainer.py and explainer.pt, a module of backbone and attention that
        needs only PyTorch and the backbone's library.
      library: Library of the module's backbone; by default torchvision, or else timm.
      weights: Weights of the backbone, if they are no longer where the run found them.
    """
    from ttame_jax.convert.export import run_to_torch

    lines = run_to_torch(run, output, library=library, module=module, weights=weights)
    print(f"{output}:")
    for line in lines:
        print(f"  {line}")


def verify(
    target: Annotated[str, tyro.conf.arg(metavar="TARGET"), tyro.conf.Positional],
    *,
    weights: str | None = None,
    library: Library | None = None,
    tolerance: float = 1e-4,
    images: int = 2,
) -> None:
    """Compare a run or a backbone with PyTorch on random images.

    Prints the maximum differences of logits, feature maps and explanation maps. Fails if one
    exceeds the tolerance.

    Args:
      target: A run's folder, or a backbone's name.
      weights: Weights of the backbone; a run's own by default.
      library: Library to compare with; by default each that has the backbone.
      tolerance: Largest difference, relative to the largest value for logits and features, and
        absolute for maps.
      images: Number of images.
    """
    from ttame_jax.convert.verify import verify

    for line in verify(target, weights, library=library, tolerance=tolerance, images=images):
        print(line)


_COMMANDS = {
    "backbone": backbone,
    "import": import_,
    "from-reference": from_reference,
    "to-torch": to_torch,
    "verify": verify,
}
_SUBCOMMANDS = tuple(
    Annotated[Any, tyro.conf.subcommand(name=name, constructor=function)]
    for name, function in _COMMANDS.items()
)


# pyrefly: ignore[not-a-type]  # a type that is computed from the table above
def convert(command: Annotated[Union[_SUBCOMMANDS], tyro.conf.arg(name="")]) -> None:  # noqa: UP007
    """Convert weights and runs between PyTorch and this project, in both directions."""
