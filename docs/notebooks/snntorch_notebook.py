# %% [markdown]
# # A quantized snnTorch network, from model to file
#
# Handwritten digits, the network of tutorial 5, 1-bit weights and 4-bit membrane potentials. Run it
# from a clone after `pip install '.[snntorch,deploy]' scikit-learn matplotlib`.

# %%
import snntorch as snn
import snntorch.functional as SF
import torch
from sklearn.datasets import load_digits
from torch import nn

from qsnn_ext import WSDRRegularizer, calibrate, deploy, quantize_, summarize

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)  # 1,797 pictures of 8x8 pixels
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
x_test, y_test = x[1500:1628], y[1500:1628]

# %% [markdown]
# ## The model, in floating point

# %%


class Net(nn.Module):
    def __init__(self, steps=10, beta=0.9):
        super().__init__()
        self.steps = steps
        self.fc1, self.lif1 = nn.Linear(64, 128), snn.Leaky(beta=beta)
        self.fc2, self.lif2 = nn.Linear(128, 128), snn.Leaky(beta=beta)
        self.fc3, self.lif3 = nn.Linear(128, 10), snn.Leaky(beta=beta)

    def forward(self, x):
        mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        spikes, potentials = [], []
        for _ in range(self.steps):
            spk, mem1 = self.lif1(self.fc1(x), mem1)
            spk, mem2 = self.lif2(self.fc2(spk), mem2)
            spk, mem3 = self.lif3(self.fc3(spk), mem3)
            spikes.append(spk)
            potentials.append(mem3)
        return torch.stack(spikes), torch.stack(potentials)


net = Net()

# %% [markdown]
# ## The conversion
#
# In place: every module stays the object it was and only its class changes.

# %%
quantize_(net, "1w-4u", sample=x[:8])

# %% [markdown]
# ## Training, with a live curve

# %%
from curves import Curve  # noqa: E402

wsdr = WSDRRegularizer(net, strength=1e-3)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
loss_fn = SF.ce_rate_loss()
curve = Curve("loss")
for step in range(150):
    chosen = torch.randint(1500, (32,))
    spikes, _ = net(x[chosen])
    loss = loss_fn(spikes, y[chosen]) + wsdr()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    curve.add(step, loss.item())
wsdr.close()
curve.show()

# %% [markdown]
# ## What it costs

# %%
net.eval()
summary = summarize(net, x_test[:32])
summary  # noqa: B018

# %%
summary.plot("summary.png")

# %% [markdown]
# ## Deployment: an integer program in a file

# %%
calibrate(net, [x[i : i + 32] for i in range(0, 320, 32)])
program = deploy.save(net, "net.qsnn", x[:32])
deployed = deploy.load("net.qsnn")  # needs NumPy only
spikes, potentials = deployed(x_test.numpy())  # [T, N, 10] each, as the model answers
accuracy = float((spikes.sum(0).argmax(1) == y_test.numpy()).mean())
print(f"accuracy of the integer program: {accuracy:.1%}")
comparison = deploy.compare(net, program, [(x_test, y_test)])
print(comparison)

# %%
comparison.plot("comparison.png")

# %% [markdown]
# ## One frame at a time

# %%
session = deployed.session(batch=1)
codes = deployed.codes(x_test[:1].numpy())
counts = sum(session.step(codes)[0].reshape(-1) for _ in range(10))
print(counts, "is a", counts.argmax())

# %% [markdown]
# ## In the browser
#
# The same runtime, compiled to WebAssembly, reads what you draw. The page is built by
# `python docs/demo/build.py` into one file that works offline.

# %%
from curves import show_page  # noqa: E402

show_page("demo/index.html")

# %% [markdown]
# ## What next
#
# Population coding and regression are on snnTorch's start page, everything else in the how-to pages
# of the documentation.
