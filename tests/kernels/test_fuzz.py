"""The fuzzer: a sample of its cases, and that it sees what it should.

All of them: `make fuzz`.
"""

import pytest
import torch

from iada.nn import arguments
from iada_kernels import torch_ops
from iada_kernels.torch_ops import loss as torch_loss
from tests.conftest import is_interpreted
from tests.fuzz.__main__ import main
from tests.fuzz.draw import COMPILED, Draw
from tests.fuzz.exact import exact_gradients, exact_hypergradient
from tests.fuzz.loss import fuzz_loss
from tests.fuzz.run import Case, circumstances, run_case
from tests.helpers.problems import (
    TENSORS,
    assert_same,
    random_problem,
    reference_loss,
    value_and_gradients,
)
from tests.kernels.test_hypergradient import by_reference, tangents_of

CPU = torch.device("cpu")


@pytest.mark.slow
def test_a_sample_of_the_cases(target):
    for number in range(20 if is_interpreted(target) else 150):
        case = run_case(1, number, *target)
        assert not case.failed, f"{case.kind} {number}: {case.worst}"


def test_a_sample_of_low_rank_cases():
    """Of any sizes, ranks, scales, dtypes and layouts: by torch operators alone."""
    for number in range(30):
        draw = Draw(1, number, COMPILED)
        with circumstances(draw, "torch", CPU):
            results = fuzz_loss(draw, "torch", CPU, ("low-rank",))
        case = Case(1, number, "loss", results)
        assert not case.failed, f"{number}: {case.worst}"


@pytest.mark.parametrize("structure", [None, "full", "diag"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_exact_result_is_the_definition(structure, reduction):
    """Where the definition loses no digits: in float64, on samples that are not confident."""
    problem = random_problem(20, 5, 6, structure=structure, reduction=reduction)
    wanted = [name for name in TENSORS if name in problem.floating()]
    assert_same(exact_gradients(problem, wanted, 1.0), value_and_gradients(reference_loss, problem))


@pytest.mark.parametrize("structure", [None, "full", "diag"])
def test_the_exact_hypergradient_is_the_definition(structure):
    problem = random_problem(20, 5, 6, structure=structure)
    tangents = tangents_of(problem)
    assert_same(exact_hypergradient(problem, tangents), by_reference(problem, tangents))


# Faults that are planted ---------------------------------------------------------------------


def changed_gradients(change):
    """A backward pass of the torch operators whose gradients `change` spoils."""
    backward = torch_ops.loss_backward

    def spoiled(inputs, options, saved, grad_loss, needs):
        gradients = backward(inputs, options, saved, grad_loss, needs)
        change(inputs, options, gradients)
        return gradients

    return torch_ops, "loss_backward", spoiled


def forget_alpha():
    def change(inputs, options, gradients):
        if gradients.covariance is not None and options.alpha:
            gradients.covariance /= options.alpha

    return changed_gradients(change)


def count_ignored_rows():
    def divisor(ignored, options):
        return None if options.reduction != "mean" else torch.tensor(max(1, len(ignored)))

    return torch_loss, "mean_divisor", divisor


def accumulate_in_half_precision():
    gradient = torch_loss._grad_weight

    def rounded(inputs, saved, residual):
        return gradient(inputs, saved, residual.half().to(residual.dtype))

    return torch_loss, "_grad_weight", rounded


def leave_a_row_unwritten():
    def change(inputs, options, gradients):
        if gradients.features is not None and len(gradients.features):
            written = torch.empty_like(gradients.features)
            written[:-1] = gradients.features[:-1]
            gradients.features = written

    return changed_gradients(change)


def change_an_argument():
    def change(inputs, options, gradients):
        with torch.no_grad():
            inputs.labels.copy_(inputs.labels.clone())

    return changed_gradients(change)


def forget_what_was_there():
    update = torch_ops.covariance_update

    def replaced(covariance, mean, count, features, labels):
        count.zero_()
        update(covariance, mean, count, features, labels)

    return torch_ops, "covariance_update", replaced


def forget_how_features_move():
    passes = torch_ops.hypergradient

    def shortened(inputs, options, tangents, needs_covariance):
        return passes(inputs, options, type(tangents)(None, tangents.weight, tangents.bias), True)

    return torch_ops, "hypergradient", shortened


def forget_ignored_rows_have_no_weight():
    def weights(inputs, options, extras):
        weight = torch.ones(len(inputs.labels), dtype=inputs.compute_dtype)
        return weight if extras.row_weight is None else weight * extras.row_weight

    return arguments, "_row_weights", weights


FAULTS = (
    forget_alpha,
    count_ignored_rows,
    accumulate_in_half_precision,
    leave_a_row_unwritten,
    change_an_argument,
    forget_what_was_there,
    forget_how_features_move,
    forget_ignored_rows_have_no_weight,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(fault, monkeypatch):
    monkeypatch.setattr(*fault())
    failing = (n for n in range(200) if run_case(0, n, "torch", CPU).failed)
    number = next(failing, None)
    assert number is not None
    assert run_case(0, number, "torch", CPU).failed  # again, alone
    monkeypatch.undo()
    assert not run_case(0, number, "torch", CPU).failed


def test_the_command_tells_how_to_repeat_a_failure(monkeypatch, capsys, tmp_path):
    command = ["--backend", "torch", "--seed", "0"]
    path = tmp_path / "results.json"
    assert main([*command, "--cases", "2", "--json", str(path)]) == 0
    assert '"failed": 0' in path.read_text()
    monkeypatch.setattr(*count_ignored_rows())
    capsys.readouterr()
    assert main([*command, "--cases", "60"]) == 1
    lines = capsys.readouterr().out.splitlines()
    repeat = next(line for line in lines if "--case " in line).split()[3:]
    assert repeat[0] == "--backend"
    assert main(repeat) == 1
    monkeypatch.undo()
    assert main(repeat) == 0


def test_sizes_are_drawn_to_the_limit():
    from tests.fuzz.draw import COMPILED, Draw

    drawn = [Draw(0, number, COMPILED).shape() for number in range(2000)]
    assert {0, 1, 2} <= {rows for rows, _, _ in drawn}
    for axis, largest in enumerate((COMPILED.rows, COMPILED.classes, COMPILED.width)):
        sizes = [shape[axis] for shape in drawn]
        assert min(sizes) <= 1
        assert max(sizes) >= 0.9 * largest
