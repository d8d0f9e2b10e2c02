"""A small GPT-2 as `transformers` builds it, in the midst of a run with the Trainer's two groups,
moves to Flax NNX and back, and its losses go on as if nothing had happened."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import ROOT
from torch_states import into_torch

import adam_jax as aj

VOCABULARY, CONTEXT, D, HEADS, LAYERS = 11, 8, 8, 2, 2
RATE, DECAY = 3e-3, 0.1

PAGE = (ROOT / "docs" / "moving-in.md").read_text()
SAID: dict = {}
exec(re.search(r"```python\n([^`]*layers, heads = 2, 2.*?)```", PAGE, re.DOTALL)[1], SAID)
RULES, TX = SAID["rules"], SAID["tx"]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.ln_1 = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.mlp = nnx.Dict(
            c_fc=nnx.Linear(D, 4 * D, rngs=rngs), c_proj=nnx.Linear(4 * D, D, rngs=rngs)
        )

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.zeros(x.shape[:2]))
        x = x + self.attn(self.ln_1(x), mask=mask)
        return x + self.mlp["c_proj"](nnx.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT2(nnx.Module):
    def __init__(self, rngs):
        self.wte, self.wpe = (nnx.Embed(n, D, rngs=rngs) for n in (VOCABULARY, CONTEXT))
        self.h = nnx.Dict({str(i): Block(rngs) for i in range(LAYERS)})
        self.ln_f = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        for block in self.h.values():
            x = block(x)
        return self.wte.attend(self.ln_f(x))


def torch_gpt2(torch):
    """With the names, the layouts and the order of modules of `transformers`."""
    from torch import nn

    class Conv1D(nn.Module):
        def __init__(self, out, inside):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inside, out) * 0.2)
            self.bias = nn.Parameter(torch.zeros(out))

        def forward(self, x):
            return x @ self.weight + self.bias

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn, self.c_proj = Conv1D(3 * D, D), Conv1D(D, D)

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = (
                part.view(batch, length, HEADS, D // HEADS).transpose(1, 2)
                for part in self.c_attn(x).split(D, dim=2)
            )
            found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.c_proj(found.transpose(1, 2).reshape(batch, length, D))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc, self.c_proj = Conv1D(4 * D, D), Conv1D(D, 4 * D)

        def forward(self, x):
            return self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))

    class TorchBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(D), Attention(), nn.LayerNorm(D)
            self.mlp = MLP()

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(VOCABULARY, D), nn.Embedding(CONTEXT, D)
            self.h = nn.ModuleList([TorchBlock() for _ in range(LAYERS)])
            self.ln_f = nn.LayerNorm(D)

        def forward(self, tokens):
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
            for block in self.h:
                x = block(x)
            return self.ln_f(x)

    class LMHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = Transformer()
            self.lm_head = nn.Linear(D, VOCABULARY, bias=False)
            self.lm_head.weight = self.transformer.wte.weight

        def forward(self, tokens):
            return self.lm_head(self.transformer(tokens))

    torch.manual_seed(0)
    return LMHead()


def trainers_optimizer(torch, model):
    """The two groups of the Trainer: no decay for biases and norms."""
    spared = [n for n, _ in model.named_parameters() if n.endswith("bias") or ".ln_" in n]
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n not in spared], "weight_decay": DECAY},
        {"params": [named[n] for n in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATE)


def batches(step):
    """Sequences that count on by a step of their own."""
    rng = np.random.default_rng(step)
    start, by = rng.integers(VOCABULARY, size=(2, 8, 1))
    return ((start + by * np.arange(CONTEXT)) % VOCABULARY).astype(np.int32)


def train_torch(torch, model, optimizer, steps):
    losses = []
    for step in steps:
        tokens = torch.tensor(batches(step), dtype=torch.long)
        logits = model(tokens[:, :-1]).reshape(-1, VOCABULARY)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("standard_promotion")
def test_a_gpt2_with_the_trainers_groups_moves_to_nnx_and_back(tmp_path):
    """A1, A2, B14: Conv1D, fused projections in heads, tied weights, decay group first."""
    torch = pytest.importorskip("torch", reason="PyTorch is an optional oracle: pip install torch")
    model = torch_gpt2(torch)
    optimizer = trainers_optimizer(torch, model)
    before = train_torch(torch, model, optimizer, range(30))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")  # as the Trainer saves it
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    name_of = {id(p): n for n, p in model.named_parameters()}
    names = [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    # In the order of the model, or of a file of safetensors, they are refused.
    in_order = list(name_of.values())
    for wrong in (in_order, sorted(in_order), [sorted(its) for its in names]):
        like = nnx.state(GPT2(nnx.Rngs(0)), nnx.Param)
        with pytest.raises(ValueError, match="name_of = "):
            aj.migrate.from_torch(saved, TX, like, names=wrong, **RULES)

    graph, like = nnx.split(GPT2(nnx.Rngs(0)), nnx.Param)
    tx = TX
    params = aj.migrate.params_from_torch(model.state_dict(), like, **RULES)
    state = aj.migrate.from_torch(saved, tx, params, names=names, **RULES)

    def loss(params, tokens):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def train(params, state, steps):
        losses = []
        for i in steps:
            params, state, value = step(params, state, batches(i))
            losses.append(float(value))
        return losses, params, state

    theirs = train_torch(torch, model, optimizer, range(30, 60))
    ours, params, state = train(params, state, range(30, 60))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert before[0] > 1.2 * ours[-1]  # it learns all the while

    again = torch_gpt2(torch)
    optimizer = trainers_optimizer(torch, again)
    into_torch(torch, again, optimizer, params, state, tx, names=names, **RULES)
    theirs = train_torch(torch, again, optimizer, range(60, 90))
    ours, _, _ = train(params, state, range(60, 90))
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
