"""Types of command-line arguments."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes

from ttame_jax.config import (
    Common,
    Data,
    Logging,
    LossConfig,
    Model,
    Optimization,
    TrainConfig,
    Validation,
)

Part = TypeVar("Part", Common, Data, Validation, Model, Optimization, Logging)


def listed(kind: Callable[[str], Any], metavar: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """Reads several values, separated by commas or spaces, as a tuple."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: tuple(map(kind, " ".join(words).replace(",", " ").split())),
        is_instance=lambda values: isinstance(values, tuple),
        str_from_instance=lambda values: [",".join(map(str, values))],
    )


Names = Annotated[tuple[str, ...], listed(str, "NAME,...")]


def in_groups(default: TrainConfig) -> Any:
    """The type of a `TrainConfig` argument whose flags are listed in groups.

    Args:
      default: the default of every field.
    """

    def part(kind: type[Part]) -> Part:
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: getattr(default, name) for name in names})

    usual = part(Common), part(Data), part(Validation), part(Model), part(Optimization)
    of_common, of_data, of_validation, of_model, of_optimization = usual
    of_logging = part(Logging)

    def config(
        common: OmitArgPrefixes[Common] = of_common,
        data: OmitArgPrefixes[Data] = of_data,
        validation: OmitArgPrefixes[Validation] = of_validation,
        model: OmitArgPrefixes[Model] = of_model,
        optimization: OmitArgPrefixes[Optimization] = of_optimization,
        loss: LossConfig = default.loss,
        logging: OmitArgPrefixes[Logging] = of_logging,
    ) -> TrainConfig:
        parts = (common, data, validation, model, optimization, logging)
        return TrainConfig(loss=loss, **{k: v for one in parts for k, v in vars(one).items()})

    return Annotated[TrainConfig, tyro.conf.arg(name="", constructor=config)]
