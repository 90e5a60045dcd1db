"""launch/gpus.sh and launch/slurm.sh: the processes that they start, their environment, and restarts."""

import pytest

TRAIN = ("--", "python", "-m", "lcm_jax.train", "--config=configs/sd15.py", "--workdir=/scratch/runs/sd15")
SIZE = ("--nodes=2", "--gpus=8")
JOB = {"SLURM_JOB_ID": "7"}


def env_words(words: list[str]) -> dict[str, str]:
    """The NAME=VALUE words after `env`."""
    rest = words[words.index("env") + 1 :]
    return dict(word.split("=", 1) for word in rest[: rest.index("python")])


def test_gpus_runs_the_command_with_its_environment(bench):
    show = (
        'printf "%s\\n" "$XLA_FLAGS" "$JAX_COMPILATION_CACHE_DIR" "$JAX_PLATFORMS" "$CUDA_VISIBLE_DEVICES" "$@"; exit 3'
    )
    words = ("--gpus=0,1", "--", "bash", "-c", show, "show", "--workdir=/scratch/my runs/sd15/")
    result = bench.run("gpus.sh", *words, XLA_FLAGS="--mine=1")
    assert result.code == 3  # the training's own
    flags, cache, platforms, gpus, workdir = result.out.splitlines()
    assert flags.split()[0] == "--xla_gpu_enable_latency_hiding_scheduler=true"
    assert flags.split()[-1] == "--mine=1"
    assert cache == "/scratch/my runs/compile_cache"
    assert (platforms, gpus, workdir) == ("cuda,cpu", "0,1", "--workdir=/scratch/my runs/sd15/")


@pytest.mark.parametrize(
    ("workdir", "cache"),
    [("sd15", "./compile_cache"), ("runs/sd15/", "runs/compile_cache"), ("gs://b/r/x", "gs://b/r/compile_cache")],
)
def test_the_compile_cache_is_beside_the_workdir(bench, workdir, cache):
    result = bench.run("gpus.sh", "--dry-run", "--", "--config=c.py", "--workdir", workdir)
    assert f"JAX_COMPILATION_CACHE_DIR={cache} " in result.out
    assert result.out.rstrip().endswith(f"python -m lcm_jax.train --config=c.py --workdir {workdir}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus=0,7", *TRAIN], "no GPU 7 on this machine, only 0, 1"),
        (["--gpus=all", *TRAIN], "--gpus=0,1"),
        ([], "-- python -m lcm_jax.train"),
        (["--config=c.py"], "no option --config=c.py"),
    ],
)
def test_gpus_says_what_would_be_right(bench, words, says):
    result = bench.run("gpus.sh", *words)
    assert result.code == 2
    assert says in result.error()


def test_gpus_without_a_driver_or_a_gpu(bench):
    bench.say("fail_index", 0)
    bench.say("fail_csv", 0)
    result = bench.run("gpus.sh", *TRAIN, without="nvidia-smi")
    assert result.code == 1
    assert "nvidia-smi is not on the PATH" in result.error()


def test_slurm_submits_a_job_that_runs_the_same_script(bench):
    result = bench.run("slurm.sh", *SIZE, "--partition=gpu", "--time=1:00:00", *TRAIN, "--config.x=(1, 2)")
    assert result.code == 0, result.err
    [call] = result.calls
    options = {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu", "--requeue"}
    assert call[0] == "sbatch"
    assert options | {"--signal=TERM@180", "--open-mode=append"} <= set(call)
    assert [word for word in call if word.startswith("--time=")][-1] == "--time=1:00:00"
    [wrap] = [word.removeprefix("--wrap=exec ") for word in call if word.startswith("--wrap=")]
    script, *words = wrap.split()
    assert script == str(bench.folder / "checkout" / "launch" / "slurm.sh")
    assert words[:2] == list(SIZE)
    assert wrap.endswith("'--config.x=(1, 2)'")


def test_slurm_starts_a_process_for_each_gpu_and_each_sees_all(bench):
    result = bench.run("slurm.sh", *SIZE, *TRAIN, **JOB)
    assert result.code == 0, result.err
    [call] = result.calls
    assert call[0] == "srun"
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpu-bind=none", "--kill-on-bad-exit=1"} <= set(call)
    assert not [word for word in call if word.startswith("--gpus-per-task")]
    (token,) = (bench.folder / "tokens").read_text().splitlines()
    assert len(token) == 32
    assert not [word for word in call if token in word]  # everyone on the node can read them
    assert call[-len(TRAIN) + 1 :] == list(TRAIN[1:])
    values = env_words(call)
    assert values["JAX_PLATFORMS"] == "cuda,cpu"
    assert values["JAX_COMPILATION_CACHE_DIR"] == "/scratch/runs/compile_cache"
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in values["XLA_FLAGS"].split()


def test_slurm_queues_again_when_the_time_is_up(bench):
    bench.say("codes", 143)
    result = bench.run("slurm.sh", *SIZE, *TRAIN, **JOB)
    assert [call[0] for call in result.calls] == ["srun", "scontrol"]
    assert result.calls[1] == ["scontrol", "requeue", "7"]
    result = bench.run("slurm.sh", *SIZE, *TRAIN, **JOB, SLURM_RESTART_COUNT="20")
    assert result.code == 1
    assert not result.calls_of("scontrol")


def test_slurm_starts_again_what_broke_off_but_not_a_mistake(bench):
    bench.say("codes", "134\n1\n0")
    result = bench.run("slurm.sh", *SIZE, *TRAIN, **JOB)
    assert result.code == 0
    assert len(result.calls) == 3
    bench.say("codes", 1)
    result = bench.run("slurm.sh", *SIZE, "--max-restarts=2", *TRAIN, **JOB)
    assert result.code == 1
    assert len(result.calls) == 3
    bench.say("codes", 2)
    result = bench.run("slurm.sh", *SIZE, *TRAIN, **JOB)
    assert result.code == 1
    assert len(result.calls) == 1
    assert "refused its command" in result.error()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus=8", *TRAIN], "--nodes=2"),
        (["--nodes=2", *TRAIN], "--gpus=8"),
        (["--nodes=two", "--gpus=8", *TRAIN], "whole number"),
        ([*SIZE], "-- python -m lcm_jax.train"),
        ([*SIZE, "--part=gpu", *TRAIN], "no option --part=gpu"),
    ],
)
def test_slurm_says_what_would_be_right(bench, words, says):
    result = bench.run("slurm.sh", *words)
    assert result.code == 2
    assert says in result.error()
    assert not result.calls


def test_slurm_dry_runs_call_nothing(bench):
    outside = bench.run("slurm.sh", "--dry-run", *SIZE, *TRAIN, without="sbatch")
    inside = bench.run("slurm.sh", "--dry-run", *SIZE, *TRAIN, without="srun", **JOB)
    assert (outside.code, inside.code, outside.calls, inside.calls) == (0, 0, [], [])
    assert outside.out.startswith("sbatch ")
    assert inside.out.startswith("srun ")
    assert "slurm.sh" in outside.out
