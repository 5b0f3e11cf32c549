"""The models of notebook 03: each part against a slow, obvious reference."""

from functools import partial

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import my_utils as utils

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def models():
    return utils.models_of("03_advanced_training")


BOTH = {"norm": True, "se": True, "dropout": 0.1, "skip": True}


@pytest.mark.parametrize(
    "switches", [{}, BOTH, {"widths": (64, 256, 256), "norm": True, "max_features": True}], ids=str
)
@pytest.mark.parametrize("whitened", [False, True])
def test_network(models, switches, whitened):
    filters = torch.randn(24, 12) if whitened else None
    network = models.ExpertNet(filters=filters, **switches)
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


def test_a_skip_adds_the_input(models):
    x = torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(models.Skip(conv := nn.Conv2d(5, 5, 3, padding=1), nn.ReLU())(x), x + conv(x).relu())


def test_linear_gate_and_plain_convolution_in_a_mixtures_place(models):
    mixture, x = models.LinearMixture(5, 7), torch.randn(3, 5, 6, 6)
    assert isinstance(mixture.gate, models.BasicGate)
    torch.testing.assert_close(mixture.gate(x), torch.full((3, 2), 0.5))
    torch.testing.assert_close(mixture(x), sum(conv(x) for conv in mixture.convs) / 2)
    some = models.ExpertNet(mixture=(models.Conv, models.Mixture, models.Conv))
    assert [isinstance(block[4], models.Mixture) for block in some.blocks] == [False, True, False]
    assert some(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    plain = models.ExpertNet(mixture=models.Conv)
    assert not any(isinstance(module, models.Mixture) for module in plain.modules())


def test_one_argument_restores_the_basic_block(models):
    basic, x = models.parts.BasicMixture(5, 7, num_experts=3).double(), torch.randn(2, 5, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        basic.gate.linear.weight.normal_()
    for image, mixed in zip(x, basic(x), strict=True):
        a = basic.gate.linear.weight @ image.mean((1, 2)) + basic.gate.linear.bias
        kernels = ((conv.bank.view(7, 5, 3, 3), conv.bias) for conv in basic.convs)
        outputs = [nn.functional.conv2d(image[None], *kernel, padding=1)[0] for kernel in kernels]
        torch.testing.assert_close(mixed, sum(weight * y for weight, y in zip(a, outputs, strict=True)))
    kinds = {type(module).__name__ for module in models.ExpertNet(mixture=models.parts.BasicMixture).modules()}
    assert "BasicGate" in kinds and not kinds & {"Mixture", "BatchNorm2d", "SE", "Dropout2d", "Skip"}


@pytest.mark.parametrize("gate", ["Mixture", "LinearMixture"])
def test_identity_start(models, gate):
    network = models.ExpertNet(widths=(32, 40, 48), norm=True, identity=True, mixture=getattr(models, gate))
    for block, channels in zip(network.blocks, (24, 32, 40), strict=True):
        x = torch.randn(2, channels, 6, 6)
        torch.testing.assert_close(block[0](x)[:, :channels], x)
        assert block[0].bank[channels:].all()  # the others keep their random weights: none of them is 0
        x = torch.randn(2, block[4].convs[1].in_channels, 6, 6)
        torch.testing.assert_close(block[4](x), x)


def test_max_pooled_features_and_small_logits(models):
    network = models.ExpertNet(small_logits=True, max_features=True)
    features = network.blocks(network.first(torch.randn(2, 3, 32, 32))).amax((2, 3))
    torch.testing.assert_close(network.head[2](features) * 96, features @ network.head[2].weight.T)
    torch.testing.assert_close(network(x := torch.randn(2, 3, 32, 32)), network.head(network.blocks(network.first(x))))
    assert network.head[2].bias is None and network.head[2].weight.std().item() == pytest.approx(1, abs=0.1)


def run_cell(models, definition):
    """Run the notebook's cell with this definition, up to where it is used."""
    cells = nbformat.read(utils.ROOT / "notebooks" / "03_advanced_training.ipynb", as_version=4).cells
    [source] = [cell.source for cell in cells if definition in cell.source]
    exec(source.split("\n\n\nwithout_gate(")[0], vars(models))


def test_a_gate_at_its_mean_weights(models, synthetic_splits):
    models.pd = pd
    run_cell(models, "def without_gate")
    mixtures, split = (models.Conv, models.Conv, models.LinearMixture), synthetic_splits.val[:200]
    network = models.ExpertNet((8, 8, 8), mixture=mixtures).eval()
    nn.init.normal_((linear := network.blocks[2][4].gate.linear).weight, std=10)
    table, [weights] = models.without_gate(network, split), models.parts.gate_weights(network, split)
    expected = [100 * utils.evaluate(network, split).top1]
    linear.weight.data.zero_()
    for kept in (1.0, 1.0), (1.0, 0.0):
        linear.bias.data = weights.mean(dim=0) * torch.tensor(kept)
        expected.append(100 * utils.evaluate(network, split).top1)
    assert table["top-1 %"].tolist() == pytest.approx(expected) and len(set(expected)) == 3
    assert table["change"].tolist() == pytest.approx([top1 - expected[0] for top1 in expected])


@pytest.fixture
def halved(models, synthetic_splits, store):
    """Return a small network, its data, and `fit` on the harder halves of its batches."""
    network = partial(models.ExpertNet, (8, 8, 8), mixture=models.Conv, norm=True)
    recipe = utils.Recipe(epochs=3, batch_size=50, learning_rate=0.01, label_smoothing=0.2, precision="float32")
    training = partial(models.HarderHalf, proxy=network, proxy_recipe=recipe)
    data = synthetic_splits.head(200, 100, 100)
    return network, data, partial(utils.fit, network, data, recipe, run="test/half", plot=False, training=training)


def test_the_harder_half_is_the_one_worked_out_by_hand(halved):
    network, data, fit = halved
    large, small = (utils.make_model(network, 0, torch.device("cpu")) for _ in range(2))
    optimizers, step = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (large, small)], 0
    for epoch in range(3):
        for images, labels in utils.batches(data.train, 50, seed=0, epoch=epoch):
            target = nn.functional.one_hot(labels, 10) * 0.8 + 0.02
            losses = -(target * small(images).log_softmax(1)).sum(1)
            kept = losses.argsort()[25:]
            (losses[kept].mean() * (step % 4 == 0)).backward()
            (-(target[kept] * large(images[kept]).log_softmax(1)).sum() / 25).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
    run = fit()
    for value, by_hand in zip(run.model.state_dict().values(), large.state_dict().values(), strict=True):
        torch.testing.assert_close(value, by_hand, rtol=1e-3, atol=1e-5)
    passes = 3 * 100 + 200 + 2 * 50  # in an epoch: the large network's, the small one's forward, every fourth backward
    assert run.train_flops == 3 * passes * utils.count_flops(network())


def test_an_interrupted_training_on_harder_halves_goes_on(halved, monkeypatch, tmp_path):
    *_, fit = halved
    whole, store = fit(), utils.store_run
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "other"))
    monkeypatch.setattr(utils, "store_run", lambda *run: store(*run) or 1 / (len(run[0].history.seconds) - 2))
    with pytest.raises(ZeroDivisionError):
        fit()
    monkeypatch.undo()
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "other"))
    again = fit()
    assert again.history.step_loss == whole.history.step_loss
    assert all(map(torch.equal, again.model.state_dict().values(), whole.model.state_dict().values()))


def test_test_time_augmentation_is_the_average_worked_out_by_hand(models, synthetic_splits):
    """A linear model takes a mirrored or moved image for another one."""
    run_cell(models, "class FlipTranslate")
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
