"""LoRA in one file: a frozen model learns through two thin matrices beside each chosen Linear.

    model = finetune.from_pretrained("openai/clip-vit-base-patch16")
    lora.add_lora(model, r=64, alpha=128, dropout=0.1)  # 72 Linears, 5,898,240 trainable parameters, 3.79 %
    ...                                                 # train what requires a gradient
    lora.save_adapter(model, "adapter")                 # 24 MB that peft opens as well
    lora.merge(model)                                   # plain weights again: nothing left to compute

The paper is Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685). Names
and files are those of Hugging Face's peft, so that adapters go both ways. It works on any model that calls
its Linears as modules; nn.MultiheadAttention doesn't, and its out_proj is refused. What can't be done is a
ValueError of one line, and changes nothing.
"""

import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

# --- The layer -------------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """W x + b + (alpha / r) B A dropout(x): a Linear whose own weight W (out, in) is frozen, and beside it
    A (r, in) and B (out, r), which are trained: r (in + out) numbers for a change of W of rank r.

    It takes over the weight and the bias of `base` under their own names, so that state dicts still fit.
    use_rslora: scale by alpha / sqrt(r) instead, with which a large r learns as fast (arXiv:2312.03732).
    """

    def __init__(self, base, r, alpha, dropout=0.0, use_rslora=False):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.dropout = nn.Dropout(dropout)
        # Kaiming-uniform with a = sqrt(5), as in peft, is uniform within 1 / sqrt(in): the fan in is that of
        # (r, in). B = 0, so that B A = 0: an adapted model starts as the base, whatever A is.
        self.lora_A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.strength = 1.0  # 0 is the base, 1 what was trained
        self.merged = False
        self.train(base.training)  # a base in eval mode stays in it: no dropout then

    @property
    def scaling(self):
        return self.strength * self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)  # (..., out)
        if self.merged:
            return y
        x = F.linear(self.dropout(x), self.lora_A) * self.scaling  # (..., r)
        return y + F.linear(x, self.lora_B)  # (..., out)

    def delta(self):
        """What the adapter adds to the weight, (out, in)."""
        return self.lora_B @ self.lora_A * self.scaling


# --- A model with adapters -------------------------------------------------------------------------------


def adapters(model):
    """{name: LoRALinear} of a model. ValueError where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not found:
        raise ValueError("this model has no adapters: add_lora(model, ...) inserts them")
    return found


def find_targets(model, targets):
    """{name: Linear} of the Linears that `targets` name, by their whole name or the end of it."""
    chosen = {}
    for target in targets:
        found = {name: m for name, m in model.named_modules() if f".{name}".endswith(f".{target}")}
        # Not isinstance: the out_proj of nn.MultiheadAttention is of a subclass and never called (peft #761).
        if not found or not all(type(module) is nn.Linear for module in found.values()):
            raise ValueError(f"no plain Linear of the model is called {target!r}")
        chosen |= found
    if not chosen:
        raise ValueError("no targets: name the Linears to adapt")
    return chosen


def add_lora(model, r, alpha, dropout=0.0, targets=("q_proj", "k_proj", "v_proj"), use_rslora=False):
    """Puts a LoRALinear in place of every Linear that `targets` name, by its whole name or the end of it,
    freezes everything else, and returns how many there are. ValueError for r < 1, alpha <= 0, dropout
    outside [0, 1), a target that is no Linear, or a model that has adapters."""
    if not (isinstance(r, int) and r >= 1):
        raise ValueError(f"r is {r}: the rank of an adapter is a whole number, 1 at least")
    if not (0 < alpha < math.inf and 0 <= dropout < 1):
        raise ValueError(f"alpha is {alpha} and dropout {dropout}: alpha > 0 and 0 <= dropout < 1 are needed")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("this model has adapters already: start again from the base model")
    chosen = find_targets(model, targets)
    model.requires_grad_(False)
    for name, base in chosen.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(base, r, alpha, dropout, use_rslora))
    return len(chosen)


def trainable_parameters(model):
    """(trainable, all) parameters, as peft's get_nb_trainable_parameters counts them."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def set_strength(model, strength):
    """Turns the adapters down or up: 0 is the base, 1 what was trained. ValueError where merged."""
    if not math.isfinite(strength):
        raise ValueError(f"strength is {strength}: a finite number is needed")
    layers = adapters(model).values()
    if any(layer.merged for layer in layers):
        raise ValueError("the adapters are merged: unmerge(model) before their strength changes")
    for layer in layers:
        layer.strength = strength


@torch.no_grad()
def merge(model):
    """Adds each adapter, at its strength, to its weight: the same function without the extra work. Never a
    side effect of eval(), as in other code: that surprises whoever saves the weights next (peft #1035).
    ValueError for merged adapters, for none, and for NaN."""
    layers = adapters(model).values()
    if any(layer.merged for layer in layers):
        raise ValueError("the adapters are merged already: merging twice would add them twice")
    deltas = [layer.delta() for layer in layers]
    if not all(delta.isfinite().all() for delta in deltas):
        raise ValueError("an adapter holds NaN or infinity: merging it would spoil the base model")
    for layer, delta in zip(layers, deltas):
        layer.weight.data = layer.weight + delta  # not +=, which a bf16 base would round
        layer.merged = True


@torch.no_grad()
def unmerge(model):
    """Takes the adapters out of the weights again: the base but for rounding. ValueError where they are not
    merged."""
    layers = adapters(model).values()
    if not all(layer.merged for layer in layers):
        raise ValueError("the adapters are not merged: there is nothing to take out")
    for layer in layers:
        layer.weight.data = layer.weight - layer.delta()
        layer.merged = False


# --- Files, as peft writes and reads them ----------------------------------------------------------------


def write(path, save):
    """save(temporary name), which then becomes `path`: the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def shortest_names(model, layers):
    """Short names where they say the same: `q_proj` for all that are called so; else the whole names."""
    short = {name.split(".")[-1] for name in layers}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in layers and name.split(".")[-1] in short:
            return sorted(layers)
    return sorted(short)


def save_adapter(model, folder, base=None):
    """Writes the adapters to `folder`: adapter_config.json and adapter_model.safetensors, which
    peft.PeftModel.from_pretrained opens on a CLIPModel, at full strength. base: the name of its model."""
    layers, folder = adapters(model), Path(folder)
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base and str(base),
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.use_rslora,
        "target_modules": shortest_names(model, layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().cpu()

    def save_tensors(path):
        save_file(tensors, path, {"format": "pt"})
        path.chmod(0o644)  # safetensors lets nobody else read it

    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "adapter_model.safetensors", save_tensors)
    write(folder / "adapter_config.json", lambda path: path.write_text(json.dumps(config, indent=1)))


# The kind of LoRA that this file knows. peft's others need more than A and B.
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
PLAIN_STARTS = (None, True, False, "gaussian")  # of A and B; others, as PiSSA, change the base as well


def read_adapter(folder):
    """(configuration, {"NAME.lora_A" or "NAME.lora_B": tensor}) of plain LoRA that peft or save_adapter
    wrote. ValueError for anything else."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, kind in (("r", int), ("lora_alpha", float), ("lora_dropout", float)):
            config[name] = kind(config[name])
    except Exception as error:  # safetensors has its own kinds
        raise ValueError(f"{folder} holds no adapter that can be read: {error}") from error
    for name, plain in PLAIN.items():
        if (config.get(name) or plain) != plain:
            raise ValueError(f"{folder} is not plain LoRA: its {name} is {config[name]}")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        raise ValueError(
            f"{folder} is not plain LoRA: its init_lora_weights is {config['init_lora_weights']}"
        )
    short = {name.removeprefix("base_model.model.").removesuffix(".weight"): x for name, x in tensors.items()}
    return config, short


def load_adapter(model, folder):
    """Inserts the adapters of `folder`, on the Linears that its tensors name. ValueError, and nothing is
    changed, where a file is damaged, a tensor has no Linear, another shape or a NaN, where the kind is not
    plain LoRA, or the model has adapters already."""
    folder = Path(folder)
    config, tensors = read_adapter(folder)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    shapes = {}
    for name in targets:
        if name in linears:
            shapes[f"{name}.lora_A"] = (config["r"], linears[name].in_features)
            shapes[f"{name}.lora_B"] = (linears[name].out_features, config["r"])
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted({*found, *shapes}):
        if found.get(name) != shapes.get(name):
            raise ValueError(
                f"{folder} doesn't fit this model: {name} is {found.get(name, 'missing')} where "
                f"{shapes.get(name, 'nothing')} fits"
            )
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise ValueError(f"{folder} holds NaN or infinity in {name}")
    use_rslora = bool(config.get("use_rslora"))
    add_lora(model, config["r"], config["lora_alpha"], config["lora_dropout"], targets, use_rslora)
    model.load_state_dict(tensors, strict=False)
