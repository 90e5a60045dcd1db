"""Maps LoRA tensor keys to a component, a module and a part (A, B or alpha), and back.

diffusers, peft   unet.mid_block.resnets.0.conv1.lora_A.weight          .lora_B.weight   (alpha: not a tensor)
kohya's scripts   lora_unet_mid_block_resnets_0_conv1.lora_down.weight  .lora_up.weight  .alpha
the same, LDM     lora_unet_middle_block_0_in_layers_2.lora_down.weight

The component may be omitted or combined with `base_model.model.` (peft's wrapper). Older diffusers versions wrote
`.lora.down.weight`, `.lora_linear_layer.down.weight` and `….attn1.processor.to_q_lora.down.weight`. All forms are read,
even mixed in one file: modules are looked up in a table of all spellings of the network's modules.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from lcm_jax.errors import UserError, nearest, plain
from lcm_jax.interop.lora.ldm_names import ldm_names

KOHYA_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",  # in models with two text encoders
    "lora_te2_": "text_encoder_2",
}
_PREFIXES = re.compile(r"(?:(unet|text_encoder_2|text_encoder)\.|base_model\.model\.)")
_DOWN = {"A": "A", "B": "B", "down": "A", "up": "B"}
_PART = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.lora_(?P<peft>A|B)(?:\.\w+)?\.weight|"  # optionally with the adapter's name
    r"(?:\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)(?P<old>down|up)\.weight|"
    r"\.(?P<alpha>alpha))"
)
_REFUSED = {
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"\.hada_": "a LoHa",
    r"\.lokr_": "a LoKr",
    r"\.lora_mid\.": "a LoCon with a Tucker core",
    r"\.b?oft_|\.oft_diag": "an OFT",
    r"\.[ab][12]\.weight$": "a GLoRA",
    r"\.diff(_b)?$": "full weight differences",
    r"\.lora_embedding_[AB]": "an adapter of an embedding",
    r"\.lora_B\.(\w+\.)?bias$|\.lora_up\.bias$": "a LoRA with biases",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner\.embedders)\.(?!.*lora)": "a whole model",
    r"^(image_proj|ip_adapter)\.": "an IP-Adapter",
    r"^(emb_params|string_to_param|clip_[lg])$": "a textual inversion",
}
LONGEST_KEY = 500  # characters; keys in published files have up to about 110
TEXT_MODEL = "text_model."  # prefix of CLIP text encoder layers up to transformers 4


@dataclasses.dataclass(frozen=True)
class Name:
    """Identifies a LoRA tensor.

    Attributes:
      component: "unet", "text_encoder", …
      module: path of the module in this package's network.
      part: "A", "B" or "alpha".
    """

    component: str
    module: str
    part: str


def refuse(keys: Iterable[str]) -> None:
    """Raises UserError, naming the format, if the keys are not those of a plain LoRA."""
    for key in keys:
        if len(key) > LONGEST_KEY:
            raise UserError(f"it is not a LoRA: the name of a tensor has {len(key)} characters ({plain(key, 60)})")
        for pattern, kind in _REFUSED.items():
            if re.search(pattern, key):
                raise UserError(
                    f"it holds {kind} ({key}); only plain LoRA of linear layers and convolutions is supported"
                )


class Names:
    """Lookup tables of all module spellings of some networks."""

    def __init__(self, modules: Mapping[str, Iterable[str]]) -> None:
        """Takes component → paths of its linear layers and convolutions."""
        self._dotted = {component: _dotted(component, paths) for component, paths in modules.items()}
        self._flat = {
            component: {spelled.replace(".", "_"): module for spelled, module in dotted.items()}
            for component, dotted in self._dotted.items()
        }

    def read(self, key: str) -> Name | None:
        """Returns the name for a key; None for an unknown part, component or module, see `fault`."""
        split = self._split(key)
        if split is None:
            return None
        tables, component, spelled, part = split
        module = tables.get(component, {}).get(spelled)
        return None if module is None else Name(component, module, part)

    def fault(self, key: str) -> str:
        """Returns why `read` doesn't accept a key, with the most similar module."""
        split = self._split(key)
        if split is None:
            return f"{key} is not a tensor of a LoRA (….lora_A.weight, ….lora_down.weight, ….alpha)"
        tables, component, spelled, _ = split
        if component not in tables:
            return f"{key} is for {component}, which this model doesn't have; it has {', '.join(tables)}"
        known = tables[component] if len(tables[component]) < 5000 else ()
        return f"this model's {component} has no module {spelled}{nearest(spelled, known)}"

    def _split(self, key: str) -> tuple[Mapping[str, Mapping[str, str]], str, str, str] | None:
        """Returns lookup tables, component, module spelling and part; None if the key is not a LoRA tensor."""
        found = _PART.fullmatch(key)
        if found is None:
            return None
        part = "alpha" if found["alpha"] else _DOWN[found["peft"] or found["old"]]
        spelled, component = found["module"], None
        while prefix := _PREFIXES.match(spelled):
            component, spelled = prefix[1] or component, spelled[prefix.end() :]
        for start, named in KOHYA_COMPONENTS.items():
            if spelled.startswith(start):
                return self._flat, named, spelled.removeprefix(start), part
        spelled = spelled.replace(".processor.", ".")
        if component is None:
            component = next((name for name, known in self._dotted.items() if spelled in known), "unet")
        return self._dotted, component, spelled, part


def module_text(key: str) -> str:
    """Returns the key up to the module, without the part; the key itself if it is not a LoRA tensor."""
    found = _PART.fullmatch(key)
    return found["module"] if found else key


def _dotted(component: str, modules: Iterable[str]) -> dict[str, str]:
    """Returns spelling → module, for every dotted spelling of a network's modules."""
    table, modules = {}, list(modules)
    ldm = ldm_names(modules) if component == "unet" else {}
    for module in modules:
        spellings = [module, ldm.get(module, module)]
        spellings += [re.sub(r"\.to_out\.0$", ".to_out", spelled) for spelled in spellings]
        if component.startswith("text_encoder"):
            spellings.append(re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", module))
            inner = [spelled.removeprefix(TEXT_MODEL) for spelled in spellings]
            spellings += [*inner, *(TEXT_MODEL + spelled for spelled in inner)]
        table.update(dict.fromkeys(spellings, module))
    return table


def peft_key(name: Name) -> str:
    """Returns the key of lora_A or lora_B in diffusers' `save_lora_weights`."""
    return f"{name.component}.{peft_module(name)}.lora_{name.part}.weight"


def peft_module(name: Name) -> str:
    """Returns a key's module path; text encoders get `text_model.`, which diffusers reads with any transformers."""
    if name.component.startswith("text_encoder") and not name.module.startswith((TEXT_MODEL, "text_projection")):
        return TEXT_MODEL + name.module
    return name.module


def kohya_key(name: Name, *, two_text_encoders: bool = False) -> str:
    """Returns the key of a tensor in kohya's scripts."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}[name.component]
    if two_text_encoders and name.component == "text_encoder":
        prefix = "lora_te1_"
    part = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}[name.part]
    return f"{prefix}{peft_module(name).replace('.', '_')}.{part}"
