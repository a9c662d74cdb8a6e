"""The model card of a student that was distilled layer by layer."""

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..distill.training_args import CoLLDTrainingArguments

_BODY = """
# {layers}-layer {model_type} speech encoder, distilled layer by layer

A speech encoder of {parameters} M parameters, trained to copy the {teacher_layers} layers of `{teacher}`
({teacher_parameters} M parameters) on `{dataset}`, without transcripts. It has no head: fine-tune it, for speech
recognition for example with `{class_name}` and any of the heads that Transformers puts on top of it.

```python
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC

feature_extractor = AutoFeatureExtractor.from_pretrained("path/or/repository")
encoder = AutoModel.from_pretrained("path/or/repository")
to_fine_tune = AutoModelForCTC.from_pretrained("path/or/repository", vocab_size=len(tokenizer))
```

## How it was trained

CoLLD-style distillation, after [arXiv 2309.07707](https://arxiv.org/abs/2309.07707): the teacher hears the whole
utterance, the student one with masked spans, and at the masked frames each student layer predicts a teacher layer. The
paper's code is not public. That it is masked, contrastive, and layer to layer is published; the settings below are
inferred, from wav2vec 2.0 and from the first author's later USAD ([arXiv 2506.18843](https://arxiv.org/abs/2506.18843)),
or ours.

| setting | value |
| --- | --- |
| student layer: teacher layer (counted from 1) | {layer_map} |
| target | {target} |
| objective | {objective} |
| masking | spans of {mask_time_length} frames, probability {mask_time_prob} |
| training | {steps} steps of {batch} utterances, learning rate {learning_rate}, seed {seed} |
| held-out loss | {eval_loss} |

The heads that predicted are not part of this model. Nothing is known here about its error rate in any task: that is for
the fine-tuned model to show. Its teacher's licence, languages and biases apply.
"""
_TARGETS = {"ffn": "the teacher layer's feed-forward output", "hidden": "the teacher layer's output"}


def colld_card(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    teacher_name: str,
    dataset_name: str,
    args: CoLLDTrainingArguments,
    layer_map: dict[int, int],
    steps: int,
    eval_loss: float | None = None,
) -> ModelCard:
    """A short card, `ModelCard.save` writes it: what the student is, how to load it, and how it was trained.

    Args:
        layer_map: 0-based student layers to teacher layers, as in `CoLLDTrainer.layer_map`.
        steps: optimizer steps that were taken.
        eval_loss: of held-out speech, where there is any.
    """
    info_nce = (
        f"InfoNCE over cosine similarity / {args.contrastive_temperature:g}, up to {args.num_negatives} negatives from "
        "the masked frames of the utterance"
    )
    body = _BODY.format(
        layers=student.config.num_hidden_layers,
        model_type=student.config.model_type,
        class_name=type(student).__name__.replace("Model", "ForCTC"),
        parameters=f"{student.num_parameters() / 1e6:.2f}",
        teacher=teacher_name,
        teacher_layers=teacher.config.num_hidden_layers,
        teacher_parameters=f"{teacher.num_parameters() / 1e6:.2f}",
        dataset=dataset_name,
        layer_map=", ".join(f"{mine + 1}: {theirs + 1}" for mine, theirs in layer_map.items()),
        target=_TARGETS[args.distill_target],
        objective=info_nce if args.objective == "info_nce" else "L1 distance and cosine similarity (DistilHuBERT's)",
        mask_time_length=args.mask_time_length,
        mask_time_prob=f"{args.mask_time_prob:g}",
        steps=steps,
        batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate=f"{args.learning_rate:g}",
        seed=args.seed,
        eval_loss="not measured" if eval_loss is None else f"{eval_loss:.3f}",
    )
    data = ModelCardData(library_name="transformers", tags=["speech", "distillation", "colld-style", "hf_dld"])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
