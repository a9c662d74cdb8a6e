"""LoRA (arXiv 2106.09685) on a dynamic model: which modules it adapts, and the weights underneath as a teacher."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..models.modeling_dld import check_dynamic

ATTENTION_PROJECTIONS = {
    "dld_wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "dld_wav2vec2_conformer": ("linear_q", "linear_k", "linear_v", "linear_out"),
}


def lora_config(
    model: PreTrainedModel,
    r: int = 16,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> LoraConfig:
    """A `LoraConfig` that fits a dynamic model: `peft.get_peft_model(model, lora_config(model, r=16))`.

    Args:
        model: a dynamic model of `hf_dld.models`; it is only looked at.
        r: rank of the adapters, at least 1.
        lora_alpha: an adapter's output is scaled by `lora_alpha / r`; above 0, `2 * r` when None.
        lora_dropout: dropout on the adapters' input in training, 0 <= p < 1.
        target_modules: last parts of the names of the modules that are adapted; the attention's projections
            (`ATTENTION_PROJECTIONS`) when None.
        modules_to_save: modules that are trained whole and saved with the adapters, such as a new `"lm_head"`.

    Raises:
        TypeError: a model that is no dynamic one, whose attention's projections are not known.
        ValueError: a number out of its range, or a target that the model lacks.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"lora_r must be an integer of at least 1, the rank of the adapters; got {r!r}.")
    lora_alpha = 2 * r if lora_alpha is None else lora_alpha
    if lora_alpha <= 0:
        raise ValueError(f"lora_alpha must be above 0, else the adapters do nothing; got {lora_alpha}.")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must be at least 0 and below 1; got {lora_dropout}.")
    if target_modules is None:
        check_dynamic(model, with_head=False)
        target_modules = ATTENTION_PROJECTIONS[model.config.model_type]
    check_target_modules(model, target_modules)
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=list(target_modules),
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
    )


def check_target_modules(model: PreTrainedModel, target_modules: Sequence[str]) -> None:
    """Raise `ValueError` unless every name ends the name of a linear or convolutional module of the model.

    PEFT complains only when none of the names is found, so that a mistyped one would be left out in silence.
    """
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv1d)]
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    missing = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in modules)]
    if missing or not wanted:
        found = sorted({name.rpartition(".")[2] for name in modules if ".layers." in name})
        raise ValueError(
            f"lora_target_modules: {type(model).__name__} has no module called {', '.join(missing) or 'nothing'}; its "
            f"encoder layers have {', '.join(found)}."
        )


def check_base_teacher(model: nn.Module) -> None:
    """Raise `ValueError` unless the weights under the model's adapters can teach it: they are there and stay fixed."""
    if not isinstance(model, PeftModel):
        raise ValueError(
            f'teacher="base" is the student with its adapters off, and {type(model).__name__} has none: wrap it with '
            'peft.get_peft_model(model, hf_dld.lora_config(model)), or give a model or "self" as the teacher.'
        )
    with adapters_off(model):  # what still wants a gradient now does not belong to the adapters
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            'teacher="base" needs base weights that stay as they are, but training would change '
            f"{', '.join(trained[:3])}{', ...' if len(trained) > 3 else ''}: freeze them (bias='none' in the PEFT "
            "configuration), or train copies of their modules with modules_to_save."
        )


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """For the time being, `model` is its base model in eval mode; after that all modes and flags are as they were."""
    in_training = [module for module in model.modules() if module.training]
    # PEFT stops the gradients of what it turns off, and starts them again whether they were wanted or not
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for module in in_training:
        module.training = False
    try:
        with model.disable_adapter():
            yield
    finally:
        for module in in_training:
            module.training = True
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
