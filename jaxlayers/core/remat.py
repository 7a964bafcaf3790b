"""What the backward pass computes anew instead of keeping it: named policies, and the functions that apply them.

Selective recomputation is that of Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models,
MLSys 2023, section 5: attention's scores, softmax, dropout and product with the values are computed again, since they
take most of the memory and little of the time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is kept of a block for its backward pass.

    Attributes:
      meaning: in words.
      whole: the block runs under `jax.checkpoint`.
      saveable: which of its values `jax.checkpoint` keeps; `None` = its inputs alone.
      attention: the attentions in it keep no more than queries, keys, values and their biases.
    """

    meaning: str
    whole: bool = False
    saveable: Callable[..., Any] | None = None
    attention: bool = False


POLICIES: Mapping[str, Policy] = {
    "none": Policy("keep everything, recompute nothing"),
    "attention": Policy("recompute scores, softmax, attention dropout and the product with the values", attention=True),
    "dots": Policy(
        "keep the products with weights; recompute norms, activation functions, dropout and attention",
        whole=True,
        saveable=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
    "full": Policy("keep the inputs of each block, recompute the block", whole=True),
}
"""The names that `remat`, the `remat` field of models and a training run take, from most memory to least."""

# Part of the key of JAX's tracing caches: a jitted function is traced again under another value.
_recompute_attention = jax.make_user_context(False)


def policy(name: str | bool) -> Policy:
    """Return the policy of that name; `False` means "none" and `True` "full".

    Raises:
      ValueError: if there is none, with the names.
    """
    if isinstance(name, bool):
        name = "full" if name else "none"
    if name not in POLICIES:
        raise ValueError(f"remat={name!r} must be one of {list(POLICIES)}; set remat")
    return POLICIES[name]


def remat(fn: _F, name: str | bool, *, in_loop: bool = False) -> _F:
    """Return `fn`, a function of arrays, with what the policy says recomputed in its backward pass.

    The values are the same. Wrap each block of a model, not the model: a function recomputed in one piece needs at its
    backward pass all the memory that it saved.

    Args:
      fn: one block, or a whole model for "attention".
      name: a name of `POLICIES`, or a truth value.
      in_loop: the function is the body of a `jax.lax.scan`, which by itself keeps the compiler from merging the
        recomputation with the first computation.
    """
    return _wrap(fn, policy(name), jax.checkpoint, in_loop)


def remat_block(fn: Callable[..., Any], name: str | bool, *, in_loop: bool = False) -> Callable[..., Any]:
    """Return `remat` of a function whose first argument is a Linen module that it calls (it is lifted by Flax)."""
    return _wrap(fn, policy(name), nn.remat, in_loop)


def _wrap(fn: Any, chosen: Policy, checkpoint: Callable[..., Any], in_loop: bool) -> Any:
    if chosen.attention:

        @functools.wraps(fn)
        def under(*arguments: Any, **keywords: Any) -> Any:
            with _recompute_attention(True):
                return fn(*arguments, **keywords)

        return under
    return checkpoint(fn, policy=chosen.saveable, prevent_cse=not in_loop) if chosen.whole else fn


def attention(fn: Callable[..., Any], module: nn.Module, *arrays: Any) -> Any:
    """Return `fn(module, *arrays)`, the core of an attention, which the policy "attention" recomputes.

    Every layer with an attention calls its core by this: what comes after the projections of queries, keys and values
    and before the projection of the output. The boundary is a `jax.checkpoint` of its own, because names
    (`jax.ad_checkpoint.checkpoint_name`) cannot draw it: a policy that keeps everything but a named array keeps, just
    as large, the unnamed one that it was made of.

    Args:
      fn: takes the module, whose submodules without parameters (dropout) it may call, and the arrays.
      module: the layer.
      *arrays: arrays (or `None`) that gradients run through; they are what is kept.
    """
    return (nn.remat(fn) if _recompute_attention.value else fn)(module, *arrays)


def of_model(model: nn.Module, name: str | bool) -> tuple[nn.Module, Callable[[_F], _F]]:
    """Return the model with the policy set, and a wrapper for the function that applies it.

    A model with a field `remat`, its own or that of a module in one of its fields, recomputes block by block: the
    field is set, and the wrapper does nothing more. Any other model counts as one block, which the wrapper wraps (only
    "attention" and "dots" then lower the peak of memory). "none" leaves the model's own choice.

    Args:
      model: an unbound module; the copy has the same parameters.
      name: a name of `POLICIES`, or a truth value.

    Example:
      >>> from jaxlayers.core import remat
      >>> from jaxlayers.nn.feed_forward import FeedForward
      >>> model, wrapped = remat.of_model(FeedForward(8), "dots")
      >>> forward = wrapped(lambda params, x: model.apply({"params": params}, x))

    Raises:
      ValueError: if there is no such policy.
    """
    chosen = policy(name)
    if not (chosen.whole or chosen.attention):
        return model, lambda fn: fn
    configured = _set_field(model, name)
    if configured is None:
        return model, functools.partial(remat, name=name)
    return configured, lambda fn: fn


def _set_field(module: nn.Module, name: str | bool) -> nn.Module | None:
    """Return a copy with the field `remat` set wherever there is one, or `None` if there is none."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name, None)
        if field.name == "remat":
            changed["remat"] = name
        elif field.name != "parent" and isinstance(value, nn.Module):
            inner = _set_field(value, name)
            if inner is not None:
                changed[field.name] = inner
    return module.clone(**changed) if changed else None
