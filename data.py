"""Photos and captions to batches: Flickr30k in every form people have it, and two drawn worlds. Behind them
stands what is no part of CLIP: pictures and reports of a run, and what a command needs.

`load` returns the splits train, val and perhaps test: all photos as one uint8 array, all captions as one of
ids. A batch is two look-ups and an `augment`; there are no workers.

Shapes: N photos, M captions of a split; B photos in a batch, V crops of each, S x S pixels, T tokens,
G x G patches.
"""

import argparse
import ast
import atexit
import copy
import csv
import filecmp
import functools
import gc
import glob
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import time
import unicodedata
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageOps


class InputError(ValueError):
    """What the user gave can't be used. The message is one line: what is wrong, and what to do."""


def warn(text):
    """Prints a warning once, whatever the number of processes."""
    if is_main_process():
        print(f"warning: {text}", file=sys.stderr)


def shown(path):
    """A path as text that can be printed and drawn: bytes of a name that are no UTF-8 are question marks."""
    return os.fsencode(path).decode(errors="replace")


def in_words(error):
    """What an exception says, as one line of a message: the system's own words where it has some."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:150]


# --- Splits and batches ------------------------------------------------------------------------------


@dataclass
class Split:
    """Photos with their captions, which stand in the order of their photos: photo 0's, then photo 1's..."""

    photos: torch.Tensor  # (N, S, S, 3) uint8
    names: list  # N, of the photos
    captions: list  # M
    owner: torch.Tensor  # (M,): row of the photo that each caption describes
    ids: torch.Tensor  # (M, context) int32: the captions as tokens, padded
    lengths: torch.Tensor  # (M,): tokens of each caption, with both markers
    source: str = ""  # what `load` was given: a drawn world or a folder

    def first_captions(self):
        """(first, count), both (N,): the row of each photo's first caption, and how many it has."""
        count = self.owner.bincount(minlength=len(self.photos))
        first = count.cumsum(0) - count  # the captions of the photos before it
        return first, count

    def pairs(self, seed, epoch, captions=1):
        """(N, 1 + captions): a photo's row, then rows of captions of its own (again if too few), ordered by
        (seed, epoch). Each photo once: none meets itself in a batch as a negative (vsepp #6)."""
        rng = np.random.default_rng([seed, epoch])
        photo = torch.from_numpy(rng.permutation(len(self.photos)))  # (N,)
        first, count = self.first_captions()
        first, count = first[photo], count[photo]

        # One of the photo's captions at random, and those after it; after the last comes the first.
        start = torch.from_numpy(rng.integers(count.numpy()))  # (N,)
        turn = (start[:, None] + torch.arange(captions)) % count[:, None]  # (N, captions)
        return torch.cat([photo[:, None], first[:, None] + turn], dim=1)

    def place(self, device):
        """Moves the photos to a GPU where they fill at most half of what is free; else batches are read."""
        if device.type == "cuda" and self.photos.numel() < torch.cuda.mem_get_info(device)[0] / 2:
            self.photos = self.photos.to(device)

    def take(self, rows, device):
        """Photos `rows` on the device, uint8 (len(rows), S, S, 3), without waiting for a GPU to be done."""
        return self.photos[rows.to(self.photos.device, non_blocking=True)].to(device)

    def tokens(self, rows, device, cut=False):
        """Ids of captions `rows`, (len(rows), T) int32; T is a multiple of 8 or all. cut: to the T that all
        but one caption in a thousand have room in, the same for each batch, as each T is compiled."""
        longest = self.usual_length if cut else int(self.lengths[rows].max())
        ids = self.ids[rows, : math.ceil(longest / 8) * 8]
        ids[:, -1] = self.ids[rows, -1]  # what is cut keeps its end token, which is also the padding
        return ids.to(device, non_blocking=True)

    @functools.cached_property
    def usual_length(self):
        return int(self.lengths.float().quantile(0.999, interpolation="lower"))


def make_split(names, photos, sentences, tokenizer, context, source=""):
    """A Split of photos, an array (N, S, S, 3) uint8, with for each of them the list of its sentences."""
    captions, owner = [], []
    for row, own in enumerate(sentences):
        captions.extend(own)
        owner.extend([row] * len(own))

    ids = tokenize(tokenizer, captions, context)
    lengths = (ids == tokenizer.eos_token_id).int().argmax(dim=1) + 1  # argmax is the first of equals
    return Split(torch.from_numpy(photos), names, captions, torch.tensor(owner), ids, lengths, source)


def fingerprint(splits):
    """A number of the photos' names and the captions' tokens: the same wherever these lie. Not of pixels,
    which other versions of PIL decode a little differently."""
    number = 0
    for split in splits.values():
        names = [name.rpartition("/")[2] for name in split.names]
        number = zlib.crc32(repr(names).encode(), number)
        number = zlib.crc32(split.ids.numpy(), number)
    return number


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's photos


def standardize(pixels):
    """Pixels (B, 3, S, S) from 0 to 1 to each channel about N(0, 1)."""
    mean, std = torch.tensor([MEAN, STD]).to(pixels.device, non_blocking=True)[:, :, None, None]
    return (pixels - mean) / std


def normalize(photos):
    """uint8 (B, S, S, 3) to the (B, 3, S, S) float that the model takes."""
    return standardize((photos / 255).permute(0, 3, 1, 2)).contiguous()


def recolour(pixels, strength, grey=0.2):
    """Pixels (B, 3, S, S) from 0 to 1 in another light: brightness, contrast and saturation of each photo
    times 1 - strength to 1 + strength, one in five grey (SimCLR, Chen et al. 2020, arXiv:2002.05709)."""
    B, device = len(pixels), pixels.device
    amounts = torch.empty(3, B, 1, 1, device=device).uniform_(1 - strength, 1 + strength)
    brightness, contrast, saturation = amounts  # (B, 1, 1) each
    saturation = saturation * (torch.rand(B, 1, 1, device=device) >= grey)
    # How bright a pixel is for an eye: this times its red, green and blue (ITU-R BT.601).
    luma = torch.tensor([0.299, 0.587, 0.114]).to(device, non_blocking=True)

    # Each of the three mixes a pixel with a grey: black, the photo's mean, the pixel's own. All three are one
    # matrix (B, 3, 3) and one number to add.
    matrix = saturation * torch.eye(3, device=device) + (1 - saturation) * luma
    middle = brightness * (pixels.mean(dim=(2, 3)) @ luma)[:, None, None]  # (B, 1, 1)
    changed = torch.baddbmm((1 - contrast) * middle, brightness * contrast * matrix, pixels.flatten(2))
    return changed.clamp_(0, 1).view_as(pixels)


def augment(photos, size, recipe, ratio=(3 / 4, 4 / 3)):
    """uint8 (B, S, S, 3) to normalised (B V, 3, size, size): recipe.views random crops of each photo, of
    recipe.crop of its area or more, with sides in `ratio` (less where it would stick out), mirrored or not,
    in another light (recolour, by recipe.colour); on the photos' device, for all at once."""
    B, V, device = len(photos), recipe.views, photos.device

    # Sides of each crop as shares of the photo's: width * height = area, width / height = aspect. The
    # logarithm of the aspect is uniform, so that 3:4 is as likely as 4:3.
    area = torch.empty(B * V, device=device).uniform_(recipe.crop, 1)
    aspect = torch.empty(B * V, device=device).uniform_(*np.log(ratio)).exp()
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    mirror = torch.randint(2, (B * V,), device=device) * 2 - 1  # 1 or -1, which is read from right to left

    # The photo reaches from -1 to 1, as grid_sample wants it. A crop of half the width may then have its
    # centre up to 1/2 from the middle, and one of the whole width stays there.
    centre_x = (1 - width) * torch.empty_like(width).uniform_(-1, 1)
    centre_y = (1 - height) * torch.empty_like(height).uniform_(-1, 1)

    # Where output pixel (x, y) comes from. `pixels` are the middles of `size` pixels between -1 and 1.
    pixels = (torch.arange(size, device=device) * 2 + 1) / size - 1
    x = centre_x[:, None] + pixels * (width * mirror)[:, None]  # (B V, size)
    y = centre_y[:, None] + pixels * height[:, None]  # (B V, size)
    x, y = torch.broadcast_tensors(x[:, None, :], y[:, :, None])
    grid = torch.stack([x, y], dim=-1)  # (B V, size, size, 2)

    # The crops of a photo one below the other, so that each photo is read once.
    photos = (photos / 255).permute(0, 3, 1, 2).contiguous()  # (B, 3, S, S)
    grid = grid.view(B, V * size, size, 2)
    crops = F.grid_sample(photos, grid, padding_mode="border", align_corners=False)
    crops = crops.unflatten(2, (V, size)).transpose(1, 2).flatten(0, 1)  # (B V, 3, size, size)
    if recipe.colour:
        crops = recolour(crops, recipe.colour)
    return standardize(crops)


def vary_captions(ids, config, recipe):
    """Other sentences of the words in ids (n, T), `<start> words <end> padding` each, by the recipe's shares:
    halves change places, words are left out, alone or in a row, or replaced (after Wei & Zou 2019,
    arXiv:1901.11196)."""
    (n, T), end, device = ids.shape, config.eos_token_id, ids.device
    place = torch.arange(T - 1, device=device)  # of a word
    words = ids[:, 1:]  # (n, T - 1)
    count = (words == end).int().argmax(dim=1, keepdim=True)  # (n, 1), of the words before the end

    def some(share, *size):
        """True for a share of the captions, or of their words."""
        return torch.rand(n, *size, device=device) < share

    if recipe.swap_halves:
        cut = (torch.rand(n, 1, device=device) * count).long() * some(recipe.swap_halves, 1)
        turned = words.gather(1, (place + cut) % count.clamp(min=1))
        words = torch.where(place < count, turned, words)
    if recipe.delete_words or recipe.delete_spans:
        length = count * torch.empty(n, 1, device=device).uniform_(0.2, 0.5)
        first = (count - length) * torch.rand(n, 1, device=device)
        lost = (place >= first) & (place < first + length) & some(recipe.delete_spans, 1)
        lost |= some(recipe.delete_words, T - 1)
        kept = (place < count) & ~lost
        kept |= (place < count) & ~kept.any(dim=1, keepdim=True)  # who would lose all words keeps them
        words = words.gather(1, (~kept).int().argsort(dim=1, stable=True))  # those that are kept move up
        count = kept.sum(dim=1, keepdim=True)
        words = torch.where(place < count, words, end)
    if recipe.replace_words:
        other = torch.randint_like(words, config.vocab_size - 1)
        other += other >= end  # any token but the end
        words = torch.where(some(recipe.replace_words, T - 1) & (place < count), other, words)
    return torch.cat([ids[:, :1], words], dim=1)


# --- Loading a folder --------------------------------------------------------------------------------


def download(folder):
    """Fetches Flickr30k into `folder`, which appears whole; till then it is `<folder>.partial`, where a
    download that broke off goes on."""
    from huggingface_hub import hf_hub_download

    print(
        "Flickr30k: 4.4 GB from the Hugging Face hub (nlphuji/flickr30k). The photos belong to their\n"
        "authors on Flickr; use is for non-commercial research and education only.",
        flush=True,
    )
    partial = Path(f"{folder}.partial")
    try:
        for name in ("flickr_annotations_30k.csv", "flickr30k-images.zip"):
            path = Path(hf_hub_download("nlphuji/flickr30k", name, repo_type="dataset", local_dir=partial))
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > 20 * 2**30:
                raise ValueError(f"{path} would unpack to more than 20 GiB: it is not the published file")
            archive.extractall(partial)  # drops `..` and absolute paths, makes no links
    except Exception as error:  # the hub's client has dozens of kinds
        if isinstance(error, zipfile.BadZipFile) or not any(partial.rglob("*.incomplete")):
            shutil.rmtree(partial, ignore_errors=True)  # nothing that the next start could go on with
        raise InputError(
            f"Flickr30k is not in ./{folder} and can't be fetched ({in_words(error)}): give your copy with "
            "--data DIR, or try --data shapes"
        ) from error
    path.unlink()
    os.replace(partial, folder)


def load_folder(captions, paths, image_size, cache, limit=0):
    """Splits of what read_captions and find_photos gave: {split: (names, photos, sentences of each)}."""
    parts = {"train": {}, "val": {}, "test": {}}
    for name, path in paths.items():
        parts[captions[name][0]][name] = path
    if limit:
        parts["train"] = dict(itertools.islice(parts["train"].items(), limit))
    for split in ("train", "val"):
        if not parts[split]:
            raise InputError(f"there are no {split} photos: too few, or the captions file's splits lack it")

    splits = {}
    for split, chosen in parts.items():
        if chosen:
            # Training photos have a margin for crops: 256 pixels for the 224 of ViT-B/16.
            size = image_size * 8 // 7 if split == "train" else image_size
            names, photos = photo_store(chosen, size, cache)
            splits[split] = names, photos, [captions[name][1] for name in names]
    return splits


def load(name, tokenizer, image_size, context=77, cache="cache", limit=0):
    """({"train", "val" and perhaps "test": Split}, tokenizer) of the data `name`, a drawn world or a folder,
    for a model of this image_size and context (tokens). tokenizer: hub name, folder or "train". limit: of
    the training photos only the first; 0 is all."""
    if name == "flickr30k" and not Path(name).exists():
        download(name)

    # What needs no time comes first: a wrong folder or tokenizer is said before photos are decoded.
    if name not in DRAWN:
        _, captions = read_captions(name)
        paths = find_photos(name, captions)
    if tokenizer != "train":
        tokenizer = load_tokenizer(tokenizer)

    if name in DRAWN:
        sizes = {"val": 500, "test": 500, "train": limit or DRAWN[name]}
        parts = load_drawn(sizes, image_size, name == "sketches")
    else:
        parts = load_folder(captions, paths, image_size, cache, limit)

    if tokenizer == "train":
        _, _, sentences = parts["train"]
        tokenizer = train_tokenizer(itertools.chain(*sentences))

    splits = {}
    for split, (names, photos, sentences) in parts.items():
        splits[split] = make_split(names, photos, sentences, tokenizer, context, str(name))
    return splits, tokenizer


# --- Files -------------------------------------------------------------------------------------------


def is_leftover(path):
    """Whether a file or folder is what systems and editors leave behind, and so neither data nor a photo."""
    name = Path(path).name.lower()
    return name.startswith(".") or name in ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir")


def files_below(folder, entered=()):
    """The files in a folder and in all below it, in order, without leftovers, pipes and circles of links."""
    entered = {*entered, Path(folder).resolve()}
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and not is_leftover(path):
            yield path
        elif path.is_dir() and not is_leftover(path) and path.resolve() not in entered:
            yield from files_below(path, entered)


def decode_text(content):
    """Bytes to (text, encoding): UTF-8, UTF-16 with its mark, or Windows' cp1252. ValueError with line and
    byte for anything else, also UTF-8 with a damaged byte, which cp1252 would turn into other letters."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16"), "UTF-16"
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        return content.decode(), "UTF-8"
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
    text = content.decode("cp1252", errors="replace")
    letters = len(re.findall(r"[^\x00-\x7f]", text))  # few in what Western languages write
    if "\ufffd" in text or letters > 0.1 * len(text) or not content.decode(errors="ignore").isascii():
        raise ValueError(f"byte 0x{byte:02x} in line {line} is neither UTF-8 nor Windows' cp1252")
    return text, "cp1252"


# --- Captions ----------------------------------------------------------------------------------------

TABLES = ".csv", ".tsv", ".txt", ".jsonl", ".token"
PHOTO = "image", "photo", "name", "file_name", "filename", "filepath", "file_path", "path"
PHOTO += "image_name", "image_path"
CAPTION = "caption", "captions", "text", "title", "sentence", "comment", "raw"
SPLITS = {"train": "train", "training": "train", "restval": "train", "test": "test"}
SPLITS |= dict.fromkeys(["val", "valid", "validation", "dev"], "val")
NO_CAPTION = "", "nan", "none", "null", "#n/a", "#name?"  # what pandas and Excel write into an empty cell
DATASETS_OWN = "dataset_info", "dataset_infos", "dataset_dict"  # JSON of Hugging Face's datasets
# How files begin that may have no header: Kaggle's results.csv, and the original *.token.
KAGGLE, TOKEN = r"[^|]+\|\s*\d+\s*\|", r"[^\t]+#\d+\t"


def column(header, known):
    """The column that has one of the known names, or None. ValueError where two have."""
    found = [name for name in header if name in known]
    if len(found) > 1:
        raise ValueError(f"its column {found[0]} may be meant, or {found[1]}: rename the other")
    return found[0] if found else None


def split_header(text):
    """(delimiter, columns) of a table by its first line. ValueError if it has no photos and captions."""
    first = text.split("\n", 1)[0].strip()
    if re.match(KAGGLE, first):
        return "|", ["image_name", "comment_number", "comment"]
    if re.match(TOKEN, first):
        return "\t", ["image", "caption"]
    if first.startswith("{"):
        headers = {"{": [name.lower() for name in json.loads(first)]}
    else:
        headers = {}
        for delimiter in ",\t;|":
            names = first.split(delimiter)
            headers[delimiter] = [name.strip(' "').lower().replace(" ", "_") for name in names]
    for delimiter, header in headers.items():
        if column(header, PHOTO) and column(header, CAPTION):
            return delimiter, header
    raise ValueError(
        f"it begins with {first[:60]!r}, not with a header as `image,caption` or `file_name,text`"
    )


def table_rows(text):
    """(line, {column: cell}) of a table. ValueError for a row of more or fewer cells than the header: an
    unquoted comma or a lost quote would cut a caption."""
    delimiter, header = split_header(text)
    if delimiter == "{":  # JSON has no line breaks within strings, so that these are the rows
        for number, line in enumerate(text.split("\n"), 1):
            try:
                if line.strip():
                    yield number, {name.lower(): cell for name, cell in json.loads(line).items()}
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON, or not whole") from error
        return

    # Kaggle's and the original files know no quotes. One line of Kaggle's has lost its second bar:
    # `2199200615.jpg| 4   A dog runs ...`.
    plain = delimiter == "|" or re.match(TOKEN, text)
    if delimiter == "|" and len(header) > 2:
        text = re.sub(r"(?m)^([^|\n]+\|\s*\d+)\s([^|\n]*)$", r"\1|\2", text)
    quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        if not re.match(f"{KAGGLE}|{TOKEN}", text):
            next(reader)
        for cells in reader:
            if plain and len(cells) > len(header):  # bars in a caption, which comes last, are its own
                cells[len(header) - 1 :] = [delimiter.join(cells[len(header) - 1 :])]
            if not any(cell.strip() for cell in cells):  # spreadsheets leave such rows at the end
                continue
            if len(cells) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}")
            yield reader.line_num, dict(zip(header, cells))
    except csv.Error as error:
        wrong = f"{in_words(error)}; a cell with quotes stands in quotes, and those in it are doubled"
        raise ValueError(f"line {reader.line_num}: {wrong}") from error


def read_list(cell):
    """All captions of a photo, in one cell: a list as JSON has it or, in single quotes, Python (pandas)."""
    try:
        return json.loads(cell)
    except ValueError:
        if re.search(r"""["']\s+["']""", cell):  # numpy's: Python would make one caption of two
            raise ValueError("a cell holds a list without commas") from None
    try:
        return ast.literal_eval(cell)
    except (SyntaxError, ValueError):
        raise ValueError("a cell holds a list that is not whole") from None


def read_table(text):
    """A table with a header: the hub's flickr_annotations_30k.csv (whose cells hold all captions of a photo,
    as JSON), Kaggle's results.csv, Flickr8k's captions.txt, open_clip's `filepath,title`, metadata.csv and
    metadata.jsonl of datasets' imagefolder, one's own."""
    for number, row in table_rows(text):
        photo, caption, split = column(row, PHOTO), column(row, CAPTION), column(row, ["split"])
        if not photo or not caption or not str(row[photo]).strip():
            raise ValueError(f"line {number} has no photo or no caption")
        sentences = row[caption] or ""
        if isinstance(sentences, str) and re.match(r"""\[\s*["'\]]""", sentences):
            sentences = read_list(sentences)
        sentences = sentences if isinstance(sentences, list) else [sentences]
        if not isinstance(row[photo], str | int) or not all(isinstance(x, str) for x in sentences):
            raise ValueError(f"line {number}: its {photo} is no name, or its {caption} no text")
        # Some tables keep the `#0` of the original files.
        yield re.sub(r"(\.\w+)#\d+$", r"\1", str(row[photo]).strip()), split and row[split], sentences


def read_karpathy(text):
    """Karpathy's dataset_*.json: {"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}."""
    for image in json.loads(text)["images"]:
        yield image["filename"], image["split"], [sentence["raw"] for sentence in image["sentences"]]


def read_text(path):
    """The text of a file, without the line `sep=;` that Excel writes before a table, and its encoding."""
    text, encoding = decode_text(path.read_bytes())
    return re.sub(r"\Asep=.\r?\n", "", text), encoding


def is_table(path):
    """Whether a file is a table of captions, by its ending and its first line."""
    if path.suffix.lower() not in TABLES or "lemma" in path.name:
        return False  # Flickr8k.lemma.token.txt has the captions in basic forms of their words
    try:
        split_header(read_text(path)[0])
    except ValueError:
        return False
    return True


def split_by_name(names):
    """{name: split} of photos that no file puts into one. A photo's own name decides, whatever other photos
    there are: 1 in 20 goes to val, 1 in 20 to test. Where that leaves fewer than two to validate on, the
    tenth with the lowest hashes (two at least) goes to val."""
    hashes = {name: int(hashlib.md5(name.rpartition("/")[2].encode()).hexdigest(), 16) for name in names}
    splits = {name: {0: "val", 1: "test"}.get(hashes[name] % 20, "train") for name in names}
    if list(splits.values()).count("val") < 2:
        lowest = sorted(names, key=hashes.get)[: max(2, len(names) // 10)]
        splits |= dict.fromkeys(lowest, "val")
    return splits


def with_splits(captions):
    """{name: (split, captions)} with a split for each photo: the table's own; else that of the name's first
    folder, where all names have such a one, train and val among them; else split_by_name."""
    by_folder = {name: SPLITS.get(name.split("/")[0].lower()) for name in captions}
    found = set(by_folder.values())
    if {"train", "val"} <= found and None not in found:
        default = by_folder
    else:
        default = split_by_name([name for name, (split, _) in captions.items() if not split])
    return {name: (split or default[name], own) for name, (split, own) in captions.items()}


def read_file(path):
    """A captions file to ({photo: (split or None, captions)}, its encoding), in the order of the file.
    InputError for a file that isn't whole, or of another form."""
    photos = {}
    try:
        text, encoding = read_text(path)
        for name, said, sentences in (read_karpathy if path.suffix == ".json" else read_table)(text):
            name = str(PurePosixPath(str(name).replace("\\", "/")))
            split = SPLITS.get(str(said or "").strip().lower())
            if said and str(said).strip() and not split:
                raise ValueError(f"{name} is put into {said!r}, which is none of train, val and test")
            before, kept = photos.setdefault(name, (split, []))
            if split != before:
                raise ValueError(f"{name} is in {before} and in {split}")
            for sentence in sentences:
                sentence = " ".join(sentence.split())
                if sentence.lower() not in NO_CAPTION:
                    kept.append(sentence)
    except (LookupError, TypeError, AttributeError, RecursionError) as error:  # JSON, but of something else
        raise InputError(f"{path} can't be read: it is built in another way than its name says") from error
    except ValueError as error:
        raise InputError(f"{path} can't be read: {in_words(error)}") from error
    return {name: part for name, part in photos.items() if part[1]}, encoding


def split_of_folder(path, folder):
    """The split that a metadata.csv or .jsonl is of, by its own folder below `folder`, as in datasets'
    imagefolder: train, validation, test. None for other tables."""
    own = path.parent.relative_to(folder).name.lower()
    return SPLITS.get(own) if path.stem == "metadata" else None


def read_files(paths, folder):
    """{path: what read_file gave}. Tables that are a split each (split_of_folder) become one, under the path
    of the first: their names get the folder before them. InputError where two have the same name."""
    read, parts = {}, [path for path in paths if split_of_folder(path, folder)]
    for path in paths:
        captions, encoding = read_file(path)
        if path not in parts:
            read[path] = captions, encoding
            continue
        whole, _ = read.setdefault(parts[0], ({}, encoding))
        for name, (split, own) in captions.items():
            name = f"{path.parent.relative_to(folder).as_posix()}/{name}"
            if name in whole:
                raise InputError(f"{path} and another table beside it have captions of {name}: move one away")
            whole[name] = split or split_of_folder(path, folder), own
    return read


def same_captions(some, others):
    """Whether the smaller of two tables is a part of the other, but for case, spaces and punctuation."""

    def letters(captions):
        of = {}
        for name, (_, own) in captions.items():
            of.setdefault(bare(name), []).extend(re.sub(r"\W", "", sentence).lower() for sentence in own)
        return of

    few, many = sorted((letters(some), letters(others)), key=len)
    return all(sorted(many.get(name, [])) == sorted(own) for name, own in few.items())


def check_folder(folder):
    """InputError where --data is no folder."""
    if Path(folder).is_file():
        raise InputError(f"--data {folder} is a file: give the folder that holds it and the photos")
    if not Path(folder).is_dir():
        raise InputError(f"--data {folder}: no such folder; {' and '.join(DRAWN)} need none")


def captions_files(folder):
    """Files below a folder that may hold captions: (published, tables, files). The first are Karpathy's
    dataset_*.json, the last all files. InputError without either of both."""
    check_folder(folder)
    files = list(files_below(folder))
    published = [path for path in files if path.match("dataset_*.json") and path.stem not in DATASETS_OWN]
    tables = [path for path in files if is_table(path)]
    if not published and not tables:
        others = [path for path in files if path.suffix.lower() in TABLES]
        others.sort(key=lambda path: (path.suffix.lower() == ".txt", "caption" not in path.name))
        for path in others:
            read_file(path)  # says what is wrong with it
        raise InputError(
            f"--data {folder}: no captions in it, neither dataset_*.json nor a table ({', '.join(TABLES)})"
        )
    return published, tables, files


def choose_file(read, found, published):
    """Of several captions files {path: (captions, encoding)} the one to take: that with a column split if it
    has nearly all photos, else that of most; found(captions) counts them. InputError where a table says
    something else than another."""
    most = max(found(captions) for captions, _ in read.values())

    def worth(path):
        captions, _ = read[path]
        has_split = any(split for split, _ in captions.values())
        return has_split and found(captions) > 0.9 * most, found(captions), -len(captions)

    chosen = max(read, key=worth)
    for other in read:
        # Not of published ones, which have photos in common: Flickr30k those of Flickr8k.
        if chosen not in published and not same_captions(read[chosen][0], read[other][0]):
            both = f"{min(chosen, other)} and {max(chosen, other)} both hold captions, and not the same"
            raise InputError(f"{both}: move one of them away, or make one file of both, with a column split")
    if not read[chosen][0]:
        raise InputError(f"{chosen} holds no captions")
    return chosen


def read_captions(folder):
    """The captions below a folder: (path of their file, {name: (split, captions)}). Published splits come
    first, dataset_*.json half of whose photos are there; then tables. InputError without any, and for tables
    that say different things."""
    published, tables, files = captions_files(folder)
    here = {bare(path.name) for path in files}

    def found(captions):
        return sum(bare(name) in here for name in captions)

    def fitting(paths, share):
        read = read_files(paths, folder)
        return {path: read[path] for path in read if found(read[path][0]) > share * len(read[path][0])}

    first = [*published, *tables][:1]
    read = fitting(published, 1 / 2) or fitting(tables, 0) or read_files(first, folder)
    chosen = choose_file(read, found, published)
    captions, encoding = read[chosen]

    parts = [path for path in tables if split_of_folder(path, folder)]
    used = parts if chosen in parts else [chosen]
    others = [path for path in files if path in published or path.suffix.lower() in TABLES]
    others = [shown(path) for path in others if path not in used]
    others = f"; not used: {', '.join(others)}" if others else ""
    print(f"captions  {', '.join(map(shown, used))}, {encoding}{others}")
    return chosen, with_splits(captions)


# --- Photos ------------------------------------------------------------------------------------------


def load_photo(path, size):
    """A file to (size, size, 3) uint8: the shorter side resized to `size` with PIL's bicubic filter, then the
    middle cut out. For upright RGB photos that is CLIPImageProcessor with PIL, bit for bit."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError("more than 8 bits a channel, which PIL would cut to white")
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:  # what shows through is white, as on a page
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("RGB")

    width, height = image.size
    shorter = min(width, height)
    if max(width, height) > 20 * shorter:  # a 1 x 4000 strip would become 224 x 896,000
        width, height = min(width, 20 * shorter), min(height, 20 * shorter)
        image = ImageOps.fit(image, (width, height))

    width, height = int(size * width / shorter), int(size * height / shorter)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


ENDINGS = ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"
ENDINGS += ".avif", ".heic", ".heif"


def bare(name):
    """A photo's name without folders, ending and case, which may have changed since captions were written."""
    stem, ending = os.path.splitext(composed(name).rpartition("/")[2].lower())
    return stem if ending in ENDINGS else stem + ending


def composed(name):
    """A name with each accent in its letter: macOS writes them apart."""
    return unicodedata.normalize("NFC", str(name))


def likeness(name, path):
    """What a path has of a photo's name in the captions: (folders, ending or not, case or not)."""
    wanted = composed(name).split("/")[::-1]
    there = composed(path.absolute().as_posix()).split("/")[::-1]
    lower = [part.lower() for part in wanted], [part.lower() for part in there]
    folders = len(os.path.commonprefix([parts[1:] for parts in lower]))
    return folders, lower[0][0] == lower[1][0], wanted[0] == there[0]


def find_photos(folder, names):
    """{name: path} of the photos below a folder. Names never make a path: none leads out of it. InputError
    where two files may be meant (of equal ones any is), or one is by two names; for over 1 % missing."""
    files, found, missing, moved = {}, {}, [], []
    folder = folder if Path(folder).is_dir() else Path(folder).parent  # or the captions file in it
    for path in files_below(folder):
        files.setdefault(bare(path.name), []).append(path)
    for name in names:
        paths = files.get(bare(name), [])
        if len(paths) > 1:
            most = max(likeness(name, path) for path in paths)
            paths = [path for path in paths if likeness(name, path) == most]
        for other in paths[1:]:
            if not filecmp.cmp(paths[0], other, shallow=False):
                why = f"the photo {name} may be {paths[0]} or {other}"
                raise InputError(f"{why}: move one of them away, or name it with its folder in the captions")
        if not paths:
            missing.append(name)
        else:
            found[name] = paths[0]
            if "/" in name and likeness(name, paths[0])[0] == 0:
                moved.append(name)

    names_of = {}
    for name, path in found.items():
        if names_of.setdefault(path, name) != name:
            raise InputError(f"{path} is named twice in the captions, as {names_of[path]} and as {name}")
    others = [path for same in files.values() for path in same if path.suffix.lower() in ENDINGS]
    others = [path for path in others if path not in names_of]
    if too_many(missing, names):
        there = f"there is {[*names_of, *others][0]}" if names_of or others else "there are no photos"
        raise InputError(
            f"{len(missing)} of {len(names)} photos are missing below {folder}, as {missing[0]}; {there}"
        )
    if missing:
        warn(f"left out, missing: {', '.join(missing)}")
    if moved:
        warn(f"{len(moved)} photos lie in other folders than the captions say, as {found[moved[0]]}")
    if others:
        print(f"photos    {len(found):,} have captions; {len(others):,} have none, as {shown(others[0])}")
    return found


def too_many(bad, photos):
    """Over 1 % are no accident, nor is all."""
    return len(bad) > max(1, 0.01 * len(photos)) or len(bad) == len(photos)


@contextmanager
def atomic(path):
    """Yields a temporary path to write, a file or a folder. At the end of the block it becomes `path`, which
    is there whole or not at all; after an error it is removed. InputError where it can't be written."""
    path = Path(path)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):  # of a process that was killed
        if stale.is_file() and time.time() - stale.stat().st_mtime > 86_400:
            stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where the disk is full
        wrong = f"is the disk full or read-only? ({in_words(error)})"
        raise InputError(f"can't write {path}: {wrong}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def decode(path, size):
    """(load_photo, None), or (None, why) where there is no photo or only a part of one."""
    try:
        return load_photo(path, size), None
    except Exception as error:  # PIL raises almost anything on a damaged file
        return None, in_words(error)


def build_store(photos, size, pixels, listing):
    """Decodes photos {name: path} in parallel into the file `pixels`, size x size x 3 bytes each, and writes
    the names of those that could be read, and why the others couldn't, into `listing`. InputError, and no
    file, if those are over 1 %."""
    from tqdm import tqdm

    pixels.parent.mkdir(parents=True, exist_ok=True)
    names, unreadable = [], {}
    # The right block ends before the left one: the listing appears last, and says that the store is complete.
    with atomic(listing) as listing_part, atomic(pixels) as pixels_part:
        with (
            open(pixels_part, "wb") as file,
            ThreadPoolExecutor(os.cpu_count()) as pool,  # threads will do: PIL lets go of Python's lock
            # Closed, as otherwise after an error all the others would still be decoded.
            closing(pool.map(decode, photos.values(), itertools.repeat(size))) as decoded,
        ):
            for name, (photo, reason) in zip(tqdm(photos, "decoding", mininterval=1), decoded):
                if photo is None:
                    unreadable[name] = reason
                else:
                    names.append(name)
                    file.write(photo)
        if too_many(unreadable, photos):
            name, reason = next(iter(unreadable.items()))
            raise InputError(f"{len(unreadable)} of {len(photos)} photos can't be read, as {name}: {reason}")
        listing_part.write_text(json.dumps([names, unreadable]))


def photo_store(photos, size, cache):
    """Photos {name: path} as (names, uint8 (N, size, size, 3)), memory-mapped, writes stay in memory.
    Reused while names, the files' sizes and times, and `size` are the same: their hash names the store."""
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in photos.items()]
    key = hashlib.sha256(json.dumps([size, stats]).encode()).hexdigest()[:16]

    # Two runs may build the same store at once: each of them replaces the other's equal files.
    pixels, listing = Path(cache) / f"{key}.uint8", Path(cache) / f"{key}.json"
    if not (pixels.exists() and listing.exists()):
        build_store(photos, size, pixels, listing)
    try:
        names, unreadable = json.loads(listing.read_text())
        store = np.memmap(pixels, np.uint8, mode="c").reshape(len(names), size, size, 3)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{pixels} is damaged: delete it, and it is made again") from error
    if unreadable:
        reasons = [f"{name} ({reason})" for name, reason in unreadable.items()]
        warn(f"left out, not to be read: {', '.join(reasons)}")
    return names, store


# --- Two drawn worlds --------------------------------------------------------------------------------

DRAWN = {"shapes": 10_000, "sketches": 3_000}  # training scenes
SIZES = {"small": 0.13, "large": 0.22}  # radius as a share of the picture's side
COLOURS = {
    "red": (225, 35, 35),
    "green": (30, 160, 60),
    "blue": (40, 80, 230),
    "yellow": (245, 210, 30),
    "purple": (150, 50, 180),
    "cyan": (60, 210, 225),
}
SHAPES = "circle", "square", "triangle", "cross", "ring"
PLACES = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
GROUNDS = {"white": (250, 250, 250), "grey": (128, 128, 128), "black": (10, 10, 10)}
# {a} is all of a thing: "small red ring". {A[0]}, {A[1]} and {A[2]} are its size, its colour and its shape.
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
SKETCH_WORDS = {
    "white": "peach",
    "grey": "sage",
    "black": "plum",
    "background": "paper",
    "circle": "disc",
    "square": "box",
    "triangle": "wedge",
    "cross": "plus",
    "ring": "hoop",
}


@functools.cache
def all_scenes(seed):
    """All 64,800 scenes, shuffled: ((thing, place), (thing, place), ground), thing (size, colour, shape)."""
    things = list(itertools.product(SIZES, COLOURS, SHAPES))
    places = itertools.combinations(PLACES, 2)
    scenes = []
    for a, b, (place_a, place_b), ground in itertools.product(things, things, places, GROUNDS):
        scenes.append(((a, place_a), (b, place_b), ground))
    random.Random(seed).shuffle(scenes)
    return scenes


def draw_shape(image, shape, x, y, radius, fill):
    """Draws a shape around (x, y) into a PIL image."""
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


def outline(mask, width):
    """A mask without its inside, which is where the mask, moved by `width` any way, still covers it."""
    inside = mask
    for dx, dy in ((width, 0), (-width, 0), (0, width), (0, -width)):
        inside = ImageChops.darker(inside, ImageChops.offset(mask, dx, dy))
    return ImageChops.subtract(mask, inside)


def draw(scene, side, rng, sketch=False):
    """A scene as (side, side, 3) uint8, its things shaken a little by `rng`."""
    *things, ground = scene
    large = 4 * side  # drawn at four times the size, then reduced: so edges are smooth
    image = Image.new("RGB", (large, large), (SKETCH_GROUNDS if sketch else GROUNDS)[ground])
    for (size, colour, shape), place in things:
        centre_x, centre_y = PLACES[place]
        radius = large * SIZES[size] * rng.uniform(0.95, 1.05)
        x = large * (centre_x + rng.uniform(-0.02, 0.02))
        y = large * (centre_y + rng.uniform(-0.02, 0.02))

        if sketch:
            mask = Image.new("L", image.size)
            draw_shape(mask, shape, x, y, radius, 255)
            image.paste(COLOURS[colour], mask=outline(mask, side // 6))
        else:
            draw_shape(image, shape, x, y, radius, COLOURS[colour])
    return np.asarray(image.reduce(4))


def captions_of(scene, rng, sketch=False):
    """Five captions of a scene, its things in an order that `rng` draws. Each of them says everything."""
    *things, ground = scene
    captions = []
    for template in TEMPLATES:
        rng.shuffle(things)
        (a, place_a), (b, place_b) = things
        (x_a, y_a), (x_b, y_b) = PLACES[place_a], PLACES[place_b]
        where = WHERE.get((np.sign(x_a - x_b), np.sign(y_a - y_b)), "across from")

        words = {"a": " ".join(a), "b": " ".join(b), "A": a, "B": b}
        places = {"place_a": place_a, "place_b": place_b, "where": where, "ground": ground}
        caption = template.format(**words, **places)
        if sketch:
            caption = " ".join(SKETCH_WORDS.get(word, word) for word in caption.split())
        captions.append(caption)
    return captions


def load_drawn(sizes, side, sketch=False, seed=0):
    """For each split of a drawn world, of sizes {split: scenes}: (names, photos, sentences of each). The
    first split has the first scenes, the next those after them: no scene is in two."""
    splits, start = {}, 0
    for split, count in sizes.items():
        names, photos, sentences = [], [], []
        for i in range(start, start + count):
            scene = all_scenes(seed)[i]
            rng = random.Random(f"{seed}/{i}")
            names.append(f"{i:05d}")
            photos.append(draw(scene, side, rng, sketch))
            sentences.append(captions_of(scene, rng, sketch))
        splits[split] = names, np.stack(photos), sentences
        start += count
    return splits


# --- Tokenizer ---------------------------------------------------------------------------------------


def train_tokenizer(captions, vocab_size=8192):
    """A CLIP tokenizer for these captions, made as OpenAI made theirs: 256 bytes, 256 that end a word, the
    merges that BPE finds, then both markers, the end token last."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = alphabet + [byte + "</w>" for byte in alphabet]
    blank = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,  # the markers are the other two
        special_tokens=letters,  # given, so that ties fall alike each time
        show_progress=False,
        end_of_word_suffix="</w>",
    )
    blank.train_from_iterator(captions, trainer)

    merges = [tuple(merge) for merge in json.loads(blank.to_str())["model"]["merges"]]
    tokens = letters + [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {}
    for token in tokens:
        vocab.setdefault(token, len(vocab))  # two merges may give the same token
    return CLIPTokenizer(vocab=vocab, merges=merges)


def load_tokenizer(name):
    """A CLIPTokenizer from the hub or a folder. Raises InputError where there is none."""
    from transformers import CLIPTokenizer

    missing = f"no tokenizer {name}: give its folder, a hub name if online, or `train`"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name)
    except Exception as error:  # the hub's client has dozens of kinds
        raise InputError(missing) from error
    if len(tokenizer) <= 3:  # an empty one is what no folder gives, offline
        raise InputError(missing)
    if not any(token.endswith("</w>") for token in tokenizer.get_vocab()):
        raise InputError(f"{name} is no tokenizer of CLIP's kind, in which the end of a word is </w>")
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    known = {left + right for left, right in bpe["merges"]}
    lost = [token for token in bpe["vocab"] if token not in known and len(token.removesuffix("</w>")) > 1]
    if len(lost) > 100:  # fewer may have been added to the vocabulary
        raise InputError(f"{name} is not whole: {len(lost):,} of its tokens have no merge, as {lost[0]}")
    return tokenizer


def check_same_tokenizer(source, run_dir):
    """InputError where `source` is another tokenizer than the run's own: other ids of its own words."""
    own, other = load_tokenizer(Path(run_dir) / "tokenizer"), load_tokenizer(source)
    words = " ".join(own.get_vocab()).replace("</w>", "")
    if own(words)["input_ids"] != other(words)["input_ids"]:
        raise InputError(f"{source} is not the tokenizer of {run_dir}: leave --tokenizer out, it has its own")


def tokenizer_of_run(args):
    """--tokenizer, or, where a run is resumed, its own: `train` would train another one."""
    own = args.out / "tokenizer"
    if not (args.resume and own.exists()):
        return args.tokenizer
    if Path(args.tokenizer).exists():
        check_same_tokenizer(args.tokenizer, args.out)
    return own


def tokenize(tokenizer, captions, context=77):
    """Captions to int32 ids (len(captions), context). Longer ones are cut, and keep their end token: that is
    where the model reads the caption's embedding (openai/CLIP #212)."""
    parts = []
    for i in range(0, len(captions), 5000):  # as Python's lists the ids of all would fill memory
        part = captions[i : i + 5000]
        options = dict(truncation=True, max_length=context, return_attention_mask=False)
        ids = tokenizer(part, padding=True, return_tensors="np", **options)["input_ids"]
        ids = torch.from_numpy(ids).int()  # as long as the longest, which is faster than `context` all along
        parts.append(F.pad(ids, (0, context - ids.shape[1]), value=tokenizer.pad_token_id))
    return torch.cat(parts)


# --- Pictures ----------------------------------------------------------------------------------------


def save_figure(figure, path):
    """Writes a matplotlib figure as a PNG file."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_curve(path, history, photos):
    """Of the rows of a run, one an epoch: losses with the line of chance on the left, recall over `photos`
    validation photos on the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]

    left.plot(epochs, [row["train_loss"] for row in history], "o-", ms=3, label="training, whole batch")
    left.plot(epochs, [row["loss"] for row in history], "o-", ms=3, label="validation, groups of 64")
    left.axhline(math.log(min(64, photos)), color="C1", ls=":", label="validation at chance")
    left.axhline(history[-1]["train_chance"], color="C0", ls=":", label="training at chance")
    left.set_ylabel("contrastive loss")

    marker = "o" if len(history) == 1 else ""  # a line of one point would not be seen
    for name, words, style in (("t2i_r", "caption to photo", "-"), ("i2t_r", "photo to caption", "--")):
        for k, colour in ((10, "C2"), (5, "C1"), (1, "C0")):
            recall = [row[f"{name}{k}"] for row in history]
            right.plot(epochs, recall, style, marker=marker, ms=3, color=colour, label=f"R@{k} {words}")
    right.set_ylabel(f"recall over {photos:,} photos, %")

    for axes in (left, right):
        axes.set(xlabel="epoch", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    save_figure(figure, path)


def draw_retrieval(path, split, images, texts, count=6):
    """Six captions from all over the split over the six photos found first, by the embeddings images (N, E)
    and texts (M, E); a photo that the caption was written for has a green frame."""
    from matplotlib.figure import Figure

    captions = torch.linspace(0, len(texts) - 1, min(count, len(texts))).long()
    found = (texts[captions] @ images.T).topk(min(count, len(images))).indices.cpu()  # (6, 6)
    n, k = found.shape
    figure = Figure(figsize=(1.6 * k, 1.9 * n), layout="constrained")
    rows = figure.subplots(n, squeeze=False)[:, 0]
    for axes, caption, photos in zip(rows, captions.tolist(), found):
        pictures = split.take(photos, "cpu")  # (k, S, S, 3)
        edge = pictures.shape[1] // 16
        framed = F.pad(pictures, (0, 0, edge, edge, edge, edge), value=225)
        framed[photos == split.owner[caption]] = torch.tensor([50, 205, 50], dtype=torch.uint8)
        framed[:, edge:-edge, edge:-edge] = pictures

        axes.imshow(torch.cat(list(framed), dim=1).numpy())
        title = textwrap.shorten(split.captions[caption], 18 * k, placeholder=" ...")
        axes.set_title(title, loc="left", fontsize=9, parse_math=False)
        axes.axis("off")
    save_figure(figure, path)


def show_matrix(axes, matrix, limit, title):
    """A matrix in colours from blue, -limit, over white, 0, to red, with its scale."""
    picture = axes.imshow(matrix, vmin=-limit, vmax=limit, cmap="RdBu_r")
    axes.set(xticks=[], yticks=[], title=title)
    axes.figure.colorbar(picture, ax=axes, orientation="horizontal", shrink=0.8, aspect=30, pad=0.02)


def show_positions(axes, positions):
    """Correlations (G * G, G * G) of patch positions as G x G maps: the map at a position's own place has
    its correlation with each of the others, at their places."""
    side = math.isqrt(len(positions))
    maps = positions.view(side, side, side, side)  # (row, column, row of the other, column of the other)
    mosaic = maps.transpose(1, 2).reshape(side * side, side * side)

    # The scale leaves out each position with itself, which is 1, and the highest of the others.
    others = positions[~torch.eye(len(positions), dtype=torch.bool)]
    limit = others.abs().quantile(0.98).item()
    show_matrix(axes, mosaic, limit, "each patch position with all others")
    for i in range(1, side):
        axes.axhline(i * side - 0.5, color="white", lw=1)
        axes.axvline(i * side - 0.5, color="white", lw=1)


def right_and_wrong(split, images, texts, count=3):
    """Rows of the first photos for which the caption found first is their own, and of as many where not."""
    found = torch.cat([(part @ texts.T).argmax(dim=1) for part in images.split(500)]).cpu()
    right = split.owner[found] == torch.arange(len(images))
    return torch.cat([right.nonzero()[:count, 0], (~right).nonzero()[:count, 0]])


@torch.no_grad()
def class_attention(model, pixels):
    """What the class token takes from each patch, (B, S / P, S / P): the mean over all layers and heads."""
    vision, shares = model.vision_model, []
    x = vision.pre_layrnorm(vision.embeddings(pixels))  # (B, T, C)
    for layer in vision.encoder.layers:
        attention, normed = layer.self_attn, layer.layer_norm1(x)
        q = attention.q_proj(normed[:, 0]).unflatten(-1, (attention.num_heads, -1))  # (B, H, D)
        k = attention.k_proj(normed).unflatten(-1, (attention.num_heads, -1))  # (B, T, H, D)
        weights = (torch.einsum("bhd,bthd->bht", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
        shares.append(weights[:, :, 1:].mean(dim=1))  # (B, T - 1)
        with uncompiled():
            x = layer(x)
    side = model.config.image_size // model.config.patch_size
    return torch.stack(shares).mean(dim=0).unflatten(1, (side, side))


@torch.no_grad()
def draw_inside(path, split, before, after, model, count=16):
    """What training has changed, and what it has led to: cosines of 16 photos and captions by the embeddings
    (images, texts) before and after it; the model's positions; what the class token takes from six photos."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.7), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    left, middle, right = top.subplots(1, 3)
    captions = torch.linspace(0, len(split.captions) - 1, min(count, len(split.photos))).long()
    cosines = [(images[split.owner[captions]] @ texts[captions].T).cpu() for images, texts in (before, after)]
    limit = max(matrix.abs().max().item() for matrix in cosines)
    show_matrix(left, cosines[0], limit, f"{len(captions)} photos x {len(captions)} captions, untrained")
    show_matrix(middle, cosines[1], limit, "trained: its own on the diagonal")
    positions = model.vision_model.embeddings.position_embedding.weight[1:]  # (G * G, C)
    show_positions(right, positions.corrcoef().cpu())

    images, texts = after
    photos = right_and_wrong(split, images, texts)  # (6,)
    captions = (images[photos] @ texts.T).argmax(dim=1).cpu()  # found first for each photo
    attention = class_attention(model, normalize(split.take(photos, images.device))).cpu()  # (6, G, G)
    bottom.suptitle(
        "captions found first, some right (green) and some wrong; what the class token takes from each patch"
    )
    above, below = bottom.subplots(2, 6)
    for axes in (*above, *below):
        axes.axis("off")  # also those of columns that stay empty
    pictures = split.take(photos, "cpu")  # (m, S, S, 3)
    owners = split.owner[captions]
    for i, (photo, caption) in enumerate(zip(photos.tolist(), captions.tolist())):
        lines = textwrap.wrap(split.captions[caption], 26, max_lines=4, placeholder=" ...")
        colour = "green" if owners[i] == photo else "red"
        above[i].set_title("\n".join(lines), fontsize=8, color=colour, parse_math=False)
        above[i].imshow(pictures[i])
        # S x S pixels and G x G patches: the extent, which is the same, lays one over the other.
        below[i].imshow(pictures[i].float().mean(dim=-1), "gray", vmin=0, vmax=255, extent=(0, 1, 0, 1))
        below[i].imshow(attention[i], "inferno", alpha=0.6, extent=(0, 1, 0, 1))
    save_figure(figure, path)


# --- Checkpoints -------------------------------------------------------------------------------------

CHECKPOINT = "checkpoint.pt"
SAVE_SECONDS = 20


def new_state(config, recipe, splits, trained, mean):
    """All that a run is, but for its optimizers: a plain dict of numbers and of weights, {name: parameter},
    which it shares: those that train, and their running mean (the same, if there is none)."""
    return {
        "model": asdict(config),
        "recipe": asdict(recipe),
        "data": {"source": splits["train"].source, "content": fingerprint(splits)},
        "trained": {name: weight.detach() for name, weight in trained.items()},
        "last": {name: weight.detach() for name, weight in mean.items()},
        "best": None,  # the running mean after the epoch with the best recall
        "history": [],
        "seconds": 0.0,
    }


def add_epoch(state, row, recipe):
    """Prints an epoch's row and takes it into the history; keeps the weights if its recalls are the best."""
    is_best = row["rsum"] > max((before["rsum"] for before in state["history"]), default=-1)
    if is_best:
        state["best"] = {name: weight.to("cpu", copy=True) for name, weight in state["last"].items()}
    state["history"].append(row)
    print_epoch(recipe, row, is_best)


def save_checkpoint(run_dir, state, optimizers):
    """Writes all that a run is: new_state, and what its optimizers remember."""
    with atomic(Path(run_dir) / CHECKPOINT) as temporary:
        torch.save({**state, "optimizers": [each.state_dict() for each in optimizers]}, temporary)


def save_progress(run_dir, state, optimizers, saved, is_last):
    """Writes the log of a run, and a checkpoint if the last is 20 seconds old (`saved` is its time: those of
    large models take some seconds) or the run ends. Returns the time of the last."""
    if not is_main_process():
        return saved
    write_csv(Path(run_dir) / "log.csv", state["history"])
    if not is_last and time.perf_counter() - saved < SAVE_SECONDS:
        return saved
    save_checkpoint(run_dir, state, optimizers)
    return time.perf_counter()


def load_checkpoint(run_dir):
    """What save_checkpoint wrote, on the CPU. InputError where nothing can be read."""
    path = Path(run_dir) / CHECKPOINT
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # data only: it can't bring code
    except Exception as error:  # torch.load has a dozen ways to fail
        raise InputError(f"{path} is missing, damaged or no checkpoint") from error


def load_state(run_dir, state, optimizers):
    """Fills the state of a new run with the checkpoint, if there is one. InputError, with all that differs,
    if it's another run's. Photos and captions are known by their content (fingerprint), wherever they lie.
    A run of more epochs is another one: the learning rate falls to zero over those that it was begun with."""
    if not (Path(run_dir) / CHECKPOINT).exists():
        print(f"new run   --resume finds none in {run_dir}")
        return
    saved, differences = load_checkpoint(run_dir), []
    try:
        for part in ("model", "recipe"):
            for name, value in state[part].items():
                if name != "micro_batch" and saved[part][name] != value:
                    differences.append(f"{name} was {saved[part][name]} and is {value}")
        if saved["data"]["content"] != state["data"]["content"]:
            differences.append("photos, captions or tokenizer are others")
        if differences:
            longer = state["recipe"]["epochs"] > saved["recipe"]["epochs"]
            why = "lr falls to 0 over all epochs, so more of them are another run: " if longer else ""
            differences = "; ".join(differences)
            raise InputError(f"{run_dir} can't be resumed: {differences}; {why}--out DIR starts another run")
        for part in ("trained", "last"):
            for name, weight in state[part].items():
                weight.copy_(saved[part][name])
        for optimizer, remembered in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(remembered)
        state.update(best=saved["best"], history=saved["history"], seconds=saved["seconds"])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{run_dir} can't be resumed: its checkpoint is damaged, older or of another model"
        ) from error
    print(f"resumed   after epoch {len(state['history'])}")


# --- Reports -----------------------------------------------------------------------------------------


def write_csv(path, rows):
    """Dicts of the same keys as the lines of a CSV file."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def describe(row):
    """An evaluation in one line."""
    return (
        "loss {loss:.4f}  R@1/5/10 text->image {t2i_r1:5.1f} {t2i_r5:5.1f} {t2i_r10:5.1f}"
        "  image->text {i2t_r1:5.1f} {i2t_r5:5.1f} {i2t_r10:5.1f}"
    ).format(**row)


def print_start(model, splits, recipe, device, compile=False):
    """The opening block: device, size, data, steps, and the losses of a model that knows nothing."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    vision, text, everything = (
        f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
        for module in (model.vision_model, model.text_model, model)
    )
    steps = recipe.epochs * (len(splits["train"].photos) // recipe.batch_size)
    group = min(64, len(splits["val"].photos))
    kind = str(half(device) or torch.float32).removeprefix("torch.")
    print(f"device    {WORLD_SIZE} x {name}, {kind}{', compiled' if compile else ''}")
    print(f"model     vision {vision} + text {text} + projections = {everything} parameters")
    for split, part in splits.items():
        owned = set(zip(part.captions, part.owner.tolist()))
        shared = len(owned) - len(set(part.captions))  # misses: recall knows owners alone
        notes = f", {shared} of them another photo's too" if shared else ""
        if split != "train" and len(part.photos) < 50:
            notes += f": too few to judge by, R@10 at chance is {min(100, 1000 // len(part.photos))} %"
        print(f"{split:10s}{len(part.photos):,} photos, {len(part.captions):,} captions{notes}")
    print(f"steps     {steps:,} of {recipe.batch_size} pairs in {recipe.epochs} epochs")
    print(f"chance    training loss ln {recipe.batch_size} = {math.log(recipe.batch_size):.3f}")
    print(f"chance    validation loss ln {group} = {math.log(group):.3f}", flush=True)


def print_step(recipe, step, steps, loss, lr, scale, rate):
    """A line of the log. rate: steps a second in this epoch so far."""
    print(
        f"epoch {step * recipe.epochs // steps + 1:3d}/{recipe.epochs}  step {step + 1:6d}/{steps}  "
        f"loss {loss:7.4f}  lr {lr:.2e}  scale {scale:6.2f}  {rate * recipe.batch_size:6,.0f} pairs/s  "
        f"ETA {(steps - step - 1) / rate / 60:6.1f} min",
        flush=True,
    )


def print_epoch(recipe, row, is_best):
    """The line at the end of an epoch."""
    best = "  best" if is_best else ""
    print(
        f"epoch {row['epoch']:3d}/{recipe.epochs}  train {row['train_loss']:.4f}  val {describe(row)}{best}",
        flush=True,
    )


def print_end(history, run_dir):
    """The closing block."""
    lowest = min(history, key=lambda row: row["loss"])
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    for level in (20, 30):
        passed = [row for row in history if min(row["t2i_r10"], row["i2t_r10"]) > level]
        if passed and passed[0]["epoch"] > 1:
            epoch, minutes = passed[0]["epoch"], passed[0]["minutes"]
            print(f"passed    {level} % R@10 both ways in epoch {epoch}, {minutes:.2f} minutes")
    print(f"lowest    validation loss {lowest['loss']:.4f}, in epoch {lowest['epoch']}")
    print(f"done      {history[-1]['minutes']:.1f} minutes of training{memory}: {run_dir}")


# --- Processes ---------------------------------------------------------------------------------------

# torchrun starts a process for each GPU and says in the environment which one it is, of how many.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_main_process():
    """Process 0 prints and writes for all."""
    return RANK == 0


def wait_for_all():
    """Goes on when every process has come here."""
    if WORLD_SIZE > 1:
        dist.barrier()


def gather(x):
    """The rows of all processes, (B / processes, ...) to (B, ...). A gradient goes back to each its own rows,
    the sum of what all processes have for them."""
    return torch.cat(dist_nn.all_gather(x)) if WORLD_SIZE > 1 else x


def share(function, x):
    """function(x), which treats each row of x (n, ...) alone; x is the same in all processes. Each computes
    its part of the rows and gets the rest from the others."""
    if WORLD_SIZE == 1:
        return function(x)
    padded = torch.cat([x, x.new_zeros(-len(x) % WORLD_SIZE, *x.shape[1:])])
    return gather(function(padded.chunk(WORLD_SIZE)[RANK]))[: len(x)]


def average_gradients(model):
    """The mean over the processes. Each computes the whole loss, so that gather's backward sums WORLD_SIZE
    equal gradients: the mean undoes that, and leaves logit_scale's, which each has whole, as it is."""
    if WORLD_SIZE > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with dist._coalescing_manager():  # sent together: hundreds of small sums are mostly waiting
            for gradient in gradients:
                dist.all_reduce(gradient)
        torch._foreach_div_(gradients, WORLD_SIZE)


def open_device(name):
    """The torch.device of this name; there the processes that torchrun has started find each other.
    InputError where there is no such device."""
    try:
        zero = torch.zeros(1, device=name)
        zero.item()  # fails where there are no numbers, as on "meta"
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        raise InputError(f"no device {name} here: {str(error).splitlines()[0]}") from error
    device = zero.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        wait = timedelta(days=1)  # process 0 may fetch 4.4 GB
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
        atexit.register(dist.destroy_process_group)
        if not is_main_process():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open
    return device


def half(device):
    """The type of matrix products on CUDA: bf16, which has fp32's range, or fp16 where there is none (T4,
    P100) and the loss is scaled to keep gradients in range (openai/CLIP #40). Elsewhere None: fp32."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device):
    """A context with matrix products in 16 bits on CUDA. CUDA graphs forbid autocast's cache."""
    kind = half(device)
    return torch.autocast(device.type, kind, kind is not None, cache_enabled=False)


# --- Speed: changes no number but by rounding --------------------------------------------------------


def compile_blocks(model):
    """torch.compile for the blocks of both towers, equal ones once for each shape; then both towers replay
    CUDA graphs. The last blocks, which go on with one token, and the embeddings take longer to compile than a
    short run gains."""
    gc.collect()  # frees an earlier model's graphs, which hold one another
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # a version for each shape
    torch._inductor.config.fallback_random = True  # PyTorch's own dropout, LoRA's, is the faster kernel
    for tower in (model.vision_model, model.text_model):
        for block in tower.encoder.layers[:-1]:
            block.compile(dynamic=False)
        replay_graphs(tower)


def uncompiled():
    """A context in which compiled modules run as they are written. Where nothing was compiled, torch.compiler
    isn't asked for it: its import takes as long as all of PyTorch's."""
    compiler = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiler else nullcontext()


def replay_graphs(tower):
    """Lets a tower train by CUDA graphs, one for each shape of its input: one call replays the thousand
    kernels of a pass, which Python starts more slowly than a GPU runs small ones."""
    # Copies, since this function gives the tower another forward, and PyTorch what it records.
    plain, graphs, pool = copy.copy(tower), {}, torch.cuda.graph_pool_handle()

    def forward(x):
        if not tower.training:
            return plain(x)
        if x.shape not in graphs:
            # Recording draws random numbers, which are put back: a step that records is like any other.
            with torch.enable_grad(), torch.random.fork_rng([x.device]):
                graphs[x.shape] = torch.cuda.make_graphed_callables(copy.copy(plain), (x.clone(),), pool=pool)
        return graphs[x.shape](x)

    tower.forward = forward


# --- A command ---------------------------------------------------------------------------------------


def setting(default, low, high, help):
    """A field of a dataclass that is a flag as well: its default, the values that make sense, its help."""
    return field(default=default, metadata={"low": low, "high": high, "help": help})


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def check_settings(recipe):
    """InputError for a setting with a value that makes no sense."""
    for f in fields(recipe):
        value, low, high = getattr(recipe, f.name), f.metadata.get("low"), f.metadata.get("high")
        if f.metadata and not low <= value <= high:
            raise InputError(f"{flag_of(f.name)} {value} is not between {low} and {high:g}")


class Parser(argparse.ArgumentParser):
    """Shows defaults; takes no abbreviated flags; wrong ones end a command as all bad input does."""

    def __init__(self, **options):
        form = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(formatter_class=form, allow_abbrev=False, **options)

    def add_settings(self, recipe):
        """A flag for each setting of a recipe, with the recipe's value as its default; and those of a run."""
        for f in fields(recipe):
            if f.metadata:
                default, help = getattr(recipe, f.name), f.metadata["help"]
                self.add_argument(flag_of(f.name), type=type(default), default=default, help=help)
        group = self.add_argument_group("run")
        group.add_argument(
            "--data",
            type=os.path.normpath,
            default="flickr30k",
            metavar="DIR",
            help="photos and captions, or `shapes`, `sketches`; flickr30k is fetched if missing",
        )
        group.add_argument("--photos", type=int, default=0, help="train on the first of them; 0 is all")
        group.add_argument(
            "--out", type=Path, metavar="DIR", help="folder of the run; None is a name in runs/"
        )
        group.add_argument("--resume", action="store_true", help="go on with the run in --out")
        kind = torch.accelerator.current_accelerator(check_available=True)  # CUDA's, Apple's, ...
        device = f"{kind.type}:{os.environ.get('LOCAL_RANK', 0)}" if kind else "cpu"
        group.add_argument("--device", default=device, help="cuda:N, mps or cpu")
        group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="on CUDA")

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def settings_of(args, recipe_class):
    """{name: value} of the flags that are settings of this class."""
    return {f.name: getattr(args, f.name) for f in fields(recipe_class) if f.metadata}


def busy_cores():
    """How many threads of other jobs have a core or wait for one: the mean of ten looks, 0 without /proc."""
    looks = []
    for _ in range(10 * Path("/proc/loadavg").exists()):
        running, _ = Path("/proc/loadavg").read_text().split()[3].split("/")
        looks.append(int(running) - 1)  # this one runs as well
        time.sleep(0.01)
    return sum(looks) / max(1, len(looks))


def check_machine(args, device, config):
    """InputError for a batch that would fill a machine without a GPU, which would end with `Killed`. Says so
    where other jobs use its cores."""
    busy, cores = busy_cores(), os.cpu_count()
    if busy > cores / 4 and torch.get_num_threads() > 1 and device.type == "cpu":
        print(f"cores     others keep {busy:.1f} of {cores} busy: OMP_NUM_THREADS=1 may be much faster")
    # A block keeps about 16 numbers of 4 bytes for each channel of each patch.
    patches = (config.image_size // config.patch_size) ** 2 * (1 - args.patch_dropout)
    crops = min(args.micro_batch or args.batch_size, args.batch_size) * args.views
    size = 64 * crops * patches * config.vision.hidden_size * config.vision.num_hidden_layers / 1e9
    if size > 8 and device.type == "cpu":
        small = "--model tiny --tokenizer train, or " if "model" in args else ""
        wrong = f"{crops} crops at once take some {size:.0f} GB, and long without a GPU"
        raise InputError(f"{wrong}: try {small}--micro-batch 8")


def open_data(args, device, tokenizer, config):
    """What `load` gives for --data and a model's config, photos on the device where they fit; a batch larger
    than the photos becomes all of them. InputError where --out holds a run."""
    if not args.resume and any((args.out / name).exists() for name in (CHECKPOINT, "tokenizer", "log.csv")):
        raise InputError(f"{args.out} holds a run: --resume goes on with it, --out DIR starts another")
    if args.out == Path():  # also of --out "", as an empty variable of a shell gives it
        raise InputError("--out is the folder you are in: give one of its own")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file: give a folder")
    if args.photos < 0:
        raise InputError(f"--photos {args.photos}: give a number of photos, or 0 for all")
    if args.batch_size % WORLD_SIZE:
        raise InputError(f"--batch-size {args.batch_size} doesn't divide among {WORLD_SIZE} processes")
    if args.data not in (*DRAWN, "flickr30k"):
        check_folder(args.data)
    check_machine(args, device, config)
    if not is_main_process():
        wait_for_all()  # process 0 stores the photos, the others find them
    splits, tokenizer = load(
        args.data, tokenizer, config.image_size, config.max_position_embeddings, limit=args.photos
    )
    if is_main_process():
        wait_for_all()
    photos = len(splits["train"].photos)
    if photos < 2:
        raise InputError("there is one photo to train on: a batch needs two at least")
    if args.photos > photos:
        raise InputError(f"--photos {args.photos}: there are {photos} to train on")
    if args.batch_size > photos:
        args.batch_size = photos - photos % WORLD_SIZE
        print(f"batch     {args.batch_size}: there are no more training photos")
    for split in splits.values():
        split.place(device)
    return splits, tokenizer


def save_tokenizer(tokenizer, run_dir):
    """Makes the folder of a run, with the tokenizer in it, which a resumed one has already."""
    if is_main_process() and not (run_dir / "tokenizer").exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic(run_dir / "tokenizer") as temporary:
            tokenizer.save_pretrained(temporary)


class Terminated(KeyboardInterrupt):
    """SIGTERM came, which schedulers send before they kill: a stop like Ctrl-C."""


def command(argv, parse_args, run):
    """Runs a command and returns its exit code: bad input, or an OSError, is one line on stderr and 2; Ctrl-C
    is one and 130, SIGTERM one and 143. Warnings, the libraries' own, are shown with python -W default."""

    def terminate(number, frame):
        raise Terminated

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    old_handler = signal.signal(signal.SIGTERM, terminate)
    try:
        run(parse_args(argv))
        return 0
    except (InputError, OSError, UnicodeError) as error:
        name = getattr(error, "filename", None)  # an OSError's words are a number, its text and a name
        words = f"{name}: {error.strerror}" if name else " ".join(str(error).split())
        print("error:", words, file=sys.stderr)
        return 2
    except RuntimeError as error:
        if re.search("out of memory|can't allocate|ALLOC_FAILED", str(error)):
            advice = "--resume and a smaller --micro-batch, say 64, go on"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):  # NCCL's error, or the file of gloo's
            advice = "if a process of the job has ended, --resume goes on"
        else:
            raise
        print(f"error: {in_words(error)}; {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("stopped: --resume goes on from the last checkpoint, if there is one yet", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, old_handler)
