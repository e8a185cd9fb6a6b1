"""The fast tests notice planted faults: each fault is put into a copy of the project, and the tests
that it names must fail there.

Each old text must be in its file exactly once. A fault that no test notices is a missing test."""

import json
import subprocess
import sys
from typing import NamedTuple

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


class Fault(NamedTuple):
    """file, from the root; old: a text that is in it once; new: what takes its place; tests: their
    ids, of which at least one must fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


UPDATE = "tests/test_model_utils.py::test_ep_update_of_tied_weights_is_the_gradient_of_phi"
STEP = "tests/test_model_utils.py::test_steps_are_the_gradient_of_phi"
RESUMED = "tests/experiment/runs/test_resume.py::test_two_and_two_epochs_are_four"

FAULTS = {
    "the EP update has the other sign": Fault(
        "model_utils.py",
        "1.0 / ((beta_1 - beta_2) * len(x))",
        "1.0 / ((beta_2 - beta_1) * len(x))",
        (UPDATE,),
    ),
    "the third phase is nudged to the same side": Fault(
        "energy/fast.py",
        "beta[len(phase.drive) :] *= -1",
        "beta[len(phase.drive) :] *= 1",
        ("tests/energy/test_dynamics.py::test_two_nudged_phases_in_one_batch",),
    ),
    "a step has no top-down input": Fault(
        "energy/dynamics.py",
        "drives[n - 1] = connection.down(neurons[n], route, drives[n - 1])",
        "connection.down(neurons[n], route, drives[n - 1])",
        (STEP,),
    ),
    "the smallest entry of a window wins the max-pooling": Fault(
        "energy/poolings.py",
        "        post, index = F.max_pool2d(u, 2, 2, return_indices=True)  # (mbs, C, h, w)\n",
        "        post, index = F.max_pool2d(u, 2, 2, return_indices=True)\n"
        "        index = F.max_pool2d(-u, 2, 2, return_indices=True)[1]\n",
        (STEP,),
    ),
    "BPTT goes through a step less": Fault(
        "model_utils.py",
        "neurons, rule.T2, output_in=0)",
        "neurons, rule.T2 - 1, output_in=0)",
        ("tests/test_model_utils.py::test_bptt_is_the_second_derivative",),
    ),
    "the nudged phase has another dropout mask": Fault(
        "model_utils.py",
        "        nudge = stepping.phase(drive, y, beta_2, rule.loss)\n",
        "        nudge = stepping.phase(drive, y, beta_2, rule.loss)\n"
        "        others = [m if m is None else m.flip(0) for m in masks or ()]\n"
        "        chain = stepping.chain(rule.loss, others or None)\n",
        (
            "tests/test_learning_rules.py::"
            "test_one_mask_serves_all_phases_of_a_batch_and_evaluation_draws_none",
        ),
    ),
    "the random sign is always the same": Fault(
        "experiment/training.py",
        "if rule.random_sign and torch.rand(()) < 0.5:",
        "if rule.random_sign and torch.rand(()) < 2:",
        ("tests/test_model_utils.py::test_a_random_sign_of_beta_is_drawn_for_each_mini_batch",),
    ),
    "an image that the last step stopped counts as converged": Fault(
        "energy/dynamics.py",
        "            converged[batch.images] |= now\n",
        "            converged[batch.images] |= now | (done == T)\n",
        ("tests/energy/test_dynamics.py::test_an_image_that_has_settled_is_as_of_its_last_step",),
    ),
    "images are not divided by their deviation": Fault(
        "data_utils.py",
        "return (images - self.mean) / self.std",
        "return images - self.mean",
        ("tests/test_data_utils.py::test_cifar_files_and_normalisation",),
    ),
    "the last mini-batch is dropped": Fault(
        "data_utils.py",
        "for chosen in order.to(self.labels.device).split(self.mbs):",
        "for chosen in order.to(self.labels.device).split(self.mbs)[: n // self.mbs]:",
        ("tests/test_data_utils.py::test_batches_cover_an_epoch_and_repeat_with_the_seed",),
    ),
    "the seed is ignored": Fault(
        "experiment/devices.py",
        "    torch.manual_seed(seed)\n",
        "    torch.seed()\n",
        ("tests/test_main.py::test_the_same_seed_gives_the_same_run",),
    ),
    "a resumed training has a new optimizer": Fault(
        "experiment/runs/checkpoint.py",
        "        optimizer.load_state_dict(moments)\n",
        "        pass\n",
        (f"{RESUMED}[MLP BPTT Adam]",),
    ),
    "a resumed training has other random numbers": Fault(
        "experiment/runs/checkpoint.py",
        "        training_state.restore_random_states(saved.random_states, generator)\n",
        "        pass\n",
        (f"{RESUMED}[CNN EP random sign Adam]",),
    ),
    "adversarial examples of a training leave the ball": Fault(
        "metrics.py",
        "        delta = delta.clamp(-eps, eps)\n",
        "        pass\n",
        (
            "tests/ART_Timesteps_Addition/test_pgd.py::"
            "test_every_model_and_rule_trains_on_attacked_images[MLP by CEP]",
        ),
    ),
    "the margin has the other sign": Fault(
        "metrics.py",
        "margin = own - others.max(1)",
        "margin = others.max(1) - own",
        (
            "tests/ART_Timesteps_Addition/test_attack_counts.py::"
            "test_a_margin_is_the_lead_of_the_own_class_over_the_best_other_one",
        ),
    ),
    "the interval is not Wilson's": Fault(
        "metrics.py",
        'proportion_ci(method="wilson")',
        'proportion_ci(method="exact")',
        ("tests/ART_Timesteps_Addition/audit/test_audit.py::test_wilson",),
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs tests with a fault in the copy, or without: (exit code of pytest, output)."""
    folder = tmp_path_factory.mktemp("mutations") / "copy"
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests/mutate.py", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def send(tests, file=None, old=None, new=None):
        process.stdin.write(json.dumps([file, old, new, tests]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield send
    process.stdin.close()
    process.wait()


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(run, name):
    fault = FAULTS[name]
    found = (ROOT / fault.file).read_text().count(fault.old)
    assert found == 1, f"{fault.file} has the text {found} times: {fault.old!r}"
    code, output = run(fault.tests, fault.file, fault.old, fault.new)
    assert code != pytest.ExitCode.OK, f"no test notices it: {fault.tests}"
    assert code == pytest.ExitCode.TESTS_FAILED, output


def test_without_a_fault_the_same_tests_pass(run):
    tests = dict.fromkeys(test for fault in FAULTS.values() for test in fault.tests)
    code, output = run(list(tests))
    assert code == pytest.ExitCode.OK, output
