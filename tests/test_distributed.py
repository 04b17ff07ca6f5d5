"""Several processes make the steps of one. Here two of them wait for work; `make stress` gives them every variant."""

import multiprocessing
import os
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from test_parity import NAMES, made, tokens

from sae_lib import Batch
from sae_lib.distributed import mine
from sae_lib.train import adam, measured, one_step

STRESS = bool(os.environ.get("SAE_LIB_STRESS"))
VARIANTS = NAMES if STRESS else ["batchtopk", "jumprelu"]
PATIENCE = 120
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
        batch = mine(Batch(tokens(size, dtype=dtype, seed=step)))
        loss = one_step(sae, optimiser, batch, 1.0, step / len(sizes))
        rows.append({key: float(value) for key, value in measured(sae, batch, loss).items()})
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


@pytest.mark.parametrize("name", VARIANTS)
def test_fifty_steps_of_two_processes_are_those_of_one(team, name):
    sizes = [97] * 24 + [1] + [96] * 24 + [3]  # of one token, a process has none
    assert_same_steps(team, 1e-9, name, torch.float64, sizes)
