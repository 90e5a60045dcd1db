"""launch/gke.sh: manifests that fit their schema and the slice, and how they get to the cluster."""

import json
import math
import pathlib

import jsonschema
import pytest
import yaml

SCHEMA = json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text())
TRAIN = ("--", "python", "-m", "lcm_jax.train", "--config=configs/sd15.py", "--workdir=gs://bucket/runs/sd15")
V5E = ("--type=v5e", "--topology=4x4", "--image=registry/project/lcm_jax")


def manifest(bench, *words: str, **environment: str) -> dict:
    """What `create --dry-run` prints, checked against the schema."""
    result = bench.run("gke.sh", "create", "sd15", "--dry-run", *words, **environment)
    assert result.code == 0, result.err
    assert not result.calls
    found = yaml.safe_load(result.out)
    jsonschema.validate(found, SCHEMA)
    return found


def job_of(found: dict) -> dict:
    [replicated] = found["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(found: dict) -> dict:
    [container] = job_of(found)["template"]["spec"]["containers"]
    return container


def environment_of(found: dict) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container_of(found)["env"]}


@pytest.mark.parametrize(
    ("kind", "topology", "slices", "chips", "accelerator"),
    [
        ("v5e", "4x4", 2, 4, "tpu-v5-lite-podslice"),
        ("v5e", "2x4", 1, 8, "tpu-v5-lite-podslice"),
        ("v5e", "16x16", 1, 4, "tpu-v5-lite-podslice"),
        ("v5p", "2x2x1", 1, 4, "tpu-v5p-slice"),
        ("v5p", "4x4x8", 2, 4, "tpu-v5p-slice"),
        ("v6e", "8x16", 4, 4, "tpu-v6e-slice"),
    ],
)
def test_the_manifest_fits_its_schema_and_the_slice(bench, kind, topology, slices, chips, accelerator):
    slice_words = (f"--type={kind}", f"--topology={topology}", f"--slices={slices}", f"--chips={chips}")
    found = manifest(bench, *slice_words, "--image=registry/lcm_jax", *TRAIN)
    [replicated] = found["spec"]["replicatedJobs"]
    assert replicated["replicas"] == slices
    job, container = job_of(found), container_of(found)
    assert job["parallelism"] == job["completions"]
    # a pod for each host, and the hosts' chips are the slice's
    assert job["parallelism"] * chips == math.prod(int(side) for side in topology.split("x"))
    assert container["resources"]["requests"] == container["resources"]["limits"] == {"google.com/tpu": chips}
    selector = job["template"]["spec"]["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert selector["cloud.google.com/gke-tpu-topology"] == topology
    annotations = found["metadata"]["annotations"]
    assert annotations == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


def test_one_pod_that_fails_restarts_all_and_a_mistake_restarts_none(bench):
    found = manifest(bench, *V5E, "--max-restarts=3", *TRAIN)
    job = job_of(found)
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 3
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}}
    assert container_of(found)["name"] == "train"
    [rule] = found["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_command_and_its_environment(bench):
    odd = ['--config.data.directory=gs://b/my "data" \\ $HOME #1', "--config.x=(1, 2)", "--config.y=yes"]
    found = manifest(bench, *V5E, "--slices=2", *TRAIN, *odd, LIBTPU_INIT_ARGS="--mine=1")
    assert container_of(found)["command"] == [*TRAIN[1:], *odd]
    values = environment_of(found)
    assert values["JAX_COORDINATOR_PORT"] == "8476"
    assert container_of(found)["ports"] == [{"containerPort": 8476, "name": "coordinator"}]
    assert values["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/runs/compile_cache"
    assert values["JAX_PLATFORMS"] == "tpu,cpu"
    flags = values["LIBTPU_INIT_ARGS"].split()
    assert "--xla_tpu_enable_latency_hiding_scheduler=true" in flags
    assert "--xla_tpu_enable_data_parallel_all_reduce_opt=true" in flags
    assert flags[-1] == "--mine=1"


def test_kubernetes_expands_nothing_in_the_command(bench):
    found = manifest(bench, *V5E, *TRAIN, "--config.x=$(HOME)")
    assert container_of(found)["command"][-1] == "--config.x=$$(HOME)"  # $$( is how Kubernetes writes $(


def test_async_collective_fusion_is_for_v5e_alone(bench):
    fusion = "--xla_tpu_enable_async_collective_fusion=true"
    assert fusion in environment_of(manifest(bench, *V5E, *TRAIN))["LIBTPU_INIT_ARGS"].split()
    v5p = manifest(bench, "--type=v5p", "--topology=2x2x4", "--image=i", *TRAIN)
    assert "async_collective_fusion" not in environment_of(v5p)["LIBTPU_INIT_ARGS"]


def test_options_that_not_every_run_has(bench):
    plain = manifest(bench, *V5E, *TRAIN)
    assert "labels" not in plain["metadata"]
    assert "namespace" not in plain["metadata"]
    assert "cloud.google.com/gke-spot" not in job_of(plain)["template"]["spec"]["nodeSelector"]
    found = manifest(bench, *V5E, "--spot", "--queue=tpus", "--service-account=trainer", "--namespace=ours", *TRAIN)
    pod = job_of(found)["template"]["spec"]
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    assert found["metadata"]["namespace"] == "ours"
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in [toleration["key"] for toleration in pod["tolerations"]]


def test_the_schema_finds_a_misspelt_field(bench):
    found = manifest(bench, *V5E, *TRAIN)
    job_of(found)["paralellism"] = job_of(found).pop("parallelism")
    with pytest.raises(jsonschema.ValidationError, match="paralellism"):
        jsonschema.validate(found, SCHEMA)


def test_create_hands_the_printed_manifest_to_the_cluster(bench):
    secret = {"LCM_JAX_JOB_TOKEN": "a secret"}
    expected = manifest(bench, *V5E, "--namespace=team", *TRAIN, **secret)
    assert environment_of(expected)["LCM_JAX_JOB_TOKEN"] == "a secret"
    made = {environment_of(manifest(bench, *V5E, *TRAIN))["LCM_JAX_JOB_TOKEN"] for _ in range(2)}
    assert [len(token) for token in made] == [32, 32]
    bench.say("fail_apply", 2)  # the webhook is not there yet
    result = bench.run("gke.sh", "create", "sd15", "--namespace=team", *V5E, *TRAIN, **secret)
    assert result.code == 0, result.err
    applies = result.calls_of("apply")
    assert len(applies) == 3
    assert applies[-1] == ["kubectl", "apply", "--filename=-", "--namespace=team"]
    assert yaml.safe_load((bench.folder / "applied").read_text()) == expected
    bench.say("fail_apply", 3)
    assert bench.run("gke.sh", "create", "sd15", *V5E, *TRAIN).code == 1


def test_create_leaves_a_jobset_of_that_name_alone(bench):
    bench.say("jobset", "there")
    result = bench.run("gke.sh", "create", "sd15", *V5E, *TRAIN)
    assert result.code == 1
    assert "delete sd15 first" in result.error()
    assert not result.calls_of("apply")


def test_create_without_the_jobset_controller(bench):
    bench.say("fail_crd", 1)
    result = bench.run("gke.sh", "create", "sd15", *V5E, *TRAIN)
    assert result.code == 1
    assert "JobSet controller" in result.error()
    assert not result.calls_of("apply")


def test_tail_status_delete(bench):
    bench.say("jobset", "there")
    [tail] = bench.run("gke.sh", "tail", "sd15").calls
    assert tail[:3] == ["kubectl", "logs", "--follow"]
    assert "jobset.sigs.k8s.io/jobset-name=sd15,jobset.sigs.k8s.io/job-index=0" in tail[4]
    assert len(bench.run("gke.sh", "status", "sd15").calls) == 2
    assert bench.run("gke.sh", "delete", "sd15").calls == [
        ["kubectl", "delete", "jobset", "sd15", "--ignore-not-found"]
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["create"], "NAME"),
        (["make", "sd15"], "one of create tail"),
        (["create", "sd15", *TRAIN], "--type is missing"),
        (["create", "sd15", "--type=v4", *TRAIN], "v5e, v5p or v6e"),
        (["create", "sd15", "--type=v5e", "--topology=3x4", *TRAIN], "8x16"),
        (["create", "sd15", "--type=v5p", "--topology=4x4", *TRAIN], "as in 2x2x4"),
        (["create", "sd15", "--type=v5p", "--topology=2x4x2", *TRAIN], "multiples of 4"),
        (["create", "sd15", "--type=v5p", "--topology=4x4x8", "--chips=8", *TRAIN], "4 chips"),
        (["create", "sd15", "--type=v5e", "--topology=2x2", "--slices=2", "--image=i", *TRAIN], "several nodes"),
        (["create", "sd15", "--type=v5e", "--topology=4x4", *TRAIN], "--image is missing"),
        (["create", "sd15", *V5E], "-- python -m lcm_jax.train"),
        (["create", "sd15", *V5E, "--", "--workdir=/runs/sd15"], "gs://BUCKET/sd15"),
        (["create", "sd15", *V5E, *TRAIN, "--config.x=a\nb"], "line break"),
        (["create", "sd15", "--chips=2", *V5E, *TRAIN], "1, 4 or 8"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_would_be_right(bench, words, says):
    result = bench.run("gke.sh", *words)
    assert result.code == 2
    assert says in result.error()
    assert len(result.err.splitlines()) == 1
    assert not result.calls
