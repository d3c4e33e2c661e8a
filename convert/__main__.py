"""The command `python -m convert`: each function is a subcommand, its docstring the help."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ttame_jax.errors import one_line_errors

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

    load_backbone(NAME, FILE) and ttame train --weights FILE then need no PyTorch.

    Args:
      name: Of the backbone, such as vgg16, vit_b16 or timm:resnet50d.
      output: The file to write.
      weights: A .safetensors, .pth, .pt or .ckpt file, torchvision, timm or timm:MODEL; by default
        torchvision, or timm for a name of timm's.
      num_classes: Of the classifier, where it is not the model's usual number.
      image_size: Side of the input, where it is not the model's own.
    """
    from convert.weights import parameters
    from ttame_jax.backbones import load_backbone, save_backbone

    weights = weights or ("timm" if name.startswith("timm:") else "torchvision")
    model = load_backbone(name, weights, num_classes=num_classes, image_size=image_size)
    save_backbone(model, output)
    count = sum(value.size for value in parameters(model).values())
    print(f"{output}: {name} from {weights}, {count:,} values, {model.num_classes} classes")


def from_reference(
    checkpoint: Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT"), tyro.conf.Positional],
    *,
    output: Path,
    weights: str = "torchvision",
) -> None:
    """Make a run of a T-TAME or L-CAM checkpoint of the authors' PyTorch code.

    The run can be explained with and evaluated. It has the settings that the checkpoint was
    trained with, and is evaluated with pixel masking, as in the authors' code.

    Args:
      checkpoint: A .ckpt file of the authors' code, or an attention.safetensors of to-torch.
      output: Folder of the run, made here.
      weights: The backbone's: torchvision, a file, or checkpoint for those in the checkpoint (whose
        BatchNorm statistics have drifted from torchvision's during training).
    """
    from convert.reference import from_reference

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
    onnx: bool = False,
    library: Library | None = None,
    weights: str | None = None,
) -> None:
    """Write a run as PyTorch files.

    Always the attention under the authors' names (.safetensors, and a .ckpt where their code
    can load it) and the backbone in torchvision's and timm's layouts.

    Args:
      run: The run's folder.
      output: Folder for the files, made here.
      module: Also explainer.py and explainer.pt: a module of backbone and attention that needs
        nothing but PyTorch and the backbone's library.
      onnx: Also explainer.onnx: images to logits and the maps of the predicted classes.
      library: Whose backbone the module has; by default torchvision's, else timm's.
      weights: Of the backbone, where they are no longer where the run found them.
    """
    from convert.export import run_to_torch

    said = run_to_torch(run, output, library=library, module=module, onnx=onnx, weights=weights)
    print(f"{output}:")
    for line in said:
        print(f"  {line}")


def verify(
    target: Annotated[str, tyro.conf.arg(metavar="TARGET"), tyro.conf.Positional],
    *,
    weights: str | None = None,
    library: Library | None = None,
    tolerance: float = 1e-4,
    images: int = 2,
) -> None:
    """Compare a run or a backbone with PyTorch's computation, on random images.

    Prints the maximum differences of logits, feature maps and explanation maps; fails if one is
    above the tolerance.

    Args:
      target: A run's folder, or a backbone's name.
      weights: Of the backbone; a run's own by default.
      library: Compare with torchvision or timm; by default with each that has the backbone.
      tolerance: Of logits and features as a share of their largest value; of maps as they are.
      images: How many.
    """
    from convert.verify import verify

    for line in verify(target, weights, library=library, tolerance=tolerance, images=images):
        print(line)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake in it ends with one line that says what to do."""
    with one_line_errors("convert"):
        tyro.extras.subcommand_cli_from_dict(
            {
                "backbone": backbone,
                "from-reference": from_reference,
                "to-torch": to_torch,
                "verify": verify,
            },
            prog="python -m convert",
            description="Weights between PyTorch and this project, both ways.",
            args=list(sys.argv[1:] if args is None else args),
        )


if __name__ == "__main__":
    main()
