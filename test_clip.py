# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "numpy", "pillow", "transformers>=5.8", "peft>=0.18", "pytest", "matplotlib"]
# ///
"""What this project claims, a test for each claim: run `pytest`. With -s each prints the largest difference.

Expected values never come from the code under test. They are those of transformers, peft or PyTorch, of a
formula that is written out here, or worked out by hand. SLOW=1 adds the tests that take long. FLICKR
names a folder of Flickr photos with captions; without it one test is skipped.
"""

import copy
import csv
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import DEFAULT, patch
from xml.etree import ElementTree

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is not on this machine is reported missing at once
import clip  # before torch: it sets OMP_WAIT_POLICY
import data

# isort: split
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from matplotlib import pyplot as plt
from PIL import Image, ImageEnhance
from safetensors.torch import load_file, save_file

import finetune
import lora
from clip import CLIP, PRESETS, CLIPConfig, TowerConfig, contrastive_loss, recall_at_k

# --- Helpers ---------------------------------------------------------------------------------------------

HERE = Path(clip.__file__).parent
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="takes long: set SLOW=1")
both_text_towers = pytest.mark.parametrize("causal", [False, True], ids=["bert", "causal"])


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test starts with the same seed in an empty folder."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


def difference(a, b):
    """The largest absolute difference of two tensors, or of two dicts of tensors; NaN if there is a NaN."""
    if torch.is_tensor(a):
        a, b = {"": a}, {"": b}
    assert {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}
    gaps = torch.stack([(a[name] - b[name]).abs().max() for name in a])
    print(f"largest difference {gaps.max():.1e} {list(a)[gaps.argmax()]}")
    return gaps.max().item()


# A small model. No two widths are equal, so that none can be taken for another, and the end token does not
# have the largest id.
SMALL = CLIPConfig(TowerConfig(48, 3, 4, 96), TowerConfig(32, 2, 2, 80), image_size=40, patch_size=8)
SMALL = replace(SMALL, projection_dim=24, vocab_size=100, eos_token_id=60, max_position_embeddings=16)
OPENAI_SMALL = replace(SMALL, causal=True)
GELU = {name: replace(getattr(SMALL, name), hidden_act="gelu") for name in ("vision", "text")}
GELU_SMALL = replace(OPENAI_SMALL, **GELU)
OPENAI_B_16 = replace(PRESETS["ViT-B/16"], causal=True)
QKV = ["q_proj", "k_proj", "v_proj"]
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
PLAIN = clip.Recipe(**clip.PLAIN)


@torch.no_grad()
def shaken(model, noise=0.1):
    """Add noise to every parameter: biases of 0, norms of 1 and embeddings of 0.02 would hide mistakes."""
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
    """Random words, the end token in place `lengths` - 1, and after it the end token again as padding."""
    ids = torch.randint(config.vocab_size, (len(lengths), width))
    ids[ids == config.eos_token_id] = 0
    return ids.where(before([length - 1 for length in lengths], width), config.eos_token_id)


def keep_outputs(model):
    """A dict that is filled with the output of each module when the model runs."""
    outputs = {}
    for name, module in model.named_modules():
        # activation_fn is a function in our MLP, but a module in theirs.
        chosen = ".layers." in name or name.endswith(("embeddings", "norm", "_projection"))
        if chosen and "activation_fn" not in name:

            def keep(module, inputs, output, name=name):
                outputs[name] = output[0] if isinstance(output, tuple) else output

            module.register_forward_hook(keep)
    return outputs


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def views(crops=1, sentences=1):
    """Some crops (12 V, 3, S, S) and captions (12 K, T) of 12 photos."""
    return photos(12 * crops), captions([3, 5, 9, 16] * 3 * sentences)


def whole_loss(model, pixels, ids):
    """clip.multiview_loss of all views of 12 photos at once."""
    images, texts = model.encode_image(pixels), model.encode_text(ids)
    return clip.multiview_loss(model, images.unflatten(0, (12, -1)), texts.unflatten(0, (12, -1)))


def general_step(model, pixels, ids, **settings):
    """(loss, gradients) of train_step_general, which here changes no weights."""
    with patch.object(clip, "update_weights"):
        recipe = replace(PLAIN, **settings)
        loss = clip.train_step_general(model, [], NO_SCALER, pixels, ids, 0.0, recipe)
    return loss, gradients(model)


def hugging_face(config):
    """transformers' CLIPModel of the same size, with attention in plain matrix products."""
    vision = dict(image_size=config.image_size, patch_size=config.patch_size)
    text = dict(vocab_size=config.vocab_size, max_position_embeddings=config.max_position_embeddings)
    text |= dict(bos_token_id=0, eos_token_id=config.eos_token_id)
    towers = dict(vision_config=vars(config.vision) | vision)
    towers |= dict(text_config=vars(config.text) | text, projection_dim=config.projection_dim)
    return transformers.CLIPModel(transformers.CLIPConfig(**towers, attn_implementation="eager"))


def both_models(config):
    """Our model and theirs with the same weights, our inputs, and the same inputs under their names."""
    # This noise keeps the activations of a wide model, and so the rounding errors, as small as SMALL's.
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
    """Write a Hugging Face folder with random weights. Returns its model, and our inputs for it."""
    theirs = shaken(hugging_face(config)).eval()
    theirs.save_pretrained(folder)
    data.train_tokenizer(["a b c"]).save_pretrained(folder)
    return theirs, (photos(4, config), captions([2, 5, 9, 16], 16, config))


# Runs on 100 drawn scenes, with a checkpoint after every epoch.
FEW = {"val": 70, "test": 70, "train": 100}


def few_scenes(monkeypatch):
    load_drawn = data.load_drawn
    monkeypatch.setattr(data, "load_drawn", lambda _, *rest: load_drawn(FEW, *rest))
    monkeypatch.setattr(clip, "SAVE_FRACTION", math.inf)


def train_shapes(monkeypatch, flags=""):
    with monkeypatch.context() as patches:
        few_scenes(patches)
        return clip.main(f"--data shapes --batch-size 25 --epochs 3 --device cpu {flags}".split())


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory):
    """A folder with a run of three epochs in runs/shapes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("shapes"))
        assert train_shapes(monkeypatch) == 0
        return Path.cwd()


def adapt_to_sketches(flags):
    given = "--base runs/shapes --data sketches --epochs 2 --batch-size 25 --device cpu"
    return finetune.main(f"{given} {flags}".split())


@pytest.fixture(scope="module")
def studied(shapes_run):
    """The same folder after finetune.py adapted that model to `sketches`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(shapes_run)
        few_scenes(monkeypatch)
        assert adapt_to_sketches("--r 4 16 --full") == 0
    return shapes_run


MODULE = Path(__file__).stem  # of these tests, for other processes
WITH_PATH = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{Path(__file__).parent}"}


def run_python(*arguments, **variables):
    """What a Python process that ends well writes to stdout."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=WITH_PATH | variables, timeout=170, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_numbers(run, other):
    ours, theirs = clip.load_checkpoint(run), clip.load_checkpoint(other)
    for row in (*ours["history"], *theirs["history"]):
        del row["minutes"]
    assert ours["history"] == theirs["history"]
    for weights in ("model", "ema_model"):
        assert difference(ours[weights], theirs[weights]) == 0


def assert_one_error(capsys, message):
    """A command wrote one line to stderr: `error: ` and the message. Progress bars don't count."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line and not line.startswith("decoding")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], errors


def noise_photo(path, shape=(60, 80), seed=0):
    """Write a photo of noise and return it."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


# --- The model -------------------------------------------------------------------------------------------

sizes = [pytest.param(OPENAI_SMALL, id="quick_gelu"), pytest.param(GELU_SMALL, id="gelu")]
all_sizes = [*sizes, pytest.param(OPENAI_B_16, id="ViT-B/16", marks=slow)]


@pytest.mark.parametrize("config", sizes)
def test_hidden_states_and_gradients_equal_hugging_faces(config):
    ours, theirs, inputs, their_inputs = both_models(config)
    found, expected = keep_outputs(ours), keep_outputs(theirs)
    contrastive_loss(ours(*inputs)).backward()
    theirs(**their_inputs).loss.backward()
    # The outputs at padding are never used. They differ: Hugging Face masks padding, our causal tower does
    # not need to. And our last block computes the class token or the end token alone.
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
        # The bias of keys adds the same number to a whole row of the softmax, so its gradient is 0.
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


def test_bert_tower_is_hugging_faces_without_a_mask():
    ours, theirs, (_, ids), their_inputs = both_models(replace(SMALL, causal=False))
    expected = []
    for row, real in zip(ids, their_inputs["attention_mask"].bool()):  # each caption alone, without padding
        x = theirs.text_model.embeddings(row[real][None])
        x = theirs.text_model.encoder(inputs_embeds=x).last_hidden_state
        expected.append(theirs.text_model.final_layer_norm(x)[0, -1])
    assert difference(ours.text_model(ids), torch.stack(expected)) < 1e-5


@both_text_towers
def test_masks_are_those_of_the_docstring(causal):
    tables = {}  # {word: (its line in the table of BERT, its line in the causal one)}
    for line in clip.TextTransformer.__doc__.splitlines():
        word, *cells = line.split("<-")[0].split() or [""]
        if len(cells) == 10 and set(cells) <= {"x", "."}:
            tables[word] = cells[:5], cells[5:]
    assert list(tables) == ["start", "a", "dog", "end", "pad"]
    expected = torch.tensor([[cell == "x" for cell in tables[word][causal]] for word in tables])

    tower, used = CLIP(replace(SMALL, causal=causal)).text_model, []
    for block in tower.encoder.layers:
        block.self_attn.register_forward_pre_hook(lambda module, arguments: used.append(arguments[2]))
    tower(torch.tensor([[1, 2, 3, 60, 60]]))
    assert torch.equal(used[0].expand(1, 1, 5, 5)[0, 0], expected)
    assert torch.equal(used[-1].expand(1, 1, 1, 5)[0, 0, 0], expected[3])  # the last block, the line `end`


# --- The loss and recall ---------------------------------------------------------------------------------


def test_loss_has_the_numbers_of_its_docstring():
    text = " ".join(contrastive_loss.__doc__.split())
    lines = [line.split() for line in contrastive_loss.__doc__.splitlines() if line.count("0.") == 6]
    table = np.array(lines, float)
    odds = np.exp(table[:, :3])
    by_row, by_column = odds / odds.sum(1, keepdims=True), odds / odds.sum(0, keepdims=True)
    assert (table[:, 3:6] == by_row.round(2)).all() and (table[:, 6:] == by_column.round(2)).all()
    loss = -np.log([by_row.diagonal(), by_column.diagonal()]).mean()
    logits = torch.tensor(table[:, :3])
    assert contrastive_loss(logits).item() == pytest.approx(loss, abs=1e-6)
    several = contrastive_loss(torch.stack([logits, torch.ones(3, 3)]))  # the mean over matrices
    assert several.item() == pytest.approx((loss + math.log(3)) / 2, abs=1e-6)
    assert f"over both, {loss:.2f} here" in text
    for B, number in ((3, "three pairs"), (128, "128")):  # chance
        assert f"{math.log(B):.2f} for {number}" in text
        assert contrastive_loss(torch.ones(B, B)).item() == pytest.approx(math.log(B), abs=1e-6)


def recall(text_to_image, image_to_text):
    t2i = {f"t2i_r{k}": value for k, value in text_to_image.items()}
    return pytest.approx(t2i | {f"i2t_r{k}": value for k, value in image_to_text.items()})


FIVE_EACH = torch.arange(40).repeat_interleave(5)
UNEVEN = torch.cat([torch.arange(40), torch.arange(60) ** 2 % 40])  # 1 to 13 each, in no order


@pytest.mark.parametrize("image_index", [FIVE_EACH, UNEVEN], ids=["five captions each", "uneven"])
def test_recall_is_that_by_sorting(image_index):
    images, noise = torch.randn(40, 24), torch.randn(len(image_index), 24)
    texts = images[image_index] + 2 * noise
    similarity = images @ texts.T
    best_photos, best_captions = (similarity.argsort(dim, descending=True) for dim in (0, 1))
    t2i, i2t = {}, {}
    for k in (1, 5, 10):
        t2i[k] = np.mean([own in best_photos[:k, c] for c, own in enumerate(image_index)])
        i2t[k] = np.mean([photo in image_index[best_captions[photo, :k]] for photo in range(40)])
    assert 0.1 < t2i[1] < t2i[5] < 1
    assert recall_at_k(images, texts, image_index) == recall(t2i, i2t)


def test_ties_and_nan_count_as_misses():
    similarity = (torch.arange(40)[:, None] == FIVE_EACH).float()
    similarity[0, 5] = 1  # photo 0 with the first caption of photo 1: one query each way
    found = recall_at_k(similarity, torch.eye(200), FIVE_EACH, ks=(1, 2))
    assert found == recall({1: 199 / 200, 2: 1}, {1: 39 / 40, 2: 1})
    nothing = {1: 0, 5: 0, 10: 0}
    for value in (1.0, torch.nan):
        alike = torch.full((40, 3), value), torch.full((200, 3), value)
        assert recall_at_k(*alike, FIVE_EACH) == recall(nothing, nothing)

    # A caption of NaN finds nothing. For every photo it comes before all others.
    texts = torch.eye(40)[FIVE_EACH]
    texts[5] = torch.nan
    found = recall_at_k(torch.eye(40), texts, FIVE_EACH, ks=(1, 2))
    assert found == recall({1: 199 / 200, 2: 199 / 200}, {1: 0, 2: 39 / 40})


# --- Starting values, padding, patch dropout -------------------------------------------------------------


def test_weights_start_at_openais_scales():
    std = {"visual_projection.weight": 48**-0.5, "text_projection.weight": 32**-0.5}
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    std |= {f"{vision}.class_embedding": 48**-0.5, f"{vision}.position_embedding.weight": 48**-0.5}
    std[f"{vision}.patch_embedding.weight"] = (3 * 3 * 8 * 8) ** -0.5  # PyTorch's default
    std |= {f"{text}.token_embedding.weight": 0.02, f"{text}.position_embedding.weight": 0.01}
    for tower, C, L in (("vision_model", 48, 3), ("text_model", 32, 2)):
        for block in (f"{tower}.encoder.layers.{i}" for i in range(L)):
            std |= {f"{block}.self_attn.{name}.weight": C**-0.5 for name in QKV}
            std[f"{block}.self_attn.out_proj.weight"] = (C * 2 * L) ** -0.5
            std[f"{block}.mlp.fc1.weight"] = (2 * C) ** -0.5
            std[f"{block}.mlp.fc2.weight"] = (C * 2 * L) ** -0.5
    model = CLIP(SMALL)
    assert difference(model.logit_scale, torch.tensor(2.6593)) < 1e-4  # ln 14.29, not 0.07
    for name, parameter in model.named_parameters():
        if name in std:
            assert abs(parameter.std() / std[name] - 1) < 4 / math.sqrt(2 * parameter.numel()), name
            assert abs(parameter.mean() / std[name]) < 4 / math.sqrt(parameter.numel()), name
        elif name != "logit_scale":
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


@torch.no_grad()
def test_mimetic_attention_starts_as_minus_its_mean():
    model = CLIP(SMALL)
    clip.init_mimetic(model)
    for tower, L in ((model.vision_model, 3), (model.text_model, 2)):
        for block in tower.encoder.layers:
            attention = block.self_attn
            assert difference(attention.k_proj.weight, attention.q_proj.weight) == 0
            ratio = attention.out_proj.weight / -attention.v_proj.weight.T
            assert difference(ratio, ratio.mean().expand_as(ratio)) < 1e-5
            assert ratio.mean().item() == pytest.approx((2 * L) ** -0.5, rel=0.1)  # out_proj is as large


@both_text_towers
def test_only_tokens_up_to_the_first_end_matter(causal):
    model, lengths = small_model(causal=causal), [3, 6, 16]
    ids = captions(lengths)
    pooled = model.text_model(ids)
    alone = torch.cat([model.text_model(ids[i : i + 1, :length]) for i, length in enumerate(lengths)])
    assert difference(pooled, alone) < 1e-5
    garbage = ids.where(before(lengths, 16), torch.randint(100, (3, 16)))
    assert difference(pooled, model.text_model(garbage)) == 0


def test_patch_dropout_keeps_half_only_in_training():
    model, pixels = small_model(), photos(3)
    embeddings = model.vision_model.embeddings
    whole, embeddings.patch_dropout = embeddings(pixels), 0.5
    assert torch.equal(embeddings.eval()(pixels), whole)
    half = embeddings.train()(pixels)
    assert half.shape == (3, 1 + 12, 48)  # of 25 patches
    assert torch.equal(half[:, 0], whole[:, 0])
    chosen = set()
    for photo in range(3):  # each patch at most once, with the position that it has in the photo
        places = (half[photo, 1:, None] == whole[photo, None, 1:]).all(dim=-1).nonzero()
        assert len(places) == 12 and len(places[:, 1].unique()) == 12
        chosen.add(tuple(places[:, 1].sort().values.tolist()))
    assert len(chosen) == 3  # other patches of each photo


# --- Several views, large batches, several processes -----------------------------------------------------


@pytest.mark.parametrize("crops, sentences", [(1, 1), (2, 3), (3, 1)])
def test_all_views_of_a_photo_are_positives(crops, sentences):
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
            expected = expected + written_out(x[:, i], x[:, j]) / len(pairs) / 2
    loss, photo_caption = clip.multiview_loss(model, images, texts)
    assert difference(loss, expected) < 1e-5
    assert difference(photo_caption, first) < 1e-5


@pytest.mark.parametrize("trained", ["", "text_projection", "visual_projection"])  # "" is everything
@pytest.mark.parametrize("crops, sentences", [(1, 1), (2, 3)])
@pytest.mark.parametrize("micro_batch", [0, 1, 4, 5, 12])
def test_micro_batches_keep_the_gradient(micro_batch, crops, sentences, trained):
    model, (pixels, ids) = small_model(), views(crops, sentences)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    loss, photo_caption = whole_loss(model, pixels, ids)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    settings = dict(views=crops, texts=sentences, micro_batch=micro_batch)
    loss, found = general_step(model, pixels, ids, **settings)
    assert difference(loss, photo_caption) < 1e-6
    assert difference(found, expected) < 1e-5


def test_micro_batches_repeat_their_dropout():
    model, (pixels, ids) = small_model().train(), views()
    model.vision_model.embeddings.patch_dropout = 0.5
    encoded, encode_image = [], model.encode_image
    model.encode_image = lambda x: encoded.append(encode_image(x)) or encoded[-1]
    general_step(model, pixels, ids, micro_batch=4)
    assert difference(torch.cat(encoded[:3]), torch.cat(encoded[3:])) == 0
    assert not torch.equal(encoded[0], encode_image(pixels[:4]))


def test_textbook_step_equals_the_general_step():
    (pixels, ids), weights = views(), []
    for step, more in ((clip.train_step, []), (clip.train_step_general, [PLAIN])):
        torch.manual_seed(1)
        model = small_model()
        start = model.visual_projection.weight.detach().clone()
        sgd = torch.optim.SGD(model.parameters())  # AdamW would enlarge the rounding of gradients near 0
        step(model, [sgd], NO_SCALER, pixels, ids, 1.0, *more)
        assert difference(model.visual_projection.weight, start) > 1e-3
        weights.append(model.state_dict())
    assert difference(*weights) < 1e-6


def step_of_two_processes():
    """Each process has half of the pairs, at once and then in micro-batches. Saves what process 0 finds."""
    clip.open_device("cpu")  # connects the processes
    found, own = [], slice(12 * clip.RANK, 12 * clip.RANK + 12)
    for micro_batch in (0, 2):
        torch.manual_seed(0)
        model, (pixels, ids) = small_model(), views(2, 2)
        settings = dict(views=2, texts=2, micro_batch=micro_batch)
        found.append(general_step(model, pixels[own], ids[own], **settings))
    if clip.RANK == 0:
        torch.save(found, "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one():
    Path("two.py").write_text(f"import {MODULE}\n{MODULE}.step_of_two_processes()")
    run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "two.py")
    model, (pixels, ids) = small_model(), views(2, 2)
    expected, photo_caption = whole_loss(model, pixels, ids)
    expected.backward()
    # With micro-batches a process adds up its gradients in another order, which changes the rounding.
    for (loss, found), tolerance in zip(torch.load("found.pt"), (3e-6, 1e-5)):
        assert difference(loss, photo_caption) < 1e-6
        assert difference(found, gradients(model)) < tolerance


# --- Released weights and exports ------------------------------------------------------------------------

# The size of the vocabulary that train_tokenizer gives for captions of single letters.
SPELLING = replace(OPENAI_SMALL, vocab_size=514, eos_token_id=513)


def reconfigure(part, **changes):
    """Change entries of base/config.json."""
    described = json.loads(Path("base/config.json").read_text())
    (described[part] if part else described).update(changes)
    Path("base/config.json").write_text(json.dumps(described))


def process(**changes):
    """Write base/preprocessor_config.json with changes of OpenAI's values."""
    transformers.CLIPImageProcessor(**dict(size=40, crop_size=40) | changes).save_pretrained("base")


def pixels_of(path):
    return data.normalize(torch.tensor(data.load_photo(path, 40))[None])


RELEASED = {
    "legacy end token": dict(vocab_size=514, eos_token_id=513),
    "padded vocabulary": dict(vocab_size=600, eos_token_id=513),
    "wider": dict(vision=TowerConfig(96, 4, 6, 192), projection_dim=40, image_size=56, patch_size=14),
}


@pytest.mark.parametrize("changes", RELEASED.values(), ids=RELEASED)
def test_released_weights_give_transformers_logits(changes):
    config = replace(OPENAI_SMALL, **changes)
    theirs, inputs = released_folder("base", config)
    if "eos_token_id" in changes:
        reconfigure("text_config", eos_token_id=2)  # as in OpenAI's own
    ours = finetune.from_pretrained("base")
    assert ours.config == config and not ours.training
    assert (ours.name_or_path, ours.tokenizer_path) == ("base", "base")
    assert difference(ours(*inputs), their_logits(theirs, *inputs)) < 1e-5


def test_tokens_may_be_added_after_the_end_token():
    theirs, _ = released_folder("base", replace(SPELLING, vocab_size=520))
    tokenizer = data.load_tokenizer("base")
    tokenizer.add_tokens(["<cat>", "<dog>"])
    tokenizer.save_pretrained("base")
    ours = finetune.from_pretrained("base")
    ids = data.tokenize(finetune.tokenizer_of(ours), ["a dog", "the <cat> is here"], 16).long()
    pixels = photos(3)
    assert difference(ours(pixels, ids), their_logits(theirs, pixels, ids)) < 1e-5
    reconfigure("text_config", eos_token_id=2)  # now transformers would read the caption at <cat>
    with pytest.raises(data.InputError, match="set eos_token_id to 513"):
        finetune.from_pretrained("base")


def remove_weight():
    tensors = load_file("base/model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, "base/model.safetensors", {"format": "pt"})


BAD_FOLDERS = {
    "not clip": (lambda: reconfigure(None, model_type="siglip"), "config.json: model_type is siglip"),
    "activation": (lambda: reconfigure("text_config", hidden_act="relu"), "text_config.hidden_act is relu"),
    "patches": (lambda: reconfigure("vision_config", image_size=44), "image_size modulo patch_size is 4"),
    "mean": (lambda: process(image_mean=[0.5] * 3), "preprocessor_config.json: image_mean is"),
    "weight missing": (remove_weight, "missing or unexpected weight visual_projection.weight"),
    "cut": (lambda: os.truncate("base/model.safetensors", 5000), "can't read the weights of base"),
    "no weights": (lambda: os.remove("base/model.safetensors"), "no file named model.safetensors"),
    "nothing": (lambda: os.remove("base/config.json"), "no CLIP in base"),
}


@pytest.mark.parametrize("change, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_what_is_not_such_a_clip_is_refused(change, message):
    released_folder("base", OPENAI_SMALL)
    process()
    change()
    with pytest.raises(data.InputError, match=message) as error:
        finetune.from_pretrained("base")
    assert len(str(error.value).splitlines()) == 1


def test_another_tokenizer_is_refused():
    released_folder("base", SPELLING)
    data.train_tokenizer(["a dog"] * 9).save_pretrained("other")  # two merges: another end token
    with pytest.raises(data.InputError, match="does not fit a model of 514 tokens with the end token 513"):
        finetune.tokenizer_of(finetune.from_pretrained("base", "other"))


@torch.no_grad()
def test_what_we_save_transformers_opens():
    tokenizer = data.train_tokenizer(["two dogs in the snow"] * 3)
    end = tokenizer.eos_token_id
    model = shaken(CLIP(replace(OPENAI_SMALL, vocab_size=end + 1, eos_token_id=end))).eval()
    tokenizer.save_pretrained("words")
    model.tokenizer_path = "words"
    lora.add_lora(model, r=4, alpha=8)
    shaken(model)
    texts = ["two dogs", "dogs in the snow " * 9]  # the second is cut
    noise_photo("a.png")
    expected = model(pixels_of("a.png"), data.tokenize(tokenizer, texts, 16))
    with pytest.raises(data.InputError, match="not merged"):
        finetune.save_pretrained(model, "ours")
    lora.merge(model)
    finetune.save_pretrained(model, "ours")
    theirs = transformers.CLIPModel.from_pretrained("ours").eval()
    processor = transformers.CLIPProcessor.from_pretrained("ours")
    options = dict(padding=True, truncation=True, return_tensors="pt")
    batch = processor(text=texts, images=Image.open("a.png"), **options)
    assert difference(theirs(**batch).logits_per_image, expected) < 1e-5
    assert finetune.from_pretrained("ours").config == model.config
    text = transformers.CLIPTextModelWithProjection.from_pretrained("ours").eval()  # as diffusers does
    ids = captions([3, 16], 16, model.config)
    assert difference(F.normalize(text(ids).text_embeds, dim=-1), model.encode_text(ids)) < 1e-5
    with pytest.raises(data.InputError, match="no BERT-style text tower"):
        finetune.save_pretrained(CLIP(SMALL), "out")


@slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["encode_image", "encode_text"])
def test_exports_take_any_batch_and_length(name, causal):
    module = small_model(causal=causal).eval()
    module.forward = getattr(module, name)
    x, other, dynamic = photos(2), photos(5), {0: torch.export.Dim("batch")}
    if name == "encode_text":
        x, other = captions([3, 9], 10), captions([4, 7, 16], 16)
        dynamic[1] = torch.export.Dim("length", min=2, max=16)
    program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,)).module()
    assert difference(program(other), module(other)) < 1e-6
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(module, (x,), "m.onnx", dynamo=True, dynamic_shapes=(dynamic,), input_names=["x"])
    session = runtime.InferenceSession("m.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert difference(torch.tensor(found), module(other)) < 1e-5


# --- LoRA, against peft ----------------------------------------------------------------------------------


def adapted(**options):
    """A small model with new adapters."""
    model = small_model()
    lora.add_lora(model, **dict(r=4, alpha=8) | options)
    return model


def peft_on(model, **options):
    """peft's model, with random A and B."""
    theirs = peft.get_peft_model(model, peft.LoraConfig(**dict(target_modules=QKV) | options)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return theirs


def our_name(name):
    """The name of a parameter, without what peft adds."""
    return name.replace(".default.weight", "").replace("base_model.model.", "")


def lora_weights(model):
    return {our_name(name): p.detach() for name, p in model.named_parameters() if "lora_" in name}


def lora_pair(dropout=0.0, use_rslora=False, targets=QKV, alpha=8):
    """CLIPModel twice with the same weights: adapted by us, and by peft, with the same random A and B."""
    ours = shaken(hugging_face(OPENAI_SMALL)).eval()
    options = dict(r=4, lora_alpha=alpha, lora_dropout=dropout, use_rslora=use_rslora, target_modules=targets)
    theirs = peft_on(copy.deepcopy(ours), **options)
    lora.add_lora(ours, 4, alpha, dropout, targets, use_rslora)
    assert ours.load_state_dict(lora_weights(theirs), strict=False).unexpected_keys == []
    return ours, theirs, dict(pixel_values=photos(4), input_ids=captions([3, 5, 9, 16]), return_loss=True)


def loaded(**config):
    """Save an adapter, change its configuration and load it. This must fail and leave the model as it was."""
    lora.save_adapter(adapted(), "adapter")
    file, model = Path("adapter/adapter_config.json"), small_model()
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    try:
        lora.load_adapter(model, "adapter")
    finally:
        assert difference(model.state_dict(), weights) == 0


# Scaled before B or after it is the same but for rounding, which a power of two does not need.
SCALES = {"2": (dict(alpha=8), 0), "1.25": (dict(alpha=5), 1e-5), "rsLoRA": (dict(use_rslora=True), 0)}
scales = pytest.mark.parametrize("scale, rounding", SCALES.values(), ids=SCALES)


@scales
def test_outputs_gradients_and_adamw_steps_equal_pefts(scale, rounding):
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


def test_dropout_is_pefts():
    ours, theirs, inputs = lora_pair(dropout=0.3)
    losses = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        losses.append(model(**inputs).loss)
    assert difference(*losses) < 1e-6
    assert difference(losses[0], ours.eval()(**inputs).loss) > 1e-3


def test_adapters_beside_a_bf16_base_are_fp32():
    _, ours, (pixels, ids), _ = both_models(OPENAI_SMALL)
    theirs = peft_on(copy.deepcopy(ours.bfloat16()), r=4, lora_alpha=8)
    lora.add_lora(ours, 4, 8)
    ours.load_state_dict(lora_weights(theirs), strict=False)
    assert {weight.dtype for weight in lora_weights(ours).values()} == {torch.float32}
    found, expected = (their_logits(model, pixels.bfloat16(), ids) for model in (ours, theirs))
    assert difference(found, expected) == 0
    lora.merge(ours)
    assert {p.dtype for name, p in ours.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_the_layer_is_its_formula_at_any_strength():
    layer, x = lora.LoRALinear(torch.nn.Linear(7, 5), 2, 6), torch.randn(3, 7)
    base = F.linear(x, layer.weight, layer.bias)
    assert difference(layer(x), base) == 0  # a new adapter changes nothing
    torch.nn.init.normal_(layer.lora_B)
    for strength in (0.0, 0.5, 1.5):
        lora.set_strength(layer, strength)
        assert difference(layer(x), base + strength * 3 * x @ layer.lora_A.T @ layer.lora_B.T) < 1e-5


def test_targets_name_linears_or_modules():
    # The small model has 3 + 2 blocks of 6 Linears, and two projections.
    counts = {"vision_model": 18, "text_model": 12, "self_attn": 20, "vision_model.encoder.layers.0": 6}
    for target, count in counts.items():
        assert lora.add_lora(small_model(), 2, 4, targets=target) == count
    theirs = lora_weights(peft_on(hugging_face(OPENAI_SMALL), target_modules="all-linear"))
    expected = {name.rpartition(".")[0] for name in theirs}
    assert len(expected) == 32 and set(lora.adapters(adapted(targets=["all-linear"]))) == expected


def test_vit_b_16_and_lora_have_published_sizes():
    with torch.device("meta"):
        model, theirs = CLIP(PRESETS["ViT-B/16"]), hugging_face(OPENAI_B_16)
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    assert shapes == {name: x.shape for name, x in theirs.state_dict().items()}
    assert lora.add_lora(model, r=64, alpha=128) == 72
    assert lora.trainable_parameters(model) == (5_898_240, 149_620_737 + 5_898_240)


@torch.no_grad()
def test_merged_equals_unmerged_and_pefts_merge():
    ours, theirs, inputs = lora_pair()
    sharing = copy.deepcopy(ours, {id(p): p for p in ours.parameters()})  # a model that shares its weights
    unmerged = ours(**inputs).logits_per_image
    lora.merge(ours)
    assert difference(ours(**inputs).logits_per_image, unmerged) < 1e-5
    assert difference(sharing(**inputs).logits_per_image, unmerged) == 0
    theirs = theirs.merge_and_unload()
    assert difference(theirs(**inputs).logits_per_image, unmerged) < 1e-5
    assert ours.state_dict().keys() == theirs.state_dict().keys()  # plain Linears again


@torch.no_grad()
@pytest.mark.parametrize("targets", [QKV, ["text_projection", "vision_model.encoder.layers.1.mlp.fc1"]])
def test_peft_opens_what_we_save(targets):
    ours, _, inputs = lora_pair(targets=targets)
    lora.save_adapter(ours, "ours", "somebody/clip")
    assert len(list(Path("ours").iterdir())) == 2
    plain = hugging_face(OPENAI_SMALL).eval()
    plain.load_state_dict({name: p for name, p in ours.state_dict().items() if "lora_" not in name})
    base = plain(**inputs).logits_per_image
    theirs = peft.PeftModel.from_pretrained(plain, "ours").eval()
    assert difference(lora_weights(theirs), lora_weights(ours)) == 0
    assert difference(theirs(**inputs).logits_per_image, ours(**inputs).logits_per_image) < 1e-6
    assert difference(base, ours(**inputs).logits_per_image) > 1e-3


@scales
@torch.no_grad()
def test_we_open_what_peft_saves(scale, rounding):
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


def test_pefts_rank_and_alpha_patterns_are_obeyed():
    ours, base, inputs, _ = both_models(OPENAI_SMALL)
    patterns = dict(rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 5})
    patterns["alpha_pattern"] = {"^vision_model.*proj": 9, "text_model.*": 32, "v_proj": 1}
    theirs = peft_on(base, r=4, lora_alpha=8, use_rslora=True, **patterns)
    theirs.save_pretrained("theirs")
    lora.load_adapter(ours, "theirs")
    assert difference(ours(*inputs), their_logits(theirs, *inputs)) < 1e-5


@pytest.mark.parametrize("vision, text", [((4, 8), (4, 32)), ((2, 8), (5, 8)), ((1, 6), (4, 3))])
def test_towers_may_differ_in_rank_and_alpha(vision, text):
    ours, base, inputs, _ = both_models(OPENAI_SMALL)
    again = copy.deepcopy(ours)
    lora.add_lora(ours.vision_model, *vision)
    lora.add_lora(ours.text_model, *text)
    for weight in lora_weights(ours).values():
        torch.nn.init.normal_(weight, std=0.1)
    lora.save_adapter(ours, "ours")
    lora.load_adapter(again, "ours")
    assert difference(again(*inputs), ours(*inputs)) == 0
    theirs = peft.PeftModel.from_pretrained(base, "ours").eval()
    assert difference(their_logits(theirs, *inputs), ours(*inputs)) < 3e-5


def test_a_failed_write_keeps_the_saved_adapter():
    model, loaded = adapted(), small_model()
    lora.save_adapter(model, "adapter")
    with patch.object(Path, "write_bytes", side_effect=OSError(28, "No space left")), pytest.raises(OSError):
        lora.save_adapter(model, "adapter")
    assert len(os.listdir("adapter")) == 2
    lora.load_adapter(loaded, "adapter")


HIDDEN = torch.nn.MultiheadAttention(8, 2)  # its out_proj is a Linear that is never called
ERRORS = {
    "r = 0": (lambda: adapted(r=0), "r=0"),
    "dropout = 1": (lambda: adapted(dropout=1.0), "dropout=1.0"),
    "half a name": (lambda: adapted(targets=["proj"]), "no Linear is named 'proj': use fc1, fc2, k_proj"),
    "hidden Linear": (lambda: lora.add_lora(HIDDEN, 2, 4, 0, "out_proj"), "may have no effect"),
    "adapted twice": (lambda: lora.add_lora(adapted(), 4, 8), "has an adapter already"),
    "nothing to merge": (lambda: lora.merge(small_model()), "has no adapters"),
    "no such folder": (lambda: lora.load_adapter(small_model(), "x"), "x is not the folder of an adapter"),
    "load another shape": (lambda: loaded(r=3), "doesn't fit: its"),
    "load PiSSA": (lambda: loaded(init_lora_weights="pissa"), "its init_lora_weights is pissa"),
    "load DoRA": (lambda: loaded(use_dora=True), "its use_dora is True"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS)
def test_a_mistake_is_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


# --- Captions, photos, splits, batches -------------------------------------------------------------------

# 60 photos with five captions each. One of the training photos is `restval`, as in Karpathy's file.
NAMES = [f"{i}.jpg" for i in range(60)]
CAPTIONS = {name: [f"photo {name[:-4]} , in way {k}" for k in range(5)] for name in NAMES}
SPLIT = {name: {0: "val", 1: "test"}.get(i % 6, "train") for i, name in enumerate(NAMES)}
ROWS = [(name, caption) for name in NAMES for caption in CAPTIONS[name]]


def write_rows(path, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def karpathy(folder):
    sentences = {name: [{"raw": caption} for caption in CAPTIONS[name]] for name in NAMES}
    images = [dict(filename=name, split=SPLIT[name], sentences=sentences[name]) for name in NAMES]
    images[2]["split"] = "restval"
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))


def kaggle(folder):
    rows = [f"{name}| {i % 5}| {caption}" for i, (name, caption) in enumerate(ROWS)]
    rows[4] = rows[4].replace("4| ", "4   ")  # as line 2199200615.jpg of the published file
    (folder / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *rows]))


def token(folder):
    lines = [f"{name}#{i % 5}\t{caption}\n" for i, (name, caption) in enumerate(ROWS)]
    (folder / "results_20130124.token").write_text("".join(lines))


def hub(folder):
    rows = [["raw", "sentids", "split", "filename", "img_id"]]
    rows += [[json.dumps(CAPTIONS[name]), "[]", SPLIT[name], name, 0] for name in NAMES]
    write_rows(folder / "flickr_annotations_30k.csv", rows)


def flickr8k(folder):
    write_rows(folder / "captions.txt", [["image", "caption"], *ROWS])


@pytest.mark.parametrize("write", [karpathy, kaggle, token, hub, flickr8k])
def test_published_forms_give_the_same_captions(write):
    write(Path())
    found = data.read_captions(".")
    assert {name: sentences for name, (_, sentences) in found.items()} == CAPTIONS
    if write in (karpathy, hub):  # these have splits too
        assert {name: split for name, (split, _) in found.items()} == SPLIT


TABLE = [("a/1.jpg", "ein Hund, im Schnee", "train"), ("2.jpg", "“two” dogs", "val"), ("2.jpg", "x", "val")]


@pytest.mark.parametrize("photo", ["file_name", "image", "image_name", "filepath"])
@pytest.mark.parametrize("caption", ["caption", "text", "title", "comment"])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_documented_tables_are_read(photo, caption, form):
    if form == "jsonl":
        lines = [json.dumps({photo: row[0], caption: row[1], "split": row[2]}) for row in TABLE]
        Path("mine.jsonl").write_text("\n".join(lines))
    else:
        write_rows(f"mine.{form}", [(photo, caption, "split"), *TABLE], "\t" if form == "tsv" else ",")
    expected = {"a/1.jpg": ("train", [TABLE[0][1]]), "2.jpg": ("val", ["“two” dogs", "x"])}
    assert data.read_captions(".") == expected


MALFORMED = {
    "an empty file": ("a.csv", b"", "has no captions"),
    "another encoding": ("a.csv", "image,caption\n1.jpg,Stra\xdfe\n".encode("cp1252"), "not UTF-8 in line 2"),
    "two photo columns": ("a.csv", b"image,filename\n1.jpg,a dog\n", "not one photo.*image, filename"),
    "too many cells": ("a.csv", b"image,caption\n1.jpg,a dog, running\n", "beside 1.jpg: put captions in"),
    "semicolons": ("a.csv", b"image;caption\n1.jpg;a dog\n", "not one photo.*image;caption"),
    "an open quote": ("a.csv", b'image,caption\n1.jpg,"a dog\n', "unexpected end"),
    "another split": ("a.csv", b"image,caption,split\n1.jpg,a dog,tst\n", "'tst', not train, val or test"),
    "a bad line": ("results.csv", b"image_name| comment_number| comment\n1.jpg a dog\n", "in '1.jpg a dog'"),
    "JSON without images": ("dataset_a.json", b"{}", "malformed"),
    "half an emoji": ("a.jsonl", b'{"image": "1", "caption": "\\ud83d"}', "surrogates"),
    "two splits": ("a.csv", b"image,caption,split\n1,a,train\n1,b,val\n", "two splits, train and val"),
}


@pytest.mark.parametrize("name, content, message", MALFORMED.values(), ids=MALFORMED)
def test_malformed_captions_are_one_clear_error(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(data.InputError, match=f"^{name} .*{message}") as error:
        data.read_captions(".", name)
    assert "\n" not in str(error.value)


def test_of_several_captions_files_karpathys_is_read():
    kaggle(Path())
    flickr8k(Path())
    with pytest.raises(data.InputError, match="captions.txt, results.csv.*--captions FILE"):
        data.read_captions(".")
    found = data.read_captions(".", "results.csv")
    assert {name: sentences for name, (_, sentences) in found.items()} == CAPTIONS
    karpathy(Path())
    assert {name: split for name, (split, _) in data.read_captions(".").items()} == SPLIT


def test_photos_are_found_by_path_then_name():
    for path in ("1.jpg", "a/1.jpg", "b/deep/2.jpg", ".hidden/2.jpg", "__MACOSX/2.jpg"):
        noise_photo(path)
    Path("b/above").symlink_to("..")  # no loop: each photo is found once
    found = data.find_photos(".", ["1.jpg", "a/1.jpg", "other/2.jpg"])
    assert list(map(str, found.values())) == ["1.jpg", "a/1.jpg", "b/deep/2.jpg"]
    with pytest.raises(data.InputError, match="1.jpg may be 1.jpg or a/1.jpg"):
        data.find_photos(".", ["b/1.jpg"])
    with pytest.raises(data.InputError, match="other/2.jpg and 2.jpg mean the same photo"):
        data.find_photos(".", ["other/2.jpg", "2.jpg"])


def test_one_missing_photo_in_100_is_a_warning(capsys):
    for i in range(99):
        Path(f"{i}.jpg").touch()
    assert len(data.find_photos(".", [f"{i}.jpg" for i in range(100)])) == 99
    assert "1 of 100 photos are missing below ., for example 99.jpg" in capsys.readouterr().err
    with pytest.raises(data.InputError, match="2 of 101 photos are missing below ., for example 99.jpg"):
        data.find_photos(".", [f"{i}.jpg" for i in range(101)])


def assert_like_transformers(path):
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    expected = torch.as_tensor(np.asarray(processor(Image.open(path))["pixel_values"][0]))
    ours = data.normalize(torch.tensor(data.load_photo(path, 224))[None])[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (224, 224), (225, 640), (37, 61)])
def test_preprocessing_equals_transformers(shape):
    noise_photo("a.png", shape)
    assert_like_transformers("a.png")


@pytest.mark.skipif("FLICKR" not in os.environ, reason="set FLICKR to a folder of Flickr photos")
def test_real_photos_are_preprocessed_as_in_transformers():
    folder = os.environ["FLICKR"]
    for path in list(data.find_photos(folder, data.read_captions(folder)).values())[:20]:
        assert_like_transformers(path)


def test_photos_are_upright_and_on_white():
    image, exif = Image.new("RGB", (40, 40), "black"), Image.Exif()
    image.paste("white", (0, 0, 40, 20))  # white above, as stored
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    image.save("a.jpg", exif=exif, quality=95)
    photo = data.load_photo("a.jpg", 16)
    assert photo[:, 12:].mean() > 240 and photo[:, :4].mean() < 15
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save("a.png")
    assert (data.load_photo("a.png", 16) == 255).all()


def test_a_caption_of_several_lines_is_a_warning(capsys):
    Path("a.csv").write_text('image,caption\n1.jpg,"a dog\n2.jpg,a cat"\n')
    data.read_captions(".")
    assert "a caption of 1.jpg has several lines in a.csv" in capsys.readouterr().err


def test_color_jitter_equals_pillow():
    photo = np.random.default_rng(0).integers(60, 120, (8, 8, 3), dtype=np.uint8)  # nothing leaves 0 to 255
    pixels = torch.from_numpy(photo / 255).float().permute(2, 0, 1).repeat(300, 1, 1, 1)
    torch.manual_seed(5)
    changed = data.color_jitter(pixels, 0.4)
    torch.manual_seed(5)
    factors = torch.empty(3, 300, 1, 1).uniform_(0.6, 1.4)[:, :, 0, 0]
    grey = torch.rand(300) < 0.2
    assert 40 < grey.sum() < 80
    for i in range(0, 300, 10):
        image = ImageEnhance.Brightness(Image.fromarray(photo)).enhance(factors[0, i].item())
        image = ImageEnhance.Contrast(image).enhance(factors[1, i].item())
        image = ImageEnhance.Color(image).enhance(0.0 if grey[i] else factors[2, i].item())
        expected = torch.from_numpy(np.asarray(image) / 255).float().permute(2, 0, 1)
        assert (changed[i] - expected).abs().max() < 0.02  # Pillow rounds three times


def test_the_store_is_reused_until_a_photo_changes(monkeypatch):
    noise_photo("a.bmp")
    first = data.photo_store({"a": Path("a.bmp")}, 16).copy()
    with monkeypatch.context() as patches:
        patches.setattr(data, "load_photo", lambda *_: pytest.fail("decoded again"))
        assert np.array_equal(data.photo_store({"a": Path("a.bmp")}, 16), first)
    os.truncate(next(Path("cache").iterdir()), 100)  # a damaged store
    assert np.array_equal(data.photo_store({"a": Path("a.bmp")}, 16), first)
    noise_photo("a.bmp", seed=1)  # another photo with the name and the size of the first one
    assert not np.array_equal(data.photo_store({"a": Path("a.bmp")}, 16), first)


@pytest.mark.parametrize("error", [OSError(28, "full"), Exception("full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("write", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_files_appear_whole_or_not_at_all(write, error):
    with pytest.raises((data.InputError, KeyboardInterrupt)), data.atomic("x") as temporary:
        write(temporary)
        raise error
    assert list(Path().iterdir()) == []
    with data.atomic("x") as temporary:
        write(temporary)
        assert not Path("x").exists()
    assert list(Path().iterdir()) == [Path("x")]


@pytest.mark.parametrize("count, expected", [(4, (2, 2, 0)), (40, (36, 4, 0)), (2000, (1800, 100, 100))])
def test_names_decide_the_split_without_a_list(count, expected):
    found = []
    for numbers in (range(count), reversed(range(count))):
        write_rows("a.csv", [("image", "caption"), *((f"{i}.jpg", "a dog") for i in numbers)])
        found.append(data.read_captions("."))
    splits = [split for split, _ in found[0].values()]
    assert found[0] == found[1] and tuple(map(splits.count, ("train", "val", "test"))) == expected


def test_pairs_have_each_photo_once_with_its_captions():
    for i, name in enumerate(NAMES):
        noise_photo(f"album/images/{name}", seed=i)
    karpathy(Path("album"))
    train = data.load("album", "train", 48, 24)[0]["train"]
    assert train.photos.shape == (40, 54, 54, 3) and train.names == [n for n in NAMES if SPLIT[n] == "train"]
    drawn = [train.pairs(seed=3, epoch=epoch) for epoch in range(40)]
    for pairs in drawn:
        assert sorted(pairs[:, 0].tolist()) == list(range(40))
        assert torch.equal(train.image_index[pairs[:, 1]], pairs[:, 0])
    assert set(torch.cat(drawn)[:, 1].tolist()) == set(range(200))
    assert torch.equal(drawn[7], train.pairs(3, 7)) and not torch.equal(drawn[7], train.pairs(4, 7))
    for photo, *own in train.pairs(3, 7, captions=4).tolist():
        assert len(set(own)) == 4 and (train.image_index[own] == photo).all()
    assert len(data.load("album", "train", 48, 24, limit=7)[0]["train"].photos) == 7


def split_of(sentences, tokenizer, context=77):
    photos = np.zeros((len(sentences), 8, 8, 3), np.uint8)
    return data.make_split([f"{i}.jpg" for i in range(len(sentences))], photos, sentences, tokenizer, context)


def test_training_batches_have_room_for_usual_captions():
    tokenizer = data.train_tokenizer(["a b c"])
    split = split_of([["a " * 3, "b " * 9]] * 1000 + [["c " * 30]], tokenizer)  # one of 2,001 is long
    rows = torch.tensor([0, 2000])
    assert torch.equal(split.tokens(rows, "cpu"), split.ids[rows, :32])
    assert torch.equal(split.tokens(rows[:1], "cpu"), split.ids[:1, :8])
    cut = split.tokens(rows, "cpu", cut=True)
    assert torch.equal(cut[:, :15], split.ids[rows, :15]) and cut.shape == (2, 16)
    assert (cut[:, 15] == tokenizer.eos_token_id).all()
    few = split_of([["a"]] * 998 + [["c " * 30]], tokenizer)  # one of 999 captions is not cut
    assert few.tokens(rows[:1], "cpu", cut=True).shape == (1, 32)


def test_crops_have_their_area_and_half_are_mirrored():
    pixels = (torch.arange(256) / 255).expand(20, 3, 256, 256)  # brighter to the right
    crops = data.random_resized_crop(pixels, 224, 0.2, views=51, ratio=(1, 1))  # (1,020, 3, 224, 224)
    width = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) * 224 / 223  # negative if mirrored
    area = width**2
    assert 0.19 < area.min() < 0.22 and 0.98 < area.max() < 1.02
    assert area.mean().item() == pytest.approx(0.6, abs=0.03)
    assert (width < 0).float().mean().item() == pytest.approx(0.5, abs=0.06)


def test_word_dropout_replaces_words_alone():
    ids = torch.full((400, 16), 60, dtype=torch.int32)  # 60 is the end token
    ids[:, 0], ids[:, 1:11] = 61, torch.arange(100, 110)
    config = SimpleNamespace(vocab_size=5000, eos_token_id=60)
    assert torch.equal(data.augment_captions(ids, config, 0.0), ids)
    varied = data.augment_captions(ids, config, 0.6)
    changed = varied != ids
    assert 0.27 < changed[:, 1:11].float().mean() < 0.33 and not changed[:, [0, *range(11, 16)]].any()
    assert not (varied[:, 1:11] == 60).any() and len(varied[changed].unique()) > 900
    # Uniform rates from 0 to 0.6 leave 1 caption in 6.6 whole; one rate of 0.3 would leave 1 in 35.
    assert 0.1 < 1 - changed.any(dim=1).float().mean() < 0.2


# --- Tokenizer, drawn worlds, the hub --------------------------------------------------------------------


def test_a_trained_tokenizer_knows_every_byte():
    tokenizer = data.train_tokenizer(["a small red circle", "a small blue square"] * 20)
    assert tokenizer.eos_token_id == len(tokenizer) - 1 and len(tokenizer("small")["input_ids"]) == 3
    text = "zebrafish 🦓 é ñ 漢"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1  # an unknown byte would become an end token
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")
    tokenizer.save_pretrained("saved")
    assert data.load_tokenizer("saved")(text)["input_ids"] == ids


def test_captions_keep_their_end_whatever_pads():
    tokenizer = data.train_tokenizer(["a b c"])
    tokenizer.pad_token = "!"  # as Stable Diffusion 2's
    tokenizer.add_tokens(["<photo>"])  # the end token has not the largest id
    end = tokenizer.eos_token_id
    split = split_of([["! a b c d e", "<photo> " + "a " * 9, "a " * 200]], tokenizer)
    assert split.lengths.tolist() == [8, 12, 77]
    for row, length in zip(split.ids.tolist(), split.lengths.tolist()):
        assert row.index(end) == length - 1 and set(row[length - 1 :]) == {end}
    assert split.tokens(torch.tensor([0]), "cpu")[0].tolist() == split.ids[0, :8].tolist()


def test_64_800_scenes_come_once_each():
    assert len(data.all_scenes(0)) == len(set(data.all_scenes(0))) == 2 * 18 * 25 * 72 == 64_800
    few, many = (data.load_drawn({"val": 10, "train": n}, 48)["train"] for n in (5, 20))
    assert np.array_equal(few[1], many[1][:5]) and few[2] == many[2][:5] and few[0] == many[0][:5]


def test_flickr30k_is_downloaded_into_its_folder():
    noise_photo("hub/a.jpg")
    hub(Path("hub"))
    with zipfile.ZipFile("hub/flickr30k-images.zip", "w") as archive:
        for name in NAMES:
            archive.write("hub/a.jpg", f"flickr30k-images/{name}")

    def download(repository, name, repo_type, local_dir):
        Path(local_dir).mkdir(exist_ok=True)
        return shutil.copy(f"hub/{name}", local_dir)

    with patch.object(data, "hf_hub_download", autospec=True, side_effect=download):
        splits, _ = data.load("flickr30k", "train", 48, 24)
    assert {name: len(split.photos) for name, split in splits.items()} == {"train": 40, "val": 10, "test": 10}
    assert {path.name for path in Path().iterdir()} == {"hub", "cache", "flickr30k"}


# --- Training --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_splits():
    """The splits of a world of few scenes, and their tokenizer."""
    with pytest.MonkeyPatch.context() as patches:
        few_scenes(patches)
        return data.load("shapes", "train", 48)


def tiny_model(few_splits):
    tokenizer = few_splits[1]
    ends = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return CLIP(replace(PRESETS["tiny"], **ends))


def test_defaults_fit_the_data_and_the_model(capsys):
    def recipe_of(flags):
        args = vars(clip.parse_args(flags.split()))
        return clip.Recipe(**{name: args[name] for name in vars(PLAIN)}), args["model"], args["text"]

    assert recipe_of("") == (clip.Recipe(), "ViT-B/16", "bert")
    assert recipe_of("--data shapes --lr 1") == (replace(clip.DRAWN_RECIPE, lr=1), "tiny", "causal")
    assert recipe_of("--model tiny") == (clip.TINY_RECIPE, "tiny", "bert")
    with pytest.raises(SystemExit):
        clip.main(["--data", "shapes", "--help"])
    assert "(default: 8)" in capsys.readouterr().out


@pytest.mark.parametrize("epochs", [3, 5])
def test_learning_rate_rises_and_patch_dropout_falls(epochs, few_splits, monkeypatch):
    model, rates, dropouts = tiny_model(few_splits), [], []

    def step(*arguments):
        rates.append(arguments[5])
        dropouts.append(model.vision_model.embeddings.patch_dropout)
        return torch.ones(())

    monkeypatch.setattr(clip, "train_step", step)
    recipe = replace(PLAIN, epochs=epochs, batch_size=10, warmup=2, lr=0.5)  # 10 steps an epoch
    clip.train(model, few_splits[0], replace(recipe, patch_dropout=0.75, unmask=1), "run")
    rising = [0.5 * (step + 1) / 20 for step in range(20)]
    assert rates == pytest.approx(rising + [0.5] * (10 * epochs - 20))
    assert dropouts == [0.75] * 10 + [0.5] * (10 * epochs - 10)


@pytest.mark.parametrize("muon", [0, 1])
def test_only_matrices_of_linears_decay(muon):
    model = CLIP(SMALL)
    optimizers = clip.make_optimizers(model, replace(PLAIN, weight_decay=0.2, muon=muon))
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


def test_muon_is_that_of_pytorch_in_fp32(monkeypatch):
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (24, 8), (8, 24), (8, 8)]]
    theirs, steps = copy.deepcopy(ours), torch.randn(5, 4, 24, 24)
    options = dict(lr=0.02, weight_decay=0.5, momentum=0.9)
    for matrices, make in ((ours, clip.Muon), (theirs, torch.optim.Muon)):
        optimizer = make(matrices, **options)
        for step in steps:
            for p, gradient in zip(matrices, step):
                p.grad = gradient[: p.shape[0], : p.shape[1]].clone()
            optimizer.step()
        # Ours computed in fp32. PyTorch's takes bf16 even on CPUs, which emulate it, unless prevented.
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
        monkeypatch.setattr(torch, "bfloat16", torch.float32)  # in PyTorch 2.15
        options["adjust_lr_fn"] = "match_rms_adamw"
    assert difference(dict(enumerate(ours)), dict(enumerate(theirs))) < 1e-6


def test_validation_loss_is_over_groups_of_64(monkeypatch):
    sentences = [[f"{photo}/{k}" for k in range(1 + photo % 3)] for photo in range(80)]
    split = split_of(sentences, data.train_tokenizer(["a b c"]), 16)
    images = F.normalize(torch.randn(80, 8), dim=-1)
    texts = F.normalize(torch.randn(len(split.captions), 8), dim=-1)
    monkeypatch.setattr(clip, "embed", lambda *_: (images, texts))
    expected, labels = 0.0, torch.arange(64)  # one group of 64: 16 photos are left out
    for turn in range(5):
        own = [split.captions.index(sentences[photo][turn % len(sentences[photo])]) for photo in range(64)]
        logits = images[:64] @ texts[own].T / 0.07
        expected += (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)).item() / 10
    assert clip.evaluate(CLIP(SMALL), split)["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_batch_holds_the_rows_of_pairs():
    values = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(48, 1).repeat(48, 2).repeat(3, 3)
    words = [[f"{i} first", f"{i} second", f"{i} third"] for i in range(12)]
    split = data.make_split(list("x" * 12), values, words, data.train_tokenizer(["a b c"]), 16)
    pairs = torch.tensor([[7, 22, 23], [4, 12, 13]])  # captions 21 to 23 are those of photo 7
    model = CLIP(replace(SMALL, image_size=40))  # photos of 48 have a margin, so they are cropped
    pixels, ids = clip.make_batch(split, pairs, model, replace(PLAIN, views=3, texts=2))
    expected = data.normalize(split.photos[[7, 7, 7, 4, 4, 4], :40, :40])
    assert difference(pixels, expected) < 1e-4
    for row, caption in zip(ids, [22, 23, 12, 13]):
        assert torch.equal(row, split.ids[caption, : len(row)])
    model = CLIP(replace(SMALL, image_size=48))  # drawn scenes have none: each view is the whole scene
    split.photos.random_(256)
    pixels, _ = clip.make_batch(split, pairs, model, replace(PLAIN, views=2))
    assert torch.equal(pixels, data.normalize(split.photos[[7, 7, 4, 4]]))


@pytest.mark.parametrize("init_scale, gradient", [(1e30, 1.0), (4.0, math.nan)], ids=["all", "AdamW's"])
def test_fp16_overflow_skips_both_optimizers(init_scale, gradient, monkeypatch):
    monkeypatch.setattr(clip, "autocast_dtype", lambda device: torch.float16)  # as on a GPU without bf16
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    model, recipe = small_model(), replace(PLAIN, muon=1)
    start = copy.deepcopy(model.state_dict())
    model.logit_scale.register_hook(lambda own: own * gradient)  # AdamW trains the logit scale
    clip.train_step(model, clip.make_optimizers(model, recipe), scaler, *views(), 1e-3)
    assert difference(model.state_dict(), start) == 0
    assert scaler.get_scale() == pytest.approx(init_scale / 2)


def test_logit_scale_never_exceeds_100():
    model = small_model()
    model.logit_scale.data.fill_(9.0)
    clip.train_step(model, clip.make_optimizers(model, PLAIN), NO_SCALER, *views(), 0.1)
    assert model.logit_scale.exp().item() == pytest.approx(100)


def test_a_run_keeps_the_average_of_its_weights(few_splits):
    model = tiny_model(few_splits)
    weight, seen = model.text_projection.weight, []
    average = weight.detach().double()

    def keep(*_):
        seen.append(weight.detach().double())
        return DEFAULT

    with patch.object(clip, "update_ema", wraps=clip.update_ema, side_effect=keep):
        ema_model, _ = clip.train(model, few_splits[0], replace(PLAIN, epochs=2, batch_size=25), "run")
    for step, trained in enumerate(seen):
        decay = (1 + step) / (7 + step)
        average = decay * average + (1 - decay) * trained
    state = clip.load_checkpoint("run")
    assert difference(ema_model.text_projection.weight, average) < 1e-6
    assert difference(state["ema_model"]["text_projection.weight"], average) < 1e-6
    assert difference(state["model"]["text_projection.weight"], seen[-1]) == 0


def test_a_run_leaves_weights_log_and_pictures(shapes_run, few_splits):
    run, pictures = shapes_run / "runs/shapes", {"curve.png", "retrieval.png", "inside.png"}
    assert {path.name for path in run.iterdir()} == {"tokenizer", "checkpoint.pt", "log.csv"} | pictures
    for name in pictures:
        Image.open(run / name).load()
    with open(run / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    model = finetune.from_pretrained(run)
    for name, value in clip.evaluate(model, few_splits[0]["val"]).items():
        assert value == pytest.approx(float(rows[-1][name]), abs=1e-5)


# --- Stops, faults and processes -------------------------------------------------------------------------


def test_an_interrupted_run_resumes_with_more_epochs(shapes_run, monkeypatch, capsys):
    assert train_shapes(monkeypatch, "--out halves --epochs 2") == 0
    calls = [DEFAULT, KeyboardInterrupt]  # in the third epoch
    with patch.object(clip, "update_weights", wraps=clip.update_weights, side_effect=calls):
        assert train_shapes(monkeypatch, "--out halves --resume") == 130
    assert capsys.readouterr().err.startswith("stopped: --resume")
    assert train_shapes(monkeypatch, "--out halves --resume") == 0
    assert "resumed   after epoch 2" in capsys.readouterr().out
    assert_same_numbers("halves", shapes_run / "runs/shapes")


def test_a_killed_run_resumes_bit_for_bit(shapes_run, monkeypatch):
    script = f"import pytest, {MODULE} as tests; tests.train_shapes(pytest.MonkeyPatch(), '--resume')"
    process = subprocess.Popen([sys.executable, "-c", script], env=WITH_PATH, stdout=subprocess.DEVNULL)
    while not Path("runs/shapes/tokenizer").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random())  # the kill comes at a random moment
    process.kill()
    process.wait()
    assert train_shapes(monkeypatch, "--resume") == 0
    assert_same_numbers("runs/shapes", shapes_run / "runs/shapes")


def test_resume_takes_another_micro_batch_and_folder(album_run, capsys):
    Path("photos").rename("elsewhere")
    assert train_album("--data elsewhere --out old --resume --micro-batch 5") == 0
    assert "resumed   after epoch 2" in capsys.readouterr().out


def test_only_torchrun_makes_several_processes():
    found = run_python("-c", "import clip; print(clip.RANK, clip.WORLD_SIZE)", RANK="1", WORLD_SIZE="4")
    assert found.split() == ["0", "1"]


# --- Adaptation ------------------------------------------------------------------------------------------


@pytest.fixture
def study_folder(studied, monkeypatch):
    monkeypatch.chdir(studied)
    few_scenes(monkeypatch)
    return studied / "runs/shapes-sketches"


def study_rows(folder):
    with open(folder / "study.csv") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_the_table_has_the_saved_models_numbers(study_folder):
    rows = study_rows(study_folder)
    models = {name: finetune.from_pretrained("runs/shapes") for name in ("zero-shot", "r=4", "r=16")}
    lora.load_adapter(models["r=4"], study_folder / "r4-seed0")
    lora.load_adapter(models["r=16"], study_folder / "r16-seed0")
    models["all weights"] = finetune.from_pretrained(study_folder / "full-seed0")
    assert list(rows) == list(models)
    splits, _ = data.load("sketches", "runs/shapes/tokenizer", 48)
    shapes, _ = data.load("shapes", "runs/shapes/tokenizer", 48)
    judged = {"val": splits["val"], "test": splits["test"], "shapes val": shapes["val"]}
    for variant, model in models.items():
        trained = 0 if variant == "zero-shot" else lora.trainable_parameters(model)[0]
        assert int(rows[variant]["trainable"]) == trained
        for name, split in judged.items():
            found = clip.evaluate(model, split)
            told = {key: float(rows[variant][f"{name} {key}"]) for key in found}
            assert told == pytest.approx(found, abs=1e-4)
    assert len({row["val loss"] for row in rows.values()}) == 4
    merged = finetune.from_pretrained(study_folder / "r16-seed0")  # plain weights, ready to be trained
    images = (clip.embed(model, splits["val"])[0] for model in (merged, models["r=16"]))
    assert difference(*images) < 1e-5 and all(p.requires_grad for p in merged.parameters())
    Image.open(study_folder / "study.png").load()


def test_a_study_continues_what_its_folder_holds(study_folder, capsys):
    first, same_out = study_rows(study_folder), f"--out {study_folder}"
    assert adapt_to_sketches("--r 4 16 --full") == 0
    assert study_rows(study_folder) == first
    faults = {"--alpha 3": "alpha was 8.0 and is 3.0 now"}
    faults[f"--base {study_folder}"] = f"give one of {study_folder}/r16-seed0"
    faults[f"--base {study_folder}/full-seed0 {same_out}"] = "base_checksum was"
    faults[f"--base {study_folder}/r4-seed0 {same_out}"] = "base_checksum was"
    for flags, message in faults.items():
        capsys.readouterr()
        assert adapt_to_sketches(f"--r 4 {flags}") == 2
        assert_one_error(capsys, message)


def test_adapting_repeats_and_leaves_the_base_alone(study_folder, tmp_path):
    base = finetune.from_pretrained("runs/shapes")
    start = {name: weight.clone() for name, weight in base.state_dict().items()}
    splits, _ = data.load("sketches", base.tokenizer_path, 48)
    recipe = replace(finetune.DRAWN_RECIPE, r=4, alpha=8.0, epochs=2, batch_size=25)
    model, history = finetune.adapt(base, splits, recipe, tmp_path / "first")
    assert history[-1]["loss"] == pytest.approx(float(study_rows(study_folder)["r=4"]["val loss"]), abs=1e-6)
    assert difference(base.state_dict(), start) == 0
    assert not model.training and len(lora.adapters(model)) == 15
    with patch.object(clip, "autocast_dtype", lambda device: torch.bfloat16):  # as on CUDA
        model, _ = finetune.adapt(base, splits, replace(recipe, seed=1), tmp_path / "second")
    after = {name: model.state_dict()[name] for name in start}
    assert {x.dtype for x in after.values()} == {torch.float32} and difference(after, start) == 0
    folders = study_folder / "r4-seed0", tmp_path / "first", tmp_path / "second"
    first, again, other = (clip.load_checkpoint(folder)["ema_model"] for folder in folders)
    assert difference(first, again) == 0 and difference(first, other) > 1e-3


def test_other_data_or_weights_are_not_the_bases(study_folder, monkeypatch):
    base = finetune.from_pretrained("runs/shapes")
    assert list(finetune.own_data(base)) == ["shapes val"]
    monkeypatch.setitem(FEW, "train", 99)  # as with --photos: the validation photos are the same
    assert list(finetune.own_data(base)) == ["shapes val"]
    monkeypatch.setitem(FEW, "val", 69)
    assert finetune.own_data(base) == {}
    monkeypatch.setattr(data, "DRAWN", {})  # then `shapes` is a folder that isn't there
    assert finetune.own_data(base) == {}
    monkeypatch.setattr(lora, "checksum", lambda model: 1)  # as if the base had been trained further
    with pytest.raises(data.InputError, match="other weights than in training"):
        finetune.from_pretrained(study_folder / "r4-seed0")


# --- Classes and search ----------------------------------------------------------------------------------

CLASSES = ["red_fox", "cat", "dog", "a_b", "owl", "crow", "bee"]


def class_folders(folder, classes=CLASSES):
    """40 photos of noise in folders of classes."""
    for i in range(40):
        noise_photo(Path(folder, classes[i % len(classes)], f"{i}.png"), seed=i)


def fitting_model():
    tokenizer = data.train_tokenizer(["a red fox", "the cat and a dog", "owl crow bee"])
    words = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return shaken(CLIP(replace(SMALL, **words))).eval(), tokenizer


def test_a_class_is_the_mean_over_templates(capsys):
    class_folders("photos")
    model, tokenizer = fitting_model()
    templates, directions, ranks = ("a {}", "the {} here"), {}, []
    for name in CLASSES:
        prompts = [template.format(name.replace("_", " ")) for template in templates]
        mean = sum(model.encode_text(data.tokenize(tokenizer, [prompt], 16))[0] / 2 for prompt in prompts)
        directions[name] = mean / mean.norm()
    for path in Path("photos").glob("*/*"):
        image = model.encode_image(pixels_of(path))[0]
        best = sorted(directions, key=lambda name: -(image @ directions[name]).item())
        ranks.append(best.index(path.parent.name))
    top1, top5 = (100 * sum(rank < k for rank in ranks) / 40 for k in (1, 5))
    assert 0 < top1 < top5 < 100
    Path("photos/.hidden").mkdir()
    Path("photos/cat/Thumbs.db").write_bytes(b"junk")
    assert finetune.classify(model, tokenizer, "photos", templates) == pytest.approx((top1, top5), abs=1e-4)
    assert f"top-1 {top1:.1f}  top-5 {top5:.1f}  40 photos of 7 classes" in capsys.readouterr().out
    torch.nn.init.zeros_(model.text_projection.weight)  # now all classes are the same vector: a tie is a miss
    assert finetune.classify(model, tokenizer, "photos", templates) == (0, 0)


NO_CLASSES = [
    ("photos/train", CLASSES, "photos must be in photos/CLASS, but train/a_b/.* is one level deeper"),
    ("photos", ["cat"], "two or more folders"),
    ("photos", ["red_fox", "Red fox"], "different classes"),
]


@pytest.mark.parametrize("folder, classes, message", NO_CLASSES)
def test_folders_that_are_no_classes_are_refused(folder, classes, message):
    class_folders(folder, classes)
    with pytest.raises(data.InputError, match=message):
        finetune.classify(*fitting_model(), "photos")


def test_search_ranks_by_cosine_with_the_query():
    class_folders("photos/deep/er")
    noise_photo("photos/0.png", seed=99)
    model, tokenizer = fitting_model()
    text = model.encode_text(data.tokenize(tokenizer, ["a red fox"], 16))[0]
    paths = Path("photos").rglob("*.png")
    cosines = {path: (model.encode_image(pixels_of(path))[0] @ text).item() for path in paths}
    found = finetune.search(model, tokenizer, "photos", "a red fox", count=41)
    assert [path for path, _ in found] == sorted(cosines, key=lambda path: -cosines[path])
    assert [cosine for _, cosine in found] == pytest.approx(sorted(cosines.values(), reverse=True), abs=1e-5)


def test_the_commands_classify_and_search(capsys):
    released_folder("base", SPELLING)
    class_folders("photos")
    flags = ["--base", "base", "--device", "cpu"]
    assert finetune.main([*flags, "--classify", "photos"]) == 0
    assert finetune.main([*flags, "--search", "photos", "two dogs"]) == 0
    assert capsys.readouterr().out.count("  photos/") == 8
    assert finetune.main([*flags, "--search", "photos", "a", "--classify", "photos"]) == 2


@pytest.mark.parametrize("policy", ["PASSIVE", "ACTIVE"])
def test_openmp_waits_passively_unless_told_otherwise(policy):
    given = "update(OMP_WAIT_POLICY='ACTIVE')" if policy == "ACTIVE" else "pop('OMP_WAIT_POLICY', 0)"
    begin = f"import os, sys; os.environ.{given}; sys.modules['torch'] = None"
    end = "try: import clip\nexcept ImportError: print(os.environ['OMP_WAIT_POLICY'])"  # at `import torch`
    assert run_python("-c", f"{begin}\n{end}").strip() == policy


# --- Bad input -------------------------------------------------------------------------------------------


def train_album(flags=""):
    toy = "--data photos --model tiny --tokenizer train --epochs 2 --batch-size 10 --device cpu"
    return clip.main(f"{toy} {flags}".split())


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A folder with 40 photos and two captions each in `photos`, and a run on them in `old`."""
    folder, rows = tmp_path_factory.mktemp("album"), ["file_name,caption,split\n"]
    for i in range(40):
        noise_photo(folder / f"photos/images/{i}.jpg", seed=i)
        for k in range(2):
            rows.append(f"images/{i}.jpg,photo {i} in way {k},{'train' if i % 4 else 'val'}\n")
    (folder / "photos/captions.csv").write_text("".join(rows))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert train_album("--out old") == 0
    return folder


@pytest.fixture
def album_run(album):
    """A copy of that folder, which a test may change."""
    shutil.copytree(album, ".", dirs_exist_ok=True)


def test_a_run_without_a_checkpoint_begins_anew(album_run):
    data.train_tokenizer(["other words"]).save_pretrained("new/tokenizer")  # of a run that was stopped early
    assert train_album("--out new") == 0
    finetune.tokenizer_of(finetune.from_pretrained("new"))  # an error if it isn't that of the model


def replaced(old, new, file="photos/captions.csv"):
    """A function that replaces text of a file."""
    return lambda: Path(file).write_text(Path(file).read_text().replace(old, new))


def with_the_config_of_another_version():
    state = torch.load("old/checkpoint.pt")
    torch.save(state | {"config": state["config"] | {"pool": "last"}}, "old/checkpoint.pt")


OLD = "--out old --resume"
# Swapping these lines moves a caption to the next photo, without changing the order of captions.
MOVED = replaced("images/5.jpg,photo 5 in way 1", "images/6.jpg,photo 5 in way 1")
PHOTO, RUN = "photos/images/3.jpg", "old/checkpoint.pt"
# (change, command, flags, part of the message). `photos` is a whole album, `old` is a run on it.
BAD = (
    (None, "clip", "--data nowhere", "--data nowhere"),
    (None, "clip", "--data ./shapes", "--data ./shapes is not a folder"),  # a drawn world has no path
    (replaced(",val", ",train"), "clip", "", "--data photos has"),
    (lambda: Path(PHOTO).write_bytes(b"x"), "clip", "", f"{PHOTO} can't be read"),
    (lambda: os.truncate(PHOTO, 2000), "clip", "", f"{PHOTO} can't be read"),
    (lambda: Image.new("I;16", (9, 9)).save(PHOTO, "PNG"), "clip", "", f"{PHOTO} can't be read (it has more"),
    (None, "clip", "--batch-size 31", "--batch-size 31 is more than the 30 photos: give fewer"),
    (None, "clip", "--lr nan", "--lr nan is not between"),
    (None, "clip", "--data shapes --captions a.csv", "but shapes is a drawn world"),
    (None, "clip", "--epoch 3", "unrecognized arguments: --epoch"),
    (None, "clip", "--device cuda:99", "--device cuda:99 can't be used here"),
    (None, "clip", "--tokenizer nowhere", "no tokenizer in nowhere"),
    (lambda: Path("new").touch(), "clip", "", "can't write new"),
    (None, "clip", "--out old", "--out old holds a run"),
    (None, "clip", f"{OLD} --seed 5", "old can't be resumed: seed was 0 and is 5 now"),
    (None, "clip", f"{OLD} --epochs 1", "old can't be resumed: epochs was 2 and is 1 now"),
    (replaced("photo 7 in way 0", "photo 8 in way 0"), "clip", OLD, "captions or tokenizer differ"),
    (MOVED, "clip", OLD, "captions or tokenizer differ"),
    (with_the_config_of_another_version, "clip", OLD, "or of another version"),
    (lambda: os.pwrite(os.open(RUN, os.O_RDWR), b"wrong", 20_000), "finetune", "--base old", "damaged"),
    (None, "clip", "--out ''", "an argument is empty"),
    (None, "clip", "--device meta", "--device meta can't be used here"),
    (None, "finetune", "--base old --classify=", "an argument is empty"),
    (None, "finetune", "--base nowhere", "no CLIP in nowhere"),
    (None, "finetune", "--base old --r 0", "--r must be between 1 and 1024"),
    (None, "finetune", "--base old --r 4 1025", "--r must be between 1 and 1024"),
    (None, "finetune", "--base old --alpha 0", "--alpha above 0 and below 1e6"),
    (None, "finetune", "--base old --alpha inf", "--alpha above 0 and below 1e6"),
    (None, "finetune", "--base old --targets query", "no Linear is named 'query'"),
    (None, "finetune", "--base old --classify nowhere", "can't read the folder nowhere"),
    (lambda: os.mkdir("new"), "finetune", "--base old --search new dog", "no photos below new"),
    (None, "finetune", "--base old --search photos \udce4", "or not UTF-8"),
    (lambda: noise_photo("\udce4/1.png"), "finetune", "--base old --classify .", "surrogates not allowed"),
)


def contents():
    """Of all files but decoded photos, and the tokenizer that a run writes first."""
    files = [path for path in Path().rglob("*") if path.is_file() and path.suffix != ".uint8"]
    return {path: path.read_bytes() for path in files if path.parts[:2] != ("new", "tokenizer")}


@pytest.mark.parametrize("change, command, flags, message", BAD)
def test_bad_input_is_one_line(change, command, flags, message, album_run, capsys):
    if change:
        change()
    start, given = contents(), "--data photos --out new --batch-size 10 --device cpu"
    given += " --model tiny --tokenizer train" if command == "clip" else ""
    assert importlib.import_module(command).main(shlex.split(f"{given} {flags}")) == 2
    assert_one_error(capsys, message)
    assert contents() == start


# --- Speed and the README --------------------------------------------------------------------------------


def fastest_step():
    """Seconds of the fastest of six steps of the model and the recipe of `shapes`."""
    model, recipe = CLIP(replace(PRESETS["tiny"], vocab_size=600, eos_token_id=599)), clip.DRAWN_RECIPE
    optimizers, seconds = clip.make_optimizers(model, recipe), []
    pixels, ids = photos(128, model.config), captions([24] * 128, 24, model.config)
    for _ in range(6):
        start = time.perf_counter()
        clip.train_step(model, optimizers, NO_SCALER, pixels, ids, 1e-3)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


AVX2 = dict(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2", MKL_ENABLE_INSTRUCTIONS="AVX2")


def test_older_cpus_take_at_most_twice_as_long():
    """Without AVX-512, 16-bit arithmetic is emulated: a step that used any would take far longer."""
    script = f"import {MODULE} as tests; print(tests.fastest_step())"
    for _ in range(3):  # other processes may disturb a measurement
        ratio = float(run_python("-c", script, **AVX2)) / float(run_python("-c", script))
        if ratio <= 2:
            return
    pytest.fail(f"a step takes {ratio:.1f} times as long")


README = (HERE / "README.md").read_text()


def test_the_readmes_python_runs(studied, monkeypatch):
    """In the folder of a study, on few drawn scenes, as one notebook."""
    monkeypatch.chdir(studied)
    few_scenes(monkeypatch)
    plt.switch_backend("agg")  # draws files, on a machine with a screen too
    blocks, notebook = re.findall(r"```python\n(.*?)```", README, re.DOTALL), {}
    assert blocks
    for block in blocks:
        exec(block, notebook)


ENCODER, TOKENS = "x = self.encoder(self.embeddings(ids), end_index", "return self.token_embedding(ids)"
EXERCISES = [  # for each exercise of the README, a line of clip.py and what replaces it
    ("math.log(1 / 0.07)", "0.07"),
    (f"{ENCODER}, mask, pool_mask=end_mask)", f"{ENCODER})"),
    (
        "return (loss_image + loss_text) / 2",
        "B = logits_per_image.shape[-1]\n"
        "return -F.logsigmoid((2 * torch.eye(B) - 1) * (logits_per_image - math.log(B))).sum(dim=-1).mean()",
    ),
    ("return (loss_image + loss_text) / 2", "return loss_image"),
    (f"{TOKENS} + self.position_embedding.weight[: ids.shape[1]]", TOKENS),
]


@pytest.mark.parametrize("old, new", EXERCISES)
def test_the_readmes_exercises_change_a_line_that_runs(old, new):
    assert all(f"`{line}`" in README for line in new.splitlines())
    source = (HERE / "clip.py").read_text()
    assert source.count(old) == 1
    changed = ModuleType("changed")
    exec(source.replace(old, new.replace("\n", "\n    ")), changed.__dict__)
    loss = changed.contrastive_loss(changed.CLIP(SMALL)(photos(3), captions([3, 5, 9])))
    loss.backward()
    assert loss.isfinite() and loss != 0
    assert changed.contrastive_loss(torch.randn(5, 2, 3, 3)).isfinite()  # as `evaluate` calls it


def test_the_readme_describes_the_default_recipe():
    epochs, unmask = clip.Recipe().epochs, clip.Recipe().unmask
    assert f"over {epochs} epochs on" in README and f"after {unmask} epochs half" in README


def test_the_readmes_pictures_are_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    pictures += re.findall(r"\]\((assets/[^)]+)\)", README)
    assert {HERE / picture for picture in pictures} == set((HERE / "assets").iterdir())
    for picture in set(pictures):
        if picture.endswith(".svg"):
            ElementTree.parse(HERE / picture)
        else:
            Image.open(HERE / picture).load()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
