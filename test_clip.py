# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "numpy", "pillow", "transformers>=5.8", "peft>=0.18", "pytest", "matplotlib"]
# ///
"""What this project claims, a test for each claim: `pytest`. With -s each prints the largest difference seen.

Expected values never come from the code under test: they are those of Hugging Face's CLIPModel, of a formula
written out, or worked out by hand. SLOW=1 adds what takes long.
"""

import ast
import copy
import csv
import functools
import http.server
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what isn't here is missing at once, not after many tries
import huggingface_hub
import peft
import transformers
from matplotlib import pyplot as plt
from PIL import Image, ImageEnhance
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

import clip
import data
import finetune
import lora
from clip import CLIP, PRESETS, CLIPConfig, TowerConfig, contrastive_loss, recall_at_k

HERE = Path(clip.__file__).parent
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="takes long: set SLOW=1")
both_text_towers = pytest.mark.parametrize("causal", [False, True], ids=["bert", "causal"])
# --- Helpers ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test starts with the same seed in an empty folder."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


def difference(a, b):
    """The largest absolute difference of two tensors, or of two dicts of them; NaN where there is one."""
    if torch.is_tensor(a):
        a, b = {"": a}, {"": b}
    assert {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}
    gaps = torch.stack([(a[name] - b[name]).abs().max() for name in a])
    print(f"largest difference {gaps.max():.1e} {list(a)[gaps.argmax()]}")
    return gaps.max().item()


# A small model and what goes into it. No two widths are equal, so that none can be taken for another, and the
# end token hasn't the largest id.
SMALL = CLIPConfig(TowerConfig(48, 3, 4, 96), TowerConfig(32, 2, 2, 80), image_size=40, patch_size=8)
SMALL = replace(SMALL, projection_dim=24, vocab_size=100, eos_token_id=60, max_position_embeddings=16)
OPENAI_SMALL = replace(SMALL, causal=True, hidden_act="quick_gelu")
GELU_SMALL = replace(SMALL, causal=True, hidden_act="gelu")
OPENAI_B_16 = replace(PRESETS["ViT-B/16"], causal=True, hidden_act="quick_gelu")
# The size of the vocabulary that train_tokenizer gives for captions of single letters.
SPELLING = replace(OPENAI_SMALL, vocab_size=514, eos_token_id=513)
QKV = ["q_proj", "k_proj", "v_proj"]
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
PLAIN = clip.Recipe(**clip.PLAIN)


@torch.no_grad()
def shaken(model, noise=0.1):
    """Noise on every parameter: biases of 0, norms of 1 and embeddings of 0.02 would hide many a mistake."""
    for parameter in model.parameters():
        parameter.add_(noise * torch.randn_like(parameter))
    return model


def small_model(**changes):
    return shaken(CLIP(replace(SMALL, **changes)))


def photos(count, config=SMALL):
    return torch.randn(count, 3, config.image_size, config.image_size)


def before(lengths, width):
    """True in the first `lengths` places of each row."""
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def captions(lengths, width=16, config=SMALL):
    """Random words, the end token in place `lengths` - 1, and behind it the end token again as padding."""
    ids = torch.randint(config.vocab_size, (len(lengths), width))
    ids[ids == config.eos_token_id] = 0
    return ids.where(before([length - 1 for length in lengths], width), config.eos_token_id)


def keep_outputs(model):
    """A dict that `model`, once run, has filled with what each module gave."""
    outputs = {}

    def keep_as(name):
        def hook(module, inputs, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in model.named_modules():
        if "activation_fn" in name:  # a function in our MLP, a module in theirs
            continue
        if ".layers." in name or name.endswith(("embeddings", "norm", "_projection")):
            module.register_forward_hook(keep_as(name))
    return outputs


def words_of(model, ids):
    """What the text tower would make of each token, (B, T, C), if the last block went on with all of them."""
    tower, x = model.text_model, model.text_model.embeddings(ids)
    T = ids.shape[1]
    mask = torch.ones(T, T).tril().bool()
    if not tower.causal:
        mask = (torch.arange(T) <= (ids == tower.eos_token_id).int().argmax(1, keepdim=True))[:, None, None]
    for block in tower.encoder.layers:
        x = block(x, mask)
    return tower.final_layer_norm(x)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def views(crops=1, sentences=1):
    """12 photos, each in some crops, and some captions of each."""
    pixels = photos(12 * crops).unflatten(0, (12, crops))
    return pixels, captions([3, 5, 9, 16] * 3 * sentences).unflatten(0, (12, sentences))


def encode_views(model, pixels, ids):
    """Embeddings (B, V, E) and (B, K, E) of pixels (B, V, 3, S, S) and ids (B, K, T)."""
    images, texts = model.encode_image(pixels.flatten(0, 1)), model.encode_text(ids.flatten(0, 1))
    return images.unflatten(0, pixels.shape[:2]), texts.unflatten(0, ids.shape[:2])


def backward_of(model, pixels, ids, micro_batch):
    """clip.backward over these views in micro-batches; without dropout they need no seed."""
    parts = list(zip(pixels.split(micro_batch), ids.split(micro_batch)))
    return clip.backward(model, [partial(encode_views, model, *part) for part in parts], NO_SCALER)


def recall(text_to_image, image_to_text):
    t2i = {f"t2i_r{k}": value for k, value in text_to_image.items()}
    return pytest.approx(t2i | {f"i2t_r{k}": value for k, value in image_to_text.items()})


# Hugging Face's models, and ours with their weights.


def hugging_face(config):
    """transformers' CLIPModel of the same size, with attention in plain matrix products."""
    both = dict(hidden_act=config.hidden_act, bos_token_id=0, eos_token_id=config.eos_token_id)
    vision = dict(image_size=config.image_size, patch_size=config.patch_size)
    text = dict(vocab_size=config.vocab_size, max_position_embeddings=config.max_position_embeddings)
    towers = dict(vision_config=vars(config.vision) | vision | both)
    towers |= dict(text_config=vars(config.text) | text | both, projection_dim=config.projection_dim)
    return transformers.CLIPModel(transformers.CLIPConfig(**towers, attn_implementation="eager"))


def both_models(config):
    """Ours and theirs with the same weights, our inputs, and the same inputs under their names."""
    # As much as keeps a wide model's activations, and with them the rounding errors, as small as SMALL's.
    noise = 0.7 * config.vision.hidden_size**-0.5
    theirs, ours = shaken(hugging_face(config), noise).eval(), CLIP(config)
    ours.load_state_dict(theirs.state_dict())
    T = config.max_position_embeddings
    lengths = [2, T, T // 2, T // 3, T // 4, T // 5]
    pixels, ids = photos(6, config), captions(lengths, T, config)
    their_inputs = dict(pixel_values=pixels, input_ids=ids, attention_mask=before(lengths, T).long())
    return ours, theirs, (pixels, ids), their_inputs | dict(return_loss=True)


@torch.no_grad()
def their_logits(theirs, pixels, ids):
    return theirs(pixel_values=pixels, input_ids=ids).logits_per_image


def released_folder(folder, config):
    """A Hugging Face folder with random weights, its model, and our inputs for it."""
    theirs = shaken(hugging_face(config)).eval()
    theirs.save_pretrained(folder)
    data.train_tokenizer(["a b c"]).save_pretrained(folder)
    return theirs, (photos(4, config), captions([2, 5, 9, 16], 16, config))


def reconfigure(folder="base", **changes):
    """Changes entries of text_config in a released folder's config.json."""
    described = json.loads(Path(folder, "config.json").read_text())
    described["text_config"] |= changes
    Path(folder, "config.json").write_text(json.dumps(described))


def replace_tensor(name, tensor):
    """Puts tensors in the place of those of this name in base/model.safetensors."""
    tensors = load_file("base/model.safetensors")
    del tensors[name]
    save_file(tensors | tensor, "base/model.safetensors", {"format": "pt"})


# Models with adapters.


def adapted(causal=False, **changes):
    """A small model with new adapters."""
    model = small_model(causal=causal)
    lora.add_lora(model, **dict(r=4, alpha=8) | changes)
    return model


def merged():
    model = adapted()
    lora.merge(model)
    return model


def poisoned():
    model = adapted()
    model.vision_model.encoder.layers[1].self_attn.q_proj.lora_A.data[0, 0] = torch.nan
    return model


def loaded(saved=None, model=None, **config):
    """Loads an adapter, its configuration changed, into a model. It fails, and leaves the model as it was."""
    model = model or small_model()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    lora.save_adapter(saved or adapted(), "adapter")
    file = Path("adapter/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    try:
        lora.load_adapter(model, "adapter")
    finally:
        assert difference(model.state_dict(), weights) == 0


def lora_pair(dropout=0.0, use_rslora=False, targets=QKV, alpha=8):
    """CLIPModel twice with the same weights: adapted by us, and by peft, with the same random A and B."""
    ours = shaken(hugging_face(OPENAI_SMALL)).eval()
    options = dict(r=4, lora_alpha=alpha, lora_dropout=dropout, use_rslora=use_rslora, target_modules=targets)
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(**options)).eval()
    lora.add_lora(ours, 4, alpha, dropout, targets, use_rslora)
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            theirs.base_model.model.get_parameter(f"{name}.default.weight").data.copy_(parameter)
    return ours, theirs, dict(pixel_values=photos(4), input_ids=captions([3, 5, 9, 16]), return_loss=True)


def our_name(name):
    """Of a parameter, without what peft adds."""
    return name.replace(".default.weight", "").replace("base_model.model.", "")


def lora_weights(model):
    return {our_name(name): p.detach() for name, p in model.named_parameters() if "lora_" in name}


# Captions and photos. 80 photos are to train on, one of them as `restval`, Karpathy's name for more of these.

NAMES = [f"{i}.jpg" for i in range(120)]
CAPTIONS = {name: [f"photo {name[:-4]} , said in way {k}" for k in range(5)] for name in NAMES}
SPLIT = {name: {0: "val", 1: "test"}.get(i % 6, "train") for i, name in enumerate(NAMES)}


def karpathy(folder):
    images = []
    for name in NAMES:
        sentences = [{"raw": caption} for caption in CAPTIONS[name]]
        split = "restval" if name == "2.jpg" else SPLIT[name]
        images.append({"filename": name, "split": split, "sentences": sentences})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))


def kaggle(folder, header=("image_name| comment_number| comment",)):
    rows = [f"{name}| {k}| {caption}" for name in NAMES for k, caption in enumerate(CAPTIONS[name])]
    rows[4] = rows[4].replace("4| ", "4   ")  # as line 2199200615.jpg of the published file
    (folder / "results.csv").write_text("\n".join([*header, *rows]))


def kaggle_without_header(folder):
    kaggle(folder, header=())


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def hub(folder):
    header = ["raw", "sentids", "split", "filename", "img_id"]
    rows = [[json.dumps(CAPTIONS[name]), "[]", SPLIT[name], name, 0] for name in NAMES]
    write_rows(folder / "flickr_annotations_30k.csv", [header, *rows])


def flickr8k(folder):
    rows = [[name, caption] for name in NAMES for caption in CAPTIONS[name]]
    write_rows(folder / "captions.txt", [["image", "caption"], *rows])


def noise_photo(path, shape, seed=0):
    """Writes a photo of noise, which it returns."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


def make_album(folder):
    """120 photos with Karpathy's captions, in `photos/images` and one folder above it."""
    for i, name in enumerate(NAMES):
        noise_photo(folder / "photos/images" / name, (60, 80), seed=i)
    karpathy(folder / "photos")


@pytest.fixture
def album():
    make_album(Path())
    return Path("photos")


def load(folder):
    splits, _ = data.load(str(folder), "train", 48, 24)
    return splits


def replace_in_captions(old, new):
    file = Path("photos/dataset_flickr30k.json")
    file.write_text(file.read_text().replace(old, new))


def prepared(path, size=224):
    """Our preprocessing of a file, (3, size, size)."""
    return data.normalize(torch.tensor(data.load_photo(path, size))[None])[0]


def processed(image):
    """Hugging Face's."""
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    return torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))


def mutated(content, rng):
    """Bytes with some of them cut out or replaced by what parsers stumble over, or only their first half."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        i = rng.randrange(len(content))
        odd = rng.choice([b"", b"\0", b'"', b"|", b",", b"\n", b"\xff\xfe", b"null", b"[]"])
        content[i : i + rng.choice([0, 1, 3, 30])] = odd
    return bytes(content[: rng.choice([None, None, len(content) // 2])])


class Hub(http.server.SimpleHTTPRequestHandler):
    """A stand-in for the hub: files of the folder `hub`, with the headers that its client wants."""

    def translate_path(self, path):
        return f"hub/{Path(path).name}"

    def end_headers(self):
        self.send_header("ETag", f'"{Path(self.path).name}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        super().end_headers()


# Runs.

TOY = "--model tiny --tokenizer train --epochs 6 --batch-size 40 --device cpu"
# clip.py with a checkpoint after every epoch.
QUICK = """
import sys
import clip, data
data.SAVE_SECONDS = 0
print("ready", flush=True)
sys.exit(clip.main(sys.argv[1:]))
"""
ONE, TWO = sys.executable, f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
WITH_PATH = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{Path(__file__).parent}"}


def run_process(line):
    """What a process that ends well has written to stdout."""
    done = subprocess.run(line.split(), env=WITH_PATH, timeout=170, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(reached, process):
    while not reached() and process.poll() is None:
        time.sleep(0.01)


def started(launch, flags, cwd="."):
    """A process that has begun clip.main; what it says goes to the files log and errors in cwd."""
    log, errors = Path(cwd, "log"), Path(cwd, "errors")
    Path(cwd, "quick.py").write_text(QUICK)
    command = f"{launch} quick.py {TOY} --data photos {flags}".split()
    with open(log, "w") as out, open(errors, "w") as err:
        # A shell's background jobs, CI's perhaps, ignore Ctrl-C, and so would their children.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=err, env=WITH_PATH, preexec_fn=heed)
    wait_until(lambda: "ready" in log.read_text(), process)
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(A folder with an album, its store and the run `old` on it, seconds that the run took)."""
    folder = tmp_path_factory.mktemp("whole")
    make_album(folder)
    process, begin = started(ONE, "--out old", folder), time.perf_counter()
    assert process.wait(timeout=100) == 0, (folder / "errors").read_text()
    return folder, time.perf_counter() - begin


@pytest.fixture
def copied(whole):
    """A copy of that folder to spoil."""
    shutil.copytree(whole[0], ".", dirs_exist_ok=True)


def hidden(folder):
    """What `data.atomic` would have left."""
    return list(Path(folder).rglob(".*"))


def assert_same_numbers(run, other):
    ours, theirs = data.load_checkpoint(run), data.load_checkpoint(other)
    for row in (*ours["history"], *theirs["history"]):
        del row["minutes"]
    assert ours["history"] == theirs["history"]
    for weights in ("trained", "last", "best"):
        assert difference(ours[weights], theirs[weights]) == 0


def assert_one_error(capsys, message):
    """Of what a command wrote to stderr, all but the progress bars is one line: `error: ` and the message."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line and not line.startswith("decoding")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], errors


def train_toy(flags):
    return clip.main(f"{TOY} --data photos {flags}".split())


FEW = {"val": 70, "test": 70, "train": 100}


def few_scenes(monkeypatch):
    """Worlds with few scenes, and a checkpoint after every epoch."""
    load_drawn = data.load_drawn
    monkeypatch.setattr(data, "load_drawn", lambda _, *rest: load_drawn(FEW, *rest))
    monkeypatch.setattr(data, "SAVE_SECONDS", 0)


def drawn_split(name, tokenizer, part="val"):
    """The split of such a world."""
    return data.make_split(*data.load_drawn(FEW, 48, name == "sketches")[part], tokenizer, 77)


def train_shapes(monkeypatch, flags=""):
    few_scenes(monkeypatch)
    return clip.main(f"--data shapes --batch-size 25 --epochs 3 --device cpu {flags}".split())


def finetune_sketches(flags):
    given = "--base runs/shapes --data sketches --batch-size 25 --epochs 2 --device cpu"
    return finetune.main(f"{given} {flags}".split())


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The folder of a small model of `shapes`, and of the study that adapts it to `sketches`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("studied"))
        assert train_shapes(monkeypatch) == 0
        assert finetune_sketches("--r 4 16 --full") == 0
        return Path.cwd()


@pytest.fixture
def study_folder(studied, monkeypatch):
    monkeypatch.chdir(studied)
    few_scenes(monkeypatch)
    return studied / "runs/shapes-sketches"


def study_rows(folder):
    with open(folder / "study.csv") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def small_model_of(split):
    """A model for the crops and the captions of a split of `load`."""
    end = split.ids.max().item()
    return CLIP(
        replace(SMALL, image_size=32, vocab_size=end + 1, eos_token_id=end, max_position_embeddings=24)
    )


def spoil(monkeypatch, module, name, number, spoilt):
    """From its call `number` on a function of a module is `spoilt`, which gets the function first."""
    function, calls = getattr(module, name), []

    def counted(*arguments, **named):
        calls.append(1)
        return (
            spoilt(function, *arguments, **named) if len(calls) >= number else function(*arguments, **named)
        )

    monkeypatch.setattr(module, name, counted)


def interrupt(*_):
    raise KeyboardInterrupt


class Trap:
    """An object whose pickle runs code: it makes the file `ran` where it is opened without care."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def median_seconds(function, warmup=8, runs=20):
    """Of a call function(i), till the GPU is done."""
    times = []
    for i in range(warmup + runs):
        start = time.perf_counter()
        function(i)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def whole_step(B, r, dropout, config, device):
    """A model and its training step, from uint8 photos through crops, towers and loss to AdamW, on photos of
    noise with captions as long as Flickr8k's; r > 0 adapts it by LoRA."""
    side = config.image_size * 8 // 7
    photos = torch.randint(256, (4 * B, side, side, 3), dtype=torch.uint8)
    lengths = (14.1 + 4.4 * torch.randn(4 * B)).round().long().clamp(6, 42)
    ids = torch.randint(config.eos_token_id, (4 * B, 77), dtype=torch.int32)
    ids[torch.arange(77) >= lengths[:, None] - 1] = config.eos_token_id
    split = data.Split(photos, [""] * 4 * B, [""] * 4 * B, torch.arange(4 * B), ids, lengths)
    split.place(device)
    model = CLIP(config).to(device).train()
    finetune.insert(model, finetune.LoRARecipe(r=r, alpha=2.0 * r, dropout=dropout))
    recipe = replace(PLAIN, batch_size=B, muon=0)
    optimizers = clip.make_optimizers(model, recipe)

    def step(i):
        pairs = (torch.arange(B) + i % 4 * B).repeat(2, 1).T
        clip.train_step(model, optimizers, NO_SCALER, split, pairs, recipe, i, 1000)

    return model, step


# --- The model -------------------------------------------------------------------------------------------

sizes = [pytest.param(OPENAI_SMALL, id="quick_gelu"), pytest.param(GELU_SMALL, id="gelu")]
all_sizes = [*sizes, pytest.param(OPENAI_B_16, id="ViT-B/16", marks=slow)]


@pytest.mark.parametrize("config", sizes)
def test_every_hidden_state_and_the_gradient_of_every_parameter_equal_hugging_faces(config):
    ours, theirs, inputs, their_inputs = both_models(config)
    found, expected = keep_outputs(ours), keep_outputs(theirs)
    contrastive_loss(ours(*inputs)).backward()
    theirs(**their_inputs).loss.backward()
    # What stands in padding is never read. It differs: they mask padding that we leave to causality. And from
    # the last query on we have the class token and the end token alone.
    real, rows = their_inputs["attention_mask"].bool(), torch.arange(len(inputs[1]))
    for name in found:
        text = name.startswith("text_model")
        if found[name].shape != expected[name].shape:
            place = real.sum(dim=1) - 1 if text else 0
            found[name], expected[name] = found[name].flatten(0, -2), expected[name][rows, place]
        elif text and found[name].ndim == 3:
            found[name], expected[name] = found[name][real], expected[name][real]
    assert len(found) == 11 * 5 + 7  # 11 modules in each of the 5 blocks, and 7 around them
    assert difference(found, expected) < 1e-5

    found, expected = gradients(ours), gradients(theirs)
    assert len(found) == len(list(ours.parameters()))
    for name, gradient in found.items():
        # A key's bias adds the same to a whole row of the softmax: its gradient is 0.
        assert gradient.abs().max() > 1e-3 or "k_proj.bias" in name
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("config", all_sizes)
@torch.no_grad()
def test_embeddings_logits_and_loss_equal_hugging_faces(config):
    ours, theirs, (pixels, ids), their_inputs = both_models(config)
    logits, output = ours(pixels, ids), theirs(**their_inputs)
    found = {"image": ours.encode_image(pixels), "text": ours.encode_text(ids)}
    found |= {"per image": logits, "per text": logits.T, "loss": contrastive_loss(logits)}
    expected = {"image": output.image_embeds, "text": output.text_embeds, "loss": output.loss}
    expected |= {"per image": output.logits_per_image, "per text": output.logits_per_text}
    assert difference(found, expected) < 1e-5


def test_a_bert_tower_is_hugging_faces_without_a_mask_on_each_caption_alone():
    ours, theirs, (_, ids), their_inputs = both_models(replace(SMALL, causal=False))
    expected = []
    for row, real in zip(ids, their_inputs["attention_mask"].bool()):
        x = theirs.text_model.embeddings(row[real][None])
        x = theirs.text_model.encoder(inputs_embeds=x).last_hidden_state
        expected.append(theirs.text_model.final_layer_norm(x)[0, -1])
    assert difference(ours.text_model(ids), torch.stack(expected)) < 1e-5


def test_vit_b_16_has_the_149_620_737_parameters_of_the_released_model_under_their_names():
    with torch.device("meta"):
        model, theirs = CLIP(PRESETS["ViT-B/16"]), hugging_face(OPENAI_B_16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 149_620_737
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    assert shapes == {name: x.shape for name, x in theirs.state_dict().items()}


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_softmax_formula(masked):
    attention, x = shaken(clip.Attention(TowerConfig(12, 1, 3, 24))), torch.randn(2, 5, 12)
    mask = (torch.rand(5, 5) < 0.6) | torch.eye(5, dtype=torch.bool)
    q = x @ attention.q_proj.weight.T + attention.q_proj.bias
    k = x @ attention.k_proj.weight.T + attention.k_proj.bias
    v = x @ attention.v_proj.weight.T + attention.v_proj.bias
    heads = []
    for D in (slice(0, 4), slice(4, 8), slice(8, 12)):
        odds = (torch.einsum("bid,bjd->bij", q[..., D], k[..., D]) / 4**0.5).exp() * (mask if masked else 1)
        heads.append(torch.einsum("bij,bjd->bid", odds / odds.sum(-1, keepdim=True), v[..., D]))
    expected = torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias
    assert difference(attention(x, x, mask if masked else None), expected) < 1e-6
    some = [0, 3]  # ask alone
    assert difference(attention(x[:, some], x, mask[some] if masked else None), expected[:, some]) < 1e-6


def test_under_autocast_blocks_hand_on_bf16_and_embeddings_and_logits_are_fp32(monkeypatch):
    layer_norm = F.layer_norm

    def layer_norm_of_cuda(x, shape, weight, bias, eps):  # under autocast in fp32
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = x.float(), weight.float(), bias.float()
        return layer_norm(x, shape, weight, bias, eps)

    monkeypatch.setattr(F, "layer_norm", layer_norm_of_cuda)
    model = small_model()
    outputs = keep_outputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        embeds = model.encode_image(photos(2)), model.encode_text(captions([4, 9], 12))
        logits = model.similarity(*embeds)
    assert [x.dtype for name, x in outputs.items() if ".layers." in name] == [torch.bfloat16] * 55
    for x in embeds:  # unit vectors
        assert x.shape == (2, 24) and x.dtype == torch.float32
        assert difference(x.square().sum(-1), torch.ones(2)) < 1e-6
    assert difference(logits, model.logit_scale.exp() * embeds[0] @ embeds[1].T) == 0


# --- The loss and recall ---------------------------------------------------------------------------------


def test_the_loss_is_the_mean_of_both_cross_entropies_in_fp32_and_ln_b_at_chance():
    logits = 5 * torch.randn(7, 7, dtype=torch.float64)
    total = 0
    for i in range(7):
        total += math.log(sum(math.exp(logits[i, j]) for j in range(7))) - logits[i, i]
        total += math.log(sum(math.exp(logits[j, i]) for j in range(7))) - logits[i, i]
    assert difference(contrastive_loss(logits), total / 14) < 1e-6
    assert contrastive_loss(logits.bfloat16()).dtype == torch.float32
    assert contrastive_loss(100 * torch.eye(128)) < 1e-6
    assert contrastive_loss(torch.ones(128, 128)).item() == pytest.approx(4.8520303)


def test_the_gradient_of_the_loss_is_softmax_minus_identity():
    logits = (5 * torch.randn(7, 7)).requires_grad_()
    contrastive_loss(logits).backward()
    odds = logits.detach().exp()
    softmaxes = odds / odds.sum(1, keepdim=True) + odds / odds.sum(0, keepdim=True)
    assert difference(logits.grad, softmaxes / 14 - torch.eye(7) / 7) < 1e-6


def recall_of(similarity, owner, **options):
    """recall_at_k for embeddings that have these similarities."""
    return recall_at_k(similarity, torch.eye(similarity.shape[1]), owner, **options)


def test_recall_worked_out_by_hand():
    first = [0.9, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5]
    second = [0.8, 0.2, 0.2, 0.2, 0.2, 0.6, 0.0, 0.0, 0.0, 0.0]
    found = recall_of(torch.tensor([first, second]), torch.tensor([0] * 5 + [1] * 5), ks=(1, 2))
    # Captions 0 and 5 find their photo. Photo 0 finds its caption 0, and so does photo 1, before its own 5.
    assert found == recall({1: 0.2, 2: 1}, {1: 0.5, 2: 1})


FIVE_EACH = torch.arange(40).repeat_interleave(5)
UNEVEN = torch.cat([torch.arange(40), torch.arange(60) ** 2 % 40])  # 1 to 13 each, in no order


@pytest.mark.parametrize("size", [2**26, 300, 1])  # all similarities, some rows or one row at once
@pytest.mark.parametrize("owner", [FIVE_EACH, UNEVEN], ids=["five captions each", "uneven"])
def test_recall_is_that_by_sorting_however_many_similarities_are_held_at_once(owner, size):
    images, noise = torch.randn(40, 24), torch.randn(len(owner), 24)
    texts = images[owner] + 2 * noise
    similarity = images @ texts.T
    best_photos, best_captions = (similarity.argsort(dim, descending=True) for dim in (0, 1))
    t2i, i2t = {}, {}
    for k in (1, 5, 10):
        t2i[k] = np.mean([own in best_photos[:k, c] for c, own in enumerate(owner)])
        i2t[k] = np.mean([photo in owner[best_captions[photo, :k]] for photo in range(40)])
    assert 0.1 < t2i[1] < t2i[5] < 1
    assert recall_at_k(images, texts, owner, size=size) == recall(t2i, i2t)


def test_a_tie_or_a_nan_counts_as_a_miss_and_a_constant_scores_nothing():
    similarity = (torch.arange(40)[:, None] == FIVE_EACH).float()
    similarity[0, 5] = 1  # photo 0 with the first caption of photo 1: one query each way
    assert recall_of(similarity, FIVE_EACH, ks=(1, 2)) == recall({1: 199 / 200, 2: 1}, {1: 39 / 40, 2: 1})
    nothing = {1: 0, 5: 0, 10: 0}
    for value in (1.0, torch.nan):
        alike = torch.full((40, 3), value), torch.full((200, 3), value)
        assert recall_at_k(*alike, FIVE_EACH) == recall(nothing, nothing)

    # A caption of NaN finds nothing, is before all others for every photo, and takes all from its own.
    texts = torch.eye(40)[FIVE_EACH]
    texts[5] = torch.nan
    found = recall_at_k(torch.eye(40), texts, FIVE_EACH, ks=(1, 2))
    assert found == recall({1: 199 / 200, 2: 199 / 200}, {1: 0, 2: 39 / 40})


E = torch.zeros(6, 24)
OTHERS = E[:, None], E[:4, None]
BAD_TENSORS = {
    # What PyTorch would take is refused by name;
    "logits that are not square": (lambda m: contrastive_loss(E), ValueError, r"logits_per_image is \(6, 24"),
    "captions of others": (lambda m: clip.multiview_loss(m, *OTHERS), ValueError, r"is \(6, 4\)"),
    "owners of others": (lambda m: recall_at_k(E, E, torch.zeros(1).int()), ValueError, "1 entries for 6"),
    "an owner below 0": (lambda m: recall_at_k(E, E, torch.full((6,), -1)), ValueError, "outside the 6"),
    # the rest by PyTorch.
    "other sizes": (lambda m: m.encode_image(torch.zeros(2, 3, 48, 48)), RuntimeError, "size"),
    "ids as floats": (lambda m: m.encode_text(captions([3]).float()), RuntimeError, ""),
    "too many tokens": (lambda m: m.encode_text(captions([3], 17)), RuntimeError, ""),
}


@pytest.mark.parametrize("call, error, message", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_wrong_tensor_is_an_error(call, error, message):
    with pytest.raises(error, match=message or None):
        call(small_model())


# --- Starting values -------------------------------------------------------------------------------------


def test_every_parameter_starts_at_the_scale_of_openai_and_the_logits_at_14_29_not_1_07():
    std = {
        "visual_projection.weight": 48**-0.5,
        "text_projection.weight": 32**-0.5,
        "vision_model.embeddings.class_embedding": 48**-0.5,
        "vision_model.embeddings.patch_embedding.weight": (3 * 8 * 8 * 48) ** -0.5,
        "text_model.embeddings.token_embedding.weight": 0.02,
    }
    for tower, C, L in (("vision_model", 48, 3), ("text_model", 32, 2)):
        for block in (f"{tower}.encoder.layers.{i}" for i in range(L)):
            std |= {f"{block}.self_attn.{name}.weight": C**-0.5 for name in QKV}
            std[f"{block}.self_attn.out_proj.weight"] = (C * 2 * L) ** -0.5
            std[f"{block}.mlp.fc1.weight"] = (2 * C) ** -0.5
            std[f"{block}.mlp.fc2.weight"] = (C * 2 * L) ** -0.5
    model = CLIP(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # norms are PyTorch's
                parameter.fill_(torch.nan)
    clip.init_weights(model)
    assert difference(model.logit_scale, torch.tensor(2.6593)) < 1e-4
    for name, parameter in model.named_parameters():
        if name in std:
            # Four standard errors of a standard deviation and of a mean.
            assert abs(parameter.std() / std[name] - 1) < 4 / math.sqrt(2 * parameter.numel()), name
            assert abs(parameter.mean() / std[name]) < 4 / math.sqrt(parameter.numel()), name
        elif name != "logit_scale" and "position" not in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_tokens_start_by_looking_at_their_like_and_taking_their_mean_away():
    model = CLIP(SMALL)
    for tower, L in ((model.vision_model, 3), (model.text_model, 2)):
        for block in tower.encoder.layers:
            attention = block.self_attn
            assert difference(attention.q_proj.weight, attention.k_proj.weight) == 0
            expected = -attention.v_proj.weight.T * (2 * L) ** -0.5
            assert difference(attention.out_proj.weight, expected) < 1e-6


def test_positions_start_as_sines_of_their_row_and_column():
    model = CLIP(SMALL)
    vision, text = (
        tower.embeddings.position_embedding.weight for tower in (model.vision_model, model.text_model)
    )
    assert (vision[0] == 0).all()
    assert vision[1:].std().item() == pytest.approx(48**-0.5) and text.std().item() == pytest.approx(0.01)

    def written_out(place, width):
        angles = [place * 10_000 ** (-i / (width // 2 - 1)) for i in range(width // 2)]
        return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]

    grid = torch.tensor([written_out(i // 5, 24) + written_out(i % 5, 24) for i in range(25)])
    line = torch.tensor([written_out(i, 32) for i in range(16)])
    for positions, expected in ((vision[1:], grid), (text, line)):
        assert difference(positions / positions.std(), expected / expected.std()) < 1e-5


# --- Padding and the end token ---------------------------------------------------------------------------

both_text_towers = pytest.mark.parametrize("causal", [False, True], ids=["bert", "causal"])


@both_text_towers
def test_a_caption_is_read_at_its_first_end_token_and_nothing_after_it_matters(causal):
    model, lengths = small_model(causal=causal), [3, 6, 16]
    ids = captions(lengths)
    pooled = model.text_model(ids)
    assert difference(pooled, words_of(model, ids)[[0, 1, 2], [2, 5, 15]]) < 1e-6
    alone = torch.cat([model.text_model(ids[i : i + 1, :length]) for i, length in enumerate(lengths)])
    assert difference(pooled, alone) < 1e-5
    garbage = ids.where(before(lengths, 16), torch.randint(100, (3, 16)))
    assert difference(pooled, model.text_model(garbage)) == 0


@both_text_towers
def test_every_word_matters_to_all_others_but_in_a_causal_tower_not_to_those_before_it(causal):
    model, ids = small_model(causal=causal), captions([9])
    words = words_of(model, ids)
    for place in range(8):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 1) % SMALL.eos_token_id
        gaps = (words_of(model, changed) - words).abs().amax(dim=2)[0, :9]
        assert (gaps[place:] > 1e-2).all()
        assert (gaps[:place] == 0).all() if causal else (gaps[:place] > 1e-2).all()


# --- Dropping patches and words --------------------------------------------------------------------------


def test_patch_dropout_shows_half_of_the_patches_in_training_and_all_in_evaluation():
    model, pixels = small_model(), photos(3)
    embeddings = model.vision_model.embeddings
    whole, embeddings.patch_dropout = embeddings(pixels), 0.5
    assert torch.equal(embeddings.eval()(pixels), whole)
    half = embeddings.train()(pixels)
    assert half.shape == (3, 1 + 12, 48)  # of 25 patches
    assert torch.equal(half[:, 0], whole[:, 0])
    chosen = set()
    for photo in range(3):  # each once, where it stood in the photo
        places = (half[photo, 1:, None] == whole[photo, None, 1:]).all(dim=-1).nonzero()
        assert len(places) == 12 and len(places[:, 1].unique()) == 12
        chosen.add(tuple(places[:, 1].sort().values.tolist()))
    assert len(chosen) == 3  # other ones in each photo


WORDS = replace(SMALL, vocab_size=5000, eos_token_id=60)


def vary(lengths, **shares):
    """Captions of these lengths, with both markers, of words that are all different; and what a recipe with
    these shares makes of them."""
    ids = captions(lengths, width=24, config=WORDS)
    ids[:, 0] = 61
    for row, length in zip(ids, lengths):
        row[1 : length - 1] = 100 + torch.arange(length - 2)
    return ids, data.vary_captions(ids, WORDS, replace(PLAIN, **shares))


def words_in(row):
    return row[1 : (row == 60).nonzero()[0, 0]].tolist()


def test_captions_stay_as_they_are_without_shares():
    ids, varied = vary([2, 3, 12, 24] * 5)
    assert torch.equal(ids, varied)


def test_replaced_words_are_a_share_and_any_others_but_the_end():
    ids, varied = vary([12] * 400, replace_words=0.3)
    assert torch.equal(ids[:, 0], varied[:, 0]) and torch.equal(ids[:, 11:], varied[:, 11:])
    changed = ids[:, 1:11] != varied[:, 1:11]
    assert 0.27 < changed.float().mean() < 0.33
    assert len(varied[:, 1:11][changed].unique()) > 900  # of 4,000 words, about 1,200
    assert not (varied[:, 1:11] == 60).any()


@pytest.mark.parametrize(
    "shares, kept",
    [({"delete_words": 0.2}, 0.8), ({"delete_spans": 1.0}, 0.65), ({"delete_spans": 0.4}, 0.86)],
)
def test_deleted_words_are_a_share_and_the_others_move_up_in_order(shares, kept):
    ids, varied = vary([22] * 400, **shares)
    found, gaps = [words_in(row) for row in varied], 0
    for row, words in zip(varied, found):
        assert words == sorted(words) and (row[1 + len(words) :] == 60).all()
        gaps += sum(b - a > 1 for a, b in zip(words, words[1:]))
    assert sum(map(len, found)) / 8000 == pytest.approx(kept, abs=0.03)
    assert gaps > 1000 if "delete_words" in shares else gaps <= 400  # words here and there, or in a row


def test_a_caption_never_loses_all_its_words():
    ids, varied = vary([3, 4, 5] * 100, delete_words=0.95, delete_spans=1.0)
    assert all(words_in(row) for row in varied)
    ids, varied = vary([2, 2], delete_words=0.5, swap_halves=1.0, replace_words=0.5)  # there is none to lose
    assert torch.equal(ids, varied)


def test_swapped_halves_are_those_on_both_sides_of_a_random_word():
    ids, varied = vary([12] * 400, swap_halves=0.3)
    turns = []
    for row in varied:
        first = words_in(row)[0] - 100
        assert words_in(row) == [100 + (first + i) % 10 for i in range(10)]
        turns.append(first)
    assert set(turns) == set(range(10))
    assert sum(turn > 0 for turn in turns) == pytest.approx(400 * 0.3 * 0.9, abs=35)  # one cut in ten is none


# --- Many pairs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops, sentences", [(1, 1), (2, 3), (3, 1)])
def test_all_crops_and_captions_of_a_photo_are_positives_of_each_other(crops, sentences):
    model = small_model()
    images = F.normalize(torch.randn(7, crops, 24), dim=-1)
    texts = F.normalize(torch.randn(7, sentences, 24), dim=-1)

    def written_out(a, b):
        odds = (model.logit_scale.exp() * torch.einsum("ie,je->ij", a, b)).exp()
        return -((odds.diag() / odds.sum(0)).log().mean() + (odds.diag() / odds.sum(1)).log().mean()) / 2

    first = 0
    for v in range(crops):
        for k in range(sentences):
            first = first + written_out(images[:, v], texts[:, k]) / (crops * sentences)
    expected = first
    for x, count in ((images, crops), (texts, sentences)):
        pairs = [(i, j) for j in range(count) for i in range(j)]
        for i, j in pairs:
            expected = expected + written_out(x[:, i], x[:, j]) / len(pairs)
    loss, cross = clip.multiview_loss(model, images, texts)
    assert difference(loss, expected) < 1e-5
    assert difference(cross, first) < 1e-5


@pytest.mark.parametrize("crops, sentences", [(1, 1), (2, 3)])
@pytest.mark.parametrize("micro_batch", [1, 4, 5, 12])
def test_micro_batches_leave_the_gradient_of_the_whole_batch(micro_batch, crops, sentences):
    model, (pixels, ids) = small_model(), views(crops, sentences)
    loss, cross = clip.multiview_loss(model, *encode_views(model, pixels, ids))
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    assert difference(backward_of(model, pixels, ids, micro_batch), cross) < 1e-6
    assert difference(gradients(model), expected) < 1e-5


@pytest.mark.parametrize("micro_batch", [4, 12])
@pytest.mark.parametrize("target", ["text_projection", "visual_projection"])
def test_adapters_in_one_tower_alone_train(target, micro_batch):
    model, (pixels, ids) = shaken(adapted(targets=[target])), views()
    contrastive_loss(model(pixels[:, 0], ids[:, 0])).backward()
    expected = gradients(model)
    model.zero_grad()
    backward_of(model, pixels, ids, micro_batch)
    assert len(expected) == 2
    assert difference(gradients(model), expected) < 1e-5


# --- Released weights ------------------------------------------------------------------------------------

SIZES = {
    "patch 20": dict(patch_size=20),
    "legacy end token": dict(vocab_size=514, eos_token_id=513),
    "wider": dict(vision=TowerConfig(96, 4, 6, 192), projection_dim=40, image_size=56, patch_size=14),
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_released_weights_give_the_logits_that_transformers_gives(changes):
    config = replace(OPENAI_SMALL, **changes)
    theirs, inputs = released_folder("base", config)
    if "eos_token_id" in changes:
        reconfigure(eos_token_id=2)  # what OpenAI's released ones say
        theirs = transformers.CLIPModel.from_pretrained("base")
    ours = finetune.from_pretrained("base")
    assert ours.config == config and not ours.training
    assert difference(ours(*inputs), their_logits(theirs, *inputs)) < 1e-5


def test_openais_released_weights_give_the_logits_that_transformers_gives():
    name = "openai/clip-vit-base-patch16"
    try:
        theirs = transformers.CLIPModel.from_pretrained(name, local_files_only=True).eval()
    except OSError:
        pytest.skip(f"{name} is not in the hub's cache here")
    ours, inputs = finetune.from_pretrained(name), (photos(2, OPENAI_B_16), captions([5, 9], 16, OPENAI_B_16))
    assert difference(ours(*inputs), their_logits(theirs, *inputs)) < 1e-4


def test_what_we_save_transformers_opens_and_gives_the_same_logits():
    tokenizer = data.train_tokenizer(["dogs"])  # which knows it as one word
    config = replace(OPENAI_SMALL, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    theirs, inputs = released_folder("base", config)
    tokenizer.save_pretrained("base")
    finetune.save_pretrained(finetune.from_pretrained("base"), "ours")
    again = transformers.CLIPModel.from_pretrained("ours").eval()
    assert difference(their_logits(again, *inputs), their_logits(theirs, *inputs)) < 1e-5
    assert finetune.from_pretrained("ours").config == config

    image, processor = (
        noise_photo(Path("a.png"), (60, 90)),
        transformers.CLIPProcessor.from_pretrained("ours"),
    )
    batch = processor(text=["dogs"], images=image, return_tensors="pt")
    assert batch["input_ids"].tolist() == data.tokenize(tokenizer, ["dogs"], 3).tolist()
    assert difference(batch["pixel_values"][0], prepared("a.png", 40)) < 1e-5


@torch.no_grad()
def test_a_merged_model_is_saved_for_transformers_as_the_adapted_one():
    model, inputs = shaken(CLIP(SPELLING)).eval(), (photos(4), captions([2, 5, 9, 16], 16, SPELLING))
    lora.add_lora(model, r=4, alpha=8)
    expected = shaken(model)(*inputs)
    lora.merge(model)
    finetune.save_pretrained(model, "merged", data.train_tokenizer(["a"]))
    theirs = transformers.CLIPModel.from_pretrained("merged").eval()
    assert difference(their_logits(theirs, *inputs), expected) < 1e-5


NAN = {"logit_scale": torch.tensor(torch.nan)}
BAD_FOLDERS = {
    "another norm": (lambda: reconfigure(layer_norm_eps=0.1), "has a norm that"),
    "another activation": (lambda: reconfigure(hidden_act="gelu"), "an activation that"),
    "a tensor missing": (lambda: replace_tensor("visual_projection.weight", {}), "not one whole CLIP"),
    "an adapter beside it": (lambda: lora.save_adapter(adapted(), "base"), "not one whole CLIP|no CLIP in"),
    "a NaN": (lambda: replace_tensor("logit_scale", NAN), "holds NaN or infinity"),
    "cut short": (lambda: os.truncate("base/model.safetensors", 5000), "no CLIP in"),
}


@pytest.mark.parametrize("change, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_folder_that_is_not_one_whole_clip_that_ours_can_express_is_refused(change, message):
    released_folder("base", OPENAI_SMALL)
    change()
    with pytest.raises(data.InputError, match=message) as error:
        finetune.from_pretrained("base")
    assert len(str(error.value).splitlines()) == 1


BAD_EXPORTS = {
    "a BERT tower": (lambda: small_model(causal=False), "no BERT-style text tower"),
    "adapters unmerged": (lambda: adapted(causal=True), "not merged"),
    "no tokenizer": (lambda: small_model(causal=True), "came with no tokenizer"),
}


@pytest.mark.parametrize("make, message", BAD_EXPORTS.values(), ids=BAD_EXPORTS)
def test_what_transformers_could_not_open_is_not_saved(make, message):
    with pytest.raises(data.InputError, match=message):
        finetune.save_pretrained(make(), "out")
    assert not Path("out").exists()


# --- LoRA ------------------------------------------------------------------------------------------------

# Scaled before B or after it is the same but for rounding, which a power of two does not need.
scales = pytest.mark.parametrize(
    "scale, rounding",
    [(dict(alpha=8), 0), (dict(alpha=5), 1e-5), (dict(use_rslora=True), 0)],
    ids=["2", "1.25", "rsLoRA, 4"],
)


@scales
def test_lora_outputs_gradients_and_twenty_steps_of_adamw_equal_pefts(scale, rounding):
    ours, theirs, inputs = lora_pair(**scale)
    start = {name: weight.clone() for name, weight in lora_weights(ours).items()}
    a, b = ours(**inputs), theirs(**inputs)
    assert difference(a.logits_per_image, b.logits_per_image) <= rounding
    a.loss.backward()
    b.loss.backward()
    expected = {our_name(name): gradient for name, gradient in gradients(theirs).items()}
    assert len(expected) == 2 * 3 * 5
    assert difference(gradients(ours), expected) <= rounding
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    assert difference(lora_weights(ours), start) > 1e-2
    assert difference(lora_weights(ours), lora_weights(theirs)) <= 10 * rounding


def test_lora_dropout_is_pefts():
    ours, theirs, inputs = lora_pair(dropout=0.3)
    losses = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        losses.append(model(**inputs).loss)
    assert difference(*losses) < 1e-6
    assert difference(losses[0], ours.eval()(**inputs).loss) > 1e-3


@torch.no_grad()
def test_merged_equals_unmerged_and_pefts_merge_and_unload():
    ours, theirs, inputs = lora_pair()
    base = {name: p.clone() for name, p in ours.state_dict().items()}
    unmerged = ours(**inputs).logits_per_image
    lora.merge(ours)
    assert difference(ours(**inputs).logits_per_image, unmerged) < 1e-5
    assert difference(theirs.merge_and_unload()(**inputs).logits_per_image, unmerged) < 1e-5
    assert difference(ours.state_dict(), base) > 1e-2
    lora.unmerge(ours)
    assert difference(ours.state_dict(), base) < 1e-6
    assert difference(ours(**inputs).logits_per_image, unmerged) < 1e-5


@torch.no_grad()
def test_merging_into_a_bf16_base_does_not_round_the_adapter():
    layer = lora.LoRALinear(torch.nn.Linear(20, 30), 4, 8)
    layer.weight.data = layer.weight.data.bfloat16()
    torch.nn.init.normal_(layer.lora_B, std=1e-4)
    base, delta = layer.weight.clone(), 2 * layer.lora_B @ layer.lora_A
    lora.merge(layer)
    assert difference(layer.weight, base + delta) < 1e-8 and layer.weight.dtype == torch.float32


TWO_MODULES = ["text_projection", "vision_model.encoder.layers.1.mlp.fc1"]


@pytest.mark.parametrize("targets, saved", [(QKV, sorted(QKV)), (TWO_MODULES, TWO_MODULES)])
@torch.no_grad()
def test_an_adapter_saved_here_opens_in_peft_and_gives_the_same_logits(targets, saved):
    ours, _, inputs = lora_pair(targets=targets)
    lora.save_adapter(ours, "ours", "somebody/clip")
    config = json.loads(Path("ours/adapter_config.json").read_text())
    assert (config["target_modules"], config["base_model_name_or_path"]) == (saved, "somebody/clip")
    assert len(list(Path("ours").iterdir())) == 2

    plain = hugging_face(OPENAI_SMALL).eval()
    plain.load_state_dict({name: p for name, p in ours.state_dict().items() if "lora_" not in name})
    base = plain(**inputs).logits_per_image
    theirs = peft.PeftModel.from_pretrained(plain, "ours").eval()
    assert len(lora_weights(theirs)) == len(lora_weights(ours))
    assert difference(theirs(**inputs).logits_per_image, ours(**inputs).logits_per_image) < 1e-6
    assert difference(base, ours(**inputs).logits_per_image) > 1e-3


@scales
@torch.no_grad()
def test_an_adapter_saved_by_peft_opens_here_in_our_clip_too(scale, rounding):
    _, theirs, inputs = lora_pair(**scale)
    theirs.save_pretrained("theirs")
    expected = theirs(**inputs).logits_per_image
    plain, ours = theirs.unload(), CLIP(OPENAI_SMALL).eval()
    ours.load_state_dict(plain.state_dict())
    assert difference(ours(inputs["pixel_values"], inputs["input_ids"]), expected) > 1e-3
    for model in (plain, ours):
        lora.load_adapter(model, "theirs")
    assert difference(plain(**inputs).logits_per_image, expected) <= rounding
    assert difference(ours(inputs["pixel_values"], inputs["input_ids"]), expected) < 1e-5


def test_a_recipe_makes_its_adapters_and_trains_379_percent_at_r_64():
    for r, trainable, percent in ((64, 5_898_240, 3.79), (8, 737_280, 0.49)):
        with torch.device("meta"):
            model = CLIP(OPENAI_B_16)
            finetune.insert(model, finetune.LoRARecipe(r=r, alpha=3.0 * r, dropout=0.2))
        layers = lora.adapters(model).values()
        assert len(layers) == 72
        assert all((layer.r, layer.alpha, layer.dropout.p) == (r, 3.0 * r, 0.2) for layer in layers)
        found, everything = lora.trainable_parameters(model)
        assert (found, everything) == (trainable, 149_620_737 + trainable)
        assert round(100 * found / everything, 2) == percent


def test_a_new_adapter_changes_nothing_exactly_and_drops_out_only_in_training():
    model, inputs = small_model().eval(), (photos(3), captions([3, 5, 9]))
    expected = model(*inputs)
    lora.add_lora(model, 4, 8, 0.5, [*QKV, "out_proj", "fc1", "fc2", "text_projection"])
    assert not any(module.training for module in model.modules())
    assert difference(model.train()(*inputs), expected) == 0
    assert difference(shaken(model)(*inputs), model(*inputs)) > 1e-3


def test_a_starts_uniform_within_one_over_sqrt_in_and_b_at_zero():
    layer = lora.LoRALinear(torch.nn.Linear(300, 50), 64, 128)
    assert layer.lora_A.shape == (64, 300) and layer.lora_B.shape == (50, 64)
    assert 0.99 < layer.lora_A.abs().max() * 300**0.5 <= 1
    assert abs(layer.lora_A.std() * 900**0.5 - 1) < 0.02  # of a uniform one: its bound over sqrt(3)
    assert (layer.lora_B == 0).all()


def test_strength_leads_from_the_base_to_the_adapted_model():
    model, x = lora.LoRALinear(torch.nn.Linear(7, 5), 2, 6), torch.randn(3, 7)
    torch.nn.init.normal_(model.lora_B)
    base = F.linear(x, model.weight, model.bias)
    for strength in (0.0, 0.5, 1.5):
        lora.set_strength(model, strength)
        assert difference(model(x), base + strength * 3 * x @ model.lora_A.T @ model.lora_B.T) < 1e-5


HIDDEN = torch.nn.MultiheadAttention(8, 2)  # its out_proj is a Linear that isn't called
BAD_LORA = {
    "r = 0": (lambda: adapted(r=0), "r is 0"),
    "dropout = 1": (lambda: adapted(dropout=1.0), "dropout 1.0"),
    "alpha as text": (lambda: adapted(alpha="8"), "alpha is '8'"),
    "half a name": (lambda: adapted(targets=["proj"]), "no plain Linear of the model is called 'proj'"),
    "a hidden Linear": (lambda: lora.add_lora(HIDDEN, 2, 4, targets=["out_proj"]), "no plain Linear"),
    "no targets": (lambda: adapted(targets=[]), "no targets"),
    "adapters twice": (lambda: lora.add_lora(adapted(), 4, 8), "has adapters already"),
    "merge twice": (lambda: lora.merge(merged()), "merged already"),
    "merge without adapters": (lambda: lora.merge(small_model()), "has no adapters"),
    "merge NaN": (lambda: lora.merge(poisoned()), "NaN or infinity"),
    "unmerge unmerged": (lambda: lora.unmerge(adapted()), "not merged"),
    "strength while merged": (lambda: lora.set_strength(merged(), 0.5), "are merged"),
    "an infinite strength": (lambda: lora.set_strength(adapted(), torch.inf), "strength is inf"),
    "load NaN": (lambda: loaded(saved=poisoned()), "infinity in vision_model.encoder.layers.1"),
    "load another shape": (lambda: loaded(r=3), "doesn't fit"),
    "load twice": (lambda: loaded(model=adapted()), "has adapters already"),
    "load PiSSA": (lambda: loaded(init_lora_weights="pissa"), "init_lora_weights is pissa"),
    "load DoRA": (lambda: loaded(use_dora=True), "its use_dora is True"),
    "load alpha as a word": (lambda: loaded(lora_alpha="big"), "can be read: its lora_alpha is big"),
    "load no alpha": (lambda: loaded(lora_alpha=None), "can be read: its lora_alpha is None"),
    "load a broken pattern": (lambda: loaded(rank_pattern={"(": 2}), "its rank_pattern is {'(': 2}"),
    "load a file": (lambda: lora.load_adapter(small_model(), __file__), "is a file: give the folder"),
    "save onto a file": (lambda: lora.save_adapter(adapted(), __file__), "is a file: an adapter is a folder"),
}


@pytest.mark.parametrize("call, message", BAD_LORA.values(), ids=BAD_LORA)
def test_bad_adapters_are_one_clear_error(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


# --- Captions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [karpathy, kaggle, kaggle_without_header, hub, flickr8k])
def test_every_form_of_flickr_gives_the_same_captions_and_published_splits_win(write):
    write(Path())
    if write in (karpathy, hub):  # beside a file without splits
        kaggle(Path())
    _, found = data.read_captions(".")
    assert {name: sentences for name, (_, sentences) in found.items()} == CAPTIONS
    if write in (karpathy, hub):
        assert {name: split for name, (split, _) in found.items()} == SPLIT


def test_of_karpathys_three_files_the_one_that_fits_most_photos_is_read(capsys):
    make_album(Path())
    folder = Path("photos")
    described = json.loads((folder / "dataset_flickr30k.json").read_text())
    fewer = {"images": described["images"][:40]}  # Flickr30k has the photos of Flickr8k too
    (folder / "dataset_flickr8k.json").write_text(json.dumps(fewer))
    others = [image | {"filename": f"COCO_{i}.jpg"} for i, image in enumerate(described["images"])]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": others}))
    assert data.read_captions(folder)[0].name == "dataset_flickr30k.json"
    said = capsys.readouterr().out
    assert "not used: photos/dataset_coco.json, photos/dataset_flickr8k.json" in said


def test_line_breaks_and_odd_separators_inside_a_caption_stay_inside_it():
    odd = 'a "dog", it\u2028runs\x85and\fbarks | loud\nand clear'
    write_rows("captions.txt", [["image", "caption"], ["1.jpg", odd], ["2.jpg", "a cat"]])
    _, found = data.read_captions(".")
    one_line = 'a "dog", it runs and barks | loud and clear'
    assert found["1.jpg"][1] == [one_line] and found["2.jpg"][1] == ["a cat"]
    Path("captions.txt").unlink()
    Path("results.csv").write_text("name| number| comment\n1.jpg| 0| a dog\u2028runs | on\n")
    assert data.read_captions(".")[1]["1.jpg"][1] == ["a dog runs | on"]


def test_without_a_split_file_a_photos_own_name_sends_1_in_20_to_val_and_1_in_20_to_test():
    found = []
    for numbers in (range(31_783), range(30_000, 0, -1)):
        Path("results.csv").write_text("".join(f"{i}.jpg| 0| a dog\n" for i in numbers))
        found.append({name: split for name, (split, _) in data.read_captions(".")[1].items()})
    splits = list(found[0].values())
    assert 0.047 < splits.count("val") / 31_783 < 0.053
    assert 0.047 < splits.count("test") / 31_783 < 0.053
    assert found[1].items() <= found[0].items()


# One's own table: {file name: its text}, of two photos with two captions each.
ROWS = [("a b.jpg", "ein Hund, im Schnee"), ("a b.jpg", "two dogs"), ("c.jpg", "“ein” Café"), ("c.jpg", "x")]


def table(columns, delimiter, rows=ROWS):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([columns, *rows])
    return text.getvalue()


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


LISTS = [("a b.jpg", [ROWS[0][1], ROWS[1][1]]), ("c.jpg", [ROWS[2][1], ROWS[3][1]])]
TOKENS = "".join(f"{name}#{i}\t{caption}\n" for i, (name, caption) in enumerate(ROWS))
OWN_TABLES = {
    "open_clip": ("train.csv", table(["filepath", "title"], ",").encode()),
    "tabs": ("mine.tsv", table(["Path", "Text"], "\t").encode()),
    "a spreadsheet's": ("Mappe1.csv", table(["File Name", "Caption"], ";").encode("cp1252")),
    "UTF-16": ("mine.txt", table(["image", "sentence"], "\t").encode("utf-16")),
    "a mark before it": ("mine.csv", table(["image", "caption"], ",").encode("utf-8-sig")),
    "imagefolder": ("metadata.csv", table(["file_name", "text"], ",").encode()),
    "imagefolder, lines": (
        "metadata.jsonl",
        lines_of({"file_name": name, "text": caption} for name, caption in ROWS).encode(),
    ),
    "lists": ("all.jsonl", lines_of({"image": name, "captions": both} for name, both in LISTS).encode()),
    "lists in cells": (
        "all.csv",
        table(["image", "caption"], ",", [(name, json.dumps(both)) for name, both in LISTS]).encode(),
    ),
    "the original": ("Flickr8k.token.txt", TOKENS.encode()),
    "more columns": (
        "mine.csv",
        table(["id", "image", "caption", "licence"], ",", [(1, *row, "CC") for row in ROWS]).encode(),
    ),
    "folders, backslashes": (
        "mine.csv",
        table(["image", "caption"], ",", [("pics\\" + name, caption) for name, caption in ROWS]).encode(),
    ),
    "other case and ending": (
        "mine.csv",
        table(["image", "caption"], ",", [(f"{name[:-4].upper()}.PNG", c) for name, c in ROWS]).encode(),
    ),
    "no ending": (
        "mine.csv",
        table(["image", "caption"], ",", [(name[:-4], c) for name, c in ROWS]).encode(),
    ),
    "phones' photos, converted": (
        "mine.csv",
        table(["image", "caption"], ",", [(f"{name[:-4]}.HEIC", c) for name, c in ROWS]).encode(),
    ),
    "Python's lists": (
        "mine.csv",
        table(["image", "caption"], ",", [(name, str(both)) for name, both in LISTS]).encode(),
    ),
    "Excel's": (
        "mine.csv",
        ("sep=;\r\n" + table(["image", "caption"], ";") + ";\r\n;\r\n").encode("utf-8-sig"),
    ),
    "blank lines": (
        "all.jsonl",
        "\n\n".join(json.dumps({"image": name, "captions": both}) for name, both in LISTS).encode(),
    ),
}


@pytest.mark.parametrize("name, content", OWN_TABLES.values(), ids=OWN_TABLES)
def test_a_table_of_ones_own_is_read_as_it_is_meant(name, content):
    photos = [Path("mine/deep/er/pics/a b.jpg"), Path("mine/other/c.jpg")]
    for i, path in enumerate(photos):
        noise_photo(path, (30, 40), seed=i)
    Path("mine", name).write_bytes(content)
    _, captions = data.read_captions("mine")
    assert [sentences for _, sentences in captions.values()] == [both for _, both in LISTS]
    assert list(data.find_photos("mine", captions).values()) == photos


def test_a_column_split_is_obeyed_in_the_words_of_others_too():
    words = dict(train="train", restval="train", val="val", validation="val", dev="val", test="test")
    words |= dict(Train="train", training="train", valid="val")
    rows = [(f"{i}.jpg", "a dog", split) for i, split in enumerate(words)]
    Path("mine.csv").write_text(table(["image", "caption", "split"], ",", rows))
    _, captions = data.read_captions(".")
    assert [split for split, _ in captions.values()] == list(words.values())


def test_leftovers_of_the_system_are_no_captions_and_no_photos(album):
    whole = load(album)["train"]
    for name in (".ipynb_checkpoints/0.jpg", "__MACOSX/images/._1.jpg", "images/._2.jpg", ".hidden/3.jpg"):
        noise_photo(album / name, (20, 20), seed=99)
    for name in (
        "Thumbs.db",
        "images/desktop.ini",
        "._dataset_flickr30k.json",
        ".captions.csv",
        "dataset_infos.json",
    ):
        (album / name).write_bytes(b"image,caption\n")
    assert torch.equal(load(album)["train"].photos, whole.photos)


def test_of_two_photos_of_one_name_none_is_taken_and_a_copy_is_no_second(album, capsys):
    captions = data.read_captions(album)[1]
    shutil.copytree(album / "images", album / "copies")
    assert set(data.find_photos(album, captions)) == set(NAMES)
    noise_photo(album / "masks/7.jpg", (60, 80), seed=99)
    with pytest.raises(data.InputError, match="photo 7.jpg may be .*/7.jpg or .*masks/7.jpg") as error:
        data.find_photos(album, captions)
    assert len(str(error.value).splitlines()) == 1
    named = {f"images/{name}": value for name, value in captions.items()}
    assert data.find_photos(album, named)["images/7.jpg"] == album / "images/7.jpg"


def test_two_tables_that_say_different_things_are_not_chosen_between():
    noise_photo(Path("a.jpg"), (20, 20))
    for name, caption in (("one.csv", "a dog"), ("two.csv", "a dog")):
        Path(name).write_text(table(["image", "caption"], ",", [("a.jpg", caption)]))
    assert data.read_captions(".")[1]["a.jpg"][1] == ["a dog"]
    Path("two.csv").write_text(table(["image", "caption"], ",", [("a.jpg", "a cat")]))
    with pytest.raises(data.InputError, match="one.csv and two.csv both hold captions, and not the same"):
        data.read_captions(".")
    noise_photo(Path("b.jpg"), (20, 20))
    Path("two.csv").write_text(table(["image", "caption"], ",", [("b.jpg", "a cat")]))  # as train and val
    with pytest.raises(data.InputError, match="make one file of both, with a column split"):
        data.read_captions(".")


def test_a_table_that_names_a_lost_photo_does_not_lose_to_an_old_one_of_those_that_are_there():
    for i in range(150):
        noise_photo(Path(f"{i}.jpg"), (20, 20))
    rows = [(f"{i}.jpg", f"a dog {i}") for i in range(151)]
    Path("captions.csv").write_text(table(["image", "caption"], ",", rows))
    assert len(data.read_captions(".")[1]) == 151
    Path("old.csv").write_text(table(["image", "caption"], ",", [(f"{i}.jpg", "a cat") for i in range(99)]))
    with pytest.raises(data.InputError, match="captions.csv and old.csv both hold captions"):
        data.read_captions(".")
    Path("old.csv").write_text(
        table(["image", "caption"], ",", [("150.jpg", "a dog 150"), ("1.jpg", "a cat")])
    )
    with pytest.raises(data.InputError, match="both hold captions"):  # a part of it, but for one caption
        data.read_captions(".")
    Path("old.csv").write_text(
        table(["image", "caption"], ",", [("1.jpg", "A dog 1."), ("2.jpg", "a dog 2")])
    )
    assert len(data.read_captions(".")[1]) == 151


def test_a_table_of_train_and_one_of_val_are_not_chosen_between_whatever_their_names():
    for name, photo in (("captions.txt", "a.jpg"), ("val.csv", "b.jpg")):
        noise_photo(Path(photo), (20, 20))
        Path(name).write_text(table(["image", "caption"], ",", [(photo, "a dog")]))
    with pytest.raises(data.InputError, match="make one file of both, with a column split"):
        data.read_captions(".")


def test_imagefolders_tables_of_train_and_validation_are_one(capsys):
    for i, folder in enumerate(("train", "validation")):
        noise_photo(Path(f"mine/{folder}/0001.jpg"), (20, 20), seed=i)
        Path(f"mine/{folder}/metadata.csv").write_text(f"file_name,text\n0001.jpg,a {folder} photo\n")
    _, captions = data.read_captions("mine")
    expected = {"train/0001.jpg": ("train", ["a train photo"])}
    assert captions == expected | {"validation/0001.jpg": ("val", ["a validation photo"])}
    said = capsys.readouterr().out
    assert said == "captions  mine/train/metadata.csv, mine/validation/metadata.csv, UTF-8\n"
    paths = data.find_photos("mine", captions)
    assert list(paths.values()) == [Path("mine", name) for name in captions]


def test_two_tables_of_one_folder_are_not_chosen_between_and_the_folder_itself_is_no_split():
    noise_photo(Path("train/a.jpg"), (20, 20))
    Path("train/metadata.csv").write_text("file_name,text\na.jpg,a dog\n")
    assert list(data.read_captions("train")[1]) == ["a.jpg"]
    Path("train/metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "ein Hund"}')
    with pytest.raises(data.InputError, match="have captions of train/a.jpg: move one away"):
        data.read_captions(".")


def test_one_table_of_imagefolders_train_and_validation_gives_their_splits(capsys):
    names = [f"{folder}/{i}.jpg" for folder in ("train", "validation", "test") for i in range(5)]
    for name in names:
        noise_photo(Path("mine", name), (20, 20))
    Path("mine/metadata.csv").write_text("file_name,text\n" + "".join(f"{name},a dog\n" for name in names))
    Path("mine/odd.csv").write_text("image,title,caption\n")
    splits = [split for split, _ in data.read_captions("mine")[1].values()]
    assert splits == ["train"] * 5 + ["val"] * 5 + ["test"] * 5
    assert "not used: mine/odd.csv" in capsys.readouterr().out


def test_what_pandas_writes_into_an_empty_cell_is_no_caption():
    rows = [("a.jpg", "a dog"), ("b.jpg", "nan"), ("c.jpg", "[]"), ("d.jpg", "None"), ("e.jpg", "#N/A")]
    Path("mine.csv").write_text(table(["image", "caption"], ",", rows))
    assert list(data.read_captions(".")[1]) == ["a.jpg"]
    Path("mine.csv").unlink()
    Path("mine.jsonl").write_text('{"Image": "a.jpg", "Caption": "a dog", "Split": "test"}')
    assert data.read_captions(".")[1] == {"a.jpg": ("test", ["a dog"])}


def test_a_tokenizer_of_another_kind_is_refused():
    from tokenizers import ByteLevelBPETokenizer

    Path("gpt2").mkdir()
    gpt2 = ByteLevelBPETokenizer()
    gpt2.train_from_iterator(["a dog runs in the snow"] * 9, 300, special_tokens=["<|endoftext|>"])
    gpt2.save_model("gpt2")
    with pytest.raises(data.InputError, match="gpt2 is no tokenizer of CLIP's kind"):
        data.load_tokenizer("gpt2")


def test_a_tokenizer_with_a_part_of_its_merges_is_refused():
    words = [f"{left}{right}ing" for left in "abcdefghijklmnop" for right in "aeioubcd"]
    data.train_tokenizer(words * 3).save_pretrained("own")
    data.load_tokenizer("own")
    file = Path("own/tokenizer.json")
    state = json.loads(file.read_text())
    state["model"]["merges"] = state["model"]["merges"][:10]
    file.write_text(json.dumps(state))
    with pytest.raises(data.InputError, match="own is not whole: .* of its tokens have no merge"):
        data.load_tokenizer("own")


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"image": {"path": "1.jpg"}, "text": "a"}', "line 1: its image is no name"),
        ('{"image": "1.jpg", "text": 5}', "line 1: its image is no name, or its text no text"),
        ("image,text\n1.jpg,\"['a' 'b']\"", "a list without commas"),
        ("image,text\n1.jpg,\"['a', 'b\"", "a list that is not whole"),
        ("image,text\n1.jpg,\"['a', nan]\"", "a list that is not whole"),
        ('{"image": "1.jpg", "text": "a"}\n{"image": ', "line 2 is no JSON, or not whole"),
    ],
)
def test_a_cell_of_another_kind_is_not_taken_for_a_caption(row, message):
    noise_photo(Path("1.jpg"), (20, 20))
    Path("a.jsonl" if row[0] == "{" else "a.csv").write_text(row)
    with pytest.raises(data.InputError, match=message):
        data.read_captions(".")


def test_what_a_killed_process_left_is_removed_after_a_day():
    old, new = Path(".a.txt.1.partial"), Path(".a.txt.2.partial")
    for path, age in ((old, 90_000), (new, 100)):
        path.write_text("")
        os.utime(path, (time.time() - age,) * 2)
    with data.atomic("a.txt") as temporary:
        temporary.write_text("whole")
    assert sorted(Path().iterdir()) == [new, Path("a.txt")]


def test_forty_photos_of_ones_own_train_with_one_command_that_says_what_they_are_worth(capsys):
    rows = [("image", "caption")] + [(f"{i}.jpg", f"photo number {i % 30}") for i in range(40)]
    for i in range(40):
        noise_photo(Path(f"mine/{i}.jpg"), (50, 60), seed=i)
    write_rows("mine/captions.csv", rows)
    flags = "--data mine --model tiny --tokenizer train --epochs 2 --device cpu"
    assert clip.main(f"{flags} --resume".split()) == 0
    said = capsys.readouterr().out
    assert re.search(r"batch     3\d: there are no more training photos", said)
    assert re.search(r"val       \d photos, .*: too few to judge by, R@10 at chance is 100 %", said)
    assert re.search(r"train     3\d photos, .* captions, \d of them another photo's too", said)
    assert "new run   --resume finds none in runs/mine" in said
    assert said.count(" step ") <= 1  # two steps


def test_a_batch_that_would_fill_a_machine_without_a_gpu_is_refused_before_any_work(album, capsys):
    assert clip.main(["--data", str(album), "--tokenizer", "train", "--device", "cpu"]) == 2
    assert_one_error(capsys, "512 crops at once take some 15 GB")
    assert not Path("cache").exists() and not Path("runs").exists()


def test_a_folder_that_is_not_there_is_said_before_a_batch_that_is_too_large(capsys):
    assert clip.main(["--data", "missing", "--device", "cpu"]) == 2
    assert_one_error(capsys, "--data missing: no such folder; shapes and sketches need none")


def test_a_photo_without_captions_is_no_hit_at_any_k():
    similarity, owner = torch.tensor([[1.0, 0.5], [0.2, 0.9], [0.1, 0.1]]), torch.tensor([0, 1])
    found = recall_of(similarity, owner, ks=(1, 10))
    assert found == pytest.approx({"t2i_r1": 1, "t2i_r10": 1, "i2t_r1": 2 / 3, "i2t_r10": 2 / 3})


@pytest.mark.parametrize("write", [karpathy, kaggle, hub, flickr8k])
def test_200_mutated_captions_files_are_read_or_refused_in_one_line(write):
    write(Path())
    (file,), rng, refused = Path().iterdir(), random.Random(0), 0
    content = file.read_bytes()[:3000]
    for _ in range(200):
        file.write_bytes(mutated(content, rng))
        try:
            _, found = data.read_captions(".")
        except data.InputError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
        else:
            for split, sentences in found.values():
                assert split in ("train", "val", "test")
                assert sentences and all(caption == caption.strip() != "" for caption in sentences)
    assert refused > 20


# --- Photos ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (224, 224), (225, 640), (37, 61)])
def test_photos_become_exactly_the_pixels_of_clip_image_processor(shape):
    image = noise_photo(Path("a.png"), shape)
    assert difference(prepared("a.png"), processed(image)) < 1e-5


@pytest.mark.skipif("FLICKR" not in os.environ, reason="set FLICKR to a folder of Flickr photos, from /")
def test_real_photos_become_exactly_the_pixels_of_clip_image_processor():
    paths = list(data.find_photos(*data.read_captions(os.environ["FLICKR"])).values())
    for path in paths[:20]:
        assert difference(prepared(path), processed(Image.open(path))) < 1e-5


# name: (mode, size, colour, format of a file that is called .jpg, RGB that must come out)
ODD_PHOTOS = {
    "grey": ("L", (40, 20), 200, "JPEG", (200, 200, 200)),
    "cmyk": ("CMYK", (40, 20), (0, 255, 255, 0), "JPEG", (255, 0, 0)),
    "palette": ("P", (40, 20), 0, "PNG", (0, 0, 0)),
    "transparent": ("RGBA", (40, 20), (9, 9, 9, 0), "PNG", (255, 255, 255)),
    "a strip": ("RGB", (1, 4000), (7, 8, 9), "PNG", (7, 8, 9)),
}


@pytest.mark.parametrize("mode, size, colour, form, expected", ODD_PHOTOS.values(), ids=ODD_PHOTOS)
def test_odd_photos_come_out_in_their_colours(mode, size, colour, form, expected):
    Image.new(mode, size, colour).save("a.jpg", form)
    photo = data.load_photo("a.jpg", 16)
    assert photo.shape == (16, 16, 3)
    assert np.abs(photo.astype(int) - expected).max() <= 3


def test_a_photo_taken_with_the_camera_turned_is_upright():
    image, exif = Image.new("RGB", (40, 40), "black"), Image.Exif()
    image.paste("white", (0, 0, 40, 20))  # white above, as stored
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    image.save("a.jpg", exif=exif, quality=95)
    photo = data.load_photo("a.jpg", 16)
    assert photo[:, 12:].mean() > 240 and photo[:, :4].mean() < 15


def test_photos_of_200_megapixels_and_of_16_bits_are_refused():
    Image.new("1", (20_000, 10_000)).save("1.png")
    with pytest.raises(Image.DecompressionBombError):
        data.load_photo("1.png", 16)
    Image.fromarray(np.full((50, 60), 30_000, np.uint16)).save("2.png")
    with pytest.raises(ValueError, match="8 bits"):
        data.load_photo("2.png", 16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP"])
def test_200_mutated_photos_are_decoded_or_count_as_broken(form):
    noise_photo(Path("good.png"), (40, 60)).save("good", form)
    rng, content, broken = random.Random(0), Path("good").read_bytes(), 0
    for _ in range(200):
        Path("1.jpg").write_bytes(mutated(content, rng))
        photo, reason = data.decode(Path("1.jpg"), 16)
        broken += photo is None
        assert photo.shape == (16, 16, 3) if reason is None else len(reason.splitlines()) == 1
    assert 20 < broken < 200


def test_a_damaged_or_missing_photo_is_named_and_left_out(album, capsys):
    replace_in_captions('"test"', '"train"')  # 100 to train on: one may be broken
    photo = album / "images/77.jpg"
    unreadable = "not to be read: 77.jpg (Truncated File Read)"
    for damage, why in ((lambda: os.truncate(photo, 300), unreadable), (photo.unlink, "missing: 77.jpg")):
        damage()
        train = load(album)["train"]
        assert f"warning: left out, {why}\n" in capsys.readouterr().err
        assert "77.jpg" not in train.names and len(train.names) == len(train.photos) == 99
        for row, caption in zip(train.owner, train.captions, strict=True):
            assert caption in CAPTIONS[train.names[row]]


def test_odd_captions_and_photos_are_read(album):
    odd = ["word " * 20_000, "🐶🐕", "كلب يجري على العشب", "\u202e reversed", 'a | b ,\n "c"', " "]
    sentences = [{"raw": caption} for caption in odd]
    replace_in_captions(
        json.dumps([{"raw": caption} for caption in CAPTIONS["2.jpg"]]), json.dumps(sentences)
    )
    file = album / "dataset_flickr30k.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    frames = [Image.new("RGB", (30, 40), colour) for colour in ("red", "blue")]
    frames[0].save(album / "images/2.jpg", "GIF", save_all=True, append_images=frames[1:])
    split = load(album)["train"]
    assert "🐶🐕" in split.captions
    assert len(split.captions) == 80 * 5  # the caption of one space is none
    assert split.lengths.max() == 24 and split.lengths.min() >= 3
    first_frame = split.photos[split.names.index("2.jpg")].float().mean((0, 1))
    assert difference(first_frame, torch.tensor([255.0, 0, 0])) < 8


# --- The store -------------------------------------------------------------------------------------------


def test_the_store_is_reused_until_a_photo_changes(album, monkeypatch):
    first = load(album)["train"].photos.clone()
    with monkeypatch.context() as patch:
        patch.setattr(data, "build_store", lambda *_: pytest.fail("built again"))
        assert torch.equal(load(album)["train"].photos, first)
    Image.new("RGB", (80, 60)).save(album / "images/2.jpg")
    assert not torch.equal(load(album)["train"].photos, first)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("write", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_what_is_written_appears_whole_or_not_at_all(write, error):
    with pytest.raises((data.InputError, KeyboardInterrupt)), data.atomic("x") as temporary:
        write(temporary)
        raise error
    assert list(Path().iterdir()) == []
    with data.atomic("x") as temporary:
        write(temporary)
        assert not Path("x").exists()
    assert list(Path().iterdir()) == [Path("x")]


# --- Splits and batches ----------------------------------------------------------------------------------


def test_an_epoch_shows_every_photo_once_with_captions_of_its_own_and_none_is_in_two_splits(album):
    splits = load(album)
    assert len(set.union(*(set(split.names) for split in splits.values()))) == 120
    assert sum(len(split.names) for split in splits.values()) == 120
    train = splits["train"]
    drawn = torch.stack([train.pairs(seed=3, epoch=epoch) for epoch in range(60)])
    for pairs in drawn:
        assert sorted(pairs[:, 0].tolist()) == list(range(80))
        assert torch.equal(train.owner[pairs[:, 1]], pairs[:, 0])
    assert set(drawn[:, :, 1].flatten().tolist()) == set(range(400))
    assert torch.equal(drawn[7], train.pairs(3, 7))
    assert not torch.equal(drawn[7], train.pairs(4, 7))
    several = train.pairs(3, 7, captions=4)
    assert torch.equal(several[:, :2], drawn[7])
    for photo, *own in several.tolist():
        assert len(set(own)) == 4 and (train.owner[own] == photo).all()


def test_a_batch_of_captions_is_as_long_as_its_longest_rounded_up_to_eight():
    ids, lengths = torch.zeros(3, 24), torch.tensor([8, 9, 17])
    split = data.Split(None, None, None, None, ids, lengths)
    widths = [split.tokens(torch.tensor(rows), "cpu").shape[1] for rows in ([0], [0, 1], [2, 0])]
    assert widths == [8, 16, 24]


def test_augmentation_mirrors_half_of_the_photos_and_crops_the_share_that_was_asked_for():
    photos = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8)
    plain, augmented = data.normalize(photos), data.augment(photos, 16, replace(PLAIN, crop=1), ratio=(1, 1))
    mirrored = (augmented - plain).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert 16 < mirrored.sum() < 48
    assert difference(augmented, torch.where(mirrored[:, None, None, None], plain.flip(-1), plain)) < 1e-4

    ramp = torch.arange(256).expand(100, 256, 256)[..., None].expand(-1, -1, -1, 3).to(torch.uint8)
    crops = data.augment(ramp, 224, replace(PLAIN, crop=0.2, views=10), ratio=(1, 1))  # (1,000, 3, 224, 224)
    columns = crops[:, 0, 0] * data.STD[0] + data.MEAN[0]
    area = ((columns[:, -1] - columns[:, 0]) * 224 / 223) ** 2
    assert 0.19 < area.min() < 0.22 and 0.98 < area.max() < 1.02
    assert area.mean().item() == pytest.approx(0.6, abs=0.03)


def test_the_crops_of_a_photo_stand_together_and_are_all_different():
    photos = (50 * torch.arange(5)).view(5, 1, 1, 1).expand(5, 32, 32, 3).to(torch.uint8)
    crops = data.augment(photos, 28, replace(PLAIN, views=3))
    assert difference(crops, data.normalize(photos[:, :28, :28]).repeat_interleave(3, dim=0)) < 1e-5
    crops = data.augment(torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8), 28, replace(PLAIN, views=3))
    assert min((crops[i] - crops[j]).abs().max() for i, j in [(0, 1), (0, 2), (1, 2)]) > 0.5


def test_colours_change_as_pillow_changes_them():
    photo = np.random.default_rng(0).integers(60, 120, (8, 8, 3), dtype=np.uint8)  # nothing leaves 0 to 255
    pixels = torch.from_numpy(photo / 255).float().permute(2, 0, 1).repeat(300, 1, 1, 1)
    torch.manual_seed(5)
    changed = data.recolour(pixels, 0.4)
    torch.manual_seed(5)
    amounts = torch.empty(3, 300, 1, 1).uniform_(0.6, 1.4)[:, :, 0, 0]
    grey = torch.rand(300, 1, 1) < 0.2
    assert 40 < grey.sum() < 80
    for i in range(0, 300, 10):
        image = Image.fromarray(photo)
        brightness, contrast, saturation = amounts[:, i].tolist()
        image = ImageEnhance.Brightness(image).enhance(brightness)
        image = ImageEnhance.Contrast(image).enhance(contrast)
        image = ImageEnhance.Color(image).enhance(0.0 if grey[i] else saturation)
        expected = torch.from_numpy(np.asarray(image) / 255).float().permute(2, 0, 1)
        assert difference(changed[i], expected) < 0.02  # Pillow rounds three times


# --- Tokenizer -------------------------------------------------------------------------------------------


def test_a_trained_tokenizer_knows_every_byte_and_its_end_token_is_the_largest():
    tokenizer = data.train_tokenizer(["a small red circle", "a small blue square"] * 20)
    assert isinstance(tokenizer, transformers.CLIPTokenizer)
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    text = "zebrafish 🦓 é ñ 漢"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1  # an unknown byte would become an end token
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")
    assert len(tokenizer("small")["input_ids"]) == 3


def test_captions_are_cut_and_keep_their_end_token_though_it_has_not_the_largest_id():
    tokenizer = data.train_tokenizer(["a b c"])
    tokenizer.add_tokens(["<photo>"])
    end = tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<photo>") > end
    sentences, photo = ["<photo> " + "a " * 9, "a " * 200], np.zeros((1, 8, 8, 3), np.uint8)
    split = data.make_split(["1"], photo, [sentences], tokenizer, 77)
    ids = split.tokens(torch.tensor([0]), "cpu")[0].tolist()
    assert len(ids) == 16 and ids.index(end) == 11 and set(ids[11:]) == {end}
    assert split.ids.shape == (2, 77) and split.ids[1].tolist().index(end) == 76


# --- Drawn worlds ----------------------------------------------------------------------------------------


def test_each_of_64_800_scenes_comes_once_and_depends_on_seed_and_index_alone():
    assert len(data.all_scenes(0)) == len(set(data.all_scenes(0))) == 64_800
    few, many = (data.load_drawn({"val": 10, "train": n}, 48)["train"] for n in (5, 20))
    assert np.array_equal(few[1], many[1][:5]) and few[2] == many[2][:5]
    assert data.all_scenes(1)[0] != data.all_scenes(0)[0]


def test_every_caption_says_which_scene_it_is_of():
    scenes, (_, _, sentences) = data.all_scenes(0), data.load_drawn({"val": 500}, 48)["val"]
    for i, own in enumerate(sentences):
        *things, ground = scenes[i]
        words = [word for thing, _ in things for word in thing] + [ground]
        assert len(own) == 5
        for caption in own:
            assert all(caption.split().count(word) >= words.count(word) for word in words), caption
    assert len(set(sum(sentences, []))) == 2500


def test_sketches_are_the_scenes_of_shapes_in_another_look_and_other_words():
    shapes, sketches = (data.load_drawn({"val": 200}, 48, sketch)["val"] for sketch in (False, True))
    assert shapes[0] == sketches[0]
    assert (shapes[1] != sketches[1]).any(axis=(1, 2, 3)).all()
    for ours, theirs in zip(sum(shapes[2], []), sum(sketches[2], [])):
        assert [data.SKETCH_WORDS.get(word, word) for word in ours.split()] == theirs.split()
        assert ours != theirs


def test_one_object_and_its_place_find_about_a_quarter_of_the_scenes():
    halves = [half for scene in data.all_scenes(0)[:500] for half in scene[:2]]
    assert 0.2 < np.mean([1 / halves.count(half) for half in halves]) < 0.3


# --- The hub ---------------------------------------------------------------------------------------------


def test_flickr30k_is_fetched_from_the_hub_and_nothing_lands_outside_its_folder(monkeypatch, capsys):
    noise_photo(Path("hub/a.jpg"), (60, 80))
    hub(Path("hub"))
    link = zipfile.ZipInfo("flickr30k-images/link")
    link.external_attr = 0o120777 << 16  # a symbolic link, to what the member holds
    with zipfile.ZipFile("hub/flickr30k-images.zip", "w") as archive:
        for name in [
            *(f"flickr30k-images/{name}" for name in NAMES),
            "../../out.jpg",
            f"{Path.cwd()}/out.jpg",
        ]:
            archive.write("hub/a.jpg", name)
        archive.writestr(link, "/etc")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    download = functools.partial(huggingface_hub.hf_hub_download, endpoint=endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert clip.main(TOY.split()) == 0
    server.shutdown()
    assert "4.4 GB" in capsys.readouterr().out
    assert {path.name for path in Path().iterdir()} == {"hub", "cache", "flickr30k", "runs"}
    assert len(list(Path("flickr30k/flickr30k-images").glob("*.jpg"))) == 120
    assert not Path("../out.jpg").exists()
    assert not any(path.is_symlink() for path in Path("flickr30k").rglob("*"))


def test_an_archive_that_would_fill_the_disk_is_not_unpacked(monkeypatch, capsys):
    with zipfile.ZipFile("bomb.zip", "w") as archive:
        for i in range(6):
            archive.writestr(f"flickr30k-images/{i}.jpg", "x")
        for member in archive.infolist():
            member.file_size = 2**32 - 2  # the directory is written at the end: 24 GiB
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "bomb.zip")
    assert clip.main(TOY.split()) == 2
    assert_one_error(capsys, "more than 20 GiB")
    assert list(Path().iterdir()) == [Path("bomb.zip")]


# --- Training --------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    rates = [clip.learning_rate(step, 1000, 2.0, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(2 / 101)
    assert rates[100] == max(rates) == 2.0
    assert rates[550] == pytest.approx(1.0)
    assert rates[999] < 1e-4
    assert np.allclose(np.diff(rates[:100]), 2 / 101)


@pytest.mark.parametrize("muon", [0, 1])
def test_only_the_matrices_of_linears_decay_and_muon_has_those_of_the_blocks(muon):
    model = CLIP(SMALL)
    optimizers = clip.make_optimizers(model, clip.Recipe(weight_decay=0.2, muon=muon))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    linears = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert len(decays) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    assert {i for i, decay in decays.items() if decay == 0.2} == linears
    assert {decay for i, decay in decays.items() if i not in linears} == {0.0}
    if muon:
        blocks = [*model.vision_model.encoder.modules(), *model.text_model.encoder.modules()]
        blocks = {id(module.weight) for module in blocks if isinstance(module, torch.nn.Linear)}
        assert {id(p) for group in optimizers[0].param_groups for p in group["params"]} == blocks


def test_muon_is_that_of_pytorch():
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (24, 8), (8, 24), (8, 8)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    groups = [{"params": [ours[0], ours[3]]}, {"params": [ours[1]]}, {"params": [ours[2]]}]
    a = clip.Muon(groups, lr=0.02, weight_decay=0.5)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        for p, q in zip(ours, theirs):  # in bf16, where ours rounds more (orthogonalize)
            assert difference(p, q) < 2e-3


def test_orthogonalized_matrices_are_3_percent_off_at_most_and_have_singular_values_near_1():
    given = torch.randn(2, 200, 300)
    exact = given.double() / given.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = exact @ exact.mT
        exact = 3.4445 * exact - 4.7750 * gram @ exact + 2.0315 * gram @ gram @ exact
    assert (clip.orthogonalize(given) - exact).norm() < 0.03 * exact.norm()
    for shape in ((3, 20, 50), (3, 50, 20), (3, 20, 20)):
        values = torch.linalg.svdvals(clip.orthogonalize(torch.randn(shape)).float())
        assert values.min() > 0.3 and values.max() < 1.3


def test_validation_loss_is_over_groups_of_64_pairs_and_five_turns_of_captions(monkeypatch):
    sentences = [[f"{photo}/{k}" for k in range(1 + photo % 3)] for photo in range(80)]
    tokenizer = data.train_tokenizer(["a b c"])
    split = data.make_split(list("x" * 80), np.zeros((80, 8, 8, 3), np.uint8), sentences, tokenizer, 16)
    images = F.normalize(torch.randn(80, 8), dim=-1)
    texts = F.normalize(torch.randn(len(split.captions), 8), dim=-1)
    monkeypatch.setattr(clip, "embed", lambda *_: (images, texts))
    expected, labels = 0.0, torch.arange(64)  # one group of 64: 16 photos are left out
    for turn in range(5):
        own = [split.captions.index(sentences[photo][turn % len(sentences[photo])]) for photo in range(64)]
        logits = images[:64] @ texts[own].T / 0.07
        expected += (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)).item() / 10
    assert clip.evaluate(CLIP(SMALL), split)["loss"] == pytest.approx(expected, abs=1e-5)


def test_crops_and_captions_stay_with_their_photo_and_are_the_same_in_both_passes(album):
    split = load(album)["train"]
    model, pairs = small_model_of(split).eval(), split.pairs(0, 0, captions=3)[:6]
    plain = replace(split, photos=split.photos[:, :32, :32])  # no margin, so no random crops
    images, texts = clip.encode_pairs(model, plain, pairs, PLAIN, 0)
    pixels = data.normalize(plain.photos[pairs[:, 0]])
    assert difference(images, model.encode_image(pixels)[:, None]) < 1e-6
    for k in range(3):
        assert difference(texts[:, k], model.encode_text(split.ids[pairs[:, 1 + k]])) < 1e-6

    lora.add_lora(model.train(), 4, 8, dropout=0.5)
    torch.nn.init.normal_(model.text_model.encoder.layers[0].self_attn.q_proj.lora_B)
    model.vision_model.embeddings.patch_dropout = 0.5
    recipe = clip.Recipe(views=2)
    assert clip.encode_pairs(model, split, pairs, recipe, 0)[0].shape == (6, 2, 24)
    first, again, other = (clip.encode_pairs(model, split, pairs, recipe, seed) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_batches_for_training_have_one_length_and_what_is_cut_keeps_its_end():
    tokenizer = data.train_tokenizer(["a b c d e f g h i j"])
    sentences = [["a " * 3, "b " * 9]] * 1000 + [
        ["a b c d e f g h i j " * 3]
    ]  # one of 2,001 captions is long
    split = data.make_split(list("x" * 1001), np.zeros((1001, 8, 8, 3), np.uint8), sentences, tokenizer, 77)
    short, both, long = torch.tensor([0, 1]), torch.tensor([0, 2000]), torch.tensor([2000])
    for rows in (short, both, long):
        assert torch.equal(split.tokens(rows, "cpu"), split.ids[rows, : 16 if rows is short else 32])
        assert split.tokens(rows, "cpu", cut=True).shape == (len(rows), 16)
    assert torch.equal(split.tokens(short, "cpu", cut=True), split.ids[short, :16])
    cut = split.tokens(long, "cpu", cut=True)[0]
    assert torch.equal(cut[:15], split.ids[2000, :15]) and cut[15] == tokenizer.eos_token_id
    assert split.ids[2000, 15] != tokenizer.eos_token_id


def test_fp16_scales_the_loss_takes_the_same_step_and_leaves_one_out_that_overflows(monkeypatch):
    monkeypatch.setattr(data, "half", lambda device: torch.float16)  # as on a GPU without bf16
    split = drawn_split("shapes", data.train_tokenizer(["a small red circle"]), "train")
    pairs = split.pairs(0, 0)
    weights = {}
    for scaled in (False, True):
        torch.manual_seed(0)
        model = CLIP(replace(PRESETS["tiny"], eos_token_id=int(split.ids[0, -1]))).train()
        before = model.text_projection.weight.detach().clone()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        optimizers = clip.make_optimizers(model, PLAIN)
        clip.train_step(model, optimizers, scaler, split, pairs, PLAIN, 0, 10)
        weights[scaled] = model.text_projection.weight.detach().clone()
    moved = (weights[False] - before).abs().mean()
    assert moved > 1e-5 and (weights[True] - weights[False]).abs().mean() < 0.1 * moved
    scaler = torch.amp.GradScaler("cpu", init_scale=1e30)
    clip.train_step(model, optimizers, scaler, split, pairs, PLAIN, 1, 10)
    assert difference(model.text_projection.weight, weights[True]) == 0
    assert scaler.get_scale() == pytest.approx(5e29)


def test_what_overflows_for_one_optimizer_leaves_the_weights_of_both_as_they_were():
    split = drawn_split("shapes", data.train_tokenizer(["a small red circle"]), "train")
    model = CLIP(replace(PRESETS["tiny"], eos_token_id=int(split.ids[0, -1]))).train()
    recipe = replace(PLAIN, muon=1)
    before = copy.deepcopy(model.state_dict())
    model.logit_scale.register_hook(lambda gradient: gradient * torch.nan)  # AdamW's, and not Muon's
    scaler, optimizers = torch.amp.GradScaler("cpu", init_scale=4.0), clip.make_optimizers(model, recipe)
    assert len(optimizers) == 2
    clip.train_step(model, optimizers, scaler, split, split.pairs(0, 0), recipe, 0, 10)
    assert difference(model.state_dict(), before) == 0
    assert scaler.get_scale() == 2


def test_photos_trains_on_the_first_of_them(album, monkeypatch):
    whole = load(album)
    splits, _ = data.load(str(album), "train", 48, 24, limit=7)
    assert splits["train"].names == whole["train"].names[:7]
    assert torch.equal(splits["train"].photos, whole["train"].photos[:7])
    assert splits["val"].names == whole["val"].names
    assert len(data.load("shapes", "train", 48, limit=20)[0]["train"].photos) == 20


def test_the_logit_scale_never_leaves_a_step_above_100(album):
    split = load(album)["train"]
    model, recipe = small_model_of(split).train(), clip.Recipe(batch_size=6, lr=0.1, views=1, captions=1)
    model.logit_scale.data.fill_(9.0)
    optimizers = clip.make_optimizers(model, recipe)
    clip.train_step(model, optimizers, NO_SCALER, split, split.pairs(0, 0)[:6], recipe, step=5, steps=10)
    assert model.logit_scale.exp().item() == pytest.approx(100)


def test_the_means_decay_has_grown_to_its_largest_after_some_9000_steps():
    for step, is_largest in ((8_900, False), (9_000, True)):
        mean, trained = ({"weight": torch.full((1,), x, dtype=torch.float64)} for x in (0.0, 1.0))
        clip.update_mean(mean, trained, step, clip.Recipe().ema)
        assert (mean["weight"].item() < 0.001 + 1e-9) == is_largest


@pytest.mark.parametrize("ema", [0.999, 0.5, 0.0])
def test_a_run_evaluates_and_keeps_the_running_mean_of_its_weights(ema, monkeypatch):
    seen = []

    def watched(train, model, *rest):
        weight = model.text_projection.weight
        seen.append(weight.detach().double())

        def keep(optimizer, *_):
            if isinstance(optimizer, torch.optim.AdamW):  # the second of two
                seen.append(weight.detach().double())

        hook = register_optimizer_step_post_hook(keep)
        history = train(model, *rest)
        hook.remove()
        return history

    spoil(monkeypatch, clip, "train", 1, watched)
    monkeypatch.setattr(clip, "finish", lambda *_: None)
    assert train_shapes(monkeypatch, f"--ema {ema}") == 0
    mean, age = seen[0], 0
    for step, weight in enumerate(seen[1:]):
        decay = min(ema, (1 + step) / (10 + step))
        mean, age = decay * mean + (1 - decay) * weight, decay * (age + 1)
    state = data.load_checkpoint("runs/shapes")
    assert difference(state["last"]["text_projection.weight"], mean) < (1e-6 if ema else 1e-12)
    assert difference(state["trained"]["text_projection.weight"], seen[-1]) == 0
    assert ema < 0.999 or 0.09 < age / (step + 1) < 0.11  # "over about the last tenth of the steps so far"
    assert (1 + 8989) / (10 + 8989) < 0.999 <= (1 + 8990) / (10 + 8990)  # 0.999 from step 8,990 on


def test_a_run_leaves_its_weights_log_and_pictures(monkeypatch, capsys):
    assert train_shapes(monkeypatch) == 0
    run, pictures = Path("runs/shapes"), {"curve.png", "retrieval.png", "inside.png"}
    assert {path.name for path in run.iterdir()} == {"tokenizer", "checkpoint.pt", "log.csv"} | pictures
    for name in pictures:
        Image.open(run / name).load()
    with open(run / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]

    tokenizer = data.load_tokenizer(run / "tokenizer")
    val, test = (drawn_split("shapes", tokenizer, part) for part in ("val", "test"))
    recalls = [f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)]
    best, said = max(rows, key=lambda row: sum(float(row[name]) for name in recalls)), capsys.readouterr().out
    for epoch, row in (("best", best), ("last", rows[-1])):
        model = finetune.from_pretrained(run, epoch)
        found = clip.evaluate(model, val)
        for name in ("loss", *recalls):
            assert found[name] == pytest.approx(float(row[name]), abs=1e-6)
        loss = clip.evaluate(model, test)["loss"]
        assert f"{epoch} epoch {row['epoch']:>3s}  loss {loss:.4f}  R@1/5/10" in said


def test_class_attention_is_the_mean_of_what_hugging_faces_class_token_takes_from_each_patch():
    ours, theirs, (pixels, _), _ = both_models(OPENAI_SMALL)
    layers = theirs.vision_model(pixels, output_attentions=True).attentions  # 3 of (6, heads, 26, 26)
    expected = torch.stack(layers).mean(dim=(0, 2))[:, 0, 1:].view(6, 5, 5)
    assert difference(data.class_attention(ours, pixels), expected) < 1e-6


def test_right_and_wrong_are_the_first_photos_whose_best_caption_is_and_is_not_their_own():
    split = data.Split(None, None, None, torch.tensor([0, 1, 1, 2, 3, 4]), None, None)
    best = torch.tensor([3, 2, 3, 0, 5])  # caption found first for photos 0 to 4: of photos 2, 1, 2, 0, 4
    texts = F.one_hot(torch.arange(6)).float()
    assert data.right_and_wrong(split, texts[best], texts, count=2).tolist() == [1, 2, 0, 3]


# --- Stops and faults ------------------------------------------------------------------------------------


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(monkeypatch):
    assert train_shapes(monkeypatch, "--ema 0.9 --out whole") == 0
    with monkeypatch.context() as patch:
        spoil(patch, clip, "evaluate", 3, interrupt)
        assert train_shapes(monkeypatch, "--ema 0.9 --out halves") == 130
    assert len(data.load_checkpoint("halves")["history"]) == 2
    assert train_shapes(monkeypatch, "--ema 0.9 --out halves --resume") == 0
    assert_same_numbers("halves", "whole")


def test_a_run_goes_on_though_its_photos_lie_elsewhere_and_its_micro_batch_is_another(copied, capsys):
    Path("photos").rename("elsewhere")
    assert train_toy("--data elsewhere --out old --resume --micro-batch 20") == 0
    assert "resumed   after epoch 6" in capsys.readouterr().out


def full_memory(*_):
    raise RuntimeError("CUDA out of memory. Tried to allocate")


def half_saved(save, state, path):
    Path(path).write_bytes(b"half")
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


# what is wrong: (function of which module, its call that goes wrong, what it does then, message)
FAULTS = {
    "NaN": (clip, "contrastive_loss", 13, lambda loss, x, **_: loss(x) * torch.nan, "the loss is not finite"),
    "a disk that fills up": (torch, "save", 2, half_saved, "is the disk full"),
    "full memory": (
        clip,
        "train_step",
        9,
        full_memory,
        "; --resume and a smaller --micro-batch, say 64, go on",
    ),
}


@pytest.mark.parametrize("module, name, call, fault, message", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_line_and_leaves_the_last_good_checkpoint(
    module, name, call, fault, message, monkeypatch, capsys
):
    spoil(monkeypatch, module, name, call, fault)
    assert train_shapes(monkeypatch) == 2
    assert_one_error(capsys, message)
    state = data.load_checkpoint("runs/shapes")
    assert 1 <= len(state["history"]) < 3 and hidden("runs") == []
    assert all(weight.isfinite().all() for weight in state["last"].values())


def test_a_mistake_in_the_code_is_not_hidden(monkeypatch):
    monkeypatch.setattr(clip, "train", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        train_shapes(monkeypatch)


@pytest.mark.parametrize("size, file", [(100_000, "cache/"), (2_000_000, "runs/photos/checkpoint.pt")])
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_half_written(size, file, album, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # of each file
    try:
        assert train_toy("") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_error(capsys, f"can't write {file}")
    assert hidden(".") == [] and not Path("runs/photos/checkpoint.pt").exists()


@pytest.mark.parametrize("stop, code", [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=slow)])
def test_a_stopped_run_is_one_line_and_goes_on_bit_for_bit(stop, code, copied):
    run = started(ONE, "--out new")
    wait_until(Path("new/checkpoint.pt").exists, run)
    run.send_signal(signal.Signals[stop])
    assert run.wait(timeout=60) == code
    said = "stopped: --resume goes on from the last checkpoint, if there is one yet"
    assert Path("errors").read_text().splitlines() == [said] and hidden("new") == []
    assert 1 <= len(data.load_checkpoint("new")["history"]) < 6
    assert train_toy("--out new --resume") == 0
    assert_same_numbers("new", "old")


def test_a_run_killed_at_any_moment_ends_with_the_numbers_of_one_that_was_not(whole, copied):
    kills, rng, seconds = int(os.environ.get("KILLS", 2)), random.Random(0), whole[1]
    for kill in range(kills):
        if kill % 3 == 0:
            shutil.rmtree("killed", ignore_errors=True)
            shutil.rmtree("cache")
        run = started(ONE, "--out killed --resume")
        # While it decodes, trains, saves or draws: at a random moment of each half of the run.
        time.sleep(seconds * (kill % 2 + rng.random()) / 2)
        run.kill()
        run.wait()
        if kill % 3 == 2 or kill + 1 == kills:
            assert train_toy("--out killed --resume") == 0
            assert_same_numbers("killed", "old")


@slow
def test_two_hundred_epochs_leave_memory_and_open_files_as_they_were(monkeypatch):
    memory, files = [], []

    def measured(evaluate, *arguments):
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        files.append(len(os.listdir("/proc/self/fd")))
        return evaluate(*arguments)

    spoil(monkeypatch, clip, "evaluate", 1, measured)
    assert train_shapes(monkeypatch, "--epochs 200") == 0
    print(f"{(memory[199] - memory[49]) / 2**20:.1f} MiB more after 200 epochs than after 50")
    assert memory[199] - memory[49] < 20 * 2**20 and len(set(files[:200])) == 1


# --- Many processes --------------------------------------------------------------------------------------


def step_of_muon():
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(8, 24)) for _ in range(3)]
    for matrix in matrices:
        matrix.grad = torch.randn(8, 24)
    clip.Muon([{"params": matrices}], lr=0.1, weight_decay=0.5).step()
    return torch.stack(matrices).detach()


# Two processes, each with half of the pairs: the loss and the gradient with 6 pairs at once, and with 2.
HALVES = f"""
import torch
import clip, {Path(__file__).stem} as tests
torch.distributed.init_process_group("gloo")
found = []
for micro_batch in (6, 2):
    torch.manual_seed(0)
    model, (pixels, ids) = tests.small_model(), tests.views(2, 2)
    half = slice(6 * clip.RANK, 6 * clip.RANK + 6)
    loss = tests.backward_of(model, pixels[half], ids[half], micro_batch)
    found.append((loss, tests.gradients(model)))
stepped = tests.step_of_muon()  # of three matrices: one process has two of them, the other one and padding
if clip.RANK == 0:
    torch.save((found, stepped), "found.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_have_the_loss_the_gradient_and_muons_step_of_one():
    Path("halves.py").write_text(HALVES)
    run_process(f"{TWO} halves.py")
    model, (pixels, ids) = small_model(), views(2, 2)
    expected, pair_loss = clip.multiview_loss(model, *encode_views(model, pixels, ids))
    expected.backward()
    # With micro-batches a process sums its gradients in another order: rounding.
    results, stepped = torch.load("found.pt")
    assert difference(stepped, step_of_muon()) < 1e-6
    for (loss, found), tolerance in zip(results, (3e-6, 1e-5)):
        assert difference(loss, pair_loss) < 1e-6
        assert difference(found, gradients(model)) < tolerance


def test_a_run_of_two_processes_is_logged_once_and_goes_on_in_one(album, capsys):
    assert run_process(f"{TWO} {HERE}/clip.py {TOY} --data photos").count("best epoch") == 1
    assert hidden("runs") == hidden("cache") == []
    assert train_toy("--resume") == 0
    assert "resumed   after epoch 6" in capsys.readouterr().out


@slow
def test_a_study_of_two_processes_leaves_its_files_once(copied):
    # Behind `--`, or torchrun takes --r for an abbreviation of its own flags.
    flags = "--base old --data photos --r 2 --epochs 1 --batch-size 40 --device cpu --out study"
    said = run_process(f"{TWO} -- {HERE}/finetune.py {flags}")
    assert said.count("zero-shot   val") == said.count("done ") == 1 and hidden("study") == []
    files = {path.name for path in Path("study").iterdir()}
    assert files == {"tokenizer", "r2-seed0", "study.csv", "study.png"}


def test_two_runs_at_once_share_the_store(album):
    command = f"{ONE} {HERE}/clip.py {TOY} --data photos --out"
    streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    alone = {**WITH_PATH, "OMP_NUM_THREADS": "1"}  # threads of two runs on two cores wait for each other
    runs = [subprocess.Popen([*command.split(), out], env=alone, **streams) for out in ("a", "b")]
    said = [run.communicate(timeout=100)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert len(list(Path("cache").iterdir())) == 6 and hidden("cache") == []  # train, val, test
    assert_same_numbers("a", "b")


@slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_of_two_processes_ends_with_one_of_them_and_goes_on_bit_for_bit(stop, copied):
    assert started(TWO, "--out two").wait(timeout=100) == 0
    job = started(TWO, "--out new")
    wait_until(Path("new/checkpoint.pt").exists, job)
    workers = subprocess.check_output(["pgrep", "-P", str(job.pid)], text=True).split()
    os.kill(int(workers[-1]) if stop == signal.SIGKILL else job.pid, stop)
    assert job.wait(timeout=60) != 0
    lines = Path("errors").read_text().splitlines()
    said = [line for line in lines if line.startswith(("stopped: ", "error: "))]
    assert stop == signal.SIGTERM or len(said) == 1
    assert 1 <= len(data.load_checkpoint("new")["history"]) < 6
    assert started(TWO, "--out new --resume").wait(timeout=100) == 0
    assert_same_numbers("new", "two")


# --- Adaptation ------------------------------------------------------------------------------------------


def test_a_study_leaves_adapters_a_table_and_a_figure_that_say_the_same(study_folder):
    rows, tokenizer = study_rows(study_folder), data.load_tokenizer("runs/shapes/tokenizer")
    Image.open(study_folder / "study.png").load()
    models = {variant: finetune.from_pretrained("runs/shapes") for variant in ("zero-shot", "r=4", "r=16")}
    lora.load_adapter(models["r=4"], study_folder / "r4-seed0")
    lora.load_adapter(models["r=16"], study_folder / "r16-seed0")
    # The checkpoint of an adapted model holds its adapters alone.
    assert set(data.load_checkpoint(study_folder / "r4-seed0")["best"]) == set(lora_weights(models["r=4"]))
    models["all weights"] = finetune.from_pretrained(study_folder / "full-seed0")
    assert list(rows) == list(models)
    splits = {"val": drawn_split("sketches", tokenizer), "test": drawn_split("sketches", tokenizer, "test")}
    splits["shapes val"] = drawn_split("shapes", tokenizer)
    for variant, model in models.items():
        trained = 0 if variant == "zero-shot" else lora.trainable_parameters(model)[0]
        assert int(rows[variant]["trainable"]) == trained
        for name, split in splits.items():
            found = clip.evaluate(model, split)
            told = {key: float(rows[variant][f"{name} {key}"]) for key in found}
            assert told == pytest.approx(found, abs=1e-4)
    assert len({row["val loss"] for row in rows.values()}) == 4


def test_a_finished_study_resumed_says_the_same_and_only_with_its_own_settings(study_folder, capsys):
    first = study_rows(study_folder)
    assert finetune_sketches("--r 4 16 --full --resume") == 0
    assert study_rows(study_folder) == first
    capsys.readouterr()
    assert finetune_sketches("--r 4 --alpha 3 --resume") == 2
    assert_one_error(capsys, "alpha was 8.0")
    assert finetune_sketches(f"--r 4 --resume --base {study_folder}/full-seed0 --out {study_folder}") == 2
    assert_one_error(capsys, "base_loss was")


def test_repeats_differ_in_their_seed_alone(study_folder, tmp_path):
    assert finetune_sketches(f"--r 4 --seeds 2 --out {tmp_path}") == 0
    first, second = (data.load_checkpoint(tmp_path / f"r4-seed{seed}")["last"] for seed in (0, 1))
    assert difference(first, data.load_checkpoint(study_folder / "r4-seed0")["last"]) == 0
    assert difference(first, second) > 1e-3


def test_a_study_called_from_a_notebook_does_what_the_command_does(study_folder, tmp_path):
    base = finetune.from_pretrained("runs/shapes")
    untouched = {name: weight.clone() for name, weight in base.state_dict().items()}
    splits, _ = data.load("sketches", base.source, 48)
    recipe = replace(finetune.DRAWN_RECIPE, r=4, alpha=8.0, epochs=2, batch_size=25)
    (row,) = finetune.study(base, splits, [recipe], tmp_path, {"val": splits["val"]})
    told = study_rows(study_folder)["r=4"]
    for name in row.keys() - {"variant", "minutes"}:
        assert row[name] == pytest.approx(float(told[name]), abs=1e-6), name
    assert difference(base.state_dict(), untouched) == 0


def test_a_run_takes_no_tokenizer_but_its_own_and_no_unknown_epoch(study_folder, tmp_path):
    own = data.load_tokenizer("runs/shapes/tokenizer")
    state = json.loads(own.backend_tokenizer.to_str())["model"]
    state["merges"][0], state["merges"][1] = state["merges"][1], state["merges"][0]
    merges = [tuple(merge) for merge in state["merges"][::-1]]
    transformers.CLIPTokenizer(vocab=state["vocab"], merges=merges).save_pretrained(tmp_path)
    assert data.load_tokenizer(tmp_path).eos_token_id == own.eos_token_id
    finetune.from_pretrained("runs/shapes", tokenizer="runs/shapes/tokenizer")
    for call in (
        lambda: finetune.from_pretrained("runs/shapes", tokenizer=tmp_path),
        lambda: data.tokenizer_of_run(
            SimpleNamespace(out=Path("runs/shapes"), resume=True, tokenizer=tmp_path)
        ),
    ):
        with pytest.raises(data.InputError, match="is not the tokenizer of runs/shapes"):
            call()
    with pytest.raises(data.InputError, match="epoch is 'first': a run has best, last and trained"):
        finetune.from_pretrained("runs/shapes", "first")


def test_an_adapter_of_another_base_is_said(tmp_path):
    model = small_model()
    lora.add_lora(model, 2, 4)
    lora.save_adapter(model, tmp_path, "somebody/clip")
    for name, times in (("somebody/clip", 0), ("other/clip", 1), (None, 0)):
        again = small_model()
        again.name = name
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            lora.load_adapter(again, tmp_path)
        assert [str(w.message) for w in seen] == [
            f"{tmp_path} was trained on somebody/clip, and this model is other/clip"
        ] * times


def test_an_adapters_configuration_may_begin_with_a_mark(tmp_path):
    model = small_model()
    lora.add_lora(model, 2, 4)
    lora.save_adapter(model, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text(), "utf-8-sig")
    lora.load_adapter(small_model(), tmp_path)


def test_the_default_rate_is_that_of_the_base(study_folder):
    def of(flags):
        args = finetune.parse_args(flags.split())
        return args.epochs, args.lr, args.dropout

    assert of("--r 64") == (5, 1e-4, 0.1)
    assert of("--base runs/shapes --data photos") == (10, 1e-3, 0.1)
    assert of("--base runs/shapes --data photos --lr 2e-4") == (10, 2e-4, 0.1)
    assert of("--base runs/shapes --data sketches") == (8, 5e-3, 0.0)


def test_the_table_shows_mean_and_deviation_over_seeds():
    rows = []
    for loss, recall in ((1.0, 10), (3.0, 20)):
        row = {"variant": "r=2", "trainable": 1000, "minutes": 1, "lowest val loss": loss}
        rows.append(row | {"val t2i_r1": recall, "val i2t_r1": 5})
    line = finetune.table(rows, ["val"]).splitlines()[1]
    assert line.split() == ["r=2", "0.00", "1,000", "1.0", "2.000", "±1.414", "15.0", "±7.1", "5.0"]


def test_an_adapter_of_the_study_opens_in_peft_on_the_released_model(album):
    theirs, inputs = released_folder("base", SPELLING)
    flags = "--base base --data photos --r 2 --epochs 1 --batch-size 20 --lr 0.01 --device cpu --out out"
    assert finetune.main(flags.split()) == 0
    ours = finetune.from_pretrained("base")
    untrained = ours(*inputs)
    lora.load_adapter(ours, "out/r2-seed0")
    expected = their_logits(peft.PeftModel.from_pretrained(theirs, "out/r2-seed0").eval(), *inputs)
    assert difference(ours.eval()(*inputs), expected) < 1e-5
    assert difference(expected, untrained) > 1e-3


CLASSES = ["red_fox", "cat", "dog", "a_b", "owl", "crow", "bee"]


def class_folders(folder):
    """40 photos of noise in folders of 7 classes."""
    for i in range(40):
        noise_photo(Path(folder, CLASSES[i % 7], f"{i}.png"), (60, 80), seed=i)


def test_a_zero_shot_class_is_where_the_mean_of_its_names_in_the_templates_points(capsys):
    class_folders(Path("photos"))
    tokenizer = data.train_tokenizer(["a red fox", "the cat and a dog", "owl crow bee"])
    model = small_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).eval()
    templates, directions, ranks = ("a {}", "the {} here"), {}, []
    for name in CLASSES:
        prompts = [template.format(name.replace("_", " ")) for template in templates]
        mean = sum(model.encode_text(data.tokenize(tokenizer, [prompt], 16))[0] / 2 for prompt in prompts)
        directions[name] = mean / mean.norm()
    for path in Path("photos").glob("*/*"):
        image = model.encode_image(prepared(path, 40)[None])[0]
        best = sorted(directions, key=lambda name: -(image @ directions[name]).item())
        ranks.append(best.index(path.parent.name))
    top1, top5 = (100 * sum(rank < k for rank in ranks) / 40 for k in (1, 5))
    assert 0 < top1 < top5 < 100
    assert finetune.classify(model, tokenizer, "photos", templates) == pytest.approx((top1, top5), abs=1e-4)
    assert f"7 classes  top-1 {top1:.1f}  top-5 {top5:.1f}  chance 14.3" in capsys.readouterr().out


# --- Adapters that people bring --------------------------------------------------------------------------


def peft_on(model, **options):
    """peft's, with random A and B."""
    theirs = peft.get_peft_model(model, peft.LoraConfig(**dict(target_modules=QKV) | options)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return theirs


def clip_pair():
    """Their CLIPModel and ours with the same weights, and inputs of ours."""
    theirs = shaken(hugging_face(OPENAI_SMALL)).eval()
    ours = CLIP(OPENAI_SMALL).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, (photos(4), captions([2, 5, 9, 16], 16))


@torch.no_grad()
def random_adapters(model):
    for layer in lora.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)


def test_adapters_beside_a_bf16_base_are_fp32_and_give_what_peft_gives():
    base, _, (pixels, ids) = clip_pair()
    base.bfloat16()
    theirs = peft_on(copy.deepcopy(base), r=4, lora_alpha=8)
    lora.add_lora(base, 4, 8)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            assert base.get_parameter(our_name(name)).dtype == parameter.dtype == torch.float32
            base.get_parameter(our_name(name)).data.copy_(parameter)
    found = their_logits(base, pixels.bfloat16(), ids)
    assert found.dtype == torch.bfloat16
    assert difference(found, their_logits(theirs, pixels.bfloat16(), ids)) == 0
    lora.merge(base)
    assert their_logits(base, pixels.bfloat16(), ids).dtype == torch.bfloat16
    assert {p.dtype for name, p in base.named_parameters() if "lora_" not in name} == {torch.bfloat16}


PATTERNS = {
    "ranks": dict(rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 5}),
    "alphas": dict(alpha_pattern={"text_model.*": 32, "v_proj": 3}),
    "both, and rsLoRA": dict(
        rank_pattern={"v_proj": 2}, alpha_pattern={"^vision_model.*proj": 9, "v_proj": 1}, use_rslora=True
    ),
}


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_ranks_and_alphas_that_peft_gave_by_pattern_are_read_as_peft_does(options, tmp_path):
    base, ours, inputs = clip_pair()
    theirs = peft_on(base, r=4, lora_alpha=8, **options)
    theirs.save_pretrained(tmp_path)
    lora.load_adapter(ours, tmp_path)
    assert difference(ours(*inputs), their_logits(theirs, *inputs)) < 1e-5


# (r, alpha) of each tower
SETTINGS = [((4, 8), (4, 32)), ((4, 16), (4, 8)), ((2, 8), (5, 8)), ((1, 6), (4, 3))]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("vision, text", SETTINGS)
def test_towers_adapted_otherwise_are_saved_as_one_that_opens_here_and_in_peft(
    vision, text, rslora, tmp_path
):
    base, ours, inputs = clip_pair()
    again = copy.deepcopy(ours)
    lora.add_lora(ours.vision_model, *vision, use_rslora=rslora)
    lora.add_lora(ours.text_model, *text, use_rslora=rslora)
    random_adapters(ours)
    lora.save_adapter(ours, tmp_path)
    lora.load_adapter(again, tmp_path)
    assert difference(again(*inputs), ours(*inputs)) == 0
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert difference(their_logits(theirs, *inputs), ours(*inputs)) < 3e-5


@pytest.mark.parametrize("other", [dict(dropout=0.1), dict(use_rslora=True)], ids=["dropout", "rslora"])
def test_what_pefts_file_can_not_say_of_each_layer_is_not_saved(other, tmp_path):
    model = small_model()
    lora.add_lora(model, 4, 8, targets=["vision_model"])
    lora.add_lora(model, 4, 8, targets=["text_model"], **other)
    with pytest.raises(ValueError, match="differ in dropout or rsLoRA"):
        lora.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapting_the_second_tower_leaves_the_first_towers_adapters_trainable():
    model = small_model()
    first = lora.add_lora(model, 4, 8, targets=["vision_model"])
    second = lora.add_lora(model, 2, 8, targets=["text_model"])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * (first + second) and all("lora_" in name for name in trainable)


TOWER_CLASSES = [
    "CLIPVisionModel",
    "CLIPTextModel",
    "CLIPVisionModelWithProjection",
    "CLIPTextModelWithProjection",
]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", TOWER_CLASSES)
def test_an_adapter_of_one_tower_opens_on_the_whole_model(name, safe, tmp_path):
    base, ours, (pixels, ids) = clip_pair()
    tower = "vision" if "Vision" in name else "text"
    config = getattr(base.config, f"{tower}_config")
    config.projection_dim = OPENAI_SMALL.projection_dim
    part = getattr(transformers, name)(config).eval()
    own = {key.removeprefix(f"{tower}_model."): weight for key, weight in base.state_dict().items()}
    own |= base.state_dict()
    part.load_state_dict({key: own[key] for key in part.state_dict()})
    alphas = {"encoder.layers.1.self_attn.v_proj": 3}
    theirs = peft_on(part, r=3, lora_alpha=7, alpha_pattern=alphas)
    theirs.save_pretrained(tmp_path)
    if not safe:
        torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
    lora.load_adapter(ours, tmp_path)
    assert all(key.startswith(f"{tower}_model.") for key in lora.adapters(ours))
    given = pixels if tower == "vision" else ids
    pooled = theirs.base_model.model(given)
    if "Projection" in name:
        expected = pooled.image_embeds if tower == "vision" else pooled.text_embeds
        encode = ours.encode_image if tower == "vision" else ours.encode_text
        expected = torch.nn.functional.normalize(expected, dim=-1)
        assert difference(encode(given), expected) < 1e-5
    else:
        assert difference(getattr(ours, f"{tower}_model")(given), pooled.pooler_output) < 1e-5


def test_an_adapter_of_a_tower_that_does_not_say_which_is_not_guessed(tmp_path):
    model = small_model()
    lora.add_lora(model, 4, 8)
    lora.save_adapter(model.text_model, tmp_path)
    with pytest.raises(ValueError, match="doesn't say for which: load it on one of model.vision_model"):
        lora.load_adapter(small_model(text=replace(OPENAI_SMALL.vision)), tmp_path)
    other = small_model()
    lora.load_adapter(other.text_model, tmp_path)
    assert len(lora.adapters(other)) == 6


def test_one_named_adapter_opens_and_of_several_the_folders_are_named(tmp_path):
    base, ours, inputs = clip_pair()
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=QKV), adapter_name="mine").eval()
    theirs.save_pretrained(tmp_path)
    again = copy.deepcopy(ours)
    lora.load_adapter(ours, tmp_path)
    assert len(lora.adapters(ours)) == 15
    theirs.add_adapter("other", peft.LoraConfig(target_modules=QKV))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 adapters, give one: .*mine, .*other"):
        lora.load_adapter(again, tmp_path)


@torch.no_grad()
def test_after_a_merge_another_adapter_goes_on_and_comes_off():
    _, ours, inputs = clip_pair()
    lora.add_lora(ours, 4, 8)
    random_adapters(ours)
    lora.merge(ours)
    merged = ours(*inputs)
    assert lora.add_lora(ours, 2, 6, targets=["q_proj", "fc1"]) == 10
    assert {name.split(".")[-1] for name in lora.adapters(ours)} == {"q_proj", "fc1"}
    assert difference(ours(*inputs), merged) == 0  # B = 0
    random_adapters(ours)
    lora.merge(ours)
    assert difference(ours(*inputs), merged) > 1e-3
    lora.unmerge(ours)
    lora.set_strength(ours, 0)
    assert difference(ours(*inputs), merged) < 1e-5


# Of peft's settings, another value, whatever it does: those that may have it, and those refused.
MAY_DIFFER = lora.OBEYED | lora.NO_MATTER
SETTINGS_OF_PEFT = sorted(peft.LoraConfig().to_dict())


def open_with(folder, **config):
    model = small_model()
    lora.add_lora(model, 4, 8)
    lora.save_adapter(model, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config, default=list))
    lora.load_adapter(small_model(), folder)


def test_an_adapter_with_all_of_pefts_defaults_opens(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8).to_dict()
    open_with(tmp_path, **config | {"peft_type": "LORA"})


@pytest.mark.parametrize("name", [*(x for x in SETTINGS_OF_PEFT if x not in MAY_DIFFER), "of_tomorrow"])
def test_every_setting_of_peft_that_is_not_known_here_is_refused_by_name(name, tmp_path):
    default = peft.LoraConfig().to_dict().get(name)
    odd = {bool: not default, dict: {"q_proj": 1}, type(None): [5], str: "other"}.get(type(default), 3)
    if name == "init_lora_weights":
        odd = "pissa"
    with pytest.raises(ValueError, match=f"not plain LoRA: its {name} is"):
        open_with(tmp_path, **{name: odd})


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.IA3Config, peft.AdaLoraConfig])
def test_an_adapter_of_another_kind_is_refused_by_its_kind(kind, tmp_path):
    options = {"total_step": 10} if kind is peft.AdaLoraConfig else {}
    options |= {"feedforward_modules": []} if kind is peft.IA3Config else {}
    peft.get_peft_model(clip_pair()[0], kind(target_modules=QKV, **options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"its peft_type is {kind.__name__.removesuffix('Config').upper()}"):
        lora.load_adapter(CLIP(OPENAI_SMALL), tmp_path)


def test_settings_that_may_differ_are_those_that_only_say_where_adapters_went_or_are_obeyed():
    said = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    about = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    off = {"megatron_core", "qalora_group_size", "inference_mode"}
    obeyed = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
    assert said | about | off | obeyed == MAY_DIFFER


TARGETS = {
    "vision_model": 18,  # 3 blocks of 6
    "text_model": 12,
    "self_attn": 20,
    "vision_model.encoder.layers.0": 6,
    "all-linear": 32,  # and both projections
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_modules_name_takes_all_linears_in_it(target):
    assert lora.add_lora(small_model(), 2, 4, targets=[target]) == TARGETS[target]


def test_one_target_may_be_given_as_it_is():
    assert lora.add_lora(small_model(), 4, 8, targets="text_model") == 12  # 2 layers of 6


def test_all_linear_is_what_peft_takes():
    theirs = peft_on(hugging_face(OPENAI_SMALL), target_modules="all-linear")
    found = {our_name(name).rpartition(".")[0] for name, _ in theirs.named_parameters() if "lora_A" in name}
    model = small_model()
    lora.add_lora(model, 2, 4, targets=["all-linear"])
    assert set(lora.adapters(model)) == found


def test_an_unknown_target_is_told_what_there_is():
    said = "fc1, fc2, k_proj, out_proj, q_proj, text_projection, v_proj, visual_projection; "
    said += "text_model, vision_model, all-linear"
    with pytest.raises(ValueError, match=said):
        lora.add_lora(small_model(), 2, 4, targets=["vision_model.*q_proj"])


# --- Released weights ------------------------------------------------------------------------------------


def with_tokens(folder, added=0, padded=0, legacy=False):
    """A released folder whose tokenizer has tokens behind its end token, and its vocabulary none or some to
    spare. Returns its model and inputs."""
    config = replace(SPELLING, vocab_size=514 + added + padded)
    theirs, _ = released_folder(folder, config)
    tokenizer = data.train_tokenizer(["a b c"])
    tokenizer.add_tokens(["<cat>", "<dog>"][:added])
    tokenizer.save_pretrained(folder)
    if legacy:
        reconfigure(folder, eos_token_id=2)
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    return theirs, (photos(3), data.tokenize(tokenizer, ["a dog", "the <cat> is here", "b"], 16).long())


@pytest.mark.parametrize(
    "added, padded, legacy", [(2, 0, 0), (2, 62, 0), (0, 64, 0), (0, 64, 1), (0, 0, 1), (0, 0, 0)]
)
def test_added_tokens_and_padded_vocabularies_give_transformers_logits(added, padded, legacy, tmp_path):
    theirs, inputs = with_tokens(tmp_path, added, padded, legacy)
    ours = finetune.from_pretrained(tmp_path)
    assert ours.config.eos_token_id == 513
    assert difference(ours(*inputs), their_logits(theirs, *inputs)) < 1e-5
    finetune.check_tokenizer(ours, finetune.tokenizer_of(ours))


def test_the_old_end_token_with_tokens_behind_it_is_refused_with_what_to_write(tmp_path):
    with_tokens(tmp_path, added=1, legacy=True)
    with pytest.raises(data.InputError, match="write 513 for the 2 in text_config"):
        finetune.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["siglip", "chinese_clip", "clip_text_model", "clip_vision_model", "bert"])
def test_another_model_type_is_refused_by_name(kind, tmp_path):
    released_folder(tmp_path, SPELLING)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(data.InputError, match=f"model_type {kind}, not clip"):
        finetune.from_pretrained(tmp_path)


USES = {
    "--classify": ["--classify", "classes"],
    "--search": ["--search", "classes", "a dog"],
    "training": ["--data", "photos", "--epochs", "1", "--r", "2", "--batch-size", "20", "--out", "out"],
}


@pytest.mark.parametrize("use", USES)
def test_without_a_tokenizer_the_advice_is_what_the_command_takes(use, album, capsys):
    released_folder(Path("base"), SPELLING)
    class_folders(Path("classes"))
    Path("tokenizer").mkdir()
    for file in Path("base").glob("*token*"):
        file.rename(Path("tokenizer", file.name))
    flags = ["--base", "base", "--device", "cpu", *USES[use]]
    capsys.readouterr()
    assert finetune.main(flags) == 2
    assert_one_error(capsys, "no tokenizer in base: --tokenizer NAME gives")
    assert finetune.main([*flags, "--tokenizer", "tokenizer"]) == 0
    if use == "training":
        config = json.loads(Path("out/r2-seed0/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "base"
    other = data.train_tokenizer(["a dog"] * 9)  # two merges: another end token
    other.save_pretrained("other")
    shutil.rmtree("out", ignore_errors=True)
    assert finetune.main([*flags, "--tokenizer", "other"]) == 2
    assert_one_error(capsys, "is not the one of the model base")


# --- Exports ---------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path):
    """(A model, the folder to which it was exported, a photo)."""
    tokenizer = data.train_tokenizer(["two dogs in the snow"] * 3)
    end = tokenizer.eos_token_id
    model = shaken(CLIP(replace(OPENAI_SMALL, vocab_size=end + 1, eos_token_id=end))).eval()
    finetune.save_pretrained(model, tmp_path / "out", tokenizer)
    assert tokenizer.model_max_length > 1e6  # the caller's is as it was
    noise_photo(tmp_path / "a.png", (60, 80), seed=0)
    return model, tmp_path / "out", tmp_path / "a.png"


QUERIES = ["two dogs", "dogs in the snow " * 9]  # of which the second is cut


@torch.no_grad()
def test_an_export_opens_in_the_classes_of_one_tower(exported):
    model, folder, _ = exported
    pixels, ids = photos(2), captions([3, 16], 16, model.config)
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    text = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
    normalize = torch.nn.functional.normalize
    assert difference(normalize(vision(pixels).image_embeds, dim=-1), model.encode_image(pixels)) < 1e-5
    assert difference(normalize(text(ids).text_embeds, dim=-1), model.encode_text(ids)) < 1e-5


@torch.no_grad()
def test_an_export_is_called_as_diffusers_does(exported):
    model, folder, _ = exported
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    text = transformers.CLIPTextModel.from_pretrained(folder).eval()
    length = tokenizer.model_max_length
    ids = tokenizer(QUERIES, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    assert ids.input_ids.tolist() == data.tokenize(tokenizer, QUERIES, 16).tolist()
    assert difference(text(ids.input_ids).pooler_output, model.text_model(ids.input_ids)) < 1e-5


@torch.no_grad()
def test_an_export_is_called_as_sentence_transformers_does(exported):
    model, folder, photo = exported
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    batch = processor(
        text=QUERIES, images=[Image.open(photo)], padding=True, truncation=True, return_tensors="pt"
    )
    texts = theirs.get_text_features(batch["input_ids"], attention_mask=batch["attention_mask"])
    images = theirs.get_image_features(batch["pixel_values"])
    texts, images = (getattr(x, "pooler_output", x) for x in (texts, images))
    normalize = torch.nn.functional.normalize
    ids = data.tokenize(processor.tokenizer, QUERIES, 16)
    assert difference(normalize(texts, dim=-1), model.encode_text(ids)) < 1e-5
    pixels = data.normalize(torch.tensor(data.load_photo(photo, 40))[None])
    assert difference(normalize(images, dim=-1), model.encode_image(pixels)) < 1e-5


def with_a_head(model):
    model.head = torch.nn.Linear(24, 3)


def with_another_projection(model):
    model.visual_projection = torch.nn.Linear(48, 20, bias=False)


def without_a_projection(model):
    model.text_projection = torch.nn.Identity()


@pytest.mark.parametrize(
    "change, name",
    [
        (with_a_head, "head.bias"),
        (with_another_projection, "visual_projection.weight"),
        (without_a_projection, "text_projection.weight"),
    ],
)
def test_a_model_that_is_not_as_clip_is_not_saved(change, name, tmp_path):
    tokenizer = data.train_tokenizer(["a b c"])
    model = CLIP(SPELLING)
    change(model)
    with pytest.raises(data.InputError, match=f"can't hold this model: {name} ") as error:
        finetune.save_pretrained(model, tmp_path / "out", tokenizer)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()


class Encoder(torch.nn.Module):
    """One of a model's encoders, as a module to export."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return getattr(self.model, self.name)(x)


def encoders(causal):
    """{name: (module, what it was exported with, dynamic dimensions, other inputs)}"""
    model, batch = small_model(causal=causal).eval(), torch.export.Dim("batch")
    length = torch.export.Dim("length", min=2, max=16)
    return {
        "image": (Encoder(model, "encode_image"), photos(2), {0: batch}, photos(5)),
        "text": (
            Encoder(model, "encode_text"),
            captions([3, 9], 10),
            {0: batch, 1: length},
            captions([4, 7, 16], 16),
        ),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_torch_export_takes_any_batch_and_length(tower, causal):
    module, x, dynamic, other = encoders(causal)[tower]
    program = torch.export.export(module, (x,), dynamic_shapes=({**dynamic},)).module()
    assert difference(program(other), module(other)) < 1e-6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_onnx_takes_any_batch_and_length(tower, causal, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module, x, dynamic, other = encoders(causal)[tower]
    file = tmp_path / "model.onnx"
    torch.onnx.export(module, (x,), file, dynamo=True, dynamic_shapes=({**dynamic},), input_names=["x"])
    session = runtime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert difference(torch.tensor(found), module(other)) < 1e-5


# --- Classes and search ----------------------------------------------------------------------------------


def leave_behind(folder):
    """What Jupyter, macOS and Windows do."""
    (folder / ".ipynb_checkpoints").mkdir()
    noise_photo(folder / ".ipynb_checkpoints" / "0-checkpoint.png", (60, 80), seed=1)
    (folder / "__MACOSX" / "cat").mkdir(parents=True)
    (folder / "__MACOSX" / "0.png").write_bytes(b"\0\5\26\7")
    for place in (folder, folder / "cat"):
        for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", "classes.txt"):
            (place / name).write_bytes(b"junk")


def fitting_model():
    tokenizer = data.train_tokenizer(["a red fox", "the cat and a dog", "owl crow bee"])
    words = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return small_model(**words).eval(), tokenizer


def test_leftovers_of_the_system_are_no_classes_and_no_photos(tmp_path, capsys):
    class_folders(tmp_path / "photos")
    model, tokenizer = fitting_model()
    clean = finetune.classify(model, tokenizer, "photos")
    found = finetune.search(model, tokenizer, "photos", "a cat")
    leave_behind(tmp_path / "photos")
    capsys.readouterr()
    assert finetune.classify(model, tokenizer, "photos") == clean
    said = capsys.readouterr().out
    assert "40 photos of 7 classes" in said
    assert "left out  2 files that are no photos by their ending, as cat/classes.txt" in said
    assert finetune.search(model, tokenizer, "photos", "a cat") == found


def test_an_empty_class_folder_stays_a_candidate_and_is_said(tmp_path, capsys):
    class_folders(tmp_path / "photos")
    (tmp_path / "photos" / "zebra").mkdir()
    finetune.classify(*fitting_model(), "photos")
    said = capsys.readouterr().out
    assert "no photos of zebra" in said and "of 8 classes" in said and "chance 12.5" in said


def test_a_class_has_the_photos_of_its_folders_too_and_those_in_no_class_are_said(tmp_path, capsys):
    class_folders(Path("flat"))
    class_folders(Path("deep"))
    Path("deep/cat/more").mkdir()
    for path in list(Path("deep/cat").glob("*.png")):
        path.rename(path.parent / "more" / path.name)
    noise_photo(Path("deep/lost.png"), (60, 80))
    model, tokenizer = fitting_model()
    assert finetune.classify(model, tokenizer, "flat") == finetune.classify(model, tokenizer, "deep")
    said = capsys.readouterr().out
    assert "no photos of" not in said and "left out  1 photos in no class, as lost.png" in said


def test_folders_of_other_files_are_no_classes(capsys):
    class_folders(Path("photos"))
    model, tokenizer = fitting_model()
    clean = finetune.classify(model, tokenizer, "photos")
    written("photos/cache/store.uint8", "")
    Path("photos/loop").symlink_to(".")
    assert finetune.classify(model, tokenizer, "photos") == clean
    assert "classes   a_b, bee, cat, crow, dog, owl, red_fox\n" in capsys.readouterr().out


def test_odd_arguments_of_classify_and_search_are_one_clear_error():
    class_folders(Path("photos"))
    model, tokenizer = fitting_model()
    with pytest.raises(data.InputError, match="two commands"):
        finetune.parse_args(["--classify", "photos", "--search", "photos", "a dog"])
    os.mkdir(b"photos/caf\xe9")  # an empty class
    finetune.classify(model, tokenizer, "photos")
    finetune.search(model, tokenizer, "photos", "caf\udce9")
    one = finetune.classify(model, tokenizer, "photos", "a {}")  # one template is no list of letters
    assert one == finetune.classify(model, tokenizer, "photos", ["a {}"])
    with pytest.raises(data.InputError, match="template 'a photo' has no {} where"):
        finetune.classify(model, tokenizer, "photos", ["a photo"])
    with pytest.raises(data.InputError, match="count is 0"):
        finetune.search(model, tokenizer, "photos", "a dog", count=0)


def test_a_photo_whose_name_is_no_utf_8_is_found_printed_and_drawn(capsys):
    released_folder(Path("base"), SPELLING)
    noise_photo(Path("a.png"), (30, 30))
    Path("photos").mkdir()
    os.rename(b"a.png", b"photos/caf\xe9.png")
    assert finetune.main(["--base", "base", "--device", "cpu", "--search", "photos", "a dog"]) == 0
    assert "photos/caf\ufffd.png" in capsys.readouterr().out
    Image.open("search.png").load()


def test_search_finds_the_photos_at_any_depth_by_their_cosine_with_the_query(tmp_path):
    class_folders(tmp_path / "photos" / "deep" / "er")
    noise_photo(tmp_path / "photos" / "0.png", (60, 80), seed=99)
    model, tokenizer = fitting_model()
    text, cosines = model.encode_text(data.tokenize(tokenizer, ["a red fox"], 16))[0], {}
    for path in Path("photos").rglob("*.png"):
        pixels = data.normalize(torch.tensor(data.load_photo(path, 40))[None])
        cosines[path] = (model.encode_image(pixels)[0] @ text).item()
    found = finetune.search(model, tokenizer, "photos", "a red fox", count=41)
    assert [path for path, _ in found] == sorted(cosines, key=lambda path: -cosines[path])
    assert [cosine for _, cosine in found] == pytest.approx(sorted(cosines.values(), reverse=True), abs=1e-5)


@pytest.mark.parametrize("out", ["", "--out found"])
def test_one_command_searches_and_draws(out, capsys):
    released_folder(Path("base"), SPELLING)
    class_folders(Path("photos"))
    flags = ["--base", "base", "--device", "cpu", *out.split(), "--search"]
    assert finetune.main([*flags, "photos", "two dogs in the $now"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.fullmatch(r" *-?\d\.\d{3}  photos/\w+/\d+\.png", line)]) == 8
    Image.open(Path(out.removeprefix("--out "), "search.png")).load()
    for folder, query, message in (("nowhere", "a", "no photos in nowhere"), ("photos", " ", "no query")):
        assert finetune.main([*flags, folder, query]) == 2
        assert_one_error(capsys, message)


def test_the_studys_figure_has_a_panel_of_what_is_forgotten_where_the_base_has_data(tmp_path):
    row = {"variant": "zero-shot", "trainable": 0, "lowest val loss": 3.0}
    row |= {f"{name} {way}_r1": 9 for name in ("val", "test", "shapes val") for way in ("t2i", "i2t")}
    rows = [row | {"variant": "r=4", "trainable": 10, "lowest val loss": 2.0}]
    finetune.draw_study(tmp_path / "three.png", row, rows)
    few = [{key: value for key, value in one.items() if "shapes" not in key} for one in (row, *rows)]
    finetune.draw_study(tmp_path / "two.png", few[0], few[1:])
    three, two = (Image.open(tmp_path / name).size for name in ("three.png", "two.png"))
    assert three[0] == 1.5 * two[0] and three[1] == two[1]


# --- Bad input -------------------------------------------------------------------------------------------


def test_files_that_would_run_code_are_refused_and_do_not():
    trap = {"logit_scale": Trap(), "lora_A": Trap(), "best": Trap(), "model": {}}
    transformers.CLIPConfig().save_pretrained("base")
    for file in ("base/pytorch_model.bin", "run/checkpoint.pt", "adapter/adapter_model.bin", "words/odd.py"):
        Path(file).parent.mkdir(exist_ok=True)
        torch.save(trap, file)
    lora_config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0}
    Path("adapter/adapter_config.json").write_text(json.dumps(lora_config))
    config = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
    Path("words/tokenizer_config.json").write_text(json.dumps(config))
    Path("words/odd.py").write_text("open('ran', 'w')")
    load_adapter = functools.partial(lora.load_adapter, small_model())
    for opened, folder in (
        (finetune.from_pretrained, "base"),
        (finetune.from_pretrained, "run"),
        (load_adapter, "adapter"),
        (data.load_tokenizer, "words"),
    ):
        with pytest.raises(ValueError):
            opened(folder)
        assert not Path("ran").exists()
    torch.load("run/checkpoint.pt", weights_only=False)  # the trap works
    assert Path("ran").exists()


# For each setting of a recipe, in their order, a value that makes no sense.
ODD_SETTINGS = 0, 1, -1, math.nan, math.inf, 2.0, 2, 0, 0.0, 1.5, 1.0, 0, 1.0, 1.5, -0.5, 1.0, 1.5, -1


def test_a_recipe_refuses_every_setting_that_makes_no_sense():
    for setting, value in zip(fields(clip.Recipe), ODD_SETTINGS, strict=True):
        flag = "--" + setting.name.replace("_", "-")
        with pytest.raises(data.InputError, match=f"{flag} {value} is not between"):
            clip.Recipe(**{setting.name: value})


def written(file, content):
    """Writes a file, and its folder."""
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())


def pipes():
    """In place of ten photos; one that was opened would never end."""
    for name in NAMES[:10]:
        Path("photos/images", name).unlink()
        os.mkfifo(f"photos/images/{name}")


def cut_stores():
    for store in Path("cache").glob("*.uint8"):
        os.truncate(store, 1000)


KAGGLE, FLICKR8K, KARPATHY = "bad/results.csv", "bad/captions.txt", "bad/dataset_x.json"
EXTRA = '{"images": [{"filename": "1", "split": "extra", "sentences": []}]}'
OLD, UTF_16 = "--out old --resume", "a| b".encode("utf-16")
# (what is done, the flags, part of the message). The folder `photos` is whole, `old` is a run on it.
BAD = (
    (lambda: written(KAGGLE, ""), "--data bad", "begins with '', not with a header"),
    (lambda: written(KAGGLE, "a,b\n1.jpg,a dog\n"), "--data bad", "begins with 'a,b', not with a"),
    (lambda: written(KAGGLE, UTF_16), "--data bad", "begins with 'a| b', not with a header"),
    (lambda: written(KAGGLE, b"a.jpg| 0| \xc3\xa9\n\xff"), "--data bad", "byte 0xff in line 2 is neither"),
    (
        lambda: written(FLICKR8K, "image,caption\n1.jpg,a, b\n"),
        "--data bad",
        "line 2 has 3 cells, the header 2",
    ),
    (lambda: written(FLICKR8K, 'image,caption\n1.jpg,"a\n'), "--data bad", "unexpected end of data"),
    (lambda: written(FLICKR8K, "a,caption\n1.jpg,a\n"), "--data bad", "begins with 'a,caption', not with"),
    (
        lambda: written(FLICKR8K, "image,path,text\na,b,c\n"),
        "--data bad",
        "column image may be meant, or path",
    ),
    (
        lambda: written(FLICKR8K, "image,caption\n../1.jpg,a\n"),
        "--data bad",
        "missing below bad, as ../1.jpg",
    ),
    (lambda: written(KARPATHY, '{"images": ['), "--data bad", "Expecting value"),
    (lambda: written(KARPATHY, "[1, 2]"), "--data bad", "built in another way"),
    (lambda: written(KARPATHY, EXTRA), "--data bad", "'extra', which"),
    (None, "--data flickr30k", "give your copy with --data DIR, or try"),  # there is no network
    (None, "--data nowhere", "nowhere: no such folder"),
    (None, "--data photos/dataset_flickr30k.json", "dataset_flickr30k.json is a file: give the folder"),
    (lambda: Path("empty").mkdir(), "--data empty", "empty: no captions in it"),
    (lambda: replace_in_captions('"val"', '"train"'), "", "there are no val photos: too few"),
    (pipes, "", "10 of 120 photos are missing below photos, as 0.jpg; there is photos/images/10"),
    (cut_stores, "", "is damaged: delete it"),
    (None, "--photos 81", "--photos 81: there are 80 to train on"),
    (None, "--photos 1", "there is one photo to train on: a batch needs two at least"),
    (None, "--photos -1", "--photos -1: give a number of photos, or 0 for all"),
    (None, "--lr nan", "--lr nan is not between"),
    (None, "--epoch 3", "unrecognized arguments: --epoch"),
    (None, "--device cuda:99", "no device cuda:99 here"),
    (None, "--tokenizer nowhere", "no tokenizer nowhere"),
    (lambda: Path("new").touch(), "", "--out new is a file: give a folder"),
    (None, "--out old", "old holds a run"),
    (None, "--out .", "--out is the folder you are in: give one of its own"),
    (None, f"{OLD} --seed 5", "old can't be resumed: seed was 0"),
    (lambda: replace_in_captions("said in", "told in"), OLD, "photos, captions or tokenizer are others"),
    (lambda: os.truncate("old/checkpoint.pt", 1000), OLD, "missing, damaged or no checkpoint"),
    (lambda: torch.save({"model": 1}, "old/checkpoint.pt"), OLD, "damaged, older or of another model"),
)


def tree():
    return {path for path in Path().rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize("change, flags, message", BAD)
def test_bad_input_is_one_line_and_exit_code_2(change, flags, message, copied, capsys):
    if change:
        change()
    before = tree()
    assert train_toy(f"--out new {flags}") == 2
    assert_one_error(capsys, message)
    assert tree() == before and hidden("cache") == []


BAD_STUDY = {
    "--r 0": "--r and --seeds take whole numbers, 1 at least",
    "--base nowhere": "no CLIP in nowhere",
    "--base run": "run holds no whole model, perhaps an adapter",
    "--base others": "is not the one of the model others",
    "--targets query": "no plain Linear of the model is called 'query'",
    "--alpha 0": "alpha is 0",
    "--classify nowhere": "no photos in nowhere",
    "--resume --out trained": "trained holds a run of clip.py, not a study",
}


@pytest.mark.parametrize("flags", BAD_STUDY)
def test_bad_input_to_a_study_is_one_line_and_exit_code_2(flags, studied, album, capsys):
    released_folder("base", SPELLING)
    released_folder("others", OPENAI_SMALL)
    Path("run").symlink_to(studied / "runs/shapes-sketches/r4-seed0")
    Path("trained").symlink_to(studied / "runs/shapes")
    capsys.readouterr()
    given = f"--base base --data photos --out out --batch-size 20 --device cpu {flags}"
    assert finetune.main(given.split()) == 2
    assert_one_error(capsys, BAD_STUDY[flags])
    assert not Path("out").exists()


# --- Speed -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("B, r, dropout", [(512, 0, 0.0), (256, 64, 0.1), (256, 64, 0.0)])
def test_a_whole_training_step_keeps_the_gpu_at_matrix_products(B, r, dropout):
    """As a share of the rate of a product of two large matrices: 0.49 from scratch on one H200."""
    a, device = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16), torch.device("cuda")
    product = 2 * len(a) ** 3 / median_seconds(lambda i: a @ a)
    model, step = whole_step(B, r, dropout, PRESETS["ViT-B/16"], device)
    with FlopCounterMode(display=False) as counter:  # matrix products and attention, forth and back
        step(0)
    data.compile_blocks(model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(step)
    share, memory = counter.get_total_flops() / seconds / product, torch.cuda.max_memory_allocated() / 2**30
    print(f"batch {B}, r={r}, dropout {dropout}: {B / seconds:,.0f} pairs/s, peak {memory:.1f} GiB,")
    print(f"{100 * share:.0f} % of a product's {product / 1e12:.0f} TFLOP/s")
    assert share > (0.2 if r else 0.4)


# --- The files -------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()
MAY_IMPORT = {"data": set(), "clip": {"data"}, "lora": set(), "finetune": {"data", "clip", "lora"}}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way_no_module_changes_a_global_and_no_function_has_60_lines(name):
    for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert imported & set(MAY_IMPORT) <= MAY_IMPORT[name]
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            assert ast.unparse(node.value) not in MAY_IMPORT, ast.unparse(node)
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_readme_and_the_scripts_name_the_same_packages():
    (line,) = re.findall(r"^pip install (.*)$", README, re.MULTILINE)
    packages = [package.strip('"') for package in line.split()]
    for name in ("clip.py", "finetune.py", "test_clip.py"):
        header = re.match(r"# /// script\n(.*?)# ///\n", (HERE / name).read_text(), re.DOTALL)
        (listed,) = re.findall(r"# dependencies = (.*)", header[1])
        assert json.loads(listed) == packages, name


def test_the_readmes_python_runs_as_one_notebook(study_folder):
    """In the folder of a study, on few drawn scenes; what trains does so for one epoch."""
    plt.switch_backend("agg")  # draws files, on a machine with a screen too
    blocks, notebook = re.findall(r"```python\n(.*?)```", README, re.DOTALL), {}
    assert blocks
    for block in blocks:
        block = re.sub(r"flickr\d+k", "shapes", block)
        exec(re.sub(r"epochs=\d+", "epochs=1", block), notebook)


# Of each exercise of the README what it changes in clip.py, and into what.
EXERCISES = [
    ("math.log(1 / 0.07)", "0.07"),
    (
        "x = self.encoder(x, end, mask, read_mask=padding_mask)",
        "x = self.encoder(x, end, None, None)",
    ),
    (
        "return self.layers[-1](x, read_mask, read[:, None])[:, 0]",
        "return self.layers[-1](x, mask).mean(dim=1)",
    ),
    (
        "return (loss_image + loss_text) / 2",
        "signs = 2 * torch.eye(len(labels)) - 1\n"
        "return -F.logsigmoid(signs * (logits_per_image - math.log(len(labels)))).sum() / len(labels)",
    ),
    ("return (loss_image + loss_text) / 2", "return loss_image"),
    (
        "return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]",
        "return self.token_embedding(ids)",
    ),
]


@pytest.mark.parametrize("old, new", EXERCISES)
def test_the_exercises_change_a_line_of_clip_that_then_runs(old, new):
    source = (HERE / "clip.py").read_text()
    assert source.count(old) == 1 and all(f"`{line}`" in README for line in new.splitlines())
    changed = ModuleType("changed")
    exec(source.replace(old, new.replace("\n", "\n    ")), changed.__dict__)
    loss = changed.contrastive_loss(changed.CLIP(SMALL)(photos(3), captions([3, 5, 9])))
    loss.backward()
    assert loss.isfinite() and loss != 0


def test_the_readmes_pictures_are_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    pictures += re.findall(r"\]\((assets/[^)]+)\)", README)
    assert {HERE / picture for picture in pictures} == set((HERE / "assets").iterdir())
    for picture in set(pictures):
        if picture.endswith(".svg"):
            ElementTree.parse(HERE / picture)
        else:
            Image.open(HERE / picture).load()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
