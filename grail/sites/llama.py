"""Sites of the Llama shape: Llama and SmolLM, Mistral, Qwen2, Qwen3, with grouped queries.

    mlp      gate_proj, up_proj  ─► act(gate)·up [intermediate]  ─► down_proj
    heads    q_proj, k_proj, v_proj ─► attention [heads·head_dim] ─► o_proj

All layers get the same widths, since the configuration holds one number for all: stock transformers
then reloads them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from grail.errors import InputError, ModelError
from grail.reduction import Reduction, Selection
from grail.sites.site import Architecture, Site, narrow_linear
from grail.transaction import Transaction
from grail.width import ChannelWidth, HeadWidth, Width

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def architecture(model: nn.Module) -> "LlamaArchitecture":
    """The blocks of a `…ForCausalLM` or bare `…Model` of the family.

    Raises:
        ModelError: a layer that is missing or is no plain floating-point `nn.Linear` (quantised,
            adapted, sharded).
    """
    decoder: Any = getattr(model, "model", model)
    prefix = "model.layers" if decoder is not model else "layers"
    for number, layer in enumerate(decoder.layers):
        for name in _LINEARS:
            linear = layer.get_submodule(name)
            if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
                raise ModelError(
                    f"{prefix}.{number}.{name} is a {type(linear).__name__}, not a plain "
                    "floating-point Linear; load the model without quantisation or adapters"
                )
    return LlamaArchitecture(model, list(decoder.layers), prefix)


class LlamaArchitecture(Architecture):
    """The blocks of a Llama-shaped decoder."""

    kinds = ("heads", "mlp")

    def __init__(self, model: Any, blocks: list[nn.Module], prefix: str):
        self.config, self.blocks, self.prefix = model.config, blocks, prefix
        self.name = model.config._name_or_path or type(model).__name__
        self.hidden_size = model.config.hidden_size
        # The MLP is the widest point: gate, its activation, up and their product beside three
        # hidden states.
        self.activations_per_token = 4 * model.config.intermediate_size + 3 * self.hidden_size

    def sites(self, kinds: Sequence[str]) -> list[list[Site]]:
        unknown = [kind for kind in kinds if kind not in self.kinds]
        if unknown or not kinds:
            raise InputError(
                f"sites must be one or more of {', '.join(self.kinds)}; "
                f"got {', '.join(unknown) or 'none'}"
            )
        return [
            [self._site(kind, number, block) for kind in self.kinds if kind in kinds]
            for number, block in enumerate(self.blocks)
        ]

    def settle(self, widths: dict[str, Width], transaction: Transaction) -> None:
        for width in widths.values():
            if isinstance(width, HeadWidth):
                for name, value in _head_settings(width).items():
                    transaction.set_attribute(self.config, name, value)
            else:
                transaction.set_attribute(self.config, "intermediate_size", width.kept)

    def _site(self, kind: str, number: int, block: Any) -> Site:
        attention, mlp = block.self_attn, block.mlp
        if kind == "mlp":
            return MlpSite(
                f"{self.prefix}.{number}.mlp",
                kind,
                number,
                mlp.down_proj,
                (attention,),
                None,
                mlp,
            )
        name = f"{self.prefix}.{number}.self_attn"
        after = block.post_attention_layernorm
        return HeadSite(name, kind, number, attention.o_proj, (), after, attention, self.config)


@dataclass(frozen=True, eq=False)
class MlpSite(Site):
    """Intermediate channels of a gated MLP."""

    mlp: Any

    def linears(self) -> dict[str, nn.Linear]:
        return {n: getattr(self.mlp, n) for n in ("gate_proj", "up_proj", "down_proj")}

    def producers(self) -> tuple[Tensor, ...]:
        return self.mlp.gate_proj.weight.detach(), self.mlp.up_proj.weight.detach()

    def width(self, keep: float, multiple: int | None) -> ChannelWidth:
        return ChannelWidth.nearest(self.channels, keep, multiple)

    def narrow(self, reduction: Reduction, width: Width, transaction: Transaction) -> None:
        narrow_linear(self.mlp.gate_proj, reduction, transaction)
        narrow_linear(self.mlp.up_proj, reduction, transaction)
        if hasattr(self.mlp, "intermediate_size"):
            transaction.set_attribute(self.mlp, "intermediate_size", reduction.kept)

    def parameters_at(self, width: Width) -> int:
        biased = sum(getattr(self.mlp, n).bias is not None for n in ("gate_proj", "up_proj"))
        fixed = 0 if self.consumer.bias is None else self.consumer.bias.numel()
        return width.kept * (3 * self.consumer.out_features + biased) + fixed


@dataclass(frozen=True, eq=False)
class HeadSite(Site):
    """Query heads of grouped attention; dropping a whole group drops its key and value head too."""

    attention: Any
    config: Any

    def linears(self) -> dict[str, nn.Linear]:
        return {n: getattr(self.attention, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}

    def producers(self) -> tuple[Tensor, ...]:
        attention, head_dim = self.attention, self.attention.head_dim
        repeats = attention.num_key_value_groups

        def per_query_head(weight: Tensor) -> Tensor:
            heads = weight.detach().unflatten(0, (-1, head_dim))
            return heads.repeat_interleave(repeats, 0).flatten(0, 1)

        keys, values = attention.k_proj.weight, attention.v_proj.weight
        return (
            attention.q_proj.weight.detach(),
            per_query_head(keys),
            per_query_head(values),
        )

    def width(self, keep: float, multiple: int | None) -> HeadWidth:
        head_dim, queries = self.attention.head_dim, self.attention.num_key_value_groups
        groups = self.channels // (head_dim * queries)
        return HeadWidth.nearest(groups, queries, head_dim, keep, self._loads)

    def _loads(self, width: HeadWidth) -> bool:
        """Whether the configuration accepts it: Llama's wants heads to divide hidden_size."""
        validate = getattr(self.config, "validate_architecture", None)
        if validate is None:
            return True
        trial = copy.copy(self.config)
        trial.__dict__.update(_head_settings(width))
        try:
            trial.validate_architecture()
        except ValueError:
            return False
        return True

    def narrow(self, reduction: Reduction, width: Width, transaction: Transaction) -> None:
        if not isinstance(reduction, Selection) or not isinstance(width, HeadWidth):
            raise InputError("attention heads are narrowed by a selection of whole heads")
        attention = self.attention
        narrow_linear(attention.q_proj, reduction, transaction)
        groups = width.group_rows(reduction)
        narrow_linear(attention.k_proj, groups, transaction)
        narrow_linear(attention.v_proj, groups, transaction)
        transaction.set_attribute(attention, "num_key_value_groups", width.kept_queries)

    def parameters_at(self, width: Width) -> int:
        assert isinstance(width, HeadWidth)
        groups = width.kept_groups * width.head_dim
        rows = {"q_proj": width.kept, "k_proj": groups, "v_proj": groups}
        linears = self.linears()
        total = sum(
            n * (linears[k].in_features + (linears[k].bias is not None)) for k, n in rows.items()
        )
        fixed = 0 if self.consumer.bias is None else self.consumer.bias.numel()
        return total + width.kept * self.consumer.out_features + fixed


def _head_settings(width: HeadWidth) -> dict[str, int]:
    return {
        "num_attention_heads": width.kept_groups * width.kept_queries,
        "num_key_value_heads": width.kept_groups,
        "head_dim": width.head_dim,  # else it would be derived from hidden_size / heads
    }
