"""What ``snn.Leaky``'s resets do today, in numbers worked out by hand.

snnTorch is reworking its resets in the open. ``QLeaky``, the kernels, the lowering and the
documentation of delayed resets all rest on these numbers: where one changes, this test fails
before a network does so in silence, and says what to look at.
"""

import pytest
import torch

snn = pytest.importorskip("snntorch")

#: (mechanism, delay): potentials returned at beta 0.5, threshold 1, current 0.75, and the steps in
#: which it fires. All are exact in binary.
TODAY = {
    # Fires above 1 at the second step; the third subtracts the threshold.
    ("subtract", True): ([0.75, 1.125, 0.3125, 0.90625, 1.203125, 0.3515625], [1, 4]),
    # The third begins at zero.
    ("zero", True): ([0.75, 1.125, 0.75, 1.125, 0.75, 1.125], [1, 3, 5]),
    ("none", True): ([0.75, 1.125, 1.3125, 1.40625, 1.453125, 1.4765625], [1, 2, 3, 4, 5]),
    # The potential returned has been reset already.
    ("subtract", False): ([0.75, 0.125, 0.8125, 0.15625, 0.828125, 0.1640625], [1, 3, 5]),
    ("zero", False): ([0.75, 0.0, 0.75, 0.0, 0.75, 0.0], [1, 3, 5]),
    ("none", False): ([0.75, 1.125, 1.3125, 1.40625, 1.453125, 1.4765625], [1, 2, 3, 4, 5]),
}

CHANGED = (
    "snnTorch's {} reset with reset_delay={} is not what it was in 1.0.0. Look at "
    "qsnn_ext/snntorch.py (describe, the delayed reset), qsnn_ext/kernels, "
    "qsnn_ext/deploy/lowering/neurons.py and docs/explanation/neuron.md before this is changed."
)


@pytest.mark.parametrize(("mechanism", "delay"), TODAY)
@pytest.mark.parametrize("by_hand", [True, False])
def test_resets(mechanism, delay, by_hand):
    potentials, fired = TODAY[mechanism, delay]
    options = {"reset_mechanism": mechanism, "reset_delay": delay}
    lif = snn.Leaky(
        beta=0.5, **options, **({} if by_hand else {"init_hidden": True, "output": True})
    )
    mem = lif.init_leaky() if by_hand else lif.reset_mem()
    found, spikes = [], []
    for step in range(len(potentials)):
        x = torch.tensor([0.75])
        spk, mem = lif(x, mem) if by_hand else lif(x)
        found.append(mem.item())
        spikes += [step] * int(spk.item())
    assert (found, spikes) == (potentials, fired), CHANGED.format(mechanism, delay)


def test_fires_strictly_above_the_threshold():
    lif = snn.Leaky(beta=0.5)
    spk, _ = lif(torch.tensor([1.0]), lif.init_leaky())
    assert spk.item() == 0, "snnTorch fires at its threshold now; qsnn_ext/snntorch.py says above"
