"""DeBERTa-v2 and v3, made to be edited: one class per screen, from the linear layer to the heads.

Module and parameter names are those of Hugging Face checkpoints, so that their weights load here
and these weights load there. Hidden states are (*tokens, H), where the tokens of a batch are
padded, (B, L), or packed without padding, (T,); a `SequenceLayout` knows which, and the same lines
serve both. Position enters through the scores of attention, see `disentangled.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loralib as lora
from loralib.block_sparse import BlockSparseLinear

from ...attention import attention, attention_probabilities
from ...configuration import ConfigError, DebertaV2Config
from ...dropout import Dropout
from ...heads import (
    BaseModelOutputWithPooling,
    Decoder,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    activation,
    choice_logits,
    classification_loss,
    first_tokens,
    flatten_choices,
    in_dtype_of,
    layout_of,
    masked_lm_loss,
    span_loss,
)
from ...layout import SequenceLayout
from ...pretrained import PreTrainedModel
from .disentangled import RelativePositions, disentangled_attention, disentangled_probabilities


def linear(config: DebertaV2Config, name: str, inputs: int, outputs: int) -> nn.Linear:
    """The dense layer `name`; a low-rank one where `config.lora_modules` names it."""
    names = (name,) if name.endswith("_proj") else (name, "dense")
    named = any(name in config.lora_modules for name in names)
    if config.apply_lora and named:  # loralib is wired in here, nowhere else
        return lora.LINEAR_TYPES[config.lora_type](
            inputs,
            outputs,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
        )
    if config.sparse_blocks is not None:
        return BlockSparseLinear(inputs, outputs, tuple(config.sparse_blocks))
    return nn.Linear(inputs, outputs)


class DebertaV2Embeddings(nn.Module):
    """LayerNorm(word + token type + position), the last two where the configuration has them.

    Padding becomes zero: the convolution of the largest models looks across the end of a sequence.
    """

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        size = config.embedding_size or config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = self.token_type_embeddings = self.embed_proj = None
        if config.position_biased_input:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        if size != config.hidden_size:
            self.embed_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        layout: SequenceLayout,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(self.positions(layout, position_ids))
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                hidden = hidden + self.token_type_embeddings.weight[0]  # all tokens are of type 0
            else:
                hidden = hidden + self.token_type_embeddings(token_type_ids)
        if self.embed_proj is not None:
            hidden = self.embed_proj(hidden)
        return self.dropout(clear_padding(self.LayerNorm(hidden), layout))  # (*tokens, H)

    def positions(self, layout: SequenceLayout, position_ids: Tensor | None) -> Tensor:
        """Position ids: those given, or (1, L) or (T,) counted from 0 in every sequence."""
        if position_ids is not None:
            return position_ids
        if layout.max_seqlen > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"a sequence of {layout.max_seqlen} tokens is longer than this model's "
                f"{self.position_embeddings.num_embeddings} positions: truncate it"
            )
        return layout.position_ids()


def clear_padding(hidden: Tensor, layout: SequenceLayout) -> Tensor:
    """Zeroes the padding of a rectangle; packed tokens have none."""
    if layout.is_packed or layout.key_mask is None:
        return hidden
    return hidden * layout.key_mask[..., None]


class DisentangledSelfAttention(nn.Module):
    """softmax(s·(content·content + content·position + position·content))·V in every head.

    Relative positions are projected by the keys' and queries' own layers (`share_att_key`, as in
    the published v2 and v3), or by layers of their own.
    """

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        size, width, terms = config.hidden_size, config.attention_size, config.position_terms
        self.num_heads = config.num_attention_heads
        self.query_proj = linear(config, "query_proj", size, width)
        self.key_proj = linear(config, "key_proj", size, width)
        self.value_proj = linear(config, "value_proj", size, width)
        self.share_att_key = config.share_att_key
        self.c2p = config.relative_attention and "c2p" in terms
        self.p2c = config.relative_attention and "p2c" in terms
        pos_key, pos_query = "key_proj", "query_proj"
        if not self.share_att_key:
            pos_key, pos_query = "pos_key_proj", "pos_query_proj"
            self.pos_key_proj = nn.Linear(size, width) if self.c2p else None
            self.pos_query_proj = nn.Linear(size, width) if self.p2c else None
        # what evaluates several models in one batch must know (see `loralib.can_batch_ranks`)
        self.shared_row_layers = (pos_key,) * self.c2p + (pos_query,) * self.p2c
        self.terms = 1 + len(terms)  # counted with and without relative attention
        self.scale = 1.0 / math.sqrt(config.head_size * self.terms)
        self.pos_dropout = Dropout(config.hidden_dropout_prob)
        self.dropout_prob = config.attention_probs_dropout_prob

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        positions: RelativePositions | None,
        table: Tensor | None,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden.shape[:-1], self.num_heads, -1)
        query = self.query_proj(hidden).view(heads)  # (*tokens, heads, d)
        key = self.key_proj(hidden).view(heads)
        value = self.value_proj(hidden).view(heads)
        p = self.dropout_prob if self.training else 0.0
        if not (self.c2p or self.p2c):
            query = query * self.terms**-0.5
            context = attention(query, key, value, layout, p).flatten(-2)
            weights = attention_probabilities(query, key, layout) if output_attentions else None
            return context, weights
        scores_from = query, key, *self.project(self.pos_dropout(table)), positions, layout
        query, key, *rest = scores_from
        context = disentangled_attention(query, key, value, *rest, self.scale, p)
        weights = None
        if output_attentions:
            weights = disentangled_probabilities(*scores_from, self.scale)
        return context.flatten(-2), weights  # (*tokens, H)

    def project(self, table: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The keys and the queries (rows, heads, d) of relative positions (rows, H)."""
        heads = (len(table), self.num_heads, -1)
        pos_key = pos_query = None
        if self.c2p:
            project = self.key_proj if self.share_att_key else self.pos_key_proj
            pos_key = project(table).view(heads)
        if self.p2c:
            project = self.query_proj if self.share_att_key else self.pos_query_proj
            pos_query = project(table).view(heads)
        return pos_key, pos_query


class DebertaV2SelfOutput(nn.Module):
    """LayerNorm(residual + dropout(W·x)) after attention."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.dense = linear(config, "attention.output", config.attention_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, context: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(context)) + residual)


class DebertaV2Attention(nn.Module):
    """Self-attention with its output layer."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.self = DisentangledSelfAttention(config)
        self.output = DebertaV2SelfOutput(config)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        positions: RelativePositions | None,
        table: Tensor | None,
        output_attentions: bool,
        first_only: bool,
    ) -> tuple[Tensor, Tensor | None]:
        context, weights = self.self(hidden, layout, positions, table, output_attentions)
        if first_only:
            context, hidden = first_tokens(context, layout), first_tokens(hidden, layout)  # (B, H)
        return self.output(context, hidden), weights


class DebertaV2Intermediate(nn.Module):
    """The widening half of the feed-forward block, with its activation."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.dense = linear(config, "intermediate", config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))  # (*tokens, intermediate)


class DebertaV2Output(nn.Module):
    """LayerNorm(residual + dropout(W·x)), the narrowing half of the feed-forward block."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.dense = linear(config, "output", config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, wide: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(wide)) + residual)


class DebertaV2Layer(nn.Module):
    """Attention, then feed-forward, each with its residual and LayerNorm.

    With `first_only` what follows attention is computed for the first token of every sequence
    alone, and (B, H) is returned: of the last layer a classifier reads nothing else.
    """

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.attention = DebertaV2Attention(config)
        self.intermediate = DebertaV2Intermediate(config)
        self.output = DebertaV2Output(config)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        positions: RelativePositions | None,
        table: Tensor | None,
        output_attentions: bool,
        first_only: bool,
    ) -> tuple[Tensor, Tensor | None]:
        hidden, weights = self.attention(
            hidden, layout, positions, table, output_attentions, first_only
        )
        return self.output(self.intermediate(hidden), hidden), weights


class ConvLayer(nn.Module):
    """LayerNorm(hidden + activation(conv(embeddings))), after the first layer."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        size, kernel = config.hidden_size, config.conv_kernel_size
        self.conv = nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=config.conv_groups)
        self.activation = activation(config.conv_act)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, embedded: Tensor, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        """
        Args:
            embedded: (*tokens, H), zero at padding; every sequence is convolved on its own.
            hidden: (*tokens, H), the output of the first layer.
        """
        local = self.conv(layout.pad(embedded).transpose(1, 2)).transpose(1, 2)  # (B, L, H)
        local = layout.unpad(local)
        local = layout.round_up_rows(local) if len(local) != len(hidden) else local
        local = self.activation(self.dropout(local))
        return clear_padding(self.LayerNorm(hidden + local), layout)


class DebertaV2Encoder(nn.Module):
    """The stack of layers, and the table of relative positions that they share."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.layer = nn.ModuleList(DebertaV2Layer(config.of_layer(i)) for i in layers)
        self.rel_embeddings = self.LayerNorm = self.conv = None
        if config.relative_attention:
            self.buckets, self.max_distance = config.position_buckets, config.max_distance
            rows = 2 * (self.buckets if self.buckets > 0 else self.max_distance)
            self.rel_embeddings = nn.Embedding(rows, config.hidden_size)
        if config.norms_relative_embeddings:
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.conv_kernel_size:
            self.conv = ConvLayer(config)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        output_attentions: bool,
        output_states: bool,
        first_only: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        states, attentions, embedded = [hidden], [], hidden
        if self.training:
            hidden = layout.round_up_rows(hidden)
        places = layout, *self.relative_positions(layout)
        for i, layer in enumerate(self.layer):
            convolve = i == 0 and self.conv is not None  # which reads all tokens of the first layer
            last = layer is self.layer[-1] and not convolve
            options = *places, output_attentions, first_only and last
            if self.gradient_checkpointing and self.training:
                hidden, weights = checkpoint(layer, hidden, *options, use_reentrant=False)
            else:
                hidden, weights = layer(hidden, *options)
            if convolve:
                hidden = self.conv(embedded, hidden, layout)
            if output_states:
                states.append(layout.drop_filler(hidden))
            attentions.append(weights)
        return (
            layout.drop_filler(hidden),
            tuple(states) if output_states else None,
            tuple(attentions) if output_attentions else None,
        )

    def relative_positions(
        self, layout: SequenceLayout
    ) -> tuple[RelativePositions | None, Tensor | None]:
        """What every layer reads: which row belongs to which i - j, and the rows in use (W, H)."""
        if self.rel_embeddings is None:
            return None, None
        positions = RelativePositions(
            layout.max_seqlen, self.buckets, self.max_distance, layout.device
        )
        table = self.rel_embeddings.weight[positions.first : positions.last]
        return positions, table if self.LayerNorm is None else self.LayerNorm(table)


class ContextPooler(nn.Module):
    """activation(W·dropout(x)) of the first token of every sequence."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.pooler_dropout)
        self.activation = activation(config.pooler_hidden_act)

    def forward(self, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        first = in_dtype_of(first_tokens(hidden, layout), self.dense)
        return self.activation(self.dense(self.dropout(first)))  # (B, H)


class DebertaV2PreTrainedModel(PreTrainedModel):
    config_class = DebertaV2Config
    base_model_prefix = "deberta"


class DebertaV2Model(DebertaV2PreTrainedModel):
    """Embeddings and encoder; what pools is part of the heads."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        self.embeddings = DebertaV2Embeddings(config)
        self.encoder = DebertaV2Encoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.embeddings.word_embeddings = embeddings

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
        first_only: bool = False,  # the head reads first tokens only: last_hidden_state is (B, H)
    ) -> BaseModelOutputWithPooling | tuple:
        if layout is None:
            layout = layout_of(input_ids, inputs_embeds, attention_mask, cu_seqlens, max_seqlen)
        want_attentions = self.asked_for("output_attentions", output_attentions)
        want_states = self.asked_for("output_hidden_states", output_hidden_states)
        hidden = self.embeddings(layout, input_ids, token_type_ids, position_ids, inputs_embeds)
        hidden, states, attentions = self.encoder(
            hidden, layout, want_attentions, want_states, first_only and not want_states
        )
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden, hidden_states=states, attentions=attentions
        )
        return self.result(output, return_dict)


class DebertaV2ForSequenceClassification(DebertaV2PreTrainedModel):
    """One or several labels, or one number, for a sequence or a pair of them.

    Labels (B, num_labels) mean several labels per row, as for the other models here; Transformers
    takes them for the probabilities of one label, where no `problem_type` is set.
    """

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        self.deberta = DebertaV2Model(config)
        self.pooler = ContextPooler(config)
        self.dropout = Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
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
        outputs = self.deberta(*tokens, *asked, return_dict=True, layout=layout, first_only=True)
        pooled = self.dropout(self.pooler(outputs.last_hidden_state, layout))
        logits = self.classifier(in_dtype_of(pooled, self.classifier))  # (B, num_labels)
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits, **outputs.traced())
        return self.result(output, return_dict)


class DebertaV2ForQuestionAnswering(DebertaV2PreTrainedModel):
    """The start and the end of the answer among the tokens."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        self.deberta = DebertaV2Model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,  # (B,) relative to each sequence
        end_positions: Tensor | None = None,  # (B,)
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> QuestionAnsweringModelOutput | tuple:
        layout = layout_of(input_ids, inputs_embeds, attention_mask, cu_seqlens, max_seqlen)
        tokens = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        asked = (output_attentions, output_hidden_states)
        outputs = self.deberta(*tokens, *asked, return_dict=True, layout=layout)
        hidden = in_dtype_of(outputs.last_hidden_state, self.qa_outputs)
        start, end = self.qa_outputs(hidden).unbind(-1)  # (*tokens) each
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions, layout)
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, **outputs.traced()
        )
        return self.result(output, return_dict)


class DebertaV2ForMultipleChoice(DebertaV2PreTrainedModel):
    """A score for every choice; the choices of a question are sequences one after the other."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        self.deberta = DebertaV2Model(config)
        self.pooler = ContextPooler(config)
        self.dropout = Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, choices, L); with counts (S, L); or packed (T,)
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (B,)
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        num_choices: int | None = None,  # of a packed call without labels; the most of the counts
        choice_counts: Tensor | None = None,  # (Q,), where questions differ in their choices
    ) -> MultipleChoiceModelOutput | tuple:
        tokens = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if cu_seqlens is None and choice_counts is None:
            num_choices, tokens = flatten_choices(*tokens)
            input_ids, attention_mask, _, _, inputs_embeds = tokens
        layout = layout_of(input_ids, inputs_embeds, attention_mask, cu_seqlens, max_seqlen)
        asked = (output_attentions, output_hidden_states)
        outputs = self.deberta(*tokens, *asked, return_dict=True, layout=layout, first_only=True)
        pooled = self.dropout(self.pooler(outputs.last_hidden_state, layout))
        scores = self.classifier(in_dtype_of(pooled, self.classifier))
        logits = choice_logits(scores, layout, labels, num_choices, choice_counts)  # (Q, choices)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        output = MultipleChoiceModelOutput(loss=loss, logits=logits, **outputs.traced())
        return self.result(output, return_dict)


class LegacyDebertaV2PredictionHeadTransform(nn.Module):
    """LayerNorm(activation(W·x)) before the decoder."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        size = config.embedding_size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, size)
        self.activation = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.activation(self.dense(in_dtype_of(hidden, self.dense))))


class LegacyDebertaV2LMPredictionHead(nn.Module):
    """A score for every word of the vocabulary at every token, by a decoder of its own name."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.transform = LegacyDebertaV2PredictionHeadTransform(config)
        self.decoder = Decoder(config.embedding_size or config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # the decoder's, by its old name

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))


class LegacyDebertaV2OnlyMLMHead(nn.Module):
    """Holds the head under the name it has in checkpoints."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.predictions = LegacyDebertaV2LMPredictionHead(config)

    def forward(self, hidden: Tensor, words: nn.Embedding) -> Tensor:
        return self.predictions(hidden)


class DebertaV2LMPredictionHead(nn.Module):
    """A score for every word of the vocabulary at every token, by the word embedding itself.

    This is the head that DeBERTa was pretrained with.
    """

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: nn.Embedding) -> Tensor:
        hidden = self.LayerNorm(self.activation(self.dense(in_dtype_of(hidden, self.dense))))
        logits = F.linear(hidden.to(words.weight.dtype), words.weight)
        return logits.to(hidden.dtype) + self.bias


class DebertaV2OnlyMLMHead(nn.Module):
    """Holds the head under the name it has in checkpoints."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.lm_head = DebertaV2LMPredictionHead(config)

    def forward(self, hidden: Tensor, words: nn.Embedding) -> Tensor:
        return self.lm_head(hidden, words)


class DebertaV2ForMaskedLM(DebertaV2PreTrainedModel):
    """The words behind [MASK].

    `config.legacy` chooses the head: Transformers' first one (the default, `cls`), or the one that
    the published v3 checkpoints hold (`lm_predictions`).
    """

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        self.deberta = DebertaV2Model(config)
        if config.legacy:
            self.cls = LegacyDebertaV2OnlyMLMHead(config)
        elif config.embedding_size not in (None, config.hidden_size):
            raise ConfigError(
                f"embedding_size {config.embedding_size} with hidden_size {config.hidden_size} "
                "needs the masked LM head of legacy=True: the other one multiplies hidden states "
                "with the word embedding"
            )
        else:
            self.lm_predictions = DebertaV2OnlyMLMHead(config)
        self.post_init()

    def _tied(self) -> dict[str, str]:
        return super()._tied() if self.config.legacy else {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,  # (*tokens), -100 where nothing is asked
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> MaskedLMOutput | tuple:
        layout = layout_of(input_ids, inputs_embeds, attention_mask, cu_seqlens, max_seqlen)
        tokens = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        asked = (output_attentions, output_hidden_states)
        outputs = self.deberta(*tokens, *asked, return_dict=True, layout=layout)
        head = self.cls if self.config.legacy else self.lm_predictions
        words = self.get_input_embeddings()
        logits = head(outputs.last_hidden_state, words)  # (*tokens, vocabulary)
        loss = None if labels is None else masked_lm_loss(logits, labels)
        output = MaskedLMOutput(loss=loss, logits=logits, **outputs.traced())
        return self.result(output, return_dict)
