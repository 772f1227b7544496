"""jaxchat: train a small ChatGPT from nothing, in JAX."""
