"""The sign of the perturbation on confident samples, where the obvious form loses it."""

import pytest
import torch

from iada_kernels import reference
from iada_kernels.torch_ops import loss as torch_ops_loss

CLASSES, WIDTH, ROWS = 100, 64, 256

# Margin in logits, and the least share of coordinates that the obvious form gets wrong there.
MARGINS = [(15, 0.05), (32, 0.25), (160, 0.90)]


def reference_sign(logits, weight, labels):
    return reference.perturbation_sign(logits, weight, labels)


def torch_ops_sign(logits, weight, labels):
    return torch_ops_loss.perturbation_sign(logits, weight, labels[:, None])


FORMS = pytest.mark.parametrize("sign_of", [reference_sign, torch_ops_sign])


def naive_sign(logits, weight, labels):
    """What autograd computes: p_y − 1 cancels and the other p_j underflow."""
    residual = logits.softmax(dim=1) - torch.nn.functional.one_hot(labels, len(weight))
    return torch.sign(residual @ weight)


def confident_samples(margin, rows=ROWS, classes=CLASSES, width=WIDTH, seed=0):
    """float32 logits in which the label leads the runner-up by `margin`, weight, labels.

    The rows of the head share an offset, as trained heads may: softmax does not see it, but what
    is lost of p_y − 1 is multiplied by it.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = 2 + torch.randn(classes, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (2 * rows,), generator=generator)
    logits = weight[labels] @ weight.T
    runner_up = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    lead = logits.gather(1, labels[:, None])[:, 0] - runner_up
    first = (lead > 1).nonzero()[:rows, 0]
    assert len(first) == rows
    logits = logits[first] * (margin / lead[first, None])
    return logits.float(), weight.float(), labels[first]


def exact_argument(logits, weight, labels):
    """g in float64 on the same inputs, and where |g| is beyond float32 rounding of 0."""
    logits, weight = logits.double(), weight.double()
    others = logits.scatter(1, labels[:, None], -torch.inf).softmax(dim=1)
    g = others @ weight - weight[labels]
    terms = others @ weight.abs() + weight[labels].abs()
    return g, g.abs() > 16 * torch.finfo(torch.float32).eps * terms


@FORMS
@pytest.mark.parametrize("margin", [margin for margin, _ in MARGINS])
def test_scale_free_sign_is_exact(sign_of, margin):
    logits, weight, labels = confident_samples(margin)
    g, decided = exact_argument(logits, weight, labels)
    assert decided.double().mean() > 0.999
    sign = sign_of(logits, weight, labels)
    assert sign.dtype == torch.float32
    assert torch.equal(sign[decided], g.sign().float()[decided])


@pytest.mark.parametrize(("margin", "share"), MARGINS)
def test_the_obvious_form_is_wrong(margin, share):
    logits, weight, labels = confident_samples(margin)
    g, decided = exact_argument(logits, weight, labels)
    wrong = naive_sign(logits, weight, labels) != g.sign().float()
    assert wrong[decided].double().mean() > share


@FORMS
def test_unconfident_samples_agree_with_the_gradient_of_cross_entropy(sign_of):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (40,), generator=generator)
    logits = features @ weight.T
    (grad,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), features
    )
    assert torch.equal(sign_of(logits.detach(), weight, labels), grad.sign())


@FORMS
def test_wrong_samples_agree_too(sign_of):
    """A label that trails far behind: r is then the softmax itself."""
    logits, weight, labels = confident_samples(160)
    labels = (labels + 1) % CLASSES
    g, decided = exact_argument(logits, weight, labels)
    sign = sign_of(logits, weight, labels)
    assert torch.equal(sign[decided], g.sign().float()[decided])


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_class_has_no_direction(sign_of, dtype):
    labels = torch.zeros(4, dtype=torch.int64)
    sign = sign_of(torch.randn(4, 1).to(dtype), torch.randn(1, 3).to(dtype), labels)
    assert torch.equal(sign, torch.zeros(4, 3, dtype=dtype))


@FORMS
def test_two_classes_point_from_one_row_to_the_other(sign_of):
    weight = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    sign = sign_of(torch.tensor([[300.0, -300.0], [-5.0, 5.0]]), weight, labels)
    assert torch.equal(sign, torch.stack((weight[1] - weight[0], weight[0] - weight[1])).sign())


@FORMS
def test_sign_is_a_constant_and_changes_no_argument(sign_of):
    logits, weight, labels = confident_samples(15, rows=8)
    kept = [logits.clone(), weight.clone(), labels.clone()]
    with torch.no_grad():
        assert not sign_of(logits.requires_grad_(), weight.requires_grad_(), labels).requires_grad
    assert all(map(torch.equal, (logits, weight, labels), kept))


def test_the_reference_sign_carries_no_graph():
    logits, weight, labels = confident_samples(15, rows=8)
    assert not reference_sign(
        logits.requires_grad_(), weight.requires_grad_(), labels
    ).requires_grad
