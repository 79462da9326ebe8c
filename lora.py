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
import re
import warnings
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
        # fp32 beside a bf16 base too, as in peft: bf16 would round the small steps of training away.
        self.base_type = base.weight.dtype
        kind = dict(dtype=torch.promote_types(self.base_type, torch.float32), device=base.weight.device)
        # Kaiming-uniform with a = sqrt(5), as in peft, is uniform within 1 / sqrt(in): the fan in is that of
        # (r, in). B = 0, so that B A = 0: an adapted model starts as the base, whatever A is.
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **kind))
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
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        # peft scales what B gives. Scaled before B, where a token is r numbers, it costs next to nothing.
        x = F.linear(self.dropout(x), self.lora_A) * self.scaling  # (..., r)
        return (y + F.linear(x, self.lora_B)).to(y.dtype)  # (..., out)

    def delta(self):
        """What the adapter adds to the weight, (out, in)."""
        return self.lora_B @ self.lora_A * self.scaling

    def set_weight(self, weight):
        """Another weight, in the type that the base had: one that was rounded to bf16 since is fp32 again."""
        self.weight.data = weight if self.base_type == torch.float32 else weight.to(self.base_type)


# --- A model with adapters -------------------------------------------------------------------------------


def adapters(model):
    """{name: LoRALinear} of a model. ValueError where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not found:
        raise ValueError("this model has no adapters: add_lora(model, ...) inserts them")
    return found


def find_targets(model, targets):
    """The names of the Linears that `targets` mean: a Linear's name or that of a module, which means all the
    Linears in it, whole or the end of it; or "all-linear". ValueError for one that means none."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = {}
    for target in [targets] if isinstance(targets, str) else targets:
        # .a.b.c. holds .b. wherever b is a module or a Linear: its name from the left, or any part of it.
        found = [name for name in linears if target == "all-linear" or f".{target}." in f".{name}."]
        if not found:
            short = {name.split(".")[-1] for name in linears}
            parts = {name.split(".")[0] for name in linears if "." in name}
            raise ValueError(
                f"no plain Linear of the model is called {target!r}, nor a module that holds some: there are "
                f"{', '.join(sorted(short))}; {', '.join([*sorted(parts), 'all-linear'])}"
            )
        chosen |= dict.fromkeys(found)
    if not chosen:
        raise ValueError("no targets: name the Linears to adapt")
    return list(chosen)


def check_setting(r, alpha, dropout):
    """ValueError for r < 1, alpha <= 0 or dropout outside [0, 1)."""
    if not (isinstance(r, int) and r >= 1):
        raise ValueError(f"r is {r!r}: the rank of an adapter is a whole number, 1 at least")
    numbers = all(isinstance(x, int | float) for x in (alpha, dropout))
    if not (numbers and 0 < alpha < math.inf and 0 <= dropout < 1):
        raise ValueError(
            f"alpha is {alpha!r} and dropout {dropout!r}: alpha > 0 and 0 <= dropout < 1 are needed"
        )


def insert(model, ranks_and_alphas, dropout, use_rslora):
    """Puts adapters beside the Linears {name: (r, alpha)} and freezes all but adapters. Merged ones become
    the plain Linears that they are. ValueError, and nothing is changed, where one can't be put in."""
    for name, (r, alpha) in ranks_and_alphas.items():
        check_setting(r, alpha, dropout)
        linear = model.get_submodule(name)
        if isinstance(linear, LoRALinear) and not linear.merged:
            raise ValueError(
                f"this model has adapters already, as at {name}: start again from the base model"
            )
        # The out_proj of nn.MultiheadAttention is of a subclass and never called (peft #761).
        if type(linear) not in (nn.Linear, LoRALinear):
            raise ValueError(f"{name} is no plain Linear: an adapter may have no effect there")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear) and layer.merged:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight, plain.bias = layer.weight, layer.bias
            model.set_submodule(name, plain.train(layer.training))
    for name, (r, alpha) in ranks_and_alphas.items():
        layer = LoRALinear(model.get_submodule(name), r, alpha, dropout, use_rslora)
        model.set_submodule(name, layer)
    for name, parameter in model.named_parameters():
        if not name.endswith(("lora_A", "lora_B")):
            parameter.requires_grad_(False)


def add_lora(model, r, alpha, dropout=0.0, targets=("q_proj", "k_proj", "v_proj"), use_rslora=False):
    """Puts a LoRALinear in place of every Linear that `targets` mean (see find_targets), freezes everything
    but adapters, and returns how many there are. A second call may adapt other Linears, with other settings.
    ValueError for r < 1, alpha <= 0, dropout outside [0, 1), a target that is no Linear and holds none, or
    one that has an adapter which isn't merged."""
    check_setting(r, alpha, dropout)
    names = find_targets(model, targets)
    insert(model, dict.fromkeys(names, (r, alpha)), dropout, use_rslora)
    return len(names)


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
        layer.set_weight(layer.weight + delta)
        layer.merged = True


@torch.no_grad()
def unmerge(model):
    """Takes the adapters out of the weights again: the base but for rounding. ValueError where they are not
    merged."""
    layers = adapters(model).values()
    if not all(layer.merged for layer in layers):
        raise ValueError("the adapters are not merged: there is nothing to take out")
    for layer in layers:
        layer.set_weight(layer.weight - layer.delta())
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
    peft.PeftModel.from_pretrained opens on a CLIPModel, at full strength. base: the name of its model.
    ValueError where layers differ in dropout or rsLoRA, for which the file has one entry."""
    layers, folder = adapters(model), Path(folder)
    first = next(iter(layers.values()))
    for layer in layers.values():
        if (layer.dropout.p, layer.use_rslora) != (first.dropout.p, first.use_rslora):
            raise ValueError(
                "the adapters differ in dropout or rsLoRA, and peft's file has one for all: save each tower "
                "by itself, as save_adapter(model.vision_model, ...)"
            )
    # A pattern is a regular expression for the end of a name; ^ makes it the whole name.
    ranks = {f"^{name}": layer.r for name, layer in layers.items() if layer.r != first.r}
    alphas = {f"^{name}": layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base and str(base),
        "r": first.r,
        "lora_alpha": first.alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
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

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: an adapter is a folder with two of them")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "adapter_model.safetensors", save_tensors)
    write(folder / "adapter_config.json", lambda path: path.write_text(json.dumps(config, indent=1)))


# What peft's configuration may hold: what is obeyed here, what doesn't matter once the tensors are there, and
# what has to have one of these values. All else, also what peft has yet to invent, has to be off.
OBEYED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "auto_mapping"}
NO_MATTER = {"task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
NO_MATTER |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}  # see the tensors
NO_MATTER |= {"megatron_core", "qalora_group_size"}  # of kinds that are off
PLAIN = {"peft_type": ["LORA"], "bias": ["none"]}
PLAIN |= {"init_lora_weights": [True, False, None, "gaussian"]}  # PiSSA and others change the base as well


def find_adapter(folder):
    """The folder itself, or the one in it: an adapter to which peft's user gave a name has its own folder."""
    named = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if (folder / "adapter_config.json").exists() or not named:
        return folder
    if len(named) > 1:
        raise ValueError(f"{folder} holds {len(named)} adapters, give one: {', '.join(map(str, named))}")
    return named[0]


def read_tensors(folder):
    """{name: tensor} of adapter_model.safetensors or, as older ones are called, adapter_model.bin."""
    if (folder / "adapter_model.safetensors").exists():
        return load_file(folder / "adapter_model.safetensors")
    tensors = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)  # runs no code
    if not all(torch.is_tensor(tensor) for tensor in tensors.values()):
        raise ValueError("not only tensors")
    return tensors


def foreign_settings(config):
    """Names of what a configuration has more than plain LoRA; the kind of the adapter first."""
    foreign = []
    for name in sorted(config, key=lambda name: name != "peft_type"):
        plain = config[name] in PLAIN[name] if name in PLAIN else not config[name]
        if name not in OBEYED | NO_MATTER and not plain:
            foreign.append(name)
    return foreign


def read_adapter(folder):
    """(configuration, {"NAME.lora_A" or "NAME.lora_B": tensor}) of plain LoRA that peft or save_adapter
    wrote. ValueError for anything else."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder of the adapter, which holds two")
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8-sig"))
        foreign = foreign_settings(config)
        tensors = {} if foreign else read_tensors(folder)
    except Exception as error:  # safetensors and torch.load have their own kinds
        wrong = "a file is missing" if isinstance(error, FileNotFoundError) else "a file is damaged or odd"
        raise ValueError(f"{folder} holds no adapter that can be read: {wrong}") from error
    if foreign:
        raise ValueError(f"{folder} is not plain LoRA: its {foreign[0]} is {config[foreign[0]]}")
    kinds = {
        "r": int,
        "lora_alpha": float,
        "lora_dropout": float,
        "rank_pattern": int,
        "alpha_pattern": float,
    }
    for name, kind in kinds.items():
        said = config.get(name)
        try:
            if name.endswith("pattern"):
                patterns = (said or {}).items()
                config[name] = {re.compile(rf"(.*\.)?({key})$"): kind(value) for key, value in patterns}
            else:
                config[name] = kind(said)
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise ValueError(f"{folder} holds no adapter that can be read: its {name} is {said}") from error
    short = {name.removeprefix("base_model.model.").removesuffix(".weight"): x for name, x in tensors.items()}
    return config, short


def by_pattern(name, patterns, default):
    """What is set for a Linear of this name: as in peft, the first pattern that fits decides."""
    return next((value for pattern, value in patterns.items() if pattern.match(name)), default)


def part_of(model, config, names, folder):
    """The prefix by which names of an adapter are names of this model: "vision_model." if peft saved it on a
    CLIPVisionModel, which has no such prefix. It is read, not guessed: both towers have the same names."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    parts = [part for part, _ in model.named_children() if all(f"{part}.{name}" in linears for name in names)]
    if not parts or any(name in linears for name in names):
        return ""
    said = config.get("auto_mapping")
    base_class = str(said.get("base_model_class")).lower() if isinstance(said, dict) else ""
    told = [part for part in parts if part.removesuffix("_model") in base_class]
    if len(told) != 1:
        raise ValueError(
            f"{folder} is for a part of this model and doesn't say for which: load it on one of "
            f"{', '.join(f'model.{part}' for part in parts)}"
        )
    return f"{told[0]}."


def load_adapter(model, folder):
    """Inserts the adapters of `folder`, on the Linears that its tensors name. ValueError, and nothing is
    changed, where a file is damaged, a tensor has no Linear, another shape or a NaN, where the kind is not
    plain LoRA, or such a Linear has an adapter already, unmerged. A warning where it was trained on a model
    of another name, which may have other weights."""
    folder = find_adapter(Path(folder))
    config, tensors = read_adapter(folder)
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    prefix = part_of(model, config, names, folder)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ranks_and_alphas, shapes = {}, {}
    for name in names:
        if prefix + name in linears:
            linear = linears[prefix + name]
            r = by_pattern(name, config["rank_pattern"], config["r"])
            alpha = by_pattern(name, config["alpha_pattern"], config["lora_alpha"])
            ranks_and_alphas[prefix + name] = r, alpha
            shapes[f"{name}.lora_A"] = (r, linear.in_features)
            shapes[f"{name}.lora_B"] = (linear.out_features, r)
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
    if not tensors:
        raise ValueError(f"{folder} holds no adapter that can be read: it has no tensors")
    trained_on = config.get("base_model_name_or_path")
    name = getattr(model, "name", None) or getattr(model, "name_or_path", None)  # ours, or Hugging Face's
    if trained_on and name and str(trained_on) != name:
        warnings.warn(f"{folder} was trained on {trained_on}, and this model is {name}", stacklevel=2)
    insert(model, ranks_and_alphas, config["lora_dropout"], bool(config.get("use_rslora")))
    model.load_state_dict({prefix + name: tensor for name, tensor in tensors.items()}, strict=False)
