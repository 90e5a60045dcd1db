"""The place of a process: from its options, from SLURM, or none."""

import pytest

from lcm_jax.errors import UserError
from lcm_jax.parallel import processes
from lcm_jax.parallel.processes import Place, find

SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)


def test_alone_without_a_word():
    assert find(None, None, None) is None
    assert find("10.0.0.1:8476", 1, 0) is None


def test_options_are_taken_as_they_are():
    assert find("10.0.0.1:8476", 4, 3) == Place("10.0.0.1:8476", 3, 4)


def test_slurm_knows(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "8476")
    assert find(None, None, None) == Place("node007:8476", 5, 8, [1])
    assert find("other:1234", 2, 1) == Place("other:1234", 1, 2)  # options come first
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find(None, None, None) is None


def test_an_environment_that_can_not_be_read_is_one_line(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "abc")
    with pytest.raises(UserError, match="node007:abc, from this cluster's environment .* is not HOST:PORT"):
        find(None, None, None)
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(UserError, match="JAX can't read the environment of Slurm: .*many"):
        find(None, None, None)


def test_an_mpirun_that_tells_jax_nothing_is_no_lone_process(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"give --coordinator, --num-processes and --process-id=\$OMPI_COMM_WORLD_RANK"):
        find(None, None, None)
    assert find("10.0.0.1:8476", 2, 1) == Place("10.0.0.1:8476", 1, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ("host:8476", None, None),
            "--num-processes, --process-id is missing; give all or none of --coordinator, ",
        ),
        ((None, 2, 1), "--coordinator is missing"),
        (("host", 2, 1), "--coordinator=host is not HOST:PORT, as in 10.0.0.1:8476"),
        (("host:70000", 2, 1), "is not HOST:PORT"),
        ((":8476", 2, 1), "is not HOST:PORT"),
        (("host:2", 2, 1), "is not HOST:PORT"),  # the roll call has no port two below
        (("host:8476", 2, 2), r"--process-id=2 must be in 0\.\.1 for 2 processes"),
        (("host:8476", 2, -1), "--process-id=-1 must be in"),
    ],
)
def test_what_is_missing_or_wrong_is_named(given, said):
    with pytest.raises(UserError, match=said):
        find(*given)


@pytest.mark.parametrize(
    ("coordinator", "roll_call"),
    [
        ("pod-w-0:8476", "pod-w-0:8474"),  # the other open port of a pod
        ("host:61439", "host:61437"),
        ("host:61440", "host:28672"),  # a port that JAX gives to jobs of SLURM: its neighbours are other jobs'
        ("host:65535", "host:32767"),
    ],
)
def test_the_roll_call_takes_no_other_run_s_port(monkeypatch, coordinator, roll_call):
    class Heard(Exception):
        pass

    def hear(address, *_, **__):
        raise Heard(address)

    monkeypatch.setattr(processes, "RollCall", hear)
    with pytest.raises(Heard, match=f"^{roll_call}$"):
        processes.Processes(find(coordinator, 2, 1))
