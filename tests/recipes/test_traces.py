"""The behaviour of sparseml 1.8.0, as recorded."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_ft import Recipe, SparseSession

# Cases in which the exact semantics differ, and the fault of SparseML that they do not have.
DRIFT = "updates late or left out by float drift"
FAULTS = {
    "gmp_cubic_f0.5_spe7": DRIFT,
    "gmp_cubic_f0.25_spe10": DRIFT,
    "gmp_linear_f0.25_spe7": DRIFT,
    "gmp_linear_f0.1_spe10": DRIFT,
    "gmp_inverse_cubic_f0.25_spe10": DRIFT,
    "gmp_inverse_cubic_f0.5_spe7": "inverse_cubic beyond its end",
    "gmp_inverse_cubic_f0.1_spe7": "inverse_cubic beyond its end",
    "gmp_leave_disabled": "the mask is dropped before the optimizer's step",
    "gmp_start_minus1": "a start at once counts from epoch -1",
}


@pytest.fixture(scope="module")
def cases(compat_folder):
    return json.loads((compat_folder / "sparseml_traces.json").read_text())["cases"]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(40, 50)
        self.fc2 = nn.Linear(50, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def run(case, compat):
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    per_epoch, total = case["steps_per_epoch"], case["epochs"] * case["steps_per_epoch"]
    torch.manual_seed(1)
    inputs, labels = torch.randn(8 * per_epoch, 40), torch.randint(0, 4, (8 * per_epoch,))
    session = SparseSession(model, case["recipe"], optimizer, per_epoch, compat=compat, total_steps=total)
    trace = []
    for step in range(total):
        rows = slice(8 * (step % per_epoch), 8 * (step % per_epoch) + 8)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        watched = [model.get_parameter(name) for name in case.get("watch", ["fc1.weight"])]
        zeros = [round(float((weight == 0).double().mean()), 5) for weight in watched]
        trace.append([*zeros, optimizer.param_groups[0]["lr"]])
    return trace


def test_there_are_all_cases(cases):
    assert len(cases) == 42


@pytest.mark.parametrize("index", range(42))
def test_compat_is_exact(cases, index):
    case = cases[index]
    if "error" in case:
        kind, _, message = case["error"].partition(": ")
        with pytest.raises(Exception) as caught:
            run(case, "sparseml")
        assert (type(caught.value).__name__, str(caught.value)) == (kind, message)
    else:
        assert run(case, "sparseml") == case["trace"]


def test_exact_semantics_differ_by_faults_only(cases):
    different = {}
    for case in cases:
        trace = run(case, None)
        same = "trace" in case and all(
            ours == pytest.approx(theirs, rel=1e-12) for ours, theirs in zip(trace, case["trace"], strict=True)
        )
        if not same:
            different[case["name"]] = trace
    assert different.keys() == FAULTS.keys()
    for name, trace in different.items():
        final = trace[-1][0]
        assert final == (0.8 if name != "gmp_leave_disabled" else pytest.approx(0.0, abs=0.01)), name


def test_a_mask_that_is_not_left_enabled_stands_for_its_last_step(cases):
    case = next(case for case in cases if case["name"] == "gmp_leave_disabled")
    trace = run(case, None)
    assert trace[10][0] == 0.8
    assert trace[12][0] < 0.05


def test_compat_is_part_of_the_recipe(cases):
    recipe = Recipe.load(cases[0]["recipe"], compat="sparseml")
    assert run(cases[0] | {"recipe": recipe}, None) == cases[0]["trace"]
