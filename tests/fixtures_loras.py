"""Random adapters for the tiny models, with distinct ranks and alphas so that mix-ups are noticed."""

import jax
import numpy as np

from lcm_jax.adapters import lora
from lcm_jax.interop.folder import Folder

UNET_TARGETS = (
    lora.Target(r"mid_block\..*(to_q|conv1|proj_in)", rank=2, alpha=1.0),
    lora.Target(r"down_blocks\..*to_out\.0", rank=3, alpha=3.0),
    lora.Target(lora.MODULES, rank=4, alpha=6.0),
)
TEXT_TARGETS = (lora.Target("q_proj|k_proj|v_proj|out_proj|fc1|fc2", rank=4, alpha=2.0),)


def kernels(folder: Folder) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns component -> module -> kernel shape, the argument of `read_lora`."""
    return {name: lora.kernels(folder.components[name].network().shapes) for name in ("unet", "text_encoder")}


def random_adapter(folder: Folder, component: str, targets, seed: int = 0) -> lora.Adapter:
    """Returns an adapter with nonzero B; its weight differences are some tenths of the weights."""
    shapes = folder.components[component].network().shapes
    adapter = lora.init(jax.random.key(seed), shapes, lora.choose(shapes, targets))
    random = np.random.default_rng(seed)
    params = {path: np.asarray(array) for path, array in adapter.params.items()}
    for path, array in params.items():
        if path.endswith(lora.B):
            params[path] = (0.3 * random.standard_normal(array.shape)).astype(np.float32)
    return lora.Adapter(params, adapter.alphas)


def random_lora(folder: Folder, seed: int = 0, targets=UNET_TARGETS) -> dict[str, lora.Adapter]:
    """Returns one adapter for the UNet and one for the text encoder."""
    return {
        "unet": random_adapter(folder, "unet", targets, seed),
        "text_encoder": random_adapter(folder, "text_encoder", TEXT_TARGETS, seed + 1),
    }


def differences(adapters: dict[str, lora.Adapter]) -> dict[str, np.ndarray]:
    """Returns 'component.module' -> dW in the layout of Flax kernels."""
    return {
        f"{component}.{path.removesuffix('.kernel')}": array
        for component, adapter in adapters.items()
        for path, array in lora.differences(adapter.params, adapter.alphas).items()
    }


def assert_same_differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = 1e-6):
    """Asserts equality within `tolerance` times the largest entry of each expected difference."""
    assert ours.keys() == theirs.keys()
    for module, difference in theirs.items():
        assert ours[module].shape == difference.shape, module
        assert np.abs(difference).max() > 0, module
        assert np.abs(ours[module] - difference).max() <= tolerance * np.abs(difference).max(), module
