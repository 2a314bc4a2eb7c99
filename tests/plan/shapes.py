"""Fields of a model that several files of these tests build on."""

LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "positions": "rope",
    "linear_bias": False,
    "tied_embeddings": False,
}
