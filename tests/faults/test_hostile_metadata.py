"""Promise: what a file says of the form of its answer can neither fill the memory nor end in a bare
error; it contradicts neither program nor input in silence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qsnn_ext.deploy import DeployedModel
from qsnn_ext.deploy.fileformat import dump_program, parse_program
from qsnn_ext.errors import FormatError
from tests.deploy.random_programs import random_program

MALFORMED = [
    {"input_rank": "1"}, {"input_rank": "2"}, {"input_rank": "0"}, {"input_rank": ""},
    {"input_rank": "3,3"}, {"output_ranks": "3"}, {"output_ranks": "3,4,3"}, {"answer": "["},
    {"answer": "[" * 100_000}, {"answer": "{}"}, {"answer": '{"steps": 3, "form": 0}'},
    {"answer": '{"steps": [[], []], "form": {"named": ["x y", {"a": 0}]}}'},
    {"answer": '{"steps": [[], []], "form": {"named": ["T", {"\\ufb01": 0, "fi": 1}]}}'},
    {"answer": '{"steps": [[["exec"]], []], "form": 0}'}, {"input_gain": "nan"},
    {"input_gain": "1,2,3,4,5,6,7,8,9,10"}, {"input_bias": "x"}, {"views": "[]"}, {"views": "{"},
    {"views": '{"nobody": [[1, 1]]}'},
]  # fmt: skip


@pytest.mark.parametrize("metadata", MALFORMED, ids=lambda m: next(iter(m.items()))[1][:30])
def test_malformed(metadata):
    program = random_program(16)
    assert min(program.values[0].shape[1:]) > 1
    assert len(program.outputs) == 2
    program.metadata = metadata
    with pytest.raises(FormatError):
        program.validate()
    with pytest.raises(FormatError):
        DeployedModel(program)


@pytest.mark.parametrize("loops", [[[10**9, 1]], [[2, 10**9]], [[2, -1]], [[0, 1]], [[1.0, 1]], 3])
def test_views_stay_within_their_neuron(loops):
    program = random_program(16)
    program.metadata = {"views": json.dumps({program.neurons[0].name: loops})}
    with pytest.raises(FormatError, match="views"):
        program.validate()


STEPS = [
    ["take", [0] * 65536], ["scale", [[1.0]] * 5_000], ["shift", [1.0] * 65536], ["scale", "x"],
    ["shape", 0, [10**30]], ["shape", 0, [-1, -1]], ["index", [["a"]]],
    ["index", ["new"] * 100], ["permute", [0]], ["sum", 99, False], ["softmax", "0"], ["softmax"],
    ["argmax", 10**30, True], ["flatten", None, 0], ["last", 10**30], ["mean", {}, None],
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{s[0]} {str(s[1:])[:20]}")
def test_steps_that_do_not_fit(step):
    program = random_program(16)
    program.timesteps = 2
    answer = {"steps": [[step], []], "form": {"tuple": [0, 1]}}
    program.metadata = {"answer": json.dumps(answer)}
    net = DeployedModel(parse_program(dump_program(program)))
    with pytest.raises(FormatError, match="does not fit its answer"):
        net(np.ones((1, *net.input_shape), np.int64))
