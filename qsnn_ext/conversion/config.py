"""What a model is quantized to: a frozen, typed configuration that can be written to a file.

A :class:`QuantConfig` gives the quantizers of all layers, those of the first and the last weighted
layer, and an ordered list of :class:`Rule` exceptions of which the first that matches a module
wins. It says nothing about a particular model; :func:`qsnn_ext.quantize_` applies it to one.

Options are named as in :mod:`qsnn_ext.quantizers`; what is left out is the preset's.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import nn

from qsnn_ext import functional as F
from qsnn_ext.errors import ConfigError, InputTypeError, MissingDependencyError
from qsnn_ext.files import write_atomically
from qsnn_ext.quantizers import (
    MEMBRANE_BITS,
    PRESETS,
    WEIGHT_BITS,
    MembraneQuantizer,
    Quantizer,
    check_bits,
    membrane_quantizer,
    parse_bits,
    preset,
    weight_quantizer,
)

#: Version of the dictionaries and files; raised whenever an older reader would misread them.
SCHEMA = 1

Keep = Literal["keep"]


_FORMATS = {".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}


def nearest(word: str, known: list[str]) -> str:
    """`` Did you mean 'x'?``, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _check_keys(data: dict[Any, Any], known: list[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ConfigError(
                f"{key!r} is not an option of {where}; the options are {', '.join(known)}."
                f"{nearest(str(key), known)}"
            )


def _part(value: Any, kind: Any) -> Any:
    """An option block as given: ready, as a table, as a number of bits, ``"keep"`` or ``None``."""
    if value is None or value == "keep" or isinstance(value, kind):
        return value
    if isinstance(value, dict):
        return kind.from_dict(value)
    if isinstance(value, int):
        return kind(bits=value)
    raise ConfigError(f"{kind.label} must be bits, a table or 'keep', got {value!r}.")


def _words(target: Any, *names: str) -> dict[str, str]:
    """The options among these that are given, so not left to the preset."""
    for name in names:
        value = getattr(target, name)
        if value == "preset":  # what files of older versions say of an option left out
            _store(target, **{name: None})
        elif value is not None and not isinstance(value, str):
            raise ConfigError(f"{name}={value!r} must be a name; write 'none' for none.")
    return {name: value for name in names if (value := getattr(target, name)) is not None}


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}={value!r} must be a number.")
    return float(value)


def _store(target: Any, **values: Any) -> None:
    """Normalise fields of a frozen dataclass while it is being made."""
    for name, value in values.items():
        object.__setattr__(target, name, value)


def _format(path: Path) -> str:
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise ConfigError(
            f"{str(path)!r} must end in .toml, .yaml or .yml to say what it is."
        ) from None


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"this file format needs {name}; install it with: pip install 'qsnn_ext[deploy]'."
        ) from error


#: Characters in a configuration file, and in one line of it. Readers of TOML and YAML take time
#: and memory that grow with the square of a line.
_LONGEST, _WIDEST = 1_000_000, 10_000


def _yaml(text: str) -> Any:
    """Plain values of a YAML document.

    Raises:
        ConfigError: not YAML, with tags, nested endlessly, or with aliases, by which few lines can
            say endlessly much.
    """
    yaml = _library("yaml")
    depth = 0
    try:
        for token in yaml.scan(text):
            depth += isinstance(token, (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken))
            if isinstance(token, yaml.AliasToken) or depth > 1000:
                raise ConfigError(
                    "it has aliases (*name) or endless lists; write out what is meant."
                )
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"it is not YAML: {error}.") from error


class _Table:
    """Dataclass to and from a plain dictionary, refusing keys it does not know."""

    label: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """All options as plain data; those that are ``None`` are absent."""
        return {
            f.name: value.to_dict() if isinstance(value, _Table) else value
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, f.name)) is not None
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: not a dictionary, an unknown key, or a value that cannot be used.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{cls.label} must be a table of options, got {data!r}.")
        _check_keys(data, [f.name for f in dataclasses.fields(cls)], cls.label)  # type: ignore[arg-type]
        return cls(**data)


@dataclass(frozen=True)
class WeightConfig(_Table):
    """How the weights of a layer are quantized.

    Args:
        bits: 1 (:class:`~qsnn_ext.BinaryWeight`), 2 to 8 (:class:`~qsnn_ext.IntWeight`), or 32 to
            leave them in floating point. The options below are those of 1 bit.
        standardize: ``"layer"``, ``"channel"`` or ``"none"``; left out, the preset's.
        scale: ``"mean"``, ``"power_of_two"`` or ``"none"``; left out, the preset's.
        gradient: ``"clipped"``, ``"identity"`` or ``"annealed"``; left out, the preset's.
        temperature: start of the annealed gradient's temperature.
        quantizer: a name in :data:`qsnn_ext.quantizers.WEIGHTS`; left out, what bits say.

    Raises:
        ConfigError: bits out of range, an unknown option, or a quantizer without that width.
    """

    label: ClassVar[str] = "the weight configuration"

    bits: int = 1
    standardize: Literal["layer", "channel", "none"] | None = None
    scale: Literal["mean", "power_of_two", "none"] | None = None
    gradient: Literal["clipped", "identity", "annealed"] | None = None
    temperature: float = 0.1
    quantizer: str | None = None

    def __post_init__(self) -> None:
        _store(self, bits=check_bits(self.bits, WEIGHT_BITS, "weight") or 32)
        _store(self, temperature=_number(self.temperature, "temperature"))
        # An option that cannot be used is an error now, not at conversion.
        weight_quantizer(1, **self._binary())
        self.build("paper")

    def build(self, preset_name: str) -> Quantizer | None:
        """A new quantizer with these options, ``None`` for 32 bits.

        Args:
            preset_name: where the options that are left out come from.
        """
        options = self._binary() if self.bits == 1 else {}
        return weight_quantizer(self.bits, preset_name, self.quantizer, **options)

    def _binary(self) -> dict[str, Any]:
        """The options of 1 bit."""
        given = _words(self, "standardize", "scale", "gradient")
        return {**given, "temperature": self.temperature}


@dataclass(frozen=True)
class MembraneConfig(_Table):
    """How the membrane potential of a neuron is quantized.

    Args:
        bits: 2 to 8, or 32 to leave it in floating point.
        scale: ``"max"`` or ``"absmax"``; left out, the preset's.
        squash: ``"tanh"`` or ``"none"``; left out, the preset's.
        mode: ``"dynamic"`` or ``"frozen"``, see :class:`~qsnn_ext.MembraneQuantizer`, or
            ``"learned"``, see :class:`~qsnn_ext.LearnedMembraneQuantizer`.
        momentum: of the running mean of frozen mode.
        sync_scale: all-reduce the scale over the processes of ``torch.distributed``.
        order: ``"fire_first"`` (Eq. 12) or ``"quantize_first"`` (Algorithm 1).

    Raises:
        ConfigError: bits out of range or an unknown option.
    """

    label: ClassVar[str] = "the membrane configuration"

    bits: int = 2
    scale: F.MembraneScale | None = None
    squash: F.Squash | Literal["none"] | None = None
    mode: Literal["dynamic", "frozen", "learned"] = "dynamic"
    momentum: float = 0.1
    sync_scale: bool = False
    order: F.StepOrder = "fire_first"

    def __post_init__(self) -> None:
        _store(self, bits=check_bits(self.bits, MEMBRANE_BITS, "membrane") or 32)
        _store(self, momentum=_number(self.momentum, "momentum"))
        if not isinstance(self.sync_scale, bool):
            raise ConfigError(f"sync_scale={self.sync_scale!r} must be true or false.")
        if not isinstance(self.mode, str):
            raise ConfigError(f"mode={self.mode!r} must be 'dynamic', 'frozen' or 'learned'.")
        F.check_order(self.order)
        self._quantizer(2, "paper")  # an option that cannot be used is an error now

    def build(self, preset_name: str) -> MembraneQuantizer | None:
        """A new quantizer with these options, ``None`` for 32 bits.

        Args:
            preset_name: where the options that are left out come from.
        """
        return self._quantizer(self.bits, preset_name)

    def _quantizer(self, bits: int, preset_name: str) -> MembraneQuantizer | None:
        return membrane_quantizer(
            bits,
            preset_name,
            **_words(self, "scale", "squash"),
            mode=self.mode,
            momentum=self.momentum,
            sync_scale=self.sync_scale,
        )


@dataclass(frozen=True)
class Rule(_Table):
    """An exception: modules it matches, and what becomes of them.

    Give exactly one of ``name`` and ``type``. What is neither given nor kept follows the rest of
    the configuration, so ``Rule(name="stem.*", weight=WeightConfig(bits=8))`` leaves the membrane
    potentials in ``stem`` as everywhere else.

    Args:
        name: glob over the dotted module names (``*`` crosses dots, upper and lower case differ).
        type: a module class, or its name with or without its module; subclasses match too.
        weight: for matched layers with weights; a number is short for that many bits, ``"keep"``
            leaves them alone.
        membrane: for matched neurons, likewise.

    Raises:
        ConfigError: no selector or two, or no action.
    """

    label: ClassVar[str] = "a rule"

    name: str | None = None
    type: str | None = None
    weight: WeightConfig | Keep | None = None
    membrane: MembraneConfig | Keep | None = None

    def __post_init__(self) -> None:
        given: Any = self.type
        if isinstance(given, type) and issubclass(given, nn.Module):
            _store(self, type=f"{given.__module__}.{given.__qualname__}")
        if (self.name is None) == (self.type is None):
            raise ConfigError("a rule needs either name= (a glob) or type= (a module class).")
        for selector in (self.name, self.type):
            if selector is not None and not (isinstance(selector, str) and selector):
                raise ConfigError(
                    f"a rule's selector must be a non-empty string, got {selector!r}."
                )
        _store(self, weight=_part(self.weight, WeightConfig))
        _store(self, membrane=_part(self.membrane, MembraneConfig))
        if self.weight is None and self.membrane is None:
            raise ConfigError(
                f"the rule for {self.selector} does nothing; give it weight= or membrane=, "
                "each a configuration or 'keep'."
            )

    @classmethod
    def keep(cls, name: str | None = None, type: Any = None) -> Rule:
        """The rule that leaves whatever it matches alone."""
        return cls(name=name, type=type, weight="keep", membrane="keep")

    @property
    def selector(self) -> str:
        """``'stem.*'`` or ``type LIFNode``, for messages."""
        return repr(self.name) if self.name is not None else f"type {self.type}"

    def matches(self, name: str, module: nn.Module) -> bool:
        """Whether the rule is about this module, known by this dotted name."""
        if self.name is not None:
            return fnmatch.fnmatchcase(name, self.name)
        return any(
            self.type in (c.__name__, c.__qualname__, f"{c.__module__}.{c.__qualname__}")
            for c in module.__class__.__mro__
        )


@dataclass(frozen=True)
class QuantConfig(_Table):
    """What every module of a model is quantized to.

    Args:
        weight: hidden layers' weights; a number is short for that many bits.
        membrane: all neurons' membrane potentials; a number is short for that many bits.
        preset: ``"paper"`` or ``"official"``: where options come from that are
            left out.
        first: the first weighted layer; ``None`` means 8 bits as in the paper, or floating point
            when ``weight`` is that too.
        last: the last weighted layer, likewise.
        readouts: ``"keep"`` leaves neurons that never fire or reset (read-outs) in floating point,
            ``"quantize"`` treats them as all others.
        rules: exceptions; the first that matches a module wins, over ``first`` and ``last`` too.

    Raises:
        ConfigError: a value that cannot be used, or two rules with the same selector.
    """

    label: ClassVar[str] = "the configuration"

    weight: WeightConfig = WeightConfig()
    membrane: MembraneConfig = MembraneConfig()
    preset: str = "paper"
    first: WeightConfig | None = None
    last: WeightConfig | None = None
    readouts: Literal["keep", "quantize"] = "keep"
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        preset(self.preset)
        for name, kind in _PARTS.items():
            _store(self, **{name: _part(getattr(self, name), kind)})
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name in ("first", "last")):
                raise ConfigError(f"{name}={value!r} must be bits or options; 32 keeps the floats.")
        if self.readouts not in ("keep", "quantize"):
            raise ConfigError(f"readouts={self.readouts!r} is unknown; 'keep' or 'quantize'.")
        if not isinstance(self.rules, (list, tuple)):
            raise ConfigError(f"rules must be a list of rules, got {self.rules!r}.")
        rules = tuple(r if isinstance(r, Rule) else Rule.from_dict(r) for r in self.rules)
        _store(self, rules=rules)
        selectors = [rule.selector for rule in rules]
        for selector in selectors:
            if selectors.count(selector) > 1:
                raise ConfigError(
                    f"two rules are for {selector} and only the first could ever apply; "
                    "merge them into one."
                )

    @classmethod
    def from_bits(cls, shorthand: str, preset: str = "paper") -> QuantConfig:
        """``"1w-2u"``: weight bits and membrane bits, everything else as by default.

        Raises:
            ConfigError: not of that form, bits out of range, or an unknown preset.
        """
        weight, membrane = parse_bits(shorthand)
        return cls(WeightConfig(weight or 32), MembraneConfig(membrane or 32), preset)

    def end(self, which: Literal["first", "last"]) -> WeightConfig:
        """What the first or the last weighted layer gets."""
        given = self.first if which == "first" else self.last
        if given is not None:
            return given
        return WeightConfig(bits=32 if self.weight.bits == 32 else 8)

    def rule_for(self, names: tuple[str, ...], module: nn.Module) -> Rule | None:
        """The first rule that matches the module under any of its names."""
        return next((r for r in self.rules if any(r.matches(n, module) for n in names)), None)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data with its schema version; see :meth:`from_dict`."""
        data = {"schema": SCHEMA, **super().to_dict()}
        data["rules"] = [rule.to_dict() for rule in self.rules]
        if not self.rules:
            del data["rules"]
        return data

    @classmethod
    def from_dict(cls, data: Any) -> QuantConfig:
        """The inverse of :meth:`to_dict`, exactly. Missing keys take their defaults.

        Besides tables, ``weight``, ``membrane``, ``first`` and ``last`` may be plain numbers of
        bits, and ``bits = "1w-2u"`` may stand for the first two.

        Raises:
            ConfigError: unknown keys (the nearest known ones are named), values that cannot be
                used, or a schema this version does not know.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"a configuration must be a table of options, got {data!r}.")
        data = dict(data)
        schema = data.pop("schema", SCHEMA)
        if schema != SCHEMA:
            raise ConfigError(
                f"the configuration has schema {schema!r} and this version of qsnn_ext reads "
                f"schema {SCHEMA}; upgrade qsnn_ext, or write the configuration anew."
            )
        if "bits" in data:
            if "weight" in data or "membrane" in data:
                raise ConfigError("give either bits = '1w-2u' or weight and membrane, not both.")
            weight, membrane = parse_bits(data.pop("bits"))
            data |= {"weight": weight or 32, "membrane": membrane or 32}
        return super().from_dict(data)

    def to_file(self, path: str | Path) -> None:
        """Write a ``.toml``, ``.yaml`` or ``.yml`` file that :meth:`from_file` reads back exactly.

        Raises:
            ConfigError: another suffix, or the file cannot be written.
            MissingDependencyError: the library for that format is not installed.
        """
        path = Path(path)
        if _format(path) == "toml":
            text = _library("tomli_w").dumps(self.to_dict())
        else:
            text = _library("yaml").safe_dump(self.to_dict(), sort_keys=False)
        write_atomically(path, lambda file: file.write(text.encode()), ConfigError)

    @classmethod
    def from_file(cls, path: str | Path) -> QuantConfig:
        """Read a ``.toml``, ``.yaml`` or ``.yml`` file.

        Raises:
            ConfigError: no such file, another suffix, not of its format, or :meth:`from_dict`.
            MissingDependencyError: YAML, and pyyaml is not installed.
        """
        path = Path(path)
        form = _format(path)
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(_LONGEST + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {str(path)!r}: {error}.") from error
        if len(text) > _LONGEST or max(map(len, text.splitlines()), default=0) > _WIDEST:
            raise ConfigError(f"{str(path)!r} is longer than any configuration; check its name.")
        try:
            data = tomllib.loads(text) if form == "toml" else _yaml(text)
            return cls.from_dict(data)
        except (ValueError, RecursionError) as error:  # ours are ValueErrors as well
            kind = "" if isinstance(error, ConfigError) else f" is not {form.upper()}"
            raise ConfigError(f"{str(path)!r}{kind}: {error!s:.2000}") from error

    @classmethod
    def parse(cls, config: Any) -> QuantConfig:
        """Whatever :func:`qsnn_ext.quantize_` takes: see there.

        Raises:
            ConfigError: a string that is no shorthand, preset or file, or a wrong value in it.
            InputTypeError: not one of the accepted kinds.
        """
        if isinstance(config, QuantConfig):
            return config
        if isinstance(config, dict):
            return cls.from_dict(config)
        if isinstance(config, Path):
            return cls.from_file(config)
        if not isinstance(config, str):
            raise InputTypeError(
                "a configuration is a QuantConfig, a dict, a shorthand such as '1w-2u', a preset "
                f"name or a file, got {type(config).__name__}."
            )
        if config in PRESETS:
            return cls(preset=config)
        if Path(config).suffix.lower() in _FORMATS:
            return cls.from_file(config)
        try:
            return cls.from_bits(config)
        except ConfigError as error:
            known = [*PRESETS, "1w-2u", "1w-4u", "1w-8u", "8w-32u"]
            raise ConfigError(
                f"configuration {config!r} is neither a preset ({', '.join(PRESETS)}) nor a "
                f".toml or .yaml file, and as a shorthand: {error}{nearest(config, known)}"
            ) from error


_PARTS: dict[str, Any] = {
    "weight": WeightConfig,
    "membrane": MembraneConfig,
    "first": WeightConfig,
    "last": WeightConfig,
}
