"""launch/tpu.sh: its requests to gcloud, the state of the workers, and the restart after a preemption."""

import collections
import os
import signal
import threading

import pytest

TRAIN = ("--", "python", "-m", "lcm_jax.train", "--config=configs/sd15.py", "--workdir=gs://bucket/runs/sd15")
ZONE = "--zone=us-east5-a"


def lines(path) -> list[str]:
    return path.read_text().splitlines()


def environment(home) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines(home / "environment") if "=" in line)


@pytest.mark.parametrize(
    ("kind", "accelerator", "runtime"),
    [
        ("v4-64", "v4-64", "tpu-ubuntu2204-base"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_create_asks_for_the_product_by_gclouds_names(bench, kind, accelerator, runtime):
    result = bench.run("tpu.sh", "create", "pod", ZONE, f"--type={kind}", "--spot", "--project=mine")
    assert result.code == 0, result.err
    [call] = result.calls_of("create")
    assert call[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    expected = {f"--accelerator-type={accelerator}", f"--runtime-version={runtime}", ZONE, "--project=mine", "--spot"}
    assert expected | {"--node-id=pod", "--network=default", "--tags=lcm-jax"} <= set(call)
    assert not [word for word in call if word.startswith("--node-count")]


def test_slices_are_asked_for_as_nodes_of_one_request(bench):
    result = bench.run("tpu.sh", "create", "pod", ZONE, "--type=v5p-16", "--slices=2")
    [call] = result.calls_of("create")
    assert {"--node-count=2", "--node-prefix=pod"} <= set(call)
    assert not [word for word in call if word.startswith("--node-id")]


def test_create_waits_until_the_pod_is_there_and_does_not_ask_twice(bench):
    bench.say("state", "WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")
    result = bench.run("tpu.sh", "create", "pod", ZONE, "--type=v5p-16")
    assert result.code == 0
    assert not result.calls_of("create")
    assert len(result.calls_of("list")) == 4


def test_create_ends_when_the_request_fails_or_waits_too_long(bench):
    bench.say("state", "WAITING_FOR_RESOURCES\nFAILED")
    result = bench.run("tpu.sh", "create", "pod", ZONE, "--type=v5p-16")
    assert result.code == 1
    assert "resume" in result.error()
    bench.say("state", "WAITING_FOR_RESOURCES")
    result = bench.run("tpu.sh", "create", "pod", ZONE, "--type=v5p-16", WAIT_HOURS="0")
    assert result.code == 1
    assert "WAIT_HOURS" in result.error()


def test_a_refusal_is_not_tried_again(bench):
    bench.say("fail_create", 9)
    result = bench.run("tpu.sh", "create", "pod", ZONE, "--type=v5p-16")
    assert result.code == 1
    assert "quota" in result.error()
    assert len(result.calls_of("create")) == 1


@pytest.mark.parametrize("unset", ["", "(unset)"])
def test_without_a_project_it_ends_at_once(bench, unset):
    bench.say("project", unset)
    result = bench.run("tpu.sh", "install", "pod", ZONE)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "add --project=PROJECT" in result.err
    assert len(result.calls) == 1
    assert bench.run("tpu.sh", "install", "pod", ZONE, "--project=mine").code == 0


def test_install_reaches_every_worker(bench):
    result = bench.run("tpu.sh", "install", "pod", ZONE)
    assert result.code == 0, result.err
    for worker in ("pod-0", "pod-1"):
        home = bench.home(worker)
        assert (home / "lcm_jax" / "launch" / "tpu.sh").exists()
        venv, packages = lines(home / "uv")
        assert "--python=3.12" in venv
        assert packages.endswith("--constraint=constraints.txt --editable=.[tpu]")


def test_a_worker_that_gcloud_passes_over_is_noticed(bench):
    bench.say("mute", "pod-1")
    result = bench.run("tpu.sh", "install", "pod", ZONE)
    assert result.code == 1
    assert "1 of 2 workers answered" in result.err
    assert "3 times" in result.error()


def test_flaky_ssh_and_scp_are_tried_again_but_not_for_ever(bench):
    bench.say("fail_ssh", 2)
    bench.say("fail_scp", 2)
    result = bench.run("tpu.sh", "install", "pod", ZONE)
    assert result.code == 0
    assert len(result.calls_of("ssh")) == len(result.calls_of("scp")) == 3
    bench.say("fail_ssh", 3)
    assert bench.run("tpu.sh", "install", "pod", ZONE).code == 1


def test_run_starts_the_command_on_all_workers_and_leaves_it_running(bench, until):
    bench.run("tpu.sh", "install", "pod", ZONE)
    spaces = "--config.data.directory=gs://bucket/my data/$HOME"
    result = bench.run("tpu.sh", "run", "pod", ZONE, *TRAIN, spaces)
    assert result.code == 0, result.err
    [call] = result.calls_of("ssh")
    assert {"--worker=all", "--node=all", "--batch-size=all"} <= set(call)
    for worker in ("pod-0", "pod-1"):
        home = bench.home(worker)
        until((home / "ready").exists)
        assert lines(home / "words") == [*TRAIN[2:], spaces]
        assert lines(home / "where") == [str(home / "lcm_jax")]
        values = environment(home)
        assert values["JAX_COORDINATOR_PORT"] == "8476"
        assert values["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/runs/compile_cache"
        assert values["JAX_PLATFORMS"] == "tpu,cpu"
        assert [values["LCM_JAX_JOB_TOKEN"]] == lines(bench.home("pod-0") / "job_token")  # the same on each
        assert len(values["LCM_JAX_JOB_TOKEN"]) == 32
        assert (home / "job_token").stat().st_mode & 0o777 == 0o600
        assert "--xla_tpu_enable_latency_hiding_scheduler=true" in values["LIBTPU_INIT_ARGS"].split()
        assert "async_collective_fusion" not in values["LIBTPU_INIT_ARGS"]  # a v5p does not compile with it
    status = bench.run("tpu.sh", "status", "pod", ZONE)
    assert status.code == 0

    before = [(bench.home(worker) / "train.pid").read_text() for worker in ("pod-0", "pod-1")]
    assert bench.run("tpu.sh", "run", "pod", ZONE, *TRAIN).code == 0  # as a retry does
    assert [(bench.home(worker) / "train.pid").read_text() for worker in ("pod-0", "pod-1")] == before


def test_the_arguments_alone_are_the_train_commands(bench, until):
    bench.run("tpu.sh", "install", "pod", ZONE)
    assert bench.run("tpu.sh", "run", "pod", ZONE, "--", *TRAIN[4:]).code == 0
    home = bench.home("pod-0")
    until((home / "ready").exists)
    assert lines(home / "words") == list(TRAIN[2:])


def test_flags_of_the_generation_of_slices_and_of_ones_own(bench, until):
    bench.say("nodes", "pod-0 pod-1")
    bench.say("type", "v5litepod-16")
    bench.run("tpu.sh", "install", "pod", ZONE)
    own = {"LIBTPU_INIT_ARGS": "--mine=1", "JAX_COMPILATION_CACHE_DIR": "gs://other/cache", "COORDINATOR_PORT": "8470"}
    assert bench.run("tpu.sh", "run", "pod", ZONE, *TRAIN, **own).code == 0
    for worker in ("pod-0-0", "pod-0-1", "pod-1-0", "pod-1-1"):
        until((bench.home(worker) / "ready").exists)
        values = environment(bench.home(worker))
        flags = values["LIBTPU_INIT_ARGS"].split()
        assert "--xla_tpu_enable_async_collective_fusion=true" in flags
        assert "--xla_tpu_enable_data_parallel_all_reduce_opt=true" in flags
        assert flags[-1] == "--mine=1"
        assert values["JAX_COMPILATION_CACHE_DIR"] == "gs://other/cache"
        assert values["JAX_COORDINATOR_PORT"] == "8470"


def test_stop_lets_the_training_save(bench, until):
    bench.run("tpu.sh", "install", "pod", ZONE)
    bench.run("tpu.sh", "run", "pod", ZONE, *TRAIN)
    homes = [bench.home(worker) for worker in ("pod-0", "pod-1")]
    for home in homes:
        until((home / "ready").exists)
    assert bench.run("tpu.sh", "stop", "pod", ZONE).code == 0
    for home in homes:
        assert (home / "saved").exists()
        until((home / "train.exit").exists)
        assert lines(home / "train.exit") == ["143"]
    bench.say("state", "ACTIVE")
    assert "ended with 143" in bench.run("tpu.sh", "status", "pod", ZONE).out


def test_tail_follows_the_first_worker(bench):
    [call] = bench.run("tpu.sh", "tail", "pod", ZONE, "--dry-run").out.splitlines()
    assert "--worker=0 --node=0" in call
    assert "tail -n 100 -F train.log" in call


def test_delete_takes_the_nodes_along(bench):
    bench.say("fail_delete", 1)
    result = bench.run("tpu.sh", "delete", "pod", ZONE)
    assert result.code == 0
    assert len(result.calls_of("delete", "--force", "--quiet", "pod")) == 2


def test_firewall_opens_ports_among_the_tagged_workers(bench):
    [call] = bench.run("tpu.sh", "firewall", "--network=mine").calls_of("create")
    assert call[:4] == ["gcloud", "compute", "firewall-rules", "create"]
    assert {"--network=mine", "--allow=tcp", "--source-tags=lcm-jax", "--target-tags=lcm-jax"} <= set(call)


def test_resume_does_all_and_ends_with_the_training(bench):
    for worker in ("pod-0", "pod-1"):
        bench.say(f"codes-{worker}", 0)
    result = bench.run("tpu.sh", "resume", "pod", ZONE, "--type=v5p-16", *TRAIN)
    assert result.code == 0, result.err
    assert len(result.calls_of("create")) == len(result.calls_of("scp")) == 1
    assert "done" in result.err
    assert not result.calls_of("delete")


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_resume_after_a_preemption_asks_for_the_pod_again(bench, state):
    for worker in ("pod-0", "pod-1"):
        bench.say(f"codes-{worker}", 0)
    bench.say("state", state)
    result = bench.run("tpu.sh", "resume", "pod", ZONE, "--type=v5p-16", "--spot", *TRAIN)
    assert result.code == 0, result.err
    verbs = [call[4] for call in result.calls if call[0] == "gcloud" and {"delete", "create", "scp"} & set(call[4:5])]
    assert verbs == ["delete", "create", "scp"]
    assert "--spot" in result.calls_of("create")[0]


def test_resume_of_a_training_that_runs_only_watches(bench, until):
    bench.run("tpu.sh", "install", "pod", ZONE)
    bench.run("tpu.sh", "run", "pod", ZONE, *TRAIN)
    bench.say("state", "ACTIVE")
    homes = [bench.home(worker) for worker in ("pod-0", "pod-1")]

    def watches() -> bool:
        """Whether resume has asked for the state more than once, as it does only while it watches."""
        calls = bench.folder / "calls"
        if not calls.exists():
            return False
        asked = collections.Counter(line for line in calls.read_text().splitlines() if '"ssh"' in line)
        return max(asked.values(), default=0) > 1

    for home in homes:
        until((home / "ready").exists)
    pids = [(home / "train.pid").read_text().strip() for home in homes]
    stop = threading.Thread(target=lambda: (until(watches), [os.killpg(int(pid), signal.SIGTERM) for pid in pids]))
    (bench.folder / "calls").unlink()
    stop.start()
    result = bench.run("tpu.sh", "resume", "pod", ZONE, "--type=v5p-16", *TRAIN)
    stop.join()
    assert result.code == 1
    assert "stopped by hand" in result.error()
    assert [(home / "train.pid").read_text().strip() for home in homes] == pids
    assert not result.calls_of("scp")


def test_resume_starts_again_what_broke_off_and_ends_the_others_first(bench):
    bench.say("codes-pod-0", "134\n0")
    bench.say("codes-pod-1", "run\n0")  # it waits for the first, which died
    result = bench.run("tpu.sh", "resume", "pod", ZONE, "--type=v5p-16", *TRAIN)
    assert result.code == 0, result.err
    assert "ended with 134; restart 1 of at most 20" in result.err
    assert len(result.calls_of("scp")) == 1
    assert (bench.home("pod-1") / "saved").exists()


def test_resume_gives_up_in_the_end(bench):
    for worker in ("pod-0", "pod-1"):
        bench.say(f"codes-{worker}", 1)
    result = bench.run("tpu.sh", "resume", "pod", ZONE, "--type=v5p-16", "--max-restarts=2", *TRAIN)
    assert result.code == 1
    assert "ended with 1" in result.error()
    assert len(result.calls_of("create")) == 1


def test_resume_does_not_repeat_a_mistake(bench):
    for worker in ("pod-0", "pod-1"):
        bench.say(f"codes-{worker}", 2)
    result = bench.run("tpu.sh", "resume", "pod", ZONE, "--type=v5p-16", *TRAIN)
    assert result.code == 1
    assert "an error that a restart does not fix" in result.error()


def test_resume_does_not_repeat_a_refusal(bench):
    bench.say("fail_create", 9)
    result = bench.run("tpu.sh", "resume", "pod", ZONE, "--type=v5p-16", *TRAIN)
    assert result.code == 1
    assert "v5p-16 was refused in" in result.error()
    assert len(result.calls_of("create")) == 1


@pytest.mark.parametrize("variable", ["TRIES", "RETRY_SECONDS", "POLL_SECONDS", "WAIT_HOURS", "COORDINATOR_PORT"])
def test_a_variable_that_is_no_number_is_one_line(bench, variable):
    result = bench.run("tpu.sh", "create", "pod", ZONE, "--type=v5p-16", **{variable: "abc"})
    assert result.code == 2
    assert result.error().startswith(f"tpu.sh: error: {variable}=abc")
    assert not result.calls


def test_a_dry_status_claims_nothing(bench):
    result = bench.run("tpu.sh", "status", "pod", ZONE, "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("gcloud compute tpus queued-resources list ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "a command is missing"),
        (["crate", "pod"], "no command crate; use one of create install"),
        (["create"], "NAME"),
        (["create", "Pod", ZONE, "--type=v5p-16"], "lower-case"),
        (["create", "pod", "--type=v5p-16"], "--zone is missing"),
        (["create", "pod", ZONE], "--type is missing"),
        (["create", "pod", ZONE, "--type=v7-8"], "v5p-128"),
        (["create", "pod", ZONE, "--type=v5p-7"], "v5p-8, -16, -24"),
        (["create", "pod", ZONE, "--type=v5e-7"], "v5e has 1, 4, 8,"),
        (["create", "pod", ZONE, "--type", "v5p-16"], "values follow a ="),
        (["create", "pod", ZONE, "--type=v5p-16", "--slices=0"], "whole number"),
        (["create", "pod", ZONE, "--type=v5p-16", "--spot", "--reserved"], "exclude each other"),
        (["run", "pod", ZONE], "-- python -m lcm_jax.train"),
        (["run", "pod", ZONE, "--", "--config=configs/sd15.py"], "--workdir=DIR"),
        (["run", "pod", ZONE, "--", "--workdir=runs/sd15"], "--workdir=gs://BUCKET/sd15"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_would_be_right(bench, words, says):
    result = bench.run("tpu.sh", *words)
    assert result.code == 2
    assert says in result.error()
    assert len(result.err.splitlines()) == 1
    assert not result.calls


def test_without_gcloud(bench):
    result = bench.run("tpu.sh", "create", "pod", ZONE, "--type=v5p-16", without="gcloud")
    assert result.code == 1
    assert "gcloud is not on the PATH" in result.error()


def test_a_dry_run_calls_nothing_and_prints_what_the_run_would_call(bench):
    words = ("resume", "pod", ZONE, "--type=v5e-16", *TRAIN)
    dry = bench.run("tpu.sh", words[0], words[1], "--dry-run", *words[2:], without="gcloud")
    assert dry.code == 0, dry.err
    assert not dry.calls
    kinds = [" ".join(line.split()[3:5]) for line in dry.out.splitlines()]
    assert kinds == [f"queued-resources {verb}" for verb in ("create", "scp", "ssh", "ssh")]
    assert "JAX_COORDINATOR_PORT=8476" in dry.out
