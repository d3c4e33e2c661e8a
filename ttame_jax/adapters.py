"""Classifiers of other JAX libraries as backbones.

Each adapter makes a pure function of a model, which returns its logits and the outputs of the named
submodules, and a `FunctionBackbone` of this function. The model is not changed. It runs in inference
mode.
"""

import contextlib
import difflib
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from ttame_jax.backbones import FunctionBackbone

_keras_lock = threading.RLock()
"""Held while layers of Keras are recorded, which changes them. Only traces take it."""

_outputs: ContextVar[dict[Any, Any]] = ContextVar("_outputs")
"""What the recorded submodules have returned in the current call of a model."""


def from_nnx(
    module: Any,
    features: Sequence[str],
    *,
    call_kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
    **options: Any,
) -> FunctionBackbone:
    """A classifier in Flax NNX as a backbone.

    Args:
      module: an `nnx.Module` that maps images [B, H, W, 3] to logits. A copy of it is switched to
        inference by ``eval()``.
      features: paths of submodules, such as "blocks.11", whose outputs are the features, earliest
        first.
      call_kwargs: further keyword arguments of the call.
      name: what messages and results call the classifier; None is the name of its class.
      **options: those of `FunctionBackbone`. Its `params` are the state of the module.

    Raises:
      ValueError: the module has no such submodule; see also `FunctionBackbone`.
    """
    from flax import nnx

    name, kwargs = name or type(module).__name__, dict(call_kwargs or {})
    copy = nnx.merge(*nnx.split(module))
    copy.eval()
    graph, state = nnx.split(copy)

    def submodules(module):
        return {".".join(map(str, path)): one for path, one in nnx.iter_modules(module) if path}

    _check_names(name, features, submodules(copy))

    def forward(state, images):
        merged = nnx.merge(graph, state)
        chosen = {path: one for path, one in submodules(merged).items() if path in features}
        for one in chosen.values():
            one.__class__ = _recording(type(one))
        with _recorded() as outputs:
            logits = merged(images, **kwargs)
        outputs = {path: outputs[id(one)] for path, one in chosen.items() if id(one) in outputs}
        return logits, _chosen(name, features, outputs)

    return FunctionBackbone(forward, state, name=name, **options)


def from_linen(
    module: Any,
    variables: Mapping[str, Any],
    features: Sequence[str],
    *,
    call_kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
    **options: Any,
) -> FunctionBackbone:
    """A classifier in Flax Linen as a backbone.

    Args:
      module: a `flax.linen.Module` that maps images [B, H, W, 3] to logits.
      variables: what ``module.init`` returns, or the trained ones.
      features: paths of submodules, such as "blocks_2/norm", whose outputs are the features,
        earliest first.
      call_kwargs: further keyword arguments of the call, such as ``{"train": False}``.
      name: what messages and results call the classifier; None is the name of its class.
      **options: those of `FunctionBackbone`. Its `params` are the variables.

    Raises:
      ValueError: the module has no such submodule; see also `FunctionBackbone`.
    """
    from flax.traverse_util import flatten_dict

    name, kwargs = name or type(module).__name__, dict(call_kwargs or {})

    def forward(variables, images):
        seen = []

        def wanted(submodule, method):
            seen.append("/".join(submodule.path))
            return method == "__call__" and seen[-1] in features

        logits, state = module.apply(
            variables, images, capture_intermediates=wanted, mutable=["intermediates"], **kwargs
        )
        captured: dict[str, Any] = flatten_dict(state.get("intermediates", {}), sep="/")
        outputs = {path.removesuffix("/__call__"): calls[-1] for path, calls in captured.items()}
        _check_names(name, features, seen)
        return logits, _chosen(name, features, outputs)

    return FunctionBackbone(forward, variables, name=name, **options)


def from_equinox(
    module: Any,
    features: Sequence[str],
    *,
    state: Any = None,
    call_kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
    **options: Any,
) -> FunctionBackbone:
    """A classifier in Equinox as a backbone.

    Args:
      module: an `equinox.Module` that maps one image [3, H, W] to logits [num_classes]. A copy of
        it is switched to inference by ``equinox.nn.inference_mode``.
      features: paths of submodules, such as "blocks.2.norm", whose outputs are the features,
        earliest first.
      state: the `equinox.nn.State` of a module that is called as ``module(image, state)`` and
        returns the logits and a new state.
      call_kwargs: further keyword arguments of the call, such as a ``key``.
      name: what messages and results call the classifier; None is the name of its class.
      **options: those of `FunctionBackbone`. Its `params` are the arrays of the module and of the
        state.

    Raises:
      ValueError: the module has no such submodule; see also `FunctionBackbone`.
      ImportError: Equinox is not installed.
    """
    import equinox as eqx

    name, kwargs = name or type(module).__name__, dict(call_kwargs or {})
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="."): path
        for path in _equinox_paths(module)
    }
    _check_names(name, features, paths)
    module = eqx.nn.inference_mode(module)
    for feature in sorted(features, key=lambda feature: -len(paths[feature])):  # inner ones first
        where = functools.partial(_at, path=paths[feature])
        module = eqx.tree_at(where, module, _recorder()(where(module), feature))
    params, static = eqx.partition((module, state), eqx.is_array)

    def forward(params, images):
        module, state = eqx.combine(params, static)

        def of_image(image):
            with _recorded() as outputs:
                found = module(image, *([] if state is None else [state]), **kwargs)
            logits = found if state is None else found[0]
            return logits, _chosen(name, features, outputs)

        return jax.vmap(of_image)(jnp.moveaxis(images, -1, 1))

    return FunctionBackbone(forward, params, name=name, **options)


def from_keras(
    model: Any, features: Sequence[str], *, name: str | None = None, **options: Any
) -> FunctionBackbone:
    """A classifier in Keras 3 on its JAX backend as a backbone.

    Args:
      model: a `keras.Model` that maps images [B, H, W, 3] to logits, not to probabilities.
      features: names of layers whose outputs are the features, earliest first.
      name: what messages and results call the classifier; None is that of the model.
      **options: those of `FunctionBackbone`. Its `params` are the values of the model's
        ``trainable_variables`` and ``non_trainable_variables``.

    Raises:
      ValueError: Keras runs on another backend, the model has no such layer or ends with a softmax;
        see also `FunctionBackbone`.
      ImportError: Keras is not installed.
    """
    import keras

    name = name or model.name
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Keras runs on {keras.backend.backend()}: set the environment variable "
            "KERAS_BACKEND=jax before Keras is imported"
        )
    *_, last = _keras_layers(model)
    activation = getattr(last, "activation", None)
    if activation is keras.activations.softmax or isinstance(last, keras.layers.Softmax):
        raise ValueError(
            f"{name} ends with a softmax, in its layer {last.name!r}: build it without, such as with "
            "classifier_activation=None"
        )
    layers = {layer.name: layer for layer in _keras_layers(model)}
    _check_names(name, features, layers)
    params = (
        [variable.value for variable in model.trainable_variables],
        [variable.value for variable in model.non_trainable_variables],
    )

    def forward(params, images):
        with contextlib.ExitStack() as stack:
            stack.enter_context(_keras_lock)
            outputs = stack.enter_context(_recorded())
            for feature in features:
                stack.enter_context(_keras_recorded(layers[feature]))
            logits, _ = model.stateless_call(*params, images, training=False)
        return logits, _chosen(name, features, outputs)

    return FunctionBackbone(forward, params, name=name, **options)


def _check_names(model: str, features: Sequence[str], known: Iterable[str]) -> None:
    if isinstance(features, str) or not features:
        raise ValueError(f"features of {model} must be a list of names, not {features!r}")
    known = list(dict.fromkeys(known))
    for feature in features:
        if feature not in known:
            similar = ", ".join(difflib.get_close_matches(feature, known, n=6, cutoff=0))
            raise ValueError(f"{model} has no submodule {feature!r}; similar names are {similar}")


def _chosen(model: str, features: Sequence[str], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded outputs in the order of the features."""
    for feature in features:
        if feature not in outputs:
            raise ValueError(
                f"{model} does not call {feature!r}, or only inside a transformation: choose another"
            )
        if not isinstance(outputs[feature], jax.Array):
            kind = type(outputs[feature]).__name__
            raise ValueError(  # noqa: TRY004  as for all wrong arguments
                f"{feature!r} of {model} returns a {kind}, not an array: choose another"
            )
    return {feature: outputs[feature] for feature in features}


@contextlib.contextmanager
def _recorded() -> Iterator[dict[Any, Any]]:
    """Yields a dict that submodules add their outputs to while the body runs."""
    token = _outputs.set({})
    try:
        yield _outputs.get()
    finally:
        _outputs.reset(token)


@functools.cache  # NNX registers each class
def _recording(kind: type) -> Any:
    """A subclass of an NNX module's class whose calls are recorded by the id of the module."""

    class Recording(kind):
        def __call__(self, *args, **kwargs):
            output = super().__call__(*args, **kwargs)
            _outputs.get()[id(self)] = output
            return output

    return Recording


@functools.cache
def _recorder() -> Any:
    """A class of Equinox modules that call another one and record its output by a name."""
    import equinox as eqx

    class Recorder(eqx.Module):
        module: Any
        name: str = eqx.field(static=True)

        def __call__(self, *args, **kwargs):
            output = self.module(*args, **kwargs)
            _outputs.get()[self.name] = output
            return output

        def __getattr__(self, name):
            if name == "module":  # not yet set
                raise AttributeError(name)
            return getattr(self.module, name)

    return Recorder


def _equinox_paths(module: Any, before: tuple = ()) -> Iterator[tuple]:
    """The paths of all modules inside an Equinox module."""
    import equinox as eqx

    def is_inner(node):
        return isinstance(node, eqx.Module) and node is not module

    for path, node in jax.tree.leaves_with_path(module, is_leaf=is_inner):
        if is_inner(node):
            yield (*before, *path)
            yield from _equinox_paths(node, (*before, *path))


def _at(node: Any, path: tuple) -> Any:
    """The node of a pytree at a path."""
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            node = getattr(node, key.name)
        else:
            node = node[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]
    return node


def _keras_layers(model: Any) -> Iterator[Any]:
    for layer in model.layers:
        yield layer
        if hasattr(layer, "layers"):
            yield from _keras_layers(layer)


@contextlib.contextmanager
def _keras_recorded(layer: Any) -> Iterator[None]:
    """Records the output of a Keras layer by its name while the body runs."""
    call = layer.call

    def recorded(*args, **kwargs):
        output = call(*args, **kwargs)
        _outputs.get()[layer.name] = output
        return output

    layer.call = recorded
    try:
        yield
    finally:
        del layer.call
