"""Train a small network on handwritten digits. Nothing of holdfast is imported; a trial is all that is handed in.

The state is plain numpy arrays: weights, the moments of Adam, and the order in which samples are shuffled. A run that was
killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

EPOCHS = 20
PASSES = 3  # over the training set, per epoch


def train(trial: Any) -> None:
    """Train one config for 20 epochs; report the validation loss and accuracy of each, with the state to continue from."""
    images, validation, labels, expected = digits()
    network, start = new_network(trial.config, trial.seed, images, labels), 0
    if trial.checkpoint:
        restore(network, trial.checkpoint.load())
        start = trial.checkpoint.step + 1
    for epoch in range(start, EPOCHS):
        for turn in range(PASSES):
            order = np.random.default_rng([trial.seed, epoch, turn]).permutation(len(images))
            network.partial_fit(images[order], labels[order])
        trial.report(measure(network, validation, expected), step=epoch, state=lambda: state_of(network))


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training images, validation images, training labels and validation labels."""
    images, labels = load_digits(return_X_y=True)
    return tuple(train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels))


def new_network(config: dict[str, Any], seed: int, images: np.ndarray, labels: np.ndarray) -> MLPClassifier:
    """Return a network with its arrays allocated and nothing learned but one small batch."""
    network = MLPClassifier(
        hidden_layer_sizes=(config["width"],) * config["layers"],
        activation=config["act"],
        alpha=config["alpha"],
        learning_rate_init=config["lr"],
        batch_size=16,
        shuffle=False,  # the order is ours, so that it can be resumed
        random_state=seed,
    )
    return network.partial_fit(images[:16], labels[:16], classes=np.arange(10))


def measure(network: MLPClassifier, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the mean log loss and the accuracy."""
    likely = network.predict_proba(images)
    chosen = np.clip(likely[np.arange(len(labels)), labels], 1e-12, None)
    return {"loss": float(-np.log(chosen).mean()), "accuracy": float((likely.argmax(axis=1) == labels).mean())}


def state_of(network: MLPClassifier) -> dict[str, Any]:
    """Return what the next epoch depends on."""
    adam = network._optimizer
    return {
        "weights": [array.copy() for array in network.coefs_ + network.intercepts_],
        "first_moments": [array.copy() for array in adam.ms],
        "second_moments": [array.copy() for array in adam.vs],
        "updates": adam.t,
        "samples": network.t_,
    }


def restore(network: MLPClassifier, state: dict[str, Any]) -> None:
    """Put a saved state into a new network of the same shape, in place: Adam holds references to the weights."""
    adam = network._optimizer
    for kept, saved in (
        (network.coefs_ + network.intercepts_, state["weights"]),
        (adam.ms, state["first_moments"]),
        (adam.vs, state["second_moments"]),
    ):
        for array, value in zip(kept, saved, strict=True):
            array[...] = value
    adam.t, network.t_ = state["updates"], state["samples"]
