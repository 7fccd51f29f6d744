"""Train a small network on handwritten digits while a population tunes its learning rate, momentum and weight decay.

Nothing of holdfast is imported. What a population asks of a trainable: its state holds everything that another member may go
on from, and nothing of its config; what the config says is applied anew at each start.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

EPOCHS = 8  # as stopping.max_steps says
HIDDEN, BATCH = 32, 32


def train(trial: Any) -> None:
    """Train one member; report the validation loss and accuracy of each epoch, with the state to go on from."""
    images, validation, labels, expected = digits()
    start, weights, momenta = 0, new_weights(trial.seed, images.shape[1]), None
    if trial.checkpoint:  # its own, or that of a member that did better
        state = trial.checkpoint.load()
        start, weights, momenta = trial.checkpoint.step + 1, state["weights"], state["momenta"]
    weights = [array.copy() for array in weights]
    momenta = [np.zeros_like(array) for array in weights] if momenta is None else [array.copy() for array in momenta]
    for epoch in range(start, EPOCHS):
        order = np.random.default_rng([trial.seed, epoch]).permutation(len(images))
        for batch in np.array_split(order, len(order) // BATCH):
            descend(weights, momenta, images[batch], labels[batch], trial.config)
        trial.report(measure(weights, validation, expected), step=epoch, state=lambda: {"weights": weights, "momenta": momenta})


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training images, validation images, training labels and validation labels."""
    images, labels = load_digits(return_X_y=True)
    return tuple(train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels))


def new_weights(seed: int, inputs: int) -> list[np.ndarray]:
    """Return the weights and biases of a network with one hidden layer, drawn anew."""
    random = np.random.default_rng(seed)
    first = random.normal(0.0, np.sqrt(2.0 / inputs), (inputs, HIDDEN))
    return [first, np.zeros(HIDDEN), random.normal(0.0, np.sqrt(2.0 / HIDDEN), (HIDDEN, 10)), np.zeros(10)]


def forward(weights: list[np.ndarray], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what the hidden layer says, and the likelihood of each digit."""
    hidden = np.maximum(images @ weights[0] + weights[1], 0.0)
    scores = hidden @ weights[2] + weights[3]
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, likely / likely.sum(axis=1, keepdims=True)


def descend(
    weights: list[np.ndarray], momenta: list[np.ndarray], images: np.ndarray, labels: np.ndarray, config: dict[str, Any]
) -> None:
    """Do one step of gradient descent with momentum, in place."""
    hidden, likely = forward(weights, images)
    likely[np.arange(len(labels)), labels] -= 1.0
    likely /= len(labels)
    back = (likely @ weights[2].T) * (hidden > 0)
    gradients = [images.T @ back, back.sum(axis=0), hidden.T @ likely, likely.sum(axis=0)]
    for array, momentum, gradient in zip(weights, momenta, gradients, strict=True):
        momentum[...] = config["momentum"] * momentum - config["lr"] * (gradient + config["decay"] * array)
        array[...] = array + momentum


def measure(weights: list[np.ndarray], images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the mean log loss and the accuracy."""
    _, likely = forward(weights, images)
    chosen = np.clip(likely[np.arange(len(labels)), labels], 1e-12, None)
    return {"loss": float(-np.log(chosen).mean()), "accuracy": float((likely.argmax(axis=1) == labels).mean())}
