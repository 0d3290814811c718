"""The contrastive loss equals the original's numbers, a slow literal formula, and closed forms."""

import math

import pytest
import torch

from losses import SupConLoss


def literal(features, labels, temperature):
    """The formula of the paper, a term at a time."""
    views = [(i, v) for v in range(features.shape[1]) for i in range(features.shape[0])]
    total = 0.0
    for i, v in views:
        z = features[i, v]
        positives = [
            (j, w) for j, w in views
            if (j, w) != (i, v) and (j == i if labels is None else labels[j] == labels[i])
        ]
        others = sum(
            torch.exp(z @ features[j, w] / temperature) for j, w in views if (j, w) != (i, v)
        )
        terms = [z @ features[j, w] / temperature - torch.log(others) for j, w in positives]
        total = total - temperature / 0.07 * sum(terms) / len(terms)
    return total / len(views)


def unit(*shape, seed=0, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("kind", ["simclr", "supcon"])
def test_loss_and_gradient_are_those_of_the_original(golden, case, kind):
    expected = {k[2:]: v for k, v in golden("loss.npz").items() if k.startswith(f"{case}_")}
    features = torch.from_numpy(expected["features"]).requires_grad_()
    labels = torch.from_numpy(expected["labels"]) if kind == "supcon" else None
    loss = SupConLoss(float(expected["temperature"]))(features, labels)
    loss.backward()
    assert loss.item() == pytest.approx(float(expected[f"{kind}_loss"]), rel=1e-5)
    gradient = torch.from_numpy(expected[f"{kind}_grad"])
    error = (features.grad - gradient).norm() / gradient.norm()
    assert error < 1e-5


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("labels", [None, [0, 1, 1, 0, 2]])
def test_loss_equals_the_formula_written_out(views, temperature, labels):
    features = unit(5, views, 6)
    labels = None if labels is None else torch.tensor(labels)
    loss = SupConLoss(temperature)(features, labels)
    torch.testing.assert_close(loss, literal(features, labels, temperature), rtol=1e-12, atol=0)


def test_loss_of_equal_features_is_the_logarithm_of_the_other_views():
    features = torch.ones(4, 2, 1, dtype=torch.float64)
    assert SupConLoss(0.5)(features).item() == pytest.approx(0.5 / 0.07 * math.log(7), rel=1e-12)


def test_order_of_images_and_of_views_does_not_matter():
    features, labels = unit(6, 2, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    loss = SupConLoss()(features, labels)
    torch.testing.assert_close(SupConLoss()(features[order], labels[order]), loss)
    torch.testing.assert_close(SupConLoss()(features.flip(1), labels), loss)


@pytest.mark.parametrize("labels", [None, [0, 1, 1, 0, 2]])
def test_the_parts_of_the_images_add_up_to_the_loss(labels):
    features, criterion = unit(5, 2, 6), SupConLoss(0.2)
    labels = None if labels is None else torch.tensor(labels)
    parts = [criterion(features, labels, slice(*ends)) for ends in ((0, 1), (1, 4), (4, 5), (5, 5))]
    torch.testing.assert_close(sum(parts), criterion(features, labels), rtol=1e-12, atol=0)
    assert parts[-1] == 0  # of a process without images


def test_a_view_is_no_negative_of_itself_however_far_the_others_are():
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)
    assert SupConLoss(1e-3)(opposite).item() == pytest.approx(0, abs=1e-9)


def test_labels_that_all_differ_make_supcon_simclr():
    features = unit(5, 2, 8)
    assert SupConLoss()(features, torch.arange(5)) == SupConLoss()(features)


@pytest.mark.parametrize("temperature", [1e-3, 100.0])
def test_loss_is_finite_at_extreme_temperatures(temperature):
    features = unit(64, 2, 16, dtype=torch.float32).requires_grad_()
    loss = SupConLoss(temperature)(features)
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (torch.ones(4, 8), None, r"\[B, V >= 2, D\], not \[4, 8\]"),
        (torch.ones(4, 1, 8), None, r"not \[4, 1, 8\]"),
        (torch.ones(4, 2, 8), torch.zeros(3), r"labels must be \[4\], not \[3\]"),
    ],
)
def test_features_and_labels_of_wrong_shape_are_refused(features, labels, words):
    with pytest.raises(ValueError, match=words):
        SupConLoss()(features, labels)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        SupConLoss(0.0)
