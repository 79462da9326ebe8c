"""What this project claims, a test for each claim: `pytest`. With -s each prints the largest difference seen.

Expected values never come from the code under test: they are those of Hugging Face's CLIPModel, of a formula
written out, or worked out by hand. SLOW=1 adds what takes long.
"""
import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.activations import ACT2FN

import clip
from clip import CLIP, CLIPConfig, PRESETS, TowerConfig, contrastive_loss, recall_at_k

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
    assert difference(clip.QuickGELU()(x), ACT2FN["quick_gelu"](x)) < 1e-6


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
    assert len(outputs) == 12 * 5 + 7       # 12 modules in each of the 5 blocks, and 7 around them
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
           "vision_model.embeddings.patch_embedding.weight": (3 * 8 * 8) ** -0.5,
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
    return {"text_to_image": pytest.approx(text_to_image), "image_to_text": pytest.approx(image_to_text)}


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
