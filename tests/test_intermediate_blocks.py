"""The models of notebook 02: parameter counts by hand, and each block against a slow, obvious reference."""

import itertools
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


@pytest.mark.parametrize("k", [1, 3])
def test_conv_views_its_bank_as_kernels(models, k):
    layer = disturb(models.Conv(4, 5, k=k, bias=True))
    x = images(4)
    kernels = layer.bank.view(5, 4, k, k)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernels, layer.bias, padding=k // 2))


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


def conv_count(i, o, k=3, bias=False):
    return i * o * k * k + bias * o


def gate_count(channels, experts):
    hidden = max(4, channels // 4)
    return channels * hidden + hidden + hidden * experts + experts


def s0_count():
    widths = [24, 96, 96, 320, 320, 320]
    stem = 24 * 12 + 24 + sum(conv_count(i, o) + 2 * o for i, o in itertools.pairwise(widths))
    blocks = 0
    for i, o in [(320, 128), (128, 128), (128, 128)]:
        se = 4 * (o * (o // 8) + o // 8 + (o // 8) * o + o)
        blocks += i * 4 + 4 + 4 * conv_count(i, o) + 2 * 4 * o + se + conv_count(i, o, 1) + 2 * o
    return stem + blocks + 128 * 10 + 10


def s1_count():
    plan = [(32, 64, 4), (64, 96, 4), (96, 192, 2), (192, 256, 2)]
    blocks = sum(gate_count(i, k) + k * conv_count(i, o) + 2 * o for i, o, k in plan)
    return conv_count(3, 32) + 2 * 32 + blocks + 256 * 10 + 10


def s2_count():
    widths = [3] + [64] * 3 + [128] * 3 + [256] * 4
    return sum(conv_count(i, o) + 2 * o for i, o in itertools.pairwise(widths)) + 256 * 16 * 10 + 10


def s3_count():
    stem = conv_count(3, 32, bias=True) + conv_count(32, 32, bias=True)
    blocks = 0
    for n, i, o in [(1, 32, 60), (2, 60, 100), (2, 100, 160), (2, 160, 240), (3, 240, 340), (3, 340, 460)]:
        convs = conv_count(i, o) + (n - 1) * conv_count(o, o) + n * 2 * o
        blocks += gate_count(i, n) + convs + conv_count(i, o, 1, bias=True)
    return stem + blocks + sum(i * o + o for i, o in [(1840, 800), (800, 400), (400, 200), (200, 10)])


def s4_count():
    widths = [3, 32, 32, 64, 64, 96, 128]
    blocks = sum(gate_count(i, 4) + 4 * conv_count(i, o, bias=True) for i, o in itertools.pairwise(widths))
    return blocks + 128 * 10 + 10


def basic_count():
    pairs = itertools.pairwise((3, 32, 64, 128))
    return sum(i * 3 + 3 + 3 * conv_count(i, o, bias=True) for i, o in pairs) + 128 * 10 + 10


COUNTS = {"BasicNet": basic_count, "S0": s0_count, "S1": s1_count, "S2": s2_count, "S3": s3_count}
COUNTS |= {"S4Stage2": s4_count}


@pytest.mark.parametrize("name", COUNTS)
def test_network(models, name):
    filters = torch.randn(24, 12)
    basic = partial(models.baseline.BasicNet, block=models.BasicMixture)
    network = {"S0": partial(models.S0, filters), "BasicNet": basic}.get(name, getattr(models, name, None))()
    assert sum(p.numel() for p in network.parameters()) == COUNTS[name]()
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


def test_kernels_mix_per_channel(models):
    experts, x = disturb(models.MixedExperts(3, 5, 4)), images(3)
    a = torch.randn(3, 4, 5, dtype=torch.float64)
    by_hand = sum(a[:, k, :, None, None] * layer(x) for k, layer in enumerate(experts.convs))
    torch.testing.assert_close(experts.mix_kernels(x, a), by_hand)


def test_mean_kernel_is_the_mean_of_the_outputs(models):
    experts, x = disturb(models.MeanKernel(3, 5, 4)), images(3)
    torch.testing.assert_close(experts(x), sum(layer(x) for layer in experts.convs) / 4)


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
