"""CLIP in one file: two transformers that learn to put a photo and its caption at the same place.

    python clip.py --data shapes     drawn scenes, nothing downloaded: about a minute on two CPU cores
    python clip.py --epochs 55       ViT-B/16 from scratch on Flickr30k, on a GPU

Radford et al. 2021, arXiv:2103.00020. Module names are Hugging Face's: released weights load unchanged.
Shapes: N photos, M captions of a split; B photos in a batch, V crops and K captions of each, S x S pixels, T
tokens (words, or patches + 1), C channels of a tower, H heads, D = C / H, P x P pixels a patch, E shared.
"""
import argparse
import atexit
import copy
import gc
import math
import os
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
from data import InputError

CHECKPOINT, WEIGHTS = "checkpoint.pt", ("trained", "last", "best")
# torchrun starts a process for each GPU and says in the environment which one it is, of how many.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# --- The model -------------------------------------------------------------------------------------------

@dataclass
class TowerConfig:
    """The size of one transformer, in Hugging Face's names."""
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int

@dataclass
class CLIPConfig:
    """All that defines a CLIP. The defaults are ViT-B/16 as released, except causal: OpenAI's is True.
    causal: False is a BERT-style text tower, in which every token sees the whole caption; True is one where a
    token sees itself and what stands before it. hidden_act: "quick_gelu", or "gelu", faster on CPUs."""
    vision: TowerConfig = field(default_factory=lambda: TowerConfig(768, 12, 12, 3072))
    text: TowerConfig = field(default_factory=lambda: TowerConfig(512, 12, 8, 2048))
    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    projection_dim: int = 512
    hidden_act: str = "quick_gelu"
    causal: bool = False

PRESETS = {
    "ViT-B/16": CLIPConfig(),
    "tiny": CLIPConfig(vision=TowerConfig(96, 3, 6, 384), text=TowerConfig(64, 2, 4, 256),
                       image_size=48, patch_size=12, projection_dim=96, hidden_act="gelu"),
}

class Attention(nn.Module):
    """Multi-head self-attention: softmax(Q K^T / sqrt(D)) V in each of H heads (Vaswani et al. 2017, eq. 1).
    x (B, T, C) to (B, T, C). Row t of the softmax says how much token t takes from each token. Where
    `mask`, of a shape that broadcasts to (B, H, T, T), is False, Q K^T is set to minus infinity: weight 0."""
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        # One Linear each: LoRA finds in nn.MultiheadAttention only a Linear that isn't called (peft #761).
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, mask=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, -1).transpose(1, 2)               # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.num_heads, -1).transpose(1, 2)               # (B, H, T, D)
        v = self.v_proj(x).view(B, T, self.num_heads, -1).transpose(1, 2)               # (B, H, T, D)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                     # (B, H, T, D)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, C))

def quick_gelu(x):
    """OpenAI's GELU. Weights trained with one lose accuracy with the other, silently (open_clip #771)."""
    return x * torch.sigmoid(1.702 * x)

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}

class MLP(nn.Module):
    """Two Linears with an activation between, applied to each token on its own."""
    def __init__(self, config, hidden_act):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACTIVATIONS[hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))

class Block(nn.Module):
    """Pre-norm transformer block, (B, T, C) to (B, T, C): the residual stream x is never normalised, only
    what is read from it; deep stacks then train without tricks (Xiong et al. 2020, arXiv:2002.04745)."""
    def __init__(self, config, hidden_act):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config, hidden_act)

    def forward(self, x, mask=None):
        # Autocast returns norms in fp32. Cast back once: what reads them would else read twice the bytes.
        x = x + self.self_attn(self.layer_norm1(x).to(x.dtype), mask)
        return x + self.mlp(self.layer_norm2(x).to(x.dtype))

class Encoder(nn.Module):
    """A stack of blocks, the same for photos and captions."""
    def __init__(self, config, hidden_act):
        super().__init__()
        self.layers = nn.ModuleList(Block(config, hidden_act) for _ in range(config.num_hidden_layers))

    def forward(self, x, mask=None):
        if torch.is_autocast_enabled(x.device.type):        # the stream is read and written all the time
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.layers:
            x = layer(x, mask)
        return x

class VisionEmbeddings(nn.Module):
    """Photos (B, 3, S, S) to tokens (B, T, C): one for each P x P patch, and before them the class token,
    which has no pixels of its own and gathers what the blocks find."""
    def __init__(self, config):
        super().__init__()
        C, P = config.vision.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=P, stride=P, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // P) ** 2 + 1, C)
        self.patch_dropout = 0.0                            # share of the patches that training leaves out

    def forward(self, pixels):
        B, _, height, width = pixels.shape
        P = self.patch_embedding.kernel_size[0]
        # A convolution that never overlaps is one Linear on each flattened patch, and runs faster as that.
        patches = pixels.view(B, 3, height // P, P, width // P, P).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(B, -1, 3 * P * P)                                     # (B, T - 1, 3 P P)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1))                   # (B, T - 1, C)
        x = x + self.position_embedding.weight[1:]
        if self.training and self.patch_dropout:
            # Other patches for each photo and step: half of them halve the work (FLIP, Li et al. 2022).
            kept = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)
            kept = kept[:, :max(1, round(x.shape[1] * (1 - self.patch_dropout)))]       # (B, T' - 1)
            x = x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))                # (B, T' - 1, C)
        class_token = self.class_embedding + self.position_embedding.weight[0]
        return torch.cat([class_token.expand(B, 1, -1), x], dim=1)                      # (B, T or T', C)

class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): photos (B, 3, S, S) to pooled features (B, C)."""
    def __init__(self, config):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        # OpenAI's extra norm. Hugging Face's name for it lost an "e", and is so in every released file.
        self.pre_layrnorm = nn.LayerNorm(config.vision.hidden_size)
        self.encoder = Encoder(config.vision, config.hidden_act)
        self.post_layernorm = nn.LayerNorm(config.vision.hidden_size)

    def forward(self, pixels):
        x = self.embeddings(pixels)                                                     # (B, T, C)
        x = self.pre_layrnorm(x)
        x = self.encoder(x)
        return self.post_layernorm(x[:, 0])                                             # (B, C), class token

class TextEmbeddings(nn.Module):
    """Token ids (B, T) to vectors (B, T, C): what the token is, plus where it stands."""
    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.text.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.text.hidden_size)
        self.word_dropout = 0.0                             # share of tokens, markers too, that are replaced

    def forward(self, ids):
        if self.training and self.word_dropout:     # captions, being few, are else learnt by heart
            kept = torch.rand(ids.shape, device=ids.device) >= self.word_dropout
            ids = ids.where(kept, torch.randint_like(ids, self.token_embedding.num_embeddings))
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]

class TextTransformer(nn.Module):
    """Captions (B, T), each `<start> words <end> padding`, to pooled features (B, C) of their end token."""
    def __init__(self, config):
        super().__init__()
        self.causal, self.eos_token_id = config.causal, config.eos_token_id
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.text, config.hidden_act)
        self.final_layer_norm = nn.LayerNorm(config.text.hidden_size)

    def forward(self, ids):
        B, T = ids.shape
        # The first end token, before any is replaced: padding repeats it, argmax returns the first of equals.
        end = (ids == self.eos_token_id).int().argmax(dim=-1)                           # (B,)
        position = torch.arange(T, device=ids.device)
        if self.causal:
            # Padding stands after the end token, where nothing that is read can see it: no padding mask.
            mask = position[:, None] >= position                                        # (T, T)
        else:
            mask = (position <= end[:, None])[:, None, None]        # (B, 1, 1, T): no token sees padding
        x = self.embeddings(ids)                                                        # (B, T, C)
        x = self.encoder(x, mask)
        x = self.final_layer_norm(x)
        return x[torch.arange(B, device=ids.device), end]                               # (B, C)

@torch.no_grad()
def init_weights(model):
    """In place: biases 0, the rest normal with the scales of openai/CLIP (model.py, initialize_parameters),
    those of its text blocks for both towers; norms are left as PyTorch makes them, with weight 1, bias 0."""
    for tower, config in ((model.vision_model, model.config.vision), (model.text_model, model.config.text)):
        inner = config.hidden_size ** -0.5
        # A block adds to the residual stream twice: this keeps its variance from growing with depth (GPT-2).
        outer = inner * (2 * config.num_hidden_layers) ** -0.5
        std = {"q_proj": inner, "k_proj": inner, "v_proj": inner, "out_proj": outer,
               "fc1": (2 * config.hidden_size) ** -0.5, "fc2": outer}
        for name, module in tower.encoder.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std[name.split(".")[-1]])
                nn.init.zeros_(module.bias)
    vision, text = model.vision_model.embeddings, model.text_model.embeddings
    nn.init.normal_(vision.class_embedding, std=model.config.vision.hidden_size ** -0.5)
    nn.init.normal_(vision.position_embedding.weight, std=model.config.vision.hidden_size ** -0.5)
    # Ours: a patch starts as strong as a position. A std of 1 / sqrt(fan in) would drown the positions.
    fan_in = 3 * model.config.patch_size ** 2
    nn.init.normal_(vision.patch_embedding.weight, std=(fan_in * model.config.vision.hidden_size) ** -0.5)
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    nn.init.normal_(text.position_embedding.weight, std=0.01)
    nn.init.normal_(model.visual_projection.weight, std=model.config.vision.hidden_size ** -0.5)
    nn.init.normal_(model.text_projection.weight, std=model.config.text.hidden_size ** -0.5)
    # One over the temperature 0.07. At a scale of exp(0.07), a common slip, training is slow to leave chance.
    nn.init.constant_(model.logit_scale, math.log(1 / 0.07))

def expect(name, x, kind, *shape):
    """Raises ValueError unless x is a tensor of this kind and shape. A letter stands for any one size."""
    fits = isinstance(x, torch.Tensor) and x.ndim == len(shape) and (
        x.is_floating_point() if kind == "float" else x.dtype in (torch.int32, torch.int64))
    sizes = {n: n for n in shape if isinstance(n, int)}
    if not fits or not all(size == sizes.setdefault(n, size) > 0 for n, size in zip(shape, x.shape)):
        raise ValueError(f"{name} is {getattr(x, 'dtype', type(x))} {[*getattr(x, 'shape', ())]}, where "
                         f"{kind} {[*shape]} is expected")

def load_checkpoint(run_dir):
    """A run's checkpoint, on the CPU: {"config": CLIPConfig, "flags", "trained": weights, "last": their mean
    (see train), "best": that of the best epoch, ...}. InputError where none can be read or it holds NaN."""
    path = Path(run_dir) / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)     # data only: it can't bring code
        towers = {name: TowerConfig(**state["config"].pop(name)) for name in ("vision", "text")}
        state["config"] = CLIPConfig(**towers, **state["config"])
        if not all(tensor.isfinite().all() for name in WEIGHTS for tensor in state[name].values()):
            raise ValueError("NaN or infinity in its weights")
        return state
    except Exception as error:                              # torch.load has a dozen ways to fail
        raise InputError(f"{path} is missing, damaged, older or no checkpoint ({error!r:.90})") from error

class CLIP(nn.Module):
    """Two towers and a temperature; `forward`, then contrastive_loss, are figure 3 of the paper."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.text_model = TextTransformer(config)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.source = None                  # where its tokenizer is, for a model that was loaded
        init_weights(self)

    def encode_image(self, pixels):
        """Photos (B, 3, S, S), normalised as in data.normalize, to unit vectors (B, E) in fp32."""
        expect("pixels", pixels, "float", "B", 3, self.config.image_size, self.config.image_size)
        return F.normalize(self.visual_projection(self.vision_model(pixels)).float(), dim=-1)

    def encode_text(self, ids):
        """Token ids (B, T) to unit vectors (B, E) in fp32. A row that has no end is read at its start."""
        expect("ids", ids, "int", "B", "T")
        expect("ids", ids, "int", "B", min(ids.shape[1], self.config.max_position_embeddings))      # T <= 77
        return F.normalize(self.text_projection(self.text_model(ids)).float(), dim=-1)

    def similarity(self, image_embeds, text_embeds):
        """exp(logit_scale) x cosine: (B, E), (B', E) to logits (B, B') in fp32: at 100 bf16 steps by 0.5."""
        expect("image_embeds", image_embeds, "float", "B", "E")
        expect("text_embeds", text_embeds, "float", "B'", image_embeds.shape[1])
        with torch.autocast(image_embeds.device.type, enabled=False):
            return self.logit_scale.exp() * image_embeds @ text_embeds.T

    def forward(self, pixels, ids):
        """B photos and B captions to logits_per_image (B, B); its transpose is logits_per_text."""
        image_embeds = self.encode_image(pixels)                                        # (B, E)
        text_embeds = self.encode_text(ids)                                             # (B, E)
        return self.similarity(image_embeds, text_embeds)                               # (B, B)

    @classmethod
    def load(cls, run_dir, epoch="best"):
        """A run's model in eval mode, on the CPU: its mean at the "best" epoch or "last"; or "trained"."""
        state = load_checkpoint(run_dir)
        try:
            model = cls(state["config"])
            model.load_state_dict(state[epoch])
        except (RuntimeError, KeyError, TypeError) as error:
            raise InputError(f"{run_dir} holds no whole model, perhaps an adapter: {error!r:.90}") from error
        model.source = Path(run_dir) / "tokenizer"
        return model.eval()

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """The model of a hub name, a Hugging Face folder or a run, in eval mode on the CPU."""
        import finetune                     # the exchange with Hugging Face's files stands there
        return finetune.read_released(cls, name_or_dir)

    def save_pretrained(self, folder, tokenizer=None):
        """Writes a Hugging Face folder, with this tokenizer or the model's: finetune.write_released."""
        import finetune
        finetune.write_released(self, folder, tokenizer)

def contrastive_loss(logits_per_image):
    """Mean of two cross-entropies over logits (B, B), a scalar: the right caption of a photo is that of its
    own row, the right photo of a caption that of its own column. Chance is ln B, 4.85 for 128."""
    expect("logits_per_image", logits_per_image, "float", "B", "B")
    labels = torch.arange(len(logits_per_image), device=logits_per_image.device)
    loss_image = F.cross_entropy(logits_per_image.float(), labels)
    loss_text = F.cross_entropy(logits_per_image.float().T, labels)
    return (loss_image + loss_text) / 2

def multiview_loss(model, image_embeds, text_embeds):
    """V crops (B, V, E) and K captions (B, K, E) of B photos: (loss, its first part), scalars. The first part
    is contrastive_loss over all V K ways to pair a crop with a caption, their mean. To it come the means over
    crops among themselves (SLIP, arXiv:2112.12750) and captions among themselves, where there are several."""
    expect("image_embeds", image_embeds, "float", "B", "V", "E")
    expect("text_embeds", text_embeds, "float", len(image_embeds), "K", image_embeds.shape[2])
    crops, captions = image_embeds.unbind(1), text_embeds.unbind(1)                     # V and K times (B, E)
    parts = [[contrastive_loss(model.similarity(a, b)) for a, b in pairs]
             for pairs in (product(crops, captions), combinations(crops, 2), combinations(captions, 2))]
    means = [sum(losses) / len(losses) for losses in parts if losses]
    return sum(means), means[0]

def recall_at_k(similarity, caption_owner, ks=(1, 5, 10)):
    """Retrieval recall as published for Flickr30k: {"t2i_r1": fraction, ..., "i2t_r1": fraction, ...}.
    similarity (photos, captions); caption_owner (captions,): the photo that each caption describes. Text to
    image: how often a caption's photo is among its k best; image to text: how often any of its captions is.
    A tie counts against the model, and so does NaN: constant similarities score 0, not 100 %."""
    expect("similarity", similarity, "float", "photos", "captions")
    expect("caption_owner", caption_owner, "int", similarity.shape[1])
    photos, captions = similarity.shape
    if not 0 <= caption_owner.min() <= caption_owner.max() < photos:
        raise ValueError(f"caption_owner names photos outside the {photos} of similarity")
    own = caption_owner == torch.arange(photos, device=similarity.device)[:, None]      # (photos, captions)
    right_photo = similarity[caption_owner, torch.arange(captions, device=similarity.device)]
    best_caption = similarity.masked_fill(~own, -torch.inf).amax(dim=1)
    # The rank of the right answer is the number of wrong ones that are not strictly below it.
    text_rank = (~(similarity < right_photo) & ~own).sum(dim=0)                         # (captions,)
    image_rank = (~(similarity < best_caption[:, None]) & ~own).sum(dim=1)              # (photos,)
    return {**{f"t2i_r{k}": (text_rank < k).float().mean().item() for k in ks},
            **{f"i2t_r{k}": (image_rank < k).float().mean().item() for k in ks}}

# --- Evaluation ------------------------------------------------------------------------------------------

def autocast(device):
    """Matrix products in bf16 on CUDA, all in fp32 elsewhere. bf16 has fp32's range: unlike fp16 it needs no
    loss scaling and doesn't overflow to NaN (openai/CLIP #40). CUDA graphs forbid autocast's cache."""
    return torch.autocast(device.type, torch.bfloat16, device.type == "cuda", cache_enabled=False)

@torch.no_grad()
def embed(model, split, batch_size=250):
    """A split's photos (N, E), captions (M, E), in eval mode; ValueError for photos with a margin (train)."""
    device, training = model.logit_scale.device, model.training
    model.eval()
    with autocast(device), torch.compiler.set_stance("force_eager"):       # or eval mode would compile anew
        images = [model.encode_image(data.normalize(split.take(rows, device)))
                  for rows in torch.arange(len(split.photos)).split(batch_size)]
        texts = [model.encode_text(split.tokens(rows, device))
                 for rows in torch.arange(len(split.captions)).split(batch_size)]
    model.train(training)
    return torch.cat(images), torch.cat(texts)

@torch.no_grad()
def evaluate(model, split):
    """The loss of a split, its recalls in percent and their sum: {"loss", "t2i_r1", ..., "i2t_r10", "rsum"}.
    The loss is over whole groups of 64 photos (of all, if fewer), five times with another caption of each, so
    that it compares across batch sizes: chance is ln 64 = 4.159. The sum picks the best epoch."""
    images, texts = embed(model, split)
    owner = split.owner.to(images.device)
    first, count = torch.searchsorted(owner, owner.unique()), owner.bincount()          # (N,), (N,)
    size = min(64, len(images))
    losses = [contrastive_loss(model.similarity(a, b)) for turn in range(5)
              for a, b in zip(images.split(size), texts[first + turn % count].split(size)) if len(a) == size]
    recall = {name: 100 * value for name, value in recall_at_k(images @ texts.T, owner).items()}
    return {"loss": torch.stack(losses).mean().item(), **recall, "rsum": sum(recall.values())}

def describe(row):
    """An evaluation in one line."""
    return ("loss {loss:.4f}  R@1/5/10 text->image {t2i_r1:5.1f} {t2i_r5:5.1f} {t2i_r10:5.1f}"
            "  image->text {i2t_r1:5.1f} {i2t_r5:5.1f} {i2t_r10:5.1f}").format(**row)

# --- Training --------------------------------------------------------------------------------------------

def make_optimizer(model, lr, weight_decay):
    """AdamW with OpenAI's betas. Decay pulls towards zero: a sensible prior for matrices of Linears (LoRA's
    too), not for norms, biases, the logit scale and embeddings; these the paper decays, patches' as well."""
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": weight_decay}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim >= 2 and "embedding" not in name]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)

def learning_rate(step, steps, peak, warmup):
    """At step 0, 1, ...: a line up to `peak` over the share `warmup` of the steps, then half a cosine."""
    if step < warmup * steps:
        return peak * (step + 1) / (warmup * steps + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup * steps) / (steps - warmup * steps)))

def compile_parts(model):
    """torch.compile part by part: equal blocks once for each length of the captions. Then CUDA graphs."""
    gc.collect()                            # an earlier model's graphs, which hold one another in a cycle
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64           # a version for each length of the captions
    torch._inductor.config.fallback_random = True       # PyTorch's own dropout is the faster kernel
    for part in model.modules():
        if isinstance(part, (VisionEmbeddings, Block)):
            part.compile(dynamic=False)
    for tower in (model.vision_model, model.text_model):
        replay_graphs(tower)

def replay_graphs(tower):
    """Lets a tower train by CUDA graphs, one for each shape of its input: one call replays the thousand
    kernels of a pass, which Python starts more slowly than a GPU runs small ones. plain keeps its forward."""
    plain, graphs, pool = copy.copy(tower), {}, torch.cuda.graph_pool_handle()
    def forward(x):
        if not tower.training:
            return plain(x)
        if x.shape not in graphs:
            with torch.enable_grad(), torch.random.fork_rng([x.device]):
                graphs[x.shape] = torch.cuda.make_graphed_callables(copy.copy(plain), (x.clone(),), pool=pool)
        return graphs[x.shape](x)
    tower.forward = forward

def encode_pairs(model, split, pairs, seed, views=1):
    """pairs (b, 1 + K): rows of b photos, and of K captions of each. Returns the embeddings of `views` crops
    of each photo (b, V, E) and of its captions (b, K, E). The same seed makes the same crops and dropout."""
    torch.manual_seed(seed)
    device, size = model.logit_scale.device, model.config.image_size
    pixels = split.take(pairs[:, 0], device).repeat_interleave(views, dim=0)            # (b V, S, S, 3)
    # Photos are stored with a margin for crops. Drawn scenes are not: a crop makes "left" and "large" wrong.
    pixels = data.augment(pixels, size) if pixels.shape[1] > size else data.normalize(pixels)
    ids = split.tokens(pairs[:, 1:].flatten(), device)                                  # (b K, T)
    with autocast(device):
        image_embeds, text_embeds = model.encode_image(pixels), model.encode_text(ids)
    return image_embeds.unflatten(0, (len(pairs), -1)), text_embeds.unflatten(0, (len(pairs), -1))

def gather(x):
    """The rows of all processes, (B / processes, ...) to (B, ...), without a graph."""
    parts = [torch.empty_like(x) if WORLD_SIZE > 1 else x.detach() for _ in range(WORLD_SIZE)]
    if WORLD_SIZE > 1:
        dist.all_gather(parts, x.detach())
    return torch.cat(parts)

def backward(model, encode, micro_batches):
    """Returns the first part of multiview_loss over the pairs of all processes; leaves the whole loss's
    gradient in the parameters. encode(i): embeddings of micro-batch i, the same each time (encode_pairs).
    The towers hold one micro-batch at a time, exactly, by gradient caching (Gao 2021, arXiv:2101.06983):
    1. Embed all pairs. Of several micro-batches keep no graph: that is what fills the memory.
    2. The loss is a function of the embeddings alone: compute it, and its gradient for each of them.
    3. Embed each micro-batch again, now with a graph, and send its part of that gradient through it."""
    if micro_batches > 1:       # a CUDA graph's replay overwrites the gradients it gave: add up elsewhere
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.grad = torch.zeros_like(p)
    with torch.set_grad_enabled(micro_batches == 1):
        embeds = [encode(i) for i in range(micro_batches)]
    image_embeds, text_embeds = (gather(torch.cat(part)).requires_grad_() for part in zip(*embeds))
    loss, pair_loss = multiview_loss(model, image_embeds, text_embeds)
    loss.backward()
    sizes = [len(images) for images, _ in embeds]
    own = (x.grad.chunk(WORLD_SIZE)[RANK].split(sizes) for x in (image_embeds, text_embeds))
    for i, grads in enumerate(zip(*own)):           # the gradient of sum(x g) is g dx: the chain rule
        sum((x * g).sum() for x, g in zip(encode(i) if micro_batches > 1 else embeds[i], grads)).backward()
    if WORLD_SIZE > 1:          # each process has the gradient of its own pairs, but of the scale the whole
        for p in filter(lambda p: p.grad is not None and p is not model.logit_scale, model.parameters()):
            dist.all_reduce(p.grad)
    return pair_loss.detach()

SAVE_SECONDS = 20   # least time between checkpoints: a kill loses at most this and the epoch after it
FREE = ("resume", "device", "compile", "micro_batch", "out")        # flags that a resumed run may change

def train(model, splits, args, run_dir):
    """Trains all that requires a gradient; returns the history, a row for each epoch: its loss and recalls
    are those of the weights' running mean (--ema), over about the last tenth of the steps so far. Writes
    log.csv each epoch, the checkpoint often and when it is stopped. Batches derive from (seed, epoch), crops
    and dropout from (seed, step): a resumed run, in as many processes and micro-batches, is on the CPU bit
    for bit the whole one. Raises InputError if the loss is not finite."""
    split, steps_per_epoch = splits["train"], len(splits["train"].photos) // args.batch_size
    steps = args.epochs * steps_per_epoch
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    flags = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    flags["content"] = str(zlib.crc32(repr([(s.names, s.captions) for s in splits.values()]).encode()))
    history, best, seconds, saved = [], None, 0.0, time.perf_counter()
    done, total = 0, torch.zeros((), device=args.device)    # steps of an epoch before a stop, losses' sum
    model.vision_model.embeddings.patch_dropout = args.patch_dropout
    model.text_model.embeddings.word_dropout = args.word_dropout
    averaged = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    trained, mean = ({name: p.detach() for name, p in each.named_parameters() if p.requires_grad}
                     for each in (model, averaged))         # averaged shares what is frozen
    def save(step):
        with data.atomic(run_dir / CHECKPOINT) as temporary:
            torch.save({"config": asdict(model.config), "flags": flags, "last": mean,
                        "best": best or mean, "trained": trained, "optimizer": optimizer.state_dict(),
                        "history": history, "step": step, "total": total, "seconds": seconds}, temporary)
        if data.stops:                                      # Ctrl-C or SIGTERM came: see data.command
            raise KeyboardInterrupt
    if args.resume and (run_dir / CHECKPOINT).exists():
        state = load_checkpoint(run_dir)
        try:
            if changed := [f"{name} was {state['flags'].get(name)}" for name in flags
                           if state["flags"].get(name) != flags[name]]:
                raise ValueError(", ".join(changed))
            sizes = [{n: w.shape for n, w in each.items()} for each in (trained, *map(state.get, WEIGHTS))]
            if sizes != sizes[:1] * 4:
                raise ValueError("weights of another model")
            model.load_state_dict(state["trained"], strict=False)
            averaged.load_state_dict(state["last"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            history, best, seconds = state["history"], state["best"], state["seconds"]
            done, total = state["step"] % steps_per_epoch, total + state["total"]
            print(f"resumed   after epoch {len(history)}, step {state['step']} of {steps}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{run_dir} can't be resumed ({error}); --out DIR starts another run") from error
    if args.compile:
        compile_parts(model)
    model.train()
    data.patience = math.inf if RANK else 1     # a first stop waits for the end of a step; process 0 decides
    for epoch in range(len(history), args.epochs):
        pairs, start = split.pairs(args.seed, epoch, args.captions), time.perf_counter()        # (N, 1 + K)
        for i in range(done, steps_per_epoch):
            step = epoch * steps_per_epoch + i
            batch = pairs[i * args.batch_size:(i + 1) * args.batch_size]                # (B, 1 + K)
            parts = batch.chunk(WORLD_SIZE)[RANK].split(args.micro_batch or len(batch))
            seed = (args.seed << 32) + (step * WORLD_SIZE + RANK) * len(parts)      # + j, one for each part
            loss = backward(model, lambda j: encode_pairs(model, split, parts[j], seed + j, args.views),
                            len(parts))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)       # one odd batch can't throw the model far
            lr = learning_rate(step, steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            model.logit_scale.data.clamp_(max=math.log(100))        # the paper's bound (openai/CLIP #46)
            ema = torch.optim.swa_utils.get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
            ema([*mean.values()], [*trained.values()], None)
            total += loss
            if (step + 1) % max(1, steps // 40) == 0:       # about 40 lines for a run of any length
                shown = loss.item()                         # waits for the GPU, so before the clock
                rate = (i + 1 - done) * args.batch_size / (time.perf_counter() - start)
                print(f"epoch {epoch + 1:3d}/{args.epochs}  step {step + 1:6d}/{steps}  loss {shown:7.4f}  "
                      f"lr {lr:.2e}  scale {model.logit_scale.exp():6.2f}  {rate:6,.0f} pairs/s  "
                      f"ETA {(steps - step - 1) * args.batch_size / rate / 60:6.1f} min", flush=True)
            if data.stops and not RANK and i + 1 < steps_per_epoch and total.isfinite():
                seconds += time.perf_counter() - start
                save(step + 1)
        train_loss, row = total.item() / steps_per_epoch, evaluate(averaged, splits["val"])
        if not math.isfinite(train_loss + row["loss"]):
            raise InputError("the loss is not finite: start a new run with a lower --lr or a longer --warmup")
        seconds += time.perf_counter() - start
        done, total = 0, torch.zeros_like(total)
        history.append({"epoch": epoch + 1, "train_loss": train_loss, "lr": lr, **row,
                        "logit_scale": model.logit_scale.exp().item(), "minutes": seconds / 60})
        is_best = row["rsum"] > max((before["rsum"] for before in history[:-1]), default=-1)
        print(f"epoch {epoch + 1:3d}/{args.epochs}  train {train_loss:.4f}  val {describe(row)}"
              f"{'  best' if is_best else ''}", flush=True)
        if RANK:
            continue                                        # process 0 writes for all
        if is_best:
            best = {name: tensor.to("cpu", copy=True) for name, tensor in mean.items()}
        with data.atomic(run_dir / "log.csv") as temporary:
            lines = [history[0].keys(), *(row.values() for row in history)]
            temporary.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        if data.stops or epoch + 1 == args.epochs or time.perf_counter() - saved > SAVE_SECONDS:
            save(step + 1)
            saved = time.perf_counter()
    data.patience = 0
    if WORLD_SIZE > 1:
        dist.barrier()                                      # what process 0 wrote is there for all
    return history

# --- The command -----------------------------------------------------------------------------------------

# The drawn worlds' defaults: a small model for a small world; nothing is cropped, left out or averaged.
DRAWN_DEFAULTS = dict(model="tiny", tokenizer="train", epochs=9, batch_size=128, lr=1e-3, weight_decay=0.1,
                      views=1, captions=1, patch_dropout=0.0, word_dropout=0.0, ema=0.0)

FLAGS = (       # of clip.py and finetune.py: name, default, least, most, help
    ("epochs", 55, 1, 1e6, "passes over the photos, less those that fill no whole batch"),
    ("batch-size", 256, 2, 1e6, "photos in a step, on all GPUs together"),
    ("micro-batch", 0, 0, 1e6, "photos that a GPU embeds at once, with crops and captions; 0 is all"),
    ("lr", 5e-4, 0, 1e3, "peak learning rate"),
    ("weight-decay", 0.2, 0, 1e3, "AdamW's, on the matrices of Linears"),
    ("warmup", 0.1, 0, 1, "share of the steps in which lr rises"),
    ("views", 4, 1, 1e3, "crops of a photo in a step, positives of each other (drawn scenes aren't cropped)"),
    ("captions", 4, 1, 1e3, "captions of a photo in a step, positives of its crops and of each other"),
    ("patch-dropout", 0.75, 0, 0.99, "share of a photo's patches that training leaves out"),
    ("word-dropout", 0.3, 0, 0.99, "share of a caption's tokens that training replaces by others"),
    ("ema", 0.999, 0, 1, "largest decay of the weights' running mean, which is evaluated and kept; 0: none"),
    ("seed", 0, 0, 1e9, "of weights, batches and crops"),
)

def add_shared_flags(parser):
    """The flags that clip.py and finetune.py have in common."""
    for name, default, _, _, words in FLAGS:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=words)
    group = parser.add_argument_group("run")
    group.add_argument("--data", type=os.path.normpath, default="flickr30k", metavar="DIR",
                       help="photos and captions, or `shapes`, `sketches`; flickr30k is fetched if missing")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder of the run; None is a name in runs/")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", default=device, help="cuda:N or cpu")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="on CUDA")

def checked(args):
    """The flags, with values that make sense. Joins the processes, where torchrun has started several."""
    for name, _, low, high, _ in FLAGS:
        if not low <= (value := getattr(args, name.replace("-", "_"))) <= high:
            raise InputError(f"--{name} {value} is not between {low} and {high:g}")
    if args.batch_size % WORLD_SIZE:
        raise InputError(f"--batch-size {args.batch_size} doesn't divide among {WORLD_SIZE} processes")
    try:
        args.device = torch.empty(1, device=args.device).device
    except (RuntimeError, AssertionError) as error:         # the latter where torch has no CUDA
        raise InputError(f"no device {args.device} here: {str(error).splitlines()[0]}") from error
    args.compile = args.compile and args.device.type == "cuda"
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)                  # where graphs are recorded and processes meet
    if WORLD_SIZE > 1 and not dist.is_initialized():
        timeout = 48 * dist.constants.default_pg_timeout                # a day: process 0 may fetch 4.4 GB
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=timeout)
        atexit.register(dist.destroy_process_group)
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout          # process 0 speaks for all
    return args

def parse_args(argv):
    parser = data.Parser(description=f"Train CLIP from scratch. Defaults of drawn worlds: {DRAWN_DEFAULTS}.",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", choices=PRESETS, default="ViT-B/16", help="size")
    parser.add_argument("--text", choices=("bert", "causal"), default="bert", help="causal is OpenAI's")
    parser.add_argument("--tokenizer", default="openai/clip-vit-base-patch16", help="name, folder or `train`")
    add_shared_flags(parser)
    if parser.parse_known_args(argv)[0].data in data.DRAWN:
        parser.set_defaults(**DRAWN_DEFAULTS)
    args = checked(parser.parse_args(argv))
    args.out = args.out or Path("runs") / Path(os.path.abspath(args.data)).name
    return args

def load_data(args, tokenizer, config):
    """What data.load gives for --data and a model's configuration, on the device where it fits."""
    if not args.resume and any((args.out / name).exists() for name in (CHECKPOINT, "tokenizer", "log.csv")):
        raise InputError(f"{args.out} holds a run: --resume goes on with it, --out DIR starts another")
    if RANK:
        dist.barrier()                                      # process 0 stores the photos, others find them
    splits, tokenizer = data.load(args.data, tokenizer, config.image_size, config.max_position_embeddings)
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    if args.batch_size > len(splits["train"].photos):
        raise InputError(f"--batch-size {args.batch_size} for {len(splits['train'].photos)} training photos")
    for split in splits.values():
        split.place(args.device)
    return splits, tokenizer

def open_run(tokenizer, args):
    """Makes the folder of a run, with the tokenizer in it."""
    if RANK == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        with data.atomic(args.out / "tokenizer") as temporary:
            tokenizer.save_pretrained(temporary)

def run(args):
    import finetune                                         # reports and figures; here, as it imports clip
    config, own = PRESETS[args.model], args.out / "tokenizer"
    tokenizer = own if args.resume and own.exists() else args.tokenizer     # "train" would train another one
    splits, tokenizer = load_data(args, tokenizer, config)
    config = replace(config, causal=args.text == "causal", vocab_size=len(tokenizer),
                     eos_token_id=tokenizer.eos_token_id)
    open_run(tokenizer, args)
    torch.manual_seed(args.seed)
    model = CLIP(config).to(args.device)
    finetune.print_start(model, splits, args)
    history = train(model, splits, args, args.out)
    if RANK == 0:
        finetune.print_end(model, splits, history, args)

def main(argv=None):
    return data.command(argv, parse_args, run)

if __name__ == "__main__":
    sys.exit(main())
