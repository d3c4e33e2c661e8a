"""What a program compiled for TPUs says about itself: estimated cycles and collectives."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
UNKNOWN = str(2**63 - 1)
"""The estimate of an operation that the compiler has no model for, as of SparseCores."""
MOVES = ("copy", "reshape", "transpose", "slice", "concatenate", "copy-start", "copy-done")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}  # others have 4


@dataclass(frozen=True)
class Instruction:
    """One line of a compiled program in text form."""

    line: str

    @cached_property
    def parts(self) -> tuple[str, str]:
        """(the type of the result, the operation)."""
        found = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\(", self.line)
        return (found[1], found[2]) if found else ("", "")

    @property
    def operation(self) -> str:
        return self.parts[1]

    @property
    def result_bytes(self) -> int:
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", self.parts[0]))
        return sum(
            BYTES.get(dtype, 4) * prod(map(int, filter(None, sizes.split(","))))
            for dtype, sizes in shapes
        )

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one execution; 0 if it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return 0 if found is None or found[1] == UNKNOWN else int(found[1])

    @property
    def is_unknown(self) -> bool:
        """Whether the compiler says that it cannot estimate the cycles."""
        return f'"estimated_cycles":"{UNKNOWN}"' in self.line

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        return re.findall(r"(?:body|calls|to_apply)=%?([\w.-]+)", self.line)


class Program:
    """A compiled program, from its text (`jax.stages.Compiled.as_text`)."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif re.match(r"\s+(ROOT )?%?[\w.-]+ = ", line):
                current.append(Instruction(line))

    def executed(
        self, name: str | None = None, times: int = 1
    ) -> Iterator[tuple[Instruction, int]]:
        """Every instruction outside fusions, and how often the program executes it."""
        for instruction in self.computations.get(name or self.entry, []):
            yield instruction, times
            if instruction.operation != "fusion":
                for called in instruction.called:
                    yield from self.executed(called, times * self.turns(instruction))

    def turns(self, instruction: Instruction) -> int:
        """How often an instruction runs the computations that it calls: a loop several times.

        Loops count up from 0 to the only integer constant in their condition.

        Raises:
          ValueError: a loop is not of this kind.
        """
        if instruction.operation != "while":
            return 1
        condition = re.search(r"condition=%?([\w.-]+)", instruction.line)
        lines = [x.line for x in self.computations[condition[1]]] if condition else []
        limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(lines))
        if len(limits) != 1:
            raise ValueError(f"cannot tell how often a loop runs: {instruction.line.strip()[:200]}")
        return int(limits[0])

    def kind(self, instruction: Instruction) -> str:
        """What an instruction's cycles are spent on.

        A fusion that has a matrix product or convolution in it is one, whatever else it computes.
        """
        inside = [x.operation for name in instruction.called for x in self.computations[name]]
        if "convolution" in (instruction.operation, *inside):
            return "matrix_products"
        if instruction.operation in MOVES:
            return "copies"
        if re.search(r'op_name="[^"]*(attention_weights|softmax)', instruction.line):
            return "softmax"
        return "rest"

    @property
    def cycles(self) -> dict[str, int]:
        """Estimated cycles of one execution, by kind."""
        total = Counter(dict.fromkeys(("matrix_products", "copies", "softmax", "rest"), 0))
        for instruction, times in self.executed():
            if instruction.cycles:
                total[self.kind(instruction)] += times * instruction.cycles
        return dict(total)

    @property
    def unknown(self) -> int:
        """Number of operations in one execution whose cycles the compiler cannot estimate."""
        return sum(times for instruction, times in self.executed() if instruction.is_unknown)

    @property
    def collectives(self) -> dict[str, dict[str, int]]:
        """Number of collective operations of each kind in one execution, and their bytes."""
        found: dict[str, dict[str, int]] = {}
        for instruction, times in self.executed():
            name = instruction.operation.removesuffix("-start")
            if name in COLLECTIVES:
                total = found.setdefault(name, {"count": 0, "bytes": 0})
                total["count"] += times
                total["bytes"] += times * instruction.result_bytes
        return found
