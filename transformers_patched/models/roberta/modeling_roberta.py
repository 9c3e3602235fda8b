"""RoBERTa, made to be edited: one class per screen, from the linear layer at the top to the heads.

Module and parameter names are those of Hugging Face checkpoints, so that their weights load here
and these weights load there. Hidden states are (*tokens, H), where the tokens of a batch are
padded, (B, L), or packed without padding, (T,); a `SequenceLayout` knows which, and the same lines
serve both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loralib as lora
from loralib.block_sparse import BlockSparseLinear

from ...attention import attention, attention_probabilities
from ...configuration import RobertaConfig
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


def linear(config: RobertaConfig, name: str, inputs: int, outputs: int) -> nn.Linear:
    """The dense layer `name`; a low-rank one where `config.lora_modules` names it."""
    if config.apply_lora and name in config.lora_modules:  # loralib is wired in here, nowhere else
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


class RobertaEmbeddings(nn.Module):
    """LayerNorm(word + token type + position), then dropout.

    Real tokens have the positions pad + 1, pad + 2, ... in their sequence, and padding has pad.
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        size, self.padding_idx = config.hidden_size, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=self.padding_idx)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, size, padding_idx=self.padding_idx
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        layout: SequenceLayout,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        if position_ids is None:
            position_ids = self.positions(layout, input_ids)
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]  # (H,): all tokens are of type 0
        else:
            types = self.token_type_embeddings(token_type_ids)
        hidden = words + types + self.position_embeddings(position_ids)  # (*tokens, H)
        return self.dropout(self.LayerNorm(hidden))

    def positions(self, layout: SequenceLayout, input_ids: Tensor | None) -> Tensor:
        """Position ids (*tokens): counted over tokens that are no padding."""
        room = self.position_embeddings.num_embeddings - self.padding_idx - 1
        if layout.max_seqlen > room and (layout.is_packed or layout.key_mask is None):
            raise ValueError(
                f"a sequence of {layout.max_seqlen} tokens is longer than this model's {room} "
                "positions: truncate it"
            )
        if input_ids is None:
            return layout.position_ids(self.padding_idx + 1)
        real = (input_ids != self.padding_idx).long()  # (*tokens)
        count = real.cumsum(-1)  # over the row, or over all packed sequences
        if layout.is_packed:
            starts = layout.cls_index()  # (B,)
            # less what was counted before the first token of each sequence
            count = count - (count - real)[starts][layout.sequence_ids()]
        return count * real + self.padding_idx


class RobertaSelfAttention(nn.Module):
    """softmax(Q·Kᵀ / √d)·V in every head, over the tokens of one sequence."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        size, width = config.hidden_size, config.attention_size
        self.num_heads = config.num_attention_heads
        self.query = linear(config, "query", size, width)
        self.key = linear(config, "key", size, width)
        self.value = linear(config, "value", size, width)
        self.dropout_prob = config.attention_probs_dropout_prob

    def forward(
        self, hidden: Tensor, layout: SequenceLayout, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden.shape[:-1], self.num_heads, -1)
        query = self.query(hidden).view(heads)  # (*tokens, heads, d)
        key = self.key(hidden).view(heads)
        value = self.value(hidden).view(heads)
        p = self.dropout_prob if self.training else 0.0
        context = attention(query, key, value, layout, p).flatten(-2)  # (*tokens, H)
        weights = attention_probabilities(query, key, layout) if output_attentions else None
        return context, weights


class RobertaSelfOutput(nn.Module):
    """LayerNorm(residual + dropout(W·x)) after attention."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = linear(config, "attention.output", config.attention_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, context: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(context)) + residual)


class RobertaAttention(nn.Module):
    """Self-attention with its output layer."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.self = RobertaSelfAttention(config)
        self.output = RobertaSelfOutput(config)

    def forward(
        self, hidden: Tensor, layout: SequenceLayout, output_attentions: bool, first_only: bool
    ) -> tuple[Tensor, Tensor | None]:
        context, weights = self.self(hidden, layout, output_attentions)
        if first_only:
            context, hidden = first_tokens(context, layout), first_tokens(hidden, layout)  # (B, H)
        return self.output(context, hidden), weights


class RobertaIntermediate(nn.Module):
    """The widening half of the feed-forward block, with its activation."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = linear(config, "intermediate", config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden))  # (*tokens, intermediate)


class RobertaOutput(nn.Module):
    """LayerNorm(residual + dropout(W·x)), the narrowing half of the feed-forward block."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = linear(config, "output", config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, wide: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(wide)) + residual)


class RobertaLayer(nn.Module):
    """Attention, then feed-forward, each with its residual and LayerNorm.

    With `first_only` what follows attention is computed for the first token of every sequence
    alone, and (B, H) is returned: of the last layer a classifier reads nothing else.
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.attention = RobertaAttention(config)
        self.intermediate = RobertaIntermediate(config)
        self.output = RobertaOutput(config)

    def forward(
        self, hidden: Tensor, layout: SequenceLayout, output_attentions: bool, first_only: bool
    ) -> tuple[Tensor, Tensor | None]:
        hidden, weights = self.attention(hidden, layout, output_attentions, first_only)
        return self.output(self.intermediate(hidden), hidden), weights


class RobertaEncoder(nn.Module):
    """The stack of layers; returns the last state and, where asked, all states and weights."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.layer = nn.ModuleList(RobertaLayer(config.of_layer(i)) for i in layers)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        output_attentions: bool,
        output_states: bool,
        first_only: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        states, attentions = [hidden], []
        if self.training:
            hidden = layout.round_up_rows(hidden)
        for layer in self.layer:
            options = layout, output_attentions, first_only and layer is self.layer[-1]
            if self.gradient_checkpointing and self.training:
                hidden, weights = checkpoint(layer, hidden, *options, use_reentrant=False)
            else:
                hidden, weights = layer(hidden, *options)
            if output_states:
                states.append(layout.drop_filler(hidden))
            attentions.append(weights)
        return (
            layout.drop_filler(hidden),
            tuple(states) if output_states else None,
            tuple(attentions) if output_attentions else None,
        )


class RobertaPooler(nn.Module):
    """tanh(W·x) of the first token of every sequence."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        first = in_dtype_of(first_tokens(hidden, layout), self.dense)
        return torch.tanh(self.dense(first))  # (B, H)


class RobertaPreTrainedModel(PreTrainedModel):
    config_class = RobertaConfig
    base_model_prefix = "roberta"


class RobertaModel(RobertaPreTrainedModel):
    """Embeddings, encoder and, unless `add_pooling_layer=False`, the pooler."""

    def __init__(self, config: RobertaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = RobertaEmbeddings(config)
        self.encoder = RobertaEncoder(config)
        self.pooler = RobertaPooler(config) if add_pooling_layer else None
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
            last_hidden_state=hidden,
            pooler_output=None if self.pooler is None else self.pooler(hidden, layout),
            hidden_states=states,
            attentions=attentions,
        )
        return self.result(output, return_dict)


class RobertaClassificationHead(nn.Module):
    """W₂·tanh(W₁·x) of the first token of every sequence, each after dropout."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.head_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden: Tensor, layout: SequenceLayout) -> Tensor:
        first = self.dropout(in_dtype_of(first_tokens(hidden, layout), self.dense))
        return self.out_proj(self.dropout(torch.tanh(self.dense(first))))  # (B, num_labels)


class RobertaForSequenceClassification(RobertaPreTrainedModel):
    """One or several labels, or one number, for a sequence or a pair of them."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)
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
        outputs = self.roberta(*tokens, *asked, return_dict=True, layout=layout, first_only=True)
        logits = self.classifier(outputs.last_hidden_state, layout)  # (B, num_labels)
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits, **outputs.traced())
        return self.result(output, return_dict)


class RobertaForQuestionAnswering(RobertaPreTrainedModel):
    """The start and the end of the answer among the tokens."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=False)
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
        outputs = self.roberta(*tokens, *asked, return_dict=True, layout=layout)
        hidden = in_dtype_of(outputs.last_hidden_state, self.qa_outputs)
        start, end = self.qa_outputs(hidden).unbind(-1)  # (*tokens) each
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions, layout)
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, **outputs.traced()
        )
        return self.result(output, return_dict)


class RobertaForMultipleChoice(RobertaPreTrainedModel):
    """A score for every choice; the choices of a question are sequences one after the other."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.roberta = RobertaModel(config)
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
        outputs = self.roberta(*tokens, *asked, return_dict=True, layout=layout, first_only=True)
        pooled = self.dropout(in_dtype_of(outputs.pooler_output, self.classifier))
        scores = self.classifier(pooled)  # (S, 1)
        logits = choice_logits(scores, layout, labels, num_choices, choice_counts)  # (Q, choices)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        output = MultipleChoiceModelOutput(loss=loss, logits=logits, **outputs.traced())
        return self.result(output, return_dict)


class RobertaLMHead(nn.Module):
    """A score for every word of the vocabulary at every token."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = Decoder(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # the decoder's, by its old name

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.layer_norm(F.gelu(self.dense(in_dtype_of(hidden, self.dense))))
        return self.decoder(hidden)


class RobertaForMaskedLM(RobertaPreTrainedModel):
    """The words behind [MASK]; the decoder is the word embedding, unless untied."""

    _tied_weights_keys = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.lm_head = RobertaLMHead(config)
        self.post_init()

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
        outputs = self.roberta(*tokens, *asked, return_dict=True, layout=layout)
        logits = self.lm_head(outputs.last_hidden_state)  # (*tokens, vocabulary)
        loss = None if labels is None else masked_lm_loss(logits, labels)
        output = MaskedLMOutput(loss=loss, logits=logits, **outputs.traced())
        return self.result(output, return_dict)
