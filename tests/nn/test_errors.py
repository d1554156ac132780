"""Every bad argument: one form of message, the same from fused and eager, and nothing touched."""

import re
from dataclasses import replace

import pytest
import torch

import iada
from iada_kernels import BACKENDS, select_backend
from tests.helpers.problems import TENSORS, Problem, eager, fused, random_problem

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, CLASSES, WIDTH = 6, 4, 7
NAN, INF = float("nan"), float("inf")

MESSAGE = re.compile(r"(\w+): expected (.+), got (.+); (.+)", re.DOTALL)


def good(**terms) -> Problem:
    return random_problem(ROWS, CLASSES, WIDTH, dtype=torch.float32, **terms)


def complaint(loss_of, problem) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is what is looked at next
        loss_of(problem)
    return str(error.value)


def assert_refused(problem, name, backend=None):
    """Both losses refuse in the same words, which name the argument."""
    message = complaint(fused(backend), problem)
    assert complaint(eager, problem) == message
    found = MESSAGE.fullmatch(message)
    assert found, message
    assert found[1] == name, message
    assert all(part.strip() for part in found.groups()), message
    return message


def put(tensor, place, value):
    changed = tensor.clone()
    changed[place] = value
    return changed


# The argument, its fault, and what brings that about.
SPOILT_TENSORS = [
    ("features", "list", lambda t: t.tolist()),
    ("features", "None", lambda t: None),
    ("features", "integer", lambda t: t.long()),
    ("features", "bool", lambda t: t > 0),
    ("features", "complex", lambda t: t.to(torch.complex64)),
    ("features", "a scalar", lambda t: t[0, 0]),
    ("weight", "list", lambda t: t.tolist()),
    ("weight", "None", lambda t: None),
    ("weight", "integer", lambda t: t.long()),
    ("weight", "transposed", lambda t: t.T),
    ("weight", "1-d", lambda t: t[0]),
    ("weight", "no class", lambda t: t[:0]),
    ("bias", "number", lambda t: 0.0),
    ("bias", "integer", lambda t: t.long()),
    ("bias", "2-d", lambda t: t[None]),
    ("bias", "scalar", lambda t: t.sum()),
    ("labels", "list", lambda t: t.tolist()),
    ("labels", "None", lambda t: None),
    ("labels", "float", lambda t: t.float()),
    ("labels", "bool", lambda t: t > 0),
    ("labels", "complex", lambda t: t.to(torch.complex64)),
    ("labels", "2-d", lambda t: t[:, None]),
    ("labels", "too large", lambda t: put(t, 2, CLASSES)),
    ("labels", "negative", lambda t: put(t, 2, -1)),
    ("labels", "int64 beyond int32", lambda t: put(t, 2, 2**40)),
    ("labels", "uint8 too large", lambda t: put(t.clamp(min=0).byte(), 2, 200)),
    ("labels", "uint8 equal to -100 modulo 256", lambda t: put(t.clamp(min=0).byte(), 2, 156)),
    ("covariance", "number", lambda t: 0.0),
    ("covariance", "list", lambda t: t.tolist()),
    ("covariance", "integer", lambda t: t.long()),
    ("covariance", "bfloat16", lambda t: t.bfloat16()),
    ("covariance", "float16", lambda t: t.half()),
    ("covariance", "one for all classes", lambda t: t[0]),
    ("covariance", "diagonal of the wrong width", lambda t: t.diagonal(dim1=1, dim2=2)[:, 1:]),
    ("covariance", "4-d", lambda t: t[None]),
    ("covariance", "state of other sizes", lambda t: iada.ClassCovariance(CLASSES, WIDTH + 1)),
    ("covariance", "tuple", lambda t: (t,)),
    ("epsilon", "number", lambda t: 0.5),
    ("epsilon", "integer", lambda t: t.long()),
    ("epsilon", "2-d", lambda t: t[:, None]),
    ("epsilon", "nan", lambda t: put(t, 3, NAN)),
    ("epsilon", "inf", lambda t: put(t, 0, INF)),
    ("epsilon", "-inf", lambda t: put(t, -1, -INF)),
    ("epsilon", "inf and -inf", lambda t: put(put(t, 0, INF), 1, -INF)),
    ("log_prior", "list", lambda t: t.tolist()),
    ("log_prior", "integer", lambda t: t.long()),
    ("log_prior", "2-d", lambda t: t[None]),
]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [(name, spoil) for name, _, spoil in SPOILT_TENSORS],
    ids=[f"{name}: {fault}" for name, fault, _ in SPOILT_TENSORS],
)
def test_spoilt_tensors(name, spoil):
    problem = good()
    assert_refused(replace(problem, **{name: spoil(getattr(problem, name))}), name)


@pytest.mark.parametrize(("label_dtype", "ignore_index"), [(torch.int8, 255), (torch.uint8, -100)])
def test_an_ignore_index_the_labels_cannot_hold_ignores_nothing(label_dtype, ignore_index):
    """255 is −1 as an int8, but no row is ignored: the label is out of range."""
    problem = good(ignored=0.0).with_options(ignore_index=ignore_index)
    labels = problem.labels.to(label_dtype)
    labels[1] = torch.tensor(ignore_index).to(label_dtype)
    assert_refused(replace(problem, labels=labels), "labels")


SPOILT_OPTIONS = [
    ("alpha", torch.tensor(0.5)),
    ("alpha", torch.nn.Parameter(torch.tensor(0.5))),
    ("alpha", NAN),
    ("alpha", INF),
    ("alpha", None),
    ("alpha", "0.5"),
    ("alpha", True),
    ("alpha", 0.5j),
    ("beta", torch.tensor(1.0)),
    ("beta", -INF),
    ("beta", NAN),
    ("beta", None),
    ("ignore_index", 1.0),
    ("ignore_index", None),
    ("ignore_index", True),
    ("ignore_index", torch.tensor(3)),
    ("reduction", "avg"),
    ("reduction", None),
    ("reduction", "Mean"),
]


@pytest.mark.parametrize(("name", "value"), SPOILT_OPTIONS)
def test_spoilt_options(name, value):
    assert_refused(good(ignored=0.0).with_options(**{name: value}), name)


# Sizes ----------------------------------------------------------------------------------------

LENGTHS = [
    (name, dim)
    for name, dims in {**dict.fromkeys(TENSORS, 1), "labels": 1, "features": 2, "weight": 2}.items()
    for dim in range(dims)
] + [("covariance", 1), ("covariance", 2)]


@pytest.mark.parametrize("change", [-1, 1], ids=["shorter", "longer"])
@pytest.mark.parametrize(("name", "dim"), LENGTHS)
def test_a_tensor_that_does_not_fit_the_others(name, dim, change):
    """Of two tensors that disagree the later one is named, with the size that it should have."""
    problem = good(ignored=0.0)
    tensor = getattr(problem, name)
    index = torch.arange(tensor.shape[dim] + change) % tensor.shape[dim]
    resized = tensor.index_select(dim, index)
    blamed = {("features", 0): "labels", ("features", 1): "weight", ("weight", 0): "bias"}
    assert_refused(replace(problem, **{name: resized}), blamed.get((name, dim), name))


@pytest.mark.parametrize("name", [*TENSORS[1:], "labels"])
def test_tensors_on_two_devices(name):
    problem = good()
    moved = replace(problem, **{name: getattr(problem, name).to("meta")})
    assert "cpu" in assert_refused(moved, name)


# What the message says ------------------------------------------------------------------------


def test_the_message_says_which_label_is_wrong_and_where():
    problem = good()
    message = assert_refused(replace(problem, labels=put(problem.labels, 4, 77)), "labels")
    assert "77 at row 4" in message
    assert f"[0, {CLASSES})" in message
    assert "ignore_index" in message


def test_the_message_says_both_shapes():
    problem = good()
    message = assert_refused(replace(problem, bias=torch.zeros(9)), "bias")
    assert "(9,)" in message
    assert f"({CLASSES},)" in message


def test_the_message_says_where_epsilon_is_not_finite():
    problem = good()
    message = assert_refused(replace(problem, epsilon=put(problem.epsilon, 3, NAN)), "epsilon")
    assert "nan at index (3,)" in message


def test_the_message_lists_the_reductions():
    message = assert_refused(good().with_options(reduction="avg"), "reduction")
    assert all(repr(name) in message for name in ("none", "mean", "sum"))


# Backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["numpy", "", "Torch", 3])
def test_unknown_backends(name):
    message = complaint(fused(name), good())
    assert all(repr(known) in message for known in BACKENDS)
    found = MESSAGE.fullmatch(message)
    assert found, message
    assert found[1] == "backend"


@pytest.mark.parametrize("name", ["native", "triton"])
def test_absent_backends_fail_loudly(name):
    try:
        select_backend(name, torch.device("cpu"))
    except RuntimeError:
        with pytest.raises(RuntimeError, match=f"backend.*{name}.*backend=None"):
            fused(name)(good())
    else:
        pytest.skip(f"{name} serves this device")


def test_arguments_are_checked_before_the_backend_is_looked_for(backend):
    problem = good()
    assert_refused(replace(problem, bias=torch.zeros(9)), "bias", backend)


# What is allowed ------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [-1.0, 1.0, 1.5, -40.0])
def test_epsilon_may_be_large(epsilon):
    problem = good()
    problem = replace(problem, epsilon=torch.full((ROWS,), epsilon))
    for loss_of in (fused(None), eager):
        assert loss_of(problem).isfinite()


def test_finite_numbers_are_allowed_where_their_sum_is_not_finite():
    state = iada.ClassCovariance(CLASSES, WIDTH, dtype=torch.float64)
    state.update(torch.full((2, WIDTH), 1e308, dtype=torch.float64), torch.tensor([0, 1]))
    assert state.count.sum() == 2


@pytest.mark.parametrize(
    "options", [{"alpha": 1}, {"beta": 0}, {"alpha": -0.5}, {"ignore_index": 0}]
)
def test_options_that_are_allowed(options):
    problem = good().with_options(**{"ignore_index": -100} | options)
    problem = replace(problem, labels=problem.labels.clamp(min=0))
    assert fused(None)(problem).isfinite()
    assert eager(problem).isfinite()


def test_nothing_is_changed_by_a_refused_call():
    problem = good()
    problem = replace(problem, epsilon=put(problem.epsilon, 0, NAN))
    kept = [tensor.clone() for tensor in problem.tensors()]
    assert_refused(problem, "epsilon")
    for tensor, copy in zip(problem.tensors(), kept, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def test_the_module_refuses_a_bad_batch_before_it_streams_it():
    """Otherwise a caller who mends epsilon and calls again streams the batch twice."""
    problem = good()
    module = iada.IADALoss(CLASSES, WIDTH)
    call = (problem.features, problem.weight, problem.bias, problem.labels)
    with pytest.raises(ValueError, match="^epsilon: expected"):
        module(*call, put(problem.epsilon, 0, NAN))
    assert (module.covariance.count == 0).all()


BUILT_WITH = [
    ("class_weight", [1.0] * CLASSES),
    ("class_weight", torch.ones(CLASSES + 1)),
    ("class_weight", torch.ones(1, CLASSES)),
    ("class_weight", torch.ones(CLASSES, dtype=torch.int64)),
    ("class_weight", -torch.ones(CLASSES)),
    ("class_weight", torch.full((CLASSES,), NAN)),
    ("reduction", "avg"),
    ("ignore_index", None),
    ("alpha", NAN),
    ("alpha", torch.tensor(0.5)),
    ("beta", "1"),
    ("label_smoothing", 1.0),
]


def test_what_is_no_tensor_of_its_kind_is_told_what_to_pass():
    problem = good()
    head = torch.nn.Linear(WIDTH, CLASSES)
    hot = torch.nn.functional.one_hot(problem.labels.clamp(min=0), CLASSES)
    for changed, remedy in (
        ({"labels": hot}, r"labels\.argmax\(1\) of one-hot rows"),
        ({"labels": problem.labels[:, None]}, r"pass labels\.squeeze\(1\)$"),
        ({"labels": None}, "got None; look at where it is made"),
        ({"weight": head}, "got a Linear; pass its parameter: head.weight"),
    ):
        tensors = {n: getattr(problem, n) for n in ("features", "weight", "bias", "labels")}
        with pytest.raises(ValueError, match=remedy):
            iada.fused_loss(**tensors | changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shares_for_their_logarithms_are_refused(dtype):
    problem = good()
    for shares, refused in (
        (torch.tensor([0.75, 0.125, 0.125, 0.0]), True),
        (torch.tensor([0.5, 0.25, 0.5, -0.25]), False),
        (torch.tensor([4.0, 2.0, 1.0, 3.0]).log(), False),  # of counts: a constant more
        (torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), False),
    ):
        given = replace(problem, log_prior=shares.to(dtype))
        for loss_of in (fused(None), eager):
            if refused:
                assert complaint(loss_of, given).startswith("log_prior: expected log π (4,), got n")
            else:
                assert loss_of(given).isfinite()


def test_smoothing_beside_class_weights_is_refused_at_once():
    problem, weights = good(), torch.rand(CLASSES)
    both = {"class_weight": weights, "label_smoothing": 0.1}
    with pytest.raises(ValueError, match="^class_weight: expected None with label_smoothing"):
        iada.IADALoss(CLASSES, WIDTH, **both)
    rows = weights[problem.labels.clamp(min=0)]  # as the message says
    tensors = (problem.features, problem.weight, problem.bias, problem.labels)
    options = {"label_smoothing": 0.1, "ignore_index": problem.options["ignore_index"]}
    assert iada.fused_loss(*tensors, row_weight=rows, **options).isfinite()


@pytest.mark.parametrize(("name", "value"), BUILT_WITH)
def test_modules_are_not_built_with_what_their_calls_would_refuse(name, value):
    makers = [iada.IADALoss]
    if name not in ("class_weight", "label_smoothing"):
        makers.append(lambda *sizes, **options: iada.ShardedIADALoss(*sizes, None, **options))
    for make in makers:
        with pytest.raises(ValueError, match=rf"(?s)^{name}: expected .+, got .+; .+"):
            make(CLASSES, WIDTH, **{name: value})


@pytest.mark.parametrize("name", ["fused", "module"])
def test_what_is_no_row_of_features_is_named(name):
    problem, module = good(), iada.IADALoss(CLASSES, WIDTH)
    loss = {"fused": iada.fused_loss, "module": module}[name]
    head = problem.weight, problem.bias, problem.labels
    logits = problem.features @ problem.weight.T
    with pytest.raises(ValueError, match=r"^features: expected \(…, \d+\), .*the last layer, not"):
        loss(logits, *head)
    maps = problem.features[:, :, None, None].expand(-1, -1, 2, 2)
    with pytest.raises(ValueError, match=r"^features: expected a row for each .*mean\(\(2, 3\)\)"):
        loss(maps, *head)
    maps, places = (
        maps[..., :1].expand(-1, -1, 2, 3),
        torch.zeros(len(maps), 2, 3, dtype=torch.int64),
    )
    with pytest.raises(ValueError, match=r"channels first; pass features\.movedim\(1, -1\)$"):
        loss(maps, problem.weight, problem.bias, places)
    assert int(module.covariance.count.sum()) == 0


def test_a_validation_loss_in_training_mode_is_told_of_once(recwarn):
    problem, module = good(), iada.IADALoss(CLASSES, WIDTH)
    call = (problem.features, problem.weight, problem.bias, problem.labels)
    module(*call)
    with torch.no_grad():
        module.eval()(*call)
        assert not recwarn.list
        with pytest.warns(UserWarning, match="criterion.eval") as told:
            module.train()(*call)
        assert told[0].filename == __file__
        recwarn.clear()
        module(*call)
    assert not recwarn.list


@pytest.mark.parametrize("shrinkage", [0.0, 1.0])
@pytest.mark.parametrize("sizes", [(CLASSES + 1, WIDTH), (CLASSES, WIDTH - 1)])
def test_the_module_says_which_head_it_was_built_for(sizes, shrinkage):
    problem, module = good(), iada.IADALoss(*sizes, shrinkage=shrinkage)
    call = (problem.features, problem.weight, problem.bias, problem.labels)
    remedy = rf"IADALoss\(num_classes={CLASSES}, num_features={WIDTH}\)"
    for training in (True, False):
        with pytest.raises(ValueError, match=rf"^weight: expected a head \(.*; build .*{remedy}"):
            module.train(training)(*call)


@pytest.mark.parametrize(
    "counts",
    [
        [3, 2, 1],
        [3.0, -1.0, 2.0, 1.0],
        [NAN, 1, 1, 1],
        [[1, 2], [3, 4]],
        [INF, 1, 1, 1],
        [0.5, 0.25, 0.25, 0.0],
        [True, True, False, True],
        [3j, 1, 1, 1],
    ],
    ids=["short", "negative", "nan", "2-d", "inf", "shares", "bool", "complex"],
)
def test_class_counts(counts):
    for make in (
        lambda c: iada.log_class_prior(c, CLASSES),
        lambda c: iada.IADALoss(CLASSES, WIDTH, class_counts=c),
    ):
        with pytest.raises(ValueError, match=r"(?s)^class_counts: expected .+, got .+; .+"):
            make(torch.tensor(counts))


def test_a_class_without_samples_counts_as_one():
    prior = iada.log_class_prior(torch.tensor([8, 0, 7]))
    torch.testing.assert_close(prior.exp(), torch.tensor([8.0, 1.0, 7.0]) / 16)


def test_class_counts_may_be_whole_numbers_of_any_dtype():
    whole = iada.log_class_prior(torch.tensor([75, 25]))
    for dtype in (torch.uint8, torch.int32, torch.float16, torch.float64):
        counts = torch.tensor([75, 25], dtype=dtype)
        torch.testing.assert_close(iada.log_class_prior(counts), whole, rtol=0, atol=0)
    with pytest.raises(ValueError, match="multiply shares by N"):
        iada.log_class_prior(torch.tensor([0.75, 0.25]))
