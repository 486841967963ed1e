"""Threads and processes on one guard, one network, or overlapping networks."""

import multiprocessing
import os
import pickle
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import nn

from sklearn_backdoor import BackdoorGuard, IBDPSCDetector, VictimNetwork
from sklearn_backdoor._exclusive import evaluation_mode, exclusive, snapshot
from sklearn_backdoor._fingerprint import fingerprint
from tests.common import LinearNetwork, corner_trigger, linear_images

N_THREADS, N_PROCESSES = 8, 4


class Convolutional(nn.Module):
    """Batch norm and dropout: another mode gives other answers, and is altered."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
        )
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(128, 6)

    def forward(self, images):
        return self.last(self.dropout(self.body(images)))


class Wrapper(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images)


def trained_network():
    """Return a network in training mode, but for one module."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Convolutional().train()
        network.body[0].eval()
    return network


def state_of(network):
    return (
        fingerprint(network),
        [module.training for module in network.modules()],
        [len(module._forward_hooks) for module in network.modules()],
    )


def images(n=600):
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1)).numpy()


def make_guard(network):
    victim = VictimNetwork(network, batch_size=32)
    return BackdoorGuard(victim, corner_trigger(), target_class=2).fit(*linear_images())


def answers(guard, X):
    return guard.predict(X), guard.trigger_score(X), guard.predict_proba(X)


def assert_equal(one, other):
    for expected, found in zip(one, other, strict=True):
        np.testing.assert_array_equal(found, expected)


def one_thread():
    torch.set_num_threads(1)
    threadpool_limits(1)


@pytest.fixture(autouse=True)
def as_many_threads_as_a_worker():
    """Sums are rounded by how many threads they are split into."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture
def switching():
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_eight_threads_on_one_guard_equal_the_serial_result(switching):
    network = trained_network()
    before = state_of(network)
    guard, X = make_guard(network), images()
    serial = answers(guard, X)
    with ThreadPoolExecutor(N_THREADS) as pool:
        for found in pool.map(lambda _: answers(guard, X), range(2 * N_THREADS)):
            assert_equal(serial, found)
    assert state_of(network) == before


@pytest.mark.parametrize("method", ["spawn", "loky"])
def test_four_processes_on_one_guard_equal_the_serial_result(method):
    network = trained_network()
    guard, X = make_guard(network), images()
    serial = answers(guard, X)
    if method == "loky":
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            parallel = joblib.Parallel(N_PROCESSES)
            results = parallel(joblib.delayed(answers)(guard, X) for _ in range(4))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(N_PROCESSES, context, one_thread) as pool:
            results = list(pool.map(answers, [guard] * 4, [X] * 4))
    assert len(results) == 4
    for found in results:
        assert_equal(serial, found)


@pytest.mark.filterwarnings("ignore:amplifying fewer than all")
def test_searches_hooks_and_predictions_share_a_network(switching):
    """A detector that swaps parameters, gradients, and skorch's own predict as well."""
    network = trained_network()
    before = state_of(network)
    guard, X = make_guard(network), images(64)
    detector = IBDPSCDetector(guard.victim, scale=3.0).fit(*linear_images())

    def gradient(_):
        with guard.victim_.differentiable() as logits:
            part = torch.from_numpy(X).requires_grad_()
            return torch.autograd.grad(logits(part).sum(), part)[0].numpy()

    calls = [
        lambda _: guard.predict_proba(X),
        lambda _: detector.trigger_score(X),
        gradient,
        lambda _: guard.victim_.net_.predict_proba(X),
        lambda _: fingerprint(snapshot(network, network)[0]),
    ]
    serial = [call(None) for call in calls]
    with ThreadPoolExecutor(N_THREADS) as pool:
        futures = [pool.submit(call, None) for _ in range(20) for call in calls]
        found = [future.result() for future in futures]
    for position, result in enumerate(found):
        np.testing.assert_array_equal(result, serial[position % len(calls)])
    assert state_of(network) == before


def test_networks_that_share_a_part_take_turns(switching):
    network = trained_network()
    body = nn.Sequential(*network.body, nn.Linear(128, 6))
    ensemble = Wrapper(nn.ModuleList([network, body]))
    ensemble.forward = lambda x: network(x) + body(x)
    before = [state_of(part) for part in (network, body, ensemble)]
    X = images(200)
    victims = [
        VictimNetwork(net, batch_size=16, feature_layer=layer).fit(X)
        for net, layer in (
            (network, None),
            (body, None),
            (Wrapper(network), None),
            (ensemble, "network.0.dropout"),
        )
    ]
    serial = [victim.decision_function(X) for victim in victims]
    with ThreadPoolExecutor(N_THREADS) as pool:
        jobs = [(i, pool.submit(victims[i].decision_function, X)) for i in range(4)]
        jobs += [(i, pool.submit(victims[i].decision_function, X)) for i in range(4)]
        for i, job in jobs:
            np.testing.assert_array_equal(job.result(), serial[i])
    assert [state_of(part) for part in (network, body, ensemble)] == before


def test_overlapping_networks_in_any_order_do_not_deadlock(switching):
    parts = [nn.Linear(2, 2) for _ in range(4)]
    for part in parts:
        with exclusive(part):  # a lock of its own
            pass
    pairs = [nn.Sequential(parts[i], parts[j]) for i in range(4) for j in range(4)]

    def enter(pair):
        for _ in range(50):
            with evaluation_mode(pair):
                assert not any(module.training for module in pair.modules())

    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(enter, pairs))
    assert all(part.training for part in parts)


def holding(network, until):
    """Start a thread that is in the middle of a pass until told otherwise."""
    entered = threading.Event()

    def hold():
        with evaluation_mode(network):
            handle = network.last.register_forward_hook(lambda *_: None)
            entered.set()
            until.wait(30)
            handle.remove()

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(30)
    return thread


def test_a_pickle_during_a_pass_waits_and_holds_no_hook():
    network = trained_network()
    guard, X = make_guard(network), images(50)
    before, serial = state_of(network), answers(guard, X)
    until = threading.Event()
    thread = holding(network, until)
    timer = threading.Timer(0.2, until.set)
    timer.start()
    again = pickle.loads(pickle.dumps(guard))
    thread.join()
    timer.join()
    assert state_of(again.victim_.network_) == before
    assert again.victim_.net is again.victim_.network_
    assert_equal(serial, answers(again, X))


def test_locks_are_outside_pickles_and_hashes():
    network = trained_network()
    victim = VictimNetwork(network).fit(images(5))
    pickles = pickle.dumps(victim), fingerprint(network)
    attributes = [set(vars(module)) for module in network.modules()]
    victim.predict(images(5))
    assert (pickle.dumps(victim), fingerprint(network)) == pickles
    assert [set(vars(module)) for module in network.modules()] == attributes


def test_a_snapshot_shares_the_weights_alone():
    network = trained_network()
    (twin,) = snapshot(network, network)
    assert twin is not network and twin.last.weight is network.last.weight
    assert [m.training for m in twin.modules()] == state_of(network)[1]
    twin.eval()
    assert network.training


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_fork_during_another_threads_pass_finds_the_network_in_order():
    network = trained_network()
    guard, X = make_guard(network), images(50)
    before, serial = state_of(network), answers(guard, X)
    until = threading.Event()
    thread = holding(network, until)
    child = os.fork()
    if child == 0:  # never let pytest go on in here
        status = 1
        try:
            assert state_of(network) == before
            assert_equal(serial, answers(guard, X))
            assert state_of(network) == before
            status = 0
        finally:
            os._exit(status)
    deadline = threading.Timer(60, os.kill, (child, 9))
    deadline.start()
    _, status = os.waitpid(child, 0)
    deadline.cancel()
    until.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    assert state_of(network) == before


def test_a_fork_in_the_middle_of_its_own_pass_can_go_on():
    network = LinearNetwork().train()
    with evaluation_mode(network):
        child = os.fork()
        if child == 0:
            os._exit(int(network.training or network.last.training))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert network.training
