"""Does the installed engine give the reference's integers? Needs Python and NumPy.

python .ci/check_engine.py ROOT

Run where the package is installed and built for another processor; ROOT is the repository, for its
networks and its random programs.
"""

import platform
import sys
from pathlib import Path

import numpy as np

import qsnn_ext
from qsnn_ext import deploy
from qsnn_ext.deploy.engine import EngineSession
from qsnn_ext.deploy.reference import ReferenceSession

RANDOM, STEPS, BATCH = 12, 3, 2


def main(root: Path) -> None:
    """Raise ``SystemExit`` with what is wrong."""
    if root in Path(qsnn_ext.__file__).parents:
        raise SystemExit(f"{qsnn_ext.__file__} is the repository's, not the installed one")
    backends = deploy.backends()
    if backends == ["numpy"]:
        raise SystemExit("there is no engine, or it does not load")
    sys.path.append(str(root))
    from tests.deploy.random_programs import random_input, random_program

    cases = [(f"random {seed}", random_program(seed)) for seed in range(RANDOM)]
    for path in sorted((root / "recipes" / "results" / "devices").glob("*.qsnn")):
        cases.append((path.name, deploy.load(path).program))
    for name, program in cases:
        codes = random_input(program, np.random.default_rng(0), BATCH, STEPS)
        for backend in backends[:-1]:
            engine, reference = (
                EngineSession(program, BATCH, backend),
                ReferenceSession(program, BATCH),
            )
            for t in range(STEPS):
                pairs = zip(engine.step(codes[:, t]), reference.step(codes[:, t]), strict=True)
                if not all(np.array_equal(a, b) for a, b in pairs):
                    raise SystemExit(f"{name}, {backend}: other integers at step {t}")
    print(f"{platform.machine()}: {len(cases)} programs, {backends[:-1]}: the same integers")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
