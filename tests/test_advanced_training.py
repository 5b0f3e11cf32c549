"""The models of notebook 03: parameter counts by hand, and each part against a slow, obvious reference."""

import itertools

import nbformat
import numpy as np
import pytest
import torch
from torch import nn

import my_utils as utils

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def models():
    return utils.models_of("03_advanced_training")


def gate_count(channels, experts):
    hidden = max(4, channels // 4)
    return channels * hidden + hidden + hidden * experts + experts


def mixture_count(i, o):
    return gate_count(i, 2) + 9 * i * o + i * o


def block_count(i, o, depth=1, norm=False, se=False):
    layer = mixture_count(o, o) + 2 * o * norm + se * (o * (o // 8) + o // 8 + (o // 8) * o + o)
    return 9 * i * o + 2 * o * norm + depth * layer


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"norm": True, "se": True},
        {"norm": True, "dropout": 0.1, "drop_path": 0.1},
        {"widths": (64, 256, 256), "norm": True, "depth": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("whitened", [False, True])
def test_network(models, switches, whitened):
    filters = torch.randn(24, 12) if whitened else None
    network = models.ExpertNet(filters=filters, **switches)
    widths = switches.get("widths", (24, 64, 96))
    counted = {name: value for name, value in switches.items() if name in ("depth", "norm", "se")}
    blocks = sum(block_count(i, o, **counted) for i, o in itertools.pairwise((24, *widths)))
    first = 24 * 12 + 24 if whitened else 24 * 27
    assert sum(p.numel() for p in network.parameters()) == first + blocks + widths[-1] * 10 + 10
    logits = network(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    idle = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == ({"first.0.weight"} if whitened else set())
    if whitened:
        assert torch.equal(network.first[0].weight.flatten(1), filters)


def test_mixture_equals_the_formula(models):
    mixture, x = models.Mixture(5, 7).double(), torch.randn(3, 5, 6, 6, dtype=torch.float64)
    gate = mixture.gate
    for image, mixed in zip(x, mixture(x), strict=True):
        z = gate.expand.weight @ (gate.reduce.weight @ image.mean((1, 2)) + gate.reduce.bias).clamp(min=0)
        a = (z + gate.expand.bias).exp() / (z + gate.expand.bias).exp().sum()
        wide = nn.functional.conv2d(image[None], mixture.convs[0].bank.view(7, 5, 3, 3), padding=1)[0]
        cheap = torch.einsum("oc,chw->ohw", mixture.convs[1].bank, image)
        torch.testing.assert_close(mixed, a[0] * wide + a[1] * cheap)


def test_squeeze_and_excitation(models):
    se, x = models.SE(16).double(), torch.randn(3, 16, 4, 4, dtype=torch.float64)
    for image, scaled in zip(x, se(x), strict=True):
        hidden = (se.reduce.weight @ image.mean((1, 2)) + se.reduce.bias).clamp(min=0)
        scale = 1 / (1 + (-(se.expand.weight @ hidden + se.expand.bias)).exp())
        torch.testing.assert_close(scaled, scale[:, None, None] * image)


def test_stochastic_depth_keeps_the_expectation(models):
    layer = models.StochasticDepth(nn.Identity(), p=0.25)
    y = layer(torch.ones(100_000, 1, 1, 1))
    torch.testing.assert_close(y.unique(), torch.tensor([1, 1 + 1 / 0.75]))
    assert y.mean().item() == pytest.approx(2, abs=0.02)
    assert torch.equal(layer.eval()(torch.ones(2, 1, 1, 1)), torch.full((2, 1, 1, 1), 2.0))


@pytest.mark.parametrize("norm", [False, True])
def test_switches_are_off_until_switched_on(models, norm):
    kinds = {type(module).__name__ for module in models.Block(8, 16, norm=norm).modules()}
    assert ("BatchNorm2d" in kinds) == norm
    assert not kinds & {"SE", "Dropout2d", "StochasticDepth"}


def test_one_argument_restores_the_basic_block(models):
    basic, x = models.parts.BasicMixture(5, 7, num_experts=3).double(), torch.randn(2, 5, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        basic.gate.linear.weight.normal_()
    for image, mixed in zip(x, basic(x), strict=True):
        a = basic.gate.linear.weight @ image.mean((1, 2)) + basic.gate.linear.bias
        outputs = [
            nn.functional.conv2d(image[None], conv.bank.view(7, 5, 3, 3), conv.bias, padding=1)[0]
            for conv in basic.convs
        ]
        torch.testing.assert_close(mixed, sum(weight * y for weight, y in zip(a, outputs, strict=True)))
    network = models.ExpertNet(mixture=models.parts.BasicMixture)
    kinds = {type(module).__name__ for module in network.modules()}
    assert "BasicGate" in kinds and not kinds & {"Mixture", "BatchNorm2d", "SE", "Dropout2d", "StochasticDepth"}


@pytest.mark.parametrize("depth", [1, 2])
def test_final_net_starts_near_the_identity(models, depth):
    network = models.FinalNet(widths=(32, 40, 48), norm=True, depth=depth)
    mixtures = [module for module in network.modules() if isinstance(module, models.Mixture)]
    assert len(mixtures) == 3 * depth
    for block, channels in zip(network.blocks, (24, 32, 40), strict=True):
        x = torch.randn(2, channels, 6, 6)
        torch.testing.assert_close(block[0](x)[:, :channels], x)
        assert block[0].bank[channels:].all()  # the others keep their random weights: none of them is 0
    for mixture in mixtures:
        x = torch.randn(2, mixture.convs[1].in_channels, 6, 6)
        torch.testing.assert_close(mixture(x), x)


def test_final_net_changes_activation_pooling_gates_and_head(models):
    plain, final = models.ExpertNet(norm=True), models.FinalNet(norm=True)
    names = {nn.ReLU: nn.GELU, nn.AdaptiveAvgPool2d: nn.AdaptiveMaxPool2d, models.ExpertGate: models.FinalGate}
    names |= {models.Classifier: nn.Sequential}
    kinds = [type(module) for module in list(plain.modules())[1:]]
    assert [type(module) for module in list(final.modules())[1:]] == [names.get(kind, kind) for kind in kinds]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(final(x) * 96, final.head(final.blocks(final.first(x))))
    assert final.head[-1].bias is None
    norms = [module for module in final.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 6 and not any(norm.weight.requires_grad for norm in norms)
    network = models.FinalNet(mixture=models.parts.BasicMixture)  # the basic block fits in here too
    assert network(x).shape == (2, 10)


def test_final_gate_gives_the_same_weights_and_a_gradient_in_channels_last_order(models):
    gate, x = models.FinalGate(8, num_experts=2), torch.randn(3, 8, 5, 5).to(memory_format=torch.channels_last)
    torch.testing.assert_close(gate(x), models.ExpertGate.forward(gate, x))
    x.requires_grad_()
    [gradient] = torch.autograd.grad(gate(x)[:, 0].sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_s4_final_has_a_norm_in_each_block_and_dropout_before_the_classifier(models):
    network = models.S4Final()
    for block in network.blocks:
        assert [type(module).__name__ for module in block.pool][-1] == "BatchNorm2d"
    assert isinstance(network.head[2], nn.Dropout) and network.head[2].p == 0.1
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_test_time_augmentation_is_the_average_worked_out_by_hand(models, synthetic_splits):
    """A linear model takes a mirrored or moved image for another one."""
    cells = nbformat.read(utils.ROOT / "notebooks" / "03_advanced_training.ipynb", as_version=4).cells
    [source] = [cell.source for cell in cells if "class FlipTranslate" in cell.source]
    exec(source.split("twin =")[0], vars(models))
    model, split = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), synthetic_splits.val[:100]
    weight, bias = (parameter.detach().double().numpy() for parameter in model[1].parameters())
    mean, std = (np.array(value).reshape(3, 1, 1) for value in (split.mean, split.std))
    images = (split.images.numpy() / 255 - mean) / std
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")

    def both(images):
        views = images, images[..., ::-1]
        return sum(view.reshape(len(view), -1) @ weight.T + bias for view in views) / 2

    expected = both(images) / 2 + (both(padded[..., :32, :32]) + both(padded[..., 2:, 2:])) / 4
    found = utils.predict(models.FlipTranslate(model), split, precision="float32", batch_size=30)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not np.allclose(found, utils.predict(model, split, precision="float32"), atol=1e-2)
