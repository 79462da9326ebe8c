"""Adapts a trained CLIP to other photos with LoRA, and measures what that wins and what it costs.

    python finetune.py --r 64                   openai/clip-vit-base-patch16 on Flickr30k, on a GPU
    python finetune.py --base runs/shapes --data sketches --r 4 16 --full     after clip.py --data shapes
    python finetune.py --classify FOLDER        zero-shot classification of the photos FOLDER/CLASS/*

Every rank, and with --full the training of all weights, starts from the same base and sees the same batches.
Data, loss, metrics and training loop are those of clip.py: what stands here is what adaptation changes, and
beside it the exchange with Hugging Face's files and the figures, which clip.py calls too.
"""
import argparse
import copy
import csv
import math
import statistics
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

import clip
import data
import lora
from clip import CLIP, CLIPConfig, TowerConfig, describe, embed, evaluate
from data import InputError

# --- Released weights ------------------------------------------------------------------------------------

def read_released(cls, source):
    """cls.from_pretrained: our CLIP with the weights of a hub name, a Hugging Face folder or a run."""
    from transformers import CLIPModel
    if (Path(source) / clip.CHECKPOINT).exists():
        return cls.load(source)
    local = Path(source).parent.exists() or Path(source).parts[0] == "runs"      # no hub name
    try:
        released, report = CLIPModel.from_pretrained(source, output_loading_info=True, local_files_only=local)
    except Exception as error:                              # the hub's client has dozens of kinds
        raise InputError(f"no CLIP in {source}: give a run (clip.py --data shapes makes runs/shapes), a "
                         "Hugging Face folder or, with a network, a hub name") from error
    vision, text = released.config.vision_config, released.config.text_config
    adapters = [name for name in released.state_dict() if ".lora_" in name]     # transformers opens them too
    if left := [name for names in (*report.values(), adapters) for name in names]:
        raise InputError(f"{source} is not one whole CLIP: {left[0]} is missing, odd or too much")
    if not (text.hidden_act == vision.hidden_act in clip.ACTIVATIONS
            and text.layer_norm_eps == vision.layer_norm_eps == 1e-5):
        raise InputError(f"{source} has an activation or a norm that this CLIP doesn't have")
    towers = [TowerConfig(*(getattr(tower, f.name) for f in fields(TowerConfig))) for tower in (vision, text)]
    # Older configurations say 2 and mean the end token, which has the largest id (transformers #24650).
    eos_token_id = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    model = cls(CLIPConfig(*towers, vision.image_size, vision.patch_size, text.vocab_size,
                           text.max_position_embeddings, eos_token_id, released.config.projection_dim,
                           text.hidden_act, causal=True))
    model.load_state_dict(released.state_dict())
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise InputError(f"{source} holds NaN or infinity: fetch or train it again")
    model.source = source
    return model.eval()

def write_released(model, folder, tokenizer=None):
    """model.save_pretrained: a folder for transformers' CLIPModel and CLIPProcessor."""
    import transformers
    c = model.config
    if not c.causal:
        raise InputError("Hugging Face's CLIP has no BERT-style text tower: train with --text causal")
    if not all(getattr(module, "merged", True) for module in model.modules()):
        raise InputError("the adapters are not merged: lora.merge(model) comes first")
    if tokenizer is None and model.source is None:
        raise InputError("this model came with no tokenizer: save_pretrained(folder, tokenizer)")
    tokenizer = tokenizer or data.load_tokenizer(model.source)
    weights = {name: weight for name, weight in model.state_dict().items() if ".lora_" not in name}
    vision = dict(asdict(c.vision), hidden_act=c.hidden_act, image_size=c.image_size, patch_size=c.patch_size)
    text = dict(asdict(c.text), hidden_act=c.hidden_act, vocab_size=c.vocab_size, eos_token_id=c.eos_token_id,
                bos_token_id=None, max_position_embeddings=c.max_position_embeddings)
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=c.projection_dim)
    with torch.device("meta"):
        released = transformers.CLIPModel(config)
    released.load_state_dict(weights, assign=True)
    released.save_pretrained(folder)
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": c.image_size}, crop_size=c.image_size)
    transformers.CLIPProcessor(pixels, tokenizer).save_pretrained(folder)

# --- One adapted model -----------------------------------------------------------------------------------

def name_of(r):
    return f"r={r}" if r else "all weights"

def insert(model, r, args):
    """Adapters of rank r with the flags' alpha, dropout and targets; on CUDA the frozen Linears in bf16."""
    lora.add_lora(model, r, 2 * r if args.alpha is None else args.alpha, args.dropout, args.targets)
    if args.device.type == "cuda":
        # Autocast rounds the frozen matrices to bf16 for each product. Rounded once they need no fp32 copy.
        for layer in filter(lambda module: isinstance(module, torch.nn.Linear), model.modules()):
            layer.weight.data = layer.weight.data.bfloat16()

def adapt(base, r, seed, splits, zero_shot, args):
    """Trains a copy of the base: adapters of rank r, or all its weights if r is 0. Returns the model of the
    best epoch and the history. Leaves a folder with the log, the curve, a checkpoint and the adapter.
    zero_shot: the base's evaluation on the validation photos, which the untrained adapters must equal."""
    folder = args.out / f"{f'r{r}' if r else 'full'}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)               # process 0 may not have made args.out yet
    model = copy.deepcopy(base).to(args.device)
    torch.manual_seed(seed)
    if r:
        insert(model, r, args)
    # B = 0 at the start, whatever A is. A first loss above the base's is a mistake, not "random adapters".
    assert evaluate(model, splits["val"]) == zero_shot, "the untrained model is not the base"
    trainable, everything = lora.trainable_parameters(model)
    print(f"\n{name_of(r)}, seed {seed}: {trainable:,} of {everything:,} parameters train, "
          f"{100 * trainable / everything:.2f} %")
    lr, base_loss = args.lr if r else args.lr / 10, round(zero_shot["loss"], 3)    # all weights: small steps
    flags = argparse.Namespace(**vars(args) | dict(seed=seed, lr=lr, out=folder, zero_shot_loss=base_loss))
    if not r:                                               # then CLIP.load opens the folder
        clip.open_run(data.load_tokenizer(model.source), flags)
    history = clip.train(model, splits, flags, folder)
    model.load_state_dict(clip.load_checkpoint(folder)["best"], strict=False)
    if clip.RANK == 0:
        draw_curve(folder / "curve.png", history, len(splits["val"].photos))
    if clip.RANK == 0 and r:
        lora.save_adapter(model, folder, args.base)
    return model, history

# --- Zero-shot classification ----------------------------------------------------------------------------

PROMPTS = "a photo of a {}", "a photo of the {}", "a cropped photo of a {}", "a picture of a {} ."

def classify(model, tokenizer, folder, templates=PROMPTS):
    """Top-1 and top-5 accuracy, in percent, on photos folder/CLASS/* (`_` in CLASS is a space). InputError
    without any. A class is the mean of its name's embeddings over the templates (CLIP's paper, 3.1.4)."""
    paths = {f"{p.parent.name}/{p.name}": p for p in sorted(Path(folder).glob("*/[!.]*")) if p.is_file()}
    if not paths:
        raise InputError(f"no photos in {folder}: each class is a folder there, with its photos")
    names, photos = data.photo_store(paths, model.config.image_size, "cache")
    classes = sorted({name.split("/")[0] for name in names})
    prompts = [template.format(name.replace("_", " ")) for name in classes for template in templates]
    sentences = [prompts] + [[]] * (len(names) - 1)         # no photo's own: as the first one's
    split = data.make_split(names, photos, sentences, tokenizer, model.config.max_position_embeddings)
    images, texts = embed(model, split)                                                 # (N, E), (prompts, E)
    weights = texts.unflatten(0, (len(classes), -1)).mean(dim=1)                        # (classes, E)
    ranked = (images @ torch.nn.functional.normalize(weights, dim=1).T).argsort(dim=1, descending=True)
    right = torch.tensor([[classes.index(name.split("/")[0])] for name in names], device=ranked.device)
    top1, top5 = (100 * (ranked[:, :k] == right).any(dim=1).float().mean().item() for k in (1, 5))
    print(f"zero-shot {len(names):,} photos of {len(classes)} classes  top-1 {top1:.1f}  top-5 {top5:.1f}  "
          f"chance {100 / len(classes):.1f}")
    return top1, top5

# --- The study -------------------------------------------------------------------------------------------

def own_data(run_dir, config):
    """{name: validation split} of what a run of clip.py was trained on, to see what it forgets; else {}."""
    if not (Path(run_dir) / clip.CHECKPOINT).exists():
        return {}
    name = clip.load_checkpoint(run_dir)["flags"]["data"]
    if name not in data.DRAWN and not Path(name).exists():
        return {}
    size, context = config.image_size, config.max_position_embeddings
    return {f"{Path(name).name} val": data.load(name, Path(run_dir) / "tokenizer", size, context)[0]["val"]}

def study(base, args, splits, judged, zero_shot):
    """Trains every variant with every seed: a row of the table for each."""
    rows = []
    for seed in range(args.seed, args.seed + args.seeds):
        for r in args.r:
            model, history = adapt(base, r, seed, splits, zero_shot["val"], args)
            row = {"variant": name_of(r), "seed": seed, "trainable": lora.trainable_parameters(model)[0],
                   "minutes": history[-1]["minutes"], "lowest val loss": min(row["loss"] for row in history)}
            for name, split in judged.items():
                evaluation = evaluate(model, split)
                print(f"{name_of(r):12s}{name:12s}{describe(evaluation)}", flush=True)
                row |= {f"{name} {key}": value for key, value in evaluation.items()}
            rows.append(row)
            del model                                       # compile_parts frees its memory
    return rows

def table(rows, judged):
    """The rows as text: one line for each variant, mean and, over several seeds, +- standard deviation."""
    columns = {"trainable": "{:,.0f}", "minutes": "{:.1f}", "lowest val loss": "{:.3f}"}
    for name in judged:
        columns |= {f"{name} t2i_r1": "{:.1f}", f"{name} i2t_r1": "{:.1f}"}
    lines = [["variant", "MB", *columns]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        same = [row for row in rows if row["variant"] == variant]
        cells = [variant, f"{same[0]['trainable'] * 4 / 1e6:.2f}"]         # fp32
        for name, form in columns.items():
            values = [row[name] for row in same]
            mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0
            cells.append(form.format(mean) + (f" ±{form.format(deviation)}" if deviation else ""))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)

# --- Reports and figures, those of clip.py as well -------------------------------------------------------

def print_start(model, splits, args):
    """The opening block: device, size, data, steps, and the losses of a model that knows nothing."""
    device, steps_per_epoch = args.device, len(splits["train"].photos) // args.batch_size
    name = f"{torch.cuda.get_device_name(device)}, bfloat16" if device.type == "cuda" else "CPU"
    vision, text, everything = (f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
                                for module in (model.vision_model, model.text_model, model))
    print(f"device    {clip.WORLD_SIZE} x {name}{', compiled' if args.compile else ''}")
    print(f"model     vision {vision} + text {text} + projections = {everything} parameters")
    for name, split in splits.items():
        print(f"{name:10s}{len(split.photos):,} photos, {len(split.captions):,} captions")
    print(f"steps     {args.epochs * steps_per_epoch:,} of {args.batch_size} pairs in {args.epochs} epochs")
    for name, pairs in (("training", args.batch_size), ("validation", min(64, len(splits["val"].photos)))):
        print(f"chance    {name} loss ln {pairs} = {math.log(pairs):.3f}", flush=True)

def print_end(model, splits, history, args):
    """The closing block: the last and the best epoch on the test photos, if there are any; the figures."""
    state, name = clip.load_checkpoint(args.out), "test" if "test" in splits else "val"
    best, lowest = max(history, key=lambda row: row["rsum"]), min(history, key=lambda row: row["loss"])
    for which, row in (("last", history[-1]), ("best", best)):
        model.load_state_dict(state[which], strict=False)
        print(f"{which} epoch {row['epoch']:3d}  {name} {describe(evaluate(model, splits[name]))}")
    draw_curve(args.out / "curve.png", history, len(splits["val"].photos))
    draw_retrieval(args.out / "retrieval.png", model, splits["val"])
    minutes, photos = history[-1]["minutes"], len(splits["train"].photos) // args.batch_size * args.batch_size
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if args.device.type == "cuda" else ""
    print(f"lowest    validation loss {lowest['loss']:.4f}, in epoch {lowest['epoch']}")
    print(f"done      {minutes:.1f} minutes of training, {len(history) * photos / minutes / 60:,.0f} pairs/s"
          f"{memory}: {args.out}")

def draw_curve(path, history, photos):
    """Loss with the line of chance on the left, recall over `photos` validation photos on the right."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], "o-", ms=3, label="training, whole batch")
    left.plot(epochs, [row["loss"] for row in history], "o-", ms=3, label="validation, groups of 64")
    left.axhline(math.log(min(64, photos)), color="grey", ls=":", label="validation at chance")
    for name, words, style in (("t2i_r", "caption to photo", "-"), ("i2t_r", "photo to caption", "--")):
        for k, colour in ((10, "C2"), (5, "C1"), (1, "C0")):
            recall = [row[f"{name}{k}"] for row in history]
            right.plot(epochs, recall, style, color=colour, label=f"R@{k} {words}")
    for axes, label in ((left, "contrastive loss"), (right, f"recall over {photos:,} photos, %")):
        axes.set(xlabel="epoch", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    with data.atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")

def draw_retrieval(path, model, split):
    """Six captions from all over the split over the photos found first, the right one in a green frame."""
    from matplotlib.figure import Figure
    images, texts = embed(model, split)
    chosen = torch.linspace(0, len(texts) - 1, min(6, len(texts))).long()
    found = (texts[chosen] @ images.T).topk(min(6, len(images))).indices.cpu()          # (6, 6)
    figure = Figure(figsize=(1.6 * found.shape[1], 1.9 * len(chosen)), layout="constrained")
    for axes, caption, photos in zip(figure.subplots(len(chosen), squeeze=False)[:, 0], chosen, found):
        pictures = split.take(photos, split.photos.device).cpu()                        # (6, S, S, 3)
        edge = pictures.shape[1] // 16
        framed = torch.nn.functional.pad(pictures, (0, 0, edge, edge, edge, edge), value=255)
        framed[photos == split.owner[caption]] = torch.tensor([50, 205, 50], dtype=torch.uint8)
        framed[:, edge:-edge, edge:-edge] = pictures
        axes.imshow(torch.cat(list(framed), dim=1).numpy())
        axes.set_title(split.captions[caption][:110], loc="left", fontsize=9, parse_math=False)
        axes.axis("off")
    with data.atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")

def draw_study(path, zero_shot, rows):
    """Lowest validation loss and R@1 against the parameters that were trained: a point for each seed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    kinds = ((lambda row: row["lowest val loss"], "lowest validation loss, groups of 64", "log"),
             (lambda row: (row["val t2i_r1"] + row["val i2t_r1"]) / 2, "R@1, mean of both ways, %", "linear"))
    for axes, (value, label, yscale) in zip(figure.subplots(1, 2), kinds):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            same = [row for row in rows if row["variant"] == variant]
            trained = [row["trainable"] for row in same]
            axes.plot(trained, list(map(value, same)), "o", alpha=0.7, label=variant)
        axes.axhline(value(zero_shot), color="grey", ls="--", label="zero-shot")
        axes.set(xlabel="trained parameters", ylabel=label, xscale="log", yscale=yscale)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=8)
    with data.atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")

# --- The command -----------------------------------------------------------------------------------------

# For the drawn worlds these are the defaults: a small model takes larger steps.
DRAWN_DEFAULTS = dict(epochs=8, lr=5e-3, dropout=0.0)

def parse_args(argv):
    parser = data.Parser(description=f"Adapt CLIP with LoRA. Defaults of drawn worlds: {DRAWN_DEFAULTS}.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    group = parser.add_argument_group("adapters")
    group.add_argument("--base", default="openai/clip-vit-base-patch16",
                       help="hub name, Hugging Face folder or run of clip.py")
    group.add_argument("--classify", metavar="FOLDER", help="zero-shot: which CLASS are FOLDER/CLASS/*?")
    group.add_argument("--r", type=int, nargs="+", default=[], help="ranks; none, nor --full, is 64")
    group.add_argument("--full", action="store_true", help="train all weights, with a tenth of --lr")
    group.add_argument("--alpha", type=float, help="scale is alpha / r; None is alpha = 2 r")
    group.add_argument("--dropout", type=float, default=0.1, help="of what goes into the adapters")
    group.add_argument("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj"], help="adapted Linears")
    group.add_argument("--seeds", type=int, default=1, help="repeats, with --seed and the ones after it")
    clip.add_shared_flags(parser)
    # Of amirhossein-yousefi/Image-Contrastive-CLIP (R@1 79.0 text->image, 92.3), but lr: LoRA takes 1e-4.
    parser.set_defaults(epochs=5, batch_size=64, lr=1e-4, weight_decay=0.1, views=1, captions=1,
                        patch_dropout=0.0, word_dropout=0.0, ema=0.0)
    if parser.parse_known_args(argv)[0].data in data.DRAWN:
        parser.set_defaults(**DRAWN_DEFAULTS)
    args = clip.checked(parser.parse_args(argv))
    if args.seeds < 1 or any(r < 1 for r in args.r):
        raise InputError("--r and --seeds take whole numbers, 1 at least")
    args.r = list(dict.fromkeys(args.r or ([] if args.full else [64]))) + [0] * args.full
    args.out = args.out or Path("runs", "-".join(Path(x).absolute().name for x in (args.base, args.data)))
    return args

def run(args):
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base = CLIP.from_pretrained(args.base).to(args.device)
    if args.classify:
        classify(base, data.load_tokenizer(base.source), args.classify)
        return
    splits, tokenizer = clip.load_data(args, base.source, base.config)
    if (len(tokenizer), tokenizer.eos_token_id) != (base.config.vocab_size, base.config.eos_token_id):
        raise InputError(f"the tokenizer in {base.source} is not the one of the model {args.base}")
    with torch.device("meta"):                              # what is wrong with the flags is said now
        for r in filter(None, args.r):
            insert(CLIP(base.config), r, args)
    clip.open_run(tokenizer, args)
    print_start(base, splits, args)
    judged = {name: split for name, split in splits.items() if name != "train"}
    judged |= own_data(args.base, base.config)
    zero_shot = {name: evaluate(base, split) for name, split in judged.items()}
    for name, row in zero_shot.items():
        print(f"{'zero-shot':12s}{name:12s}{describe(row)}", flush=True)
    base.cpu()                                              # a GPU holds the copy that trains, and no other
    rows = study(base, args, splits, judged, zero_shot)
    if clip.RANK:
        return                                              # process 0 writes for all
    first = {"variant": "zero-shot", "seed": "", "trainable": 0, "minutes": 0.0,
             "lowest val loss": zero_shot["val"]["loss"],
             **{f"{name} {key}": value for name, row in zero_shot.items() for key, value in row.items()}}
    with data.atomic(args.out / "study.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, first)
        writer.writeheader()
        writer.writerows([first, *rows])
    draw_study(args.out / "study.png", first, rows)
    print(f"\n{table([first, *rows], judged)}\ndone      {args.out}")

def main(argv=None):
    return data.command(argv, parse_args, run)

if __name__ == "__main__":
    sys.exit(main())
