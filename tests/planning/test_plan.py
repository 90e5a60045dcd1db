"""The plan command on a micro model: compiled for real topologies, parsed, printed and saved."""

import json
import math
import pathlib

import jax
import pytest
from fixtures_folders import write_little

from lcm_jax import cli, config_file, plan
from lcm_jax.parallel.mesh import make_mesh
from lcm_jax.planning import fast, topology
from lcm_jax.planning.blueprint import blueprint
from lcm_jax.planning.compiled import COLLECTIVES
from lcm_jax.planning.report import table
from lcm_jax.training.program import make_program

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    teacher = write_little(tmp_path_factory.mktemp("little") / "teacher", unet_channels=[32])
    return [
        f"--config={ROOT}/configs/digits.py:smoke",
        f"--config.model.folder={teacher}",
        "--config.model.dtype=bfloat16",
        "--config.data.image_size=8",
        "--config.mesh.cpu_devices=0",
    ]


@pytest.fixture(scope="module")
def denoising(options):
    """One network, forward and backward: a third of the time that libtpu takes for a distillation."""
    return [f"--config={ROOT}/configs/digits_teacher.py", *options[1:], "--config.denoising.train_text_encoder=False"]


@pytest.fixture(scope="module")
def autoencoder(options):
    """The smallest step there is, where it does not matter which."""
    return [f"--config={ROOT}/configs/digits_teacher.py:vae", *options[1:], "--config.batch_size=8"]


def planned(options, folder, capsys, *more):
    code = cli.run(plan.main, [*options, *more, f"--json={folder}/plan.json"], "plan")
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads((folder / "plan.json").read_text()), output


def used(figures):
    assert figures["collectives"].keys() == set(COLLECTIVES)
    return {kind for kind, found in figures["collectives"].items() if found["count"]}


DIVIDED = ["--topology=v5p-16", "--batch-a-chip=2", "--config.mesh.fsdp=8"]


def test_weights_divided_over_a_v5p(denoising, tmp_path, capsys):
    """Only weights and gradients are communicated; anything else here is a bug."""
    figures, output = planned(denoising, tmp_path, capsys, *DIVIDED, f"--save={tmp_path}/x")
    assert used(figures) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert figures["to_explain"] == []
    parameters = 8 * figures["memory_bytes"]["parameters"] // 4  # of the whole, in number; some are not divided
    gathered, summed = (figures["collectives"][kind] for kind in ("all-gather", "reduce-scatter"))
    summed = summed["bytes"] + figures["collectives"]["all-reduce"]["bytes"]
    assert 0 < gathered["bytes"] <= 2 * 2 * parameters  # forward and backward; bfloat16
    assert 0 < summed <= 4 * parameters + 4096  # float32, and the loss
    assert figures["fits"] is True
    assert figures["mesh"] == {"data": 1, "fsdp": 8}
    assert figures["attention"] == "pallas"  # what train takes on a TPU; not this machine's
    assert (figures["batch_size"], figures["product"], figures["topology"]) == (16, "v5p-16", "v5p:2x2x2")
    memory = figures["memory_bytes"]
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    seconds = figures["seconds"]
    assert seconds["step"] == pytest.approx(seconds["compute"] + seconds["exposed"])
    assert 0 < seconds["floor"] < seconds["step"]
    assert any(row["module"].startswith("denoiser/mid_block/attentions") for row in figures["profile"])
    for said in ("it fits", "all-gather", "fraction of peak", "where the time goes", "compiled in"):
        assert said in output.out
    assert "2 per chip and micro-batch" in output.out
    assert "per chip and micro-batch" in table({**figures, "batch_a_chip": 8, "accumulate": 2})
    assert "per chip and micro-batch" not in table({**figures, "batch_a_chip": 8})
    # and libtpu keeps quiet
    assert output.err == "Compiling the step; for Stable Diffusion it takes 10 to 90 minutes ...\n"
    _, header, content = (tmp_path / "x").read_bytes().split(b"\n", 2)
    made = json.loads(header)
    assert made["made_for"]["devices"] == "8 x TPU v5"
    assert 10_000 < made["step"] < len(content)
    layers, output = planned(denoising, tmp_path, capsys, *DIVIDED, "--fast")
    assert layers["fast"] is True
    assert "fast: added up from layers" in output.out
    assert layers.keys() == {"fast", *figures}
    for part in ("compute", "exchange"):  # the gradient alone is half of it
        assert layers["seconds"][part] == pytest.approx(seconds[part], rel=0.25)
    assert layers["seconds"]["step"] == pytest.approx(seconds["compute"] + layers["seconds"]["exposed"], rel=0.25)
    exact = ("parameters", "ema", "optimizer", "frozen", "batch")
    assert [layers["memory_bytes"][part] for part in exact] == [memory[part] for part in exact]
    assert layers["collectives"]["all-gather"]["bytes"] == pytest.approx(gathered["bytes"], rel=0.01)


class Free:
    """Prices of layers that cost nothing, so that nothing is compiled."""

    def of(self, piece, step):
        return fast.Price({}, 0.0, 0.0, 0.0, 0.0)


def test_temporaries_of_layers(denoising):
    """What lives between the layers: with twice the images twice the activations, with recomputation fewer."""

    def temporaries(*changes):
        config = config_file.load(denoising[0].removeprefix("--config="), [*denoising[1:], *changes])
        step = make_program(config, blueprint(config), make_mesh(config.mesh, jax.devices()[:1]))
        return fast.memory(fast.Estimate(step, topology.parse("v5p-8"), Free()))["temporaries"]

    one, two, recomputed = (
        temporaries("--config.batch_size=8", "--config.model.remat=none"),
        temporaries("--config.batch_size=16", "--config.model.remat=none"),
        temporaries("--config.batch_size=16", "--config.model.remat=block"),
    )
    assert 1.5 * one < two < 2.2 * one
    assert recomputed < 0.8 * two


def test_weights_whole_on_a_v4(autoencoder, tmp_path, capsys):
    """Only sums cross the links; each chip is one device."""
    figures, _ = planned(autoencoder, tmp_path, capsys, "--topology=v4:2x2x1")
    assert used(figures) == {"all-reduce"}
    assert figures["to_explain"] == []
    assert figures["chips"] == 4
    assert figures["chip_memory_bytes"] == 32 * 2**30
    assert figures["memory_bytes"]["optimizer"] == pytest.approx(2 * figures["memory_bytes"]["parameters"], rel=0.01)


def test_this_machines_own_devices(autoencoder, tmp_path, capsys):
    figures, output = planned(autoencoder, tmp_path, capsys, "--topology=local")
    assert figures["chips"] == jax.device_count()
    assert figures["fits"] is None
    assert figures["flops_a_chip"]["model"] > 0
    assert "it fits" not in output.out
    assert "per chip and micro-batch" not in output.out


def test_a_lora_is_planned(options):
    """Its state is the adapters', the base is among what is frozen, and its weights' gradient is not counted."""
    changes = ["--config.lora.rank=2", "--config.lcd.w_embedding_dim=0"]
    adapters, whole = (
        config_file.load(options[0].split("=")[1], [*options[1:], *more]) for more in (changes, changes[1:])
    )
    programs = [
        make_program(each, blueprint(each), make_mesh(each.mesh, jax.devices()[:1])) for each in (adapters, whole)
    ]

    def numbers(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    of_base = numbers(programs[1].frozen["teacher"])
    assert numbers(programs[0].frozen["unet"]) == of_base == numbers(programs[1].state["params"])
    assert "teacher" not in programs[0].frozen
    assert numbers(programs[0].state["params"]) < of_base / 2
    assert plan.model_flops(adapters) < plan.model_flops(whole)


def test_a_batch_that_is_too_small_is_raised_and_said(options, capsys):
    config = plan.config_file.load(options[0].removeprefix("--config="), options[1:])
    assert plan.with_batch(config, None, 32).batch_size == 32
    assert "config.batch_size=8 is raised to 32" in capsys.readouterr().out
    assert plan.with_batch(config, None, 4).batch_size == 8
    assert plan.with_batch(config, 3, 4).batch_size == 12


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--topology=v7x-16"], "--topology=v7x-16 is unknown; use v4-64 or v4:4x4x4"),
        (["--topology=v5p-16", "--config.mesh.fsdp=3"], "config.mesh.fsdp=3 do not multiply to the 8 devices"),
        (["--topology=v5p-16", "--config.batch_size=12"], "config.batch_size=12 is not divisible by the 8 devices"),
        (["--topology=v5p-16", "--batch-a-chip=0"], "--batch-a-chip=0; it must be at least 1"),
        (["--topology=v5p-16", "--slices=0"], "--slices=0; it must be at least 1"),
        (["--topology=v5p-16", "--search", "--batch-a-chip=0"], "--batch-a-chip=0; it must be at least 1"),
        (["--topology=v5p-16", "--json=/"], "--json=/ is a folder"),
        (["--topology=local", "--fast"], "--fast does not go with --topology=local"),
        (["--topology=v5p-16", "--fast", "--save=x"], "--fast does not go with --save=x"),
        (["--topology=local", "--search"], "local has no time estimates"),
        (["--topology=v5p-16", "--search", "--save=x"], "--save writes one step"),
        (["--topology=v5p-16", "--jsn=x"], "there is no option --jsn=x; did you mean '--json'?"),
    ],
)
def test_bad_input_is_one_line(options, given, said, capsys):
    assert cli.run(plan.main, [*options, *given], "plan") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_search_recommends_the_fastest_that_fits(options, monkeypatch, capsys, tmp_path):
    """With fake compiler results: a larger batch per chip and less recomputation are faster, but need more memory."""

    def report(config, compiled):
        batch, fsdp = config.batch_size // 4, config.mesh.fsdp
        memory = (
            batch * {"layer": 0.5, "block": 1, "block_save_attention": 2, "none": 4}[config.model.remat] + 8 // fsdp
        )
        rate = (
            batch**0.5
            * {"layer": 2, "block": 3, "block_save_attention": 3.5, "none": 4}[config.model.remat]
            / fsdp**0.1
        )
        return {
            "batch_size": config.batch_size,
            "fits": memory <= 14,
            "memory_bytes": {"total": memory * 2**30, "temporaries": memory * 2**30},
            "chip_memory_bytes": 14 * 2**30,
            "images_per_second": rate,
        }

    monkeypatch.setattr(plan, "report", report)
    monkeypatch.setattr(plan, "compile_step", lambda config, where: None)
    code = cli.run(plan.main, [*options, "--topology=v5p-8", "--search", f"--json={tmp_path}/s.json"], "plan")
    assert code == 0
    output = capsys.readouterr().out
    found = json.loads((tmp_path / "s.json").read_text())
    best = max((each for each in found if not each["why_not"]), key=lambda each: each["images_per_second"])
    assert found[0] == best
    expected = {"batch_size": best["batch_size"], "mesh.fsdp": best["fsdp"], "model.remat": best["remat"]}
    assert "Use " + " ".join(f"--config.{name}={value}" for name, value in expected.items()) in output
    refused = [each for each in found if each["why_not"]]
    assert refused
    assert all("of 14 GiB" in each["why_not"] for each in refused)


def test_nothing_that_fits_is_told_by_the_exit_code(options, monkeypatch, capsys):
    monkeypatch.setattr(plan, "compile_step", lambda *_: (_ for _ in ()).throw(plan.NoFit("out of memory", None)))
    assert cli.run(plan.main, [*options, "--topology=v5p-8", "--search", "--batch-a-chip=2"], "plan") == 1
    output = capsys.readouterr().out
    assert "  out of memory" in output
    assert "None of these combinations fits." in output


def test_what_does_not_fit_is_told_with_its_parts(autoencoder, monkeypatch, capsys, tmp_path):
    """Any other compiler error is a UserError."""
    said = ["RESOURCE_EXHAUSTED: 23 of 16 GiB\nat length"]

    def give_up(self):
        raise jax.errors.JaxRuntimeError(said[0])

    monkeypatch.setattr(jax.stages.Lowered, "compile", give_up)
    more = ["--topology=v5p-8", "--config.model.remat=block", f"--json={tmp_path}/no.json"]
    assert cli.run(plan.main, [*autoencoder, *more], "plan") == 1
    output = capsys.readouterr().out
    figures = json.loads((tmp_path / "no.json").read_text())
    assert figures["fits"] is False
    parts = figures["memory_bytes"]
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)
    helps = "What may help: a smaller batch, config.accumulate, a larger config.mesh.fsdp, config.mesh.frozen=sharded"
    compilers = f"The compiler: {said[0].splitlines()[0]}\n"
    for said_then in ("it does NOT fit into 95.000 GiB", "  optimizer ", compilers, helps):
        assert said_then in output
    said[0] = "INTERNAL: a mishap"
    assert cli.run(plan.main, [*autoencoder, "--topology=v5p-8"], "plan") == 2
    assert "the compiler failed: INTERNAL: a mishap" in capsys.readouterr().err
