"""LoRA in one file: a frozen model learns through two thin matrices beside each chosen Linear.

    model = finetune.from_pretrained("openai/clip-vit-base-patch16")
    lora.add_lora(model, r=64, alpha=128, dropout=0.1)  # 72 Linears, 5,898,240 trainable parameters, 3.79 %
    ...                 # call model.train(), then train the parameters that require a gradient
    lora.save_adapter(model, "adapter")                 # 24 MB, in the format of Hugging Face's peft
    lora.merge(model)                                   # plain weights again, as fast as the base

The paper is Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685). Names
and files are those of peft, so adapters can be exchanged with it. An adapter or a setting that does not fit
raises a ValueError, and the model stays as it was.
"""

import json
import math
import os
import re
import tempfile
import warnings
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

# --- The layer -------------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """W x + b + (alpha / r) B A dropout(x). The weight W (out, in) is frozen; A (r, in) and B (out, r) are
    trained. They are r (in + out) numbers, and change W by a matrix of rank r or less. W and b keep their
    names, so a base's state dict fits with strict=False. use_rslora scales by alpha / sqrt(r) instead, so
    that a large r learns as fast as a small one (arXiv:2312.03732)."""

    def __init__(self, base, r, alpha, dropout=0.0, use_rslora=False):
        # "meta" allocates nothing: the weights are the base's.
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.dropout = nn.Dropout(dropout)
        # fp32 even beside a bf16 base, as in peft: bf16 would round the small steps of training away.
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, dtype=dtype, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=dtype, device=base.weight.device))
        # As in peft, A is uniform within 1 / sqrt(in). B is 0, so an adapted model starts as the base.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.strength = 1.0  # 0 gives the base, 1 the adapted model
        self.train(base.training)  # a new module is in training mode, but its base may be in eval mode

    @property
    def scaling(self):
        return self.strength * self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)  # (..., out)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        # peft scales the output of B. Scaling its input is the same and cheaper: a token has r numbers there.
        x = F.linear(self.dropout(x), self.lora_A) * self.scaling  # (..., r)
        return (y + F.linear(x, self.lora_B)).to(y.dtype)  # (..., out)

    def delta(self):
        """The change of the weight, (out, in)."""
        return self.lora_B @ self.lora_A * self.scaling


# --- A model with adapters -------------------------------------------------------------------------------


def adapters(model):
    """{name: LoRALinear} of a model. ValueError if there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not found:
        raise ValueError("this model has no adapters: add_lora(model, ...) inserts them")
    return found


def checksum(model):
    """A number that depends on all weights of a model. An adapter fits only the weights it was trained on."""
    number = 0
    for weight in model.state_dict().values():
        number = zlib.crc32(weight.cpu().numpy().tobytes(), number)
    return number


def linears_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def find_targets(model, targets):
    """The names of the Linears to adapt. A target is one or more whole components of a name, such as
    "q_proj", "layers.0" or "vision_model". It selects all Linears that have it, "all-linear" selects all."""
    linears, chosen = linears_of(model), []
    for target in [targets] if isinstance(targets, str) else targets:
        # The dots keep "proj" from matching "q_proj".
        found = [name for name in linears if target == "all-linear" or f".{target}." in f".{name}."]
        if not found:
            names = {name.split(".")[-1] for name in linears} | {name.split(".")[0] for name in linears}
            raise ValueError(f"no Linear is named {target!r}: use {', '.join(sorted(names))} or all-linear")
        chosen.extend(found)
    return list(dict.fromkeys(chosen))


def insert(model, settings, dropout, use_rslora):
    """Replace the Linears of settings {name: (r, alpha)} by LoRALinears, and freeze everything else."""
    if not settings:
        raise ValueError("there is no Linear to adapt: name some as targets")
    for name, (r, alpha) in settings.items():
        if not (isinstance(r, int) and r >= 1 and alpha > 0 and 0 <= dropout < 1):
            given = f"not r={r!r}, alpha={alpha!r}, dropout={dropout}"
            raise ValueError(f"r must be an integer >= 1, alpha > 0 and 0 <= dropout < 1, {given}")
        linear = model.get_submodule(name)
        if isinstance(linear, LoRALinear):
            raise ValueError(f"{name} has an adapter already: merge it, or start again from the base")
        # The out_proj of nn.MultiheadAttention is a subclass of Linear and is never called (peft #761).
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name} is a {type(linear).__name__}, where LoRA may have no effect: omit it")
    for name, (r, alpha) in settings.items():
        model.set_submodule(name, LoRALinear(model.get_submodule(name), r, alpha, dropout, use_rslora))
    for name, parameter in model.named_parameters():
        if not name.endswith(("lora_A", "lora_B")):
            parameter.requires_grad_(False)


def add_lora(model, r, alpha, dropout=0.0, targets=("q_proj", "k_proj", "v_proj"), use_rslora=False):
    """Put adapters beside the Linears that `targets` name (see find_targets), freeze all other parameters of
    `model`, which may be one tower, and return the number of adapters. A second call can adapt other Linears
    with other settings."""
    names = find_targets(model, targets)
    insert(model, dict.fromkeys(names, (r, alpha)), dropout, use_rslora)
    return len(names)


def trainable_parameters(model):
    """(trainable, all) parameters, as peft's get_nb_trainable_parameters counts them."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def set_strength(model, strength):
    """Scale the adapters: 0 gives the base, 1 the adapted model."""
    for layer in adapters(model).values():
        layer.strength = strength


@torch.no_grad()
def merge(model):
    """Add each adapter to its weight and put a plain Linear in its place: the same function without extra
    work, as peft's merge_and_unload. Unlike in some libraries, eval() does not merge here, so a state dict
    keeps the base's weights until you merge (peft #1035)."""
    layers = adapters(model)
    deltas = [layer.delta() for layer in layers.values()]
    if not all(delta.isfinite().all() for delta in deltas):
        raise ValueError("an adapter holds NaN or infinity: merging it would spoil the base")
    for (name, layer), delta in zip(layers.items(), deltas):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        weight = (layer.weight + delta).to(layer.weight.dtype)  # a new one: other models may share the old
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        model.set_submodule(name, plain.train(layer.training))


# --- Files, as peft writes and reads them ----------------------------------------------------------------


def save_adapter(model, folder, base=None):
    """Write adapter_config.json and adapter_model.safetensors, which peft.PeftModel.from_pretrained opens.
    base: the base model's name. The strength is not saved. ValueError if the adapters have different dropouts
    or use_rslora, of which a file has one."""
    layers, folder = adapters(model), Path(folder)
    first = next(iter(layers.values()))
    if len({(layer.dropout.p, layer.use_rslora) for layer in layers.values()}) > 1:
        raise ValueError("the adapters differ in dropout or use_rslora: save each tower by itself")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base and str(base),
        "r": first.r,
        "lora_alpha": first.alpha,
        # peft searches for (.*\.)?PATTERN$, so that a pattern may be the end of a name. With ^ it must be the
        # whole name.
        "rank_pattern": {f"^{name}": layer.r for name, layer in layers.items() if layer.r != first.r},
        "alpha_pattern": {f"^{name}": x.alpha for name, x in layers.items() if x.alpha != first.alpha},
        "lora_dropout": first.dropout.p,
        "use_rslora": first.use_rslora,
        "target_modules": list(layers),
    }
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().cpu()
    files = {"adapter_model.safetensors": save(tensors, {"format": "pt"})}
    files |= {"adapter_config.json": json.dumps(config, indent=1).encode()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # each file appears whole or not at all
        for name, content in files.items():
            Path(temporary, name).write_bytes(content)
        (folder / "adapter_config.json").unlink(missing_ok=True)  # no old configuration beside new weights
        for name in files:
            os.replace(Path(temporary, name), folder / name)


# Settings of peft.LoraConfig that we obey, and those that don't matter once an adapter is trained. All others
# must be off or have peft's default ("gaussian", an initialisation of A, doesn't matter either).
MAY_DIFFER = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
MAY_DIFFER |= {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
MAY_DIFFER |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode"}


def read_adapter(folder):
    """(peft.LoraConfig, {"NAME.lora_A" or "NAME.lora_B": tensor}). ValueError if it isn't plain LoRA."""
    import peft

    is_whole = (folder / "adapter_config.json").exists() and any(folder.glob("adapter_model.*"))
    if not is_whole:  # peft would look for this name on the hub
        inside = ", ".join(str(path.parent) for path in sorted(folder.glob("*/adapter_config.json")))
        advice = f"give one of {inside}" if inside else "it lacks adapter_config.json or the weights"
        raise ValueError(f"{folder} is not the folder of an adapter: {advice}")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        weights = peft.load_peft_weights(str(folder), device="cpu").items()
        tensors = {key.removeprefix("base_model.model.").removesuffix(".weight"): x for key, x in weights}
    except Exception as error:  # peft and safetensors raise a dozen kinds
        raise ValueError(f"the adapter in {folder} can't be read: {' '.join(str(error).split())}") from error
    default = peft.LoraConfig()
    for name, value in vars(config).items():
        if name not in MAY_DIFFER and value and value not in (getattr(default, name, None), "gaussian"):
            value = getattr(value, "value", value)  # peft_type is an enumeration
            raise ValueError(f"{folder} is not plain LoRA: its {name} is {value}")
    return config, tensors


def load_adapter(model, folder):
    """Insert the adapters of a folder that peft or save_adapter wrote. Its tensors say on which Linears.
    ValueError if they don't fit the model; a warning if the folder names another base."""
    folder, linears = Path(folder), linears_of(model)
    config, tensors = read_adapter(folder)
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    # An adapter that was saved from one tower has names without the tower's.
    parts = [part for part, _ in model.named_children()]
    towers = [part for part in parts if any(f"{part}.{name}" in linears for name in names)]
    if towers:
        raise ValueError(f"{folder} is for one tower: load it on {' or '.join(f'model.{x}' for x in towers)}")

    def by_pattern(name, patterns, default):  # as in peft, the first pattern that matches the end of the name
        return next((x for key, x in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    settings, expected = {}, {}
    for name in names:
        r = by_pattern(name, config.rank_pattern or {}, config.r)
        settings[name] = r, by_pattern(name, config.alpha_pattern or {}, config.lora_alpha)
        if name in linears:
            expected[f"{name}.lora_A"] = (r, linears[name].in_features)
            expected[f"{name}.lora_B"] = (linears[name].out_features, r)
    for name in sorted(expected.keys() | tensors.keys()):
        shape = tuple(tensors[name].shape) if name in tensors else "missing"
        if shape != expected.get(name):
            needed = expected.get(name, "absent, as there is no such Linear")
            raise ValueError(f"{folder} doesn't fit: its {name} is {shape}, but must be {needed}")
    trained_on, base = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    if trained_on and base and trained_on != base:
        warnings.warn(f"{folder} was trained on {trained_on}, but this model is {base}", stacklevel=2)
    insert(model, settings, config.lora_dropout, config.use_rslora)
    model.load_state_dict(tensors, strict=False)
