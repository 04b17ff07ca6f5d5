"""Several processes make the steps of one. Here two of them wait for work; `make stress` gives them every variant.

As a script, this file is a process that torchrun starts, and that may be killed.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from dense import given
from safetensors.torch import load_file
from test_checkpoint import D_IN, activations
from test_parity import D_SAE, NAMES, made, tokens

from sae_lib import Batch, TopKSAE, train
from sae_lib.distributed import (
    add_gradients,
    agree,
    anywhere,
    count,
    first_alone,
    gathered,
    greatest,
    largest,
    launched,
    least,
    mine,
    per_token,
    rank,
)
from sae_lib.sae import spread
from sae_lib.selection import top_of_columns
from sae_lib.sparse import DenseCode
from sae_lib.train import adam, measured, one_step

STRESS = bool(os.environ.get("SAE_LIB_STRESS"))
VARIANTS = NAMES if STRESS else ["batchtopk", "jumprelu", "gradient, others", "topk, embedding"]
PATIENCE = 300
"""Seconds until a test gives a process up."""


class Team:
    """Two processes that do what they are asked."""

    def __init__(self, folder):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.members = [], []
        for number in range(2):
            pipe, end = context.Pipe()
            self.pipes.append(pipe)
            self.members.append(context.Process(target=serve, args=(number, f"{folder}/meeting", end), daemon=True))
            self.members[-1].start()

    def __call__(self, work, *arguments):
        """What each process returns from `work(*arguments)`; an exception is returned too."""
        for pipe in self.pipes:
            pipe.send((work, arguments))
        results = []
        for pipe in self.pipes:
            assert pipe.poll(PATIENCE), "no answer"
            results.append(pipe.recv())
        return results


def serve(number, meeting, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=2)
    with suppress(EOFError):
        while True:
            work, arguments = pipe.recv()
            try:
                pipe.send(work(*arguments))
            except BaseException as error:
                pipe.send(type(error)(str(error)))


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    team = Team(tmp_path_factory.mktemp("team"))
    yield team
    for pipe, member in zip(team.pipes, team.members, strict=True):
        pipe.close()
        member.kill()


# The same steps -------------------------------------------------------------------------------------------------------


def stepped(name, dtype, sizes, dead=20):
    """A variant's state after a step on a batch of each size, and what was measured on the way."""
    sae = made(name, dtype=dtype, dead=dead)
    optimiser = adam(sae, 10_000)
    rows = []
    for step, size in enumerate(sizes):
        batch = mine(given(tokens(size, dtype=dtype, seed=step)))
        loss = one_step(sae, optimiser, batch, 1.0, step / len(sizes))
        rows.append({key: float(value) for key, value in measured(sae, batch, loss, spread(batch.x)).items()})
    return {key: value.detach().numpy() for key, value in sae.state_dict().items()}, rows


def assert_same_steps(team, tolerance, name, *arguments):
    state, rows = stepped(name, *arguments)
    (first, first_rows), (second, second_rows) = team(stepped, name, *arguments)
    assert first_rows == second_rows
    for key, ours in first.items():
        ours, value = torch.tensor(ours), torch.tensor(state[key])
        assert torch.equal(ours, torch.tensor(second[key])), key
        if value.is_floating_point():
            assert (ours - value).norm() <= tolerance * value.norm(), key
        else:
            assert torch.equal(ours, value), key
    for row, expected in zip(first_rows, rows, strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance * 1e-3)
    return rows


@pytest.mark.parametrize("name", VARIANTS)
def test_one_step_of_two_processes_is_that_of_one(team, name):
    rows = assert_same_steps(team, 1e-5, name, torch.float32, [97])  # 49 and 48 tokens
    assert "aux" not in rows[0] or rows[0]["aux"] > 0


@pytest.mark.parametrize("name", [*VARIANTS, "equivariant, random pose"])
def test_fifty_steps_of_two_processes_are_those_of_one(team, name):
    sizes = [97] * 24 + [1] + [96] * 24 + [3]  # of one token, a process has none
    assert_same_steps(team, 1e-9, name, torch.float64, sizes)


# The whole batch ------------------------------------------------------------------------------------------------------


def chosen(values, most):
    """What this process keeps of its half of some values."""
    own = torch.tensor(values).tensor_split(2)[rank()]
    return sorted(own[largest(own, most)].tolist())


@pytest.mark.parametrize(
    ("values", "most", "kept"),
    [
        ([5.0, 1.0, 4.0, 2.0, 3.0], 3, [[4.0, 5.0], [3.0]]),
        ([5.0, 4.0, 3.0, 2.0, 1.0], 2, [[4.0, 5.0], []]),
        ([1.0, 2.0], 5, [[1.0], [2.0]]),
        ([7.0], 1, [[7.0], []]),
    ],
    ids=str,
)
def test_the_largest_are_those_of_all_processes(team, values, most, kept):
    assert team(chosen, values, most) == kept


def test_of_equal_values_no_more_are_kept_than_asked_for(team):
    first, second = team(chosen, [2.0] * 9, 4)
    assert len(first) + len(second) == 4


def selected(dense):
    """Living pairs, in this process, of tokens that are all the same."""
    sae = made("batchtopk", k=100 if dense else 3)
    code = sae.loss(mine(Batch(tokens(1).expand(31, -1)))).code
    return len(code.cols), isinstance(code, DenseCode)


@pytest.mark.parametrize("dense", [False, True])
def test_a_batch_of_equal_tokens_has_exactly_k_times_as_many_living_pairs(team, dense):
    (first, kind), (second, other) = team(selected, dense)
    assert first + second == 31 * (100 if dense else 3)
    assert kind == other == dense


def columns(dense, n):
    """The pairs that this process keeps of budgets over the whole batch, as (token, latent), and the budgets."""
    x = tokens(n, torch.float64)
    own = mine(Batch(torch.arange(n)[:, None])).x[:, 0]
    scores = made("topk", dtype=torch.float64).scores(x[own])
    counts = torch.arange(D_SAE) % (20 if dense else 4)
    code = top_of_columns(scores, counts)
    assert isinstance(code, DenseCode) == (dense or n == 1)
    return list(zip(own[code.rows].tolist(), code.cols.tolist(), strict=True))


@pytest.mark.parametrize(("dense", "n"), [(False, 97), (True, 97), (False, 1)])
def test_budgets_of_latents_are_over_the_whole_batch(team, dense, n):
    first, second = team(columns, dense, n)
    assert sorted(first + second) == sorted(columns(dense, n))
    assert n == 1 or (first and second)


def reduced_values():
    """This process's number is 0 or 1; what all have together."""
    own = rank()
    return (
        count(own + 1),
        greatest(own),
        anywhere(torch.tensor([own == 0, own == 1, False])).tolist(),
        least(torch.tensor([1.0 + own, 4.0 - own])).tolist(),
        [part.tolist() for part in gathered(torch.full((own + 1, 2), own, dtype=torch.bfloat16))],
        agree([torch.ones(3), torch.tensor(7)]),
        agree([torch.ones(3), torch.tensor(7 + own)]),
    )


def test_reductions_by_hand(team):
    expected = 3, 1, [True, True, False], [1.0, 3.0], [[[0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]], True, False
    assert team(reduced_values) == [expected, expected]


def shares():
    """A loss that is the square of a total, and this process's gradient of it."""
    x = torch.tensor([1.0, 2.0, 3.0]).tensor_split(2)[rank()].requires_grad_()
    loss = (per_token(x.sum(), len(x)) - 1).square()
    loss.backward()
    weight = torch.nn.Parameter(torch.zeros(2, 3).T)
    weight.grad = torch.full((2, 3), 1.0 + rank()).T
    add_gradients([weight, torch.nn.Parameter(torch.zeros(1))])
    return loss.item(), x.grad.tolist(), weight.grad.tolist()


def test_a_loss_is_that_of_the_whole_batch_and_its_gradient_that_of_the_own_tokens(team):
    loss = pytest.approx(1.0)  # the mean is 2
    slope = pytest.approx(2 / 3)  # 2 (2 - 1), and a token is a third of the mean
    summed = [[3.0, 3.0]] * 3
    assert team(shares) == [(loss, [slope, slope], summed), (loss, [slope], summed)]


def work_alone(folder):
    first_alone((folder / str(rank())).touch)


def fail_alone(number):
    if rank() == number:
        raise ValueError("no room")


def test_the_first_works_alone_and_if_it_fails_all_do(team, tmp_path):
    assert team(work_alone, tmp_path) == [None, None]
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    first, second = team(first_alone, fail_alone, 0)
    assert str(first) == "no room"
    assert str(second) == "process 0 failed: its error says why"
    assert team(first_alone, fail_alone, 1) == [None, None]


# Runs -----------------------------------------------------------------------------------------------------------------


class Stopping(TopKSAE):
    """Sends a signal to its own process after some tokens, if that process has a certain number."""

    moment: tuple[int, int, int] | None = None

    def after_step(self, batch, code):
        super().after_step(batch, code)
        if self.moment and (rank(), int(self.tokens_trained)) == self.moment[:2]:
            os.kill(os.getpid(), self.moment[2])


def run(folder=None, moment=None, learning_rate=None, apart=None):
    """Train on one layer's outputs; how far it came, and the weights."""
    sae = Stopping(D_IN, 12, 3, seed=rank() if apart == "weights" else 0)
    sae.moment, sae.learning_rate = moment, learning_rate
    stream = activations(1500, batch_size=33, buffer_size=300)
    if rank() and apart == "generator":
        torch.rand(1, generator=sae.generator)
    if apart == "data":
        stream = [(1 + rank()) * batch.x for batch in stream]
    made = train(sae, stream, 1200, checkpoint=folder, checkpoint_every=300)
    return made.tokens, {key: value.numpy() for key, value in made.saes[0].state_dict().items()}


def read():
    """All batches of a stream, and how many inputs this process ran."""
    stream = activations(1800, batch_size=64, buffer_size=300)
    inputs = []
    stream.model.register_forward_pre_hook(lambda _, x: inputs.append(len(x[0])))
    return [batch.x.numpy() for batch in stream], sum(inputs)


def cached(folder):
    activations(100).cache(folder)


def test_a_cache_is_written_by_one_process_alone(team, tmp_path):
    for error in team(cached, tmp_path):
        assert str(error) == "a cache must be written by one process, got 2; write it first, then all read it"
    assert list(tmp_path.iterdir()) == []
    cached(tmp_path)
    assert team(cached, tmp_path) == [None, None]


def test_processes_share_the_forward_passes_and_see_the_same_batches(team):
    batches, inputs = read()
    for ours, own in team(read):
        assert len(ours) == len(batches) == 29
        assert all((x == y).all() for x, y in zip(ours, batches, strict=True))
        assert own == pytest.approx(inputs / 2, abs=256)


@pytest.fixture(scope="module")
def unbroken():
    """The weights of a run in one process."""
    return run()[1]


def distance(state, expected):
    """The largest difference of a tensor from what is expected, relative to its norm."""
    pairs = [(torch.as_tensor(state[key]).double(), torch.as_tensor(value).double()) for key, value in expected.items()]
    return max(float((ours - value).norm() / value.norm().clamp(min=1e-30)) for ours, value in pairs)


def test_two_processes_train_as_one_does(team, unbroken):
    (tokens, state), (_, other) = team(run)
    assert tokens == 1200
    assert distance(state, unbroken) < 1e-5
    assert distance(other, state) == 0


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_one_goes_on(team, unbroken, tmp_path):
    stops = team(run, tmp_path, (1, 20 * 33, signal.SIGINT))
    assert [type(stop) for stop in stops] == [KeyboardInterrupt] * 2
    assert f"{tmp_path} still holds a whole checkpoint, after 660 tokens" in str(stops[0])
    assert str(stops[0]) == str(stops[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{330:015d}", f"{660:015d}"]
    assert distance(run(tmp_path)[1], unbroken) < 1e-5


def test_what_one_process_began_two_finish(team, unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, (0, 20 * 33, signal.SIGINT))
    (_, state), (_, other) = team(run, tmp_path)
    assert distance(state, unbroken) < 1e-5
    assert distance(other, state) == 0
    finished = team(run, tmp_path)  # it returns at once what it made
    assert [distance(end, state) for _, end in finished] == [0, 0]


@pytest.mark.parametrize("apart", ["weights", "generator", "data"])
def test_processes_that_hold_different_things_are_told_so(team, apart):
    for error in team(run, None, None, None, apart):
        assert isinstance(error, ValueError)
        assert "all processes must train the same SAEs on the same stream" in str(error)


def test_a_loss_that_is_no_number_stops_all_processes(team):
    first, second = team(run, None, None, 1e30)
    assert "the loss must stay finite" in str(first)
    assert str(first) == str(second)


def launch(processes, *command):
    """Run a script or module in processes that torchrun starts."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.run([*torchrun, *map(str, command)], capture_output=True, text=True, timeout=2 * PATIENCE)


def test_a_process_that_is_killed_ends_the_run_which_goes_on_in_one_or_in_three(unbroken, tmp_path):
    killed = launch(2, __file__, tmp_path / "run", 20 * 33)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [f"{330:015d}"]
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert distance(run(tmp_path / "run")[1], unbroken) < 1e-5
    if STRESS:
        assert launch(3, __file__, tmp_path / "other").returncode == 0
        assert distance(run(tmp_path / "other")[1], unbroken) < 1e-5  # returns what they made


@pytest.mark.skipif(not STRESS, reason="make stress")
def test_the_command_line_trains_in_two_processes(tmp_path):
    command = "-m sae_lib train --variant topk --d-sae 64 --k 4 --tokens 5000 --batch-size 501 --out".split()
    assert launch(1, *command, tmp_path / "one").returncode == 0
    two = launch(2, *command, tmp_path / "two")
    assert two.returncode == 0
    assert two.stdout.count("0-topk") == 1  # of the first process alone
    ours, expected = (load_file(tmp_path / run / "0-topk/weights.safetensors") for run in ("two", "one"))
    assert distance(ours, expected) < 1e-5


if __name__ == "__main__":
    with launched():
        folder, *killed = sys.argv[1:]
        run(folder, (1, int(killed[0]), signal.SIGKILL) if killed else None)
