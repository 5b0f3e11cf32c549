"""The models of notebook 02: each block against a slow, obvious reference."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

import my_utils as utils

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def models():
    return utils.models_of("02_intermediate_blocks")


def images(channels: int, side: int = 8, count: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, side, side, dtype=torch.float64)


def conv(layer, x):
    """The layer's convolution of one image [C, H, W], by torch's own function and its kernel shape."""
    kernel = layer.bank.reshape(layer.bank.shape[0], layer.in_channels, layer.k, layer.k)
    return F.conv2d(x[None], kernel, layer.bias, padding=(layer.k - 1) // 2)[0]


def expert_weights(gate, x):
    """softmax(W2 relu(W1 m + b1) + b2) for one image."""
    m = torch.stack([channel.mean() for channel in x])
    hidden = (gate.reduce.weight @ m + gate.reduce.bias).clamp(min=0)
    z = gate.expand.weight @ hidden + gate.expand.bias
    return z.exp() / z.exp().sum()


def normalised(norm, y, channels=slice(None)):
    """BatchNorm in evaluation mode, for one image and some of its channels."""
    mean, var = norm.running_mean[channels], norm.running_var[channels]
    scale, shift = norm.weight[channels], norm.bias[channels]
    column = (slice(None), None, None)
    return (y - mean[column]) / (var[column] + norm.eps).sqrt() * scale[column] + shift[column]


def disturb(model):
    """Random statistics, scales and gate weights, so that nothing is tested at a value that hides it."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
        for name, value in model.named_buffers():
            if value.is_floating_point():
                value.copy_(0.5 + torch.rand_like(value) if "var" in name else torch.randn_like(value))
    return model.double().eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("side", "num_experts"), [(16, 4), (16, 3), (8, 4)])
def test_kernels_and_outputs_mix_alike(models, bias, side, num_experts):
    experts, x = disturb(models.MixedExperts(3, 5, num_experts, bias=bias)), images(3, side)
    a = torch.randn(3, num_experts, dtype=torch.float64)
    mixed = lambda row, image: sum(w * conv(c, image) for w, c in zip(row, experts.convs, strict=True))  # noqa: E731
    by_hand = torch.stack([mixed(row, image) for row, image in zip(a, x, strict=True)])
    for way in (experts, experts.mix_kernels, experts.mix_outputs):
        torch.testing.assert_close(way(x, a), by_hand)


def s0_block(block, image):
    a = block.gate.linear.weight @ image.mean((1, 2)) + block.gate.linear.bias
    width, total = block.norm.num_features // 4, 0
    for k, path in enumerate(block.paths.convs):
        mine = slice(k * width, (k + 1) * width)
        y = normalised(block.norm, conv(path, image), mine).clamp(min=0)
        hidden = slice(k * (width // 8), (k + 1) * (width // 8))
        squeezed = block.se.reduce.weight[hidden, :, 0, 0] @ y.mean((1, 2)) + block.se.reduce.bias[hidden]
        scale = (block.se.expand.weight[mine, :, 0, 0] @ squeezed.clamp(min=0) + block.se.expand.bias[mine]).sigmoid()
        total = total + a[k] * scale[:, None, None] * y
    return normalised(block.skip[1], conv(block.skip[0], image)) + total


def s1_block(block, image):
    a = expert_weights(block.gate, image)
    y = block.pool(sum(w * conv(c, image) for w, c in zip(a, block.experts.convs, strict=True))[None])[0]
    return normalised(block.norm, y).clamp(min=0)


def s3_block(block, image):
    total, y = conv(block.skip.layer, image) / block.skip.scale, image
    for weight, (layer, _, norm) in zip(expert_weights(block.gate, image), block.steps, strict=True):
        y = normalised(norm, conv(layer, y).clamp(min=0))
        total = total + weight * y
    return block.pool(total.clamp(min=0)[None])[0]


def s4_block(block, image):
    a, convs = expert_weights(block.gate, image), block.experts.layer.convs
    mixed = sum(w * conv(c, image) for w, c in zip(a, convs, strict=True)) / block.experts.scale
    return block.pool(mixed[None])[0].clamp(min=0)


BLOCKS = [("S0Block", (8, 16), s0_block), ("S1Block", (8, 6, True), s1_block), ("S3Block", (3, 8, 6, True), s3_block)]
BLOCKS += [("S4Block", (8, 6, True), s4_block), ("S4Block", (8, 6, True, 3, 4), s4_block)]


@pytest.mark.parametrize(("name", "arguments", "reference"), BLOCKS)
def test_block_equals_its_slow_reference(models, name, arguments, reference):
    block, x = disturb(getattr(models, name)(*arguments)), images(8)
    torch.testing.assert_close(block(x), torch.stack([reference(block, image) for image in x]))


def test_stochastic_depth_leaves_the_skip(models):
    block, x = disturb(models.S0Block(8, 16, drop=0.5)), images(8, count=64)
    assert not torch.allclose(block(x), block.skip(x))
    block.drop = 1 - 1e-12  # practically always
    block.train()
    for norm in (block.norm, block.skip[1]):
        norm.eval()
    torch.testing.assert_close(block(x), block.skip(x))


@pytest.mark.parametrize("name", ["BasicNet", "S0", "S1", "S2", "S3", "S4Stage2"])
def test_network(models, name):
    filters = torch.randn(24, 12)
    basic = partial(models.baseline.BasicNet, block=models.BasicMixture)
    network = {"S0": partial(models.S0, filters), "BasicNet": basic}.get(name, getattr(models, name, None))()
    logits = network(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    # A softmax over a single convolution is constant: S3's first gate is the only part that cannot learn.
    idle = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    if name == "S0":
        assert torch.equal(network.stem[0][0].weight.flatten(1), filters)
    assert (
        all(n.startswith("blocks.0.gate") for n in idle)
        if name == "S3"
        else idle == ({"stem.0.0.weight"} if name == "S0" else set())
    )


def test_whitening(models, synthetic_splits):
    filters = models.whitening_filters(synthetic_splits.train, count=200, eps=0.0).double()
    images = next(utils.batches(synthetic_splits.train.head(200), 200))[0].double()
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1)  # [N, 3, 31, 31, 2, 2]
    outputs = torch.einsum("kcij,nchwij->knhw", filters.view(24, 3, 2, 2), patches).flatten(1)  # [24, N 31 31]
    covariance = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    torch.testing.assert_close(covariance, torch.eye(12, dtype=torch.float64), atol=1e-3, rtol=0)
    assert torch.equal(filters[12:], -filters[:12])
    layer = models.Whitening(filters.float())
    torch.testing.assert_close(layer(images.float()).double()[0, :, 0, 0], outputs[:, 0].relu(), atol=1e-4, rtol=1e-4)


def test_kernels_mix_per_channel_and_a_mean_kernel_is_the_mean_of_the_outputs(models):
    experts, mean, x = disturb(models.MixedExperts(3, 5, 4)), disturb(models.MeanKernel(3, 5, 4)), images(3)
    a = torch.randn(3, 4, 5, dtype=torch.float64)
    by_hand = sum(a[:, k, :, None, None] * layer(x) for k, layer in enumerate(experts.convs))
    torch.testing.assert_close(experts.mix_kernels(x, a), by_hand)
    torch.testing.assert_close(mean(x), sum(layer(x) for layer in mean.convs) / 4)


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("last", ["softmax", "signed", "static"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_study_gate(models, last, standardise, per_channel):
    gate, x = models.StudyGate(16, 5, last, standardise, per_channel), images(16, count=64)
    start = gate.double()(x)
    assert start.shape == ((64, 4, 5) if per_channel else (64, 4))
    expected = torch.tensor([1.0, 0, 0, 0]) if last == "static" else torch.full((4,), 0.25)
    means = start.transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(means.float(), expected, atol=0.12, rtol=0)
    gate = disturb(gate)
    m = x.mean((2, 3))
    if standardise:
        m = (m - gate.norm.running_mean) / (gate.norm.running_var + gate.norm.eps).sqrt()
    hidden = (m @ gate.reduce.weight.T + gate.reduce.bias).clamp(min=0)
    z = (hidden @ gate.expand.weight.T + gate.expand.bias).view(64, -1, *start.shape[2:])
    weights = {"softmax": z.softmax(1), "signed": z / z.abs().sum(1, keepdim=True)}
    weights["static"] = torch.cat([torch.ones_like(z[:, :1]), z], dim=1)
    torch.testing.assert_close(gate(x), weights[last])
