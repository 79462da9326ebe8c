"""What this project claims, a test for each claim: `pytest`. With -s each prints the largest difference seen.

Expected values never come from the code under test: they are those of Hugging Face's CLIPModel, of a formula
written out, or worked out by hand. SLOW=1 adds what takes long.
"""
import copy
import csv
import http.server
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
import tempfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")    # what isn't here is missing at once, not after many tries
import peft
import transformers
from matplotlib import pyplot as plt
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

import clip
import data
import finetune
import lora
from clip import CLIP, CLIPConfig, PRESETS, TowerConfig, contrastive_loss, recall_at_k

HERE = Path(clip.__file__).parent
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="takes long: set SLOW=1")

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def difference(a, b):
    """The largest absolute difference of two tensors, or of two dicts of them; NaN where there is one."""
    if torch.is_tensor(a):
        a, b = {"": a}, {"": b}
    assert {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}
    gaps = torch.stack([(a[name] - b[name]).abs().max() for name in a])
    print(f"largest difference {gaps.max():.1e} {list(a)[gaps.argmax()]}")
    return gaps.max().item()

# --- The model -------------------------------------------------------------------------------------------

# No two widths are equal, so that none can be taken for another, and the end token hasn't the largest id.
SMALL = CLIPConfig(vision=TowerConfig(48, 3, 4, 96), text=TowerConfig(32, 2, 2, 80),
                   image_size=40, patch_size=8, projection_dim=24,
                   vocab_size=100, eos_token_id=60, max_position_embeddings=16)

both_text_towers = pytest.mark.parametrize("causal", [False, True], ids=["bert", "causal"])

@torch.no_grad()
def shaken(model, noise=0.1):
    """Noise on every parameter: biases of 0, norms of 1 and embeddings of 0.02 would hide many a mistake."""
    for parameter in model.parameters():
        parameter.add_(noise * torch.randn_like(parameter))
    return model

def small_model(**changes):
    return shaken(CLIP(replace(SMALL, **changes)))

def before(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]

def captions(lengths, width, config=SMALL):
    """Random words, the end token in place `lengths` - 1, and behind it the end token again as padding."""
    ids = torch.randint(config.vocab_size, (len(lengths), width))
    ids[ids == config.eos_token_id] = 0
    return ids.where(before([length - 1 for length in lengths], width), config.eos_token_id)

def photos(count, config=SMALL):
    return torch.randn(count, 3, config.image_size, config.image_size)

def another_word(ids, position):
    ids = ids.clone()
    ids[:, position] = (ids[:, position] + 1) % SMALL.eos_token_id
    return ids

def test_vit_b_16_has_the_149_620_737_parameters_of_the_released_model():
    with torch.device("meta"):
        model = CLIP(PRESETS["ViT-B/16"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 149_620_737
    assert sum(parameter.numel() for parameter in model.vision_model.parameters()) == 85_799_424
    assert sum(parameter.numel() for parameter in model.text_model.parameters()) == 63_165_952

@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_softmax_formula(masked):
    attention, x = shaken(clip.Attention(TowerConfig(12, 1, 3, 24))), torch.randn(2, 5, 12)
    mask = (torch.rand(5, 5) < 0.6) | torch.eye(5, dtype=torch.bool)
    q, k, v = (x @ proj.weight.T + proj.bias
               for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = []
    for D in (slice(0, 4), slice(4, 8), slice(8, 12)):
        odds = (torch.einsum("bid,bjd->bij", q[..., D], k[..., D]) / 4 ** 0.5).exp() * (mask if masked else 1)
        heads.append(torch.einsum("bij,bjd->bid", odds / odds.sum(-1, keepdim=True), v[..., D]))
    expected = torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias
    assert difference(attention(x, mask if masked else None), expected) < 1e-6

def test_a_masked_token_has_no_influence_at_all():
    attention, x = shaken(clip.Attention(TowerConfig(12, 1, 3, 24))), torch.randn(2, 5, 12)
    mask, others = torch.tensor([[True, True, True, False, True]]), [0, 1, 2, 4]
    changed = x.clone()
    changed[:, 3] = 1000
    assert difference(attention(x)[:, others], attention(changed)[:, others]) > 0.1
    assert difference(attention(x, mask)[:, others], attention(changed, mask)[:, others]) == 0

def test_quick_gelu_is_that_of_transformers():
    x = torch.linspace(-10, 10, 1001)
    assert difference(clip.quick_gelu(x), ACT2FN["quick_gelu"](x)) < 1e-6

def test_hidden_act_decides_the_activation_of_both_towers():
    quick, exact = small_model(hidden_act="quick_gelu"), small_model(hidden_act="gelu")
    exact.load_state_dict(quick.state_dict())
    pixels, ids = photos(2), captions([4, 9], 12)
    assert difference(quick.encode_image(pixels), exact.encode_image(pixels)) > 1e-4
    assert difference(quick.encode_text(ids), exact.encode_text(ids)) > 1e-4

def test_the_patch_embedding_is_the_convolution_it_is_stored_as():
    embeddings, pixels = small_model().vision_model.embeddings, photos(2)
    patches = F.conv2d(pixels, embeddings.patch_embedding.weight, stride=8).flatten(2).transpose(1, 2)
    expected = torch.cat([embeddings.class_embedding.expand(2, 1, 48), patches], 1)
    assert difference(embeddings(pixels), expected + embeddings.position_embedding.weight) < 1e-5

# Equal to Hugging Face's

OPENAI_SMALL, OPENAI_B_16 = (replace(config, causal=True, hidden_act="quick_gelu")
                             for config in (SMALL, PRESETS["ViT-B/16"]))
GELU_SMALL = replace(SMALL, causal=True, hidden_act="gelu")
small_sizes = pytest.mark.parametrize("config", [OPENAI_SMALL, GELU_SMALL], ids=["quick_gelu", "gelu"])

def hugging_face(config):
    """transformers' CLIPModel of the same size, with attention in plain matrix products."""
    both = dict(hidden_act=config.hidden_act, bos_token_id=0, eos_token_id=config.eos_token_id)
    vision = dict(image_size=config.image_size, patch_size=config.patch_size)
    text = dict(vocab_size=config.vocab_size, max_position_embeddings=config.max_position_embeddings)
    return transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=vars(config.vision) | vision | both, text_config=vars(config.text) | text | both,
        projection_dim=config.projection_dim, attn_implementation="eager"))

def both_models(config):
    """Ours and theirs with the same weights, our inputs, and the same inputs under their names."""
    # As much as keeps a wide model's activations, and with them the rounding errors, as small as SMALL's.
    noise = 0.7 * config.vision.hidden_size ** -0.5
    theirs, ours = shaken(hugging_face(config), noise).eval(), CLIP(config)
    ours.load_state_dict(theirs.state_dict())
    T = config.max_position_embeddings
    lengths = [2, T, T // 2, T // 3, T // 4, T // 5]
    pixels, ids = photos(6, config), captions(lengths, T, config)
    return ours, theirs, (pixels, ids), dict(pixel_values=pixels, input_ids=ids, return_loss=True,
                                             attention_mask=before(lengths, T).long())

def keep_outputs(model):
    """A dict that `model`, once run, has filled with what each module gave."""
    outputs = {}
    for name, module in model.named_modules():
        if "activation_fn" in name:                         # a function in our MLP, a module in theirs
            continue
        if ".layers." in name or name.endswith(("embeddings", "norm", "_projection")):
            def hook(module, inputs, output, name=name):
                outputs[name] = output[0] if isinstance(output, tuple) else output
            module.register_forward_hook(hook)
    return outputs

def test_a_released_state_dict_fits_with_nothing_renamed():
    with torch.device("meta"):
        ours, theirs = CLIP(OPENAI_B_16).state_dict(), hugging_face(OPENAI_B_16).state_dict()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}

@small_sizes
def test_every_hidden_state_equals_hugging_faces(config):
    ours, theirs, inputs, their_inputs = both_models(config)
    outputs, expected = keep_outputs(ours), keep_outputs(theirs)
    ours(*inputs)
    theirs(**their_inputs)
    # What stands in padding is never read. It differs: they mask padding that we leave to causality.
    real = their_inputs["attention_mask"].bool()
    for name in [name for name in outputs if name.startswith("text_model")]:
        outputs[name], expected[name] = outputs[name][real], expected[name][real]
    assert len(outputs) == 11 * 5 + 7       # 11 modules in each of the 5 blocks, and 7 around them
    assert difference(outputs, expected) < 1e-5

@pytest.mark.parametrize("config", [OPENAI_SMALL, GELU_SMALL, pytest.param(OPENAI_B_16, marks=slow)],
                         ids=["quick_gelu", "gelu", "ViT-B/16"])
@torch.no_grad()
def test_pooled_outputs_embeddings_logits_and_loss_equal_hugging_faces(config):
    ours, theirs, (pixels, ids), their_inputs = both_models(config)
    logits, expected = ours(pixels, ids), theirs(**their_inputs)
    assert difference(
        {"image pooled": ours.vision_model(pixels), "image": ours.encode_image(pixels),
         "text pooled": ours.text_model(ids), "text": ours.encode_text(ids),
         "per image": logits, "per text": logits.T, "loss": contrastive_loss(logits)},
        {"image pooled": theirs.vision_model(pixels).pooler_output, "image": expected.image_embeds,
         "text pooled": theirs.text_model(ids, their_inputs["attention_mask"]).pooler_output,
         "text": expected.text_embeds, "per image": expected.logits_per_image,
         "per text": expected.logits_per_text, "loss": expected.loss}) < 1e-5

@small_sizes
def test_the_gradient_of_every_parameter_equals_hugging_faces(config):
    ours, theirs, inputs, their_inputs = both_models(config)
    contrastive_loss(ours(*inputs)).backward()
    theirs(**their_inputs).loss.backward()
    gradients, expected = ({name: parameter.grad for name, parameter in model.named_parameters()}
                           for model in (ours, theirs))
    # A key's bias adds the same to a whole row of the softmax: its gradient is 0.
    assert all(x.abs().max() > 1e-3 for name, x in gradients.items() if "k_proj.bias" not in name)
    assert difference(gradients, expected) < 1e-5

def test_a_bert_tower_is_hugging_faces_without_a_mask_on_each_caption_alone():
    ours, theirs, (_, ids), their_inputs = both_models(replace(SMALL, causal=False))
    expected = []
    for row, real in zip(ids, their_inputs["attention_mask"].bool()):
        x = theirs.text_model.embeddings(row[real][None])
        x = theirs.text_model.encoder(inputs_embeds=x).last_hidden_state
        expected.append(theirs.text_model.final_layer_norm(x)[0, -1])
    assert difference(ours.text_model(ids), torch.stack(expected)) < 1e-5

# Padding and the end token

def words_of(model, ids):
    """What the text tower makes of each token, (B, T, C)."""
    outputs = keep_outputs(model)
    model.encode_text(ids)
    return outputs["text_model.final_layer_norm"]

@both_text_towers
def test_padding_never_changes_an_embedding(causal):
    model, ids = small_model(causal=causal), captions([3, 6, 9], 16)
    expected = torch.cat([model.encode_text(ids[i:i + 1, :length]) for i, length in enumerate([3, 6, 9])])
    assert difference(model.encode_text(ids[:, :9]), expected) < 1e-6
    assert difference(model.encode_text(ids), expected) < 1e-6

@both_text_towers
def test_nothing_after_the_end_token_matters(causal):
    model, ids = small_model(causal=causal), captions([3, 6, 9], 16)
    garbage = ids.where(before([3, 6, 9], 16), torch.randint(100, (3, 16)))
    assert difference(model.encode_text(garbage), model.encode_text(ids)) < 1e-6

@both_text_towers
def test_every_word_before_the_end_token_matters(causal):
    model, ids = small_model(causal=causal), captions([9], 16)
    for position in range(8):
        assert difference(model.encode_text(another_word(ids, position)), model.encode_text(ids)) > 1e-2

@both_text_towers
def test_a_caption_is_read_at_its_first_end_token(causal):
    model, ids = small_model(causal=causal), captions([2, 7, 16], 16)
    assert difference(model.text_model(ids), words_of(model, ids)[[0, 1, 2], [1, 6, 15]]) == 0

def test_in_a_bert_tower_every_word_sees_the_last():
    model, ids = small_model(causal=False), captions([9], 16)
    words, changed = words_of(model, ids), words_of(model, another_word(ids, 7))
    assert all(difference(words[:, position], changed[:, position]) > 1e-2 for position in range(8))

def test_in_a_causal_tower_no_word_sees_a_later_one():
    model, ids = small_model(causal=True), captions([9], 16)
    words, changed = words_of(model, ids), words_of(model, another_word(ids, 7))
    assert difference(words[:, :7], changed[:, :7]) == 0

# Embeddings, logits, starting values

def test_embeddings_are_unit_vectors_in_fp32_even_under_autocast():
    model, pixels, ids = small_model(), photos(2), captions([4, 9], 12)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for embeds in (model.encode_image(pixels), model.encode_text(ids)):
                assert embeds.shape == (2, 24) and embeds.dtype == torch.float32
                assert difference(embeds.square().sum(-1), torch.ones(2)) < 1e-6

def test_logits_are_the_scale_times_the_cosines_with_photos_in_rows():
    model, pixels, ids = small_model(), photos(3), captions([4, 9, 2], 12)
    images = model.visual_projection(model.vision_model(pixels)).detach()
    texts = model.text_projection(model.text_model(ids)).detach()
    cosines = [[i @ t / (i @ i).sqrt() / (t @ t).sqrt() for t in texts] for i in images]
    assert difference(model(pixels, ids), model.logit_scale.exp() * torch.tensor(cosines)) < 1e-5

def test_autocast_does_not_round_the_logits():
    model, images, texts = small_model(), torch.randn(6, 24), torch.randn(5, 24)
    expected = model.similarity(images, texts)
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(model.similarity(images, texts), expected) == 0

def test_the_logits_start_at_a_scale_of_14_29_and_not_1_07():
    scale = CLIP(SMALL).logit_scale.detach()
    assert difference(scale, torch.tensor(2.6593)) < 1e-4
    assert difference(scale.exp(), torch.tensor(1 / 0.07)) < 1e-4

def test_every_parameter_starts_at_the_scale_of_openai():
    std = {"visual_projection.weight": 48 ** -0.5, "text_projection.weight": 32 ** -0.5,
           "vision_model.embeddings.class_embedding": 48 ** -0.5,
           "vision_model.embeddings.patch_embedding.weight": (3 * 8 * 8 * 48) ** -0.5,
           "vision_model.embeddings.position_embedding.weight": 48 ** -0.5,
           "text_model.embeddings.token_embedding.weight": 0.02,
           "text_model.embeddings.position_embedding.weight": 0.01}
    for tower, C, L in (("vision_model", 48, 3), ("text_model", 32, 2)):
        for block in (f"{tower}.encoder.layers.{i}" for i in range(L)):
            std |= {f"{block}.self_attn.{name}_proj.weight": C ** -0.5 for name in "qkv"}
            std[f"{block}.self_attn.out_proj.weight"] = (C * 2 * L) ** -0.5
            std[f"{block}.mlp.fc1.weight"] = (2 * C) ** -0.5
            std[f"{block}.mlp.fc2.weight"] = (C * 2 * L) ** -0.5
    model = CLIP(SMALL)
    with torch.no_grad():
        for name in std:
            model.get_parameter(name).fill_(torch.nan)
    clip.init_weights(model)
    for name, parameter in model.named_parameters():
        if name in std:
            # Four standard errors of a standard deviation and of a mean.
            assert abs(parameter.std() / std[name] - 1) < 4 / math.sqrt(2 * parameter.numel()), name
            assert abs(parameter.mean() / std[name]) < 4 / math.sqrt(parameter.numel()), name
        elif name != "logit_scale":
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name

# The loss

def test_the_loss_is_the_mean_of_both_cross_entropies():
    logits = 5 * torch.randn(7, 7, dtype=torch.float64)
    total = 0
    for i in range(7):
        total += math.log(sum(math.exp(logits[i, j]) for j in range(7))) - logits[i, i]
        total += math.log(sum(math.exp(logits[j, i]) for j in range(7))) - logits[i, i]
    assert difference(contrastive_loss(logits), total / 14) < 1e-6

@pytest.mark.parametrize("logits, loss", [(100 * torch.eye(128), 0.0), (torch.ones(128, 128), 4.8520303)],
                         ids=["perfect", "equal"])
def test_the_loss_of_perfect_logits_is_zero_and_of_equal_ones_ln_b(logits, loss):
    assert difference(contrastive_loss(logits), torch.tensor(loss)) < 1e-6

def test_the_loss_treats_photos_and_captions_alike():
    logits = 5 * torch.randn(7, 7)
    assert difference(contrastive_loss(logits), contrastive_loss(logits.T)) < 1e-6

def test_the_loss_of_bf16_logits_is_computed_in_fp32():
    logits = (5 * torch.randn(7, 7)).bfloat16()
    assert contrastive_loss(logits).dtype == torch.float32
    assert difference(contrastive_loss(logits), contrastive_loss(logits.float())) == 0

def test_the_gradient_of_the_loss_is_softmax_minus_identity():
    logits = (5 * torch.randn(7, 7)).requires_grad_()
    contrastive_loss(logits).backward()
    odds = logits.detach().exp()
    softmaxes = odds / odds.sum(1, keepdim=True) + odds / odds.sum(0, keepdim=True)
    assert difference(logits.grad, softmaxes / 14 - torch.eye(7) / 7) < 1e-6

# Recall

FIVE_EACH = torch.arange(40).repeat_interleave(5)
UNEVEN = torch.cat([torch.arange(40), torch.arange(60) ** 2 % 40])      # 1 to 13 each, in no order

def recall(text_to_image, image_to_text):
    return pytest.approx({**{f"t2i_r{k}": value for k, value in text_to_image.items()},
                          **{f"i2t_r{k}": value for k, value in image_to_text.items()}})

def test_recall_worked_out_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5],
                               [0.8, 0.2, 0.2, 0.2, 0.2, 0.6, 0.0, 0.0, 0.0, 0.0]])
    # Captions 0 and 5 find their photo. Photo 0 finds its caption 0, and so does photo 1, before its own 5.
    assert (recall_at_k(similarity, torch.tensor([0] * 5 + [1] * 5), ks=(1, 2))
            == recall({1: 0.2, 2: 1}, {1: 0.5, 2: 1}))

@pytest.mark.parametrize("owner", [FIVE_EACH, UNEVEN], ids=["five captions each", "uneven"])
def test_recall_is_that_by_sorting(owner):
    C, ks = len(owner), (1, 5, 10)
    similarity = torch.randn(40, C) + (owner == torch.arange(40)[:, None])
    best_photos, best_captions = (similarity.argsort(dim, descending=True) for dim in (0, 1))
    assert recall_at_k(similarity, owner) == recall(
        {k: sum(owner[c] in best_photos[:k, c] for c in range(C)) / C for k in ks},
        {k: sum(p in owner[best_captions[p, :k]] for p in range(40)) / 40 for k in ks})

@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_constant_similarity_scores_nothing(value):
    nothing = {1: 0, 5: 0, 10: 0}
    assert recall_at_k(torch.full((40, 200), value), FIVE_EACH) == recall(nothing, nothing)

@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_tie_or_a_nan_counts_as_a_miss(value):
    similarity = (FIVE_EACH == torch.arange(40)[:, None]).float()
    similarity[0, 5] = value        # photo 0 with the first caption of photo 1: one query each way
    assert (recall_at_k(similarity, FIVE_EACH, ks=(1, 2))
            == recall({1: 199 / 200, 2: 1}, {1: 39 / 40, 2: 1}))

# --- Released weights ------------------------------------------------------------------------------------

SIZES = {"patch 8": {}, "patch 20": dict(patch_size=20),
         "legacy end token": dict(vocab_size=90, eos_token_id=89),
         "wider": dict(vision=TowerConfig(96, 4, 6, 192), projection_dim=40, image_size=56, patch_size=14)}

def released_folder(folder, config):
    """A Hugging Face folder with random weights, its model, and our inputs for it."""
    theirs = shaken(hugging_face(config)).eval()
    theirs.save_pretrained(folder)
    data.train_tokenizer(["a b c"]).save_pretrained(folder)
    return theirs, (photos(4, config), captions([2, 5, 9, 16], 16, config))

def reconfigure(folder, **parts):
    """Changes entries of vision_config and text_config in the folder's config.json."""
    described = json.loads((folder / "config.json").read_text())
    for part, changes in parts.items():
        described[part] |= changes
    (folder / "config.json").write_text(json.dumps(described))

@torch.no_grad()
def their_logits(theirs, pixels, ids):
    return theirs(pixel_values=pixels, input_ids=ids).logits_per_image

@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_released_weights_give_the_logits_that_transformers_gives(changes, tmp_path):
    config = replace(OPENAI_SMALL, **changes)
    theirs, inputs = released_folder(tmp_path, config)
    if "eos_token_id" in changes:
        reconfigure(tmp_path, text_config=dict(eos_token_id=2))        # what OpenAI's released ones say
        theirs = transformers.CLIPModel.from_pretrained(tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    assert ours.config == config
    assert difference(ours(*inputs), their_logits(theirs, *inputs)) < 1e-5

def test_what_we_save_transformers_opens_and_gives_the_same_logits(tmp_path):
    theirs, inputs = released_folder(tmp_path / "theirs", OPENAI_SMALL)
    ours = CLIP.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.CLIPModel.from_pretrained(tmp_path / "ours").eval()
    assert difference(their_logits(again, *inputs), their_logits(theirs, *inputs)) < 1e-5
    assert CLIP.from_pretrained(tmp_path / "ours").config == OPENAI_SMALL
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "ours")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    image.save(tmp_path / "a.png")
    batch = processor(text=["a b c"], images=image, return_tensors="pt")
    ids = data.tokenize(data.load_tokenizer(tmp_path / "theirs"), ["a b c"], 16)[0]
    assert batch["input_ids"][0].tolist() == ids[:5].tolist()
    pixels = data.normalize(torch.tensor(data.load_photo(tmp_path / "a.png", 40))[None])
    assert difference(batch["pixel_values"], pixels) < 1e-5

def test_a_run_of_clip_py_is_a_base_as_well(monkeypatch, tmp_path):
    assert train_shapes(monkeypatch, tmp_path, "--text", "causal") == 0
    ours, again = CLIP.load("runs/shapes"), CLIP.from_pretrained("runs/shapes")
    assert difference(ours.state_dict(), again.state_dict()) == 0
    ours.save_pretrained("exported")
    inputs = photos(3, ours.config), captions([2, 5, 9], 16, ours.config)
    theirs = transformers.CLIPModel.from_pretrained("exported").eval()
    with torch.no_grad():
        assert difference(ours(*inputs), their_logits(theirs, *inputs)) < 1e-5

@torch.no_grad()
def test_a_merged_model_is_saved_for_transformers_as_the_adapted_one(tmp_path):
    model, pixels, ids = lora_clip(), photos(4), captions([2, 5, 9, 16], 16)
    for layer in lora.adapters(model).values():
        layer.lora_B.normal_(std=0.1)
    expected = model(pixels, ids)
    lora.merge(model)
    model.save_pretrained(tmp_path, data.train_tokenizer(["a"]))
    theirs = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert difference(their_logits(theirs, pixels, ids), expected) < 1e-5

def with_another_norm(folder):
    reconfigure(folder, text_config=dict(layer_norm_eps=0.1))

def with_another_activation(folder):
    reconfigure(folder, vision_config=dict(hidden_act="relu"), text_config=dict(hidden_act="relu"))

@pytest.mark.parametrize("change", [with_another_norm, with_another_activation])
def test_a_clip_that_ours_can_t_express_is_refused(change, tmp_path):
    released_folder(tmp_path, OPENAI_SMALL)
    change(tmp_path)
    with pytest.raises(data.InputError, match="an activation or a norm"):
        CLIP.from_pretrained(tmp_path)

def test_a_bert_tower_is_refused_by_save_pretrained(tmp_path):
    with pytest.raises(data.InputError, match="no BERT-style text tower"):
        small_model(causal=False).save_pretrained(tmp_path / "out", data.train_tokenizer(["a"]))
    assert not (tmp_path / "out").exists()

def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

def with_a_tensor_too_many(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_model.adapter.weight"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

def with_another_shape(folder):
    reconfigure(folder, vision_config=dict(intermediate_size=100))

def cut_short(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])

@pytest.mark.parametrize("damage", [without_a_tensor, with_a_tensor_too_many, with_another_shape, cut_short])
def test_a_checkpoint_that_is_not_one_whole_clip_is_refused(damage, tmp_path):
    released_folder(tmp_path, OPENAI_SMALL)
    damage(tmp_path)
    with pytest.raises(data.InputError, match="is not one whole CLIP|no CLIP in") as error:
        CLIP.from_pretrained(tmp_path)
    assert len(str(error.value).splitlines()) == 1

def test_openais_released_weights_give_the_logits_that_transformers_gives():
    try:
        theirs = transformers.CLIPModel.from_pretrained("openai/clip-vit-base-patch16", local_files_only=True)
    except OSError:
        pytest.skip("openai/clip-vit-base-patch16 is not in the hub's cache here")
    ours, ids = CLIP.from_pretrained("openai/clip-vit-base-patch16"), captions([5, 9], 16, OPENAI_B_16)
    pixels = photos(2, OPENAI_B_16)
    with torch.no_grad():
        assert difference(ours(pixels, ids), their_logits(theirs.eval(), pixels, ids)) < 1e-4

# --- LoRA ------------------------------------------------------------------------------------------------

QKV = ["q_proj", "k_proj", "v_proj"]

def lora_pair(r=4, alpha=8, dropout=0.0, use_rslora=False, targets=QKV):
    """CLIPModel twice with the same weights: adapted by us, and by peft, with the same random A and B."""
    ours = shaken(hugging_face(OPENAI_SMALL)).eval()
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, use_rslora=use_rslora)).eval()
    lora.add_lora(ours, r, alpha, dropout, targets, use_rslora)
    ours.eval()
    for name, parameter in ours.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            theirs.base_model.model.get_parameter(f"{name}.default.weight").data.copy_(parameter)
    return ours, theirs, dict(pixel_values=photos(4), input_ids=captions([3, 5, 9, 16], 16), return_loss=True)

def lora_gradients(model):
    return {name.replace(".default.weight", "").replace("base_model.model.", ""): parameter.grad
            for name, parameter in model.named_parameters() if parameter.grad is not None}

def lora_weights(model):
    return {name.replace(".default.weight", "").replace("base_model.model.", ""): parameter.detach()
            for name, parameter in model.named_parameters() if "lora_" in name}

@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha / r", "rslora"])
def test_lora_outputs_and_gradients_equal_pefts(use_rslora):
    ours, theirs, inputs = lora_pair(use_rslora=use_rslora)
    a, b = ours(**inputs), theirs(**inputs)
    assert difference(a.logits_per_image, b.logits_per_image) < 1e-6
    a.loss.backward()
    b.loss.backward()
    assert len(lora_gradients(ours)) == 2 * 3 * 5
    assert difference(lora_gradients(ours), lora_gradients(theirs)) < 1e-6

def test_lora_dropout_is_pefts():
    ours, theirs, inputs = lora_pair(dropout=0.3)
    losses = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        losses.append(model(**inputs).loss)
    assert difference(*losses) < 1e-6
    assert difference(losses[0], ours.eval()(**inputs).loss) > 1e-3

def test_twenty_steps_of_adamw_leave_the_same_a_and_b_as_peft():
    ours, theirs, inputs = lora_pair()
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    start = lora_pair()[0]
    assert difference(lora_weights(ours), lora_weights(start)) > 1e-2
    assert difference(lora_weights(ours), lora_weights(theirs)) < 1e-5

@torch.no_grad()
def test_merged_equals_unmerged_and_pefts_merge_and_unload():
    ours, theirs, inputs = lora_pair()
    base = {name: p.clone() for name, p in ours.state_dict().items()}
    unmerged = ours(**inputs).logits_per_image
    lora.merge(ours)
    assert difference(ours(**inputs).logits_per_image, unmerged) < 1e-5
    theirs = theirs.merge_and_unload()
    assert difference(ours(**inputs).logits_per_image, theirs(**inputs).logits_per_image) < 1e-5
    lora.unmerge(ours)
    assert difference(ours.state_dict(), base) < 1e-6
    assert difference(ours(**inputs).logits_per_image, unmerged) < 1e-5

@pytest.mark.parametrize("targets", [QKV, ["vision_model.encoder.layers.1.mlp.fc1", "text_projection"]],
                         ids=["everywhere", "two modules"])
@torch.no_grad()
def test_an_adapter_saved_here_opens_in_peft_and_gives_the_same_logits(targets, tmp_path):
    ours, _, inputs = lora_pair(targets=targets)
    lora.save_adapter(ours, tmp_path, "somebody/clip")
    base = copy.deepcopy(ours)
    lora.set_strength(base, 0.0)
    plain = hugging_face(OPENAI_SMALL).eval()
    plain.load_state_dict({name: p for name, p in ours.state_dict().items() if "lora_" not in name})
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert len(lora_weights(theirs)) == len(lora_weights(ours))
    assert difference(theirs(**inputs).logits_per_image, ours(**inputs).logits_per_image) < 1e-6
    assert difference(base(**inputs).logits_per_image, ours(**inputs).logits_per_image) > 1e-3

@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha / r", "rslora"])
@torch.no_grad()
def test_an_adapter_saved_by_peft_opens_here_in_our_clip_too(use_rslora, tmp_path):
    _, theirs, inputs = lora_pair(use_rslora=use_rslora)
    theirs.save_pretrained(tmp_path)
    expected = theirs(**inputs).logits_per_image
    plain = theirs.unload()
    ours = CLIP(OPENAI_SMALL).eval()
    ours.load_state_dict(plain.state_dict())
    assert difference(ours(inputs["pixel_values"], inputs["input_ids"]), expected) > 1e-3
    for model in (plain, ours):
        lora.load_adapter(model, tmp_path)
    assert difference(plain.eval()(**inputs).logits_per_image, expected) < 1e-6
    assert difference(ours.eval()(inputs["pixel_values"], inputs["input_ids"]), expected) < 1e-5

@pytest.mark.parametrize("r, trainable", [(64, 5_898_240), (8, 737_280)])
def test_the_study_trains_379_percent_at_r_64(r, trainable):
    with torch.device("meta"):
        model = CLIP(OPENAI_B_16)
        assert lora.add_lora(model, r, 2 * r) == 72
    assert lora.trainable_parameters(model) == (trainable, 149_620_737 + trainable)
    if r == 64:
        assert round(100 * trainable / (149_620_737 + trainable), 2) == 3.79
        assert round(4 * trainable / 1e6) == 24             # MB in fp32

@torch.no_grad()
def test_merging_into_a_bf16_base_does_not_round_the_adapter():
    layer = lora.LoRALinear(torch.nn.Linear(20, 30), 4, 8)
    layer.weight.data = layer.weight.data.bfloat16()
    torch.nn.init.normal_(layer.lora_B, std=1e-4)
    base, delta = layer.weight.clone(), layer.delta()
    lora.merge(layer)
    assert difference(layer.weight, base + delta) == 0 and layer.weight.dtype == torch.float32
    lora.unmerge(layer)
    assert difference(layer.weight, base.float()) < 1e-7

def test_a_new_adapter_changes_nothing_exactly():
    model, pixels, ids = small_model(), photos(3), captions([3, 5, 9], 16)
    expected = model(pixels, ids)
    lora.add_lora(model, 4, 8)
    assert difference(model(pixels, ids), expected) == 0

def test_adapters_of_a_model_in_eval_mode_have_no_dropout():
    model, pixels = small_model().eval(), photos(3)
    lora.add_lora(model, 4, 8, dropout=0.5)
    for layer in lora.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B)
    assert difference(model.encode_image(pixels), model.encode_image(pixels)) == 0
    model.train()
    assert difference(model.encode_image(pixels), model.encode_image(pixels)) > 1e-3

def test_a_starts_uniform_within_one_over_sqrt_in_and_b_at_zero():
    layer = lora.LoRALinear(torch.nn.Linear(300, 50), 64, 128)
    assert layer.lora_A.shape == (64, 300) and layer.lora_B.shape == (50, 64)
    assert 0.99 < layer.lora_A.abs().max() * 300 ** 0.5 <= 1
    assert abs(layer.lora_A.std() * 900 ** 0.5 - 1) < 0.02  # of a uniform one: its bound over sqrt(3)
    assert (layer.lora_B == 0).all()

def test_only_a_and_b_get_gradients():
    model = small_model()
    lora.add_lora(model, 4, 8)
    contrastive_loss(model(photos(3), captions([3, 5, 9], 16))).backward()
    assert all(("lora_" in name) == (p.grad is not None) for name, p in model.named_parameters())

def test_strength_leads_from_the_base_to_the_adapted_model():
    model, x = lora.LoRALinear(torch.nn.Linear(7, 5), 2, 6), torch.randn(3, 7)
    torch.nn.init.normal_(model.lora_B)
    base = F.linear(x, model.weight, model.bias)
    for strength in (0.0, 0.5, 1.5):
        lora.set_strength(model, strength)
        assert difference(model(x), base + strength * 3 * x @ model.lora_A.T @ model.lora_B.T) < 1e-5

def adapted(**changes):
    model = small_model()
    lora.add_lora(model, **dict(r=4, alpha=8) | changes)
    return model

def lora_clip():
    model = small_model(causal=True)
    lora.add_lora(model, 4, 8)
    return model

def poisoned(value=torch.nan):
    model = adapted()
    model.vision_model.encoder.layers[1].self_attn.q_proj.lora_A.data[0, 0] = value
    return model

def merged(times):
    model = adapted()
    for _ in range(times):
        lora.merge(model)
    return model

def loaded(model, saved=None, **config):
    """`model` with an adapter loaded that `saved` wrote, its configuration changed."""
    with tempfile.TemporaryDirectory() as folder:
        lora.save_adapter(saved or adapted(), folder)
        file = Path(folder) / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        before = {name: p.clone() for name, p in model.state_dict().items()}
        try:
            lora.load_adapter(model, folder)
        finally:
            assert difference(model.state_dict(), before) == 0
    return model

BAD_LORA = {
    "r = 0": (lambda: adapted(r=0), "r is 0"),
    "r < 0": (lambda: adapted(r=-4), "r is -4"),
    "r is a fraction": (lambda: adapted(r=2.5), "r is 2.5"),
    "alpha = 0": (lambda: adapted(alpha=0), "alpha is 0"),
    "alpha is NaN": (lambda: adapted(alpha=math.nan), "alpha is nan"),
    "dropout = 1": (lambda: adapted(dropout=1.0), "dropout 1.0"),
    "no such target": (lambda: adapted(targets=["q_proj", "query"]), "no plain Linear of the model"),
    "a target that is no Linear": (lambda: adapted(targets=["layer_norm1"]), "'layer_norm1'"),
    "no targets": (lambda: adapted(targets=[]), "no targets"),
    "attention that hides its Linears": (lambda: lora.add_lora(torch.nn.MultiheadAttention(8, 2), 2, 4, 0.0,
                                                               ["out_proj"]), "no plain Linear"),
    "save for Hugging Face before merging": (lambda: lora_clip().save_pretrained("out"), "not merged"),
    "save for Hugging Face without a tokenizer": (lambda: small_model(causal=True).save_pretrained("out"),
                                                  "came with no tokenizer"),
    "load PiSSA": (lambda: loaded(small_model(), init_lora_weights="pissa"), "init_lora_weights is pissa"),
    "half a name": (lambda: adapted(targets=["proj"]), "'proj'"),
    "adapters twice": (lambda: lora.add_lora(adapted(), 4, 8), "has adapters already"),
    "merge twice": (lambda: merged(2), "merged already"),
    "merge without adapters": (lambda: lora.merge(small_model()), "has no adapters"),
    "unmerge unmerged": (lambda: lora.unmerge(adapted()), "not merged"),
    "strength while merged": (lambda: lora.set_strength(merged(1), 0.5), "are merged"),
    "save without adapters": (lambda: lora.save_adapter(small_model(), "out"), "has no adapters"),
    "merge NaN": (lambda: lora.merge(poisoned()), "NaN or infinity"),
    "load NaN": (lambda: loaded(small_model(), poisoned()), "infinity in vision_model.encoder.layers.1"),
    "load infinity": (lambda: loaded(small_model(), poisoned(-torch.inf)), "NaN or infinity"),
    "load another shape": (lambda: loaded(small_model(vision=TowerConfig(64, 3, 4, 96))), "doesn't fit"),
    "load for more layers": (lambda: loaded(small_model(vision=TowerConfig(48, 2, 4, 96))), "doesn't fit"),
    "load with another r": (lambda: loaded(small_model(), r=3), "doesn't fit"),
    "load twice": (lambda: loaded(adapted()), "has adapters already"),
    "load DoRA": (lambda: loaded(small_model(), use_dora=True), "its use_dora is True"),
    "load prefix tuning": (lambda: loaded(small_model(), peft_type="PREFIX_TUNING"), "not plain LoRA"),
    "load ranks that differ": (lambda: loaded(small_model(), rank_pattern={"q_proj": 2}), "rank_pattern"),
    "load alpha as a word": (lambda: loaded(small_model(), lora_alpha="big"), "can be read"),
    "load from nowhere": (lambda: lora.load_adapter(small_model(), "nowhere"), "can be read"),
}

@pytest.mark.parametrize("name", BAD_LORA)
def test_bad_adapters_are_one_clear_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, message = BAD_LORA[name]
    with pytest.raises(data.InputError) as error:
        call()
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []

# --- Data ------------------------------------------------------------------------------------------------

NAMES = [f"{i}.jpg" for i in range(120)]
CAPTIONS = {name: [f"photo {name[:-4]} , said in way {k}" for k in range(5)] for name in NAMES}
SPLIT = {name: "val" if i % 6 == 0 else "test" if i % 6 == 1 else "train" for i, name in enumerate(NAMES)}

def karpathy(folder):
    images = [{"filename": name, "split": SPLIT[name], "sentences": [{"raw": c} for c in captions]}
              for name, captions in CAPTIONS.items()]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))

def kaggle(folder):
    rows = [f"{name}| {k}| {c}" for name, captions in CAPTIONS.items() for k, c in enumerate(captions)]
    rows[4] = rows[4].replace("4| ", "4   ")                # as line 2199200615.jpg of the published file
    (folder / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *rows]))

def hub(folder):
    with open(folder / "flickr_annotations_30k.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        writer.writerows([json.dumps(c), "[]", SPLIT[name], name, 0] for name, c in CAPTIONS.items())

def flickr8k(folder):
    with open(folder / "captions.txt", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([name, c] for name, captions in CAPTIONS.items() for c in captions)

@pytest.fixture
def album(tmp_path, monkeypatch):
    """A folder of 120 photos with Karpathy's captions, one folder deeper than the photos' captions."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / "images" / name)
    karpathy(folder)
    return folder

def few_scenes(monkeypatch):
    load_drawn = data.load_drawn
    monkeypatch.setattr(data, "load_drawn", lambda sizes, *rest: load_drawn(
        {"val": 70, "test": 70, "train": 100}, *rest))

@pytest.mark.parametrize("write", [karpathy, kaggle, hub, flickr8k])
def test_every_form_of_flickr_gives_the_same_captions(write, tmp_path):
    write(tmp_path)
    _, captions = data.read_captions(tmp_path)
    assert {name: sentences for name, (_, sentences) in captions.items()} == CAPTIONS

def test_kaggles_file_without_its_header_loses_no_caption(tmp_path):
    kaggle(tmp_path)
    lines = (tmp_path / "results.csv").read_text().split("\n")
    (tmp_path / "results.csv").write_text("\n".join(lines[1:]))
    assert data.read_captions(tmp_path)[1]["0.jpg"][1] == CAPTIONS["0.jpg"]

@pytest.mark.parametrize("write", [karpathy, hub])
def test_published_splits_are_kept_and_karpathys_file_wins(write, tmp_path):
    kaggle(tmp_path)
    write(tmp_path)
    _, captions = data.read_captions(tmp_path)
    assert {name: split for name, (split, _) in captions.items()} == SPLIT

def test_of_karpathys_three_files_the_one_named_like_the_folder_is_read(tmp_path):
    folder = tmp_path / "flickr30k"
    folder.mkdir()
    karpathy(folder)
    for other in ("coco", "flickr8k"):
        (folder / f"dataset_{other}.json").write_text('{"images": []}')
    assert data.read_captions(folder)[0].name == "dataset_flickr30k.json"

def test_line_breaks_and_odd_separators_inside_a_caption_stay_inside_it(tmp_path):
    odd = 'a "dog", it\u2028runs\x85and\fbarks | loud\nand clear'
    with open(tmp_path / "captions.txt", "w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], ["1.jpg", odd], ["2.jpg", "a cat"]])
    _, captions = data.read_captions(tmp_path)
    assert [sentences for _, sentences in captions.values()] == [[" ".join(odd.split())], ["a cat"]]
    (tmp_path / "captions.txt").unlink()
    kaggles = "image_name| comment_number| comment\n1.jpg| 0| a dog\u2028runs | on\n"
    (tmp_path / "results.csv").write_text(kaggles)
    assert data.read_captions(tmp_path)[1]["1.jpg"][1] == ["a dog runs | on"]

@pytest.mark.parametrize("rows, message", [
    ("image,caption\n1.jpg,a dog , a cat\n", "more or fewer cells"),
    ("image,caption\n1.jpg\n", "more or fewer cells"),
    ('image,caption\n1.jpg,"a dog\n2.jpg,a cat\n', "unexpected end of data"),
    ("name,text\n1.jpg,a dog\n", "'image'")])
def test_a_csv_that_would_lose_words_is_refused(rows, message, tmp_path):
    (tmp_path / "captions.txt").write_text(rows)
    with pytest.raises(data.InputError, match=message):
        data.read_captions(tmp_path)

def test_restval_is_training_and_another_split_is_an_error(tmp_path):
    image = {"filename": "1.jpg", "split": "restval", "sentences": [{"raw": "a dog"}]}
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"images": [image]}))
    assert data.read_captions(tmp_path)[1] == {"1.jpg": ("train", ["a dog"])}
    file.write_text(json.dumps({"images": [image | {"split": "holdout"}]}))
    with pytest.raises(data.InputError, match="1.jpg into 'holdout'"):
        data.read_captions(tmp_path)

def test_captions_keep_their_end_token_though_it_has_not_the_largest_id():
    tokenizer = data.train_tokenizer(["a b c"])
    tokenizer.add_tokens(["<photo>"])
    assert tokenizer.convert_tokens_to_ids("<photo>") > tokenizer.eos_token_id
    split = data.make_split(["1"], np.zeros((1, 8, 8, 3), np.uint8), [["<photo> " + "a " * 9]], tokenizer, 77)
    ids = split.tokens(torch.tensor([0]), "cpu")[0].tolist()
    assert ids.index(tokenizer.eos_token_id) == 11 and len(ids) == 16

def test_a_photos_own_name_decides_its_split(tmp_path):
    kaggle(tmp_path)
    _, before = data.read_captions(tmp_path)
    header, *rows = (tmp_path / "results.csv").read_text().splitlines()
    (tmp_path / "results.csv").write_text("\n".join([header, "new.jpg| 0| one more", *reversed(rows)]))
    _, after = data.read_captions(tmp_path)
    assert {name: after[name][0] for name in before} == {name: split for name, (split, _) in before.items()}
    assert {split for split, _ in before.values()} == {"train", "val", "test"}

def test_without_a_split_file_1_photo_in_20_goes_to_val_and_1_in_20_to_test(tmp_path):
    rows = "".join(f"{i}.jpg| 0| a dog\n" for i in range(31_783))
    (tmp_path / "results.csv").write_text(f"image_name| comment_number| comment\n{rows}")
    splits = [split for split, _ in data.read_captions(tmp_path)[1].values()]
    assert 0.047 < splits.count("val") / 31_783 < 0.053
    assert 0.047 < splits.count("test") / 31_783 < 0.053

def processed(image, size):
    """Hugging Face's own preprocessing, (size, size, 3) float."""
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size)
    return torch.as_tensor(np.asarray(processor(image)["pixel_values"][0])).permute(1, 2, 0)

def prepared(path):
    """Our preprocessing of a file, in the same layout."""
    return data.normalize(torch.tensor(data.load_photo(path, 224))[None])[0].permute(1, 2, 0)

@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (224, 224), (225, 640), (37, 61)])
def test_photos_become_exactly_the_pixels_of_clip_image_processor(shape, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    image.save(tmp_path / "a.png")
    assert difference(prepared(tmp_path / "a.png"), processed(image, 224)) < 1e-5

@pytest.mark.skipif("FLICKR" not in os.environ, reason="set FLICKR to a folder of Flickr photos")
def test_real_photos_become_exactly_the_pixels_of_clip_image_processor():
    captions_file, captions = data.read_captions(os.environ["FLICKR"])
    for path in list(data.find_photos(captions_file, captions).values())[:20]:
        assert difference(prepared(path), processed(Image.open(path), 224)) < 1e-5

def saved(mode, colour, path, **options):
    Image.new(mode, (40, 20), colour).save(path, **options)
    return path

def test_odd_photos_come_out_in_their_colours(tmp_path):
    odd = {"grey": (saved("L", 200, tmp_path / "g.jpg"), (200, 200, 200)),
           "cmyk": (saved("CMYK", (0, 255, 255, 0), tmp_path / "c.jpg"), (255, 0, 0)),
           "palette": (saved("P", 0, tmp_path / "p.png"), (0, 0, 0)),
           "transparent": (saved("RGBA", (9, 9, 9, 0), tmp_path / "t.png"), (255, 255, 255)),
           "png named jpg": (saved("RGB", (1, 2, 3), tmp_path / "n.jpg", format="PNG"), (1, 2, 3))}
    for name, (path, colour) in odd.items():
        photo = data.load_photo(path, 16)
        assert photo.shape == (16, 16, 3)
        assert np.abs(photo.astype(int) - colour).max() <= 3, name
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "1.png")
    assert (data.load_photo(tmp_path / "1.png", 16) == (7, 8, 9)).all()
    Image.new("RGB", (1, 4000), (7, 8, 9)).save(tmp_path / "strip.png")
    assert (data.load_photo(tmp_path / "strip.png", 16) == (7, 8, 9)).all()

def test_a_photo_taken_with_the_camera_turned_is_upright(tmp_path):
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (0, 0, 40, 20))                    # white above, as stored
    exif = Image.Exif()
    exif[0x0112] = 6                                        # turn by 90 degrees clockwise to show
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    photo = data.load_photo(tmp_path / "a.jpg", 16)
    assert photo[:, 12:].mean() > 240
    assert photo[:, :4].mean() < 15

def load(folder):
    splits, _ = data.load(str(folder), "train", 48, 24)
    return splits

def test_a_damaged_or_missing_photo_is_named_and_left_out(album, capsys):
    for i in range(120, 420):                               # so many that two are under 1 %
        shutil.copy(album / "images" / "5.jpg", album / "images" / f"{i}.jpg")
    images = [{"filename": f"{i}.jpg", "split": "train" if i > 9 else "val",
               "sentences": [{"raw": f"photo {i}"}]} for i in range(420)]
    (album / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    (album / "images" / "77.jpg").write_bytes((album / "images" / "77.jpg").read_bytes()[:300])
    (album / "images" / "88.jpg").unlink()
    train = load(album)["train"]
    assert "warning: left out, missing or not to be read: 77.jpg, 88.jpg\n" in capsys.readouterr().err
    assert not {"77.jpg", "88.jpg"} & set(train.names)
    assert len(train.names) == len(train.photos) == 408
    assert [train.captions[c] for c in (0, -1)] == ["photo 10", "photo 419"]

def test_the_store_is_reused_until_a_photo_changes(album, monkeypatch):
    first = load(album)["train"].photos.clone()
    monkeypatch.setattr(data, "build_store", lambda *_: pytest.fail("built again"))
    assert torch.equal(load(album)["train"].photos, first)
    monkeypatch.undo()
    monkeypatch.chdir(album.parent)
    Image.new("RGB", (80, 60)).save(album / "images" / "2.jpg")
    assert not torch.equal(load(album)["train"].photos, first)

def test_what_a_killed_process_left_is_removed_even_if_it_had_our_number(tmp_path):
    with data.atomic(tmp_path / "file") as temporary:
        temporary.mkdir()
        left = shutil.copytree(temporary, tmp_path / "left")
    remains = (temporary, temporary.with_name(temporary.name.replace(str(os.getpid()), "999999999")))
    for folder in remains:
        shutil.copytree(left, folder)
    with data.atomic(tmp_path / "file2") as other:
        other.write_text("x")
    assert all(folder.exists() for folder in remains)       # they belong to another file
    shutil.rmtree(tmp_path / "file")
    with data.atomic(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert not any(folder.exists() for folder in remains) and (tmp_path / "file").read_text() == "x"

def test_a_store_that_fails_leaves_nothing_behind(album):
    for name in NAMES[2:30]:
        (album / "images" / name).write_bytes(b"no photo")
    with pytest.raises(data.InputError, match="missing or broken"):
        load(album)
    assert list(Path("cache").iterdir()) == []

def test_an_epoch_shows_every_photo_once_with_one_of_its_own_captions(album):
    train = load(album)["train"]
    drawn = torch.stack([train.pairs(seed=3, epoch=epoch) for epoch in range(60)])
    for pairs in drawn:
        assert sorted(pairs[:, 0].tolist()) == list(range(80))
        assert torch.equal(train.owner[pairs[:, 1]], pairs[:, 0])
    assert set(drawn[:, :, 1].flatten().tolist()) == set(range(400))
    assert torch.equal(drawn[7], train.pairs(3, 7))
    several = train.pairs(3, 7, captions=4)
    assert torch.equal(several[:, :2], drawn[7])
    for row in several.tolist():
        assert len(set(row[1:])) == 4 and (train.owner[row[1:]] == row[0]).all()
    assert not torch.equal(drawn[7], train.pairs(4, 7))

def test_no_photo_and_no_caption_is_in_two_splits(album):
    names = [set(split.names) for split in load(album).values()]
    assert sum(len(part) for part in names) == len(set.union(*names)) == 120

def test_a_trained_tokenizer_knows_every_byte_and_its_end_token_is_the_largest():
    tokenizer = data.train_tokenizer(["a small red circle", "a small blue square"] * 20)
    assert isinstance(tokenizer, transformers.CLIPTokenizer)
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    text = "zebrafish 🦓 é ñ 漢"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1           # an unknown byte would become an end token
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")
    assert len(tokenizer("small")["input_ids"]) == 3

def test_long_captions_are_cut_and_keep_their_end_token():
    tokenizer = data.train_tokenizer(["a b c"])
    ids = data.tokenize(tokenizer, ["a " * 200, "b"])
    assert ids.shape == (2, 77)
    assert ids[0, -1] == tokenizer.eos_token_id
    assert (ids[1, 2:] == tokenizer.eos_token_id).all()

def test_a_batch_of_captions_is_as_long_as_its_longest_rounded_up_to_eight(album):
    train = load(album)["train"]
    train.ids, train.lengths = torch.zeros(3, 24), torch.tensor([8, 9, 17])
    batches = [torch.tensor(rows) for rows in ([0], [0, 1], [2, 0])]
    assert [train.tokens(rows, torch.device("cpu")).shape[1] for rows in batches] == [8, 16, 24]

def test_augmentation_without_crop_is_the_photo_or_its_mirror_image():
    photos = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8)
    plain, augmented = data.normalize(photos), data.augment(photos, 16, scale=(1, 1), ratio=(1, 1))
    mirrored = (augmented - plain).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert 16 < mirrored.sum() < 48
    assert difference(augmented, torch.where(mirrored[:, None, None, None], plain.flip(-1), plain)) < 1e-4

def test_crops_show_the_share_of_the_photo_that_was_asked_for():
    ramp = torch.arange(256).expand(500, 256, 256)[..., None].expand(-1, -1, -1, 3).to(torch.uint8)
    columns = data.augment(ramp, 224, scale=(0.4, 0.4), ratio=(1, 1))[:, 0, 0] * data.STD[0] + data.MEAN[0]
    width = (columns[:, -1] - columns[:, 0]).abs() * 224 / 223
    assert difference(width, torch.full_like(width, 0.4 ** 0.5)) < 0.01

def test_there_are_64_800_scenes_and_each_comes_once():
    assert len(data.all_scenes(0)) == len(set(data.all_scenes(0))) == 64_800

def test_a_scene_depends_on_seed_and_index_alone():
    few, many = (data.load_drawn({"val": 10, "train": n}, 48) for n in (5, 20))
    assert np.array_equal(few["train"][1], many["train"][1][:5])
    assert few["train"][2] == many["train"][2][:5]
    assert data.all_scenes(1)[0] != data.all_scenes(0)[0]

def test_no_validation_scene_is_in_training_and_every_caption_says_which_one_it_is():
    scenes = [data.all_scenes(0)[i] for i in range(11_000)]
    assert len(set(scenes)) == 11_000
    captions = sum(data.load_drawn({"val": 500}, 48)["val"][2], [])
    assert len(set(captions)) == 2500
    for i, caption in enumerate(captions):
        *objects, ground = scenes[i // 5]
        words = [word for thing, _ in objects for word in thing] + [ground]
        assert all(caption.split().count(word) >= words.count(word) for word in words), caption

def test_sketches_are_the_scenes_of_shapes_in_another_look_and_other_words():
    shapes, sketches = (data.load_drawn({"val": 200}, 48, sketch)["val"] for sketch in (False, True))
    assert shapes[0] == sketches[0]
    assert (shapes[1] != sketches[1]).any(axis=(1, 2, 3)).all()
    for ours, theirs in zip(sum(shapes[2], []), sum(sketches[2], [])):
        assert [data.SKETCH_WORDS.get(word, word) for word in ours.split()] == theirs.split()
        assert ours != theirs

def test_reading_half_a_caption_fails_on_shapes():
    halves = [half for i in range(500) for half in data.all_scenes(0)[i][:2]]
    chance = np.mean([1 / halves.count(half) for half in halves])
    print(f"R@1 of a reader of one object and its place: {chance:.3f}")
    assert chance < 0.35

def mutated(content, rng):
    """Bytes with a few of them changed, cut out, doubled or replaced by what parsers stumble over."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        i = rng.randrange(len(content) + 1)
        odd = rng.choice([b"\0", b'"', b"|", b",", b"\n", b"\xff\xfe", b"null", b"[]", b"\xe2\x80\xa8"])
        content[i:i + rng.choice([0, 0, 1, 3, 30])] = rng.choice([b"", odd, content[max(0, i - 50):i]])
    return bytes(content[:rng.choice([None, None, len(content) // 2])])

@pytest.mark.parametrize("write", [karpathy, kaggle, hub, flickr8k])
def test_500_mutated_captions_files_are_read_or_refused_in_one_line(write, tmp_path):
    write(tmp_path)
    file, rng, refused = next(tmp_path.iterdir()), random.Random(0), 0
    content = file.read_bytes()[:3000]
    for _ in range(500):
        file.write_bytes(mutated(content, rng))
        try:
            _, captions = data.read_captions(tmp_path)
            data.find_photos(file, captions)
            assert all(split in ("train", "val", "test") and all(c == c.strip() != "" for c in sentences)
                       for split, sentences in captions.values())
        except data.InputError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 50

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP"])
def test_500_mutated_photos_give_pixels_or_an_exception_that_the_store_catches(form, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "good", form)
    rng, content, broken = random.Random(0), (tmp_path / "good").read_bytes(), 0
    for _ in range(500):
        (tmp_path / "1.jpg").write_bytes(mutated(content, rng))
        try:
            assert data.load_photo(tmp_path / "1.jpg", 16).shape == (16, 16, 3)
        except AssertionError:
            raise
        except Exception:
            broken += 1
    assert 50 < broken < 500

@pytest.fixture
def hub_server(tmp_path):
    """A stand-in for the hub: two files of nlphuji/flickr30k, with the headers that the client wants."""
    files = tmp_path / "hub"
    files.mkdir()
    hub(files)
    Image.new("RGB", (80, 60), "red").save(files / "red.jpg")
    with zipfile.ZipFile(files / "flickr30k-images.zip", "w") as archive:
        for name in NAMES:
            archive.write(files / "red.jpg", f"flickr30k-images/{name}")
        archive.write(files / "red.jpg", "../../outside.jpg")
        archive.write(files / "red.jpg", f"{tmp_path}/outside.jpg")
        link = zipfile.ZipInfo("flickr30k-images/link")
        link.external_attr = 0o120777 << 16                 # a symbolic link, to what the member holds
        archive.writestr(link, "/etc")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = files / Path(self.path).name
            content = path.read_bytes() if path.is_file() else b""
            self.send_response(200 if content else 404)
            for name, value in {"ETag": f'"{len(content)}"', "X-Repo-Commit": "a" * 40,
                                "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()

def run_process(*argv, cwd, **environment):
    return subprocess.run([sys.executable, Path(clip.__file__), *argv], cwd=cwd, timeout=170,
                          capture_output=True, text=True, env={**os.environ, **environment})

TOY = ("--model", "tiny", "--tokenizer", "train", "--epochs", "1", "--batch-size", "40", "--device", "cpu")

def test_flickr30k_is_fetched_from_the_hub_and_nothing_lands_outside_its_folder(hub_server, tmp_path):
    (tmp_path / "a").mkdir()
    done = run_process(*TOY, cwd=tmp_path / "a", HF_ENDPOINT=hub_server, HF_HUB_OFFLINE="0",
                       HF_HUB_DISABLE_XET="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "4.4 GB" in done.stdout
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["cache", "flickr30k", "runs"]
    assert not list(tmp_path.glob("outside.jpg"))
    assert not any(path.is_symlink() for path in (tmp_path / "a/flickr30k").rglob("*"))

def test_an_archive_that_would_fill_the_disk_is_not_unpacked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("bomb.zip", "w") as archive:
        for i in range(6):
            archive.writestr(f"flickr30k-images/{i}.jpg", "x")
        for member in archive.infolist():
            member.file_size = 2**32 - 2                    # the directory is written at the end: 24 GiB
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "bomb.zip")
    assert clip.main([*TOY]) == 2
    assert_one_error(capsys, "more than 20 GiB")
    assert not Path("flickr30k").exists()

def test_without_network_the_missing_photos_are_one_line(tmp_path):
    done = run_process(cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--data DIR" in done.stderr
    assert "--data shapes" in done.stderr

# --- Training --------------------------------------------------------------------------------------------

def train_shapes(monkeypatch, folder, *flags):
    monkeypatch.chdir(folder)
    few_scenes(monkeypatch)
    return clip.main(["--data", "shapes", "--batch-size", "25", "--epochs", "3", "--device", "cpu", *flags])

def test_a_run_leaves_all_that_load_needs_and_two_pictures(monkeypatch, tmp_path, capsys):
    assert train_shapes(monkeypatch, tmp_path) == 0
    run = tmp_path / "runs" / "shapes"
    assert {p.name for p in run.iterdir()} == {"tokenizer", "checkpoint.pt", "log.csv", "curve.png",
                                               "retrieval.png"}
    for name in ("curve.png", "retrieval.png"):
        Image.open(run / name).load()
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    model, tokenizer = CLIP.load(run), data.load_tokenizer(run / "tokenizer")
    split = data.make_split(*data.load_drawn({"val": 70}, 48)["val"], tokenizer, 77)
    best = max(rows, key=lambda row: sum(float(value) for name, value in row.items() if "_r" in name))
    assert abs(clip.evaluate(model, split)["loss"] - float(best["loss"])) < 1e-6
    assert abs(clip.evaluate(CLIP.load(run, "last"), split)["loss"] - float(rows[-1]["loss"])) < 1e-6
    assert "best epoch" + best["epoch"].rjust(4) in capsys.readouterr().out

def without_times(history):
    return [{name: value for name, value in row.items() if name != "minutes"} for row in history]

def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(monkeypatch, tmp_path):
    assert train_shapes(monkeypatch, tmp_path, "--ema", "0.9", "--out", "whole") == 0
    monkeypatch.undo()
    evaluate, calls = clip.evaluate, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(clip, "evaluate", interrupted)
    monkeypatch.setattr(clip, "SAVE_SECONDS", 0)            # saves after every epoch
    assert train_shapes(monkeypatch, tmp_path, "--ema", "0.9", "--out", "halves") == 130
    monkeypatch.undo()
    assert train_shapes(monkeypatch, tmp_path, "--ema", "0.9", "--out", "halves", "--resume") == 0
    whole, halves = (clip.load_checkpoint(tmp_path / name) for name in ("whole", "halves"))
    assert without_times(whole["history"]) == without_times(halves["history"])
    for weights in clip.WEIGHTS:
        assert all(torch.equal(whole[weights][name], halves[weights][name]) for name in whole[weights])

@pytest.mark.parametrize("ema", [0.999, 0.5, 0.0])
def test_a_run_evaluates_and_keeps_the_running_mean_of_its_weights(ema, monkeypatch, tmp_path):
    train, seen = clip.train, []

    def watched(model, *rest):
        weight = model.text_projection.weight
        seen.append(weight.detach().double())
        hook = register_optimizer_step_post_hook(lambda *_: seen.append(weight.detach().double()))
        history = train(model, *rest)
        hook.remove()
        return history

    monkeypatch.setattr(clip, "train", watched)
    assert train_shapes(monkeypatch, tmp_path, "--ema", str(ema)) == 0
    mean, age = seen[0], 0
    for step, weight in enumerate(seen[1:]):
        decay = min(ema, (1 + step) / (10 + step))
        mean, age = decay * mean + (1 - decay) * weight, decay * (age + 1)
    state = clip.load_checkpoint("runs/shapes")
    assert difference(state["last"]["text_projection.weight"], mean) < (1e-6 if ema else 1e-12)
    assert difference(state["trained"]["text_projection.weight"], seen[-1]) == 0
    assert min(n for n in range(9999) if (1 + n) / (10 + n) >= 0.999) == 8990
    assert ema < 0.999 or 0.09 < age / (step + 1) < 0.11    # "over about the last tenth of the steps so far"

def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    rates = [clip.learning_rate(step, 1000, 2.0, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(2 / 101)
    assert rates[100] == max(rates) == 2.0
    assert rates[550] == pytest.approx(1.0)
    assert rates[999] < 1e-4
    assert np.allclose(np.diff(rates[:100]), 2 / 101)

def test_only_the_matrices_of_linears_decay():
    model = CLIP(SMALL)
    groups = clip.make_optimizer(model, 1e-3, 0.2).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    linears = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert len(decays) == len(list(model.parameters()))
    assert {i for i, decay in decays.items() if decay == 0.2} == linears

def test_the_logit_scale_never_leaves_a_step_above_100(monkeypatch, tmp_path):
    monkeypatch.setattr(clip, "init_weights", lambda model, init=clip.init_weights: (
        init(model), model.logit_scale.data.fill_(9.0)))
    assert train_shapes(monkeypatch, tmp_path) == 0
    scale = clip.load_checkpoint("runs/shapes")["last"]["logit_scale"].exp().item()
    assert 90 < scale < 100.001

def test_ctrl_c_is_one_line_and_exit_code_130(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(clip, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train_shapes(monkeypatch, tmp_path) == 130
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("stopped: the same command with --resume")

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_checkpoint(monkeypatch, tmp_path, capsys):
    loss, steps = clip.contrastive_loss, []

    def poisoned(logits):
        steps.append(1)
        return loss(logits) * (torch.nan if len(steps) > 12 else 1)

    monkeypatch.setattr(clip, "contrastive_loss", poisoned)
    monkeypatch.setattr(clip, "SAVE_SECONDS", 0)
    assert train_shapes(monkeypatch, tmp_path) == 2
    assert "not finite" in capsys.readouterr().err
    state = clip.load_checkpoint("runs/shapes")
    assert len(state["history"]) == 1
    assert all(p.isfinite().all() for p in state["last"].values())

def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(monkeypatch, tmp_path, capsys):
    saves, save = [], torch.save

    def full(state, path):
        saves.append(1)
        if len(saves) == 2:
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(clip, "SAVE_SECONDS", 0)
    assert train_shapes(monkeypatch, tmp_path) == 2
    assert "is the disk full" in capsys.readouterr().err
    assert len(clip.load_checkpoint("runs/shapes")["history"]) == 1
    assert not list(tmp_path.glob("runs/shapes/.*"))

def test_validation_loss_is_over_groups_of_64_pairs(album, monkeypatch):
    split = load(album)["train"]                    # 80 photos: one group of 64, and 16 left out
    images, texts = F.normalize(torch.randn(80, 8), dim=-1), F.normalize(torch.randn(400, 8), dim=-1)
    monkeypatch.setattr(clip, "embed", lambda *_: (images, texts))
    model = CLIP(SMALL)
    expected = []
    for turn in range(5):
        logits = images[:64] @ texts[turn:320:5].T / 0.07
        labels = torch.arange(64)
        expected.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    assert clip.evaluate(model, split)["loss"] == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)

# --- Many pairs, many processes --------------------------------------------------------------------------

def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

def backward_of(model, pixels, ids, micro_batch):
    """clip.backward over pixels (B, V, 3, S, S) and ids (B, K, T) in micro-batches; without dropout they need
    no seed."""
    parts = list(zip(pixels.split(micro_batch), ids.split(micro_batch)))

    def encode(i):
        crops, words = parts[i]
        return (model.encode_image(crops.flatten(0, 1)).unflatten(0, crops.shape[:2]),
                model.encode_text(words.flatten(0, 1)).unflatten(0, words.shape[:2]))

    return clip.backward(model, encode, len(parts))

def views(crops=1, sentences=1):
    """12 photos, each in some crops, and some captions of each."""
    return (photos(12 * crops).unflatten(0, (12, crops)),
            captions([3, 5, 9, 16] * 3 * sentences, 16).unflatten(0, (12, sentences)))

@pytest.mark.parametrize("crops, sentences", [(1, 1), (2, 3), (3, 1), (1, 2)])
def test_all_crops_and_captions_of_a_photo_are_positives_of_each_other(crops, sentences):
    model, images, texts = small_model(), torch.randn(7, crops, 24), torch.randn(7, sentences, 24)

    def written_out(a, b):
        odds = (model.logit_scale.exp() * torch.einsum("ie,je->ij", a, b)).exp()
        return -((odds.diag() / odds.sum(0)).log().mean() + (odds.diag() / odds.sum(1)).log().mean()) / 2

    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    first = sum(written_out(images[:, v], texts[:, k]) for v in range(crops) for k in range(sentences))
    expected = first / (crops * sentences)
    for x, count in ((images, crops), (texts, sentences)):
        pairs = [(i, j) for j in range(count) for i in range(j)]
        expected = expected + sum(written_out(x[:, i], x[:, j]) for i, j in pairs) / max(1, len(pairs))
    loss, cross = clip.multiview_loss(model, images, texts)
    assert difference(loss, expected) < 1e-5
    assert difference(cross, first / (crops * sentences)) < 1e-5

@pytest.mark.parametrize("crops, sentences", [(1, 1), (2, 3)])
@pytest.mark.parametrize("micro_batch", [1, 4, 5, 12])
def test_micro_batches_leave_the_gradient_of_the_whole_batch(micro_batch, crops, sentences):
    model, (pixels, ids) = small_model(), views(crops, sentences)
    images = model.encode_image(pixels.flatten(0, 1)).view(12, crops, -1)
    texts = model.encode_text(ids.flatten(0, 1)).view(12, sentences, -1)
    loss, cross = clip.multiview_loss(model, images, texts)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    assert difference(backward_of(model, pixels, ids, micro_batch), cross) < 1e-6
    assert difference(gradients(model), expected) < 1e-5

def test_a_micro_batch_is_cropped_and_dropped_out_the_same_in_both_passes(album):
    split = load(album)["train"]
    end = split.ids.max().item()
    model = CLIP(replace(SMALL, image_size=32, patch_size=8, vocab_size=end + 1, eos_token_id=end)).train()
    lora.add_lora(model, 4, 8, dropout=0.5)
    torch.nn.init.normal_(model.text_model.encoder.layers[0].self_attn.q_proj.lora_B)
    model.vision_model.embeddings.patch_dropout = model.text_model.embeddings.word_dropout = 0.5
    pairs = split.pairs(0, 0, captions=3)[:6]
    first, again, other = (clip.encode_pairs(model, split, pairs, seed, views=2) for seed in (1, 1, 2))
    assert first[0].shape == (6, 2, 24) and first[1].shape == (6, 3, 24)
    for a, b, c in zip(first, again, other):
        assert torch.equal(a, b) and not torch.equal(a, c)

@pytest.mark.parametrize("micro_batch", [4, 12])
@pytest.mark.parametrize("target", ["text_projection", "visual_projection"])
def test_adapters_in_one_tower_alone_train(target, micro_batch):
    model, (pixels, ids) = small_model(), views()
    lora.add_lora(model, 4, 8, targets=[target])
    torch.nn.init.normal_(model.get_submodule(target).lora_B)
    contrastive_loss(model(pixels[:, 0], ids[:, 0])).backward()
    expected = gradients(model)
    model.zero_grad()
    backward_of(model, pixels, ids, micro_batch)
    assert len(expected) == 2
    assert difference(gradients(model), expected) < 1e-5

def test_crops_and_captions_stay_with_their_photo(album):
    split = load(album)["train"]
    end = split.ids.max().item()
    model = CLIP(replace(SMALL, image_size=32, vocab_size=end + 1, eos_token_id=end,
                         max_position_embeddings=77)).eval()
    split.photos = split.photos[:, :32, :32]                # no margin, so no random crops
    pairs = split.pairs(0, 0, captions=3)[:6]
    images, texts = clip.encode_pairs(model, split, pairs, 0, views=2)
    pixels = data.normalize(split.photos[pairs[:, 0]])
    assert difference(images, model.encode_image(pixels)[:, None].expand(-1, 2, -1)) < 1e-6
    for k in range(3):
        assert difference(texts[:, k], model.encode_text(split.ids[pairs[:, 1 + k]])) < 1e-6

TWO_PROCESSES = """
import torch
import clip, test_clip
torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model, (pixels, ids) = test_clip.small_model(), test_clip.views(2, 2)
half = slice(6 * clip.RANK, 6 * clip.RANK + 6)
loss = test_clip.backward_of(model, pixels[half], ids[half], MICRO_BATCH)
if clip.RANK == 0:
    torch.save((loss, test_clip.gradients(model)), "found.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""

TORCHRUN = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"

def torchrun(*command, cwd):
    return subprocess.run([*TORCHRUN, *command], cwd=cwd, timeout=170, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})

# clip.py on 300 scenes, with a checkpoint after every epoch.
QUICK = """
import sys
import clip, data
data.DRAWN["shapes"], clip.SAVE_SECONDS = 300, 0
print("ready", flush=True)
sys.exit(clip.main(sys.argv[1:]))
"""

def started(*launch, cwd, flags=(), until="ETA"):
    """A quick run, launched so, that has said `until`; its output goes to the files log and errors in cwd."""
    (cwd / "quick.py").write_text(QUICK)
    with open(cwd / "log", "w") as log, open(cwd / "errors", "w") as errors:
        process = subprocess.Popen([*launch, "quick.py", "--device", "cpu", *flags], cwd=cwd, stdout=log,
                                   stderr=errors, env={**os.environ, "PYTHONPATH": str(HERE)})
    while until not in (cwd / "log").read_text() and process.poll() is None:
        time.sleep(0.02)
    return process

# With micro-batches a process sums its gradients in another order: rounding.
@pytest.mark.parametrize("micro_batch, tolerance", [(6, 1e-6), (2, 1e-5)])
def test_two_processes_have_the_loss_and_the_gradient_of_one(micro_batch, tolerance, tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES.replace("MICRO_BATCH", str(micro_batch)))
    done = torchrun("two.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loss, found = torch.load(tmp_path / "found.pt")
    torch.manual_seed(0)
    model, (pixels, ids) = small_model(), views(2, 2)
    images = model.encode_image(pixels.flatten(0, 1)).view(12, 2, -1)
    expected, cross = clip.multiview_loss(model, images, model.encode_text(ids.flatten(0, 1)).view(12, 2, -1))
    expected.backward()
    assert difference(loss, cross) < 1e-6
    assert difference(found, gradients(model)) < tolerance

def test_a_run_of_two_processes_is_logged_once_and_goes_on_in_one(album):
    flags = (*TOY, "--data", "photos", "--epochs", "2")
    done = torchrun(str(HERE / "clip.py"), *flags, cwd=album.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best epoch") == 1
    assert not list(album.parent.glob("runs/photos/.*"))
    done = run_process(*flags, "--resume", cwd=album.parent)
    assert done.returncode == 0, done.stderr
    assert "resumed   after epoch 2" in done.stdout

def test_a_study_of_two_processes_leaves_its_files_once(album):
    done = run_process(*TOY, "--data", "photos", cwd=album.parent)
    assert done.returncode == 0, done.stderr
    # Behind `--`, or torchrun takes --r for an abbreviation of its own flags.
    done = torchrun("--", str(HERE / "finetune.py"), "--base", "runs/photos", "--data", "photos", "--r", "2",
                    "--epochs", "1", "--batch-size", "40", "--device", "cpu", "--out", "runs/study",
                    cwd=album.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zero-shot   val") == done.stdout.count("done ") == 1
    assert {p.name for p in (album.parent / "runs/study").iterdir()} == {
        "tokenizer", "r2-seed0", "study.csv", "study.png"}
    assert not list(album.parent.glob("runs/study/**/.*"))

SCENES = ("--data", "shapes", "--batch-size", "30", "--epochs", "4")

@slow
def test_a_killed_process_ends_the_whole_job_with_one_line(tmp_path):
    job = started(*TORCHRUN, cwd=tmp_path, flags=("--data", "shapes"))
    workers = subprocess.check_output(["pgrep", "-P", str(job.pid)], text=True).split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    lines = (tmp_path / "errors").read_text().splitlines()
    assert len([line for line in lines if line.startswith(("stopped: ", "error: "))]) == 1

def assert_same_numbers(run, other):
    ours, theirs = clip.load_checkpoint(run), clip.load_checkpoint(other)
    assert without_times(ours["history"]) == without_times(theirs["history"])
    for weights in clip.WEIGHTS:
        assert all(torch.equal(ours[weights][name], theirs[weights][name]) for name in theirs[weights])

@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """The run of SCENES, from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    assert started(sys.executable, cwd=folder, flags=SCENES).wait(timeout=100) == 0
    return folder / "runs/shapes"

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143),
                                          pytest.param(signal.SIGINT, 130, marks=slow)])
def test_a_stopped_run_saves_its_step_and_goes_on_bit_for_bit(number, code, never_stopped, tmp_path):
    run = started(sys.executable, cwd=tmp_path, flags=SCENES)
    run.send_signal(number)
    assert run.wait(timeout=60) == code
    assert (tmp_path / "errors").read_text().splitlines() == [
        "stopped: the same command with --resume goes on from what was saved"]
    assert 0 < clip.load_checkpoint(tmp_path / "runs/shapes")["step"] < 40
    assert started(sys.executable, cwd=tmp_path, flags=(*SCENES, "--resume")).wait(timeout=60) == 0
    assert_same_numbers(tmp_path / "runs/shapes", never_stopped)

@slow
def test_a_stopped_job_of_two_processes_saves_its_step(tmp_path):
    job = started(*TORCHRUN, cwd=tmp_path, flags=SCENES)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) != 0
    assert 0 < clip.load_checkpoint(tmp_path / "runs/shapes")["step"] < 40

def hidden(folder):
    return [path for path in Path(folder).rglob(".*")]

def test_a_run_killed_at_any_moment_ends_with_the_numbers_of_one_that_was_not(album):
    kills, rng, folder = int(os.environ.get("KILLS", 3)), random.Random(0), album.parent
    flags = (*TOY, "--data", "photos", "--epochs", "6", "--out")
    start = started(sys.executable, cwd=folder, flags=(*flags, "whole"), until="ready")
    begin = time.perf_counter()
    assert start.wait(timeout=60) == 0
    seconds = time.perf_counter() - begin                   # of decoding, steps, checkpoints and drawing
    for kill in range(kills):
        if kill % 3 == 0:
            shutil.rmtree("killed", ignore_errors=True)
            shutil.rmtree("cache")
        run = started(sys.executable, cwd=folder, flags=(*flags, "killed", "--resume"), until="ready")
        time.sleep(rng.uniform(0, seconds))
        run.kill()
        run.wait()
        if kill % 3 == 2 or kill + 1 == kills:
            done = started(sys.executable, cwd=folder, flags=(*flags, "killed", "--resume"))
            assert done.wait(timeout=60) == 0
            assert_same_numbers("killed", "whole")
            assert hidden("killed") == hidden("cache") == []

def test_two_runs_at_once_share_the_store(album):
    command = [sys.executable, HERE / "clip.py", *TOY, "--data", "photos", "--out"]
    runs = [subprocess.Popen([*command, out], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for out in ("a", "b")]
    said = [run.communicate(timeout=100)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert len(list(Path("cache").iterdir())) == 3 and hidden("cache") == []        # train, val, test
    assert_same_numbers("a", "b")

def test_two_runs_that_end_a_store_at_the_same_moment_both_go_on(tmp_path, monkeypatch):
    replace = os.replace
    def beaten(source, target):                             # the other run's folder arrives just before ours
        shutil.copytree(source, target)
        replace(source, target)
    monkeypatch.setattr(os, "replace", beaten)
    with data.atomic(tmp_path / "store") as temporary:
        temporary.mkdir()
        (temporary / "names.json").write_text("[]")
    assert [path.name for path in tmp_path.rglob("*")] == ["store", "names.json"]
    with pytest.raises(data.InputError, match="can't write"), data.atomic(tmp_path / "store") as temporary:
        temporary.mkdir()
        raise OSError(28, "No space left on device")        # ours, and told, though the other's folder is there

@pytest.mark.parametrize("size, file", [(100_000, "cache/"), (2_000_000, "runs/photos/checkpoint.pt")])
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_half_written(size, file, album):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))     # of each file
    done = subprocess.run([sys.executable, HERE / "clip.py", *TOY, "--data", "photos"], preexec_fn=limit,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert f"error: can't write {file}" in done.stderr.splitlines()[-1]
    assert hidden("cache") + hidden("runs" if Path("runs").exists() else "cache") == []
    assert not Path("runs/photos/checkpoint.pt").exists()

@slow
def test_two_hundred_epochs_leave_memory_and_open_files_as_they_were(monkeypatch, tmp_path, capsys):
    evaluate, memory, files = clip.evaluate, [], []

    def measured(*arguments):
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        files.append(len(os.listdir("/proc/self/fd")))
        return evaluate(*arguments)

    monkeypatch.setattr(clip, "evaluate", measured)
    monkeypatch.setattr(clip, "SAVE_SECONDS", 0)
    assert train_shapes(monkeypatch, tmp_path, "--epochs", "200") == 0
    lines = capsys.readouterr().out.splitlines()
    print(f"{(memory[199] - memory[49]) / 2**20:.1f} MiB more after 200 epochs than after 50")
    assert memory[199] - memory[49] < 20 * 2**20
    assert len(set(files[:200])) == 1
    assert len([line for line in lines if " step " in line]) == 40 and len(lines) < 260
    assert max(map(len, lines)) < 150

def trap_of_hugging_face(folder):
    transformers.CLIPModel(transformers.CLIPConfig()).config.save_pretrained(folder)
    torch.save({"logit_scale": Trap()}, folder / "pytorch_model.bin")

def trap_of_peft(folder):
    lora.save_adapter(adapted(), folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"lora_A": Trap()}, folder / "adapter_model.bin")

def trap_of_a_run(folder):
    torch.save({"best": Trap(), "last": Trap(), "config": {}}, folder / "checkpoint.pt")

def trap_of_a_tokenizer(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}))
    (folder / "odd.py").write_text("open('ran', 'w')")

TRAPS = {trap_of_hugging_face: CLIP.from_pretrained, trap_of_a_run: CLIP.from_pretrained,
         trap_of_peft: lambda folder: lora.load_adapter(small_model(), folder),
         trap_of_a_tokenizer: data.load_tokenizer}

@pytest.mark.parametrize("trap", TRAPS)
def test_a_file_that_would_run_code_is_refused_and_does_not(trap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd").mkdir()
    trap(tmp_path / "odd")
    with pytest.raises(data.InputError):
        TRAPS[trap](tmp_path / "odd")
    assert not Path("ran").exists()
    torch.save(Trap(), "careless")
    torch.load("careless", weights_only=False)              # the trap works
    assert Path("ran").exists()

def test_odd_captions_and_photos_are_read(album):
    images = json.loads((album / "dataset_flickr30k.json").read_text())
    odd = ["word " * 100_000, "🐶🐕", "كلب يجري على العشب", "\u202e reversed", "a | b ,\n \"c\"", " "]
    images["images"][2]["sentences"] = [{"raw": caption} for caption in odd * 9]
    images["images"][3]["sentences"] = [{"raw": "a single one"}]
    (album / "dataset_flickr30k.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(images).encode())
    frames = [Image.new("RGB", (30, 40), colour) for colour in ("red", "blue")]
    frames[0].save(album / "images/2.jpg", "GIF", save_all=True, append_images=frames[1:])
    split = load(album)["train"]
    assert sum(caption == "🐶🐕" for caption in split.captions) == 9
    assert split.captions.count("a single one") == 1 and len(split.captions) == 80 * 5 + 45 - 9
    assert split.lengths.max() == split.ids.shape[1] and split.lengths.min() >= 3
    assert (split.photos[split.names.index("2.jpg")].float().mean((0, 1)) - torch.tensor([255.0, 0, 0])
            ).abs().max() < 8                               # the first frame
    assert split.pairs(0, 0, captions=4).shape == (80, 5)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lie", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00"], ids=["65535 x 65535", "0 x 0"])
def test_a_jpeg_whose_header_lies_about_its_size_is_refused(lie, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "1.jpg")
    content = bytearray((tmp_path / "1.jpg").read_bytes())
    at = content.index(b"\xff\xc0") + 5
    assert content[at:at + 4] == bytes([0, 40, 0, 60])
    content[at:at + 4] = lie
    (tmp_path / "1.jpg").write_bytes(content)
    with pytest.raises(Exception, match="exceeds limit|cannot identify"):
        data.load_photo(tmp_path / "1.jpg", 16)

def test_a_photo_of_200_megapixels_is_refused(tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "1.png")
    with pytest.raises(Image.DecompressionBombError):
        data.load_photo(tmp_path / "1.png", 16)

def test_patch_dropout_shows_half_of_the_patches_in_training_and_all_in_evaluation():
    model, pixels = small_model(), photos(3)
    embeddings = model.vision_model.embeddings
    whole, embeddings.patch_dropout = embeddings(pixels), 0.5
    assert torch.equal(embeddings.eval()(pixels), whole)
    half = embeddings.train()(pixels)
    patches = whole.shape[1] - 1
    assert half.shape == (3, 1 + patches // 2, whole.shape[2])
    assert torch.equal(half[:, 0], whole[:, 0])
    for photo in range(3):                          # each once, where it stood in the photo
        places = (half[photo, 1:, None] == whole[photo, None, 1:]).all(dim=-1).nonzero()
        assert len(places) == patches // 2 and len(places[:, 1].unique()) == patches // 2

def test_word_dropout_replaces_a_share_of_the_tokens_in_training_and_none_in_evaluation():
    embeddings, ids = small_model().text_model.embeddings, torch.randint(100, (50, 16))
    whole, embeddings.word_dropout = embeddings(ids), 0.3
    assert torch.equal(embeddings.eval()(ids), whole)
    words = embeddings.train()(ids) - embeddings.position_embedding.weight
    changed = (words - embeddings.token_embedding(ids)).abs().amax(dim=-1) > 1e-5
    assert 0.25 < changed.float().mean() < 0.35             # 800 tokens, 1 in 100 of them replaced by itself
    nearest = torch.cdist(words.flatten(0, 1), embeddings.token_embedding.weight).min(dim=1)
    assert nearest.values.max() < 1e-2                      # what stands there is a token
    assert len(nearest.indices[changed.flatten()].unique()) > 80        # and not always the same one

def test_replaced_words_leave_a_caption_read_at_its_end_token():
    model, ids = small_model(), captions([3, 6, 9], 16)
    model.text_model.embeddings.word_dropout = 0.99
    assert difference(model.train().text_model(ids), words_of(model.train(), ids)[range(3), [2, 5, 8]]) > 0
    torch.manual_seed(1)
    pooled = model.text_model(ids)
    torch.manual_seed(1)
    assert difference(pooled, words_of(model, ids)[range(3), [2, 5, 8]]) == 0

# --- Adaptation ------------------------------------------------------------------------------------------

def finetune_sketches(*flags):
    return finetune.main(["--base", "runs/shapes", "--data", "sketches", "--batch-size", "25",
                          "--epochs", "2", "--device", "cpu", *flags])

@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The folder of a small model of `shapes`, and of the study that adapts it to `sketches`."""
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert train_shapes(monkeypatch, folder) == 0
        assert finetune_sketches("--r", "4", "16", "--full") == 0
    return folder

@pytest.fixture
def study_folder(studied, monkeypatch):
    monkeypatch.chdir(studied)
    few_scenes(monkeypatch)
    return studied / "runs" / "shapes-sketches"

def drawn_split(name, tokenizer, part="val"):
    sizes = {"val": 70, "test": 70, "train": 100}
    return data.make_split(*data.load_drawn(sizes, 48, name == "sketches")[part], tokenizer, 77)

def study_rows(folder):
    return {row["variant"]: row for row in csv.DictReader(open(folder / "study.csv"))}

def test_a_study_leaves_adapters_a_table_and_a_figure_that_say_the_same(study_folder):
    rows, tokenizer = study_rows(study_folder), data.load_tokenizer("runs/shapes/tokenizer")
    assert list(rows) == ["zero-shot", "r=4", "r=16", "all weights"]
    Image.open(study_folder / "study.png").load()
    models = {variant: CLIP.load("runs/shapes") for variant in rows}
    lora.load_adapter(models["r=4"], study_folder / "r4-seed0")
    lora.load_adapter(models["r=16"], study_folder / "r16-seed0")
    models["all weights"] = CLIP.load(study_folder / "full-seed0")
    for variant, model in models.items():
        assert int(rows[variant]["trainable"]) == (0 if variant == "zero-shot" else
                                                   lora.trainable_parameters(model)[0])
        for name, split in {"val": drawn_split("sketches", tokenizer),
                            "test": drawn_split("sketches", tokenizer, "test"),
                            "shapes val": drawn_split("shapes", tokenizer)}.items():
            found = clip.evaluate(model, split)
            told = {key: float(rows[variant][f"{name} {key}"]) for key in found}
            assert told == pytest.approx(found, abs=1e-4)
    assert len({row["val loss"] for row in rows.values()}) == 4

def test_the_checkpoint_of_an_adapted_model_holds_its_adapters_alone(study_folder):
    model = CLIP.load("runs/shapes")
    lora.load_adapter(model, study_folder / "r4-seed0")
    state = clip.load_checkpoint(study_folder / "r4-seed0")
    assert set(state["last"]) == set(state["best"]) == set(lora_weights(model))

def test_an_adapter_turned_off_gives_the_base_back_exactly(study_folder):
    model, tokenizer = CLIP.load("runs/shapes"), data.load_tokenizer("runs/shapes/tokenizer")
    split = drawn_split("shapes", tokenizer)
    base = clip.evaluate(model, split)
    lora.load_adapter(model, study_folder / "r16-seed0")
    assert clip.evaluate(model, split) != base
    lora.set_strength(model, 0.0)
    assert clip.evaluate(model, split) == base

def test_a_finished_study_resumed_says_the_same(study_folder, capsys):
    first = study_rows(study_folder)
    assert finetune_sketches("--r", "4", "16", "--full", "--resume") == 0
    assert study_rows(study_folder) == first

def test_repeats_differ_in_their_seed_alone(study_folder, tmp_path):
    assert finetune_sketches("--r", "4", "--seeds", "2", "--out", str(tmp_path)) == 0
    first, second = (clip.load_checkpoint(tmp_path / f"r4-seed{seed}")["last"] for seed in (0, 1))
    assert difference(first, clip.load_checkpoint(study_folder / "r4-seed0")["last"]) == 0
    assert difference(first, second) > 1e-3

def test_the_table_shows_mean_and_deviation_over_seeds():
    rows = [{"variant": "r=2", "trainable": 1000, "minutes": 1, "lowest val loss": loss, "val t2i_r1": recall,
             "val i2t_r1": 5} for loss, recall in ((1.0, 10), (3.0, 20))]
    line = finetune.table(rows, ["val"]).splitlines()[1]
    assert line.split() == ["r=2", "0.00", "1,000", "1.0", "2.000", "±1.414", "15.0", "±7.1", "5.0"]

# The size of the vocabulary that train_tokenizer gives for captions of single letters.
SPELLING = replace(OPENAI_SMALL, vocab_size=514, eos_token_id=513)

def test_an_adapter_of_the_study_opens_in_peft_on_the_released_model(album):
    theirs, inputs = released_folder(Path("base"), SPELLING)
    assert finetune.main(["--base", "base", "--data", "photos", "--r", "2", "--epochs", "1",
                          "--batch-size", "20", "--lr", "0.01", "--device", "cpu", "--out", "out"]) == 0
    ours = CLIP.from_pretrained("base")
    before = ours(*inputs)
    lora.load_adapter(ours, "out/r2-seed0")
    adapted_theirs = peft.PeftModel.from_pretrained(theirs, "out/r2-seed0")
    with torch.no_grad():
        assert difference(ours.eval()(*inputs), their_logits(adapted_theirs.eval(), *inputs)) < 1e-5
        assert difference(ours(*inputs), before) > 1e-3

def class_folders(folder):
    """40 photos of noise in folders of 7 classes."""
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / ["red_fox", "cat", "dog", "a_b", "owl", "crow", "bee"][i % 7]
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path / f"{i}.png")

def test_a_zero_shot_class_is_where_the_mean_of_its_names_in_the_templates_points(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "photos")
    tokenizer = data.train_tokenizer(["a red fox", "the cat and a dog", "owl crow bee"])
    model = shaken(CLIP(replace(SMALL, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)))
    templates, paths = ("a {}", "the {} here"), sorted((tmp_path / "photos").glob("*/*"))
    classes, directions = sorted({path.parent.name for path in paths}), []
    for name in classes:
        ids = [data.tokenize(tokenizer, [form.format(name.replace("_", " "))], 16) for form in templates]
        mean = sum(model.eval().encode_text(one)[0] for one in ids) / len(ids)
        directions.append(mean / mean.norm())
    hits = []
    for path in paths:
        pixels = data.normalize(torch.from_numpy(data.load_photo(path, 40))[None])
        scores = [(model.encode_image(pixels)[0] @ direction).item() for direction in directions]
        best = sorted(classes, key=lambda name: -scores[classes.index(name)])
        hits.append((best[0] == path.parent.name, path.parent.name in best[:5]))
    top1, top5 = finetune.classify(model, tokenizer, tmp_path / "photos", templates)
    assert (top1, top5) == pytest.approx([100 * sum(hit) / 40 for hit in zip(*hits)], abs=1e-4)
    assert 0 < top1 < top5 < 100

def test_one_command_classifies_folders_of_photos(study_folder, tmp_path, capsys):
    class_folders(tmp_path / "photos")
    flags = ("--base", "runs/shapes", "--device", "cpu", "--classify")
    assert finetune.main([*flags, str(tmp_path / "photos")]) == 0
    assert re.search(r"40 photos of 7 classes  top-1 +[\d.]+  top-5 +[\d.]+  chance 14.3", capsys.readouterr().out)
    assert finetune.main([*flags, "nowhere"]) == 2
    assert_one_error(capsys, "no photos in nowhere")

def assert_one_error(capsys, message):
    """Of what a command wrote to stderr, all but the progress bars is one line: `error: ` and the message."""
    error = [line for line in capsys.readouterr().err.strip().splitlines() if line and not line.startswith("decoding")]
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0], error

BAD_STUDY = {
    "rank zero": (["--r", "0"], "--r and --seeds"),
    "a negative rank": (["--r", "4", "-1"], "--r and --seeds"),
    "no seeds": (["--r", "4", "--seeds", "0"], "--r and --seeds"),
    "no such base": (["--base", "nowhere"], "no CLIP in nowhere"),
    "a base that is no model": (["--base", "photos"], "no CLIP in photos"),
    "NaN in the base": (["--base", "nan"], "nan holds NaN"),
    "an adapter for a base": (["--base", "adapter"], "adapter is not one whole CLIP"),
    "another model's tokenizer": (["--base", "others"], "is not the one of the model others"),
    "no such target": (["--targets", "query"], "no plain Linear of the model is called"),
    "dropout of one": (["--dropout", "1"], "dropout 1.0"),
    "alpha zero": (["--alpha", "0"], "alpha is 0"),
    "more pairs than photos": (["--batch-size", "81"], "--batch-size 81"),
    "no such photos": (["--data", "nowhere"], "nowhere: no such folder"),
    "an unknown flag": (["--rank", "4"], "--rank"),
}

@pytest.mark.parametrize("name", BAD_STUDY)
def test_bad_input_to_a_study_is_one_line_and_exit_code_2(name, album, capsys):
    released_folder(Path("base"), SPELLING)
    released_folder(Path("others"), OPENAI_SMALL)
    shutil.copytree("base", "nan")
    weights = load_file("nan/model.safetensors")
    weights["logit_scale"].fill_(torch.nan)
    save_file(weights, "nan/model.safetensors", {"format": "pt"})
    model = CLIP.from_pretrained("base")
    lora.add_lora(model, 2, 4)
    lora.save_adapter(model, "adapter", base="base")        # transformers would open it as the whole model
    flags, message = BAD_STUDY[name]
    given = {"--base": "base", "--data": "photos", "--out": "out", "--batch-size": "20"}
    kept = [word for flag, value in given.items() if flag not in flags for word in (flag, value)]
    capsys.readouterr()
    assert finetune.main([*kept, "--device", "cpu", *flags]) == 2
    assert_one_error(capsys, message)
    assert not Path("out").exists()

class Trap:
    """An object whose pickle runs code: it makes the file `ran` where it is opened without care."""
    def __reduce__(self):
        return Path.touch, (Path("ran"),)

def listed(folder, **changes):
    """A folder with one photo that a Karpathy file names, but for the changes."""
    Path(folder).mkdir()
    Image.new("RGB", (60, 60)).save(f"{folder}/1.jpg")
    image = {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "a dog"}]} | changes
    Path(folder, "dataset_flickr8k.json").write_text(json.dumps({"images": [image]}))

def written(file, content):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())

def checkpoint(change):
    """Changes the checkpoint of the run `old`, as state -> state."""
    state = change(torch.load("old/checkpoint.pt"))
    torch.save(state, "old/checkpoint.pt")

def with_nan(state):
    state["last"]["logit_scale"].fill_(torch.nan)
    return state

def without_a_weight(state):
    del state["last"]["visual_projection.weight"]
    return state

def other_captions():
    images = json.loads(Path("photos/dataset_flickr30k.json").read_text())
    images["images"][2]["sentences"].reverse()
    written("photos/dataset_flickr30k.json", json.dumps(images))

def for_photos(change):
    """Makes something else of ten photos."""
    for path in sorted(Path("photos/images").iterdir())[:10]:
        path.unlink()
        change(path)

OLD = "--data photos --out old --resume"

# name: (what is wrong, the flags, part of the message). The folder `photos` is whole, `old` is a run on it.
BAD = {
    "no such folder": (None, "--data nowhere", "no such folder"),
    "a file for a folder": (lambda: written("file", "x"), "--data file", "file: no such folder"),
    "no captions file": (lambda: Path("empty").mkdir(), "--data empty", "empty: no captions in it"),
    "captions without photos": (lambda: (Path("alone").mkdir(), karpathy(Path("alone"))),
                                "--data alone", "are missing or broken"),
    "an empty captions file": (lambda: written("bad/results.csv", ""), "--data bad", "holds no captions"),
    "captions of spaces": (lambda: listed("bad", sentences=[{"raw": " \t "}]),
                           "--data bad", "holds no captions"),
    "the wrong delimiter": (lambda: written("bad/results.csv", "image_name,comment\n1.jpg,a dog\n"),
                            "--data bad", "this line is not"),
    "captions in UTF-16": (lambda: written("bad/results.csv", "a| b| c\n1.jpg| 0| a dog".encode("utf-16")),
                           "--data bad", "can't be read"),
    "captions in Latin-1": (lambda: written("bad/captions.txt", b"image,caption\n1.jpg,caf\xe9\n"),
                            "--data bad", "can't be read"),
    "a comma without quotes": (lambda: written("bad/captions.txt", "image,caption\n1.jpg,a dog, two cats\n"),
                               "--data bad", "more or fewer cells"),
    "a lost quote": (lambda: written("bad/captions.txt", 'image,caption\n1.jpg,"a dog\n2.jpg,a cat\n'),
                     "--data bad", "can't be read"),
    "a column missing": (lambda: written("bad/captions.txt", "photo,caption\n1.jpg,a dog\n"),
                         "--data bad", "KeyError('image')"),
    "JSON cut short": (lambda: written("bad/dataset_x.json", '{"images": ['), "--data bad", "can't be read"),
    "JSON of another kind": (lambda: written("bad/dataset_x.json", "[1, 2]"), "--data bad", "can't be read"),
    "a caption that is a number": (lambda: listed("bad", sentences=[{"raw": 5}]),
                                   "--data bad", "can't be read"),
    "JSON too deep": (lambda: written("bad/dataset_x.json", "[" * 200_000), "--data bad", "can't be read"),
    "photos of 16 bits": (lambda: for_photos(lambda path: Image.fromarray(
        np.full((50, 60), 30_000, np.uint16)).save(path, "PNG")), "--data photos", "are missing or broken"),
    "pipes for photos": (lambda: for_photos(os.mkfifo), "--data photos", "are missing or broken"),
    "a captions file that is a folder": (lambda: Path("bad/results.csv").mkdir(parents=True),
                                         "--data bad", "Is a directory"),
    "a split of another name": (lambda: listed("bad", split="dev"), "--data bad", "'dev', which is none"),
    "a split without photos": (lambda: listed("bad"), "--data bad", "no val photos"),
    "a path as a photo's name": (lambda: listed("bad", filename="../../1.jpg"),
                                 "--data bad", "without folders"),
    "an absolute path": (lambda: listed("bad", filename="/etc/passwd"), "--data bad", "without folders"),
    "a store cut short": (lambda: [os.truncate(f, 1000) for f in Path("cache").glob("*/photos.uint8")],
                          "--data photos --out new --tokenizer old/tokenizer", "is damaged: delete it"),
    "a store without names": (lambda: [f.unlink() for f in Path("cache").glob("*/names.json")],
                              "--data photos --out new --tokenizer old/tokenizer", "is damaged: delete it"),
    "more pairs than photos": (None, "--data photos --batch-size 81", "--batch-size 81"),
    "no epochs": (None, "--data photos --epochs 0", "--epochs 0"),
    "half an epoch": (None, "--data photos --epochs 0.5", "--epochs"),
    "a batch of one": (None, "--data photos --batch-size 1", "--batch-size 1"),
    "a negative micro-batch": (None, "--data photos --micro-batch -4", "--micro-batch -4"),
    "a negative rate": (None, "--data photos --lr -1", "--lr -1"),
    "a rate that is no number": (None, "--data photos --lr nan", "--lr nan"),
    "an infinite rate": (None, "--data photos --lr inf", "--lr inf"),
    "negative decay": (None, "--data photos --weight-decay -0.1", "--weight-decay -0.1"),
    "warm-up longer than the run": (None, "--data photos --warmup 2", "--warmup 2"),
    "no crops": (None, "--data photos --views 0", "--views 0"),
    "no captions of a photo": (None, "--data photos --captions 0", "--captions 0"),
    "all patches dropped": (None, "--data photos --patch-dropout 1", "--patch-dropout 1"),
    "all words dropped": (None, "--data photos --word-dropout 1", "--word-dropout 1"),
    "a decay above 1": (None, "--data photos --ema 1.5", "--ema 1.5 is not between 0 and 1"),
    "a negative seed": (None, "--data photos --seed -1", "--seed -1"),
    "an unknown model": (None, "--data photos --model RN50", "RN50"),
    "an unknown text tower": (None, "--data photos --text gpt", "gpt"),
    "an unknown flag": (None, "--epoch-count 3", "--epoch-count"),
    "an unknown device": (None, "--data photos --device tpu9", "no device tpu9"),
    "a GPU that isn't there": (None, "--data photos --device cuda:99", "no device cuda:99"),
    "an unknown tokenizer": (None, "--data photos --tokenizer nowhere", "no tokenizer nowhere"),
    "an empty tokenizer folder": (lambda: Path("empty").mkdir(),
                                  "--data photos --tokenizer empty", "no tokenizer empty"),
    "a broken tokenizer": (lambda: written("odd/tokenizer.json", "{"),
                           "--data photos --tokenizer odd", "no tokenizer odd"),
    "a file for the run's folder": (lambda: written("file", "x"), "--data photos --out file", "file"),
    "a folder with a tokenizer of somebody's": (lambda: written("mine/tokenizer/mine.txt", "x"),
                                                "--data photos --out mine", "mine holds a run"),
    "a folder where the log should be": (lambda: Path("odd/log.csv").mkdir(parents=True),
                                         "--data photos --out odd", "odd holds a run"),
    "a run that is there": (None, "--data photos --out old", "holds a run"),
    "another seed resumed": (None, f"{OLD} --seed 5", "seed was 0"),
    "other data resumed": (lambda: (shutil.copytree("photos", "others")),
                           "--data others --out old --resume", "data was photos"),
    "other captions resumed": (other_captions, OLD, "content was"),
    "a checkpoint without a weight": (lambda: checkpoint(without_a_weight), OLD, "weights of another model"),
    "a checkpoint cut short": (lambda: os.truncate("old/checkpoint.pt", 1000), OLD, "is missing, damaged"),
    "an empty checkpoint": (lambda: os.truncate("old/checkpoint.pt", 0), OLD, "is missing, damaged"),
    "a checkpoint of something else": (lambda: checkpoint(lambda state: {"model": 1}),
                                       OLD, "is missing, damaged"),
    "a checkpoint that runs code": (lambda: checkpoint(lambda state: state | {"best": Trap()}),
                                    OLD, "is missing, damaged"),
    "NaN in a checkpoint": (lambda: checkpoint(with_nan), OLD, "NaN or infinity"),
    "a checkpoint without the optimizer": (lambda: checkpoint(lambda state: state | {"optimizer": {}}),
                                           OLD, "can't be resumed"),
    "a checkpoint without the step": (lambda: checkpoint(lambda state: state | {"step": None}),
                                      OLD, "can't be resumed"),
}

@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, album, capsys):
    spoil, flags, message = BAD[name]
    flags = flags.split()
    if any(flag.startswith("old") for flag in flags):
        assert clip.main(["--data", "photos", *TOY, "--out", "old"]) == 0
    if spoil:
        spoil()
    before = {path for path in Path().rglob("*") if "cache" not in path.parts}
    capsys.readouterr()
    given = [flag for i in range(0, len(TOY), 2) if TOY[i] not in flags for flag in TOY[i:i + 2]]
    assert clip.main([*given, *flags]) == 2
    assert_one_error(capsys, message)
    assert {path for path in Path().rglob("*") if "cache" not in path.parts} == before

E, ID = torch.zeros(6, 24), torch.zeros(6, 16, dtype=torch.long)

# name: (a call with a model of SMALL: photos of 40 pixels, 16 tokens; part of the message)
BAD_TENSORS = {
    "photos of another size": (lambda m: m.encode_image(torch.zeros(2, 3, 48, 48)),
                               "pixels is torch.float32 [2, 3, 48, 48], where float ['B', 3, 40, 40]"),
    "photos with channels last": (lambda m: m.encode_image(torch.zeros(2, 40, 40, 3)), "pixels is"),
    "one photo without a batch": (lambda m: m.encode_image(torch.zeros(3, 40, 40)), "pixels is"),
    "photos as uint8": (lambda m: m.encode_image(torch.zeros(2, 3, 40, 40).byte()), "torch.uint8"),
    "photos as an array": (lambda m: m.encode_image(np.zeros((2, 3, 40, 40), "f")), "pixels is float32"),
    "a list for photos": (lambda m: m([[1.0]], ID), "pixels is <class 'list'>"),
    "words for ids": (lambda m: m.encode_text("a dog"), "ids is <class 'str'>"),
    "ids as floats": (lambda m: m.encode_text(ID.float()), "ids is torch.float32 [6, 16], where int"),
    "ids as bytes": (lambda m: m.encode_text(ID.byte()), "ids is torch.uint8"),
    "no photos": (lambda m: m.encode_image(torch.zeros(0, 3, 40, 40)), "pixels is torch.float32 [0, 3"),
    "one caption without a batch": (lambda m: m.encode_text(ID[0]), "ids is torch.int64 [16]"),
    "more tokens than positions": (lambda m: m.encode_text(torch.cat([ID, ID], 1)), "where int ['B', 16]"),
    "embeddings of two widths": (lambda m: m.similarity(E, E[:, :8]), "text_embeds is torch.float32 [6, 8]"),
    "one embedding without a batch": (lambda m: m.similarity(E[0], E), "image_embeds is torch.float32 [24]"),
    "logits that are not square": (lambda m: contrastive_loss(E), "logits_per_image is torch.float32 [6"),
    "logits as integers": (lambda m: contrastive_loss(ID[:, :6]), "logits_per_image is torch.int64"),
    "logits of three dimensions": (lambda m: contrastive_loss(E[None]), "logits_per_image is"),
    "crops without their dimension": (lambda m: clip.multiview_loss(m, E, E[:, None]), "image_embeds is"),
    "captions of other photos": (lambda m: clip.multiview_loss(m, E[:, None], E[:4, None]),
                                 "text_embeds is torch.float32 [4, 1, 24], where float [6, 'K', 24]"),
    "owners of other captions": (lambda m: recall_at_k(E, ID[:, 0]), "caption_owner is torch.int64 [6]"),
    "owners below zero": (lambda m: recall_at_k(E, ID[0, :1].expand(24) - 1), "outside the 6 of similarity"),
    "owners as floats": (lambda m: recall_at_k(E, torch.zeros(24)), "caption_owner is torch.float32"),
    "similarities of one photo": (lambda m: recall_at_k(E[0], ID[0]), "similarity is torch.float32 [24]"),
    "an infinite strength": (lambda m: lora.set_strength(adapted(), torch.inf), "strength is inf"),
}

@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_wrong_tensor_is_a_value_error_that_names_it(name):
    call, message = BAD_TENSORS[name]
    with pytest.raises(ValueError) as error:
        call(small_model())
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1

# --- Speed -----------------------------------------------------------------------------------------------

CUDA = torch.cuda.is_available()

def median_seconds(function, warmup=8, runs=20):
    """Of a call function(i), done when the GPU is."""
    times = []
    for i in range(warmup + runs):
        start = time.perf_counter()
        function(i)
        if CUDA:
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
    if r:
        finetune.insert(model, r, finetune.parse_args(["--dropout", str(dropout)]))
    optimizer = clip.make_optimizer(model, lr=5e-4, weight_decay=0.2)
    def step(i):
        pairs = (torch.arange(B) + i % 4 * B).repeat(2, 1).T
        clip.backward(model, lambda _: clip.encode_pairs(model, split, pairs, seed=i), micro_batches=1)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, step

@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("B, r, dropout, least", [(512, 0, 0.0, 0.4), (256, 64, 0.1, 0.2), (256, 64, 0.0, 0.2)])
def test_a_whole_training_step_keeps_the_gpu_at_matrix_products(B, r, dropout, least):
    """As a share of the rate of a product of two large matrices: 0.49 from scratch on one H100."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = 2 * len(a) ** 3 / median_seconds(lambda i: a @ a)
    with FlopCounterMode(display=False) as counter:         # matrix products and attention, forth and back
        whole_step(B, r, dropout, PRESETS["ViT-B/16"], torch.device("cuda"))[1](0)
    # Another one: a step before its graphs are recorded would leave nodes of another CUDA stream behind.
    model, step = whole_step(B, r, dropout, PRESETS["ViT-B/16"], torch.device("cuda"))
    clip.compile_parts(model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(step)
    share = counter.get_total_flops() / seconds / product
    print(f"batch {B}, r={r}, dropout {dropout}: {B / seconds:,.0f} pairs/s, {100 * share:.0f} % of a product's "
          f"{product / 1e12:.0f} TFLOP/s, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    assert share > least

# --- README ----------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()

LIMITS = {"clip.py": 700, "data.py": 450, "lora.py": 200, "finetune.py": 350}

@pytest.mark.parametrize("name, limit", LIMITS.items())
def test_a_file_is_as_long_as_the_readme_says_and_no_longer_than_promised(name, limit):
    lines = (HERE / name).read_text().splitlines()
    assert len(lines) <= limit
    assert max(map(len, lines)) <= 110
    assert f"| `{name}` | {len(lines)} |" in README

def test_the_readmes_python_runs_as_one_notebook(study_folder):
    plt.switch_backend("agg")               # draws files, on a machine with a screen too
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    toy, notebook = ["--data", "shapes", "--epochs", "2", "--batch-size", "10"], {}
    for block in blocks:                    # the drawn world for the photos; what trains for minutes trains less
        block = re.sub(r"flags = \[.*?\]", f"flags = {toy}", block, flags=re.DOTALL)
        exec(block.replace("flickr8k", "shapes"), notebook)
    for picture in ("photos.png", "inside.png", "strength.png"):
        Image.open(picture).load()
    assert len(list(Path("classes").glob("*/*/*.png"))) > 50

def test_the_readme_is_read_in_an_evening():
    assert len(README.splitlines()) <= 250

def test_every_link_of_the_readme_leads_to_the_line_that_it_quotes():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) == len(re.findall(r"\.py#L", README)) >= 18
    for code, file, line in links:
        assert code in (HERE / file).read_text().splitlines()[int(line) - 1], (file, line, code)

def test_the_readme_counts_the_bad_inputs():
    assert f"{len(BAD) + len(BAD_STUDY) + len(BAD_LORA)} rows of three tables" in README
    assert f"; {len(BAD_TENSORS)} calls |" in README

def test_the_readmes_pictures_are_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        Image.open(HERE / picture).load()
