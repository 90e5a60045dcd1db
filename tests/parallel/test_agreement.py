"""Processes started with different options, models or data: each ends with one line that names the difference."""

import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import pytest
from safetensors.numpy import load_file, save_file
from stored_records import rewrite, shout

from lcm_jax.config import DataConfig, default_config, facts, from_dict
from lcm_jax.data.sources import open_data
from lcm_jax.errors import Unavailable, UserError
from lcm_jax.interop.folder import read_folder
from lcm_jax.parallel import agreement
from lcm_jax.training import identity
from lcm_jax.training.workdir import LOCK, _here

ROOT = pathlib.Path(__file__).resolve().parents[2]


def value(options, name):
    """The last value of --config.<name>=."""
    return [option.partition("=")[2] for option in options if option.startswith(f"--config.{name}=")][-1]


@pytest.fixture(scope="module")
def other_model(quick, tmp_path_factory):
    """The model of `quick` with a larger UNet weight, and no other difference."""
    folder = shutil.copytree(value(quick, "model.folder"), tmp_path_factory.mktemp("other") / "teacher")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"] * 1.5}, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def other_data(quick, tmp_path_factory):
    """The data of `quick` with one caption changed."""
    data = shutil.copytree(value(quick, "data.data_dir"), tmp_path_factory.mktemp("other") / "data")
    (shard,) = data.glob("captioned_digits/*/*-train.array_record*")
    rewrite(shard, shout(0))
    return data


@pytest.fixture(scope="module")
def other_file(tmp_path_factory):
    """A config file of the same name with another value."""
    folder = shutil.copytree(ROOT / "configs", tmp_path_factory.mktemp("other") / "configs")
    file = folder / "digits_teacher.py"
    file.write_text(file.read_text().replace("return config", "config.seed = 7\n    return config"))
    return file


@pytest.fixture(scope="module")
def ended(quick, other_model, other_data, other_file, tmp_path_factory):
    """{case: (exit codes, outputs)}: the last process of each run was started with one different option."""
    cases = {
        "optimizer": (2, "--config.optimizer.learning_rate=1"),
        "split": (2, "--config.data.split=validation"),
        "steps": (4, "--config.steps=7"),
        "checkpoints": (2, "--config.checkpoint.every=3"),
        "mesh": (2, "--config.mesh.fsdp=2"),
        "file": (2, f"--config={other_file}:vae"),
        "no file": (2, "--config=/nowhere.py"),
        "model": (2, f"--config.model.folder={other_model}"),
        "data": (4, f"--config.data.data_dir={other_data}"),
        "no option": (2, "--config.nothing=1 --nothing=1"),
        "no number": (2, "--wait=long"),
        "no step": (2, "--compiled=/nowhere"),
        "held": (2, ""),
        "workdir": (2, f"--workdir={tmp_path_factory.mktemp('another') / 'run'}"),
    }
    argvs = []
    for case, (count, other) in cases.items():
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        workdir = tmp_path_factory.mktemp("runs") / "run"
        if case == "held":
            workdir.mkdir()
            (workdir / LOCK).write_text(json.dumps({**_here(), "since": "then"}))
        common = [*quick, f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}"]
        argvs.append([[*common, f"--process-id={i}", *other.split() * (i == count - 1)] for i in range(count)])
    group = subprocess.run(
        [sys.executable, pathlib.Path(__file__).with_name("train_in_forks.py")],
        input=json.dumps(argvs),
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert group.returncode == 0, group.stderr
    return dict(zip(cases, json.loads(group.stdout), strict=True))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("optimizer", "config.optimizer.learning_rate differs: process 1 on .* has 1.0, process 0 on .* has 0.002;"),
        ("split", "config.data.split differs: process 1 on .* has 'validation', process 0 on .* has 'train';"),
        ("steps", "config.steps differs: process 3 on .* has 7, process 0 on .* has 6;"),
        ("checkpoints", "config.checkpoint.every differs: process 1 on .* has 3, process 0 on .* has 2;"),
        ("mesh", "config.mesh.fsdp differs: process 1 on .* has 2, process 0 on .* has 1;"),
        ("file", "config.seed differs: process 1 on .* has 7, process 0 on .* has 0;"),
        ("no file", "process 1 on .*: --config=/nowhere.py: there is no file /nowhere.py; "),
        ("no option", "process 1 on .*: there is no option --nothing=1"),
        ("no number", "process 1 on .*: --wait=long: it must be a number$"),
        ("no step", "process 1 on .*: --compiled=/nowhere: the file does not exist"),
        ("held", "process 0 on .*: --workdir=.*: process .* is training in it; wait until it ends, stop it"),
        ("model", r"unet weights differs: process 1 on .* has \w{32}, process 0 on .* has \w{32};"),
        (
            "workdir",
            r"content of config.json in --workdir differs: process 1 on .* has nothing, process 0 on .* has",
        ),
        ("data", r"data records 0 to \d+ differs: process 3 on .* has \w{32}, process 0 on .* has \w{32};"),
    ],
)
def test_every_process_ends_with_the_line_that_names_the_difference(ended, case, said):
    codes, outputs = ended[case]
    assert codes == [2] * len(codes), outputs
    lines = [output.strip().splitlines()[-1] for output in outputs]
    assert len(set(lines)) == 1, outputs
    assert re.search(f"^lcm-jax train: error: {said}", lines[0]), outputs
    assert not any("Traceback" in output or "First step" in output for output in outputs)


def test_what_may_differ_from_host_to_host(quick, tmp_path):
    """Paths of inputs and the number of threads may differ; the content of inputs is compared instead."""

    def config(**changes):
        tree = default_config().to_dict()
        tree["model"]["folder"] = "x"
        for name, of in changes.items():
            section, _, key = name.partition("__")
            tree[section][key] = of
        return from_dict(tree)

    own = config(model__folder="y", data__data_dir="/a", data__directory="/b", data__threads=9)
    assert facts(own) == facts(config())
    assert facts(config(data__split="test")) != facts(config())
    model = shutil.copytree(value(quick, "model.folder"), tmp_path / "model")
    data = shutil.copytree(value(quick, "data.data_dir"), tmp_path / "data")
    places = [(value(quick, "model.folder"), value(quick, "data.data_dir")), (model, data)]
    found = [
        (identity.of_folder(read_folder(folder)).facts, identity.of_data(open_data(DataConfig(data_dir=str(at)))).facts)
        for folder, at in places
    ]
    assert found[0] == found[1]


class Store:
    """The key-value store of JAX's coordinator, for processes one after the other."""

    def __init__(self):
        self.content, self.read = {}, 0

    def key_value_set(self, key, text):
        assert key not in self.content
        self.content[key] = text

    def blocking_key_value_get(self, key, _):
        self.read += len(self.content[key])
        return self.content[key]


def test_a_thousand_processes_read_little(monkeypatch):
    """Those that agree read a hash and the verdict, however long the facts are."""
    store, count = Store(), 1000
    run = agreement.distributed.global_state
    monkeypatch.setattr(run, "client", store)
    monkeypatch.setattr(run, "num_processes", count)
    long = {f"data file {i}": "x" * 100 for i in range(1000)}

    def agree(process, given):
        monkeypatch.setattr(run, "process_id", process)
        monkeypatch.setattr(agreement, "_call", itertools.count())
        agreement.agree(given)

    for process, given in ((1, long), (2, {**long, "data file 7": "y"}), (3, {**long, "data file 8": "z"})):
        store.content = {}
        with pytest.raises(KeyError, match="agree/0/1"):  # process 0 would wait for the others
            agree(0, long)
        store.read = 0
        with pytest.raises(KeyError, match="verdict"):
            agree(process, given)
        assert (store.read < 100) == (given is long)
    reports = [
        {"process": f"process {i}", "problem": "", "later": False, "difference": "d" * (i > 1)} for i in range(count)
    ]
    store.content = {f"lcm_jax/agree/0/{i}": json.dumps(report) for i, report in enumerate(reports) if i}
    with pytest.raises(
        agreement.Disagreement, match="^d; 997 more processes differ; start all processes with the same"
    ):
        agree(0, long)
    store.content = {"lcm_jax/agree/0/verdict": json.dumps(["why", True]), "lcm_jax/agree/0/hash": "x"}
    monkeypatch.setattr(run, "process_id", 1)
    monkeypatch.setattr(agreement, "_call", itertools.count())
    with pytest.raises(Unavailable, match="^why$"):
        agreement.agree({}, Unavailable("why"))
    report = json.loads(store.content["lcm_jax/agree/0/1"])
    assert agreement._verdict([report, {**report, "problem": ""}]) == (f"{report['process']}: why", True)


def test_one_process_alone_has_its_own_problem_only():
    agreement.agree({"config.steps": "6"})
    with pytest.raises(UserError, match="^its problem$"):
        agreement.agree({}, "its problem")


@pytest.mark.parametrize(
    ("here", "there", "same"),
    [
        ("--a=1 --b=2", "--b=2  --a=1", True),
        ("--a=1 --a=2", "--a=2", True),
        ("--a=1 --a=2", "--a=1", False),
        ("--xla_disable_hlo_passes=a/b", "", False),
        ("--xla_gpu_enable_triton_gemm=false", "", False),
        ("--xla_dump_to=dumps --xla_gpu_kernel_cache_file=k", "--xla_gpu_cuda_data_dir=/usr/cuda", True),
        ("--xla_gpu_load_autotune_results_from=mine", "", True),
        ("--xla_force_host_platform_device_count=4", "", True),
    ],
)
def test_flags_of_the_compiler_are_compared_without_places(monkeypatch, here, there, same):
    found = []
    for flags in (here, there):
        monkeypatch.setenv("XLA_FLAGS", flags)
        found.append(agreement.settings())
    assert (found[0] == found[1]) == same


def test_devices_are_compared_by_number_and_kind(monkeypatch):
    devices = jax.devices()
    assert agreement.of_devices(devices)["devices per process"] == "8 cpu (cpu)"
    assert agreement.of_devices(devices[:4])["devices per process"] == "4 cpu (cpu)"
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert agreement.of_devices(devices)["devices per process"] == "0 "
