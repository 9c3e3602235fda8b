"""`PeftModelFor…`: one class per task type, with the task's arguments spelled out.

Hugging Face's `Trainer` keeps the dataset columns that `forward` names, so the names must be there;
arguments that are not given are not passed on, so a model need not know them all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .config import TaskType
from .peft_model import PeftModel, for_task

CLASSIFIER_NAMES = ("classifier", "score")
SPAN_HEAD_NAMES = ("qa_outputs",)
HEAD_NAMES = CLASSIFIER_NAMES + SPAN_HEAD_NAMES  # what task heads are called: trained in full


def _given(**values: Any) -> dict[str, Any]:
    """The arguments that were given; a model need not know the others."""
    return {name: value for name, value in values.items() if value is not None}


class _EncoderTask(PeftModel):
    """The tasks of encoders: models that take token, mask, segment and label tensors."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model; `labels` add a loss, `cu_seqlens`, `max_seqlen` mark a packed batch."""
        return super().forward(
            **_given(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                labels=labels,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
            ),
            **kwargs,
        )


@for_task(TaskType.SEQ_CLS)
class PeftModelForSequenceClassification(_EncoderTask):
    """Adapters for classifying sequences; the head (`classifier` or `score`) trains along."""

    head_names = CLASSIFIER_NAMES


@for_task(TaskType.TOKEN_CLS)
class PeftModelForTokenClassification(_EncoderTask):
    """Adapters for classifying tokens; the head (`classifier` or `score`) trains along."""

    head_names = CLASSIFIER_NAMES


@for_task(TaskType.CAUSAL_LM)
class PeftModelForCausalLM(_EncoderTask):
    """Adapters for models that continue a text."""


@for_task(TaskType.QUESTION_ANS)
class PeftModelForQuestionAnswering(PeftModel):
    """Adapters for finding answer spans; the head (`qa_outputs`) trains along."""

    head_names = SPAN_HEAD_NAMES

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model; positions add a loss, `cu_seqlens` marks a packed batch."""
        return super().forward(
            **_given(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                start_positions=start_positions,
                end_positions=end_positions,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
            ),
            **kwargs,
        )


@for_task(TaskType.SEQ_2_SEQ_LM)
class PeftModelForSeq2SeqLM(PeftModel):
    """Adapters for encoder-decoder models."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model; `labels` add a loss."""
        return super().forward(
            **_given(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                decoder_inputs_embeds=decoder_inputs_embeds,
                labels=labels,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
            ),
            **kwargs,
        )


@for_task(TaskType.FEATURE_EXTRACTION)
class PeftModelForFeatureExtraction(_EncoderTask):
    """Adapters for models used for their hidden states."""
