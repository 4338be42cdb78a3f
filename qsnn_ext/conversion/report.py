"""What became of each module of a model, and how much of the model is quantized."""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from torch import nn

from qsnn_ext import text
from qsnn_ext.conversion.config import QuantConfig
from qsnn_ext.wrapping import unwrap

#: - ``converted``: its class or its quantizer changed;
#: - ``unchanged``: it already was what the configuration asks for;
#: - ``kept``: left alone on purpose (a rule, a read-out, 32 bits, a constant);
#: - ``unsupported``: left in floating point because nothing here can quantize it;
#: - ``nothing``: it holds nothing to quantize.
Action = Literal["converted", "unchanged", "kept", "unsupported", "nothing"]

#: Where a model keeps the report of its last conversion.
REPORT_ATTRIBUTE = "_qsnn_report"

_HEADER = ("module", "type", "became", "weights", "membrane", "why")


@dataclass(frozen=True)
class ModuleReport:
    """What became of one module.

    Attributes:
        name: dotted name; empty for the model itself.
        type: its class before.
        became: its class now.
        action: see :data:`Action`.
        reason: why, in words; for what stays in floating point, with the remedy.
        weight_bits: bits of its weights now; ``None`` without weights or in floating point.
        membrane_bits: bits of its membrane potential now, likewise.
        aliases: further names of the same module.
        neuron: whether it is a neuron, or probably one.
        parameters: values of its own parameters, without its children's and those met before.
        weights: how many of them are matrices: what a quantizer quantizes, or would.
        operations: multiplications and additions of its weights on the sample; ``None`` without.
        states: values it carries between time steps on the sample; ``None`` without.
    """

    name: str
    type: str
    became: str
    action: Action
    reason: str
    weight_bits: int | None = None
    membrane_bits: int | None = None
    aliases: tuple[str, ...] = ()
    neuron: bool = False
    parameters: int = 0
    weights: int = 0
    operations: int | None = None
    states: int | None = None


@dataclass(frozen=True)
class Shares:
    """How many of some things have how many bits; 32 stands for floating point."""

    by_bits: dict[int, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_bits.values())

    def share(self, bits: int) -> float:
        """Those of one width, 0 to 1; 0 where there are none at all."""
        return self.by_bits.get(bits, 0) / self.total if self.total else 0.0

    def __str__(self) -> str:
        """``96.2 % 1 bit, 3.1 % 8 bits, 0.7 % float of 12.6 M``."""
        parts = [f"{100 * self.share(bits):.1f} % {_width(bits)}" for bits in sorted(self.by_bits)]
        return f"{', '.join(parts)} of {text.count(self.total)}"


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`~qsnn_ext.quantize_` did; ``str()`` of it is a table.

    Attributes:
        config: the configuration that was applied.
        modules: every module of the model in definition order.
        firsts: names of the first weighted layers: those that see the input, not spikes.
        lasts: names of the last weighted layers: those whose output no other weights see.
        ends_by: how these were found.
        unseen: weighted layers that did not run on the sample.
        warnings: what a user should know before training.
    """

    config: QuantConfig
    modules: tuple[ModuleReport, ...]
    firsts: tuple[str, ...]
    lasts: tuple[str, ...]
    ends_by: str
    unseen: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def first(self) -> str | None:
        """The first of :attr:`firsts` in running order, ``None`` without weighted layers."""
        return self.firsts[0] if self.firsts else None

    @property
    def last(self) -> str | None:
        """The last of :attr:`lasts` in running order, ``None`` without weighted layers."""
        return self.lasts[-1] if self.lasts else None

    @property
    def changed(self) -> bool:
        """Whether anything was converted; ``False`` on a second run."""
        return bool(self.of("converted"))

    def of(self, *actions: Action) -> tuple[ModuleReport, ...]:
        """The modules with one of these actions."""
        return tuple(row for row in self.modules if row.action in actions)

    def __getitem__(self, name: str) -> ModuleReport:
        """The row of one module.

        Raises:
            KeyError: no module of that name.
        """
        rows = {alias: row for row in self.modules for alias in row.aliases}
        return {**rows, **{row.name: row for row in self.modules}}[name]

    # ----------------------------------------------------------------- totals

    @property
    def parameters(self) -> Shares:
        """All parameters by their bits."""
        counts: Counter[int] = Counter()
        for row in self.modules:
            counts[row.weight_bits or 32] += row.weights
            counts[32] += row.parameters - row.weights
        return Shares(_positive(counts))

    @property
    def operations(self) -> Shares | None:
        """Operations of weights on the sample by the weights' bits; ``None`` without a sample."""
        return self._shares("operations", "weight_bits")

    @property
    def states(self) -> Shares | None:
        """Values carried between time steps on the sample by their bits; ``None`` without one."""
        return self._shares("states", "membrane_bits")

    def _shares(self, what: str, bits: str) -> Shares | None:
        counts: Counter[int] = Counter()
        seen = False
        for row in self.modules:
            number = getattr(row, what)
            if number is not None:
                seen = True
                counts[getattr(row, bits) or 32] += number
        return Shares(_positive(counts)) if seen else None

    @property
    def floating(self) -> tuple[tuple[str, int, str], ...]:
        """What stays in floating point, largest first: name and type, values, reason and remedy."""
        rows = [
            (f"{row.name or '(model)'} ({row.type})", row.weights, f"{row.action}: {row.reason}")
            for row in self.modules
            if row.weights and row.weight_bits is None
        ]
        vectors = sum(row.parameters - row.weights for row in self.modules)
        if vectors:
            rows.append(("biases, batch norms and other vectors", vectors, "they are no weights"))
        rows += [
            (
                f"{row.name or '(model)'} ({row.type})",
                row.states or 0,
                f"{row.action}: {row.reason}",
            )
            for row in self.modules
            if row.neuron and row.membrane_bits is None
        ]
        return tuple(sorted(rows, key=lambda row: -row[1]))

    # ----------------------------------------------------------------- in words

    def rows(self, everything: bool = False) -> list[tuple[str, ...]]:
        """Cells of the table, see :meth:`table`."""
        return [
            (
                row.name or "(model)",
                row.type,
                row.became if row.became != row.type else "",
                "" if row.weight_bits is None else str(row.weight_bits),
                "" if row.membrane_bits is None else str(row.membrane_bits),
                f"{row.action}: {row.reason}",
            )
            for row in self.modules
            if everything or (row.action, row.reason) != ("nothing", "container")
        ]

    def table(self, everything: bool = False) -> str:
        """A table of the modules.

        Args:
            everything: with containers, which hold nothing but other modules.
        """
        return "\n".join(text.table(_HEADER, self.rows(everything)))

    def summary(self) -> list[str]:
        """Totals, what stays in floating point, warnings, and how first and last were found."""
        counts = Counter(row.action for row in self.modules)
        line = ", ".join(f"{n} {action}" for action, n in sorted(counts.items()))
        lines = [line + ("" if self.changed else "; nothing was changed")]
        for title, shares in (
            ("parameters", self.parameters),
            ("synaptic operations", self.operations),
            ("carried state", self.states),
        ):
            if shares is not None and shares.total:
                lines.append(f"{title}: {shares}")
        floating = self.floating
        if floating:
            lines.append("in floating point, largest first:")
            lines += _alike(floating)
        lines += [f"warning: {text.printable(warning, most=1000)}" for warning in self.warnings]
        ends = "no weighted layer"
        if self.firsts or self.lasts:
            ends = (
                f"first weighted layer {', '.join(self.firsts) or 'none'}, "
                f"last {', '.join(self.lasts) or 'none'}, by {self.ends_by}"
            )
        if self.unseen:
            ends += f"; did not run on the sample: {', '.join(self.unseen)}"
        return [*lines, text.printable(ends, most=10000)]

    def __str__(self) -> str:
        """The table, and :meth:`summary` under it."""
        return "\n".join([self.table(), "", *self.summary()])

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        lines = "".join(
            f"<li>{html.escape(text.printable(line, most=2000))}</li>" for line in self.summary()
        )
        return f"{text.html_table(_HEADER, self.rows())}<ul>{lines}</ul>"

    def __rich__(self) -> Any:
        """The same for ``rich.print``."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        shown = Table(*_HEADER)
        for row in self.rows():
            shown.add_row(*[Text(text.printable(cell, most=1000)) for cell in row])
        return Group(shown, *map(Text, self.summary()))

    # ----------------------------------------------------------------- as data

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "config": self.config.to_dict(),
            "firsts": list(self.firsts),
            "lasts": list(self.lasts),
            "ends_by": self.ends_by,
            "unseen": list(self.unseen),
            "warnings": list(self.warnings),
            "modules": [asdict(row) for row in self.modules],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConversionReport:
        """The inverse of :meth:`to_dict`; also of what earlier versions wrote."""
        known = {f.name for f in fields(ModuleReport)}
        modules = tuple(
            ModuleReport(
                **{
                    **{k: v for k, v in row.items() if k in known},
                    "aliases": tuple(row["aliases"]),
                }
            )
            for row in data["modules"]
        )

        def ends(many: str, one: str) -> tuple[str, ...]:
            return tuple(data[many] if many in data else [n for n in [data[one]] if n is not None])

        return cls(
            config=QuantConfig.from_dict(data["config"]),
            modules=modules,
            firsts=ends("firsts", "first"),
            lasts=ends("lasts", "last"),
            ends_by=data["ends_by"],
            unseen=tuple(data["unseen"]),
            warnings=tuple(data.get("warnings", ())),
        )


#: Lines of what stays in floating point that are printed.
_SHOWN = 10


def _alike(floating: tuple[tuple[str, int, str], ...]) -> list[str]:
    """What stays in floating point, in one line all of a type that do so for one reason."""
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, number, why in floating:
        # How each was seen to be a neuron is in the table.
        key = name.rpartition(" (")[2], re.sub(r"(probably a neuron): it .*?;", r"\1;", why)
        groups.setdefault(key, []).append((name, number))
    lines = []
    largest = sorted(groups.items(), key=lambda group: -sum(n for _, n in group[1]))
    for (_, why), rows in largest[:_SHOWN]:
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        total = text.count(sum(number for _, number in rows))
        name = text.printable(rows[0][0])
        lines.append(f"  {name}{more}: {total}; {text.printable(why, most=1000)}")
    if len(groups) > _SHOWN:
        lines.append(f"  and {len(groups) - _SHOWN} more (report.floating)")
    return lines


def _positive(counts: Counter[int]) -> dict[int, int]:
    return {bits: number for bits, number in sorted(counts.items()) if number}


def _width(bits: int) -> str:
    return "float" if bits == 32 else "1 bit" if bits == 1 else f"{bits} bits"


def conversion_report(model: nn.Module) -> ConversionReport | None:
    """The report of the last conversion of ``model``, ``None`` if it never was converted."""
    report: ConversionReport | None = unwrap(model).__dict__.get(REPORT_ATTRIBUTE)
    return report
