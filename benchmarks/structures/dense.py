"""One answer per pixel: U-Nets, several scales at once, an autoencoder."""

from __future__ import annotations

import math

import snntorch as snn
import torch
from snntorch import surrogate as snn_surrogate
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from benchmarks.structures import Built, structure


def conv_bn_lif(i: int, o: int, k: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, neuron."""
    return nn.Sequential(
        layer.Conv2d(i, o, k, stride, k // 2, bias=False),
        layer.BatchNorm2d(o),
        neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True),
    )


class DoubleConv(nn.Module):
    """Twice convolution, batch norm, neuron."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(conv_bn_lif(i, o), conv_bn_lif(o, o))

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]``."""
        return self.double_conv(x)


class Up(nn.Module):
    """Enlarge, put the skip connection beside it, convolve."""

    def __init__(self, i: int, o: int, bilinear: bool) -> None:
        super().__init__()
        self.bilinear = bilinear
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(i + o, o)
        else:
            self.up = layer.ConvTranspose2d(i, o, kernel_size=2, stride=2)
            self.up_lif = neuron.LIFNode(tau=2.0, detach_reset=True)
            self.conv = DoubleConv(2 * o, o)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Low resolution and skip, both ``[T, N, C, H, W]``."""
        if self.bilinear:
            x1 = functional.seq_to_ann_forward(x1, self.up)
        else:
            x1 = self.up_lif(self.up(x1))
        return self.conv(torch.cat([x2, x1], dim=2))


class UNet(nn.Module):
    """Events ``[T, N, 2, H, W]`` to a mask ``[N, classes, H, W]``, averaged over time."""

    def __init__(self, width: int, classes: int, bilinear: bool) -> None:
        super().__init__()
        self.inc = DoubleConv(2, width)
        self.down1 = nn.Sequential(layer.MaxPool2d(2), DoubleConv(width, 2 * width))
        self.down2 = nn.Sequential(layer.MaxPool2d(2), DoubleConv(2 * width, 4 * width))
        self.up1 = Up(4 * width, 2 * width, bilinear)
        self.up2 = Up(2 * width, width, bilinear)
        self.outc = layer.Conv2d(width, classes, kernel_size=1)
        functional.set_step_mode(self, "m")
        if bilinear:
            functional.set_step_mode(nn.ModuleList([self.up1.up, self.up2.up]), "s")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 2, H, W]`` to ``[N, classes, H, W]``."""
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return self.outc(x).mean(0)


@structure("U-Net, transposed", "spiking U-Net with transposed convolutions as decoder")
def unet_transposed(small: bool = True) -> Built:
    return Built(UNet(8 if small else 64, 3, False), (torch.rand(2, 2, 2, 16, 16) < 0.3).float())


@structure("U-Net, bilinear", "spiking U-Net with bilinear upsampling as decoder")
def unet_bilinear(small: bool = True) -> Built:
    return Built(UNet(8 if small else 64, 3, True), (torch.rand(2, 2, 2, 16, 16) < 0.3).float())


# --------------------------------------------------------------------------- StereoSpike


class UpsampleConv(nn.Module):
    """Nearest neighbors to a given size, then a convolution."""

    def __init__(self, i: int, o: int, k: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.UpsamplingNearest2d(size=(size[0] + k - 1, size[1] + k - 1)),
            nn.Conv2d(i, o, k, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` to ``[N, o, H, W]``."""
        return self.up(x)


class SEWResBlock(nn.Module):
    """Two convolutions; the residual adds spikes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), Gain(), if_node()
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), Gain(), if_node()
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]``."""
        return self.conv2(self.conv1(x)) + x


class Gain(nn.Module):
    """A trained factor, the only normalization there is."""

    def __init__(self, start: float = 5.0) -> None:
        super().__init__()
        self.scale_value = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * self.scale_value


def if_node() -> neuron.IFNode:
    """The spiking neuron."""
    return neuron.IFNode(v_threshold=1.0, v_reset=0.0, surrogate_function=surrogate.ATan())


class StereoSpike(nn.Module):
    """Depth at three scales, accumulated in neurons that never fire and read through ``.v``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        size = 16
        self.bottom = nn.Sequential(
            nn.Conv2d(4, width, 5, padding=2, bias=False), Gain(), if_node()
        )
        self.conv1 = nn.Sequential(
            nn.Conv2d(width, 2 * width, 5, stride=2, padding=2, bias=False), Gain(), if_node()
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(2 * width, 4 * width, 5, stride=2, padding=2, bias=False), Gain(), if_node()
        )
        self.bottleneck = SEWResBlock(4 * width)
        self.deconv2 = nn.Sequential(
            UpsampleConv(4 * width, 2 * width, 5, (size // 2, size // 2)), Gain(), if_node()
        )
        self.deconv1 = nn.Sequential(
            UpsampleConv(2 * width, width, 5, (size, size)), Gain(), if_node()
        )
        self.predict_depth3 = nn.Sequential(UpsampleConv(4 * width, 1, 3, (size, size)), Gain())
        self.predict_depth2 = nn.Sequential(UpsampleConv(2 * width, 1, 3, (size, size)), Gain())
        self.predict_depth1 = nn.Sequential(UpsampleConv(width, 1, 3, (size, size)), Gain())
        self.Ineurons = neuron.IFNode(
            v_threshold=float("inf"), v_reset=0.0, surrogate_function=surrogate.ATan()
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[N, T, 4, H, W]`` to depths ``[N, 1, H, W]``, finest first."""
        depths: list[Tensor] = []
        for t in range(x.shape[1]):
            out_bottom = self.bottom(x[:, t])
            out_conv1 = self.conv1(out_bottom)
            out_conv2 = self.conv2(out_conv1)
            out_rconv = self.bottleneck(out_conv2)
            depths = []
            self.Ineurons(self.predict_depth3(out_rconv))
            depths.append(self.Ineurons.v)
            out_add2 = self.deconv2(out_rconv) + out_conv1
            self.Ineurons(self.predict_depth2(out_add2))
            depths.append(self.Ineurons.v)
            out_add1 = self.deconv1(out_add2) + out_bottom
            self.Ineurons(self.predict_depth1(out_add1))
            depths.append(self.Ineurons.v)
        return depths[::-1]


@structure("StereoSpike", "StereoSpike: heads at all scales into one neuron that never fires")
def stereospike(small: bool = True) -> Built:
    return Built(StereoSpike(4 if small else 32), (torch.rand(2, 2, 4, 16, 16) < 0.3).float())


class Hourglass(nn.Module):
    """One read-out per scale, multi-step, membrane potentials of the last step as answers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enc1 = conv_bn_lif(2, width, stride=2)
        self.enc2 = conv_bn_lif(width, 2 * width, stride=2)
        self.dec = nn.Sequential(
            layer.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
            layer.BatchNorm2d(width),
            neuron.ParametricLIFNode(init_tau=2.0, detach_reset=True),
        )
        self.flow_low = layer.Conv2d(2 * width, 2, 1)
        self.flow_high = layer.Conv2d(width, 2, 1)
        self.read_low = neuron.IFNode(v_threshold=math.inf, v_reset=0.0)
        self.read_high = neuron.IFNode(v_threshold=math.inf, v_reset=0.0)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``[T, N, 2, H, W]`` to ``[N, 2, H/4, W/4]`` and ``[N, 2, H/2, W/2]``."""
        fine = self.enc1(x)
        coarse = self.enc2(fine)
        self.read_low(self.flow_low(coarse))
        self.read_high(self.flow_high(self.dec(coarse) + fine))
        return {"low": self.read_low.v, "high": self.read_high.v}


@structure("optical flow", "flow networks: a read-out with infinite threshold per scale, dict")
def optical_flow(small: bool = True) -> Built:
    return Built(Hourglass(8 if small else 64), (torch.rand(3, 2, 2, 16, 16) < 0.3).float())


# --------------------------------------------------------------------------- autoencoder


class SAE(nn.Module):
    """Convolutions down to a latent vector and up again, a loop around two Sequentials."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        grad = snn_surrogate.atan(alpha=2.0)

        def leaky(threshold: float = 1.0, output: bool = False) -> snn.Leaky:
            return snn.Leaky(
                beta=0.5, spike_grad=grad, init_hidden=True, threshold=threshold, output=output
            )

        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, stride=2),
            nn.BatchNorm2d(width),
            leaky(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.BatchNorm2d(2 * width),
            leaky(),
            nn.Flatten(1, -1),
            nn.Linear(2 * width * 16, latent),
            leaky(output=True),
        )
        self.linear_net = nn.Sequential(nn.Linear(latent, 2 * width * 16), leaky())
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (2 * width, 4, 4)),
            nn.ConvTranspose2d(2 * width, width, 3, padding=1, stride=2, output_padding=1),
            nn.BatchNorm2d(width),
            leaky(),
            nn.ConvTranspose2d(width, 1, 3, padding=1, stride=2, output_padding=1),
            leaky(threshold=20000.0, output=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 16, 16]`` to ``[N, 1, 16, 16]``, the last membrane potential."""
        utils.reset(self.encoder)
        utils.reset(self.linear_net)
        utils.reset(self.decoder)
        mems = []
        for _ in range(3):
            spk, _ = self.encoder(x)
            _, mem = self.decoder(self.linear_net(spk))
            mems.append(mem)
        return torch.stack(mems, dim=1)[:, -1]


@structure("autoencoder", "snnTorch's spiking autoencoder: transposed convolutions, huge threshold")
def autoencoder(small: bool = True) -> Built:
    return Built(SAE(8 if small else 32, 16 if small else 32), torch.rand(2, 1, 16, 16))
