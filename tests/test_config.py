"""The configuration: shorthands, round trips, errors that help."""

import dataclasses
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsnn_ext import BinaryWeight, IntWeight, MembraneConfig, QuantConfig, Rule, WeightConfig
from qsnn_ext.errors import ConfigError, InputTypeError
from qsnn_ext.quantizers import MembraneQuantizer
from qsnn_ext.spikingjelly import QuantLIFNode

WEIGHTS = st.builds(
    WeightConfig,
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 32]),
    standardize=st.sampled_from([None, "layer", "channel", "none"]),
    scale=st.sampled_from([None, "mean", "power_of_two", "none"]),
    gradient=st.sampled_from([None, "clipped", "identity", "annealed"]),
    temperature=st.floats(1e-6, 1e6),
)
MEMBRANES = st.builds(
    MembraneConfig,
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 32]),
    scale=st.sampled_from([None, "max", "absmax"]),
    squash=st.sampled_from([None, "tanh", "none"]),
    mode=st.sampled_from(["dynamic", "frozen"]),
    momentum=st.floats(1e-6, 1.0),
    sync_scale=st.booleans(),
    order=st.sampled_from(["fire_first", "quantize_first"]),
)
#: What file formats treat in a way of their own, and any other character: hypothesis would need ten
#: seconds to list those of a category.
SPECIAL = " !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~0aNé\u00a0\u2028\ufeff\U0001f600"
OTHERS = st.integers(0xA0, 0x10FFFF).map(chr).filter(lambda c: unicodedata.category(c) != "Cs")
RULES = st.builds(
    Rule,
    name=st.text(st.sampled_from(SPECIAL) | OTHERS, min_size=1),
    weight=WEIGHTS | st.just("keep"),
    membrane=st.none() | MEMBRANES | st.just("keep"),
)
CONFIGS = st.builds(
    QuantConfig,
    weight=WEIGHTS,
    membrane=MEMBRANES,
    preset=st.sampled_from(["paper", "official"]),
    first=st.none() | WEIGHTS,
    last=st.none() | WEIGHTS,
    readouts=st.sampled_from(["keep", "quantize"]),
    rules=st.lists(RULES, max_size=3, unique_by=lambda rule: rule.selector).map(tuple),
)


@given(config=CONFIGS)
def test_dictionaries_and_files_hold_a_configuration_exactly(config, tmp_path_factory):
    assert QuantConfig.from_dict(config.to_dict()) == config
    folder = tmp_path_factory.mktemp("config")
    for suffix in ("toml", "yaml", "yml"):
        path = folder / f"c.{suffix}"
        config.to_file(path)
        assert QuantConfig.from_file(path) == config
        assert QuantConfig.parse(str(path)) == QuantConfig.parse(path) == config


def test_shorthand_says_weight_and_membrane_bits():
    config = QuantConfig.parse("1w-4u")
    assert (config.weight.bits, config.membrane.bits, config.preset) == (1, 4, "paper")
    assert config.end("first").bits == config.end("last").bits == 8
    assert QuantConfig.parse("8w-32u").membrane.bits == 32


def test_float_weights_keep_float_ends():
    assert QuantConfig.parse("32w-2u").end("first").bits == 32
    assert QuantConfig(weight=32, first=8).end("first").bits == 8


def test_preset_name_is_a_configuration():
    assert QuantConfig.parse("official") == QuantConfig(preset="official")
    assert QuantConfig.parse({"bits": "1w-8u"}) == QuantConfig.from_bits("1w-8u")


def test_options_at_preset_come_from_the_preset_and_others_stay():
    own = WeightConfig(standardize="none")
    assert own.build("official").options() == {
        "standardize": None, "scale": "power_of_two", "gradient": "annealed", "temperature": 0.1,
    }  # fmt: skip
    membrane = MembraneConfig(bits=4, squash="none", mode="frozen", momentum=0.5)
    options = membrane.build("official").options()
    assert (options["squash"], options["scale"]) == (None, "absmax")
    assert (options["bits"], options["mode"], options["momentum"]) == (4, "frozen", 0.5)


def test_bits_choose_the_kind_of_quantizer():
    assert isinstance(WeightConfig(1).build("paper"), BinaryWeight)
    assert isinstance(WeightConfig(4).build("paper"), IntWeight)
    assert WeightConfig(32).build("paper") is None
    assert MembraneConfig(32).build("paper") is None


def test_one_word_for_none_everywhere():
    """Left out is the preset's; ``"none"`` is none, in configurations, quantizers and neurons."""
    for word in (None, "none"):
        assert BinaryWeight(standardize=word, scale=word).options()["standardize"] is None
        assert MembraneQuantizer(squash=word).squash is None
    assert WeightConfig(standardize="none").build("official").standardize is None
    assert WeightConfig().build("official").standardize == "channel"
    assert MembraneConfig(squash="none").build("official").squash is None
    assert QuantLIFNode(preset="official", squash="none").membrane.squash is None
    assert QuantLIFNode(preset="official").membrane.squash == "tanh"


def test_files_of_older_versions_say_preset():
    old = {"weight": {"bits": 1, "standardize": "preset", "scale": "none", "gradient": "preset"}}
    config = QuantConfig.from_dict({**old, "membrane": {"bits": 4, "squash": "preset"}})
    assert config == QuantConfig(WeightConfig(1, scale="none"), MembraneConfig(4))


def test_a_quantizer_is_chosen_by_name():
    assert isinstance(WeightConfig(1, quantizer="binary").build("paper"), BinaryWeight)
    assert isinstance(WeightConfig(2, quantizer="integer").build("paper"), IntWeight)
    with pytest.raises(ConfigError, match="binary', 'integer"):
        WeightConfig(2, quantizer="octal")
    with pytest.raises(ConfigError, match="has 1 bits, not 2"):
        WeightConfig(2, quantizer="binary")


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().preset = "official"


def test_a_module_class_is_stored_by_its_name():
    rule = Rule(type=nn.Conv2d, weight=8)
    assert rule.type == "torch.nn.modules.conv.Conv2d"
    for selector in ("Conv2d", "torch.nn.modules.conv.Conv2d", nn.Conv2d):
        assert Rule(type=selector, weight=8).matches("a", nn.Conv2d(1, 1, 1))
        assert not Rule(type=selector, weight=8).matches("a", nn.Linear(1, 1))


def test_globs_cross_dots_and_heed_case():
    layer = nn.Linear(1, 1)
    assert Rule(name="body.*", weight=8).matches("body.0.fc", layer)
    assert not Rule(name="body.*", weight=8).matches("Body.0.fc", layer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("1w2u", "did you mean '1w-2u'"),
        ("papr", "did you mean 'paper'"),
        ("9w-2u", "weight bits=9"),
        ("1w-1u", "membrane bits=1"),
        ({"wieght": 1}, "did you mean 'weight'"),
        ({"weight": {"bitz": 1}}, "did you mean 'bits'"),
        ({"weight": {"bits": 9}}, "choose 1 to 8"),
        ({"weight": {"bits": 8, "standardize": "all"}}, "standardize='all'"),
        ({"weight": True}, "bits=True"),
        ({"weight": "keep"}, "weight='keep'"),
        ({"membrane": {"bits": 32, "scale": "mean"}}, "scale='mean'"),
        ({"membrane": {"order": "later"}}, "order='later'"),
        ({"membrane": {"momentum": 2}}, "momentum"),
        ({"membrane": {"sync_scale": "yes"}}, "sync_scale"),
        ({"first": [8]}, "bits, a table"),
        ({"preset": "mine"}, "preset='mine'"),
        ({"readouts": "drop"}, "readouts='drop'"),
        ({"schema": 99}, "schema 99"),
        ({"bits": "1w-2u", "weight": 1}, "not both"),
        ({"rules": {"name": "x"}}, "list of rules"),
        ({"rules": [{"weight": 8}]}, "either name="),
        ({"rules": [{"name": "a", "type": "B", "weight": 8}]}, "either name="),
        ({"rules": [{"name": "a"}]}, "does nothing"),
        ({"rules": [{"name": "", "weight": 8}]}, "non-empty"),
        ({"rules": [{"name": "a", "weight": 8}, {"name": "a", "weight": 1}]}, "two rules"),
    ],
)
def test_wrong_configurations_say_what_is_wrong(config, message):
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        QuantConfig.parse(config)


def test_other_objects_are_no_configuration():
    with pytest.raises(InputTypeError, match="got int"):
        QuantConfig.parse(3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "weight = ", "is not TOML"),
        ("c.yaml", "weight: [", "is not YAML"),
        ("c.yaml", "!!python/object/apply:os.getcwd []", "is not YAML"),
        ("c.yaml", "- 1", "must be a table"),
        ("c.json", "{}", "must end in .toml"),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        QuantConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        QuantConfig.parse(str(tmp_path / "nowhere.toml"))
