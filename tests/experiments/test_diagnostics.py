"""The surrogate's gap by sampling, the terms of Table 1, and the spectra."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import iada
from iada.experiments.diagnostics import (
    TermsLog,
    effective_rank,
    regularization_terms,
    spectrum,
    surrogate,
    surrogate_gap,
)
from iada.experiments.diagnostics.balance import balance_curve
from iada.experiments.metrics import measure
from iada.utils.evaluate import outputs
from iada_kernels.contract import LossInputs
from iada_kernels.reference import perturbation_sign
from tests.helpers.problems import random_problem, reference_loss, target_of
from tests.helpers.training import make_trainer


def gap_of(problem, **options):
    inputs, given = problem.records()
    inputs = inputs._replace(covariance=options.pop("covariance", inputs.covariance))
    return surrogate_gap(inputs, **({"alpha": given.alpha} | options))


def class_means(losses, labels):
    return torch.stack([losses[labels == c].mean() for c in labels.unique()])


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize(("rows", "classes", "width"), [(40, 4, 6), (12, 7, 2), (9, 2, 30)])
def test_bound_holds_and_is_eq_5(structure, rows, classes, width):
    problem = random_problem(rows, classes, width, structure=structure, ignored=0.0, alpha=0.3)
    found = gap_of(problem, samples=4000)
    p = problem
    losses = reference_loss(dataclasses.replace(p, log_prior=None).with_options(reduction="none"))
    torch.testing.assert_close(found.bound, class_means(losses, p.labels))
    assert (found.standard_error > 0).all()
    assert (found.gap > -5 * found.standard_error).all()
    assert (found.gap > 5 * found.standard_error).any()  # a gap there is
    assert torch.equal(found.rows, torch.bincount(p.labels)[found.classes])


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_sampling_agrees_with_sampled_features(structure):
    """Against draws of h̃ itself, A numbers each, with a Cholesky factor."""
    p = random_problem(6, 3, 8, structure=structure, ignored=0.0)
    found = gap_of(p, samples=20000)
    generator = torch.Generator().manual_seed(1)
    sign = perturbation_sign(p.features @ p.weight.T + p.bias, p.weight, p.labels)
    centre = p.features + p.epsilon[:, None] * sign
    sigma = p.covariance if structure == "full" else torch.diag_embed(p.covariance)
    root = torch.linalg.cholesky(sigma)[p.labels]
    noise = torch.randn(20000, 6, 8, generator=generator, dtype=torch.float64)
    drawn = centre + 0.5**0.5 * torch.einsum("nab,snb->sna", root, noise)
    logits = drawn @ p.weight.T + p.bias
    losses = -logits.log_softmax(dim=2)[:, torch.arange(6), p.labels]
    want = class_means(losses.mean(dim=0), p.labels)
    errors = losses.std(dim=0) / 20000**0.5
    error = torch.stack(
        [errors[p.labels == c].square().sum().sqrt() / (p.labels == c).sum() for c in found.classes]
    )
    torch.testing.assert_close(found.standard_error, error, rtol=0.1, atol=0)
    assert ((found.expected - want).abs() < 5 * 2**0.5 * error).all()


def test_exact_without_covariance_and_without_alpha():
    problem = random_problem(20, 4, 5, ignored=0.0)
    for found in (
        gap_of(problem, covariance=torch.zeros_like(problem.covariance), samples=3),
        gap_of(problem, alpha=0.0, samples=3),
    ):
        assert found.standard_error.abs().max() < 1e-15
        assert found.gap.abs().max() < 1e-14
        assert found.expected.min() > 0


def test_one_dimension_is_quadrature():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    features = torch.tensor([[0.3], [-1.2], [0.8]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    sigma = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)[:, None, None]
    epsilon = torch.tensor([0.4, -0.2, 0.0], dtype=torch.float64)
    inputs = LossInputs(features, weight, bias, labels, sigma, epsilon)
    found = surrogate_gap(inputs, alpha=0.7, samples=50000)
    points, weights = np.polynomial.hermite_e.hermegauss(120)
    weights = torch.from_numpy(weights / weights.sum())
    sign = perturbation_sign(features @ weight.T + bias, weight, labels)
    centre = features + epsilon[:, None] * sign
    h = centre + (0.7 * sigma[:, 0]).sqrt() * torch.from_numpy(points)  # (3, 120)
    logits = h[..., None] * weight[:, 0] + bias
    losses = -logits.log_softmax(dim=2)[torch.arange(3), :, labels]
    want = losses @ weights
    assert ((found.expected - want).abs() < 4 * found.standard_error).all()
    assert (found.standard_error < 0.01 * want).all()


def test_chunks_change_nothing_but_the_draws(monkeypatch):
    problem = random_problem(30, 4, 5, ignored=0.0)
    whole = gap_of(problem, samples=3000)
    assert torch.equal(whole.expected, gap_of(problem, samples=3000).expected)
    assert not torch.equal(whole.expected, gap_of(problem, samples=3000, seed=1).expected)
    monkeypatch.setattr(surrogate, "CHUNK", 64)
    small = gap_of(problem, samples=3000)
    assert ((small.expected - whole.expected).abs() < 6 * whole.standard_error).all()
    torch.testing.assert_close(small.standard_error, whole.standard_error, rtol=0.15, atol=0)


def test_the_variance_of_draws_is_unbiased():
    """Against torch's of the same draws, of which there are three."""
    centre, factor = torch.tensor([[0.0, 1.0, -0.5]]).double(), torch.randn(3, 2).double()
    mean, variance = surrogate._expected(centre, factor, 3, torch.Generator().manual_seed(0))
    noise = torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = (centre + noise @ factor.T).logsumexp(dim=2)
    torch.testing.assert_close(mean, values.mean(dim=0))
    torch.testing.assert_close(variance, values.var(dim=0))


def test_overall_is_weighted_as_in_eq_2():
    problem = random_problem(30, 3, 5, ignored=0.0)
    found = gap_of(problem, samples=500)
    counts = torch.tensor([100, 10, 1])
    weights = (1 / counts.double())[problem.labels]
    want = (weights * found.gap[problem.labels]).sum() / weights.sum()
    overall = found.overall(counts)
    assert overall["gap"] == pytest.approx(float(want))
    assert overall["bound"] - overall["expected"] == pytest.approx(float(want))
    assert 0 < overall["standard_error"] < found.standard_error.max()
    with pytest.raises(ValueError, match="class_counts: expected samples of each class"):
        found.overall(torch.tensor([100, 10, 0]))
    assert found.as_record()["classes"] == [0, 1, 2]


def test_negative_part_of_the_covariance_is_reported_and_left_out():
    problem = random_problem(20, 3, 4, ignored=0.0)
    vectors = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    values = torch.tensor([2.0, 1.0, 0.5, -0.5], dtype=torch.float64)
    sigma = (vectors * values) @ vectors.T
    clean = (vectors * values.clamp(min=0)) @ vectors.T
    found = gap_of(problem, covariance=sigma.expand(3, 4, 4), samples=50)
    same = gap_of(problem, covariance=clean.expand(3, 4, 4), samples=50)
    torch.testing.assert_close(found.negative, torch.full((3,), 0.125).double())
    assert same.negative.max() < 1e-12
    torch.testing.assert_close(found.bound, same.bound)


def test_on_a_fitted_classifier():
    trainer = make_trainer(epochs=3, alpha=0.2)
    trainer.fit()
    found = outputs(trainer.backbone, trainer.head, trainer.validation_set)
    head = trainer.head
    torch.testing.assert_close(found.logits, head(found.features).detach())
    epsilon = torch.linspace(-0.5, 0.5, len(found.labels))
    sigma = trainer.method.covariance.covariance
    inputs = LossInputs(found.features, head.weight, head.bias, found.labels, sigma, epsilon)
    gap = surrogate_gap(inputs, alpha=0.2)
    assert (gap.gap > -5 * gap.standard_error).all()
    assert gap.bound.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -0.1}, "alpha: expected 0 or more"),
        ({"samples": 1}, "samples: expected a whole number from 2"),
        ({"covariance": torch.zeros(4, 3)}, "covariance: expected"),
        ({"covariance": torch.full((4, 5), torch.nan)}, "covariance: expected finite"),
    ],
)
def test_surrogate_errors(change, message):
    with pytest.raises(ValueError, match=message):
        gap_of(random_problem(8, 4, 5, ignored=0.0), **change)
    with pytest.raises(ValueError, match="labels: expected class indices"):
        gap_of(random_problem(8, 4, 5, ignored=0.5))


def literal_terms(problem):
    """Table 1 as it is written, with N·C·A temporaries; ignored rows 0."""
    p, y = problem, target_of(problem)
    q = torch.nn.functional.linear(p.features, p.weight, p.bias).softmax(dim=1)
    q = q.scatter(1, y[:, None], 0.0)  # j ≠ y
    difference = p.weight[None] - p.weight[y][:, None]
    valid = (p.labels != p.options["ignore_index"]).double()
    zero = torch.zeros(len(y)).double()
    terms = [zero, zero, zero]
    if p.covariance is not None:
        form = "nca,na,nca->nc" if p.covariance.dim() == 2 else "nca,nab,ncb->nc"
        rho = torch.einsum(form, difference, p.covariance[y], difference)
        terms[0] = (q * 0.5 * rho).sum(dim=1)
    if p.epsilon is not None:
        sign = perturbation_sign(
            torch.nn.functional.linear(p.features, p.weight, p.bias), p.weight, y
        )
        delta = p.epsilon[:, None] * sign
        terms[1] = (q * torch.einsum("nca,na->nc", difference, delta)).sum(dim=1)
    if p.log_prior is not None:
        terms[2] = (q * (p.log_prior[None] - p.log_prior[y][:, None])).sum(dim=1)
    return [term * valid for term in terms]


def terms_of(problem):
    inputs, options = problem.records()
    return regularization_terms(inputs, options.ignore_index)


@pytest.mark.parametrize("structure", ["full", "diag", None])
@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize(("rows", "classes", "width"), [(40, 4, 6), (5, 9, 3), (3, 1, 2)])
def test_terms_are_table_1(structure, present, rows, classes, width):
    given = {"bias": present, "epsilon": present, "log_prior": present}
    problem = random_problem(rows, classes, width, structure=structure, **given)
    for have, want in zip(terms_of(problem), literal_terms(problem), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-14)


def test_terms_in_blocks(block_elements):
    problem = random_problem(40, 4, 6)
    want = literal_terms(problem)
    block_elements(30)
    for have, term in zip(terms_of(problem), want, strict=True):
        torch.testing.assert_close(have, term, rtol=1e-12, atol=1e-14)


def test_terms_are_the_first_order_of_the_loss():
    """d/dt CE(z + t(z̃ − z)) at t = 0 is αG + R + βF."""
    problem = random_problem(20, 4, 6, ignored=0.0, alpha=0.4, beta=0.7)
    p, step = problem, 1e-6

    def loss(t):
        scaled = dataclasses.replace(p, epsilon=t * p.epsilon)
        return reference_loss(scaled.with_options(alpha=t * 0.4, beta=t * 0.7, reduction="none"))

    slope = (loss(step) - loss(-step)) / (2 * step)
    terms = terms_of(problem)
    want = 0.4 * terms.generalization + terms.robustness + 0.7 * terms.fairness
    torch.testing.assert_close(slope, want, rtol=1e-6, atol=1e-8)
    assert (terms.generalization >= 0).all()
    assert torch.equal(terms.robustness.sign(), p.epsilon.sign())


def test_terms_of_a_confident_sample_do_not_cancel():
    problem = random_problem(6, 3, 4, ignored=0.0)
    sure = nn.functional.one_hot(problem.labels, 3).double() @ torch.linalg.pinv(problem.weight).T
    features = 40 * sure  # a margin of about 40: 1 − q_y is 0 in float32, q_j is not
    problem = dataclasses.replace(problem, features=features, epsilon=None)
    exact, single = terms_of(problem), terms_of(problem.map(torch.Tensor.float))
    assert 0 < exact.generalization.max() < 1e-8
    assert single.generalization.dtype == torch.float32
    for have, want in zip(single, exact, strict=True):
        torch.testing.assert_close(have.double(), want, rtol=1e-3, atol=0)


def test_terms_log_of_a_run():
    log = TermsLog(every=2)
    history = make_trainer(observe=log, batch_norm=True).fit()
    assert history == make_trainer(batch_norm=True).fit()  # looking changes nothing
    rows = log.summary()
    assert [row["epoch"] for row in rows] == [2, 3, 4, 5]  # the CE phase has no terms
    assert all(row["generalization"] > 0 for row in rows)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    other = TermsLog(every=2)
    other.load_state_dict(log.state_dict())
    assert other.summary() == rows


def test_terms_log_is_the_mean_over_what_it_saw():
    seen = []

    class Spy(TermsLog):
        def __call__(self, trainer, batch, result):
            super().__call__(trainer, batch, result)
            if trainer.plain_phase:
                return
            trainer.backbone.eval()
            with torch.no_grad():
                features = trainer.backbone(batch[0])
            trainer.backbone.train()
            head, method = trainer.head, trainer.method
            sigma, prior = method.covariance.covariance, method.log_prior
            given = (features, head.weight, head.bias, batch[1], sigma, result.epsilon, prior)
            seen.append(regularization_terms(LossInputs(*given)))

    log = Spy(every=1)
    make_trainer(observe=log, epochs=3).fit()
    (row,) = log.summary()
    for name in ("generalization", "robustness", "fairness"):
        want = torch.cat([getattr(terms, name) for terms in seen]).mean()
        assert row[name] == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize(("every", "looks"), [(1, range(6)), (4, (0, 4)), (9, (0,))])
def test_terms_log_looks_every_so_many_steps(every, looks):
    """Of six steps an epoch, from each epoch's first on."""
    trainer = make_trainer(epochs=4)
    seen = []

    def note(module, given, out):
        if not module.training:
            seen.append((trainer.epoch, trainer.batch))

    log = TermsLog(every)
    trainer.observe = log
    trainer.validation_set = None
    trainer.backbone.register_forward_hook(note)
    trainer.fit()
    assert seen == [(epoch, step) for epoch in (2, 3) for step in looks]


@pytest.mark.parametrize("method", ["ce", "isda", "logit-adjustment"])
def test_terms_log_of_other_methods(method):
    log = TermsLog()
    make_trainer(observe=log, method=method, epochs=2, ce_epochs=0).fit()
    rows = log.summary()
    assert len(rows) == 2
    assert all(row["robustness"] == 0 for row in rows)
    assert (rows[-1]["generalization"] > 0) == (method == "isda")


def test_terms_log_refuses_a_bad_interval():
    with pytest.raises(ValueError, match="every: expected a whole number from 1 on"):
        TermsLog(every=0)


def test_spectrum_is_numpys_and_descends():
    problem = random_problem(classes=3, width=6)
    found = spectrum(problem.covariance.float())
    assert found.dtype == torch.float64
    want = np.linalg.eigvalsh(problem.covariance.float().double().numpy())[:, ::-1]
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-10, atol=1e-12)
    diagonal = problem.covariance.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(
        spectrum(diagonal), spectrum(torch.diag_embed(diagonal)), rtol=1e-10, atol=1e-12
    )


def test_spectrum_of_a_class_covariance_and_of_asymmetric_input():
    state = iada.ClassCovariance(3, 4)
    state.update(torch.randn(50, 4), torch.arange(50) % 3)
    assert (spectrum(state)[:, -1] > 0).all()
    tilted = state.covariance + torch.triu(torch.ones(4, 4), 1) - torch.tril(torch.ones(4, 4), -1)
    torch.testing.assert_close(spectrum(tilted), spectrum(state), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="covariance: expected"):
        spectrum(torch.zeros(3))


def test_effective_rank():
    values = torch.tensor([[1.0, 1, 1, 1], [5, 0, 0, 0], [0, 0, 0, 0], [2, 2, -1, 0]])
    torch.testing.assert_close(effective_rank(values), torch.tensor([4.0, 1, 0, 2]).double())


def test_a_curve_of_balance_is_best_where_the_prior_is_taken_off():
    """Gaussians with a skewed prior; Bayes' logits need all of log π, those of the mean none."""
    counts = torch.tensor([900, 90, 10])
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) % 3
    points = 2.0 * torch.eye(3)[labels] + torch.randn(3000, 3, generator=generator)
    balanced = 2.0 * points
    bayes = balanced + (counts / counts.sum()).log()
    for logits, best in ((balanced, 0.0), (bayes, 1.0)):
        found = balance_curve(logits, labels, counts)
        top = max(found["balanced"])
        near = [t for t, share in zip(found["tau"], found["balanced"], strict=True) if share == top]
        assert min(abs(tau - best) for tau in near) <= 0.2
        assert found["top1"] == pytest.approx(found["balanced"])  # as many samples of each
    np.testing.assert_allclose(found["tau"], np.arange(-1, 1.55, 0.1), atol=1e-12)
    plain = measure(bayes, labels, counts).metrics
    at = dict(zip(found["tau"], found["top1"], strict=True))
    assert at[0.0] == plain["top1"]
    assert at[1.0] == plain["posthoc_top1"]


def test_a_class_without_test_samples_is_left_out_of_the_balance():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    found = balance_curve(logits, torch.tensor([0, 1, 0]), torch.tensor([3, 3, 0]))
    assert found["balanced"][10] == pytest.approx(0.75)
    assert found["top1"][10] == pytest.approx(2 / 3)
