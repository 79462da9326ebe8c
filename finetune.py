# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "numpy", "pillow", "transformers>=5.8", "peft>=0.18", "pytest", "matplotlib"]
# ///
"""Adapts a trained CLIP to other photos with LoRA, and measures what that wins and what it costs.

    python finetune.py --r 64                   openai/clip-vit-base-patch16 on Flickr30k, on a GPU
    python finetune.py --base runs/shapes --data sketches --r 4 16 --full     after clip.py --data shapes
    python finetune.py --classify FOLDER        zero-shot classification of the photos FOLDER/CLASS/*
    python finetune.py --search FOLDER "two dogs in the snow"         the photos below FOLDER that fit best

Every rank, and with --full the training of all weights, starts from the same base and sees the same batches.
Data, loss, metrics and training loop are those of clip.py: what stands here is what adaptation changes, and
the exchange with Hugging Face's files.
"""

import copy
import math
import statistics
import sys
import textwrap
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

import clip
import data
import lora
from clip import CLIP, CLIPConfig, Recipe, TowerConfig, embed, evaluate
from data import InputError, is_main_process, setting

# --- Released weights, and those of a run ----------------------------------------------------------------


def load_run(run_dir, epoch="best"):
    """The model of a run of clip.py: its running mean at the "best" epoch or the "last"; or as "trained"."""
    state = data.load_checkpoint(run_dir)
    if epoch not in ("best", "last", "trained"):
        raise InputError(f"epoch is {epoch!r}: a run has best, last and trained")
    try:
        towers = {name: TowerConfig(**state["model"].pop(name)) for name in ("vision", "text")}
        model = CLIP(CLIPConfig(**towers, **state["model"]))
        model.load_state_dict(state[epoch])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{run_dir} holds no whole model, perhaps an adapter") from error
    model.source = Path(run_dir) / "tokenizer"
    return model


def load_released(source, tokenizer):
    """The model of a hub name or of a Hugging Face folder, whose tokenizer is there or in `tokenizer`."""
    from transformers import CLIPModel, PreTrainedConfig

    if (Path(source) / "adapter_config.json").exists():
        raise InputError(f"{source} is not one whole CLIP: it holds an adapter, for lora.load_adapter")
    local = Path(source).parent.exists() or Path(source).parts[0] == "runs"  # no hub name
    try:
        described, _ = PreTrainedConfig.get_config_dict(source, local_files_only=local)
        kind = described["model_type"]
        if kind == "clip":  # transformers would open others too, with what is missing drawn at random
            given = dict(output_loading_info=True, local_files_only=local)
            released, report = CLIPModel.from_pretrained(source, **given)
    except Exception as error:  # the hub's client has dozens of kinds
        raise InputError(
            f"no CLIP in {source}: give a run (clip.py --data shapes makes runs/shapes), a Hugging Face "
            "folder or, with a network, a hub name"
        ) from error
    if kind != "clip":
        raise InputError(f"{source} is not one whole CLIP: its config.json says model_type {kind}, not clip")
    adapters = [name for name in released.state_dict() if ".lora_" in name]  # transformers opens them too
    for names in (*report.values(), adapters):
        for name in names:
            raise InputError(f"{source} is not one whole CLIP: {name} is missing, odd or too much")
    model = CLIP(config_of(released.config, source, tokenizer))
    model.load_state_dict(released.state_dict())
    model.source = tokenizer
    return model


def load_tokenizer(source):
    """The tokenizer of a model. InputError where there is none, with advice that a command takes."""
    try:
        return data.load_tokenizer(source)
    except InputError as error:
        raise InputError(
            f"no tokenizer in {source}: --tokenizer NAME gives the one that the model was trained with, a "
            "folder or a hub name"
        ) from error


def check_tokenizer(model, tokenizer):
    """InputError for a tokenizer that isn't the model's: one with another end token, at which a caption is
    read, or with more tokens than the model has embeddings. It may have fewer: vocabularies are padded."""
    config = model.config
    tokens = 1 + max(tokenizer.get_vocab().values())
    if tokenizer.eos_token_id != config.eos_token_id or tokens > config.vocab_size:
        raise InputError(
            f"the tokenizer is not the one of the model {model.name or 'given'}: it has {tokens} "
            f"tokens and ends with {tokenizer.eos_token_id}, the model {config.vocab_size} and "
            f"{config.eos_token_id}"
        )


def end_token(text, source, tokenizer):
    """The end token of a text_config. Older ones say 2, by which transformers reads a caption at its largest
    token (#24650): that is the tokenizer's end token, unless it has tokens behind it. InputError then."""
    if text.eos_token_id != 2:
        return text.eos_token_id
    loaded = load_tokenizer(tokenizer)
    end = loaded.eos_token_id
    if end != max(loaded.get_vocab().values()):
        raise InputError(
            f"{source} says eos_token_id 2, by which a caption is read at its largest token, but the "
            f"tokenizer has some behind its end token: write {end} for the 2 in text_config of config.json"
        )
    return end


def config_of(released, source, tokenizer):
    """Our CLIPConfig of a transformers.CLIPConfig. InputError for a CLIP that ours can't express."""
    vision, text = released.vision_config, released.text_config
    if not (text.hidden_act == vision.hidden_act in clip.ACTIVATIONS) or vision.num_channels != 3:
        wrong = f"{text.hidden_act}, {vision.hidden_act} or {vision.num_channels} channels"
        raise InputError(
            f"{source} has an activation that this CLIP doesn't have, or not 3 channels: {wrong}"
        )
    if not (text.layer_norm_eps == vision.layer_norm_eps == 1e-5):
        raise InputError(f"{source} has a norm that this CLIP doesn't have: its eps is not 1e-5")
    sizes = [field.name for field in fields(TowerConfig)]
    return CLIPConfig(
        vision=TowerConfig(**{name: getattr(vision, name) for name in sizes}),
        text=TowerConfig(**{name: getattr(text, name) for name in sizes}),
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        eos_token_id=end_token(text, source, tokenizer),
        projection_dim=released.projection_dim,
        hidden_act=text.hidden_act,
        causal=True,
    )


def from_pretrained(name_or_dir, epoch="best", tokenizer=None):
    """The CLIP of a hub name, a Hugging Face folder or a run of clip.py, in eval mode on the CPU.

    epoch, for a run: the running mean of its weights after the "best" epoch or the "last"; or as "trained".
    tokenizer: the folder or hub name of its tokenizer, where that isn't beside the weights.
    InputError where there is no whole CLIP, or one with NaN.
    """
    if (Path(name_or_dir) / data.CHECKPOINT).exists():
        model = load_run(name_or_dir, epoch)
        if tokenizer:
            data.check_same_tokenizer(tokenizer, name_or_dir)
    else:
        model = load_released(name_or_dir, tokenizer or name_or_dir)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise InputError(f"{name_or_dir} holds NaN or infinity: fetch or train it again")
    model.name, model.source = str(name_or_dir), tokenizer or model.source
    return model.eval()


def tokenizer_of(model):
    """The tokenizer of a model that from_pretrained gave. InputError where there is none, or not the one."""
    tokenizer = load_tokenizer(model.source)
    check_tokenizer(model, tokenizer)
    return tokenizer


def save_pretrained(model, folder, tokenizer=None):
    """Writes a folder for transformers' CLIPModel and CLIPProcessor, with this tokenizer or the model's, and
    for all that opens a part of it, as CLIPTextModelWithProjection or diffusers."""
    import transformers

    c = model.config
    if not c.causal:
        raise InputError("Hugging Face's CLIP has no BERT-style text tower: train with --text causal")
    if not all(getattr(module, "merged", True) for module in model.modules()):
        raise InputError("the adapters are not merged: lora.merge(model) comes first")
    if tokenizer is None and model.source is None:
        raise InputError("this model came with no tokenizer: save_pretrained(model, folder, tokenizer)")
    tokenizer = copy.deepcopy(tokenizer or load_tokenizer(model.source))
    check_tokenizer(model, tokenizer)
    tokenizer.model_max_length = c.max_position_embeddings  # what others cut captions to

    both = {"hidden_act": c.hidden_act, "projection_dim": c.projection_dim}
    markers = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = asdict(c.vision) | {"image_size": c.image_size, "patch_size": c.patch_size}
    text = asdict(c.text) | {"vocab_size": c.vocab_size, "max_position_embeddings": c.max_position_embeddings}
    config = transformers.CLIPConfig(
        vision_config=vision | both, text_config=text | both | markers, projection_dim=c.projection_dim
    )
    with torch.device("meta"):
        released = transformers.CLIPModel(config)
    weights = {name: weight for name, weight in model.state_dict().items() if ".lora_" not in name}
    shapes = {name: weight.shape for name, weight in released.state_dict().items()}
    for name in sorted({*weights, *shapes}):
        if name not in weights or weights[name].shape != shapes.get(name):
            raise InputError(f"transformers' CLIPModel can't hold this model: {name} is not as in CLIP")
    released.load_state_dict(weights, assign=True)
    released.save_pretrained(folder)
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": c.image_size}, crop_size=c.image_size)
    transformers.CLIPProcessor(pixels, tokenizer).save_pretrained(folder)


# --- One adapted model -----------------------------------------------------------------------------------


@dataclass
class LoRARecipe(Recipe):
    """How to adapt: a Recipe, and what the adapters are."""

    dropout: float = setting(0.1, 0, 0.99, "of what goes into the adapters")
    r: int = 64  # 0 trains all weights
    alpha: float = 128.0
    targets: tuple = ("q_proj", "k_proj", "v_proj")
    base_loss: float = 0.0  # of the base on the validation photos: a resumed run has the same base

    @property
    def variant(self):
        return f"r={self.r}" if self.r else "all weights"


# Those of amirhossein-yousefi/Image-Contrastive-CLIP, which trains all weights (R@1 79.0 text->image, 92.3
# image->text on Flickr30k's test photos), but lr, which is LoRA's.
RECIPE = LoRARecipe(epochs=5, batch_size=64, lr=1e-4, weight_decay=0.1, muon=0, **clip.PLAIN)
# A model of a few thousand photos knows less, and has further to go: with OpenAI's rate it hardly moves.
RUN_RECIPE = replace(RECIPE, epochs=10, lr=1e-3)
DRAWN_RECIPE = replace(RECIPE, epochs=8, lr=5e-3, dropout=0.0)


def insert(model, recipe):
    """Puts in the adapters of a LoRARecipe, none if r is 0; on CUDA the frozen Linears become bf16.
    InputError where they can't be put in."""
    if not recipe.r:
        return
    try:
        lora.add_lora(model, recipe.r, recipe.alpha, recipe.dropout, recipe.targets)
    except ValueError as error:
        raise InputError(str(error)) from error
    half = data.half(model.logit_scale.device)
    if half:
        # Autocast rounds frozen matrices to 16 bits for each product. Rounded once they need no fp32 copy.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.to(half)


def adapt(base, splits, recipe, run_dir, resume=False, compile=False):
    """Trains a copy of the base: adapters, or all its weights if recipe.r is 0. Returns the model of the best
    epoch and the history. run_dir gets the log, the curve, a checkpoint, and the adapter or the tokenizer.

    B = 0 at the start, whatever A is: the untrained model is the base. A first loss above the base's is a
    mistake, not "random adapters".
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(base)
    torch.manual_seed(recipe.seed)
    insert(model, recipe)
    trainable, everything = lora.trainable_parameters(model)
    print(
        f"\n{recipe.variant}, seed {recipe.seed}: {trainable:,} of {everything:,} parameters train, "
        f"{100 * trainable / everything:.2f} %"
    )
    history = clip.train(model, splits, recipe, run_dir, resume, compile)
    model.load_state_dict(data.load_checkpoint(run_dir)["best"], strict=False)
    if is_main_process():
        data.draw_curve(run_dir / "curve.png", history, len(splits["val"].photos))
        if recipe.r:
            lora.save_adapter(model, run_dir, base.name)
        else:  # then from_pretrained opens the folder
            data.save_tokenizer(data.load_tokenizer(base.source), run_dir)
    return model, history


# --- Classes and search ----------------------------------------------------------------------------------


def photos_below(folder):
    """{name: path} of the photos at any depth, without leftovers; other files are left out, and said so."""
    photos, others = {}, []
    for path in data.files_below(folder) if Path(folder).is_dir() else ():
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in data.ENDINGS:
            photos[name] = path
        else:
            others.append(name)
    if others:
        print(f"left out  {len(others)} files that are no photos by their ending, as {data.shown(others[0])}")
    return photos


def embed_folder(model, tokenizer, photos, sentences):
    """Photos {name: path} and sentences to names, in the order of images (N, E), and texts (M, E)."""
    check_tokenizer(model, tokenizer)
    names, pixels = data.photo_store(photos, model.config.image_size, "cache")
    captions = [sentences] + [[]] * (len(names) - 1)  # no photo's own: as the first one's
    split = data.make_split(names, pixels, captions, tokenizer, model.config.max_position_embeddings)
    return names, *embed(model, split)


PROMPTS = "a photo of a {}", "a photo of the {}", "a cropped photo of a {}", "a picture of a {} ."


def classify(model, tokenizer, folder, templates=PROMPTS):
    """Top-1 and top-5 accuracy, in percent, on the photos in folder/CLASS and below (`_` in CLASS is a
    space). A class is the mean of its name's embeddings over the templates (CLIP's paper, 3.1.4). InputError
    for no photos, or a template without {}."""
    templates = [templates] if isinstance(templates, str) else templates
    for template in templates:
        if "{}" not in template:
            raise InputError(f"the template {template!r} has no {{}} where the name of the class goes")
    below = photos_below(folder)
    photos = {name: path for name, path in below.items() if "/" in name}
    outside = [name for name in below if name not in photos]
    if not photos:
        there = f", not {data.shown(outside[0])}" if outside else ""
        raise InputError(f"no photos in {folder}: each class is a folder there, with its photos{there}")
    if outside:
        print(f"left out  {len(outside)} photos in no class, as {data.shown(outside[0])}")
    # An empty folder is a candidate, too; one that holds other files than photos, as cache, is none.
    empty = [path for path in Path(folder).iterdir() if path.is_dir() and not any(path.iterdir())]
    classes = {path.name for path in empty if not data.is_leftover(path)}
    classes = sorted(classes | {name.split("/")[0] for name in photos})
    print(f"classes   {textwrap.shorten(data.shown(', '.join(classes)), 100)}")
    words = [data.shown(name).replace("_", " ") for name in classes]
    prompts = [template.format(name) for name in words for template in templates]

    names, images, texts = embed_folder(model, tokenizer, photos, prompts)  # (N, E), (prompts, E)
    class_of = [name.split("/")[0] for name in names]
    empty = [name for name in classes if name not in class_of]
    if empty:
        print(f"no photos of {', '.join(empty)}, which other photos may be taken for all the same")
    weights = texts.unflatten(0, (len(classes), -1)).mean(dim=1)  # (classes, E)
    ranked = (images @ nn.functional.normalize(weights, dim=1).T).argsort(dim=1, descending=True)
    right = ranked.new_tensor([classes.index(name) for name in class_of])[:, None]  # (N, 1)
    top1, top5 = (100 * (ranked[:, :k] == right).any(dim=1).float().mean().item() for k in (1, 5))
    print(
        f"zero-shot {len(names):,} photos of {len(classes)} classes  top-1 {top1:.1f}  top-5 {top5:.1f}  "
        f"chance {100 / len(classes):.1f}"
    )
    return top1, top5


def search(model, tokenizer, folder, query, count=8):
    """The photos at any depth of a folder that fit a query best: [(path, cosine)], the best first. InputError
    for no photos or no query."""
    if count < 1:
        raise InputError(f"count is {count}: how many photos, 1 at least")
    photos = photos_below(folder)
    if not photos:
        raise InputError(f"no photos in {folder}, nor in its folders")
    query = data.shown(query)
    if not query.strip():
        raise InputError("no query: say what the photo shows")
    names, images, texts = embed_folder(model, tokenizer, photos, [query])  # (N, E), (1, E)
    cosines, rows = (images @ texts[0]).topk(min(count, len(names)))
    return [(photos[names[row]], cosine) for row, cosine in zip(rows.tolist(), cosines.tolist())]


def draw_search(path, query, found):
    """The photos [(path, cosine)] that were found, in rows of four."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.9 * math.ceil(len(found) / 4)), layout="constrained")
    figure.suptitle(query, parse_math=False)
    grid = figure.subplots(math.ceil(len(found) / 4), 4, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, (photo, cosine) in zip(grid, found):
        axes.imshow(data.load_photo(photo, 224))
        axes.set_title(f"{cosine:.3f}  {data.shown(photo.name)[-24:]}", fontsize=9, parse_math=False)
    data.save_figure(figure, path)


# --- The study -------------------------------------------------------------------------------------------


def own_data(run_dir, config):
    """{name: validation split} of what a run of clip.py was trained on, to see what it forgets; else {}."""
    if not (Path(run_dir) / data.CHECKPOINT).exists():
        return {}
    name = data.load_checkpoint(run_dir)["data"]["source"]
    if name not in data.DRAWN and not Path(name).exists():
        return {}
    tokenizer = Path(run_dir) / "tokenizer"
    splits, _ = data.load(name, tokenizer, config.image_size, config.max_position_embeddings)
    return {f"{Path(name).name} val": splits["val"]}


def judge(model, variant, judged):
    """{"val loss", "val t2i_r1", ...}: the evaluation of a model on each of the splits {name: Split}."""
    row = {}
    for name, split in judged.items():
        evaluation = evaluate(model, split)
        print(f"{variant:12s}{name:14s}{data.describe(evaluation)}", flush=True)
        row |= {f"{name} {key}": value for key, value in evaluation.items()}
    return row


def study(base, splits, recipes, out, judged, resume=False, compile=False):
    """Adapts the base by each recipe, in folders of `out`. Returns a row of the table for each: what trained,
    how long, the lowest validation loss, and the best epoch's evaluation on the splits `judged`."""
    rows = []
    for recipe in recipes:
        name = f"r{recipe.r}" if recipe.r else "full"
        model, history = adapt(base, splits, recipe, out / f"{name}-seed{recipe.seed}", resume, compile)
        row = {
            "variant": recipe.variant,
            "seed": recipe.seed,
            "trainable": lora.trainable_parameters(model)[0],
            "minutes": history[-1]["minutes"],
            "lowest val loss": min(epoch["loss"] for epoch in history),
        }
        rows.append(row | judge(model, recipe.variant, judged))
        del model  # a GPU holds one copy beside the base
    return rows


def table(rows, judged):
    """The rows as text: one line for each variant, mean and, over several seeds, +- standard deviation."""
    columns = {"trainable": "{:,.0f}", "minutes": "{:.1f}", "lowest val loss": "{:.3f}"}
    for name in judged:
        columns |= {f"{name} t2i_r1": "{:.1f}", f"{name} i2t_r1": "{:.1f}"}
    lines = [["variant", "MB", *columns]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        same = [row for row in rows if row["variant"] == variant]
        cells = [variant, f"{same[0]['trainable'] * 4 / 1e6:.2f}"]  # fp32
        for name, form in columns.items():
            values = [row[name] for row in same]
            cell = form.format(statistics.mean(values))
            if len(values) > 1 and statistics.stdev(values):
                cell += f" ±{form.format(statistics.stdev(values))}"
            cells.append(cell)
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def draw_study(path, zero_shot, rows):
    """Lowest validation loss and R@1 against the parameters that were trained: a point for each seed. Where
    the base's own data were judged, as "shapes val", a third panel shows what of them is forgotten."""
    from matplotlib.figure import Figure

    def values(name, row):
        return row[name] if name in row else (row[f"{name} t2i_r1"] + row[f"{name} i2t_r1"]) / 2

    panels = {"lowest val loss": "lowest validation loss, groups of 64", "val": "R@1, mean of both ways, %"}
    for key in zero_shot:
        if key.endswith(" val t2i_r1"):
            name = key.removesuffix(" t2i_r1")
            panels[name] = f"R@1 on the base's data, {name}, %"
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items()):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            same = [row for row in rows if row["variant"] == variant]
            trained = [row["trainable"] for row in same]
            axes.plot(trained, [values(name, row) for row in same], "o", alpha=0.7, label=variant)
        axes.axhline(values(name, zero_shot), color="grey", ls="--", label="zero-shot")
        scale = "log" if name == "lowest val loss" else "linear"
        axes.set(xlabel="trained parameters", ylabel=label, xscale="log", yscale=scale)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=8)
    data.save_figure(figure, path)


# --- The command -----------------------------------------------------------------------------------------


def changes(recipe):
    """{name: value} of what a recipe has otherwise than RECIPE."""
    return {name: value for name, value in asdict(recipe).items() if value != getattr(RECIPE, name)}


def parse_args(argv):
    parser = data.Parser(
        description="Adapt CLIP with LoRA. The defaults of epochs, lr and dropout depend on the base: those "
        f"shown are for released weights; a run of clip.py has {changes(RUN_RECIPE)}, drawn worlds have "
        f"{changes(DRAWN_RECIPE)}."
    )
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--base",
        default="openai/clip-vit-base-patch16",
        help="hub name, Hugging Face folder or run of clip.py",
    )
    group.add_argument("--tokenizer", metavar="NAME", help="folder or hub name; None is the base's own")
    group.add_argument("--classify", metavar="FOLDER", help="zero-shot: which CLASS are FOLDER/CLASS/*?")
    words = ("FOLDER", "QUERY")
    group.add_argument("--search", nargs=2, metavar=words, help="photos below FOLDER that fit a sentence")
    group.add_argument("--r", type=int, nargs="+", default=[], help="ranks; none, nor --full, is 64")
    group.add_argument("--full", action="store_true", help="train all weights, with a tenth of --lr")
    group.add_argument("--alpha", type=float, help="scale is alpha / r; None is alpha = 2 r")
    group.add_argument(
        "--targets", nargs="+", default=list(RECIPE.targets), help="Linears, or modules of them"
    )
    group.add_argument("--seeds", type=int, default=1, help="repeats, with --seed and the ones after it")
    parser.add_settings(RECIPE)
    known = parser.parse_known_args(argv)[0]
    if known.data in data.DRAWN:
        parser.set_defaults(**changes(DRAWN_RECIPE))
    elif (Path(known.base) / data.CHECKPOINT).exists():
        parser.set_defaults(**changes(RUN_RECIPE))
    args = parser.parse_args(argv)
    if args.seeds < 1 or any(r < 1 for r in args.r):
        raise InputError("--r and --seeds take whole numbers, 1 at least")
    if args.classify and args.search:
        raise InputError("--classify and --search are two commands: give one of them")
    args.picture = (args.out or Path()) / "search.png"
    args.out = args.out or Path("runs", "-".join(Path(x).absolute().name for x in (args.base, args.data)))
    return args


def recipes_of(args, base_loss=0.0):
    """A LoRARecipe for each rank, and for all weights, with each seed that the flags ask for."""
    ranks = list(dict.fromkeys(args.r)) or [RECIPE.r] * (not args.full)
    settings = data.settings_of(args, LoRARecipe) | {"targets": args.targets, "base_loss": base_loss}
    recipes = []
    for seed in range(args.seed, args.seed + args.seeds):
        settings["seed"] = seed
        for r in ranks:
            alpha = 2.0 * r if args.alpha is None else args.alpha
            recipes.append(LoRARecipe(**settings, r=r, alpha=alpha))
        if args.full:  # all weights: small steps
            recipes.append(LoRARecipe(**settings | {"lr": args.lr / 10}, r=0))
    return recipes


def run(args):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = data.open_device(args.device)
    base = from_pretrained(args.base, tokenizer=args.tokenizer).to(device)
    tokenizer = tokenizer_of(base)
    if args.classify:
        classify(base, tokenizer, args.classify)
        return
    if args.search:
        found = search(base, tokenizer, *args.search)
        for photo, cosine in found:
            print(f"{cosine:6.3f}  {data.shown(photo)}")
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_search(args.picture, data.shown(args.search[1]), found)
        print(f"done      {args.picture}")
        return

    if (args.out / data.CHECKPOINT).exists():
        raise InputError(f"{args.out} holds a run of clip.py, not a study: give another --out")
    c = base.config
    splits, _ = data.open_data(args, device, base.source, c)
    for recipe in recipes_of(args):  # what is wrong with the adapters is said before anything is written
        with torch.device("meta"):
            insert(CLIP(c), recipe)
    data.save_tokenizer(tokenizer, args.out)
    compile = args.compile and device.type == "cuda"
    data.print_start(base, splits, recipe, device, compile)
    judged = {name: split for name, split in splits.items() if name != "train"} | own_data(args.base, c)
    zero_shot = judge(base, "zero-shot", judged)
    recipes = recipes_of(args, base_loss=round(zero_shot["val loss"], 3))
    rows = study(base, splits, recipes, args.out, judged, args.resume, compile)
    if is_main_process():
        first = {"variant": "zero-shot", "seed": "", "trainable": 0, "minutes": 0.0}
        first |= {"lowest val loss": zero_shot["val loss"]} | zero_shot
        data.write_csv(args.out / "study.csv", [first, *rows])
        draw_study(args.out / "study.png", first, rows)
        print(f"\n{table([first, *rows], judged)}\ndone      {args.out}")


def main(argv=None):
    return data.command(argv, parse_args, run)


if __name__ == "__main__":
    sys.exit(main())
