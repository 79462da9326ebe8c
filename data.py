"""This file turns photos and captions into batches: Flickr30k in its published forms, your own photos, and
two drawn worlds, `shapes` and `sketches`.

`load` returns splits. A Split holds its photos as one uint8 array and its captions as token ids, so a batch
is two look-ups and an `augment` on the GPU, without worker processes. The letters in the shapes of tensors: N
photos and M captions in a split; B photos in a batch, with V crops of each; S x S pixels; T tokens.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import textwrap
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath

# OpenMP reads this when torch is imported. Without it, waiting threads spin, which makes a step several times
# slower while another process uses one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTokenizer


class InputError(ValueError):
    """The user's input can't be used. The message is one line: what is wrong, and what to do."""


def first_line(error):
    """The first line of an exception's text, at most 150 characters of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


# --- Splits and batches ----------------------------------------------------------------------------------


@dataclass
class Split:
    """Photos with their captions, in the order of the photos: those of photo 0, then those of photo 1, ..."""

    photos: torch.Tensor  # (N, S, S, 3) uint8
    names: list  # N file names
    captions: list  # M strings
    image_index: torch.Tensor  # (M,): the row of the photo that each caption describes
    ids: torch.Tensor  # (M, context) int32 token ids, padded with the end token
    lengths: torch.Tensor  # (M,): number of tokens of each caption, start and end included
    usual_length: int  # 99.9 % of the captions are not longer
    source: str = ""  # the name that `load` was given

    def first_captions(self):
        """(first, count), (N,) each: the row of a photo's first caption, and how many captions it has."""
        count = self.image_index.bincount(minlength=len(self.photos))
        return count.cumsum(0) - count, count

    def pairs(self, seed, epoch, captions=1):
        """(N, 1 + captions): the photos in random order, each with the rows of some of its captions. No photo
        comes twice in an epoch, since in one batch it would be its own negative (vsepp #6)."""
        rng = np.random.default_rng([seed, epoch])
        photo = torch.from_numpy(rng.permutation(len(self.photos)))  # (N,)
        first, count = self.first_captions()
        first, count = first[photo], count[photo]
        # Start at a random caption, take the next ones, and go on with the first after the last.
        start = torch.from_numpy(rng.integers(count.numpy()))
        offset = (start[:, None] + torch.arange(captions)) % count[:, None]  # (N, captions)
        return torch.cat([photo[:, None], first[:, None] + offset], dim=1)

    def place(self, device):
        """Move the photos to a GPU if they fill at most half of its free memory."""
        if device.type == "cuda" and self.photos.numel() < torch.cuda.mem_get_info(device)[0] / 2:
            self.photos = self.photos.to(device)

    def take(self, rows, device):
        """Photos of these rows on the device, (len(rows), S, S, 3) uint8."""
        return self.photos[rows.to(self.photos.device, non_blocking=True)].to(device)

    def tokens(self, rows, device, cut=False):
        """Token ids of these captions, (len(rows), T) int32, where T is a multiple of 8 or the context. cut
        is for training: T is then the same in every batch, since torch.compile compiles once for each T.
        At most one caption in a thousand is cut."""
        longest = self.usual_length if cut else int(self.lengths[rows].max())
        ids = self.ids[rows, : math.ceil(longest / 8) * 8]
        ids[:, -1] = self.ids[rows, -1]  # a cut caption ends in the end token (padding has its id)
        return ids.to(device, non_blocking=True)

    def fingerprint(self):
        """A number that depends on the photos' names, the captions' tokens, and the photo of each caption."""
        names = repr([PurePosixPath(name).name for name in self.names]).encode()
        return zlib.crc32(names + self.ids.numpy().tobytes() + self.image_index.numpy().tobytes())


def make_split(names, photos, sentences, tokenizer, context, source=""):
    """A Split of photos, an array (N, S, S, 3) uint8, and the list of sentences of each photo."""
    captions = list(itertools.chain(*sentences))
    image_index = torch.arange(len(sentences)).repeat_interleave(torch.tensor([len(x) for x in sentences]))
    ids = tokenize(tokenizer, captions, context)
    lengths = (ids == tokenizer.eos_token_id).int().argmax(dim=1) + 1
    usual_length = int(lengths.float().quantile(0.999, interpolation="higher"))
    return Split(torch.from_numpy(photos), names, captions, image_index, ids, lengths, usual_length, source)


# --- Augmentation ----------------------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


def normalize(photos):
    """Normalise photos, uint8 (B, S, S, 3) or float from 0 to 1 (B, 3, S, S). Returns (B, 3, S, S)."""
    pixels = photos if photos.is_floating_point() else (photos / 255).permute(0, 3, 1, 2)
    mean, std = torch.tensor([MEAN, STD]).to(pixels.device, non_blocking=True)[:, :, None, None]
    return ((pixels - mean) / std).contiguous()


def color_jitter(pixels, strength, grey=0.2):
    """Pixels (B, 3, S, S) from 0 to 1 with brightness, saturation and contrast multiplied by random factors
    from 1 - strength to 1 + strength. A fraction `grey` becomes grey (SimCLR, arXiv:2002.05709)."""
    B, device = len(pixels), pixels.device
    factors = torch.empty(3, B, 1, 1, 1, device=device).uniform_(1 - strength, 1 + strength)
    brightness, contrast, saturation = factors  # (B, 1, 1, 1) each
    saturation = saturation * (torch.rand(B, 1, 1, 1, device=device) >= grey)
    luma = torch.tensor([0.299, 0.587, 0.114]).to(device, non_blocking=True)[:, None, None]  # R, G, B in grey
    pixels = brightness * pixels
    in_grey = (pixels * luma).sum(dim=1, keepdim=True)  # (B, 1, S, S)
    pixels = torch.lerp(in_grey, pixels, saturation)
    mean_grey = in_grey.mean(dim=(2, 3), keepdim=True)
    return torch.lerp(mean_grey, pixels, contrast).clamp_(0, 1)


def random_resized_crop(pixels, size, scale, views, ratio=(3 / 4, 4 / 3)):
    """Random crops (B V, 3, size, size) of pixels (B, 3, S, S), half of them mirrored, since captions of
    photos seldom say left or right. The area of a crop is a random fraction of the photo's, from `scale` to
    1, and its width / height is in `ratio`. Then a side longer than the photo's is shortened to it."""
    B, V, device = len(pixels), views, pixels.device
    area = torch.empty(B * V, device=device).uniform_(scale, 1)
    aspect = torch.empty(B * V, device=device).uniform_(*np.log(ratio)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)  # (B V,)
    mirror = torch.randint(2, (B * V,), device=device) * 2 - 1  # 1 or -1
    # width and height are fractions of the photo. For grid_sample the photo reaches from -1 to 1, so the crop
    # is 2 width wide, and its centre is between -(1 - width) and 1 - width.
    centre_x = (1 - width) * torch.empty_like(width).uniform_(-1, 1)
    centre_y = (1 - height) * torch.empty_like(height).uniform_(-1, 1)
    pixel = (torch.arange(size, device=device) * 2 + 1) / size - 1  # the centres of pixels, from -1 to 1
    x = centre_x[:, None] + pixel * (width * mirror)[:, None]  # (B V, size)
    y = centre_y[:, None] + pixel * height[:, None]
    x, y = torch.broadcast_tensors(x[:, None, :], y[:, :, None])
    grid = torch.stack([x, y], dim=-1).view(B, V * size, size, 2)  # the crops of a photo, one below the other
    crops = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return crops.unflatten(2, (V, size)).transpose(1, 2).flatten(0, 1)


def augment(photos, size, recipe):
    """uint8 photos (B, S, S, 3) to normalised random crops (B V, 3, size, size), the V crops of a photo one
    after the other, by recipe.views, recipe.crop_scale and recipe.color_jitter."""
    pixels = (photos / 255).permute(0, 3, 1, 2).contiguous()
    crops = random_resized_crop(pixels, size, recipe.crop_scale, recipe.views)
    return normalize(color_jitter(crops, recipe.color_jitter) if recipe.color_jitter else crops)


def augment_captions(ids, config, word_dropout):
    """Replace tokens in ids (n, T) by random ones. Start, end and padding stay. Each caption has its own
    probability of this, from 0 to word_dropout, so the model also reads captions that are nearly whole."""
    if not word_dropout:
        return ids
    words = torch.randint_like(ids, config.vocab_size - 1)
    words += words >= config.eos_token_id  # any token but the end token
    p = word_dropout * torch.rand(len(ids), 1, device=ids.device)
    replaced = (torch.rand(ids.shape, device=ids.device) < p) & (ids != config.eos_token_id)
    replaced[:, 0] = False  # the start token
    return torch.where(replaced, words, ids)


# --- Loading ---------------------------------------------------------------------------------------------


def load(name, tokenizer, image_size, context=77, captions=None, limit=0):
    """({"train", "val" and perhaps "test": Split}, tokenizer) of a drawn world or a folder, with photos of
    image_size pixels and captions of `context` tokens. tokenizer: hub name, folder, or "train" to train one.
    captions: the captions file. limit: number of training photos; 0 is all."""
    if limit < 0:
        raise InputError(f"--photos {limit} is negative: give a number of training photos, or 0 for all")
    if name not in (*DRAWN, "flickr30k") and not Path(name).is_dir():
        raise InputError(f"--data {name} is not a folder: give one, or {' or '.join(DRAWN)}")
    if captions and name in DRAWN:
        raise InputError(f"--captions {captions} is for folders of photos, but {name} is a drawn world")
    tokenizer = load_tokenizer(tokenizer) if tokenizer != "train" else None  # fails before photos are decoded
    if name in DRAWN:
        sizes = {"val": 500, "test": 500, "train": limit or DRAWN[name]}
        parts = load_drawn(sizes, image_size, name == "sketches")
    else:
        parts = load_folder(name, captions, image_size, limit)
    tokenizer = tokenizer or train_tokenizer(itertools.chain(*parts["train"][2]))
    splits = {split: make_split(*part, tokenizer, context, str(name)) for split, part in parts.items()}
    return splits, tokenizer


def load_folder(folder, captions_file, image_size, limit):
    """{split: (names, photos, sentences of each)} of the photos and captions below a folder."""
    if folder == "flickr30k" and not Path(folder).exists():
        download(folder)
    captions = read_captions(folder, captions_file)
    paths = find_photos(folder, captions)
    names = {"train": [], "val": [], "test": []}
    for name in paths:
        names[captions[name][0]].append(name)
    names["train"] = names["train"][: limit or None]
    if min(len(names["train"]), len(names["val"])) < 2:
        advice = "add photos, or mark two as val in the column split"
        raise InputError(f"--data {folder} has fewer than two photos to train on or to validate on: {advice}")
    parts = {}
    for split, own in names.items():
        if own:
            # Training photos have a margin for crops: 256 pixels for the 224 of ViT-B/16.
            size = image_size * 8 // 7 if split == "train" else image_size
            photos = photo_store({name: paths[name] for name in own}, size)
            parts[split] = own, photos, [captions[name][1] for name in own]
    return parts


def download(folder):
    """Download Flickr30k, 4.4 GB, from the Hugging Face hub. The folder appears when it is complete."""
    partial = Path(f"{folder}.partial")  # an interrupted download continues here
    try:
        for name in ("flickr_annotations_30k.csv", "flickr30k-images.zip"):
            path = hf_hub_download("nlphuji/flickr30k", name, repo_type="dataset", local_dir=partial)
        zipfile.ZipFile(path).extractall(partial)
    except Exception as error:  # the hub's client raises dozens of kinds
        reason = first_line(error)
        raise InputError(f"can't download {folder} ({reason}): give your copy, or --data shapes") from error
    os.remove(path)
    os.replace(partial, folder)


# --- Captions --------------------------------------------------------------------------------------------

PHOTO_COLUMNS = {"file_name", "image", "image_name", "filepath", "filename"}
CAPTION_COLUMNS = {"caption", "text", "title", "comment", "raw"}
SPLITS = dict(train="train", restval="train", val="val", validation="val", dev="val", test="test")
# A line of *.token is `photo#number<TAB>caption`, a line of Kaggle's results.csv `photo| number| caption`. In
# one of Kaggle's lines the second bar is missing.
TOKEN, KAGGLE = r"([^\t\n]+)#\d+\t(.*)", r"\s*([^|]+?)\s*\|\s*\d+\s*\|?(.*)"


def find_captions_file(folder):
    """Karpathy's dataset_*.json below a folder, or else its only table or *.token file. Flickr30k's
    *.lemma.token does not count, since it repeats the captions as lemmas."""
    found, others = [], []
    for path in files_below(folder):
        if path.match("dataset_*.json"):
            found.append(path)
        elif path.suffix in (".csv", ".tsv", ".txt", ".jsonl", ".token") and "lemma" not in path.name:
            with open(path, encoding="utf-8", errors="replace") as file:
                first = file.readline()
            words = set(re.findall(r"\w+", first))
            if (words & PHOTO_COLUMNS and words & CAPTION_COLUMNS) or re.match(TOKEN, first):
                others.append(path)
    found = found or others
    if len(found) != 1:
        problem = f"several captions files, {', '.join(map(str, found))}" if found else "no captions file"
        advice = "choose one with --captions FILE; a table is UTF-8 and has the columns file_name and caption"
        raise InputError(f"--data {folder} has {problem}: {advice}")
    return found[0]


def read_rows(path):
    """Yield (photo, split or None, captions) from a captions file, a published form or a table."""
    text = path.read_text("utf-8-sig")
    header = text.partition("\n")[0]
    if path.suffix == ".json":  # Karpathy's
        for image in json.loads(text)["images"]:
            yield image["filename"], image["split"], [sentence["raw"] for sentence in image["sentences"]]
    elif re.match(TOKEN, header) or header.startswith("image_name|"):
        for line in text.split("\n"):
            match = re.match(TOKEN, line) or re.match(KAGGLE, line)
            if match:
                yield match[1], None, [match[2]]
            elif line.strip() and line != header:  # Kaggle's file has a header
                raise ValueError(f"no photo and caption in {line[:50]!r}")
    else:
        if text.startswith("{"):
            table = (json.loads(line) for line in text.split("\n") if line.strip())
        else:
            delimiter = "\t" if "\t" in header else ","
            table = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
        for row in table:
            photos = [row[name] for name in PHOTO_COLUMNS & set(row)]
            captions = [row[name] for name in CAPTION_COLUMNS & set(row)]
            if len(photos) != 1 or len(captions) != 1:
                raise ValueError(f"not one photo and one caption column among {', '.join(map(str, row))}")
            if None in photos + captions or None in row:  # a missing cell, or cells beyond the header
                raise ValueError(f"too few or too many cells beside {photos[0]}: put captions in quotes")
            # The hub's file has the five captions of a photo as a JSON list in one cell.
            if "raw" in row and captions[0].startswith("["):
                captions = json.loads(captions[0])
            yield photos[0], row.get("split"), captions


def read_captions(folder, path=None):
    """{photo: (split, captions)} of a captions file, by default the one that find_captions_file finds."""
    if path and not Path(path).exists():
        raise InputError(f"--captions {path} is not there: give a path from the current folder")
    path = Path(path) if path else find_captions_file(folder)
    photos = {}
    try:
        for name, split, sentences in read_rows(path):
            "".join([name, *sentences]).encode()  # fails if one is not text, or not valid Unicode
            if any("\n" in sentence.strip() for sentence in sentences):  # perhaps a quote that was not closed
                print(f"warning: a caption of {name} has several lines in {path}", file=sys.stderr)
            if split and split not in SPLITS:
                raise ValueError(f"the split of {name} is {split!r}, not train, val or test")
            known = photos.setdefault(PurePosixPath(name).as_posix(), (SPLITS.get(split), []))
            if known[0] != SPLITS.get(split):
                raise ValueError(f"{name} has two splits, {known[0]} and {split}")
            known[1].extend(" ".join(sentence.split()) for sentence in sentences if sentence.strip())
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} is not UTF-8 in line {line}: save it as UTF-8") from error
    except Exception as error:  # a malformed file can raise almost anything
        is_clear = isinstance(error, (ValueError, OSError, csv.Error))
        reason = first_line(error) if is_clear else "it is malformed"
        raise InputError(f"{path} is not a captions file as the README describes: {reason}") from error
    captioned = {name: part for name, part in photos.items() if part[1]}
    if not captioned:
        raise InputError(f"{path} has no captions")
    if len(captioned) < len(photos):
        print(f"warning: {len(photos) - len(captioned)} photos have only empty captions", file=sys.stderr)
    print(f"captions  {path}")
    return with_splits(captioned)


def with_splits(photos):
    """Give each photo that has no split one: the order of the hashes of all names decides."""
    missing = [name for name, (split, _) in photos.items() if not split]
    if missing:
        print("splits    by a hash of the photos' names: recall does not compare with published figures")
    missing.sort(key=lambda name: zlib.crc32(PurePosixPath(name).name.encode()))
    count = len(missing)
    val, test = (max(2, count // 10), 0) if count < 1000 else (count // 20, count // 20)
    # zip stops after the last name.
    splits = dict(zip(missing, ["val"] * val + ["test"] * test + ["train"] * count))
    return {name: (split or splits[name], captions) for name, (split, captions) in photos.items()}


# --- Photos ----------------------------------------------------------------------------------------------

ENDINGS = ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"


def files_below(folder):
    """Files at any depth of a folder, in order, without hidden ones and macOS's __MACOSX."""

    def fail(error):  # os.walk would leave out a folder that it can't read
        raise InputError(f"can't read the folder {error.filename} ({error.strerror})") from error

    seen = set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        if os.path.realpath(parent) in seen:  # reached before, by a symbolic link
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        yield from (Path(parent, name) for name in sorted(names) if name[0] != ".")


def find_photos(folder, names):
    """{name: path} of the photos, by their path relative to the folder, else by their file name."""
    files = {}
    for path in files_below(folder):
        files.setdefault(path.name, []).append(path)
    found, name_of = {}, {}
    for name in names:
        paths = files.get(PurePosixPath(name).name, [])
        paths = [path for path in paths if path == Path(folder, name)] or paths  # prefer the exact path
        if len(paths) > 1:
            raise InputError(f"the photo {name} may be {paths[0]} or {paths[1]}: use relative paths as names")
        if paths:
            found[name] = paths[0]
            other = name_of.setdefault(paths[0], name)
            if other != name:
                raise InputError(f"{other} and {name} mean the same photo, {paths[0]}: mend the table")
    missing = [name for name in names if name not in found]
    if missing:
        text = f"{len(missing)} of {len(names)} photos are missing below {folder}, for example {missing[0]}"
        if len(missing) > 0.01 * len(names):
            raise InputError(f"{text}: add them, or remove their captions")
        print(f"warning: {text}", file=sys.stderr)
    return found


def load_photo(path, size):
    """A file to (size, size, 3) uint8, as transformers' CLIPImageProcessor resizes and crops it."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError("it has more than 8 bits a channel")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:  # show it on white, as a page does
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = image.convert("RGB")
    except Exception as error:  # PIL raises almost anything on a damaged file
        reason = first_line(error)
        raise InputError(f"{path} can't be read ({reason}): repair it or move it away") from error
    width, height = (int(size * side / min(image.size)) for side in image.size)  # the shorter side is `size`
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@contextmanager
def atomic(path):
    """Yield a temporary path, which becomes `path` at the end: the file or folder is whole or not there."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir() and Path(path).is_dir():
            shutil.rmtree(path)  # os.replace can't replace a folder
        os.replace(temporary, path)
    except Exception as error:
        # If the disk is full, torch.save raises RuntimeError, and tokenizers a plain Exception.
        if not (isinstance(error, (OSError, RuntimeError)) or type(error) is Exception):
            raise
        raise InputError(f"can't write {path} ({first_line(error)}): check the path and the space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a folder
        if temporary.exists():
            temporary.unlink()


def photo_store(photos, size):
    """Photos {name: path} as uint8 (N, size, size, 3). They are decoded once, into a file in cache/ whose
    name is a hash of the names, sizes and dates of the photos."""
    key = hashlib.sha256(str(size).encode())
    for name, path in photos.items():
        key.update(repr((name, path.stat().st_size, path.stat().st_mtime_ns)).encode())
    store, shape = Path("cache", f"{key.hexdigest()[:16]}.uint8"), (len(photos), size, size, 3)
    if not store.exists() or store.stat().st_size != math.prod(shape):  # a copied cache may be cut short
        with atomic(store) as temporary, open(temporary, "wb") as file, ThreadPoolExecutor() as pool:
            decoded = pool.map(load_photo, photos.values(), itertools.repeat(size))  # PIL releases the GIL
            for photo in tqdm(decoded, "decoding", len(photos), mininterval=1):
                file.write(photo.tobytes())
    # "c" is copy-on-write: PyTorch wants a writable array, and the file never changes.
    return np.memmap(store, np.uint8, "c", shape=shape)


# --- Two drawn worlds --------------------------------------------------------------------------------

DRAWN = {"shapes": 10_000, "sketches": 3_000}  # training scenes
SIZES = {"small": 0.13, "large": 0.22}  # radius as a fraction of the picture's side
COLOURS = {"red": (225, 35, 35), "green": (30, 160, 60), "blue": (40, 80, 230)}
COLOURS |= {"yellow": (245, 210, 30), "purple": (150, 50, 180), "cyan": (60, 210, 225)}
SHAPES = "circle", "square", "triangle", "cross", "ring"
PLACES = {"top left": (0.27, 0.27), "top right": (0.73, 0.27)}
PLACES |= {"bottom left": (0.27, 0.73), "bottom right": (0.73, 0.73)}
WHERE = {(-1, 0): "left of", (1, 0): "right of", (0, -1): "above", (0, 1): "below"}
GROUNDS = {"white": (250, 250, 250), "grey": (128, 128, 128), "black": (10, 10, 10)}
# {a} is a whole thing, "small red ring"; {A[0]}, {A[1]} and {A[2]} are its size, its colour and its shape.
TEMPLATES = (
    "a {a} at the {place_a} and a {b} at the {place_b} on a {ground} background",
    "{ground} background with {a} {place_a} , {b} {place_b}",
    "in the {place_a} corner a {a} , in the {place_b} corner a {b} , on {ground}",
    "on {ground} , a {a} at the {place_a} , {where} a {b}",
    "the {place_a} {A[2]} is {A[0]} and {A[1]} , {where} a {B[2]} that is {B[0]} and {B[1]} , on {ground}",
)
# `sketches` has the same scenes as outlines, on other backgrounds and in other words.
SKETCH_GROUNDS = {"white": (255, 225, 190), "grey": (150, 190, 160), "black": (50, 30, 70)}
SKETCH_WORDS = {"white": "peach", "grey": "sage", "black": "plum", "background": "paper", "circle": "disc"}
SKETCH_WORDS |= {"square": "box", "triangle": "wedge", "cross": "plus", "ring": "hoop"}


def all_scenes(seed):
    """All 64,800 scenes (thing and place, thing and place, background). A thing is (size, colour, shape)."""
    things = list(itertools.product(SIZES, COLOURS, SHAPES))
    combinations = itertools.product(things, things, itertools.combinations(PLACES, 2), GROUNDS)
    scenes = [((a, places[0]), (b, places[1]), ground) for a, b, places, ground in combinations]
    random.Random(seed).shuffle(scenes)
    return scenes


def draw_shape(image, shape, x, y, radius, fill):
    """Draw a shape around (x, y) into a PIL image."""
    pen = ImageDraw.Draw(image)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=round(radius * 0.4))
    elif shape == "square":
        pen.rectangle(box, fill)
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill)
    elif shape == "cross":
        pen.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill)
        pen.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill)


def draw(scene, side, rng, sketch=False):
    """A scene as (side, side, 3) uint8. `rng` changes the sizes and places of its things a little."""
    *things, ground = scene
    large = 4 * side  # drawn at four times the size and then reduced, so that edges are smooth
    background = (SKETCH_GROUNDS if sketch else GROUNDS)[ground]
    image = Image.new("RGB", (large, large), background)
    for (size, colour, shape), place in things:
        radius = large * SIZES[size] * rng.uniform(0.95, 1.05)
        x, y = (large * (centre + rng.uniform(-0.02, 0.02)) for centre in PLACES[place])
        draw_shape(image, shape, x, y, radius, COLOURS[colour])
        if sketch and shape != "ring":  # outlines: the background fills the inside. A ring is one already.
            draw_shape(image, shape, x, y, 0.8 * radius, background)
    return np.asarray(image.reduce(4))


def captions_of(scene, rng, sketch=False):
    """Five captions of a scene, each with everything in it. `rng` chooses which thing comes first."""
    *things, ground = scene
    captions = []
    for template in TEMPLATES:
        rng.shuffle(things)
        (a, place_a), (b, place_b) = things
        (x_a, y_a), (x_b, y_b) = PLACES[place_a], PLACES[place_b]
        where = WHERE.get((np.sign(x_a - x_b), np.sign(y_a - y_b)), "across from")
        values = dict(a=" ".join(a), b=" ".join(b), A=a, B=b, place_a=place_a, place_b=place_b)
        words = template.format(**values, where=where, ground=ground).split()
        captions.append(" ".join(SKETCH_WORDS.get(word, word) if sketch else word for word in words))
    return captions


def load_drawn(sizes, side, sketch=False, seed=0):
    """{split: (names, photos, sentences of each)} for sizes {split: scenes}. Splits share none."""
    splits, scenes = {}, enumerate(all_scenes(seed))
    for split, count in sizes.items():
        names, photos, sentences = [], [], []
        for i, scene in itertools.islice(scenes, count):
            rng = random.Random(f"{seed}/{i}")
            names.append(f"{i:05d}")
            photos.append(draw(scene, side, rng, sketch))
            sentences.append(captions_of(scene, rng, sketch))
        splits[split] = names, np.stack(photos), sentences
    return splits


# --- Tokenizer ---------------------------------------------------------------------------------------


def train_tokenizer(captions, vocab_size=8192):
    """A CLIP tokenizer. As in OpenAI's, its tokens are, in this order: the 256 bytes, the 256 bytes with the
    mark </w> for the end of a word, the merges of BPE in these captions, the start and the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = alphabet + [byte + "</w>" for byte in alphabet]
    # Special tokens get the first ids. So every byte is a token, and training is deterministic.
    options = dict(special_tokens=letters, end_of_word_suffix="</w>", show_progress=False)
    blank = CLIPTokenizer().backend_tokenizer
    blank.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=vocab_size - 2, **options))
    merges = [tuple(merge) for merge in json.loads(blank.to_str())["model"]["merges"]]
    tokens = letters + ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    unique = dict.fromkeys(tokens)  # two merges may give the same token
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(unique)}, merges=merges)


def load_tokenizer(name):
    """A CLIPTokenizer from the hub or a folder."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name)
        if len(tokenizer) <= 3:  # transformers makes an empty one if the folder lacks its files
            raise ValueError("it is empty")
        return tokenizer
    except Exception as error:  # the hub's client raises dozens of kinds
        advice = "--tokenizer names a folder or, if online, a hub name; clip.py also takes `train`"
        raise InputError(f"no tokenizer in {name}: {advice}") from error


def tokenize(tokenizer, captions, context=77):
    """Captions to int32 ids (len(captions), context), padded with the end token. Longer captions are cut, but
    keep their end token, at which the model reads a caption (openai/CLIP #212)."""
    "".join(captions).encode()  # UnicodeError if one comes from bytes that are not UTF-8
    ids = torch.full((len(captions), context), tokenizer.eos_token_id, dtype=torch.int32)
    for i, row in enumerate(tokenizer(captions, truncation=True, max_length=context)["input_ids"]):
        ids[i, : len(row)] = torch.tensor(row)
    return ids


# --- Pictures --------------------------------------------------------------------------------------------


def save_figure(figure, path):
    """Write a matplotlib figure as a PNG file."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_pictures(folder, history, split, before, after, model):
    """Draw curve.png, retrieval.png and inside.png of a run."""
    draw_curve(folder / "curve.png", history, len(split.photos))
    draw_retrieval(folder / "retrieval.png", split, *after)
    draw_inside(folder / "inside.png", split, before, after, model)


def draw_curve(path, history, photos):
    """The losses and recalls of each epoch, with dotted lines for the losses of a model that guesses."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs, last = [row["epoch"] for row in history], history[-1]
    left.plot(epochs, [row["train_loss"] for row in history], "o-", ms=3, color="C0", label="training")
    left.plot(epochs, [row["loss"] for row in history], "o-", ms=3, color="C1", label="validation")
    left.axhline(last["train_chance"], color="C0", ls=":", label="training, chance")
    chance = math.log(min(64, photos))  # clip.evaluate compares groups of 64 photos
    left.axhline(chance, color="C1", ls=":", label="validation, chance")
    left.set(xlabel="epoch", ylabel="contrastive loss", ylim=(0, None))
    for name, label, style in (("t2i_r", "text to image", "o-"), ("i2t_r", "image to text", "x--")):
        for k, color in ((10, "C2"), (5, "C1"), (1, "C0")):
            recall = [row[f"{name}{k}"] for row in history]
            right.plot(epochs, recall, style, ms=3, color=color, label=f"R@{k} {label}")
    right.set(xlabel="epoch", ylabel=f"recall over {photos:,} photos, %", ylim=(0, None))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    save_figure(figure, path)


def draw_retrieval(path, split, images, texts, count=6):
    """Six captions, each above the six photos that it finds first. The right photo has a green frame."""
    captions = torch.linspace(0, len(texts) - 1, count).long()
    found = (texts[captions] @ images.T).topk(min(count, len(images))).indices.cpu()
    figure = Figure(figsize=(9.6, 11.4), layout="constrained")
    for axes, caption, photos in zip(figure.subplots(count, 1), captions.tolist(), found):
        pictures = split.take(photos, "cpu")  # (6, S, S, 3)
        edge = pictures.shape[1] // 16
        framed = F.pad(pictures, (0, 0, edge, edge, edge, edge), value=225)
        framed[photos == split.image_index[caption]] = torch.tensor([50, 205, 50], dtype=torch.uint8)
        framed[:, edge:-edge, edge:-edge] = pictures
        axes.imshow(torch.cat(list(framed), dim=1).numpy())
        title = textwrap.shorten(split.captions[caption], 110)
        axes.set_title(title, loc="left", fontsize=9, parse_math=False)
        axes.axis("off")
    save_figure(figure, path)


@torch.no_grad()
def class_attention(model, pixels):
    """The attention of the class token to each patch, (B, S / P, S / P): the mean of all layers and heads."""
    vision, weights = model.vision_model, []
    x = vision.pre_layrnorm(vision.embeddings(pixels))  # (B, T, C)
    for layer in vision.encoder.layers:
        attention, normed = layer.self_attn, layer.layer_norm1(x)
        q = attention.q_proj(normed[:, 0]).unflatten(-1, (attention.num_heads, -1))  # (B, H, D)
        k = attention.k_proj(normed).unflatten(-1, (attention.num_heads, -1))  # (B, T, H, D)
        softmax = (torch.einsum("bhd,bthd->bht", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
        weights.append(softmax[:, :, 1:].mean(dim=1))  # (B, T - 1)
        x = layer(x)
    return torch.stack(weights).mean(dim=0).unflatten(1, (math.isqrt(x.shape[1] - 1), -1))


def draw_inside(path, split, before, after, model, count=16):
    """Top: the cosines of 16 captions and their photos, from the embeddings (images, texts) before and after
    training. Below: six photos, the caption that each finds first (green: right), and the attention of the
    class token."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    captions = torch.linspace(0, len(split.captions) - 1, count).long()
    photos = split.image_index[captions]
    cosines = [(images[photos] @ texts[captions].T).cpu() for images, texts in (before, after)]
    limit = cosines[1].abs().max()  # one colour scale for both
    for axes, matrix, title in zip(top.subplots(1, 2), cosines, ("before", "after")):
        picture = axes.imshow(matrix, vmin=-limit, vmax=limit, cmap="RdBu_r")
        axes.set(xlabel="captions", ylabel="photos", title=f"cosines {title} training")
    top.colorbar(picture, shrink=0.8)

    images, texts = after
    rows = torch.linspace(0, len(images) - 1, 6).long()
    found = (images[rows] @ texts.T).argmax(dim=1).cpu()
    attention = class_attention(model, normalize(split.take(rows, images.device))).cpu()
    above, below = bottom.subplots(2, 6)
    for i, photo in enumerate(split.take(rows, "cpu")):
        color = "green" if split.image_index[found[i]] == rows[i] else "red"
        title = textwrap.fill(split.captions[found[i]], 26, max_lines=4)
        above[i].set_title(title, fontsize=8, color=color, parse_math=False)
        above[i].imshow(photo)
        below[i].imshow(photo.float().mean(dim=-1), "gray", extent=(0, 1, 0, 1))
        below[i].imshow(attention[i], "inferno", alpha=0.6, extent=(0, 1, 0, 1))  # over the grey photo
        above[i].axis("off")
        below[i].axis("off")
    save_figure(figure, path)


# --- The command line ------------------------------------------------------------------------------------


def setting(default, low, high, help):
    """A field of a recipe that is a flag too, with its default, range and help."""
    return field(default=default, metadata={"low": low, "high": high, "help": help})


def check_settings(recipe):
    """InputError for a setting out of its range."""
    for f in fields(recipe):
        if f.metadata:
            value, low, high = getattr(recipe, f.name), f.metadata["low"], f.metadata["high"]
            if not low <= value <= high:
                flag = f.name.replace("_", "-")
                raise InputError(f"--{flag} {value} is not between {low} and {high:g}")


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults, takes no abbreviated flags, and reports errors as InputError."""

    def __init__(self, **options):
        form = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=form, allow_abbrev=False, **options)

    def add_recipe(self, recipe):
        """A flag for each setting of a recipe, and the flags of a run."""
        for f in fields(recipe):
            if f.metadata:
                flag, value = f"--{f.name.replace('_', '-')}", getattr(recipe, f.name)
                self.add_argument(flag, type=type(value), default=value, help=f.metadata["help"])
        add = self.add_argument_group("run").add_argument
        help = f"folder of photos and captions, or {' or '.join(DRAWN)}"
        add("--data", default="flickr30k", metavar="DIR", help=help)
        add("--captions", metavar="FILE", help="captions file, if DIR has several")
        add("--photos", type=int, default=0, help="train on the first photos only; 0 is all")
        add("--out", type=Path, metavar="DIR", help="folder of the run; by default in runs/")
        add("--resume", action="store_true", help="continue the run in --out")
        kind = torch.accelerator.current_accelerator(check_available=True)  # CUDA's, Apple's, ...
        device = f"{kind.type}:{os.environ.get('LOCAL_RANK', 0)}" if kind else "cpu"
        add("--device", default=device, help="cuda:N, mps or cpu")
        add("--compile", action=argparse.BooleanOptionalAction, default=True, help="CUDA only")

    def first_look(self, argv):
        """The flags, for defaults that depend on them. The second parse, which has these, shows --help."""
        argv = sys.argv[1:] if argv is None else argv
        # "" and "--out=" are empty. Bytes that are not UTF-8 have become surrogates.
        if any(re.fullmatch(r"(--[\w-]+=)?\s*|.*[\ud800-\udfff].*", word) for word in argv):
            self.error("an argument is empty, perhaps from a shell variable without a value, or not UTF-8")
        return self.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def run_command(argv, parse_args, run):
    """Run a command and return its exit code. Bad input is one line on stderr and 2; Ctrl-C is 130."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # `python -W default` shows warnings again
    try:
        run(parse_args(argv))
        return 0
    except (InputError, OSError, UnicodeError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {first_line(error)}: add --resume --micro-batch 32, or less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: --resume continues a run from its last checkpoint", file=sys.stderr)
        return 130
