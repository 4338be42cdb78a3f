"""Promise: every error raised on purpose, in the package and the recipes, derives from
``QSNNError``, so that one ``except`` catches them all, and says more than a word.

The sources are searched for ``raise``. What may be raised besides is listed here with the reason.
"""

import ast
import builtins
import inspect
from pathlib import Path

import pytest

from qsnn_ext import errors

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "qsnn_ext").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
OURS = {n for n, c in vars(errors).items() if inspect.isclass(c)}

#: (file, exception): why it is not one of ours.
ALLOWED = {
    ("qsnn_ext/__init__.py", "AttributeError"): "what a module's __getattr__ has to raise",
    ("qsnn_ext/deploy/__init__.py", "AttributeError"): "what a module's __getattr__ has to raise",
    ("qsnn_ext/deploy/lowering/functions.py", "InputArithmeticError"): "caught by lower's attempt",
    ("qsnn_ext/deploy/lowering/tracing.py", "ModelFailedError"): "caught by lower, which names it",
    ("qsnn_ext/kernels/_native.py", "AttributeError"): "caught: library() warns of it",
    ("qsnn_ext/kernels/_native.py", "MemoryError"): "what Python and NumPy raise without memory",
    ("qsnn_ext/quantizers.py", "NotImplementedError"): "a method that subclasses must write",
    ("recipes/engine/cli.py", "SystemExit"): "the exit status of a command, after the message",
    ("recipes/engine/files.py", "OSError"): "torch's word for a full disk, named by the caller",
}


def raises(tree):
    """Every ``raise X(...)``, ``raise X`` with its function, and no bare ``raise``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield node


def name_of(node):
    """What is raised: a class, a call of one, or a call of a function that makes one."""
    exception = node.func if isinstance(node, ast.Call) else node
    if isinstance(exception, ast.Attribute):
        return exception.attr
    return exception.id if isinstance(exception, ast.Name) else ast.unparse(exception)


def is_exception(name):
    found = getattr(builtins, name, None)
    return inspect.isclass(found) and issubclass(found, BaseException)


def makers():
    """Functions of the sources whose return annotation is one of our errors."""
    return {
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.returns is not None
        and ast.unparse(node.returns).strip("\"'") in OURS
    }


def test_only_our_own_are_raised():
    foreign, used, ours = [], set(), OURS | makers()
    for path in SOURCES:
        where = path.relative_to(ROOT).as_posix()
        for node in raises(ast.parse(path.read_text())):
            name = name_of(node.exc)
            if name in ours or (name == "error" and not is_exception(name)):
                continue  # `error`: a variable that holds the type or the one just caught
            if (where, name) in ALLOWED:
                used.add((where, name))
                continue
            foreign.append(f"{where}:{node.lineno}: raise {ast.unparse(node.exc)[:60]}")
    assert not foreign, "raise one of qsnn_ext.errors, or list it with its reason:\n" + "\n".join(
        foreign
    )
    present = {key for key in ALLOWED if (ROOT / key[0]).exists()}
    assert used == present, f"no longer raised: {present - used}"


def test_asserts_are_for_programmers():
    """An ``assert`` vanishes under -O, so none of them may be the check of what a user gave."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Assert) and node.msg is not None), (
                f"{path}:{node.lineno}: a check with a message for somebody is an error of ours"
            )


def test_messages_are_sentences():
    """A thing at fault and a remedy do not fit in a word or two."""
    for path in SOURCES:
        for node in raises(ast.parse(path.read_text())):
            if not isinstance(node.exc, ast.Call) or name_of(node.exc) not in OURS:
                continue
            assert node.exc.args, f"{path}:{node.lineno}: no message"
            parts = [
                n.value
                for n in ast.walk(node.exc.args[0])
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ]
            words = " ".join(parts).split()
            passed_on = any(isinstance(n, ast.Name) and "error" in n.id
                            for n in ast.walk(node.exc.args[0]))  # fmt: skip
            if isinstance(node.exc.args[0], ast.JoinedStr | ast.Constant) and not passed_on:
                assert len(words) >= 3, f"{path}:{node.lineno}: {words} says too little"


@pytest.mark.parametrize("name", sorted(OURS))
def test_one_base_class(name):
    kind = getattr(errors, name)
    assert issubclass(kind, errors.QSNNError)
    assert str(kind("a message")) == "a message"
    assert kind.__doc__
    import pickle

    again = pickle.loads(pickle.dumps(kind("from a worker")))  # as data loading workers do
    assert type(again) is kind
    assert str(again) == "from a worker"
