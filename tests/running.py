from flax import nnx


@nnx.jit
def run(backbone, x):
    """A backbone's logits and feature maps, compiled."""
    return backbone(x)
