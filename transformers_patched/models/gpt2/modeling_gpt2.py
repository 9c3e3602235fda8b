"""GPT-2, made to be edited: one class per screen, from the linear layer at the top to the heads.

Module and parameter names are those of Hugging Face checkpoints, so that their weights load here
and these weights load there. Hidden states are (*tokens, H), where the tokens of a batch are
padded, (B, L), or packed without padding, (T,); a `SequenceLayout` knows which, and the same lines
serve both. They also serve generation, whose cache answers for keys and values of earlier tokens.
"""

from __future__ import annotations

import math
import re
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loralib as lora

from ...attention import attention, attention_probabilities
from ...configuration import GPT2Config
from ...dropout import Dropout
from ...files import CheckpointError
from ...heads import (
    BaseModelOutputWithPooling,
    CausalLMOutput,
    Decoder,
    SequenceClassifierOutput,
    activation,
    classification_loss,
    in_dtype_of,
    language_model_loss,
    last_tokens,
    layout_of,
    next_tokens,
    sum_by_sequence,
    token_losses,
)
from ...layout import SequenceLayout
from ...pretrained import PreTrainedModel


class KeyValueCache(Protocol):
    """What generation puts in place of attention within the sequences of a layout."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keeps the keys and values of these tokens; returns their context, (*tokens, heads, d)."""
        ...


class Conv1D(nn.Module):
    """y = x W + b with W stored (in, out), as GPT-2's files have it. (The name is theirs.)"""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.nx}, out_features={self.nf}"


def linear(config: GPT2Config, name: str, inputs: int, outputs: int) -> nn.Module:
    """The dense layer `name`; a low-rank one where `config.lora_modules` names it."""
    if config.apply_lora and name in config.lora_modules:  # loralib is wired in here ...
        return lora.LINEAR_TYPES[config.lora_type](
            inputs,
            outputs,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            fan_in_fan_out=True,
        )
    return Conv1D(outputs, inputs)


def fused_linear(config: GPT2Config) -> nn.Module:
    """c_attn: query, key and value in one layer, each with low-rank factors of its own or none."""
    size, fused = config.hidden_size, 3 * config.attention_size
    if config.apply_lora and any(config.adapted_segments):  # ... and here, nowhere else
        return lora.MERGED_LINEAR_TYPES[config.lora_type](
            size,
            fused,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            enable_lora=config.adapted_segments,
            fan_in_fan_out=True,
        )
    return Conv1D(fused, size)


class GPT2Attention(nn.Module):
    """softmax(Q·Kᵀ / √d)·V in every head, over a token itself and those before it."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads = layer, config.num_attention_heads
        self.c_attn = fused_linear(config)
        self.c_proj = linear(config, "attn.c_proj", config.attention_size, config.hidden_size)
        self.c_proj.init_factor = 1.0 / math.sqrt(2 * config.n_layer)  # 2 n residuals are summed
        self.dropout_prob = config.attn_pdrop
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout | None,
        output_attentions: bool,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        fused = self.c_attn(hidden)  # (*tokens, 3 H)
        heads = (*hidden.shape[:-1], self.num_heads, -1)
        query, key, value = (x.reshape(heads) for x in fused.chunk(3, -1))  # (*tokens, heads, d)
        if cache is not None:
            context = cache.attend(self.layer, query, key, value)
        else:
            p = self.dropout_prob if self.training else 0.0
            context = attention(query, key, value, layout, p, causal=True)
        weights = None
        if output_attentions:
            weights = attention_probabilities(query, key, layout, causal=True)
        return self.resid_dropout(self.c_proj(context.flatten(-2))), weights


class GPT2MLP(nn.Module):
    """W₂·gelu(W₁·x)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = linear(config, "c_fc", config.hidden_size, config.intermediate_size)
        self.c_proj = linear(config, "mlp.c_proj", config.intermediate_size, config.hidden_size)
        self.c_proj.init_factor = 1.0 / math.sqrt(2 * config.n_layer)
        self.activation = activation(config.activation_function)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(hidden))))


class GPT2Block(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x))."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout | None,
        output_attentions: bool,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        context, weights = self.attn(self.ln_1(hidden), layout, output_attentions, cache)
        hidden = hidden + context
        return hidden + self.mlp(self.ln_2(hidden)), weights


class GPT2PreTrainedModel(PreTrainedModel):
    """Reads the files of Hugging Face, of OpenAI's model without its head, and Microsoft's."""

    config_class = GPT2Config
    base_model_prefix = "transformer"

    @classmethod
    def checkpoint_name(cls, key: str) -> str | None:
        """Removes `module.`, adds what is shortened, leaves out causal masks and index buffers.

        Raises:
            CheckpointError: The key is a GPT-2's, under a prefix that nobody writes: it would load
                nothing, and leave the model random.
        """
        name = key.removeprefix("module.")
        if re.search(r"(^|\.)attn\.(bias|masked_bias)$|\.lora_ind$", name):
            return None
        inside = r"(h\.\d+\.|wte\.|wpe\.|ln_f\.)"
        if not re.match(rf"(transformer\.)?{inside}", name) and re.search(rf"\.{inside}", name):
            prefix = re.match(rf"(.*?\.){inside}", key).group(1)
            raise CheckpointError(
                f"{key}: a GPT-2's weights begin with 'transformer.' or have no prefix, not "
                f"{prefix!r}; rename them in the file"
            )
        name = re.sub(r"\.[gw]$", ".weight", re.sub(r"\.b$", ".bias", name))
        return "lm_head.weight" if name == "lm_head.decoder.weight" else name


class GPT2Model(GPT2PreTrainedModel):
    """Word and position embeddings, the blocks, and a last LayerNorm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.n_positions, config.hidden_size)
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config.of_layer(i), i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.wte = embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        layout: SequenceLayout | None = None,  # a head that has made it passes it on
        cache: KeyValueCache | None = None,  # generation's; tokens are (T,) with position_ids
    ) -> BaseModelOutputWithPooling | tuple:
        if layout is None and cache is None:
            layout = layout_of(input_ids, inputs_embeds, attention_mask, cu_seqlens, max_seqlen)
        want_attentions = self.asked_for("output_attentions", output_attentions)
        want_states = self.asked_for("output_hidden_states", output_hidden_states)
        hidden = self.embed(layout, input_ids, token_type_ids, position_ids, inputs_embeds)
        hidden, states, attentions = self.run_blocks(
            hidden, layout, want_attentions, want_states, cache
        )
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden, hidden_states=states, attentions=attentions
        )
        return self.result(output, return_dict)

    def embed(
        self,
        layout: SequenceLayout | None,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """dropout(word + position), (*tokens, H); token types are words where they are given."""
        if position_ids is None:
            if layout.max_seqlen > self.wpe.num_embeddings:
                raise ValueError(
                    f"a sequence of {layout.max_seqlen} tokens is longer than this model's "
                    f"{self.wpe.num_embeddings} positions: truncate it"
                )
            position_ids = layout.position_ids()
        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden = hidden + self.wte(token_type_ids)
        return self.drop(hidden)

    def run_blocks(
        self,
        hidden: Tensor,
        layout: SequenceLayout | None,
        output_attentions: bool,
        output_states: bool,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """The last state after LayerNorm and, where asked, all states and attention weights."""
        states, attentions = [], []
        if self.training:
            hidden = layout.round_up_rows(hidden)
        for block in self.h:
            if output_states:
                states.append(layout.drop_filler(hidden))
            options = layout, output_attentions, cache
            if self.gradient_checkpointing and self.training:
                hidden, weights = checkpoint(block, hidden, *options, use_reentrant=False)
            else:
                hidden, weights = block(hidden, *options)
            attentions.append(weights)
        if layout is not None:
            hidden = layout.drop_filler(hidden)
        hidden = self.ln_f(hidden)
        return (
            hidden,
            (*states, hidden) if output_states else None,
            tuple(attentions) if output_attentions else None,
        )


class GPT2LMHeadModel(GPT2PreTrainedModel):
    """The next token; the head is the word embedding, unless untied."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = Decoder(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (*tokens), each token's own id; -100 is not scored
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        label_smoothing: float = 0.0,
        score_sequences: bool = False,
        output_scored_states: bool = False,
        return_loss: bool = True,
    ) -> CausalLMOutput | tuple:
        """Logits at every token or, with `labels`, their mean loss and no logits.

        With `score_sequences` logits are (B, 1), every sequence's log-probability of its labels,
        and there is no loss and no gradient.

        The model moves labels itself: every token is predicted from those before it, and the first
        one of a sequence from none, so that it is never scored. Logits are then formed at scored
        places only, a slice at a time (see `language_model_loss`). `output_scored_states` adds what
        they are formed of: the last hidden states at the N scored places, and the head; without
        `return_loss` no logits are formed, and labels only say the places.
        """
        layout = layout_of(input_ids, inputs_embeds, attention_mask, cu_seqlens, max_seqlen)
        tokens = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        asked = (output_attentions, output_hidden_states)
        outputs = self.transformer(*tokens, *asked, return_dict=True, layout=layout)
        hidden = outputs.last_hidden_state  # (*tokens, H)
        loss, logits, states = None, None, None
        if labels is None:
            logits = self.lm_head(hidden)  # (*tokens, vocabulary)
        else:
            targets = next_tokens(labels, layout).flatten()
            scored = (targets != -100).nonzero().flatten()  # (N,)
            rows = hidden.flatten(0, -2).index_select(0, scored)  # (N, H)
            weight, targets = self.lm_head.weight, targets[scored]
            states = (rows, weight) if output_scored_states else None
            if score_sequences:
                losses = token_losses(rows, weight, targets)  # (N,)
                logits = -sum_by_sequence(losses, scored, layout)[:, None]  # (B, 1)
            elif return_loss:
                loss = language_model_loss(rows, weight, targets, label_smoothing)
                loss = loss / max(1, len(scored))
        output = CausalLMOutput(loss=loss, logits=logits, scored_states=states, **outputs.traced())
        return self.result(output, return_dict)


class GPT2ForSequenceClassification(GPT2PreTrainedModel):
    """One or several labels, or one number, read from the last token of a sequence."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B,), or (B, num_labels) for several labels per row
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> SequenceClassifierOutput | tuple:
        layout = layout_of(input_ids, inputs_embeds, attention_mask, cu_seqlens, max_seqlen)
        tokens = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        asked = (output_attentions, output_hidden_states)
        outputs = self.transformer(*tokens, *asked, return_dict=True, layout=layout)
        real, pad = layout.key_mask, self.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            real = input_ids != pad
        last = last_tokens(outputs.last_hidden_state, layout, real)  # (B, H)
        logits = self.score(in_dtype_of(last, self.score))  # (B, num_labels)
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits, **outputs.traced())
        return self.result(output, return_dict)
