"""What the loss takes beside Eq. 6: with nothing given it is `F.cross_entropy` of `F.linear`."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import iada
from iada_kernels import native
from tests.helpers.problems import random_problem

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, CLASSES, WIDTH = 12, 5, 7
LOSSES = {"fused": iada.fused_loss, "eager": iada.eager_loss}


def inputs(dtype=torch.float64):
    problem = random_problem(ROWS, CLASSES, WIDTH, dtype=dtype, ignored=0.0)
    tensors = problem.features, problem.weight, problem.bias
    return [tensor.detach().clone().requires_grad_() for tensor in tensors], problem


def gradients(loss, tensors):
    return torch.autograd.grad(loss.sum(), tensors, retain_graph=True)


def assert_same(got, want, tensors):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(got, tensors), gradients(want, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_with_nothing_given_it_is_cross_entropy(name, reduction, smoothing, weighted):
    if smoothing and weighted:
        pytest.skip("refused, see below")
    tensors, problem = inputs()
    labels = problem.labels.clone()
    labels[3] = -100
    weight = torch.rand(CLASSES, dtype=torch.float64) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    got = LOSSES[name](*tensors, labels, class_weight=weight, **options)
    assert_same(got, F.cross_entropy(F.linear(*tensors), labels, weight, **options), tensors)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_as_labels(name, reduction, smoothing, weighted):
    tensors, _ = inputs()
    labels = torch.rand(ROWS, CLASSES, dtype=torch.float64).softmax(dim=1)
    weight = torch.rand(CLASSES, dtype=torch.float64) if weighted else None
    prior = torch.randn(CLASSES, dtype=torch.float64)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    got = LOSSES[name](*tensors, labels, log_prior=prior, beta=0.5, class_weight=weight, **options)
    logits = F.linear(*tensors) + 0.5 * prior
    assert_same(got, F.cross_entropy(logits, labels, weight, **options), tensors)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("term", ["covariance", "epsilon"])
def test_probabilities_have_no_covariance_and_no_epsilon(name, term):
    tensors, problem = inputs()
    labels = torch.full((ROWS, CLASSES), 1 / CLASSES, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"^labels: expected class indices where .*{term}.*row_w"):
        LOSSES[name](*tensors, labels, **{term: getattr(problem, term)})


def test_a_mixed_label_is_two_weighted_losses():
    """The remedy that the error names: mixup with Σ and ε."""
    tensors, problem = inputs()
    terms = {name: getattr(problem, name) for name in ("covariance", "epsilon", "log_prior")}
    other, share = problem.labels.roll(1), torch.rand(ROWS, dtype=torch.float64)
    got = sum(
        iada.fused_loss(*tensors, labels, row_weight=weight, reduction="sum", **terms)
        for labels, weight in ((problem.labels, share), (other, 1 - share))
    )
    rows = [
        iada.eager_loss(*tensors, y, reduction="none", **terms) for y in (problem.labels, other)
    ]
    assert_same(got, (share * rows[0] + (1 - share) * rows[1]).sum(), tensors)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_rows(name, reduction, backend):
    tensors, problem = inputs()
    labels = problem.labels.clone()
    labels[2] = -100
    terms = {name: getattr(problem, name) for name in ("covariance", "epsilon", "log_prior")}
    rows, classes = torch.rand(ROWS).double(), torch.rand(CLASSES).double()
    chosen = {"backend": backend} if name == "fused" else {}
    weights = {"row_weight": rows, "class_weight": classes}
    got = LOSSES[name](*tensors, labels, reduction=reduction, **terms, **weights, **chosen)
    losses = iada.eager_loss(*tensors, labels, reduction="none", **terms)
    both = rows * classes[labels.clamp(min=0)] * (labels >= 0)
    want = losses * both
    if reduction != "none":
        want = want.sum() / (both.sum() if reduction == "mean" else 1)
    assert_same(got, want, tensors)


def test_a_mean_over_no_weight_is_0():
    tensors, problem = inputs()
    none = [tensors[0][:0].detach().requires_grad_(), *tensors[1:]]
    for given, labels, weights in (
        (tensors, problem.labels, torch.zeros(ROWS)),
        (none, problem.labels[:0], None),
        (none, torch.ones(0, CLASSES), None),
    ):
        loss = iada.fused_loss(*given, labels, row_weight=weights)
        assert loss == 0
        assert all((grad == 0).all() for grad in gradients(loss, given))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "kind", ["a row's weight", "a class's weight", "a share", "a class's weight of a share"]
)
def test_what_counts_for_nothing_may_be_infinite(name, kind):
    """A class without a sample has log prior −∞; 0 · ∞ would be NaN."""
    tensors, problem = inputs()
    absent, labels = 1, problem.labels.clone()
    prior = torch.full((CLASSES,), 0.5, dtype=torch.float64).log()
    prior[absent] = -torch.inf
    labels[labels == absent] = 0
    want = LOSSES[name](*tensors, labels, log_prior=prior, reduction="sum")
    if kind == "a share":
        labels, weights = F.one_hot(labels, CLASSES).double(), {}
    elif kind == "a class's weight of a share":
        labels, want = 0.9 * F.one_hot(labels, CLASSES).double(), 0.9 * want
        labels[:, absent] = 0.1
        weights = {"class_weight": torch.arange(CLASSES).ne(absent).double()}
    else:  # one row more, of the absent class
        tensors = [torch.cat((tensors[0], tensors[0][:1])), *tensors[1:]]
        labels = torch.cat((labels, torch.tensor([absent])))
        rows = {"row_weight": torch.tensor([1.0] * ROWS + [0.0])}
        classes = {"class_weight": torch.arange(CLASSES).ne(absent).double()}
        weights = rows if kind == "a row's weight" else classes
    got = LOSSES[name](*tensors, labels, log_prior=prior, reduction="sum", **weights)
    assert_same(got, want, tensors[1:])


@pytest.mark.parametrize("name", LOSSES)
def test_a_share_that_smoothing_gives_an_impossible_class_is_infinite(name):
    tensors, problem = inputs()
    prior = torch.zeros(CLASSES, dtype=torch.float64)
    prior[1] = -torch.inf
    labels = problem.labels.masked_fill(problem.labels == 1, 0)
    for y in (labels, F.one_hot(labels, CLASSES).double()):
        assert LOSSES[name](*tensors, y, log_prior=prior) < torch.inf
        assert LOSSES[name](*tensors, y, log_prior=prior, label_smoothing=0.1) == torch.inf


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_half_precision_are_multiplied_at_that_of_the_loss(name):
    tensors, problem = inputs()
    rows = torch.full((ROWS,), 1e-3, dtype=torch.float16)
    classes = torch.full((CLASSES,), 1e-3, dtype=torch.float16)  # 1e-6 has 4 bits in float16
    weights = {"row_weight": rows, "class_weight": classes}
    got = LOSSES[name](*tensors, problem.labels, reduction="sum", **weights)
    want = LOSSES[name](*tensors, problem.labels, reduction="sum")
    assert_same(got, want * rows[0].double() * classes[0].double(), tensors)


@pytest.mark.parametrize("name", LOSSES)
def test_logits_of_no_rows(name):
    head = torch.randn(CLASSES, WIDTH), None
    empty = torch.empty(2, 0, WIDTH), *head, torch.empty(2, 0, dtype=torch.int64)
    loss, logits = LOSSES[name](*empty, return_logits=True)
    assert loss == 0
    assert logits.shape == (2, 0, CLASSES)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_label_smoothing_with_every_term(smoothing):
    tensors, problem = inputs()
    terms = {name: getattr(problem, name) for name in ("covariance", "epsilon", "log_prior")}
    got = iada.fused_loss(*tensors, problem.labels, label_smoothing=smoothing, **terms)
    want = iada.eager_loss(*tensors, problem.labels, label_smoothing=smoothing, **terms)
    assert_same(got, want, tensors)

    def as_function(*tensors):
        return iada.fused_loss(*tensors, problem.labels, label_smoothing=smoothing, **terms)

    assert torch.autograd.gradcheck(as_function, tensors)
    assert torch.autograd.gradgradcheck(as_function, tensors)


@pytest.mark.skipif(not native.is_available(), reason="no native library here")
def test_label_smoothing_names_the_backends_that_have_it():
    tensors, problem = inputs()
    with pytest.raises(RuntimeError, match="label_smoothing.*backend=None"):
        iada.fused_loss(*tensors, problem.labels, label_smoothing=0.1, backend="native")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("leading", [(), (3, 4), (2, 3, 2), (1, 12)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_dimensions(name, leading, reduction):
    count = 1 if not leading else ROWS
    problem = random_problem(count, CLASSES, WIDTH, dtype=torch.float64, ignored=0.0)
    head = problem.weight.requires_grad_(), problem.bias
    covariance = problem.covariance
    rows = torch.rand(count).double()
    terms = {"covariance": covariance, "log_prior": problem.log_prior, "reduction": reduction}
    got, logits = LOSSES[name](
        problem.features.view(*leading, WIDTH), *head, problem.labels.view(leading),
        epsilon=problem.epsilon.view(leading), row_weight=rows.view(leading),
        return_logits=True, **terms,
    )  # fmt: skip
    want = LOSSES[name](
        problem.features, *head, problem.labels, epsilon=problem.epsilon, row_weight=rows, **terms
    )
    assert got.shape == (leading if reduction == "none" else ())
    assert torch.equal(got.reshape(-1), want.reshape(-1))
    assert logits.shape == (*leading, CLASSES)
    assert not logits.requires_grad
    torch.testing.assert_close(logits.view(-1, CLASSES), F.linear(problem.features, *head))


BAD = {
    "labels of other dimensions": ("labels", {"labels": torch.zeros(12, dtype=torch.int64)}),
    "epsilon of other dimensions": ("epsilon", {"epsilon": torch.zeros(12)}),
    "row weights of other dimensions": ("row_weight", {"row_weight": torch.zeros(4, 3)}),
    "a class weight too few": ("class_weight", {"class_weight": torch.ones(CLASSES - 1)}),
    "a negative class weight": ("class_weight", {"class_weight": -torch.ones(CLASSES)}),
    "an infinite row weight": ("row_weight", {"row_weight": torch.full((3, 4), torch.inf)}),
    "integer row weights": ("row_weight", {"row_weight": torch.ones(3, 4, dtype=torch.int64)}),
    "class weights elsewhere": (
        "class_weight",
        {"class_weight": torch.ones(CLASSES, device="meta")},
    ),
    "row weights elsewhere": ("row_weight", {"row_weight": torch.ones(3, 4, device="meta")}),
    "smoothing of 1": ("label_smoothing", {"label_smoothing": 1.0}),
    "negative smoothing": ("label_smoothing", {"label_smoothing": -0.1}),
    "smoothing as a tensor": ("label_smoothing", {"label_smoothing": torch.tensor(0.1)}),
    "smoothing of weighted classes": (
        "class_weight",
        {"label_smoothing": 0.1, "class_weight": torch.ones(CLASSES)},
    ),
}


@pytest.mark.parametrize(("name", "change"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("loss", LOSSES)
def test_what_does_not_fit_is_named(loss, name, change):
    call = {
        "features": torch.randn(3, 4, WIDTH),
        "weight": torch.randn(CLASSES, WIDTH),
        "bias": None,
        "labels": torch.zeros(3, 4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=rf"(?s)^{name}: expected .+, got .+; .+"):
        LOSSES[loss](**call | change)


@pytest.mark.parametrize(
    "options",
    [
        dict(zip(("class_weight", "label_smoothing"), pair, strict=True))
        for pair in itertools.product([None, torch.rand(CLASSES)], [0.0, 0.1])
        if pair[0] is None or not pair[1]
    ],
)
def test_the_module_has_them_too(options):
    module = iada.IADALoss(CLASSES, WIDTH, torch.arange(1, CLASSES + 1), **options)
    twin = copy.deepcopy(module.covariance)
    features, labels = torch.randn(3, 4, WIDTH), torch.randint(CLASSES, (3, 4))
    weight, bias, epsilon = torch.randn(CLASSES, WIDTH), torch.randn(CLASSES), torch.rand(3, 4)
    rows = torch.rand(3, 4)
    loss, logits = module(features, weight, bias, labels, epsilon, rows, return_logits=True)
    twin.update(features.view(-1, WIDTH), labels.view(-1))
    assert torch.equal(module.covariance.count, twin.count)
    want = iada.eager_loss(
        features, weight, bias, labels, covariance=twin, epsilon=epsilon,
        log_prior=module.log_prior, row_weight=rows, **options,
    )  # fmt: skip
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(logits, F.linear(features, weight, bias))


def test_a_callers_weights_stay_as_they_are():
    weights = torch.ones(CLASSES)
    criterion = iada.IADALoss(CLASSES, WIDTH, class_weight=weights)
    other = iada.IADALoss(CLASSES, WIDTH, class_weight=torch.rand(CLASSES))
    criterion.load_state_dict(other.state_dict())
    assert torch.equal(weights, torch.ones(CLASSES))
    assert torch.equal(criterion.class_weight, other.class_weight)


def test_modules_are_made_where_they_are_asked_for():
    place = {"device": "meta", "dtype": torch.float64}
    modules = [
        iada.ClassCovariance(CLASSES, WIDTH, **place),
        iada.IADALoss(CLASSES, WIDTH, torch.ones(CLASSES), class_weight=torch.ones(5), **place),
        iada.PerturbationNet(**place),
        iada.TrainingMemory(CLASSES, 3, **place),
    ]
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            assert tensor.device.type == "meta"
            assert not tensor.is_floating_point() or tensor.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_modules_keep_their_precision_in_a_model_that_is_cast(dtype):
    """float16 and bfloat16 leave float32 as it is, bit for bit; float64 takes them along."""
    counts = torch.arange(1, CLASSES + 1)
    model = torch.nn.ModuleList(
        [
            iada.IADALoss(CLASSES, WIDTH, counts, class_weight=torch.rand(CLASSES)),
            iada.ShardedIADALoss(CLASSES, WIDTH, None, counts),
            iada.TrainingMemory(CLASSES, 3),
            iada.PerturbationNet(),
        ]
    )
    for memory in (model[2].class_means, model[2].samples):
        memory.copy_(torch.rand(memory.shape))
    before = copy.deepcopy(model.state_dict())
    model.to(dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in model.state_dict().items():
        assert not tensor.is_floating_point() or tensor.dtype == kept, name
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    model.to("meta")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
