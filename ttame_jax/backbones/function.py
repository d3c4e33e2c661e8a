"""A classifier given as a function of its parameters and images.

The function also returns the feature maps that explanations read. To let a method change one of
them, `FunctionBackbone.split` divides the program of the function (see `program`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.preprocessing import IMAGENET, Masking, Preprocessing

from .base import Architecture, Backbone, State
from .program import NotOnThePath, divide

Params = Any
"""A pytree of arrays."""

Forward = Callable[[Params, jax.Array], tuple[jax.Array, Mapping[str, jax.Array]]]
"""``forward(params, images) -> (logits, features)`` with features by name, earliest first."""

Layout = Literal["NHWC", "NCHW"]
"""The order of the axes of a feature map with four."""


class FunctionBackbone(Backbone):
    """A classifier given as a pure function in inference mode.

    ``forward(params, images)`` takes standardised images [B, H, W, 3], for any B, and returns logits
    [B, num_classes] and a dict of features by name, earliest first. A feature is a map
    [B, H_i, W_i, C_i] or [B, C_i, H_i, W_i], or tokens [B, prefix_tokens + H_i^2, C_i] of square
    images. The logits must be computed from the returned arrays themselves, not from what they were
    computed from.

    Args:
      forward: the function. It is static: the same function is compiled once.
      params: its parameters, a pytree of arrays.
      name: what messages and results call the classifier; None is the function's name.
      preprocessing: of its input.
      class_names: one for each class, or None.
      feature_layers: names of the features that T-TAME reads; None is all.
      target_layer: name of the feature that CAM methods read; None is the last one. If the logits
        are computed from a class token, it must be a feature before the last mixing of tokens.
      layout: of features with four axes; None is found from a square input.
      prefix_tokens: number of tokens before those of the patches; None is found, for fewer than
        2 H_i + 1.
      any_size: whether images may have another size than that of `preprocessing`; None is found by
        an abstract evaluation. Features that are tokens need images of one size.
      masking: None is "standardised" if a feature is tokens, and otherwise "pixel".
      class_weights: a function of the parameters, see `Backbone.class_weights`.

    Raises:
      ValueError: the function does not return what is described above, or an argument does not fit
        it; the message says which.
    """

    def __init__(
        self,
        forward: Forward,
        params: Params,
        *,
        name: str | None = None,
        preprocessing: Preprocessing = IMAGENET,
        class_names: Sequence[str] | None = None,
        feature_layers: Sequence[str] | None = None,
        target_layer: str | None = None,
        layout: Layout | None = None,
        prefix_tokens: int | None = None,
        any_size: bool | None = None,
        masking: Masking | None = None,
        class_weights: Callable[[Params], jax.Array] | None = None,
    ):
        name = name or getattr(forward, "__name__", type(forward).__name__)
        self.forward = forward
        self._store(name, params)
        size = preprocessing.image_size
        logits, features = _describe(forward, params, name, (2, size, size, 3))
        names = None if class_names is None else tuple(class_names)
        architecture = Architecture(
            num_classes=logits.shape[1], preprocessing=preprocessing, class_names=names
        )
        super().__init__(name, architecture)
        self.dtype = jnp.result_type(*(feature.dtype for feature in features.values()))
        self.layers = tuple(features)
        self.feature_layers = self._known(feature_layers or self.layers)
        (self.target_layer,) = self._known([target_layer or self.layers[-1]])
        maps, tokens = ([x for x in features.items() if x[1].ndim == n] for n in (4, 3))
        self.layout = _layout(name, maps, layout)
        self.prefix_tokens = _prefix_tokens(name, tokens, prefix_tokens)
        self.masking = masking or ("standardised" if tokens else "pixel")
        if tokens and any_size:
            raise ValueError(f"{name} has features that are tokens, which need any_size=False")
        self.any_size = not tokens and (self._takes_any_size() if any_size is None else any_size)
        for layer, (height, width, _) in zip(self.feature_layers, self.feature_shapes()):
            if height * width == 1:
                raise ValueError(
                    f"feature {layer!r} of {name} has a single position: return an earlier one"
                )
        self._class_weights = class_weights
        if class_weights is not None:
            self._check_class_weights()

    def _store(self, name: str, params: Params) -> None:
        """Stores the leaves as variables of the module, and keys of random numbers as integers."""
        paths, self.treedef = jax.tree.flatten_with_path(params)
        try:
            hash((self.forward, self.treedef))
        except TypeError as error:
            raise ValueError(
                f"{name} cannot be compiled, since its function or the structure of its parameters "
                f"is not hashable ({error}): pass plain dicts, lists and arrays as parameters"
            ) from None
        leaves, keys = [], []
        for i, (path, leaf) in enumerate(paths):
            try:
                value = jnp.asarray(leaf)
            except TypeError:
                raise ValueError(
                    f"the parameters of {name} must be arrays, but params"
                    f"{jax.tree_util.keystr(path)} is a {type(leaf).__name__}"
                ) from None
            if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                keys.append((i, jax.random.key_impl(value)))
                value = jax.random.key_data(value)
            trainable = jnp.issubdtype(value.dtype, jnp.floating)
            leaves.append(nnx.Param(value) if trainable else nnx.Variable(value))
        self.leaves, self.keys = nnx.List(leaves), tuple(keys)

    @property
    def params(self) -> Params:
        """The parameters as `forward` takes them."""
        values = [variable.get_value() for variable in self.leaves]
        for i, implementation in self.keys:
            values[i] = jax.random.wrap_key_data(values[i], impl=implementation)
        return self.treedef.unflatten(values)

    @property
    def class_weights(self) -> jax.Array | None:
        return None if self._class_weights is None else self._class_weights(self.params)

    def _known(self, layers: Iterable[str]) -> tuple[str, ...]:
        for layer in layers:
            if layer not in self.layers:
                raise ValueError(
                    f"{self.name} has no layer {layer!r}; it has {', '.join(self.layers)}"
                )
        return tuple(layers)

    def _forward(self, images):
        logits, features = self.forward(self.params, images)
        maps = (self.feature_map(self._channels_last(features[x])) for x in self.feature_layers)
        return logits.astype(jnp.float32), tuple(maps)

    def layer_outputs(self, images):
        logits, features = self.forward(self.params, images)
        return {layer: features[layer] for layer in self.layers} | {"head": logits}

    def _channels_last(self, feature: jax.Array) -> jax.Array:
        first = feature.ndim == 4 and self.layout == "NCHW"
        return jnp.moveaxis(feature, 1, -1) if first else feature

    def _as_returned(self, feature: jax.Array) -> jax.Array:
        first = feature.ndim == 4 and self.layout == "NCHW"
        return jnp.moveaxis(feature, -1, 1) if first else feature

    def feature_map(self, x: jax.Array) -> jax.Array:
        if x.ndim == 4:
            return x
        patches = x[:, self.prefix_tokens :]
        side = math.isqrt(patches.shape[1])
        return patches.reshape(x.shape[0], side, side, -1)

    def split(
        self, layer: str | None = None
    ) -> tuple[Callable[[jax.Array], State], Callable[..., jax.Array]]:
        """Splits the computation after a feature, see `Backbone.split`.

        The state is the feature with channels last, the other values that are needed after it, and
        an array [B, H, W, 0], which has the size of the images.

        Raises:
          ValueError: there is no such feature, or the logits are not computed from it.
        """
        (layer,) = self._known([layer or self.target_layer])
        size = self.preprocessing.image_size
        self._parts(layer, jnp.float32, size, size)  # raises

        def before(images):
            self.check_size(*images.shape[1:3])
            first, _ = self._parts(layer, images.dtype, *images.shape[1:3])
            params = self.params

            def of_image(image):
                feature, *others = first(params, image[None])
                return self._channels_last(feature)[0], *others

            return *jax.vmap(of_image)(images), images[..., :0]

        def after(state, classes=None):
            *values, size = state
            _, last = self._parts(layer, size.dtype, *size.shape[1:3])
            params = self.params

            def of_image(feature, *others):
                (logits,) = last(params, self._as_returned(feature[None]), *others)
                return logits[0]

            logits = jax.vmap(of_image)(*values).astype(jnp.float32)
            return logits if classes is None else logits[:, classes]

        return before, after

    def _parts(self, layer, dtype, height, width) -> tuple[Callable, Callable]:
        image = jax.ShapeDtypeStruct((1, height, width, 3), dtype)
        try:
            return divide(self.forward, self.params, image, layer)
        except NotOnThePath:
            raise ValueError(
                f"the logits of {self.name} are not computed from its feature {layer!r}: return the "
                "array that the next layer reads, not a copy or a part of it, and none from inside "
                "a loop (jax.lax.scan)"
            ) from None

    def _takes_any_size(self) -> bool:
        size = self.preprocessing.image_size
        image = jax.ShapeDtypeStruct((1, size + 9, size + 4, 3), jnp.float32)
        try:
            logits, _ = jax.eval_shape(self.forward, self.params, image)
        except Exception:  # noqa: BLE001  each library raises its own types
            return False
        return logits.shape == (1, self.num_classes)

    def _check_class_weights(self) -> None:
        shape = jax.eval_shape(lambda: self.class_weights).shape
        wanted = (self.feature_shapes()[-1][-1], self.num_classes)
        if shape != wanted:
            raise ValueError(
                f"class_weights of {self.name} must have the shape {list(wanted)}, not {list(shape)}"
            )


def _describe(forward, params, name: str, shape: tuple[int, ...]):
    """The abstract logits and features of images of a shape, the features in their order."""
    order = []

    def recorded(params, images):
        outputs = forward(params, images)
        if isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[1], Mapping):
            order.extend(outputs[1])  # which JAX sorts
        return outputs

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        outputs = jax.eval_shape(recorded, params, images)
    except Exception as error:  # of the user's function
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{name} cannot be evaluated on images {list(shape)}: {reason}") from error
    if not order:
        raise ValueError(
            f"{name} must return logits and a dict of at least one feature, not "
            f"{' '.join(str(outputs).split())[:300]}"
        )
    logits, features = outputs
    arrays = {"its logits": logits, **{f"feature {key!r}": features[key] for key in order}}
    for what, value in arrays.items():
        if not isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(  # noqa: TRY004  as for all wrong arguments
                f"{name} must return {what} as an array, not a {type(value).__name__}"
            )
    if logits.ndim != 2 or logits.shape[0] != shape[0] or not logits.shape[1]:
        raise ValueError(
            f"{name} must return logits [{shape[0]}, num_classes] of images {list(shape)}, not "
            f"{list(logits.shape)}"
        )
    for key in order:
        found = features[key].shape
        if found[:1] != shape[:1] or len(found) not in (3, 4):
            raise ValueError(
                f"feature {key!r} of {name} has the shape {list(found)}: return one with positions, "
                f"[{shape[0]}, H, W, C], [{shape[0]}, C, H, W] or [{shape[0]}, tokens, C]"
            )
    return logits, {key: features[key] for key in order}


def _layout(name: str, maps, given: Layout | None) -> Layout:
    """The order of the axes of the features with four, which are maps of a square image."""
    if given is not None:
        if given not in get_args(Layout):
            raise ValueError(f"layout must be {' or '.join(get_args(Layout))}, not {given!r}")
        return given
    shapes = [feature.shape[1:] for _, feature in maps]
    square = {"NHWC": all(a == b for a, b, _ in shapes), "NCHW": all(b == c for _, b, c in shapes)}
    found: list[Layout] = [layout for layout in get_args(Layout) if square[layout]]
    if maps and len(found) != 1:
        raise ValueError(
            f"the layout of the features of {name} is not clear from their shapes "
            f"({', '.join(str(list(shape)) for shape in shapes)}): give layout='NHWC' or 'NCHW'"
        )
    return found[0]


def _prefix_tokens(name: str, tokens, given: int | None) -> int:
    """The number of tokens before those of the patches, which are a square number."""
    lengths = {key: feature.shape[1] for key, feature in tokens}
    if given is None:
        found = {n - math.isqrt(n) ** 2 for n in lengths.values()}
        if len(found) > 1:
            raise ValueError(
                f"the features of {name} have {', '.join(map(str, lengths.values()))} tokens: give "
                "prefix_tokens, the number of those that are no patches"
            )
        return found.pop() if found else 0
    for key, length in lengths.items():
        patches = length - given
        if given < 0 or patches < 1 or math.isqrt(patches) ** 2 != patches:
            raise ValueError(
                f"feature {key!r} of {name} has {length} tokens: without prefix_tokens={given} they "
                "are not those of a square"
            )
    return given
