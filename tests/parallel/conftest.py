"""A folder of models of one level each: every kind of exchange, and few operations to compile."""

import dataclasses

import pytest
from fixtures_folders import write_little
from little import BATCH, SIZE

from lcm_jax.config import Config, EMAConfig, ModelConfig, OptimizerConfig
from lcm_jax.data.config import DataConfig
from lcm_jax.interop.folder import read_folder
from lcm_jax.interop.tokenizer import load_tokenizer
from lcm_jax.objectives.lcd import LCDConfig
from lcm_jax.training.networks import make_parts


@pytest.fixture(scope="session")
def little(tmp_path_factory):
    return read_folder(write_little(tmp_path_factory.mktemp("little") / "teacher"))


@pytest.fixture(scope="session")
def configure(little):
    """configure(**changes of Config) -> (config, parts)."""

    def configure(*, model=None, **changes):
        config = Config(
            model=ModelConfig(folder=str(little.path), **(model or {})),
            data=DataConfig(image_size=SIZE),
            batch_size=BATCH,
            # the usual Huber distance, of c = 0.001, multiplies the rounding of a difference near zero by 1,000
            lcd=LCDConfig(w_embedding_init="random", w_embedding_dim=8, empty_prompts=0.3, huber_c=0.1),
            # an eps this large keeps the sign of a gradient near zero from deciding over an update
            optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3),
            ema=EMAConfig(decay=0.9),
        )
        config = dataclasses.replace(config, **changes)
        return config, make_parts(config, little, load_tokenizer(little))

    return configure
