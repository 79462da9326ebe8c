"""Photos and captions to batches: Flickr30k in every form people have it, and two drawn worlds.

`load` returns the splits train, val and perhaps test: all photos as one uint8 array, all captions as one of
ids. A batch is two look-ups and an `augment`; there are no workers.
"""
import argparse
import csv
import errno
import hashlib
import io
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageOps

class InputError(ValueError):
    """What the user gave can't be used. The message is one line: what is wrong, and what to do."""

class Parser(argparse.ArgumentParser):
    def error(self, message):       # wrong flags end a command as all bad input does
        raise InputError(f"{message}; --help lists the flags")

stops, patience = [], 0     # stop signals that came, and how many of them wait for the end of a step

def command(argv, parse_args, run):
    """Runs a command and returns its exit code: bad input, or an OSError, is one line on stderr and 2; Ctrl-C
    is one and 130, SIGTERM one and 143. Warnings, the libraries' own, are shown with python -W default."""
    global stops, patience
    stops, patience = [], 0
    def stop(number, frame):
        stops.append(number)
        if len(stops) > patience:
            raise KeyboardInterrupt
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        run(parse_args(argv))
        return 0
    except (InputError, OSError, UnicodeError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except RuntimeError as error:                           # a full GPU, or another process of the job ended
        if not ("alloc" in str(error) or "RANK" in os.environ):
            raise
        print(f"error: {str(error).splitlines()[0]:.90}; --resume --micro-batch 64 goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command with --resume goes on from what was saved", file=sys.stderr)
        return 128 + (stops or [signal.SIGINT])[0]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

def remove(path):
    """Removes a file or folder that may be there."""
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)

@contextmanager
def atomic(path):
    """Yields a temporary path to write; at the end of the block it becomes `path`, after an error it goes."""
    tail = f"@{platform.node()}.{path.name}"
    temporary = path.with_name(f".{os.getpid()}{tail}")
    for left in path.parent.glob(f".*{tail}"):              # of killed processes, perhaps of our own number
        running = not Path("/proc").exists() or Path("/proc", left.name[1:].split("@")[0]).exists()
        if left == temporary or not running:
            remove(left)
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                # torch says RuntimeError where the disk is full
        if getattr(error, "errno", None) != errno.ENOTEMPTY:        # else another run has just built the same
            raise InputError(f"can't write {path}: is the disk full or read-only? ({error!r:.90})") from error
    finally:
        remove(temporary)

# --- Captions --------------------------------------------------------------------------------------------

def read_karpathy(text):
    """Karpathy's dataset_*.json: {"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}."""
    for image in json.loads(text)["images"]:
        yield image["filename"], image["split"], [sentence["raw"] for sentence in image["sentences"]]

def csv_rows(text):
    """The rows of a CSV file, as dicts. An unquoted comma or a lost quote would cut a caption: ValueError."""
    for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
        if None in row or None in row.values():
            raise ValueError(f"this row has more or fewer cells than the header: {list(row.values())[:2]}")
        yield row

def read_hub(text):
    """flickr_annotations_30k.csv of the hub's nlphuji/flickr30k, with columns raw (JSON), split, filename."""
    for row in csv_rows(text):
        yield row["filename"], row["split"], json.loads(row["raw"])

def read_kaggle(text):
    """Kaggle's results.csv: lines `name.jpg| 0| caption`. One line of the published file has lost its second
    bar (`2199200615.jpg| 4   A dog runs ...`), which this pattern forgives."""
    for i, line in enumerate(filter(str.strip, text.split("\n"))):
        row = re.fullmatch(r"([^|]+)\|\s*\d+\s*\|?(.*)", line.strip())
        if row:
            yield row[1].strip(), None, [row[2]]
        elif i:                                             # line 0 is a header
            raise ValueError(f"this line is not `name.jpg| 0| caption`: {line[:60]!r}")

def read_flickr8k(text):
    """Flickr8k's captions.txt: a CSV with the header `image,caption`."""
    for row in csv_rows(text):
        yield row["image"], None, [row["caption"]]

# A reader yields (photo, split or None, captions). Those that know the published split come first, and win.
READERS = {"dataset_*.json": read_karpathy, "flickr_annotations_30k.csv": read_hub,
           "results.csv": read_kaggle, "captions.txt": read_flickr8k}

def read_captions(folder):
    """The captions file in a folder or one deeper (of dataset_X.json one with X in its path): (path, {name:
    (split, captions)}); else InputError. Without splits a photo's name decides, 1 in 20 each to val, test."""
    found = [(path, pattern) for pattern in READERS for depth in ("", "*/") for path in sorted(
             Path(folder).glob(depth + pattern), key=lambda path: (path.stem[8:] not in str(folder), path))]
    if not found:
        wrong = "no captions in it or one folder deeper" if Path(folder).is_dir() else "no such folder"
        raise InputError(f"--data {folder}: {wrong}; looked for {', '.join(READERS)}; {[*DRAWN]} need none")
    (path, pattern), photos, captions = found[0], {}, {}
    try:
        for name, split, sentences in READERS[pattern](path.read_text(encoding="utf-8-sig")):
            kept = (" ".join(sentence.split()) for sentence in sentences if sentence)
            photos.setdefault(str(name), (split, []))[1].extend(filter(None, kept))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise InputError(f"{path} can't be read as a {pattern}: {error!r:.150}") from error
    for name, (split, sentences) in photos.items():
        if split is None:
            split = {0: "val", 1: "test"}.get(int(hashlib.md5(name.encode()).hexdigest(), 16) % 20, "train")
        if split not in ("train", "restval", "val", "test"):
            raise InputError(f"{path} puts {name} into {split!r}, which is none of train, val and test")
        if sentences:
            captions[name] = split.replace("restval", "train"), sentences      # restval: more for training
    if not captions:
        raise InputError(f"{path} holds no captions")
    return path, captions

def download(folder):
    """Fetches Flickr30k into `folder`, which appears whole; till then it is `<folder>.partial`."""
    import zipfile
    from huggingface_hub import hf_hub_download
    print("Flickr30k: 4.4 GB from the Hugging Face hub (nlphuji/flickr30k). The photos belong to their\n"
          "authors on Flickr; use is for non-commercial research and education only.", flush=True)
    partial = Path(f"{folder}.partial")
    try:
        for name in ("flickr_annotations_30k.csv", "flickr30k-images.zip"):
            path = Path(hf_hub_download("nlphuji/flickr30k", name, repo_type="dataset", local_dir=partial))
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > 20 * 2**30:
                raise ValueError(f"{path} would unpack to more than 20 GiB: it is not the published file")
            archive.extractall(partial)                     # drops `..` and absolute paths, makes no links
    except Exception as error:                              # the hub's client has dozens of kinds
        raise InputError(f"Flickr30k is not in ./{folder} and can't be fetched ({error!r:.150}): give your "
                         f"copy with --data DIR, try --data shapes, or delete {partial} first") from error
    path.unlink()
    os.replace(partial, folder)

# --- Photos ----------------------------------------------------------------------------------------------

def load_photo(path, size):
    """A file to (size, size, 3) uint8: the shorter side resized to `size` with PIL's bicubic filter, then the
    middle cut out. For upright RGB photos that is CLIPImageProcessor with PIL, bit for bit."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError("more than 8 bits a channel, which PIL would cut to white")
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:                     # what shows through is white, as on a page
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
    if max(image.size) > 20 * min(image.size):              # a 1 x 4000 strip would become 224 x 896,000
        image = ImageOps.fit(image, [min(side, 20 * min(image.size)) for side in image.size])
    width, height = (int(size * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))

def find_photos(captions_file, names):
    """{name: path} of photos beside the captions file or one folder deeper; of missing ones, any."""
    if bad := next((name for name in names if Path(name).name != name), None):
        raise InputError(f"{captions_file} names the photo {bad!r}: give a file name without folders")
    folder = captions_file.parent
    folders = [*sorted(path for path in folder.iterdir() if path.is_dir()), folder]     # the last one wins
    paths = {path.name: path for place in folders for path in place.iterdir()}
    return {name: paths.get(name, folder / name) for name in names}

def build_store(store, photos, size):
    """Decodes photos {name: path} in parallel into `store`: size x size x 3 bytes each, in order, and the
    names of those that could be read in names.json. The folder appears whole or not at all."""
    from tqdm import tqdm
    store.parent.mkdir(parents=True, exist_ok=True)
    names, broken = [], []
    def decode(path):
        try:
            return load_photo(path, size) if path.is_file() else None       # no pipe, which never ends
        except Exception:                                   # PIL raises almost anything on a damaged file
            return None
    with atomic(store) as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        temporary.mkdir()
        with open(temporary / "photos.uint8", "wb") as file:
            decoded = pool.map(decode, photos.values())     # threads do: PIL lets go of Python's lock
            for name, photo in zip(tqdm(photos, "decoding", mininterval=1), decoded):
                (broken if photo is None else names).append(name)
                file.write(b"" if photo is None else photo)
        if len(broken) > 0.01 * len(photos):
            raise InputError(f"{len(broken)} of {len(photos)} photos are missing or broken, as {broken[0]}")
        (temporary / "names.json").write_text(json.dumps(names))
    if broken:
        print(f"warning: left out, missing or not to be read: {', '.join(broken)}", file=sys.stderr)

def photo_store(photos, size, cache):
    """Photos {name: path} as (names, uint8 (N, size, size, 3)), memory-mapped, writes stay in memory.
    Reused while names, the files' sizes and times, and `size` are the same: the hash is its folder's name."""
    stats = [(name, os.path.isfile(path) and (os.path.getsize(path), os.stat(path).st_mtime_ns))
             for name, path in photos.items()]
    store = Path(cache) / hashlib.sha256(json.dumps([size, stats]).encode()).hexdigest()[:16]
    if not store.exists():
        build_store(store, photos, size)
    try:
        names = json.loads((store / "names.json").read_text())
        return names, np.memmap(store / "photos.uint8", np.uint8, mode="c", shape=(len(names), size, size, 3))
    except (OSError, ValueError) as error:
        raise InputError(f"{store} is damaged: delete it, and it is made again ({error!r:.90})") from error

# --- Two drawn worlds ------------------------------------------------------------------------------------

DRAWN = {"shapes": 10_000, "sketches": 3_000}               # training scenes
SIZES = {"small": 0.13, "large": 0.22}                      # radius as a share of the picture's side
COLOURS = {"red": (225, 35, 35), "green": (30, 160, 60), "blue": (40, 80, 230), "yellow": (245, 210, 30),
           "purple": (150, 50, 180), "cyan": (60, 210, 225)}
SHAPES = "circle", "square", "triangle", "cross", "ring"
PLACES = {"top left": (0.27, 0.27), "top right": (0.73, 0.27),
          "bottom left": (0.27, 0.73), "bottom right": (0.73, 0.73)}
GROUNDS = {"white": (250, 250, 250), "grey": (128, 128, 128), "black": (10, 10, 10)}
TEMPLATES = (
    "a {a} at the {place_a} and a {b} at the {place_b} on a {ground} background",
    "{ground} background with {a} {place_a} , {b} {place_b}",
    "in the {place_a} corner a {a} , in the {place_b} corner a {b} , on {ground}",
    "on {ground} , a {a} at the {place_a} , {where} a {b}",
    "the {place_a} {A[2]} is {A[0]} and {A[1]} , {where} a {B[2]} that is {B[0]} and {B[1]} , on {ground}",
)
WHERE = {(-1, 0): "left of", (1, 0): "right of", (0, -1): "above", (0, 1): "below"}
# `sketches` is the same world in outlines, on other backgrounds, which have other names, as the shapes have.
SKETCH_GROUNDS = {"white": (255, 225, 190), "grey": (150, 190, 160), "black": (50, 30, 70)}
SKETCH_WORDS = {"white": "peach", "grey": "sage", "black": "plum", "background": "paper", "circle": "disc",
                "square": "box", "triangle": "wedge", "cross": "plus", "ring": "hoop"}

@cache
def all_scenes(seed):
    """All 64,800 scenes, shuffled: ((thing, place), (thing, place), ground), thing (size, colour, shape)."""
    objects = list(itertools.product(SIZES, COLOURS, SHAPES))
    scenes = [((a, place_a), (b, place_b), ground) for a in objects for b in objects
              for place_a, place_b in itertools.combinations(PLACES, 2) for ground in GROUNDS]
    random.Random(seed).shuffle(scenes)
    return scenes

def draw(scene, side, rng, sketch=False):
    """A scene as (side, side, 3) uint8, objects shaken a little by `rng`, drawn at four times the size."""
    *objects, ground = scene
    image = Image.new("RGB", (4 * side, 4 * side), (SKETCH_GROUNDS if sketch else GROUNDS)[ground])
    for (size, colour, shape), place in objects:
        radius = 4 * side * SIZES[size] * rng.uniform(0.95, 1.05)
        x, y = (4 * side * (centre + rng.uniform(-0.02, 0.02)) for centre in PLACES[place])
        box, mask = (x - radius, y - radius, x + radius, y + radius), Image.new("L", image.size)
        pen, fill = (ImageDraw.Draw(mask), 255) if sketch else (ImageDraw.Draw(image), COLOURS[colour])
        if shape == "triangle":
            pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill)
        elif shape == "cross":
            pen.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill)
            pen.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill)
        elif shape == "square":
            pen.rectangle(box, fill)
        else:
            pen.ellipse(box, fill if shape == "circle" else None, fill, width=round(radius * 0.4))
        if sketch:                                          # the outline: the shape without its inside
            inside, reach = mask, side // 6
            for dx, dy in ((reach, 0), (-reach, 0), (0, reach), (0, -reach)):
                inside = ImageChops.darker(inside, ImageChops.offset(mask, dx, dy))
            image.paste(COLOURS[colour], mask=ImageChops.subtract(mask, inside))
    return np.asarray(image.reduce(4))

def captions_of(scene, rng, sketch=False):
    """Five captions of a scene, its objects in an order that `rng` draws. Each of them says everything."""
    *objects, ground = scene
    captions = []
    for template in TEMPLATES:
        rng.shuffle(objects)
        (a, place_a), (b, place_b) = objects
        (x_a, y_a), (x_b, y_b) = PLACES[place_a], PLACES[place_b]
        where = WHERE.get((np.sign(x_a - x_b), np.sign(y_a - y_b)), "across from")
        words = template.format(a=" ".join(a), b=" ".join(b), A=a, B=b, place_a=place_a, place_b=place_b,
                                where=where, ground=ground).split()
        captions.append(" ".join(SKETCH_WORDS.get(word, word) if sketch else word for word in words))
    return captions

def load_drawn(sizes, side, sketch=False, seed=0):
    """For each split of a drawn world, of sizes {split: scenes}: (names, photos, sentences of each)."""
    splits, index = {}, itertools.count()
    for split, count in sizes.items():
        rows = []
        for i in itertools.islice(index, count):
            scene, rng = all_scenes(seed)[i], random.Random(f"{seed}/{i}")
            rows.append((f"{i:05d}", draw(scene, side, rng, sketch), captions_of(scene, rng, sketch)))
        names, photos, sentences = zip(*rows)
        splits[split] = list(names), np.stack(photos), sentences
    return splits

# --- Tokenizer -------------------------------------------------------------------------------------------

def train_tokenizer(captions, vocab_size=8192):
    """A CLIP tokenizer for these captions, made as OpenAI made theirs: 256 bytes, 256 that end a word (given,
    so that ties fall alike each time), the merges that BPE finds, then both markers, the end token last."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    blank = CLIPTokenizer().backend_tokenizer
    letters = [byte + end for end in ("", "</w>") for byte in sorted(pre_tokenizers.ByteLevel.alphabet())]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, special_tokens=letters, show_progress=False,
                                  end_of_word_suffix="</w>")
    blank.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(blank.to_str())["model"]["merges"]]
    tokens = [*letters, *("".join(merge) for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges=merges)

def load_tokenizer(name):
    """A CLIPTokenizer from the hub or a folder. Raises InputError where there is none."""
    from transformers import CLIPTokenizer
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name)
        assert len(tokenizer) > 3                           # an empty one is what no folder gives, offline
        return tokenizer
    except Exception as error:                              # the hub's client has dozens of kinds
        raise InputError(f"no tokenizer {name}: give its folder, a hub name if online, or `train`") from error

def tokenize(tokenizer, captions, context=77):
    """Captions to int32 ids (len(captions), context). Longer ones are cut, and keep their end token: that is
    where the model reads the caption's embedding (openai/CLIP #212)."""
    form = dict(padding="max_length", truncation=True, max_length=context)
    parts = (captions[i:i + 5000] for i in range(0, len(captions), 5000))       # lists of all ids fill memory
    return torch.cat([torch.tensor(tokenizer(part, **form)["input_ids"]).int() for part in parts])

# --- Splits and batches ----------------------------------------------------------------------------------

@dataclass
class Split:
    """photos (N, S, S, 3) uint8; names N; captions M, in the order of the photos; owner (M,): the photo that
    each caption describes; ids (M, context) int32; lengths (M,) of the captions, with both markers."""
    photos: torch.Tensor
    names: list
    captions: list
    owner: torch.Tensor
    ids: torch.Tensor
    lengths: torch.Tensor

    def pairs(self, seed, epoch, captions=1):
        """(N, 1 + captions): a photo's row, then rows of captions of its own (again if too few), ordered by
        (seed, epoch). Each photo once: none meets itself in a batch as a negative (vsepp #6)."""
        rng = np.random.default_rng([seed, epoch])
        photo = torch.from_numpy(rng.permutation(len(self.photos)))
        first, count = torch.searchsorted(self.owner, photo), self.owner.bincount()[photo]      # (N,), (N,)
        turn = torch.from_numpy(rng.integers(count.numpy()))[:, None] + torch.arange(captions)
        return torch.cat([photo[:, None], first[:, None] + turn % count[:, None]], dim=1)

    def place(self, device):
        """Moves the photos to a GPU where they fill at most half of what is free; else batches are read."""
        if device.type == "cuda" and self.photos.numel() < torch.cuda.mem_get_info(device)[0] / 2:
            self.photos = self.photos.to(device)

    def take(self, rows, device):
        """Photos `rows` on the device, uint8 (len(rows), S, S, 3), without waiting for a GPU to be done."""
        return self.photos[rows.to(self.photos.device, non_blocking=True)].to(device)

    def tokens(self, rows, device):
        """Ids of captions `rows`, (len(rows), T) int32. T is a multiple of 8 or all: each T is compiled."""
        longest = -(-int(self.lengths[rows].max()) // 8) * 8
        return self.ids[rows, :longest].to(device, non_blocking=True)

def make_split(names, photos, sentences, tokenizer, context):
    """A Split of photos (N, S, S, 3) uint8, with for each of them the list of its sentences."""
    owner = np.repeat(np.arange(len(names)), [len(own) for own in sentences])
    captions = [caption for own in sentences for caption in own]
    ids = tokenize(tokenizer, captions, context)
    return Split(torch.from_numpy(photos), names, captions, torch.from_numpy(owner), ids,
                 lengths=(ids == tokenizer.eos_token_id).int().argmax(dim=1) + 1)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # of OpenAI's photos

def normalize(photos):
    """uint8 (B, S, S, 3) to the (B, 3, S, S) float that the model takes, each channel about N(0, 1)."""
    mean, std = torch.tensor([MEAN, STD]).to(photos.device, non_blocking=True)
    return ((photos / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

def augment(photos, size, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3)):
    """uint8 (B, S, S, 3) to normalised (B, 3, size, size): a random crop of `scale` of the area with sides in
    `ratio` (less where it would stick out), mirrored or not; on the photos' device, for all at once."""
    B, device = len(photos), photos.device
    area = torch.empty(B, device=device).uniform_(*scale)
    aspect = torch.empty(B, device=device).uniform_(*np.log(ratio)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)    # shares
    mirror = torch.randint(2, (B,), device=device) * 2 - 1
    # Where output pixel (x, y) comes from, with all coordinates from -1 to 1.
    centres = (torch.arange(size, device=device) * 2 + 1) / size - 1                    # (size,)
    x, y = (centres * side[:, None] + ((1 - side.abs()) * torch.empty_like(side).uniform_(-1, 1))[:, None]
            for side in (width * mirror, height))                                       # (B, size) each
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)   # (B, size, size, 2)
    return F.grid_sample(normalize(photos), grid, padding_mode="border", align_corners=False)

def load_flickr(captions_file, captions, image_size, cache):
    """Splits of what read_captions gave, with photos: for each split (names, photos, sentences of each)."""
    paths, splits = find_photos(captions_file, captions), {}
    for split in ("train", "val", "test"):
        chosen = {name: path for name, path in paths.items() if captions[name][0] == split}
        if chosen:
            # Training photos have a margin for crops: 256 pixels for the 224 of ViT-B/16.
            size = image_size * 8 // 7 if split == "train" else image_size
            names, photos = photo_store(chosen, size, cache)
            splits[split] = names, photos, [captions[name][1] for name in names]
        elif split != "test":
            raise InputError(f"{captions_file} has no {split} photos, too few? dataset_*.json can name them")
    return splits

def load(name, tokenizer, image_size, context=77, cache="cache"):
    """({"train", "val" and perhaps "test": Split}, tokenizer) of the data `name`, a drawn world or a folder,
    for a model of this image_size and context (tokens). tokenizer: hub name, folder or "train"."""
    if name == "flickr30k" and not Path(name).exists():
        download(name)
    captions = None if name in DRAWN else read_captions(name)       # a wrong folder is said before all else
    tokenizer = tokenizer if tokenizer == "train" else load_tokenizer(tokenizer)
    parts = (load_flickr(*captions, image_size, cache) if captions else
             load_drawn({"val": 500, "test": 500, "train": DRAWN[name]}, image_size, name == "sketches"))
    if tokenizer == "train":
        tokenizer = train_tokenizer(itertools.chain(*parts["train"][2]))
    return {split: make_split(*part, tokenizer, context) for split, part in parts.items()}, tokenizer
