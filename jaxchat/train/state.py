"""The state that a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec as P

from jaxchat import sharding
from jaxchat.config import Model
from jaxchat.model import params as model_params
from jaxchat.model.params import Params


@struct.dataclass
class TrainState:
    step: jax.Array  # int32: finished steps
    empty_steps: jax.Array  # int32: steps in which no token was supervised, so no weight changed
    params: Params
    opt_state: Any  # state of the optax optimizer

    @property
    def rest(self) -> dict:
        """All fields but the weights, as {name: value}. A checkpoint stores the weights separately."""
        return {"step": self.step, "empty_steps": self.empty_steps, "opt_state": self.opt_state}


def fresh(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, optimizer.init(params))


def state_shardings(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Return a TrainState that holds the NamedSharding of each array instead of the array."""
    specs = model_params.specs(model.config)
    opt_state = jax.eval_shape(optimizer.init, model_params.shapes(model.config))
    opt_specs = sharding.optimizer_specs(opt_state, model_params.named(model.config))
    return sharding.named(model.mesh, TrainState(P(), P(), specs, opt_specs))


def abstract_state(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Return a TrainState of ShapeDtypeStructs with shardings, into which a checkpoint can be restored."""
    shapes = jax.eval_shape(lambda: fresh(model_params.init(jax.random.key(0), model.config), optimizer))
    return sharding.abstract(shapes, state_shardings(model, optimizer))


def init_state(seed: int, model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Create a TrainState with random weights, which depend on the seed but not on the mesh."""

    def make(key):
        return fresh(model_params.init(key, model.config), optimizer)

    return jax.jit(make, out_shardings=state_shardings(model, optimizer))(jax.random.key(seed))


def state_from_params(params: Params, model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Create a TrainState of step 0 with the given weights and fresh optimizer state. `params` is donated."""
    shardings = state_shardings(model, optimizer)
    return jax.jit(lambda p: fresh(p, optimizer), out_shardings=shardings, donate_argnums=0)(params)
