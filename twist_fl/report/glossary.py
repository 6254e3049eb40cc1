"""What the words of a report mean, in a sentence each, for who has never heard of TwIST."""

from __future__ import annotations

LOWER = "lower is better"
WORDS = {
    "Perplexity": f"how many tokens the model wavers between, on average, when it predicts the next one of a text that "
    f"it has never seen: {LOWER}, and 1 would be certainty.",
    "A block": "one attention head, or one slice of the neurons of a feed-forward layer.",
    "A divided layer": "a layer whose heads and neurons are cut into blocks, so that a smaller model can hold some of "
    "them and leave the others out; embeddings and all other layers are always whole.",
    "A ticket": "a smaller model made of some blocks of each divided layer, chosen at random, with the weights as they "
    "are: nothing is trained or tuned afterwards.",
    "κ (kappa)": "the share of a divided layer's blocks that a ticket holds; of 12 blocks, 4/12 is κ = 0.33.",
}
ALGORITHMS = {
    "twist": ("TwIST", "each worker trains a ticket of its own for some batches; then the server averages what workers "
              "share, puts the blocks together and draws new tickets."),
    "fedavg": ("FedAvg", "each worker trains the whole model for some batches; then the server averages the models."),
    "ddp": ("DDP", "workers share every batch: the server averages their gradients and takes one step (plain "
            "data-parallel training)."),
}  # fmt: skip
