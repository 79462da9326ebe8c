# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "numpy", "pillow", "transformers>=5.8", "peft>=0.18", "pytest", "matplotlib"]
# ///
"""Adapt a trained CLIP to other photos with LoRA, and measure what this gains and what it costs.

    python finetune.py --r 64                   openai/clip-vit-base-patch16 on Flickr30k, on a GPU
    python finetune.py --base runs/shapes --data sketches --r 4 16 --full     after clip.py --data shapes
    python finetune.py --classify FOLDER        zero-shot classification of the photos FOLDER/CLASS/*
    python finetune.py --search FOLDER "two dogs in the snow"         the photos below FOLDER that fit best

Each rank, and with --full the training of all weights, starts from the same base and sees the same batches.
"""

import contextlib
import copy
import statistics
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import clip  # before torch, as data.py explains
import data
import lora

# isort: split
import torch
import transformers
from matplotlib.figure import Figure

from clip import CLIP, CLIPConfig, Recipe, TowerConfig
from data import InputError, setting

# --- Released weights, and those of a run ----------------------------------------------------------------


def load_run(run_dir):
    """The model of a run of clip.py: the moving average of its weights."""
    checkpoint = clip.load_checkpoint(run_dir)
    model = CLIP(checkpoint["config"])
    if checkpoint["ema_model"].keys() != model.state_dict().keys():
        raise InputError(f"{run_dir} holds an adapter whose training has not ended: resume it first")
    model.load_state_dict(checkpoint["ema_model"])
    return model


def check_released(name, config):
    """InputError, with file and entry, if our CLIP can't represent this released one."""
    text, vision, size = config.text_config, config.vision_config, config.vision_config.image_size
    needed = transformers.CLIPImageProcessor(size=size, crop_size=size).to_dict()  # defaults are OpenAI's
    try:
        found = transformers.CLIPImageProcessor.from_pretrained(name).to_dict()
    except OSError:  # there is no preprocessor_config.json
        found = needed
    checks = [
        ("config.json: text_config.hidden_act", text.hidden_act, tuple(clip.ACTIVATIONS)),
        ("config.json: vision_config.hidden_act", vision.hidden_act, tuple(clip.ACTIVATIONS)),
        ("config.json: text_config.layer_norm_eps", text.layer_norm_eps, (1e-5,)),
        ("config.json: vision_config.layer_norm_eps", vision.layer_norm_eps, (1e-5,)),
        ("config.json: vision_config.num_channels", vision.num_channels, (3,)),
        ("config.json: image_size modulo patch_size", size % vision.patch_size, (0,)),
    ]
    for entry, value in needed.items():
        checks.append((f"preprocessor_config.json: {entry}", found[entry], (value,)))
    for entry, value, allowed in checks:
        if value not in allowed:
            raise InputError(f"{name}/{entry} is {value}, but must be {' or '.join(map(str, allowed))}")


def load_released(name, tokenizer):
    """The model of a Hugging Face folder or a hub name. InputError if it isn't a complete CLIP."""
    try:
        released = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's client raises dozens of kinds
        advice = "give a hub name, or the path of a run or folder from the current folder"
        raise InputError(f"no CLIP in {name} ({data.first_line(error)}): {advice}") from error
    if released.model_type != "clip":
        raise InputError(f"{name}/config.json: model_type is {released.model_type}, not clip")
    check_released(name, released)
    vision, text = released.vision_config, released.text_config
    end = text.eos_token_id
    if end == 2:  # old configurations have this wrong id (transformers #24650)
        vocabulary = data.load_tokenizer(tokenizer)
        end = vocabulary.eos_token_id
        if end != max(vocabulary.get_vocab().values()):  # transformers then reads at the largest id
            raise InputError(f"{name}/config.json: set eos_token_id to {end}: other tokens have larger ids")
    towers = [TowerConfig(*[getattr(x, f.name) for f in fields(TowerConfig)]) for x in (vision, text)]
    others = {key: getattr(vision, key) for key in ("image_size", "patch_size")}
    others |= {key: getattr(text, key) for key in ("vocab_size", "max_position_embeddings")}
    others |= {"eos_token_id": end, "projection_dim": released.projection_dim, "causal": True}
    try:
        theirs, report = transformers.CLIPModel.from_pretrained(name, output_loading_info=True)
    except Exception as error:
        raise InputError(f"can't read the weights of {name}: {data.first_line(error)}") from error
    wrong = [key for keys in report.values() for key in keys]
    if wrong:
        raise InputError(f"{name} is not a complete CLIP: missing or unexpected weight {wrong[0]}")
    model = CLIP(CLIPConfig(*towers, **others))
    model.load_state_dict(theirs.state_dict())
    return model


def from_pretrained(name_or_dir, tokenizer=None):
    """The CLIP of a run of clip.py, an adapter's folder, a Hugging Face folder or a hub name, on the CPU.
    tokenizer: folder or hub name of its tokenizer, if it isn't beside the weights."""
    folder = Path(name_or_dir)
    is_run = (folder / "checkpoint.pt").exists()
    # In a study's folder, read_adapter raises an error that names the adapters inside.
    is_study = not is_run and any(folder.glob("*/adapter_config.json"))
    if is_study or (folder / "adapter_config.json").exists():
        try:
            base = lora.read_adapter(folder)[0].base_model_name_or_path
            if not base:
                raise InputError("adapter_config.json has no base_model_name_or_path: add it")
            model = from_pretrained(base, tokenizer)
            if is_run and clip.load_checkpoint(folder)["recipe"]["base_checksum"] != lora.checksum(model):
                raise InputError(f"its base, {base}, has other weights than in training: adapt it again")
            lora.load_adapter(model, folder)
            lora.merge(model)
        except Exception as error:  # a malformed configuration raises almost anything
            raise InputError(f"can't open the adapter in {folder}: {error}") from error
        model.requires_grad_(True)  # load_adapter froze the base
        tokenizer = model.tokenizer_path
    else:
        tokenizer = tokenizer or (folder / "tokenizer" if is_run else name_or_dir)
        model = load_run(folder) if is_run else load_released(name_or_dir, tokenizer)
    model.name_or_path, model.tokenizer_path = str(name_or_dir), str(tokenizer)
    return model.eval()


def tokenizer_of(model):
    """The tokenizer in model.tokenizer_path. InputError if it has another end token or more tokens than the
    model. It may have fewer."""
    tokenizer = data.load_tokenizer(getattr(model, "tokenizer_path", None))
    end, size = model.config.eos_token_id, model.config.vocab_size
    if tokenizer.eos_token_id != end or max(tokenizer.get_vocab().values()) >= size:
        raise InputError(f"the tokenizer does not fit a model of {size} tokens with the end token {end}")
    return tokenizer


def save_pretrained(model, folder):
    """Write a folder for transformers' CLIPModel and CLIPProcessor, with the tokenizer of the model."""
    c = model.config
    if not c.causal:
        raise InputError("Hugging Face's CLIP has no BERT-style text tower: train with --text causal")
    if any(".lora_" in name for name in model.state_dict()):
        raise InputError("the adapters are not merged: call lora.merge(model) first")
    tokenizer = tokenizer_of(model)
    tokenizer.model_max_length = c.max_position_embeddings  # CLIPProcessor cuts captions to this length
    vision = asdict(c.vision) | {"image_size": c.image_size, "patch_size": c.patch_size}
    text = asdict(c.text) | {"vocab_size": c.vocab_size, "max_position_embeddings": c.max_position_embeddings}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for tower in (vision, text):
        tower["projection_dim"] = c.projection_dim
    options = dict(text_config=text, vision_config=vision, projection_dim=c.projection_dim)
    released = transformers.CLIPModel(transformers.CLIPConfig(**options))
    released.load_state_dict(model.state_dict())
    released.save_pretrained(folder)
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": c.image_size}, crop_size=c.image_size)
    transformers.CLIPProcessor(pixels, tokenizer).save_pretrained(folder)


# --- One adapted model -----------------------------------------------------------------------------------


@dataclass
class LoRARecipe(Recipe):
    """A Recipe and the settings of adapters. Start from RECIPE below: the defaults are those of clip.py."""

    dropout: float = setting(0.1, 0, 0.99, "dropout of the adapters' input")
    r: int = 64  # 0 trains all weights
    alpha: float = 128.0
    targets: tuple = ("q_proj", "k_proj", "v_proj")
    base_checksum: int = 0  # of the base's weights; `adapt` sets it, and an adapter fits only this base


# For released weights, after amirhossein-yousefi/Image-Contrastive-CLIP; for runs of clip.py; for drawn data.
RECIPE = LoRARecipe(**clip.PLAIN, epochs=5, batch_size=64, lr=1e-4, weight_decay=0.1, warmup=0.5)
RUN_RECIPE = replace(RECIPE, epochs=10, lr=7e-4)
DRAWN_RECIPE = replace(RECIPE, epochs=8, lr=5e-3, dropout=0.0)


def adapt(base, splits, recipe, run_dir, resume=False, compile=False):
    """Train adapters in a copy of the base, or all its weights if recipe.r is 0. Returns what clip.train
    returns, and adds the curve and the adapter to run_dir, or the tokenizer if all weights are trained."""
    run_dir, recipe = Path(run_dir), replace(recipe, base_checksum=lora.checksum(base))
    model = copy.deepcopy(base)
    torch.manual_seed(recipe.seed)
    if recipe.r:
        try:
            lora.add_lora(model, recipe.r, recipe.alpha, recipe.dropout, recipe.targets)
        except ValueError as error:
            raise InputError(str(error)) from error
        # Autocast would round the frozen fp32 weights in every step. Round them once, for the training.
        dtype = clip.autocast_dtype(model.logit_scale.device)
        for linear in lora.linears_of(model).values():
            linear.weight.data = linear.weight.data.to(dtype)
    trainable, total = lora.trainable_parameters(model)
    print(f"\n{run_dir.name}: training {trainable:,} of {total:,} parameters, {trainable / total:.2%}")
    model, history = clip.train(model, splits, recipe, run_dir, resume, compile)  # the moving average
    if recipe.r:
        for name, linear in lora.linears_of(model).items():
            linear.weight.data = base.get_submodule(name).weight.data  # in fp32 again
    if clip.RANK == 0:
        data.draw_curve(run_dir / "curve.png", history, len(splits["val"].photos))
        if recipe.r:
            lora.save_adapter(model, run_dir, getattr(base, "name_or_path", None))
        else:  # with its tokenizer the run can be the next base
            with data.atomic(run_dir / "tokenizer") as temporary:
                tokenizer_of(base).save_pretrained(temporary)
    return model, history


# --- Classes and search ----------------------------------------------------------------------------------

PROMPTS = "a photo of a {}", "a photo of the {}", "a cropped photo of a {}", "a picture of a {} ."


def photos_below(folder):
    """{relative name: path} of the photos at any depth of a folder. InputError if there is none."""
    paths = [path for path in data.files_below(folder) if path.suffix.lower() in data.ENDINGS]
    if not paths:
        raise InputError(f"there are no photos below {folder}")
    return {path.relative_to(folder).as_posix(): path for path in paths}


def embed_folder(model, tokenizer, photos, sentences):
    """Embeddings of photos {name: path}, (N, E), and of sentences, (M, E)."""
    pixels = data.photo_store(photos, model.config.image_size)
    captions = [sentences] + [[]] * (len(photos) - 1)  # all belong to the first photo, as each needs one
    context = model.config.max_position_embeddings
    return clip.embed(model, data.make_split(list(photos), pixels, captions, tokenizer, context))


def classify(model, tokenizer, folder, templates=PROMPTS):
    """Top-1 and top-5 accuracy, in percent, on the photos folder/CLASS/*. In CLASS `_` means a space. A class
    is the mean of the embeddings of its name in each template (CLIP's paper, 3.1.4)."""
    templates = [templates] if isinstance(templates, str) else templates
    photos = {name: path for name, path in photos_below(folder).items() if "/" in name}
    if photos and all(name.count("/") > 1 for name in photos):
        raise InputError(f"photos must be in {folder}/CLASS, but {next(iter(photos))} is one level deeper")
    folders = [name.split("/")[0] for name in photos]
    class_of = [name.replace("_", " ").lower() for name in folders]
    classes = sorted(set(class_of))
    if len(classes) < max(2, len(set(folders))):  # fewer classes than folders: two have the same name
        raise InputError(f"{folder} needs two or more folders of photos, with the names of different classes")
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    images, texts = embed_folder(model, tokenizer, photos, prompts)  # (N, E), (classes x templates, E)
    means = torch.nn.functional.normalize(texts.unflatten(0, (len(classes), -1)).mean(dim=1), dim=1)
    answers = torch.arange(len(classes), device=images.device)
    right = torch.tensor([classes.index(name) for name in class_of], device=images.device)  # (N,)
    rank = clip.rank_of_best_match(images, means, right, answers)
    top1, top5 = (100 * (rank < k).float().mean().item() for k in (1, 5))
    chance = f"{len(photos):,} photos of {len(classes)} classes, chance {100 / len(classes):.1f}"
    print(f"classes   {', '.join(classes)}\nzero-shot top-1 {top1:.1f}  top-5 {top5:.1f}  {chance}")
    return top1, top5


def search(model, tokenizer, folder, query, count=8):
    """The photos at any depth of a folder that fit a query best: [(path, cosine)], the best first."""
    photos = photos_below(folder)
    images, texts = embed_folder(model, tokenizer, photos, [query])  # (N, E), (1, E)
    cosines, rows = (images @ texts[0]).topk(min(count, len(images)))
    paths = list(photos.values())
    return [(paths[row], cosine) for row, cosine in zip(rows.tolist(), cosines.tolist())]


# --- The study -------------------------------------------------------------------------------------------


def own_data(base):
    """{name: validation split} of the data that a base learnt, if it is a run, to measure what it forgets."""
    run_dir = Path(base.name_or_path)
    if not (run_dir / "checkpoint.pt").exists():
        return {}
    checkpoint, splits = clip.load_checkpoint(run_dir), {}
    source = checkpoint["source"]
    if source in data.DRAWN or Path(source).exists():  # do not download it again
        with contextlib.suppress(InputError):  # limit=2, since no training photo is used
            splits, _ = data.load(source, base.tokenizer_path, base.config.image_size, limit=2)
    if splits and splits["val"].fingerprint() in checkpoint["data"]:
        return {f"{Path(source).name} val": splits["val"]}
    print(f"the base's own data, {source}, can't be loaded as they were: what it forgets is not shown")
    return {}


def evaluate_all(model, variant, judged):
    """{"val loss", "val t2i_r1", ...}: the evaluation of a model on each of the splits {name: Split}."""
    row = {}
    for name, split in judged.items():
        evaluation = clip.evaluate(model, split)
        print(f"{variant:12s}{name:13s} {clip.describe(evaluation)}", flush=True)
        row |= {f"{name} {key}": value for key, value in evaluation.items()}
        row[f"{name} r10"] = (evaluation["t2i_r10"] + evaluation["i2t_r10"]) / 2
    return row


def table(rows, judged):
    """The rows as text: a line for each variant, with the mean over seeds and the standard deviation."""
    columns = {"trainable": ",.0f", "minutes": ".1f", "lowest val loss": ".3f"}
    for name in judged:
        columns |= {f"{name} t2i_r1": ".1f", f"{name} i2t_r1": ".1f", f"{name} r10": ".1f"}
    lines = [["variant", "MB", *columns]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        same = [row for row in rows if row["variant"] == variant]
        cells = [variant, f"{same[0]['trainable'] * 4 / 1e6:.2f}"]  # fp32
        for name, form in columns.items():
            values = [row[name] for row in same]
            deviation = f" ±{statistics.stdev(values):{form}}" if len(set(values)) > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{deviation}")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def draw_study(path, rows, judged):
    """Lowest validation loss, and R@10 on each validation split, against the number of trained parameters."""
    panels = ["lowest val loss", *(f"{name} r10" for name in judged if name.endswith("val"))]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels)), panels):
        axes.axhline(rows[0][name], color="grey", ls="--", label="zero-shot")
        for variant in dict.fromkeys(row["variant"] for row in rows[1:]):
            same = [row for row in rows if row["variant"] == variant]
            trained = [row["trainable"] for row in same]
            axes.plot(trained, [row[name] for row in same], "o", alpha=0.7, label=variant)
        label = name.replace("r10", "R@10, mean of both ways, %")
        axes.set(xlabel="trained parameters", ylabel=label, xscale="log")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=8)
    data.save_figure(figure, path)


def study(base, splits, recipes, out, compile=False):
    """Adapt the base by each recipe, in a subfolder of `out`, and compare all in study.csv, study.png and a
    printed table. The same call continues a study that was stopped. Only the number of epochs may grow."""
    judged = {name: split for name, split in splits.items() if name != "train"} | own_data(base)
    zero_shot = evaluate_all(base, "zero-shot", judged)
    rows = [{"variant": "zero-shot", "seed": "", "trainable": 0, "minutes": 0.0}]
    rows[0] |= {"lowest val loss": zero_shot["val loss"]} | zero_shot
    for recipe in recipes:
        name, variant = (f"r{recipe.r}", f"r={recipe.r}") if recipe.r else ("full", "all weights")
        run_dir = out / f"{name}-seed{recipe.seed}"
        model, history = adapt(base, splits, recipe, run_dir, resume=True, compile=compile)
        row = {"variant": variant, "seed": recipe.seed}
        row |= {"trainable": lora.trainable_parameters(model)[0], "minutes": history[-1]["minutes"]}
        row |= {"lowest val loss": min(epoch["loss"] for epoch in history)}
        rows.append(row | evaluate_all(model, variant, judged))
        del model  # free its memory before the next one is trained
    if clip.RANK == 0:
        clip.write_csv(out / "study.csv", rows)
        draw_study(out / "study.png", rows, judged)
        print(f"\n{table(rows, judged)}\ndone      {out}")


# --- The command -----------------------------------------------------------------------------------------


def parse_args(argv):
    parser = data.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="openai/clip-vit-base-patch16", help="run, adapter or model")
    parser.add_argument("--tokenizer", metavar="NAME", help="folder or hub name; None is the base's own")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--classify", metavar="FOLDER", help="find the CLASS of each photo FOLDER/CLASS/*")
    task.add_argument("--search", nargs=2, metavar=("FOLDER", "QUERY"), help="find photos by a sentence")
    parser.add_argument("--r", type=int, nargs="+", default=[], help="ranks; 64 by default, unless --full")
    parser.add_argument("--full", action="store_true", help="train all weights, with a tenth of --lr")
    parser.add_argument("--alpha", type=float, help="the scale is alpha / r; 2 r by default")
    parser.add_argument("--targets", nargs="+", default=RECIPE.targets, help="Linears, modules or all-linear")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from --seed on")
    parser.add_recipe(RECIPE)
    args = parser.first_look(argv)  # defaults depend on --base and --data
    recipe = RECIPE
    if (Path(args.base) / "checkpoint.pt").exists():
        recipe = DRAWN_RECIPE if args.data in data.DRAWN else RUN_RECIPE
    parser.set_defaults(**{f.name: getattr(recipe, f.name) for f in fields(recipe) if f.metadata})
    args = parser.parse_args(argv)
    ranks_fit = all(1 <= r <= 1024 for r in args.r)
    if args.seeds < 1 or not ranks_fit or not (args.alpha is None or 0 < args.alpha < 1e6):
        raise InputError("--r must be between 1 and 1024, --seeds at least 1, --alpha above 0 and below 1e6")
    args.out = args.out or Path("runs", "-".join(Path(x).absolute().name for x in (args.base, args.data)))
    return args


def recipes_of(args):
    """A LoRARecipe for each seed and each rank that the flags ask for. Rank 0 trains all weights."""
    flags = {f.name: getattr(args, f.name) for f in fields(LoRARecipe) if f.metadata}
    recipe = LoRARecipe(**flags, targets=tuple(args.targets))
    recipes = []
    ranks = [*args.r, 0] if args.full else (args.r or [RECIPE.r])
    for seed in range(args.seed, args.seed + args.seeds):
        for r in dict.fromkeys(ranks):
            alpha = 2.0 * r if args.alpha is None else args.alpha
            lr = recipe.lr if r else recipe.lr / 10  # all weights need smaller steps
            recipes.append(replace(recipe, seed=seed, r=r, alpha=alpha, lr=lr))
    return recipes


def run(args):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    recipes, device = recipes_of(args), clip.open_device(args.device)
    base = from_pretrained(args.base, args.tokenizer).to(device)
    tokenizer = tokenizer_of(base)
    if args.classify:
        classify(base, tokenizer, args.classify)
    elif args.search:
        for photo, cosine in search(base, tokenizer, *args.search):
            print(f"{cosine:6.3f}  {photo}")
    else:
        splits, _ = clip.open_data(args, device, base.tokenizer_path, base.config)
        clip.print_start(base, splits, args.batch_size, device)
        study(base, splits, recipes, args.out, compile=args.compile and device.type == "cuda")


def main(argv=None):
    return data.run_command(argv, parse_args, run)


if __name__ == "__main__":
    sys.exit(main())
