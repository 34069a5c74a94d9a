"""The compact form for transformers: ``from_pretrained(..., subfolder="sparse")`` opens it once sparse_ft is imported.

transformers calls whatever turns stored tensors into weights a quantizer, and finds it by the ``quant_method`` of
config.json. Ours only loads: the model that comes out is an ordinary one, which any Trainer takes and which saves
itself in dense layout.

Imported by `sparse_ft` in the middle of transformers' own import, hence nothing of either at the top but base classes.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.getLogger(__name__)

QUANT_METHOD = "sparse_ft"
HINT = "call sparse_ft.convert(model, batch) with a batch of yours"


@register_quantization_config(QUANT_METHOD)
class SparseConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of ``sparse/config.json``; it says nothing that the weights file does not."""

    def __init__(self, **entries: Any):
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' enum has its own methods only
        self.sparsity = entries.get("sparsity")


@register_quantizer(QUANT_METHOD)
class CompactLoader(HfQuantizer):
    """Turns values and positions into dense weights, and at the end pruned layers into native ones."""

    serialized_names = {"weight": ["weight", "weight.gaps", "weight.bitmap"]}

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.masks: dict[str, Tensor] = {}  # that the zeros of the weights do not tell

    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        from sparse_ft.hub.compact import read_index
        from sparse_ft.hub.header import open_safetensors, tensor_headers

        for path in checkpoint_files or ():
            with open_safetensors(path) as file:
                read_index(path, file.metadata(), tensor_headers(file))  # refuses what it cannot read
        return model

    def get_load_operations(self) -> dict[str, Any]:
        from transformers.core_model_loading import ConversionOps

        class Unpack(ConversionOps):
            """Dense weight of one layer; the masks are left with the quantizer."""

            def __init__(self, hf_quantizer: CompactLoader):
                self.hf_quantizer = hf_quantizer

            def __deepcopy__(self, memo: Any) -> "Unpack":
                return self  # transformers copies it for each weight, but the masks belong into one place

            def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
                tensors = {pattern: found[0] for pattern, found in input_dict.items()}
                weight = self.hf_quantizer.unpacked(kwargs["full_layer_name"], tensors, kwargs["model"])
                return {target_patterns[0]: [weight]}

            @property
            def reverse_op(self) -> ConversionOps:
                from transformers.core_model_loading import _IdentityOp

                return _IdentityOp()

        return {"deserialize": Unpack}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return None if param.get_dtype() == "U8" else dtype

    def unpacked(self, name: str, tensors: dict[str, Tensor], model: Any) -> Tensor:
        """The dense weight `name` of `model`, from what the file holds for it.

        Raises:
            ValueError: Its positions are missing or do not fit it.
        """
        from sparse_ft.hub.compact import dense_weight

        values = tensors["weight"]
        positions = [tensors[each] for each in ("weight.gaps", "weight.bitmap") if each in tensors]
        if not positions:
            return values  # a weight that is stored as it is
        shape = tuple(model.get_parameter(name).shape)
        weight, mask = dense_weight(values, positions[0], shape, values.dtype, is_gaps="weight.gaps" in tensors)
        if mask is not None:
            self.masks[name] = mask
        return weight

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        from sparse_ft.conversion import convert

        self.remove_quantization_config(model)
        try:
            convert(model, masks=self.masks)
        except Exception as error:  # whatever a model raises that does not take the inputs it names as its own
            reason = str(error).partition("\n")[0]
            logger.warning("every layer is left dense, for the model could not be timed (%s): %s", reason, HINT)
        return model
