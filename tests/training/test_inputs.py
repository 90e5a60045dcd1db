"""A run is resumed and exported only with its original inputs: a changed model or data set is an error."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from commands import train_on_one
from safetensors.numpy import load_file, save_file
from stored_records import rewrite, shout, turned
from transformers import CLIPTokenizer

from lcm_jax import export
from lcm_jax.adapters.lora import LoraConfig
from lcm_jax.config import load_resolved, resolved
from lcm_jax.data.config import DataConfig
from lcm_jax.data.sources import open_data
from lcm_jax.data.sources.tfds import TfdsSource
from lcm_jax.errors import UserError
from lcm_jax.interop.folder import read_folder
from lcm_jax.objectives.autoencoder import AutoencoderConfig
from lcm_jax.training import identity, loop

UNET = "unet/diffusion_pytorch_model.safetensors"


class Reached(Exception):
    """Raised when a run's start has passed the comparison of its inputs."""


class Run:
    """A run with its own copies of model and data; each start ends once its inputs are accepted."""

    def __init__(self, quick, root, monkeypatch):
        self.model, self.data, self.workdir = root / "model", root / "data", root / "run"
        places = {"model.folder": self.model, "data.data_dir": self.data}
        for name, copy in places.items():
            (original,) = (o.partition("=")[2] for o in quick if o.startswith(f"--config.{name}="))
            shutil.copytree(original, copy)
        self.options = [*quick, "--config.data.split=validation", f"--workdir={self.workdir}"]
        monkeypatch.setattr(loop, "load_tokenizer", self._reached)
        self._patch = monkeypatch
        self.accepted()
        monkeypatch.setattr(loop, "finalized_steps", lambda _: [2])  # begun: a checkpoint is there

    @staticmethod
    def _reached(_):
        raise Reached

    def start(self, *more):
        places = [f"--config.model.folder={self.model}", f"--config.data.data_dir={self.data}"]
        return train_on_one([*self.options, *places, *more])

    def accepted(self):
        with pytest.raises(Reached):
            self.start()


@pytest.fixture
def run(quick, tmp_path, monkeypatch):
    return Run(quick, tmp_path, monkeypatch)


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def scale(file, key, factor):
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key] * np.float32(factor)}, file, metadata={"format": "pt"})


def shard(data):
    (file,) = data.glob("captioned_digits/*/*-validation.array_record*")
    return file


CHANGES = {
    "unet weights": lambda run: scale(run.model / UNET, "conv_in.weight", 1.3),
    "text_encoder weights": lambda run: scale(
        run.model / "text_encoder/model.safetensors", "final_layer_norm.weight", 1 + 1e-6
    ),
    "unet/config.json": lambda run: change_json(run.model / "unet/config.json", norm_num_groups=2),
    "scheduler/scheduler_config.json": lambda run: change_json(
        run.model / "scheduler/scheduler_config.json", beta_end=0.013
    ),
    "tokenizer merges": lambda run: (run.model / "tokenizer/merges.txt").write_text("#version: 0.2\n"),
    "tokenizer settings": lambda run: change_json(run.model / "tokenizer/tokenizer_config.json", model_max_length=9),
    "data records 50 to 99": lambda run: rewrite(shard(run.data), shout(50)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_is_refused_by_name(run, name, capsys):
    run.accepted()
    before = (run.workdir / "config.json").read_text()
    CHANGES[name](run)
    assert run.start("--config.steps=7") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: {name}" in line
    assert f" changed since the run in {run.workdir} began; restore the original, or choose another --work" in line
    assert (run.workdir / "config.json").read_text() == before  # a start that is refused changes nothing
    (run.workdir / "inputs.json").unlink()  # as the line says; and as of a run of an older version
    run.accepted()
    assert identity.recorded(run.workdir)
    run.accepted()


def test_content_alone_counts(run):
    """Path, number of files, and the program that wrote them do not matter."""
    change_json(run.model / "unet/config.json", _diffusers_version="99.0", dropout=0.0, freq_shift=0)
    change_json(run.model / "vae/config.json", force_upcast=False)
    change_json(run.model / "text_encoder/config.json", dtype="float32", transformers_version="99.0")
    change_json(run.model / "scheduler/scheduler_config.json", solver_order=2, timestep_spacing="trailing")
    change_json(run.model / "model_index.json", image_encoder=[None, None])
    (run.model / "tokenizer/README.txt").write_text("of another version")
    tokenizer = CLIPTokenizer.from_pretrained(run.model / "tokenizer")
    shutil.rmtree(run.model / "tokenizer")
    tokenizer.save_pretrained(run.model / "tokenizer")  # tokenizer.json instead of vocab.json and merges.txt
    before = shard(run.data).read_bytes()
    rewrite(shard(run.data), turned)
    assert shard(run.data).read_bytes() != before
    tensors = load_file(run.model / UNET)
    (run.model / UNET).unlink()
    shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, run.model / "unet" / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (run.model / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    run.model, run.data = run.model.rename(run.model.with_name("b")), run.data.rename(run.data.with_name("c"))
    run.accepted()
    assert load_resolved(run.workdir).model.folder == str(run.model)


def test_without_a_record_inputs_must_lie_where_they_lay(run, capsys):
    (run.workdir / "inputs.json").unlink()
    run.model = run.model.rename(run.model.with_name("b"))
    assert run.start() == 2
    assert "holds a run with config.model.folder=" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["unet weights", "tokenizer merges"])
def test_a_changed_model_is_not_mixed_into_an_export(run, rank, name, tmp_path):
    config = load_resolved(run.workdir)
    if rank:
        whole = {"objective": "denoising", "autoencoder": AutoencoderConfig()}
        config = dataclasses.replace(config, **whole, lora=LoraConfig(rank=rank))
    (run.workdir / "config.json").write_text(resolved(config))
    out = tmp_path / ("out.safetensors" if rank else "out")
    with pytest.raises(UserError, match="holds no checkpoint yet"):  # it came past the comparison
        export.export(run.workdir, out)
    CHANGES[name](run)
    with pytest.raises(UserError, match=f"^{name} in {run.model} changed since the run in {run.workdir} began"):
        export.export(run.workdir, out)
    assert not out.exists()


def test_of_large_data_records_all_over_it_are_compared(quick, monkeypatch):
    (data_dir,) = (o.partition("=")[2] for o in quick if o.startswith("--config.data.data_dir="))
    source = open_data(DataConfig(data_dir=data_dir, split="validation"))
    read, stored = [], TfdsSource.stored
    monkeypatch.setattr(TfdsSource, "stored", lambda self, numbers: read.extend(numbers) or stored(self, numbers))
    monkeypatch.setattr(identity, "SAMPLE", 50)
    small = identity.of_data(source).facts
    assert sorted(read[50:]) == list(range(len(source)))
    monkeypatch.setattr(identity, "WHOLE", 1000)
    read.clear()
    large = identity.of_data(source).facts
    assert len(read) == len(set(read)) == 50
    assert {0, len(source) - 1} < set(read)
    assert max(np.diff(sorted(read))) < len(source) / 40
    assert large.keys() == small.keys()
    assert len(large) == identity.PARTS + 2


def test_weights_are_told_apart_by_each_bit(quick):
    (folder,) = (o.partition("=")[2] for o in quick if o.startswith("--config.model.folder="))
    model = read_folder(folder)
    before = identity.of_folder(model).facts
    flat = model.components["vae"].params
    path = next(path for path, array in flat.items() if array.ndim == 4)
    changed = flat[path].copy()
    changed.view(np.uint32).reshape(-1)[-1] ^= 1
    flat[path] = changed
    after = identity.of_folder(model).facts
    assert [name for name in after if after[name] != before[name]] == ["vae weights"]
    flat[path] = np.ascontiguousarray(changed)
    assert identity.of_folder(model).facts == after
