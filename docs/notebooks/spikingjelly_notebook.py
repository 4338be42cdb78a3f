# %% [markdown]
# # A quantized SpikingJelly network, from model to file
#
# Handwritten digits, a convolutional network, 1-bit weights and 2-bit membrane potentials. Run it
# from a clone after `pip install '.[spikingjelly,deploy]' scikit-learn matplotlib`.

# %%
import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from qsnn_ext import WSDRRegularizer, calibrate, deploy, quantize_, summarize

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)  # 1,797 pictures of 8x8 pixels
x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8).repeat(4, 1, 1, 1, 1)
y = torch.tensor(labels)  # x: [T, N, C, H, W]
x_test, y_test = x[:, 1500:], y[1500:]

# %% [markdown]
# ## The model, in floating point

# %%


def spiking(inputs, outputs):
    conv = layer.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return conv, layer.BatchNorm2d(outputs), neuron.LIFNode(detach_reset=True)


model = nn.Sequential(
    *spiking(1, 16), *spiking(16, 32), *spiking(32, 64), layer.Flatten(), layer.Linear(64, 10)
)
functional.set_step_mode(model, "m")

# %% [markdown]
# ## The conversion
#
# In place: every module stays the object it was and only its class changes.

# %%
quantize_(model, "1w-2u", sample=x[:, :16])

# %% [markdown]
# ## Training, with a live curve

# %%
from curves import Curve  # noqa: E402

wsdr = WSDRRegularizer(model, strength=1e-3)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
curve = Curve("loss")
for step in range(300):
    chosen = torch.randint(1500, (16,))
    functional.reset_net(model)
    logits = model(x[:, chosen]).mean(0)
    loss = nn.functional.cross_entropy(logits, y[chosen]) + wsdr()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    curve.add(step, loss.item())
wsdr.close()
curve.show()

# %% [markdown]
# ## What it costs

# %%
model.eval()
summary = summarize(model, x_test[:, :16])
summary  # noqa: B018

# %%
summary.plot("summary.png")

# %% [markdown]
# ## Deployment: an integer program in a file
#
# `calibrate` fixes the membrane scales at values seen on data; from then on a sample's answer does
# not depend on its batch. The file needs NumPy only; the engine in C is faster.

# %%
calibrate(model, [x[:, i : i + 16] for i in range(0, 320, 16)])
program = deploy.save(model, "net.qsnn", x[:, :16])
answers = deploy.load("net.qsnn")(x_test.numpy()).mean(0).argmax(1)
accuracy = float((answers == labels[1500:]).mean())
print(f"accuracy of the integer program: {accuracy:.1%}")
comparison = deploy.compare(model, program, [(x_test[:, :24], y_test[:24])])
print(comparison)

# %%
comparison.plot("comparison.png")

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
# The how-to pages of the documentation: choose bits and layers, calibrate, deploy to C, run on a
# microcontroller.
